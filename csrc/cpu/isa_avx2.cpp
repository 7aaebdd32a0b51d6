// The kernels for x86-64 with AVX2, FMA and F16C: 32-byte vectors.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

// from here to the end of the file, so that template instantiations are compiled for the target too
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LS_ISA avx2
#define LS_BYTES 32
#define LS_STREAM 32
#define LS_F16C

#include "isa_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
