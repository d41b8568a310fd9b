// Device code of the attention pool. No torch headers, so that it also compiles outside the package.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../attention_pool.h"

namespace fbkd::cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
// Three blocks leave each thread 80 registers; with four (64 registers) the compiler spills.
constexpr int kBlocksPerMultiprocessor = 3;
constexpr unsigned kFullWarp = 0xffffffffu;
// Forward: 16 columns a lane (8 in float64: the same shared memory), in 16-byte loads where alignment allows.
template <typename A>
constexpr int kLaneCols = 64 / sizeof(A);
template <typename A>
constexpr int kColTile = kLanes * kLaneCols<A>;
// Backward: rows of a tile, 8 a warp.
constexpr int kGradientRows = 64;
// From this many tiles on, the second stage adds them in 16 groups side by side.
constexpr int kFinishGroups = 16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T, typename A>
__device__ __forceinline__ T from_float(A x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ double from_float<double>(double x) { return x; }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

// VEC elements that move together; VEC * sizeof(T) is 16 bytes, or VEC is 1.
template <typename T, int VEC>
struct alignas(VEC * sizeof(T)) Pack {
  T value[VEC];
};

template <typename A>
struct alignas(2 * sizeof(A)) Sums {
  A abs;
  A plain;
};

template <typename A>
__device__ __forceinline__ void add(Sums<A>& to, const Sums<A>& from) {
  to.abs += from.abs;
  to.plain += from.plain;
}

// Where one direction's sums of a tile go: means at once if there is one tile, partial sums otherwise.
template <typename A>
struct Destination {
  Sums<A>* partial;  // (images, tiles, length), nullptr for a single tile
  A* mean_abs;       // (images, length)
  A* mean_plain;     // (images, length)
  int64_t tiles;
  int64_t length;
  A count;  // elements of each mean

  __device__ __forceinline__ void put(int64_t image, int64_t tile, int64_t index, const Sums<A>& sums) const {
    if (partial != nullptr)
      partial[(image * tiles + tile) * length + index] = sums;
    else
      put_mean(image * length + index, sums);
  }

  __device__ __forceinline__ void put_mean(int64_t index, const Sums<A>& sums) const {
    mean_abs[index] = sums.abs / count;
    mean_plain[index] = sums.plain / count;
  }
};

struct TileIndex {
  int64_t image;
  int64_t row;
  int64_t col;
};

__device__ __forceinline__ TileIndex tile_index(int64_t tile, const Tiling& tiling) {
  const int64_t row_of_tiles = tile / tiling.col_tiles;
  return {row_of_tiles / tiling.row_tiles, row_of_tiles % tiling.row_tiles, tile % tiling.col_tiles};
}

// The pack at column `col` of a row; zeros beyond the last column.
template <typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> load_pack(const T* row, int64_t col, int64_t cols) {
  if (col + VEC <= cols) return *reinterpret_cast<const Pack<T, VEC>*>(row + col);
  Pack<T, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.value[i] = col + i < cols ? row[col + i] : from_float<T>(decltype(to_float(T()))(0));
  return pack;
}

template <typename A>
__device__ __forceinline__ Sums<A> warp_sum(Sums<A> sums) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sums.abs += __shfl_xor_sync(kFullWarp, sums.abs, offset);
    sums.plain += __shfl_xor_sync(kFullWarp, sums.plain, offset);
  }
  return sums;
}

// One tile's row sums and column sums. Warp w takes rows w, w + 8, ...; lane l of a warp takes, in each chunk of
// 32 * VEC columns, the VEC columns from l * VEC on.
template <typename T, typename A, int VEC>
__device__ __forceinline__ void sum_tile(const T* image,  // (rows, cols)
                                         const MatrixView& view, const Tiling& tiling, const TileIndex& at,
                                         const Destination<A>& by_row, Sums<A> (&total)[kLaneCols<A>]) {
  constexpr int kChunks = kLaneCols<A> / VEC;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t first_col = at.col * tiling.col_tile + lane * VEC;
  const int64_t last_row = min64(view.rows, (at.row + 1) * tiling.row_tile);
  for (int64_t row = at.row * tiling.row_tile + warp; row < last_row; row += kWarps) {
    const T* data = image + row * view.row_stride;
    Pack<T, VEC> packs[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      packs[chunk] = load_pack<T, VEC>(data, first_col + chunk * kLanes * VEC, view.cols);
    Sums<A> row_sums{A(0), A(0)};
#pragma unroll
    for (int i = 0; i < kLaneCols<A>; ++i) {
      const A value = to_float(packs[i / VEC].value[i % VEC]);
      const Sums<A> sums{magnitude(value), value};
      add(row_sums, sums);
      add(total[i], sums);
    }
    row_sums = warp_sum(row_sums);
    if (lane == 0) by_row.put(at.image, at.col, row, row_sums);
  }
}

template <typename T, typename A, int VEC>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    attention_pool_sums(const T* __restrict__ x,  // (images, rows, cols)
                        MatrixView view, Tiling tiling, Destination<A> by_row, Destination<A> by_col) {
  __shared__ Sums<A> shared[kWarps][kColTile<A>];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t tiles = tiles_of(view, tiling);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const TileIndex at = tile_index(tile, tiling);
    Sums<A> total[kLaneCols<A>];
#pragma unroll
    for (int i = 0; i < kLaneCols<A>; ++i) total[i] = {A(0), A(0)};
    sum_tile<T, A, VEC>(x + at.image * view.image_stride, view, tiling, at, by_row, total);

#pragma unroll
    for (int i = 0; i < kLaneCols<A>; ++i) shared[warp][(i / VEC * kLanes + lane) * VEC + i % VEC] = total[i];
    __syncthreads();
    for (int i = threadIdx.x; i < kColTile<A>; i += kThreads) {
      const int64_t col = at.col * tiling.col_tile + i;
      Sums<A> sums = shared[0][i];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) add(sums, shared[w][i]);
      if (col < view.cols) by_col.put(at.image, at.row, col, sums);
    }
    __syncthreads();
  }
}

// Adds the partial sums of every tile and divides: 32 outputs a block, tiles dealt to GROUPS groups of threads.
template <typename A, int GROUPS>
__global__ void __launch_bounds__(kLanes * GROUPS) attention_pool_finish(Destination<A> to, int64_t images) {
  __shared__ Sums<A> shared[GROUPS][kLanes];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t outputs = images * to.length;
  for (int64_t first = int64_t(blockIdx.x) * kLanes; first < outputs; first += int64_t(gridDim.x) * kLanes) {
    const int64_t output = first + lane;
    Sums<A> sums{A(0), A(0)};
    if (output < outputs) {
      const int64_t image = output / to.length, index = output % to.length;
      const Sums<A>* partial = to.partial + image * to.tiles * to.length + index;
#pragma unroll 4
      for (int64_t tile = group; tile < to.tiles; tile += GROUPS) add(sums, partial[tile * to.length]);
    }
    shared[group][lane] = sums;
    __syncthreads();
    if (group == 0 && output < outputs) {
#pragma unroll
      for (int g = 1; g < GROUPS; ++g) add(sums, shared[g][lane]);
      to.put_mean(output, sums);
    }
    __syncthreads();
  }
}

// Gradients of one direction's means, nullptr where absent, and 1 / the elements of each mean.
template <typename A>
struct Source {
  const A* abs;    // (images, length)
  const A* plain;  // (images, length)
  int64_t length;
  A scale;

  __device__ __forceinline__ Sums<A> get(int64_t image, int64_t index) const {
    const int64_t at = image * length + index;
    return {abs == nullptr ? A(0) : abs[at] * scale, plain == nullptr ? A(0) : plain[at] * scale};
  }
};

// dx = sign(x) * (row abs + column abs) + row plain + column plain. x is not read unless READ.
template <typename T, typename A, int VEC, bool READ>
__global__ void __launch_bounds__(kThreads) attention_pool_gradient(const T* __restrict__ x,  // (images, rows, cols)
                                                                    T* __restrict__ dx,       // (images, rows, cols)
                                                                    MatrixView from, MatrixView to, Tiling tiling,
                                                                    Source<A> by_row, Source<A> by_col) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t tiles = tiles_of(from, tiling);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const TileIndex at = tile_index(tile, tiling);
    const int64_t col = at.col * tiling.col_tile + lane * VEC;
    const int64_t last_row = min64(from.rows, (at.row + 1) * tiling.row_tile);
    Sums<A> col_grad[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      col_grad[i] = col + i < from.cols ? by_col.get(at.image, col + i) : Sums<A>{A(0), A(0)};
#pragma unroll 2
    for (int64_t row = at.row * tiling.row_tile + warp; row < last_row; row += kWarps) {
      if (col >= from.cols) break;
      const Sums<A> row_grad = by_row.get(at.image, row);
      Pack<T, VEC> in{}, out;
      if (READ) in = load_pack<T, VEC>(x + at.image * from.image_stride + row * from.row_stride, col, from.cols);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const A plain = row_grad.plain + col_grad[i].plain;
        const A abs = row_grad.abs + col_grad[i].abs;
        out.value[i] = from_float<T>(READ ? input_gradient<A>(to_float(in.value[i]), abs, plain) : plain);
      }
      // A pack crosses the last column only where VEC does not divide it, and then the launcher takes VEC = 1.
      *reinterpret_cast<Pack<T, VEC>*>(dx + at.image * to.image_stride + row * to.row_stride + col) = out;
    }
  }
}

}  // namespace fbkd::cuda
