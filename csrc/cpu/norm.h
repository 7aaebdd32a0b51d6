// What shift_add_group_norm_silu and its backward share: arguments and the plan of their units.
#pragma once

#include "tensor.h"

namespace latent_shift {

// The tensors behind the pointers of NormArgs.
struct NormCall {
  NormArgs args{};
  MemoryFormat layout;
  ScalarType accumulate;
  std::vector<Tensor> keep;

  const void* hold(const Tensor& t) {
    keep.push_back(dense(t, layout));
    return keep.back().const_data_ptr();
  }
};

struct NormTables {
  const OptionalTensor &temb, &weight, &bias, &ada_scale, &ada_shift;
};

// Checks everything forward and backward share and fills geometry, shift and tables.
NormCall prepare_norm(const Tensor& x, const NormTables& tables, int64_t num_groups,
                      const OptionalTensor& cu_frames, int64_t num_frames, const Ints& sizes,
                      const Ints& offsets, bool shift_after, const std::string& boundary);

// Chooses the span of a unit and the zeros that stand for frames outside the clip.
void plan_norm(NormCall& call, bool backward);

void run_norm(const NormArgs& args, bool backward);

}  // namespace latent_shift
