// What kernel code compiled for the host calls; the executor runs it (tests/host/executor).
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

namespace latent_shift::host {

// A fault of a kernel: what, where and by which thread of which block.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- the side of the tests ---------------------------------------------------------------------

struct Options {
  uint64_t seed = 0;
  // Races, the order of asynchronous accesses and random preemption; without, several times faster.
  bool races = true;
  int arch = 90;
  int shared_per_block = 227 * 1024;
  int num_sms = 132;
};

struct LaunchRecord {
  std::string kernel;
  dim3 blocks, threads;
  unsigned int cluster;
  size_t shared;
  uint64_t accesses;
};

void configure(const Options& options);
const Options& options();
// `item` is the size of its elements, no two of which share what a race is told by.
void register_buffer(uint64_t address, uint64_t bytes, uint32_t item, const std::string& name,
                     bool writable);
void clear_buffers();
const std::vector<LaunchRecord>& launch_records();
// Runs `kernel(params)` in every thread; `name` is any text that holds the kernel's name.
void launch(const char* name, dim3 blocks, dim3 threads, unsigned int cluster, size_t shared,
            void (*kernel)(const void*), const void* params, size_t param_bytes);

// ---- the side of the kernels -------------------------------------------------------------------

[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();

enum class Element { kBfloat16, kHalf };
enum class Shuffle { kIndex, kXor, kUp, kDown };

void require(int arch, const char* what);
unsigned char* dynamic_shared();
uint32_t shared_address(const void* shared);

void sync_warp(uint32_t mask);
void shuffle(uint32_t mask, Shuffle kind, void* value, size_t bytes, int lane, int width);
uint32_t ballot(uint32_t mask, bool predicate);
bool elect_one();

void barrier_sync(uint32_t id, uint32_t threads);
void barrier_arrive(uint32_t id, uint32_t threads);
void sync_block();

void cp_async(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int groups);
void cp_async_arrive(uint64_t* barrier);

void mbarrier_init(uint64_t* barrier, uint32_t count);
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void fence_mbarrier_init();
void fence_proxy_async();
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint32_t mask);

void ldmatrix_x4(uint32_t* r, const void* row);
void mma(Element element, float* d, const uint32_t* a, const uint32_t* b);

void check_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes);
void wgmma(Element element, int n, float* d, uint64_t a, uint64_t b, bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive();
void cluster_wait();
void* cluster_map(const void* own_shared, uint32_t rank);

}  // namespace latent_shift::host
