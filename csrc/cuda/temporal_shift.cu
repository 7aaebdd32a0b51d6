// temporal_shift and its adjoint on CUDA: checks, launch, registration; the kernels are in the .cuh.
#include "temporal_shift.cuh"

#include "tensor.h"

namespace latent_shift::cuda {

static Tensor run_shift(const Tensor& x, const OptionalTensor& cu_frames, int64_t num_frames,
                        const Ints& sizes, const Ints& offsets, const std::string& boundary,
                        bool adjoint) {
  const Shift shift = make_shift(x, cu_frames, num_frames, sizes, offsets, boundary);
  const MemoryFormat layout = layout_of(x);
  const Call call(x);
  Tensor y = empty_as(x, layout);
  if (x.numel() == 0) return y;
  const Tensor source = dense(x, layout);
  const bool adds = adjoint && shift.boundary == Boundary::kReplicate && !is_identity(shift);
  temporal_shift(call.launcher,
                 {{shift, is_channels_last(x, layout), x.size(0), x.size(1), x.size(2) * x.size(3)},
                  adds ? dtype_of(x) : DType::kFloat,
                  static_cast<int>(x.element_size()),
                  adjoint,
                  source.const_data_ptr(),
                  y.mutable_data_ptr()});
  return y;
}

static Tensor forward(const Tensor& x, const OptionalTensor& cu_frames, int64_t num_frames,
                      const Ints& sizes, const Ints& offsets, const std::string& boundary) {
  return run_shift(x, cu_frames, num_frames, sizes, offsets, boundary, false);
}

static Tensor backward(const Tensor& dy, const OptionalTensor& cu_frames, int64_t num_frames,
                       const Ints& sizes, const Ints& offsets, const std::string& boundary) {
  return run_shift(dy, cu_frames, num_frames, sizes, offsets, boundary, true);
}

}  // namespace latent_shift::cuda

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CUDA, m) {
  m.impl("temporal_shift", TORCH_BOX(&latent_shift::cuda::forward));
  m.impl("temporal_shift_backward", TORCH_BOX(&latent_shift::cuda::backward));
}
