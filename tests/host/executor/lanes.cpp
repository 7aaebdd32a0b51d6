// What threads do together: the lanes of a warp, barriers of a block and of a cluster.
#include "machine.h"

namespace latent_shift::host {

void finish_meeting(Warp& warp, size_t which) {
  const std::unique_ptr<Meeting> meeting = std::move(warp.meetings[which]);
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(which));
  meeting->finish(*meeting);
  for (Fiber* f : meeting->lanes)
    if (f && f != current) make_ready(f);
}

void meet(int kind, uint32_t mask, void* operands, const char* what, void (*finish)(Meeting&)) {
  Fiber& f = *current;
  Warp& warp = *f.warp;
  if (!(mask >> f.lane & 1)) fault(say(what, ": the mask leaves out the executing lane"));
  size_t which = 0;
  while (which < warp.meetings.size() &&
         !(warp.meetings[which]->kind == kind && warp.meetings[which]->mask == mask))
    ++which;
  if (which == warp.meetings.size()) {
    warp.meetings.push_back(std::make_unique<Meeting>());
    warp.meetings.back()->kind = kind, warp.meetings.back()->mask = mask;
    warp.meetings.back()->finish = finish;
  }
  Meeting& meeting = *warp.meetings[which];
  meeting.arrived |= 1u << f.lane;
  meeting.operands[f.lane] = operands;
  meeting.lanes[f.lane] = &f;
  if (meeting.arrived == (mask & warp.existing))
    finish_meeting(warp, which);
  else
    block_on(what);
}

void meet_all(int kind, void* operands, const char* what, void (*finish)(Meeting&)) {
  if (current->warp->existing != 0xFFFFFFFF)
    fault(say(what, ": lanes of the warp have exited or do not exist"));
  meet(kind, 0xFFFFFFFF, operands, what, finish);
}

struct ShuffleOperands {
  Shuffle kind;
  void* value;
  size_t bytes;
  int lane, width;
};

static void finish_shuffle(Meeting& meeting) {
  uint64_t values[kWarp] = {};
  for (uint32_t i = 0; i < kWarp; ++i)
    if (const auto* o = static_cast<ShuffleOperands*>(meeting.operands[i]))
      std::memcpy(&values[i], o->value, o->bytes);
  for (uint32_t i = 0; i < kWarp; ++i) {
    const auto* o = static_cast<ShuffleOperands*>(meeting.operands[i]);
    if (!o) continue;
    const int own = static_cast<int>(i), low = own & ~(o->width - 1), high = low + o->width - 1;
    int source = own;
    switch (o->kind) {
      case Shuffle::kIndex: source = low + (o->lane & (o->width - 1)); break;
      case Shuffle::kXor: source = (own ^ o->lane) > high ? own : own ^ o->lane; break;
      case Shuffle::kUp: source = own - o->lane < low ? own : own - o->lane; break;
      case Shuffle::kDown: source = own + o->lane > high ? own : own + o->lane; break;
    }
    if (!meeting.operands[source])
      fault(say("shuffle: lane ", own, " reads lane ", source, ", which takes no part"));
    std::memcpy(o->value, &values[source], o->bytes);
  }
}

void shuffle(uint32_t mask, Shuffle kind, void* value, size_t bytes, int lane, int width) {
  LS_HERE();
  if (width < 1 || width > 32 || (width & (width - 1))) fault(say("shuffle: width ", width));
  ShuffleOperands operands{kind, value, bytes, lane, width};
  meet(static_cast<int>(kind), mask, &operands, "a shuffle", finish_shuffle);
}

uint32_t ballot(uint32_t mask, bool predicate) {
  LS_HERE();
  struct Operands {
    bool predicate;
    uint32_t result;
  } operands{predicate, 0};
  meet(kBallot, mask, &operands, "__ballot_sync", [](Meeting& meeting) {
    uint32_t votes = 0;
    for (uint32_t i = 0; i < kWarp; ++i)
      if (const auto* o = static_cast<Operands*>(meeting.operands[i]))
        votes |= static_cast<uint32_t>(o->predicate) << i;
    for (void* o : meeting.operands)
      if (o) static_cast<Operands*>(o)->result = votes;
  });
  return operands.result;
}

bool elect_one() {
  LS_HERE();
  bool ignored;
  meet_all(kElect, &ignored, "elect.sync", [](Meeting&) {});
  return current->lane == (m.options.seed + current->warp->index) % kWarp;
}

void sync_warp(uint32_t mask) {
  LS_HERE();
  meet(kSyncWarp, mask, current, "__syncwarp", [](Meeting& meeting) {
    if (!m.options.races) return;
    Gather gather;
    for (Fiber* f : meeting.lanes) {
      if (!f) continue;
      gather.add(f->time, m.timelines);
      ++f->time.epoch;
    }
    const auto [known, fenced] = gather.take();
    for (Fiber* f : meeting.lanes)
      if (f) f->time.acquire(known, fenced);
  });
}

static bool arrive_at(uint32_t id, uint32_t threads, bool waits) {
  Fiber& f = *current;
  if (id >= kBarriers) fault(say("barrier ", id, ": there are 16"));
  if (threads == 0 || threads > m.num_threads || (threads % kWarp && threads != m.num_threads))
    fault(say("barrier ", id, ": ", threads, " threads of a block of ", m.num_threads));
  Barrier& barrier = f.block->barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.lanes.assign(f.block->warps.size(), 0);
  }
  if (barrier.expected != threads)
    fault(say("barrier ", id, ": for ", threads, " threads here, for ", barrier.expected,
              " where others wait"));
  uint32_t& lanes = barrier.lanes[f.warp->index];
  if (lanes >> f.lane & 1) fault(say("barrier ", id, ": arrives twice before it completes"));
  lanes |= 1u << f.lane;
  release(barrier.gather, f.time);
  if (++barrier.arrived < barrier.expected) {
    if (waits) barrier.waiting.push_back(&f);
    return false;
  }
  for (size_t i = 0; i < barrier.lanes.size(); ++i)
    if (const uint32_t others = f.block->warps[i].existing & ~barrier.lanes[i];
        barrier.lanes[i] && others)
      fault(say("barrier ", id, ": warp ", i, " is divergent, lanes 0x", std::hex, others,
                " took no part"));
  barrier.arrived = 0;
  const auto [known, fenced] = barrier.gather.take();
  for (Fiber* waiting : barrier.waiting) {
    acquire(waiting->time, known, fenced);
    make_ready(waiting);
  }
  barrier.waiting.clear();
  if (waits) acquire(f.time, known, fenced);
  return true;
}

void barrier_sync(uint32_t id, uint32_t threads) {
  LS_HERE();
  if (!arrive_at(id, threads, true))
    block_on("named barrier ", say(id, " of ", threads, " threads"));
}

void barrier_arrive(uint32_t id, uint32_t threads) {
  LS_HERE();
  arrive_at(id, threads, false);
}

void sync_block() {
  LS_HERE();
  if (!arrive_at(0, m.num_threads, true)) block_on("__syncthreads");
}

uint32_t cluster_rank() { return current->block->rank; }
uint32_t cluster_size() { return m.cluster; }

void complete_cluster_barrier() {
  if (m.cluster_arrivals < m.cluster_expected || m.cluster_expected == 0) return;
  m.cluster_arrivals = 0;
  ++m.cluster_phase;
  std::tie(m.cluster_known, m.cluster_fenced) = m.cluster_gather.take();
  for (Fiber* f : m.cluster_waiting) {
    acquire(f->time, m.cluster_known, m.cluster_fenced);
    make_ready(f);
  }
  m.cluster_waiting.clear();
}

void cluster_arrive() {
  LS_HERE();
  require(90, "barrier.cluster");
  Fiber& f = *current;
  if (f.cluster_arrived) fault("cluster_arrive twice without cluster_wait");
  f.cluster_arrived = true;
  f.cluster_phase = m.cluster_phase;
  release(m.cluster_gather, f.time);
  ++m.cluster_arrivals;
  complete_cluster_barrier();
}

void cluster_wait() {
  LS_HERE();
  Fiber& f = *current;
  if (!f.cluster_arrived) fault("cluster_wait without cluster_arrive");
  f.cluster_arrived = false;
  if (f.cluster_phase == m.cluster_phase) {
    m.cluster_waiting.push_back(&f);
    block_on("cluster_wait");
  } else {
    acquire(f.time, m.cluster_known, m.cluster_fenced);
  }
}

void* cluster_map(const void* shared, uint32_t rank) {
  LS_HERE();
  require(90, "mapa");
  if (rank >= m.cluster) fault(say("cluster_map: rank ", rank, " of a cluster of ", m.cluster));
  const uintptr_t address = own_shared(shared, 1, "cluster_map");
  return reinterpret_cast<void*>(address + kSharedStride * rank -
                                 kSharedStride * current->block->rank);
}

}  // namespace latent_shift::host
