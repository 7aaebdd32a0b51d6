// What the CUDA kernels would do with a call, asked by latent_shift_kernels.cost through ctypes: their
// own planning (csrc/cuda/*_plan.h) holds no CUDA, so machines without a GPU or nvcc can ask it too.
#include <exception>
#include <iterator>

#include "../cuda/norm_plan.h"
#include "../cuda/shift_group_norm_silu_conv2d_plan.h"

#define LS_EXPORT extern "C" __attribute__((visibility("default")))

namespace cuda = latent_shift::cuda;

// `device` is (arch, shared memory a block may have, multiprocessors), `shape` (dtype, channels_last,
// frames, channels, pixels, groups, aligned), `plan` (split, cluster, vector, span, tile_c, tile_p,
// tiles, tiles_p, threads, shared, blocks, workspace of a forward). Returns whether there is a plan.
LS_EXPORT bool latent_shift_plan_norm(bool backward, const int64_t* device, const int64_t* shape,
                                      int64_t* plan) {
  const cuda::Limits limits{static_cast<int>(device[0]), static_cast<int>(device[1]),
                            static_cast<int>(device[2])};
  const cuda::NormShape norm{static_cast<cuda::DType>(shape[0]),
                             shape[1] != 0,
                             shape[2],
                             shape[3],
                             shape[4],
                             shape[5],
                             shape[6] != 0};
  try {
    const cuda::NormPlan p =
        backward ? cuda::plan_norm_backward(norm, limits) : cuda::plan_norm_forward(norm, limits);
    const cuda::NormTiling& t = p.tiling;
    const int64_t said[] = {p.split,
                            t.cluster,
                            p.vector,
                            t.span,
                            t.tile_c,
                            t.tile_p,
                            p.tiles(),
                            t.tiles_p,
                            p.threads,
                            static_cast<int64_t>(p.shared),
                            p.blocks(norm.frames),
                            cuda::norm_workspace(norm, p)};
    std::copy(std::begin(said), std::end(said), plan);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// `shape` is (frames, elements of a frame, bytes of an element, aligned), `plan` (elements an access,
// blocks, threads) of the elementwise kernels, which every device launches alike.
LS_EXPORT bool latent_shift_plan_flat(const int64_t*, const int64_t* shape, int64_t* plan) {
  const int vector = cuda::flat_vector(shape[1], static_cast<int>(shape[2]), shape[3] != 0);
  plan[0] = vector;
  plan[1] = shape[0] * cuda::flat_tiles(shape[1], vector);
  plan[2] = cuda::kFlatThreads;
  return true;
}

// `shape` is (frames, height, width, channels of x, of skip, of the output, groups, sums), `plan`
// (arch of the instruction, columns, cluster, CTAs in x, in y, threads, shared, tiles, blocks of input
// channels, pixel chunks, workspace bytes).
LS_EXPORT bool latent_shift_plan_conv(const int64_t* device, const int64_t* shape, int64_t* plan) {
  const cuda::Limits limits{static_cast<int>(device[0]), static_cast<int>(device[1]),
                            static_cast<int>(device[2])};
  const cuda::ConvShape conv{shape[0], shape[1], shape[2], shape[3],
                             shape[4], shape[5], shape[6], shape[7] != 0};
  if (cuda::conv_refusal(conv.x_channels, conv.skip_channels, conv.out_channels, limits))
    return false;
  const cuda::ConvPlan p = cuda::plan_conv(conv, limits);
  if (p.variant < 0) return false;
  const cuda::ConvVariant& v = cuda::kConvVariants[p.variant];
  const int64_t said[] = {v.arch,
                          v.columns,
                          p.cluster,
                          p.ctas,
                          p.cta_columns,
                          v.threads,
                          v.shared,
                          p.tiles,
                          p.blocks,
                          p.pixel_chunks,
                          static_cast<int64_t>(p.workspace_bytes)};
  std::copy(std::begin(said), std::end(said), plan);
  return true;
}
