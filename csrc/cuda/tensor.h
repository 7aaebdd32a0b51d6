// Between torch's CUDA tensors and the kernels' plain structs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cmath>

#include "../common/check.h"
#include "norm_tile.cuh"

namespace latent_shift::cuda {

// The device of a call, made current while it lasts, and its current stream.
class Call {
 public:
  explicit Call(const Tensor& x)
      : device_(x.get_device_index()), guard_(device_), launcher(stream(device_), device_) {
    STD_TORCH_CHECK(launcher.limits.arch >= 80,
                    "the CUDA kernels need a device of compute capability 8.0 or later, this one "
                    "has ",
                    launcher.limits.arch / 10, ".", launcher.limits.arch % 10,
                    "; LATENT_SHIFT_BACKEND=reference serves it");
  }

 private:
  static cudaStream_t stream(int32_t device) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                    "device ", device, " has no current stream");
    return static_cast<cudaStream_t>(stream);
  }

  const int32_t device_;
  const torch::stable::accelerator::DeviceGuard guard_;

 public:
  CudaLauncher launcher;
};

// One pixel has no layout: its channels are a row.
inline bool is_channels_last(const Tensor& x, MemoryFormat layout) {
  return layout == MemoryFormat::ChannelsLast || x.size(2) * x.size(3) == 1;
}

inline Tensor empty_as(const Tensor& x, MemoryFormat layout) {
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              layout);
}

inline Tensor empty_on(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(
      x, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

inline Tensor nothing(const Tensor& x) { return empty_on(x, {0}, x.scalar_type()); }

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::Double: return DType::kDouble;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline void check_device(const Tensor& x, const OptionalTensor& other, const char* name) {
  STD_TORCH_CHECK(!other || other->device() == x.device(), name, " must be on the device of x");
}

// The tensors of one call of a norm: dense, kept alive until its launches, and whether all of them
// are aligned.
class NormTensors {
 public:
  NormTensors(const Tensor& x, int64_t num_groups) : layout(layout_of(x)), x_(x) {
    const int64_t channels = x.size(1);
    STD_TORCH_CHECK(num_groups > 0 && channels % num_groups == 0, "num_groups = ", num_groups,
                    " does not divide ", channels, " channels");
    shape = {dtype_of(x), is_channels_last(x, layout), x.size(0),
             channels,    x.size(2) * x.size(3),       num_groups,
             true};
  }

  const void* image(const Tensor& t, const char* name) {
    check_same(x_, t, name);
    check_device(x_, t, name);
    keep_.push_back(dense(t, layout));
    const void* data = keep_.back().const_data_ptr();
    shape.aligned = shape.aligned && is_aligned(data);
    return data;
  }
  const void* image(const OptionalTensor& t, const char* name) {
    return t ? image(*t, name) : nullptr;
  }
  void* output(const Tensor& t) {
    shape.aligned = shape.aligned && is_aligned(t.mutable_data_ptr());
    return t.mutable_data_ptr();
  }
  const void* statistic(const Tensor& t, const char* name) {
    const ScalarType type = accumulate_type(x_);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == shape.frames && t.size(1) == shape.groups, name,
                    " must be (", shape.frames, ", ", shape.groups, "), got ", shape_of(t));
    check_device(x_, t, name);
    keep_.push_back(t.scalar_type() == type ? t : torch::stable::to(t, type));
    if (!keep_.back().is_contiguous()) keep_.back() = torch::stable::contiguous(keep_.back());
    return keep_.back().const_data_ptr();
  }

  NormTables tables(const OptionalTensor& temb, const OptionalTensor& weight,
                    const OptionalTensor& bias, const OptionalTensor& ada_scale,
                    const OptionalTensor& ada_shift) {
    check_parameter(weight, shape.channels, "weight");
    check_parameter(bias, shape.channels, "bias");
    check_table(temb, shape.frames, shape.channels, "temb");
    check_table(ada_scale, shape.frames, shape.channels, "ada_scale");
    check_table(ada_shift, shape.frames, shape.channels, "ada_shift");
    return {table(temb, "temb"), table(weight, "weight"), table(bias, "bias"),
            table(ada_scale, "ada_scale"), table(ada_shift, "ada_shift")};
  }

  const MemoryFormat layout;
  NormShape shape;

 private:
  Table table(const OptionalTensor& t, const char* name) {
    if (!t) return {};
    check_device(x_, t, name);
    keep_.push_back(t->is_contiguous() ? *t : torch::stable::contiguous(*t));
    const Tensor& kept = keep_.back();
    return {kept.const_data_ptr(), dtype_of(kept), kept.dim() == 2 ? kept.size(0) : 1};
  }

  const Tensor& x_;
  std::vector<Tensor> keep_;
};

}  // namespace latent_shift::cuda
