// Device code of the attention masks, and its launches. No torch headers.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace fbkd::cuda {

// Elements of a thread in a tile: few, because the maps are small and there should be enough blocks all the same.
constexpr int kMaskElements = 8;
constexpr int kMaskTile = kMaskElements * kThreads;
// Two blocks of a multiprocessor leave each thread 128 registers: exponentials in float64 want more than 64.
constexpr int kMaskBlocks = 2;

// The element type of a map. Maps are small, so that a branch at each load costs nothing.
enum class MapType : int { kFloat, kDouble, kHalf, kBFloat16 };

struct Map {
  const void* data;  // (images, length)
  MapType type;

  __device__ __forceinline__ double at(int64_t index) const {
    switch (type) {
      case MapType::kDouble:
        return static_cast<const double*>(data)[index];
      case MapType::kHalf:
        return to_float(static_cast<const __half*>(data)[index]);
      case MapType::kBFloat16:
        return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
      default:
        return static_cast<const float*>(data)[index];
    }
  }
};

// A maximum, and the sum of exponentials of what is below it.
struct Peak {
  double maximum;
  double sum;
};

template <typename A>
struct SoftmaxLevel {
  Map student, teacher;  // student.data is nullptr: the teacher's map alone
  A* mask;               // (images, length)
  Peak* peaks;           // (softmaxes, images, tiles)
  int64_t images, length;
  int64_t tiles;  // of an image
  double temperature, inverse_temperature;
  bool joint;

  // The student's and the teacher's, or one.
  __device__ __forceinline__ int softmaxes() const { return student.data != nullptr && !joint ? 2 : 1; }

  // What a softmax is taken of. In float64, which keeps the digits of differences of large float32 activations.
  __device__ __forceinline__ double value(int softmax, int64_t index) const {
    double x;
    if (student.data != nullptr && joint)
      x = student.at(index) + teacher.at(index);
    else
      x = softmax == softmaxes() - 1 ? teacher.at(index) : student.at(index);
    // float64 divides as the reference does; float32 has digits to spare for the faster product.
    return sizeof(A) == sizeof(double) ? x / temperature : x * inverse_temperature;
  }

  __device__ __forceinline__ Peak& peak(int softmax, int64_t image, int64_t tile) const {
    return peaks[(softmax * images + image) * tiles + tile];
  }
};

__device__ __forceinline__ float exponential(double x, float) { return expf(static_cast<float>(x)); }
__device__ __forceinline__ double exponential(double x, double) { return exp(x); }

// NaN wins.
__device__ __forceinline__ double larger(double a, double b) { return a > b || a != a ? a : b; }

__device__ __forceinline__ double block_maximum(double value, double (&shared)[kWarps]) {
  return block_reduce(value, shared, [](double a, double b) { return larger(a, b); });
}

// The tile's place: its level is known.
struct MaskPosition {
  int64_t image, tile;
  int64_t first;  // element of the image that is the thread's first; the next is kThreads further
  int count;

  template <typename A>
  __device__ __forceinline__ MaskPosition(const SoftmaxLevel<A>& level, int64_t tile_of_level)
      : image(tile_of_level / level.tiles),
        tile(tile_of_level - image * level.tiles),
        first(tile * kMaskTile + threadIdx.x),
        count(static_cast<int>(max64(0, min64(kMaskElements, ceil_div(level.length - first, int64_t(kThreads)))))) {}
};

// Each tile's maximum and sum of exponentials.
template <typename A>
__global__ void __launch_bounds__(kThreads, kMaskBlocks)
    attention_mask_peaks(const __grid_constant__ Batch<SoftmaxLevel<A>> batch) {
  __shared__ double of_warps[kWarps];
  const double infinity = INFINITY;
  for (int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int index = batch.find(tile);
    const SoftmaxLevel<A>& level = batch.level[index];
    const MaskPosition at(level, tile - batch.first_tile[index]);
    const int64_t first = at.image * level.length + at.first;
    for (int softmax = 0; softmax < level.softmaxes(); ++softmax) {
      double values[kMaskElements], maximum = -infinity, sum = 0;
#pragma unroll
      for (int i = 0; i < kMaskElements; ++i)
        values[i] = i < at.count ? level.value(softmax, first + i * kThreads) : -infinity;
#pragma unroll
      for (int i = 0; i < kMaskElements; ++i) maximum = larger(maximum, values[i]);
      maximum = block_maximum(maximum, of_warps);
      // Where all is -infinity the sum stays 0: another tile of the row may have more.
#pragma unroll
      for (int i = 0; i < kMaskElements; ++i)
        if (i < at.count && maximum != -infinity) sum += exponential(values[i] - maximum, A());
      sum = block_sum(sum, of_warps);
      if (threadIdx.x == 0) level.peak(softmax, at.image, at.tile) = {maximum, sum};
    }
  }
}

// The masks, from the peaks of all of a row's tiles, which each block adds in the same order.
template <typename A>
__global__ void __launch_bounds__(kThreads, kMaskBlocks)
    attention_mask_values(const __grid_constant__ Batch<SoftmaxLevel<A>> batch) {
  __shared__ double of_warps[kWarps];
  const double infinity = INFINITY;
  for (int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int index = batch.find(tile);
    const SoftmaxLevel<A>& level = batch.level[index];
    const MaskPosition at(level, tile - batch.first_tile[index]);
    const int64_t first = at.image * level.length + at.first;
    double masks[kMaskElements];
#pragma unroll
    for (int i = 0; i < kMaskElements; ++i) masks[i] = 0;
    for (int softmax = 0; softmax < level.softmaxes(); ++softmax) {
      const Peak* peaks = &level.peak(softmax, at.image, 0);
      double maximum = -infinity, sum = 0;
      for (int64_t i = threadIdx.x; i < level.tiles; i += kThreads) maximum = larger(maximum, peaks[i].maximum);
      maximum = block_maximum(maximum, of_warps);
      for (int64_t i = threadIdx.x; i < level.tiles; i += kThreads)
        sum += peaks[i].sum * exponential(peaks[i].maximum - maximum, A());
      sum = block_sum(sum, of_warps);
      const double scale = static_cast<double>(level.length) / (level.softmaxes() * sum);
#pragma unroll
      for (int i = 0; i < kMaskElements; ++i)
        if (i < at.count) masks[i] += exponential(level.value(softmax, first + i * kThreads) - maximum, A()) * scale;
    }
#pragma unroll
    for (int i = 0; i < kMaskElements; ++i)
      if (i < at.count) level.mask[first + i * kThreads] = static_cast<A>(masks[i]);
  }
}

// The masks of levels that accumulate in A. Of a level it takes: images, length, student, teacher, mask, temperature
// and joint, and map_type(level, of_student).
template <typename A, typename Level, typename TypeOf, typename Queue>
void launch_attention_masks(const std::vector<Level>& levels, TypeOf&& map_type, Queue& queue) {
  in_batches(levels, [&](const Level* first, const Level* last) {
    auto batch = empty_batch<SoftmaxLevel<A>>();
    int64_t count = 0;
    for (const Level* level = first; level != last; ++level) {
      const int64_t tiles = ceil_div(level->length, kMaskTile);
      SoftmaxLevel<A> next{{level->student, map_type(*level, true)},
                           {level->teacher, map_type(*level, false)},
                           static_cast<A*>(level->mask),
                           nullptr,
                           level->images,
                           level->length,
                           tiles,
                           level->temperature,
                           1 / level->temperature,
                           level->joint};
      count += 2 * level->images * tiles;
      add_level(batch, next, level->images * tiles);
    }
    Peak* peaks = reinterpret_cast<Peak*>(queue.template scratch<double>(2 * count));
    for (int slot = 0; slot < last - first; ++slot) batch.level[slot].peaks = peaks + 2 * batch.first_tile[slot];
    queue.launch(attention_mask_peaks<A>, batch.tiles, batch);
    queue.launch(attention_mask_values<A>, batch.tiles, batch);
  });
}

}  // namespace fbkd::cuda
