// Shift, residual, GroupNorm and SiLU in one visit of the cache, forward and backward.
//
//   s = [residual +] shift_before(x) [+ temb]    stored (and rounded) where there is a residual
//   z = (s - mean) * scale + shift,  y = shift_after(silu(z))
//   scale = rstd * weight * (1 + ada_scale),  shift = bias * (1 + ada_scale) + ada_shift
//
// A unit is one frame and one group (NCHW), or one frame and a span of whole groups (channels_last).
// Its input comes from memory once; mean, centred variance and the activation come out of cache, L2
// in NCHW. The shift is the frame of the load (before) or of the store (after). While a unit of NCHW
// computes exponentials, the next one's input is prefetched.
//
// channels_last units are cut into slots: vectors of channels that lie in one slice, the last
// vector of a slice overlapping its predecessor, so that no lane is masked and group boundaries do
// not matter. Statistics are kept per channel and merged to groups (Chan et al. 1979).
//
// Statistics are fp32 (fp64 for fp64), sums of the differences from a pivot and of their squares. A
// sample of the input makes the pivot; where it lies further from the mean than the standard
// deviation, the mean becomes the pivot of a second pass, so that cancellation costs one bit.
// All sums run in an order given by the shape alone. Included by the isa_*.cpp files after vec.h.
#pragma once

namespace latent_shift {
namespace LS_ISA {
namespace {

LS_FN char* carve(char*& scratch, int64_t bytes) {
  char* begin = scratch;
  scratch += (bytes + 63) / 64 * 64;
  return begin;
}

template <typename A>
LS_FN const A* row_of(const Table& table, int64_t n, const Geometry& g) {
  if (!table.data) return nullptr;
  return static_cast<const A*>(table.data) + n * table.rows / g.frames * g.channels;
}

// The per-channel numbers of one frame.
template <typename A>
struct Affine {
  const A *weight, *bias, *ada_scale, *ada_shift, *temb;
};

template <typename A>
LS_FN Affine<A> affine_of(const NormArgs& a, int64_t n) {
  const Geometry& g = a.geometry;
  return {row_of<A>(a.weight, 0, g), row_of<A>(a.bias, 0, g), row_of<A>(a.ada_scale, n, g),
          row_of<A>(a.ada_shift, n, g), a.is_sum ? nullptr : row_of<A>(a.temb, n, g)};
}

// d(z)/d(xhat) and the constant of z
template <typename A>
LS_FN A gain(const Affine<A>& f, int64_t c) {
  return (f.weight ? f.weight[c] : 1) * (f.ada_scale ? 1 + f.ada_scale[c] : 1);
}
template <typename A>
LS_FN A constant(const Affine<A>& f, int64_t c) {
  return (f.bias ? f.bias[c] : 0) * (f.ada_scale ? 1 + f.ada_scale[c] : 1) +
         (f.ada_shift ? f.ada_shift[c] : 0);
}

// Both for channels [c0, c1), in loops that vectorise.
template <typename A>
LS_FN void tabulate(const Affine<A>& f, int64_t c0, int64_t c1, A* gains, A* constants) {
  const int64_t count = c1 - c0;
  for (int64_t i = 0; i < count; ++i) gains[i] = f.weight ? f.weight[c0 + i] : 1;
  for (int64_t i = 0; i < count; ++i) constants[i] = f.bias ? f.bias[c0 + i] : 0;
  if (f.ada_scale)
    for (int64_t i = 0; i < count; ++i) {
      gains[i] *= 1 + f.ada_scale[c0 + i];
      constants[i] *= 1 + f.ada_scale[c0 + i];
    }
  if (f.ada_shift)
    for (int64_t i = 0; i < count; ++i) constants[i] += f.ada_shift[c0 + i];
}

// Where a slice of frame n is read and written. Frames are -1 where there is none.
struct Route {
  int64_t from;     // input frame
  int64_t to[2];    // frames that receive the result
  int64_t cleared;  // frame of the output nobody else writes: zeros
};

// Forward: x is gathered (shift_before), y scattered (shift_after).
LS_FN Route forward_route(const NormArgs& a, int64_t n, int slice) {
  const int32_t offset = a.shift.offset[slice];
  Route route{n, {n, -1}, -1};
  if (a.shift_before) route.from = source_frame(a.shift, n, offset);
  if (a.shift_after) {
    const Readers readers = reader_frames(a.shift, n, offset);
    route.to[0] = readers.first, route.to[1] = readers.second;
    if (source_frame(a.shift, n, offset) < 0) route.cleared = n;
  }
  return route;
}

// Backward of the stores: dy is gathered from the reader (shift_after), dx scattered to the source
// (scatter). Replicated ends, where two gradients meet, are left to the operator.
LS_FN Route backward_route(const NormArgs& a, int64_t n, int slice) {
  const int32_t offset = a.shift.offset[slice];
  Route route{n, {n, -1}, -1};
  if (a.shift_after) route.from = reader_frames(a.shift, n, offset).first;
  if (a.scatter) {
    route.to[0] = source_frame(a.shift, n, offset);
    if (reader_frames(a.shift, n, offset).first < 0) route.cleared = n;
  }
  return route;
}

template <typename A>
LS_FN A canonical(A v) {
  return v == v ? v : static_cast<A>(__builtin_nan(""));
}

// silu_of((x - center) * scale + shift) is the activation of one group's channels [c0, c0 + count);
// scale and shift hold the factor -log2(e). NaNs are made canonical, see
// Lane<BFloat16>::packed_clean.
template <typename A>
LS_FN void tabulate_lines(const Affine<A>& f, int64_t c0, int64_t count, A mean, A rstd, A* centers,
                          A* scales, A* shifts) {
  constexpr A kFactor = static_cast<A>(-kLog2E);
  tabulate(f, c0, c0 + count, scales, shifts);
  for (int64_t i = 0; i < count; ++i) centers[i] = canonical(mean - (f.temb ? f.temb[c0 + i] : 0));
  for (int64_t i = 0; i < count; ++i) scales[i] = canonical(kFactor * (rstd * scales[i]));
  for (int64_t i = 0; i < count; ++i) shifts[i] = canonical(kFactor * shifts[i]);
}

template <typename T>
LS_FN void prefetch_l2(const T* p) {
  __builtin_prefetch(p, 0, 2);
}
// Also for lines about to be written: strided stores would otherwise wait for them one by one.
template <typename T>
LS_FN void prefetch_l1(const T* p) {
  __builtin_prefetch(p, 0, 3);
}

template <typename T>
LS_FN void write_clean(T* to, typename Lane<T>::Vec v, int64_t lanes, bool streaming) {
  if (__builtin_expect(lanes != Lane<T>::kLanes, 0)) return store(to, v, lanes);
  if constexpr (Lane<T>::element(1) != 1) {  // bf16
    const UIntVec both = Lane<T>::packed_clean(v);
    if (streaming) return stream_bytes(to, both);
    __builtin_memcpy(to, &both, sizeof(both));
  } else {
    if (streaming) return Lane<T>::stream(to, v);
    Lane<T>::store(to, v);
  }
}

template <typename T>
LS_FN void write(T* to, typename Lane<T>::Vec v, int64_t lanes, bool streaming) {
  if (streaming && lanes == Lane<T>::kLanes) return Lane<T>::stream(to, v);
  store(to, v, lanes);
}

LS_FN bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & (LS_BYTES - 1)) == 0; }

// ---- NCHW ----

// Adds term(i, sums, lanes) over a plane, in chunks of 32 registers so that long sums round as
// little as short ones: half-precision inputs share their trailing bits, and rounding errors that
// agree in sign would not average out.
template <typename T, int kSums, typename Term>
LS_FN void accumulate(int64_t pixels, typename Lane<T>::Vec (&sums)[kSums], const Term& term) {
  typedef typename Lane<T>::Vec V;
  constexpr int64_t L = Lane<T>::kLanes;
  for (int64_t begin = 0; begin < pixels; begin += 16 * L) {
    const int64_t end = pixels - begin < 16 * L ? pixels : begin + 16 * L;
    V even[kSums] = {}, odd[kSums] = {};
    int64_t i = begin;
    for (; i + 2 * L <= end; i += 2 * L) {
      term(i, even, L);
      term(i + L, odd, L);
    }
    if (i + L <= end) {
      term(i, even, L);
      i += L;
    }
    if (i < end) term(i, odd, end - i);
    for (int k = 0; k < kSums; ++k) sums[k] += even[k] + odd[k];
  }
}

// Calls term(i, lanes) for the vectors of a plane.
template <typename T, typename Term>
LS_FN void for_each_vector(int64_t pixels, const Term& term) {
  constexpr int64_t L = Lane<T>::kLanes;
  int64_t i = 0;
  for (; i + L <= pixels; i += L) term(i, L);
  if (i < pixels) term(i, pixels - i);
}

template <typename T>
static void norm_forward_planes(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  typedef typename Lane<T>::Acc A;
  typedef typename Lane<T>::Vec V;
  constexpr int64_t L = Lane<T>::kLanes;
  const Geometry& g = a.geometry;
  const int64_t P = g.pixels, D = g.channels / a.groups, slab = D * P, frame = g.channels * P;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  const T* zeros = static_cast<const T*>(a.zeros);
  T *y = static_cast<T*>(a.y), *sum = static_cast<T*>(a.sum);
  A* centers = reinterpret_cast<A*>(carve(scratch, 3 * D * sizeof(A)));
  A *scales = centers + D, *shifts = scales + D;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / a.groups, c0 = unit % a.groups * D;
    Route routes[3];
    for (int k = 0; k < 3; ++k) routes[k] = forward_route(a, n, k);
    Affine<A> f = affine_of<A>(a, n);
    const auto plane = [&](int64_t c) {
      const int64_t from = routes[slice_of(a.shift, c)].from;
      return from < 0 ? zeros : x + from * frame + c * P;
    };

    // for statistics, planes that lie next to each other are one, unless each needs a number of its
    // own
    const auto run_end = [&](int64_t c) {
      const int slice = slice_of(a.shift, c);
      if (f.temb || routes[slice].from < 0) return c + 1;
      return a.shift.end[slice] < c0 + D ? a.shift.end[slice] : c0 + D;
    };
    // One pass suffices where the pivot is nearer to the mean than the standard deviation: at first
    // the mean of a vector of every plane, from the middle of the image.
    const int64_t middle = P < L ? 0 : P / 2 / L * L, sampled = P < L ? P : L;
    V sample{};
    A temb_total = 0;
    for (int64_t c = c0; c < c0 + D; ++c) {
      sample += load(plane(c) + middle, sampled);
      if (residual) sample += load(residual + n * frame + c * P + middle, sampled);
      if (f.temb) temb_total += f.temb[c];
    }
    A pivot =
        truncated((sum_lanes(sample) / static_cast<A>(sampled) + temb_total) / static_cast<A>(D));
    const auto input = [&](int64_t c) { return residual ? sum + n * frame + c * P : plane(c); };
    double drift, variance;
    for (bool first = true;; first = false) {
      V moments[2] = {};
      for (int64_t c = c0, next; c < c0 + D; c = next) {
        next = run_end(c);
        const int64_t pixels = (next - c) * P;
        const A temb = f.temb ? f.temb[c] : 0, center = pivot - temb;
        const auto add = [&](V v, A about, V* partial, int64_t lanes) {
          const V d = first_lanes<T>(v - about, lanes);
          partial[0] += d;
          partial[1] += d * d;
        };
        if (residual && first) {
          const T *source = plane(c), *other = residual + n * frame + c * P;
          T* stored = sum + n * frame + c * P;
          accumulate<T>(pixels, moments, [&](int64_t i, V* partial, int64_t lanes) {
            const V v = rounded<T>(load(source + i, lanes) + load(other + i, lanes) + temb);
            store(stored + i, v, lanes);
            add(v, pivot, partial, lanes);
          });
        } else {
          const T* source = input(c);
          accumulate<T>(pixels, moments, [&](int64_t i, V* partial, int64_t lanes) {
            add(load(source + i, lanes), center, partial, lanes);
          });
        }
      }
      if (residual) f.temb = nullptr;  // it is in the stored sum
      drift = static_cast<double>(sum_lanes(moments[0])) / slab;
      variance = static_cast<double>(sum_lanes(moments[1])) / slab - drift * drift;
      if (!first || !(drift * drift > variance)) break;
      pivot = truncated(static_cast<A>(pivot + drift));
    }
    const A mean = static_cast<A>(pivot + drift);
    const A rstd =
        static_cast<A>(1 / __builtin_sqrt((variance > 0 ? variance : variance * 0) + a.eps));
    static_cast<A*>(a.mean)[unit] = mean;
    static_cast<A*>(a.rstd)[unit] = rstd;

    tabulate_lines(f, c0, D, mean, rstd, centers, scales, shifts);
    for (int64_t c = c0; c < c0 + D; ++c) {
      const T* source = input(c);
      // the next unit's planes follow this one's
      const T* next = plane(c) + slab;
      const T* next_residual = residual ? residual + n * frame + c * P + slab : next;
      const Route& route = routes[slice_of(a.shift, c)];
      const A center = centers[c - c0], scale = scales[c - c0], shift = shifts[c - c0];
      T* to = route.to[0] < 0 ? nullptr : y + route.to[0] * frame + c * P;
      T* again = route.to[1] < 0 ? nullptr : y + route.to[1] * frame + c * P;
      const bool streaming = a.streaming && aligned(to);
      if (to) {
        for_each_vector<T>(P, [&](int64_t i, int64_t lanes) {
          prefetch_l2(next + i);
          if (residual) prefetch_l2(next_residual + i);
          const V v = silu_of<T>((load(source + i, lanes) - center) * scale + (V{} + shift));
          write_clean(to + i, v, lanes, streaming);
        });
        if (again) __builtin_memcpy(again, to, P * sizeof(T));
      }
      if (route.cleared >= 0)
        __builtin_memset(static_cast<void*>(y + route.cleared * frame + c * P), 0, P * sizeof(T));
    }
  }
  if (a.streaming) stream_fence();
}

// What the loss gradient of z is made of: t = -log2(e) * z.
template <typename T, typename V, typename A>
LS_FN V silu_gradient(V dy, V t, A) {
  const V gate = sigmoid_of<T>(t);
  const V z = t * static_cast<A>(-1 / kLog2E);
  return dy * (gate + gate * z * (A{1} - gate));
}

template <typename T>
static void norm_backward_planes(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  typedef typename Lane<T>::Acc A;
  typedef typename Lane<T>::Vec V;
  constexpr int L = Lane<T>::kLanes;
  const Geometry& g = a.geometry;
  const int64_t P = g.pixels, D = g.channels / a.groups, slab = D * P, padded = ceil_div(P, L) * L;
  const int64_t frame = g.channels * P;
  const T* x = static_cast<const T*>(a.x);
  const T *dy = static_cast<const T*>(a.dy), *dsum = static_cast<const T*>(a.dsum);
  const T* zeros = static_cast<const T*>(a.zeros);
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  A *dz_sums = static_cast<A*>(a.dz), *dz_xhat_sums = static_cast<A*>(a.dz_xhat),
    *ds_sums = static_cast<A*>(a.ds);
  A* dz = reinterpret_cast<A*>(carve(scratch, D * padded * sizeof(A)));  // [D, P]
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / a.groups, c0 = unit % a.groups * D;
    Route routes[3];
    int64_t x_frames[3];
    for (int k = 0; k < 3; ++k) {
      routes[k] = backward_route(a, n, k);
      x_frames[k] = a.shift_before && !a.is_sum ? source_frame(a.shift, n, a.shift.offset[k]) : n;
    }
    const Affine<A> f = affine_of<A>(a, n);
    const A mean = static_cast<const A*>(a.mean)[unit], rstd = static_cast<const A*>(a.rstd)[unit];
    const auto x_plane = [&](int64_t c) {
      const int64_t from = x_frames[slice_of(a.shift, c)];
      return from < 0 ? zeros : x + from * frame + c * P;
    };
    const auto dy_plane = [&](int64_t c) {
      const int64_t from = routes[slice_of(a.shift, c)].from;
      return from < 0 ? zeros : dy + from * frame + c * P;
    };

    double mean_dxhat = 0, mean_dxhat_xhat = 0;
    for (int64_t c = c0; c < c0 + D; ++c) {
      const T *source = x_plane(c), *grad = dy_plane(c);
      A* kept = dz + (c - c0) * padded;
      const A center = mean - (f.temb ? f.temb[c] : 0);
      const A scale = static_cast<A>(-kLog2E * rstd * gain(f, c)),
              shift = static_cast<A>(-kLog2E * constant(f, c));
      V sums[2] = {};
      accumulate<T>(P, sums, [&](int64_t i, V* partial, int64_t lanes) {
        const V d = load(source + i, lanes) - center;
        // dy is zero behind the last lane
        const V v = silu_gradient<T>(load(grad + i, lanes), d * scale + shift, A{});
        Lane<A>::store(kept + i, v);
        partial[0] += first_lanes<T>(v, lanes);
        partial[1] += first_lanes<T>(v * d, lanes);
      });
      const A dz_sum = sum_lanes(sums[0]), dz_xhat_sum = sum_lanes(sums[1]) * rstd;
      dz_sums[n * g.channels + c] = dz_sum;
      dz_xhat_sums[n * g.channels + c] = dz_xhat_sum;
      mean_dxhat += static_cast<double>(dz_sum) * gain(f, c);
      mean_dxhat_xhat += static_cast<double>(dz_xhat_sum) * gain(f, c);
    }
    const A of_x = static_cast<A>(-mean_dxhat_xhat / slab * rstd * rstd);
    const A fixed = static_cast<A>(-mean_dxhat / slab * rstd);

    for (int64_t c = c0; c < c0 + D; ++c) {
      const T* source = x_plane(c);
      const T *next = source + slab, *next_grad = dy_plane(c) + slab;
      const T* extra = dsum ? dsum + n * frame + c * P : nullptr;
      const A* kept = dz + (c - c0) * padded;
      const Route& route = routes[slice_of(a.shift, c)];
      const A center = mean - (f.temb ? f.temb[c] : 0), of_dz = gain(f, c) * rstd;
      T* to = route.to[0] < 0 ? nullptr : dx + route.to[0] * frame + c * P;
      T* again = dresidual ? dresidual + n * frame + c * P : nullptr;
      const bool streaming = a.streaming && aligned(to);
      V total[1] = {};
      accumulate<T>(P, total, [&](int64_t i, V* partial, int64_t lanes) {
        prefetch_l2(next + i);
        prefetch_l2(next_grad + i);
        V v = (load(source + i, lanes) - center) * of_x + (V{} + fixed);
        v = Lane<A>::load(kept + i) * of_dz + v;
        if (extra) v += load(extra + i, lanes);
        if (ds_sums) partial[0] += first_lanes<T>(v, lanes);
        if (to) write(to + i, v, lanes, streaming);
        if (again) store(again + i, v, lanes);
      });
      if (ds_sums) ds_sums[n * g.channels + c] = sum_lanes(total[0]);
      if (route.cleared >= 0)
        __builtin_memset(static_cast<void*>(dx + route.cleared * frame + c * P), 0, P * sizeof(T));
    }
  }
  if (a.streaming) stream_fence();
}

// ---- channels_last ----

// Channels [begin, end) of a unit that lie in one slice, cut into `slots` vectors, numbered from
// `first`. The last one ends with the slice, over its predecessor; a slice narrower than a vector
// has one partial slot.
struct Segment {
  int64_t begin, end, first, slots, lanes;
  int slice;

  int64_t channel(int64_t slot, int64_t L) const {
    const int64_t c = begin + slot * L;
    return c + lanes > end ? end - lanes : c;
  }
};

struct Segments {
  Segment of[3];
  int count;
  int64_t slots;
};

LS_FN Segments make_segments(const NormArgs& a, int64_t L, int64_t c0, int64_t c1) {
  Segments s;
  s.count = 0;
  s.slots = 0;
  for (int k = 0; k < 3; ++k) {
    const int64_t lo = slice_begin(a.shift, k) > c0 ? slice_begin(a.shift, k) : c0;
    const int64_t hi = a.shift.end[k] < c1 ? a.shift.end[k] : c1;
    if (lo >= hi) continue;
    s.of[s.count++] = {lo, hi, s.slots, ceil_div(hi - lo, L), hi - lo < L ? hi - lo : L, k};
    s.slots += ceil_div(hi - lo, L);
  }
  return s;
}

LS_FN int64_t max_slots(const NormArgs& a, int64_t lanes) { return a.span / lanes + 4; }

// A frame's rows, or a row of zeros again and again where the frame lies outside the clip.
template <typename T>
struct Rows {
  const T* p;
  int64_t stride;
};

template <typename T>
LS_FN Rows<T> rows_of(const T* x, const T* zeros, int64_t from, const Geometry& g) {
  if (from < 0) return {zeros, 0};
  return {x + from * g.pixels * g.channels, g.channels};
}

// Calls term(slot, channel, lanes, slice) for every slot of the unit.
template <int L, typename Term>
LS_FN void for_each_slot(const Segments& segments, const Term& term) {
  for (int s = 0; s < segments.count; ++s) {
    const Segment& segment = segments.of[s];
    if (segment.lanes == L) {
      for (int64_t j = 0; j < segment.slots; ++j)
        term(segment.first + j, segment.channel(j, L), int64_t{L}, segment.slice);
    } else {
      term(segment.first, segment.begin, segment.lanes, segment.slice);
    }
  }
}

// Calls term(channel, lanes) for the vectors of a segment of `width` channels.
template <int L, typename Term>
LS_FN void for_each_channel(int64_t width, const Term& term) {
  if (width < L) return term(0, width);
  for (int64_t c = 0; c < width; c += L) term(c + L > width ? width - L : c, int64_t{L});
}

constexpr int64_t kBlock = 64;  // pixels summed before they are added to the sums of a frame
constexpr int64_t kStep = 8;    // pixels summed before they are added to a slot's sum

template <typename T>
static void norm_forward_rows(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  typedef typename Lane<T>::Acc A;
  typedef typename Lane<T>::Vec V;
  constexpr int L = Lane<T>::kLanes;
  const Geometry& g = a.geometry;
  const int64_t P = g.pixels, C = g.channels, D = C / a.groups, frame = C * P,
                units = norm_units(a);
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  const T* zeros = static_cast<const T*>(a.zeros);
  T *y = static_cast<T*>(a.y), *sum = static_cast<T*>(a.sum);
  const int64_t most = max_slots(a, L);
  V* sums = reinterpret_cast<V*>(carve(scratch, 2 * most * sizeof(V)));
  V* moments = reinterpret_cast<V*>(carve(scratch, 2 * most * sizeof(V)));  // of a block
  V* pivots = reinterpret_cast<V*>(carve(scratch, most * sizeof(V)));
  V* lines = reinterpret_cast<V*>(carve(scratch, 3 * most * sizeof(V)));
  A* channel = reinterpret_cast<A*>(carve(scratch, 6 * a.span * sizeof(A)));
  A *channel_means = channel, *channel_squares = channel + a.span;
  A *channel_drifts = channel_squares + a.span, *centers = channel_drifts + a.span;
  A *scales = centers + a.span, *shifts = scales + a.span;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units, c0 = unit % units * a.span;
    const int64_t c1 = c0 + a.span < C ? c0 + a.span : C;
    const Segments segments = make_segments(a, L, c0, c1);
    Route routes[3];
    Rows<T> sources[3];
    for (int k = 0; k < 3; ++k) {
      routes[k] = forward_route(a, n, k);
      sources[k] = rows_of(x, zeros, routes[k].from, g);
    }
    Affine<A> f = affine_of<A>(a, n);
    // zeros have no channels to tell apart
    const auto at = [&](const Rows<T>& rows, int64_t p, int64_t channel) {
      return rows.stride ? rows.p + p * rows.stride + channel : rows.p;
    };

    // One pass suffices where the pivots are nearer to the means than a group's standard deviation:
    // at first the means of a few pixels from all over the image.
    const int64_t apart = ceil_div(P, kStep);
    const A sampled = static_cast<A>(ceil_div(P, apart));
    for_each_slot<L>(segments, [&](int64_t slot, int64_t channel, int64_t lanes, int slice) {
      V total{};
      for (int64_t p = 0; p < P; p += apart) {
        total += load(at(sources[slice], p, channel), lanes);
        if (residual) total += load(residual + n * frame + p * C + channel, lanes);
      }
      total = total / sampled;
      if (residual && f.temb) total += load_table<T>(f.temb + channel, lanes);
      pivots[slot] = truncated(total);
    });
    bool again = true;
    for (bool first = true; again; first = false) {
      for (int64_t j = 0; j < 2 * segments.slots; ++j) sums[j] = moments[j] = V{};
      for (int64_t p = 0; p < P; p += kStep) {
        const int64_t count = P - p < kStep ? P - p : kStep;
        for_each_slot<L>(segments, [&](int64_t slot, int64_t channel, int64_t lanes, int slice) {
          const Rows<T> rows = first || !residual ? sources[slice] : Rows<T>{sum + n * frame, C};
          const T* in = at(rows, p, channel);
          const V pivot = pivots[slot];
          V total{}, total_squares{};
          const auto add = [&](V v) {
            const V d = v - pivot;
            total += d;
            total_squares += d * d;
          };
          if (residual && first) {
            const V temb = f.temb ? load_table<T>(f.temb + channel, lanes) : V{};
            const T* other = residual + n * frame + p * C + channel;
            T* stored = sum + n * frame + p * C + channel;
            for (int64_t i = 0; i < count; ++i) {
              prefetch_l1(stored + (i + kStep) * C);
              const V v =
                  rounded<T>(load(in + i * rows.stride, lanes) + load(other + i * C, lanes) + temb);
              store(stored + i * C, v, lanes);
              add(v);
            }
          } else {
            for (int64_t i = 0; i < count; ++i) {
              prefetch_l1(in + (i + kStep) * rows.stride);
              add(load(in + i * rows.stride, lanes));
            }
          }
          moments[2 * slot] += total;
          moments[2 * slot + 1] += total_squares;
        });
        if ((p + count) % kBlock == 0 || p + count == P)
          for (int64_t j = 0; j < 2 * segments.slots; ++j) {
            sums[j] += moments[j];
            moments[j] = V{};
          }
      }
      if (residual) f.temb = nullptr;  // it is in the stored sum
      for_each_slot<L>(segments, [&](int64_t slot, int64_t channel, int64_t lanes, int) {
        const V drift = sums[2 * slot] / static_cast<A>(P), mean = pivots[slot] + drift;
        store_table<T>(channel_drifts + channel - c0, drift, lanes);
        store_table<T>(channel_means + channel - c0, mean, lanes);
        store_table<T>(channel_squares + channel - c0, sums[2 * slot + 1] - drift * sums[2 * slot],
                       lanes);
        pivots[slot] = truncated(mean);
      });
      if (f.temb)
        for (int64_t i = 0; i < c1 - c0; ++i) channel_means[i] += f.temb[c0 + i];
      again = false;
      for (int64_t c = 0; c < c1 - c0; c += D) {
        // Chan's merge of D channels of P pixels each
        double mean = 0, within = 0, between = 0, drift = 0;
        for (int64_t i = c; i < c + D; ++i) mean += channel_means[i];
        mean /= D;
        for (int64_t i = c; i < c + D; ++i) {
          const double d = channel_means[i] - mean, moved = channel_drifts[i];
          within += channel_squares[i];
          between += d * d;
          drift += moved * moved;
        }
        const double variance = (within / P + between) / D;
        again |= first && drift / D > variance;
        const A group_mean = static_cast<A>(mean);
        const A rstd =
            static_cast<A>(1 / __builtin_sqrt((variance > 0 ? variance : variance * 0) + a.eps));
        static_cast<A*>(a.mean)[n * a.groups + (c0 + c) / D] = group_mean;
        static_cast<A*>(a.rstd)[n * a.groups + (c0 + c) / D] = rstd;
        tabulate_lines(f, c0 + c, D, group_mean, rstd, centers + c, scales + c, shifts + c);
      }
    }
    for_each_slot<L>(segments, [&](int64_t slot, int64_t channel, int64_t lanes, int) {
      lines[3 * slot] = load_table<T>(centers + channel - c0, lanes);
      lines[3 * slot + 1] = load_table<T>(scales + channel - c0, lanes);
      lines[3 * slot + 2] = load_table<T>(shifts + channel - c0, lanes);
    });

    for (int64_t p = 0; p < P; ++p) {
      for (int s = 0; s < segments.count; ++s) {
        const Segment& segment = segments.of[s];
        const Route& route = routes[segment.slice];
        const int64_t row = p * C + segment.begin, width = segment.end - segment.begin;
        if (route.to[0] >= 0) {
          const Rows<T> rows = residual ? Rows<T>{sum + n * frame, C} : sources[segment.slice];
          const T* in = at(rows, p, segment.begin);
          const int64_t step = rows.stride ? 1 : 0;
          T* to = y + route.to[0] * frame + row;
          const V* line = lines + 3 * segment.first;
          const auto activate = [&](int64_t c, int64_t lanes) {
            prefetch_l1(in + c * step + 2 * rows.stride);
            prefetch_l1(to + c + 2 * C);
            const V v = silu_of<T>((load(in + c * step, lanes) - line[0]) * line[1] + line[2]);
            write_clean(to + c, v, lanes, false);
            line += 3;
          };
          for_each_channel<L>(width, activate);
          if (route.to[1] >= 0)
            __builtin_memcpy(y + route.to[1] * frame + row, to, width * sizeof(T));
        }
        if (route.cleared >= 0)
          __builtin_memset(static_cast<void*>(y + route.cleared * frame + row), 0,
                           width * sizeof(T));
      }
    }
  }
}

template <typename T>
static void norm_backward_rows(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  typedef typename Lane<T>::Acc A;
  typedef typename Lane<T>::Vec V;
  constexpr int L = Lane<T>::kLanes;
  const Geometry& g = a.geometry;
  const int64_t P = g.pixels, C = g.channels, D = C / a.groups, frame = C * P,
                units = norm_units(a);
  const T* x = static_cast<const T*>(a.x);
  const T *dy = static_cast<const T*>(a.dy), *dsum = static_cast<const T*>(a.dsum);
  const T* zeros = static_cast<const T*>(a.zeros);
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  A *dz_sums = static_cast<A*>(a.dz), *dz_xhat_sums = static_cast<A*>(a.dz_xhat),
    *ds_sums = static_cast<A*>(a.ds);
  const int64_t most = max_slots(a, L);
  // per slot: sums of dz, of dz * d, of ds, over all pixels and over a block of them, so that long
  // sums round little; center, then either scale and shift or the factors of ds
  V* sums = reinterpret_cast<V*>(carve(scratch, 3 * most * sizeof(V)));
  V* partial = reinterpret_cast<V*>(carve(scratch, 3 * most * sizeof(V)));
  V* tables = reinterpret_cast<V*>(carve(scratch, 4 * most * sizeof(V)));
  A* channel = reinterpret_cast<A*>(carve(scratch, 5 * a.span * sizeof(A)));
  A *centers = channel, *first_table = channel + a.span, *second_table = first_table + a.span;
  A *third_table = second_table + a.span, *gains = third_table + a.span;
  constexpr A kFactor = static_cast<A>(-kLog2E);
  V* dz = reinterpret_cast<V*>(carve(scratch, most * P * sizeof(V)));  // [P, slots]
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units, c0 = unit % units * a.span;
    const int64_t c1 = c0 + a.span < C ? c0 + a.span : C;
    const Segments segments = make_segments(a, L, c0, c1);
    const int64_t slots = segments.slots;
    Route routes[3];
    Rows<T> sources[3], grads[3];
    for (int k = 0; k < 3; ++k) {
      routes[k] = backward_route(a, n, k);
      sources[k] =
          rows_of(x, zeros,
                  a.shift_before && !a.is_sum ? source_frame(a.shift, n, a.shift.offset[k]) : n, g);
      grads[k] = rows_of(dy, zeros, routes[k].from, g);
    }
    const auto at = [&](const Rows<T>& rows, int64_t p, int64_t c) {
      return rows.stride ? rows.p + p * rows.stride + c : rows.p;
    };
    const Affine<A> f = affine_of<A>(a, n);
    tabulate(f, c0, c1, gains, second_table);
    for (int64_t c = 0; c < c1 - c0; c += D) {
      const int64_t group = n * a.groups + (c0 + c) / D;
      const A mean = static_cast<const A*>(a.mean)[group];
      const A factor = kFactor * static_cast<const A*>(a.rstd)[group];
      for (int64_t i = c; i < c + D; ++i) centers[i] = mean - (f.temb ? f.temb[c0 + i] : 0);
      for (int64_t i = c; i < c + D; ++i) first_table[i] = factor * gains[i];
      for (int64_t i = c; i < c + D; ++i) second_table[i] *= kFactor;
    }
    for_each_slot<L>(segments, [&](int64_t slot, int64_t c, int64_t lanes, int) {
      tables[4 * slot] = load_table<T>(centers + c - c0, lanes);
      tables[4 * slot + 1] = load_table<T>(first_table + c - c0, lanes);
      tables[4 * slot + 2] = load_table<T>(second_table + c - c0, lanes);
    });

    const auto add_block = [&](int k) {
      for (int64_t j = k; j < 3 * slots; j += 3) {
        sums[j] += partial[j];
        partial[j] = V{};
      }
    };
    for (int64_t j = 0; j < 3 * slots; ++j) sums[j] = partial[j] = V{};
    for (int64_t p = 0; p < P; p += kStep) {
      const int64_t count = P - p < kStep ? P - p : kStep;
      for_each_slot<L>(segments, [&](int64_t slot, int64_t c, int64_t lanes, int slice) {
        const T *in = at(sources[slice], p, c), *grad = at(grads[slice], p, c);
        const int64_t stride = sources[slice].stride, grad_stride = grads[slice].stride;
        const V center = tables[4 * slot], scale = tables[4 * slot + 1],
                shift = tables[4 * slot + 2];
        V total{}, total_d{};
        for (int64_t i = 0; i < count; ++i) {
          prefetch_l1(in + (i + kStep) * stride);
          prefetch_l1(grad + (i + kStep) * grad_stride);
          const V d = load(in + i * stride, lanes) - center;
          const V v = silu_gradient<T>(load(grad + i * grad_stride, lanes), d * scale + shift, A{});
          dz[(p + i) * slots + slot] = v;
          total += v;
          total_d += v * d;
        }
        partial[3 * slot] += total;
        partial[3 * slot + 1] += total_d;
      });
      if ((p + count) % kBlock == 0 || p + count == P) add_block(0), add_block(1);
    }
    for_each_slot<L>(segments, [&](int64_t slot, int64_t c, int64_t lanes, int) {
      store_table<T>(dz_sums + n * C + c, sums[3 * slot], lanes);
      store_table<T>(dz_xhat_sums + n * C + c, sums[3 * slot + 1], lanes);
    });
    for (int64_t c = 0; c < c1 - c0; c += D) {
      const A rstd = static_cast<const A*>(a.rstd)[n * a.groups + (c0 + c) / D];
      A *dz_sum = dz_sums + n * C + c0 + c, *dz_xhat_sum = dz_xhat_sums + n * C + c0 + c;
      double dxhat = 0, dxhat_xhat = 0;
      for (int64_t i = 0; i < D; ++i) {
        dz_xhat_sum[i] *= rstd;
        dxhat += static_cast<double>(dz_sum[i]) * gains[c + i];
        dxhat_xhat += static_cast<double>(dz_xhat_sum[i]) * gains[c + i];
      }
      const double count = static_cast<double>(D) * P;
      const A of_x = static_cast<A>(-dxhat_xhat / count * rstd * rstd);
      const A fixed = static_cast<A>(-dxhat / count * rstd);
      for (int64_t i = c; i < c + D; ++i) first_table[i] = gains[i] * rstd;  // of dz
      for (int64_t i = c; i < c + D; ++i) second_table[i] = of_x;
      for (int64_t i = c; i < c + D; ++i) third_table[i] = fixed;
    }
    for_each_slot<L>(segments, [&](int64_t slot, int64_t c, int64_t lanes, int) {
      tables[4 * slot + 1] = load_table<T>(first_table + c - c0, lanes);
      tables[4 * slot + 2] = load_table<T>(second_table + c - c0, lanes);
      tables[4 * slot + 3] = load_table<T>(third_table + c - c0, lanes);
    });

    for (int64_t p = 0; p < P; ++p) {
      for (int s = 0; s < segments.count; ++s) {
        const Segment& segment = segments.of[s];
        const Route& route = routes[segment.slice];
        const int64_t row = p * C + segment.begin, width = segment.end - segment.begin,
                      lanes = segment.lanes;
        const Rows<T> rows = sources[segment.slice];
        const T* in = at(rows, p, segment.begin);
        const int64_t step = rows.stride ? 1 : 0;
        T* to = route.to[0] < 0 ? nullptr : dx + route.to[0] * frame + row;
        T* again = dresidual ? dresidual + n * frame + row : nullptr;
        const T* extra = dsum ? dsum + n * frame + row : nullptr;
        const V* kept = dz + p * slots + segment.first;
        for (int64_t j = 0; j < segment.slots; ++j) {
          const int64_t c = segment.channel(j, L) - segment.begin;
          const V* table = tables + 4 * (segment.first + j);
          prefetch_l1(in + c * step + 2 * rows.stride);
          if (to) prefetch_l1(to + c + 2 * C);
          V v = (load(in + c * step, lanes) - table[0]) * table[2] + table[3];
          v = kept[j] * table[1] + v;
          if (extra) v += load(extra + c, lanes);
          if (ds_sums) partial[3 * (segment.first + j) + 2] += v;
          if (to) store(to + c, v, lanes);
          if (again) store(again + c, v, lanes);
        }
        if (route.cleared >= 0)
          __builtin_memset(static_cast<void*>(dx + route.cleared * frame + row), 0,
                           width * sizeof(T));
      }
      if (ds_sums && ((p + 1) % kBlock == 0 || p + 1 == P)) add_block(2);
    }
    if (ds_sums)
      for_each_slot<L>(segments, [&](int64_t slot, int64_t c, int64_t lanes, int) {
        store_table<T>(ds_sums + n * C + c, sums[3 * slot + 2], lanes);
      });
  }
}

template <typename T>
static void norm_forward_typed(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  if (a.geometry.channels_last) {
    norm_forward_rows<T>(a, begin, end, scratch);
  } else {
    norm_forward_planes<T>(a, begin, end, scratch);
  }
}

template <typename T>
static void norm_backward_typed(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  if (a.geometry.channels_last) {
    norm_backward_rows<T>(a, begin, end, scratch);
  } else {
    norm_backward_planes<T>(a, begin, end, scratch);
  }
}

static void norm_forward(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  LS_DISPATCH(a.geometry.dtype, norm_forward_typed, a, begin, end, scratch)
}

static void norm_backward(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  LS_DISPATCH(a.geometry.dtype, norm_backward_typed, a, begin, end, scratch)
}

static size_t norm_scratch(const NormArgs& a, bool backward) {
  const Geometry& g = a.geometry;
  const int64_t size = g.dtype == DType::kDouble ? 8 : 4, lanes = 2 * LS_BYTES / size;
  const int64_t vector = lanes * size;
  if (!g.channels_last)
    return backward ? g.channels / a.groups * ceil_div(g.pixels, lanes) * vector + 64
                    : 3 * g.channels / a.groups * size + 64;
  const int64_t most = max_slots(a, lanes);
  return most * vector * (10 + (backward ? g.pixels : 0)) + 6 * a.span * size + 16 * 64;
}

}  // namespace
}  // namespace LS_ISA
}  // namespace latent_shift
