// shift_group_norm_silu_conv2d on the host executor.
#include "../../csrc/cuda/shift_group_norm_silu_conv2d.cuh"
#include "bindings.h"

namespace latent_shift::cuda {
namespace {

namespace py = pybind11;
using Ints = std::vector<int64_t>;

Shift shift_of(const py::dict& a, const char* sizes, const char* offsets) {
  Shift shift{};
  shift.num_frames = a["num_frames"].cast<int64_t>();
  shift.boundary = static_cast<Boundary>(a["boundary"].cast<int>());
  shift.cu_frames = host::pointer<const int32_t>(a["cu_frames"].cast<uintptr_t>());
  shift.clips = a["clips"].cast<int32_t>();
  const Ints size = a[sizes].cast<Ints>(), offset = a[offsets].cast<Ints>();
  int64_t end = 0;
  for (int k = 0; k < 3; ++k) {
    shift.end[k] = end += size[k];
    shift.offset[k] = static_cast<int32_t>(offset[k]);
  }
  return shift;
}

// (address, dtype, rows); address 0 where absent.
Table table_of(const py::dict& a, const char* name) {
  const auto [data, dtype, rows] = a[name].cast<std::tuple<uintptr_t, int, int64_t>>();
  return {host::pointer<const void>(data), static_cast<DType>(dtype), rows};
}

ConvArgs args_of(const py::dict& a) {
  const auto pointer = [&](const char* name) {
    return host::pointer<void>(a[name].cast<uintptr_t>());
  };
  const auto number = [&](const char* name) { return a[name].cast<int64_t>(); };
  ConvArgs args{};
  args.dtype = static_cast<DType>(a["dtype"].cast<int>());
  args.x = pointer("x");
  args.skip = pointer("skip");
  args.filter = pointer("filter");
  args.residual = pointer("residual");
  args.temb = table_of(a, "temb");
  args.weight = table_of(a, "weight");
  args.bias = table_of(a, "bias");
  args.ada_scale = table_of(a, "ada_scale");
  args.ada_shift = table_of(a, "ada_shift");
  args.filter_bias = table_of(a, "filter_bias");
  args.out_temb = table_of(a, "out_temb");
  args.shift = shift_of(a, "sizes", "offsets");
  args.out_shift = shift_of(a, "out_sizes", "out_offsets");
  args.shift_after = a["shift_after"].cast<bool>();
  const Ints strides = a["filter_strides"].cast<Ints>();
  std::copy(strides.begin(), strides.end(), args.filter_strides);
  args.shape = {number("frames"),        number("height"),
                number("width"),         number("x_channels"),
                number("skip_channels"), number("out_channels"),
                number("groups"),        a["sums"].cast<uintptr_t>() != 0};
  args.eps = a["eps"].cast<float>();
  args.scale = a["scale"].cast<float>();
  args.out = pointer("out");
  args.workspace = pointer("workspace");
  args.mean = static_cast<float*>(pointer("mean"));
  args.rstd = static_cast<float*>(pointer("rstd"));
  args.sums = static_cast<float*>(pointer("sums"));
  return args;
}

}  // namespace

LS_HOST_BINDINGS(shift_group_norm_silu_conv2d) {
  // (arch, columns, threads, bytes of shared memory) of every variant.
  m.def("conv_variants", [] {
    py::list variants;
    for (const ConvVariant& v : kConvVariants)
      variants.append(py::make_tuple(v.arch, v.columns, v.threads, v.shared));
    return variants;
  });
  m.def("conv_choice", [](const py::dict& a) {
    return plan_conv(args_of(a).shape, host::HostLauncher().limits).variant;
  });
  m.def("conv_workspace", [](const py::dict& a, int variant) {
    return plan_conv(args_of(a).shape, variant).workspace_bytes;
  });
  m.def("shift_group_norm_silu_conv2d", [](const py::dict& a, int variant) {
    const ConvArgs args = args_of(a);
    host::HostLauncher launcher;
    shift_group_norm_silu_conv2d(launcher, args, plan_conv(args.shape, variant));
  });
}

}  // namespace latent_shift::cuda
