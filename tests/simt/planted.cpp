// A sum over each row by one block: as it should be, and with one bug at a time.
#include "runtime.h"

namespace {

// In the order of BUGS in tests/test_simt.py.
enum Bug {
  kNone,
  kNoBarrier,        // the first warp reads the others' sums before they are there
  kEarlyWrite,       // shared memory is written again while thread 0 still reads it
  kUnwritten,        // reads a place in shared memory that nobody writes
  kReadPastEnd,      // one element past the input
  kReadBefore,       // one element before the input
  kWritePastEnd,     // one element past the output
  kWriteInput,       // writes what is only for reading
  kNullPointer,      //
  kSharedIndex,      // one element past a shared array
  kLocalIndex,       // one element past a thread's own array
  kMisaligned,       // a 16-byte load from 4 bytes past a multiple of 16
  kBranchBarrier,    // half of the block returns before __syncthreads
  kTwoBarriers,      // the halves of the block are at different __syncthreads
  kBarrierShuffle,   // one lane is in __syncthreads, the others of its warp in a shuffle
  kLaneGone,         // one lane returns before a shuffle that waits for it
  kTwoShuffles,      // the halves of a warp are in different shuffles
  kMasksDisagree,    // lanes of one shuffle have different masks
  kForeignLane,      // takes the value of a lane outside the mask
  kBlocksCollide,    // every block writes the same element
  kUnwrittenOutput,  // the last block writes nothing
  kDivideByZero,     //
  kStackOverflow,    //
};

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

struct alignas(16) Four {
  float value[4];
};

__device__ int endless(int depth) {
  volatile int large[1024];
  large[depth % 1024] = depth;
  return endless(depth + 1) + large[0];
}

// The sum of the thread's four elements.
template <Bug BUG>
__device__ __forceinline__ float load(const float* row) {
  const int thread = threadIdx.x;
  if (BUG == kReadPastEnd && thread == kThreads - 1) return row[thread * 4 + 4];
  if (BUG == kReadBefore && blockIdx.x == 0 && thread == 0) return row[-1];
  if (BUG == kNullPointer) row = nullptr;
  if (BUG == kMisaligned && thread == 3) ++row;
  const Four four = *reinterpret_cast<const Four*>(row + thread * 4);
  float sum = BUG == kStackOverflow ? endless(thread) : 0.0f;
  if (BUG == kDivideByZero && thread == 7) sum += thread / blockIdx.y;
  for (int i = 0; i < 4 + (BUG == kLocalIndex && thread == 5); ++i) sum += four.value[i];
  return sum;
}

template <Bug BUG>
__device__ __forceinline__ float warp_sum(float sum) {
  const int lane = threadIdx.x % 32;
  if (BUG == kTwoShuffles && lane < 16) return __shfl_sync(kAll, sum, 0);
  if (BUG == kMasksDisagree) return __shfl_sync(lane % 2 == 0 ? kAll >> 1 : kAll, sum, 0);
  if (BUG == kForeignLane) return __shfl_sync(lane < 16 ? 0x0000ffffu : 0xffff0000u, sum, 3);
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

template <Bug BUG>
__global__ void block_sum(const float* __restrict__ x,  // (blocks, 512)
                          float* __restrict__ sums) {   // (blocks,)
  __shared__ float shared[2 * kWarps];
  const int thread = threadIdx.x, warp = thread / 32;
  float sum = load<BUG>(x + int64_t(blockIdx.x) * kThreads * 4);
  if (BUG == kLaneGone && thread == 40) return;
  if (BUG == kBarrierShuffle && thread == 40) __syncthreads();
  sum = warp_sum<BUG>(sum);
  if (thread % 32 == 0) shared[BUG == kSharedIndex && warp == 2 ? 2 * kWarps : warp] = sum;

  if (BUG == kBranchBarrier && thread >= kThreads / 2) return;
  if (BUG == kTwoBarriers && thread >= kThreads / 2)
    __syncthreads();
  else if (BUG != kNoBarrier)
    __syncthreads();

  if (BUG == kEarlyWrite && thread == 64) shared[1] = 0.0f;
  if (BUG == kWriteInput) const_cast<float*>(x)[thread] = 0.0f;
  if (BUG == kUnwrittenOutput && blockIdx.x == gridDim.x - 1) return;
  if (thread != 0) return;
  const int first = BUG == kUnwritten ? 1 : 0;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += shared[first + w];
  sums[BUG == kBlocksCollide ? 0 : blockIdx.x + (BUG == kWritePastEnd)] = total;
}

template <Bug BUG = kNone>
void launch_with(int64_t bug, unsigned blocks, const float* x, float* sums) {
  if (bug == BUG) return launch(block_sum<BUG>, blocks, kThreads, x, sums);
  if constexpr (BUG < kStackOverflow) launch_with<Bug(BUG + 1)>(bug, blocks, x, sums);
}

// Every lane takes its left neighbour's number out of shared memory.
template <bool SYNC>
__global__ void shift(int* out) {  // (64,)
  __shared__ int shared[64];
  const int thread = threadIdx.x;
  shared[thread] = thread;
  if (SYNC) __syncwarp();
  out[thread] = shared[thread % 32 == 0 ? thread : thread - 1];
}

enum Barrier { kAbsent, kOfWarp, kOfBlock };

// Shared memory is read by many and then written again: each warp's element by the warp's own last lane, or the first
// warp's by the last thread of the block.
template <Barrier BARRIER>
__global__ void reuse(bool own, int* out) {  // (64,)
  __shared__ int shared[2];
  const int thread = threadIdx.x, warp = thread / 32;
  if (thread % 32 == 0) shared[warp] = warp;
  __syncthreads();
  out[thread] = shared[own ? warp : 0];
  if (BARRIER == kOfWarp) __syncwarp();
  if (BARRIER == kOfBlock) __syncthreads();
  if (own ? thread % 32 == 31 : thread == 63) shared[own ? warp : 0] = -1;
}

template <typename T>
__global__ void copy(const T* from, T* to) {
  to[threadIdx.x] = from[threadIdx.x];
}

__global__ void set_to_zero(int* out) { *out = 0; }

// Its accesses go unseen: only the order of threads can show the race.
__attribute__((no_sanitize("thread"))) __global__ void unseen_race(int* last) { *last = threadIdx.x; }

}  // namespace

extern "C" const char* row_sums(int64_t bug, int64_t blocks, const float* x, float* sums) {
  return simt::report([&] { launch_with(bug, blocks, x, sums); });
}

extern "C" const char* shifted(bool sync, int* out) {
  return simt::report([&] { launch(sync ? shift<true> : shift<false>, 1, 64, out); });
}

extern "C" const char* reused(int64_t barrier, bool own, int* out) {
  const auto kernel = barrier == kAbsent ? reuse<kAbsent> : barrier == kOfWarp ? reuse<kOfWarp> : reuse<kOfBlock>;
  return simt::report([&] { launch(kernel, 1, 64, own, out); });
}

extern "C" const char* through_scratch(bool fill, const double* x, double* out) {
  return simt::report([&] {
    simt::Scratch<double> scratch(32, "scratch");
    if (fill) launch(copy<double>, 1, 32, x, scratch.data());
    launch(copy<double>, 1, 32, scratch.data(), out);
  });
}

extern "C" const char* last_thread(int* last) {
  return simt::report([&] {
    launch(set_to_zero, 1, 1, last);
    launch(unseen_race, 1, 64, last);
  });
}

extern "C" const char* crash_outside_kernels(int*) {
  return simt::report([&] { *static_cast<volatile int*>(nullptr) = 0; });
}
