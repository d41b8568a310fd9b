// Enough of CUDA to run csrc/cuda/attention_pool.cuh on the host: one OS thread a CUDA thread, one block at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};

inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

using Barrier = std::barrier<>;

struct Warp {
  Barrier barrier{32};
  double slot[32];
};

inline std::unique_ptr<Barrier> block_barrier;
inline std::vector<std::unique_ptr<Warp>> warps;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

template <typename A>
A __shfl_xor_sync(unsigned, A value, int mask) {
  Warp& warp = *warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  warp.slot[lane] = static_cast<double>(value);
  warp.barrier.arrive_and_wait();
  const A other = static_cast<A>(warp.slot[lane ^ static_cast<unsigned>(mask)]);
  warp.barrier.arrive_and_wait();
  return other;
}

template <typename Kernel, typename... Args>
void launch(Kernel kernel, unsigned grid, unsigned threads, const Args&... args) {
  gridDim.x = grid;
  blockDim.x = threads;
  for (unsigned block = 0; block < grid; ++block) {
    block_barrier = std::make_unique<Barrier>(threads);
    warps.clear();
    for (unsigned warp = 0; warp < threads / 32; ++warp) warps.push_back(std::make_unique<Warp>());
    std::vector<std::thread> pool;
    for (unsigned thread = 0; thread < threads; ++thread)
      pool.emplace_back([=, &args...] {
        threadIdx.x = thread;
        blockIdx.x = block;
        kernel(args...);
      });
    for (std::thread& thread : pool) thread.join();
  }
}
