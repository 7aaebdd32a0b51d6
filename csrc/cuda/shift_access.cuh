// The shift as addresses: every slice of channels of a frame is read from a frame, or written to
// one, of its own. A vector that lies across slices is loaded from each of their frames and its
// elements selected; its elements are stored one by one.
#pragma once

#include "../common/shift.h"
#include "vec.cuh"

namespace latent_shift::cuda {

// n / d and n % d by multiplication, for n < 2^31 and 0 < d < 2^31.
struct FastDivide {
  uint32_t divisor = 1, magic = 1, shift = 0;

  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    magic = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

  LS_DEVICE uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>((uint64_t{n} * magic) >> 32) + n) >> shift;
  }
  LS_DEVICE uint32_t modulo(uint32_t n) const { return n - divide(n) * divisor; }
};

// Where in a row the slices end: a row is the C channels of a pixel in channels_last, the whole
// frame in NCHW, where a channel is `pixels` elements.
struct Slices {
  FastDivide row;
  uint32_t end0 = 0, end1 = 0;

  LS_DEVICE int of(uint32_t position) const { return (position >= end0) + (position >= end1); }
};

inline Slices slices_of(const Shift& shift, uint32_t row, uint32_t channel_size) {
  Slices slices;
  slices.row = FastDivide(row);
  slices.end0 = static_cast<uint32_t>(shift.end[0]) * channel_size;
  slices.end1 = static_cast<uint32_t>(shift.end[1]) * channel_size;
  return slices;
}

// One frame per slice, null where there is none. Kept in registers, so never indexed by a variable.
template <class T>
struct Frames {
  T* slice[3];

  LS_DEVICE T* of(int k) const { return k == 0 ? slice[0] : k == 1 ? slice[1] : slice[2]; }
  LS_DEVICE bool any() const { return slice[0] || slice[1] || slice[2]; }
};

template <class T>
LS_DEVICE T* frame_at(T* base, int64_t n, int64_t frame_size) {
  return n < 0 ? nullptr : base + n * frame_size;
}

// Frame n itself in every slice.
template <class T>
LS_DEVICE Frames<T> own_frame(T* base, int64_t n, int64_t frame_size) {
  T* frame = base + n * frame_size;
  return {{frame, frame, frame}};
}

// The frames that frame n of shift(x) reads.
template <class T>
LS_DEVICE Frames<T> sources(const Shift& shift, T* base, int64_t n, int64_t frame_size) {
  const Clip clip = clip_of(shift, n);
  Frames<T> frames;
#pragma unroll
  for (int k = 0; k < 3; ++k)
    frames.slice[k] = frame_at(base, source_frame(shift, clip, n, shift.offset[k]), frame_size);
  return frames;
}

// The frames of shift(x) that read frame n of x: one, or a second at a replicated end.
template <class T>
struct ReadingFrames {
  Frames<T> first, second;
};

template <class T>
LS_DEVICE ReadingFrames<T> readers(const Shift& shift, T* base, int64_t n, int64_t frame_size) {
  const Clip clip = clip_of(shift, n);
  ReadingFrames<T> frames;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const Readers by = reader_frames(shift, clip, n, shift.offset[k]);
    frames.first.slice[k] = frame_at(base, by.first, frame_size);
    frames.second.slice[k] = frame_at(base, by.second, frame_size);
  }
  return frames;
}

// Frame n itself in the slices where `frames` has none.
template <class T>
LS_DEVICE Frames<T> where_none(const Frames<T>& frames, T* base, int64_t n, int64_t frame_size) {
  Frames<T> own;
#pragma unroll
  for (int k = 0; k < 3; ++k) own.slice[k] = frames.slice[k] ? nullptr : base + n * frame_size;
  return own;
}

// Whether `Count` positions from `position` on lie in one slice of one row.
template <int Count>
LS_DEVICE bool in_one_slice(const Slices& slices, uint32_t position) {
  return Count == 1 || (position + Count <= slices.row.divisor &&
                        slices.of(position) == slices.of(position + (Count - 1)));
}

template <class T, int N>
LS_DEVICE Vec<T, N> load_or_zero(const T* frame, int64_t offset) {
  if (!frame) return Vec<T, N>{};
  return load<T, N>(frame + offset);
}

// The vector at `offset` of a frame, whose elements come from the frames of their slices; zero where
// there is none. They are at Positions positions of the row: N, or 1 where all are of one channel.
template <class T, int N, int Positions = N>
LS_DEVICE Vec<T, N> gather(const Frames<const T>& from, const Slices& slices, uint32_t position,
                           int64_t offset) {
  static_assert(Positions == N || Positions == 1);
  if (in_one_slice<Positions>(slices, position))
    return load_or_zero<T, N>(from.of(slices.of(position)), offset);
  int slice[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    slice[j] = slices.of(position);
    position = position + 1 == slices.row.divisor ? 0 : position + 1;
  }
  T lanes[N];
  Vec<T, N>{}.unpack(lanes);
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    bool touched = false;
#pragma unroll
    for (int j = 0; j < N; ++j) touched |= slice[j] == k;
    if (touched && from.slice[k]) {
      T other[N];
      load<T, N>(from.slice[k] + offset).unpack(other);
#pragma unroll
      for (int j = 0; j < N; ++j) lanes[j] = slice[j] == k ? other[j] : lanes[j];
    }
  }
  Vec<T, N> v;
  v.pack(lanes);
  return v;
}

// The adjoint's gather: the sum of both readers.
template <class T, int N, int Positions = N>
LS_DEVICE Vec<T, N> gather(const ReadingFrames<const T>& from, const Slices& slices,
                           uint32_t position, int64_t offset) {
  const Vec<T, N> first = gather<T, N, Positions>(from.first, slices, position, offset);
  if (!from.second.any()) return first;
  acc_t<T> sum[N], other[N];
  widen(first, sum);
  widen(gather<T, N, Positions>(from.second, slices, position, offset), other);
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] += other[j];
  return narrow<T, N>(sum);
}

// Stores a vector of one row to the frames of its elements' slices, where there is one.
template <class T, int N, int Positions = N>
LS_DEVICE void scatter(const Frames<T>& to, const Slices& slices, uint32_t position, int64_t offset,
                       const Vec<T, N>& v) {
  if (in_one_slice<Positions>(slices, position)) {
    T* frame = to.of(slices.of(position));
    if (frame) store<T, N>(frame + offset, v);
    return;
  }
  T lanes[N];
  v.unpack(lanes);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    T* frame = to.of(slices.of(position + j));
    if (frame) frame[offset + j] = lanes[j];
  }
}

}  // namespace latent_shift::cuda
