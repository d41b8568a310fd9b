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

// Additions in a chain of the accumulation dtype, before they are added in float64.
constexpr int64_t kChain = 32;

// Of a channel's pixels in a tile: the maxima m of both maps, and with x = (s - m_s) / tau, y = (t - m_t) / tau the
// sums of e^x, of e^y and of e^y (y - x).
enum Part { kStudentMax, kTeacherMax, kStudentSum, kTeacherSum, kDivergence, kParts };

// What the gradient needs of a channel of an image: softmax(s / tau) = factor * e^((s - max) / tau).
enum Normaliser { kStudentPeak, kStudentFactor, kTeacherPeak, kTeacherFactor, kNormalisers };

struct DivergenceLevel : PairLevel {
  void* normalisers;  // (images, 4, C) of the accumulation dtype; read only in backward
};

// The parts of one channel. To join two sets of pixels, rescale both sums to the larger maximum and add.
struct SoftmaxSums {
  double s_max = kLeast, t_max = kLeast, s_sum = 0, t_sum = 0, divergence = 0;

  void add(const SoftmaxSums& other, double inverse) {
    move_to(std::max(s_max, other.s_max), std::max(t_max, other.t_max), inverse);
    SoftmaxSums moved = other;
    moved.move_to(s_max, t_max, inverse);
    s_sum += moved.s_sum, t_sum += moved.t_sum, divergence += moved.divergence;
  }
  void move_to(double s_largest, double t_largest, double inverse) {
    if (s_largest == s_max && t_largest == t_max) return;
    const double x = (s_max - s_largest) * inverse, y = (t_max - t_largest) * inverse, weight = std::exp(y);
    divergence = t_sum == 0 ? divergence : weight * (divergence + t_sum * (y - x));
    s_sum *= std::exp(x), t_sum *= weight;
    s_max = s_largest, t_max = t_largest;
  }

  static constexpr double kLeast = std::numeric_limits<double>::lowest();
};

// No maximum is -inf, because e^(-inf - kLowest) is 0 and e^(-inf + inf) NaN.
template <typename A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

template <typename A>
FBKD_CLONES A largest_of(const A* x, int64_t count) {
  A largest = kLowest<A>;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// One channel's sums: sums[k] belongs to Part k, whose maxima are known.
template <typename A>
FBKD_CLONES void row_sums(const A* __restrict__ s, const A* __restrict__ t, A s_max, A t_max, A inverse, int64_t count,
                          SoftmaxSums* sums) {
  A s_sum = 0, t_sum = 0, divergence = 0;
#pragma omp simd reduction(+ : s_sum, t_sum, divergence)
  for (int64_t i = 0; i < count; ++i) {
    const A x = (s[i] - s_max) * inverse, y = (t[i] - t_max) * inverse, weight = exponential(y);
    s_sum += exponential(x), t_sum += weight, divergence += weight * (y - x);
  }
  sums->s_sum = s_sum, sums->t_sum = t_sum, sums->divergence = divergence;
}

// Of some pixels' channels, up to kPiece of them; [k] belongs to Part k.
template <typename A>
using ChannelSums = A[kParts][kPiece];

template <typename A>
FBKD_CLONES void add_col_maxima(const A* __restrict__ s, const A* __restrict__ t, int64_t count,
                                ChannelSums<A>& parts) {
  A* __restrict__ s_max = parts[kStudentMax], * __restrict__ t_max = parts[kTeacherMax];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    s_max[i] = s[i] > s_max[i] ? s[i] : s_max[i];
    t_max[i] = t[i] > t_max[i] ? t[i] : t_max[i];
  }
}

template <typename A>
FBKD_CLONES void add_col_sums(const A* __restrict__ s, const A* __restrict__ t, A inverse, int64_t count,
                              ChannelSums<A>& parts) {
  const A* __restrict__ s_max = parts[kStudentMax], * __restrict__ t_max = parts[kTeacherMax];
  A* __restrict__ s_sum = parts[kStudentSum], * __restrict__ t_sum = parts[kTeacherSum];
  A* __restrict__ divergence = parts[kDivergence];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A x = (s[i] - s_max[i]) * inverse, y = (t[i] - t_max[i]) * inverse, weight = exponential(y);
    s_sum[i] += exponential(x), t_sum[i] += weight, divergence[i] += weight * (y - x);
  }
}

// out = scale * (softmax(s) - softmax(t)): 0 of equal maps.
template <typename A>
FBKD_CLONES void row_gradient(const A* __restrict__ s, const A* __restrict__ t, A inverse, A s_max, A s_factor, A t_max,
                              A t_factor, A scale, int64_t count, A* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A of_student = s_factor * exponential((s[i] - s_max) * inverse);
    out[i] = scale * (of_student - t_factor * exponential((t[i] - t_max) * inverse));
  }
}

template <typename A>
FBKD_CLONES void col_gradient(const A* __restrict__ s, const A* __restrict__ t, A inverse, const A* __restrict__ s_max,
                              const A* __restrict__ s_factor, const A* __restrict__ t_max,
                              const A* __restrict__ t_factor, A scale, int64_t count, A* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A of_student = s_factor[i] * exponential((s[i] - s_max[i]) * inverse);
    out[i] = scale * (of_student - t_factor[i] * exponential((t[i] - t_max[i]) * inverse));
  }
}

template <typename A, class Base>
using DivergenceTiles = PairTiles<A, DivergenceLevel, Base>;

// Second stage: joins the tiles of blocks of an image's channels.
template <typename A>
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
    SoftmaxSums all = sums_at(image * tiles, channel);
    for (int64_t tile = 1; tile < tiles; ++tile) all.add(sums_at(image * tiles + tile, channel), 1 / temperature);
    losses[image * channels + channel] = all.divergence / all.t_sum + (std::log(all.s_sum) - std::log(all.t_sum));
    A* normalisers = static_cast<A*>(level.normalisers) + image * kNormalisers * channels + channel;
    normalisers[kStudentPeak * channels] = static_cast<A>(all.s_max);
    normalisers[kStudentFactor * channels] = static_cast<A>(1 / all.s_sum);
    normalisers[kTeacherPeak * channels] = static_cast<A>(all.t_max);
    normalisers[kTeacherFactor * channels] = static_cast<A>(1 / all.t_sum);
  }

  SoftmaxSums sums_at(int64_t tile, int64_t channel) const {
    const double* first = parts.data() + tile * kParts * channels + channel;
    return {first[kStudentMax * channels], first[kTeacherMax * channels], first[kStudentSum * channels],
            first[kTeacherSum * channels], first[kDivergence * channels]};
  }

  DivergenceLevel level;
  int64_t channels;
  const std::vector<double>& parts;
  double temperature;
  std::vector<double>& losses;
};

// First stage of a level: every tile's maxima and sums.
template <typename A>
struct LevelSums : DivergenceTiles<A, LevelLoss> {
  LevelSums(const DivergenceLevel& level, double temperature)
      : DivergenceTiles<A, LevelLoss>(level, channel_tiling(level.student)),
        temperature(temperature),
        channels(level.student.channels()) {
    const MatrixView& view = level.student;
    const int64_t tiles = view.images * (view.rows_are_channels ? 1 : this->tiling.row_tiles);
    parts.resize(static_cast<size_t>(tiles * kParts * channels));
    losses.resize(static_cast<size_t>(view.images * channels));
  }

  using Block = typename DivergenceTiles<A, LevelLoss>::Block;

  void run(int64_t tile) override {
    const Block block = this->block_of(tile);
    if (this->level.student.rows_are_channels) {
      for (int64_t row = block.first_row; row < block.last_row; ++row)
        reduce_channel({block.image, row, row + 1, block.first_col, block.last_col});
      return;
    }
    for (int64_t col = block.first_col; col < block.last_col; col += kPiece)
      reduce_pixels(tile, {block.image, block.first_row, block.last_row, col, min64(col + kPiece, block.last_col)});
  }

  void reduce_channel(const Block& block) {
    SoftmaxSums all;
    this->pieces(block, [&](int64_t, int64_t, int64_t, const A* s, const A* t, int64_t cols) {
      const A s_max = largest_of(s, cols), t_max = largest_of(t, cols);
      SoftmaxSums piece{s_max, t_max};
      row_sums(s, t, s_max, t_max, static_cast<A>(1 / temperature), cols, &piece);
      all.add(piece, 1 / temperature);
    });
    double* out = parts.data() + block.image * kParts * channels + block.first_row;
    const double numbers[] = {all.s_max, all.t_max, all.s_sum, all.t_sum, all.divergence};
    for (int64_t kind = 0; kind < kParts; ++kind) out[kind * channels] = numbers[kind];
  }

  void reduce_pixels(int64_t tile, const Block& block) {
    ChannelSums<A> some;
    const int64_t count = block.last_col - block.first_col;
    double* out = parts.data() + tile * kParts * channels + block.first_col;
    for (int64_t kind : {kStudentMax, kTeacherMax}) std::fill_n(some[kind], count, kLowest<A>);
    this->pieces(block, [&](int64_t, int64_t, int64_t, const A* s, const A* t, int64_t cols) {
      add_col_maxima(s, t, cols, some);
    });
    for (int64_t kind : {kStudentMax, kTeacherMax}) std::copy_n(some[kind], count, out + kind * channels);
    for (int64_t row = block.first_row; row < block.last_row; row += kChain) {
      for (int64_t kind : {kStudentSum, kTeacherSum, kDivergence}) std::fill_n(some[kind], count, A(0));
      const Block chain{block.image, row, min64(row + kChain, block.last_row), block.first_col, block.last_col};
      this->pieces(chain, [&](int64_t, int64_t, int64_t, const A* s, const A* t, int64_t cols) {
        add_col_sums(s, t, static_cast<A>(1 / temperature), cols, some);
      });
      for (int64_t kind : {kStudentSum, kTeacherSum, kDivergence})
        for (int64_t i = 0; i < count; ++i) out[kind * channels + i] += some[kind][i];
    }
  }

  std::unique_ptr<Tiles> second_stage() const override {
    return std::make_unique<Divergences<A>>(this->level, parts, temperature, losses);
  }
  double total() const override {
    return temperature * temperature / static_cast<double>(losses.size()) * total_of(losses);
  }

  double temperature;
  int64_t channels;
  std::vector<double> parts;           // (tiles of pixels of all images, 5, C), 0 at first
  mutable std::vector<double> losses;  // (images, C), written by the second stage
};

template <typename A>
struct LevelGradient : DivergenceTiles<A, Tiles> {
  LevelGradient(const DivergenceLevel& level, double temperature, double grad)
      : DivergenceTiles<A, Tiles>(level, channel_tiling(level.student)),
        dense(gradient_view(level.student)),
        inverse(static_cast<A>(1 / temperature)),
        scale(static_cast<A>(grad * temperature / static_cast<double>(level.student.images * channels()))) {
    advise_huge_pages(level.ds, dense.numel() * element_size(level.student_type));
  }

  int64_t channels() const { return this->level.student.channels(); }

  void run(int64_t tile) override {
    A buffer[kPiece];
    const DivergenceLevel& level = this->level;
    const bool by_row = level.student.rows_are_channels;
    this->pieces(tile, [&](int64_t image, int64_t row, int64_t col, const A* s, const A* t, int64_t cols) {
      const int64_t first = image * dense.image_stride + row * dense.row_stride + col;
      A* piece = piece_to_fill(level.student_type, level.ds, first, buffer);
      const A* norms = static_cast<const A*>(level.normalisers) + image * kNormalisers * channels();
      const A* rows[kNormalisers];
      for (int64_t kind = 0; kind < kNormalisers; ++kind) rows[kind] = norms + kind * channels() + (by_row ? row : col);
      const auto [s_max, s_factor, t_max, t_factor] = rows;
      if (by_row)
        row_gradient(s, t, inverse, *s_max, *s_factor, *t_max, *t_factor, scale, cols, piece);
      else
        col_gradient(s, t, inverse, s_max, s_factor, t_max, t_factor, scale, cols, piece);
      store_piece(level.student_type, level.ds, first, cols, piece);
    });
  }

  MatrixView dense;
  A inverse, scale;
};

void launch_channel_divergence_forward(const std::vector<DivergenceLevel>& levels, double temperature,
                                       const Tensor& losses) {
  std::vector<std::unique_ptr<LevelLoss>> parts;
  for (const DivergenceLevel& level : levels)
    parts.push_back(with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<LevelLoss> {
      return std::make_unique<LevelSums<typename decltype(type)::type>>(level, temperature);
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

// The losses (levels,), then each level's normalisers (N, 4, C).
Tensors channel_divergence_forward(const Tensors& student, const Tensors& teacher, double temperature) {
  const char* op = "channel_divergence";
  check_pair_lists(student, teacher, op);
  Tensors results{empty_squares(student, teacher)};
  torch::stable::zero_(results[0]);
  std::vector<DivergenceLevel> levels;
  for (size_t index = 0; index < student.size(); ++index) {
    const PairLevel pair = pair_level(student, teacher, index, nullptr, op);
    const Tensor& s = student[index];
    results.push_back(empty_like_device(s, {s.size(0), kNormalisers, s.size(1)}, pair.accumulation()));
    if (s.numel() > 0) levels.push_back({pair, results.back().mutable_data_ptr()});
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
    checked_data(normalisers[index], pair.accumulation(), kNormalisers * s.size(0) * s.size(1), s, op, "normalisers");
    if (s.numel() > 0) levels.push_back({pair, normalisers[index].mutable_data_ptr()});
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
