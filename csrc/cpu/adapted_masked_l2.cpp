// Adapted masked squared distance on the CPU: || A S + a - T || in blocks of pixels that stay in cache, around the
// vendor's matrix product.
#include "../stable_abi.h"

#include "../adapted_masked_l2_levels.h"

#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "memory.h"
#include "pixel_blocks.h"
#include "pool_gradient.h"
#include "vector.h"

namespace fbkd {
namespace {

// Turns products into E = scale * weight * (d + bias - t) and returns the sum of weight * (d + bias - t)^2.
template <typename A>
FBKD_CLONES A channel_residual(A* __restrict__ d, const A* __restrict__ t, A bias, A scale,
                               const A* __restrict__ weight, int64_t count, A& bias_gradient) {
  A sum = 0, total = 0;
#pragma omp simd reduction(+ : sum, total)
  for (int64_t i = 0; i < count; ++i) {
    const A difference = d[i] + bias - t[i];
    const A weighted = weight[i] * difference;
    sum += weighted * difference;
    d[i] = scale * weighted;
    total += d[i];
  }
  bias_gradient = total;
  return sum;
}

// The same along the channels of a pixel.
template <typename A>
FBKD_CLONES A pixel_residual(A* __restrict__ d, const A* __restrict__ t, const A* __restrict__ bias, A scale,
                             const A* __restrict__ weight, int64_t count, A* __restrict__ bias_gradient) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    const A difference = d[i] + bias[i] - t[i];
    const A weighted = weight[i] * difference;
    sum += weighted * difference;
    d[i] = scale * weighted;
    bias_gradient[i] += d[i];
  }
  return sum;
}

// x = scale * x + y; y nullptr: zeros.
template <typename A>
FBKD_CLONES void scale_and_add(A* __restrict__ x, A scale, const A* __restrict__ y, int64_t count) {
  if (y == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] *= scale;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = scale * x[i] + y[i];
  }
}

template <typename A>
Buffer<A> converted(ScalarType type, const void* data, int64_t count) {
  Buffer<A> result(static_cast<size_t>(count));
  const A* piece = load_piece(type, data, 0, 1, count, result.data());
  if (piece != result.data()) std::copy(piece, piece + count, result.data());
  return result;
}

// Finishes pieces of a student's gradient: scales what is there and adds what comes from elsewhere.
template <typename A>
struct Finisher {
  Finisher(ScalarType type, const MatrixView& view, const void* student, const StudentGradient& gradient)
      : type(type), student(student), gradient(gradient), dense(gradient_view(view)), pool(view, gradient.pool) {}

  int64_t offset(int64_t image, int64_t row, int64_t col) const {
    return image * dense.image_stride + row * dense.row_stride + col;
  }
  // A row's `count` elements from column `col` on, which are in `piece`, and end up in ds times scale.
  void finish(int64_t image, int64_t row, int64_t col, int64_t count, A scale, A* piece) const {
    A buffer[kPiece];
    for (int64_t done = 0; done < count; done += kPiece) {
      const int64_t size = min64(kPiece, count - done), first = offset(image, row, col + done);
      const A* incoming = nullptr;
      if (gradient.incoming != nullptr) incoming = load_piece(type, gradient.incoming, first, 1, size, buffer);
      if (scale != A(1) || incoming != nullptr) scale_and_add(piece + done, scale, incoming, size);
      if (pool.present) pool.put(image, row, col + done, size, type, student, true, piece + done);
      store_piece(type, gradient.ds, first, size, piece + done);
    }
  }

  ScalarType type;
  const void* student;
  StudentGradient gradient;
  MatrixView dense;
  PoolGradient<A> pool;
};

// A level cut into groups of blocks of pixels. Blocks and groups are functions of the shape alone.
template <typename A>
struct LevelDistance : SumOfSquares {
  // gradients nullptr: the sum alone. grad: of the sum of squares.
  LevelDistance(const AdaptedLevel& level, const AdaptedGradients* gradients, double grad)
      : level(level),
        student_channels(level.student_channels()),
        teacher_channels(level.teacher_channels()),
        block_pixels(block_pixels_of(max64(student_channels, teacher_channels), level.student.images, level.pixels())),
        blocks_per_image(ceil_div(level.pixels(), block_pixels)),
        blocks(level.student.images * blocks_per_image),
        groups(min64(blocks, groups_of(partial_bytes()))),
        weight(converted<A>(level.weight_type, level.weight, teacher_channels * student_channels)),
        bias(converted<A>(level.bias_type, level.bias, teacher_channels)),
        scale(static_cast<A>(2 * grad)),
        squares(static_cast<size_t>(groups)) {
    if (gradients == nullptr) return;
    finisher.emplace(level.student_type, level.student, level.s, gradients->student);
    parameter_gradients = *gradients;
    dweight.resize(static_cast<size_t>(groups * teacher_channels * student_channels));
    dbias.resize(static_cast<size_t>(groups * teacher_channels));
    advise_huge_pages(gradients->student.ds, finisher->dense.numel() * element_size(level.student_type));
  }

  int64_t partial_bytes() const override {
    return teacher_channels * student_channels * static_cast<int64_t>(sizeof(A));
  }
  int64_t count() const override { return groups; }
  int64_t elements() const override { return level.student.numel() * teacher_channels; }

  double total() const override { return total_of(squares); }
  std::unique_ptr<Tiles> second_stage() const override;

  struct Workspace {
    Buffer<A> adapted, student, gradient, bias_piece, ones;
  };

  void run(int64_t group) override {
    Workspace space;
    space.adapted.resize(static_cast<size_t>(teacher_channels * block_pixels));
    space.bias_piece.resize(static_cast<size_t>(teacher_channels));
    space.ones.assign(kPiece, A(1));
    for (int64_t index = group * blocks / groups; index < (group + 1) * blocks / groups; ++index) {
      const int64_t first = index % blocks_per_image * block_pixels;
      const Block block{index / blocks_per_image, first, min64(block_pixels, level.pixels() - first)};
      const Matrix<A> s = read_block(level.student_type, level.s, level.student, block, space.student);  // (Cs, pixels)
      const Matrix<A> d = compact(space.adapted.data(), teacher_channels, block.size);                   // (Ct, pixels)
      matmul(d, weight_matrix(weight.data()), s);
      squares[group] += residual(block, d.data, space, dbias.empty() ? nullptr : &dbias[group * teacher_channels]);
      if (finisher.has_value()) gradient(block, d, s, space, &dweight[group * teacher_channels * student_channels]);
    }
  }

  Matrix<A> weight_matrix(const A* data) const {
    return {const_cast<A*>(data), teacher_channels, student_channels, student_channels, 1};
  }
  // A compact block in the student's order.
  Matrix<A> compact(A* data, int64_t channels, int64_t pixels) const {
    return block_matrix(data, level.student.rows_are_channels, channels, pixels);
  }

  // Products become E; the block's sum of squares. Adds the sums of E over pixels to total (Ct) unless nullptr.
  double residual(const Block& block, A* d, Workspace& space, double* total) const {
    double sum = 0;
    A buffer[kPiece];
    const MatrixView& view = level.teacher;
    const bool by_channel = level.student.rows_are_channels;
    const BlockRows rows = rows_of(block, level.student.rows_are_channels, teacher_channels);
    for (int64_t row = 0; row < rows.count; ++row) {
      const A row_weight = by_channel ? channel_weight(block.image, row) : pixel_weight(block.image, block.first + row);
      for (int64_t col = 0; col < rows.cols; col += kPiece) {
        const int64_t size = min64(kPiece, rows.cols - col);
        const int64_t first = block.image * view.image_stride + (rows.first_row + row) * view.row_stride +
                              (rows.first_col + col) * view.col_stride;
        const A* t = load_piece(level.teacher_type, level.t, first, view.col_stride, size, buffer);
        A* piece = d + row * rows.cols + col;
        A part;
        if (by_channel) {
          A channel_total;
          part = channel_residual(piece, t, bias[row], scale * row_weight,
                                  weights(level.spatial_mask, block.image * level.pixels() + block.first + col, space),
                                  size, channel_total);
          if (total != nullptr) total[row] += channel_total;
        } else {
          part = pixel_residual(piece, t, &bias[col], scale * row_weight,
                                weights(level.channel_mask, block.image * teacher_channels + col, space), size,
                                &space.bias_piece[col]);
        }
        sum += static_cast<double>(row_weight) * part;
      }
      if (!by_channel && (row % kRowsOfPiece == kRowsOfPiece - 1 || row == rows.count - 1))
        flush(space.bias_piece.data(), teacher_channels, total);
    }
    return sum;
  }

  A channel_weight(int64_t image, int64_t channel) const {
    const A* mask = static_cast<const A*>(level.channel_mask);
    return mask == nullptr ? A(1) : mask[image * teacher_channels + channel];
  }
  A pixel_weight(int64_t image, int64_t pixel) const {
    const A* mask = static_cast<const A*>(level.spatial_mask);
    return mask == nullptr ? A(1) : mask[image * level.pixels() + pixel];
  }
  static const A* weights(const void* mask, int64_t first, const Workspace& space) {
    return mask == nullptr ? space.ones.data() : static_cast<const A*>(mask) + first;
  }

  // e (Ct, pixels), s (Cs, pixels): the block of dS, and its part of the weight's gradient.
  void gradient(const Block& block, const Matrix<A>& e, const Matrix<A>& s, Workspace& space, A* group_dweight) const {
    matmul_add(weight_matrix(group_dweight), e, s.transposed());
    const BlockRows rows = rows_of(block, level.student);
    const MatrixView& dense = finisher->dense;
    const int64_t first = finisher->offset(block.image, rows.first_row, rows.first_col);
    const bool in_place = is_accumulator<A>(level.student_type);
    if (!in_place) space.gradient.resize(static_cast<size_t>(student_channels * block_pixels));
    A* data = piece_to_fill(level.student_type, finisher->gradient.ds, first, space.gradient.data());
    const int64_t pitch = in_place ? dense.row_stride : rows.cols;
    const bool by_channel = level.student.rows_are_channels;
    const Matrix<A> ds{data, student_channels, block.size, by_channel ? pitch : 1, by_channel ? 1 : pitch};
    matmul(ds, weight_matrix(weight.data()).transposed(), e);
    for (int64_t row = 0; row < rows.count; ++row)
      finisher->finish(block.image, rows.first_row + row, rows.first_col, rows.cols, A(1), data + row * pitch);
  }

  AdaptedLevel level;
  int64_t student_channels, teacher_channels;  // Cs, Ct
  int64_t block_pixels, blocks_per_image, blocks, groups;
  Buffer<A> weight, bias;
  A scale;
  std::vector<double> squares;  // (groups)
  Buffer<A> dweight;            // (groups, Ct, Cs)
  std::vector<double> dbias;    // (groups, Ct)
  std::optional<Finisher<A>> finisher;
  AdaptedGradients parameter_gradients{};
};

// Second stage: adds the groups' gradients of the parameters, in their order. A tile is a row of the weight.
template <typename A>
struct Parameters : Tiles {
  explicit Parameters(const LevelDistance<A>& distance) : distance(distance) {}

  int64_t count() const override { return distance.teacher_channels; }
  int64_t elements() const override {
    return distance.teacher_channels * distance.student_channels * max64(1, distance.groups);
  }
  void run(int64_t row) override {
    const int64_t size = distance.student_channels;
    Buffer<A> sum(static_cast<size_t>(size));
    double total = 0;
    for (int64_t group = 0; group < distance.groups; ++group) {
      const int64_t index = group * distance.teacher_channels + row;
      add_vector(sum.data(), &distance.dweight[index * size], size);
      total += distance.dbias[index];
    }
    const A bias = static_cast<A>(total);
    const AdaptedGradients& gradients = distance.parameter_gradients;
    store_piece(distance.level.weight_type, gradients.dweight, row * size, size, sum.data());
    store_piece(distance.level.bias_type, gradients.dbias, row, 1, &bias);
  }

  const LevelDistance<A>& distance;
};

template <typename A>
std::unique_ptr<Tiles> LevelDistance<A>::second_stage() const {
  return std::make_unique<Parameters<A>>(*this);
}

std::unique_ptr<SumOfSquares> make_distance(const AdaptedLevel& level, const AdaptedGradients* gradients, double grad) {
  return with_accumulator(level.accumulation(), [&](auto type) -> std::unique_ptr<SumOfSquares> {
    return std::make_unique<LevelDistance<typename decltype(type)::type>>(level, gradients, grad);
  });
}

// Gradients of the students, the weights and the biases, and the levels' sums of squares.
struct AdaptedResult {
  Tensors dstudent, dweight, dbias;
  std::vector<double> squares;

  Tensors gradients() const {
    Tensors result = dstudent;
    result.insert(result.end(), dweight.begin(), dweight.end());
    result.insert(result.end(), dbias.begin(), dbias.end());
    return result;
  }
};

// Sums of squares and gradients. grad nullptr: of ones, with nothing else added.
AdaptedResult launch_adapted_masked_l2_backward(const AdaptedArguments& arguments, const Tensor* grad,
                                                const OptionalTensors& pool_grads, const OptionalTensors& grad_student,
                                                const char* op) {
  const std::vector<AdaptedLevel> levels = adapted_levels(arguments, op);
  check_length(pool_grads, 4 * levels.size(), op, "pool_grads");
  check_length(grad_student, levels.size(), op, "grad_student");
  if (grad != nullptr) checked_grad(*grad, arguments.student, arguments.teacher, op);
  AdaptedResult result;
  std::vector<std::unique_ptr<SumOfSquares>> distances;
  for (size_t index = 0; index < levels.size(); ++index) {
    const AdaptedLevel& level = levels[index];
    const Tensor& s = arguments.student[index];
    result.dstudent.push_back(empty_gradient(s, level.student));
    result.dweight.push_back(
        empty_like_device(s, {level.teacher_channels(), level.student_channels()}, level.weight_type));
    result.dbias.push_back(empty_like_device(s, {level.teacher_channels()}, level.bias_type));
    const StudentGradient student = student_gradient(s, level.student, level.accumulation(), pool_grads, grad_student,
                                                     index, result.dstudent.back(), op);
    const AdaptedGradients gradients{student, result.dweight.back().mutable_data_ptr(),
                                     result.dbias.back().mutable_data_ptr()};
    distances.push_back(make_distance(level, &gradients, grad == nullptr ? 1 : number_at(*grad, index)));
  }
  run_products(distances);
  run_second_stages(distances);
  for (const auto& distance : distances) result.squares.push_back(distance->total());
  return result;
}

// The difference is never kept: in cache, computing it again costs less than it would take to write and read it.
Tensors adapted_masked_l2_forward(const Tensors& student, const Tensors& weight, const Tensors& bias,
                                  const Tensors& teacher, const OptionalTensors& spatial_mask,
                                  const OptionalTensors& channel_mask, bool keep) {
  const char* op = "adapted_masked_l2_forward";
  STD_TORCH_CHECK(!keep, op, ": keep must be false on the CPU");
  std::vector<std::unique_ptr<SumOfSquares>> distances;
  for (const AdaptedLevel& level : adapted_levels({student, weight, bias, teacher, spatial_mask, channel_mask}, op))
    distances.push_back(make_distance(level, nullptr, 1));
  run_products(distances);
  const Tensor squares = empty_squares(student, teacher);
  for (size_t index = 0; index < distances.size(); ++index) put_number(squares, index, distances[index]->total());
  return {squares};
}

Tensors adapted_masked_l2_backward(const Tensors& student, const Tensors& weight, const Tensors& bias,
                                   const Tensors& teacher, const OptionalTensors& spatial_mask,
                                   const OptionalTensors& channel_mask, const Tensors& residual, const Tensor& grad,
                                   const OptionalTensors& pool_grads, const OptionalTensors& grad_student) {
  const char* op = "adapted_masked_l2_backward";
  check_length(residual, 0, op, "residual");
  const AdaptedArguments arguments{student, weight, bias, teacher, spatial_mask, channel_mask};
  return launch_adapted_masked_l2_backward(arguments, &grad, pool_grads, grad_student, op).gradients();
}

// The sums of squares, then the gradients for grad = 1.
Tensors adapted_masked_l2_with_gradient(const Tensors& student, const Tensors& weight, const Tensors& bias,
                                        const Tensors& teacher, const OptionalTensors& spatial_mask,
                                        const OptionalTensors& channel_mask) {
  const AdaptedArguments arguments{student, weight, bias, teacher, spatial_mask, channel_mask};
  const OptionalTensors no_pool_grads(4 * student.size()), no_grad_student(student.size());
  const AdaptedResult result = launch_adapted_masked_l2_backward(arguments, nullptr, no_pool_grads, no_grad_student,
                                                                 "adapted_masked_l2_with_gradient");
  const Tensor squares = empty_squares(student, teacher);
  for (size_t index = 0; index < student.size(); ++index) put_number(squares, index, result.squares[index]);
  Tensors outputs{squares};
  for (const Tensor& gradient : result.gradients()) outputs.push_back(gradient);
  return outputs;
}

// Second half of `with_gradient`: scales the stored gradient (made for grad = 1) by the real grad and adds the other
// incoming gradients, in place. A tile is a row of a student's gradient.
template <typename A>
struct FinishRows : Tiles {
  FinishRows(Finisher<A> finisher, double grad) : finisher(std::move(finisher)), scale(static_cast<A>(grad)) {}

  int64_t count() const override { return finisher.dense.images * finisher.dense.rows; }
  int64_t elements() const override { return finisher.dense.numel(); }
  void run(int64_t tile) override {
    const int64_t image = tile / finisher.dense.rows, row = tile % finisher.dense.rows;
    A* data = static_cast<A*>(finisher.gradient.ds) + finisher.offset(image, row, 0);
    finisher.finish(image, row, 0, finisher.dense.cols, scale, data);
  }

  Finisher<A> finisher;
  A scale;
};

void adapted_masked_l2_finish_(const Tensors& gradient, const Tensors& student, const Tensor& grad,
                               const OptionalTensors& pool_grads, const OptionalTensors& grad_student) {
  const char* op = "adapted_masked_l2_finish";
  check_length(gradient, student.size(), op, "gradient");
  check_length(pool_grads, 4 * student.size(), op, "pool_grads");
  check_length(grad_student, student.size(), op, "grad_student");
  checked_data(grad, grad.scalar_type(), static_cast<int64_t>(student.size()), grad, op, "grad");
  STD_TORCH_CHECK(grad.scalar_type() == accumulation_type(grad.scalar_type()), op, ": grad must be float32 or float64");
  std::vector<std::unique_ptr<Tiles>> rows;
  for (size_t index = 0; index < student.size(); ++index) {
    const Tensor& s = student[index];
    const MatrixView view = checked_view(s, op, "student");
    const ScalarType type = s.scalar_type();
    STD_TORCH_CHECK(type == accumulation_type(type), op, ": student must be float32 or float64");
    const StudentGradient wanted =
        student_gradient(s, view, type, pool_grads, grad_student, index, gradient[index], op);
    rows.push_back(with_accumulator(type, [&](auto tag) -> std::unique_ptr<Tiles> {
      using A = typename decltype(tag)::type;
      const Finisher<A> finisher(type, view, s.const_data_ptr(), wanted);
      return std::make_unique<FinishRows<A>>(finisher, number_at(grad, index));
    }));
  }
  run_tiles(rows);
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("adapted_masked_l2_forward", TORCH_BOX(&fbkd::adapted_masked_l2_forward));
  m.impl("adapted_masked_l2_backward", TORCH_BOX(&fbkd::adapted_masked_l2_backward));
  m.impl("adapted_masked_l2_with_gradient", TORCH_BOX(&fbkd::adapted_masked_l2_with_gradient));
  m.impl("adapted_masked_l2_finish_", TORCH_BOX(&fbkd::adapted_masked_l2_finish_));
}
