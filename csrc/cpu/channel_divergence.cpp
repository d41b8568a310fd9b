// Channel divergence on the CPU: the softmaxes over the pixels of each channel in one read of both maps from memory;
// the gradient another, and one write.
#include "../stable_abi.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "memory.h"
#include "pair_tiles.h"
#include "simd.h"

namespace fbkd {
namespace {

// Elements of a tile. It is read twice, for its maxima and for its sums: with both maps it stays in the second cache.
constexpr int64_t kTile = int64_t(1) << 16;
// Where channels are columns every tile leaves five numbers a channel: over 64 rows and more they are little beside it.
constexpr int64_t kMinPixelRows = 64, kMaxPixelRows = 256;
constexpr int64_t kFinishChannels = 64;

// Of a channel's pixels in a tile: the maxima m of both maps, and with x = (s - m_s) / tau, y = (t - m_t) / tau the
// sums of e^x, of e^y and of e^y (y - x).
enum Part { kStudentMax, kTeacherMax, kStudentSum, kTeacherSum, kDivergence, kParts };

// Logarithms of what e^(s / tau) and e^(t / tau) are divided by, of each image and channel.
enum Normaliser { kOfStudent, kOfTeacher, kNormalisers };

struct DivergenceLevel : PairLevel {
  double* normalisers;  // (images, 2, C); read only in backward
};

template <typename A>
FBKD_CLONES void row_maxima(const A* __restrict__ s, const A* __restrict__ t, int64_t count, double* s_max,
                            double* t_max) {
  A largest_s = static_cast<A>(*s_max), largest_t = static_cast<A>(*t_max);
#pragma omp simd reduction(max : largest_s, largest_t)
  for (int64_t i = 0; i < count; ++i) {
    largest_s = s[i] > largest_s ? s[i] : largest_s;
    largest_t = t[i] > largest_t ? t[i] : largest_t;
  }
  *s_max = largest_s, *t_max = largest_t;
}

template <typename A>
FBKD_CLONES void col_maxima(const A* __restrict__ s, const A* __restrict__ t, int64_t count, double* __restrict__ s_max,
                            double* __restrict__ t_max) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double u = s[i], v = t[i];
    s_max[i] = u > s_max[i] ? u : s_max[i];
    t_max[i] = v > t_max[i] ? v : t_max[i];
  }
}

// e^x for x <= 0, in A: its error is small beside what the float64 sums are of.
template <typename A>
FBKD_INLINE double power(double x) {
  return exponential(static_cast<A>(x));
}

// One channel's sums: sums[k] belongs to Part k, whose maxima are known.
template <typename A>
FBKD_CLONES void add_row_sums(const A* __restrict__ s, const A* __restrict__ t, double inverse, int64_t count,
                              double* __restrict__ sums) {
  const double s_max = sums[kStudentMax], t_max = sums[kTeacherMax];
  double s_sum = 0, t_sum = 0, divergence = 0;
#pragma omp simd reduction(+ : s_sum, t_sum, divergence)
  for (int64_t i = 0; i < count; ++i) {
    const double x = (s[i] - s_max) * inverse, y = (t[i] - t_max) * inverse, weight = power<A>(y);
    s_sum += power<A>(x), t_sum += weight, divergence += weight * (y - x);
  }
  sums[kStudentSum] += s_sum, sums[kTeacherSum] += t_sum, sums[kDivergence] += divergence;
}

// One pixel of `count` channels: sums[k * pitch + i] belongs to Part k of channel i.
template <typename A>
FBKD_CLONES void add_col_sums(const A* __restrict__ s, const A* __restrict__ t, double inverse, int64_t count,
                              double* __restrict__ sums, int64_t pitch) {
  const double* s_max = sums + kStudentMax * pitch;
  const double* t_max = sums + kTeacherMax * pitch;
  double* s_sum = sums + kStudentSum * pitch;
  double* t_sum = sums + kTeacherSum * pitch;
  double* divergence = sums + kDivergence * pitch;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double x = (s[i] - s_max[i]) * inverse, y = (t[i] - t_max[i]) * inverse, weight = power<A>(y);
    s_sum[i] += power<A>(x), t_sum[i] += weight, divergence[i] += weight * (y - x);
  }
}

// out = scale * (softmax(s) - softmax(t)): 0 of equal maps.
template <typename A>
FBKD_CLONES void row_gradient(const A* __restrict__ s, const A* __restrict__ t, double inverse, double s_norm,
                              double t_norm, double scale, int64_t count, A* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<A>(scale * (power<A>(s[i] * inverse - s_norm) - power<A>(t[i] * inverse - t_norm)));
}

template <typename A>
FBKD_CLONES void col_gradient(const A* __restrict__ s, const A* __restrict__ t, double inverse,
                              const double* __restrict__ s_norm, const double* __restrict__ t_norm, double scale,
                              int64_t count, A* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<A>(scale * (power<A>(s[i] * inverse - s_norm[i]) - power<A>(t[i] * inverse - t_norm[i])));
}

Tiling tiling_for(const MatrixView& view) {
  const int64_t rows = ceil_div(kTile, view.cols);
  const int64_t pixel_rows = min64(kMaxPixelRows, max64(kMinPixelRows, rows));
  return tiling_of(view, view.rows_are_channels ? rows : pixel_rows, view.cols);
}

template <typename A, class Base>
using DivergenceTiles = PairTiles<A, DivergenceLevel, Base>;

// Second stage: joins the tiles of blocks of an image's channels.
struct Divergences : Tiles {
  Divergences(const DivergenceLevel& level, const std::vector<double>& parts, double temperature,
              std::vector<double>& losses)
      : level(level), channels(level.student.channels()), parts(parts), temperature(temperature), losses(losses) {}

  int64_t blocks() const { return ceil_div(channels, kFinishChannels); }
  int64_t count() const override { return level.student.images * blocks(); }
  int64_t elements() const override { return static_cast<int64_t>(parts.size()); }
  void run(int64_t tile) override {
    const int64_t image = tile / blocks(), first = tile % blocks() * kFinishChannels;
    for (int64_t channel = first; channel < min64(first + kFinishChannels, channels); ++channel) finish(image, channel);
  }

  void finish(int64_t image, int64_t channel) const {
    const int64_t tiles = static_cast<int64_t>(parts.size()) / (level.student.images * kParts * channels);
    const double* first = parts.data() + image * tiles * kParts * channels + channel;
    const auto part = [&](int64_t tile, Part kind) { return first[(tile * kParts + kind) * channels]; };
    double s_max = part(0, kStudentMax), t_max = part(0, kTeacherMax);
    for (int64_t tile = 1; tile < tiles; ++tile) {
      s_max = std::max(s_max, part(tile, kStudentMax));
      t_max = std::max(t_max, part(tile, kTeacherMax));
    }
    double s_sum = 0, t_sum = 0, divergence = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const double x = (part(tile, kStudentMax) - s_max) / temperature;
      const double y = (part(tile, kTeacherMax) - t_max) / temperature, weight = std::exp(y);
      s_sum += std::exp(x) * part(tile, kStudentSum);
      t_sum += weight * part(tile, kTeacherSum);
      // Where a tile has nothing but -inf its sums are 0 or NaN already.
      divergence += weight * (part(tile, kDivergence) + (y == x ? 0 : part(tile, kTeacherSum) * (y - x)));
    }
    const double s_log = std::log(s_sum), t_log = std::log(t_sum);
    losses[image * channels + channel] = divergence / t_sum + (s_log - t_log);
    double* normalisers = level.normalisers + image * kNormalisers * channels + channel;
    normalisers[kOfStudent * channels] = s_max / temperature + s_log;
    normalisers[kOfTeacher * channels] = t_max / temperature + t_log;
  }

  DivergenceLevel level;
  int64_t channels;
  const std::vector<double>& parts;
  double temperature;
  std::vector<double>& losses;
};

struct Losses : StagedTiles {
  virtual double total() const = 0;
};

// First stage of a level: every tile's maxima and sums.
template <typename A>
struct LevelParts : DivergenceTiles<A, Losses> {
  LevelParts(const DivergenceLevel& level, double temperature)
      : DivergenceTiles<A, Losses>(level, tiling_for(level.student)),
        temperature(temperature),
        channels(level.student.channels()) {
    const MatrixView& view = level.student;
    const int64_t tiles = view.images * (view.rows_are_channels ? 1 : this->tiling.row_tiles);
    parts.resize(static_cast<size_t>(tiles * kParts * channels));
    losses.resize(static_cast<size_t>(view.images * channels));
  }

  void run(int64_t tile) override {
    const auto block = this->block_of(tile);
    if (!this->level.student.rows_are_channels) return reduce_pixels(tile, block);
    for (int64_t row = block.first_row; row < block.last_row; ++row)
      reduce_channel({block.image, row, row + 1, block.first_col, block.last_col});
  }

  using Block = typename DivergenceTiles<A, Losses>::Block;

  void reduce_channel(const Block& block) {
    double sums[kParts] = {kLeast, kLeast};
    this->pieces(block, [&](int64_t, int64_t, int64_t, const A* s, const A* t, int64_t cols) {
      row_maxima(s, t, cols, &sums[kStudentMax], &sums[kTeacherMax]);
    });
    this->pieces(block, [&](int64_t, int64_t, int64_t, const A* s, const A* t, int64_t cols) {
      add_row_sums(s, t, 1 / temperature, cols, sums);
    });
    for (int64_t kind = 0; kind < kParts; ++kind)
      parts[(block.image * kParts + kind) * channels + block.first_row] = sums[kind];
  }

  void reduce_pixels(int64_t tile, const Block& block) {
    double* sums = parts.data() + tile * kParts * channels;  // (5, C)
    std::fill(sums, sums + 2 * channels, kLeast);
    this->pieces(block, [&](int64_t, int64_t, int64_t col, const A* s, const A* t, int64_t cols) {
      col_maxima(s, t, cols, sums + kStudentMax * channels + col, sums + kTeacherMax * channels + col);
    });
    this->pieces(block, [&](int64_t, int64_t, int64_t col, const A* s, const A* t, int64_t cols) {
      add_col_sums(s, t, 1 / temperature, cols, sums + col, channels);
    });
  }

  std::unique_ptr<Tiles> second_stage() const override {
    return std::make_unique<Divergences>(this->level, parts, temperature, losses);
  }
  double total() const override {
    return temperature * temperature / static_cast<double>(losses.size()) * total_of(losses);
  }

  static constexpr double kLeast = -std::numeric_limits<double>::infinity();
  double temperature;
  int64_t channels;
  std::vector<double> parts;           // (tiles of pixels of all images, 5, C)
  mutable std::vector<double> losses;  // (images, C), written by the second stage
};

template <typename A>
struct LevelGradient : DivergenceTiles<A, Tiles> {
  LevelGradient(const DivergenceLevel& level, double temperature, double grad)
      : DivergenceTiles<A, Tiles>(level, tiling_for(level.student)),
        dense(gradient_view(level.student)),
        inverse(1 / temperature),
        scale(grad * temperature / static_cast<double>(level.student.images * level.student.channels())) {
    advise_huge_pages(level.ds, dense.numel() * element_size(level.student_type));
  }

  void run(int64_t tile) override {
    A buffer[kPiece];
    const DivergenceLevel& level = this->level;
    const int64_t channels = level.student.channels();
    this->pieces(tile, [&](int64_t image, int64_t row, int64_t col, const A* s, const A* t, int64_t cols) {
      const int64_t first = image * dense.image_stride + row * dense.row_stride + col;
      A* piece = piece_to_fill(level.student_type, level.ds, first, buffer);
      const bool by_row = level.student.rows_are_channels;
      const double* s_norm = level.normalisers + image * kNormalisers * channels + (by_row ? row : col);
      const double* t_norm = s_norm + kOfTeacher * channels;
      if (by_row)
        row_gradient(s, t, inverse, *s_norm, *t_norm, scale, cols, piece);
      else
        col_gradient(s, t, inverse, s_norm, t_norm, scale, cols, piece);
      store_piece(level.student_type, level.ds, first, cols, piece);
    });
  }

  MatrixView dense;
  double inverse, scale;
};

void launch_channel_divergence_forward(const std::vector<DivergenceLevel>& levels, double temperature,
                                       const Tensor& losses) {
  std::vector<std::unique_ptr<Losses>> parts;
  for (const DivergenceLevel& level : levels)
    parts.push_back(with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<Losses> {
      return std::make_unique<LevelParts<typename decltype(type)::type>>(level, temperature);
    }));
  run_tiles(parts);
  run_second_stages(parts);
  for (size_t i = 0; i < levels.size(); ++i) put_number(losses, levels[i].index, parts[i]->total());
}

void launch_channel_divergence_backward(const std::vector<DivergenceLevel>& levels, double temperature,
                                        const Tensor& grad) {
  std::vector<std::unique_ptr<Tiles>> gradients;
  for (const DivergenceLevel& level : levels)
    gradients.push_back(with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<Tiles> {
      return std::make_unique<LevelGradient<typename decltype(type)::type>>(level, temperature,
                                                                            number_at(grad, level.index));
    }));
  run_tiles(gradients);
}

// The losses (levels,), then each level's normalisers (N, 2, C).
Tensors channel_divergence_forward(const Tensors& student, const Tensors& teacher, double temperature) {
  const char* op = "channel_divergence";
  check_pair_lists(student, teacher, op);
  Tensors results{empty_squares(student, teacher)};
  torch::stable::zero_(results[0]);
  std::vector<DivergenceLevel> levels;
  for (size_t index = 0; index < student.size(); ++index) {
    const PairLevel pair = pair_level(student, teacher, index, nullptr, op);
    const Tensor& s = student[index];
    results.push_back(empty_like_device(s, {s.size(0), kNormalisers, s.size(1)}, ScalarType::Double));
    if (s.numel() > 0) levels.push_back({pair, static_cast<double*>(results.back().mutable_data_ptr())});
  }
  launch_channel_divergence_forward(levels, temperature, results[0]);
  return results;
}

Tensors channel_divergence_backward(const Tensors& student, const Tensors& teacher, const Tensors& normalisers,
                                    double temperature, const Tensor& grad) {
  const char* op = "channel_divergence_backward";
  check_pair_lists(student, teacher, op);
  check_length(normalisers, student.size(), op, "normalisers");
  checked_grad(grad, student, teacher, op);
  Tensors gradients;
  std::vector<DivergenceLevel> levels;
  for (size_t index = 0; index < student.size(); ++index) {
    const PairLevel pair = pair_level(student, teacher, index, &gradients, op);
    const Tensor& s = student[index];
    checked_data(normalisers[index], ScalarType::Double, kNormalisers * s.size(0) * s.size(1), s, op, "normalisers");
    if (s.numel() > 0) levels.push_back({pair, static_cast<double*>(normalisers[index].mutable_data_ptr())});
  }
  launch_channel_divergence_backward(levels, temperature, grad);
  return gradients;
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("channel_divergence_forward", TORCH_BOX(&fbkd::channel_divergence_forward));
  m.impl("channel_divergence_backward", TORCH_BOX(&fbkd::channel_divergence_backward));
}
