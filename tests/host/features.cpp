// Correct kernels, one for every feature of the executor, with results that tests can compute.
#include "trial.h"

namespace latent_shift::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFF;

// out[block] = sum of row `block` of a (blocks, n): strided loads, shuffles, shared memory.
__global__ void row_sum(const __grid_constant__ Trial p) {
  const auto* row = static_cast<const float*>(p.a) + blockIdx.x * p.n;
  auto* partial = reinterpret_cast<float*>(ptx::dynamic_shared());
  float sum = 0;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) sum += row[i];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAll, sum, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) sum += partial[warp];
    static_cast<float*>(p.out)[blockIdx.x] = sum;
  }
}

// One row of 32 for each kind of vote and shuffle; lanes take turns in halves of the warp.
__global__ void shuffles(const __grid_constant__ Trial p) {
  const unsigned lane = threadIdx.x;
  auto* out = static_cast<int*>(p.out) + lane;
  const unsigned half = lane < 16 ? 0xFFFF : 0xFFFF0000;
  const int value = 100 + static_cast<int>(lane);
  out[0] = __shfl_sync(kAll, value, 5);
  out[32] = __shfl_sync(kAll, value, static_cast<int>(lane) + 1, 8);
  out[64] = __shfl_up_sync(kAll, value, 3);
  out[96] = __shfl_down_sync(kAll, value, 3, 16);
  out[128] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  if (lane < 16)
    out[160] = __shfl_xor_sync(half, value, 1);
  else
    out[160] = __shfl_xor_sync(half, value, 2);
  __syncwarp();
  out[192] = ptx::elect_one();
  const double wide = __shfl_xor_sync(kAll, value + 0.5, 16);
  out[224] = static_cast<int>(2 * wide);
}

// Every conversion of a 16-bit type: out = its float for a's bits, b's floats rounded to it.
template <class T>
__global__ void conversions(const __grid_constant__ Trial p) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  auto* out = static_cast<float*>(p.out);
  out[2 * i] = static_cast<float>(static_cast<const T*>(p.a)[i]);
  const T rounded = static_cast<const float*>(p.b)[i];
  out[2 * i + 1] = static_cast<float>(rounded);
}

// out (16, 8) = a (16, 16) b^T by one mma, fragments by ldmatrix or, with n = 1, element by element.
template <class T>
__global__ void mma_tile(const __grid_constant__ Trial p) {
  const unsigned lane = threadIdx.x, group = lane / 4, pair = 2 * (lane % 4);
  auto* a = reinterpret_cast<uint16_t*>(ptx::dynamic_shared());
  uint16_t* b = a + 256;
  for (unsigned i = lane; i < 256; i += 32) a[i] = static_cast<const uint16_t*>(p.a)[i];
  for (unsigned i = lane; i < 128; i += 32) b[i] = static_cast<const uint16_t*>(p.b)[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  float d[4] = {1, 1, 1, 1};
  if (p.n == 1) {
    for (unsigned r = 0; r < 4; ++r)
      fa[r] = *reinterpret_cast<uint32_t*>(a + (group + r % 2 * 8) * 16 + pair + r / 2 * 8);
    for (unsigned r = 0; r < 2; ++r)
      fb[r] = *reinterpret_cast<uint32_t*>(b + group * 16 + pair + r * 8);
  } else {
    ptx::ldmatrix_x4(fa, a + lane % 16 * 16 + lane / 16 * 8);
    uint32_t twice[4];
    ptx::ldmatrix_x4(twice, b + lane % 8 * 16 + lane / 8 % 2 * 8);
    fb[0] = twice[0], fb[1] = twice[3];
  }
  ptx::mma_m16n8k16<T>(d, fa, fb);
  auto* out = static_cast<float*>(p.out);
  for (unsigned r = 0; r < 4; ++r) out[(group + r / 2 * 8) * 8 + pair + r % 2] = d[r];
}

// out (64, N) = a (64, 32) b (N, 32)^T. In shared memory a's core matrices of 8 rows are 160 bytes
// apart and b's 128; `n` says where rows of a start, in 16 bytes, as a convolution's taps do.
template <class T, int N>
__global__ void __launch_bounds__(128) wgmma_tile(const __grid_constant__ Trial p) {
  constexpr unsigned kStrideA = 160, kLeadingA = 8 * kStrideA + 16, kStrideB = 128,
                     kLeadingB = 16 * N;
  constexpr unsigned kChunks = 4;  // of 8 elements along K
  unsigned char* a = ptx::dynamic_shared();
  unsigned char* b = a + kChunks * kLeadingA + 256;
  const auto place = [&](unsigned char* to, const void* from, unsigned rows, unsigned stride,
                         unsigned leading) {
    for (unsigned i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
      const unsigned row = i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<uint4*>(to + row / 8 * stride + row % 8 * 16 + chunk * leading) =
          static_cast<const uint4*>(from)[i];
    }
  };
  place(a + 16 * p.n, p.a, 64, kStrideA, kLeadingA);
  place(b, p.b, N, kStrideB, kLeadingB);
  ptx::fence_proxy_async();
  __syncthreads();
  float d[N / 2];
  ptx::keep_registers(d);
  ptx::wgmma_fence();
  for (unsigned step = 0; step < 2; ++step)
    ptx::wgmma_m64k16<T, N>(
        d, ptx::wgmma_descriptor(a + 16 * p.n + 2 * step * kLeadingA, kLeadingA, kStrideA),
        ptx::wgmma_descriptor(b + 2 * step * kLeadingB, kLeadingB, kStrideB), step > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::keep_registers(d);
  const unsigned lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  auto* out = static_cast<float*>(p.out);
  for (unsigned r = 0; r < N / 2; ++r)
    out[(row + r / 2 % 2 * 8) * N + r / 4 * 8 + 2 * (lane % 4) + r % 2] = d[r];
}

// out = 2 a over n tiles of one vector a thread, two cp.async groups in flight; past `n` tiles the
// copies fill with zeros, and the last block's tile, which nobody reads, is one of those.
__global__ void copy_pipeline(const __grid_constant__ Trial p) {
  auto* stage = reinterpret_cast<float4*>(ptx::dynamic_shared());
  const auto* a = static_cast<const float4*>(p.a);
  auto* out = static_cast<float4*>(p.out);
  const int thread = threadIdx.x, size = blockDim.x;
  const auto fetch = [&](int tile) {
    ptx::cp_async_16(stage + tile % 3 * size + thread, a + tile * size + thread, tile < p.n);
    ptx::cp_async_commit();
  };
  fetch(0);
  fetch(1);
  for (int tile = 0; tile <= p.n; ++tile) {
    ptx::cp_async_wait<1>();
    __syncthreads();
    const float4 v = stage[tile % 3 * size + (thread + 1) % size];
    out[tile * size + (thread + 1) % size] = {2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w};
    fetch(tile + 2);
  }
  ptx::cp_async_wait<0>();
}

// The same with mbarriers that the copies arrive at: warp 0 copies, the others read.
__global__ void copy_barriers(const __grid_constant__ Trial p) {
  auto* full = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  uint64_t* empty = full + 2;
  auto* stage = reinterpret_cast<float4*>(full + 4);
  const unsigned lane = threadIdx.x % 32, readers = blockDim.x - 32;
  if (threadIdx.x < 2) {
    ptx::mbarrier_init(full + threadIdx.x, 32);
    ptx::mbarrier_init(empty + threadIdx.x, readers);
  }
  __syncthreads();
  for (int tile = 0; tile < p.n; ++tile) {
    const int slot = tile % 2, parity = tile / 2 % 2;
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(empty + slot, parity ^ 1);
      ptx::cp_async_16(stage + slot * 32 + lane, static_cast<const float4*>(p.a) + tile * 32 + lane,
                       true);
      ptx::cp_async_arrive_noinc(full + slot);
    } else {
      ptx::mbarrier_wait(full + slot, parity);
      if (threadIdx.x < 64) static_cast<float4*>(p.out)[tile * 32 + lane] = stage[slot * 32 + lane];
      ptx::mbarrier_arrive(empty + slot);
    }
  }
  ptx::cp_async_wait<0>();
}

// Bulk copies by one elected thread, two stages, readers that give them back.
__global__ void bulk_pipeline(const __grid_constant__ Trial p) {
  auto* full = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  uint64_t* empty = full + 2;
  auto* stage = reinterpret_cast<float*>(full + 4);
  const unsigned readers = blockDim.x - 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, readers);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (!ptx::elect_one()) return;
    for (int tile = 0; tile < p.n; ++tile) {
      const int slot = tile % 2;
      ptx::mbarrier_wait(empty + slot, tile / 2 % 2 ^ 1);
      ptx::mbarrier_arrive_expect_tx(full + slot, readers * sizeof(float));
      ptx::bulk_copy_to_shared(stage + slot * readers,
                               static_cast<const float*>(p.a) + tile * readers,
                               readers * sizeof(float), full + slot);
    }
  } else {
    const unsigned i = threadIdx.x - 32;
    for (int tile = 0; tile < p.n; ++tile) {
      const int slot = tile % 2;
      ptx::mbarrier_wait(full + slot, tile / 2 % 2);
      const float v = stage[slot * readers + (i + 1) % readers];
      ptx::mbarrier_arrive(empty + slot);
      static_cast<float*>(p.out)[tile * readers + (i + 1) % readers] = v;
    }
  }
}

// Warp 0 fills, warp 1 drains, by named barriers that one side only arrives at.
__global__ void named_barriers(const __grid_constant__ Trial p) {
  auto* value = reinterpret_cast<int*>(ptx::dynamic_shared());
  const unsigned lane = threadIdx.x % 32;
  for (int i = 0; i < p.n; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0) ptx::named_barrier_sync(2, 64);
      value[lane] = 32 * i + static_cast<int>(lane);
      ptx::named_barrier_arrive(1, 64);
    } else {
      ptx::named_barrier_sync(1, 64);
      static_cast<int*>(p.out)[32 * i + lane] = value[31 - lane];
      if (i + 1 < p.n) ptx::named_barrier_arrive(2, 64);
    }
  }
}

// out[block] = sum over the cluster's ranks r of (r + 1) a[first block of the cluster + r], through
// distributed shared memory.
__global__ void cluster_sum(const __grid_constant__ Trial p) {
  auto* own = reinterpret_cast<float*>(ptx::dynamic_shared());
  if (threadIdx.x == 0)
    own[0] = (ptx::cluster_rank() + 1) * static_cast<const float*>(p.a)[blockIdx.x];
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned rank = 0; rank < ptx::cluster_size(); ++rank) sum += *ptx::cluster_map(own, rank);
    static_cast<float*>(p.out)[blockIdx.x] = sum;
  }
  ptx::cluster_sync();
}

// Every block multicasts its part of each tile of a to the cluster: out[block] = all tiles in turn.
__global__ void cluster_multicast(const __grid_constant__ Trial p) {
  auto* full = reinterpret_cast<uint64_t*>(ptx::dynamic_shared());
  uint64_t* empty = full + 1;
  auto* stage = reinterpret_cast<float*>(full + 2);
  const unsigned rank = ptx::cluster_rank(), size = ptx::cluster_size(), part = 32;
  const unsigned tile_size = part * size;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, size);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  for (int tile = 0; tile < p.n; ++tile) {
    if (threadIdx.x == 0) {
      if (tile > 0) ptx::mbarrier_wait_cluster(empty, (tile - 1) % 2);
      ptx::mbarrier_arrive_expect_tx(full, tile_size * sizeof(float));
      ptx::bulk_copy_to_shared_multicast(
          stage + rank * part, static_cast<const float*>(p.a) + tile * tile_size + rank * part,
          part * sizeof(float), full, static_cast<uint16_t>((1u << size) - 1));
    }
    ptx::mbarrier_wait(full, tile % 2);
    for (unsigned i = threadIdx.x; i < tile_size; i += blockDim.x)
      static_cast<float*>(p.out)[(blockIdx.x * p.n + tile) * tile_size + i] = stage[i];
    __syncthreads();
    if (threadIdx.x < size) ptx::mbarrier_arrive_cluster(empty, threadIdx.x);
  }
  ptx::cluster_sync();
}

}  // namespace

LS_HOST_BINDINGS(features) {
  def_trial<row_sum>(m, "row_sum");
  def_trial<shuffles>(m, "shuffles");
  def_trial<conversions<__nv_bfloat16>>(m, "conversions_bfloat16");
  def_trial<conversions<__half>>(m, "conversions_float16");
  def_trial<mma_tile<__nv_bfloat16>>(m, "mma_tile_bfloat16");
  def_trial<mma_tile<__half>>(m, "mma_tile_float16");
  def_trial<wgmma_tile<__half, 16>>(m, "wgmma_tile_float16_16");
  def_trial<wgmma_tile<__nv_bfloat16, 64>>(m, "wgmma_tile_bfloat16_64");
  def_trial<wgmma_tile<__half, 80>>(m, "wgmma_tile_float16_80");
  def_trial<wgmma_tile<__nv_bfloat16, 128>>(m, "wgmma_tile_bfloat16_128");
  def_trial<wgmma_tile<__nv_bfloat16, 160>>(m, "wgmma_tile_bfloat16_160");
  def_trial<wgmma_tile<__half, 256>>(m, "wgmma_tile_float16_256");
  def_trial<copy_pipeline>(m, "copy_pipeline");
  def_trial<copy_barriers>(m, "copy_barriers");
  def_trial<bulk_pipeline>(m, "bulk_pipeline");
  def_trial<named_barriers>(m, "named_barriers");
  def_trial<cluster_sum>(m, "cluster_sum");
  def_trial<cluster_multicast>(m, "cluster_multicast");
}

}  // namespace latent_shift::cuda
