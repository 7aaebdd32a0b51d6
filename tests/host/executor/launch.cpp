// A launch: its limits, its clusters one after another, and the records of what ran.
#include "machine.h"

#include <link.h>

namespace latent_shift::host {

uint3 thread_index() { return current ? current->thread : uint3{}; }
uint3 block_index() { return current ? current->block->index : uint3{}; }
dim3 block_size() { return m.threads; }
dim3 grid_size() { return m.blocks; }

void require(int arch, const char* what) {
  if (m.options.arch < arch)
    fault(say(what, " needs sm_", arch, ", the device is sm_", m.options.arch));
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(current->block->shared); }

uint32_t shared_address(const void* shared) {
  LS_HERE();
  const uintptr_t address = own_shared(shared, 1, "shared_address");
  return kSharedWindow + static_cast<uint32_t>((address - m.shared_base) % kSharedStride);
}

static void exit_thread() {
  Fiber& f = *current;
  Warp& warp = *f.warp;
  Block& block = *f.block;
  f.pc = nullptr;
  if (!warp.groups.empty() || !warp.open.empty()) fault("exits with wgmma in flight");
  f.exited = true;
  warp.existing &= ~(1u << f.lane);
  for (size_t i = 0; i < warp.meetings.size();)
    if (warp.meetings[i]->arrived == (warp.meetings[i]->mask & warp.existing))
      finish_meeting(warp, i);
    else
      ++i;
  --m.cluster_expected;
  if (f.cluster_arrived && f.cluster_phase == m.cluster_phase) --m.cluster_arrivals;
  complete_cluster_barrier();
  if (m.options.races) block.exits.add(f.time, m.timelines);
  if (--block.live > 0) return;
  for (const AsyncEvent& event : m.events)
    if (event.block == &block) fault("the block exits with an asynchronous copy in flight");
  for (size_t group = 0; group < block.wgmma_log.size(); ++group)
    for (size_t w = 4 * group; w < 4 * group + 4 && w < block.warps.size(); ++w)
      if (block.warps[w].issued != block.wgmma_log[group].size())
        fault(say("warp ", w, " took part in ", block.warps[w].issued, " of ",
                  block.wgmma_log[group].size(), " wgmma of its warpgroup"));
  if (!m.options.races) return;
  for (const auto& [timeline, epoch] : block.remote)
    if (!block.exits.knows(timeline, epoch))
      fault("the block exits without waiting for the access to its shared memory by " +
            who(timeline));
}

static void fiber_main() {
  while (true) {
    m.entry(m.params);
    exit_thread();
    Context::swap(current->context, m.scheduler);
  }
}

static uint3 unflatten(uint64_t i, const dim3& size) {
  return {static_cast<uint32_t>(i % size.x), static_cast<uint32_t>(i / size.x % size.y),
          static_cast<uint32_t>(i / size.x / size.y)};
}

static void start_cluster(uint64_t first_block) {
  m.races.begin_cluster(first_block == 0);
  const uint32_t warps = (m.num_threads + kWarp - 1) / kWarp;
  m.cluster_blocks.clear();
  m.ready.clear();
  m.events.clear();
  m.cluster_waiting.clear();
  m.cluster_gather.take();
  m.cluster_known = m.cluster_fenced = nullptr;
  m.cluster_arrivals = m.cluster_phase = 0;
  m.cluster_expected = m.num_threads * m.cluster;
  m.timelines = m.cluster * (m.num_threads + warps + kBarrierAgents);
  while (m.fibers.size() > m.cluster_expected) m.fibers.pop_back();
  while (m.fibers.size() < m.cluster_expected) {
    m.fibers.push_back(std::make_unique<Fiber>());
    m.fibers.back()->stack = std::make_unique<Stack>();
  }
  for (uint32_t rank = 0; rank < m.cluster; ++rank) {
    m.cluster_blocks.push_back(std::make_unique<Block>());
    Block& block = *m.cluster_blocks.back();
    block.index = unflatten(first_block + rank, m.blocks);
    block.rank = rank;
    block.shared = m.shared_base + rank * kSharedStride;
    block.live = m.num_threads;
    block.warps = std::vector<Warp>(warps);
    block.wgmma_log.resize((warps + 3) / 4);
    std::memset(m.states + rank * kSharedStride, kUninitialised, m.shared);
    std::memset(reinterpret_cast<void*>(block.shared), 0xFF, m.shared);
    for (uint32_t i = 0; i < m.num_threads; ++i) {
      Fiber& f = *m.fibers[rank * m.num_threads + i];
      Warp& warp = block.warps[i / kWarp];
      warp.block = &block;
      warp.index = i / kWarp;
      warp.agent = m.num_threads * m.cluster + rank * (warps + kBarrierAgents) + warp.index;
      warp.existing |= 1u << i % kWarp;
      f.block = &block;
      f.warp = &warp;
      f.lane = i % kWarp, f.index = i;
      f.thread = unflatten(i, m.threads);
      f.time = Timeline{rank * m.num_threads + i, 1, nullptr, nullptr};
      f.exited = false;
      f.waits_for = nullptr, f.pc = nullptr;
      f.open_copies.clear(), f.copy_groups.clear();
      f.cluster_arrived = false;
      f.context.start(*f.stack, fiber_main);
      block.fibers.push_back(&f);
      m.ready.push_back(&f);
    }
  }
}

// The text of `Kernel = name` in what a template calls itself.
static std::string kernel_name(const char* pretty) {
  const std::string s = pretty;
  const size_t at = s.find("Kernel = ");
  if (at == std::string::npos) return s;
  std::string name = s.substr(at + 9, s.find("; Params", at) - at - 9);
  if (name.rfind("(& ", 0) == 0) name = name.substr(3, name.size() - 4);
  for (const std::string prefix : {"latent_shift::cuda::", "latent_shift::host::"})
    for (size_t i; (i = name.find(prefix)) != std::string::npos;) name.erase(i, prefix.size());
  return name;
}

// Where this module's code and constants lie: kernels may read their tables.
static int find_image(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&find_image);
  uintptr_t begin = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    begin = std::min<uintptr_t>(begin, info->dlpi_addr + segment.p_vaddr);
    end = std::max<uintptr_t>(end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
  }
  if (here < begin || here >= end) return 0;
  m.image_begin = begin, m.image_end = end;
  return 1;
}

void configure(const Options& options) { m.options = options; }
const Options& options() { return m.options; }
const std::vector<LaunchRecord>& launch_records() { return m.records; }

void register_buffer(uint64_t address, uint64_t bytes, uint32_t item, const std::string& name,
                     bool writable) {
  if (bytes == 0) return;
  const Buffer buffer{address, address + bytes, name, writable, std::min(item, 8u), nullptr};
  const auto at = std::upper_bound(m.buffers.begin(), m.buffers.end(), buffer.begin,
                                   [](uintptr_t a, const Buffer& b) { return a < b.begin; });
  if ((at != m.buffers.end() && at->begin < buffer.end) ||
      (at != m.buffers.begin() && (at - 1)->end > buffer.begin))
    throw std::invalid_argument("buffer '" + name + "' overlaps a registered one");
  const auto placed = m.buffers.insert(at, buffer);
  if (writable) placed->cells = reserve<Cell>((bytes / placed->item + 1) * sizeof(Cell));
  forget_buffer();
}

void clear_buffers() {
  for (const Buffer& b : m.buffers)
    if (b.cells) munmap(b.cells, ((b.end - b.begin) / b.item + 1) * sizeof(Cell));
  m.buffers.clear();
  m.records.clear();
}

void launch(const char* name, dim3 blocks, dim3 threads, unsigned int cluster, size_t shared,
            void (*kernel)(const void*), const void* params, size_t param_bytes) {
  if (!m.shared_base) {
    // Aligned as the largest alignment that shared memory has on a device.
    const auto base = reinterpret_cast<uintptr_t>(reserve<char>(kSharedStride * (kMaxCluster + 1)));
    m.shared_base = (base + kSharedStride - 1) / kSharedStride * kSharedStride;
    m.states = reserve<uint8_t>(kSharedStride * kMaxCluster);
    m.shared_cells = reserve<Cell>(kSharedStride * kMaxCluster / 2 * sizeof(Cell));
    dl_iterate_phdr(find_image, nullptr);
  }
  m.kernel = kernel_name(name);
  const auto refuse = [&](const std::string& what) {
    throw KernelError(m.kernel + ": launch: " + what);
  };
  const uint64_t num_blocks = uint64_t{blocks.x} * blocks.y * blocks.z;
  const uint64_t num_threads = uint64_t{threads.x} * threads.y * threads.z;
  if (num_blocks == 0 || blocks.x > INT32_MAX || blocks.y > 65535 || blocks.z > 65535)
    refuse(say("grid (", blocks.x, ", ", blocks.y, ", ", blocks.z, ")"));
  if (num_threads == 0 || num_threads > 1024 || threads.z > 64)
    refuse(say("block (", threads.x, ", ", threads.y, ", ", threads.z, ")"));
  if (cluster == 0 || cluster > kMaxCluster || blocks.x % cluster ||
      (cluster > 1 && m.options.arch < 90))
    refuse(say("cluster of ", cluster, " in a grid of ", blocks.x, " on sm_", m.options.arch));
  if (shared > static_cast<size_t>(m.options.shared_per_block))
    refuse(say(shared, " bytes of shared memory, a block has ", m.options.shared_per_block));
  if (param_bytes > 4096) refuse(say(param_bytes, " bytes of parameters"));

  m.blocks = blocks, m.threads = threads, m.cluster = cluster, m.shared = shared;
  m.num_threads = static_cast<uint32_t>(num_threads);
  m.entry = kernel, m.params = params, m.param_bytes = param_bytes;
  m.accesses = 0;
  m.failure.reset();
  m.random_state = (m.options.seed + 1) * 0x9E3779B97F4A7C15u | 1;
  for (int i = 0; i < 8; ++i) m.random(2);
  m.until_preemption = 1 + m.random(kMeanAccessesBetweenPreemptions);
  try {
    for (uint64_t block = 0; block < num_blocks; block += cluster) {
      start_cluster(block);
      run_cluster();
    }
  } catch (...) {
    current = nullptr;
    throw;
  }
  m.records.push_back({m.kernel, blocks, threads, cluster, shared, m.accesses});
}

}  // namespace latent_shift::host
