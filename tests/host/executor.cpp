// A small SIMT machine: every thread of a cluster is a fiber, a seeded scheduler runs them in random
// order and preempts them at random memory accesses, warps are 32 fibers that meet at the
// instructions that need them together. Kernels are compiled with the compiler's ThreadSanitizer
// instrumentation, whose entry points are defined here, so that every access of kernel code that can
// be to shared or global memory is checked: bounds, alignment, initialisation, races.
//
// What hardware does asynchronously is done late here: cp.async at the wait, bulk copies when
// somebody has to wait for them, wgmma at wgmma_wait. Until then the bytes or registers that they
// write are out of bounds to everybody.
#include "executor.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <unordered_map>

#include "fiber.h"
#include "races.h"

namespace latent_shift::host {
namespace {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kBarriers = 16;
constexpr uint32_t kMaxCluster = 8;
constexpr uint32_t kBarrierAgents =
    16;  // mbarriers of a block, the agents of more than that repeat
// From one block's shared memory to the next; what a block does not have of it is its guard zone.
constexpr uintptr_t kSharedStride = 256 * 1024;
// What the hardware keeps for itself at the start of a block's shared memory.
constexpr uint32_t kSharedWindow = 1024;
constexpr uint32_t kMeanAccessesBetweenPreemptions = 256;

enum ByteState : uint8_t { kUninitialised, kInitialised, kPending, kBarrierObject };

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  bool writable;
  uint32_t item;
  Cell* cells;
};

struct Fiber;

// Lanes of one warp that wait for each other at one instruction.
struct Meeting {
  int kind;
  uint32_t mask, arrived = 0;
  std::array<void*, kWarp> operands{};
  std::array<Fiber*, kWarp> lanes{};
  void (*finish)(Meeting&);
};

// The accumulator of wgmma in the registers of a warp's lanes, as 16 rows.
struct Tile {
  int n;
  std::array<float*, kWarp> registers;
  std::vector<float> values;
  int in_flight = 0;
  bool touched = false;
};

struct Wgmma {
  Element element;
  int n;
  uint64_t a, b;
  bool accumulate;
  std::shared_ptr<Tile> tile;
  uint32_t epoch;
};

struct Block;

struct Warp {
  Block* block;
  uint32_t index;         // in the block
  uint32_t existing = 0;  // lanes that have not exited
  std::vector<std::unique_ptr<Meeting>> meetings;
  // wgmma
  bool fence_seen = false;
  uint32_t agent, agent_epoch = 0;
  size_t issued = 0;
  std::vector<Wgmma> open;
  std::deque<std::vector<Wgmma>> groups;
  std::vector<std::shared_ptr<Tile>> tiles;
};

struct AsyncCopy {
  uintptr_t shared, global;
  uint32_t bytes;
  bool valid;
};

struct Fiber {
  Context context;
  std::unique_ptr<Stack> stack;
  Block* block;
  Warp* warp;
  uint32_t lane, index;  // in the warp, in the block
  uint3 thread;
  Timeline time;
  bool exited;
  const char* waits_for;
  std::string detail;
  const void* pc;
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;
  bool cluster_arrived;
  uint32_t cluster_phase;
};

struct Barrier {
  uint32_t expected = 0, arrived = 0;
  std::vector<uint32_t> lanes;  // of every warp
  std::vector<Fiber*> waiting;
  Gather gather;
};

struct Mbarrier {
  uint32_t count, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;
  bool fenced = false;  // its initialisation, for the asynchronous proxy and the cluster
  uint32_t init_timeline, init_epoch;
  uint32_t agent, agent_epoch = 0;
  Gather gather;
  Clock known, known_fenced;
  std::vector<std::pair<Fiber*, uint32_t>> waiting;
};

struct Block {
  uint3 index;
  uint32_t rank;
  uintptr_t shared;
  uint32_t live = 0;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  std::array<Barrier, kBarriers> barriers;
  std::map<uintptr_t, Mbarrier> mbarriers;
  std::vector<std::vector<Wgmma>> wgmma_log;  // of every warpgroup
  std::unordered_map<uint32_t, uint32_t>
      remote;  // timeline -> epoch of its last access from outside
  Gather exits;
};

// Something the hardware finishes in its own time: copies, then arrivals or bytes at a barrier.
struct AsyncEvent {
  Block* block;
  uintptr_t barrier;
  std::vector<AsyncCopy> copies;
  bool arrives;  // cp.async.mbarrier.arrive; else complete_tx
  Timeline by;
  uint32_t agent_epoch;
};

struct Machine {
  Options options;
  std::vector<Buffer> buffers;
  std::vector<LaunchRecord> records;
  uintptr_t image_begin = 0, image_end = 0;

  // of the launch
  std::string kernel;
  dim3 blocks, threads;
  uint32_t cluster = 1, timelines = 0, num_threads = 0;
  size_t shared = 0;
  void (*entry)(const void*) = nullptr;
  const void* params = nullptr;
  size_t param_bytes = 0;
  uint64_t accesses = 0;
  std::optional<std::string> failure;

  // of the cluster that runs
  Races races;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> cluster_blocks;
  std::vector<Fiber*> ready;
  std::vector<AsyncEvent> events;
  uint32_t cluster_arrivals = 0, cluster_expected = 0, cluster_phase = 0;
  std::vector<Fiber*> cluster_waiting;
  Gather cluster_gather;
  Clock cluster_known, cluster_fenced;

  uintptr_t shared_base = 0;
  uint8_t* states = nullptr;
  Cell* shared_cells = nullptr;
  Context scheduler;
  uint64_t random_state = 1;
  uint32_t until_preemption = 1;

  uint32_t random(uint32_t below) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>((random_state >> 32) * below >> 32);
  }
};

Machine m;
Fiber* current = nullptr;
size_t last_buffer = 0;

template <class T>
T* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

// ---- faults ------------------------------------------------------------------------------------

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

// "file:line" of the kernel code that an instruction was compiled from, as far as tools are there.
std::string source_of(const void* pc) {
  Dl_info info;
  if (!pc || !dladdr(pc, &info)) return "";
  std::ostringstream command;
  const auto offset = reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  command << "addr2line -i -e '" << info.dli_fname << "' 0x" << std::hex << offset - 1
          << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (!pipe) return "";
  std::string found;
  char line[1024];
  while (fgets(line, sizeof(line), pipe)) {
    std::string at(line, strcspn(line, " \n"));
    const bool shim =
        at.find("/host/include/") != std::string::npos || at.find("/c++/") != std::string::npos;
    if (found.empty() && !shim && at[0] != '?') found = at.substr(at.rfind('/') + 1);
  }
  pclose(pipe);
  return found;
}

std::string who(uint32_t timeline) {
  const uint32_t threads = m.num_threads * static_cast<uint32_t>(m.cluster_blocks.size());
  const uint32_t warps = (m.num_threads + kWarp - 1) / kWarp;
  const auto block = [](uint32_t rank) {
    return m.cluster == 1 ? "" : " of block " + std::to_string(rank) + " of the cluster";
  };
  if (timeline < threads) {
    const Fiber& f = *m.fibers[timeline];
    return "thread " + text(f.thread) + block(f.block->rank);
  }
  const uint32_t agent = timeline - threads, rank = agent / (warps + kBarrierAgents);
  const uint32_t slot = agent % (warps + kBarrierAgents);
  return (slot < warps ? "a wgmma of warp " + std::to_string(slot) : "a bulk copy") + block(rank);
}

void fail(const std::string& what) {
  if (!m.failure) m.failure = m.kernel + ": " + what;
}

[[noreturn]] void fault(const std::string& what) {
  Fiber& f = *current;
  const std::string source = source_of(f.pc);
  fail("block " + text(f.block->index) + ", thread " + text(f.thread) + ": " + what +
       (source.empty() ? "" : " [" + source + "]"));
  Context::swap(f.context, m.scheduler);
  __builtin_unreachable();
}

template <class... Parts>
std::string say(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

#define LS_HERE() (current ? void(current->pc = __builtin_return_address(0)) : outside())
[[noreturn]] void outside() { throw KernelError("device code was called outside a launch"); }

// ---- scheduling --------------------------------------------------------------------------------

void make_ready(Fiber* f) {
  f->waits_for = nullptr;
  m.ready.push_back(f);
}

void block_on(const char* what, std::string detail = {}) {
  Fiber& f = *current;
  f.waits_for = what;
  f.detail = std::move(detail);
  Context::swap(f.context, m.scheduler);
}

void preempt() {
  m.until_preemption = 1 + m.random(2 * kMeanAccessesBetweenPreemptions);
  m.ready.push_back(current);
  Context::swap(current->context, m.scheduler);
}

void complete_async(size_t which);

[[nodiscard]] std::string deadlock() {
  std::map<std::string, std::pair<int, const Fiber*>> groups;
  int exited = 0;
  for (const auto& f : m.fibers) {
    if (f->exited) {
      ++exited;
      continue;
    }
    auto& group = groups[std::string(f->waits_for) + f->detail + "\n" +
                         std::to_string(reinterpret_cast<uintptr_t>(f->pc))];
    if (group.first++ == 0) group.second = f.get();
  }
  std::string report = "deadlock:";
  int lines = 0;
  for (const auto& [key, group] : groups) {
    if (++lines > 8) break;
    const Fiber& f = *group.second;
    const std::string source = source_of(f.pc);
    report += say(lines > 1 ? ";" : "", " ", group.first, group.first == 1 ? " thread" : " threads",
                  " (first: block ", text(f.block->index), ", thread ", text(f.thread), ") at ",
                  f.waits_for, f.detail, source.empty() ? "" : " [" + source + "]");
  }
  return report + say("; ", exited, " exited");
}

void run_cluster() {
  // Some seeds let asynchronous work finish early, some only when nothing else can go on.
  const uint32_t eager = m.random(3);
  size_t live = m.fibers.size();
  while (live > 0) {
    const bool fire =
        !m.events.empty() && (m.ready.empty() || (eager && m.random(eager == 1 ? 8 : 256) == 0));
    if (fire) {
      complete_async(m.random(static_cast<uint32_t>(m.events.size())));
    } else if (m.ready.empty()) {
      fail(deadlock());
    } else {
      const uint32_t pick = m.random(static_cast<uint32_t>(m.ready.size()));
      current = m.ready[pick];
      m.ready[pick] = m.ready.back();
      m.ready.pop_back();
      Context::swap(m.scheduler, current->context);
      if (current->exited) --live;
      current = nullptr;
    }
    if (m.failure) throw KernelError(*m.failure);
  }
}

// ---- memory ------------------------------------------------------------------------------------

uint32_t agent_base() { return m.num_threads * static_cast<uint32_t>(m.cluster_blocks.size()); }

std::string address_text(uintptr_t address, size_t bytes) {
  return say(bytes, bytes == 1 ? " byte" : " bytes", " at 0x", std::hex, address);
}

[[noreturn]] void fault_conflict(const Conflict& conflict, bool write, const std::string& where) {
  const char* mine = write ? "write of " : "read of ";
  switch (conflict.kind) {
    case Conflict::kOtherBlockWrite:
      fault(say("race: ", mine, where, " that another block of this launch writes"));
    case Conflict::kOtherBlockRead:
      fault(say("race: ", mine, where, " that another block of this launch reads"));
    case Conflict::kProxy:
      fault(say("asynchronous ", mine, where, " written by ", who(conflict.timeline),
                " with no fence_proxy_async between"));
    default:
      fault(say("race: ", mine, where, ", unordered after the ",
                conflict.kind == Conflict::kWrite ? "write" : "read", " by ",
                who(conflict.timeline)));
  }
}

std::string shared_text(uintptr_t address, size_t bytes) {
  const uintptr_t offset = address - m.shared_base;
  const auto rank = static_cast<uint32_t>(offset / kSharedStride);
  return say(bytes, " bytes at shared memory + ", offset % kSharedStride,
             rank == current->block->rank ? "" : say(" of block ", rank, " of the cluster"));
}

struct As {
  uint32_t timeline, epoch;
  bool async;
};

// Bounds, initialisation and order of an access to shared memory; `as` where it is on behalf of an
// agent.
void check_shared(uintptr_t address, size_t bytes, bool write, std::optional<As> as = {}) {
  Fiber& f = *current;
  const uintptr_t offset = address - m.shared_base;
  const auto rank = static_cast<uint32_t>(offset / kSharedStride);
  if (rank >= m.cluster_blocks.size() || offset % kSharedStride + bytes > m.shared)
    fault(say("out of bounds: ", write ? "write of " : "read of ", shared_text(address, bytes),
              ", which has ", m.shared));
  Block& block = *m.cluster_blocks[rank];
  if (&block != f.block) {
    if (block.live == 0)
      fault(
          say(write ? "write of " : "read of ", shared_text(address, bytes), ", which has exited"));
    if (m.options.races) block.remote[f.time.id] = f.time.epoch;
  }
  uint8_t* state = m.states + offset;
  for (size_t i = 0; i < bytes; ++i) {
    if (state[i] == kInitialised || (write && state[i] == kUninitialised)) continue;
    const std::string where = shared_text(address + i, bytes - i);
    if (state[i] == kUninitialised) fault("uninitialised: read of " + where);
    if (state[i] == kPending)
      fault(say(write ? "write" : "read", " of ", where, " that an asynchronous copy is writing"));
    fault(say(write ? "write" : "read", " of ", where, ", which hold an mbarrier"));
  }
  if (m.options.races) {
    const Races::Access access{f.time,
                               as ? as->timeline : f.time.id,
                               as ? as->epoch : f.time.epoch,
                               agent_base(),
                               write,
                               as && as->async,
                               false};
    const size_t first = offset / 2, last = (offset + bytes - 1) / 2;
    const Conflict conflict = m.races.check(m.shared_cells + first, last - first + 1, access);
    if (conflict.kind != Conflict::kNone)
      fault_conflict(conflict, write, shared_text(address, bytes));
  }
  if (write) std::memset(state, kInitialised, bytes);
}

const Buffer* find_buffer(uintptr_t address) {
  auto& buffers = m.buffers;
  if (last_buffer < buffers.size() &&
      address - buffers[last_buffer].begin < buffers[last_buffer].end - buffers[last_buffer].begin)
    return &buffers[last_buffer];
  const auto next = std::upper_bound(buffers.begin(), buffers.end(), address,
                                     [](uintptr_t a, const Buffer& b) { return a < b.begin; });
  if (next == buffers.begin() || address >= (next - 1)->end) return nullptr;
  last_buffer = static_cast<size_t>(next - 1 - buffers.begin());
  return &buffers[last_buffer];
}

void check_global(uintptr_t address, size_t bytes, bool write) {
  Fiber& f = *current;
  const Buffer* buffer = find_buffer(address);
  if (!buffer || address + bytes > buffer->end) {
    if (!write && address >= m.image_begin && address + bytes <= m.image_end) return;
    const auto params = reinterpret_cast<uintptr_t>(m.params);
    if (!write && address >= params && address + bytes <= params + m.param_bytes) return;
    std::string nearest = "no registered buffer is near";
    uintptr_t best = 1 << 20;
    for (const Buffer& b : m.buffers) {
      const bool before = address < b.begin;
      const uintptr_t distance = before ? b.begin - address : address - b.end;
      if (!before && address < b.end) {
        nearest = say("they start in and end past '", b.name, "'");
        break;
      }
      if (distance >= best) continue;
      best = distance;
      nearest = say(distance, before ? " before '" : " past the end of '", b.name, "' of ",
                    b.end - b.begin, " bytes");
    }
    fault(say("out of bounds: ", write ? "write of " : "read of ", address_text(address, bytes),
              ", ", nearest));
  }
  const auto where = [&] {
    return say(bytes, " bytes at '", buffer->name, "' + ", address - buffer->begin);
  };
  if (!buffer->writable) {
    if (write) fault("write of " + where() + ", which is an input");
    return;
  }
  if (!m.options.races) return;
  const Races::Access access{f.time, f.time.id, f.time.epoch, agent_base(), write, false, true};
  const size_t first = (address - buffer->begin) / buffer->item;
  const size_t last = (address + bytes - 1 - buffer->begin) / buffer->item;
  const Conflict conflict = m.races.check(buffer->cells + first, last - first + 1, access);
  if (conflict.kind != Conflict::kNone) fault_conflict(conflict, write, where());
}

bool is_shared(uintptr_t address) { return address - m.shared_base < kSharedStride * kMaxCluster; }

void check_accumulators(uintptr_t address, size_t bytes) {
  for (const auto& tile : current->warp->tiles) {
    const auto begin = reinterpret_cast<uintptr_t>(tile->registers[current->lane]);
    if (address + bytes <= begin || address >= begin + sizeof(float) * tile->n / 2) continue;
    if (tile->in_flight) fault("access to wgmma accumulators before the wgmma_wait that ends it");
    tile->touched = true;
  }
}

// Any access of kernel code.
inline void access(const void* pointer, size_t bytes, bool write, bool aligned, const void* pc) {
  Fiber* f = current;
  if (!f) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address - f->stack->low() < kStackBytes) {
    if (!f->warp->tiles.empty()) check_accumulators(address, bytes);
    return;
  }
  f->pc = pc;
  ++m.accesses;
  if (m.options.races && --m.until_preemption == 0) preempt();
  if (aligned && address % bytes != 0)
    fault(say("misaligned: ", write ? "write of " : "read of ", address_text(address, bytes)));
  if (is_shared(address))
    check_shared(address, bytes, write);
  else
    check_global(address, bytes, write);
}

// A shared-memory address given to an instruction that takes this block's only.
uintptr_t own_shared(const void* pointer, size_t alignment, const char* what) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!is_shared(address)) fault(say(what, ": 0x", std::hex, address, " is not in shared memory"));
  if ((address - m.shared_base) / kSharedStride != current->block->rank)
    fault(say(what, ": the address is in another block's shared memory"));
  if (address % alignment) fault(say(what, ": misaligned, ", shared_text(address, alignment)));
  return address;
}

// ---- meetings of a warp's lanes ----------------------------------------------------------------

enum Kind {
  kSyncWarp = 16,
  kBallot,
  kElect,
  kLdmatrix,
  kStmatrix,
  kMma,
  kWgmma,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait
};

void finish_meeting(Warp& warp, size_t which) {
  const std::unique_ptr<Meeting> meeting = std::move(warp.meetings[which]);
  warp.meetings.erase(warp.meetings.begin() + static_cast<std::ptrdiff_t>(which));
  meeting->finish(*meeting);
  for (Fiber* f : meeting->lanes)
    if (f && f != current) make_ready(f);
}

// Waits until every lane of the mask is here with its operands; the last one runs `finish`.
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

void finish_shuffle(Meeting& meeting) {
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

}  // namespace

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

// ---- barriers ----------------------------------------------------------------------------------

namespace {

void release(Gather& gather, Timeline& time) {
  if (!m.options.races) return;
  gather.add(time, m.timelines);
  ++time.epoch;
}

void acquire(Timeline& time, const Clock& known, const Clock& fenced) {
  if (m.options.races) time.acquire(known, fenced);
}

bool arrive_at(uint32_t id, uint32_t threads, bool waits) {
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

}  // namespace

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

namespace {

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

}  // namespace

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

// ---- asynchronous copies -----------------------------------------------------------------------

namespace {

// Reads and writes of a copy are checked where it is issued; the bytes stay out of bounds until
// finish_copy.
void begin_copy(const AsyncCopy& copy, std::optional<As> as) {
  if (copy.valid) check_global(copy.global, copy.bytes, false);
  check_shared(copy.shared, copy.bytes, true, as);
  std::memset(m.states + (copy.shared - m.shared_base), kPending, copy.bytes);
}

void finish_copy(const AsyncCopy& copy) {
  auto* to = reinterpret_cast<void*>(copy.shared);
  if (copy.valid)
    std::memcpy(to, reinterpret_cast<const void*>(copy.global), copy.bytes);
  else
    std::memset(to, 0, copy.bytes);
  std::memset(m.states + (copy.shared - m.shared_base), kInitialised, copy.bytes);
}

Mbarrier& find_mbarrier(uintptr_t address, const char* what) {
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

void complete_phase(Mbarrier& barrier) {
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

}  // namespace

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

// ---- mbarriers ---------------------------------------------------------------------------------

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

void mbarrier_inval(uint64_t* address) {
  LS_HERE();
  const uintptr_t at = own_shared(address, 8, "mbarrier.inval");
  if (!find_mbarrier(at, "mbarrier.inval").waiting.empty())
    fault("mbarrier.inval: threads wait at the mbarrier");
  current->block->mbarriers.erase(at);
  std::memset(m.states + (at - m.shared_base), kUninitialised, 8);
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

// ---- matrix fragments --------------------------------------------------------------------------

namespace {

float decode(Element element, uint16_t bits) {
  if (element == Element::kBfloat16) {
    const uint32_t x = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &x, 4);
    return value;
  }
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const int exponent = i >> 10 & 31, mantissa = i & 0x3FF;
      const float magnitude =
          exponent == 31  ? (mantissa ? NAN : INFINITY)
          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                          : std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25);
      values[static_cast<size_t>(i)] = i >> 15 ? -magnitude : magnitude;
    }
    return values;
  }();
  return table[bits];
}

struct Matrices {
  uint32_t* r;
  int count;
  uintptr_t row;
  bool transpose;
};

}  // namespace

void ldmatrix(uint32_t* r, int matrices, const void* row, bool transpose) {
  LS_HERE();
  Matrices operands{r, matrices, reinterpret_cast<uintptr_t>(row), transpose};
  if (current->lane < 8u * static_cast<uint32_t>(matrices))
    check_shared(own_shared(row, 16, "ldmatrix"), 16, false);
  meet_all(kLdmatrix + 64 * matrices + transpose, &operands, "ldmatrix", [](Meeting& meeting) {
    const auto lane = [&](uint32_t i) { return static_cast<Matrices*>(meeting.operands[i]); };
    for (int matrix = 0; matrix < lane(0)->count; ++matrix) {
      uint16_t elements[8][8];
      for (uint32_t row = 0; row < 8; ++row)
        std::memcpy(elements[row],
                    reinterpret_cast<void*>(lane(8 * static_cast<uint32_t>(matrix) + row)->row),
                    16);
      for (uint32_t i = 0; i < kWarp; ++i) {
        const uint32_t row = i / 4, column = 2 * (i % 4);
        const bool t = lane(i)->transpose;
        const uint32_t low = t ? elements[column][row] : elements[row][column];
        const uint32_t high = t ? elements[column + 1][row] : elements[row][column + 1];
        lane(i)->r[matrix] = low | high << 16;
      }
    }
  });
}

void stmatrix(void* row, const uint32_t* r) {
  LS_HERE();
  require(90, "stmatrix");
  Matrices operands{const_cast<uint32_t*>(r), 4, own_shared(row, 16, "stmatrix"), false};
  check_shared(operands.row, 16, true);
  meet_all(kStmatrix, &operands, "stmatrix", [](Meeting& meeting) {
    const auto lane = [&](uint32_t i) { return static_cast<Matrices*>(meeting.operands[i]); };
    for (uint32_t matrix = 0; matrix < 4; ++matrix)
      for (uint32_t i = 0; i < kWarp; ++i)
        std::memcpy(reinterpret_cast<void*>(lane(8 * matrix + i / 4)->row + 4 * (i % 4)),
                    &lane(i)->r[matrix], 4);
  });
}

namespace {

struct MmaOperands {
  Element element;
  float* d;
  const uint32_t *a, *b;
};

void finish_mma(Meeting& meeting) {
  float a[16][16], b[16][8];
  for (uint32_t i = 0; i < kWarp; ++i) {
    const auto& o = *static_cast<MmaOperands*>(meeting.operands[i]);
    const uint32_t g = i / 4, t = 2 * (i % 4);
    for (uint32_t half = 0; half < 2; ++half) {
      const auto element = [&](uint32_t r) {
        return decode(o.element, static_cast<uint16_t>(r >> 16 * half));
      };
      for (uint32_t r = 0; r < 4; ++r)
        a[g + 8 * (r & 1)][t + half + 8 * (r >> 1)] = element(o.a[r]);
      for (uint32_t r = 0; r < 2; ++r) b[t + half + 8 * r][g] = element(o.b[r]);
    }
  }
  float d[16][8] = {};
  for (uint32_t row = 0; row < 16; ++row)
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (uint32_t i = 0; i < kWarp; ++i)
    for (uint32_t r = 0; r < 4; ++r)
      static_cast<MmaOperands*>(meeting.operands[i])->d[r] +=
          d[i / 4 + 8 * (r >> 1)][2 * (i % 4) + (r & 1)];
}

}  // namespace

void mma(Element element, float* d, const uint32_t* a, const uint32_t* b) {
  LS_HERE();
  MmaOperands operands{element, d, a, b};
  meet_all(kMma, &operands, "mma.sync", finish_mma);
}

// ---- wgmma -------------------------------------------------------------------------------------

namespace {

// The address of a core matrix row: 16 bytes of K of one row of A, or of one column of B.
struct Operand {
  uintptr_t start;
  uint32_t leading, stride;

  Operand(const Block& block, uint64_t bits) {
    const auto field = [&](int shift) {
      return static_cast<uint32_t>(bits >> shift & 0x3FFF) << 4;
    };
    start = block.shared - kSharedWindow + field(0);
    leading = field(16), stride = field(32);
  }
  uintptr_t core(uint32_t row_group, uint32_t k_chunk) const {
    return start + row_group * stride + k_chunk * leading;
  }
};

// acc[16][n] += a[16][16] b[16][n]
#if defined(__x86_64__) && defined(__GLIBC__)
__attribute__((target_clones("avx2", "default")))
#endif
void multiply(float* __restrict__ acc, const float* __restrict__ a, const float* __restrict__ b,
              int n) {
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < n; ++column)
        acc[row * n + column] += a[row * 16 + k] * b[k * n + column];
}

void compute(const Warp& warp, const Wgmma& op) {
  Tile& tile = *op.tile;
  if (!op.accumulate) std::fill(tile.values.begin(), tile.values.end(), 0.0f);
  const auto at = [&](uintptr_t address) {
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<const void*>(address), 2);
    return decode(op.element, bits);
  };
  const Operand a(*warp.block, op.a), b(*warp.block, op.b);
  float rows[16 * 16];
  std::vector<float> columns(static_cast<size_t>(16 * op.n));
  for (uint32_t row = 0; row < 16; ++row)
    for (uint32_t k = 0; k < 16; ++k)
      rows[row * 16 + k] =
          at(a.core(2 * (warp.index % 4) + row / 8, k / 8) + row % 8 * 16 + k % 8 * 2);
  const auto n = static_cast<uint32_t>(op.n);
  for (uint32_t column = 0; column < n; ++column)
    for (uint32_t k = 0; k < 16; ++k)
      columns[k * n + column] = at(b.core(column / 8, k / 8) + column % 8 * 16 + k % 8 * 2);
  multiply(tile.values.data(), rows, columns.data(), op.n);
}

// Between a tile and the registers of the lanes: d[4 j + 2 h + i] of lane l is row 8 h + l / 4,
// column 8 j + 2 (l % 4) + i.
template <class Move>
void each_register(Tile& tile, Move move) {
  for (uint32_t l = 0; l < kWarp; ++l)
    for (uint32_t r = 0; r < static_cast<uint32_t>(tile.n) / 2; ++r) {
      const uint32_t row = 8 * (r >> 1 & 1) + l / 4, column = 8 * (r / 4) + 2 * (l % 4) + (r & 1);
      move(tile.registers[l][r], tile.values[row * static_cast<uint32_t>(tile.n) + column]);
    }
}

std::shared_ptr<Tile> tile_of(Warp& warp, int n, const std::array<float*, kWarp>& registers) {
  for (const auto& tile : warp.tiles)
    if (tile->n == n && tile->registers == registers) return tile;
  auto& tiles = warp.tiles;
  for (size_t i = 0; i < tiles.size();) {
    const float *begin = tiles[i]->registers[0], *end = begin + tiles[i]->n / 2;
    if (registers[0] >= end || registers[0] + n / 2 <= begin) {
      ++i;
    } else {
      if (tiles[i]->in_flight)
        fault("wgmma: accumulates in part of the registers of one in flight");
      tiles.erase(tiles.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  tiles.push_back(std::make_shared<Tile>());
  tiles.back()->n = n;
  tiles.back()->registers = registers;
  tiles.back()->values.resize(static_cast<size_t>(16 * n));
  return tiles.back();
}

struct WgmmaOperands {
  Wgmma op;
  float* d;
};

void finish_wgmma(Meeting& meeting) {
  Warp& warp = *current->warp;
  const auto lane = [&](uint32_t i) { return static_cast<WgmmaOperands*>(meeting.operands[i]); };
  Wgmma op = lane(0)->op;
  std::array<float*, kWarp> registers;
  for (uint32_t i = 0; i < kWarp; ++i) {
    const Wgmma& other = lane(i)->op;
    if (other.a != op.a || other.b != op.b || other.accumulate != op.accumulate)
      fault("wgmma: the lanes of a warp have different descriptors");
    registers[i] = lane(i)->d;
  }
  auto& log = warp.block->wgmma_log[warp.index / 4];
  if (warp.issued == log.size()) log.push_back(op);
  const Wgmma& first = log[warp.issued++];
  if (first.a != op.a || first.b != op.b || first.n != op.n || first.accumulate != op.accumulate)
    fault("wgmma: the warps of a warpgroup have different descriptors");

  op.tile = tile_of(warp, op.n, registers);
  Tile& tile = *op.tile;
  if (!warp.fence_seen || tile.touched)
    fault("wgmma: no wgmma_fence after the last access to the accumulators");
  op.epoch = ++warp.agent_epoch;
  const As as{warp.agent, op.epoch, true};
  for (uint32_t chunk = 0; chunk < 2; ++chunk) {
    const Operand a(*warp.block, op.a), b(*warp.block, op.b);
    const auto check = [&](const char* name, const Operand& operand, uint32_t group) {
      const uintptr_t core = operand.core(group, chunk);
      if (core < warp.block->shared || core + 128 > warp.block->shared + m.shared)
        fault(say("out of bounds: wgmma descriptor of ", name, " (leading ", operand.leading,
                  ", stride ", operand.stride, ") reaches shared memory + ",
                  static_cast<int64_t>(core - warp.block->shared), ", which has ", m.shared));
      check_shared(core, 128, false, as);
    };
    for (uint32_t group = 0; group < 2; ++group) check("a", a, 2 * (warp.index % 4) + group);
    for (uint32_t group = 0; group < static_cast<uint32_t>(op.n) / 8; ++group) check("b", b, group);
  }
  if (tile.in_flight == 0) {
    if (op.accumulate) each_register(tile, [](float& r, float& value) { value = r; });
    each_register(tile, [](float& r, float&) { r = std::nanf(""); });
  }
  ++tile.in_flight;
  warp.open.push_back(std::move(op));
}

void complete_group(Warp& warp) {
  for (const Wgmma& op : warp.groups.front()) {
    compute(warp, op);
    if (--op.tile->in_flight == 0) {
      each_register(*op.tile, [](float& r, float& value) { r = value; });
      op.tile->touched = false;
    }
    if (!m.options.races) continue;
    const Clock clock = with(nullptr, m.timelines, warp.agent, op.epoch);
    for (uint32_t lane = 0; lane < kWarp; ++lane)
      warp.block->fibers[warp.index * kWarp + lane]->time.acquire(clock, nullptr);
  }
  warp.groups.pop_front();
}

void require_warpgroup(const char* what) {
  require(90, what);
  if (current->block->warps.size() < current->warp->index / 4 * 4 + 4)
    fault(say(what, ": the warp is not one of a whole warpgroup"));
}

}  // namespace

void check_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes) {
  LS_HERE();
  const auto bad = [](uint32_t bytes) { return bytes % 16 || bytes >= 1u << 18; };
  own_shared(shared, 16, "wgmma descriptor");
  if (bad(leading_bytes) || bad(stride_bytes))
    fault(say("wgmma descriptor: leading ", leading_bytes, ", stride ", stride_bytes,
              " must be multiples of 16 below 2^18"));
}

void wgmma(Element element, int n, float* d, uint64_t a, uint64_t b, bool accumulate) {
  LS_HERE();
  require_warpgroup("wgmma");
  WgmmaOperands operands{{element, n, a, b, accumulate, nullptr, 0}, d};
  meet_all(kWgmma + 64 * n, &operands, "wgmma", finish_wgmma);
}

void wgmma_fence() {
  LS_HERE();
  require_warpgroup("wgmma.fence");
  meet_all(kWgmmaFence, current, "wgmma.fence", [](Meeting&) {
    current->warp->fence_seen = true;
    for (const auto& tile : current->warp->tiles) tile->touched = false;
  });
}

void wgmma_commit() {
  LS_HERE();
  meet_all(kWgmmaCommit, current, "wgmma.commit_group", [](Meeting&) {
    Warp& warp = *current->warp;
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
  });
}

void wgmma_wait(int groups) {
  LS_HERE();
  meet_all(kWgmmaWait, &groups, "wgmma.wait_group", [](Meeting& meeting) {
    const auto keep = static_cast<size_t>(*static_cast<int*>(meeting.operands[0]));
    while (current->warp->groups.size() > keep) complete_group(*current->warp);
  });
}

// ---- launches ----------------------------------------------------------------------------------

namespace {

void exit_thread() {
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

void fiber_main() {
  while (true) {
    m.entry(m.params);
    exit_thread();
    Context::swap(current->context, m.scheduler);
  }
}

uint3 unflatten(uint64_t i, const dim3& size) {
  return {static_cast<uint32_t>(i % size.x), static_cast<uint32_t>(i / size.x % size.y),
          static_cast<uint32_t>(i / size.x / size.y)};
}

void start_cluster(uint64_t first_block) {
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
std::string kernel_name(const char* pretty) {
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
int find_image(dl_phdr_info* info, size_t, void*) {
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

}  // namespace

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
  last_buffer = 0;
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

// ---- ThreadSanitizer's entry points ------------------------------------------------------------

using latent_shift::host::access;
using latent_shift::host::current;

#define LS_ACCESS(bytes)                                                                           \
  void __tsan_read##bytes(void* p) { access(p, bytes, false, true, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { access(p, bytes, true, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                     \
    access(p, bytes, false, false, __builtin_return_address(0));                                   \
  }                                                                                                \
  void __tsan_unaligned_write##bytes(void* p) {                                                    \
    access(p, bytes, true, false, __builtin_return_address(0));                                    \
  }

extern "C" {
LS_ACCESS(1)
LS_ACCESS(2)
LS_ACCESS(4)
LS_ACCESS(8)
LS_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) {
  access(p, bytes, false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  access(p, bytes, true, false, __builtin_return_address(0));
}

// Of -fsanitize=alignment: a vector that is loaded element by element must be aligned as a whole.
void __ubsan_handle_type_mismatch_v1(const void* data, const void* pointer) {
  struct Mismatch {
    const char* file;
    uint32_t line, column;
    const struct {
      uint16_t kind, info;
      char name[1];
    }* type;
    uint8_t log_alignment, access;
  };
  if (!current) return;
  current->pc = __builtin_return_address(0);
  const auto& mismatch = *static_cast<const Mismatch*>(data);
  latent_shift::host::fault(latent_shift::host::say(
      "misaligned: access to ", mismatch.type->name, " at 0x", std::hex,
      reinterpret_cast<uintptr_t>(pointer), ", which needs an alignment of ", std::dec,
      1 << mismatch.log_alignment));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// The copies of instrumented code are renamed to these when it is built.
void* ls_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes) {
    access(from, bytes, false, false, __builtin_return_address(0));
    access(to, bytes, true, false, __builtin_return_address(0));
  }
  return std::memcpy(to, from, bytes);
}
void* ls_memmove(void* to, const void* from, size_t bytes) {
  if (bytes) {
    access(from, bytes, false, false, __builtin_return_address(0));
    access(to, bytes, true, false, __builtin_return_address(0));
  }
  return std::memmove(to, from, bytes);
}
void* ls_memset(void* to, int value, size_t bytes) {
  if (bytes) access(to, bytes, true, false, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}
}

// Host code in the same files counts references; kernels hold no atomics.
#define LS_ATOMIC(bits)                                                                            \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {               \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t v, int) {            \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t v,      \
                                                int) {                                             \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t v,     \
                                                 int) {                                            \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* p, uint##bits##_t v,     \
                                                 int) {                                            \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* e, \
                                                    uint##bits##_t v, int, int) {                  \
    return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile uint##bits##_t* p, uint##bits##_t* e,   \
                                                  uint##bits##_t v, int, int) {                    \
    return __atomic_compare_exchange_n(p, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }
extern "C" {
LS_ATOMIC(8)
LS_ATOMIC(16)
LS_ATOMIC(32)
LS_ATOMIC(64)
void __tsan_atomic_thread_fence(int) {}
}
