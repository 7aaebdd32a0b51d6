// shift_group_norm_silu_conv2d_fused: the CUDA kernels of shift_group_norm_silu_conv2d, under a name of
// their own. The operator itself is served by its composition (one launch of norm and activation, the
// library's convolution, shift_add) until this is asked for: see shift_group_norm_silu_conv2d.cuh.
#include "shift_group_norm_silu_conv2d.cuh"

#include <cmath>
#include <limits>
#include <tuple>

#include "tensor.h"

namespace latent_shift::cuda {
namespace {

// Hopper's kernels trap where they were not compiled for sm_90a.
#ifdef LATENT_SHIFT_SM90A
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// The shift of frames as `like` has it, with other slices.
Shift with_slices(const Shift& like, const Ints& sizes, const Ints& offsets, int64_t channels) {
  STD_TORCH_CHECK(sizes.size() == 3 && offsets.size() == 3, "expected three slices, got ",
                  sizes.size(), " sizes and ", offsets.size(), " offsets");
  Shift shift = like;
  int64_t end = 0;
  for (int k = 0; k < 3; ++k) {
    STD_TORCH_CHECK(sizes[k] >= 0 && offsets[k] >= -1 && offsets[k] <= 1,
                    "slices need sizes >= 0 and offsets in -1, 0, 1, got size ", sizes[k],
                    " with offset ", offsets[k]);
    shift.end[k] = end += sizes[k];
    shift.offset[k] = static_cast<int32_t>(offsets[k]);
  }
  STD_TORCH_CHECK(end == channels, "the slices hold ", end, " channels, x and skip have ",
                  channels);
  return shift;
}

// The tensors of a call as the kernels want them, kept until its launches.
class ConvTensors {
 public:
  explicit ConvTensors(const Tensor& x) : x_(x) {}

  // Dense in channels_last and aligned to 16 bytes, a copy where it is not.
  const void* image(const OptionalTensor& t, const char* name) {
    if (!t) return nullptr;
    check_device(x_, t, name);
    Tensor image = dense(*t, MemoryFormat::ChannelsLast);
    if (!is_aligned(image.const_data_ptr())) image = torch::stable::clone(image);
    keep_.push_back(image);
    return image.const_data_ptr();
  }

  Table table(const OptionalTensor& t, const char* name) {
    if (!t) return {};
    check_device(x_, t, name);
    keep_.push_back(t->is_contiguous() ? *t : torch::stable::contiguous(*t));
    const Tensor& kept = keep_.back();
    return {kept.const_data_ptr(), dtype_of(kept), kept.dim() == 2 ? kept.size(0) : 1};
  }

 private:
  const Tensor& x_;
  std::vector<Tensor> keep_;
};

}  // namespace

static std::tuple<Tensor, Tensor, Tensor, Tensor> run_conv(
    const Tensor& x, const OptionalTensor& skip, const OptionalTensor& temb,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& ada_scale,
    const OptionalTensor& ada_shift, int64_t num_groups, double eps, const Tensor& filter,
    const OptionalTensor& filter_bias, const OptionalTensor& out_temb,
    const OptionalTensor& residual, double scale, const OptionalTensor& cu_frames,
    int64_t num_frames, const Ints& sizes, const Ints& offsets, bool shift_after,
    const Ints& out_sizes, const Ints& out_offsets, const std::string& boundary, bool emit_sums) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0,
                  "expected (B*T, C, H, W) with channels to convolve, got ", shape_of(x));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "the fused convolution computes in bfloat16 and float16");
  const int64_t frames = x.size(0), height = x.size(2), width = x.size(3);
  if (skip) {
    STD_TORCH_CHECK(
        skip->dim() == 4 && skip->scalar_type() == x.scalar_type() && skip->size(0) == frames &&
            skip->size(2) == height && skip->size(3) == width,
        "skip must match x ", shape_of(x), " in dtype and all but channels, got ", shape_of(*skip));
  }
  const int64_t skip_channels = skip ? skip->size(1) : 0, channels = x.size(1) + skip_channels;
  STD_TORCH_CHECK(filter.dim() == 4 && filter.scalar_type() == x.scalar_type() &&
                      filter.size(1) == channels && filter.size(2) == 3 && filter.size(3) == 3,
                  "filter must be (Cout, ", channels, ", 3, 3) of x's dtype, got ",
                  shape_of(filter));
  STD_TORCH_CHECK(num_groups > 0 && channels % num_groups == 0, "num_groups = ", num_groups,
                  " does not divide ", channels, " channels");
  check_parameter(weight, channels, "weight");
  check_parameter(bias, channels, "bias");
  check_parameter(filter_bias, filter.size(0), "filter_bias");
  check_table(temb, frames, channels, "temb");
  check_table(ada_scale, frames, channels, "ada_scale");
  check_table(ada_shift, frames, channels, "ada_shift");
  check_table(out_temb, frames, filter.size(0), "out_temb");

  check_device(x, filter, "filter");
  const Call call(x);
  Limits limits = call.launcher.limits;
  if (limits.arch == 90 && !kHasWgmma) limits.arch = 89;
  const int64_t out_channels = filter.size(0);
  if (const char* reason = conv_refusal(x.size(1), skip_channels, out_channels, limits)) {
    STD_TORCH_CHECK(false, "the fused convolution ", reason, "; got ", x.size(1), " + ",
                    skip_channels, " input and ", out_channels, " output channels on sm_",
                    limits.arch, ". shift_group_norm_silu_conv2d serves every call");
  }

  const int64_t out_shape[] = {frames, out_channels, height, width};
  Tensor out =
      torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(out_shape, 4), x.scalar_type(),
                           std::nullopt, x.device(), std::nullopt, MemoryFormat::ChannelsLast);
  Tensor mean = empty_on(x, {frames, num_groups}, ScalarType::Float),
         rstd = empty_on(x, {frames, num_groups}, ScalarType::Float);
  Tensor sums = emit_sums ? empty_on(x, {frames, out_channels, 2}, ScalarType::Float)
                          : empty_on(x, {0}, ScalarType::Float);
  if (residual) check_same(out, *residual, "residual");
  ConvArgs a{};
  a.out_shift = make_shift(out, cu_frames, num_frames, out_sizes, out_offsets, boundary);
  a.shift = with_slices(a.out_shift, sizes, offsets, channels);
  if (x.numel() == 0 || out.numel() == 0) {
    torch::stable::fill_(mean, std::nan(""));  // of nothing
    torch::stable::fill_(rstd, std::nan(""));
    torch::stable::fill_(sums, 0);
    return {out, mean, rstd, sums};
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(frames * height * width <= kMost && channels <= kMost / 64,
                  "the fused convolution counts pixels in 31 bits, got ", shape_of(x));
  STD_TORCH_CHECK(out_channels <= int64_t{65535} * 64,
                  "the fused convolution makes at most 4,194,240 channels, got ", out_channels);

  ConvTensors tensors(x);
  a.dtype = dtype_of(x);
  a.x = tensors.image(x, "x");
  a.skip = tensors.image(skip, "skip");
  a.residual = tensors.image(residual, "residual");
  a.filter = filter.const_data_ptr();
  for (int i = 0; i < 4; ++i) a.filter_strides[i] = filter.stride(i);
  a.temb = tensors.table(temb, "temb");
  a.weight = tensors.table(weight, "weight");
  a.bias = tensors.table(bias, "bias");
  a.ada_scale = tensors.table(ada_scale, "ada_scale");
  a.ada_shift = tensors.table(ada_shift, "ada_shift");
  a.filter_bias = tensors.table(filter_bias, "filter_bias");
  a.out_temb = tensors.table(out_temb, "out_temb");
  a.shift_after = shift_after;
  a.shape = {frames, height, width, x.size(1), skip_channels, out_channels, num_groups, emit_sums};
  a.eps = static_cast<float>(eps);
  a.scale = static_cast<float>(scale);
  a.out = out.mutable_data_ptr();
  a.mean = static_cast<float*>(mean.mutable_data_ptr());
  a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  a.sums = emit_sums ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr;
  const ConvPlan plan = plan_conv(a.shape, limits);
  STD_TORCH_CHECK(plan.variant >= 0, "no kernel of the fused convolution fits into ",
                  limits.shared_per_block, " bytes of shared memory");
  Tensor workspace = empty_on(x, {static_cast<int64_t>(plan.workspace_bytes)}, ScalarType::Byte);
  a.workspace = workspace.mutable_data_ptr();
  shift_group_norm_silu_conv2d(call.launcher, a, plan);
  return {out, mean, rstd, sums};
}

}  // namespace latent_shift::cuda

// For explain and the cost model.
extern "C" __attribute__((visibility("default"))) bool latent_shift_has_wgmma() {
  return latent_shift::cuda::kHasWgmma;
}

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CUDA, m) {
  m.impl("shift_group_norm_silu_conv2d_fused", TORCH_BOX(&latent_shift::cuda::run_conv));
}
