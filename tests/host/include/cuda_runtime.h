// The part of CUDA's runtime header that kernels use, for a host compiler: types, qualifiers
// defined away, warp and block functions that lead to the executor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "executor.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __align__(n) alignas(n)

#define threadIdx (::latent_shift::host::thread_index())
#define blockIdx (::latent_shift::host::block_index())
#define blockDim (::latent_shift::host::block_size())
#define gridDim (::latent_shift::host::grid_size())

using cudaStream_t = void*;
inline constexpr int warpSize = 32;

#define LS_VECTOR_TYPES(type, name)                                                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
LS_VECTOR_TYPES(short, short)
LS_VECTOR_TYPES(unsigned short, ushort)
LS_VECTOR_TYPES(int, int)
LS_VECTOR_TYPES(unsigned int, uint)
LS_VECTOR_TYPES(float, float)
LS_VECTOR_TYPES(double, double)
#undef LS_VECTOR_TYPES

struct float3 {
  float x, y, z;
};
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }

// ---- arithmetic --------------------------------------------------------------------------------

#define LS_MIN_MAX(type)                                    \
  inline type min(type a, type b) { return a < b ? a : b; } \
  inline type max(type a, type b) { return a < b ? b : a; }
LS_MIN_MAX(int)
LS_MIN_MAX(unsigned int)
LS_MIN_MAX(long)
LS_MIN_MAX(unsigned long)
LS_MIN_MAX(long long)
LS_MIN_MAX(unsigned long long)
#undef LS_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0.0f; }
inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(x)); }
inline unsigned int __umulhi(unsigned int a, unsigned int b) {
  return static_cast<unsigned int>(uint64_t{a} * b >> 32);
}

template <class To, class From>
To ls_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned int __float_as_uint(float x) { return ls_bit_cast<unsigned int>(x); }
inline int __float_as_int(float x) { return ls_bit_cast<int>(x); }
inline float __uint_as_float(unsigned int x) { return ls_bit_cast<float>(x); }
inline float __int_as_float(int x) { return ls_bit_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }

// ---- memory ------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

// ---- threads -----------------------------------------------------------------------------------

inline void __syncthreads() { ::latent_shift::host::sync_block(); }
inline void __syncwarp(unsigned int mask = 0xFFFFFFFF) { ::latent_shift::host::sync_warp(mask); }

#define LS_SHUFFLE(name, kind)                                                                  \
  template <class T>                                                                            \
  T name(unsigned int mask, T value, int lane, int width = warpSize) {                          \
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));               \
    ::latent_shift::host::shuffle(mask, ::latent_shift::host::Shuffle::kind, &value, sizeof(T), \
                                  lane, width);                                                 \
    return value;                                                                               \
  }
LS_SHUFFLE(__shfl_sync, kIndex)
LS_SHUFFLE(__shfl_xor_sync, kXor)
LS_SHUFFLE(__shfl_up_sync, kUp)
LS_SHUFFLE(__shfl_down_sync, kDown)
#undef LS_SHUFFLE

inline unsigned int __ballot_sync(unsigned int mask, int predicate) {
  return ::latent_shift::host::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned int mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned int mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}
