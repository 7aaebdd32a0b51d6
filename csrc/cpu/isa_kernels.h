// Everything one instruction set compiles, and its table of kernels. Included last by each
// isa_*.cpp file.
#pragma once

#include "kernels.h"
#include "vec.h"
// vec.h first
#include "norm_kernels.h"
#include "shift_kernels.h"

#define LS_STRING(name) #name
#define LS_NAME(name) LS_STRING(name)

namespace latent_shift {
namespace LS_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {LS_NAME(LS_ISA), shift,        shift_add,
                          norm_scratch,    norm_forward, norm_backward};

}  // namespace LS_ISA
}  // namespace latent_shift
