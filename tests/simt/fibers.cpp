// Fibers, their scheduler, barriers and shuffles.
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread* current;
Call call;
uint32_t tick = 1, launch_tick, block_tick;
std::vector<uint16_t> warp_ticks;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kGuard = 64 << 10;  // below each stack, a multiple of the page: nothing may be touched

std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch
unsigned block_size;
jmp_buf scheduler, driver;
std::string error;
unsigned order;
std::mt19937 random_source;

std::string block_name() {
  const auto& [x, y, z] = blockIdx;
  return y + z == 0 ? number("block", x) : number("block", x) + "," + std::to_string(y) + "," + std::to_string(z);
}

std::string place(const Place& where) { return simt::place(where.file_name(), where.line()); }

// A crash of a kernel or of a driver's host code becomes an error like the others; what they own leaks.
void crash(int signal, siginfo_t* info, void*) {
  const std::string what = "crash: " + std::string(strsignal(signal));
  if (current != nullptr && signal == SIGFPE) fail_in_thread(what + " at " + code_name(code_at(info->si_addr)));
  if (current != nullptr) fail_in_thread(what + ", perhaps a stack overflow");
  error = what + " in the driver";
  _longjmp(driver, 1);
}

class CaughtSignals {
 public:
  CaughtSignals() {
    static std::vector<char> memory(64 << 10);
    stack_t stack{};
    stack.ss_sp = memory.data();
    stack.ss_size = memory.size();
    sigaltstack(&stack, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = crash;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~CaughtSignals() {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction before_[3];
  stack_t stack_before_;
};

void fiber() {
  for (;;) {
    call.body(call.arguments);
    current->state = State::kReturned;
    if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
  }
}

void suspend(State state, const Place& where) {
  current->state = state;
  current->where = where;
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

void start(Thread& thread) {
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = reinterpret_cast<void*>(thread.stack);
  thread.start.uc_stack.ss_size = kStack;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, fiber, 0);
  setcontext(&thread.start);
}

void resume(Thread& thread) {
  current = &thread;
  const unsigned id = thread.id;
  threadIdx = {id % blockDim.x, id / blockDim.x % blockDim.y, id / blockDim.x / blockDim.y};
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.context, 1);
    start(thread);
  }
  current = nullptr;
  if (!error.empty()) throw std::runtime_error(error);
}

void add_thread() {
  auto thread = std::make_unique<Thread>();
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kGuard, PROT_NONE) != 0)
    throw std::runtime_error("no memory for a thread's stack");
  thread->stack = reinterpret_cast<uintptr_t>(stack);
  thread->id = threads.size();
  threads.push_back(std::move(thread));
}

std::vector<unsigned> permutation(unsigned count) {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  if (order == 1) std::reverse(result.begin(), result.end());
  if (order > 1) std::shuffle(result.begin(), result.end(), random_source);
  return result;
}

Thread& lane_of(const Thread& thread, unsigned lane) { return *threads[thread.id / kLanes * kLanes + lane]; }

template <typename Function>
void for_lanes(const Thread& thread, Function function) {
  for (unsigned lane = 0; lane < kLanes; ++lane)
    if (thread.mask >> lane & 1) function(lane_of(thread, lane));
}

std::string doing(const Thread& thread) {
  const std::string name = number("thread", thread.id);
  if (thread.state == State::kReturned) return name + " has returned";
  return name + (thread.state == State::kBarrier ? " is in __syncthreads at " : " is in a shuffle or __syncwarp at ") +
         place(thread.where);
}

bool together(const Place& a, const Place& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// A thread that waits in a shuffle waits in vain if a lane has returned, or has come with another mask.
void check_shuffle(const Thread& thread, bool masks) {
  for_lanes(thread, [&](const Thread& other) {
    if (other.state == State::kReturned)
      fail(block_name() + ": shuffle with a missing lane: " + doing(thread) + " for " + number("thread", other.id) +
           ", which has returned");
    if (masks && other.mask != thread.mask)
      fail(block_name() + ": deadlock: " + doing(thread) + ", " + doing(other) + " with another mask");
  });
}

// No thread can go on. Either all have come to one __syncthreads, or something is wrong.
void pass_barrier() {
  const Thread* waiting = nullptr;
  for (unsigned i = 0; i < block_size; ++i) {
    if (threads[i]->state == State::kWarp) check_shuffle(*threads[i], false);
    if (threads[i]->state == State::kBarrier && waiting == nullptr) waiting = threads[i].get();
  }
  for (unsigned i = 0; i < block_size; ++i) {
    Thread& thread = *threads[i];
    if (waiting == nullptr && thread.state == State::kWarp) check_shuffle(thread, true);
    if (waiting != nullptr && (thread.state != State::kBarrier || !together(thread.where, waiting->where)))
      fail(block_name() + ": divergent barrier: " + doing(*waiting) + " while " + doing(thread));
  }
  for (unsigned i = 0; i < block_size; ++i) threads[i]->state = State::kReady;
  ++tick;
  std::fill(warp_ticks.begin(), warp_ticks.end(), 0);
}

void run_block() {
  block_tick = ++tick;
  warp_ticks.assign((block_size + kLanes - 1) / kLanes, 0);
  for (unsigned i = 0; i < block_size; ++i) threads[i]->state = State::kReady;
  for (unsigned returned = 0; returned < block_size;) {
    bool moved = false;
    for (unsigned i : permutation(block_size)) {
      if (threads[i]->state != State::kReady) continue;
      resume(*threads[i]);
      moved = true;
      returned += threads[i]->state == State::kReturned;
    }
    if (!moved) pass_barrier();
  }
}

// Where a thread waits for the lanes of `mask`. The last to come hands out the values and lets the others go.
void meet(unsigned mask, const Place& where) {
  Thread& me = *current;
  const unsigned warp = me.id / kLanes, lanes = std::min(kLanes, block_size - warp * kLanes);
  if (!(mask >> me.id % kLanes & 1)) fail_in_thread("its lane is not in its own mask, at " + place(where));
  if (lanes < kLanes && mask >> lanes != 0) fail_in_thread("names lanes that the block lacks, at " + place(where));
  me.mask = mask;
  me.where = where;
  bool all = true;
  for_lanes(me, [&](const Thread& other) {
    all = all && (&other == &me || (other.state == State::kWarp && other.mask == mask));
  });
  if (!all) return suspend(State::kWarp, where);
  for_lanes(me, [&](Thread& other) {
    if (!together(other.where, where) || other.bytes != me.bytes)
      fail_in_thread("divergent shuffle: it is at " + place(where) + " while " + doing(other));
    std::memcpy(other.received, lane_of(other, other.source).given, me.bytes);
    other.state = State::kReady;
  });
  if (me.bytes == 0 && mask == ~0u) ++warp_ticks[warp];
}

}  // namespace

std::string number(const char* what, size_t value) { return what + (" " + std::to_string(value)); }

std::string place(const char* file, unsigned line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

void fail(const std::string& what) {
  error = what;
  if (current != nullptr) _longjmp(scheduler, 1);
  throw std::runtime_error(error);
}

void fail_in_thread(const std::string& what) {
  fail(block_name() + ", " + number("thread", current->id) + ": " + what);
}

unsigned lane() { return current->id % kLanes; }

void run_grid(dim3 grid, dim3 block, const Call& of) {
  error.clear();
  block_size = block.x * block.y * block.z;
  if (size_t(grid.x) * grid.y * grid.z == 0 || block_size == 0 || block_size > kMaxThreads)
    fail("a launch needs at least one block, and blocks of 1 to 1024 threads");
  find_segments();
  while (threads.size() < block_size) add_thread();
  call = of;
  gridDim = grid;
  blockDim = block;
  launch_tick = ++tick;
  try {
    for (unsigned i : permutation(grid.x * grid.y * grid.z)) {
      blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      run_block();
    }
  } catch (...) {
    for (auto& thread : threads) thread->started = false;  // some are in the middle of a kernel
    throw;
  }
}

void block_barrier(const Place& where) { suspend(State::kBarrier, where); }

void warp_barrier(unsigned mask, const Place& where) {
  current->bytes = 0;
  current->source = lane();
  meet(mask, where);
}

void exchange(unsigned mask, void* value, size_t bytes, unsigned source, const Place& where) {
  if (bytes > sizeof(current->given)) fail_in_thread("a shuffle of more than 16 bytes");
  if (!(mask >> source & 1)) fail_in_thread("shuffles from a lane that is not in the mask, at " + place(where));
  current->bytes = bytes;
  current->source = source;
  std::memcpy(current->given, value, bytes);
  meet(mask, where);
  std::memcpy(value, current->received, bytes);
}

const char* run_driver(void (*body)(const void*), const void* of) {
  static std::string message;
  const CaughtSignals caught;
  if (_setjmp(driver) == 0) {
    try {
      body(of);
      return nullptr;
    } catch (const std::exception& exception) {
      error = exception.what();
    }
  }
  message = error;
  return message.c_str();
}

}  // namespace simt

// For build.py. Order of threads and blocks: 0 as numbered, 1 reversed, else random, newly drawn whenever threads wait.
extern "C" void simt_order(unsigned value) {
  simt::order = value;
  simt::random_source.seed(value);
}
