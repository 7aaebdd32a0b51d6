// shift_add_group_norm_silu on CUDA: checks, launch, registration; the kernels are in the .cuh.
#include "shift_add_group_norm_silu.cuh"

#include <tuple>

#include "tensor.h"

namespace latent_shift::cuda {

static std::tuple<Tensor, Tensor, Tensor, Tensor> run_norm(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& temb,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& ada_scale,
    const OptionalTensor& ada_shift, int64_t num_groups, double eps,
    const OptionalTensor& cu_frames, int64_t num_frames, const Ints& sizes, const Ints& offsets,
    bool shift_after, const std::string& boundary) {
  NormArgs args{};
  args.shift = make_shift(x, cu_frames, num_frames, sizes, offsets, boundary);
  const Call call(x);
  NormTensors tensors(x, num_groups);
  args.tables = tensors.tables(temb, weight, bias, ada_scale, ada_shift);
  args.x = tensors.image(x, "x");
  args.residual = tensors.image(residual, "residual");
  const ScalarType accumulate = accumulate_type(x);
  Tensor y = empty_as(x, tensors.layout);
  Tensor sum = residual ? empty_as(x, tensors.layout) : nothing(x);
  Tensor mean = empty_on(x, {x.size(0), num_groups}, accumulate),
         rstd = empty_on(x, {x.size(0), num_groups}, accumulate);
  if (x.numel() == 0) {
    torch::stable::fill_(mean, std::nan(""));  // of nothing
    torch::stable::fill_(rstd, std::nan(""));
    return {y, sum, mean, rstd};
  }
  args.y = tensors.output(y);
  if (residual) args.sum = tensors.output(sum);
  args.mean = mean.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  const bool moves = !is_identity(args.shift);
  args.shift_before = moves && !shift_after;
  args.shift_after = moves && shift_after;
  args.eps = eps;
  args.shape = tensors.shape;
  const NormPlan plan = plan_norm_forward(args.shape, call.launcher.limits);
  Tensor workspace = empty_on(x, {norm_workspace(args.shape, plan)}, accumulate);
  args.workspace = workspace.mutable_data_ptr();
  shift_add_group_norm_silu(call.launcher, args, plan);
  return {y, sum, mean, rstd};
}

}  // namespace latent_shift::cuda

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CUDA, m) {
  m.impl("shift_add_group_norm_silu", TORCH_BOX(&latent_shift::cuda::run_norm));
}
