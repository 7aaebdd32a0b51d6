// The convolution for sm_80 and later: mma.sync on a transformed halo.
//
// A CTA of 8 warps computes 2 tiles x Columns output channels: 4 warps in the direction of pixels, 2
// in that of channels, 32 x Columns / 2 each. Halos are double-buffered, 32 input channels at a time:
// the threads of a tile copy the raw numbers of the next block to their places when a block begins
// (cp.async), and each turns its own into the activation a few taps later, so that no registers wait.
// The filter comes through a ring of cp.async stages, one tap of one block each, read by ldmatrix
// without bank conflicts. One __syncthreads a tap.
#pragma once

#include "mma.cuh"
#include "shift_group_norm_silu_conv2d_tile.cuh"

namespace latent_shift::cuda {

template <class T, int Columns>
__global__ void __launch_bounds__(ConvMma<Columns>::kThreads, ConvMma<Columns>::kCtasPerSm)
    shift_group_norm_silu_conv2d_mma_kernel(const __grid_constant__ ConvParams p) {
  using Traits = ConvMma<Columns>;
  using TileEpilogue = Epilogue<T, Traits::kPart, Traits::kPart>;
  static_assert(kCtaTiles * sizeof(TileTable) <= Traits::kHalosAt);
  constexpr int kPixelBlocks = 2, kColumnBlocks = Traits::kWarpColumns / 8;
  unsigned char* const shared = ptx::dynamic_shared();
  unsigned char* const halos = shared + Traits::kHalosAt;
  unsigned char* const ring = halos + Traits::kHalosBytes;

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int cta_tile = warp / 4, pixel0 = warp / 2 % 2 * 32,
            column0 = warp % 2 * Traits::kWarpColumns;
  TileTable& table = reinterpret_cast<TileTable*>(shared)[cta_tile];
  table.fill(p, Tile(p, blockIdx.x * kCtaTiles + cta_tile), thread % kTileThreads, kTileThreads);
  __syncthreads();
  const HaloLoader<T, kTileThreads, 1> loader(p, table, thread % kTileThreads);
  const auto halo = [&](int block) {
    return halos + (block % 2 * kCtaTiles + cta_tile) * kHaloBytes;
  };

  const int steps = p.blocks * kTaps;
  // this thread's 16 bytes of the next stage to load
  const unsigned char* filters = static_cast<const unsigned char*>(p.filters) +
                                 int64_t{blockIdx.y} * steps * Traits::kStageBytes +
                                 thread * kVectorBytes;
  const auto load_filter = [&](int step) {
    if (step < steps) {
      unsigned char* const stage =
          ring + step % Traits::kStages * Traits::kStageBytes + thread * kVectorBytes;
#pragma unroll
      for (int i = 0; i < Traits::kStageBytes; i += Traits::kThreads * kVectorBytes) {
        if (i + thread * kVectorBytes < Traits::kStageBytes)
          ptx::cp_async_16(stage + i, filters + i, true);
      }
      filters += Traits::kStageBytes;
    }
    ptx::cp_async_commit();
  };

  loader.copy(0, halo(0));
  ptx::cp_async_commit();
  for (int step = 0; step < Traits::kStages - 1; ++step) load_filter(step);
  ptx::cp_async_wait<Traits::kStages - 1>();
  loader.activate(0, halo(0));

  // Where this lane's rows of ldmatrix begin: A by pixel of the halo, B by output channel.
  const MatrixLane at(lane);
  const int a_row = (at.high * kHaloPitch + (pixel0 / kTile + at.low) * kHalo + at.row) * kRowBytes;
  const int b_row = (at.low * Columns + column0 + at.high * 8 + at.row) * kRowBytes;

  float sums[kPixelBlocks][kColumnBlocks][4] = {};
  for (int block = 0, step = 0; block < p.blocks; ++block) {
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap, ++step) {
      ptx::cp_async_wait<Traits::kStages - 2>();
      __syncthreads();
      const bool more = block + 1 < p.blocks;
      if (more && tap == 0) loader.copy(block + 1, halo(block + 1));
      load_filter(step + Traits::kStages - 1);
      const unsigned char* a_base = halo(block) + a_row + tap_offset(tap);
      const unsigned char* b_base = ring + step % Traits::kStages * Traits::kStageBytes + b_row;
#pragma unroll
      for (int k = 0; k < kBlockChunks; k += 2) {
        uint32_t a[kPixelBlocks][4];
#pragma unroll
        for (int i = 0; i < kPixelBlocks; ++i)
          ptx::ldmatrix_x4(a[i], a_base + (k * kHaloPitch + 2 * i * kHalo) * kRowBytes);
        warp_product<T>(sums, a, b_base + k * Columns * kRowBytes);
      }
      if (more && tap == Traits::kActivateTap) loader.activate(block + 1, halo(block + 1));
    }
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // the epilogue reuses the shared memory of the main loop
  const TileEpilogue epilogue(p, table, thread % kTileThreads, 1 + cta_tile,
                              halos + cta_tile * TileEpilogue::kBytes);
#pragma unroll
  for (int part = 0; part < Columns; part += Traits::kPart) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
      const int column = column0 + j * 8 - part;
      if (column < 0 || column >= Traits::kPart) continue;
#pragma unroll
      for (int i = 0; i < kPixelBlocks; ++i)
        epilogue.put(pixel0 + i * 16, column, sums[i][j], lane);
    }
    epilogue.store_part(0, blockIdx.y * Columns + part);
  }
}

}  // namespace latent_shift::cuda
