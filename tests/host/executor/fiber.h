// Fibers: a stack and a saved stack pointer, switched by hand where that is a dozen instructions.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace latent_shift::host {

constexpr size_t kStackBytes = 256 * 1024;

// A stack with an unmapped page below it, committed as it is touched.
class Stack {
 public:
  Stack() {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = kStackBytes + page;
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_, page, PROT_NONE);
    low_ = reinterpret_cast<uintptr_t>(base_) + page;
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(base_, bytes_); }
  uintptr_t low() const { return low_; }

 private:
  void* base_;
  size_t bytes_;
  uintptr_t low_;
};

#ifdef __x86_64__

// Pushes the callee-saved registers, stores the stack pointer, and goes on where `to` left off.
extern "C" void ls_switch_stack(void** from, void* to);

struct Context {
  void* stack_pointer = nullptr;

  void start(const Stack& stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack.low() + kStackBytes - 64);
    *--top = nullptr;  // entry never returns; keeps its frame 16-byte aligned
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
  }
  static void swap(Context& from, Context& to) {
    ls_switch_stack(&from.stack_pointer, to.stack_pointer);
  }
};

#else

struct Context {
  ucontext_t context;

  void start(const Stack& stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = reinterpret_cast<void*>(stack.low());
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

}  // namespace latent_shift::host
