// Masked squared distance on the CPU: one read of both maps; the gradient another, and one write.
#include "../stable_abi.h"

#include "../masked_l2_levels.h"

#include <torch/csrc/stable/library.h>

#include "memory.h"
#include "pair_tiles.h"

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

// What both passes share.
template <typename A, class Base>
struct MaskedTiles : PairTiles<A, MaskedLevel, Base> {
  explicit MaskedTiles(const MaskedLevel& level) : PairTiles<A, MaskedLevel, Base>(level, tiling_for(level)) {}

  A row_weight(int64_t image, int64_t row) const {
    const A* mask = static_cast<const A*>(this->level.row_mask);
    return mask == nullptr ? A(1) : mask[image * this->level.student.rows + row];
  }
  const A* col_weights(int64_t image, int64_t col) const {
    const A* mask = static_cast<const A*>(this->level.col_mask);
    return mask == nullptr ? nullptr : mask + image * this->level.student.cols + col;
  }
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
