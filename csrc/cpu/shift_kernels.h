// Moving and adding channel slices: temporal_shift, its adjoint, shift_add.
//
// Both layouts are runs of contiguous elements that come from one source frame: a slice of planes
// (NCHW) or a slice of one pixel's channels (channels_last). A unit is a block of one output frame;
// 2 bytes moved per byte of x. Included by the isa_*.cpp files after vec.h.
#pragma once

namespace latent_shift {
namespace LS_ISA {
namespace {

typedef char Bytes __attribute__((vector_size(LS_BYTES)));

LS_FN void copy_bytes(char* to, const char* from, int64_t count, bool streaming) {
  int64_t i = 0;
  if (count < LS_BYTES) {
    __builtin_memcpy(to, from, count);
    return;
  }
  Bytes last;
  __builtin_memcpy(&last, from + count - LS_BYTES, LS_BYTES);
  if (streaming) {
    // up to a register boundary, then aligned stores that bypass the cache
    Bytes first;
    __builtin_memcpy(&first, from, LS_BYTES);
    __builtin_memcpy(to, &first, LS_BYTES);
    i = LS_BYTES - (reinterpret_cast<uintptr_t>(to) & (LS_BYTES - 1));
    for (; i + 2 * LS_BYTES <= count; i += 2 * LS_BYTES) {
      Bytes a, b;
      __builtin_memcpy(&a, from + i, LS_BYTES);
      __builtin_memcpy(&b, from + i + LS_BYTES, LS_BYTES);
      stream_bytes(to + i, a);
      stream_bytes(to + i + LS_BYTES, b);
    }
  }
  for (; i + LS_BYTES <= count; i += LS_BYTES) {
    Bytes a;
    __builtin_memcpy(&a, from + i, LS_BYTES);
    __builtin_memcpy(to + i, &a, LS_BYTES);
  }
  __builtin_memcpy(to + count - LS_BYTES, &last, LS_BYTES);
}

// (a + b) * scale in the accumulate type; b may be null.
template <typename T>
LS_FN void add_run(T* to, const T* a, const T* b, double scale, int64_t count) {
  typedef typename Lane<T>::Vec V;
  typedef typename Lane<T>::Acc Acc;
  constexpr int L = Lane<T>::kLanes;
  const Acc factor = static_cast<Acc>(scale);
  for (int64_t i = 0; i < count;) {
    int64_t lanes = L;
    if (i + L > count) {
      // the last vector overlaps its predecessor where there is one
      if (count >= L) {
        i = count - L;
      } else {
        lanes = count;
      }
    }
    V sum = load(a + i, lanes);
    sum = sum + (b ? load(b + i, lanes) : V{});
    store(to + i, sum * factor, lanes);
    i += lanes;
  }
}

// Calls run(slice, first element of the frame, element count) for every contiguous run of a frame's
// part.
template <typename Run>
LS_FN void for_each_run(const ShiftArgs& a, int64_t units, int64_t part, const Run& run) {
  const Geometry& g = a.geometry;
  if (g.channels_last) {
    const int64_t per_unit = ceil_div(g.pixels, units);
    const int64_t begin = part * per_unit;
    const int64_t end = begin + per_unit < g.pixels ? begin + per_unit : g.pixels;
    for (int64_t p = begin; p < end; ++p)
      for (int k = 0; k < 3; ++k) {
        const int64_t first = slice_begin(a.shift, k);
        if (a.shift.end[k] > first) run(k, p * g.channels + first, a.shift.end[k] - first);
      }
  } else {
    const int64_t total = g.channels * g.pixels, per_unit = ceil_div(total, units);
    const int64_t begin = part * per_unit;
    const int64_t end = begin + per_unit < total ? begin + per_unit : total;
    for (int k = 0; k < 3; ++k) {
      const int64_t lo = slice_begin(a.shift, k) * g.pixels, hi = a.shift.end[k] * g.pixels;
      const int64_t first = lo > begin ? lo : begin, last = hi < end ? hi : end;
      if (last > first) run(k, first, last - first);
    }
  }
}

template <typename T>
static void add_ends(const ShiftArgs& a, int64_t begin, int64_t end) {
  const int64_t stride = a.geometry.channels * a.geometry.pixels;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t units = shift_units(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units;
    Readers readers[3];  // a.shift is the forward's: what read frame n sends its gradient back
    for (int k = 0; k < 3; ++k) readers[k] = reader_frames(a.shift, n, a.shift.offset[k]);
    for_each_run(a, units, unit % units, [&](int k, int64_t first, int64_t count) {
      const Readers from = readers[k];
      T* to = y + n * stride + first;
      if (from.second >= 0) {
        add_run(to, x + from.first * stride + first, x + from.second * stride + first, 1.0, count);
      } else if (from.first >= 0) {
        __builtin_memcpy(to, x + from.first * stride + first, count * sizeof(T));
      } else {
        __builtin_memset(static_cast<void*>(to), 0, count * sizeof(T));
      }
    });
  }
}

template <typename T>
static void add_shifted(const ShiftArgs& a, int64_t begin, int64_t end) {
  const int64_t stride = a.geometry.channels * a.geometry.pixels;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const int64_t units = shift_units(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units;
    int64_t source[3];
    for (int k = 0; k < 3; ++k) source[k] = source_frame(a.shift, n, a.shift.offset[k]);
    for_each_run(a, units, unit % units, [&](int k, int64_t first, int64_t count) {
      add_run(y + n * stride + first, residual + n * stride + first,
              source[k] < 0 ? nullptr : x + source[k] * stride + first, a.scale, count);
    });
  }
}

// channels_last past the cache: rows are put together in L1 and leave it as whole lines.
static void shift_rows_streaming(const ShiftArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kStage = 16 << 10;
  alignas(64) char stage[kStage];
  const Geometry& g = a.geometry;
  const int64_t row = g.channels * a.element_size, rows = kStage / row;
  const int64_t units = shift_units(a), per_unit = ceil_div(g.pixels, units);
  const char* x = static_cast<const char*>(a.x);
  char* y = static_cast<char*>(a.y);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units;
    const int64_t first = unit % units * per_unit;
    const int64_t last = first + per_unit < g.pixels ? first + per_unit : g.pixels;
    for (int64_t p = first; p < last; p += rows) {
      const int64_t count = last - p < rows ? last - p : rows;
      for (int k = 0; k < 3; ++k) {
        const int64_t at = slice_begin(a.shift, k) * a.element_size;
        const int64_t size = a.shift.end[k] * a.element_size - at;
        const int64_t source = source_frame(a.shift, n, a.shift.offset[k]);
        const char* from = x + (source * g.pixels + p) * row + at;
        for (int64_t i = 0; i < count; ++i) {
          if (source < 0) {
            __builtin_memset(stage + i * row + at, 0, size);
          } else {
            copy_bytes(stage + i * row + at, from + i * row, size, false);
          }
        }
      }
      copy_bytes(y + (n * g.pixels + p) * row, stage, count * row, true);
    }
  }
}

static void shift(const ShiftArgs& a, int64_t begin, int64_t end) {
  if (a.add_ends) {
    LS_DISPATCH(a.geometry.dtype, add_ends, a, begin, end)
  }
  if (a.streaming && a.geometry.channels_last && a.geometry.channels * a.element_size <= 4096) {
    shift_rows_streaming(a, begin, end);
    return stream_fence();
  }
  const int64_t size = a.element_size, stride = a.geometry.channels * a.geometry.pixels * size;
  const char* x = static_cast<const char*>(a.x);
  char* y = static_cast<char*>(a.y);
  const int64_t units = shift_units(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units;
    int64_t source[3];
    for (int k = 0; k < 3; ++k) source[k] = source_frame(a.shift, n, a.shift.offset[k]);
    for_each_run(a, units, unit % units, [&](int k, int64_t first, int64_t count) {
      char* to = y + n * stride + first * size;
      if (source[k] < 0) {
        __builtin_memset(to, 0, count * size);
      } else {
        copy_bytes(to, x + source[k] * stride + first * size, count * size,
                   a.streaming && !a.geometry.channels_last);
      }
    });
  }
  if (a.streaming) stream_fence();
}

static void shift_add(const ShiftArgs& a, int64_t begin, int64_t end) {
  LS_DISPATCH(a.geometry.dtype, add_shifted, a, begin, end)
}

}  // namespace
}  // namespace LS_ISA
}  // namespace latent_shift
