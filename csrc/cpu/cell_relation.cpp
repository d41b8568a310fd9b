// The relation term of levels with few pooled cells on the CPU, || NL_t(T) - B(NL_s(S)) ||, and all its gradients.
//
// With K cells, r = Phi^T x + d holds a pixel's K products with them and a non-local block is z = x + U r' + O: r' is r
// without its mean over the image, U = scale * Wz g / K and O a constant of each image. So the residual is
//
//   e = t - B s + [U_t, -B U_s] [r'_t; r'_s] + v,    v = O_t - B O_s - b,
//
// and takes K products a pixel and channel where theta alone would take c. docs/math.md derives it and its gradients.
//
// Maps are copied into matrices (C, N L) of all images' pixels, so that the vendor's product gets long rows.
#include "../stable_abi.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../tensors.h"
#include "buffer.h"
#include "max_pool.h"
#include "pixel_blocks.h"
#include "vector.h"

namespace fbkd {
namespace {

// A level's tensors: the adaptation's two, then each side's, of which the first ten learn.
constexpr size_t kSideTensors = 12, kLearned = 10, kLevelTensors = 2 + 2 * kSideTensors;
// Winners pass their gradients as a dense product with zeros at the other pixels if a cell has fewer pixels than these.
constexpr int64_t kDensePixels = 8;

// Columns [first, first + count) of a matrix.
template <typename A>
Matrix<A> columns(const Matrix<A>& m, int64_t first, int64_t count) {
  return {m.data + first * m.col_stride, m.rows, count, m.row_stride, m.col_stride};
}

// A matrix with memory of its own, which starts undefined.
template <typename A>
struct OwnMatrix {
  OwnMatrix() = default;
  OwnMatrix(int64_t rows, int64_t cols) : storage(rows * cols), rows(rows), cols(cols) {}
  Matrix<A> view() const { return row_major(storage.get(), rows, cols); }
  A* row(int64_t index) const { return storage.get() + index * cols; }
  void fill(A value) { std::fill(storage.get(), storage.get() + rows * cols, value); }

  UndefinedBuffer<A> storage;
  int64_t rows = 0, cols = 0;
};

// Call f(index) for every index below `count`, in parallel if all together handle enough elements.
template <typename F>
void parallel_each(int64_t count, int64_t elements, F&& f) {
  const int64_t grain = max64(1, count * kThreadElements / max64(1, elements));
  parallel_region(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) f(index);
  });
}

struct Extents {
  int64_t images, height, width;
  Pool pool;

  int64_t pixels() const { return height * width; }  // of an image, as are the cells
  int64_t cell_rows() const { return height / pool.ky; }
  int64_t cell_cols() const { return width / pool.kx; }
  int64_t cells() const { return cell_rows() * cell_cols(); }
  int64_t all_pixels() const { return images * pixels(); }
  int64_t all_cells() const { return images * cells(); }
};

// A map as the matrix (C, N L).
template <typename A>
OwnMatrix<A> packed(ScalarType type, const void* data, const MatrixView& view) {
  const int64_t channels = view.channels(), pixels = view.pixels();
  OwnMatrix<A> matrix(channels, view.images * pixels);
  parallel_each(view.images, view.numel(), [&](int64_t image) {
    Buffer<A> buffer(static_cast<size_t>(view.cols));
    for (int64_t row = 0; row < view.rows; ++row) {
      A* copy = view.rows_are_channels ? matrix.row(row) + image * pixels : buffer.data();
      const A* x = load_piece(type, data, image * view.image_stride + row * view.row_stride, 1, view.cols, copy);
      if (!view.rows_are_channels)
        for (int64_t c = 0; c < channels; ++c) matrix.row(c)[image * pixels + row] = x[c];
      else if (x != copy)
        std::copy(x, x + pixels, copy);
    }
  });
  return matrix;
}

// The other way round: into a densely packed map.
template <typename A>
void unpack(const OwnMatrix<A>& matrix, ScalarType type, void* data, const MatrixView& map) {
  const MatrixView view = gradient_view(map);
  parallel_each(view.images, view.numel(), [&](int64_t image) {
    Buffer<A> buffer(static_cast<size_t>(view.cols));
    for (int64_t row = 0; row < view.rows; ++row) {
      const A* piece = matrix.row(row) + image * view.cols;
      if (!view.rows_are_channels) {
        for (int64_t c = 0; c < view.cols; ++c) buffer[c] = matrix.row(c)[image * view.rows + row];
        piece = buffer.data();
      }
      store_piece(type, data, image * view.image_stride + row * view.row_stride, view.cols, piece);
    }
  });
}

template <typename A>
OwnMatrix<A> transposed(const OwnMatrix<A>& matrix) {
  constexpr int64_t kTile = 16;
  OwnMatrix<A> result(matrix.cols, matrix.rows);
  parallel_each(ceil_div(matrix.cols, kTile), matrix.rows * matrix.cols, [&](int64_t tile) {
    const int64_t begin = tile * kTile, end = min64(matrix.cols, begin + kTile);
    for (int64_t row = 0; row < matrix.rows; ++row)
      for (int64_t col = begin; col < end; ++col) result.row(col)[row] = matrix.row(row)[col];
  });
  return result;
}

// One side's parameters; nullptr where the block has none.
template <typename A>
struct SideParameters {
  const A* g_weight;       // (c, C)
  const A* g_bias;         // (c)
  const A* out_weight;     // (C, c)
  const A* out_bias;       // (C)
  const A* theta_weight;   // (c, C)
  const A* theta_bias;     // (c)
  const A* phi_weight;     // (c, C)
  const A* phi_bias;       // (c)
  const A* norm_weight;    // (C)
  const A* norm_bias;      // (C)
  const A* norm_mean;      // (C), nullptr: the batch's own
  const A* norm_variance;  // (C)
  double eps;              // negative: no norm
};

// Where the gradients of these go; nullptr where there is none.
template <typename A>
struct SideGradients {
  A* g_weight;
  A* g_bias;
  A* out_weight;
  A* out_bias;
  A* theta_weight;
  A* theta_bias;
  A* phi_weight;
  A* phi_bias;
  A* norm_weight;
  A* norm_bias;
};

// A max-pooled 1x1 convolution of a map, and where its values came from.
template <typename A>
struct PooledConvolution {
  PooledConvolution(const Extents& size, const A* weight, const A* bias, int64_t inner, int64_t channels)
      : size(size),
        weight(row_major(weight, inner, channels)),
        bias(bias),
        values(inner, size.all_cells()),
        winners(static_cast<size_t>(inner * size.all_cells())) {}

  void run(const OwnMatrix<A>& x) {
    OwnMatrix<A> y(weight.rows, size.all_pixels());
    matmul(y.view(), weight, x.view());
    parallel_each(weight.rows, weight.rows * y.cols, [&](int64_t channel) {
      Buffer<A> best(static_cast<size_t>(size.width));
      std::vector<int32_t> best_row(static_cast<size_t>(size.width));
      for (int64_t image = 0; image < size.images; ++image) pool(y, channel, image, best, best_row);
    });
  }

  void pool(const OwnMatrix<A>& y, int64_t channel, int64_t image, Buffer<A>& best, std::vector<int32_t>& best_row) {
    const Pool& pool = size.pool;
    const int64_t columns = size.cell_cols() * pool.kx, first_pixel = image * size.pixels();
    int64_t at = channel * values.cols + image * size.cells();
    for (int64_t cell_row = 0; cell_row < size.cell_rows(); ++cell_row) {
      const int64_t first_row = cell_row * pool.ky;
      for (int64_t dy = 0; dy < pool.ky; ++dy)
        fold_row(y.row(channel) + first_pixel + (first_row + dy) * size.width, bias[channel], static_cast<int32_t>(dy),
                 columns, best.data(), best_row.data());
      for (int64_t first = 0; first < columns; first += pool.kx, ++at) {
        const int64_t column = first + pool.winner(&best[first], &best_row[first]);
        values.row(0)[at] = best[column];
        winners[at] = first_pixel + (first_row + best_row[column]) * size.width + column;
      }
    }
  }

  bool passes_densely() const { return size.pool.ky * size.pool.kx < kDensePixels; }

  // From the gradient of the values (c, N K). x and dx are matrices (C, N L), and (N L, C) unless passes_densely(); dx
  // is added to, unless it has no rows.
  void backward(const OwnMatrix<A>& dvalues, const OwnMatrix<A>& x, const OwnMatrix<A>& dx, A* dweight,
                A* dbias) const {
    for (int64_t c = 0; c < weight.rows; ++c) dbias[c] = sum_of(dvalues.row(c), dvalues.cols);
    passes_densely() ? pass_densely(dvalues, x, dx, dweight) : pass_one_by_one(dvalues, x, dx, dweight);
  }

  void pass_densely(const OwnMatrix<A>& dvalues, const OwnMatrix<A>& x, const OwnMatrix<A>& dx, A* dweight) const {
    OwnMatrix<A> spread(weight.rows, size.all_pixels());
    spread.fill(A(0));
    for (int64_t c = 0; c < weight.rows; ++c)
      for (int64_t i = 0; i < dvalues.cols; ++i) spread.row(c)[winners[c * dvalues.cols + i]] = dvalues.row(c)[i];
    matmul(row_major(dweight, weight.rows, weight.cols), spread.view(), x.view().transposed());
    if (dx.rows > 0) matmul_add(dx.view(), weight.transposed(), spread.view());
  }

  void pass_one_by_one(const OwnMatrix<A>& dvalues, const OwnMatrix<A>& x, const OwnMatrix<A>& dx, A* dweight) const {
    const int64_t work = weight.rows * weight.cols * dvalues.cols;
    parallel_each(weight.rows, work, [&](int64_t c) {
      A* row = dweight + c * weight.cols;
      std::fill(row, row + weight.cols, A(0));
      for (int64_t i = 0; i < dvalues.cols; ++i)
        add_multiple(row, dvalues.row(c)[i], x.row(winners[c * dvalues.cols + i]), weight.cols);
    });
    if (dx.rows == 0) return;
    parallel_each(size.images, work, [&](int64_t image) {
      for (int64_t c = 0; c < weight.rows; ++c)
        for (int64_t i = image * size.cells(); i < (image + 1) * size.cells(); ++i)
          add_multiple(dx.row(winners[c * dvalues.cols + i]), dvalues.row(c)[i], weight.data + c * weight.cols,
                       weight.cols);
    });
  }

  Extents size;
  Matrix<A> weight;              // (c, C)
  const A* bias;                 // (c)
  OwnMatrix<A> values;           // (c, N K)
  std::vector<int64_t> winners;  // (c, N K), pixels of all images
};

// A side's non-local block on its map.
template <typename A>
struct CellBlock {
  CellBlock(const SideParameters<A>& parameters, const Extents& size, int64_t channels, int64_t inner, OwnMatrix<A> map)
      : parameters(parameters),
        size(size),
        channels(channels),
        inner(inner),
        x(std::move(map)),
        phi(size, parameters.phi_weight, parameters.phi_bias, inner, channels),
        g(size, parameters.g_weight, parameters.g_bias, inner, channels),
        keys(channels, size.all_cells()),
        values(channels, size.all_cells()),
        shifts(1, size.all_cells()),
        means(1, size.all_cells()),
        covariances(size.all_cells(), size.cells()),
        spread(channels, size.all_cells()),
        image_means(channels, size.images),
        mean(static_cast<size_t>(channels)),
        variance(static_cast<size_t>(channels)),
        deviation(static_cast<size_t>(channels)),
        scale(static_cast<size_t>(channels)) {}

  bool has_norm() const { return parameters.eps >= 0; }
  bool uses_batch_statistics() const { return has_norm() && parameters.norm_mean == nullptr; }
  Matrix<A> pixels_of(const Matrix<A>& matrix, int64_t image) const {
    return columns(matrix, image * size.pixels(), size.pixels());
  }
  Matrix<A> cells_of(const Matrix<A>& matrix, int64_t image) const {
    return columns(matrix, image * size.cells(), size.cells());
  }
  Matrix<A> covariance(int64_t image) const {
    return row_major(covariances.row(image * size.cells()), size.cells(), size.cells());
  }

  // Phi = Wtheta^T phi, d = btheta^T phi, V = Wz g / K of all images.
  void prepare() {
    phi.run(x);
    g.run(x);
    matmul(keys.view(), theta_weight().transposed(), phi.values.view());
    matmul(shifts.view(), row_major(parameters.theta_bias, 1, inner), phi.values.view());
    matmul(values.view(), out_weight(), g.values.view());
    multiply_by(values.row(0), A(1) / static_cast<A>(size.cells()), channels * values.cols);
  }

  // r' (K, L) of an image into `response`, the mean of r and, for a norm of the batch, what its variance takes.
  void respond(int64_t image, const Matrix<A>& response) {
    matmul(response, cells_of(keys.view(), image).transposed(), pixels_of(x.view(), image));
    for (int64_t k = 0; k < size.cells(); ++k) {
      A* row = response.data + k * response.row_stride;
      const int64_t cell = image * size.cells() + k;
      const A average = sum_of(row, size.pixels()) / static_cast<A>(size.pixels());
      add_number(row, -average, size.pixels());
      means.row(0)[cell] = average + shifts.row(0)[cell];
    }
    if (!uses_batch_statistics()) return;
    matmul(covariance(image), response, response.transposed());
    multiply_by(covariance(image).data, A(1) / static_cast<A>(size.pixels()), size.cells() * size.cells());
    matmul(cells_of(spread.view(), image), cells_of(values.view(), image), covariance(image));
  }

  // Scale and mean of every channel, from all images' responses.
  void normalize() {
    const A images = static_cast<A>(size.images);
    for (int64_t c = 0; c < channels; ++c) {
      const A bias = parameters.out_bias == nullptr ? A(0) : parameters.out_bias[c];
      A* per_image = image_means.row(c);
      for (int64_t n = 0; n < size.images; ++n)
        per_image[n] = bias + dot(values.row(c) + n * size.cells(), means.row(0) + n * size.cells(), size.cells());
      if (uses_batch_statistics()) {
        mean[c] = sum_of(per_image, size.images) / images;
        A between = 0;
        for (int64_t n = 0; n < size.images; ++n) between += (per_image[n] - mean[c]) * (per_image[n] - mean[c]);
        variance[c] = (dot(values.row(c), spread.row(c), size.all_cells()) + between) / images;
      } else if (has_norm()) {
        mean[c] = parameters.norm_mean[c], variance[c] = parameters.norm_variance[c];
      }
      deviation[c] = has_norm() ? std::sqrt(variance[c] + static_cast<A>(parameters.eps)) : A(1);
      scale[c] = (parameters.norm_weight == nullptr ? A(1) : parameters.norm_weight[c]) / deviation[c];
    }
  }

  // O (C, N): what an image's pixels have in common.
  OwnMatrix<A> offsets() const {
    OwnMatrix<A> result(channels, size.images);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t n = 0; n < size.images; ++n)
        result.row(c)[n] = scale[c] * (image_means.row(c)[n] - mean[c]) +
                           (parameters.norm_bias == nullptr ? A(0) : parameters.norm_bias[c]);
    return result;
  }

  // U (C, N K)
  OwnMatrix<A> scaled_values() const {
    OwnMatrix<A> result(channels, size.all_cells());
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < result.cols; ++i) result.row(c)[i] = scale[c] * values.row(c)[i];
    return result;
  }

  // From the gradients of U, which become those of V, and of O: those of the norm, and of r's means.
  void normalize_backward(OwnMatrix<A>& dvalues, const OwnMatrix<A>& doffsets, const SideGradients<A>& gradients) {
    dmeans = OwnMatrix<A>(1, size.all_cells());
    dmeans.fill(A(0));
    dvariance.assign(static_cast<size_t>(channels), A(0));
    const A images = static_cast<A>(size.images);
    Buffer<A> dimage(static_cast<size_t>(size.images));
    for (int64_t c = 0; c < channels; ++c) {
      const A* doffset = doffsets.row(c);
      const A* per_image = image_means.row(c);
      A dscale = dot(dvalues.row(c), values.row(c), size.all_cells()), doffset_sum = sum_of(doffset, size.images);
      for (int64_t n = 0; n < size.images; ++n) dscale += doffset[n] * (per_image[n] - mean[c]);
      if (uses_batch_statistics()) dvariance[c] = -dscale * scale[c] / (2 * deviation[c] * deviation[c] * images);
      for (int64_t n = 0; n < size.images; ++n) {
        dimage[n] = scale[c] * doffset[n];
        if (uses_batch_statistics())
          dimage[n] += 2 * dvariance[c] * (per_image[n] - mean[c]) - scale[c] * doffset_sum / images;
      }
      multiply_by(dvalues.row(c), scale[c], size.all_cells());
      if (uses_batch_statistics()) add_multiple(dvalues.row(c), 2 * dvariance[c], spread.row(c), size.all_cells());
      for (int64_t n = 0; n < size.images; ++n) {
        const int64_t first = n * size.cells();
        add_multiple(dvalues.row(c) + first, dimage[n], means.row(0) + first, size.cells());
        add_multiple(dmeans.row(0) + first, dimage[n], values.row(c) + first, size.cells());
      }
      if (gradients.norm_weight != nullptr) gradients.norm_weight[c] = dscale / deviation[c];
      if (gradients.norm_bias != nullptr) gradients.norm_bias[c] = doffset_sum;
      if (gradients.out_bias != nullptr) gradients.out_bias[c] = sum_of(dimage.data(), size.images);
    }
  }

  // Turns the gradient of an image's r' into that of r, and finds that of Phi.
  void respond_backward(int64_t image, const Matrix<A>& response, const Matrix<A>& dresponse, const Matrix<A>& dkeys) {
    const A share = A(1) / static_cast<A>(size.pixels());
    Buffer<A> shift(static_cast<size_t>(size.cells()));
    for (int64_t k = 0; k < size.cells(); ++k)
      shift[k] = share * (dmeans.row(0)[image * size.cells() + k] -
                          sum_of(dresponse.data + k * dresponse.row_stride, size.pixels()));
    if (uses_batch_statistics()) {
      OwnMatrix<A> weighted(channels, size.cells());  // dvariance * V
      const Matrix<A> v = cells_of(values.view(), image);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < size.cells(); ++k)
          weighted.row(c)[k] = 2 * share * dvariance[c] * v.data[c * v.row_stride + k];
      const Matrix<A> inner_product = covariance(image);  // needed no more
      matmul(inner_product, v.transposed(), weighted.view());
      matmul_add(dresponse, inner_product, response);
    }
    for (int64_t k = 0; k < size.cells(); ++k)
      add_number(dresponse.data + k * dresponse.row_stride, shift[k], size.pixels());
    matmul(cells_of(dkeys, image), pixels_of(x.view(), image), dresponse.transposed());
  }

  // From the gradients of Phi and V to those of the convolutions and, where it has rows, of the map, added to dx (C, N
  // L).
  void prepare_backward(const OwnMatrix<A>& dkeys, OwnMatrix<A>& dvalues, OwnMatrix<A>& dx,
                        const SideGradients<A>& gradients) {
    OwnMatrix<A> dphi(inner, size.all_cells()), dg(inner, size.all_cells());
    multiply_by(dvalues.row(0), A(1) / static_cast<A>(size.cells()), channels * dvalues.cols);
    matmul(dphi.view(), theta_weight(), dkeys.view());
    matmul_add(dphi.view(), row_major(parameters.theta_bias, 1, inner).transposed(), dmeans.view());
    matmul(dg.view(), out_weight().transposed(), dvalues.view());
    matmul(row_major(gradients.theta_weight, inner, channels), phi.values.view(), dkeys.view().transposed());
    matmul(row_major(gradients.theta_bias, inner, 1), phi.values.view(), dmeans.view().transposed());
    matmul(row_major(gradients.out_weight, channels, inner), dvalues.view(), g.values.view().transposed());
    if (phi.passes_densely()) {
      phi.backward(dphi, x, dx, gradients.phi_weight, gradients.phi_bias);
      g.backward(dg, x, dx, gradients.g_weight, gradients.g_bias);
      return;
    }
    const OwnMatrix<A> pixels = transposed(x);  // a pixel's channels side by side
    OwnMatrix<A> dpixels(dx.cols, dx.rows);
    if (dx.rows > 0) dpixels.fill(A(0));
    phi.backward(dphi, pixels, dpixels, gradients.phi_weight, gradients.phi_bias);
    g.backward(dg, pixels, dpixels, gradients.g_weight, gradients.g_bias);
    if (dx.rows == 0) return;
    const OwnMatrix<A> from_winners = transposed(dpixels);
    add_multiple(dx.row(0), A(1), from_winners.row(0), dx.rows * dx.cols);
  }

  Matrix<A> theta_weight() const { return row_major(parameters.theta_weight, inner, channels); }
  Matrix<A> out_weight() const { return row_major(parameters.out_weight, channels, inner); }

  SideParameters<A> parameters;
  Extents size;
  int64_t channels, inner;
  OwnMatrix<A> x;  // (C, N L)
  PooledConvolution<A> phi, g;
  OwnMatrix<A> keys, values;                   // Phi and V (C, N K)
  OwnMatrix<A> shifts;                         // d (1, N K)
  OwnMatrix<A> means;                          // of r (1, N K)
  OwnMatrix<A> covariances;                    // of r (N K, K)
  OwnMatrix<A> spread;                         // V Cov(r) (C, N K)
  OwnMatrix<A> image_means;                    // of u (C, N)
  Buffer<A> mean, variance, deviation, scale;  // (C)
  OwnMatrix<A> dmeans;                         // (1, N K)
  Buffer<A> dvariance;                         // (C), over N
};

template <typename A>
struct LevelGradients {
  void* student;  // densely packed, nullptr: not wanted
  ScalarType student_type;
  A* adaptation_weight;
  A* adaptation_bias;
  SideGradients<A> sides[2];
};

// Both sides of a level.
template <typename A>
struct CellLevel {
  CellLevel(const MatrixView& student_view, const Extents& size, const A* weight, const A* bias, CellBlock<A> student,
            CellBlock<A> teacher)
      : student_view(student_view),
        size(size),
        weight(weight),
        bias(bias),
        sides{std::move(student), std::move(teacher)},
        responses(2 * size.cells(), size.all_pixels()),
        residual(sides[1].channels, size.all_pixels()) {}

  CellBlock<A>& student() { return sides[0]; }
  CellBlock<A>& teacher() { return sides[1]; }
  Matrix<A> adaptation() const { return row_major(weight, sides[1].channels, sides[0].channels); }
  // Of an image: the teacher's K responses, then the student's.
  Matrix<A> responses_of(const OwnMatrix<A>& all, int64_t image) const {
    return columns(all.view(), image * size.pixels(), size.pixels());
  }
  static Matrix<A> half(const Matrix<A>& both, int64_t side, int64_t cells) {
    return side == 1 ? both.rows_to(cells) : both.rows_from(cells);
  }
  int64_t work() const { return size.all_pixels() * (sides[0].channels + sides[1].channels) * size.cells(); }

  // Sum of e^2.
  double forward() {
    for (CellBlock<A>& side : sides) side.prepare();
    parallel_each(size.images, work(), [&](int64_t image) {
      for (int64_t side = 0; side < 2; ++side)
        sides[side].respond(image, half(responses_of(responses, image), side, size.cells()));
    });
    for (CellBlock<A>& side : sides) side.normalize();
    offsets = student().offsets();
    scaled_values = student().scaled_values();
    const int64_t channels = teacher().channels;
    OwnMatrix<A> adapted(channels, size.all_cells()), shared = teacher().offsets();
    matmul(adapted.view(), adaptation(), scaled_values.view());
    matmul_add(shared.view(), adaptation(), offsets.view(), -1);
    mixed = interleaved(teacher().scaled_values(), adapted);
    parallel_each(size.images, residual.rows * residual.cols, [&](int64_t image) {
      for (int64_t c = 0; c < channels; ++c) {
        const A* t = teacher().x.row(c) + image * size.pixels();
        A* e = residual.row(c) + image * size.pixels();
        std::copy(t, t + size.pixels(), e);
        add_number(e, shared.row(c)[image] - bias[c], size.pixels());
      }
    });
    matmul_add(residual.view(), adaptation(), student().x.view(), -1);
    std::vector<double> squares(static_cast<size_t>(size.images));
    parallel_each(size.images, work(), [&](int64_t image) {
      matmul_add(pixels_of(residual, image), mixed_of(mixed, image), responses_of(responses, image));
      for (int64_t c = 0; c < channels; ++c) {
        const A* e = residual.row(c) + image * size.pixels();
        for (int64_t first = 0; first < size.pixels(); first += kPiece)
          squares[image] += dot(e + first, e + first, min64(kPiece, size.pixels() - first));
      }
    });
    return total_of(squares);
  }

  // After forward(): gradients of grad times the sum.
  void backward(double grad, const LevelGradients<A>& gradients) {
    const int64_t channels = teacher().channels, student_channels = student().channels;
    OwnMatrix<A> totals(channels, size.images), dmixed(channels, mixed.cols),
        dresponses(responses.rows, responses.cols);
    parallel_each(size.images, work(), [&](int64_t image) {
      for (int64_t c = 0; c < channels; ++c) {
        A* e = residual.row(c) + image * size.pixels();
        multiply_by(e, static_cast<A>(2 * grad), size.pixels());
        totals.row(c)[image] = sum_of(e, size.pixels());
      }
      const Matrix<A> e = pixels_of(residual, image);
      matmul(mixed_of(dmixed, image), e, responses_of(responses, image).transposed());
      matmul(responses_of(dresponses, image), mixed_of(mixed, image).transposed(), e);
    });
    OwnMatrix<A> dvalues[2] = {OwnMatrix<A>(student_channels, size.all_cells()),
                               OwnMatrix<A>(channels, size.all_cells())};
    OwnMatrix<A> dadapted(channels, size.all_cells()), doffsets(student_channels, size.images);
    separate(dmixed, dvalues[1], dadapted);
    matmul(dvalues[0].view(), adaptation().transposed(), dadapted.view());
    multiply_by(totals.row(0), A(-1), channels * size.images);
    matmul(doffsets.view(), adaptation().transposed(), totals.view());
    const Matrix<A> dweight = row_major(gradients.adaptation_weight, channels, student_channels);
    matmul(dweight, residual.view(), student().x.view().transposed());
    multiply_by(dweight.data, A(-1), channels * student_channels);
    matmul_add(dweight, dadapted.view(), scaled_values.view().transposed());
    matmul_add(dweight, totals.view(), offsets.view().transposed());
    for (int64_t c = 0; c < channels; ++c) gradients.adaptation_bias[c] = sum_of(totals.row(c), size.images);
    multiply_by(totals.row(0), A(-1), channels * size.images);
    OwnMatrix<A> dstudent;
    if (gradients.student != nullptr) {
      dstudent = OwnMatrix<A>(student_channels, size.all_pixels());
      dstudent.fill(A(0));
      matmul_add(dstudent.view(), adaptation().transposed(), residual.view(), -1);
    }
    student().normalize_backward(dvalues[0], doffsets, gradients.sides[0]);
    teacher().normalize_backward(dvalues[1], totals, gradients.sides[1]);
    const OwnMatrix<A> dkeys[2] = {OwnMatrix<A>(student_channels, size.all_cells()),
                                   OwnMatrix<A>(channels, size.all_cells())};
    parallel_each(size.images, work(), [&](int64_t image) {
      for (int64_t side = 0; side < 2; ++side) {
        const Matrix<A> response = half(responses_of(responses, image), side, size.cells());
        const Matrix<A> dresponse = half(responses_of(dresponses, image), side, size.cells());
        sides[side].respond_backward(image, response, dresponse, dkeys[side].view());
        if (side == 0 && gradients.student != nullptr)
          matmul_add(pixels_of(dstudent, image), sides[0].cells_of(sides[0].keys.view(), image), dresponse);
      }
    });
    OwnMatrix<A> dteacher;
    student().prepare_backward(dkeys[0], dvalues[0], dstudent, gradients.sides[0]);
    teacher().prepare_backward(dkeys[1], dvalues[1], dteacher, gradients.sides[1]);
    if (gradients.student != nullptr) unpack(dstudent, gradients.student_type, gradients.student, student_view);
  }

  Matrix<A> pixels_of(const OwnMatrix<A>& matrix, int64_t image) const {
    return columns(matrix.view(), image * size.pixels(), size.pixels());
  }
  Matrix<A> mixed_of(const OwnMatrix<A>& matrix, int64_t image) const {
    return columns(matrix.view(), image * 2 * size.cells(), 2 * size.cells());
  }
  // (Ct, N, 2K) of both (Ct, N, K), the second one's sign turned; and back.
  OwnMatrix<A> interleaved(const OwnMatrix<A>& first, const OwnMatrix<A>& second) const {
    OwnMatrix<A> both(first.rows, 2 * first.cols);
    for (int64_t row = 0; row < first.rows; ++row)
      for (int64_t n = 0; n < size.images; ++n)
        for (int64_t k = 0; k < size.cells(); ++k) {
          both.row(row)[2 * n * size.cells() + k] = first.row(row)[n * size.cells() + k];
          both.row(row)[(2 * n + 1) * size.cells() + k] = -second.row(row)[n * size.cells() + k];
        }
    return both;
  }
  void separate(const OwnMatrix<A>& both, OwnMatrix<A>& first, OwnMatrix<A>& second) const {
    for (int64_t row = 0; row < first.rows; ++row)
      for (int64_t n = 0; n < size.images; ++n)
        for (int64_t k = 0; k < size.cells(); ++k) {
          first.row(row)[n * size.cells() + k] = both.row(row)[2 * n * size.cells() + k];
          second.row(row)[n * size.cells() + k] = -both.row(row)[(2 * n + 1) * size.cells() + k];
        }
  }

  MatrixView student_view;
  Extents size;
  const A* weight;             // (Ct, Cs)
  const A* bias;               // (Ct)
  CellBlock<A> sides[2];       // student, teacher
  OwnMatrix<A> responses;      // (2K, N L)
  OwnMatrix<A> residual;       // e (Ct, N L)
  OwnMatrix<A> offsets;        // O of the student (Cs, N)
  OwnMatrix<A> scaled_values;  // U of the student (Cs, N K)
  OwnMatrix<A> mixed;          // [U_t, -B U_s] (Ct, N 2K)
};

// The arguments that every variant of the op has. Of every level: kLevelTensors in `parameters`, four numbers in
// `pools`, two in `eps`, the student's and the teacher's, negative without a norm.
struct CellArguments {
  const Tensors& student;
  const Tensors& teacher;
  const OptionalTensors& parameters;
  const std::vector<int64_t>& pools;
  const std::vector<double>& eps;

  ScalarType accumulation(size_t index) const {
    return accumulation_type(student[index].scalar_type(), teacher[index].scalar_type());
  }
};

void check(const CellArguments& arguments, const char* op) {
  const size_t count = arguments.student.size();
  STD_TORCH_CHECK(count > 0, op, ": student must have at least one level");
  check_length(arguments.teacher, count, op, "teacher");
  check_length(arguments.parameters, kLevelTensors * count, op, "parameters");
  check_length(arguments.pools, 4 * count, op, "pools");
  check_length(arguments.eps, 2 * count, op, "eps");
}

template <typename A>
SideParameters<A> side_parameters(const CellArguments& arguments, size_t index, size_t side, int64_t channels,
                                  int64_t& inner, const char* op) {
  const std::optional<Tensor>* tensors = &arguments.parameters[kLevelTensors * index + 2 + kSideTensors * side];
  const char* names[kSideTensors] = {"g_weight",     "g_bias",     "out_weight", "out_bias",
                                     "theta_weight", "theta_bias", "phi_weight", "phi_bias",
                                     "norm_weight",  "norm_bias",  "norm_mean",  "norm_variance"};
  for (size_t i : {0, 1, 2, 4, 5, 6, 7}) STD_TORCH_CHECK(tensors[i].has_value(), op, ": ", names[i], " must be given");
  inner = tensors[1]->numel();
  const int64_t sizes[kSideTensors] = {inner * channels, inner, channels * inner, channels, inner * channels, inner,
                                       inner * channels, inner, channels,         channels, channels,         channels};
  const A* data[kSideTensors];
  for (size_t i = 0; i < kSideTensors; ++i)
    data[i] = static_cast<const A*>(
        checked_data(tensors[i], arguments.accumulation(index), sizes[i], arguments.student[index], op, names[i]));
  return {data[0],
          data[1],
          data[2],
          data[3],
          data[4],
          data[5],
          data[6],
          data[7],
          data[8],
          data[9],
          data[10],
          data[11],
          arguments.eps[2 * index + side]};
}

template <typename A>
CellLevel<A> cell_level(const CellArguments& arguments, size_t index, const char* op) {
  const Tensor &s = arguments.student[index], &t = arguments.teacher[index];
  const MatrixView views[2] = {checked_view(s, op, "student"), checked_view(t, op, "teacher")};
  check_pair(s, t, false, op);
  check_device(t, s, op, "teacher");
  const int64_t* pool = &arguments.pools[4 * index];
  const Extents size{s.size(0), s.size(2), s.size(3), {pool[0], pool[1], pool[2], pool[3]}};
  STD_TORCH_CHECK(size.images > 0, op, ": student must have at least one image");
  STD_TORCH_CHECK(size.pool.fits(size.height, size.width), op, ": pools must fit the map, and its first cell the pool");
  const int64_t channels[2] = {s.size(1), t.size(1)};
  int64_t inner[2];
  const SideParameters<A> student = side_parameters<A>(arguments, index, 0, channels[0], inner[0], op);
  const SideParameters<A> teacher = side_parameters<A>(arguments, index, 1, channels[1], inner[1], op);
  const std::optional<Tensor>* adaptation = &arguments.parameters[kLevelTensors * index];
  const ScalarType type = arguments.accumulation(index);
  STD_TORCH_CHECK(adaptation[0].has_value() && adaptation[1].has_value(), op, ": the adaptation must be given");
  const void* weight = checked_data(adaptation[0], type, channels[1] * channels[0], s, op, "adaptation_weight");
  const void* bias = checked_data(adaptation[1], type, channels[1], s, op, "adaptation_bias");
  return CellLevel<A>(
      views[0], size, static_cast<const A*>(weight), static_cast<const A*>(bias),
      CellBlock<A>(student, size, channels[0], inner[0], packed<A>(s.scalar_type(), s.const_data_ptr(), views[0])),
      CellBlock<A>(teacher, size, channels[1], inner[1], packed<A>(t.scalar_type(), t.const_data_ptr(), views[1])));
}

// Gradients of a level as the op returns them: the student's and one of each parameter, empty where there is none.
template <typename A>
LevelGradients<A> allocate(const CellArguments& arguments, size_t index, ScalarType student_type, Tensor* student,
                           Tensors& outputs) {
  LevelGradients<A> gradients{};
  if (student != nullptr) {
    const Tensor& s = arguments.student[index];
    const bool channels_last = matrix_view(s.sizes().data(), s.strides().data()).channels_last;
    *student = empty_like_device(s, shape_of(s), student_type, channels_last);
    gradients.student = student->mutable_data_ptr(), gradients.student_type = student_type;
  }
  std::vector<A*> data;
  for (size_t i = 0; i < kLevelTensors; ++i) {
    const auto& parameter = arguments.parameters[kLevelTensors * index + i];
    const size_t field = i < 2 ? 0 : (i - 2) % kSideTensors;
    const bool learns = parameter.has_value() && field < kLearned;
    std::vector<int64_t> shape{0};
    if (learns) shape.assign(parameter->sizes().begin(), parameter->sizes().end());
    outputs.push_back(empty_like_device(arguments.student[index], shape, arguments.accumulation(index)));
    data.push_back(learns ? static_cast<A*>(outputs.back().mutable_data_ptr()) : nullptr);
  }
  gradients.adaptation_weight = data[0], gradients.adaptation_bias = data[1];
  for (size_t side = 0; side < 2; ++side) {
    A** side_data = &data[2 + kSideTensors * side];
    gradients.sides[side] = {side_data[0], side_data[1], side_data[2], side_data[3], side_data[4],
                             side_data[5], side_data[6], side_data[7], side_data[8], side_data[9]};
  }
  return gradients;
}

// Mean and biased variance (C) of u where the norm takes the batch's, else empty.
template <typename A>
void put_moments(const CellBlock<A>& block, const Tensor& like, ScalarType type, Tensors& outputs) {
  for (const Buffer<A>* moment : {&block.mean, &block.variance}) {
    const int64_t count = block.uses_batch_statistics() ? block.channels : 0;
    outputs.push_back(empty_like_device(like, {count}, type));
    std::copy(moment->begin(), moment->begin() + count, static_cast<A*>(outputs.back().mutable_data_ptr()));
  }
}

struct CellResults {
  Tensor squares;      // (levels)
  Tensors moments;     // four a level: mean and variance of the student's u, then of the teacher's
  Tensors students;    // gradients of the students, if wanted
  Tensors parameters;  // gradients of the parameters, kLevelTensors a level
};

// differentiates: also the gradients, of grad times the sums, or (nullptr) of the sums.
CellResults launch_cell_relation(const CellArguments& arguments, bool differentiates, const Tensor* grad,
                                 bool student_gradient, const char* op) {
  check(arguments, op);
  if (grad != nullptr) checked_grad(*grad, arguments.student, arguments.teacher, op);
  CellResults results;
  results.squares = empty_squares(arguments.student, arguments.teacher);
  for (size_t index = 0; index < arguments.student.size(); ++index)
    with_accumulator(arguments.accumulation(index), [&](auto tag) {
      using A = typename decltype(tag)::type;
      CellLevel<A> level = cell_level<A>(arguments, index, op);
      put_number(results.squares, index, level.forward());
      for (CellBlock<A>& side : level.sides)
        put_moments(side, arguments.student[index], arguments.accumulation(index), results.moments);
      if (!differentiates) return;
      // Before grad is known a gradient stays in the accumulation type, so that it is rounded once.
      const ScalarType type = grad == nullptr ? arguments.accumulation(index) : arguments.student[index].scalar_type();
      if (student_gradient) results.students.push_back(Tensor());
      const LevelGradients<A> gradients = allocate<A>(
          arguments, index, type, student_gradient ? &results.students.back() : nullptr, results.parameters);
      level.backward(grad == nullptr ? 1 : number_at(*grad, index), gradients);
    });
  return results;
}

Tensors joined(std::initializer_list<const Tensors*> lists) {
  Tensors all;
  for (const Tensors* list : lists) all.insert(all.end(), list->begin(), list->end());
  return all;
}

Tensors cell_relation_forward(const Tensors& student, const Tensors& teacher, const OptionalTensors& parameters,
                              const std::vector<int64_t>& pools, const std::vector<double>& eps) {
  const CellResults results =
      launch_cell_relation({student, teacher, parameters, pools, eps}, false, nullptr, false, "cell_relation_forward");
  const Tensors squares{results.squares};
  return joined({&squares, &results.moments});
}

Tensors cell_relation_backward(const Tensors& student, const Tensors& teacher, const OptionalTensors& parameters,
                               const std::vector<int64_t>& pools, const std::vector<double>& eps, const Tensor& grad,
                               bool student_gradient) {
  const CellResults results = launch_cell_relation({student, teacher, parameters, pools, eps}, true, &grad,
                                                   student_gradient, "cell_relation_backward");
  return joined({&results.students, &results.parameters});
}

Tensors cell_relation_with_gradient(const Tensors& student, const Tensors& teacher, const OptionalTensors& parameters,
                                    const std::vector<int64_t>& pools, const std::vector<double>& eps,
                                    bool student_gradient) {
  const CellResults results = launch_cell_relation({student, teacher, parameters, pools, eps}, true, nullptr,
                                                   student_gradient, "cell_relation_with_gradient");
  const Tensors squares{results.squares};
  return joined({&squares, &results.moments, &results.students, &results.parameters});
}

}  // namespace
}  // namespace fbkd

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CPU, m) {
  m.impl("cell_relation_forward", TORCH_BOX(&fbkd::cell_relation_forward));
  m.impl("cell_relation_backward", TORCH_BOX(&fbkd::cell_relation_backward));
  m.impl("cell_relation_with_gradient", TORCH_BOX(&fbkd::cell_relation_with_gradient));
}
