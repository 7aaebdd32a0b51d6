// Vectors of LS_BYTES bytes: loads and stores of every dtype, exp, sigmoid. One source for every instruction set.
//
// Included by the isa_*.cpp files only, after the target pragma, with LS_ISA naming the namespace, LS_BYTES the
// register width, and LS_F16C / LS_STREAM where half conversions and non-temporal stores exist. Everything has
// internal linkage and no std templates are used, so nothing compiled here can be merged with another target's code.
//
// exp: Cody-Waite reduction to |r| <= ln(2)/2 and a polynomial (degree 6 in fp32, 13 in fp64), 2^n by exponent
// bits; <= 1 ulp in fp32 inside the normal range, +inf above it, NaN kept. It saturates at e^-86 below.
#pragma once

#if !defined(LS_ISA) || !defined(LS_BYTES)
#error "define LS_ISA and LS_BYTES first"
#endif

namespace latent_shift {
namespace LS_ISA {
namespace {

#define LS_FN static inline __attribute__((always_inline))

constexpr int kFloatLanes = LS_BYTES / 4;
constexpr int kDoubleLanes = LS_BYTES / 8;

typedef float FloatVec __attribute__((vector_size(LS_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(LS_BYTES)));
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

// GCC 12 splits these conversions in halves where one instruction does; compare with the last line of each.
LS_FN UIntVec zero_extend(HalfBits bits) {
#if defined(LS_F16C) && LS_BYTES == 64
  return bit_cast<UIntVec>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(bits)));
#elif defined(LS_F16C) && LS_BYTES == 32
  return bit_cast<UIntVec>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, UIntVec);
#endif
}

LS_FN HalfBits low_halves(UIntVec v) {  // all below 2^16
#if defined(LS_F16C) && LS_BYTES == 64
  return bit_cast<HalfBits>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif defined(LS_F16C) && LS_BYTES == 32
  const __m256i both = bit_cast<__m256i>(v);
  return bit_cast<HalfBits>(
      _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
  return __builtin_convertvector(v, HalfBits);
#endif
}

LS_FN FloatVec widen(HalfBits bits, BFloat16) { return bit_cast<FloatVec>(zero_extend(bits) << 16); }

LS_FN HalfBits narrow(FloatVec x, BFloat16) {
  const UIntVec u = bit_cast<UIntVec>(x);
  // to nearest even; all ones is a NaN
  const UIntVec nan = bit_cast<UIntVec>(x != x);
  const UIntVec rounded = ((u + 0x7fff + ((u >> 16) & 1)) | nan) >> 16;
  return low_halves(rounded);
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
  const UIntVec u = zero_extend(bits);
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
  const UIntVec subnormal =
      bit_cast<UIntVec>(bit_cast<FloatVec>(magnitude) + 0.5f) - 0x3f000000;
  const UIntVec normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const UIntVec infinite = UIntVec{} + 0x7c00, quiet = UIntVec{} + 0x7e00;
  UIntVec value = magnitude < 0x38800000 ? subnormal : normal;
  value = magnitude >= 0x47800000 ? infinite : value;
  value = magnitude > 0x7f800000 ? quiet : value;
  return low_halves(value | ((u >> 16) & 0x8000));
}
#endif

template <typename V>
LS_FN void stream_bytes(void* to, V v) {
#if defined(LS_STREAM)
  if constexpr (sizeof(V) == 8) {
    __builtin_memcpy(to, &v, sizeof(V));
  } else {
    constexpr int kParts = sizeof(V) / (sizeof(V) < LS_STREAM ? sizeof(V) : LS_STREAM);
    char* target = static_cast<char*>(to);
    if constexpr (sizeof(V) / kParts == 16) {
      typedef float Part __attribute__((vector_size(16)));
      Part parts[kParts];
      __builtin_memcpy(parts, &v, sizeof(V));
      for (int i = 0; i < kParts; ++i) _mm_stream_ps(reinterpret_cast<float*>(target + 16 * i), parts[i]);
    }
#if LS_STREAM >= 32
    if constexpr (sizeof(V) / kParts == 32) {
      typedef float Part __attribute__((vector_size(32)));
      Part parts[kParts];
      __builtin_memcpy(parts, &v, sizeof(V));
      for (int i = 0; i < kParts; ++i) _mm256_stream_ps(reinterpret_cast<float*>(target + 32 * i), parts[i]);
    }
#endif
#if LS_STREAM >= 64
    if constexpr (sizeof(V) / kParts == 64) {
      _mm512_stream_ps(reinterpret_cast<float*>(target), bit_cast<__m512>(v));
    }
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

// How a dtype is stored (T), computed (Acc) and held in a register (Vec).
template <typename T>
struct Lane {  // BFloat16, Half
  typedef float Acc;
  typedef FloatVec Vec;
  static constexpr int kLanes = kFloatLanes;
  static inline __attribute__((always_inline)) Vec load(const T* p) {
    HalfBits bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return widen(bits, T{});
  }
  static inline __attribute__((always_inline)) void store(T* p, Vec v) {
    const HalfBits bits = narrow(v, T{});
    __builtin_memcpy(p, &bits, sizeof(bits));
  }
  static inline __attribute__((always_inline)) void stream(T* p, Vec v) { stream_bytes(p, narrow(v, T{})); }
};

template <typename T, typename V>
struct PlainLane {
  typedef T Acc;
  typedef V Vec;
  static constexpr int kLanes = sizeof(V) / sizeof(T);
  static inline __attribute__((always_inline)) Vec load(const T* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static inline __attribute__((always_inline)) void store(T* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static inline __attribute__((always_inline)) void stream(T* p, Vec v) { stream_bytes(p, v); }
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
  T buffer[Lane<T>::kLanes];
  Lane<T>::store(buffer, v);
  return Lane<T>::load(buffer);
}
template <>
inline __attribute__((always_inline)) FloatVec rounded<float>(FloatVec v) {
  return v;
}
template <>
inline __attribute__((always_inline)) DoubleVec rounded<double>(DoubleVec v) {
  return v;
}

// v in the first `lanes`, zeros behind them.
LS_FN FloatVec first_lanes(FloatVec v, int64_t lanes) {
  IntVec index;
  for (int i = 0; i < kFloatLanes; ++i) index[i] = i;
  return index < static_cast<int32_t>(lanes) ? v : FloatVec{};
}
LS_FN DoubleVec first_lanes(DoubleVec v, int64_t lanes) {
  LongVec index;
  for (int i = 0; i < kDoubleLanes; ++i) index[i] = i;
  return index < lanes ? v : DoubleVec{};
}

LS_FN float sum_lanes(FloatVec v) {
  float lanes[kFloatLanes];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int width = kFloatLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
LS_FN double sum_lanes(DoubleVec v) {
  double lanes[kDoubleLanes];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int width = kDoubleLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// To 12 significant bits: what is subtracted from half-precision numbers without rounding.
LS_FN FloatVec truncated(FloatVec v) { return bit_cast<FloatVec>(bit_cast<UIntVec>(v) & 0xfffff000u); }
LS_FN DoubleVec truncated(DoubleVec v) { return v; }

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

LS_FN FloatVec exp(FloatVec x) {
  x = clamp(x, -86.0f, 89.0f);  // e^89 overflows in the last multiplication, as it should
  // 1.5 * 2^23 + 126 leaves round(x / ln 2) + 126 in the low bits
  const FloatVec shifted = x * 1.44269504f + 12583038.0f;
  const FloatVec n = shifted - 12583038.0f;
  FloatVec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // twice the polynomial, so that 2^(n-1) stays finite for n = 128
  FloatVec p = FloatVec{} + 2.0f * 1.38146131e-3f;
  p = p * r + 2.0f * 8.36870983e-3f;
  p = p * r + 2.0f * 4.16683874e-2f;
  p = p * r + 2.0f * 1.66665207e-1f;
  p = p * r + 2.0f * 4.99999935e-1f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  return p * bit_cast<FloatVec>(bit_cast<UIntVec>(shifted) << 23);
}

LS_FN DoubleVec exp(DoubleVec x) {
  x = x > 710.0 ? DoubleVec{} + 710.0 : x;
  x = x < -707.0 ? DoubleVec{} - 707.0 : x;
  const DoubleVec shifted = x * 1.4426950408889634 + (6755399441055744.0 + 1022.0);
  const DoubleVec n = shifted - (6755399441055744.0 + 1022.0);
  DoubleVec r = x - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  // 2 / k! for k = 13 .. 0
  constexpr double kTerms[] = {2 / 6227020800.0, 2 / 479001600.0, 2 / 39916800.0, 2 / 3628800.0,
                               2 / 362880.0,     2 / 40320.0,     2 / 5040.0,     2 / 720.0,
                               2 / 120.0,        2 / 24.0,        2 / 6.0,        1.0,
                               2.0,              2.0};
  DoubleVec p = DoubleVec{} + kTerms[0];
  for (int k = 1; k < 14; ++k) p = p * r + kTerms[k];
  return p * bit_cast<DoubleVec>(bit_cast<LongVec>(shifted) << 52);
}

template <typename V>
LS_FN V sigmoid(V z) {
  return 1 / (1 + exp(-z));
}

// z * sigmoid(z) with one division; -inf gives NaN, as in torch.
template <typename V>
LS_FN V silu(V z) {
  return z / (1 + exp(-z));
}

#define LS_DISPATCH(dtype, function, ...)                              \
  switch (dtype) {                                                     \
    case DType::kFloat: return function<float>(__VA_ARGS__);           \
    case DType::kBFloat16: return function<BFloat16>(__VA_ARGS__);     \
    case DType::kHalf: return function<Half>(__VA_ARGS__);             \
    case DType::kDouble: return function<double>(__VA_ARGS__);         \
  }

}  // namespace
}  // namespace LS_ISA
}  // namespace latent_shift
