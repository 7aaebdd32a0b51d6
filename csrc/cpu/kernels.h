// What the operators (torch side) ask of the kernels (one instance per instruction set): plain
// structs, no torch.
//
// A kernel processes the units [begin, end) of its operator. Units never share an output element
// and no result depends on how units are spread over threads, so any partition gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/shift.h"

namespace latent_shift {

enum class DType : int32_t { kFloat, kBFloat16, kHalf, kDouble };

// A tensor (N, C, H, W) is N frames of C planes of P pixels (NCHW) or of P rows of C channels
// (channels_last).
struct Geometry {
  DType dtype;
  bool channels_last;
  int64_t frames, channels, pixels;  // N, C, P
};

// A table (R, C) in the accumulate type; frame n reads row n * R / N. Absent where data is null.
struct Table {
  const void* data;
  int64_t rows;
};

struct ShiftArgs {
  Geometry geometry;
  int64_t element_size;  // of x; any type can be moved, adding needs geometry.dtype
  Shift shift;
  bool add_ends;  // adjoint of replicate: end frames also receive what they had read themselves
  const void* x;  // [N, C, P]
  const void* residual;  // [N, C, P], shift_add only
  double scale;          // shift_add only
  void* y;               // [N, C, P]
  int64_t block;         // bytes of a frame per unit
  bool streaming;        // y will not be read before it leaves the cache
};

struct NormArgs {
  Geometry geometry;
  Shift shift;
  bool shift_before, shift_after;  // neither where the shift is the identity
  int64_t groups;                  // G
  int64_t span;                    // channels (whole groups) per unit, channels_last
  double eps;
  bool streaming;
  const void*
      zeros;      // P (NCHW) or C (channels_last) zeros, what a frame outside the clip looks like
  const void* x;  // [N, C, P]
  const void* residual;  // [N, C, P] or null
  Table temb, weight, bias, ada_scale, ada_shift;
  void *mean, *rstd;  // [N, G], written by forward, read by backward
  // forward
  void* y;    // [N, C, P]
  void* sum;  // [N, C, P] or null
  // backward
  bool scatter;             // dx is written where the shift had read x
  bool is_sum;              // x is the stored sum: neither shift nor temb applies to it any more
  const void *dy, *dsum;    // [N, C, P]
  void *dx, *dresidual;     // [N, C, P]; dresidual null where it equals dx
  void *dz, *dz_xhat, *ds;  // [N, C] sums over pixels; ds null without temb
};

struct Kernels {
  const char* isa;
  void (*shift)(const ShiftArgs&, int64_t begin, int64_t end);
  void (*shift_add)(const ShiftArgs&, int64_t begin, int64_t end);
  size_t (*norm_scratch)(const NormArgs&, bool backward);  // bytes per thread
  void (*norm_forward)(const NormArgs&, int64_t begin, int64_t end, char* scratch);
  void (*norm_backward)(const NormArgs&, int64_t begin, int64_t end, char* scratch);
};

LS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Units of one frame.
LS_INLINE int64_t shift_units(const ShiftArgs& a) {
  const int64_t row = a.geometry.channels_last ? a.geometry.channels * a.element_size : 1;
  const int64_t rows = a.geometry.channels_last
                           ? a.geometry.pixels
                           : a.geometry.channels * a.geometry.pixels * a.element_size;
  const int64_t rows_per_unit = a.block / row > 0 ? a.block / row : 1;
  return ceil_div(rows, rows_per_unit);
}

LS_INLINE int64_t norm_units(const NormArgs& a) {
  return a.geometry.channels_last ? ceil_div(a.geometry.channels, a.span) : a.groups;
}

// The best of what this machine runs, or LATENT_SHIFT_CPU_ISA (baseline, avx2, avx512), chosen
// once.
const Kernels& kernels();

}  // namespace latent_shift
