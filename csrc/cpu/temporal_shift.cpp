// temporal_shift and its adjoint on the CPU.
//
//   y[t, slice] = x[t + offset, slice],  x, y: (B*T, C, H, W), NCHW or channels_last, any dtype
//
// One unit moves a block of one frame; the floor is one read and one write of x. The adjoint of
// zeros and circular is the opposite shift; of replicate, end frames also receive what they had
// read themselves.
#include "tensor.h"

namespace latent_shift {

Tensor run_shift(const Tensor& x, MemoryFormat layout, const Shift& shift, bool adjoint) {
  Tensor y = empty_as(x, layout);
  if (x.numel() == 0) return y;
  ShiftArgs args{};
  args.add_ends = adjoint && shift.boundary == Boundary::kReplicate && !is_identity(shift);
  const int64_t pixels = x.size(2) * x.size(3);
  // bytes can be moved without knowing the dtype
  args.geometry = args.add_ends
                      ? geometry_of(x, layout)
                      : Geometry{DType::kFloat, layout == MemoryFormat::ChannelsLast || pixels == 1,
                                 x.size(0), x.size(1), pixels};
  args.element_size = static_cast<int64_t>(x.element_size());
  args.shift = adjoint && !args.add_ends ? opposite(shift) : shift;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.block = 64 << 10;
  args.streaming = x.numel() * args.element_size >= kStreamingBytes;
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, x.size(0) * shift_units(args), 1,
                              [&](int64_t begin, int64_t end) { k.shift(args, begin, end); });
  return y;
}

Tensor temporal_shift(const Tensor& x, const OptionalTensor& cu_frames, int64_t num_frames,
                      const Ints& sizes, const Ints& offsets, const std::string& boundary) {
  const Shift shift = make_shift(x, cu_frames, num_frames, sizes, offsets, boundary);
  const MemoryFormat layout = layout_of(x);
  return run_shift(dense(x, layout), layout, shift, false);
}

Tensor temporal_shift_backward(const Tensor& dy, const OptionalTensor& cu_frames,
                               int64_t num_frames, const Ints& sizes, const Ints& offsets,
                               const std::string& boundary) {
  const Shift shift = make_shift(dy, cu_frames, num_frames, sizes, offsets, boundary);
  const MemoryFormat layout = layout_of(dy);
  return run_shift(dense(dy, layout), layout, shift, true);
}

}  // namespace latent_shift

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CPU, m) {
  m.impl("temporal_shift", TORCH_BOX(&latent_shift::temporal_shift));
  m.impl("temporal_shift_backward", TORCH_BOX(&latent_shift::temporal_shift_backward));
}
