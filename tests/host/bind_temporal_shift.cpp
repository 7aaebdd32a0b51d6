// temporal_shift and shift_add on the host executor.
#include "../../csrc/cuda/shift_add.cuh"
#include "../../csrc/cuda/temporal_shift.cuh"
#include "arguments.h"

namespace latent_shift::cuda {

static FlatShape flat_shape(const Arguments& a) {
  return {a.shift(), a.get<bool>("channels_last"), a.get<int64_t>("frames"),
          a.get<int64_t>("channels"), a.get<int64_t>("pixels")};
}

LS_HOST_BINDINGS(temporal_shift) {
  m.def("temporal_shift", [](const pybind11::dict& given) {
    const Arguments a(given);
    host::HostLauncher launcher;
    temporal_shift(launcher, {flat_shape(a), a.dtype(), a.get<int>("element_size"),
                              a.get<bool>("adjoint"), a.pointer("x"), a.pointer("y")});
  });
  m.def("shift_add", [](const pybind11::dict& given) {
    const Arguments a(given);
    host::HostLauncher launcher;
    shift_add(launcher, {flat_shape(a), a.dtype(), a.get<double>("scale"), a.pointer("h"),
                         a.pointer("residual"), a.pointer("y")});
  });
}

}  // namespace latent_shift::cuda
