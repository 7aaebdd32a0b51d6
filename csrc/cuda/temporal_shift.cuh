// temporal_shift and its adjoint.
//
//   y[t, slice] = x[t + offset, slice],  x, y: (B*T, C, H, W), NCHW or channels_last
//
// The shift is the frame a vector is loaded from. Bytes: one read and one write; elements that leave
// the clip are not read. The adjoint of zeros and circular is the opposite shift; of replicate, an
// end frame also receives what it had read itself, and that sum is in fp32 (fp64). Everything else
// is a copy of bits, of any dtype.
#pragma once

#include "flat_frames.cuh"

namespace latent_shift::cuda {

struct TemporalShiftArgs {
  FlatShape shape;
  DType dtype;       // used where the adjoint adds
  int element_size;  // 1, 2, 4, 8 or 16 bytes
  bool adjoint;
  const void* x;
  void* y;
};

struct TemporalShiftParams {
  FlatFrames flat;
  const void* x;
  void* y;
};

// The frames that frame n of the result is made of: those it reads, or for the adjoint those that
// read it.
template <bool Adjoint, class T>
LS_DEVICE auto origins(const Shift& shift, T* base, int64_t n, int64_t frame_size) {
  if constexpr (Adjoint) {
    return readers(shift, base, n, frame_size);
  } else {
    return sources(shift, base, n, frame_size);
  }
}

template <class T, int N, bool Adjoint>
__global__ void __launch_bounds__(kFlatThreads, kFlatBlocks)
    temporal_shift_kernel(const __grid_constant__ TemporalShiftParams p) {
  const FlatTile<N> tile(p.flat);
  const Slices slices = p.flat.slices;
  const auto from =
      origins<Adjoint>(p.flat.shift, static_cast<const T*>(p.x), tile.frame, p.flat.frame_size);
  T* y = static_cast<T*>(p.y) + tile.frame * p.flat.frame_size;
  Vec<T, N> v[kFlatVectors];
#pragma unroll
  for (int i = 0; i < kFlatVectors; ++i)
    if (tile.holds(i))
      v[i] = gather<T, N>(from, slices, slices.row.modulo(tile.offset(i)), tile.offset(i));
#pragma unroll
  for (int i = 0; i < kFlatVectors; ++i)
    if (tile.holds(i)) store<T, N>(y + tile.offset(i), v[i]);
}

namespace detail {

template <class T, bool Adjoint = false, class Launcher>
void launch_temporal_shift(Launcher& launcher, const TemporalShiftArgs& args) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t frame_size = args.shape.channels * args.shape.pixels;
  const bool vectors = fits_vectors(frame_size, sizeof(T), {args.x, args.y});
  const TemporalShiftParams params{flat_frames(args.shape, vectors ? kVector : 1), args.x, args.y};
  const Grid grid = flat_grid(args.shape, params.flat);
  if (vectors) {
    launcher.template launch<temporal_shift_kernel<T, kVector, Adjoint>>(grid, params);
  } else {
    launcher.template launch<temporal_shift_kernel<T, 1, Adjoint>>(grid, params);
  }
}

}  // namespace detail

template <class Launcher>
void temporal_shift(Launcher& launcher, TemporalShiftArgs args) {
  if (args.shape.frames * args.shape.channels * args.shape.pixels == 0) return;
  Shift& shift = args.shape.shift;
  if (args.adjoint && shift.boundary == Boundary::kReplicate && !is_identity(shift)) {
    switch (args.dtype) {
      case DType::kFloat: return detail::launch_temporal_shift<float, true>(launcher, args);
      case DType::kBFloat16:
        return detail::launch_temporal_shift<__nv_bfloat16, true>(launcher, args);
      case DType::kHalf: return detail::launch_temporal_shift<__half, true>(launcher, args);
      case DType::kDouble: return detail::launch_temporal_shift<double, true>(launcher, args);
    }
  }
  if (args.adjoint)
    for (int32_t& offset : shift.offset) offset = -offset;
  switch (args.element_size) {
    case 1: return detail::launch_temporal_shift<uint8_t>(launcher, args);
    case 2: return detail::launch_temporal_shift<uint16_t>(launcher, args);
    case 4: return detail::launch_temporal_shift<uint32_t>(launcher, args);
    case 8: return detail::launch_temporal_shift<uint2>(launcher, args);
    case 16: return detail::launch_temporal_shift<uint4>(launcher, args);
    default:
      throw std::runtime_error("elements of " + std::to_string(args.element_size) +
                               " bytes cannot be shifted");
  }
}

}  // namespace latent_shift::cuda
