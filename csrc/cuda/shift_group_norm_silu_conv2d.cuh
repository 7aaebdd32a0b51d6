// shift_group_norm_silu_conv2d: normalised, activated and shifted input of a 3x3 convolution, made on
// the way into shared memory.
//
//   u = cat(x, skip)
//   a = [shift](silu(groupnorm([shift](u) + temb) * (1 + ada_scale) + ada_shift))
//   out = (residual + out_shift(conv2d(a, filter, padding 1) + filter_bias + out_temb)) * scale
//
// x, skip, residual, out: (N, C, H, W) in channels_last, bf16 or fp16; fp32 accumulation; channel
// counts are multiples of 8. Five launches on one stream, none of them with atomics:
//   1 statistics: sum and centred sum of squares per (frame, 256 pixels, channel), one read of u
//   2 fold: per (frame, group) the mean and rstd; per (frame, channel) the scale and shift of
//     z = u * scale + shift in which norm, tables and the placement of the shift are contained. The
//     convolution then only knows which frame a channel reads: zeros that enter before the norm have
//     a shift, zeros that enter after it have neither. A launch of its own, because a frame has up to
//     64 tiles and a CTA would spend longer on folding than on reading 2 KiB of the result.
//   3 pack: the filter as the stages the convolution streams
//   4 the convolution (_mma.cuh, _wgmma.cuh; _tile.cuh is common to both)
//   5 with `sums`: per (frame, channel) sum and centred sum of squares of out, from those of tiles
//
// Bytes: 2 E for the statistics, about 1.6 * 2 E for halos of which most hits L2, 2 O (4 O with a
// residual), and the filter once per two tiles, shared by a cluster; E and O the elements of input and
// output. The alternative is one launch of norm and activation (4 E) and the library's convolution
// (2 E + 2 O). What this saves over it is at most 20.4 / Cout of the convolution's time, and it has not
// been timed against it on a device: the composition serves unless LATENT_SHIFT_BACKEND=auto,fused.
#pragma once

#include <algorithm>
#include <iterator>

#include "launch.h"
#include "shift_group_norm_silu_conv2d_mma.cuh"
#include "shift_group_norm_silu_conv2d_wgmma.cuh"

namespace latent_shift::cuda {

// ---- 1: statistics -----------------------------------------------------------------------------

constexpr int kStatisticsChannels = 64;
constexpr int kStatisticsThreads = 256;

struct StatisticsParams {
  const void *x, *skip;
  float2* partials;  // [frames, pixel chunks, in_channels]: sum, centred sum of squares
  int32_t x_channels, in_channels, pixels, pixel_chunks, channel_blocks;
};

// A thread holds 8 channels of up to 8 pixels in registers: one read, an exact mean, then deviations.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads)
    conv_statistics_kernel(const __grid_constant__ StatisticsParams p) {
  constexpr int kVectors = kStatisticsChannels / kChunk;  // of a pixel
  constexpr int kLanes = kStatisticsThreads / kVectors;   // pixels at a time
  constexpr int kRows = kStatisticsPixels / kLanes;       // pixels of a thread
  constexpr int kWarps = kStatisticsThreads / 32;
  float* const partial = reinterpret_cast<float*>(ptx::dynamic_shared());  // [warps, channels]
  float* const means = partial + kWarps * kStatisticsChannels;

  int64_t index = blockIdx.x;
  const int channel_block = static_cast<int>(index % p.channel_blocks);
  index /= p.channel_blocks;
  const int chunk = static_cast<int>(index % p.pixel_chunks);
  const int64_t frame = index / p.pixel_chunks;
  const int thread = threadIdx.x, warp = thread / 32, vector = thread % kVectors;
  const int first = chunk * kStatisticsPixels + thread / kVectors;
  const int channel0 = channel_block * kStatisticsChannels, channel = channel0 + vector * kChunk;
  const int count = min(kStatisticsPixels, p.pixels - chunk * kStatisticsPixels);

  const bool in_x = channel < p.x_channels, exists = channel < p.in_channels;
  const int64_t stride = in_x ? p.x_channels : p.in_channels - p.x_channels;
  const T* from = static_cast<const T*>(in_x ? p.x : p.skip) + frame * p.pixels * stride +
                  (in_x ? channel : channel - p.x_channels);
  Vec<T, kChunk> held[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int pixel = first + i * kLanes;
    held[i] =
        exists && pixel < p.pixels ? load<T, kChunk>(from + pixel * stride) : Vec<T, kChunk>{};
  }

  // The block's sum of what a thread has for its 8 channels, in a fixed order.
  const auto total = [&](float (&v)[kChunk]) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      for (int mask = kVectors; mask < 32; mask *= 2)
        v[e] += __shfl_xor_sync(0xffffffffu, v[e], mask);
      if (thread % 32 < kVectors) partial[warp * kStatisticsChannels + vector * kChunk + e] = v[e];
    }
    __syncthreads();
    float sum = 0.f;
    if (thread < kStatisticsChannels) {
      for (int w = 0; w < kWarps; ++w) sum += partial[w * kStatisticsChannels + thread];
    }
    return sum;
  };

  float v[kChunk] = {}, x[kChunk];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    widen(held[i], x);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v[e] += x[e];
  }
  const float sum = total(v);
  if (thread < kStatisticsChannels) means[thread] = sum / count;
  __syncthreads();
  float mean[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    mean[e] = means[vector * kChunk + e];
    v[e] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (first + i * kLanes >= p.pixels) break;
    widen(held[i], x);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v[e] = fmaf(x[e] - mean[e], x[e] - mean[e], v[e]);
  }
  const float centred = total(v);
  if (thread < kStatisticsChannels && channel0 + thread < p.in_channels) {
    const int64_t row = frame * p.pixel_chunks + chunk;
    p.partials[row * p.in_channels + channel0 + thread] = {sum, centred};
  }
}

// ---- 2: fold -----------------------------------------------------------------------------------

constexpr int kFoldThreads = 128;

struct FoldParams {
  const float2* partials;
  Table temb, weight, bias, ada_scale, ada_shift;
  float *mean, *rstd;  // [frames, groups]
  float* affine;       // [frames, 2, in_channels]
  Shift shift;
  int64_t frames;
  int32_t groups, in_channels, pixels, pixel_chunks;
  float eps;
  bool shift_after;
};

// One warp per (frame, group).
__global__ void __launch_bounds__(kFoldThreads)
    conv_fold_kernel(const __grid_constant__ FoldParams p) {
  const int64_t unit = blockIdx.x * int64_t{kFoldThreads / 32} + threadIdx.x / 32;
  if (unit >= p.frames * p.groups) return;
  const int64_t n = unit / p.groups;
  const int lane = threadIdx.x % 32;
  const int32_t size = p.in_channels / p.groups,
                channel0 = static_cast<int32_t>(unit % p.groups) * size;
  const Clip clip = clip_of(p.shift, n);
  const auto table = [&](const Table& t, int32_t channel, float absent) {
    return read(t, row_offset(t, n, p.frames, p.in_channels) + channel, absent);
  };
  const auto warp_sum = [](float v) {
    for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
    return v;
  };
  // Every (channel, pixel chunk) of the group as count, sum and centred sum of squares.
  const auto each_partial = [&](auto&& use) {
    for (int32_t i = lane; i < size * p.pixel_chunks; i += 32) {
      const int32_t channel = channel0 + i % size, chunk = i / size;
      const int32_t offset = p.shift_after ? 0 : p.shift.offset[slice_of(p.shift, channel)];
      const int64_t from = source_frame(p.shift, clip, n, offset);
      float2 part{0.f, 0.f};
      if (from >= 0) part = p.partials[(from * p.pixel_chunks + chunk) * p.in_channels + channel];
      const float count =
          static_cast<float>(min(kStatisticsPixels, p.pixels - chunk * kStatisticsPixels));
      use(count, fmaf(count, table(p.temb, channel, 0.f), part.x), part.y);
    }
  };

  const float total = static_cast<float>(size) * static_cast<float>(p.pixels);
  float sum = 0.f, centred = 0.f;
  each_partial([&](float, float part, float) { sum += part; });
  const float mean = warp_sum(sum) / total;
  each_partial([&](float count, float part, float squares) {
    const float d = part / count - mean;
    centred += fmaf(d * d, count, squares);
  });
  const float rstd = rsqrtf(warp_sum(centred) / total + p.eps);
  if (lane == 0) {
    p.mean[unit] = mean;
    p.rstd[unit] = rstd;
  }

  for (int32_t channel = channel0 + lane; channel < channel0 + size; channel += 32) {
    const float gain = rstd * table(p.weight, channel, 1.f);
    const float ada = 1.f + table(p.ada_scale, channel, 0.f);
    const float scale = gain * ada;
    const float shift =
        fmaf(fmaf(table(p.temb, channel, 0.f) - mean, gain, table(p.bias, channel, 0.f)), ada,
             table(p.ada_shift, channel, 0.f));
    const auto put = [&](int64_t frame, float a, float b) {
      float* row = p.affine + frame * 2 * p.in_channels + channel;
      row[0] = a;
      row[p.in_channels] = b;
    };
    if (!p.shift_after) {
      put(n, scale, shift);
      continue;
    }
    const int32_t offset = p.shift.offset[slice_of(p.shift, channel)];
    const Readers readers = reader_frames(p.shift, clip, n, offset);
    if (readers.first >= 0) put(readers.first, scale, shift);
    if (readers.second >= 0) put(readers.second, scale, shift);
    if (source_frame(p.shift, clip, n, offset) < 0) put(n, 0.f, 0.f);
  }
}

// ---- 3: pack -----------------------------------------------------------------------------------

constexpr int kPackThreads = 256;

struct PackParams {
  const void* filter;  // (out_channels, in_channels, 3, 3) with any strides
  void* packed;        // [column blocks, blocks, taps, kBlockChunks, columns, kChunk], zero-padded
  int64_t strides[4];
  int32_t in_channels, out_channels, columns, column_blocks, blocks;
};

// 16 bytes a thread; taps vary fastest, then input channels, as in a contiguous filter.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    conv_pack_kernel(const __grid_constant__ PackParams p) {
  int64_t index = blockIdx.x * int64_t{kPackThreads} + threadIdx.x;
  const int tap = static_cast<int>(index % kTaps);
  index /= kTaps;
  const int32_t chunks = p.blocks * kBlockChunks;
  const int32_t chunk = static_cast<int32_t>(index % chunks);
  const int64_t row = index / chunks;
  if (row >= int64_t{p.column_blocks} * p.columns) return;
  Vec<T, kChunk> v{};
  const int32_t channel = chunk * kChunk;
  if (row < p.out_channels && channel < p.in_channels) {
    const T* from = static_cast<const T*>(p.filter) + row * p.strides[0] + channel * p.strides[1] +
                    tap / 3 * p.strides[2] + tap % 3 * p.strides[3];
    T lanes[kChunk];
#pragma unroll
    for (int e = 0; e < kChunk; ++e) lanes[e] = from[e * p.strides[1]];
    v.pack(lanes);
  }
  const int64_t stage = (row / p.columns * p.blocks + chunk / kBlockChunks) * kTaps + tap;
  const int64_t to = (stage * kBlockChunks + chunk % kBlockChunks) * p.columns + row % p.columns;
  store(static_cast<T*>(p.packed) + to * kChunk, v);
}

// ---- 5: sums of the output ---------------------------------------------------------------------

constexpr int kSumsThreads = 128;

struct SumsParams {
  const float2* partials;  // [frames, tiles per frame, channels]
  float2* sums;            // [frames, channels]: sum, centred sum of squares
  int64_t frames;
  int32_t channels, height, width, tiles_x, tiles_per_frame;
};

__global__ void __launch_bounds__(kSumsThreads)
    conv_sums_kernel(const __grid_constant__ SumsParams p) {
  const int64_t unit = blockIdx.x * int64_t{kSumsThreads} + threadIdx.x;
  if (unit >= p.frames * p.channels) return;
  const float2* from =
      p.partials + unit / p.channels * p.tiles_per_frame * p.channels + unit % p.channels;
  float sum = 0.f, centred = 0.f;
  for (int tile = 0; tile < p.tiles_per_frame; ++tile) sum += from[int64_t{tile} * p.channels].x;
  const float mean = sum / (static_cast<float>(p.height) * static_cast<float>(p.width));
  for (int tile = 0; tile < p.tiles_per_frame; ++tile) {
    const float2 part = from[int64_t{tile} * p.channels];
    const int rows = min(kTile, p.height - tile / p.tiles_x * kTile);
    const int columns = min(kTile, p.width - tile % p.tiles_x * kTile);
    const float count = static_cast<float>(rows * columns), d = part.x / count - mean;
    centred += fmaf(d * d, count, part.y);
  }
  p.sums[unit] = {sum, centred};
}

// ---- planning ----------------------------------------------------------------------------------

struct ConvArgs {
  ConvShape shape;
  DType dtype;  // of x, skip, filter, residual and out
  const void *x, *skip, *filter, *residual;
  Table temb, weight, bias, ada_scale, ada_shift, filter_bias, out_temb;
  Shift shift, out_shift;
  bool shift_after;
  int64_t filter_strides[4];
  float eps, scale;
  void *out, *workspace;  // the plan's workspace_bytes, aligned to 256
  float *mean, *rstd;     // [frames, groups]
  float* sums;            // [frames, out_channels, 2], or null unless shape.sums
};

// The kernels of kConvVariants, in that order.
template <class Launcher, class T>
struct ConvKernels {
  using Launch = void (*)(Launcher&, const Grid&, const ConvParams&);

  template <auto Kernel>
  static void launch(Launcher& launcher, const Grid& grid, const ConvParams& params) {
    launcher.template launch<Kernel>(grid, params);
  }

  static constexpr Launch kTable[] = {launch<shift_group_norm_silu_conv2d_mma_kernel<T, 64>>,
                                      launch<shift_group_norm_silu_conv2d_mma_kernel<T, 128>>,
                                      launch<shift_group_norm_silu_conv2d_mma_kernel<T, 160>>,
                                      launch<shift_group_norm_silu_conv2d_wgmma_kernel<T, 64>>,
                                      launch<shift_group_norm_silu_conv2d_wgmma_kernel<T, 80>>,
                                      launch<shift_group_norm_silu_conv2d_wgmma_kernel<T, 128>>,
                                      launch<shift_group_norm_silu_conv2d_wgmma_kernel<T, 160>>,
                                      launch<shift_group_norm_silu_conv2d_wgmma_kernel<T, 320>>};
  static_assert(std::size(kTable) == kConvVariants.size());
};

// ---- launches ----------------------------------------------------------------------------------

template <class T, class Launcher>
void launch_conv(Launcher& launcher, const ConvArgs& a, const ConvPlan& plan) {
  const ConvVariant& v = kConvVariants[plan.variant];
  const auto narrowed = [](int64_t n) { return static_cast<int32_t>(n); };
  unsigned char* const workspace = static_cast<unsigned char*>(a.workspace);
  const int64_t in_channels = a.shape.x_channels + a.shape.skip_channels,
                pixels = a.shape.height * a.shape.width;

  StatisticsParams statistics{};
  statistics.x = a.x;
  statistics.skip = a.skip;
  statistics.partials = reinterpret_cast<float2*>(workspace + plan.statistics);
  statistics.x_channels = narrowed(a.shape.x_channels);
  statistics.in_channels = narrowed(in_channels);
  statistics.pixels = narrowed(pixels);
  statistics.pixel_chunks = narrowed(plan.pixel_chunks);
  statistics.channel_blocks = narrowed(ceil_div<int64_t>(in_channels, kStatisticsChannels));
  constexpr size_t kStatisticsShared = (kStatisticsThreads / 32 + 1) * kStatisticsChannels * 4;
  launcher.template launch<conv_statistics_kernel<T>>(
      grid_of(a.shape.frames * plan.pixel_chunks * statistics.channel_blocks, kStatisticsThreads, 1,
              kStatisticsShared),
      statistics);

  FoldParams fold{};
  fold.partials = statistics.partials;
  fold.temb = a.temb;
  fold.weight = a.weight;
  fold.bias = a.bias;
  fold.ada_scale = a.ada_scale;
  fold.ada_shift = a.ada_shift;
  fold.mean = a.mean;
  fold.rstd = a.rstd;
  fold.affine = reinterpret_cast<float*>(workspace + plan.affine);
  fold.shift = a.shift;
  fold.frames = a.shape.frames;
  fold.groups = narrowed(a.shape.groups);
  fold.in_channels = narrowed(in_channels);
  fold.pixels = narrowed(pixels);
  fold.pixel_chunks = narrowed(plan.pixel_chunks);
  fold.eps = a.eps;
  fold.shift_after = a.shift_after;
  launcher.template launch<conv_fold_kernel>(
      grid_of(ceil_div<int64_t>(a.shape.frames * a.shape.groups, kFoldThreads / 32), kFoldThreads),
      fold);

  PackParams pack{};
  pack.filter = a.filter;
  pack.packed = workspace + plan.filters;
  std::copy(std::begin(a.filter_strides), std::end(a.filter_strides), pack.strides);
  pack.in_channels = narrowed(in_channels);
  pack.out_channels = narrowed(a.shape.out_channels);
  pack.columns = v.columns;
  pack.column_blocks = narrowed(plan.cta_columns);
  pack.blocks = narrowed(plan.blocks);
  const int64_t vectors = plan.cta_columns * v.columns * plan.blocks * kBlockChunks * kTaps;
  launcher.template launch<conv_pack_kernel<T>>(
      grid_of(ceil_div<int64_t>(vectors, kPackThreads), kPackThreads), pack);

  ConvParams conv{};
  conv.x = a.x;
  conv.skip = a.skip;
  conv.affine = fold.affine;
  conv.filters = pack.packed;
  conv.residual = a.residual;
  conv.out = a.out;
  conv.partials = a.shape.sums ? reinterpret_cast<float*>(workspace + plan.partials) : nullptr;
  conv.filter_bias = a.filter_bias;
  conv.out_temb = a.out_temb;
  conv.shift = a.shift;
  conv.out_shift = a.out_shift;
  conv.frames = narrowed(a.shape.frames);
  conv.height = narrowed(a.shape.height);
  conv.width = narrowed(a.shape.width);
  conv.x_channels = narrowed(a.shape.x_channels);
  conv.in_channels = narrowed(in_channels);
  conv.out_channels = narrowed(a.shape.out_channels);
  conv.tiles_x = narrowed(ceil_div<int64_t>(a.shape.width, kTile));
  conv.tiles_per_frame = narrowed(plan.tiles / a.shape.frames);
  conv.tiles = narrowed(plan.tiles);
  conv.blocks = narrowed(plan.blocks);
  conv.out_scale = a.scale;
  Grid grid = grid_of(plan.ctas, v.threads, plan.cluster, v.shared);
  grid.blocks.y = static_cast<unsigned>(plan.cta_columns);
  ConvKernels<Launcher, T>::kTable[plan.variant](launcher, grid, conv);

  if (!a.shape.sums) return;
  SumsParams sums{};
  sums.partials = reinterpret_cast<const float2*>(conv.partials);
  sums.sums = reinterpret_cast<float2*>(a.sums);
  sums.frames = a.shape.frames;
  sums.channels = conv.out_channels;
  sums.height = conv.height;
  sums.width = conv.width;
  sums.tiles_x = conv.tiles_x;
  sums.tiles_per_frame = conv.tiles_per_frame;
  launcher.template launch<conv_sums_kernel>(
      grid_of(ceil_div<int64_t>(a.shape.frames * a.shape.out_channels, kSumsThreads), kSumsThreads),
      sums);
}

template <class Launcher>
void shift_group_norm_silu_conv2d(Launcher& launcher, const ConvArgs& a, const ConvPlan& plan) {
  if (a.dtype == DType::kHalf)
    launch_conv<__half>(launcher, a, plan);
  else
    launch_conv<__nv_bfloat16>(launcher, a, plan);
}

}  // namespace latent_shift::cuda
