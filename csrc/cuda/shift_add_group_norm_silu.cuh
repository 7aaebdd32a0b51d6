// shift_add_group_norm_silu, forward.
//
//   sum = [residual +] shift(x) [+ temb]
//   y = shift(silu(groupnorm(sum) * (1 + ada_scale) + ada_shift))
//
// x, residual, y, sum: (B*T, C, H, W), NCHW or channels_last; the shift is on x, or on y if
// shift_after; mean, rstd: (B*T, G).
//
// One block per frame and span of groups, or a cluster that shares them, holds its slab in shared
// memory from the one read to the one write: 4 bytes an element in 16 bits, 8 with a residual. A
// shift of x is the frame it is loaded from, a shift of y the frame it is stored to. Where no slab
// fits: partial moments of tiles, their merge, and a second read.
//
// Numerics: fp32 (fp64); the variance is of centred values, whose own mean corrects the mean, so that
// a constant group has exactly its value for mean; every order of summation is fixed, no atomics.
#pragma once

#include "launch.h"
#include "reduce.cuh"

namespace latent_shift::cuda {

enum class NormStage : int32_t { kWhole, kPartial, kApply };

struct NormArgs {
  NormShape shape;
  Shift shift;
  bool shift_before, shift_after;
  double eps;
  const void *x, *residual;
  NormTables tables;
  void *y, *sum, *mean, *rstd;
  void* workspace = nullptr;  // norm_workspace numbers of the type of mean
};

struct NormParams {
  NormTiling tiling;
  NormSizes sizes;
  Shift shift;
  NormStage stage;
  bool shift_before, shift_after;
  double eps;
  const void *x, *residual;
  NormTables tables;
  void *y, *sum, *mean, *rstd;
  void* moments;  // (frames, tiles of a span, groups, 2): mean and squared deviations
};

template <class T, int kChannels, int kPixels>
__global__ void __launch_bounds__(kNormThreads, 1)
    shift_add_group_norm_silu_kernel(const __grid_constant__ NormParams p) {
  using A = acc_t<T>;
  constexpr int N = kChannels * kPixels;
  struct Route {
    ReadingFrames<const T> from;
    TileStore<T> to;
  };
  const NormSizes& sizes = p.sizes;
  const NormTile<kChannels, kPixels> tile(p.tiling, sizes);
  const int64_t frame_size = sizes.frame_size;
  const int32_t rows = p.tiling.partial_rows, group_channels = sizes.group_channels;

  Carver shared{ptx::dynamic_shared()};
  Route& route = *shared.take_constant<Route>();
  T* slab = reinterpret_cast<T*>(shared.take<unsigned char>(p.tiling.slab_bytes));
  A* scratch = shared.take<A>(2 * rows * tile.channels);
  A* added = shared.take<A>(tile.channels);
  A* factor = shared.take<A>(tile.channels);
  A* term = shared.take<A>(tile.channels);
  A* mean = shared.take<A>(tile.groups);
  A* rstd = shared.take<A>(tile.groups);
  A* exchange = shared.take<A>(3 * tile.groups);

  const T* x = static_cast<const T*>(p.x);
  if (threadIdx.x == 0) {
    T* y = static_cast<T*>(p.y);
    route.from = {p.shift_before ? sources(p.shift, x, tile.frame, frame_size)
                                 : own_frame(x, tile.frame, frame_size),
                  {}};
    route.to = p.shift_after ? TileStore<T>::to_readers(p.shift, y, tile.frame, frame_size)
                             : TileStore<T>{own_frame(y, tile.frame, frame_size), {}, {}};
  }
  __syncthreads();

  // the slab: the sum as it is stored, or x alone
  Arrivals arrivals(tile.own_c() * tile.own_p());
  {
    if (!p.residual) {
      for (int32_t c = tile.lane_c; c < tile.units_c; c += tile.lanes_c) {
        const UnitFetch<T, kChannels, kPixels> fetch(route.from, sizes.slices, tile.channel(c), x);
#pragma unroll 4
        for (int32_t i = tile.lane_p; i < tile.units_p; i += tile.lanes_p) {
          fetch(slab + tile.slot(c, i), tile.at(c, i));
          arrivals.issued();
        }
      }
    } else {
      const T* residual = static_cast<const T*>(p.residual) + tile.frame * frame_size;
      T* sum = static_cast<T*>(p.sum) + tile.frame * frame_size;
      const int64_t row = row_offset(p.tables.temb, tile.frame, sizes.frames, sizes.channels);
      for (int32_t c = tile.lane_c; c < tile.units_c; c += tile.lanes_c) {
        A temb[kChannels];
#pragma unroll
        for (int j = 0; j < kChannels; ++j)
          temb[j] = read<A>(p.tables.temb, row + tile.channel(c) + j, 0);
        constexpr int kBatch = 2;  // vectors of each tensor in flight
        for (int32_t first = tile.lane_p; first < tile.units_p; first += kBatch * tile.lanes_p) {
          Vec<T, N> a[kBatch], b[kBatch];
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            const int32_t i = first + k * tile.lanes_p;
            if (i < tile.units_p) {
              a[k] = gather<T, N, kChannels>(route.from.first, sizes.slices, tile.channel(c),
                                             tile.at(c, i));
              b[k] = load<T, N>(residual + tile.at(c, i));
            }
          }
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            const int32_t i = first + k * tile.lanes_p;
            if (i < tile.units_p) {
              A u[N], v[N];
              widen(a[k], u);
              widen(b[k], v);
#pragma unroll
              for (int j = 0; j < N; ++j) u[j] = u[j] + v[j] + temb[kChannels == 1 ? 0 : j];
              const Vec<T, N> total = narrow<T, N>(u);
              store<T, N>(slab + tile.slot(c, i), total);
              store<T, N>(sum + tile.at(c, i), total);
            }
          }
        }
      }
    }
    arrivals.all_issued();
  }
  read_tables(p.tables, sizes, tile, added, factor, term);
  if (p.residual)  // the time embedding is in the slab
    for (int32_t i = threadIdx.x; i < tile.channels; i += blockDim.x) added[i] = 0;

  const int64_t statistic = tile.frame * sizes.groups + tile.first_group;
  if (p.stage == NormStage::kApply) {
    for (int32_t g = threadIdx.x; g < tile.groups; g += blockDim.x) {
      mean[g] = static_cast<const A*>(p.mean)[statistic + g];
      rstd[g] = static_cast<const A*>(p.rstd)[statistic + g];
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
  } else {
    const bool whole = p.stage == NormStage::kWhole;
    const A count = whole ? A(group_channels) * A(sizes.pixels)
                          : A(min(group_channels, tile.channels)) * A(tile.pixels());
    __syncthreads();  // the tables
    for_units_c(tile, [&](int32_t c, bool active) {
      A sum[kChannels] = {};
      if (active) {
        for (int32_t i = tile.lane_p; i < tile.units_p; i += tile.lanes_p) {
          arrivals.wait();
          A u[N];
          widen(load<T, N>(slab + tile.slot(c, i)), u);
#pragma unroll
          for (int j = 0; j < N; ++j) sum[kChannels == 1 ? 0 : j] += u[j];
        }
        const A pixels = A(tile.own_p() * kPixels);
#pragma unroll
        for (int j = 0; j < kChannels; ++j) sum[j] += pixels * added[c * kChannels + j];
      }
      put_partials(scratch, tile, c, active, sum);
    });
    sum_groups<1>(scratch, 0, rows, tile, group_channels, p.tiling.cluster, exchange,
                  [&](int32_t g, const A(&sum)[1]) { mean[g] = sum[0] / count; });
    for_units_c(tile, [&](int32_t c, bool active) {
      A squares[kChannels] = {}, offs[kChannels] = {};
      if (active) {
        A centre[kChannels];
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          const int32_t channel = c * kChannels + j;
          centre[j] = mean[channel / group_channels] - added[channel];
        }
#pragma unroll 4
        for (int32_t i = tile.lane_p; i < tile.units_p; i += tile.lanes_p) {
          A u[N];
          widen(load<T, N>(slab + tile.slot(c, i)), u);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const int k = kChannels == 1 ? 0 : j;
            const A off = u[j] - centre[k];
            offs[k] += off;
            squares[k] += off * off;
          }
        }
      }
      put_partials(scratch, tile, c, active, squares);
      put_partials(scratch + rows * tile.channels, tile, c, active, offs);
    });
    const A eps = static_cast<A>(p.eps);
    sum_groups<2>(scratch, rows * tile.channels, rows, tile, group_channels, p.tiling.cluster,
                  exchange + tile.groups, [&](int32_t g, const A(&sum)[2]) {
                    const A off = sum[1] / count, squares = sum[0] - sum[1] * off;
                    mean[g] += off;
                    rstd[g] = whole ? 1 / sqrt((squares < 0 ? 0 : squares) / count + eps) : squares;
                  });
    if (p.tiling.cluster > 1) ptx::cluster_arrive();  // the last read of another block's sums
    if (!whole) {
      const int64_t tiles = int64_t{p.tiling.tiles_c} * p.tiling.tiles_p;
      A* moments = static_cast<A*>(p.moments) +
                   2 * ((tile.frame * tiles + tile.index) * sizes.groups + tile.first_group);
      for (int32_t g = threadIdx.x; g < tile.groups; g += blockDim.x) {
        moments[2 * g] = mean[g];
        moments[2 * g + 1] = rstd[g];
      }
      return;
    }
    if (tile.index == 0)
      for (int32_t g = threadIdx.x; g < tile.groups; g += blockDim.x) {
        static_cast<A*>(p.mean)[statistic + g] = mean[g];
        static_cast<A*>(p.rstd)[statistic + g] = rstd[g];
      }
  }

  for (int32_t c = tile.lane_c; c < tile.units_c; c += tile.lanes_c) {
    A centre[kChannels], slope[kChannels], offset[kChannels];
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int32_t channel = c * kChannels + j, g = channel / group_channels;
      centre[j] = mean[g] - added[channel];
      slope[j] = rstd[g] * factor[channel];
      offset[j] = term[channel];
    }
    const UnitStore<T, kChannels, kPixels> store_unit(route.to, sizes.slices, tile.channel(c));
#pragma unroll 2
    for (int32_t i = tile.lane_p; i < tile.units_p; i += tile.lanes_p) {
      A u[N];
      widen(load<T, N>(slab + tile.slot(c, i)), u);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int k = kChannels == 1 ? 0 : j;
        const A z = (u[j] - centre[k]) * slope[k] + offset[k];
        u[j] = z * sigmoid<T>(z);
      }
      store_unit(tile.at(c, i), narrow<T, N>(u));
    }
  }
  if (p.tiling.cluster > 1) {
    __syncwarp();
    ptx::cluster_wait();
  }
}

// The merge of a split: one warp per frame and group.
struct MergeParams {
  NormTiling tiling;
  NormSizes sizes;
  double eps;
  const void* moments;
  void *mean, *rstd;
};

constexpr int kMergeThreads = 128;

template <class A>
__global__ void __launch_bounds__(kMergeThreads)
    merge_moments_kernel(const __grid_constant__ MergeParams p) {
  const int64_t statistic =
      int64_t{blockIdx.x} * (kMergeThreads / 32) + static_cast<int64_t>(threadIdx.x / 32);
  if (statistic >= p.sizes.frames * p.sizes.groups) return;
  const NormTiling& t = p.tiling;
  const int32_t lane = threadIdx.x % 32, tiles = t.tiles_c * t.tiles_p;
  const int64_t frame = statistic / p.sizes.groups, g = statistic - frame * p.sizes.groups;
  const A* moments = static_cast<const A*>(p.moments) + 2 * (frame * tiles * p.sizes.groups + g);
  const int32_t unit_c = t.channels_last ? t.stride_c : 1, unit_p = p.sizes.pixels / t.units_p;
  const auto count_of = [&](int32_t tile) {
    const int32_t tile_c = tile / t.tiles_p, tile_p = tile - tile_c * t.tiles_p;
    const int32_t channels =
        t.tiles_c == 1
            ? p.sizes.group_channels
            : min(t.tile_c, p.sizes.group_channels / unit_c - tile_c * t.tile_c) * unit_c;
    return A(channels) * A(min(t.tile_p, t.units_p - tile_p * t.tile_p) * unit_p);
  };
  const A count = A(p.sizes.group_channels) * A(p.sizes.pixels), first = moments[0];
  A sum = 0;
  for (int32_t tile = lane; tile < tiles; tile += 32)
    sum += count_of(tile) * (moments[2 * int64_t{tile} * p.sizes.groups] - first);
  const A mean = first + warp_sum(sum, 32) / count;
  A squares = 0;
  for (int32_t tile = lane; tile < tiles; tile += 32) {
    const A off = moments[2 * int64_t{tile} * p.sizes.groups] - mean;
    squares += moments[2 * int64_t{tile} * p.sizes.groups + 1] + count_of(tile) * off * off;
  }
  squares = warp_sum(squares, 32);
  if (lane == 0) {
    static_cast<A*>(p.mean)[statistic] = mean;
    static_cast<A*>(p.rstd)[statistic] =
        1 / sqrt((squares < 0 ? 0 : squares) / count + static_cast<A>(p.eps));
  }
}

namespace detail {

template <class T, int kChannels, int kPixels, class Launcher>
void launch_norm(Launcher& launcher, const NormArgs& args, const NormPlan& plan) {
  const NormShape& shape = args.shape;
  NormParams params{plan.tiling,
                    norm_sizes(shape, args.shift),
                    args.shift,
                    plan.split ? NormStage::kPartial : NormStage::kWhole,
                    args.shift_before,
                    args.shift_after,
                    args.eps,
                    args.x,
                    args.residual,
                    args.tables,
                    args.y,
                    args.sum,
                    args.mean,
                    args.rstd,
                    args.workspace};
  constexpr auto kernel = shift_add_group_norm_silu_kernel<T, kChannels, kPixels>;
  const Grid grid =
      grid_of(plan.blocks(shape.frames), plan.threads, plan.tiling.cluster, plan.shared);
  launcher.template launch<kernel>(grid, params);
  if (!plan.split) return;
  const MergeParams merge{plan.tiling,    params.sizes, args.eps,
                          args.workspace, args.mean,    args.rstd};
  const int64_t warps = shape.frames * shape.groups;
  launcher.template launch<merge_moments_kernel<acc_t<T>>>(
      grid_of(ceil_div<int64_t>(warps, kMergeThreads / 32), kMergeThreads), merge);
  params.stage = NormStage::kApply;
  if (args.residual) {  // the sum was stored
    params.x = args.sum;
    params.residual = nullptr;
    params.tables.temb = {};
    params.shift_before = false;
  }
  launcher.template launch<kernel>(grid, params);
}

template <class T, class Launcher>
void launch_norm_of(Launcher& launcher, const NormArgs& args, const NormPlan& plan) {
  constexpr int kVector = 16 / sizeof(T);
  if (plan.vector == 1) {
    launch_norm<T, 1, 1>(launcher, args, plan);
  } else if (plan.tiling.channels_last) {
    launch_norm<T, kVector, 1>(launcher, args, plan);
  } else {
    launch_norm<T, 1, kVector>(launcher, args, plan);
  }
}

}  // namespace detail

// With the plan of plan_norm_forward; the tensors are not empty.
template <class Launcher>
void shift_add_group_norm_silu(Launcher& launcher, const NormArgs& args, const NormPlan& plan) {
  check_frame_size(args.shape.channels, args.shape.pixels);
  switch (args.shape.dtype) {
    case DType::kFloat: return detail::launch_norm_of<float>(launcher, args, plan);
    case DType::kBFloat16: return detail::launch_norm_of<__nv_bfloat16>(launcher, args, plan);
    case DType::kHalf: return detail::launch_norm_of<__half>(launcher, args, plan);
    case DType::kDouble: return detail::launch_norm_of<double>(launcher, args, plan);
  }
}

}  // namespace latent_shift::cuda
