// shift_add_group_norm_silu on the host executor.
#include "../../csrc/cuda/shift_add_group_norm_silu.cuh"
#include "arguments.h"

namespace latent_shift::cuda {

static NormArgs norm_args(const Arguments& a) {
  NormArgs args{};
  args.shape = a.norm_shape();
  args.shift = a.shift();
  args.shift_before = a.get<bool>("shift_before");
  args.shift_after = a.get<bool>("shift_after");
  args.eps = a.get<double>("eps");
  args.x = a.pointer("x");
  args.residual = a.pointer("residual");
  args.tables = a.tables();
  args.y = a.pointer("y");
  args.sum = a.pointer("sum");
  args.mean = a.pointer("mean");
  args.rstd = a.pointer("rstd");
  args.workspace = a.pointer("workspace");
  return args;
}

LS_HOST_BINDINGS(shift_add_group_norm_silu) {
  // The plan, and the workspace it needs; no call.
  m.def("plan_norm_forward", [](const pybind11::dict& given) {
    const NormShape shape = Arguments(given).norm_shape();
    const NormPlan plan = plan_norm_forward(shape, host::HostLauncher().limits);
    pybind11::dict said = describe(plan, shape.frames);
    said["workspace"] = norm_workspace(shape, plan);
    return said;
  });
  m.def("shift_add_group_norm_silu", [](const pybind11::dict& given) {
    const NormArgs args = norm_args(Arguments(given));
    host::HostLauncher launcher;
    shift_add_group_norm_silu(launcher, args, plan_norm_forward(args.shape, launcher.limits));
  });
}

}  // namespace latent_shift::cuda
