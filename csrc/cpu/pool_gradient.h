// What the gradients of a level's four means add to a piece of a row of its gradient.
#pragma once

#include "../attention_pool_levels.h"
#include "buffer.h"
#include "pieces.h"

namespace fbkd {

namespace {

template <bool READ, bool ADD, typename A>
FBKD_INLINE void write_pool_gradient(const A* __restrict__ x, A row_abs, A row_plain, const A* __restrict__ col_abs,
                                     const A* __restrict__ col_plain, int64_t count, A* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A plain = row_plain + col_plain[i];
    const A gradient = READ ? input_gradient<A>(x[i], row_abs + col_abs[i], plain) : plain;
    out[i] = ADD ? out[i] + gradient : gradient;
  }
}

// sign(x) * (row_abs + col_abs) + row_plain + col_plain, written to out or added to it; x nullptr: only the plain part.
template <typename A>
FBKD_CLONES void pool_gradient(const A* x, A row_abs, A row_plain, const A* col_abs, const A* col_plain, int64_t count,
                               bool add, A* out) {
  if (x == nullptr)
    add ? write_pool_gradient<false, true>(x, row_abs, row_plain, col_abs, col_plain, count, out)
        : write_pool_gradient<false, false>(x, row_abs, row_plain, col_abs, col_plain, count, out);
  else
    add ? write_pool_gradient<true, true>(x, row_abs, row_plain, col_abs, col_plain, count, out)
        : write_pool_gradient<true, false>(x, row_abs, row_plain, col_abs, col_plain, count, out);
}

}  // namespace

// Gradients of one direction's means, divided by the number of elements of each mean; zeros where there is none.
template <typename A>
struct MeanGradients {
  MeanGradients(const void* abs, const void* plain, int64_t size, int64_t count)
      : abs(scaled(abs, size, count)), plain(scaled(plain, size, count)) {}

  static Buffer<A> scaled(const void* grad, int64_t size, int64_t count) {
    Buffer<A> result(static_cast<size_t>(size), A(0));
    if (grad != nullptr)
      for (int64_t i = 0; i < size; ++i) result[i] = static_cast<const A*>(grad)[i] / static_cast<A>(count);
    return result;
  }

  Buffer<A> abs, plain;
};

// Both directions of a level.
template <typename A>
struct PoolGradient {
  PoolGradient(const MatrixView& view, const ByDirection<const void*>& grads)
      : view(view),
        rows(grads.row_abs, grads.row_plain, view.images * view.rows, view.cols),
        cols(grads.col_abs, grads.col_plain, view.images * view.cols, view.rows),
        reads(grads.row_abs != nullptr || grads.col_abs != nullptr),
        present(reads || grads.row_plain != nullptr || grads.col_plain != nullptr) {}

  // Writes, or adds to, up to kPiece elements of a row's gradient from column `col` on. data: the map itself, of
  // element type `type`.
  void put(int64_t image, int64_t row, int64_t col, int64_t count, ScalarType type, const void* data, bool add,
           A* out) const {
    A buffer[kPiece];
    const int64_t first = image * view.image_stride + row * view.row_stride + col;
    const A* x = reads ? load_piece(type, data, first, 1, count, buffer) : nullptr;
    const int64_t r = image * view.rows + row, c = image * view.cols + col;
    pool_gradient(x, rows.abs[r], rows.plain[r], &cols.abs[c], &cols.plain[c], count, add, out);
  }

  MatrixView view;
  MeanGradients<A> rows, cols;
  bool reads, present;
};

}  // namespace fbkd
