// How GroupNorm's blocks are cut out of a tensor, and which of three ways serves:
//
//   one launch   a block holds whole groups of a frame in shared memory
//   cluster      the blocks of a cluster share them, and exchange sums (sm_90)
//   split        partial moments, their merge, and a second read: whatever fits nowhere
//
// A tile is channels x pixels of one frame, counted in units that make a vector together: in
// channels_last a unit of channels is a vector and a unit of pixels one pixel, in NCHW it is the
// other way round, and both are one element where 16-byte accesses do not fit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace latent_shift::cuda {

constexpr int kNormThreads = 512;
constexpr int kNormConstantBytes = 256;  // of a block's shared memory: the frames it works on

struct NormTiling {
  int32_t span, spans;         // groups a tile may hold; spans of a frame
  int32_t units_p;             // units of pixels in a frame
  int32_t stride_c, stride_p;  // elements from one unit to the next
  int32_t tile_c, tile_p;      // units in a tile
  int32_t tiles_c, tiles_p;    // tiles that share a span
  int32_t lanes_c, lanes_p;    // threads along both
  int32_t partial_rows;        // sums per channel that meet in shared memory
  uint32_t slab_bytes;         // of one tensor's tile in shared memory
  int32_t cluster;
  bool channels_last;
};

struct NormShape {
  DType dtype;
  bool channels_last;
  int64_t frames, channels, pixels, groups;
  bool aligned;  // every pointer, to 16 bytes
};

// What a kernel keeps in shared memory.
struct NormNeeds {
  int slabs;        // tensors
  int sums;         // sums per channel that are reduced at a time
  int per_channel;  // numbers
  int per_group;
  int threads_per_sm;  // that the registers allow
};

constexpr NormNeeds kNormForwardNeeds{1, 2, 3, 5, 640};
constexpr NormNeeds kNormBackwardNeeds{2, 2, 5, 6, 512};

struct NormPlan {
  NormTiling tiling{};
  int vector = 1;  // elements
  int threads = 0;
  size_t shared = 0;
  bool split = false;
  double cost = std::numeric_limits<double>::infinity();

  int64_t tiles() const { return int64_t{tiling.tiles_c} * tiling.tiles_p; }
  int64_t blocks(int64_t frames) const { return frames * tiling.spans * tiles(); }
};

namespace detail {

inline int power_of_two_at_most(int n) {
  int power = 1;
  while (power <= n / 2) power *= 2;
  return power;
}

inline int power_of_two_at_least(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// As many lanes as there are items, or so few more rounds that all are equally busy.
inline int balanced(int items, int lanes) { return ceil_div(items, ceil_div(items, lanes)); }

inline void place_threads(NormPlan& plan) {
  NormTiling& t = plan.tiling;
  const int64_t vectors = int64_t{t.tile_c} * t.tile_p;
  // four vectors a thread, and eight before a block takes more than its share of the registers
  const int64_t few = std::clamp<int64_t>(vectors / 4, 64, 256);
  const int threads = static_cast<int>(std::clamp<int64_t>(vectors / 8, few, kNormThreads));
  if (t.channels_last) {
    t.lanes_c = balanced(t.tile_c, std::min(t.tile_c, threads));
    t.lanes_p = std::min(t.tile_p, std::max(1, threads / t.lanes_c));
    t.partial_rows = t.lanes_p;
  } else {
    // whole warps or powers of two along a channel: they sum by shuffles
    const int most = std::max(32, power_of_two_at_most(threads / std::min(t.tile_c, threads)));
    t.lanes_p = std::min(power_of_two_at_least(t.tile_p), most);
    t.lanes_c = balanced(t.tile_c, std::min(t.tile_c, std::max(1, threads / t.lanes_p)));
    t.partial_rows = std::max(1, t.lanes_p / 32);
  }
  plan.threads = round_up(t.lanes_c * t.lanes_p, 32);
}

// Half of the lanes along pixels, whose sums per channel wait side by side in shared memory; false
// where too few threads would be left.
inline bool fewer_partials(NormPlan& plan) {
  NormTiling& t = plan.tiling;
  if (!t.channels_last || t.lanes_p == 1 || plan.threads < 256) return false;
  t.lanes_p = t.partial_rows = ceil_div(t.lanes_p, 2);
  plan.threads = round_up(t.lanes_c * t.lanes_p, 32);
  return true;
}

inline void place_shared(NormPlan& plan, const NormShape& shape, const NormNeeds& needs) {
  NormTiling& t = plan.tiling;
  const int size = size_of(shape.dtype), sum_size = shape.dtype == DType::kDouble ? 8 : 4;
  const size_t slab = size_t{1} * t.tile_c * t.tile_p * plan.vector * size;
  const size_t channels = size_t{1} * t.tile_c * (t.channels_last ? plan.vector : 1);
  t.slab_bytes = static_cast<uint32_t>(round_up<size_t>(slab, 16));
  plan.shared = kNormConstantBytes + round_up<size_t>(slab, 16) * needs.slabs +
                (channels * (size_t{1} * t.partial_rows * needs.sums + needs.per_channel) +
                 size_t{1} * t.span * needs.per_group) *
                    sum_size;
}

// The time a plan takes, as bytes that pass through the busiest multiprocessor.
inline double norm_cost(const NormPlan& plan, const NormShape& shape, const NormNeeds& needs,
                        const Limits& limits) {
  constexpr double kBlockBytes = 2048;       // a block's start, as traffic
  constexpr double kClusterBytes = 2048;     // its barriers
  constexpr double kLaunchBytes = 64 << 10;  // 2 us at 33 GB/s, what an H200 moves per SM in 1 us
  constexpr double kSharedPass = 0.15;       // two sweeps of shared memory against one of DRAM
  const NormTiling& t = plan.tiling;
  const double bytes = double{1} * t.slab_bytes * needs.slabs;
  // a row that ends inside a sector reads its neighbour's part too
  const int64_t row = int64_t{t.tile_c} * plan.vector * size_of(shape.dtype);
  const double sectors = t.channels_last && row % 32 ? 1 + 16.0 / static_cast<double>(row) : 1;
  const double per_sm =
      static_cast<double>(ceil_div<int64_t>(plan.blocks(shape.frames), limits.num_sms));
  const auto by_shared =
      static_cast<double>((limits.shared_per_block + 1024) / (plan.shared + 1024));
  const double resident =
      std::min(by_shared, static_cast<double>(needs.threads_per_sm) / plan.threads);
  // sums hide behind the traffic of other blocks, except in the first that run together
  const double exposed = resident >= 2 ? std::min(per_sm, std::floor(resident)) : per_sm;
  double cost = per_sm * (bytes * sectors + kBlockBytes) + kSharedPass * exposed * bytes;
  if (t.cluster > 1) cost += per_sm * kClusterBytes;
  return plan.split ? 1.5 * cost + 2 * kLaunchBytes : cost;
}

}  // namespace detail

// The cheapest way that fits. Spans are whole vectors, and whole 32-byte sectors if that leaves
// blocks enough.
inline NormPlan plan_norm(const NormShape& shape, const NormNeeds& needs, const Limits& limits) {
  constexpr int64_t kSplitBytes = 32 << 10;  // of a block that is one of many
  const int size = size_of(shape.dtype);
  const int64_t group = shape.channels / shape.groups;
  NormPlan best;
  for (const int vector : {16 / size, 1}) {
    const int64_t contiguous = shape.channels_last ? shape.channels : shape.pixels;
    if (vector > 1 && (!shape.aligned || contiguous % vector)) continue;
    const int unit_c = shape.channels_last ? vector : 1, unit_p = vector / unit_c;

    const auto consider = [&](int64_t span, int64_t tile_c, int64_t tile_p, int cluster) {
      NormPlan plan;
      NormTiling& t = plan.tiling;
      plan.vector = vector;
      plan.split = cluster == 0;
      t.cluster = std::max(1, cluster);
      t.channels_last = shape.channels_last;
      t.span = static_cast<int32_t>(span);
      t.spans = static_cast<int32_t>(ceil_div(shape.groups, span));
      t.units_p = static_cast<int32_t>(shape.pixels / unit_p);
      t.stride_c = static_cast<int32_t>(shape.channels_last ? vector : shape.pixels);
      t.stride_p = static_cast<int32_t>(shape.channels_last ? shape.channels : vector);
      t.tile_c = static_cast<int32_t>(tile_c);
      t.tile_p = static_cast<int32_t>(tile_p);
      t.tiles_c = static_cast<int32_t>(ceil_div(span * group / unit_c, tile_c));
      t.tiles_p = plan.split ? ceil_div(t.units_p, t.tile_p) : t.cluster;
      detail::place_threads(plan);
      detail::place_shared(plan, shape, needs);
      const auto most = static_cast<size_t>(limits.shared_per_block);
      while (plan.shared > most && detail::fewer_partials(plan))
        detail::place_shared(plan, shape, needs);
      if (plan.shared > most) return false;
      plan.cost = detail::norm_cost(plan, shape, needs, limits);
      if (plan.cost < best.cost) best = plan;
      return true;
    };
    const auto consider_span = [&](int64_t span) {
      const int64_t units_c = span * group / unit_c, units_p = shape.pixels / unit_p;
      for (int cluster = 1; cluster <= (limits.arch >= 90 ? 8 : 1); cluster *= 2)
        if (cluster <= units_p)
          consider(span, units_c, ceil_div<int64_t>(units_p, cluster), cluster);
      // tiles of whole rows of a span, or parts of the one group
      const int64_t row = shape.channels_last ? 1 : std::min<int64_t>(units_p, 8);
      for (int64_t units = kSplitBytes / (int64_t{vector} * size * needs.slabs); units > 0;
           units /= 2) {
        if (units_c * row > units && span > 1) break;
        const int64_t tile_c = std::clamp<int64_t>(units / row, 1, units_c);
        if (consider(span, tile_c, std::clamp<int64_t>(units / tile_c, 1, units_p), 0)) break;
      }
    };
    const int64_t sizes[] = {vector > 1 && shape.channels_last ? 16 : size, 32};
    for (const int64_t bytes : sizes) {
      int64_t unit = 1;
      while (unit < shape.groups && unit * group * size % bytes) ++unit;
      for (int64_t span = unit; span < shape.groups; span *= 2) consider_span(span);
    }
    consider_span(shape.groups);
    if (best.threads) return best;
  }
  throw std::runtime_error("no tile of a norm over " + std::to_string(group) + " channels and " +
                           std::to_string(shape.pixels) + " pixels a group fits " +
                           std::to_string(limits.shared_per_block) + " bytes of shared memory");
}

inline NormPlan plan_norm_forward(const NormShape& shape, const Limits& limits) {
  return plan_norm(shape, kNormForwardNeeds, limits);
}

inline NormPlan plan_norm_backward(const NormShape& shape, const Limits& limits) {
  return plan_norm(shape, kNormBackwardNeeds, limits);
}

// Numbers of workspace that a forward call needs.
inline int64_t norm_workspace(const NormShape& shape, const NormPlan& plan) {
  return plan.split ? 2 * shape.frames * plan.tiles() * shape.groups : 0;
}

}  // namespace latent_shift::cuda
