// Channel correlation on the CPU: five sums a channel in one read of both maps; the gradient another, and one write.
#include "../stable_abi.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "memory.h"
#include "pair_tiles.h"
#include "simd.h"

namespace fbkd {
namespace {

// Of a channel of both maps, each shifted by its first element; in float64, where a small difference of large sums
// keeps its digits.
enum Sum { kStudentSum, kTeacherSum, kStudentSquares, kTeacherSquares, kProducts, kSums };

// What is known of a channel, one row each of a level's coefficients (6, C). The gradient needs the first four: for a
// grad of 1, dS = student * (s - student_mean) + teacher * (t - teacher_mean). The others are sums over centred values.
enum Coefficient {
  kStudentMean,
  kTeacherMean,
  kStudent,
  kTeacher,
  kCentredStudentSquares,
  kCentredTeacherSquares,
  kCoefficients
};

struct CorrelationLevel : PairLevel {
  double* coefficients;  // (6, C); read only in backward
};

// One channel's sums: sums[k] belongs to Sum k.
template <typename A>
FBKD_CLONES void add_row_sums(const A* __restrict__ s, const A* __restrict__ t, double s_shift, double t_shift,
                              int64_t count, double* __restrict__ sums) {
  double s_sum = 0, t_sum = 0, s_squares = 0, t_squares = 0, products = 0;
#pragma omp simd reduction(+ : s_sum, t_sum, s_squares, t_squares, products)
  for (int64_t i = 0; i < count; ++i) {
    const double u = s[i] - s_shift, v = t[i] - t_shift;
    s_sum += u, t_sum += v;
    s_squares += u * u, t_squares += v * v, products += u * v;
  }
  sums[kStudentSum] += s_sum, sums[kTeacherSum] += t_sum;
  sums[kStudentSquares] += s_squares, sums[kTeacherSquares] += t_squares, sums[kProducts] += products;
}

// One pixel of `count` channels: sums[k * pitch + i] belongs to Sum k of channel i.
template <typename A>
FBKD_CLONES void add_col_sums(const A* __restrict__ s, const A* __restrict__ t, const double* __restrict__ s_shift,
                              const double* __restrict__ t_shift, int64_t count, double* __restrict__ sums,
                              int64_t pitch) {
  double* s_sum = sums + kStudentSum * pitch;
  double* t_sum = sums + kTeacherSum * pitch;
  double* s_squares = sums + kStudentSquares * pitch;
  double* t_squares = sums + kTeacherSquares * pitch;
  double* products = sums + kProducts * pitch;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double u = s[i] - s_shift[i], v = t[i] - t_shift[i];
    s_sum[i] += u, t_sum[i] += v;
    s_squares[i] += u * u, t_squares[i] += v * v, products[i] += u * v;
  }
}

// out = student * (s - s_mean) + teacher * (t - t_mean): 0 of equal maps, because nothing is contracted.
template <typename A>
FBKD_CLONES void row_gradient(const A* __restrict__ s, const A* __restrict__ t, double s_mean, double t_mean,
                              double student, double teacher, int64_t count, A* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double u = s[i] - s_mean, v = t[i] - t_mean;
    out[i] = static_cast<A>(student * u + teacher * v);
  }
}

template <typename A>
FBKD_CLONES void col_gradient(const A* __restrict__ s, const A* __restrict__ t, const double* __restrict__ s_mean,
                              const double* __restrict__ t_mean, const double* __restrict__ student,
                              const double* __restrict__ teacher, double scale, int64_t count, A* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const double u = s[i] - s_mean[i], v = t[i] - t_mean[i];
    out[i] = static_cast<A>(scale * (student[i] * u + teacher[i] * v));
  }
}

template <typename A, class Base>
using CorrelationTiles = PairTiles<A, CorrelationLevel, Base>;

double element_at(ScalarType type, const void* data, int64_t index) {
  double value;
  return *load_piece(type, data, index, 1, 1, &value);
}

// Second stage: the coefficients of blocks of channels, and what each channel adds to the loss.
struct Coefficients : Tiles {
  Coefficients(const CorrelationLevel& level, const std::vector<double>& shifts, const std::vector<double>& partials,
               double eps, std::vector<double>& losses)
      : level(level),
        channels(level.student.channels()),
        values(static_cast<double>(level.student.images * level.student.pixels())),
        shifts(shifts),
        partials(partials),
        eps(eps),
        losses(losses) {}

  int64_t count() const override { return ceil_div(channels, kFinishChannels); }
  int64_t elements() const override { return static_cast<int64_t>(partials.size()); }
  void run(int64_t tile) override {
    const int64_t last = min64((tile + 1) * kFinishChannels, channels);
    for (int64_t channel = tile * kFinishChannels; channel < last; ++channel) finish(channel);
  }

  void finish(int64_t channel) const {
    double sums[kSums] = {};
    const int64_t tiles = static_cast<int64_t>(partials.size()) / (kSums * channels);
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t sum = 0; sum < kSums; ++sum) sums[sum] += partials[(tile * kSums + sum) * channels + channel];
    const double s_mean = sums[kStudentSum] / values, t_mean = sums[kTeacherSum] / values;
    const double ss = centred(sums[kStudentSquares], s_mean, s_mean);
    const double tt = centred(sums[kTeacherSquares], t_mean, t_mean);
    const double st = sums[kProducts] - values * s_mean * t_mean;
    const double deviation = std::sqrt(ss / degrees()), a = deviation + eps;
    const double b = std::sqrt(tt / degrees()) + eps;
    const double scale = 1 / (static_cast<double>(channels) * values);
    losses[channel] = scale / 2 * (ss / (a * a) + tt / (b * b) - 2 * (st / (a * b)));
    // d(deviation)/ds = (s - mean) / (degrees * deviation), and 0 where the channel is constant.
    const double through_deviation = deviation == 0 ? 0 : (ss / (a * a) - st / (a * b)) / (a * degrees() * deviation);
    const auto put = [&](Coefficient kind, double value) { level.coefficients[kind * channels + channel] = value; };
    put(kStudentMean, shifts[channel] + s_mean);
    put(kTeacherMean, shifts[channels + channel] + t_mean);
    put(kStudent, scale * (1 / (a * a) - through_deviation));
    put(kTeacher, -scale * (1 / (a * b)));
    put(kCentredStudentSquares, ss);
    put(kCentredTeacherSquares, tt);
  }

  double degrees() const { return values > 1 ? values - 1 : 1; }
  // A sum of squares: 0 where rounding would leave less, NaN where it is.
  double centred(double squares, double mean, double same) const {
    const double sum = squares - values * mean * same;
    return sum < 0 ? 0 : sum;
  }

  CorrelationLevel level;
  int64_t channels;
  double values;  // of a channel, in all images
  const std::vector<double>& shifts;
  const std::vector<double>& partials;
  double eps;
  std::vector<double>& losses;
};

// First stage of a level: the sums of every tile. Where rows are channels a tile of an image has channels of its own.
template <typename A>
struct LevelSums : CorrelationTiles<A, LevelLoss> {
  LevelSums(const CorrelationLevel& level, double eps)
      : CorrelationTiles<A, LevelLoss>(level, channel_tiling(level.student)), eps(eps) {
    const int64_t channels = level.student.channels();
    const int64_t parts = level.student.images * (level.student.rows_are_channels ? 1 : this->tiling.row_tiles);
    partials.resize(static_cast<size_t>(parts * kSums * channels));
    losses.resize(static_cast<size_t>(channels));
    const MatrixView &s_view = level.student, &t_view = level.teacher;
    const bool by_row = s_view.rows_are_channels;
    for (int64_t channel = 0; channel < channels; ++channel)
      shifts.push_back(element_at(level.student_type, level.s, channel * (by_row ? s_view.row_stride : 1)));
    for (int64_t channel = 0; channel < channels; ++channel)
      shifts.push_back(
          element_at(level.teacher_type, level.t, channel * (by_row ? t_view.row_stride : t_view.col_stride)));
  }

  void run(int64_t tile) override {
    const MatrixView& view = this->level.student;
    const int64_t channels = view.channels();
    const double *s_shift = shifts.data(), *t_shift = s_shift + channels;
    this->pieces(tile, [&](int64_t image, int64_t row, int64_t col, const A* s, const A* t, int64_t cols) {
      if (!view.rows_are_channels) {
        double* sums = partials.data() + tile * kSums * channels + col;
        return add_col_sums(s, t, s_shift + col, t_shift + col, cols, sums, channels);
      }
      double sums[kSums] = {};
      add_row_sums(s, t, s_shift[row], t_shift[row], cols, sums);
      for (int64_t sum = 0; sum < kSums; ++sum) partials[(image * kSums + sum) * channels + row] += sums[sum];
    });
  }
  std::unique_ptr<Tiles> second_stage() const override {
    return std::make_unique<Coefficients>(this->level, shifts, partials, eps, losses);
  }
  double total() const override { return total_of(losses); }

  double eps;
  std::vector<double> shifts;          // (2, C): the first element of each channel of student and teacher
  std::vector<double> partials;        // (parts, 5, C)
  mutable std::vector<double> losses;  // (C), written by the second stage
};

template <typename A>
struct LevelGradient : CorrelationTiles<A, Tiles> {
  LevelGradient(const CorrelationLevel& level, double grad)
      : CorrelationTiles<A, Tiles>(level, channel_tiling(level.student)),
        dense(gradient_view(level.student)),
        grad(grad) {
    advise_huge_pages(level.ds, dense.numel() * element_size(level.student_type));
  }

  void run(int64_t tile) override {
    A buffer[kPiece];
    const CorrelationLevel& level = this->level;
    this->pieces(tile, [&](int64_t image, int64_t row, int64_t col, const A* s, const A* t, int64_t cols) {
      const int64_t first = image * dense.image_stride + row * dense.row_stride + col;
      A* piece = piece_to_fill(level.student_type, level.ds, first, buffer);
      if (level.student.rows_are_channels)
        row_gradient(s, t, at(kStudentMean, row)[0], at(kTeacherMean, row)[0], grad * at(kStudent, row)[0],
                     grad * at(kTeacher, row)[0], cols, piece);
      else
        col_gradient(s, t, at(kStudentMean, col), at(kTeacherMean, col), at(kStudent, col), at(kTeacher, col), grad,
                     cols, piece);
      store_piece(level.student_type, level.ds, first, cols, piece);
    });
  }

  const double* at(Coefficient kind, int64_t channel) const {
    return this->level.coefficients + kind * this->level.student.channels() + channel;
  }

  MatrixView dense;
  double grad;
};

void launch_channel_correlation_forward(const std::vector<CorrelationLevel>& levels, double eps, const Tensor& losses) {
  std::vector<std::unique_ptr<LevelLoss>> sums;
  for (const CorrelationLevel& level : levels)
    sums.push_back(with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<LevelLoss> {
      return std::make_unique<LevelSums<typename decltype(type)::type>>(level, eps);
    }));
  run_tiles(sums);
  run_second_stages(sums);
  for (size_t i = 0; i < levels.size(); ++i) put_number(losses, levels[i].index, sums[i]->total());
}

void launch_channel_correlation_backward(const std::vector<CorrelationLevel>& levels, const Tensor& grad) {
  std::vector<std::unique_ptr<Tiles>> gradients;
  for (const CorrelationLevel& level : levels)
    gradients.push_back(with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<Tiles> {
      return std::make_unique<LevelGradient<typename decltype(type)::type>>(level, number_at(grad, level.index));
    }));
  run_tiles(gradients);
}

// The losses (levels,), then each level's coefficients (6, C).
Tensors channel_correlation_forward(const Tensors& student, const Tensors& teacher, double eps) {
  const char* op = "channel_correlation";
  check_pair_lists(student, teacher, op);
  Tensors results{empty_squares(student, teacher)};
  torch::stable::zero_(results[0]);
  std::vector<CorrelationLevel> levels;
  for (size_t index = 0; index < student.size(); ++index) {
    const PairLevel pair = pair_level(student, teacher, index, nullptr, op);
    results.push_back(empty_like_device(student[index], {kCoefficients, student[index].size(1)}, ScalarType::Double));
    if (student[index].numel() > 0)
      levels.push_back({pair, static_cast<double*>(results.back().mutable_data_ptr())});
    else
      torch::stable::zero_(results.back());
  }
  launch_channel_correlation_forward(levels, eps, results[0]);
  return results;
}

Tensors channel_correlation_backward(const Tensors& student, const Tensors& teacher, const Tensors& coefficients,
                                     const Tensor& grad) {
  const char* op = "channel_correlation_backward";
  check_pair_lists(student, teacher, op);
  check_length(coefficients, student.size(), op, "coefficients");
  checked_grad(grad, student, teacher, op);
  Tensors gradients;
  std::vector<CorrelationLevel> levels;
  for (size_t index = 0; index < student.size(); ++index) {
    const PairLevel pair = pair_level(student, teacher, index, &gradients, op);
    const Tensor& s = student[index];
    checked_data(coefficients[index], ScalarType::Double, kCoefficients * s.size(1), s, op, "coefficients");
    if (s.numel() > 0) levels.push_back({pair, static_cast<double*>(coefficients[index].mutable_data_ptr())});
  }
  launch_channel_correlation_backward(levels, grad);
  return gradients;
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("channel_correlation_forward", TORCH_BOX(&fbkd::channel_correlation_forward));
  m.impl("channel_correlation_backward", TORCH_BOX(&fbkd::channel_correlation_backward));
}
