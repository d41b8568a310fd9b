// Device code of the attention pool, and its launches. No torch headers.
#pragma once

#include "../attention_pool.h"
#include "device.cuh"
#include "plan.h"

namespace fbkd::cuda {

// Rows of a thread, one 16-byte load each, which are in flight together. Gradients write as much as they read, so that
// half as many loads fill the memory's pipes.
constexpr int kSumRows = 4;
constexpr int kGradientRows = 2;
// Steps of a tile's threads down the tile, at most. More would leave no fewer partial sums to speak of.
constexpr int kSumSteps = 16;
constexpr int kGradientSteps = 8;
// Blocks of a multiprocessor: four leave each thread 64 registers, enough for those loads and the sums beside them.
constexpr int kSumBlocks = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kGradientBlocks = 3;  // Turing's code for 16-bit maps takes some more
#else
constexpr int kGradientBlocks = 4;
#endif
// The second stage deals the tiles to up to 32 groups of a block's threads, four tiles or more each.
constexpr int kMostGroupBits = 5;
constexpr int64_t kTilesOfGroup = 4;

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

  // One of the two sums.
  __device__ __forceinline__ void put(int64_t image, int64_t tile, int64_t index, bool plain, A sum) const {
    if (partial != nullptr) {
      Sums<A>& sums = partial[(image * tiles + tile) * length + index];
      *(plain ? &sums.plain : &sums.abs) = sum;
    } else {
      (plain ? mean_plain : mean_abs)[image * length + index] = sum / count;
    }
  }

  __device__ __forceinline__ void put_mean(int64_t index, const Sums<A>& sums) const {
    mean_abs[index] = sums.abs / count;
    mean_plain[index] = sums.plain / count;
  }
};

template <typename A>
struct SumLevel {
  MatrixView view;
  TileShape shape;
  const void* x;  // (images, rows, cols)
  Destination<A> by_row, by_col;
  int move;
};

// Row sums of a tile, and each thread's share of the sums of its columns.
template <typename T, typename A, int VEC>
__device__ __forceinline__ void sum_rows(const SumLevel<A>& level, const TilePosition& at, Sums<A> (&total)[VEC]) {
  const int64_t stride = level.view.row_stride;
  const T* columns =
      static_cast<const T*>(level.x) + at.image * level.view.image_stride + at.first_row * stride + at.col;
  // Every lane stays to the end: the shuffles need them all.
  for (int step = 0; step < at.tile_rows; step += at.groups * kSumRows) {
    const int row = step + at.group * kSumRows;
    const int rows = at.rows(row, kSumRows);
    Pack<T, VEC> packs[kSumRows];
    with_move<VEC, kWord<T>>(level.move, [&](auto move) {
      load_rows<decltype(move)::value>(packs, columns + row * stride, stride, rows, at.cols);
    });
    A sums[2 * kSumRows];  // row by row: abs, plain
#pragma unroll
    for (int u = 0; u < kSumRows; ++u) {
      A values[VEC];
      packs[u].get(values);
      Sums<A> row_sums{A(0), A(0)};
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const Sums<A> both{magnitude(values[i]), values[i]};
        add(row_sums, both);
        add(total[i], both);
      }
      sums[2 * u] = row_sums.abs, sums[2 * u + 1] = row_sums.plain;
    }
    const A sum = sum_of_lane(sums, level.shape.lane_bits);
    if (at.lane < 2 * rows)
      level.by_row.put(at.image, at.tile_col, at.first_row + row + at.lane / 2, at.lane % 2 != 0, sum);
  }
}

template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, kSumBlocks)
    attention_pool_sums(const __grid_constant__ Batch<SumLevel<A>> batch) {
  constexpr int VEC = kVec<T>;
  // Threads' sums of their i-th columns side by side, in rows that keep both the writing and the reading threads of a
  // warp on different banks.
  constexpr int kPitch = kThreads + 128 / sizeof(Sums<A>) / VEC;
  static_assert(VEC << kMaxLaneBits <= kThreads, "one thread for each column of a tile");
  __shared__ Sums<A> shared[VEC * kPitch];
  const int thread = threadIdx.x;
  for (int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int index = batch.find(tile);
    const SumLevel<A>& level = batch.level[index];
    const TilePosition at = tile_position<VEC>(level.view, level.shape, tile - batch.first_tile[index]);
    Sums<A> total[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) total[i] = {A(0), A(0)};
    sum_rows<T>(level, at, total);

#pragma unroll
    for (int i = 0; i < VEC; ++i) shared[i * kPitch + thread] = total[i];
    __syncthreads();
    const int lanes = 1 << level.shape.lane_bits;
    const int64_t col = at.tile_col * level.shape.tiling.col_tile + thread;
    if (thread < VEC * lanes && col < level.view.cols) {
      const Sums<A>* column = shared + thread % VEC * kPitch + thread / VEC;
      Sums<A> sums{A(0), A(0)};
      for (int group = 0; group < at.groups; group += kWarps)
#pragma unroll
        for (int i = 0; i < kWarps; ++i) add(sums, column[(group + i) * lanes]);
      level.by_col.put(at.image, at.tile_row, col, sums);
    }
    __syncthreads();
  }
}

template <typename A>
struct FinishLevel {
  Destination<A> to;
  int64_t outputs;  // images * length
  int group_bits;
};

// Adds the partial sums of every tile and divides. A block's groups of threads share the tiles of each of its outputs.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    attention_pool_finish(const __grid_constant__ Batch<FinishLevel<A>, 2 * kMaxLevels> batch) {
  __shared__ Sums<A> shared[kThreads];
  const int thread = threadIdx.x;
  for (int64_t block = blockIdx.x; block < batch.tiles; block += gridDim.x) {
    const int entry = batch.find(block);
    const FinishLevel<A>& level = batch.level[entry];
    const Destination<A>& to = level.to;
    const int groups = 1 << level.group_bits, width = kThreads >> level.group_bits;
    const int group = thread / width;
    const int64_t output = (block - batch.first_tile[entry]) * width + thread % width;
    Sums<A> sums{A(0), A(0)};
    if (output < level.outputs) {
      const int64_t image = output / to.length, length = to.length;
      const Sums<A>* partial = to.partial + image * to.tiles * length + (output - image * length);
#pragma unroll 4
      for (int64_t tile = group; tile < to.tiles; tile += groups) add(sums, partial[tile * length]);
    }
    shared[thread] = sums;
    for (int half = groups / 2; half > 0; half /= 2) {
      __syncthreads();
      if (group < half) {
        add(sums, shared[thread + half * width]);
        shared[thread] = sums;
      }
    }
    if (group == 0 && output < level.outputs) to.put_mean(output, sums);
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
  bool packs;

  // The same from an element on.
  __device__ __forceinline__ Source from(int64_t image, int64_t index) const {
    const int64_t at = image * length + index;
    return {abs == nullptr ? nullptr : abs + at, plain == nullptr ? nullptr : plain + at, length, scale, packs};
  }

  __device__ __forceinline__ Sums<A> get(int index) const {
    return {abs == nullptr ? A(0) : abs[index] * scale, plain == nullptr ? A(0) : plain[index] * scale};
  }

  template <int VEC>
  __device__ __forceinline__ void get(Sums<A> (&grads)[VEC], int count) const {
    A of_abs[VEC], of_plain[VEC];
    load_numbers(of_abs, abs, count, packs, A(0));
    load_numbers(of_plain, plain, count, packs, A(0));
#pragma unroll
    for (int i = 0; i < VEC; ++i) grads[i] = {of_abs[i] * scale, of_plain[i] * scale};
  }
};

template <typename A>
struct GradientLevel {
  MatrixView view;
  TileShape shape;
  const void* x;  // (images, rows, cols), nullptr: no gradient depends on it
  void* dx;       // (images, rows, cols), dense
  Source<A> by_row, by_col;
  int move;  // of both x and dx
};

// dx = sign(x) * (row abs + column abs) + row plain + column plain.
template <typename T, typename A>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    attention_pool_gradient(const __grid_constant__ Batch<GradientLevel<A>> batch) {
  constexpr int VEC = kVec<T>;
  for (int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int index = batch.find(tile);
    const GradientLevel<A>& level = batch.level[index];
    const MatrixView& view = level.view;
    const TilePosition at = tile_position<VEC>(view, level.shape, tile - batch.first_tile[index]);
    const int64_t corner = at.image * view.image_stride + at.first_row * view.row_stride + at.col;
    const T* x = static_cast<const T*>(level.x) + corner;
    T* dx = static_cast<T*>(level.dx) + (at.image * view.rows + at.first_row) * view.cols + at.col;
    const Source<A> row_grads = level.by_row.from(at.image, at.first_row);
    Sums<A> col_grads[VEC];
    level.by_col.from(at.image, at.col).get(col_grads, at.cols);
    for (int row = at.group * kGradientRows; row < at.tile_rows; row += at.groups * kGradientRows) {
      const int rows = at.rows(row, kGradientRows);
      Pack<T, VEC> packs[kGradientRows]{};
      if (level.x != nullptr) {
        with_move<VEC, kWord<T>>(level.move, [&](auto move) {
          load_rows<decltype(move)::value>(packs, x + row * view.row_stride, view.row_stride, rows, at.cols);
        });
      }
#pragma unroll
      for (int u = 0; u < kGradientRows; ++u) {
        const Sums<A> row_grad = u < rows ? row_grads.get(row + u) : Sums<A>{A(0), A(0)};
        A values[VEC];
        packs[u].get(values);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const A abs = row_grad.abs + col_grads[i].abs, plain = row_grad.plain + col_grads[i].plain;
          values[i] = input_gradient<A>(values[i], abs, plain);
        }
        packs[u].set(values);
      }
      with_move<VEC, kWord<T>>(level.move, [&](auto move) {
        store_rows<decltype(move)::value>(dx + row * view.cols, packs, view.cols, rows, at.cols);
      });
    }
  }
}

// Sums of one direction of a level. Partial sums go to `partial`, which moves on behind them.
template <typename A, typename Finish>
Destination<A> destination(void* abs, void* plain, int64_t images, int64_t tiles, int64_t length, int64_t count,
                           Sums<A>*& partial, Finish& finish) {
  Destination<A> to{nullptr, static_cast<A*>(abs), static_cast<A*>(plain), tiles, length, static_cast<A>(count)};
  if (tiles == 1) return to;
  to.partial = partial;
  partial += images * tiles * length;
  int group_bits = 0;
  while (group_bits < kMostGroupBits && tiles > kTilesOfGroup << group_bits) ++group_bits;
  add_level(finish, {to, images * length, group_bits}, ceil_div(images * length, kThreads >> group_bits));
  return to;
}

// Partial sums of a level.
inline int64_t partial_sums(const MatrixView& view, const Tiling& tiling) {
  const int64_t of_rows = tiling.col_tiles > 1 ? tiling.col_tiles * view.rows : 0;
  const int64_t of_cols = tiling.row_tiles > 1 ? tiling.row_tiles * view.cols : 0;
  return view.images * (of_rows + of_cols);
}

// The means of levels of T. Of a level it takes: view, x and means (by direction).
template <typename T, typename A, typename Level, typename Queue>
void launch_attention_pool_forward(const std::vector<Level>& levels, Queue& queue) {
  const auto shape_of = [](const Level& level) { return tile_shape<kVec<T>, kSumRows>(level.view, kSumSteps); };
  in_batches(levels, [&](const Level* first, const Level* last) {
    int64_t count = 0;
    for (const Level* level = first; level != last; ++level)
      count += partial_sums(level->view, shape_of(*level).tiling);
    Sums<A>* partial = count > 0 ? reinterpret_cast<Sums<A>*>(queue.template scratch<A>(2 * count)) : nullptr;
    auto sums = empty_batch<SumLevel<A>>();
    auto finish = empty_batch<FinishLevel<A>, 2 * kMaxLevels>();
    for (const Level* level = first; level != last; ++level) {
      const MatrixView& view = level->view;
      const TileShape shape = shape_of(*level);
      const auto& means = level->means;
      const Destination<A> by_row = destination(means.row_abs, means.row_plain, view.images, shape.tiling.col_tiles,
                                                view.rows, view.cols, partial, finish);
      const Destination<A> by_col = destination(means.col_abs, means.col_plain, view.images, shape.tiling.row_tiles,
                                                view.cols, view.rows, partial, finish);
      const int move = elements_per_move<T>([&](int move) { return movable<T>(level->x, view, move); });
      add_level(sums, {view, shape, level->x, by_row, by_col, move}, tiles_of(view, shape.tiling));
    }
    queue.launch(attention_pool_sums<T, A>, sums.tiles, sums);
    if (finish.tiles > 0) queue.launch(attention_pool_finish<A>, finish.tiles, finish);
  });
}

template <typename A>
Source<A> source(const void* abs, const void* plain, int64_t length, int64_t count, int vec) {
  return {static_cast<const A*>(abs), static_cast<const A*>(plain), length, A(1) / static_cast<A>(count),
          numbers_aligned(abs, length, vec) && numbers_aligned(plain, length, vec)};
}

// The gradients of levels of T. Of a level it takes: view, x, dx and grads (by direction).
template <typename T, typename A, typename Level, typename Queue>
void launch_attention_pool_backward(const std::vector<Level>& levels, Queue& queue) {
  in_batches(levels, [&](const Level* first, const Level* last) {
    auto batch = empty_batch<GradientLevel<A>>();
    for (const Level* level = first; level != last; ++level) {
      const MatrixView& view = level->view;
      const auto& grads = level->grads;
      const TileShape shape = tile_shape<kVec<T>, kGradientRows>(view, kGradientSteps);
      const int move = elements_per_move<T>([&](int move) {
        return movable<T>(level->dx, gradient_view(view), move) &&
               (level->x == nullptr || movable<T>(level->x, view, move));
      });
      add_level(batch,
                {view, shape, level->x, level->dx, source<A>(grads.row_abs, grads.row_plain, view.rows, view.cols, 1),
                 source<A>(grads.col_abs, grads.col_plain, view.cols, view.rows, kVec<T>), move},
                tiles_of(view, shape.tiling));
    }
    queue.launch(attention_pool_gradient<T, A>, batch.tiles, batch);
  });
}

}  // namespace fbkd::cuda
