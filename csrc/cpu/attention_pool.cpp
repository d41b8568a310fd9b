// Attention pool on the CPU: row and column sums of x and |x| in one read.
#include "../stable_abi.h"

#include "../attention_pool.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../attention_pool_tensors.h"
#include "memory.h"
#include "simd.h"

namespace fbkd {
namespace {

// At least 8192 columns a tile, where there are as many; 4096 to 16384 were within the noise of each other.
constexpr int64_t kMinColTile = 8192;
// A tile has at least 32 K elements (below that a thread costs more than it brings) and at most 512 K, else a 1/32 of
// the image: enough tiles to share out, and few enough that their column sums are small beside the input.
constexpr int64_t kMinTile = int64_t(1) << 15;
constexpr int64_t kMaxTile = int64_t(1) << 19;
constexpr int64_t kTilesPerImage = 32;
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
constexpr int64_t kColPiece = 128;   // rows, taken one at a time
constexpr int64_t kFinishBlock = 8192;

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
FBKD_INLINE void add_four_rows(const T* __restrict__ x, int64_t row_stride, int64_t cols,
                               A* __restrict__ row_abs, A* __restrict__ row_plain,    // (4)
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
FBKD_INLINE void add_row(const T* __restrict__ x, int64_t cols,
                         A* __restrict__ row_abs, A* __restrict__ row_plain,    // (1)
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
FBKD_INLINE void add_long_rows(const T* x, int64_t row_stride, int64_t cols,
                               A* row_abs, A* row_plain,    // (4)
                               A* col_abs, A* col_plain) {  // (cols)
  for (int64_t row = 0; row < kRowStep; ++row) row_abs[row] = row_plain[row] = 0;
  for (int64_t col = 0; col < cols; col += kRowPiece) {
    A abs[kRowStep], plain[kRowStep];
    add_four_rows<First>(x + col, row_stride, min64(kRowPiece, cols - col), abs, plain, col_abs + col, col_plain + col);
    for (int64_t row = 0; row < kRowStep; ++row) row_abs[row] += abs[row], row_plain[row] += plain[row];
  }
}

// Rows one at a time, column sums written.
template <typename T, typename A>
FBKD_INLINE void sum_short_rows(const T* x, int64_t row_stride, int64_t rows, int64_t cols,
                                A* row_abs, A* row_plain,    // (rows)
                                A* col_abs, A* col_plain) {  // (cols)
  add_row<true>(x, cols, row_abs, row_plain, col_abs, col_plain);
  for (int64_t row = 1; row < rows; ++row)
    add_row<false>(x + row * row_stride, cols, row_abs + row, row_plain + row, col_abs, col_plain);
}

// Adds a later piece's or tile's partial sums to the first one's.
template <typename A>
FBKD_INLINE void add_to(A* __restrict__ sum, const A* __restrict__ partial, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += partial[i];
}

template <typename T, typename A>
FBKD_INLINE void sum_tile_body(const T* x, int64_t row_stride, int64_t rows, int64_t cols,
                               A* row_abs, A* row_plain,    // (rows)
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
  const int64_t first = min64(rows, kColPiece);
  sum_short_rows(x, row_stride, first, cols, row_abs, row_plain, col_abs, col_plain);
  A abs[kShortRow<T>], plain[kShortRow<T>];
  for (row = first; row < rows; row += kColPiece) {
    sum_short_rows(x + row * row_stride, row_stride, min64(kColPiece, rows - row), cols, row_abs + row,
                   row_plain + row, abs, plain);
    add_to(col_abs, abs, cols);
    add_to(col_plain, plain, cols);
  }
}

template <typename T, typename A>
FBKD_INLINE void gradient_tile_body(const T* __restrict__ x, int64_t x_stride,    // (rows, cols), unread if nullptr
                                    T* __restrict__ dx, int64_t dx_stride,        // (rows, cols)
                                    int64_t rows, int64_t cols,
                                    const A* row_abs, const A* row_plain,                              // (rows)
                                    const A* __restrict__ col_abs, const A* __restrict__ col_plain) {  // (cols)
  for (int64_t i = 0; i < rows; ++i) {
    const T* x_row = x + (x == nullptr ? 0 : i * x_stride);
    T* dx_row = dx + i * dx_stride;
    const A abs = row_abs[i], plain = row_plain[i];
    if (x == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j) store(dx_row[j], plain + col_plain[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < cols; ++j)
        store(dx_row[j], input_gradient<A>(load(x_row[j]), abs + col_abs[j], plain + col_plain[j]));
    }
  }
}

#define FBKD_CPU_TYPES(T, A)                                                                                      \
  FBKD_CLONES void sum_tile(const T* x, int64_t row_stride, int64_t rows, int64_t cols, A* row_abs, A* row_plain, \
                            A* col_abs, A* col_plain) {                                                           \
    sum_tile_body<T, A>(x, row_stride, rows, cols, row_abs, row_plain, col_abs, col_plain);                       \
  }                                                                                                               \
  FBKD_CLONES void gradient_tile(const T* x, int64_t x_stride, T* dx, int64_t dx_stride, int64_t rows,            \
                                 int64_t cols, const A* row_abs, const A* row_plain, const A* col_abs,            \
                                 const A* col_plain) {                                                            \
    gradient_tile_body<T, A>(x, x_stride, dx, dx_stride, rows, cols, row_abs, row_plain, col_abs, col_plain);     \
  }

FBKD_CPU_TYPES(float, float)
FBKD_CPU_TYPES(double, double)
FBKD_CPU_TYPES(Half, float)
FBKD_CPU_TYPES(BFloat16, float)
#undef FBKD_CPU_TYPES

// Sums of one direction: tile t of image n lies at (n * tiles + t) * length. A single tile lies in the output itself.
template <typename A>
struct Partials {
  Partials(const Tensor& x, A* mean_abs, A* mean_plain, int64_t images, int64_t tiles, int64_t length)
      : mean_abs(mean_abs), mean_plain(mean_plain), images(images), tiles(tiles), length(length) {
    if (tiles == 1) {
      abs = mean_abs;
      plain = mean_plain;
      return;
    }
    const int64_t count = images * tiles * length;
    storage = empty_like_device(x, {2, count}, accumulation_type(x.scalar_type()));
    abs = static_cast<A*>(storage->mutable_data_ptr());
    plain = abs + count;
  }

  int64_t offset(int64_t image, int64_t tile, int64_t index) const {
    return (image * tiles + tile) * length + index;
  }

  // Adds the tiles in their order and divides.
  void finish(int64_t count) const {
    const int64_t blocks = ceil_div(length, kFinishBlock);
    torch::stable::parallel_for(0, images * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / blocks, first = task % blocks * kFinishBlock;
        const int64_t size = min64(kFinishBlock, length - first);
        finish_block(abs, mean_abs, image, first, size, static_cast<A>(count));
        finish_block(plain, mean_plain, image, first, size, static_cast<A>(count));
      }
    });
  }

  void finish_block(A* sums, A* means, int64_t image, int64_t first, int64_t size, A count) const {
    A* mean = means + image * length + first;
    A* total = tiles == 0 ? mean : sums + offset(image, 0, first);
    if (tiles == 0)
      for (int64_t i = 0; i < size; ++i) mean[i] = 0;
    for (int64_t tile = 1; tile < tiles; ++tile) add_to(total, sums + offset(image, tile, first), size);
    for (int64_t i = 0; i < size; ++i) mean[i] = total[i] / count;
  }

  A* mean_abs;
  A* mean_plain;
  int64_t images, tiles, length;
  A* abs = nullptr;
  A* plain = nullptr;
  std::optional<Tensor> storage;
};

template <typename T, typename A>
void forward(const Tensor& x, const MatrixView& view, const PoolOutputs& outputs) {
  const Tiling tiling = cpu_tiling(view);
  const Means<A> means = means_of<A>(outputs, view);
  const Partials<A> by_row(x, means.row_abs, means.row_plain, view.images, tiling.col_tiles, view.rows);
  const Partials<A> by_col(x, means.col_abs, means.col_plain, view.images, tiling.row_tiles, view.cols);
  const T* data = static_cast<const T*>(x.const_data_ptr());
  const int64_t grain = ceil_div(kMinTile, tiling.row_tile * tiling.col_tile);

  torch::stable::parallel_for(0, tiles_of(view, tiling), grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t col_index = tile % tiling.col_tiles;
      const int64_t row_index = tile / tiling.col_tiles % tiling.row_tiles;
      const int64_t image = tile / (tiling.col_tiles * tiling.row_tiles);
      const int64_t row = row_index * tiling.row_tile, col = col_index * tiling.col_tile;
      const int64_t row_offset = by_row.offset(image, col_index, row);
      const int64_t col_offset = by_col.offset(image, row_index, col);
      sum_tile(data + image * view.image_stride + row * view.row_stride + col, view.row_stride,
               min64(tiling.row_tile, view.rows - row), min64(tiling.col_tile, view.cols - col),
               by_row.abs + row_offset, by_row.plain + row_offset, by_col.abs + col_offset, by_col.plain + col_offset);
    }
  });
  by_row.finish(view.cols);
  by_col.finish(view.rows);
}

// One direction's gradients divided by the number of elements of its means; zeros where there is none.
template <typename A>
std::vector<A> scaled(const A* grad, int64_t size, int64_t count) {
  std::vector<A> result(static_cast<size_t>(size), A(0));
  if (grad != nullptr)
    for (int64_t i = 0; i < size; ++i) result[i] = grad[i] / static_cast<A>(count);
  return result;
}

template <typename T, typename A>
void backward(const Tensor& x, const MatrixView& view, const Gradients<A>& grads, const Tensor& dx) {
  const MatrixView to = gradient_view(view);
  const int64_t row_count = view.images * view.rows, col_count = view.images * view.cols;
  const std::vector<A> row_abs = scaled(grads.row_abs, row_count, view.cols);
  const std::vector<A> row_plain = scaled(grads.row_plain, row_count, view.cols);
  const std::vector<A> col_abs = scaled(grads.col_abs, col_count, view.rows);
  const std::vector<A> col_plain = scaled(grads.col_plain, col_count, view.rows);
  const T* data = grads.needs_input() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
  T* dx_data = static_cast<T*>(dx.mutable_data_ptr());
  advise_huge_pages(dx_data, row_count * view.cols * static_cast<int64_t>(sizeof(T)));

  const int64_t grain = max64(1, kMinTile / max64(1, view.cols));
  torch::stable::parallel_for(0, row_count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin / view.rows; image * view.rows < end; ++image) {
      const int64_t first = max64(0, begin - image * view.rows);
      const int64_t last = min64(view.rows, end - image * view.rows);
      const T* from = data == nullptr ? nullptr : data + image * view.image_stride + first * view.row_stride;
      gradient_tile(from, view.row_stride, dx_data + image * to.image_stride + first * to.row_stride, to.row_stride,
                    last - first, view.cols, &row_abs[image * view.rows + first],
                    &row_plain[image * view.rows + first], &col_abs[image * view.cols], &col_plain[image * view.cols]);
    }
  });
}

PoolOutputs attention_pool_forward(const Tensor& x) {  // (N, C, H, W)
  const MatrixView view = checked_view(x);
  const PoolOutputs outputs = allocate_outputs(x);
  switch (x.scalar_type()) {
    case ScalarType::Float: forward<float, float>(x, view, outputs); break;
    case ScalarType::Double: forward<double, double>(x, view, outputs); break;
    case ScalarType::Half: forward<Half, float>(x, view, outputs); break;
    case ScalarType::BFloat16: forward<BFloat16, float>(x, view, outputs); break;
    default: STD_TORCH_CHECK(false, "attention_pool: x must be float16, bfloat16, float32 or float64");
  }
  return outputs;
}

template <typename T, typename A>
Tensor backward_of(const Tensor& x, const std::optional<Tensor>& grad_spatial_attention,
                   const std::optional<Tensor>& grad_channel_attention,
                   const std::optional<Tensor>& grad_spatial_mean, const std::optional<Tensor>& grad_channel_mean) {
  const MatrixView view = checked_view(x);
  const Gradients<A> grads = checked_gradients<A>(x, view, grad_spatial_attention, grad_channel_attention,
                                                  grad_spatial_mean, grad_channel_mean);
  const Tensor dx = allocate_gradient(x, view);
  if (x.numel() > 0) backward<T, A>(x, view, grads, dx);
  return dx;
}

Tensor attention_pool_backward(const Tensor& x,                                      // (N, C, H, W)
                               const std::optional<Tensor>& grad_spatial_attention,  // (N, H, W)
                               const std::optional<Tensor>& grad_channel_attention,  // (N, C)
                               const std::optional<Tensor>& grad_spatial_mean,       // (N, H, W)
                               const std::optional<Tensor>& grad_channel_mean) {     // (N, C)
  const auto run = [&](auto function) {
    return function(x, grad_spatial_attention, grad_channel_attention, grad_spatial_mean, grad_channel_mean);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: return run(backward_of<float, float>);
    case ScalarType::Double: return run(backward_of<double, double>);
    case ScalarType::Half: return run(backward_of<Half, float>);
    case ScalarType::BFloat16: return run(backward_of<BFloat16, float>);
    default: STD_TORCH_CHECK(false, "attention_pool: x must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&fbkd::attention_pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&fbkd::attention_pool_backward));
}
