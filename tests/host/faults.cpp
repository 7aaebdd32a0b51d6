#include "../../csrc/cuda/ptx.cuh"
#include "bindings.h"
