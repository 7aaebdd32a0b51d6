// Kernels with planted faults: right with fault = 0, and each numbered fault is one that the
// executor must report.
#include "trial.h"

namespace latent_shift::cuda {
namespace {

// 1: no barrier between a write and a neighbour's read. 2: the barrier waits for one warp only.
// 3: no barrier before the value is overwritten.
__global__ void neighbours(const __grid_constant__ Trial p) {
  auto* value = reinterpret_cast<int*>(ptx::dynamic_shared());
  const int i = threadIdx.x, size = blockDim.x;
  value[i] = -1;
  __syncthreads();
  value[i] = i;
  if (p.fault == 2)
    ptx::named_barrier_sync(1 + i / 32, 32);
  else if (p.fault != 1)
    __syncthreads();
  static_cast<int*>(p.out)[i] = value[(i + 1) % size];
  if (p.fault != 3) __syncthreads();
  value[i] = 0;
}

// A warp's own exchange through shared memory. 1: a shuffle does not order memory, __syncwarp does.
// 2: only half of the warp meets.
__global__ void warp_exchange(const __grid_constant__ Trial p) {
  auto* value = reinterpret_cast<short*>(ptx::dynamic_shared());
  const unsigned i = threadIdx.x;
  value[i] = -1;
  __syncwarp();
  value[i] = static_cast<short>(i);
  if (p.fault == 1)
    __shfl_xor_sync(0xFFFFFFFF, 0, 1);
  else
    __syncwarp(p.fault == 2 ? i < 16 ? 0xFFFF : 0xFFFF0000 : 0xFFFFFFFF);
  static_cast<int*>(p.out)[i] = value[31 - i];
}

// 1, 2: reads, writes past the shared memory of the block. 3, 4: reads, writes past a buffer.
// 5: writes an input. 6: reads what nobody wrote. 7: a misaligned vector. 8: a copy of bytes past
// a buffer.
__global__ void bounds(const __grid_constant__ Trial p) {
  auto* value = reinterpret_cast<int*>(ptx::dynamic_shared());
  const auto* a = static_cast<const int*>(p.a);
  auto* out = static_cast<int*>(p.out);
  const int i = threadIdx.x, size = blockDim.x;
  if (p.fault != 6 || i != 7) value[i] = a[i + (p.fault == 3)];
  if (p.fault == 2) value[i + 1] = 0;
  if (p.fault == 5) const_cast<int*>(a)[i] = 0;
  __syncthreads();
  int neighbour = value[p.fault == 1 ? i + 1 : (i + 1) % size];
  if (p.fault == 7) neighbour += reinterpret_cast<int2*>(value + 1)->x;
  if (p.fault == 8) std::memcpy(&neighbour, a + i + 1, sizeof(int));
  out[i + (p.fault == 4)] = neighbour;
}

// 1: threads of a block, 2: blocks write one element. 3: blocks read what others write.
__global__ void global_order(const __grid_constant__ Trial p) {
  auto* out = static_cast<int*>(p.out);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[p.fault == 1 ? i / 2 : p.fault == 2 ? threadIdx.x : i] = 1;
  if (p.fault == 3) out[i] += out[(i + blockDim.x) % (gridDim.x * blockDim.x)];
}

// 1: __syncthreads in a branch that half of the block takes. 2: a thread exits before it. 3: too few
// threads at a named barrier. 4: the sides disagree on its count. 5: in part of a warp.
__global__ void barriers(const __grid_constant__ Trial p) {
  const unsigned i = threadIdx.x;
  if (p.fault == 2 && i == 3) return;
  if (p.fault != 1 || i < 32) __syncthreads();
  if (p.fault == 3 && i >= 32) return;
  if (p.fault == 5 && i % 2 == 0) return ptx::named_barrier_sync(1, 32);
  ptx::named_barrier_sync(1, p.fault == 5 ? 32 : p.fault == 4 && i < 32 ? 32 : 64);
}

// 1: no wait for the copy. 2: waits for all but the last group. 3: overwrites what others still read.
// 4: a misaligned destination.
__global__ void copies(const __grid_constant__ Trial p) {
  auto* stage = reinterpret_cast<int4*>(ptx::dynamic_shared());
  const int i = threadIdx.x, size = blockDim.x;
  const auto* a = static_cast<const int4*>(p.a);
  void* to = stage + i;
  ptx::cp_async_16(p.fault == 4 ? static_cast<char*>(to) + 8 : to, a + i, true);
  ptx::cp_async_commit();
  if (p.fault == 2)
    ptx::cp_async_wait<1>();
  else if (p.fault != 1)
    ptx::cp_async_wait<0>();
  __syncthreads();
  static_cast<int4*>(p.out)[i] = stage[(i + 1) % size];
  if (p.fault != 3) __syncthreads();
  ptx::cp_async_16(to, a + i, true);
  ptx::cp_async_wait<0>();
}

// One bulk copy. 1: the barrier is for one arrival too many. 2: too few bytes are expected. 3: nobody
// waits. 4: no fence after mbarrier_init. 5: generic writes to the place with no proxy fence. 6: the
// barrier's word is read. 7: twice the arrivals. 8: a use that is not ordered after the init.
__global__ void bulk(const __grid_constant__ Trial p) {
  auto* full = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  auto* stage = reinterpret_cast<int*>(full + 2);
  const unsigned i = threadIdx.x, bytes = blockDim.x * sizeof(int);
  stage[i] = 0;
  if (p.fault != 5) ptx::fence_proxy_async();
  if (i == 0) {
    ptx::mbarrier_init(full, p.fault == 1 ? 2 : 1);
    if (p.fault != 4) ptx::fence_mbarrier_init();
  }
  if (p.fault != 8) __syncthreads();
  if (i == 0) {
    ptx::mbarrier_arrive_expect_tx(full, bytes - (p.fault == 2 ? 16 : 0));
    if (p.fault == 7) ptx::mbarrier_arrive(full);
    ptx::bulk_copy_to_shared(stage, p.a, bytes, full);
  }
  if (p.fault != 3) ptx::mbarrier_wait(full, 0);
  static_cast<int*>(p.out)[i] = stage[i];
  if (p.fault == 6) static_cast<int*>(p.out)[i] = static_cast<int>(*full);
}

// out (64, 64) = a (64, 16) b (64, 16)^T. 1: no proxy fence. 2: a's stride reaches past what was
// written. 3: b's past the end. 4: accumulators read before the wait. 5: an operand overwritten before
// it. 6: no wgmma_fence. 7: one warp's own descriptor. 8: a stride that stays inside, so that only
// the result is wrong. 9: the last warp takes no part. 10: no fence after the accumulators are
// written. 11: no wait at all. 12: a swizzle, which the layout of b does not have.
__global__ void matrices(const __grid_constant__ Trial p) {
  using T = __nv_bfloat16;
  auto* a = reinterpret_cast<uint4*>(ptx::dynamic_shared());
  uint4* b = a + 192;
  const unsigned i = threadIdx.x, row = i / 2, chunk = i % 2;
  a[chunk * 64 + row] = static_cast<const uint4*>(p.a)[i];
  b[chunk * 64 + row] = static_cast<const uint4*>(p.b)[i];
  if (p.fault != 1) ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  if (p.fault != 6) ptx::wgmma_fence();
  if (p.fault == 9 && i >= 96) return;
  const uint64_t da = ptx::wgmma_descriptor(p.fault == 7 && i >= 96 ? b : a, 1024,
                                            p.fault == 2   ? 256
                                            : p.fault == 8 ? 64
                                                           : 128);
  const uint64_t swizzle = p.fault == 12 ? uint64_t{1} << 62 : 0;
  const uint64_t db = ptx::wgmma_descriptor(b, 1024, p.fault == 3 ? 8192 : 128) | swizzle;
  ptx::wgmma_m64k16<T, 64>(d, da, db, false);
  if (p.fault == 5 && i == 0) a[0] = {};
  ptx::wgmma_commit();
  float early = 0;
  if (p.fault == 4) early = d[3];
  if (p.fault != 11) ptx::wgmma_wait<0>();
  if (p.fault == 10) {
    d[0] = 0;
    ptx::wgmma_m64k16<T, 64>(d, da, db, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  if (p.fault == 11) return;
  const unsigned lane = i % 32, first = i / 32 * 16 + lane / 4;
  for (unsigned r = 0; r < 32; ++r)
    static_cast<float*>(p.out)[(first + r / 2 % 2 * 8) * 64 + r / 4 * 8 + 2 * (lane % 4) + r % 2] =
        d[r] + early;
}

// Two blocks read each other's shared memory. 1: no barrier before the read. 2: none after it, so the
// other may have exited. 3: a rank that is not there. 4: an arrival at the other's barrier after
// which nobody waits.
__global__ void cluster(const __grid_constant__ Trial p) {
  auto* value = reinterpret_cast<int*>(ptx::dynamic_shared());
  auto* barrier = reinterpret_cast<uint64_t*>(value + 32);
  const unsigned rank = ptx::cluster_rank(), other = p.fault == 3 ? 2 : 1 - rank;
  value[threadIdx.x] = static_cast<int>(rank);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 32);
    ptx::fence_mbarrier_init();
  }
  if (p.fault == 1)
    __syncthreads();
  else
    ptx::cluster_sync();
  static_cast<int*>(p.out)[blockIdx.x * blockDim.x + threadIdx.x] =
      ptx::cluster_map(value, other)[threadIdx.x];
  if (p.fault != 2 && p.fault != 4) ptx::cluster_sync();
  if (p.fault == 2) return;
  ptx::mbarrier_arrive_cluster(barrier, other);
  if (p.fault != 4) ptx::mbarrier_wait_cluster(barrier, 0);
}

// 1: a shuffle from a lane outside the mask. 2: a lane outside its own mask. 3: half a warp at mma.
__global__ void lanes(const __grid_constant__ Trial p) {
  const unsigned i = threadIdx.x;
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (p.fault == 1 && i < 8) __shfl_xor_sync(0xFF, 1, 8);
  if (p.fault == 2) __syncwarp(0xFF);
  if (p.fault == 3 && i < 16) return;
  ptx::mma_m16n8k16<__half>(d, a, b);
}

}  // namespace

LS_HOST_BINDINGS(faults) {
  def_trial<neighbours>(m, "neighbours");
  def_trial<warp_exchange>(m, "warp_exchange");
  def_trial<bounds>(m, "bounds");
  def_trial<global_order>(m, "global_order");
  def_trial<barriers>(m, "barriers");
  def_trial<copies>(m, "copies");
  def_trial<bulk>(m, "bulk");
  def_trial<matrices>(m, "matrices");
  def_trial<cluster>(m, "cluster");
  def_trial<lanes>(m, "lanes");
}

}  // namespace latent_shift::cuda
