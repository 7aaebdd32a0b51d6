// The kernels for x86-64 with AVX-512 F, BW, DQ and VL: 64-byte vectors.
//
// With LATENT_SHIFT_EMULATE_AVX512 the same 64-byte source is lowered to AVX2, so that tests can
// run it on a machine without AVX-512.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#if defined(LATENT_SHIFT_EMULATE_AVX512)
#define LS_TARGET "avx2,fma,f16c"
#define LS_STREAM 32
#else
#define LS_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define LS_STREAM 64
#define LS_F16C
#endif

#define LS_PRAGMA(text) _Pragma(#text)
#define LS_PUSH_TARGET(name) \
  LS_PRAGMA(clang attribute push(__attribute__((target(name))), apply_to = function))
#define LS_SET_TARGET(name) LS_PRAGMA(GCC target(name))
#if defined(__clang__)
LS_PUSH_TARGET(LS_TARGET)
#else
LS_SET_TARGET(LS_TARGET)
#endif

// GCC 12 warns about its own intrinsics header
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define LS_ISA avx512
#define LS_BYTES 64

#include "isa_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
