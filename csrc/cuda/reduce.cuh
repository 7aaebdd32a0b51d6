// Sums over a tile in one fixed order: over a thread's vectors, over the threads that share a
// channel, over the channels of a group, over the blocks of a cluster.
#pragma once

#include "norm_tile.cuh"

namespace latent_shift::cuda {

template <class A>
LS_DEVICE A warp_sum(A x, int32_t lanes) {
  for (int32_t step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// Leaves a thread's sums of the channels of unit `c` in scratch, (partial_rows, channels). Threads
// that share a channel in one warp (NCHW) add up first.
template <class A, int kChannels, int kPixels>
LS_DEVICE void put_partials(A* scratch, const NormTile<kChannels, kPixels>& tile, int32_t c,
                            bool active, const A (&sum)[kChannels]) {
  int32_t row = tile.lane_p;
  A values[kChannels];
#pragma unroll
  for (int j = 0; j < kChannels; ++j) values[j] = sum[j];
  if (kChannels == 1 && !tile.channels_last) {
    const int32_t lanes = min(tile.lanes_p, 32);
    values[0] = warp_sum(values[0], lanes);
    active = active && tile.lane_p % lanes == 0;
    row = tile.lane_p / lanes;
  }
  if (!active) return;
#pragma unroll
  for (int j = 0; j < kChannels; ++j) scratch[row * tile.channels + c * kChannels + j] = values[j];
}

// The sum of a channel of the tile over the rows of scratch.
template <class A>
LS_DEVICE A channel_sum(const A* scratch, int32_t channels, int32_t rows, int32_t channel) {
  A sum = 0;
  for (int32_t row = 0; row < rows; ++row) sum += scratch[row * channels + channel];
  return sum;
}

// finish(g, sums) with the sums of the tile's values of group g, or with a cluster of all its blocks'
// values. Each of kSums sets of values is (rows, channels) in shared memory, `stride` apart;
// `exchange` holds kSums numbers per group. Begins and ends with a barrier.
template <int kSums, class A, class Tile, class Finish>
LS_DEVICE void sum_groups(const A* values, int32_t stride, int32_t rows, const Tile& tile,
                          int32_t group_channels, int32_t cluster, A* exchange, Finish finish) {
  __syncthreads();
  const int32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int32_t width = min(group_channels, tile.channels);  // a tile may hold part of one group
  const int32_t step_rows = 32 / width, step_channels = 32 - step_rows * width;
  for (int32_t g = threadIdx.x / 32; g < tile.groups; g += warps) {
    A sum[kSums] = {};
    int32_t row = lane / width, channel = lane - row * width;
    while (row < rows) {
#pragma unroll
      for (int k = 0; k < kSums; ++k)
        sum[k] += values[k * stride + row * tile.channels + g * width + channel];
      row += step_rows;
      channel += step_channels;
      if (channel >= width) {
        channel -= width;
        ++row;
      }
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) sum[k] = warp_sum(sum[k], 32);
    if (lane == 0) {
      if (cluster > 1) {
#pragma unroll
        for (int k = 0; k < kSums; ++k) exchange[g * kSums + k] = sum[k];
      } else {
        finish(g, sum);
      }
    }
  }
  if (cluster > 1) {
    ptx::cluster_sync();
    for (int32_t g = threadIdx.x; g < tile.groups; g += blockDim.x) {
      A sum[kSums] = {};
      for (int32_t rank = 0; rank < cluster; ++rank) {
        const A* theirs = ptx::cluster_map(exchange, rank);
#pragma unroll
        for (int k = 0; k < kSums; ++k) sum[k] += theirs[g * kSums + k];
      }
      finish(g, sum);
    }
  }
  __syncthreads();
}

}  // namespace latent_shift::cuda
