// Masked squared distance on the CPU: one read of both maps; the gradient another, and one write.
#include "../stable_abi.h"

#include "../masked_l2_levels.h"

#include <torch/csrc/stable/library.h>

#include "memory.h"
#include "pieces.h"
#include "tiles.h"

namespace fbkd {
namespace {

// Tiles of whole rows, eight or more: two long streams, and threads that touch fresh memory far apart do not wait for
// each other's pages. Not more than 128, to keep chains of additions short.
constexpr int64_t kTile = int64_t(1) << 17;
constexpr int64_t kMinRows = 8, kMaxRows = 128;
// With fewer rows than these there are no others to share out, so they are cut. Where the layouts differ they are too:
// the teacher's cache lines have to wait for the tile's next row.
constexpr int64_t kCutCols = 4096, kCutRows = 64;

// Sum of weight * (s - t)^2; weight nullptr: ones.
template <typename A>
FBKD_CLONES A masked_squares(const A* __restrict__ s, const A* __restrict__ t, const A* __restrict__ weight,
                             int64_t count) {
  A sum = 0;
  if (weight == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += (s[i] - t[i]) * (s[i] - t[i]);
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += weight[i] * (s[i] - t[i]) * (s[i] - t[i]);
  }
  return sum;
}

// out = scale * weight * (s - t)
template <typename A>
FBKD_CLONES void masked_gradient(const A* __restrict__ s, const A* __restrict__ t, A scale,
                                 const A* __restrict__ weight, int64_t count, A* __restrict__ out) {
  if (weight == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = scale * (s[i] - t[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = scale * weight[i] * (s[i] - t[i]);
  }
}

Tiling tiling_for(const MaskedLevel& level) {
  const MatrixView& view = level.student;
  if (level.teacher.col_stride != 1 || view.rows <= kMinRows) return tiling_of(view, kCutRows, kCutCols);
  return tiling_of(view, min64(kMaxRows, max64(kMinRows, kTile / view.cols)), view.cols);
}

// What both passes share: a level's tiles, their rows cut into pieces.
template <typename A, class Base>
struct MaskedTiles : Base {
  explicit MaskedTiles(const MaskedLevel& level) : level(level), tiling(tiling_for(level)) {}

  int64_t count() const override { return tiles_of(level.student, tiling); }
  int64_t elements() const override { return level.student.numel(); }

  // visit(image, row, col, s, t, cols) for every piece of a tile's rows.
  template <typename Visit>
  void pieces(int64_t tile, Visit&& visit) const {
    A s_buffer[kPiece], t_buffer[kPiece];
    const MatrixView &s_view = level.student, &t_view = level.teacher;
    const int64_t image = tile / (tiling.row_tiles * tiling.col_tiles);
    const int64_t first_row = tile / tiling.col_tiles % tiling.row_tiles * tiling.row_tile;
    const int64_t first_col = tile % tiling.col_tiles * tiling.col_tile;
    const int64_t last_row = min64(first_row + tiling.row_tile, s_view.rows);
    const int64_t last_col = min64(first_col + tiling.col_tile, s_view.cols);
    for (int64_t row = first_row; row < last_row; ++row) {
      for (int64_t col = first_col; col < last_col; col += kPiece) {
        const int64_t cols = min64(kPiece, last_col - col);
        const int64_t s_first = image * s_view.image_stride + row * s_view.row_stride + col;
        const int64_t t_first = image * t_view.image_stride + row * t_view.row_stride + col * t_view.col_stride;
        const A* s = load_piece(level.student_type, level.s, s_first, 1, cols, s_buffer);
        const A* t = load_piece(level.teacher_type, level.t, t_first, t_view.col_stride, cols, t_buffer);
        visit(image, row, col, s, t, cols);
      }
    }
  }

  A row_weight(int64_t image, int64_t row) const {
    return level.row_mask == nullptr ? A(1) : static_cast<const A*>(level.row_mask)[image * level.student.rows + row];
  }
  const A* col_weights(int64_t image, int64_t col) const {
    if (level.col_mask == nullptr) return nullptr;
    return static_cast<const A*>(level.col_mask) + image * level.student.cols + col;
  }

  MaskedLevel level;
  Tiling tiling;
};

struct Squares : Tiles {
  virtual double total() const = 0;
};

template <typename A>
struct LevelSquares : MaskedTiles<A, Squares> {
  explicit LevelSquares(const MaskedLevel& level)
      : MaskedTiles<A, Squares>(level), partial(static_cast<size_t>(this->count())) {}

  void run(int64_t tile) override {
    double sum = 0;
    this->pieces(tile, [&](int64_t image, int64_t row, int64_t col, const A* s, const A* t, int64_t cols) {
      sum += static_cast<double>(this->row_weight(image, row)) *
             static_cast<double>(masked_squares(s, t, this->col_weights(image, col), cols));
    });
    partial[tile] = sum;
  }
  double total() const override { return total_of(partial); }

  std::vector<double> partial;
};

template <typename A>
struct LevelGradient : MaskedTiles<A, Tiles> {
  LevelGradient(const MaskedLevel& level, double grad)
      : MaskedTiles<A, Tiles>(level), dense(gradient_view(level.student)), scale(static_cast<A>(2 * grad)) {
    advise_huge_pages(level.ds, dense.numel() * element_size(level.student_type));
  }

  void run(int64_t tile) override {
    A buffer[kPiece];
    const MaskedLevel& level = this->level;
    this->pieces(tile, [&](int64_t image, int64_t row, int64_t col, const A* s, const A* t, int64_t cols) {
      const int64_t first = image * dense.image_stride + row * dense.row_stride + col;
      A* piece = piece_to_fill(level.student_type, level.ds, first, buffer);
      masked_gradient(s, t, scale * this->row_weight(image, row), this->col_weights(image, col), cols, piece);
      store_piece(level.student_type, level.ds, first, cols, piece);
    });
  }

  MatrixView dense;
  A scale;
};

void launch_masked_l2_forward(const std::vector<MaskedLevel>& levels, const Tensor& squares) {
  std::vector<std::unique_ptr<Squares>> sums;
  for (const MaskedLevel& level : levels)
    sums.push_back(with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<Squares> {
      return std::make_unique<LevelSquares<typename decltype(type)::type>>(level);
    }));
  run_tiles(sums);
  for (size_t i = 0; i < levels.size(); ++i) put_number(squares, levels[i].index, sums[i]->total());
}

void launch_masked_l2_backward(const std::vector<MaskedLevel>& levels, const Tensor& grad) {
  std::vector<std::unique_ptr<Tiles>> gradients;
  for (const MaskedLevel& level : levels)
    gradients.push_back(with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<Tiles> {
      return std::make_unique<LevelGradient<typename decltype(type)::type>>(level, number_at(grad, level.index));
    }));
  run_tiles(gradients);
}

Tensor masked_l2_forward(const Tensors& student, const Tensors& teacher, const OptionalTensors& spatial_mask,
                         const OptionalTensors& channel_mask) {
  const auto levels = masked_levels(student, teacher, spatial_mask, channel_mask, nullptr, "masked_l2");
  Tensor squares = empty_squares(student, teacher);
  torch::stable::zero_(squares);
  launch_masked_l2_forward(levels, squares);
  return squares;
}

Tensors masked_l2_backward(const Tensors& student, const Tensors& teacher, const OptionalTensors& spatial_mask,
                           const OptionalTensors& channel_mask, const Tensor& grad) {
  const char* op = "masked_l2_backward";
  Tensors gradients;
  const auto levels = masked_levels(student, teacher, spatial_mask, channel_mask, &gradients, op);
  checked_grad(grad, student, teacher, op);
  launch_masked_l2_backward(levels, grad);
  return gradients;
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("masked_l2_forward", TORCH_BOX(&fbkd::masked_l2_forward));
  m.impl("masked_l2_backward", TORCH_BOX(&fbkd::masked_l2_backward));
}
