// Which instruction set serves: the widest this machine runs, or what LATENT_SHIFT_CPU_ISA names.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace latent_shift {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

bool supported(const char* isa) {
  if (std::strcmp(isa, "baseline") == 0) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
#if defined(LATENT_SHIFT_EMULATE_AVX512)
  return avx2;
#else
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#else
  return false;
#endif
}

const Kernels& choose() {
  const Kernels* const candidates[] = {
#if defined(__x86_64__)
#if !defined(LATENT_SHIFT_EMULATE_AVX512)
      &avx512::kKernels,
#endif
      &avx2::kKernels,
#if defined(LATENT_SHIFT_EMULATE_AVX512)
      &avx512::kKernels,
#endif
#endif
      &baseline::kKernels,
  };
  const char* wanted = std::getenv("LATENT_SHIFT_CPU_ISA");
  if (wanted && *wanted) {
    for (const Kernels* kernels : candidates)
      if (std::strcmp(kernels->isa, wanted) == 0 && supported(wanted)) return *kernels;
    std::fprintf(
        stderr,
        "latent_shift: LATENT_SHIFT_CPU_ISA=%s is unknown or not supported here; ignored.\n",
        wanted);
  }
  for (const Kernels* kernels : candidates)
    if (supported(kernels->isa)) return *kernels;
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace latent_shift

// Read by latent_shift_kernels.backends through ctypes.
extern "C" __attribute__((visibility("default"))) const char* latent_shift_cpu_isa() {
  return latent_shift::kernels().isa;
}
