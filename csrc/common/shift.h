// The temporal shift as plain numbers: which frame a slice of channels reads, and who reads it.
//
//   y[t, slice k] = x[t + offset[k], slice k],  k = 0, 1, 2 in channel order, offset in {-1, 0, 1}
//
// Frames are folded into the batch: frame n of B*T is frame n % T of its clip. No torch types, host
// and device.
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
  int64_t num_frames;  // T
  int64_t end[3];      // one past the last channel of each slice; end[2] == C
  int32_t offset[3];   // source frame minus destination frame
  Boundary boundary;
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

// The frame (of B*T) that frame n reads in a slice, -1 where zeros enter.
LS_INLINE int64_t source_frame(const Shift& shift, int64_t n, int32_t offset) {
  const int64_t t = n % shift.num_frames;
  int64_t source = t + offset;
  if (source < 0 || source >= shift.num_frames) {
    if (shift.boundary == Boundary::kZeros) return -1;
    source = shift.boundary == Boundary::kReplicate ? t : shift.num_frames - 1 - t;
  }
  return n - t + source;
}

// The frames that read frame n in a slice: none (-1), one, or two at a replicated end.
struct Readers {
  int64_t first, second;
};

LS_INLINE Readers reader_frames(const Shift& shift, int64_t n, int32_t offset) {
  const int64_t T = shift.num_frames, t = n % T, reader = t - offset;
  Readers readers{-1, -1};
  if (reader >= 0 && reader < T) {
    readers.first = n - t + reader;
  } else if (shift.boundary == Boundary::kCircular) {
    readers.first = n - t + (reader < 0 ? T - 1 : 0);
  }
  // an end frame that has no neighbour to read reads itself
  const bool own = shift.boundary == Boundary::kReplicate &&
                   ((offset < 0 && t == 0) || (offset > 0 && t == T - 1));
  if (own) (readers.first < 0 ? readers.first : readers.second) = n;
  return readers;
}

}  // namespace latent_shift
