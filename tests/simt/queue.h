// The Queue of csrc/cuda/plan.h for drivers: it runs each kernel at once, in at most `most_blocks` blocks.
#pragma once

#include "runtime.h"

#include <algorithm>
#include <vector>

#include "../../csrc/cuda/device.cuh"

class Queue {
 public:
  explicit Queue(int64_t most_blocks) : most_blocks_(most_blocks) {}
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  ~Queue() {
    for (void* memory : scratch_) simt::release(memory);
  }

  template <typename A>
  A* scratch(int64_t count) {
    scratch_.push_back(simt::allocate(count * sizeof(A), "scratch"));
    return static_cast<A*>(scratch_.back());
  }

  template <typename Parameters>
  void launch(void (*kernel)(Parameters), int64_t blocks, const Parameters& parameters) {
    const unsigned grid = std::min(blocks, most_blocks_);
    ::launch(kernel, grid, static_cast<unsigned>(fbkd::cuda::kThreads), parameters);
  }

 private:
  int64_t most_blocks_;
  std::vector<void*> scratch_;
};

template <typename T>
struct Type {
  using type = T;
};

// Element types as the tests number them.
template <typename F>
void with_type(int64_t type, F&& f) {
  if (type == 0) f(Type<float>());
  if (type == 1) f(Type<double>());
  if (type == 2) f(Type<__half>());
  if (type == 3) f(Type<__nv_bfloat16>());
}

template <typename... T>
using Accumulator = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;
