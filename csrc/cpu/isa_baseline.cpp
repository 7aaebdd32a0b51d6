// The kernels for any machine: 16-byte vectors, which every x86-64 and every 64-bit Arm has.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#define LS_STREAM 16
#endif

#define LS_ISA baseline
#define LS_BYTES 16

#include "isa_kernels.h"
