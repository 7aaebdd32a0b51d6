// Matrix products of a warp: operand fragments through ldmatrix, m16n8k16 with fp32 accumulation.
//
// Operands lie in shared memory as rows of 8 numbers (16 bytes), A by pixel and B by output channel,
// the k axis along the row; 8 rows that follow one another fill the 32 banks once.
#pragma once

#include "ptx.cuh"

namespace latent_shift::cuda {

constexpr int kRowBytes = 16;

// Which of the four 8x8 matrices of ldmatrix_x4 this lane addresses, and the row within it.
struct MatrixLane {
  int row, low, high;  // the matrix is 2 * high + low

  __device__ __forceinline__ explicit MatrixLane(int lane)
      : row(lane % 8), low(lane / 8 % 2), high(lane / 16) {}
};

// d[i][j] += a[i] * b[j] for kRows blocks of 16 rows and kColumns blocks of 8 columns, k = 16.
// `b_row` is this lane's row of the first pair of column blocks: row `high * 8 + row` of k chunk
// `low`.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void warp_product(float (&d)[kRows][kColumns][4],
                                             const uint32_t (&a)[kRows][4],
                                             const unsigned char* b_row) {
  static_assert(kColumns % 2 == 0);
#pragma unroll
  for (int j = 0; j < kColumns; j += 2) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, b_row + j * 8 * kRowBytes);
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      ptx::mma_m16n8k16<T>(d[i][j], a[i], left);
      ptx::mma_m16n8k16<T>(d[i][j + 1], a[i], right);
    }
  }
}

}  // namespace latent_shift::cuda
