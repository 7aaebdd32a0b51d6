// Every access of kernel code, by way of ThreadSanitizer's entry points: bounds, alignment,
// initialisation, races.
#include "machine.h"

namespace latent_shift::host {

static size_t last_buffer = 0;

void forget_buffer() { last_buffer = 0; }

uint32_t agent_base() { return m.num_threads * static_cast<uint32_t>(m.cluster_blocks.size()); }

std::string address_text(uintptr_t address, size_t bytes) {
  return say(bytes, bytes == 1 ? " byte" : " bytes", " at 0x", std::hex, address);
}

[[noreturn]] static void fault_conflict(const Conflict& conflict, bool write,
                                        const std::string& where) {
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

void check_shared(uintptr_t address, size_t bytes, bool write, std::optional<As> as) {
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

static const Buffer* find_buffer(uintptr_t address) {
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

static void check_accumulators(uintptr_t address, size_t bytes) {
  for (const auto& tile : current->warp->tiles) {
    const auto begin = reinterpret_cast<uintptr_t>(tile->registers[current->lane]);
    if (address + bytes <= begin || address >= begin + sizeof(float) * tile->n / 2) continue;
    if (tile->in_flight) fault("access to wgmma accumulators before the wgmma_wait that ends it");
    tile->touched = true;
  }
}

// Any access of kernel code.
static inline void access(const void* pointer, size_t bytes, bool write, bool aligned,
                          const void* pc) {
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

uintptr_t own_shared(const void* pointer, size_t alignment, const char* what) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!is_shared(address)) fault(say(what, ": 0x", std::hex, address, " is not in shared memory"));
  if ((address - m.shared_base) / kSharedStride != current->block->rank)
    fault(say(what, ": the address is in another block's shared memory"));
  if (address % alignment) fault(say(what, ": misaligned, ", shared_text(address, alignment)));
  return address;
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
