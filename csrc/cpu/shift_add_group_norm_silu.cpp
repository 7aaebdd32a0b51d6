// shift_add_group_norm_silu on the CPU.
//
//   sum = [residual +] shift(x) [+ temb]
//   y = shift(silu(groupnorm(sum) * (1 + ada_scale) + ada_shift))
//
// x, residual, y, sum: (B*T, C, H, W), NCHW or channels_last; the shift is on x, or on y if
// shift_after; returns (y, sum, mean, rstd), sum empty without a residual. One unit per frame and
// group, or frame and span of groups: one read of each input from memory and one write of each
// output. Loops and numerics: norm_kernels.h.
#include "norm.h"

#include <cmath>
#include <tuple>

namespace latent_shift {

NormCall prepare_norm(const Tensor& x, const NormTables& tables, int64_t num_groups,
                      const OptionalTensor& cu_frames, int64_t num_frames, const Ints& sizes,
                      const Ints& offsets, bool shift_after, const std::string& boundary) {
  NormCall call;
  NormArgs& a = call.args;
  a.shift = make_shift(x, cu_frames, num_frames, sizes, offsets, boundary);
  const int64_t frames = x.size(0), channels = x.size(1);
  STD_TORCH_CHECK(num_groups > 0 && channels % num_groups == 0, "num_groups = ", num_groups,
                  " does not divide ", channels, " channels");
  check_parameter(tables.weight, channels, "weight");
  check_parameter(tables.bias, channels, "bias");
  check_table(tables.temb, frames, channels, "temb");
  check_table(tables.ada_scale, frames, channels, "ada_scale");
  check_table(tables.ada_shift, frames, channels, "ada_shift");
  const bool moves = !is_identity(a.shift);
  a.shift_before = moves && !shift_after;
  a.shift_after = moves && shift_after;
  if (!moves) a.shift = identity_shift(a.shift);
  call.layout = layout_of(x);
  call.accumulate = accumulate_type(x);
  a.geometry = geometry_of(x, call.layout);
  a.groups = num_groups;
  call.keep.reserve(12);
  a.temb = table_of(tables.temb, call.accumulate, call.keep);
  a.weight = table_of(tables.weight, call.accumulate, call.keep);
  a.bias = table_of(tables.bias, call.accumulate, call.keep);
  a.ada_scale = table_of(tables.ada_scale, call.accumulate, call.keep);
  a.ada_shift = table_of(tables.ada_shift, call.accumulate, call.keep);
  return call;
}

void plan_norm(NormCall& call, bool backward) {
  NormArgs& a = call.args;
  const Geometry& g = a.geometry;
  const int64_t size = g.dtype == DType::kDouble ? 8 : g.dtype == DType::kFloat ? 4 : 2;
  const int64_t zeros = g.channels_last ? g.channels : g.pixels;
  Tensor row = torch::stable::new_zeros(
      call.keep.empty() ? empty_of({0}, ScalarType::Float) : call.keep.front(),
      torch::headeronly::IntHeaderOnlyArrayRef(&zeros, 1), ScalarType::Double);
  a.zeros = row.const_data_ptr();
  call.keep.push_back(row);
  a.streaming = g.frames * g.channels * g.pixels * size >= kStreamingBytes;

  // Whole frames, unless that leaves threads idle or backward's copy of dz grows past a few MB; then
  // whole groups that end on cache lines. The choice does not change a bit of the result: statistics
  // are kept per channel.
  const int64_t group = g.channels / a.groups, line = 64 / size;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t step = group;
  while (step % line != 0 && step < g.channels) step += group;
  const auto too_wide = [&] {
    return g.frames * norm_units(a) < 4 * threads || (backward && a.span * g.pixels > 1 << 20);
  };
  a.span = g.channels;
  while (a.span > step && too_wide()) a.span = ceil_div(a.span / 2, step) * step;
}

void run_norm(const NormArgs& a, bool backward) {
  const Kernels& k = kernels();
  const size_t bytes = k.norm_scratch(a, backward);
  torch::stable::parallel_for(
      0, a.geometry.frames * norm_units(a), 1, [&](int64_t begin, int64_t end) {
        const auto scratch = scratch_memory(bytes);
        (backward ? k.norm_backward : k.norm_forward)(a, begin, end, scratch.get());
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> shift_add_group_norm_silu(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& temb,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& ada_scale,
    const OptionalTensor& ada_shift, int64_t num_groups, double eps,
    const OptionalTensor& cu_frames, int64_t num_frames, const Ints& sizes, const Ints& offsets,
    bool shift_after, const std::string& boundary) {
  NormCall call = prepare_norm(x, {temb, weight, bias, ada_scale, ada_shift}, num_groups, cu_frames,
                               num_frames, sizes, offsets, shift_after, boundary);
  NormArgs& a = call.args;
  if (residual) check_same(x, *residual, "residual");
  Tensor y = empty_as(x, call.layout), sum = residual ? empty_as(x, call.layout) : nothing(x);
  Tensor mean = empty_of({x.size(0), num_groups}, call.accumulate),
         rstd = empty_of({x.size(0), num_groups}, call.accumulate);
  if (x.numel() == 0) {
    torch::stable::fill_(mean, std::nan(""));  // of nothing
    torch::stable::fill_(rstd, std::nan(""));
    return {y, sum, mean, rstd};
  }
  plan_norm(call, false);
  a.eps = eps;
  a.x = call.hold(x);
  if (residual) {
    a.residual = call.hold(*residual);
    a.sum = sum.mutable_data_ptr();
  }
  a.y = y.mutable_data_ptr();
  a.mean = mean.mutable_data_ptr();
  a.rstd = rstd.mutable_data_ptr();
  run_norm(a, false);
  return {y, sum, mean, rstd};
}

}  // namespace latent_shift

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CPU, m) {
  m.impl("shift_add_group_norm_silu", TORCH_BOX(&latent_shift::shift_add_group_norm_silu));
}
