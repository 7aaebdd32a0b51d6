// shift_add_group_norm_silu, backward.
//
//   dz = dy' silu'(z),  dxhat = dz * weight * (1 + ada_scale),  dy' the adjoint shift of dy or dy
//   ds = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) * rstd [+ dsum]
//   dx = adjoint shift of ds, or ds
//
// Blocks and stages are those of the forward; a block holds x and dy in shared memory from their one
// read to the one write, 6 bytes an element in 16 bits, and computes z twice rather than keep it.
// The reverse shift is the frame that ds is stored to. Where the replicate boundary makes two
// gradients meet, that shift waits for all of ds and is a launch of its own.
//
// The gradients of all parameters follow from the sums of dz and dz * xhat (and of ds for the time
// embedding) per frame, tile and channel, which a last launch adds up in a fixed order.
#pragma once

#include "launch.h"
#include "reduce.cuh"
#include "shift_add_group_norm_silu.cuh"
#include "temporal_shift.cuh"

namespace latent_shift::cuda {

struct NormGradient {
  void* data = nullptr;  // null where the parameter is absent
  DType dtype = DType::kFloat;
  int64_t rows = 1;
};

struct NormBackwardArgs {
  NormShape shape;
  Shift shift;
  bool shift_before, shift_after;
  bool is_sum;  // x is shift(x) + residual + temb
  const void *dy, *dsum, *x;
  NormTables tables;
  const void *mean, *rstd;
  void *dx, *dresidual;  // dresidual where it is not dx
  void* total;           // as large as x, where norm_backward_total asks for it
  NormGradient dtemb, dweight, dbias, dada_scale, dada_shift;
  void* workspace = nullptr;  // norm_backward_workspace numbers of the type of mean
};

struct NormBackwardParams {
  NormTiling tiling;
  NormSizes sizes;
  Shift shift;
  NormStage stage;
  bool shift_x, shift_dy;
  const void *dy, *dsum, *x;
  NormTables tables;
  const void *mean, *rstd;
  void *own, *moved;   // ds in its frame, and in the frames the shift took it from
  void* channel_sums;  // (2, frames, tiles of pixels, channels): dz, dz * xhat
  void* ds_sums;       // (frames, tiles of pixels, channels)
  void* group_sums;    // (frames, tiles, groups, 2): dxhat, dxhat * xhat
  void* merged;        // (frames, groups, 2)
};

template <class T, int kChannels, int kPixels>
__global__ void __launch_bounds__(kNormThreads, 1)
    shift_add_group_norm_silu_backward_kernel(const __grid_constant__ NormBackwardParams p) {
  using A = acc_t<T>;
  constexpr int N = kChannels * kPixels;
  struct Route {
    ReadingFrames<const T> x, dy;
    TileStore<T> moved;
  };
  const NormSizes& sizes = p.sizes;
  const NormTile<kChannels, kPixels> tile(p.tiling, sizes);
  const int64_t frame_size = sizes.frame_size;
  const int32_t rows = p.tiling.partial_rows, group_channels = sizes.group_channels;

  Carver shared{ptx::dynamic_shared()};
  Route& route = *shared.take_constant<Route>();
  T* x_slab = reinterpret_cast<T*>(shared.take<unsigned char>(p.tiling.slab_bytes));
  T* dy_slab = reinterpret_cast<T*>(shared.take<unsigned char>(p.tiling.slab_bytes));
  A* scratch = shared.take<A>(2 * rows * tile.channels);
  A* added = shared.take<A>(tile.channels);
  A* factor = shared.take<A>(tile.channels);
  A* term = shared.take<A>(tile.channels);
  A* channel_sums = shared.take<A>(2 * tile.channels);
  A* mean = shared.take<A>(tile.groups);
  A* rstd = shared.take<A>(tile.groups);
  A* mean_dxhat = shared.take<A>(tile.groups);       // times rstd
  A* mean_dxhat_xhat = shared.take<A>(tile.groups);  // times rstd^2
  A* exchange = shared.take<A>(2 * tile.groups);

  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  if (threadIdx.x == 0) {
    route.x = {p.shift_x ? sources(p.shift, x, tile.frame, frame_size)
                         : own_frame(x, tile.frame, frame_size),
               {}};
    route.dy = {own_frame(dy, tile.frame, frame_size), {}};
    if (p.shift_dy) route.dy = readers(p.shift, dy, tile.frame, frame_size);
    if (p.moved)
      route.moved =
          TileStore<T>::to_sources(p.shift, static_cast<T*>(p.moved), tile.frame, frame_size);
  }
  __syncthreads();

  Arrivals arrivals(tile.own_c() * tile.own_p());
  for (int32_t c = tile.lane_c; c < tile.units_c; c += tile.lanes_c) {
    const UnitFetch<T, kChannels, kPixels> fetch_x(route.x, sizes.slices, tile.channel(c), x);
    const UnitFetch<T, kChannels, kPixels> fetch_dy(route.dy, sizes.slices, tile.channel(c), dy);
    for (int32_t i = tile.lane_p; i < tile.units_p; i += tile.lanes_p) {
      fetch_x(x_slab + tile.slot(c, i), tile.at(c, i));
      fetch_dy(dy_slab + tile.slot(c, i), tile.at(c, i));
      arrivals.issued();
    }
  }
  arrivals.all_issued();
  read_tables(p.tables, sizes, tile, added, factor, term);
  const int64_t statistic = tile.frame * sizes.groups + tile.first_group;
  for (int32_t g = threadIdx.x; g < tile.groups; g += blockDim.x) {
    mean[g] = static_cast<const A*>(p.mean)[statistic + g];
    rstd[g] = static_cast<const A*>(p.rstd)[statistic + g];
  }
  __syncthreads();

  // x - mean and dz of the vector at `slot`
  struct Unit {
    A centre[kChannels], slope[kChannels], offset[kChannels];
  };
  const auto unit_of = [&](int32_t c) {
    Unit unit;
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int32_t channel = c * kChannels + j, g = channel / group_channels;
      unit.centre[j] = mean[g] - added[channel];
      unit.slope[j] = rstd[g] * factor[channel];
      unit.offset[j] = term[channel];
    }
    return unit;
  };
  const auto differentiate = [&](const Unit& unit, int32_t slot, A(&off)[N], A(&dz)[N]) {
    widen(load<T, N>(x_slab + slot), off);
    widen(load<T, N>(dy_slab + slot), dz);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int k = kChannels == 1 ? 0 : j;
      off[j] -= unit.centre[k];
      const A z = off[j] * unit.slope[k] + unit.offset[k], gate = sigmoid<T>(z);
      dz[j] *= gate * (1 + z * (1 - gate));
    }
  };

  const int64_t tiles = int64_t{p.tiling.tiles_c} * p.tiling.tiles_p;
  const int64_t row = tile.frame * tiles + tile.index;
  // tiles that hold parts of the channels share a row of sums per channel
  const int64_t channel_row = tile.frame * p.tiling.tiles_p + tile.index % p.tiling.tiles_p;
  const A count = A(group_channels) * A(sizes.pixels);
  const auto keep_means = [&](int32_t g, A dxhat, A dxhat_xhat) {
    mean_dxhat[g] = dxhat / count * rstd[g];
    mean_dxhat_xhat[g] = dxhat_xhat / count * rstd[g] * rstd[g];
  };
  if (p.stage == NormStage::kApply) {
    const A* merged = static_cast<const A*>(p.merged) + 2 * statistic;
    for (int32_t g = threadIdx.x; g < tile.groups; g += blockDim.x)
      keep_means(g, merged[2 * g], merged[2 * g + 1]);
    ptx::cp_async_wait<0>();
    __syncthreads();
  } else {
    for_units_c(tile, [&](int32_t c, bool active) {
      A sum_dz[kChannels] = {}, sum_dz_off[kChannels] = {};
      if (active) {
        const Unit unit = unit_of(c);
        for (int32_t i = tile.lane_p; i < tile.units_p; i += tile.lanes_p) {
          arrivals.wait();
          A off[N], dz[N];
          differentiate(unit, tile.slot(c, i), off, dz);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const int k = kChannels == 1 ? 0 : j;
            sum_dz[k] += dz[j];
            sum_dz_off[k] += dz[j] * off[j];
          }
        }
      }
      put_partials(scratch, tile, c, active, sum_dz);
      put_partials(scratch + rows * tile.channels, tile, c, active, sum_dz_off);
    });
    __syncthreads();
    for (int32_t i = threadIdx.x; i < tile.channels; i += blockDim.x) {
      const A dz = channel_sum(scratch, tile.channels, rows, i);
      const A dz_xhat = channel_sum(scratch + rows * tile.channels, tile.channels, rows, i) *
                        rstd[i / group_channels];
      if (p.channel_sums) {
        A* sums =
            static_cast<A*>(p.channel_sums) + channel_row * sizes.channels + tile.first_channel + i;
        sums[0] = dz;
        sums[sizes.frames * p.tiling.tiles_p * sizes.channels] = dz_xhat;
      }
      channel_sums[i] = dz * factor[i];
      channel_sums[tile.channels + i] = dz_xhat * factor[i];
    }
    const bool whole = p.stage == NormStage::kWhole;
    A* partial = static_cast<A*>(p.group_sums) + 2 * (row * sizes.groups + tile.first_group);
    sum_groups<2>(channel_sums, tile.channels, 1, tile, group_channels, p.tiling.cluster, exchange,
                  [&](int32_t g, const A(&sum)[2]) {
                    if (whole) {
                      keep_means(g, sum[0], sum[1]);
                    } else {
                      partial[2 * g] = sum[0];
                      partial[2 * g + 1] = sum[1];
                    }
                  });
    if (!whole) return;
    if (p.tiling.cluster > 1) ptx::cluster_arrive();  // the last read of another block's sums
  }

  const T* dsum = p.dsum ? static_cast<const T*>(p.dsum) + tile.frame * frame_size : nullptr;
  T* own = p.own ? static_cast<T*>(p.own) + tile.frame * frame_size : nullptr;
  for_units_c(tile, [&](int32_t c, bool active) {
    A sum_ds[kChannels] = {};
    if (active) {
      const Unit unit = unit_of(c);
      A first_mean[kChannels], second_mean[kChannels];
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        const int32_t g = (c * kChannels + j) / group_channels;
        first_mean[j] = mean_dxhat[g];
        second_mean[j] = mean_dxhat_xhat[g];
      }
      const UnitStore<T, kChannels, kPixels> store_moved(route.moved, sizes.slices, tile.channel(c),
                                                         p.moved != nullptr);
      constexpr int kBatch = 4;  // vectors of dsum in flight
      for (int32_t first = tile.lane_p; first < tile.units_p; first += kBatch * tile.lanes_p) {
        Vec<T, N> upstream[kBatch];
        if (dsum) {
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            const int32_t i = first + k * tile.lanes_p;
            if (i < tile.units_p) upstream[k] = load<T, N>(dsum + tile.at(c, i));
          }
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int32_t i = first + k * tile.lanes_p;
          if (i >= tile.units_p) break;
          A off[N], ds[N];
          differentiate(unit, tile.slot(c, i), off, ds);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            const int m = kChannels == 1 ? 0 : j;
            ds[j] = ds[j] * unit.slope[m] - first_mean[m] - off[j] * second_mean[m];
          }
          if (dsum) {
            A other[N];
            widen(upstream[k], other);
#pragma unroll
            for (int j = 0; j < N; ++j) ds[j] += other[j];
          }
#pragma unroll
          for (int j = 0; j < N; ++j) sum_ds[kChannels == 1 ? 0 : j] += ds[j];
          const Vec<T, N> v = narrow<T, N>(ds);
          if (own) store<T, N>(own + tile.at(c, i), v);
          store_moved(tile.at(c, i), v);
        }
      }
    }
    if (p.ds_sums) put_partials(scratch, tile, c, active, sum_ds);
  });
  if (p.ds_sums) {
    __syncthreads();
    A* sums = static_cast<A*>(p.ds_sums) + channel_row * sizes.channels + tile.first_channel;
    for (int32_t i = threadIdx.x; i < tile.channels; i += blockDim.x)
      sums[i] = channel_sum(scratch, tile.channels, rows, i);
  }
  if (p.tiling.cluster > 1) {
    __syncwarp();
    ptx::cluster_wait();
  }
}

// The merge of a split: one warp per frame and group.
template <class A>
__global__ void __launch_bounds__(kMergeThreads)
    merge_group_sums_kernel(const __grid_constant__ NormBackwardParams p) {
  const int64_t statistic =
      int64_t{blockIdx.x} * (kMergeThreads / 32) + static_cast<int64_t>(threadIdx.x / 32);
  if (statistic >= p.sizes.frames * p.sizes.groups) return;
  const int32_t lane = threadIdx.x % 32, tiles = p.tiling.tiles_c * p.tiling.tiles_p;
  const int64_t frame = statistic / p.sizes.groups, g = statistic - frame * p.sizes.groups;
  const A* partial = static_cast<const A*>(p.group_sums) + 2 * (frame * tiles * p.sizes.groups + g);
  A first = 0, second = 0;
  for (int32_t tile = lane; tile < tiles; tile += 32) {
    first += partial[2 * int64_t{tile} * p.sizes.groups];
    second += partial[2 * int64_t{tile} * p.sizes.groups + 1];
  }
  first = warp_sum(first, 32);
  second = warp_sum(second, 32);
  if (lane == 0) {
    static_cast<A*>(p.merged)[2 * statistic] = first;
    static_cast<A*>(p.merged)[2 * statistic + 1] = second;
  }
}

// Gradients of the parameters from the sums: one block per row of a gradient and 32 channels; its
// rows of threads take every kParameterRows-th row of the sums.
struct NormParameterParams {
  int64_t frames, tiles, channels;
  Table weight, bias, ada_scale;
  NormGradient dtemb, dweight, dbias, dada_scale, dada_shift;
  const void *channel_sums, *ds_sums;
};

constexpr int kParameterRows = 8;

template <class A>
__global__ void __launch_bounds__(32 * kParameterRows)
    norm_parameters_kernel(const __grid_constant__ NormParameterParams p) {
  const int64_t blocks_c = (p.channels + 31) / 32;
  int64_t job = blockIdx.x / blocks_c;
  const int32_t lane = threadIdx.x % 32, first_row = threadIdx.x / 32;
  const int64_t c = (blockIdx.x - job * blocks_c) * 32 + lane;
  A* shared = reinterpret_cast<A*>(ptx::dynamic_shared());  // (2, kParameterRows, 32)

  // job 0 is weight and bias; then the rows of each table
  enum class Kind { kAffine, kTemb, kScale, kShift } kind = Kind::kAffine;
  int64_t rows = 1;
  if (job > 0) {
    const NormGradient* tables[] = {&p.dtemb, &p.dada_scale, &p.dada_shift};
    job -= 1;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int64_t count = tables[k]->data ? tables[k]->rows : 0;
      if (kind == Kind::kAffine) {
        if (job < count) {
          kind = static_cast<Kind>(k + 1);
          rows = count;
        } else {
          job -= count;
        }
      }
    }
  }
  const int64_t frames_per_row = p.frames / rows;
  const int64_t begin = job * frames_per_row * p.tiles, end = begin + frames_per_row * p.tiles;
  const A* dz = static_cast<const A*>(p.channel_sums);
  const A* dz_xhat = dz + p.frames * p.tiles * p.channels;
  const A* ds = static_cast<const A*>(p.ds_sums);
  A first = 0, second = 0;
  if (c < p.channels) {
    const A weight = read<A>(p.weight, c, 1), bias = read<A>(p.bias, c, 0);
    for (int64_t row = begin + first_row; row < end; row += kParameterRows) {
      const int64_t at = row * p.channels + c;
      if (kind == Kind::kTemb) {
        first += ds[at];
      } else if (kind == Kind::kShift) {
        first += dz[at];
      } else if (kind == Kind::kScale) {
        first += dz_xhat[at] * weight + dz[at] * bias;
      } else if (dz) {  // job 0, whether there is anything affine or not
        const A scale =
            1 + read<A>(p.ada_scale,
                        row_offset(p.ada_scale, row / p.tiles, p.frames, p.channels) + c, 0);
        first += dz_xhat[at] * scale;
        second += dz[at] * scale;
      }
    }
  }
  shared[first_row * 32 + lane] = first;
  shared[(kParameterRows + first_row) * 32 + lane] = second;
  __syncthreads();
  if (first_row > 0 || c >= p.channels) return;
  first = second = 0;
  for (int k = 0; k < kParameterRows; ++k) {
    first += shared[k * 32 + lane];
    second += shared[(kParameterRows + k) * 32 + lane];
  }
  const int64_t at = job * p.channels + c;
  if (kind == Kind::kTemb) {
    write(p.dtemb.data, p.dtemb.dtype, at, first);
  } else if (kind == Kind::kShift) {
    write(p.dada_shift.data, p.dada_shift.dtype, at, first);
  } else if (kind == Kind::kScale) {
    write(p.dada_scale.data, p.dada_scale.dtype, at, first);
  } else {
    if (p.dweight.data) write(p.dweight.data, p.dweight.dtype, at, first);
    if (p.dbias.data) write(p.dbias.data, p.dbias.dtype, at, second);
  }
}

namespace detail {

struct NormBackwardWorkspace {
  int64_t channel_sums, ds_sums, group_sums, merged;  // numbers

  NormBackwardWorkspace(const NormBackwardArgs& args, const NormPlan& plan) {
    const int64_t rows = args.shape.frames * plan.tiling.tiles_p;
    const bool summed =
        args.dweight.data || args.dbias.data || args.dada_scale.data || args.dada_shift.data;
    channel_sums = summed ? 2 * rows * args.shape.channels : 0;
    ds_sums = args.dtemb.data ? rows * args.shape.channels : 0;
    group_sums = plan.split ? 2 * args.shape.frames * plan.tiles() * args.shape.groups : 0;
    merged = plan.split ? 2 * args.shape.frames * args.shape.groups : 0;
  }
};

// Whether the reverse shift is a launch of its own.
inline bool shifts_last(const NormBackwardArgs& args) {
  return args.shift_before && args.shift.boundary == Boundary::kReplicate;
}

}  // namespace detail

// Numbers of workspace that a call needs.
inline int64_t norm_backward_workspace(const NormBackwardArgs& args, const NormPlan& plan) {
  const detail::NormBackwardWorkspace sizes(args, plan);
  return sizes.channel_sums + sizes.ds_sums + sizes.group_sums + sizes.merged;
}

// Whether a call needs `total`.
inline bool norm_backward_total(const NormBackwardArgs& args) {
  return detail::shifts_last(args) && !args.is_sum;
}

namespace detail {

template <class T, int kChannels, int kPixels, class Launcher>
void launch_norm_backward(Launcher& launcher, const NormBackwardArgs& args, const NormPlan& plan) {
  using A = acc_t<T>;
  const NormShape& shape = args.shape;
  const NormBackwardWorkspace sizes(args, plan);
  A* next = static_cast<A*>(args.workspace);
  const auto take = [&](int64_t count) {
    A* taken = count ? next : nullptr;
    next += count;
    return taken;
  };
  NormBackwardParams params{};
  params.tiling = plan.tiling;
  params.sizes = norm_sizes(shape, args.shift);
  params.shift = args.shift;
  params.stage = plan.split ? NormStage::kPartial : NormStage::kWhole;
  params.shift_x = args.shift_before && !args.is_sum;
  params.shift_dy = args.shift_after;
  params.dy = args.dy;
  params.dsum = args.dsum;
  params.x = args.x;
  params.tables = args.tables;
  if (args.is_sum) params.tables.temb = {};
  params.mean = args.mean;
  params.rstd = args.rstd;
  if (!args.shift_before) {
    params.own = args.dx;
  } else if (shifts_last(args)) {
    params.own = args.is_sum ? args.dresidual : args.total;
  } else {
    params.own = args.dresidual;
    params.moved = args.dx;
  }
  params.channel_sums = take(sizes.channel_sums);
  params.ds_sums = take(sizes.ds_sums);
  params.group_sums = take(sizes.group_sums);
  params.merged = take(sizes.merged);

  constexpr auto kernel = shift_add_group_norm_silu_backward_kernel<T, kChannels, kPixels>;
  const Grid grid =
      grid_of(plan.blocks(shape.frames), plan.threads, plan.tiling.cluster, plan.shared);
  launcher.template launch<kernel>(grid, params);
  if (plan.split) {
    const int64_t warps = shape.frames * shape.groups;
    launcher.template launch<merge_group_sums_kernel<A>>(
        grid_of(ceil_div<int64_t>(warps, kMergeThreads / 32), kMergeThreads), params);
    params.stage = NormStage::kApply;
    launcher.template launch<kernel>(grid, params);
  }
  if (shifts_last(args)) {
    const FlatShape flat{args.shift, shape.channels_last, shape.frames, shape.channels,
                         shape.pixels};
    temporal_shift(launcher, {flat, shape.dtype, size_of(shape.dtype), true, params.own, args.dx});
  }
  if (!params.channel_sums && !params.ds_sums) return;
  const NormParameterParams parameters{
      shape.frames,     plan.tiling.tiles_p,   shape.channels,  args.tables.weight,
      args.tables.bias, args.tables.ada_scale, args.dtemb,      args.dweight,
      args.dbias,       args.dada_scale,       args.dada_shift, params.channel_sums,
      params.ds_sums};
  int64_t jobs = 1;
  for (const NormGradient* table : {&args.dtemb, &args.dada_scale, &args.dada_shift})
    jobs += table->data ? table->rows : 0;
  launcher.template launch<norm_parameters_kernel<A>>(
      grid_of(jobs * ceil_div<int64_t>(shape.channels, 32), 32 * kParameterRows, 1,
              2 * 32 * kParameterRows * sizeof(A)),
      parameters);
}

template <class T, class Launcher>
void launch_norm_backward_of(Launcher& launcher, const NormBackwardArgs& args,
                             const NormPlan& plan) {
  constexpr int kVector = 16 / sizeof(T);
  if (plan.vector == 1) {
    launch_norm_backward<T, 1, 1>(launcher, args, plan);
  } else if (plan.tiling.channels_last) {
    launch_norm_backward<T, kVector, 1>(launcher, args, plan);
  } else {
    launch_norm_backward<T, 1, kVector>(launcher, args, plan);
  }
}

}  // namespace detail

// With the plan of plan_norm_backward; the tensors are not empty.
template <class Launcher>
void shift_add_group_norm_silu_backward(Launcher& launcher, const NormBackwardArgs& args,
                                        const NormPlan& plan) {
  check_frame_size(args.shape.channels, args.shape.pixels);
  switch (args.shape.dtype) {
    case DType::kFloat: return detail::launch_norm_backward_of<float>(launcher, args, plan);
    case DType::kBFloat16:
      return detail::launch_norm_backward_of<__nv_bfloat16>(launcher, args, plan);
    case DType::kHalf: return detail::launch_norm_backward_of<__half>(launcher, args, plan);
    case DType::kDouble: return detail::launch_norm_backward_of<double>(launcher, args, plan);
  }
}

}  // namespace latent_shift::cuda
