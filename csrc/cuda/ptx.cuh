// The PTX instructions the kernels use, one function each and nothing more: kernels hold no inline
// assembly. Compiled by anything but nvcc, the same functions come from the host executor of the
// tests (tests/host/include/ptx_host.h), which checks their use.
//
// Names, operand order and the memory layouts are those of the PTX ISA; shared-memory pointers are
// generic pointers. Functions that need a newer architecture than the one compiled for trap.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace latent_shift::cuda::ptx {

// A shared-memory matrix descriptor of wgmma without swizzle, K-major: core matrices of 8 rows by
// 16 bytes, 128 contiguous bytes each; `leading_bytes` from one to the next along K and
// `stride_bytes` from one to the next along M or N. All three are multiples of 16 below 2^18.
__host__ __device__ constexpr uint64_t wgmma_descriptor_bits(uint32_t address,
                                                             uint32_t leading_bytes,
                                                             uint32_t stride_bytes) {
  constexpr uint64_t mask = 0x3FFFF;
  return (address & mask) >> 4 | (leading_bytes & mask) >> 4 << 16 |
         (stride_bytes & mask) >> 4 << 32;
}

}  // namespace latent_shift::cuda::ptx

#ifndef __CUDACC__
#include "ptx_host.h"
#else

#define LS_DEVICE __device__ __forceinline__

namespace latent_shift::cuda::ptx {

// ---- addresses ---------------------------------------------------------------------------------

LS_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

LS_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- cp.async, sm_80 ---------------------------------------------------------------------------

// 16 bytes, past L1; zeros where not valid, and then the source is not read.
LS_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

LS_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Groups` of this thread's groups are still in flight.
template <int Groups>
LS_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// Arrives once all earlier cp.async of this thread are complete; the arrival is one of those the
// barrier was initialised for.
LS_DEVICE void cp_async_arrive_noinc(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// ---- arithmetic --------------------------------------------------------------------------------

// One instruction each, to about 2 units of the last place; results and arguments below 2^-126 are 0.
LS_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

LS_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- named barriers ----------------------------------------------------------------------------

// `threads` is the number that arrives or waits, a multiple of 32. Barrier 0 is __syncthreads.
LS_DEVICE void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

LS_DEVICE void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers ---------------------------------------------------------------------------------

LS_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

LS_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  [[maybe_unused]] uint64_t state;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];"
               : "=l"(state)
               : "r"(shared_address(barrier))
               : "memory");
}

#if __CUDA_ARCH__ >= 900
#define LS_MBARRIER_TRY "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define LS_MBARRIER_TRY "mbarrier.test_wait.parity.shared.b64"
#endif

// Waits until the phase of the given parity is complete. Acquires what this block's threads and
// bulk copies released; for data of another block of the cluster, mbarrier_wait_cluster.
LS_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "try: " LS_MBARRIER_TRY
      " done, [%0], %1;\n"
      "@!done bra try;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- matrix fragments, sm_80 -------------------------------------------------------------------

// 8x8 matrices of 16-bit elements: lane 8 i + r points at row r of matrix i (16 bytes, aligned);
// each lane receives elements 2 (lane % 4) and + 1 of row lane / 4 of every matrix.
LS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8) += a (16x16, row-major) b (16x8, column-major), T = __nv_bfloat16 or __half.
template <class T>
LS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define LS_MMA(type)                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
               "{%0, %1, %2, %3};"                                    \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    LS_MMA("bf16");
  else
    LS_MMA("f16");
#undef LS_MMA
}

// ---- Hopper: clusters, sm_90 -------------------------------------------------------------------

#if __CUDA_ARCH__ >= 900

LS_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

LS_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

LS_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

LS_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address in block `rank` of the cluster of what lies at `own_shared` in this one.
template <class T>
LS_DEVICE T* cluster_map(T* own_shared, uint32_t rank) {
  T* mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(own_shared), "r"(rank));
  return mapped;
}

LS_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  [[maybe_unused]] uint64_t state;
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 %0, [%1], %2;"
               : "=l"(state)
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the barrier that lies at this address in block `rank` of the cluster. Enough to give a
// buffer that was read back to the bulk copies that fill it; it publishes no writes to the other
// block, as the _release form does at the price of a memory barrier.
LS_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

LS_DEVICE void mbarrier_arrive_cluster_release(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// mbarrier_wait that also acquires what other blocks of the cluster released; it empties L1.
LS_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "try: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra try;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

LS_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders earlier accesses to this block's shared memory before later ones by wgmma and bulk copies.
LS_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Both addresses and the size are multiples of 16; the bytes count on the barrier.
LS_DEVICE void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes,
                                   uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// To the same place, and counting on the barrier at the same place, in every block of the mask.
LS_DEVICE void bulk_copy_to_shared_multicast(void* shared, const void* global, uint32_t bytes,
                                             uint64_t* barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(mask)
      : "memory");
}

// True in one lane of a converged warp, always the same one.
LS_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred leader;\n"
      "elect.sync _|leader, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, leader;\n}"
      : "=r"(elected));
  return elected != 0;
}

#else

LS_DEVICE uint32_t cluster_rank() { return 0; }
LS_DEVICE uint32_t cluster_size() { return 1; }
LS_DEVICE void cluster_arrive() { __trap(); }
LS_DEVICE void cluster_wait() { __trap(); }
template <class T>
LS_DEVICE T* cluster_map(T* own_shared, uint32_t) {
  __trap();
  return own_shared;
}
LS_DEVICE void mbarrier_arrive_expect_tx(uint64_t*, uint32_t) { __trap(); }
LS_DEVICE void mbarrier_arrive_cluster(uint64_t*, uint32_t) { __trap(); }
LS_DEVICE void mbarrier_arrive_cluster_release(uint64_t*, uint32_t) { __trap(); }
LS_DEVICE void mbarrier_wait_cluster(uint64_t*, uint32_t) { __trap(); }
LS_DEVICE void fence_mbarrier_init() { __trap(); }
LS_DEVICE void fence_proxy_async() { __trap(); }
LS_DEVICE void bulk_copy_to_shared(void*, const void*, uint32_t, uint64_t*) { __trap(); }
LS_DEVICE void bulk_copy_to_shared_multicast(void*, const void*, uint32_t, uint64_t*, uint16_t) {
  __trap();
}
LS_DEVICE bool elect_one() {
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane == 0;
}

#endif

// The barrier wants a warp's lanes together, and they may come from a loop that they left one by one.
LS_DEVICE void cluster_sync() {
  __syncwarp();
  cluster_arrive();
  cluster_wait();
}

// ---- Hopper: warpgroups, sm_90a ----------------------------------------------------------------

LS_DEVICE uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes,
                                    uint32_t stride_bytes) {
  return wgmma_descriptor_bits(shared_address(shared), leading_bytes, stride_bytes);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Before the first wgmma and after any access to the registers it accumulates in.
LS_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

LS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Groups` groups are still in flight.
template <int Groups>
LS_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

// Keeps reads and writes of accumulators on this side of a wgmma_wait or wgmma_fence.
template <int Count>
LS_DEVICE void keep_registers(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N>
LS_DEVICE void set_max_registers_increase() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
LS_DEVICE void set_max_registers_decrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// The accumulator operands of N columns: the register names, and the values bound to them.
#define LS_OUT_8(d, i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LS_REGS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LS_REGS_32 LS_REGS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LS_REGS_48 LS_REGS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define LS_REGS_64 LS_REGS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define LS_REGS_80 LS_REGS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define LS_REGS_96 LS_REGS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define LS_REGS_112 LS_REGS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define LS_REGS_128 LS_REGS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define LS_REGS_144 LS_REGS_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define LS_REGS_160 LS_REGS_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define LS_REGS_176 LS_REGS_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define LS_REGS_192 LS_REGS_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define LS_REGS_208 LS_REGS_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define LS_REGS_224 LS_REGS_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define LS_REGS_240 LS_REGS_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define LS_REGS_256 LS_REGS_240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define LS_OUT_16(d) LS_OUT_8(d, 0)
#define LS_OUT_32(d) LS_OUT_16(d), LS_OUT_8(d, 8)
#define LS_OUT_48(d) LS_OUT_32(d), LS_OUT_8(d, 16)
#define LS_OUT_64(d) LS_OUT_48(d), LS_OUT_8(d, 24)
#define LS_OUT_80(d) LS_OUT_64(d), LS_OUT_8(d, 32)
#define LS_OUT_96(d) LS_OUT_80(d), LS_OUT_8(d, 40)
#define LS_OUT_112(d) LS_OUT_96(d), LS_OUT_8(d, 48)
#define LS_OUT_128(d) LS_OUT_112(d), LS_OUT_8(d, 56)
#define LS_OUT_144(d) LS_OUT_128(d), LS_OUT_8(d, 64)
#define LS_OUT_160(d) LS_OUT_144(d), LS_OUT_8(d, 72)
#define LS_OUT_176(d) LS_OUT_160(d), LS_OUT_8(d, 80)
#define LS_OUT_192(d) LS_OUT_176(d), LS_OUT_8(d, 88)
#define LS_OUT_208(d) LS_OUT_192(d), LS_OUT_8(d, 96)
#define LS_OUT_224(d) LS_OUT_208(d), LS_OUT_8(d, 104)
#define LS_OUT_240(d) LS_OUT_224(d), LS_OUT_8(d, 112)
#define LS_OUT_256(d) LS_OUT_240(d), LS_OUT_8(d, 120)

// %a, %b and %p are the operands after the N / 2 accumulators.
#define LS_WGMMA(n, type, a_operand, b_operand, p_operand)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_operand                                  \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" LS_REGS_##n \
               "}, %" #a_operand ", %" #b_operand ", p, 1, 1, 0, 0;\n}"                         \
               : LS_OUT_##n(d)                                                                  \
               : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)))
#define LS_WGMMA_CASE(n, a_operand, b_operand, p_operand)   \
  if constexpr (N == n) {                                   \
    if constexpr (std::is_same_v<T, __nv_bfloat16>)         \
      LS_WGMMA(n, "bf16", a_operand, b_operand, p_operand); \
    else                                                    \
      LS_WGMMA(n, "f16", a_operand, b_operand, p_operand);  \
  }

// d (64xN) = a (64x16) b (16xN) [+ d], both operands K-major in shared memory, by the four warps of
// a warpgroup. Lane l of warp w holds d[4 j + 2 h + i] = D[16 w + 8 h + l / 4][8 j + 2 (l % 4) + i].
template <class T, int N>
LS_DEVICE void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(N % 16 == 0 && N >= 16 && N <= 256);
  LS_WGMMA_CASE(16, 8, 9, 10)
  LS_WGMMA_CASE(32, 16, 17, 18)
  LS_WGMMA_CASE(48, 24, 25, 26)
  LS_WGMMA_CASE(64, 32, 33, 34)
  LS_WGMMA_CASE(80, 40, 41, 42)
  LS_WGMMA_CASE(96, 48, 49, 50)
  LS_WGMMA_CASE(112, 56, 57, 58)
  LS_WGMMA_CASE(128, 64, 65, 66)
  LS_WGMMA_CASE(144, 72, 73, 74)
  LS_WGMMA_CASE(160, 80, 81, 82)
  LS_WGMMA_CASE(176, 88, 89, 90)
  LS_WGMMA_CASE(192, 96, 97, 98)
  LS_WGMMA_CASE(208, 104, 105, 106)
  LS_WGMMA_CASE(224, 112, 113, 114)
  LS_WGMMA_CASE(240, 120, 121, 122)
  LS_WGMMA_CASE(256, 128, 129, 130)
}

#else

LS_DEVICE void wgmma_fence() { __trap(); }
LS_DEVICE void wgmma_commit() { __trap(); }
template <int Groups>
LS_DEVICE void wgmma_wait() {
  __trap();
}
template <int Count>
LS_DEVICE void keep_registers(float (&)[Count]) {}
template <int N>
LS_DEVICE void set_max_registers_increase() {}
template <int N>
LS_DEVICE void set_max_registers_decrease() {}
template <class T, int N>
LS_DEVICE void wgmma_m64k16(float (&)[N / 2], uint64_t, uint64_t, bool) {
  __trap();
}

#endif

}  // namespace latent_shift::cuda::ptx

#undef LS_DEVICE
#undef LS_MBARRIER_TRY
#endif  // __CUDACC__
