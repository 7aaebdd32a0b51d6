// Arguments of the operators as tests/host/backend.py gives them: a dictionary of numbers, addresses
// (0 where absent) and tuples.
#pragma once

#include "../../csrc/cuda/norm_tile.cuh"
#include "bindings.h"

namespace latent_shift::cuda {

class Arguments {
 public:
  explicit Arguments(const pybind11::dict& given) : given_(given) {}

  template <class T>
  T get(const char* name) const {
    return given_[name].cast<T>();
  }
  void* pointer(const char* name) const { return host::pointer<void>(get<uintptr_t>(name)); }
  DType dtype() const { return static_cast<DType>(get<int>("dtype")); }

  Shift shift() const {
    Shift shift{};
    shift.num_frames = get<int64_t>("num_frames");
    shift.boundary = static_cast<Boundary>(get<int>("boundary"));
    shift.cu_frames = static_cast<const int32_t*>(pointer("cu_frames"));
    shift.clips = get<int32_t>("clips");
    const auto sizes = get<std::vector<int64_t>>("sizes");
    const auto offsets = get<std::vector<int32_t>>("offsets");
    int64_t end = 0;
    for (int k = 0; k < 3; ++k) {
      shift.end[k] = end += sizes[k];
      shift.offset[k] = offsets[k];
    }
    return shift;
  }

  // A table or a gradient: (address, dtype, rows).
  template <class Rows>
  Rows rows(const char* name) const {
    const auto [data, dtype, count] = get<std::tuple<uintptr_t, int, int64_t>>(name);
    Rows rows;
    rows.data = host::pointer<void>(data);
    rows.dtype = static_cast<DType>(dtype);
    rows.rows = count;
    return rows;
  }

  NormTables tables() const {
    return {rows<Table>("temb"), rows<Table>("weight"), rows<Table>("bias"),
            rows<Table>("ada_scale"), rows<Table>("ada_shift")};
  }

  NormShape norm_shape() const {
    return {dtype(),
            get<bool>("channels_last"),
            get<int64_t>("frames"),
            get<int64_t>("channels"),
            get<int64_t>("pixels"),
            get<int64_t>("groups"),
            get<bool>("aligned")};
  }

 private:
  const pybind11::dict& given_;
};

// A plan as roofline.py and the tests read it.
inline pybind11::dict describe(const NormPlan& plan, int64_t frames) {
  const NormTiling& t = plan.tiling;
  using pybind11::arg;
  return pybind11::dict(arg("variant") = plan.split      ? "split"
                                         : t.cluster > 1 ? "cluster"
                                                         : "one launch",
                        arg("vector") = plan.vector, arg("span") = t.span, arg("tile_c") = t.tile_c,
                        arg("tile_p") = t.tile_p, arg("tiles") = plan.tiles(),
                        arg("cluster") = t.cluster, arg("threads") = plan.threads,
                        arg("shared") = plan.shared, arg("blocks") = plan.blocks(frames));
}

}  // namespace latent_shift::cuda
