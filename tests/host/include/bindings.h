// What a file bind_<operator>.cpp needs: LS_HOST_BINDINGS(operator) { m.def(...); } adds functions to
// the module. They take data pointers as integers, and run an operator's template on a HostLauncher.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host_launcher.h"

namespace latent_shift::host {

using Bind = void (*)(pybind11::module_&);

std::vector<Bind>& bindings();

struct Registration {
  explicit Registration(Bind bind) { bindings().push_back(bind); }
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace latent_shift::host

#define LS_HOST_BINDINGS(name)                                                  \
  static void bind_##name(pybind11::module_& m);                                \
  static const ::latent_shift::host::Registration register_##name(bind_##name); \
  static void bind_##name([[maybe_unused]] pybind11::module_& m)
