// shift_add_group_norm_silu_backward on the host executor.
#include "../../csrc/cuda/shift_add_group_norm_silu_backward.cuh"
#include "arguments.h"

namespace latent_shift::cuda {

static NormBackwardArgs norm_backward_args(const Arguments& a) {
  NormBackwardArgs args{};
  args.shape = a.norm_shape();
  args.shift = a.shift();
  args.shift_before = a.get<bool>("shift_before");
  args.shift_after = a.get<bool>("shift_after");
  args.is_sum = a.get<bool>("is_sum");
  args.dy = a.pointer("dy");
  args.dsum = a.pointer("dsum");
  args.x = a.pointer("x");
  args.tables = a.tables();
  args.mean = a.pointer("mean");
  args.rstd = a.pointer("rstd");
  args.dx = a.pointer("dx");
  args.dresidual = a.pointer("dresidual");
  args.total = a.pointer("total");
  args.dtemb = a.rows<NormGradient>("dtemb");
  args.dweight = a.rows<NormGradient>("dweight");
  args.dbias = a.rows<NormGradient>("dbias");
  args.dada_scale = a.rows<NormGradient>("dada_scale");
  args.dada_shift = a.rows<NormGradient>("dada_shift");
  args.workspace = a.pointer("workspace");
  return args;
}

LS_HOST_BINDINGS(shift_add_group_norm_silu_backward) {
  m.def("plan_norm_backward", [](const pybind11::dict& given) {
    const NormShape shape = Arguments(given).norm_shape();
    return describe(plan_norm_backward(shape, host::HostLauncher().limits), shape.frames);
  });
  m.def("norm_backward_workspace", [](const pybind11::dict& given) {
    const NormBackwardArgs args = norm_backward_args(Arguments(given));
    const NormPlan plan = plan_norm_backward(args.shape, host::HostLauncher().limits);
    return std::make_pair(norm_backward_workspace(args, plan), norm_backward_total(args));
  });
  m.def("shift_add_group_norm_silu_backward", [](const pybind11::dict& given) {
    const NormBackwardArgs args = norm_backward_args(Arguments(given));
    host::HostLauncher launcher;
    shift_add_group_norm_silu_backward(launcher, args,
                                       plan_norm_backward(args.shape, launcher.limits));
  });
}

}  // namespace latent_shift::cuda
