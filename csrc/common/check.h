// Arguments of the operators, checked and turned into plain numbers (LibTorch stable ABI only).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "shift.h"

namespace latent_shift {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

inline MemoryFormat layout_of(const Tensor& x) {  // reference.memory_format
  return x.stride(1) == 1 && !x.is_contiguous() ? MemoryFormat::ChannelsLast
                                                : MemoryFormat::Contiguous;
}

// `x` with dense strides in `layout`, itself where it has them.
inline Tensor dense(const Tensor& x, MemoryFormat layout) {
  if (layout == MemoryFormat::Contiguous)
    return x.is_contiguous() ? x : torch::stable::contiguous(x);
  int64_t expected = 1;
  bool dense = true;
  for (const int64_t i : {1, 3, 2, 0}) {  // channels vary fastest
    dense = dense && (x.size(i) == 1 || x.stride(i) == expected);
    expected *= x.size(i);
  }
  return dense ? x : torch::stable::contiguous(x, layout);
}

inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The shift of `x` (B*T, C, H, W). It points into `cu_frames`.
inline Shift make_shift(const Tensor& x, const OptionalTensor& cu_frames, int64_t num_frames,
                        const Ints& sizes, const Ints& offsets, const std::string& boundary) {
  STD_TORCH_CHECK(x.dim() == 4, "expected (B*T, C, H, W), got ", shape_of(x));
  STD_TORCH_CHECK(num_frames > 0, "num_frames must be >= 1, got ", num_frames);
  STD_TORCH_CHECK(cu_frames || x.size(0) % num_frames == 0, "a batch of ", x.size(0),
                  " frames does not split into clips of ", num_frames);
  STD_TORCH_CHECK(sizes.size() == 3 && offsets.size() == 3, "expected three slices, got ",
                  sizes.size(), " sizes and ", offsets.size(), " offsets");
  Shift shift;
  shift.num_frames = num_frames;
  if (cu_frames) {
    const Tensor& ends = *cu_frames;
    STD_TORCH_CHECK(ends.dim() == 1 && ends.scalar_type() == ScalarType::Int &&
                        ends.is_contiguous() && ends.device() == x.device() &&
                        ends.size(0) >= (x.size(0) > 0 ? 2 : 1),
                    "cu_frames must be (clips + 1) int32 numbers, contiguous and on the device of "
                    "x, got ",
                    shape_of(ends));
    shift.num_frames = x.size(0);
    shift.clips = static_cast<int32_t>(ends.size(0) - 1);
    shift.cu_frames = static_cast<const int32_t*>(ends.const_data_ptr());
  }
  int64_t end = 0;
  for (int k = 0; k < 3; ++k) {
    STD_TORCH_CHECK(sizes[k] >= 0 && offsets[k] >= -1 && offsets[k] <= 1,
                    "slices need sizes >= 0 and offsets in -1, 0, 1, got size ", sizes[k],
                    " with offset ", offsets[k]);
    shift.end[k] = end += sizes[k];
    shift.offset[k] = static_cast<int32_t>(offsets[k]);
  }
  STD_TORCH_CHECK(end == x.size(1), "the slices hold ", end, " channels, the tensor has ",
                  x.size(1));
  if (boundary == "zeros") {
    shift.boundary = Boundary::kZeros;
  } else if (boundary == "replicate") {
    shift.boundary = Boundary::kReplicate;
  } else {
    STD_TORCH_CHECK(boundary == "circular", "unknown boundary '", boundary, "'");
    shift.boundary = Boundary::kCircular;
  }
  return shift;
}

// No shift: one slice of all channels.
inline Shift identity_shift(const Shift& shift) {
  Shift none = shift;
  none.end[0] = none.end[1] = none.end[2];
  none.offset[0] = none.offset[1] = none.offset[2] = 0;
  return none;
}

inline Shift opposite(const Shift& shift) {
  Shift back = shift;
  for (int32_t& offset : back.offset) offset = -offset;
  return back;
}

inline void check_same(const Tensor& x, const Tensor& other, const char* name) {
  bool same = other.dim() == x.dim() && other.scalar_type() == x.scalar_type();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = other.size(i) == x.size(i);
  STD_TORCH_CHECK(same, name, " must match x in shape and dtype: expected ", shape_of(x), ", got ",
                  shape_of(other),
                  other.scalar_type() == x.scalar_type() ? "" : " of another dtype");
}

inline void check_parameter(const OptionalTensor& parameter, int64_t channels, const char* name) {
  STD_TORCH_CHECK(!parameter || (parameter->dim() == 1 && parameter->size(0) == channels), name,
                  " must be (", channels, "), got ", parameter ? shape_of(*parameter) : "");
}

inline void check_table(const OptionalTensor& table, int64_t frames, int64_t channels,
                        const char* name) {
  if (!table) return;
  const bool fits =
      table->dim() == 2 && table->size(1) == channels &&
      (table->size(0) == frames || (table->size(0) > 0 && frames % table->size(0) == 0));
  STD_TORCH_CHECK(fits, name, " must be (R, ", channels, ") with R dividing ", frames,
                  " frames, got ", shape_of(*table));
}

}  // namespace latent_shift
