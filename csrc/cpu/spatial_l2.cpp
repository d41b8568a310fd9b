// The spatial term on the CPU: a 3x3 convolution of one channel, its squared distance to a target, and all gradients.
//
// A tile is some rows of an image. Copies of the student's rows with zeros around them, and the residual with zeros
// around it, stay in cache; with w (3, 3), b and the gradient of the sum of squares for a grad of 1:
//
//   e(y, x)  = t(y, x) - b - sum_ij w(i, j) s(y + i - 1, x + j - 1)    zero outside the image
//   dw(i, j) = -2 sum_yx e(y, x) s(y + i - 1, x + j - 1)
//   db       = -2 sum_yx e(y, x)
//   ds(y, x) = -2 sum_ij w(2 - i, 2 - j) e(y + i - 1, x + j - 1)       the same convolution with w rotated by 180
//   degrees
//
// ds needs e of one row beyond the tile on either side, which both neighbours compute.
#include "../stable_abi.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "../tensors.h"
#include "pieces.h"
#include "tiles.h"
#include "vector.h"

namespace fbkd {
namespace {

// Pixels of a tile: its buffers of both maps take 64 KB in float.
constexpr int64_t kTile = 8192;
constexpr int64_t kWeights = 9;
// The sum of squares, its derivatives by the weights, and by the bias.
constexpr int64_t kSums = 1 + kWeights + 1;
// A pixel's multiplications, in elements that other ops read once.
constexpr int64_t kPixelElements = 8;

struct SpatialLevel {
  ScalarType type;  // of all tensors of the level: float or double
  int64_t images, height, width;
  const void* student;  // (images, height, width)
  const void* weight;   // (3, 3)
  const void* bias;     // (1,)
  const void* teacher;  // (images, height, width)
  void* ds;             // (images, height, width); nullptr: no gradients
};

// A row of a convolution, from three rows that begin one pixel further left.
template <typename A>
FBKD_CLONES void convolve_row(const A* __restrict__ above, const A* __restrict__ middle, const A* __restrict__ below,
                              const A* __restrict__ w, int64_t width, A* __restrict__ result) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x)
    result[x] = (w[0] * above[x] + w[1] * above[x + 1] + w[2] * above[x + 2]) +
                (w[3] * middle[x] + w[4] * middle[x + 1] + w[5] * middle[x + 2]) +
                (w[6] * below[x] + w[7] * below[x + 1] + w[8] * below[x + 2]);
}

// e = t - b - e.
template <typename A>
FBKD_CLONES void subtract_from(const A* __restrict__ t, A bias, int64_t width, A* __restrict__ e) {
#pragma omp simd
  for (int64_t x = 0; x < width; ++x) e[x] = t[x] - bias - e[x];
}

// Rows [first, last) of an image, a zero on either side of each; rows that the image lacks stay zeros.
template <typename A>
struct PaddedRows {
  PaddedRows(int64_t first, int64_t last, int64_t width)
      : first(first), pitch(width + 2), data(static_cast<size_t>((last - first) * pitch)) {}

  A* operator[](int64_t row) { return data.data() + (row - first) * pitch; }

  int64_t first, pitch;
  std::vector<A> data;
};

using SpatialSums = std::array<double, kSums>;

struct SpatialTiles : Tiles {
  virtual SpatialSums total() const = 0;
};

template <typename A>
struct LevelTiles : SpatialTiles {
  explicit LevelTiles(const SpatialLevel& level)
      : level(level),
        rows(max64(1, kTile / level.width)),
        tiles(ceil_div(level.height, rows)),
        partial(static_cast<size_t>(level.images * tiles)) {
    std::copy_n(static_cast<const A*>(level.weight), kWeights, weight.begin());
    for (int64_t k = 0; k < kWeights; ++k) backward_weight[k] = -2 * weight[kWeights - 1 - k];
  }

  int64_t count() const override { return level.images * tiles; }
  int64_t elements() const override { return kPixelElements * level.images * level.height * level.width; }

  void run(int64_t tile) override {
    const int64_t image = tile / tiles, first = tile % tiles * rows, last = min64(first + rows, level.height);
    const int64_t halo = level.ds == nullptr ? 0 : 1;
    const A* s = static_cast<const A*>(level.student) + image * level.height * level.width;
    const A* t = static_cast<const A*>(level.teacher) + image * level.height * level.width;
    PaddedRows<A> student(first - halo - 1, last + halo + 1, level.width);
    PaddedRows<A> error(first - halo, last + halo, level.width);
    for (int64_t row = max64(0, student.first); row < min64(level.height, last + halo + 1); ++row)
      std::copy_n(s + row * level.width, level.width, student[row] + 1);
    for (int64_t row = max64(0, error.first); row < min64(level.height, last + halo); ++row) {
      convolve_row(student[row - 1], student[row], student[row + 1], weight.data(), level.width, error[row] + 1);
      subtract_from(t + row * level.width, *static_cast<const A*>(level.bias), level.width, error[row] + 1);
    }
    for (int64_t row = first; row < last; ++row) add_row(student, error, row, partial[tile]);
    if (level.ds == nullptr) return;
    A* ds = static_cast<A*>(level.ds) + image * level.height * level.width;
    for (int64_t row = first; row < last; ++row)
      convolve_row(error[row - 1], error[row], error[row + 1], backward_weight.data(), level.width,
                   ds + row * level.width);
  }

  // In float over a piece of a row, in double over pieces.
  void add_row(PaddedRows<A>& student, PaddedRows<A>& error, int64_t row, SpatialSums& sums) const {
    for (int64_t x = 0; x < level.width; x += kPiece) {
      const int64_t count = min64(kPiece, level.width - x);
      const A* e = error[row] + 1 + x;
      sums[0] += dot(e, e, count);
      if (level.ds == nullptr) continue;
      for (int64_t k = 0; k < kWeights; ++k)
        sums[1 + k] -= 2 * static_cast<double>(dot(e, student[row + k / 3 - 1] + x + k % 3, count));
      sums[1 + kWeights] -= 2 * static_cast<double>(sum_of(e, count));
    }
  }

  SpatialSums total() const override {
    SpatialSums sums{};
    for (const SpatialSums& tile : partial)
      for (int64_t k = 0; k < kSums; ++k) sums[k] += tile[k];
    return sums;
  }

  SpatialLevel level;
  int64_t rows, tiles;  // of a tile; of an image
  std::array<A, kWeights> weight, backward_weight;
  std::vector<SpatialSums> partial;
};

void check_map(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, op, ": ", name, " must have 3 dimensions (N, H, W), got ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op, ": ", name,
                  " must be float32 or float64");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, op, ": ", name, " must have at least one pixel");
}

SpatialLevel spatial_level(const Tensor& student, const Tensor& weight, const Tensor& bias, const Tensor& teacher,
                           const char* op) {
  check_map(student, op, "student");
  check_map(teacher, op, "teacher");
  for (int64_t dim = 0; dim < 3; ++dim)
    STD_TORCH_CHECK(student.size(dim) == teacher.size(dim), op, ": student and teacher must agree in N, H and W");
  const ScalarType type = student.scalar_type();
  return {type,
          student.size(0),
          student.size(1),
          student.size(2),
          checked_data(student, type, student.numel(), student, op, "student"),
          checked_data(weight, type, kWeights, student, op, "weight"),
          checked_data(bias, type, 1, student, op, "bias"),
          checked_data(teacher, type, student.numel(), student, op, "teacher"),
          nullptr};
}

// The levels; their students' gradients are added to the outputs where asked for.
std::vector<SpatialLevel> spatial_levels(const Tensors& student, const Tensors& weight, const Tensors& bias,
                                         const Tensors& teacher, bool gradient, Tensors& outputs) {
  const char* op = "spatial_l2";
  STD_TORCH_CHECK(!student.empty(), op, ": student must have at least one level");
  check_length(weight, student.size(), op, "weight");
  check_length(bias, student.size(), op, "bias");
  check_length(teacher, student.size(), op, "teacher");
  std::vector<SpatialLevel> levels;
  for (size_t index = 0; index < student.size(); ++index) {
    const Tensor& s = student[index];
    check_device(s, student[0], op, "student");
    levels.push_back(spatial_level(s, weight[index], bias[index], teacher[index], op));
    if (!gradient) continue;
    outputs.push_back(empty_like_device(s, {s.size(0), s.size(1), s.size(2)}, s.scalar_type()));
    levels.back().ds = outputs.back().mutable_data_ptr();
  }
  return levels;
}

// Writes the sums of every level, (levels, columns).
void launch_spatial_l2(const std::vector<SpatialLevel>& levels, const Tensor& sums) {
  std::vector<std::unique_ptr<SpatialTiles>> tiles;
  for (const SpatialLevel& level : levels)
    tiles.push_back(with_accumulator(level.type, [&](auto type) -> std::unique_ptr<SpatialTiles> {
      return std::make_unique<LevelTiles<typename decltype(type)::type>>(level);
    }));
  run_tiles(tiles);
  const int64_t columns = sums.size(1);
  for (size_t index = 0; index < levels.size(); ++index) {
    const SpatialSums total = tiles[index]->total();
    for (int64_t k = 0; k < columns; ++k) put_number(sums, static_cast<int64_t>(index) * columns + k, total[k]);
  }
}

Tensors spatial_l2(const Tensors& student, const Tensors& weight, const Tensors& bias, const Tensors& teacher,
                   bool gradient) {
  Tensors outputs{Tensor()};
  const auto levels = spatial_levels(student, weight, bias, teacher, gradient, outputs);
  const std::vector<int64_t> shape{static_cast<int64_t>(levels.size()), gradient ? kSums : 1};
  outputs[0] = empty_like_device(student[0], shape, total_type(student, teacher));
  launch_spatial_l2(levels, outputs[0]);
  return outputs;
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) { m.impl("spatial_l2", TORCH_BOX(&fbkd::spatial_l2)); }
