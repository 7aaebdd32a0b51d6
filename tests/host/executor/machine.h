// The state of the machine, and what its parts ask of each other: schedule.cpp (faults, fibers),
// memory.cpp (accesses of kernel code), lanes.cpp (warps, barriers, clusters), copies.cpp
// (asynchronous copies, mbarriers), matrices.cpp (ldmatrix, mma, wgmma), launch.cpp.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "executor.h"
#include "fiber.h"
#include "races.h"

namespace latent_shift::host {

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

extern Machine m;
extern Fiber* current;

template <class T>
T* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

// ---- schedule.cpp

template <class... Parts>
std::string say(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::string text(const uint3& v);
// The name of a timeline.
std::string who(uint32_t timeline);
// Notes what ends the launch, from where there is no fiber to stop.
void fail(const std::string& what);
[[noreturn]] void fault(const std::string& what);
[[noreturn]] void outside();
// Notes where in kernel code a function of the device was called.
#define LS_HERE() (current ? void(current->pc = __builtin_return_address(0)) : outside())

void make_ready(Fiber* f);
void block_on(const char* what, std::string detail = {});
void preempt();
void run_cluster();

// ---- memory.cpp

struct As {
  uint32_t timeline, epoch;
  bool async;
};

bool is_shared(uintptr_t address);
std::string address_text(uintptr_t address, size_t bytes);
std::string shared_text(uintptr_t address, size_t bytes);
// The first timeline of an agent.
uint32_t agent_base();
// Bounds, initialisation and order of an access to shared memory; `as` where it is on behalf of an
// agent.
void check_shared(uintptr_t address, size_t bytes, bool write, std::optional<As> as = {});
void check_global(uintptr_t address, size_t bytes, bool write);
// A shared-memory address given to an instruction that takes this block's only.
uintptr_t own_shared(const void* pointer, size_t alignment, const char* what);
void forget_buffer();

// ---- lanes.cpp

enum Kind {
  kSyncWarp = 16,
  kBallot,
  kElect,
  kLdmatrix,
  kMma,
  kWgmma,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait
};

void finish_meeting(Warp& warp, size_t which);
// Waits until every lane of the mask is here with its operands; the last one runs `finish`.
void meet(int kind, uint32_t mask, void* operands, const char* what, void (*finish)(Meeting&));
void meet_all(int kind, void* operands, const char* what, void (*finish)(Meeting&));
void complete_cluster_barrier();

inline void release(Gather& gather, Timeline& time) {
  if (!m.options.races) return;
  gather.add(time, m.timelines);
  ++time.epoch;
}

inline void acquire(Timeline& time, const Clock& known, const Clock& fenced) {
  if (m.options.races) time.acquire(known, fenced);
}

// ---- copies.cpp

// The hardware finishes the asynchronous work at this place of the queue.
void complete_async(size_t which);

}  // namespace latent_shift::host
