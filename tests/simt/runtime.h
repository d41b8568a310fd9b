// Enough of CUDA to run a kernel's source on the CPU: include this first, then the .cuh. A block's threads are fibers
// that run one at a time until they meet a barrier or a shuffle; blocks run one after another. The compiler calls the
// runtime at every memory access (g++ -fsanitize=thread, with accesses.cpp in the place of libtsan).
//
// A driver, tests/simt/<op>.cpp:
//
//   #include "runtime.h"
//   #include "../../csrc/cuda/<op>.cuh"
//
//   extern "C" const char* <op>(const void* x, int64_t count, void* out) {
//     return simt::report([&] {
//       simt::Scratch<float> partial(count, "partial");  // like a temporary tensor: unwritten until a kernel writes it
//       launch(kernel<float>, grid, threads, static_cast<const float*>(x), partial.data(), static_cast<float*>(out));
//     });
//   }
//
// launch: grid and block as unsigned or dim3, arguments converted to the kernel's parameters; returns when the grid is
// done, throws what went wrong. report: null if nothing did, else the message. Kernels may touch the tensors that
// Library.run in build.py passes (inputs: reading only), Scratch, __shared__ variables and their own locals; a byte of
// an output, of Scratch or of __shared__ (there: by the same block) has to be written before it is read.
//
// Not here: atomics, memcpy of a size known only at run time, extern __shared__, `__shared__ alignas(16)`
// (__align__(16) works), blocks with an incomplete warp in a shuffle, textures, inline PTX, approximate intrinsics such
// as __expf. Host code in a driver: no shared_ptr, no function-local static with an initialiser (both want hooks for
// atomics).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <utility>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
// Shared variables make up the library's thread-local segment, which is how the runtime knows their addresses.
// constinit keeps g++ from guarding the first use of an array of __half.
#define __shared__ static thread_local constinit
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

using Place = std::source_location;

struct Call {
  void (*body)(const void* arguments);  // what one thread runs
  const void* arguments;
  size_t bytes;
};

void run_grid(dim3 grid, dim3 block, const Call& call);
void block_barrier(const Place& where);
void warp_barrier(unsigned mask, const Place& where);
// Replaces `value` by that of lane `source`; every lane of `mask` has to come to the same place.
void exchange(unsigned mask, void* value, size_t bytes, unsigned source, const Place& where);
unsigned lane();
const char* run_driver(void (*body)(const void*), const void* of);

void* allocate(size_t bytes, const char* name);
void release(void* memory);

// Device memory that belongs to the driver.
template <typename T>
class Scratch {
 public:
  Scratch(size_t count, const char* name) : data_(static_cast<T*>(allocate(count * sizeof(T), name))) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(data_); }
  T* data() const { return data_; }

 private:
  T* data_;
};

template <typename Body>
const char* report(const Body& body) {
  return run_driver([](const void* of) { (*static_cast<const Body*>(of))(); }, &body);
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, int width, const Place& where) {
  const unsigned last = lane() | (width - 1);
  exchange(mask, &value, sizeof(T), source <= last ? source : lane(), where);
  return value;
}

}  // namespace simt

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Arguments&... arguments) {
  using Invocation = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Invocation invocation(kernel, std::tuple<Parameters...>(arguments...));
  const auto body = [](const void* of) {
    const auto& [function, parameters] = *static_cast<const Invocation*>(of);
    std::apply(function, parameters);
  };
  simt::run_grid(grid, block, {body, &invocation, sizeof(Invocation)});
}

inline void __syncthreads(simt::Place where = simt::Place::current()) { simt::block_barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Place where = simt::Place::current()) {
  simt::warp_barrier(mask, where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Place where = simt::Place::current()) {
  return simt::shuffle(mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)), width, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, simt::Place where = simt::Place::current()) {
  return simt::shuffle(mask, value, simt::lane() ^ flip, width, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Place where = simt::Place::current()) {
  return simt::shuffle(mask, value, simt::lane() + delta, width, where);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
