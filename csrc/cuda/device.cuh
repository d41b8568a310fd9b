// Device code that the CUDA kernels share: element types, packs, levels, tiles. No torch headers, so that the kernels
// also compile outside the package.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../layout.h"

namespace fbkd::cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T, typename A>
__device__ __forceinline__ T from_float(A x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ float from_float<float>(double x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ double from_float<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(double x) {
  return __double2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(double x) {
  return __double2bfloat16(x);
}

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

// Elements of 16 bytes: what a thread takes of a row.
template <typename T>
constexpr int kVec = 16 / sizeof(T);
// Elements of 4 bytes, at least one.
template <typename T>
constexpr int kWord = sizeof(T) < 4 ? 4 / sizeof(T) : 1;

// What registers hold elements in: 16-bit ones two by two, so that loads of any width give the same words.
template <typename T>
using Word = std::conditional_t<sizeof(T) == 2, unsigned, T>;

__device__ __forceinline__ float element(float word, int, float) { return word; }
__device__ __forceinline__ double element(double word, int, double) { return word; }
__device__ __forceinline__ float element(unsigned word, int half, __half) {
  return to_float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * half)));
}
__device__ __forceinline__ float element(unsigned word, int half, __nv_bfloat16) {
  return to_float(__ushort_as_bfloat16(static_cast<unsigned short>(word >> 16 * half)));
}

__device__ __forceinline__ unsigned two_bits(__half low, __half high) {
  return __half_as_ushort(low) | static_cast<unsigned>(__half_as_ushort(high)) << 16;
}
__device__ __forceinline__ unsigned two_bits(__nv_bfloat16 low, __nv_bfloat16 high) {
  return __bfloat16_as_ushort(low) | static_cast<unsigned>(__bfloat16_as_ushort(high)) << 16;
}

// VEC elements that a thread holds.
template <typename T, int VEC>
struct Pack {
  static constexpr int kInWord = sizeof(Word<T>) / sizeof(T);
  Word<T> word[VEC / kInWord];

  template <typename A>
  __device__ __forceinline__ void get(A (&values)[VEC]) const {
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[i] = element(word[i / kInWord], i % kInWord, T());
  }

  template <typename A>
  __device__ __forceinline__ void set(const A (&values)[VEC]) {
#pragma unroll
    for (int i = 0; i < VEC; i += kInWord) {
      if constexpr (kInWord == 1)
        word[i] = from_float<T>(values[i]);
      else
        word[i / 2] = two_bits(from_float<T>(values[i]), from_float<T>(values[i + 1]));
    }
  }
};

// Words that move together.
template <typename W, int COUNT>
struct alignas(COUNT * sizeof(W)) Copy {
  W word[COUNT];
};

// The first `count` elements of a pack and zeros behind them, in moves of MOVE elements or 16 bytes: the smaller.
// MOVE divides `count`, and `data` is aligned to it (see elements_per_move).
template <int MOVE, typename T, int VEC>
__device__ __forceinline__ void load_pack(Pack<T, VEC>& pack, const T* data, int count) {
  if constexpr (MOVE * sizeof(T) < 4) {
    const unsigned short* bits = reinterpret_cast<const unsigned short*>(data);
#pragma unroll
    for (int i = 0; i < VEC; i += 2) {
      const unsigned low = i < count ? bits[i] : 0, high = i + 1 < count ? bits[i + 1] : 0;
      pack.word[i / 2] = low | high << 16;
    }
  } else {
    constexpr int kElements = MOVE < kVec<T> ? MOVE : kVec<T>, kWords = kElements / Pack<T, VEC>::kInWord;
#pragma unroll
    for (int first = 0; first < VEC; first += kElements) {
      Copy<Word<T>, kWords> copy{};
      if (first < count) copy = *reinterpret_cast<const Copy<Word<T>, kWords>*>(data + first);
#pragma unroll
      for (int i = 0; i < kWords; ++i) pack.word[first / Pack<T, VEC>::kInWord + i] = copy.word[i];
    }
  }
}

template <int MOVE, typename T, int VEC>
__device__ __forceinline__ void store_pack(T* data, const Pack<T, VEC>& pack, int count) {
  if constexpr (MOVE * sizeof(T) < 4) {
    unsigned short* bits = reinterpret_cast<unsigned short*>(data);
#pragma unroll
    for (int i = 0; i < VEC; ++i)
      if (i < count) bits[i] = static_cast<unsigned short>(pack.word[i / 2] >> 16 * (i % 2));
  } else {
    constexpr int kElements = MOVE < kVec<T> ? MOVE : kVec<T>, kWords = kElements / Pack<T, VEC>::kInWord;
#pragma unroll
    for (int first = 0; first < VEC; first += kElements) {
      Copy<Word<T>, kWords> copy;
#pragma unroll
      for (int i = 0; i < kWords; ++i) copy.word[i] = pack.word[first / Pack<T, VEC>::kInWord + i];
      if (first < count) *reinterpret_cast<Copy<Word<T>, kWords>*>(data + first) = copy;
    }
  }
}

// Calls f(Move<MOVE>), the elements of a level's loads and stores as a constant: VEC, WORD or 1. The branch is outside
// of f, so that all loads of f are issued together.
template <int MOVE>
struct Move {
  static constexpr int value = MOVE;
};

template <int VEC, int WORD, typename F>
__device__ __forceinline__ void with_move(int move, F&& f) {
  if (move == VEC) {
    f(Move<VEC>());
  } else if (WORD > 1 && move == WORD) {
    f(Move<WORD>());
  } else {
    f(Move<1>());
  }
}

// COUNT packs one below another, zeros from row `rows` and column `cols` on.
template <int MOVE, typename T, int VEC, int COUNT>
__device__ __forceinline__ void load_rows(Pack<T, VEC> (&packs)[COUNT], const T* data, int64_t row_stride, int rows,
                                          int cols) {
#pragma unroll
  for (int u = 0; u < COUNT; ++u) load_pack<MOVE>(packs[u], data + u * row_stride, u < rows ? cols : 0);
}

template <int MOVE, typename T, int VEC, int COUNT>
__device__ __forceinline__ void store_rows(T* data, const Pack<T, VEC> (&packs)[COUNT], int64_t row_stride, int rows,
                                           int cols) {
#pragma unroll
  for (int u = 0; u < COUNT; ++u) store_pack<MOVE>(data + u * row_stride, packs[u], u < rows ? cols : 0);
}

// The first `count` of VEC numbers and zeros behind them; `otherwise` where there is no tensor.
template <typename A, int VEC>
__device__ __forceinline__ void load_numbers(A (&numbers)[VEC], const A* data, int count, bool packs, A otherwise) {
  Pack<A, VEC> pack;
  if (data == nullptr) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack.word[i] = otherwise;
  } else if (packs) {
    load_pack<VEC>(pack, data, count);
  } else {
    load_pack<1>(pack, data, count);
  }
  pack.get(numbers);
}

// One launch works on up to this many levels; its parameters stay below the 4 KB that every architecture takes.
constexpr int kMaxLevels = 8;

// Levels whose tiles are numbered one after the other, for the blocks of one launch.
template <typename Level, int COUNT = kMaxLevels>
struct Batch {
  Level level[COUNT];
  int64_t first_tile[COUNT];  // of a level that is absent: beyond every tile
  int64_t tiles;

  // Index of the level that a tile is of.
  __device__ __forceinline__ int find(int64_t tile) const {
    int index = 0;
#pragma unroll
    for (int i = 1; i < COUNT; ++i) index += tile >= first_tile[i];
    return index;
  }
};

// How a block's threads lie over the tiles of a matrix: 2^lane_bits side by side with kVec columns each, and the groups
// that these make below one another.
struct TileShape {
  Tiling tiling;
  int lane_bits;
};

// Where a thread works.
struct TilePosition {
  int64_t image;
  int64_t tile_row, tile_col;  // the tile among those of the image
  int64_t first_row;           // of the tile
  int64_t col;                 // first of the thread
  int tile_rows;               // of the tile; rows in it count from its first
  int cols;                    // of the thread
  int lane;                    // in its group
  int group;
  int groups;

  // Rows of the tile from `row` on, as far as they count: up to `most`.
  __device__ __forceinline__ int rows(int row, int most) const {
    const int left = tile_rows - row;
    return left < 0 ? 0 : left < most ? left : most;
  }
};

template <int VEC>
__device__ __forceinline__ TilePosition tile_position(const MatrixView& view, const TileShape& shape, int64_t tile) {
  const Tiling& tiling = shape.tiling;
  const int64_t row_of_tiles = tile / tiling.col_tiles;
  const int thread = threadIdx.x;
  TilePosition at;
  at.image = row_of_tiles / tiling.row_tiles;
  at.tile_row = row_of_tiles - at.image * tiling.row_tiles;
  at.tile_col = tile - row_of_tiles * tiling.col_tiles;
  at.first_row = at.tile_row * tiling.row_tile;
  at.tile_rows = static_cast<int>(min64(tiling.row_tile, view.rows - at.first_row));
  at.group = thread >> shape.lane_bits;
  at.groups = kThreads >> shape.lane_bits;
  at.lane = thread - (at.group << shape.lane_bits);
  at.col = at.tile_col * tiling.col_tile + at.lane * VEC;
  at.cols = static_cast<int>(max64(0, min64(VEC, view.cols - at.col)));
  return at;
}

// Adds each of the 8 values over the lanes of a group (8, 16 or 32): lane l gets the sum of values[l % 8]. Halving
// the number of values with each step takes 9 shuffles where adding one value after the other takes 40.
template <typename A>
__device__ __forceinline__ A sum_of_lane(A (&values)[8], int lane_bits) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A kept = upper ? values[i + half] : values[i];
      const A given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kFullWarp, given, half);
    }
  }
  for (int offset = 8; offset < 1 << lane_bits; offset *= 2) values[0] += __shfl_xor_sync(kFullWarp, values[0], offset);
  return values[0];
}

// One value of all of a block's values, which every thread gets. The order is fixed; `combine` is commutative.
template <typename A, typename Combine>
__device__ __forceinline__ A block_reduce(A value, A (&shared)[kWarps], Combine combine) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
  if (threadIdx.x % kLanes == 0) shared[threadIdx.x / kLanes] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared[warp]);
  __syncthreads();
  return value;
}

template <typename A>
__device__ __forceinline__ A block_sum(A value, A (&shared)[kWarps]) {
  return block_reduce(value, shared, [](A a, A b) { return a + b; });
}

}  // namespace fbkd::cuda
