// Correct kernels, one for every feature of the executor.
#include "../../csrc/cuda/ptx.cuh"
#include "bindings.h"

namespace latent_shift::cuda {
namespace {

struct ReduceParams {
  const float* x;
  float* y;
  int64_t row;
};

// y[block] = sum of a row: strided loads, shuffles, shared memory.
__global__ void __launch_bounds__(256) row_sum_kernel(const __grid_constant__ ReduceParams p) {
  auto* partial = reinterpret_cast<float*>(ptx::dynamic_shared());
  float sum = 0;
  for (int64_t i = threadIdx.x; i < p.row; i += blockDim.x) sum += p.x[blockIdx.x * p.row + i];
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned int warp = 1; warp < blockDim.x / 32; ++warp) sum += partial[warp];
    p.y[blockIdx.x] = sum;
  }
}

void row_sum(uintptr_t x, uintptr_t y, int64_t rows, int64_t row, int threads) {
  host::HostLauncher().launch<row_sum_kernel>(
      grid_of(rows, threads, 1, threads / 32 * sizeof(float)),
      ReduceParams{host::pointer<float>(x), host::pointer<float>(y), row});
}

}  // namespace

LS_HOST_BINDINGS(features) { m.def("row_sum", row_sum); }

}  // namespace latent_shift::cuda
