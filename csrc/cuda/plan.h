// What planning a launch needs: no CUDA, so that the plans are also made on the host, by the CPU library
// for explain and the cost model, and by the tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LS_CONSTEXPR __host__ __device__ constexpr
#else
#define LS_CONSTEXPR constexpr
#endif

namespace latent_shift::cuda {

enum class DType : int32_t { kFloat, kBFloat16, kHalf, kDouble };

LS_CONSTEXPR int size_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

struct Limits {
  int arch;              // 80, 90, ...
  int shared_per_block;  // bytes a block may ask for
  int num_sms;
};

template <class Int>
LS_CONSTEXPR Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// The elementwise kernels walk frames in tiles of consecutive vectors (flat_frames.cuh).
constexpr int kFlatThreads = 256;
constexpr int kFlatVectors = 4;  // 64 bytes in flight a thread

// Elements of the accesses to frames that are `aligned` to 16 bytes or not, of `size` bytes each.
inline int flat_vector(int64_t frame_size, int size, bool aligned) {
  return aligned && frame_size * size % 16 == 0 ? 16 / size : 1;
}

inline int64_t flat_tiles(int64_t frame_size, int vector) {
  return ceil_div<int64_t>(frame_size, kFlatThreads * kFlatVectors * vector);
}

template <class Int>
LS_CONSTEXPR Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

}  // namespace latent_shift::cuda
