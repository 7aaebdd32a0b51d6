// Asynchronous copies, and the mbarriers that they complete.
#include "machine.h"

#include <tuple>

namespace latent_shift::host {

// Reads and writes of a copy are checked where it is issued; the bytes stay out of bounds until
// finish_copy.
static void begin_copy(const AsyncCopy& copy, std::optional<As> as) {
  if (copy.valid) check_global(copy.global, copy.bytes, false);
  check_shared(copy.shared, copy.bytes, true, as);
  std::memset(m.states + (copy.shared - m.shared_base), kPending, copy.bytes);
}

static void finish_copy(const AsyncCopy& copy) {
  auto* to = reinterpret_cast<void*>(copy.shared);
  if (copy.valid)
    std::memcpy(to, reinterpret_cast<const void*>(copy.global), copy.bytes);
  else
    std::memset(to, 0, copy.bytes);
  std::memset(m.states + (copy.shared - m.shared_base), kInitialised, copy.bytes);
}

static Mbarrier& find_mbarrier(uintptr_t address, const char* what) {
  Block& block = *m.cluster_blocks[(address - m.shared_base) / kSharedStride];
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end())
    fault(say(what, ": no mbarrier was initialised at ", shared_text(address, 8)));
  const Mbarrier& barrier = found->second;
  if (m.options.races && !current->time.knows(barrier.init_timeline, barrier.init_epoch))
    fault(say(what, ": race: unordered after the initialisation of the mbarrier by ",
              who(barrier.init_timeline)));
  return found->second;
}

static void complete_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  std::tie(barrier.known, barrier.known_fenced) = barrier.gather.take();
  auto& waiting = barrier.waiting;
  for (size_t i = 0; i < waiting.size();) {
    const auto [fiber, parity] = waiting[i];
    if ((barrier.phase & 1) == parity) {
      ++i;
      continue;
    }
    acquire(fiber->time, barrier.known, barrier.known_fenced);
    make_ready(fiber);
    waiting[i] = waiting.back();
    waiting.pop_back();
  }
}

void complete_async(size_t which) {
  const AsyncEvent event = std::move(m.events[which]);
  m.events[which] = std::move(m.events.back());
  m.events.pop_back();
  uint32_t bytes = 0;
  for (const AsyncCopy& copy : event.copies) {
    finish_copy(copy);
    bytes += copy.bytes;
  }
  const auto found = event.block->mbarriers.find(event.barrier);
  if (found == event.block->mbarriers.end())
    return fail("an asynchronous copy completes at an mbarrier that was invalidated");
  Mbarrier& barrier = found->second;
  if (event.arrives) {
    if (barrier.pending == 0)
      return fail("cp.async arrives at an mbarrier that expects no more arrivals");
    --barrier.pending;
    if (m.options.races) barrier.gather.add(event.by, m.timelines);
  } else {
    barrier.bytes -= bytes;
    if (m.options.races) barrier.gather.add(barrier.agent, event.agent_epoch, m.timelines);
  }
  complete_phase(barrier);
}

void cp_async(void* shared, const void* global, bool valid) {
  LS_HERE();
  const AsyncCopy copy{own_shared(shared, 16, "cp.async"), reinterpret_cast<uintptr_t>(global), 16,
                       valid};
  if (valid && copy.global % 16)
    fault("misaligned: cp.async from " + address_text(copy.global, 16));
  begin_copy(copy, {});
  current->open_copies.push_back(copy);
}

void cp_async_commit() {
  LS_HERE();
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait(int groups) {
  LS_HERE();
  auto& waiting = current->copy_groups;
  while (waiting.size() > static_cast<size_t>(groups)) {
    for (const AsyncCopy& copy : waiting.front()) {
      finish_copy(copy);
      check_shared(copy.shared, copy.bytes, true);
    }
    waiting.pop_front();
  }
}

void cp_async_arrive(uint64_t* address) {
  LS_HERE();
  Fiber& f = *current;
  const uintptr_t barrier = own_shared(address, 8, "cp.async.mbarrier.arrive");
  find_mbarrier(barrier, "cp.async.mbarrier.arrive");
  AsyncEvent event{f.block, barrier, std::move(f.open_copies), true, f.time, 0};
  f.open_copies.clear();
  for (const auto& group : f.copy_groups)
    event.copies.insert(event.copies.end(), group.begin(), group.end());
  f.copy_groups.clear();
  ++f.time.epoch;
  m.events.push_back(std::move(event));
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* address, uint32_t mask) {
  LS_HERE();
  require(90, "cp.async.bulk");
  const uintptr_t to = own_shared(shared, 16, "cp.async.bulk");
  const uintptr_t at = own_shared(address, 8, "cp.async.bulk");
  const auto from = reinterpret_cast<uintptr_t>(global);
  if (from % 16 || bytes % 16)
    fault(say("misaligned: cp.async.bulk from ", address_text(from, bytes)));
  if (mask == 0 || mask >> m.cluster)
    fault(say("cp.async.bulk: mask ", mask, " in a cluster of ", m.cluster));
  for (uint32_t rank = 0; rank < m.cluster; ++rank) {
    if (!(mask >> rank & 1)) continue;
    Block& block = *m.cluster_blocks[rank];
    const uintptr_t move = kSharedStride * rank - kSharedStride * current->block->rank;
    Mbarrier& barrier = find_mbarrier(at + move, "cp.async.bulk");
    if (!barrier.fenced)
      fault("cp.async.bulk: no fence_mbarrier_init after the initialisation of its mbarrier");
    const As as{barrier.agent, ++barrier.agent_epoch, true};
    const AsyncCopy copy{to + move, from, bytes, true};
    begin_copy(copy, as);
    m.events.push_back({&block, at + move, {copy}, false, {}, as.epoch});
  }
}

void fence_proxy_async() {
  LS_HERE();
  require(90, "fence.proxy.async");
  fence_mbarrier_init();
  if (m.options.races) current->time.fence(m.timelines);
}

void fence_mbarrier_init() {
  LS_HERE();
  require(90, "fence.mbarrier_init");
  for (auto& [address, barrier] : current->block->mbarriers)
    if (barrier.init_timeline == current->time.id) barrier.fenced = true;
}

void mbarrier_init(uint64_t* address, uint32_t count) {
  LS_HERE();
  const uintptr_t at = own_shared(address, 8, "mbarrier.init");
  if (count == 0 || count >= 1u << 20) fault(say("mbarrier.init: ", count, " arrivals"));
  check_shared(at, 8, true);
  std::memset(m.states + (at - m.shared_base), kBarrierObject, 8);
  Block& block = *current->block;
  const uint32_t slot = static_cast<uint32_t>(block.mbarriers.size()) % kBarrierAgents;
  Mbarrier barrier{};
  barrier.count = barrier.pending = count;
  barrier.init_timeline = current->time.id;
  barrier.init_epoch = current->time.epoch;
  const auto warps = static_cast<uint32_t>(block.warps.size());
  barrier.agent = agent_base() + block.rank * (warps + kBarrierAgents) + warps + slot;
  block.mbarriers[at] = std::move(barrier);
}

void mbarrier_arrive(uint64_t* address, uint32_t expected_bytes) {
  LS_HERE();
  Fiber& f = *current;
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (!is_shared(at)) fault("mbarrier.arrive: the address is not in shared memory");
  Block& block = *m.cluster_blocks[(at - m.shared_base) / kSharedStride];
  Mbarrier& barrier = find_mbarrier(at, "mbarrier.arrive");
  if (&block != f.block) {
    if (block.live == 0) fault(say("mbarrier.arrive at block ", block.rank, ", which has exited"));
    if (!barrier.fenced)
      fault(
          "mbarrier.arrive: no fence_mbarrier_init after the initialisation of a remote mbarrier");
    block.remote[f.time.id] = f.time.epoch;
  }
  if (barrier.pending == 0)
    fault(say("mbarrier.arrive: the phase has had its ", barrier.count, " arrivals and waits for ",
              barrier.bytes, " bytes"));
  barrier.bytes += expected_bytes;
  --barrier.pending;
  release(barrier.gather, f.time);
  complete_phase(barrier);
}

void mbarrier_wait(uint64_t* address, uint32_t parity) {
  LS_HERE();
  Fiber& f = *current;
  const uintptr_t at = own_shared(address, 8, "mbarrier.wait");
  Mbarrier& barrier = find_mbarrier(at, "mbarrier.wait");
  if (parity > 1) fault(say("mbarrier.wait: parity ", parity));
  if ((barrier.phase & 1) != parity) return acquire(f.time, barrier.known, barrier.known_fenced);
  barrier.waiting.emplace_back(&f, parity);
  block_on("an mbarrier",
           say(" at shared memory + ", (at - m.shared_base) % kSharedStride, ", parity ", parity));
}

}  // namespace latent_shift::host
