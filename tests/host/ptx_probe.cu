// Every wrapper of ptx.cuh once, for a test that looks for its instruction in the machine code.
#include "../../csrc/cuda/ptx.cuh"

using namespace latent_shift::cuda;

__global__ void ampere(float* out, const uint4* in) {
  unsigned char* shared = ptx::dynamic_shared();
  auto* barrier = reinterpret_cast<uint64_t*>(shared);
  unsigned char* row = shared + 1024 + 16 * threadIdx.x;
  ptx::mbarrier_init(barrier, 1);
  ptx::cp_async_16(row, in + threadIdx.x, threadIdx.x < 7);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  ptx::cp_async_arrive_noinc(barrier);
  ptx::named_barrier_sync(1, 64);
  ptx::named_barrier_arrive(2, 64);
  ptx::mbarrier_arrive(barrier);
  ptx::mbarrier_wait(barrier, 0);
  uint32_t a[4], b[4];
  float d[4] = {};
  ptx::ldmatrix_x4(a, row);
  ptx::ldmatrix_x4(b, row + 512);
  const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
  ptx::mma_m16n8k16<__nv_bfloat16>(d, a, left);
  ptx::mma_m16n8k16<__half>(d, a, right);
  out[threadIdx.x] = ptx::exp2_approx(d[0]) + ptx::rcp_approx(d[1]) + d[2] + d[3];
}

#ifdef LS_HOPPER

__global__ void hopper(float* out, const uint4* in) {
  unsigned char* shared = ptx::dynamic_shared();
  auto* barrier = reinterpret_cast<uint64_t*>(shared);
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  ptx::fence_proxy_async();
  if (ptx::elect_one()) {
    ptx::mbarrier_arrive_expect_tx(barrier, 128);
    ptx::bulk_copy_to_shared(shared + 128, in, 128, barrier);
    ptx::bulk_copy_to_shared_multicast(shared + 256, in, 128, barrier, 3);
  }
  ptx::mbarrier_arrive_cluster(barrier, 1);
  ptx::mbarrier_arrive_cluster_release(barrier, 1);
  ptx::mbarrier_wait(barrier, 0);
  ptx::mbarrier_wait_cluster(barrier, 1);
  ptx::cluster_sync();
  out[0] = *ptx::cluster_map(reinterpret_cast<float*>(shared), 1) + ptx::cluster_rank() +
           ptx::cluster_size();
}

template <class T, int N>
__global__ void __launch_bounds__(128, 1) warpgroup(float* out, int steps) {
  unsigned char* shared = ptx::dynamic_shared();
  float d[N / 2];
  ptx::keep_registers(d);
  ptx::wgmma_fence();
  for (int step = 0; step < steps; ++step)
    ptx::wgmma_m64k16<T, N>(d, ptx::wgmma_descriptor(shared + 256 * step, 128, 256),
                            ptx::wgmma_descriptor(shared + 8192 + 256 * step, 128, 256), step > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::keep_registers(d);
  for (int i = 0; i < N / 2; ++i) out[i * 128 + threadIdx.x] = d[i];
}

template __global__ void warpgroup<__nv_bfloat16, 16>(float*, int);
template __global__ void warpgroup<__nv_bfloat16, 64>(float*, int);
template __global__ void warpgroup<__half, 80>(float*, int);
template __global__ void warpgroup<__nv_bfloat16, 160>(float*, int);
template __global__ void warpgroup<__half, 256>(float*, int);

__global__ void __launch_bounds__(256, 1) registers(float* out) {
  if (threadIdx.x < 128)
    ptx::set_max_registers_decrease<24>();
  else
    ptx::set_max_registers_increase<240>();
  out[threadIdx.x] = 1;
}

#endif
