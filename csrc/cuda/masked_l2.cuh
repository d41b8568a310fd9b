// Device code of the masked squared distance, and its launches. No torch headers.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace fbkd::cuda {

// Rows of a thread: with a load of each map for each, as many bytes are in flight as in the attention pool.
constexpr int kDistanceRows = 2;
// Steps of a tile's threads down the tile, at most: a thread adds up to 32 rows of one pack, its block 256 threads.
constexpr int kDistanceSteps = 16;
// Blocks of a multiprocessor: three leave each thread 80 registers. Values in float64 would spill there.
template <typename A>
constexpr int kDistanceBlocks = sizeof(A) == 8 ? 2 : 3;

template <typename A>
struct DistanceLevel {
  MatrixView student, teacher;  // the same rows and columns
  TileShape shape;
  const void* s;      // (images, rows, cols)
  const void* t;      // (images, rows, cols)
  const A* row_mask;  // (images, rows), nullptr: ones
  const A* col_mask;  // (images, cols), nullptr: ones
  A* partial;         // forward: (tiles,)
  void* ds;           // backward: (images, rows, cols), dense
  const void* grad;   // backward: the number that the level's sum gets
  int move;           // of s and ds, and of t unless it is transposed
  bool mask_packs;
  bool grad_is_double;
};

// Values of a step's rows and a tile's columns, in rows with one more column: threads that write down a column and
// those that read along a row use different banks.
template <typename S, bool TRANSPOSED>
constexpr int kTransposedValues =
    TRANSPOSED ? kDistanceRows * kThreads * kVec<S> + kDistanceRows * (kThreads >> kMinLaneBits) : 1;

// The teacher's values at a step where its layout is not the student's: neighbouring threads read along its columns,
// which is where its memory is contiguous, and shared memory turns them.
template <typename T, typename A, int VEC>
__device__ __forceinline__ void load_transposed(A (&values)[kDistanceRows][VEC], A* shared,
                                                const DistanceLevel<A>& level, const TilePosition& at, int step) {
  constexpr int kInFlight = 16 / sizeof(A);
  const int rows = at.groups * kDistanceRows, width = kThreads / rows;  // both powers of two
  const int pitch = static_cast<int>(level.shape.tiling.col_tile) + 1;
  const int row = threadIdx.x % rows, col = threadIdx.x / rows;
  const int64_t first_col = at.tile_col * level.shape.tiling.col_tile, stride = level.teacher.col_stride;
  const int cols = row < at.rows(step, rows) ? static_cast<int>(min64(pitch, level.student.cols - first_col)) : 0;
  const T* from = static_cast<const T*>(level.t) + at.image * level.teacher.image_stride +
                  (at.first_row + step + row) * level.teacher.row_stride + first_col * stride;
  A* to = shared + row * pitch;
  __syncthreads();
#pragma unroll kInFlight
  for (int k = 0; k < kDistanceRows * VEC; ++k) {
    const int at_col = col + k * width;
    to[at_col] = at_col < cols ? A(to_float(from[at_col * stride])) : A(0);
  }
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kDistanceRows; ++u)
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[u][i] = shared[(at.group * kDistanceRows + u) * pitch + at.lane * VEC + i];
}

// Calls visit(row, rows, s, t) for each of a thread's steps through a tile: its first row, how many there are up to
// kDistanceRows, and what is there, with zeros beyond the last row and column.
template <typename S, typename T, bool TRANSPOSED, typename A, typename Visit>
__device__ __forceinline__ void visit_tile(const DistanceLevel<A>& level, const TilePosition& at, A* shared,
                                           Visit&& visit) {
  constexpr int VEC = kVec<S>;
  const int64_t s_stride = level.student.row_stride, t_stride = level.teacher.row_stride;
  const S* s =
      static_cast<const S*>(level.s) + at.image * level.student.image_stride + at.first_row * s_stride + at.col;
  const T* t =
      static_cast<const T*>(level.t) + at.image * level.teacher.image_stride + at.first_row * t_stride + at.col;
  // All threads stay to the end: load_transposed has barriers.
  for (int step = 0; step < at.tile_rows; step += at.groups * kDistanceRows) {
    const int row = step + at.group * kDistanceRows;
    const int rows = at.rows(row, kDistanceRows);
    Pack<S, VEC> student[kDistanceRows];
    A teacher[kDistanceRows][VEC];
    with_move<VEC, kWord<S>>(level.move, [&](auto move) {
      load_rows<decltype(move)::value>(student, s + row * s_stride, s_stride, rows, at.cols);
      if constexpr (!TRANSPOSED) {
        Pack<T, VEC> packs[kDistanceRows];
        load_rows<decltype(move)::value>(packs, t + row * t_stride, t_stride, rows, at.cols);
#pragma unroll
        for (int u = 0; u < kDistanceRows; ++u) packs[u].get(teacher[u]);
      }
    });
    if constexpr (TRANSPOSED) load_transposed<T>(teacher, shared, level, at, step);
    visit(row, rows, student, teacher);
  }
}

template <typename A, int VEC>
__device__ __forceinline__ void load_col_mask(A (&mask)[VEC], const DistanceLevel<A>& level, const TilePosition& at) {
  const A* from = level.col_mask == nullptr ? nullptr : level.col_mask + at.image * level.student.cols + at.col;
  load_numbers(mask, from, at.cols, level.mask_packs, A(1));
}

// Returns the mask of the tile's rows, or nullptr for all ones.
template <typename A>
__device__ __forceinline__ const A* row_mask_of(const DistanceLevel<A>& level, const TilePosition& at) {
  return level.row_mask == nullptr ? nullptr : level.row_mask + at.image * level.student.rows + at.first_row;
}

// Each tile's sum of row mask * column mask * (S - T)^2.
template <typename S, typename T, typename A, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, kDistanceBlocks<A>)
    masked_l2_sums(const __grid_constant__ Batch<DistanceLevel<A>> batch) {
  constexpr int VEC = kVec<S>;
  __shared__ A transposed[kTransposedValues<S, TRANSPOSED>];
  __shared__ A of_warps[kWarps];
  for (int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int index = batch.find(tile);
    const DistanceLevel<A>& level = batch.level[index];
    const int64_t tile_of_level = tile - batch.first_tile[index];
    const TilePosition at = tile_position<VEC>(level.student, level.shape, tile_of_level);
    A col_mask[VEC];
    load_col_mask(col_mask, level, at);
    const A* row_mask = row_mask_of(level, at);
    A total = A(0);
    visit_tile<S, T, TRANSPOSED>(level, at, transposed,
                                 [&](int row, int rows, const auto& student, const auto& teacher) {
#pragma unroll
                                   for (int u = 0; u < kDistanceRows; ++u) {
                                     A values[VEC], sum = A(0);
                                     student[u].get(values);
#pragma unroll
                                     for (int i = 0; i < VEC; ++i) {
                                       const A difference = values[i] - teacher[u][i];
                                       sum += col_mask[i] * (difference * difference);
                                     }
                                     if (u < rows) total += row_mask == nullptr ? sum : row_mask[row + u] * sum;
                                   }
                                 });
    total = block_sum(total, of_warps);
    if (threadIdx.x == 0) level.partial[tile_of_level] = total;
  }
}

template <typename A>
struct DistanceFinishLevel {
  const A* partial;  // (tiles,)
  int64_t tiles;
  void* square;
  bool square_is_double;
};

// One block a level adds the sums of its tiles.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    masked_l2_finish(const __grid_constant__ Batch<DistanceFinishLevel<A>> batch) {
  __shared__ double of_warps[kWarps];
  for (int64_t block = blockIdx.x; block < batch.tiles; block += gridDim.x) {
    const DistanceFinishLevel<A>& level = batch.level[batch.find(block)];
    double sum = 0;
#pragma unroll 4
    for (int64_t tile = threadIdx.x; tile < level.tiles; tile += kThreads) sum += level.partial[tile];
    sum = block_sum(sum, of_warps);
    if (threadIdx.x != 0) continue;
    if (level.square_is_double)
      *static_cast<double*>(level.square) = sum;
    else
      *static_cast<float*>(level.square) = static_cast<float>(sum);
  }
}

// dS = 2 * grad * row mask * column mask * (S - T).
template <typename S, typename T, typename A, bool TRANSPOSED>
__global__ void __launch_bounds__(kThreads, kDistanceBlocks<A>)
    masked_l2_gradient(const __grid_constant__ Batch<DistanceLevel<A>> batch) {
  constexpr int VEC = kVec<S>;
  __shared__ A transposed[kTransposedValues<S, TRANSPOSED>];
  for (int64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    const int index = batch.find(tile);
    const DistanceLevel<A>& level = batch.level[index];
    const MatrixView& view = level.student;
    const TilePosition at = tile_position<VEC>(view, level.shape, tile - batch.first_tile[index]);
    const A grad =
        level.grad_is_double ? A(*static_cast<const double*>(level.grad)) : A(*static_cast<const float*>(level.grad));
    A col_mask[VEC];
    load_col_mask(col_mask, level, at);
    const A* row_mask = row_mask_of(level, at);
    S* ds = static_cast<S*>(level.ds) + (at.image * view.rows + at.first_row) * view.cols + at.col;
    visit_tile<S, T, TRANSPOSED>(
        level, at, transposed, [&](int row, int rows, const auto& student, const auto& teacher) {
          Pack<S, VEC> out[kDistanceRows];
#pragma unroll
          for (int u = 0; u < kDistanceRows; ++u) {
            const A scale = A(2) * grad * (row_mask == nullptr || u >= rows ? A(1) : row_mask[row + u]);
            A values[VEC];
            student[u].get(values);
#pragma unroll
            for (int i = 0; i < VEC; ++i) values[i] = scale * col_mask[i] * (values[i] - teacher[u][i]);
            out[u].set(values);
          }
          with_move<VEC, kWord<S>>(level.move, [&](auto move) {
            store_rows<decltype(move)::value>(ds + row * view.cols, out, view.cols, rows, at.cols);
          });
        });
  }
}

inline bool is_transposed(const MatrixView& teacher) { return teacher.col_stride != 1; }

// A level of S and T for either direction. Of a level it takes: student, teacher, s, t, row_mask, col_mask and, where
// `gradient` says so, ds.
template <typename S, typename T, typename A, typename Level>
DistanceLevel<A> distance_level(const Level& level, bool gradient) {
  const MatrixView& view = level.student;
  DistanceLevel<A> result{};
  result.student = view, result.teacher = level.teacher;
  result.shape = tile_shape<kVec<S>, kDistanceRows>(view, kDistanceSteps);
  result.s = level.s, result.t = level.t;
  result.row_mask = static_cast<const A*>(level.row_mask), result.col_mask = static_cast<const A*>(level.col_mask);
  result.ds = gradient ? level.ds : nullptr;
  result.mask_packs = numbers_aligned(level.col_mask, view.cols, kVec<S>);
  result.move = elements_per_move<S>([&](int move) {
    return movable<S>(level.s, view, move) &&
           (is_transposed(level.teacher) || movable<T>(level.t, level.teacher, move)) &&
           (!gradient || movable<S>(level.ds, gradient_view(view), move));
  });
  return result;
}

// Number `index` of a tensor of float or double.
inline void* number_at(void* data, int64_t index, bool is_double) {
  return static_cast<char*>(data) + index * (is_double ? sizeof(double) : sizeof(float));
}

// Calls f(transposed, levels) for the levels whose teachers are transposed and for those whose are not: each has its
// kernel.
template <typename Level, typename F>
void by_orientation(const std::vector<Level>& levels, F&& f) {
  std::vector<Level> transposed, straight;
  for (const Level& level : levels) (is_transposed(level.teacher) ? transposed : straight).push_back(level);
  in_batches(straight, [&](const Level* first, const Level* last) { f(std::false_type(), first, last); });
  in_batches(transposed, [&](const Level* first, const Level* last) { f(std::true_type(), first, last); });
}

// The sums of levels of S and T into squares[level.index], which are float or double.
template <typename S, typename T, typename A, typename Level, typename Queue>
void launch_masked_l2_forward(const std::vector<Level>& levels, void* squares, bool squares_are_double, Queue& queue) {
  by_orientation(levels, [&](auto transposed, const Level* first, const Level* last) {
    auto sums = empty_batch<DistanceLevel<A>>();
    auto finish = empty_batch<DistanceFinishLevel<A>>();
    for (const Level* level = first; level != last; ++level) {
      const DistanceLevel<A> next = distance_level<S, T, A>(*level, false);
      add_level(sums, next, tiles_of(next.student, next.shape.tiling));
    }
    A* partial = queue.template scratch<A>(sums.tiles);
    for (const Level* level = first; level != last; ++level) {
      DistanceLevel<A>& placed = sums.level[level - first];
      placed.partial = partial + sums.first_tile[level - first];
      const DistanceFinishLevel<A> next{placed.partial, tiles_of(placed.student, placed.shape.tiling),
                                        number_at(squares, level->index, squares_are_double), squares_are_double};
      add_level(finish, next, 1);
    }
    queue.launch(masked_l2_sums<S, T, A, decltype(transposed)::value>, sums.tiles, sums);
    queue.launch(masked_l2_finish<A>, finish.tiles, finish);
  });
}

// The gradients of levels of S and T; grad[level.index] is float or double.
template <typename S, typename T, typename A, typename Level, typename Queue>
void launch_masked_l2_backward(const std::vector<Level>& levels, const void* grad, bool grad_is_double, Queue& queue) {
  by_orientation(levels, [&](auto transposed, const Level* first, const Level* last) {
    auto batch = empty_batch<DistanceLevel<A>>();
    for (const Level* level = first; level != last; ++level) {
      DistanceLevel<A> next = distance_level<S, T, A>(*level, true);
      next.grad = number_at(const_cast<void*>(grad), level->index, grad_is_double);
      next.grad_is_double = grad_is_double;
      add_level(batch, next, tiles_of(next.student, next.shape.tiling));
    }
    queue.launch(masked_l2_gradient<S, T, A, decltype(transposed)::value>, batch.tiles, batch);
  });
}

}  // namespace fbkd::cuda
