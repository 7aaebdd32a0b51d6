// shift_add on the CPU.
//
//   y = (residual + temporal_shift(h)) * scale,  all (B*T, C, H, W), in the layout of h
//
// One unit writes a block of one frame; two reads and one write; sums in fp32 (fp64 for fp64),
// rounded once.
#include "tensor.h"

namespace latent_shift {

Tensor shift_add(const Tensor& residual, const Tensor& h, double scale,
                 const OptionalTensor& cu_frames, int64_t num_frames, const Ints& sizes,
                 const Ints& offsets, const std::string& boundary) {
  ShiftArgs args{};
  args.shift = make_shift(h, cu_frames, num_frames, sizes, offsets, boundary);
  check_same(h, residual, "residual");
  const MemoryFormat layout = layout_of(h);
  args.geometry = geometry_of(h, layout);
  Tensor y = empty_as(h, layout);
  if (h.numel() == 0) return y;
  const Tensor x = dense(h, layout), other = dense(residual, layout);
  args.element_size = static_cast<int64_t>(h.element_size());
  args.x = x.const_data_ptr();
  args.residual = other.const_data_ptr();
  args.scale = scale;
  args.y = y.mutable_data_ptr();
  args.block = 64 << 10;
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, h.size(0) * shift_units(args), 1,
                              [&](int64_t begin, int64_t end) { k.shift_add(args, begin, end); });
  return y;
}

}  // namespace latent_shift

STABLE_TORCH_LIBRARY_IMPL(latent_shift, CPU, m) {
  m.impl("shift_add", TORCH_BOX(&latent_shift::shift_add));
}
