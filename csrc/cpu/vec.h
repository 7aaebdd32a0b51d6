// Vectors of LS_BYTES bytes: loads and stores of every dtype, exp, sigmoid. One source for every
// instruction set.
//
// Included by the isa_*.cpp files only, after the target pragma, with LS_ISA naming the namespace,
// LS_BYTES the register width, and LS_F16C / LS_STREAM where half conversions and non-temporal
// stores exist. Everything has internal linkage and no std templates are used, so nothing compiled
// here can be merged with another target's code.
//
// 2^t = 2^n * p(t - n) with n the nearest integer, 2^n by exponent bits, p of degree 6 in fp32
// (relative error 2e-9 before rounding), 4 for results in 16 bits (3e-6) and 13 in fp64; +inf above
// the range, NaN kept, saturated at 2^-125 (2^-1020) below.
#pragma once

#if !defined(LS_ISA) || !defined(LS_BYTES)
#error "define LS_ISA and LS_BYTES first"
#endif

namespace latent_shift {
namespace LS_ISA {
namespace {

#define LS_FN static inline __attribute__((always_inline))
#define LS_MEMBER inline __attribute__((always_inline))

constexpr int kFloatLanes = LS_BYTES / 4;
constexpr int kDoubleLanes = LS_BYTES / 8;

typedef float FloatVec __attribute__((vector_size(LS_BYTES)));
typedef uint32_t UIntVec __attribute__((vector_size(LS_BYTES)));
typedef double DoubleVec __attribute__((vector_size(LS_BYTES)));
typedef int64_t LongVec __attribute__((vector_size(LS_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(LS_BYTES / 2)));

// 16-bit storage types; arithmetic is in float
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename To, typename From>
LS_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

#if defined(LS_F16C) && LS_BYTES == 64
LS_FN FloatVec widen(HalfBits bits, Half) {
  return bit_cast<FloatVec>(_mm512_cvtph_ps(bit_cast<__m256i>(bits)));
}
LS_FN HalfBits narrow(FloatVec x, Half) {
  return bit_cast<HalfBits>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(LS_F16C) && LS_BYTES == 32
LS_FN FloatVec widen(HalfBits bits, Half) {
  return bit_cast<FloatVec>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
LS_FN HalfBits narrow(FloatVec x, Half) {
  return bit_cast<HalfBits>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
LS_FN FloatVec widen(HalfBits bits, Half) {
  const UIntVec u = __builtin_convertvector(bits, UIntVec);
  const UIntVec magnitude = (u & 0x7fff) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals
  const UIntVec finite = bit_cast<UIntVec>(bit_cast<FloatVec>(magnitude) * 0x1p112f);
  const UIntVec special = magnitude | 0x7f800000;
  const UIntVec value = magnitude >= 0x0f800000 ? special : finite;
  return bit_cast<FloatVec>(value | ((u & 0x8000) << 16));
}
LS_FN HalfBits narrow(FloatVec x, Half) {
  const UIntVec u = bit_cast<UIntVec>(x);
  const UIntVec magnitude = u & 0x7fffffff;
  // adding 0.5 rounds to multiples of 2^-24, the spacing of subnormal halves
  const UIntVec subnormal = bit_cast<UIntVec>(bit_cast<FloatVec>(magnitude) + 0.5f) - 0x3f000000;
  const UIntVec normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const UIntVec infinite = UIntVec{} + 0x7c00, quiet = UIntVec{} + 0x7e00;
  UIntVec value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x47800000 ? infinite : value;
  value = magnitude > 0x7f800000 ? quiet : value;
  return __builtin_convertvector(value | ((u >> 16) & 0x8000), HalfBits);
}
#endif

// A register to memory past the cache. The address is aligned to the register.
template <typename V>
LS_FN void stream_bytes(void* to, V v) {
#if defined(LS_STREAM)
  constexpr int kWidth = LS_STREAM < LS_BYTES ? LS_STREAM : LS_BYTES;
  static_assert(sizeof(V) == LS_BYTES, "whole registers only");
  typedef float Part __attribute__((vector_size(kWidth)));
  Part parts[LS_BYTES / kWidth];
  __builtin_memcpy(parts, &v, sizeof(V));
  for (int i = 0; i < LS_BYTES / kWidth; ++i) {
    float* target = static_cast<float*>(to) + i * kWidth / 4;
#if LS_STREAM == 64
    _mm512_stream_ps(target, parts[i]);
#elif LS_STREAM == 32
    _mm256_stream_ps(target, parts[i]);
#else
    _mm_stream_ps(target, parts[i]);
#endif
  }
#else
  __builtin_memcpy(to, &v, sizeof(V));
#endif
}

// Makes streaming stores visible before the thread reports its work done.
LS_FN void stream_fence() {
#if defined(LS_STREAM)
  _mm_sfence();
#endif
}

// The unit of all loops: two registers, whose independent chains of operations hide each other's
// latency.
template <typename R, typename A>
struct Pair {
  R a, b;
};
typedef Pair<FloatVec, float> FloatPair;
typedef Pair<DoubleVec, double> DoublePair;

#define LS_OPERATOR(op)                                                    \
  template <typename R, typename A>                                        \
  LS_FN Pair<R, A> operator op(const Pair<R, A>& x, const Pair<R, A>& y) { \
    return {x.a op y.a, x.b op y.b};                                       \
  }                                                                        \
  template <typename R, typename A>                                        \
  LS_FN Pair<R, A> operator op(const Pair<R, A>& x, A y) {                 \
    return {x.a op y, x.b op y};                                           \
  }
LS_OPERATOR(+)
LS_OPERATOR(-)
LS_OPERATOR(*)
LS_OPERATOR(/)
#undef LS_OPERATOR

template <typename R, typename A>
LS_FN Pair<R, A> operator-(A x, const Pair<R, A>& y) {
  return {x - y.a, x - y.b};
}
template <typename R, typename A>
LS_FN Pair<R, A> operator/(A x, const Pair<R, A>& y) {
  return {x / y.a, x / y.b};
}
template <typename R, typename A>
LS_FN Pair<R, A>& operator+=(Pair<R, A>& x, const Pair<R, A>& y) {
  return x = x + y;
}

// How a dtype is stored (T), computed (Acc) and held in registers (Vec, kLanes elements).
//
// 16-bit numbers are bf16 with the even elements in one register and the odd ones in the other,
// which is where a 32-bit view of memory has them; everything else is in order. element(i) is the
// place of element i.
template <typename T>
struct Lane;

template <>
struct Lane<BFloat16> {
  typedef float Acc;
  typedef FloatPair Vec;
  static constexpr int kLanes = 2 * kFloatLanes;
  static constexpr int element(int i) { return i / 2 + i % 2 * kFloatLanes; }

  static inline __attribute__((always_inline)) Vec load(const BFloat16* p) {
    UIntVec both;
    __builtin_memcpy(&both, p, sizeof(both));
    return {bit_cast<FloatVec>(both << 16), bit_cast<FloatVec>(both & 0xffff0000u)};
  }
  // to nearest even, in the high half
  static inline __attribute__((always_inline)) UIntVec rounded(FloatVec x) {
    const UIntVec u = bit_cast<UIntVec>(x);
    return u + 0x7fff + ((u >> 16) & 1);
  }
  // A NaN whose low half is not zero could be rounded to a number; all ones is a NaN.
  static inline __attribute__((always_inline)) UIntVec kept_nan(FloatVec x) {
    return rounded(x) | bit_cast<UIntVec>(x != x);
  }
  static inline __attribute__((always_inline)) UIntVec packed(Vec v) {
    return (kept_nan(v.a) >> 16) | (kept_nan(v.b) & 0xffff0000u);
  }
  static inline __attribute__((always_inline)) void store(BFloat16* p, Vec v) {
    const UIntVec both = packed(v);
    __builtin_memcpy(p, &both, sizeof(both));
  }
  static inline __attribute__((always_inline)) void stream(BFloat16* p, Vec v) {
    stream_bytes(p, packed(v));
  }
  // For results whose NaNs come from bf16 numbers or from arithmetic: their low half is zero.
  static inline __attribute__((always_inline)) UIntVec packed_clean(Vec v) {
    return (rounded(v.a) >> 16) | (rounded(v.b) & 0xffff0000u);
  }
};

template <>
struct Lane<Half> {
  typedef float Acc;
  typedef FloatPair Vec;
  static constexpr int kLanes = 2 * kFloatLanes;
  static constexpr int element(int i) { return i; }

  static inline __attribute__((always_inline)) Vec load(const Half* p) {
    HalfBits a, b;
    __builtin_memcpy(&a, p, sizeof(a));
    __builtin_memcpy(&b, p + kFloatLanes, sizeof(b));
    return {widen(a, Half{}), widen(b, Half{})};
  }
  static inline __attribute__((always_inline)) void store(Half* p, Vec v) {
    const HalfBits a = narrow(v.a, Half{}), b = narrow(v.b, Half{});
    __builtin_memcpy(p, &a, sizeof(a));
    __builtin_memcpy(p + kFloatLanes, &b, sizeof(b));
  }
  // half registers are not worth it
  static inline __attribute__((always_inline)) void stream(Half* p, Vec v) { store(p, v); }
};

template <typename T, typename R>
struct PlainLane {
  typedef T Acc;
  typedef Pair<R, T> Vec;
  static constexpr int kLanes = 2 * sizeof(R) / sizeof(T);
  static constexpr int element(int i) { return i; }

  static inline __attribute__((always_inline)) Vec load(const T* p) {
    R a, b;  // one by one: a copy of the whole pair would go through memory
    __builtin_memcpy(&a, p, sizeof(a));
    __builtin_memcpy(&b, p + kLanes / 2, sizeof(b));
    return {a, b};
  }
  static inline __attribute__((always_inline)) void store(T* p, Vec v) {
    __builtin_memcpy(p, &v.a, sizeof(v.a));
    __builtin_memcpy(p + kLanes / 2, &v.b, sizeof(v.b));
  }
  static inline __attribute__((always_inline)) void stream(T* p, Vec v) {
    stream_bytes(p, v.a);
    stream_bytes(p + kLanes / 2, v.b);
  }
};
template <>
struct Lane<float> : PlainLane<float, FloatVec> {};
template <>
struct Lane<double> : PlainLane<double, DoubleVec> {};

// The first `lanes` elements, zeros behind them.
template <typename T>
LS_FN typename Lane<T>::Vec load(const T* p, int64_t lanes) {
  if (__builtin_expect(lanes == Lane<T>::kLanes, 1)) return Lane<T>::load(p);
  T buffer[Lane<T>::kLanes] = {};
  __builtin_memcpy(buffer, p, lanes * sizeof(T));
  return Lane<T>::load(buffer);
}

template <typename T>
LS_FN void store(T* p, typename Lane<T>::Vec v, int64_t lanes) {
  if (__builtin_expect(lanes == Lane<T>::kLanes, 1)) return Lane<T>::store(p, v);
  T buffer[Lane<T>::kLanes];
  Lane<T>::store(buffer, v);
  __builtin_memcpy(p, buffer, lanes * sizeof(T));
}

// What the value becomes when stored as T.
template <typename T>
LS_FN typename Lane<T>::Vec rounded(typename Lane<T>::Vec v) {
  if constexpr (sizeof(T) == 2) {
    T buffer[Lane<T>::kLanes];
    Lane<T>::store(buffer, v);
    return Lane<T>::load(buffer);
  } else {
    return v;
  }
}

// Numbers per channel, in order, to and from the places that the elements of a T have in registers.
template <typename T>
LS_FN typename Lane<T>::Vec load_table(const typename Lane<T>::Acc* p, int64_t lanes) {
  typename Lane<T>::Acc places[Lane<T>::kLanes] = {};
  for (int64_t i = 0; i < lanes; ++i) places[Lane<T>::element(i)] = p[i];
  return Lane<typename Lane<T>::Acc>::load(places);
}
template <typename T>
LS_FN void store_table(typename Lane<T>::Acc* p, typename Lane<T>::Vec v, int64_t lanes) {
  typename Lane<T>::Acc places[Lane<T>::kLanes];
  Lane<typename Lane<T>::Acc>::store(places, v);
  for (int64_t i = 0; i < lanes; ++i) p[i] = places[Lane<T>::element(i)];
}

// v in the first `lanes` elements, zeros behind them.
template <typename T>
LS_FN typename Lane<T>::Vec first_lanes(typename Lane<T>::Vec v, int64_t lanes) {
  typedef typename Lane<T>::Acc A;
  if (__builtin_expect(lanes == Lane<T>::kLanes, 1)) return v;
  A places[Lane<T>::kLanes];
  Lane<A>::store(places, v);
  for (int64_t i = lanes; i < Lane<T>::kLanes; ++i) places[Lane<T>::element(i)] = 0;
  return Lane<A>::load(places);
}

template <typename R, typename A>
LS_FN A sum_lanes(Pair<R, A> v) {
  constexpr int kCount = sizeof(R) / sizeof(A);
  const R both = v.a + v.b;
  A lanes[kCount];
  __builtin_memcpy(lanes, &both, sizeof(both));
  for (int width = kCount / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// To 12 significant bits: what is subtracted from half-precision numbers without rounding.
LS_FN FloatPair truncated(FloatPair v) {
  return {bit_cast<FloatVec>(bit_cast<UIntVec>(v.a) & 0xfffff000u),
          bit_cast<FloatVec>(bit_cast<UIntVec>(v.b) & 0xfffff000u)};
}
LS_FN DoublePair truncated(DoublePair v) { return v; }
LS_FN float truncated(float v) { return bit_cast<float>(bit_cast<uint32_t>(v) & 0xfffff000u); }
LS_FN double truncated(double v) { return v; }

// The nearest number in [low, high]; NaN stays NaN.
#if defined(LS_F16C) && LS_BYTES == 64
LS_FN FloatVec clamp(FloatVec x, float low, float high) {
  return bit_cast<FloatVec>(
      _mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), bit_cast<__m512>(x))));
}
#elif defined(LS_F16C) && LS_BYTES == 32
LS_FN FloatVec clamp(FloatVec x, float low, float high) {
  return bit_cast<FloatVec>(
      _mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), bit_cast<__m256>(x))));
}
#else
LS_FN FloatVec clamp(FloatVec x, float low, float high) {
  x = x > high ? FloatVec{} + high : x;
  return x < low ? FloatVec{} + low : x;
}
#endif
LS_FN DoubleVec clamp(DoubleVec x, double low, double high) {
  x = x > high ? DoubleVec{} + high : x;
  return x < low ? DoubleVec{} + low : x;
}

constexpr double kLog2E = 1.4426950408889634;

// offset + factor * 2^t, as exact as a T is
template <typename T>
LS_FN FloatPair exp2_plus(FloatPair t, float factor, float offset) {
  const FloatPair x{clamp(t.a, -125.0f, 129.0f), clamp(t.b, -125.0f, 129.0f)};
  // 1.5 * 2^23 + 126 leaves round(x) + 126 in the low bits
  const FloatPair shifted = x + 12583038.0f;
  const FloatPair r = x - (shifted - 12583038.0f);
  // twice the polynomial times 2^(n-1), which stays finite for n = 128
  const float f = 2 * factor;
  FloatPair p;
  if constexpr (sizeof(T) == 2) {
    p = r * (f * 9.5828520e-3f) + f * 5.5906426e-2f;
    p = p * r + f * 2.4024099e-1f;
    p = p * r + f * 6.9312418e-1f;
  } else {
    p = r * (f * 1.5345812e-4f) + f * 1.3399931e-3f;
    p = p * r + f * 9.6184890e-3f;
    p = p * r + f * 5.5503288e-2f;
    p = p * r + f * 2.4022647e-1f;
    p = p * r + f * 6.9314721e-1f;
  }
  p = p * r + f;
  const FloatPair power{bit_cast<FloatVec>(bit_cast<UIntVec>(shifted.a) << 23),
                        bit_cast<FloatVec>(bit_cast<UIntVec>(shifted.b) << 23)};
  return p * power + (FloatPair{} + offset);
}

template <typename T>
LS_FN DoublePair exp2_plus(DoublePair t, double factor, double offset) {
  const DoublePair x{clamp(t.a, -1020.0, 1025.0), clamp(t.b, -1020.0, 1025.0)};
  const DoublePair shifted = x + (6755399441055744.0 + 1022.0);
  const DoublePair r = (x - (shifted - (6755399441055744.0 + 1022.0))) * 0.6931471805599453;
  // 1 / k! for k = 13 .. 0
  constexpr double kTerms[] = {1 / 6227020800.0,
                               1 / 479001600.0,
                               1 / 39916800.0,
                               1 / 3628800.0,
                               1 / 362880.0,
                               1 / 40320.0,
                               1 / 5040.0,
                               1 / 720.0,
                               1 / 120.0,
                               1 / 24.0,
                               1 / 6.0,
                               0.5,
                               1.0,
                               1.0};
  DoublePair p = DoublePair{} + kTerms[0];
  for (int k = 1; k < 14; ++k) p = p * r + kTerms[k];
  const DoublePair power{bit_cast<DoubleVec>(bit_cast<LongVec>(shifted.a) << 52),
                         bit_cast<DoubleVec>(bit_cast<LongVec>(shifted.b) << 52)};
  return p * (2 * factor) * power + (DoublePair{} + offset);
}

// silu(z) = z * sigmoid(z) and sigmoid(z) of t = -z * log2(e): the caller folds the factor into
// what makes z. -inf gives NaN, as in torch; z beyond 2^127 counts as infinite.
template <typename T, typename R, typename A>
LS_FN Pair<R, A> silu_of(Pair<R, A> t) {
  constexpr A kFactor = static_cast<A>(-kLog2E);
  return t / exp2_plus<T>(t, kFactor, kFactor);
}
template <typename T, typename R, typename A>
LS_FN Pair<R, A> sigmoid_of(Pair<R, A> t) {
  return A{1} / exp2_plus<T>(t, A{1}, A{1});
}

#define LS_DISPATCH(dtype, function, ...)                          \
  switch (dtype) {                                                 \
    case DType::kFloat: return function<float>(__VA_ARGS__);       \
    case DType::kBFloat16: return function<BFloat16>(__VA_ARGS__); \
    case DType::kHalf: return function<Half>(__VA_ARGS__);         \
    case DType::kDouble: return function<double>(__VA_ARGS__);     \
  }

}  // namespace
}  // namespace LS_ISA
}  // namespace latent_shift
