// One block's tile of a frame in shared memory, and the loops over it.
//
// A thread copies, sums and stores the same vectors from first to last, so the slab needs no barrier:
// only sums do.
#pragma once

#include "norm_plan.h"
#include "shift_access.cuh"

namespace latent_shift::cuda {

// What all norm kernels know of their tensors.
struct NormSizes {
  int64_t frames;
  uint32_t frame_size;  // elements
  int32_t channels, groups, group_channels, pixels;
  Slices slices;  // of a row of channels
};

inline NormSizes norm_sizes(const NormShape& shape, const Shift& shift) {
  NormSizes sizes;
  sizes.frames = shape.frames;
  sizes.frame_size = static_cast<uint32_t>(shape.channels * shape.pixels);
  sizes.channels = static_cast<int32_t>(shape.channels);
  sizes.groups = static_cast<int32_t>(shape.groups);
  sizes.group_channels = static_cast<int32_t>(shape.channels / shape.groups);
  sizes.pixels = static_cast<int32_t>(shape.pixels);
  sizes.slices = slices_of(shift, static_cast<uint32_t>(shape.channels), 1);
  return sizes;
}

// Hands out shared memory: first what is the same for every unit of channels, then slabs and sums.
struct Carver {
  unsigned char* next;

  template <class Constant>
  LS_DEVICE Constant* take_constant() {
    static_assert(sizeof(Constant) <= kNormConstantBytes);
    Constant* taken = reinterpret_cast<Constant*>(next);
    next += kNormConstantBytes;
    return taken;
  }

  template <class A>
  LS_DEVICE A* take(int count) {
    A* taken = reinterpret_cast<A*>(next);
    next += count * sizeof(A);
    return taken;
  }
};

// kChannels x kPixels elements make a vector; one of them is 1.
template <int kChannels, int kPixels>
struct NormTile {
  static constexpr int kVector = kChannels * kPixels;

  int64_t frame;
  int32_t index;                    // among the tiles of a span
  int32_t first_group, groups;      // of the span
  int32_t first_channel, channels;  // of the tile
  int32_t units_c, units_p;
  int32_t lane_c, lane_p, lanes_c, lanes_p;
  int32_t slot_c, slot_p;  // vectors of the slab from one unit to the next
  uint32_t offset;         // of the first vector in the frame
  uint32_t stride_c, stride_p;
  bool channels_last;

  LS_DEVICE NormTile(const NormTiling& t, const NormSizes& sizes) {
    const uint32_t tiles = t.tiles_c * t.tiles_p;
    uint32_t block = blockIdx.x / tiles;
    index = blockIdx.x - block * tiles;
    frame = block / t.spans;
    const int32_t span = block - static_cast<uint32_t>(frame) * t.spans;
    first_group = span * t.span;
    groups = min(t.span, sizes.groups - first_group);
    const int32_t tile_c = index / t.tiles_p, tile_p = index - tile_c * t.tiles_p;
    const int32_t span_units = groups * sizes.group_channels / kChannels;
    units_c = min(t.tile_c, span_units - tile_c * t.tile_c);
    units_p = max(0, min(t.tile_p, t.units_p - tile_p * t.tile_p));
    first_channel = first_group * sizes.group_channels + tile_c * t.tile_c * kChannels;
    channels = units_c * kChannels;
    stride_c = t.stride_c;
    stride_p = t.stride_p;
    offset = static_cast<uint32_t>(first_channel / kChannels) * stride_c +
             static_cast<uint32_t>(tile_p * t.tile_p) * stride_p;
    channels_last = t.channels_last;
    lanes_c = t.lanes_c;
    lanes_p = t.lanes_p;
    const int32_t thread = threadIdx.x;
    if (channels_last) {
      lane_p = thread / lanes_c;
      lane_c = thread - lane_p * lanes_c;
      if (lane_p >= lanes_p) lane_c = units_c;  // idle
      slot_c = 1;
      slot_p = units_c;
    } else {
      lane_c = thread / lanes_p;
      lane_p = thread - lane_c * lanes_p;
      if (lane_c >= lanes_c) lane_c = units_c;
      slot_c = units_p;
      slot_p = 1;
    }
  }

  LS_DEVICE int32_t pixels() const { return units_p * kPixels; }
  // Vectors along the pixels that are this thread's in each of its units of channels.
  LS_DEVICE int32_t own_p() const {
    return lane_p < units_p ? (units_p - lane_p + lanes_p - 1) / lanes_p : 0;
  }
  LS_DEVICE int32_t own_c() const {
    return lane_c < units_c ? (units_c - lane_c + lanes_c - 1) / lanes_c : 0;
  }
  LS_DEVICE int32_t slot(int32_t c, int32_t p) const { return (c * slot_c + p * slot_p) * kVector; }
  LS_DEVICE uint32_t at(int32_t c, int32_t p) const { return offset + c * stride_c + p * stride_p; }
  LS_DEVICE int32_t channel(int32_t c) const { return first_channel + c * kChannels; }
};

// Calls body(c) for this thread's units of channels, and in the same round on every thread with a
// unit past the end where it has none: sums by shuffles need all lanes of a warp.
template <class Tile, class Body>
LS_DEVICE void for_units_c(const Tile& tile, Body body) {
  const int32_t rounds = (tile.units_c + tile.lanes_c - 1) / tile.lanes_c;
  for (int32_t round = 0; round < rounds; ++round) {
    const int32_t c = tile.lane_c + round * tile.lanes_c;
    body(c, c < tile.units_c);
  }
}

// Copies in flight, committed in quarters of a thread's vectors, so that the first can be summed
// while the last are on their way.
class Arrivals {
 public:
  LS_DEVICE explicit Arrivals(int32_t vectors) : quarter_(max(1, (vectors + 3) / 4)) {}

  LS_DEVICE void issued() {
    if (++count_ == quarter_) commit();
  }
  LS_DEVICE void all_issued() {
    while (groups_ < 4) commit();
    count_ = groups_ = 0;
  }
  // Before the first use of each vector, in the order of their issue.
  LS_DEVICE void wait() {
    if (count_-- > 0) return;
    count_ = quarter_ - 1;
    switch (groups_++) {
      case 0: return ptx::cp_async_wait<3>();
      case 1: return ptx::cp_async_wait<2>();
      case 2: return ptx::cp_async_wait<1>();
      default: return ptx::cp_async_wait<0>();
    }
  }

 private:
  LS_DEVICE void commit() {
    ptx::cp_async_commit();
    ++groups_;
    count_ = 0;
  }
  int32_t quarter_, count_ = 0, groups_ = 0;
};

// Brings the vectors of one unit of channels to shared memory, from the frame of its slice, without
// passing registers; what lies across slices, or has two readers to add, goes the long way.
template <class T, int kChannels, int kPixels>
class UnitFetch {
  static constexpr int N = kChannels * kPixels;

 public:
  LS_DEVICE UnitFetch(const ReadingFrames<const T>& from, const Slices& slices, uint32_t channel,
                      const T* anywhere)
      : from_(from), slices_(slices), channel_(channel) {
    const int slice = slices.of(channel);
    frame_ = from.first.of(slice);
    direct_ = in_one_slice<kChannels>(slices, channel) && !from.second.of(slice);
    source_ = frame_ ? frame_ : anywhere;
  }

  LS_DEVICE void operator()(T* shared, uint32_t offset) const {
    if constexpr (sizeof(T) * N == 16) {
      if (direct_)
        return ptx::cp_async_16(shared, frame_ ? source_ + offset : source_, frame_ != nullptr);
    }
    store<T, N>(shared, gather<T, N, kChannels>(from_, slices_, channel_, offset));
  }

 private:
  const ReadingFrames<const T>& from_;
  const Slices& slices_;
  const uint32_t channel_;
  const T *frame_, *source_;
  bool direct_;
};

// The frames a tile is stored to, slice by slice, and those that nobody else fills with zeros.
template <class T>
struct TileStore {
  Frames<T> first, second, zeros;

  // y = shift(tile)
  static LS_DEVICE TileStore to_readers(const Shift& shift, T* y, int64_t n, int64_t frame_size) {
    const ReadingFrames<T> by = readers(shift, y, n, frame_size);
    return {by.first, by.second, where_none(sources(shift, y, n, frame_size), y, n, frame_size)};
  }

  // The adjoint, where no frame has two readers.
  static LS_DEVICE TileStore to_sources(const Shift& shift, T* dx, int64_t n, int64_t frame_size) {
    return {sources(shift, dx, n, frame_size),
            {},
            where_none(readers(shift, dx, n, frame_size).first, dx, n, frame_size)};
  }
};

// Stores the vectors of one unit of channels; those across slices element by element.
template <class T, int kChannels, int kPixels>
class UnitStore {
  static constexpr int N = kChannels * kPixels;

 public:
  // `stores` is false where nothing is to be stored, and `to` holds nothing.
  LS_DEVICE UnitStore(const TileStore<T>& to, const Slices& slices, uint32_t channel,
                      bool stores = true)
      : to_(to), slices_(slices), channel_(channel) {
    const int slice = slices.of(channel);
    whole_ = !stores || in_one_slice<kChannels>(slices, channel);
    first_ = stores ? to.first.of(slice) : nullptr;
    second_ = stores ? to.second.of(slice) : nullptr;
    zeros_ = stores ? to.zeros.of(slice) : nullptr;
  }

  LS_DEVICE void operator()(uint32_t offset, const Vec<T, N>& v) const {
    if (whole_) {
      if (first_) store<T, N>(first_ + offset, v);
      if (second_) store<T, N>(second_ + offset, v);
      if (zeros_) store<T, N>(zeros_ + offset, Vec<T, N>{});
    } else {
      scatter<T, N, kChannels>(to_.first, slices_, channel_, offset, v);
      scatter<T, N, kChannels>(to_.second, slices_, channel_, offset, v);
      scatter<T, N, kChannels>(to_.zeros, slices_, channel_, offset, Vec<T, N>{});
    }
  }

 private:
  const TileStore<T>& to_;
  const Slices& slices_;
  const uint32_t channel_;
  bool whole_;
  T *first_, *second_, *zeros_;
};

// The numbers of the tile's channels that the tables hold, by channel of the tile:
// (xhat * weight + bias) * (1 + ada_scale) + ada_shift = xhat * factor + term.
struct NormTables {
  Table temb, weight, bias, ada_scale, ada_shift;
};

template <class A, class Tile>
LS_DEVICE void read_tables(const NormTables& tables, const NormSizes& sizes, const Tile& tile,
                           A* added, A* factor, A* term) {
  const int64_t temb = row_offset(tables.temb, tile.frame, sizes.frames, sizes.channels),
                scales = row_offset(tables.ada_scale, tile.frame, sizes.frames, sizes.channels),
                shifts = row_offset(tables.ada_shift, tile.frame, sizes.frames, sizes.channels);
  for (int32_t i = threadIdx.x; i < tile.channels; i += blockDim.x) {
    const int32_t c = tile.first_channel + i;
    const A scale = 1 + read<A>(tables.ada_scale, scales + c, 0);
    added[i] = read<A>(tables.temb, temb + c, 0);
    factor[i] = read<A>(tables.weight, c, 1) * scale;
    term[i] = read<A>(tables.bias, c, 0) * scale + read<A>(tables.ada_shift, shifts + c, 0);
  }
}

}  // namespace latent_shift::cuda
