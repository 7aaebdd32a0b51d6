// How the fused convolution is cut up, its shared memory, and which of its kernels serves.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>

#include "plan.h"

namespace latent_shift::cuda {

constexpr int kTaps = 9;
constexpr int kTile = 8;
constexpr int kTilePixels = kTile * kTile;
constexpr int kHalo = kTile + 2;
constexpr int kHaloPixels = kHalo * kHalo;
// 2 modulo 8, so that the 4 chunks of 2 pixels, stored by 8 threads, hit different banks
constexpr int kHaloPitch = 106;
constexpr int kChunk = 8;        // channels in 16 bytes
constexpr int kBlockChunks = 4;  // chunks in a block of the k loop
constexpr int kBlockChannels = kBlockChunks * kChunk;
constexpr int kVectorBytes = 16;
constexpr int kHaloBytes = kBlockChunks * kHaloPitch * kVectorBytes;
constexpr int kCtaTiles = 2;
constexpr int kTileThreads = 128;  // threads of a tile in the epilogue

// Output channels that leave together.
LS_CONSTEXPR int part_columns(int columns) { return columns % 80 == 0 ? 80 : 64; }

// Bytes of the filter's stage: one tap, one block of channels.
LS_CONSTEXPR uint32_t stage_bytes(int columns) { return columns * kBlockChannels * 2; }

LS_CONSTEXPR int max_bytes(int a, int b) { return a > b ? a : b; }

// What a tile's epilogue keeps in shared memory, in this order: fp32 sums of Columns output channels,
// and of a part of them the numbers stored and the addends.
template <int Columns, int Part>
struct EpilogueShared {
  // 8 or 24 modulo 32 banks: the 8 rows and 4 pairs of a fragment do not collide
  static constexpr int kPitch = Columns + 8;
  static constexpr int kStoredPitch = Part + 8;
  static constexpr int kStoredAt = kTilePixels * kPitch * 4;
  static constexpr int kAddendAt = kStoredAt + kTilePixels * kStoredPitch * 2;
  static constexpr int kBytes = kAddendAt + Part * 4;
  static_assert(kPitch % 16 == 8 && Part % kChunk == 0);
};

// The sm_80 kernel, described in shift_group_norm_silu_conv2d_mma.cuh.
template <int Columns>
struct ConvMma {
  static constexpr int kColumns = Columns;
  static constexpr int kThreads = kCtaTiles * kTileThreads;
  // the sums of 160 columns leave no room for a second CTA's registers
  static constexpr int kCtasPerSm = Columns > 128 ? 1 : 2;
  static constexpr int kStages = 4;
  // of a block: its copies have landed when as many steps have begun as there are stages
  static constexpr int kActivateTap = kStages;
  static constexpr int kStageBytes = stage_bytes(Columns);
  static constexpr int kWarpColumns = Columns / 2;
  static constexpr int kPart = part_columns(Columns);
  static constexpr int kHalosAt = 2048;  // after the tiles' tables
  static constexpr int kHalosBytes = 2 * kCtaTiles * kHaloBytes;
  static constexpr int kShared =
      kHalosAt + max_bytes(kHalosBytes + kStages * kStageBytes,
                           kCtaTiles* EpilogueShared<kPart, kPart>::kBytes);
};

// The sm_90a kernel, described in shift_group_norm_silu_conv2d_wgmma.cuh.
template <int Columns>
struct ConvWgmma {
  static constexpr int kColumns = Columns;
  static constexpr int kThreads = 384;
  static constexpr int kStages = 8;
  static constexpr int kHalos = 3;  // in use, being activated, being copied
  static constexpr int kInstructionColumns = Columns > 256 ? Columns / 2 : Columns;
  static constexpr int kInstructions = Columns / kInstructionColumns;
  static constexpr int kStageBytes = stage_bytes(Columns);
  static constexpr int kPart = part_columns(Columns);
  static constexpr int kTablesAt = 256;  // after the barriers
  static constexpr int kHalosAt = 2048;
  static constexpr int kHalosBytes = kHalos * kCtaTiles * kHaloBytes;
  static constexpr int kShared =
      kHalosAt + max_bytes(kHalosBytes + kStages * kStageBytes,
                           kCtaTiles* EpilogueShared<Columns, kPart>::kBytes);
  // what one group gives back the others take: 168 a thread is what a launch has
  static constexpr int kProducerRegisters = kInstructions > 1 ? 88 : 152;
  static constexpr int kConsumerRegisters = kInstructions > 1 ? 208 : 176;
  static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters == kThreads * 168 &&
                kThreads * 168 <= 65536);
  // a share of a stage for each CTA of a cluster, in whole 16-byte copies
  static_assert(kStageBytes % (2 * kVectorBytes) == 0);
};

constexpr int kStatisticsPixels = 256;  // of a frame, of which a block takes the moments
constexpr int kSumBytes = 8;            // a sum and a centred sum of squares

struct ConvShape {
  int64_t frames, height, width, x_channels, skip_channels, out_channels, groups;
  bool sums;
};

// A kernel for so many output channels a CTA.
struct ConvVariant {
  int arch;  // 90: that only; 80: that and later
  int columns, threads, shared;
  int ctas_per_sm;  // that the registers allow
  int step_clocks;  // of a tap of 32 channels, both tiles, from the dense bf16 rates
};

template <int Columns>
constexpr ConvVariant kMmaVariant{80,
                                  Columns,
                                  ConvMma<Columns>::kThreads,
                                  ConvMma<Columns>::kShared,
                                  ConvMma<Columns>::kCtasPerSm,
                                  Columns * 4 + 64};
template <int Columns>
constexpr ConvVariant kWgmmaVariant{
    90, Columns, ConvWgmma<Columns>::kThreads, ConvWgmma<Columns>::kShared, 1, Columns * 2 + 32};

constexpr std::array kConvVariants{kMmaVariant<64>,    kMmaVariant<128>,  kMmaVariant<160>,
                                   kWgmmaVariant<64>,  kWgmmaVariant<80>, kWgmmaVariant<128>,
                                   kWgmmaVariant<160>, kWgmmaVariant<320>};

struct ConvPlan {
  int variant = -1;  // of kConvVariants, -1 if none fits
  unsigned cluster = 1;
  int64_t tiles = 0, cta_columns = 0, ctas = 0, blocks = 0, pixel_chunks = 0;
  // offsets in the workspace
  size_t statistics = 0, affine = 0, filters = 0, partials = 0, workspace_bytes = 0;
};

// Why no kernel here serves these sizes, or null.
inline const char* conv_refusal(int64_t x_channels, int64_t skip_channels, int64_t out_channels,
                                const Limits& limits) {
  if (limits.arch < 80) return "needs sm_80 or later";
  if (x_channels % kChunk || skip_channels % kChunk || out_channels % kChunk)
    return "needs channel counts that are multiples of 8";
  return nullptr;
}

inline ConvPlan plan_conv(const ConvShape& a, int variant) {
  ConvPlan plan;
  const ConvVariant& v = kConvVariants[variant];
  const int64_t in_channels = a.x_channels + a.skip_channels, pixels = a.height * a.width;
  plan.variant = variant;
  plan.tiles = a.frames * ceil_div<int64_t>(a.height, kTile) * ceil_div<int64_t>(a.width, kTile);
  plan.cta_columns = ceil_div<int64_t>(a.out_channels, v.columns);
  plan.blocks = ceil_div<int64_t>(in_channels, kBlockChannels);
  plan.pixel_chunks = ceil_div<int64_t>(pixels, kStatisticsPixels);
  plan.ctas = ceil_div<int64_t>(plan.tiles, kCtaTiles);
  plan.cluster = v.arch == 90 && plan.ctas > 1 ? 2 : 1;
  plan.ctas = round_up<int64_t>(plan.ctas, plan.cluster);
  const auto reserve = [&plan](int64_t bytes) {
    const size_t at = plan.workspace_bytes;
    plan.workspace_bytes += round_up<int64_t>(bytes, 256);
    return at;
  };
  plan.statistics = reserve(a.frames * plan.pixel_chunks * in_channels * kSumBytes);
  plan.affine = reserve(a.frames * 2 * in_channels * sizeof(float));
  plan.filters = reserve(plan.cta_columns * plan.blocks * kTaps * stage_bytes(v.columns));
  plan.partials = reserve(a.sums ? plan.tiles * a.out_channels * kSumBytes : 0);
  return plan;
}

// Clocks of the convolution by tile counts and dense rates: whole waves of CTAs, each with the taps
// of its k loop, a fixed start and an end that grows with the columns. An estimate that has not been
// fitted to a device; it only ranks the variants.
inline double conv_clocks(const ConvPlan& plan, const Limits& limits) {
  constexpr double kStartClocks = 3000, kEndClocksPerColumn = 25;
  const ConvVariant& v = kConvVariants[plan.variant];
  const int64_t by_shared = (limits.shared_per_block + 1024) / (v.shared + 1024);
  const int64_t resident = std::min<int64_t>(v.ctas_per_sm, by_shared);
  const int64_t slots = limits.num_sms * resident;
  const double waves = static_cast<double>(ceil_div(plan.ctas * plan.cta_columns, slots));
  const double loop =
      static_cast<double>(plan.blocks) * kTaps * v.step_clocks * static_cast<double>(resident);
  return waves * (loop + kStartClocks + kEndClocksPerColumn * v.columns);
}

// The variant of the device's best instruction with the fewest clocks.
inline ConvPlan plan_conv(const ConvShape& a, const Limits& limits) {
  ConvPlan best;
  double fewest = 0;
  const int arch = limits.arch == 90 ? 90 : 80;
  for (int i = 0; i < static_cast<int>(kConvVariants.size()); ++i) {
    const ConvVariant& v = kConvVariants[i];
    if (v.arch != arch || v.shared > limits.shared_per_block) continue;
    const ConvPlan plan = plan_conv(a, i);
    const double clocks = conv_clocks(plan, limits);
    if (best.variant >= 0 && clocks >= fewest) continue;
    best = plan;
    fewest = clocks;
  }
  return best;
}

}  // namespace latent_shift::cuda
