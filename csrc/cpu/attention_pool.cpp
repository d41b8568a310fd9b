// Attention pool on the CPU: row and column sums of x and |x| in one read.
#include "../stable_abi.h"

#include "../attention_pool_levels.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "memory.h"
#include "pool_gradient.h"
#include "simd.h"
#include "tiles.h"
#include "vector.h"

namespace fbkd {
namespace {

// At least 8192 columns a tile, where there are as many; 4096 to 16384 were within the noise of each other.
constexpr int64_t kMinColTile = 8192;
// A tile has at least 32 K elements (below that a thread costs more than it brings) and at most 4 M, else 1/8 of
// the image: enough tiles to share out, and few enough that their column sums are small beside the input.
constexpr int64_t kMinTile = int64_t(1) << 15;
constexpr int64_t kMaxTile = int64_t(1) << 22;
constexpr int64_t kTilesPerImage = 8;
// Every tile writes its column sums: over 32 rows and more they are little beside the input.
constexpr int64_t kMinRowTile = 32;
// Rows in flight: four, so that a column sum is loaded and stored once every four elements.
constexpr int64_t kRowStep = 4;
// Up to 4096 bytes a row, one at a time: four rows in one page hide from the hardware's prefetcher that they are one
// stream (channels_last, C = 256, float32, one thread: 8.2 ms by four, 3.4 ms by one).
template <typename T>
constexpr int64_t kShortRow = 4096 / sizeof(T);
// Rounding errors grow with the root of the number of consecutive additions: longer sums are made of pieces.
constexpr int64_t kRowPiece = 1024;  // columns, 64 additions in each of 16 lanes
constexpr int64_t kFinishBlock = 8192;
constexpr int64_t kGradientRows = 8;

Tiling cpu_tiling(const MatrixView& view) {
  Tiling tiling{};
  const int64_t col_tiles = max64(1, view.cols / kMinColTile);
  tiling.col_tile = max64(16, round_up(ceil_div(view.cols, col_tiles), 16));
  tiling.col_tiles = ceil_div(view.cols, tiling.col_tile);
  const int64_t elements = min64(kMaxTile, max64(kMinTile, view.rows * view.cols / kTilesPerImage));
  const int64_t row_tiles = max64(1, ceil_div(view.rows, max64(kMinRowTile, elements / tiling.col_tile)));
  tiling.row_tile = max64(kRowStep, round_up(ceil_div(view.rows, row_tiles), kRowStep));
  tiling.row_tiles = ceil_div(view.rows, tiling.row_tile);
  return tiling;
}

// First rows of a tile: column sums are written. Later rows: they are added to.
template <bool First, typename A>
FBKD_INLINE void accumulate(A& sum, A value) {
  sum = First ? value : sum + value;
}

template <bool First, typename T, typename A>
FBKD_INLINE void add_four_rows(const T* __restrict__ x, int64_t row_stride, int64_t cols, A* __restrict__ row_abs,
                               A* __restrict__ row_plain,                             // (4)
                               A* __restrict__ col_abs, A* __restrict__ col_plain) {  // (cols)
  const T* x0 = x;
  const T* x1 = x0 + row_stride;
  const T* x2 = x1 + row_stride;
  const T* x3 = x2 + row_stride;
  A p0 = 0, p1 = 0, p2 = 0, p3 = 0, a0 = 0, a1 = 0, a2 = 0, a3 = 0;
#pragma omp simd reduction(+ : p0, p1, p2, p3, a0, a1, a2, a3)
  for (int64_t j = 0; j < cols; ++j) {
    const A v0 = load(x0[j]), v1 = load(x1[j]), v2 = load(x2[j]), v3 = load(x3[j]);
    const A m0 = std::fabs(v0), m1 = std::fabs(v1), m2 = std::fabs(v2), m3 = std::fabs(v3);
    p0 += v0, p1 += v1, p2 += v2, p3 += v3;
    a0 += m0, a1 += m1, a2 += m2, a3 += m3;
    accumulate<First>(col_plain[j], (v0 + v1) + (v2 + v3));
    accumulate<First>(col_abs[j], (m0 + m1) + (m2 + m3));
  }
  row_plain[0] = p0, row_plain[1] = p1, row_plain[2] = p2, row_plain[3] = p3;
  row_abs[0] = a0, row_abs[1] = a1, row_abs[2] = a2, row_abs[3] = a3;
}

// One row, in pieces of columns.
template <bool First, typename T, typename A>
FBKD_INLINE void add_row(const T* __restrict__ x, int64_t cols, A* __restrict__ row_abs,
                         A* __restrict__ row_plain,                             // (1)
                         A* __restrict__ col_abs, A* __restrict__ col_plain) {  // (cols)
  *row_plain = *row_abs = 0;
  for (int64_t col = 0; col < cols; col += kRowPiece) {
    const int64_t end = min64(col + kRowPiece, cols);
    A plain = 0, abs = 0;
#pragma omp simd reduction(+ : plain, abs)
    for (int64_t j = col; j < end; ++j) {
      const A value = load(x[j]);
      const A magnitude = std::fabs(value);
      plain += value;
      abs += magnitude;
      accumulate<First>(col_plain[j], value);
      accumulate<First>(col_abs[j], magnitude);
    }
    *row_plain += plain;
    *row_abs += abs;
  }
}

// Four rows in pieces of columns.
template <bool First, typename T, typename A>
FBKD_INLINE void add_long_rows(const T* x, int64_t row_stride, int64_t cols, A* row_abs, A* row_plain,  // (4)
                               A* col_abs, A* col_plain) {                                              // (cols)
  for (int64_t row = 0; row < kRowStep; ++row) row_abs[row] = row_plain[row] = 0;
  for (int64_t col = 0; col < cols; col += kRowPiece) {
    A abs[kRowStep], plain[kRowStep];
    add_four_rows<First>(x + col, row_stride, min64(kRowPiece, cols - col), abs, plain, col_abs + col, col_plain + col);
    for (int64_t row = 0; row < kRowStep; ++row) row_abs[row] += abs[row], row_plain[row] += plain[row];
  }
}

// Rows one at a time, column sums written.
template <typename T, typename A>
FBKD_INLINE void sum_short_rows(const T* x, int64_t row_stride, int64_t rows, int64_t cols, A* row_abs,
                                A* row_plain,                // (rows)
                                A* col_abs, A* col_plain) {  // (cols)
  add_row<true>(x, cols, row_abs, row_plain, col_abs, col_plain);
  for (int64_t row = 1; row < rows; ++row)
    add_row<false>(x + row * row_stride, cols, row_abs + row, row_plain + row, col_abs, col_plain);
}

template <typename T, typename A>
FBKD_CLONES void sum_tile(const T* x, int64_t row_stride, int64_t rows, int64_t cols, A* row_abs,
                          A* row_plain,                // (rows)
                          A* col_abs, A* col_plain) {  // (cols)
  int64_t row = 0;
  if (rows >= kRowStep && cols > kShortRow<T>) {
    add_long_rows<true>(x, row_stride, cols, row_abs, row_plain, col_abs, col_plain);
    for (row = kRowStep; row + kRowStep <= rows; row += kRowStep)
      add_long_rows<false>(x + row * row_stride, row_stride, cols, row_abs + row, row_plain + row, col_abs, col_plain);
    for (; row < rows; ++row)
      add_row<false>(x + row * row_stride, cols, row_abs + row, row_plain + row, col_abs, col_plain);
    return;
  }
  const int64_t first = min64(rows, kRowsOfPiece);
  sum_short_rows(x, row_stride, first, cols, row_abs, row_plain, col_abs, col_plain);
  A abs[kShortRow<T>], plain[kShortRow<T>];
  for (row = first; row < rows; row += kRowsOfPiece) {
    sum_short_rows(x + row * row_stride, row_stride, min64(kRowsOfPiece, rows - row), cols, row_abs + row,
                   row_plain + row, abs, plain);
    add_vector(col_abs, abs, cols);
    add_vector(col_plain, plain, cols);
  }
}

// Sums of one direction: tile t of image n lies at (n * tiles + t) * length. A single tile lies in the output itself.
template <typename A>
struct Partials {
  Partials(const Tensor& like, void* mean_abs, void* mean_plain, int64_t images, int64_t tiles, int64_t length)
      : mean_abs(static_cast<A*>(mean_abs)), mean_plain(static_cast<A*>(mean_plain)), tiles(tiles), length(length) {
    abs = this->mean_abs;
    plain = this->mean_plain;
    if (tiles == 1) return;
    const int64_t count = images * tiles * length;
    storage.emplace(like, 2 * count);
    abs = storage->data();
    plain = abs + count;
  }

  int64_t offset(int64_t image, int64_t tile, int64_t index) const { return (image * tiles + tile) * length + index; }

  // Adds the tiles of outputs first .. first + size in their order and divides.
  void finish(int64_t image, int64_t first, int64_t size, A count) const {
    finish_one(abs, mean_abs, image, first, size, count);
    finish_one(plain, mean_plain, image, first, size, count);
  }

  void finish_one(A* sums, A* means, int64_t image, int64_t first, int64_t size, A count) const {
    A* mean = means + image * length + first;
    A* total = sums + offset(image, 0, first);
    for (int64_t tile = 1; tile < tiles; ++tile) add_vector(total, sums + offset(image, tile, first), size);
    for (int64_t i = 0; i < size; ++i) mean[i] = total[i] / count;
  }

  A* mean_abs;
  A* mean_plain;
  int64_t tiles, length;
  A* abs;
  A* plain;
  std::optional<Scratch<A>> storage;
};

// Second stage: blocks of the means of both directions.
template <typename A>
struct Finish : Tiles {
  Finish(const MatrixView& view, const Partials<A>& by_row, const Partials<A>& by_col)
      : view(view), by_row(by_row), by_col(by_col) {}

  int64_t row_blocks() const { return ceil_div(view.rows, kFinishBlock); }
  int64_t col_blocks() const { return ceil_div(view.cols, kFinishBlock); }
  int64_t count() const override { return view.images * (row_blocks() + col_blocks()); }
  int64_t elements() const override { return view.images * (view.rows * by_row.tiles + view.cols * by_col.tiles); }
  void run(int64_t tile) override {
    const int64_t image = tile / (row_blocks() + col_blocks()), block = tile % (row_blocks() + col_blocks());
    if (block < row_blocks())
      finish(by_row, image, block, view.cols);
    else
      finish(by_col, image, block - row_blocks(), view.rows);
  }
  void finish(const Partials<A>& sums, int64_t image, int64_t block, int64_t count) const {
    const int64_t first = block * kFinishBlock;
    sums.finish(image, first, min64(kFinishBlock, sums.length - first), static_cast<A>(count));
  }

  MatrixView view;
  const Partials<A>& by_row;
  const Partials<A>& by_col;
};

// First stage of a level: every tile's row and column sums.
template <typename T, typename A>
struct LevelSums : StagedTiles {
  LevelSums(const PoolLevel& level, const Tensor& like)
      : x(static_cast<const T*>(level.x)),
        view(level.view),
        tiling(cpu_tiling(view)),
        by_row(like, level.means.row_abs, level.means.row_plain, view.images, tiling.col_tiles, view.rows),
        by_col(like, level.means.col_abs, level.means.col_plain, view.images, tiling.row_tiles, view.cols) {}

  int64_t count() const override { return tiles_of(view, tiling); }
  int64_t elements() const override { return view.numel(); }
  void run(int64_t tile) override {
    const int64_t col_index = tile % tiling.col_tiles;
    const int64_t row_index = tile / tiling.col_tiles % tiling.row_tiles;
    const int64_t image = tile / (tiling.col_tiles * tiling.row_tiles);
    const int64_t row = row_index * tiling.row_tile, col = col_index * tiling.col_tile;
    const int64_t row_offset = by_row.offset(image, col_index, row);
    const int64_t col_offset = by_col.offset(image, row_index, col);
    sum_tile(x + image * view.image_stride + row * view.row_stride + col, view.row_stride,
             min64(tiling.row_tile, view.rows - row), min64(tiling.col_tile, view.cols - col), by_row.abs + row_offset,
             by_row.plain + row_offset, by_col.abs + col_offset, by_col.plain + col_offset);
  }
  std::unique_ptr<Tiles> second_stage() const override { return std::make_unique<Finish<A>>(view, by_row, by_col); }

  const T* x;
  MatrixView view;
  Tiling tiling;
  Partials<A> by_row, by_col;
};

void launch_attention_pool_forward(const std::vector<PoolLevel>& levels, const Tensor& like) {
  std::vector<std::unique_ptr<StagedTiles>> sums;
  for (const PoolLevel& level : levels)
    sums.push_back(dispatch<Cpu>(level.type, [&](auto type) -> std::unique_ptr<StagedTiles> {
      using T = typename decltype(type)::type;
      return std::make_unique<LevelSums<T, Accumulator<T>>>(level, like);
    }));
  run_tiles(sums);
  run_second_stages(sums);
}

// dx a few whole rows at a time: threads that touch fresh memory far apart do not wait for each other's pages.
template <typename A>
struct GradientRows : Tiles {
  explicit GradientRows(const PoolGradientLevel& level)
      : level(level), dense(gradient_view(level.view)), gradient(level.view, level.grads) {
    advise_huge_pages(level.dx, dense.numel() * element_size(level.type));
  }

  int64_t count() const override { return ceil_div(dense.images * dense.rows, kGradientRows); }
  int64_t elements() const override { return dense.numel(); }
  void run(int64_t tile) override {
    const int64_t last = min64((tile + 1) * kGradientRows, dense.images * dense.rows);
    for (int64_t row = tile * kGradientRows; row < last; ++row)
      for (int64_t col = 0; col < dense.cols; col += kPiece)
        write(row / dense.rows, row % dense.rows, col, min64(kPiece, dense.cols - col));
  }

  void write(int64_t image, int64_t row, int64_t col, int64_t count) const {
    A buffer[kPiece];
    const int64_t first = image * dense.image_stride + row * dense.row_stride + col;
    A* piece = piece_to_fill(level.type, level.dx, first, buffer);
    gradient.put(image, row, col, count, level.type, level.x, false, piece);
    store_piece(level.type, level.dx, first, count, piece);
  }

  PoolGradientLevel level;
  MatrixView dense;
  PoolGradient<A> gradient;
};

void launch_attention_pool_backward(const std::vector<PoolGradientLevel>& levels) {
  std::vector<std::unique_ptr<Tiles>> rows;
  for (const PoolGradientLevel& level : levels)
    rows.push_back(with_accumulator(level.type, [&](auto type) -> std::unique_ptr<Tiles> {
      return std::make_unique<GradientRows<typename decltype(type)::type>>(level);
    }));
  run_tiles(rows);
}

Tensors attention_pool_forward(const Tensors& x) {
  Tensors means;
  const auto levels = pool_levels(x, means, "attention_pool");
  if (!levels.empty()) launch_attention_pool_forward(levels, x[0]);
  return means;
}

Tensors attention_pool_backward(const Tensors& x, const OptionalTensors& grads) {
  Tensors gradients;
  launch_attention_pool_backward(pool_gradient_levels(x, grads, gradients, "attention_pool_backward"));
  return gradients;
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&fbkd::attention_pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&fbkd::attention_pool_backward));
}
