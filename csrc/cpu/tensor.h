// Between torch's tensors and the kernels' plain structs.
#pragma once

#include <cstdlib>
#include <memory>

#include "../common/check.h"
#include "kernels.h"

namespace latent_shift {

// Outputs larger than this bypass the cache: they would evict it before anybody reads them.
constexpr int64_t kStreamingBytes = int64_t{8} << 20;

inline Tensor empty_as(const Tensor& x, MemoryFormat layout) {
  return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                              layout);
}

inline Tensor empty_of(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                              dtype);
}

inline Tensor nothing(const Tensor& x) { return empty_of({0}, x.scalar_type()); }

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::Double: return DType::kDouble;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16, float16 or float64");
  }
}

// One pixel has no layout: its channels are a row.
inline Geometry geometry_of(const Tensor& x, MemoryFormat layout) {
  const int64_t pixels = x.size(2) * x.size(3);
  return {dtype_of(x), layout == MemoryFormat::ChannelsLast || pixels == 1, x.size(0), x.size(1),
          pixels};
}

// A parameter or table as contiguous numbers of the accumulate type; `keep` owns them.
inline Table table_of(const OptionalTensor& table, ScalarType accumulate,
                      std::vector<Tensor>& keep) {
  if (!table) return {nullptr, 1};
  Tensor t = *table;
  if (t.scalar_type() != accumulate) t = torch::stable::to(t, accumulate);
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
  keep.push_back(t);
  return {t.const_data_ptr(), t.dim() == 2 ? t.size(0) : 1};
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Cache-line aligned scratch memory.
inline std::unique_ptr<char, Free> scratch_memory(size_t bytes) {
  return std::unique_ptr<char, Free>(
      static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
}

// Moves `x` (dense in its layout) by `shift`, or by its adjoint; used by temporal_shift and by the
// fused backward where replicated ends meet.
Tensor run_shift(const Tensor& x, MemoryFormat layout, const Shift& shift, bool adjoint);

}  // namespace latent_shift
