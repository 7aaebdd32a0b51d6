// A small SIMT machine: every thread of a cluster is a fiber, a seeded scheduler runs them in random
// order and preempts them at random memory accesses, warps are 32 fibers that meet at the
// instructions that need them together. Kernels are compiled with the compiler's ThreadSanitizer
// instrumentation, whose entry points are defined here, so that every access of kernel code that can
// be to shared or global memory is checked: bounds, alignment, initialisation, races.
//
// What hardware does asynchronously is done late here: cp.async at the wait, bulk copies when
// somebody has to wait for them, wgmma at wgmma_wait. Until then the bytes or registers that they
// write are out of bounds to everybody.
#include "machine.h"

#include <dlfcn.h>

#include <cstdio>

namespace latent_shift::host {

Machine m;
Fiber* current = nullptr;

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

// "file:line" of the kernel code that an instruction was compiled from, as far as tools are there.
static std::string source_of(const void* pc) {
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

[[noreturn]] void outside() { throw KernelError("device code was called outside a launch"); }

void make_ready(Fiber* f) {
  f->waits_for = nullptr;
  m.ready.push_back(f);
}

void block_on(const char* what, std::string detail) {
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

[[nodiscard]] static std::string deadlock() {
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

}  // namespace latent_shift::host
