#include "fiber.h"

#ifdef __x86_64__

asm(R"(
  .text
  .globl ls_switch_stack
  .hidden ls_switch_stack
  .type ls_switch_stack, @function
ls_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size ls_switch_stack, .-ls_switch_stack
)");

#endif
