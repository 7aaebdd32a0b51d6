// shift_add.
//
//   y = (residual + temporal_shift(h)) * scale,  all (B*T, C, H, W), NCHW or channels_last
//
// The shift is the frame a vector of h is loaded from. Bytes: two reads and one write. Sum and
// product in fp32 (fp64), rounded once.
#pragma once

#include "flat_frames.cuh"

namespace latent_shift::cuda {

struct ShiftAddArgs {
  FlatShape shape;
  DType dtype;
  double scale;
  const void *h, *residual;
  void* y;
};

struct ShiftAddParams {
  FlatFrames flat;
  double scale;
  const void *h, *residual;
  void* y;
};

template <class T, int N>
__global__ void __launch_bounds__(kFlatThreads)
    shift_add_kernel(const __grid_constant__ ShiftAddParams p) {
  const FlatTile<N> tile(p.flat);
  const Slices slices = p.flat.slices;
  const int64_t frame_size = p.flat.frame_size;
  const Frames<const T> from =
      sources(p.flat.shift, static_cast<const T*>(p.h), tile.frame, frame_size);
  const T* residual = static_cast<const T*>(p.residual) + tile.frame * frame_size;
  T* y = static_cast<T*>(p.y) + tile.frame * frame_size;
  const auto scale = static_cast<acc_t<T>>(p.scale);
  Vec<T, N> h[kFlatVectors], r[kFlatVectors];
#pragma unroll
  for (int i = 0; i < kFlatVectors; ++i)
    if (tile.holds(i)) {
      r[i] = load<T, N>(residual + tile.offset(i));
      h[i] = gather<T, N>(from, slices, slices.row.modulo(tile.offset(i)), tile.offset(i));
    }
#pragma unroll
  for (int i = 0; i < kFlatVectors; ++i)
    if (tile.holds(i)) {
      acc_t<T> sum[N], other[N];
      widen(r[i], sum);
      widen(h[i], other);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] = (sum[j] + other[j]) * scale;
      store<T, N>(y + tile.offset(i), narrow<T, N>(sum));
    }
}

namespace detail {

template <class T, class Launcher>
void launch_shift_add(Launcher& launcher, const ShiftAddArgs& args) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t frame_size = args.shape.channels * args.shape.pixels;
  const bool vectors = fits_vectors(frame_size, sizeof(T), {args.h, args.residual, args.y});
  const ShiftAddParams params{flat_frames(args.shape, vectors ? kVector : 1), args.scale, args.h,
                              args.residual, args.y};
  const Grid grid = flat_grid(args.shape, params.flat);
  if (vectors) {
    launcher.template launch<shift_add_kernel<T, kVector>>(grid, params);
  } else {
    launcher.template launch<shift_add_kernel<T, 1>>(grid, params);
  }
}

}  // namespace detail

template <class Launcher>
void shift_add(Launcher& launcher, const ShiftAddArgs& args) {
  if (args.shape.frames * args.shape.channels * args.shape.pixels == 0) return;
  switch (args.dtype) {
    case DType::kFloat: return detail::launch_shift_add<float>(launcher, args);
    case DType::kBFloat16: return detail::launch_shift_add<__nv_bfloat16>(launcher, args);
    case DType::kHalf: return detail::launch_shift_add<__half>(launcher, args);
    case DType::kDouble: return detail::launch_shift_add<double>(launcher, args);
  }
}

}  // namespace latent_shift::cuda
