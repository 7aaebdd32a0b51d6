// The functions of csrc/cuda/ptx.cuh on the host executor.
#pragma once

#include <cmath>

#include "executor.h"

namespace latent_shift::cuda::ptx {

inline unsigned char* dynamic_shared() { return host::dynamic_shared(); }
inline uint32_t shared_address(const void* shared) { return host::shared_address(shared); }

inline void cp_async_16(void* shared, const void* global, bool valid) {
  host::cp_async(shared, global, valid);
}
inline void cp_async_commit() { host::cp_async_commit(); }
template <int Groups>
void cp_async_wait() {
  host::cp_async_wait(Groups);
}
inline void cp_async_arrive_noinc(uint64_t* barrier) { host::cp_async_arrive(barrier); }

// ftz: what is too small for a normal number is 0
inline float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(flushed(x))); }
inline float rcp_approx(float x) { return flushed(1.0f / flushed(x)); }

inline void named_barrier_sync(uint32_t id, uint32_t threads) { host::barrier_sync(id, threads); }
inline void named_barrier_arrive(uint32_t id, uint32_t threads) {
  host::barrier_arrive(id, threads);
}

inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
  host::mbarrier_init(barrier, count);
}
inline void mbarrier_arrive(uint64_t* barrier) { host::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  host::require(90, "mbarrier.arrive.expect_tx");
  host::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  host::mbarrier_arrive(static_cast<uint64_t*>(host::cluster_map(barrier, rank)), 0);
}
inline void mbarrier_arrive_cluster_release(uint64_t* barrier, uint32_t rank) {
  mbarrier_arrive_cluster(barrier, rank);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  host::mbarrier_wait(barrier, parity);
}
inline void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
  host::require(90, "mbarrier.try_wait.acquire.cluster");
  host::mbarrier_wait(barrier, parity);
}
inline void fence_mbarrier_init() { host::fence_mbarrier_init(); }
inline void fence_proxy_async() { host::fence_proxy_async(); }

inline void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes,
                                uint64_t* barrier) {
  host::bulk_copy(shared, global, bytes, barrier, 1u << host::cluster_rank());
}
inline void bulk_copy_to_shared_multicast(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier, uint16_t mask) {
  host::bulk_copy(shared, global, bytes, barrier, mask);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { host::ldmatrix_x4(r, row); }

template <class T>
constexpr host::Element element_of =
    std::is_same_v<T, __half> ? host::Element::kHalf : host::Element::kBfloat16;

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  host::mma(element_of<T>, d, a, b);
}

inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes,
                                 uint32_t stride_bytes) {
  host::check_descriptor(shared, leading_bytes, stride_bytes);
  return wgmma_descriptor_bits(shared_address(shared), leading_bytes, stride_bytes);
}
inline void wgmma_fence() { host::wgmma_fence(); }
inline void wgmma_commit() { host::wgmma_commit(); }
template <int Groups>
void wgmma_wait() {
  host::wgmma_wait(Groups);
}
template <class T, int N>
void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(N % 16 == 0 && N >= 16 && N <= 256);
  host::wgmma(element_of<T>, N, d, a, b, accumulate);
}
template <int Count>
void keep_registers(float (&)[Count]) {}

inline uint32_t cluster_rank() { return host::cluster_rank(); }
inline uint32_t cluster_size() { return host::cluster_size(); }
inline void cluster_arrive() { host::cluster_arrive(); }
inline void cluster_wait() { host::cluster_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
template <class T>
T* cluster_map(T* own_shared, uint32_t rank) {
  return static_cast<T*>(host::cluster_map(own_shared, rank));
}

template <int N>
void set_max_registers_increase() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}
template <int N>
void set_max_registers_decrease() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

inline bool elect_one() { return host::elect_one(); }

}  // namespace latent_shift::cuda::ptx
