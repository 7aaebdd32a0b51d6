// half for a host compiler, in CUDA's names.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half_raw {
  unsigned short x;
};

struct alignas(2) __half {
  unsigned short bits;

  __half() = default;
  __half(__half_raw raw) : bits(raw.x) {}
  // Rounds to nearest, ties to even; past the largest half, infinity.
  __half(float value) {
    const unsigned int x = __float_as_uint(value), sign = x >> 16 & 0x8000;
    const float magnitude = std::fabs(value);
    unsigned int result;
    if (value != value) {
      result = 0x7FFF;
    } else if (magnitude >= 65520.0f) {
      result = sign | 0x7C00;
    } else if (magnitude < 6.103515625e-5f) {  // 2^-14: subnormal, in units of 2^-24
      result = sign | static_cast<unsigned int>(std::nearbyint(magnitude * 16777216.0f));
    } else {
      const unsigned int exact = (x & 0x7FFFFFFF) - (112u << 23);
      result = sign | (exact + 0xFFF + (exact >> 13 & 1)) >> 13;
    }
    bits = static_cast<unsigned short>(result);
  }
  operator float() const {
    const unsigned int sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31,
                       mantissa = bits & 0x3FF;
    if (exponent == 0) return std::copysign(mantissa / 16777216.0f, __uint_as_float(sign));
    const unsigned int shifted = exponent == 31 ? 255 : exponent + 112;
    return __uint_as_float(sign | shifted << 23 | mantissa << 13);
  }
};

struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
