// shift_add_group_norm_silu_backward on the CPU.
//
//   dz = dy' * silu'(z),  dxhat = dz * weight * (1 + ada_scale)
//   ds = (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)) * rstd [+ dsum]
//   dx = adjoint shift of ds
//
// Units as in forward: x and dy are read once from memory, dz is kept in cache between the two
// sweeps. All parameter gradients follow from the sums of dz and dz * xhat per (frame, channel),
// added over frames in frame order.
#include "norm.h"

namespace latent_shift {
namespace {

// Gradients of the parameters from the sums per (frame, channel), [N, C] each; absent outputs are
// null.
struct ParameterGrads {
  void *temb, *weight, *bias, *ada_scale, *ada_shift;
};

template <typename A>
void reduce_frames(const NormArgs& a, const ParameterGrads& grads) {
  const int64_t N = a.geometry.frames, C = a.geometry.channels;
  const A *dz = static_cast<const A*>(a.dz), *dz_xhat = static_cast<const A*>(a.dz_xhat);
  const A* ds = static_cast<const A*>(a.ds);
  const A *weight = static_cast<const A*>(a.weight.data),
          *bias = static_cast<const A*>(a.bias.data);
  const A* ada_scale = static_cast<const A*>(a.ada_scale.data);
  A *dtemb = static_cast<A*>(grads.temb), *dweight = static_cast<A*>(grads.weight);
  A *dbias = static_cast<A*>(grads.bias), *dada_scale = static_cast<A*>(grads.ada_scale);
  A* dada_shift = static_cast<A*>(grads.ada_shift);
  for (int64_t n = 0; n < N; ++n) {
    const A* scale = ada_scale ? ada_scale + n * a.ada_scale.rows / N * C : nullptr;
    for (int64_t c = 0; c < C; ++c) {
      const A one = dz[n * C + c], two = dz_xhat[n * C + c], factor = scale ? 1 + scale[c] : 1;
      if (dweight) dweight[c] += two * factor;
      if (dbias) dbias[c] += one * factor;
      if (dada_scale)
        dada_scale[n * a.ada_scale.rows / N * C + c] +=
            two * (weight ? weight[c] : 1) + one * (bias ? bias[c] : 0);
      if (dada_shift) dada_shift[n * a.ada_shift.rows / N * C + c] += one;
      if (dtemb) dtemb[n * a.temb.rows / N * C + c] += ds[n * C + c];
    }
  }
}

// A gradient to accumulate in, and the contiguous tensor of the parameter's own dtype to return.
struct Gradient {
  Tensor sums, result;

  Gradient(const OptionalTensor& parameter, const Tensor& x, ScalarType accumulate)
      : sums(parameter ? torch::stable::new_zeros(*parameter, parameter->sizes(), accumulate)
                       : nothing(x)),
        result(parameter ? torch::stable::empty(parameter->sizes(), parameter->scalar_type())
                         : sums) {}

  void* data() const { return sums.numel() ? sums.mutable_data_ptr() : nullptr; }

  Tensor finish() {
    return result.get() == sums.get() ? result : torch::stable::copy_(result, sums);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
shift_add_group_norm_silu_backward(const Tensor& dy, const OptionalTensor& dsum, const Tensor& x,
                                   bool is_sum, const OptionalTensor& temb,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& ada_scale, const OptionalTensor& ada_shift,
                                   const Tensor& mean, const Tensor& rstd, int64_t num_groups,
                                   const OptionalTensor& cu_frames, int64_t num_frames,
                                   const Ints& sizes, const Ints& offsets, bool shift_after,
                                   const std::string& boundary) {
  NormCall call = prepare_norm(x, {temb, weight, bias, ada_scale, ada_shift}, num_groups, cu_frames,
                               num_frames, sizes, offsets, shift_after, boundary);
  NormArgs& a = call.args;
  check_same(x, dy, "dy");
  if (dsum) check_same(x, *dsum, "dsum");
  const MemoryFormat layout = call.layout;
  const ScalarType accumulate = call.accumulate;
  Tensor dx = empty_as(x, layout);
  Tensor dresidual = is_sum && a.shift_before ? empty_as(x, layout) : nothing(x);
  Gradient dtemb(temb, x, accumulate), dweight(weight, x, accumulate), dbias(bias, x, accumulate);
  Gradient dada_scale(ada_scale, x, accumulate), dada_shift(ada_shift, x, accumulate);

  if (x.numel() > 0) {
    plan_norm(call, true);
    const Shift shift = a.shift;
    // Where replicated ends make two gradients meet, the shift is a step of its own.
    const bool apart = shift.boundary == Boundary::kReplicate && (a.shift_before || a.shift_after);
    const bool scatter_apart = apart && a.shift_before;
    a.is_sum = is_sum;
    a.x = call.hold(x);
    a.dy = call.hold(dy);
    if (apart && a.shift_after) {
      a.dy = call.hold(run_shift(dense(dy, layout), layout, shift, true));
      a.shift_after = false;
      a.shift = identity_shift(shift);
    }
    if (dsum) a.dsum = call.hold(*dsum);
    const Tensor statistics[] = {torch::stable::to(mean, accumulate),
                                 torch::stable::to(rstd, accumulate)};
    for (const Tensor& t : statistics)
      STD_TORCH_CHECK(
          t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == num_groups && t.is_contiguous(),
          "mean and rstd must be (", x.size(0), ", ", num_groups, ") and contiguous, got ",
          shape_of(t));
    a.mean = statistics[0].mutable_data_ptr();
    a.rstd = statistics[1].mutable_data_ptr();
    Tensor total = scatter_apart && !is_sum ? empty_as(x, layout) : dresidual;
    a.scatter = a.shift_before && !scatter_apart;
    a.dx = scatter_apart ? total.mutable_data_ptr() : dx.mutable_data_ptr();
    a.dresidual = !scatter_apart && dresidual.numel() ? dresidual.mutable_data_ptr() : nullptr;
    Tensor dz = empty_of({x.size(0), x.size(1)}, accumulate),
           dz_xhat = empty_of({x.size(0), x.size(1)}, accumulate);
    Tensor ds = temb ? empty_of({x.size(0), x.size(1)}, accumulate) : nothing(x);
    a.dz = dz.mutable_data_ptr();
    a.dz_xhat = dz_xhat.mutable_data_ptr();
    a.ds = temb ? ds.mutable_data_ptr() : nullptr;
    run_norm(a, true);
    if (scatter_apart) dx = run_shift(total, layout, shift, true);
    const ParameterGrads grads{dtemb.data(), dweight.data(), dbias.data(), dada_scale.data(),
                               dada_shift.data()};
    if (accumulate == ScalarType::Double) {
      reduce_frames<double>(a, grads);
    } else {
      reduce_frames<float>(a, grads);
    }
  }
  return {dx,
          dresidual,
          dtemb.finish(),
          dweight.finish(),
          dbias.finish(),
          dada_scale.finish(),
          dada_shift.finish()};
}

}  // namespace latent_shift

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CPU, m) {
  m.impl("shift_add_group_norm_silu_backward",
         TORCH_BOX(&latent_shift::shift_add_group_norm_silu_backward));
}
