// Squared residual of the relation term on the CPU, || t + U r - P s + v || with r = W t or t, and all its gradients, in
// blocks of pixels that stay in cache, around the vendor's matrix product.
#include "../stable_abi.h"

#include <torch/csrc/stable/library.h>

#include "../masked_l2_levels.h"
#include "masked_rows.h"
#include "memory.h"
#include "pixel_blocks.h"
#include "tiles.h"

namespace fbkd {
namespace {

// Rows of a channels_last block whose residuals are added up in the accumulation type.
constexpr int64_t kColPiece = 128;

#define FBKD_RELATION(A)                                                                                              \
  FBKD_CLONES void add_constant(A* __restrict__ to, const A* __restrict__ t, A constant, int64_t count) {             \
    _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) to[i] = t[i] + constant;                                  \
  }                                                                                                                   \
  FBKD_CLONES void add_vectors(A* __restrict__ to, const A* __restrict__ t, const A* __restrict__ v, int64_t count) { \
    _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) to[i] = t[i] + v[i];                                      \
  }                                                                                                                   \
  /* Scales e; returns the sum of the squares before, and in `total` the sum after. */                                \
  FBKD_CLONES A square_and_scale(A* __restrict__ e, A scale, int64_t count, A& total) {                               \
    A squares = 0, sum = 0;                                                                                           \
    _Pragma("omp simd reduction(+ : squares, sum)") for (int64_t i = 0; i < count; ++i) {                             \
      squares += e[i] * e[i];                                                                                         \
      e[i] *= scale;                                                                                                  \
      sum += e[i];                                                                                                    \
    }                                                                                                                 \
    total = sum;                                                                                                      \
    return squares;                                                                                                   \
  }                                                                                                                   \
  /* The same along the channels of a pixel, whose scaled residuals are added to `totals`. */                         \
  FBKD_CLONES A square_and_scale(A* __restrict__ e, A scale, int64_t count, A* __restrict__ totals) {                 \
    A squares = 0;                                                                                                    \
    _Pragma("omp simd reduction(+ : squares)") for (int64_t i = 0; i < count; ++i) {                                  \
      squares += e[i] * e[i];                                                                                         \
      e[i] *= scale;                                                                                                  \
      totals[i] += e[i];                                                                                              \
    }                                                                                                                 \
    return squares;                                                                                                   \
  }                                                                                                                   \
  FBKD_CLONES void add_scaled(A* __restrict__ to, A scale, const A* __restrict__ x, int64_t count) {                  \
    _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) to[i] += scale * x[i];                                    \
  }

FBKD_RELATION(float)
FBKD_RELATION(double)
#undef FBKD_RELATION

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
        from(level.student.channels()),
        to(level.teacher.channels()),
        block_pixels(block_pixels_of(max64(from, to), level.student.images, level.student.pixels())),
        blocks(ceil_div(level.student.pixels(), block_pixels)),
        images(level.student.images),
        groups(max64(1, min64(blocks, groups_of(partial_bytes()) / max64(1, images)))),
        negative(static_cast<size_t>(images * to * from)),
        scale(static_cast<A>(2 * grad)),
        squares(static_cast<size_t>(images * groups)) {
    const A* matrix = static_cast<const A*>(level.student_matrix);
    std::transform(matrix, matrix + negative.size(), negative.begin(), [](A value) { return -value; });
    if (gradients == nullptr) return;
    wanted = *gradients;
    differentiates = true;
    partials.resize(static_cast<size_t>(images * groups * partial_size()));
    totals.resize(static_cast<size_t>(images * groups * to));
    if (wanted.ds != nullptr) advise_huge_pages(wanted.ds, level.student.numel() * element_size(level.student_type));
  }

  bool projects() const { return level.teacher_projection != nullptr; }
  int64_t partial_size() const { return to * from + to * level.inner + (projects() ? level.inner * to : 0); }
  int64_t partial_bytes() const override { return partial_size() * static_cast<int64_t>(sizeof(A)); }
  int64_t count() const override { return images * groups; }
  int64_t elements() const override { return level.student.numel() * to; }
  double total() const override {
    double sum = 0;
    for (double group : squares) sum += group;
    return sum;
  }
  std::unique_ptr<Tiles> second_stage() const override;

  struct Workspace {
    std::vector<A> residual, response, gradient, student, teacher, sums;
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
    const Matrix<A> p = row_major(&negative[block.image * to * from], to, from);
    const Matrix<A> u = of_image(level.teacher_matrix, block.image, to, level.inner);
    Matrix<A> r = t;
    if (projects()) {
      r = block_matrix(reserve(space.response, level.inner * block_pixels), rows_are_channels(), level.inner, block.size);
      matmul(r, of_image(level.teacher_projection, 0, level.inner, to), t);
    }
    matmul_add(e, p, s);
    matmul_add(e, u, r);
    squares[tile] += square(block, e.data, differentiates ? &totals[tile * to] : nullptr, space);
    if (!differentiates) return;
    A* partial = &partials[tile * partial_size()];
    matmul_add(row_major(partial, to, from), e, s.transposed());
    matmul_add(row_major(partial += to * from, to, level.inner), e, r.transposed());
    if (wanted.ds != nullptr) student_gradient(block, p.transposed(), e, space);
    if (!projects()) return;
    matmul(r, u.transposed(), e);
    matmul_add(row_major(partial += to * level.inner, level.inner, to), r, t.transposed());
  }

  bool rows_are_channels() const { return level.student.rows_are_channels; }
  static Matrix<A> of_image(const void* data, int64_t image, int64_t rows, int64_t cols) {
    return row_major(static_cast<const A*>(data) + image * rows * cols, rows, cols);
  }

  // t + v (Ct, pixels), in the student's order.
  Matrix<A> residual_block(const Block& block, Workspace& space) const {
    const MatrixView view = oriented(level.teacher, rows_are_channels());
    const BlockRows rows = rows_of(block, view);
    const A* offset = static_cast<const A*>(level.offset) + block.image * to;
    A* data = reserve(space.residual, to * block_pixels);
    A buffer[kPiece];
    for (int64_t row = 0; row < rows.count; ++row) {
      for (int64_t col = 0; col < rows.cols; col += kPiece) {
        const int64_t size = min64(kPiece, rows.cols - col);
        const int64_t first = rows.offset(view, block.image, row) + col * view.col_stride;
        const A* t = load_piece(level.teacher_type, level.t, first, view.col_stride, size, buffer);
        A* piece = data + row * rows.cols + col;
        rows_are_channels() ? add_constant(piece, t, offset[row], size) : add_vectors(piece, t, offset + col, size);
      }
    }
    return block_matrix(data, rows_are_channels(), to, block.size);
  }

  // Turns e into 2 grad e and returns the sum of squares before. Adds sums over pixels to total (Ct) unless nullptr.
  double square(const Block& block, A* e, double* total, Workspace& space) const {
    const BlockRows rows = rows_of(block, rows_are_channels(), to);
    A* sums = reserve(space.sums, to);
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
      if (!rows_are_channels() && (row % kColPiece == kColPiece - 1 || row == rows.count - 1)) flush(sums, total);
    }
    return squares;
  }

  void flush(A* sums, double* total) const {
    for (int64_t c = 0; c < to; ++c) {
      if (total != nullptr) total[c] += sums[c];
      sums[c] = 0;
    }
  }

  void student_gradient(const Block& block, const Matrix<A>& p, const Matrix<A>& e, Workspace& space) const {
    const MatrixView view = gradient_view(level.student);
    if (is_accumulator<A>(level.student_type)) {
      matmul(block_in_place<A>(wanted.ds, view, block), p, e);
      return;
    }
    const Matrix<A> ds = block_matrix(reserve(space.gradient, from * block_pixels), rows_are_channels(), from, block.size);
    matmul(ds, p, e);
    const BlockRows rows = rows_of(block, view);
    for (int64_t row = 0; row < rows.count; ++row)
      store_piece(level.student_type, wanted.ds, rows.offset(view, block.image, row), rows.cols,
                  ds.data + row * rows.cols);
  }

  RelationLevel level;
  int64_t from, to;  // Cs, Ct
  int64_t block_pixels, blocks, images, groups;  // blocks and groups of an image
  std::vector<A> negative;  // -P
  A scale;
  bool differentiates = false;
  RelationGradients wanted{};
  std::vector<double> squares;  // (images, groups)
  std::vector<double> totals;   // (images, groups, Ct)
  std::vector<A> partials;      // (images, groups): of -dP (Ct, Cs), dU (Ct, c) and dW (c, Ct)
};

// Adds the groups' gradients of the parameters, in their order: a tile a row of P, U and v of an image, or a row of W.
template <typename A>
struct RelationParameters : Tiles {
  explicit RelationParameters(const LevelResidual<A>& of) : of(of) {}

  int64_t count() const override { return of.images * of.to + (of.projects() ? of.level.inner : 0); }
  int64_t elements() const override { return of.images * of.groups * of.partial_size(); }
  void run(int64_t tile) override {
    const int64_t inner = of.level.inner, from_u = of.to * of.from, from_w = from_u + of.to * inner;
    if (tile >= of.images * of.to) {
      const int64_t row = tile - of.images * of.to;
      add(of.wanted.dteacher_projection, row, of.to, from_w + row * of.to, 0, of.images * of.groups, A(1));
      return;
    }
    const int64_t row = tile % of.to, first = tile / of.to * of.groups, end = first + of.groups;
    add(of.wanted.dstudent_matrix, tile, of.from, row * of.from, first, end, A(-1));
    add(of.wanted.dteacher_matrix, tile, inner, from_u + row * inner, first, end, A(1));
    double total = 0;
    for (int64_t group = first; group < end; ++group) total += of.totals[group * of.to + row];
    static_cast<A*>(of.wanted.doffset)[tile] = static_cast<A>(total);
  }
  // Row `row` of `out`: `count` elements from `at` of the partial sums of the groups.
  void add(void* out, int64_t row, int64_t count, int64_t at, int64_t first, int64_t end, A sign) const {
    A* sum = static_cast<A*>(out) + row * count;
    std::fill(sum, sum + count, A(0));
    for (int64_t group = first; group < end; ++group)
      add_scaled(sum, sign, &of.partials[group * of.partial_size() + at], count);
  }

  const LevelResidual<A>& of;
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

RelationLevel relation_level(const RelationArguments& of, size_t index, const char* op) {
  const Tensor &s = of.student[index], &t = of.teacher[index], &u = of.teacher_matrix[index];
  const MatrixView student = checked_view(s, op, "student"), teacher = checked_view(t, op, "teacher");
  check_pair(s, t, false, op);
  check_device(t, s, op, "teacher");
  STD_TORCH_CHECK(u.dim() == 3, op, ": teacher_matrix must have shape (N, Ct, c), got ", u.dim(), " dimensions");
  const ScalarType type = accumulation_type(s.scalar_type(), t.scalar_type());
  const int64_t images = s.size(0), from = s.size(1), to = t.size(1), inner = u.size(2);
  const auto& projection = of.teacher_projection[index];
  STD_TORCH_CHECK(projection.has_value() || inner == to, op, ": teacher_matrix must have shape (N, ", to, ", ", to,
                  ") where teacher_projection is absent");
  return {s.scalar_type(), t.scalar_type(), student, teacher, s.const_data_ptr(), t.const_data_ptr(),
          checked_data(of.student_matrix[index], type, images * to * from, s, op, "student_matrix"),
          checked_data(u, type, images * to * inner, s, op, "teacher_matrix"),
          checked_data(projection, type, inner * to, s, op, "teacher_projection"),
          checked_data(of.offset[index], type, images * to, s, op, "offset"), inner};
}

std::vector<RelationLevel> relation_levels(const RelationArguments& of, const char* op) {
  const size_t count = of.student.size();
  STD_TORCH_CHECK(count > 0, op, ": student must have at least one level");
  check_length(of.student_matrix, count, op, "student_matrix");
  check_length(of.teacher, count, op, "teacher");
  check_length(of.teacher_matrix, count, op, "teacher_matrix");
  check_length(of.teacher_projection, count, op, "teacher_projection");
  check_length(of.offset, count, op, "offset");
  std::vector<RelationLevel> levels;
  for (size_t index = 0; index < count; ++index) levels.push_back(relation_level(of, index, op));
  return levels;
}

// Every level's sum of squares, of gradients where these are given with the grad of each sum.
Tensor run_residuals(const RelationArguments& of, const std::vector<RelationLevel>& levels,
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
  const Tensor squares = empty_like_device(of.student[0], {static_cast<int64_t>(levels.size())},
                                           total_type(of.student, of.teacher));
  for (size_t index = 0; index < residuals.size(); ++index) put_number(squares, index, residuals[index]->total());
  return squares;
}

// Allocates all gradients: of the students where wanted, of P, of U, of W, of v. Empty where there is no W.
std::vector<RelationGradients> allocate(const RelationArguments& of, const std::vector<RelationLevel>& levels,
                                        bool student_gradient, Tensors& outputs) {
  std::vector<RelationGradients> gradients(levels.size());
  const auto parameter = [&](const Tensor& like) {
    const auto size = like.sizes();
    outputs.push_back(empty_like_device(like, std::vector<int64_t>(size.begin(), size.end()), like.scalar_type()));
    return outputs.back().mutable_data_ptr();
  };
  for (size_t index = 0; student_gradient && index < levels.size(); ++index) {
    outputs.push_back(empty_gradient(of.student[index], levels[index].student));
    gradients[index].ds = outputs.back().mutable_data_ptr();
  }
  for (size_t index = 0; index < levels.size(); ++index)
    gradients[index].dstudent_matrix = parameter(of.student_matrix[index]);
  for (size_t index = 0; index < levels.size(); ++index)
    gradients[index].dteacher_matrix = parameter(of.teacher_matrix[index]);
  for (size_t index = 0; index < levels.size(); ++index) {
    const auto& projection = of.teacher_projection[index];
    if (projection.has_value())
      gradients[index].dteacher_projection = parameter(*projection);
    else
      outputs.push_back(empty_like_device(of.offset[index], {0}, of.offset[index].scalar_type()));
  }
  for (size_t index = 0; index < levels.size(); ++index) gradients[index].doffset = parameter(of.offset[index]);
  return gradients;
}

// A residual is never kept: in cache, computing it again costs less than it would take to write and read it.
Tensors forward_op(const Tensors& student, const Tensors& student_matrix, const Tensors& teacher,
                   const Tensors& teacher_matrix, const OptionalTensors& teacher_projection, const Tensors& offset,
                   bool keep) {
  const char* op = "relation_residual_forward";
  STD_TORCH_CHECK(!keep, op, ": keep must be false on the CPU");
  const RelationArguments of{student, student_matrix, teacher, teacher_matrix, teacher_projection, offset};
  return {run_residuals(of, relation_levels(of, op), {}, nullptr)};
}

Tensors backward_op(const Tensors& student, const Tensors& student_matrix, const Tensors& teacher,
                    const Tensors& teacher_matrix, const OptionalTensors& teacher_projection, const Tensors& offset,
                    const Tensors& residual, const Tensor& grad, bool student_gradient) {
  const char* op = "relation_residual_backward";
  check_length(residual, 0, op, "residual");
  const RelationArguments of{student, student_matrix, teacher, teacher_matrix, teacher_projection, offset};
  const std::vector<RelationLevel> levels = relation_levels(of, op);
  checked_data(grad, total_type(student, teacher), static_cast<int64_t>(levels.size()), grad, op, "grad");
  Tensors outputs;
  run_residuals(of, levels, allocate(of, levels, student_gradient, outputs), &grad);
  return outputs;
}

Tensors with_gradient_op(const Tensors& student, const Tensors& student_matrix, const Tensors& teacher,
                         const Tensors& teacher_matrix, const OptionalTensors& teacher_projection,
                         const Tensors& offset, bool student_gradient) {
  const char* op = "relation_residual_with_gradient";
  const RelationArguments of{student, student_matrix, teacher, teacher_matrix, teacher_projection, offset};
  const std::vector<RelationLevel> levels = relation_levels(of, op);
  Tensors gradients;
  Tensors outputs{run_residuals(of, levels, allocate(of, levels, student_gradient, gradients), nullptr)};
  outputs.insert(outputs.end(), gradients.begin(), gradients.end());
  return outputs;
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("relation_residual_forward", TORCH_BOX(&fbkd::forward_op));
  m.impl("relation_residual_backward", TORCH_BOX(&fbkd::backward_op));
  m.impl("relation_residual_with_gradient", TORCH_BOX(&fbkd::with_gradient_op));
}
