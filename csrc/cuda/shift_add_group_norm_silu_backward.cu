// shift_add_group_norm_silu_backward on CUDA: checks, launch, registration; the kernels are in the
// .cuh.
#include "shift_add_group_norm_silu_backward.cuh"

#include <tuple>

#include "tensor.h"

namespace latent_shift::cuda {
namespace {

Tensor gradient_of(const Tensor& x, const OptionalTensor& parameter, NormGradient& gradient) {
  if (!parameter) return nothing(x);
  Tensor result = torch::stable::new_empty(*parameter, parameter->sizes());
  if (x.numel() == 0) return torch::stable::fill_(result, 0.0);
  gradient = {result.mutable_data_ptr(), dtype_of(result), result.dim() == 2 ? result.size(0) : 1};
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_norm_backward(
    const Tensor& dy, const OptionalTensor& dsum, const Tensor& x, bool is_sum,
    const OptionalTensor& temb, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& ada_scale, const OptionalTensor& ada_shift, const Tensor& mean,
    const Tensor& rstd, int64_t num_groups, const OptionalTensor& cu_frames, int64_t num_frames,
    const Ints& sizes, const Ints& offsets, bool shift_after, const std::string& boundary) {
  NormBackwardArgs args{};
  args.shift = make_shift(x, cu_frames, num_frames, sizes, offsets, boundary);
  const Call call(x);
  NormTensors tensors(x, num_groups);
  args.tables = tensors.tables(temb, weight, bias, ada_scale, ada_shift);
  const bool moves = !is_identity(args.shift);
  args.shift_before = moves && !shift_after;
  args.shift_after = moves && shift_after;
  args.is_sum = is_sum;
  args.x = tensors.image(x, "x");
  args.dy = tensors.image(dy, "dy");
  args.dsum = tensors.image(dsum, "dsum");
  args.mean = tensors.statistic(mean, "mean");
  args.rstd = tensors.statistic(rstd, "rstd");
  Tensor dx = empty_as(x, tensors.layout);
  const bool separate = is_sum && args.shift_before;
  Tensor dresidual = separate ? empty_as(x, tensors.layout) : nothing(x);
  Tensor dtemb = gradient_of(x, temb, args.dtemb), dweight = gradient_of(x, weight, args.dweight),
         dbias = gradient_of(x, bias, args.dbias),
         dada_scale = gradient_of(x, ada_scale, args.dada_scale),
         dada_shift = gradient_of(x, ada_shift, args.dada_shift);
  if (x.numel() > 0) {
    args.dx = tensors.output(dx);
    if (separate) args.dresidual = tensors.output(dresidual);
    Tensor total = norm_backward_total(args) ? empty_as(x, tensors.layout) : nothing(x);
    args.total = tensors.output(total);
    args.shape = tensors.shape;
    const NormPlan plan = plan_norm_backward(args.shape, call.launcher.limits);
    Tensor workspace = empty_on(x, {norm_backward_workspace(args, plan)}, accumulate_type(x));
    args.workspace = workspace.mutable_data_ptr();
    shift_add_group_norm_silu_backward(call.launcher, args, plan);
  }
  return {dx, dresidual, dtemb, dweight, dbias, dada_scale, dada_shift};
}

}  // namespace
}  // namespace latent_shift::cuda

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CUDA, m) {
  m.impl("shift_add_group_norm_silu_backward", TORCH_BOX(&latent_shift::cuda::run_norm_backward));
}
