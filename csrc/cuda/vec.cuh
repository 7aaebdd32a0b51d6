// Vectors of up to 16 bytes, conversion to and from the type sums are kept in, and SiLU.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "plan.h"
#include "ptx.cuh"

#define LS_DEVICE __device__ __forceinline__

namespace latent_shift::cuda {

// Statistics and sums are fp32, fp64 for fp64.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// N elements that move together, as one word.
template <class T, int N>
struct Vec {
  typename Word<sizeof(T) * N>::type word;

  LS_DEVICE void unpack(T (&lanes)[N]) const { __builtin_memcpy(lanes, &word, sizeof(word)); }
  LS_DEVICE void pack(const T (&lanes)[N]) { __builtin_memcpy(&word, lanes, sizeof(word)); }
};

// `p` is aligned to the vector, in global or shared memory.
template <class T, int N>
LS_DEVICE Vec<T, N> load(const T* p) {
  return {*reinterpret_cast<const typename Word<sizeof(T) * N>::type*>(p)};
}

template <class T, int N>
LS_DEVICE void store(T* p, const Vec<T, N>& v) {
  *reinterpret_cast<typename Word<sizeof(T) * N>::type*>(p) = v.word;
}

LS_DEVICE float widen(float x) { return x; }
LS_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
LS_DEVICE float widen(__half x) { return __half2float(x); }
LS_DEVICE double widen(double x) { return x; }

template <class T>
LS_DEVICE T narrow(acc_t<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

template <class T, int N>
LS_DEVICE void widen(const Vec<T, N>& v, acc_t<T> (&x)[N]) {
  T lanes[N];
  v.unpack(lanes);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = widen(lanes[j]);
}

template <class T, int N>
LS_DEVICE Vec<T, N> narrow(const acc_t<T> (&x)[N]) {
  T lanes[N];
#pragma unroll
  for (int j = 0; j < N; ++j) lanes[j] = narrow<T>(x[j]);
  Vec<T, N> v;
  v.pack(lanes);
  return v;
}

// 1 / (1 + exp(-z)). The fast forms are right to a few units of the last place of fp32, far below
// the rounding of 16-bit types; fp32 and fp64 take the exact ones.
template <class T>
LS_DEVICE acc_t<T> sigmoid(acc_t<T> z) {
  if constexpr (std::is_same_v<T, double>) {
    return 1.0 / (1.0 + exp(-z));
  } else if constexpr (std::is_same_v<T, float>) {
    return 1.0f / (1.0f + expf(-z));
  } else {
    return ptx::rcp_approx(1.0f + ptx::exp2_approx(-1.4426950408889634f * z));
  }
}

// An affine parameter (one row) or a per-clip or per-frame table (rows of C channels) of any
// floating dtype; absent where null.
struct Table {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t rows = 1;
};

// The row that belongs to frame n of N starts at this element.
LS_DEVICE int64_t row_offset(const Table& table, int64_t n, int64_t frames, int64_t channels) {
  return table.rows == 1 ? 0 : n * table.rows / frames * channels;
}

template <class A>
LS_DEVICE A read(const Table& table, int64_t index, A otherwise) {
  if (!table.data) return otherwise;
  switch (table.dtype) {
    case DType::kBFloat16: return widen(static_cast<const __nv_bfloat16*>(table.data)[index]);
    case DType::kHalf: return widen(static_cast<const __half*>(table.data)[index]);
    case DType::kDouble: return static_cast<A>(static_cast<const double*>(table.data)[index]);
    default: return static_cast<const float*>(table.data)[index];
  }
}

template <class A>
LS_DEVICE void write(void* data, DType dtype, int64_t index, A value) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = narrow<__nv_bfloat16>(static_cast<float>(value));
      break;
    case DType::kHalf:
      static_cast<__half*>(data)[index] = narrow<__half>(static_cast<float>(value));
      break;
    case DType::kDouble: static_cast<double*>(data)[index] = value; break;
    default: static_cast<float*>(data)[index] = static_cast<float>(value);
  }
}

}  // namespace latent_shift::cuda
