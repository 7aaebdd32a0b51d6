// A ring of shared-memory stages between warps that fill and warps that use them.
#pragma once

#include "ptx.cuh"

namespace latent_shift::cuda {

// Where a warp stands in a ring: the stage, and the parity of the round it is in.
template <int Stages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A pair of barriers a stage: `full` completes when the fillers are done, `empty` when the users are.
template <int Stages>
struct Ring {
  using Position = RingPosition<Stages>;
  static constexpr int kBarriers = 2 * Stages;

  uint64_t* barriers;

  __device__ __forceinline__ uint64_t* full(const Position& at) const {
    return barriers + at.stage;
  }
  __device__ __forceinline__ uint64_t* empty(const Position& at) const {
    return barriers + Stages + at.stage;
  }

  __device__ __forceinline__ void init(uint32_t fillers, uint32_t users) const {
    for (int stage = 0; stage < Stages; ++stage) {
      ptx::mbarrier_init(barriers + stage, fillers);
      ptx::mbarrier_init(barriers + Stages + stage, users);
    }
  }
  __device__ __forceinline__ void wait_full(const Position& at) const {
    ptx::mbarrier_wait(full(at), at.parity);
  }
  // A new barrier counts as having completed the round before its first: round 0 waits for nobody.
  __device__ __forceinline__ void wait_empty(const Position& at) const {
    ptx::mbarrier_wait(empty(at), at.parity ^ 1);
  }
};

}  // namespace latent_shift::cuda
