// shift_add on CUDA: checks, launch, registration; the kernel is in the .cuh.
#include "shift_add.cuh"

#include "tensor.h"

namespace latent_shift::cuda {

static Tensor run_shift_add(const Tensor& residual, const Tensor& h, double scale,
                            const OptionalTensor& cu_frames, int64_t num_frames, const Ints& sizes,
                            const Ints& offsets, const std::string& boundary) {
  const Shift shift = make_shift(h, cu_frames, num_frames, sizes, offsets, boundary);
  check_same(h, residual, "residual");
  check_device(h, residual, "residual");
  const DType dtype = dtype_of(h);
  const MemoryFormat layout = layout_of(h);
  const Call call(h);
  Tensor y = empty_as(h, layout);
  if (h.numel() == 0) return y;
  const Tensor moved = dense(h, layout), kept = dense(residual, layout);
  shift_add(call.launcher,
            {{shift, is_channels_last(h, layout), h.size(0), h.size(1), h.size(2) * h.size(3)},
             dtype,
             scale,
             moved.const_data_ptr(),
             kept.const_data_ptr(),
             y.mutable_data_ptr()});
  return y;
}

}  // namespace latent_shift::cuda

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CUDA, m) {
  m.impl("shift_add", TORCH_BOX(&latent_shift::cuda::run_shift_add));
}
