// What fibers.cpp and accesses.cpp share: the block that runs, and how a check ends a launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <string>
#include <vector>

#include "runtime.h"

namespace simt {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 256 << 10;

enum class State { kReady, kBarrier, kWarp, kReturned };

struct Thread {
  unsigned id;
  State state;
  Place where;                   // of the barrier or the shuffle that it waits in
  unsigned mask, source, bytes;  // of the shuffle; no bytes: __syncwarp
  unsigned char given[16], received[16];
  uintptr_t stack;
  bool started;
  ucontext_t start;
  jmp_buf context;
};

extern Thread* current;  // null in host code
extern Call call;
// Launches, blocks and block barriers so far, and what that was when the present launch and block began.
extern uint32_t tick, launch_tick, block_tick;
extern std::vector<uint16_t> warp_ticks;  // of each warp: full __syncwarp since the last block barrier

std::string number(const char* what, size_t value);
std::string place(const char* file, unsigned line);

// Ends the launch. In a thread of a kernel: run_grid throws the message once back on its own stack.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_in_thread(const std::string& what);

// Address of an instruction as an offset in the library, and the name in whose place build.py puts file and line.
uint32_t code_at(const void* instruction);
std::string code_name(uint32_t code);

// Where shared memory is in this thread of the operating system.
void find_segments();

}  // namespace simt
