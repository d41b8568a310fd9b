// Pooled 1x1 convolutions and covariances of feature maps on the CPU, in one read of each map: blocks of rows that stay
// in cache, around the vendor's matrix product.
#include "../stable_abi.h"

#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "max_pool.h"
#include "pixel_blocks.h"
#include "vector.h"

namespace fbkd {
namespace {

// Where a channel's pixels lie side by side, winners pass their gradients as a dense product with zeros at the other
// pixels if a cell has fewer pixels than these, else one by one, as always where a pixel's channels do. With 128 pooled
// channels of 256 at 100x168, one thread: cells of 4x4 46 ms one by one, 27 ms densely; 8x8 21 and 26; in channels_last
// 11 and 27; 4.4 and 24. Without the map's gradient both are even at 4x4.
constexpr int64_t kGatherPixels = 36, kGatherPixelsForWeight = 17;

// sum[c] += sum over cells of grad[cell, c] * x[at[cell, c]]
template <typename A>
FBKD_CLONES void gather(A* __restrict__ sum, const A* __restrict__ x, const int32_t* __restrict__ at,
                        const A* __restrict__ grad, int64_t cells, int64_t channels) {
  for (int64_t cell = 0; cell < cells; ++cell, at += channels, grad += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sum[c] += grad[c] * x[at[c]];
  }
}

struct StatisticsLevel {
  ScalarType type;
  MatrixView view;
  int64_t width;  // of the map
  const void* x;
  bool covaries;           // whether a covariance is wanted
  const void* mean;        // (images, C), in the accumulation type
  const void* projection;  // (r, C); nullptr: the identity
  const void* weight;      // (p, C); nullptr: nothing is pooled
  const void* bias;        // (p)
  Pool pool;
  int64_t rank, pooled;  // r (C without projection), p

  int64_t channels() const { return view.channels(); }
  int64_t height() const { return view.pixels() / width; }
  int64_t cell_rows() const { return weight == nullptr ? 0 : height() / pool.ky; }
  int64_t cell_cols() const { return weight == nullptr ? 0 : width / pool.kx; }
  int64_t cells() const { return cell_rows() * cell_cols(); }
};

// A level's images cut into strips of whole rows of cells, the strips dealt to groups, the strips' rows to blocks: all
// functions of the shape alone.
struct Strips {
  Strips(const StatisticsLevel& level, int64_t partial_bytes)
      : block_rows(max64(1, block_pixels_of(level.channels(), level.view.images, level.view.pixels()) / level.width)),
        rows(level.weight == nullptr ? block_rows : round_up(block_rows, level.pool.ky)),
        per_image(ceil_div(level.height(), rows)),
        groups(max64(1, min64(per_image, groups_of(partial_bytes) / max64(1, level.view.images)))) {}

  int64_t block_rows, rows, per_image, groups;  // groups of an image
};

// Calls f(strip) for the strips of a group, a tile.
template <typename F>
void for_strips(const StatisticsLevel& level, const Strips& strips, int64_t tile, F&& f) {
  const int64_t image = tile / strips.groups, group = tile % strips.groups;
  for (int64_t strip = group * strips.per_image / strips.groups; strip < (group + 1) * strips.per_image / strips.groups;
       ++strip) {
    const int64_t row = strip * strips.rows;
    f(Block{image, row * level.width, min64(strips.rows, level.height() - row) * level.width});
  }
}

// Calls f(block) for the blocks of a strip.
template <typename F>
void for_blocks(const StatisticsLevel& level, const Strips& strips, const Block& strip, F&& f) {
  const int64_t size = strips.block_rows * level.width, end = strip.first + strip.size;
  for (int64_t first = strip.first; first < end; first += size) f(Block{strip.image, first, min64(size, end - first)});
}

template <typename A>
struct Statistics : ProductTiles {
  Statistics(const StatisticsLevel& level, void* pooled, void* winners, void* cross)
      : level(level),
        strips(level, partial_bytes()),
        pooled(static_cast<A*>(pooled)),
        winners(static_cast<int32_t*>(winners)),
        cross(static_cast<A*>(cross)),
        partials(static_cast<size_t>(count() * cross_size())) {}

  std::unique_ptr<Tiles> second_stage() const override;
  int64_t partial_bytes() const override { return cross_size() * static_cast<int64_t>(sizeof(A)); }
  int64_t cross_size() const { return level.covaries ? level.rank * level.channels() : 0; }
  int64_t count() const override { return level.view.images * strips.groups; }
  int64_t elements() const override { return level.view.numel() * (level.pooled + level.rank); }

  struct Workspace {
    Buffer<A> x, y, centred, projected, best;
    std::vector<int32_t> best_row;
  };

  void run(int64_t tile) override {
    Workspace space;
    for_strips(level, strips, tile, [&](const Block& strip) {
      for_blocks(level, strips, strip, [&](const Block& block) {
        if (level.weight != nullptr) fold(block, space);
        if (level.covaries) covariance(block, space, &partials[tile * cross_size()]);
      });
    });
  }

  // The pooled convolution of a block of rows.
  void fold(const Block& block, Workspace& space) {
    const int64_t last = level.cell_rows() * level.pool.ky, width = level.width,
                  columns = level.cell_cols() * level.pool.kx;
    if (block.first / width >= last) return;
    const Matrix<A> x = read_block(level.type, level.x, level.view, block, space.x);
    const Matrix<A> y = row_major(reserve(space.y, level.pooled * block.size), level.pooled, block.size);
    matmul(y, row_major(static_cast<const A*>(level.weight), level.pooled, level.channels()), x);
    A* best = reserve(space.best, level.pooled * width);
    if (space.best_row.empty()) space.best_row.resize(static_cast<size_t>(level.pooled * width));
    const A* bias = static_cast<const A*>(level.bias);
    for (int64_t row = block.first / width; row < min64(last, (block.first + block.size) / width); ++row) {
      const int64_t dy = row % level.pool.ky;
      const A* y_row = y.data + row * width - block.first;
      for (int64_t c = 0; c < level.pooled; ++c)
        fold_row(y_row + c * block.size, bias[c], static_cast<int32_t>(dy), columns, best + c * width,
                 &space.best_row[c * width]);
      if (dy == level.pool.ky - 1) finish_cells(block.image, row / level.pool.ky, space);
    }
  }

  void finish_cells(int64_t image, int64_t cell_row, const Workspace& space) {
    for (int64_t c = 0; c < level.pooled; ++c) {
      const A* best = &space.best[c * level.width];
      const int32_t* best_row = &space.best_row[c * level.width];
      const int64_t out = (image * level.pooled + c) * level.cells() + cell_row * level.cell_cols();
      for (int64_t cell = 0; cell < level.cell_cols(); ++cell) {
        const int64_t first = cell * level.pool.kx, col = first + level.pool.winner(best + first, best_row + first);
        pooled[out + cell] = best[col];
        winners[out + cell] = static_cast<int32_t>((cell_row * level.pool.ky + best_row[col]) * level.width + col);
      }
    }
  }

  // A covariance is symmetric: these rows are made in full, of the others only the part right of their number. Halves
  // of few rows would take a product that adds all pixels into one float: 1e-4 off where values repeat, as zeros do.
  int64_t upper_rows() const { return level.projection == nullptr && level.rank >= 64 ? level.rank / 2 : 0; }

  // Adds the block's share of the sum of W (x - mean) (x - mean)^T.
  void covariance(const Block& block, Workspace& space, A* sum) const {
    const int64_t channels = level.channels();
    const Matrix<A> x = centred(block, space);
    if (level.projection != nullptr) {
      const Matrix<A> z = row_major(reserve(space.projected, level.rank * block.size), level.rank, block.size);
      matmul(z, row_major(static_cast<const A*>(level.projection), level.rank, channels), x);
      matmul_add(row_major(sum, level.rank, channels), z, x.transposed());
      return;
    }
    const int64_t half = upper_rows();
    const Matrix<A> lower = x.rows_from(half);
    if (half > 0) matmul_add(row_major(sum, half, channels), x.rows_to(half), x.transposed());
    matmul_add(Matrix<A>{sum + half * channels + half, channels - half, channels - half, channels, 1}, lower,
               lower.transposed());
  }

  // x - mean (C, pixels), in the map's order.
  Matrix<A> centred(const Block& block, Workspace& space) const {
    const BlockRows rows = rows_of(block, level.view);
    const A* mean = static_cast<const A*>(level.mean) + block.image * level.channels();
    A* data = reserve(space.centred, rows.count * rows.cols);
    A buffer[kPiece];
    for (int64_t row = 0; row < rows.count; ++row) {
      for (int64_t col = 0; col < rows.cols; col += kPiece) {
        const int64_t size = min64(kPiece, rows.cols - col);
        const A* x = load_piece(level.type, level.x, rows.offset(level.view, block.image, row) + col, 1, size, buffer);
        A* piece = data + row * rows.cols + col;
        level.view.rows_are_channels ? write_sum(piece, x, -mean[row], size)
                                     : write_difference(piece, x, mean + col, size);
      }
    }
    return block_matrix(data, level.view.rows_are_channels, level.channels(), block.size);
  }

  StatisticsLevel level;
  Strips strips;
  A* pooled;           // (images, p, cells)
  int32_t* winners;    // (images, p, cells)
  A* cross;            // (images, r, C)
  Buffer<A> partials;  // (images, groups, r, C)
};

// Second stage: adds the groups' sums in their order and divides them by the number of pixels. A tile is a row of an
// image.
template <typename A>
struct Covariances : Tiles {
  explicit Covariances(const Statistics<A>& sums) : sums(sums) {}

  int64_t count() const override { return sums.level.covaries ? sums.level.view.images * sums.level.rank : 0; }
  int64_t elements() const override { return static_cast<int64_t>(sums.partials.size()); }
  void run(int64_t tile) override {
    const int64_t rank = sums.level.rank, channels = sums.level.channels(), image = tile / rank, row = tile % rank;
    const int64_t left = row < sums.upper_rows() ? 0 : sums.upper_rows(), groups = sums.strips.groups;
    A* out = sums.cross + tile * channels;
    std::fill(out, out + channels, A(0));
    const A share = A(1) / static_cast<A>(sums.level.view.pixels());
    for (int64_t group = image * groups; group < (image + 1) * groups; ++group) {
      const A* partial = &sums.partials[group * sums.cross_size()];
      for (int64_t col = 0; col < left; ++col) out[col] += share * partial[col * channels + row];
      add_multiple(out + left, share, partial + row * channels + left, channels - left);
    }
  }

  const Statistics<A>& sums;
};

template <typename A>
std::unique_ptr<Tiles> Statistics<A>::second_stage() const {
  return std::make_unique<Covariances<A>>(*this);
}

struct StatisticsGradient {
  void* dx;                 // gradient_view(level.view), added to; nullptr: not wanted
  const void* inner;        // (images, r, C), nullptr where absent
  const void* shift;        // (images, C), nullptr where absent
  const int32_t* winners;   // (images, p, cells)
  const void* grad_pooled;  // (images, p, cells), nullptr where absent
  void* dweight;            // (p, C)
};

template <typename A>
struct StatisticsBackward : ProductTiles {
  StatisticsBackward(const StatisticsLevel& level, const StatisticsGradient& gradient)
      : level(level),
        gradient(gradient),
        strips(level, partial_bytes()),
        dense(level.view.rows_are_channels &&
              level.pool.ky * level.pool.kx < (gradient.dx == nullptr ? kGatherPixelsForWeight : kGatherPixels)),
        partials(static_cast<size_t>(count() * dweight_size())) {
    if (level.weight != nullptr) transpose_weight();
    if (affine()) find_offsets();
  }

  void transpose_weight() {
    transposed_weight.resize(static_cast<size_t>(level.pooled * level.channels()));
    const A* weight = static_cast<const A*>(level.weight);
    for (int64_t c = 0; c < level.pooled; ++c)
      for (int64_t k = 0; k < level.channels(); ++k)
        transposed_weight[k * level.pooled + c] = weight[c * level.channels() + k];
  }

  // shift - projection^T inner mean
  void find_offsets() {
    const int64_t channels = level.channels();
    offsets.resize(static_cast<size_t>(level.view.images * channels));
    if (gradient.shift != nullptr) {
      const A* shift = static_cast<const A*>(gradient.shift);
      std::copy(shift, shift + offsets.size(), offsets.begin());
    }
    if (gradient.inner == nullptr) return;
    Buffer<A> projected(static_cast<size_t>(level.rank)), centre(static_cast<size_t>(channels));
    for (int64_t image = 0; image < level.view.images; ++image) {
      const Matrix<A> mean = row_major(static_cast<const A*>(level.mean) + image * channels, channels, 1);
      const Matrix<A> z = row_major(projected.data(), level.rank, 1);
      matmul(z, inner_of(image), mean);
      if (level.projection != nullptr) matmul(row_major(centre.data(), channels, 1), projection().transposed(), z);
      const A* back = level.projection == nullptr ? z.data : centre.data();
      add_multiple(&offsets[image * channels], A(-1), back, channels);
    }
  }

  Matrix<A> inner_of(int64_t image) const {
    const int64_t channels = level.channels();
    return row_major(static_cast<const A*>(gradient.inner) + image * level.rank * channels, level.rank, channels);
  }
  Matrix<A> projection() const {
    return row_major(static_cast<const A*>(level.projection), level.rank, level.channels());
  }

  std::unique_ptr<Tiles> second_stage() const override;
  int64_t partial_bytes() const override { return dweight_size() * static_cast<int64_t>(sizeof(A)); }
  bool pools() const { return gradient.grad_pooled != nullptr; }
  bool affine() const { return gradient.dx != nullptr && (gradient.inner != nullptr || gradient.shift != nullptr); }
  int64_t dweight_size() const { return pools() ? level.pooled * level.channels() : 0; }
  int64_t count() const override { return pools() || affine() ? level.view.images * strips.groups : 0; }
  int64_t elements() const override { return level.view.numel() * (level.pooled + level.rank); }

  struct Workspace {
    Buffer<A> x, dx, projected, dense, grads;
    std::vector<int32_t> at;
    int64_t cells;
  };

  void run(int64_t tile) override {
    Workspace space;
    for_strips(level, strips, tile, [&](const Block& strip) {
      A* partial = partials.data() + tile * dweight_size();
      if (pools()) collect(strip, space);
      if (affine() || (pools() && dense)) {
        for_blocks(level, strips, strip, [&](const Block& block) {
          const Matrix<A> x = read_block(level.type, level.x, level.view, block, space.x);
          const Matrix<A> dx = read_gradient(block, space);
          if (affine()) add_affine(block, x, dx, space);
          if (pools() && dense) pass_densely(block, strip, x, dx, partial, space);
          write_gradient(block, dx);
        });
      }
      if (!pools() || dense || space.cells == 0) return;
      const Matrix<A> dx = read_gradient(strip, space);
      pass_one_by_one(read_block(level.type, level.x, level.view, strip, space.x), dx, partial, space);
      write_gradient(strip, dx);
    });
  }

  Matrix<A> read_gradient(const Block& block, Workspace& space) const {
    if (gradient.dx == nullptr) return {};
    return read_block(level.type, gradient.dx, gradient_view(level.view), block, space.dx);
  }
  void write_gradient(const Block& block, const Matrix<A>& dx) const {
    if (gradient.dx == nullptr || is_accumulator<A>(level.type)) return;  // it was changed in place
    const MatrixView view = gradient_view(level.view);
    const BlockRows rows = rows_of(block, view);
    for (int64_t row = 0; row < rows.count; ++row)
      store_piece(level.type, gradient.dx, rows.offset(view, block.image, row), rows.cols, dx.data + row * rows.cols);
  }

  // dx += projection^T inner (x - mean) + shift
  void add_affine(const Block& block, const Matrix<A>& x, const Matrix<A>& dx, Workspace& space) const {
    const int64_t channels = level.channels();
    if (gradient.inner != nullptr && level.projection == nullptr) {
      matmul_add(dx, inner_of(block.image), x);
    } else if (gradient.inner != nullptr) {
      const Matrix<A> z = row_major(reserve(space.projected, level.rank * block.size), level.rank, block.size);
      matmul(z, inner_of(block.image), x);
      matmul_add(dx, projection().transposed(), z);
    }
    const A* offset = &offsets[block.image * channels];
    if (level.view.rows_are_channels)
      for (int64_t k = 0; k < channels; ++k) add_number(dx.data + k * dx.row_stride, offset[k], block.size);
    else
      for (int64_t i = 0; i < block.size; ++i) add_vector(dx.data + i * dx.col_stride, offset, channels);
  }

  // The gradients of a strip's cells and where in it they go, (cells, p).
  void collect(const Block& strip, Workspace& space) const {
    const int64_t rows_per_cell = level.pool.ky * level.width, cols = level.cell_cols();
    const int64_t first_row = strip.first / rows_per_cell;
    const int64_t cell_rows = min64(level.cell_rows(), first_row + strip.size / rows_per_cell) - first_row;
    space.cells = max64(0, cell_rows) * cols;
    if (space.at.empty()) space.at.resize(static_cast<size_t>(strips.rows / level.pool.ky * cols * level.pooled));
    A* grads = reserve(space.grads, static_cast<int64_t>(space.at.size()));
    for (int64_t c = 0; c < level.pooled; ++c) {
      const int64_t first = (strip.image * level.pooled + c) * level.cells() + first_row * cols;
      for (int64_t cell = 0; cell < space.cells; ++cell) {
        space.at[cell * level.pooled + c] = static_cast<int32_t>(gradient.winners[first + cell] - strip.first);
        grads[cell * level.pooled + c] = static_cast<const A*>(gradient.grad_pooled)[first + cell];
      }
    }
  }

  void pass_densely(const Block& block, const Block& strip, const Matrix<A>& x, const Matrix<A>& dx, A* dweight,
                    Workspace& space) const {
    const Matrix<A> spread = row_major(reserve(space.dense, level.pooled * block.size), level.pooled, block.size);
    std::fill(spread.data, spread.data + level.pooled * block.size, A(0));
    for (int64_t i = 0; i < space.cells * level.pooled; ++i) {
      const int64_t at = space.at[i] + strip.first - block.first;
      if (at >= 0 && at < block.size) spread.data[i % level.pooled * block.size + at] = space.grads[i];
    }
    matmul_add(row_major(dweight, level.pooled, level.channels()), spread, x.transposed());
    if (gradient.dx == nullptr) return;
    matmul_add(dx, row_major(static_cast<const A*>(level.weight), level.pooled, level.channels()).transposed(), spread);
  }

  // dweight is transposed, (C, p), where a channel's pixels lie side by side: then all reads and writes of a step are
  // in the first cache.
  void pass_one_by_one(const Matrix<A>& x, const Matrix<A>& dx, A* dweight, const Workspace& space) const {
    const int64_t channels = level.channels(), pooled = level.pooled;
    const int32_t* at = space.at.data();
    const A* grads = space.grads.data();
    if (!level.view.rows_are_channels) {
      const A* weight = static_cast<const A*>(level.weight);
      for (int64_t i = 0; i < space.cells * pooled; ++i) {
        add_multiple(dweight + i % pooled * channels, grads[i], x.data + at[i] * x.col_stride, channels);
        if (gradient.dx != nullptr)
          add_multiple(dx.data + at[i] * dx.col_stride, grads[i], weight + i % pooled * channels, channels);
      }
      return;
    }
    for (int64_t k = 0; k < channels; ++k) {
      gather(dweight + k * pooled, x.data + k * x.row_stride, at, grads, space.cells, pooled);
      if (gradient.dx == nullptr) continue;
      A* dx_row = dx.data + k * dx.row_stride;
      const A* weight = &transposed_weight[k * pooled];
      for (int64_t cell = 0; cell < space.cells; ++cell)
        for (int64_t c = 0; c < pooled; ++c) dx_row[at[cell * pooled + c]] += grads[cell * pooled + c] * weight[c];
    }
  }

  bool transposed() const { return !dense && level.view.rows_are_channels; }

  StatisticsLevel level;
  StatisticsGradient gradient;
  Strips strips;
  bool dense;
  Buffer<A> transposed_weight;  // (C, p)
  Buffer<A> offsets;            // (images, C), of dx
  Buffer<A> partials;           // (images, groups, p, C), or (images, groups, C, p) where transposed()
};

// Second stage: adds the groups' gradients of the weight in their order. A tile is a pooled channel.
template <typename A>
struct WeightGradient : Tiles {
  explicit WeightGradient(const StatisticsBackward<A>& sums) : sums(sums) {}

  int64_t count() const override { return sums.level.weight == nullptr ? 0 : sums.level.pooled; }
  int64_t elements() const override { return static_cast<int64_t>(sums.partials.size()); }
  void run(int64_t row) override {
    const int64_t channels = sums.level.channels(), pooled = sums.level.pooled;
    A* out = static_cast<A*>(sums.gradient.dweight) + row * channels;
    std::fill(out, out + channels, A(0));
    for (size_t first = 0; first < sums.partials.size(); first += static_cast<size_t>(sums.dweight_size())) {
      const A* partial = &sums.partials[first];
      if (sums.transposed())
        for (int64_t k = 0; k < channels; ++k) out[k] += partial[k * pooled + row];
      else
        add_vector(out, partial + row * channels, channels);
    }
  }

  const StatisticsBackward<A>& sums;
};

template <typename A>
std::unique_ptr<Tiles> StatisticsBackward<A>::second_stage() const {
  return std::make_unique<WeightGradient<A>>(*this);
}

StatisticsLevel statistics_level(const Tensor& x, const OptionalTensors& projections, const OptionalTensors& weights,
                                 const std::vector<int64_t>& pools, size_t index, const char* op) {
  const MatrixView view = checked_view(x, op, "x");
  const ScalarType type = accumulation_type(x.scalar_type());
  const int64_t* sides = &pools[4 * index];
  StatisticsLevel level{};
  level.type = x.scalar_type(), level.view = view, level.width = x.size(3), level.x = x.const_data_ptr();
  level.pool = {sides[0], sides[1], sides[2], sides[3]};
  level.rank = view.channels();
  const auto rows = [&](const std::optional<Tensor>& matrix, const char* name, int64_t& count) -> const void* {
    if (!matrix.has_value()) return nullptr;
    STD_TORCH_CHECK(matrix->dim() == 2, op, ": ", name, " must have 2 dimensions, got ", matrix->dim());
    count = matrix->size(0);
    return checked_data(*matrix, type, count * view.channels(), x, op, name);
  };
  level.projection = rows(projections[index], "projection", level.rank);
  level.weight = rows(weights[index], "weight", level.pooled);
  if (level.weight != nullptr) {
    STD_TORCH_CHECK(level.pool.fits(x.size(2), x.size(3)) && view.pixels() <= INT32_MAX, op,
                    ": pool must fit the map, and its first cell the pool");
  }
  return level;
}

template <typename... Lists>
void check_lengths(const char* op, size_t count, const std::vector<int64_t>& pools, const Lists&... lists) {
  STD_TORCH_CHECK(count > 0, op, ": x must have at least one level");
  check_length(pools, 4 * count, op, "pool");
  (check_length(lists, count, op, "an argument"), ...);
}

Tensors non_local_statistics_forward(const Tensors& x, const OptionalTensors& mean, const OptionalTensors& projection,
                                     const OptionalTensors& weight, const OptionalTensors& bias,
                                     const std::vector<int64_t>& pool) {
  const char* op = "non_local_statistics_forward";
  check_lengths(op, x.size(), pool, mean, projection, weight, bias);
  Tensors pooled, winners, cross;
  std::vector<std::unique_ptr<ProductTiles>> levels;
  for (size_t index = 0; index < x.size(); ++index) {
    const Tensor& map = x[index];
    StatisticsLevel level = statistics_level(map, projection, weight, pool, index, op);
    const ScalarType type = accumulation_type(map.scalar_type());
    const int64_t images = map.size(0);
    level.covaries = mean[index].has_value();
    level.mean = checked_data(mean[index], type, images * level.channels(), map, op, "mean");
    level.bias = checked_data(bias[index], type, level.pooled, map, op, "bias");
    const bool pools = level.weight != nullptr;
    const std::vector<int64_t> none{0}, cells{images, level.pooled, level.cells()};
    pooled.push_back(empty_like_device(map, pools ? cells : none, type));
    winners.push_back(empty_like_device(map, pools ? cells : none, ScalarType::Int));
    cross.push_back(empty_like_device(
        map, level.covaries ? std::vector<int64_t>{images, level.rank, level.channels()} : none, type));
    with_accumulator(type, [&](auto tag) {
      using A = typename decltype(tag)::type;
      levels.push_back(std::make_unique<Statistics<A>>(
          level, pooled.back().mutable_data_ptr(), winners.back().mutable_data_ptr(), cross.back().mutable_data_ptr()));
    });
  }
  run_products(levels);
  run_second_stages(levels);
  Tensors outputs = pooled;
  outputs.insert(outputs.end(), winners.begin(), winners.end());
  outputs.insert(outputs.end(), cross.begin(), cross.end());
  return outputs;
}

// Adds to every gradient that is not empty, if there are any, and fills grad_weight where something is pooled.
void non_local_statistics_backward_(const Tensors& gradient, const Tensors& grad_weight, const Tensors& x,
                                    const OptionalTensors& mean, const OptionalTensors& projection,
                                    const OptionalTensors& inner, const OptionalTensors& shift,
                                    const OptionalTensors& weight, const Tensors& winners,
                                    const OptionalTensors& grad_pooled, const std::vector<int64_t>& pool) {
  const char* op = "non_local_statistics_backward";
  check_lengths(op, x.size(), pool, grad_weight, mean, projection, inner, shift, weight, winners, grad_pooled);
  if (!gradient.empty()) check_length(gradient, x.size(), op, "gradient");
  std::vector<std::unique_ptr<ProductTiles>> levels;
  for (size_t index = 0; index < x.size(); ++index) {
    const Tensor& map = x[index];
    StatisticsLevel level = statistics_level(map, projection, weight, pool, index, op);
    const ScalarType type = accumulation_type(map.scalar_type());
    const int64_t images = map.size(0), cells = images * level.pooled * level.cells();
    StatisticsGradient wanted{};
    if (!gradient.empty() && gradient[index].numel() > 0)
      wanted.dx = checked_gradient(gradient[index], map, level.view, op, "gradient");
    wanted.inner = checked_data(inner[index], type, images * level.rank * level.channels(), map, op, "inner");
    level.mean = checked_data(mean[index], type, images * level.channels(), map, op, "mean");
    STD_TORCH_CHECK(wanted.inner == nullptr || level.mean != nullptr || images == 0, op, ": inner needs a mean");
    wanted.shift = checked_data(shift[index], type, images * level.channels(), map, op, "shift");
    if (level.weight != nullptr) {
      wanted.winners =
          static_cast<const int32_t*>(checked_data(winners[index], ScalarType::Int, cells, map, op, "winners"));
      wanted.grad_pooled = checked_data(grad_pooled[index], type, cells, map, op, "grad_pooled");
      checked_data(grad_weight[index], type, level.pooled * level.channels(), map, op, "grad_weight");
      wanted.dweight = grad_weight[index].mutable_data_ptr();
    }
    with_accumulator(type, [&](auto tag) {
      using A = typename decltype(tag)::type;
      levels.push_back(std::make_unique<StatisticsBackward<A>>(level, wanted));
    });
  }
  run_products(levels);
  run_second_stages(levels);
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("non_local_statistics_forward", TORCH_BOX(&fbkd::non_local_statistics_forward));
  m.impl("non_local_statistics_backward_", TORCH_BOX(&fbkd::non_local_statistics_backward_));
}
