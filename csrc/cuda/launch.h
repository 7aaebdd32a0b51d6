// How kernels are launched: what the device offers, the grid, and the launcher of the shipped
// library. The host executor of the tests has a launcher with the same interface, so an operator's
// planning and its sequence of launches are one template that both run.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace latent_shift::cuda {

struct Grid {
  dim3 blocks, threads;
  unsigned cluster = 1;  // blocks per cluster, a divisor of blocks.x
  size_t shared = 0;     // bytes of dynamic shared memory
};

// A one-dimensional grid; a launch holds fewer than 2^31 blocks.
inline Grid grid_of(int64_t blocks, int threads, unsigned cluster = 1, size_t shared = 0) {
  if (blocks >= int64_t{1} << 31)
    throw std::runtime_error("the tensor needs " + std::to_string(blocks) +
                             " blocks, a launch holds fewer than 2^31");
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), cluster,
          shared};
}

// Offsets inside a frame are 32 bits.
inline void check_frame_size(int64_t channels, int64_t pixels) {
  if (channels * pixels >= int64_t{1} << 31)
    throw std::runtime_error("a frame holds fewer than 2^31 elements, got " +
                             std::to_string(channels * pixels));
}

#ifdef __CUDACC__

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error of a launch must not show in a later call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

static __global__ void architecture_probe() {}

// The architecture to plan for: the current device's, or what its code was compiled for where that is
// PTX from before clusters, whose functions trap.
inline int architecture_of(int device) {
  const int own = device_attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                  device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (own < 90) return own;
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, architecture_probe), "cudaFuncGetAttributes");
  return code.ptxVersion < 90 ? code.ptxVersion : own;
}

// Asked anew at every call: a process may use devices of several kinds.
inline Limits limits_of(int device) {
  return {architecture_of(device),
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          device_attribute(cudaDevAttrMultiProcessorCount, device)};
}

// Launches on one stream of the current device. Never synchronises, so it may be captured.
class CudaLauncher {
 public:
  CudaLauncher(cudaStream_t stream, int device)
      : stream(stream), limits(limits_of(device)), device_(device) {}

  template <auto Kernel, class Params>
  void launch(const Grid& grid, const Params& params) const {
    if (grid.shared > 0) allow_shared<Kernel>();
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared;
    config.stream = stream;
    cudaLaunchAttribute cluster{};
    if (grid.cluster > 1) {
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {grid.cluster, 1, 1};
      config.attrs = &cluster;
      config.numAttrs = 1;
    }
    check_cuda(cudaLaunchKernelEx(&config, Kernel, params), "kernel launch");
  }

  const cudaStream_t stream;
  const Limits limits;

 private:
  // Once per kernel and device; two threads that meet here set the same values.
  template <auto Kernel>
  void allow_shared() const {
    constexpr int kDevices = 64;
    static bool allowed[kDevices] = {};
    const bool remember = device_ < kDevices;
    if (remember && __atomic_load_n(&allowed[device_], __ATOMIC_ACQUIRE)) return;
    const void* kernel = reinterpret_cast<const void*>(Kernel);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    limits.shared_per_block),
               "cudaFuncSetAttribute");
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "cudaFuncSetAttribute");
    if (remember) __atomic_store_n(&allowed[device_], true, __ATOMIC_RELEASE);
  }

  const int device_;
};

#endif  // __CUDACC__

}  // namespace latent_shift::cuda
