// The convolution for sm_90a: warp-specialised wgmma on a transformed halo.
//
// A CTA of 3 warpgroups computes 2 tiles x Columns output channels, one CTA an SM. Consumer
// warpgroups 1 and 2 own a tile each and issue wgmma with both operands in shared memory, without
// swizzle: 8 pixels of a halo row are a core matrix, the next 8 pixels of the tile lie one halo row
// on, and a tap of the filter moves the start. In warpgroup 0, warp 0 streams the filter through a
// ring of bulk copies, one tap of 32 input channels a stage; the CTAs of a cluster fetch a share each
// and multicast it. Warps 1 to 3 copy the raw halo of a block while they turn the one before it into
// the activation and the consumers use the one before that. The consumers' registers come from
// warpgroup 0 (setmaxnreg).
#pragma once

#include "pipeline.cuh"
#include "shift_group_norm_silu_conv2d_tile.cuh"

namespace latent_shift::cuda {

template <class T, int Columns>
__global__ void __launch_bounds__(ConvWgmma<Columns>::kThreads, 1)
    shift_group_norm_silu_conv2d_wgmma_kernel(const __grid_constant__ ConvParams p) {
  using Traits = ConvWgmma<Columns>;
  using TileEpilogue = Epilogue<T, Columns, Traits::kPart>;
  static_assert(Traits::kTablesAt + kCtaTiles * sizeof(TileTable) <= Traits::kHalosAt);
  constexpr int kTransformThreads = 96, kConsumerWarps = 8;
  constexpr int kConsumers = 3;  // the named barrier of all consumers, after one for each tile
  unsigned char* const shared = ptx::dynamic_shared();
  unsigned char* const halos = shared + Traits::kHalosAt;
  unsigned char* const stages = halos + Traits::kHalosBytes;
  using FilterRing = Ring<Traits::kStages>;
  using HaloRing = Ring<Traits::kHalos>;
  const FilterRing filter_ring{reinterpret_cast<uint64_t*>(shared)};
  const HaloRing halo_ring{filter_ring.barriers + FilterRing::kBarriers};
  static_assert((FilterRing::kBarriers + HaloRing::kBarriers) * 8 <= Traits::kTablesAt);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const uint32_t peers = ptx::cluster_size();
  if (thread == 0) {
    filter_ring.init(1, peers * kConsumerWarps);
    halo_ring.init(kTransformThreads / 32, kConsumerWarps);
    ptx::fence_mbarrier_init();
  }
  TileTable* const tables = reinterpret_cast<TileTable*>(shared + Traits::kTablesAt);
  if (warp / 4 > 0) {
    const int cta_tile = warp / 4 - 1;
    tables[cta_tile].fill(p, Tile(p, blockIdx.x * kCtaTiles + cta_tile), thread % kTileThreads,
                          kTileThreads);
  }
  ptx::cluster_sync();

  const int steps = p.blocks * kTaps;
  if (warp < 4) {
    ptx::set_max_registers_decrease<Traits::kProducerRegisters>();
    if (warp == 0) {
      if (ptx::elect_one()) {
        const uint32_t share = Traits::kStageBytes / peers, offset = ptx::cluster_rank() * share;
        const uint16_t everyone = static_cast<uint16_t>((1u << peers) - 1);
        const unsigned char* from = static_cast<const unsigned char*>(p.filters) +
                                    int64_t{blockIdx.y} * steps * Traits::kStageBytes + offset;
        typename FilterRing::Position at;
        for (int step = 0; step < steps; ++step, at.advance(), from += Traits::kStageBytes) {
          unsigned char* to = stages + at.stage * Traits::kStageBytes + offset;
          uint64_t* const full = filter_ring.full(at);
          filter_ring.wait_empty(at);
          ptx::mbarrier_arrive_expect_tx(full, Traits::kStageBytes);
          if (peers == 1)
            ptx::bulk_copy_to_shared(to, from, share, full);
          else
            ptx::bulk_copy_to_shared_multicast(to, from, share, full, everyone);
        }
      }
      __syncwarp();
    } else {
      constexpr int kThreads = kTransformThreads / kCtaTiles;
      const int transform = thread - 32, cta_tile = transform / kThreads;
      const HaloLoader<T, kThreads, 3> loader(p, tables[cta_tile], transform % kThreads);
      const auto halo = [&](const typename HaloRing::Position& at) {
        return halos + (at.stage * kCtaTiles + cta_tile) * kHaloBytes;
      };
      typename HaloRing::Position at, last;
      for (int block = 0; block <= p.blocks; ++block) {
        if (block < p.blocks) {
          halo_ring.wait_empty(at);
          loader.copy(block, halo(at));
        }
        ptx::cp_async_commit();
        if (block > 0) {
          ptx::cp_async_wait<1>();
          loader.activate(block - 1, halo(last));
          ptx::fence_proxy_async();
          __syncwarp();
          if (lane == 0) ptx::mbarrier_arrive(halo_ring.full(last));
        }
        last = at;
        at.advance();
      }
    }
    __syncwarp();
    ptx::cluster_arrive();
  } else {
    ptx::set_max_registers_increase<Traits::kConsumerRegisters>();
    constexpr int kColumns = Traits::kInstructionColumns;
    const int cta_tile = warp / 4 - 1;
    const uint64_t a_start = ptx::wgmma_descriptor(halos + cta_tile * kHaloBytes,
                                                   kHaloPitch * kVectorBytes, kHalo * kVectorBytes);
    const uint64_t b_start =
        ptx::wgmma_descriptor(stages, Columns * kVectorBytes, kTile * kVectorBytes);
    // descriptors count in units of 16 bytes
    constexpr uint64_t kHaloStep = kCtaTiles * kHaloBytes / 16,
                       kStageStep = Traits::kStageBytes / 16;

    const auto release = [&](uint64_t* barrier) {
      for (uint32_t rank = lane; rank < peers; rank += 32)
        ptx::mbarrier_arrive_cluster(barrier, rank);
    };

    float sums[Traits::kInstructions][kColumns / 2];
#pragma unroll
    for (int i = 0; i < Traits::kInstructions; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) sums[i][j] = 0.f;
    }

    typename FilterRing::Position at, last;
    typename HaloRing::Position halo_at, last_halo;
    for (int block = 0; block < p.blocks; ++block) {
      halo_ring.wait_full(halo_at);
#pragma unroll 1
      for (int tap = 0; tap < kTaps; ++tap) {
        const uint64_t a = a_start + halo_at.stage * kHaloStep + tap_offset(tap) / 16;
        const uint64_t b = b_start + at.stage * kStageStep;
        filter_ring.wait_full(at);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBlockChunks; k += 2) {
#pragma unroll
          for (int i = 0; i < Traits::kInstructions; ++i)
            ptx::wgmma_m64k16<T, kColumns>(sums[i], a + k * kHaloPitch,
                                           b + k * Columns + i * kColumns, true);
        }
        ptx::wgmma_commit();
        // the step before this one is complete: give its stage back
        ptx::wgmma_wait<1>();
        if (block + tap > 0) release(filter_ring.empty(last));
        if (block > 0 && tap == 0 && lane == 0) ptx::mbarrier_arrive(halo_ring.empty(last_halo));
        last = at;
        at.advance();
      }
      last_halo = halo_at;
      halo_at.advance();
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < Traits::kInstructions; ++i) ptx::keep_registers(sums[i]);
    __syncwarp();

    ptx::cluster_arrive();  // before the stores, which no peer waits for
    // the epilogue reuses the shared memory that both tiles' products read
    ptx::named_barrier_sync(kConsumers, kCtaTiles * kTileThreads);
    const TileEpilogue epilogue(p, tables[cta_tile], thread % kTileThreads, 1 + cta_tile,
                                halos + cta_tile * TileEpilogue::kBytes);
    const int pixel = warp % 4 * 16;
#pragma unroll
    for (int column = 0; column < Columns; column += 8)
      epilogue.put(pixel, column, sums[column / kColumns] + column % kColumns / 2, lane);
#pragma unroll 1
    for (int part = 0; part < Columns; part += Traits::kPart)
      epilogue.store_part(part, blockIdx.y * Columns + part);
  }
  // a block's barriers live until its peers have arrived there for the last time
  __syncwarp();
  ptx::cluster_wait();
}

}  // namespace latent_shift::cuda
