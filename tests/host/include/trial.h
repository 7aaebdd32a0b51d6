// Small kernels that all take the same parameters, for the tests of the executor itself.
#pragma once

#include "../../../csrc/cuda/ptx.cuh"
#include "bindings.h"

namespace latent_shift::cuda {

struct Trial {
  const void *a, *b;
  void* out;
  int n;
  int fault;  // which fault to commit, 0 for none
};

template <auto Kernel>
void run_trial(unsigned blocks, unsigned threads, unsigned cluster, size_t shared, uintptr_t a,
               uintptr_t b, uintptr_t out, int n, int fault) {
  host::HostLauncher().launch<Kernel>(
      Grid{dim3(blocks), dim3(threads), cluster, shared},
      Trial{host::pointer<void>(a), host::pointer<void>(b), host::pointer<void>(out), n, fault});
}

template <auto Kernel>
void def_trial(pybind11::module_& m, const char* name) {
  namespace py = pybind11;
  m.def(name, run_trial<Kernel>, py::kw_only(), py::arg("blocks") = 1, py::arg("threads") = 32,
        py::arg("cluster") = 1, py::arg("shared") = 0, py::arg("a") = 0, py::arg("b") = 0,
        py::arg("out") = 0, py::arg("n") = 0, py::arg("fault") = 0);
}

}  // namespace latent_shift::cuda
