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

constexpr int64_t kLine = 64;

LS_FN void copy_line(char* to, const char* from, bool streaming) {
  for (int64_t i = 0; i < kLine; i += LS_BYTES) {
    Bytes v;
    __builtin_memcpy(&v, from + i, LS_BYTES);
    if (streaming) {
      stream_bytes(to + i, v);
    } else {
      __builtin_memcpy(to + i, &v, LS_BYTES);
    }
  }
}

LS_FN void copy_run(char* to, const char* from, int64_t count) {
  if (count < kLine) {
    __builtin_memcpy(to, from, count);
    return;
  }
  for (int64_t i = 0; i + kLine <= count; i += kLine) copy_line(to + i, from + i, false);
  copy_line(to + count - kLine, from + count - kLine, false);
}

// Puts runs one behind the other in memory. Past the cache, whole lines at a time: a line in which a
// run ends waits for the next run.
struct RunWriter {
  alignas(64) char around[3 * kLine];  // a line, and what whole copies write around it
  char* const line = around + kLine;
  char* to;                    // where the next run goes; past the cache, where the line goes
  int64_t skip = 0, held = 0;  // bytes of the line before the first run, and in all
  const bool streaming;

  LS_MEMBER RunWriter(char* first, bool streaming) : to(first), streaming(streaming) {
    if (streaming) skip = held = reinterpret_cast<uintptr_t>(first) & (kLine - 1);
    to -= skip;
  }

  LS_MEMBER void write(const char* from, int64_t count) {
    if (!streaming) {
      copy_run(to, from, count);
      to += count;
      return;
    }
    const bool whole = count >= kLine;
    if (held > 0) {
      const int64_t missing = kLine - held < count ? kLine - held : count;
      if (whole) {
        copy_line(line + held, from, false);
      } else {
        __builtin_memcpy(line + held, from, missing);
      }
      held += missing, from += missing, count -= missing;
      if (held < kLine) return;
      if (skip > 0) {
        finish();
      } else {
        copy_line(to, line, true);
      }
      held = 0, to += kLine;
    }
    for (; count >= kLine; count -= kLine, from += kLine, to += kLine) copy_line(to, from, true);
    if (whole) {
      copy_line(line + count - kLine, from + count - kLine, false);
    } else {
      __builtin_memcpy(line, from, count);
    }
    held = count;
  }

  LS_MEMBER void finish() {
    __builtin_memcpy(to + skip, line + skip, held - skip);
    skip = 0;
  }
};

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

// The first element of a frame's part.
LS_FN int64_t unit_begin(const ShiftArgs& a, int64_t units, int64_t part) {
  const Geometry& g = a.geometry;
  if (g.channels_last) return part * ceil_div(g.pixels, units) * g.channels;
  return part * ceil_div(g.channels * g.pixels, units);
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

static void shift(const ShiftArgs& a, int64_t begin, int64_t end) {
  if (a.add_ends) {
    LS_DISPATCH(a.geometry.dtype, add_ends, a, begin, end)
  }
  alignas(64) static const char kZeros[4096] = {};
  const int64_t size = a.element_size, stride = a.geometry.channels * a.geometry.pixels * size;
  const char* x = static_cast<const char*>(a.x);
  const int64_t units = shift_units(a);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units;
    const char* source[3];
    for (int k = 0; k < 3; ++k) {
      const int64_t from = source_frame(a.shift, n, a.shift.offset[k]);
      source[k] = from < 0 ? nullptr : x + from * stride;
    }
    RunWriter out(static_cast<char*>(a.y) + n * stride + unit_begin(a, units, unit % units) * size,
                  a.streaming);
    for_each_run(a, units, unit % units, [&](int k, int64_t first, int64_t count) {
      if (source[k]) return out.write(source[k] + first * size, count * size);
      constexpr int64_t kMost = sizeof(kZeros);
      for (int64_t left = count * size; left > 0; left -= kMost)
        out.write(kZeros, left < kMost ? left : kMost);
    });
    out.finish();
  }
  if (a.streaming) stream_fence();
}

static void shift_add(const ShiftArgs& a, int64_t begin, int64_t end) {
  LS_DISPATCH(a.geometry.dtype, add_shifted, a, begin, end)
}

}  // namespace
}  // namespace LS_ISA
}  // namespace latent_shift
