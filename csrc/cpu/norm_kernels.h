// Shift, residual, GroupNorm and SiLU in one visit of the cache, forward and backward.
//
//   s = [residual +] shift_before(x) [+ temb]          stored (and rounded) where there is a residual
//   z = (s - mean) * scale + shift,  y = shift_after(silu(z))
//   scale = rstd * weight * (1 + ada_scale),  shift = bias * (1 + ada_scale) + ada_shift, per (frame, channel)
//
// A unit is one frame and one group (NCHW) or a span of whole groups (channels_last) that fits the L2 cache: its
// input is read from memory once, then mean, centred variance and the activation come out of cache. The shift is
// the frame of the load (before) or of the store (after). While a unit computes exponentials, the next one's input
// is prefetched.
//
// channels_last units are cut into slots: vectors of channels that lie in one slice, the last vector of a slice
// overlapping its predecessor, so that no lane is masked and group boundaries do not matter. Statistics are kept per
// channel and merged to groups.
//
// Statistics are fp32 (fp64 for fp64), two-pass with the residual of the first mean as correction. All sums run in an
// order given by the shape alone. Included by the isa_*.cpp files after vec.h.
#pragma once

namespace latent_shift {
namespace LS_ISA {
namespace {

constexpr int kRows = 8;  // pixels per block, channels_last

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
  return (f.bias ? f.bias[c] : 0) * (f.ada_scale ? 1 + f.ada_scale[c] : 1) + (f.ada_shift ? f.ada_shift[c] : 0);
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

// Backward of the stores: dy is gathered from the reader (shift_after), dx scattered to the source (scatter).
// Replicated ends, where two gradients meet, are left to the operator.
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

// ---- NCHW ----

// Calls term(i, j, lanes) for the vectors of a plane, j < 4 naming one of four independent chains.
template <typename V, int L, typename Term>
LS_FN void for_each_vector(int64_t pixels, const Term& term) {
  int64_t i = 0;
  for (; i + 4 * L <= pixels; i += 4 * L) {
    term(i, 0, L);
    term(i + L, 1, L);
    term(i + 2 * L, 2, L);
    term(i + 3 * L, 3, L);
  }
  for (; i + L <= pixels; i += L) term(i, 0, L);
  if (i < pixels) term(i, 1, pixels - i);
}

// Adds term(i, lanes) over a plane to `sums`, in chunks of 32 vectors so that long sums round as little as short ones:
// half-precision inputs share their trailing bits, and rounding errors that agree in sign would not average out.
template <typename V, int L, int kSums, typename Term>
LS_FN void accumulate(int64_t pixels, V (*sums)[kSums], const Term& term) {
  for (int64_t chunk = 0; chunk < pixels; chunk += 32 * L) {
    const int64_t count = pixels - chunk < 32 * L ? pixels - chunk : 32 * L;
    V partial[4][kSums] = {};
    for_each_vector<V, L>(count, [&](int64_t i, int j, int64_t lanes) { term(chunk + i, partial[j], lanes); });
    for (int k = 0; k < kSums; ++k)
      sums[0][k] += (partial[0][k] + partial[1][k]) + (partial[2][k] + partial[3][k]);
  }
}

// Narrower non-temporal stores cost more than they save.
template <typename T>
constexpr bool kStreamable = sizeof(T) * Lane<T>::kLanes == LS_BYTES;

template <typename T>
LS_FN void write(T* to, typename Lane<T>::Vec v, int64_t lanes, bool streaming) {
  if (streaming && lanes == Lane<T>::kLanes) {
    Lane<T>::stream(to, v);
  } else {
    store(to, v, lanes);
  }
}

template <typename T>
LS_FN void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

template <typename T>
static void norm_forward_planes(const NormArgs& a, int64_t begin, int64_t end) {
  typedef typename Lane<T>::Acc A;
  typedef typename Lane<T>::Vec V;
  constexpr int L = Lane<T>::kLanes;
  const Geometry& g = a.geometry;
  const int64_t P = g.pixels, D = g.channels / a.groups, slab = D * P;
  const int64_t frame = g.channels * P;
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  const T* zeros = static_cast<const T*>(a.zeros);
  T *y = static_cast<T*>(a.y), *sum = static_cast<T*>(a.sum);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / a.groups, c0 = unit % a.groups * D;
    Route routes[3];
    for (int k = 0; k < 3; ++k) routes[k] = forward_route(a, n, k);
    Affine<A> f = affine_of<A>(a, n);
    const auto plane = [&](int64_t c) {
      const int64_t from = routes[slice_of(a.shift, c)].from;
      return from < 0 ? zeros : x + from * frame + c * P;
    };

    V total[1][1] = {};
    A temb_total = 0;
    for (int64_t c = c0; c < c0 + D; ++c) {
      const T* source = plane(c);
      const A temb = f.temb ? f.temb[c] : 0;
      if (residual) {
        const T* other = residual + n * frame + c * P;
        T* stored = sum + n * frame + c * P;
        accumulate<V, L, 1>(P, total, [&](int64_t i, V* partial, int64_t lanes) {
          V v = load(source + i, lanes) + load(other + i, lanes);
          v = rounded<T>(v + temb);
          store(stored + i, v, lanes);
          partial[0] += lanes == L ? v : first_lanes(v, lanes);
        });
      } else {
        accumulate<V, L, 1>(
            P, total, [&](int64_t i, V* partial, int64_t lanes) { partial[0] += load(source + i, lanes); });
        temb_total += temb;
      }
    }
    if (residual) f.temb = nullptr;  // it is in the stored sum
    const A count = static_cast<A>(slab);
    const A estimate = (sum_lanes(total[0][0]) + temb_total * P) / count;
    const A pivot = truncated(V{} + estimate)[0];

    const auto input = [&](int64_t c) { return residual ? sum + n * frame + c * P : plane(c); };
    V moments[1][2] = {};
    for (int64_t c = c0; c < c0 + D; ++c) {
      const T* source = input(c);
      const A center = pivot - (f.temb ? f.temb[c] : 0);
      accumulate<V, L, 2>(P, moments, [&](int64_t i, V* partial, int64_t lanes) {
        V d = load(source + i, lanes) - center;
        if (lanes != L) d = first_lanes(d, lanes);
        partial[0] += d;
        partial[1] += d * d;
      });
    }
    const A drift = sum_lanes(moments[0][0]) / count;
    const A squares = sum_lanes(moments[0][1]) / count;
    const A mean = pivot + drift;
    const A variance = squares - drift * drift;
    const A rstd = 1 / __builtin_sqrt((variance > 0 ? variance : variance * 0) + a.eps);
    static_cast<A*>(a.mean)[unit] = mean;
    static_cast<A*>(a.rstd)[unit] = rstd;

    for (int64_t c = c0; c < c0 + D; ++c) {
      const T* source = input(c);
      const T* next = residual ? plane(c) + slab : source + slab;
      const T* next_residual = residual ? residual + n * frame + c * P + slab : nullptr;
      const Route& route = routes[slice_of(a.shift, c)];
      const A center = mean - (f.temb ? f.temb[c] : 0);
      const A scale = rstd * gain(f, c), shift = constant(f, c);
      T* to = route.to[0] < 0 ? nullptr : y + route.to[0] * frame + c * P;
      T* again = route.to[1] < 0 ? nullptr : y + route.to[1] * frame + c * P;
      const bool aligned = (reinterpret_cast<uintptr_t>(to) & (LS_BYTES - 1)) == 0;
      const bool streaming = kStreamable<T> && a.streaming && aligned && !again;
      if (to) {
        for_each_vector<V, L>(P, [&](int64_t i, int j, int64_t lanes) {
          // one prefetch per cache line
          if (j * L * sizeof(T) % 64 == 0) {
            prefetch(next + i);
            if (next_residual) prefetch(next_residual + i);
          }
          const V v = silu((load(source + i, lanes) - center) * scale + shift);
          write(to + i, v, lanes, streaming);
          if (again) store(again + i, v, lanes);
        });
      }
      if (route.cleared >= 0) __builtin_memset(static_cast<void*>(y + route.cleared * frame + c * P), 0, P * sizeof(T));
    }
  }
  if (a.streaming) stream_fence();
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
  A *dz_sums = static_cast<A*>(a.dz), *dz_xhat_sums = static_cast<A*>(a.dz_xhat), *ds_sums = static_cast<A*>(a.ds);
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

    A mean_dxhat = 0, mean_dxhat_xhat = 0;
    for (int64_t c = c0; c < c0 + D; ++c) {
      const T *source = x_plane(c), *grad = dy_plane(c);
      A* kept = dz + (c - c0) * padded;
      const A center = mean - (f.temb ? f.temb[c] : 0), scale = gain(f, c), shift = constant(f, c);
      V sums[1][2] = {};
      accumulate<V, L, 2>(P, sums, [&](int64_t i, V* partial, int64_t lanes) {
        const V xhat = (load(source + i, lanes) - center) * rstd;
        const V z = xhat * scale + shift;
        const V gate = sigmoid(z);
        const V v = load(grad + i, lanes) * (gate + gate * z * (1 - gate));  // 0 * finite = 0 behind the last lane
        Lane<A>::store(kept + i, v);
        partial[0] += lanes == L ? v : first_lanes(v, lanes);
        partial[1] += lanes == L ? v * xhat : first_lanes(v * xhat, lanes);
      });
      const A dz_sum = sum_lanes(sums[0][0]), dz_xhat_sum = sum_lanes(sums[0][1]);
      dz_sums[n * g.channels + c] = dz_sum;
      dz_xhat_sums[n * g.channels + c] = dz_xhat_sum;
      mean_dxhat += dz_sum * scale;
      mean_dxhat_xhat += dz_xhat_sum * scale;
    }
    mean_dxhat /= static_cast<A>(slab);
    mean_dxhat_xhat /= static_cast<A>(slab);

    for (int64_t c = c0; c < c0 + D; ++c) {
      const T* source = x_plane(c);
      const T *next = source + slab, *next_grad = dy_plane(c) + slab;
      const T* extra = dsum ? dsum + n * frame + c * P : nullptr;
      const A* kept = dz + (c - c0) * padded;
      const Route& route = routes[slice_of(a.shift, c)];
      const A center = mean - (f.temb ? f.temb[c] : 0);
      const A of_dz = gain(f, c) * rstd, of_x = -mean_dxhat_xhat * rstd * rstd, fixed = -mean_dxhat * rstd;
      T* to = route.to[0] < 0 ? nullptr : dx + route.to[0] * frame + c * P;
      T* again = dresidual ? dresidual + n * frame + c * P : nullptr;
      const bool aligned = (reinterpret_cast<uintptr_t>(to) & (LS_BYTES - 1)) == 0;
      const bool streaming = kStreamable<T> && a.streaming && aligned && !again;
      V total[4] = {};
      for_each_vector<V, L>(P, [&](int64_t i, int j, int64_t lanes) {
        if (j * L * sizeof(T) % 64 == 0) {
          prefetch(next + i);
          prefetch(next_grad + i);
        }
        V v = (load(source + i, lanes) - center) * of_x + fixed;
        v = Lane<A>::load(kept + i) * of_dz + v;
        if (extra) v += load(extra + i, lanes);
        if (ds_sums) total[j] += lanes == L ? v : first_lanes(v, lanes);
        if (to) write(to + i, v, lanes, streaming);
        if (again) store(again + i, v, lanes);
      });
      if (ds_sums) ds_sums[n * g.channels + c] = sum_lanes((total[0] + total[1]) + (total[2] + total[3]));
      if (route.cleared >= 0)
        __builtin_memset(static_cast<void*>(dx + route.cleared * frame + c * P), 0, P * sizeof(T));
    }
  }
  if (a.streaming) stream_fence();
}

// ---- channels_last ----

// A vector of channels of one slice. Rows are C elements apart; a missing input is a row of zeros, 0 apart.
struct Slot {
  int64_t channel, lanes;
  int64_t route;  // slice
};

// Cuts channels [c0, c1) into slots that do not cross slices (only those of a shift that is applied).
LS_FN int64_t make_slots(const NormArgs& a, int64_t lanes, int64_t c0, int64_t c1, Slot* slots) {
  int64_t count = 0;
  for (int k = 0; k < 3; ++k) {
    int64_t lo = slice_begin(a.shift, k), hi = a.shift.end[k];
    if (lo < c0) lo = c0;
    if (hi > c1) hi = c1;
    for (int64_t c = lo; c < hi; c += lanes) {
      Slot slot{c, lanes, k};
      if (c + lanes > hi) {
        if (hi - lo >= lanes) {
          slot.channel = hi - lanes;
        } else {
          slot.lanes = hi - c;
        }
      }
      slots[count++] = slot;
    }
  }
  return count;
}

LS_FN int64_t max_slots(const NormArgs& a, int64_t lanes) { return a.span / lanes + 4; }

template <typename T>
struct Source {
  const T* p;
  int64_t stride;
};

template <typename T>
LS_FN Source<T> source_of(const T* x, const T* zeros, int64_t from, int64_t channel, const Geometry& g) {
  if (from < 0) return {zeros, 0};
  return {x + from * g.pixels * g.channels + channel, g.channels};
}

template <typename T>
static void norm_forward_rows(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  typedef typename Lane<T>::Acc A;
  typedef typename Lane<T>::Vec V;
  constexpr int L = Lane<T>::kLanes;
  const Geometry& g = a.geometry;
  const int64_t P = g.pixels, C = g.channels, D = C / a.groups, frame = C * P, units = norm_units(a);
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  const T* zeros = static_cast<const T*>(a.zeros);
  T *y = static_cast<T*>(a.y), *sum = static_cast<T*>(a.sum);
  const int64_t most = max_slots(a, L);
  Slot* slots = reinterpret_cast<Slot*>(carve(scratch, most * sizeof(Slot)));
  V* first = reinterpret_cast<V*>(carve(scratch, most * sizeof(V)));
  V* second = reinterpret_cast<V*>(carve(scratch, most * sizeof(V)));
  V* pivots = reinterpret_cast<V*>(carve(scratch, most * sizeof(V)));
  A* centers = reinterpret_cast<A*>(carve(scratch, (a.span + L) * sizeof(A)));  // mean, then center, per channel
  A* scales = reinterpret_cast<A*>(carve(scratch, (a.span + L) * sizeof(A)));   // squares, then scale
  A* shifts = reinterpret_cast<A*>(carve(scratch, (a.span + L) * sizeof(A)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units, c0 = unit % units * a.span;
    const int64_t c1 = c0 + a.span < C ? c0 + a.span : C;
    const int64_t count = make_slots(a, L, c0, c1, slots);
    // input of the next unit, relative to this one's
    const int64_t ahead = c1 < C ? c1 - c0 : frame - c0;
    Route routes[3];
    for (int k = 0; k < 3; ++k) routes[k] = forward_route(a, n, k);
    Affine<A> f = affine_of<A>(a, n);
    const auto source = [&](const Slot& slot) {
      return source_of(x, zeros, routes[slot.route].from, slot.channel, g);
    };

    for (int64_t j = 0; j < count; ++j) first[j] = V{};
    for (int64_t p = 0; p < P; p += kRows) {
      const int64_t rows = P - p < kRows ? P - p : kRows;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t lanes = slots[j].lanes;
        const Source<T> in = source(slots[j]);
        V total{};
        if (residual) {
          const V temb = f.temb ? load(f.temb + slots[j].channel, lanes) : V{};
          const int64_t at = n * frame + p * C + slots[j].channel;
          for (int64_t i = 0; i < rows; ++i) {
            V v = load(in.p + (p + i) * in.stride, lanes) + load(residual + at + i * C, lanes);
            v = rounded<T>(v + temb);
            store(sum + at + i * C, v, lanes);
            total += v;
          }
        } else {
          for (int64_t i = 0; i < rows; ++i) total += load(in.p + (p + i) * in.stride, lanes);
        }
        first[j] += total;
      }
    }
    if (residual) f.temb = nullptr;  // it is in the stored sum
    const auto input = [&](const Slot& slot) {
      return residual ? Source<T>{sum + n * frame + slot.channel, C} : source(slot);
    };

    for (int64_t j = 0; j < count; ++j) {
      pivots[j] = truncated(first[j] / static_cast<A>(P));
      first[j] = second[j] = V{};
    }
    for (int64_t p = 0; p < P; p += kRows) {
      const int64_t rows = P - p < kRows ? P - p : kRows;
      for (int64_t j = 0; j < count; ++j) {
        const Source<T> in = input(slots[j]);
        V total{}, squares{};
        for (int64_t i = 0; i < rows; ++i) {
          const V d = load(in.p + (p + i) * in.stride, slots[j].lanes) - pivots[j];
          total += d;
          squares += d * d;
        }
        first[j] += total;
        second[j] += squares;
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const V drift = first[j] / static_cast<A>(P);
      store(centers + slots[j].channel - c0, pivots[j] + drift, slots[j].lanes);
      store(scales + slots[j].channel - c0, second[j] - drift * first[j], slots[j].lanes);
    }

    for (int64_t c = c0; c < c1; c += D) {
      // Chan's merge of D channels of P pixels each
      double mean = 0, squares = 0;
      for (int64_t i = c; i < c + D; ++i) mean += centers[i - c0] + (f.temb ? f.temb[i] : 0);
      mean /= D;
      for (int64_t i = c; i < c + D; ++i) {
        const double d = centers[i - c0] + (f.temb ? f.temb[i] : 0) - mean;
        squares += scales[i - c0] + P * d * d;
      }
      const double variance = squares / (static_cast<double>(D) * P);
      const A group_mean = static_cast<A>(mean);
      const A rstd = static_cast<A>(1 / __builtin_sqrt((variance > 0 ? variance : variance * 0) + a.eps));
      static_cast<A*>(a.mean)[n * a.groups + c / D] = group_mean;
      static_cast<A*>(a.rstd)[n * a.groups + c / D] = rstd;
      for (int64_t i = c; i < c + D; ++i) {
        centers[i - c0] = group_mean - (f.temb ? f.temb[i] : 0);
        scales[i - c0] = rstd * gain(f, i);
        shifts[i - c0] = constant(f, i);
      }
    }

    for (int64_t p = 0; p < P; p += kRows) {
      const int64_t rows = P - p < kRows ? P - p : kRows;
      for (int64_t j = 0; j < count; ++j) {
        const Route& route = routes[slots[j].route];
        const int64_t lanes = slots[j].lanes, channel = slots[j].channel;
        const int64_t at = p * C + channel;
        if (route.to[0] >= 0) {
          const Source<T> in = input(slots[j]);
          const T* next = x + (route.from < 0 ? n : route.from) * frame + at + ahead;
          const V center = load(centers + channel - c0, lanes);
          const V scale = load(scales + channel - c0, lanes);
          const V shift = load(shifts + channel - c0, lanes);
          T* to = y + route.to[0] * frame + at;
          T* again = route.to[1] < 0 ? nullptr : y + route.to[1] * frame + at;
          for (int64_t i = 0; i < rows; ++i) {
            prefetch(next + i * C);
            const V v = silu((load(in.p + (p + i) * in.stride, lanes) - center) * scale + shift);
            store(to + i * C, v, lanes);
            if (again) store(again + i * C, v, lanes);
          }
          if (residual)
            for (int64_t i = 0; i < rows; ++i) prefetch(residual + n * frame + at + ahead + i * C);
        }
        if (route.cleared >= 0)
          for (int64_t i = 0; i < rows; ++i) store(y + route.cleared * frame + at + i * C, V{}, lanes);
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
  const int64_t P = g.pixels, C = g.channels, D = C / a.groups, frame = C * P, units = norm_units(a);
  const T* x = static_cast<const T*>(a.x);
  const T *dy = static_cast<const T*>(a.dy), *dsum = static_cast<const T*>(a.dsum);
  const T* zeros = static_cast<const T*>(a.zeros);
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  A *dz_sums = static_cast<A*>(a.dz), *dz_xhat_sums = static_cast<A*>(a.dz_xhat), *ds_sums = static_cast<A*>(a.ds);
  const int64_t most = max_slots(a, L);
  Slot* slots = reinterpret_cast<Slot*>(carve(scratch, most * sizeof(Slot)));
  V* first = reinterpret_cast<V*>(carve(scratch, most * sizeof(V)));
  V* second = reinterpret_cast<V*>(carve(scratch, most * sizeof(V)));
  A* centers = reinterpret_cast<A*>(carve(scratch, (a.span + L) * sizeof(A)));
  A* rstds = reinterpret_cast<A*>(carve(scratch, (a.span + L) * sizeof(A)));
  A* gains = reinterpret_cast<A*>(carve(scratch, (a.span + L) * sizeof(A)));      // then of_dz
  A* constants = reinterpret_cast<A*>(carve(scratch, (a.span + L) * sizeof(A)));  // then fixed
  A* of_x = reinterpret_cast<A*>(carve(scratch, (a.span + L) * sizeof(A)));
  V* dz = reinterpret_cast<V*>(carve(scratch, most * P * sizeof(V)));  // [P / kRows, slots, kRows]
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / units, c0 = unit % units * a.span;
    const int64_t c1 = c0 + a.span < C ? c0 + a.span : C;
    const int64_t count = make_slots(a, L, c0, c1, slots);
    const int64_t ahead = c1 < C ? c1 - c0 : frame - c0;
    Route routes[3];
    int64_t x_frames[3];
    for (int k = 0; k < 3; ++k) {
      routes[k] = backward_route(a, n, k);
      x_frames[k] = a.shift_before && !a.is_sum ? source_frame(a.shift, n, a.shift.offset[k]) : n;
    }
    const Affine<A> f = affine_of<A>(a, n);
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t group = n * a.groups + c / D;
      centers[c - c0] = static_cast<const A*>(a.mean)[group] - (f.temb ? f.temb[c] : 0);
      rstds[c - c0] = static_cast<const A*>(a.rstd)[group];
      gains[c - c0] = gain(f, c);
      constants[c - c0] = constant(f, c);
    }

    for (int64_t j = 0; j < count; ++j) first[j] = second[j] = V{};
    for (int64_t p = 0; p < P; p += kRows) {
      const int64_t rows = P - p < kRows ? P - p : kRows;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t lanes = slots[j].lanes, channel = slots[j].channel, slice = slots[j].route;
        const Source<T> in = source_of(x, zeros, x_frames[slice], channel, g);
        const Source<T> grad = source_of(dy, zeros, routes[slice].from, channel, g);
        const V center = load(centers + channel - c0, lanes), rstd = load(rstds + channel - c0, lanes);
        const V scale = load(gains + channel - c0, lanes), shift = load(constants + channel - c0, lanes);
        V* kept = dz + p * count + j * rows;
        V total{}, squares{};
        for (int64_t i = 0; i < rows; ++i) {
          const V xhat = (load(in.p + (p + i) * in.stride, lanes) - center) * rstd;
          const V z = xhat * scale + shift;
          const V gate = sigmoid(z);
          const V v = load(grad.p + (p + i) * grad.stride, lanes) * (gate + gate * z * (1 - gate));
          kept[i] = v;
          total += v;
          squares += v * xhat;
        }
        first[j] += total;
        second[j] += squares;
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      store(dz_sums + n * C + slots[j].channel, first[j], slots[j].lanes);
      store(dz_xhat_sums + n * C + slots[j].channel, second[j], slots[j].lanes);
    }
    for (int64_t c = c0; c < c1; c += D) {
      double dxhat = 0, dxhat_xhat = 0;
      for (int64_t i = c; i < c + D; ++i) {
        dxhat += static_cast<double>(dz_sums[n * C + i]) * gains[i - c0];
        dxhat_xhat += static_cast<double>(dz_xhat_sums[n * C + i]) * gains[i - c0];
      }
      const A rstd = rstds[c - c0];
      const A scale_x = static_cast<A>(-dxhat_xhat / (static_cast<double>(D) * P)) * rstd * rstd;
      const A fixed = static_cast<A>(-dxhat / (static_cast<double>(D) * P)) * rstd;
      for (int64_t i = c; i < c + D; ++i) {
        of_x[i - c0] = scale_x;
        gains[i - c0] *= rstd;
        constants[i - c0] = fixed;
      }
    }

    for (int64_t j = 0; j < count; ++j) first[j] = V{};
    for (int64_t p = 0; p < P; p += kRows) {
      const int64_t rows = P - p < kRows ? P - p : kRows;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t lanes = slots[j].lanes, channel = slots[j].channel, slice = slots[j].route;
        const int64_t at = p * C + channel;
        const Route& route = routes[slice];
        const Source<T> in = source_of(x, zeros, x_frames[slice], channel, g);
        const V center = load(centers + channel - c0, lanes), scale_x = load(of_x + channel - c0, lanes);
        const V of_dz = load(gains + channel - c0, lanes), fixed = load(constants + channel - c0, lanes);
        const V* kept = dz + p * count + j * rows;
        T* to = route.to[0] < 0 ? nullptr : dx + route.to[0] * frame + at;
        T* again = dresidual ? dresidual + n * frame + at : nullptr;
        const T* extra = dsum ? dsum + n * frame + at : nullptr;
        const T* next = x + (x_frames[slice] < 0 ? n : x_frames[slice]) * frame + at + ahead;
        const T* next_grad = dy + (route.from < 0 ? n : route.from) * frame + at + ahead;
        V total{};
        for (int64_t i = 0; i < rows; ++i) {
          prefetch(next + i * C);
          prefetch(next_grad + i * C);
          V v = (load(in.p + (p + i) * in.stride, lanes) - center) * scale_x + fixed;
          v = kept[i] * of_dz + v;
          if (extra) v += load(extra + i * C, lanes);
          total += v;
          if (to) store(to + i * C, v, lanes);
          if (again) store(again + i * C, v, lanes);
        }
        first[j] += total;
        if (route.cleared >= 0)
          for (int64_t i = 0; i < rows; ++i) store(dx + route.cleared * frame + at + i * C, V{}, lanes);
      }
    }
    if (ds_sums)
      for (int64_t j = 0; j < count; ++j) store(ds_sums + n * C + slots[j].channel, first[j], slots[j].lanes);
  }
}

template <typename T>
static void norm_forward_typed(const NormArgs& a, int64_t begin, int64_t end, char* scratch) {
  if (a.geometry.channels_last) {
    norm_forward_rows<T>(a, begin, end, scratch);
  } else {
    norm_forward_planes<T>(a, begin, end);
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
  const int64_t lanes = g.dtype == DType::kDouble ? kDoubleLanes : kFloatLanes;
  const int64_t size = g.dtype == DType::kDouble ? 8 : 4;
  if (!g.channels_last)
    return backward ? g.channels / a.groups * ceil_div(g.pixels, lanes) * LS_BYTES + 64 : 64;
  const int64_t most = max_slots(a, lanes);
  return most * (sizeof(Slot) + 3 * LS_BYTES) + 5 * (a.span + lanes) * size + 64 * 16 +
         (backward ? most * g.pixels * LS_BYTES : 0);
}

}  // namespace
}  // namespace LS_ISA
}  // namespace latent_shift
