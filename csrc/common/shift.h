// The temporal shift as plain numbers: which frame a slice of channels reads, and who reads it.
//
//   y[t, slice k] = x[t + offset[k], slice k],  k = 0, 1, 2 in channel order, offset in {-1, 0, 1}
//
// Frames are folded into the batch. Clips have T frames each, or, with cu_frames, lengths of their
// own: clip i is frames [cu_frames[i], cu_frames[i + 1]), and a clip of one frame stays as it is. No
// torch types, host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LS_INLINE static __host__ __device__ __forceinline__
#else
// Internal linkage on purpose: translation units compiled for different instruction sets include
// this header.
#define LS_INLINE static inline __attribute__((always_inline))
#endif

namespace latent_shift {

enum class Boundary : int32_t { kZeros, kReplicate, kCircular };

struct Shift {
  int64_t num_frames;  // T, or the frames of all clips with cu_frames
  int64_t end[3];      // one past the last channel of each slice; end[2] == C
  int32_t offset[3];   // source frame minus destination frame
  Boundary boundary;
  int32_t clips = 0;                   // with cu_frames, at least one
  const int32_t* cu_frames = nullptr;  // [clips + 1], or null
};

LS_INLINE int slice_of(const Shift& shift, int64_t channel) {
  return (channel >= shift.end[0]) + (channel >= shift.end[1]);
}

LS_INLINE int64_t slice_begin(const Shift& shift, int slice) {
  return slice == 0 ? 0 : shift.end[slice - 1];
}

LS_INLINE bool is_identity(const Shift& shift) {
  return shift.offset[0] == 0 && shift.offset[1] == 0 && shift.offset[2] == 0;
}

// Frames [begin, begin + length).
struct Clip {
  int64_t begin, length;
};

// The clip of frame n. It holds n and lies inside the batch whatever cu_frames holds.
LS_INLINE Clip clip_of(const Shift& shift, int64_t n) {
  if (!shift.cu_frames) return {n - n % shift.num_frames, shift.num_frames};
  int32_t first = 0, last = shift.clips;  // n is in one of the clips [first, last)
  while (last - first > 1) {
    const int32_t middle = first + (last - first) / 2;
    (shift.cu_frames[middle] <= n ? first : last) = middle;
  }
  int64_t begin = shift.cu_frames[first], end = shift.cu_frames[first + 1];
  begin = begin < 0 ? 0 : begin < n ? begin : n;
  end = end > shift.num_frames ? shift.num_frames : end > n ? end : n + 1;
  return {begin, end - begin};
}

LS_INLINE int32_t offset_in(const Shift& shift, const Clip& clip, int32_t offset) {
  return shift.cu_frames && clip.length == 1 ? 0 : offset;
}

// The frame that frame n of a clip reads in a slice, -1 where zeros enter.
LS_INLINE int64_t source_frame(const Shift& shift, const Clip& clip, int64_t n, int32_t offset) {
  const int64_t t = n - clip.begin;
  int64_t source = t + offset_in(shift, clip, offset);
  if (source < 0 || source >= clip.length) {
    if (shift.boundary == Boundary::kZeros) return -1;
    source = shift.boundary == Boundary::kReplicate ? t : clip.length - 1 - t;
  }
  return clip.begin + source;
}

LS_INLINE int64_t source_frame(const Shift& shift, int64_t n, int32_t offset) {
  return source_frame(shift, clip_of(shift, n), n, offset);
}

// The frames that read frame n in a slice: none (-1), one, or two at a replicated end.
struct Readers {
  int64_t first, second;
};

LS_INLINE Readers reader_frames(const Shift& shift, const Clip& clip, int64_t n, int32_t offset) {
  offset = offset_in(shift, clip, offset);
  const int64_t T = clip.length, t = n - clip.begin, reader = t - offset;
  Readers readers{-1, -1};
  if (reader >= 0 && reader < T) {
    readers.first = clip.begin + reader;
  } else if (shift.boundary == Boundary::kCircular) {
    readers.first = clip.begin + (reader < 0 ? T - 1 : 0);
  }
  // an end frame that has no neighbour to read reads itself
  const bool own = shift.boundary == Boundary::kReplicate &&
                   ((offset < 0 && t == 0) || (offset > 0 && t == T - 1));
  if (own) (readers.first < 0 ? readers.first : readers.second) = n;
  return readers;
}

LS_INLINE Readers reader_frames(const Shift& shift, int64_t n, int32_t offset) {
  return reader_frames(shift, clip_of(shift, n), n, offset);
}

}  // namespace latent_shift
