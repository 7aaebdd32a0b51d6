// The vector helpers of csrc/cpu/vec.h behind a C interface, for test_cpu_isa.py. Compiled once per
// register width: -DLS_BYTES=16, 32 or 64; the widths that x86 has no registers for here are
// lowered.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#if LS_BYTES == 32
#pragma GCC target("avx2,fma,f16c")
#define LS_F16C
#endif
#endif

#define LS_ISA tested
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/vec.h"

using namespace latent_shift;
using namespace latent_shift::tested;

#define EXPORT extern "C" __attribute__((visibility("default")))

template <typename T, typename F>
static void map(const T* x, T* y, int64_t count, F f) {
  constexpr int64_t L = Lane<T>::kLanes;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = count - i < L ? count - i : L;
    store(y + i, f(load(x + i, lanes)), lanes);
  }
}

// z -> silu(z), sigmoid(z)
EXPORT void silu_float(const float* x, float* y, int64_t count) {
  map(x, y, count, [](FloatPair z) { return silu_of<float>(z * static_cast<float>(-kLog2E)); });
}
EXPORT void silu_double(const double* x, double* y, int64_t count) {
  map(x, y, count, [](DoublePair z) { return silu_of<double>(z * -kLog2E); });
}
// t -> 1 + 2^t
EXPORT void exp2_plus_one_float(const float* x, float* y, int64_t count) {
  map(x, y, count, [](FloatPair t) { return exp2_plus<float>(t, 1.0f, 1.0f); });
}
// t -> 2^t
EXPORT void exp2_float(const float* x, float* y, int64_t count) {
  map(x, y, count, [](FloatPair t) { return exp2_plus<float>(t, 1.0f, 0.0f); });
}
// likewise, as exact as a 16-bit result needs
EXPORT void exp2_short(const float* x, float* y, int64_t count) {
  map(x, y, count, [](FloatPair t) { return exp2_plus<Half>(t, 1.0f, 0.0f); });
}
EXPORT void exp2_double(const double* x, double* y, int64_t count) {
  map(x, y, count, [](DoublePair t) { return exp2_plus<double>(t, 1.0, 0.0); });
}

// 16-bit numbers to float and back, in element order
template <typename T>
static void widen_all(const T* x, float* y, int64_t count) {
  constexpr int64_t L = Lane<T>::kLanes;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = count - i < L ? count - i : L;
    store_table<T>(y + i, load(x + i, lanes), lanes);
  }
}
template <typename T>
static void narrow_all(const float* x, T* y, int64_t count) {
  constexpr int64_t L = Lane<T>::kLanes;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t lanes = count - i < L ? count - i : L;
    store(y + i, load_table<T>(x + i, lanes), lanes);
  }
}
EXPORT void widen_bf16(const uint16_t* x, float* y, int64_t count) {
  widen_all(reinterpret_cast<const BFloat16*>(x), y, count);
}
EXPORT void widen_fp16(const uint16_t* x, float* y, int64_t count) {
  widen_all(reinterpret_cast<const Half*>(x), y, count);
}
EXPORT void narrow_bf16(const float* x, uint16_t* y, int64_t count) {
  narrow_all(x, reinterpret_cast<BFloat16*>(y), count);
}
EXPORT void narrow_fp16(const float* x, uint16_t* y, int64_t count) {
  narrow_all(x, reinterpret_cast<Half*>(y), count);
}

// Sum of the first `count` of a register pair's elements.
EXPORT float sum_first_bf16(const uint16_t* x, int64_t count) {
  return sum_lanes(
      first_lanes<BFloat16>(Lane<BFloat16>::load(reinterpret_cast<const BFloat16*>(x)), count));
}
EXPORT float sum_first_float(const float* x, int64_t count) {
  return sum_lanes(first_lanes<float>(Lane<float>::load(x), count));
}
EXPORT int64_t lanes_float() { return Lane<float>::kLanes; }
