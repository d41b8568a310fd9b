// Squared residual of the relation term on the CPU, || t + U r - P s + v || with r = W t or t, and all its gradients,
// in blocks of pixels that stay in cache, around the vendor's matrix product.
#include "../stable_abi.h"

#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "buffer.h"
#include "memory.h"
#include "pixel_blocks.h"
#include "vector.h"

namespace fbkd {
namespace {

// Scales e; returns the sum of the squares before, and in `total` the sum after.
template <typename A>
FBKD_CLONES A square_and_scale(A* __restrict__ e, A scale, int64_t count, A& total) {
  A squares = 0, sum = 0;
#pragma omp simd reduction(+ : squares, sum)
  for (int64_t i = 0; i < count; ++i) {
    squares += e[i] * e[i];
    e[i] *= scale;
    sum += e[i];
  }
  total = sum;
  return squares;
}

// The same along the channels of a pixel, whose scaled residuals are added to `totals`.
template <typename A>
FBKD_CLONES A square_and_scale(A* __restrict__ e, A scale, int64_t count, A* __restrict__ totals) {
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) {
    squares += e[i] * e[i];
    e[i] *= scale;
    totals[i] += e[i];
  }
  return squares;
}

struct RelationLevel {
  ScalarType student_type, teacher_type;
  MatrixView student, teacher;
  const void* s;
  const void* t;
  const void* student_matrix;      // P (N, Ct, Cs), as all parameters in the accumulation type
  const void* teacher_matrix;      // U (N, Ct, c)
  const void* teacher_projection;  // W (c, Ct), nullptr: the identity
  const void* offset;              // v (N, Ct)
  int64_t inner;                   // c

  ScalarType accumulation() const { return accumulation_type(student_type, teacher_type); }
};

// Gradients of one level; ds nullptr: the student's is not wanted.
struct RelationGradients {
  void* ds;
  void* dstudent_matrix;
  void* dteacher_matrix;
  void* dteacher_projection;
  void* doffset;
};

// A level cut into groups of blocks of an image's pixels. Blocks and groups are functions of the shape alone.
template <typename A>
struct LevelResidual : SumOfSquares {
  // gradients nullptr: the sum alone. grad: of the sum of squares.
  LevelResidual(const RelationLevel& level, const RelationGradients* gradients, double grad)
      : level(level),
        student_channels(level.student.channels()),
        teacher_channels(level.teacher.channels()),
        block_pixels(
            block_pixels_of(max64(student_channels, teacher_channels), level.student.images, level.student.pixels())),
        blocks(ceil_div(level.student.pixels(), block_pixels)),
        images(level.student.images),
        groups(max64(1, min64(blocks, groups_of(partial_bytes()) / max64(1, images)))),
        negative(static_cast<size_t>(images * teacher_channels * student_channels)),
        scale(static_cast<A>(2 * grad)),
        squares(static_cast<size_t>(images * groups)) {
    const A* matrix = static_cast<const A*>(level.student_matrix);
    std::transform(matrix, matrix + negative.size(), negative.begin(), [](A value) { return -value; });
    if (gradients == nullptr) return;
    wanted = *gradients;
    differentiates = true;
    partials.resize(static_cast<size_t>(images * groups * partial_size()));
    totals.resize(static_cast<size_t>(images * groups * teacher_channels));
    if (wanted.ds != nullptr) advise_huge_pages(wanted.ds, level.student.numel() * element_size(level.student_type));
  }

  bool projects() const { return level.teacher_projection != nullptr; }
  int64_t partial_size() const {
    return teacher_channels * student_channels + teacher_channels * level.inner +
           (projects() ? level.inner * teacher_channels : 0);
  }
  int64_t partial_bytes() const override { return partial_size() * static_cast<int64_t>(sizeof(A)); }
  int64_t count() const override { return images * groups; }
  int64_t elements() const override { return level.student.numel() * teacher_channels; }
  double total() const override { return total_of(squares); }
  std::unique_ptr<Tiles> second_stage() const override;

  struct Workspace {
    Buffer<A> residual, response, gradient, student, teacher, sums;
  };

  void run(int64_t tile) override {
    Workspace space;
    const int64_t image = tile / groups, group = tile % groups;
    for (int64_t index = group * blocks / groups; index < (group + 1) * blocks / groups; ++index) {
      const int64_t first = index * block_pixels;
      run_block({image, first, min64(block_pixels, level.student.pixels() - first)}, tile, space);
    }
  }

  void run_block(const Block& block, int64_t tile, Workspace& space) {
    const Matrix<A> s = read_block(level.student_type, level.s, level.student, block, space.student);
    const Matrix<A> t = read_block(level.teacher_type, level.t, level.teacher, block, space.teacher);
    const Matrix<A> e = residual_block(block, space);
    const Matrix<A> p =
        row_major(&negative[block.image * teacher_channels * student_channels], teacher_channels, student_channels);
    const Matrix<A> u = of_image(level.teacher_matrix, block.image, teacher_channels, level.inner);
    Matrix<A> r = t;
    if (projects()) {
      r = block_matrix(reserve(space.response, level.inner * block_pixels), rows_are_channels(), level.inner,
                       block.size);
      matmul(r, of_image(level.teacher_projection, 0, level.inner, teacher_channels), t);
    }
    matmul_add(e, p, s);
    matmul_add(e, u, r);
    squares[tile] += square(block, e.data, differentiates ? &totals[tile * teacher_channels] : nullptr, space);
    if (!differentiates) return;
    A* partial = &partials[tile * partial_size()];
    matmul_add(row_major(partial, teacher_channels, student_channels), e, s.transposed());
    matmul_add(row_major(partial += teacher_channels * student_channels, teacher_channels, level.inner), e,
               r.transposed());
    if (wanted.ds != nullptr) student_gradient(block, p.transposed(), e, space);
    if (!projects()) return;
    matmul(r, u.transposed(), e);
    matmul_add(row_major(partial += teacher_channels * level.inner, level.inner, teacher_channels), r, t.transposed());
  }

  bool rows_are_channels() const { return level.student.rows_are_channels; }
  static Matrix<A> of_image(const void* data, int64_t image, int64_t rows, int64_t cols) {
    return row_major(static_cast<const A*>(data) + image * rows * cols, rows, cols);
  }

  // t + v (Ct, pixels), in the student's order.
  Matrix<A> residual_block(const Block& block, Workspace& space) const {
    const MatrixView view = oriented(level.teacher, rows_are_channels());
    const BlockRows rows = rows_of(block, view);
    const A* offset = static_cast<const A*>(level.offset) + block.image * teacher_channels;
    A* data = reserve(space.residual, teacher_channels * block_pixels);
    A buffer[kPiece];
    for (int64_t row = 0; row < rows.count; ++row) {
      for (int64_t col = 0; col < rows.cols; col += kPiece) {
        const int64_t size = min64(kPiece, rows.cols - col);
        const int64_t first = rows.offset(view, block.image, row) + col * view.col_stride;
        const A* t = load_piece(level.teacher_type, level.t, first, view.col_stride, size, buffer);
        A* piece = data + row * rows.cols + col;
        rows_are_channels() ? write_sum(piece, t, offset[row], size) : write_sum(piece, t, offset + col, size);
      }
    }
    return block_matrix(data, rows_are_channels(), teacher_channels, block.size);
  }

  // Turns e into 2 grad e and returns the sum of squares before. Adds sums over pixels to total (Ct) unless nullptr.
  double square(const Block& block, A* e, double* total, Workspace& space) const {
    const BlockRows rows = rows_of(block, rows_are_channels(), teacher_channels);
    A* sums = reserve(space.sums, teacher_channels);
    double squares = 0;
    for (int64_t row = 0; row < rows.count; ++row) {
      for (int64_t col = 0; col < rows.cols; col += kPiece) {
        const int64_t size = min64(kPiece, rows.cols - col);
        A* at = e + row * rows.cols + col;
        if (rows_are_channels()) {
          A sum;
          squares += square_and_scale(at, scale, size, sum);
          if (total != nullptr) total[row] += sum;
        } else {
          squares += square_and_scale(at, scale, size, sums + col);
        }
      }
      if (!rows_are_channels() && (row % kRowsOfPiece == kRowsOfPiece - 1 || row == rows.count - 1))
        flush(sums, teacher_channels, total);
    }
    return squares;
  }

  void student_gradient(const Block& block, const Matrix<A>& p, const Matrix<A>& e, Workspace& space) const {
    const MatrixView view = gradient_view(level.student);
    if (is_accumulator<A>(level.student_type)) {
      matmul(block_in_place<A>(wanted.ds, view, block), p, e);
      return;
    }
    const Matrix<A> ds = block_matrix(reserve(space.gradient, student_channels * block_pixels), rows_are_channels(),
                                      student_channels, block.size);
    matmul(ds, p, e);
    const BlockRows rows = rows_of(block, view);
    for (int64_t row = 0; row < rows.count; ++row)
      store_piece(level.student_type, wanted.ds, rows.offset(view, block.image, row), rows.cols,
                  ds.data + row * rows.cols);
  }

  RelationLevel level;
  int64_t student_channels, teacher_channels;    // Cs, Ct
  int64_t block_pixels, blocks, images, groups;  // blocks and groups of an image
  Buffer<A> negative;                            // -P
  A scale;
  bool differentiates = false;
  RelationGradients wanted{};
  std::vector<double> squares;  // (images, groups)
  std::vector<double> totals;   // (images, groups, Ct)
  Buffer<A> partials;           // (images, groups): of -dP (Ct, Cs), dU (Ct, c) and dW (c, Ct)
};

// Second stage: adds the groups' gradients of the parameters, in their order. A tile is a row of P, U and v of an
// image, or a row of W.
template <typename A>
struct RelationParameters : Tiles {
  explicit RelationParameters(const LevelResidual<A>& residual) : residual(residual) {}

  int64_t count() const override {
    return residual.images * residual.teacher_channels + (residual.projects() ? residual.level.inner : 0);
  }
  int64_t elements() const override { return residual.images * residual.groups * residual.partial_size(); }
  void run(int64_t tile) override {
    const int64_t inner = residual.level.inner, groups = residual.groups;
    const int64_t student_channels = residual.student_channels, teacher_channels = residual.teacher_channels;
    const int64_t u_begin = teacher_channels * student_channels, w_begin = u_begin + teacher_channels * inner;
    const RelationGradients& gradients = residual.wanted;
    if (tile >= residual.images * teacher_channels) {
      const int64_t row = tile - residual.images * teacher_channels;
      add(gradients.dteacher_projection, row, teacher_channels, w_begin + row * teacher_channels, 0,
          residual.images * groups, A(1));
      return;
    }
    const int64_t row = tile % teacher_channels, first = tile / teacher_channels * groups, end = first + groups;
    add(gradients.dstudent_matrix, tile, student_channels, row * student_channels, first, end, A(-1));
    add(gradients.dteacher_matrix, tile, inner, u_begin + row * inner, first, end, A(1));
    double total = 0;
    for (int64_t group = first; group < end; ++group) total += residual.totals[group * teacher_channels + row];
    static_cast<A*>(gradients.doffset)[tile] = static_cast<A>(total);
  }
  // Row `row` of `out`: `count` elements from `begin` of the partial sums of the groups first .. end, times sign.
  void add(void* out, int64_t row, int64_t count, int64_t begin, int64_t first, int64_t end, A sign) const {
    A* sum = static_cast<A*>(out) + row * count;
    std::fill(sum, sum + count, A(0));
    for (int64_t group = first; group < end; ++group)
      add_multiple(sum, sign, &residual.partials[group * residual.partial_size() + begin], count);
  }

  const LevelResidual<A>& residual;
};

template <typename A>
std::unique_ptr<Tiles> LevelResidual<A>::second_stage() const {
  return std::make_unique<RelationParameters<A>>(*this);
}

// The arguments that every variant of the op has.
struct RelationArguments {
  const Tensors& student;
  const Tensors& student_matrix;
  const Tensors& teacher;
  const Tensors& teacher_matrix;
  const OptionalTensors& teacher_projection;
  const Tensors& offset;
};

RelationLevel relation_level(const RelationArguments& arguments, size_t index, const char* op) {
  const Tensor &s = arguments.student[index], &t = arguments.teacher[index], &u = arguments.teacher_matrix[index];
  const MatrixView student = checked_view(s, op, "student"), teacher = checked_view(t, op, "teacher");
  check_pair(s, t, false, op);
  check_device(t, s, op, "teacher");
  STD_TORCH_CHECK(u.dim() == 3, op, ": teacher_matrix must have shape (N, Ct, c), got ", u.dim(), " dimensions");
  const ScalarType type = accumulation_type(s.scalar_type(), t.scalar_type());
  const int64_t images = s.size(0), inner = u.size(2);
  const int64_t student_channels = s.size(1), teacher_channels = t.size(1);
  const auto& projection = arguments.teacher_projection[index];
  STD_TORCH_CHECK(projection.has_value() || inner == teacher_channels, op, ": teacher_matrix must have shape (N, ",
                  teacher_channels, ", ", teacher_channels, ") where teacher_projection is absent");
  return {s.scalar_type(),
          t.scalar_type(),
          student,
          teacher,
          s.const_data_ptr(),
          t.const_data_ptr(),
          checked_data(arguments.student_matrix[index], type, images * teacher_channels * student_channels, s, op,
                       "student_matrix"),
          checked_data(u, type, images * teacher_channels * inner, s, op, "teacher_matrix"),
          checked_data(projection, type, inner * teacher_channels, s, op, "teacher_projection"),
          checked_data(arguments.offset[index], type, images * teacher_channels, s, op, "offset"),
          inner};
}

std::vector<RelationLevel> relation_levels(const RelationArguments& arguments, const char* op) {
  const size_t count = arguments.student.size();
  STD_TORCH_CHECK(count > 0, op, ": student must have at least one level");
  check_length(arguments.student_matrix, count, op, "student_matrix");
  check_length(arguments.teacher, count, op, "teacher");
  check_length(arguments.teacher_matrix, count, op, "teacher_matrix");
  check_length(arguments.teacher_projection, count, op, "teacher_projection");
  check_length(arguments.offset, count, op, "offset");
  std::vector<RelationLevel> levels;
  for (size_t index = 0; index < count; ++index) levels.push_back(relation_level(arguments, index, op));
  return levels;
}

// Every level's sum of squares; fills the gradients where these are given, for the grad of each sum or for ones.
Tensor launch_relation_residual(const RelationArguments& arguments, const std::vector<RelationLevel>& levels,
                                const std::vector<RelationGradients>& gradients, const Tensor* grad) {
  std::vector<std::unique_ptr<SumOfSquares>> residuals;
  for (size_t index = 0; index < levels.size(); ++index)
    residuals.push_back(with_accumulator(levels[index].accumulation(), [&](auto type) -> std::unique_ptr<SumOfSquares> {
      return std::make_unique<LevelResidual<typename decltype(type)::type>>(
          levels[index], gradients.empty() ? nullptr : &gradients[index],
          grad == nullptr ? 1 : number_at(*grad, index));
    }));
  run_products(residuals);
  if (!gradients.empty()) run_second_stages(residuals);
  const Tensor squares = empty_squares(arguments.student, arguments.teacher);
  for (size_t index = 0; index < residuals.size(); ++index) put_number(squares, index, residuals[index]->total());
  return squares;
}

// Allocates all gradients: of the students where wanted, of P, of U, of W, of v. Empty where there is no W.
std::vector<RelationGradients> allocate(const RelationArguments& arguments, const std::vector<RelationLevel>& levels,
                                        bool student_gradient, Tensors& outputs) {
  std::vector<RelationGradients> gradients(levels.size());
  const auto parameter = [&](const Tensor& like) {
    outputs.push_back(empty_like_device(like, shape_of(like), like.scalar_type()));
    return outputs.back().mutable_data_ptr();
  };
  for (size_t index = 0; student_gradient && index < levels.size(); ++index) {
    outputs.push_back(empty_gradient(arguments.student[index], levels[index].student));
    gradients[index].ds = outputs.back().mutable_data_ptr();
  }
  for (size_t index = 0; index < levels.size(); ++index)
    gradients[index].dstudent_matrix = parameter(arguments.student_matrix[index]);
  for (size_t index = 0; index < levels.size(); ++index)
    gradients[index].dteacher_matrix = parameter(arguments.teacher_matrix[index]);
  for (size_t index = 0; index < levels.size(); ++index) {
    const auto& projection = arguments.teacher_projection[index];
    if (projection.has_value())
      gradients[index].dteacher_projection = parameter(*projection);
    else
      outputs.push_back(empty_like_device(arguments.offset[index], {0}, arguments.offset[index].scalar_type()));
  }
  for (size_t index = 0; index < levels.size(); ++index) gradients[index].doffset = parameter(arguments.offset[index]);
  return gradients;
}

// A residual is never kept: in cache, computing it again costs less than it would take to write and read it.
Tensors relation_residual_forward(const Tensors& student, const Tensors& student_matrix, const Tensors& teacher,
                                  const Tensors& teacher_matrix, const OptionalTensors& teacher_projection,
                                  const Tensors& offset, bool keep) {
  const char* op = "relation_residual_forward";
  STD_TORCH_CHECK(!keep, op, ": keep must be false on the CPU");
  const RelationArguments arguments{student, student_matrix, teacher, teacher_matrix, teacher_projection, offset};
  return {launch_relation_residual(arguments, relation_levels(arguments, op), {}, nullptr)};
}

Tensors relation_residual_backward(const Tensors& student, const Tensors& student_matrix, const Tensors& teacher,
                                   const Tensors& teacher_matrix, const OptionalTensors& teacher_projection,
                                   const Tensors& offset, const Tensors& residual, const Tensor& grad,
                                   bool student_gradient) {
  const char* op = "relation_residual_backward";
  check_length(residual, 0, op, "residual");
  const RelationArguments arguments{student, student_matrix, teacher, teacher_matrix, teacher_projection, offset};
  const std::vector<RelationLevel> levels = relation_levels(arguments, op);
  checked_grad(grad, student, teacher, op);
  Tensors outputs;
  launch_relation_residual(arguments, levels, allocate(arguments, levels, student_gradient, outputs), &grad);
  return outputs;
}

Tensors relation_residual_with_gradient(const Tensors& student, const Tensors& student_matrix, const Tensors& teacher,
                                        const Tensors& teacher_matrix, const OptionalTensors& teacher_projection,
                                        const Tensors& offset, bool student_gradient) {
  const char* op = "relation_residual_with_gradient";
  const RelationArguments arguments{student, student_matrix, teacher, teacher_matrix, teacher_projection, offset};
  const std::vector<RelationLevel> levels = relation_levels(arguments, op);
  Tensors gradients;
  Tensors outputs{
      launch_relation_residual(arguments, levels, allocate(arguments, levels, student_gradient, gradients), nullptr)};
  outputs.insert(outputs.end(), gradients.begin(), gradients.end());
  return outputs;
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("relation_residual_forward", TORCH_BOX(&fbkd::relation_residual_forward));
  m.impl("relation_residual_backward", TORCH_BOX(&fbkd::relation_residual_backward));
  m.impl("relation_residual_with_gradient", TORCH_BOX(&fbkd::relation_residual_with_gradient));
}
