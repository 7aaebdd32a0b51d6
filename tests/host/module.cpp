// The module latent_shift_host: the executor's controls, and every file's bindings.
#include "bindings.h"

namespace latent_shift::host {

std::vector<Bind>& bindings() {
  static std::vector<Bind> all;
  return all;
}

}  // namespace latent_shift::host

PYBIND11_MODULE(latent_shift_host, m) {
  namespace py = pybind11;
  namespace host = latent_shift::host;
  py::register_exception<host::KernelError>(m, "KernelError", PyExc_RuntimeError);
  m.def(
      "configure",
      [](uint64_t seed, bool races, int arch, int shared_per_block, int num_sms) {
        host::configure({seed, races, arch, shared_per_block, num_sms});
      },
      py::arg("seed"), py::arg("races"), py::arg("arch"), py::arg("shared_per_block"),
      py::arg("num_sms"));
  m.def("register_buffer", &host::register_buffer, py::arg("address"), py::arg("bytes"),
        py::arg("item"), py::arg("name"), py::arg("writable"));
  m.def("clear_buffers", &host::clear_buffers);
  m.def("launches", [] {
    py::list launches;
    for (const auto& l : host::launch_records())
      launches.append(
          py::dict(py::arg("kernel") = l.kernel,
                   py::arg("blocks") = py::make_tuple(l.blocks.x, l.blocks.y, l.blocks.z),
                   py::arg("threads") = py::make_tuple(l.threads.x, l.threads.y, l.threads.z),
                   py::arg("cluster") = l.cluster, py::arg("shared") = l.shared,
                   py::arg("accesses") = l.accesses));
    return launches;
  });
  for (const host::Bind bind : host::bindings()) bind(m);
}
