// The CUDA kernels of the attention pool as host functions, with the tiling and the grid chosen by the caller.
#include "runtime.h"

#include "../../csrc/cuda/attention_pool.cuh"

using namespace fbkd;
using namespace fbkd::cuda;

namespace {

template <typename A>
void finish(const Destination<A>& to, int64_t images, unsigned grid, bool groups) {
  if (to.partial == nullptr) return;
  if (groups)
    launch(attention_pool_finish<A, kFinishGroups>, grid, kLanes * kFinishGroups, to, images);
  else
    launch(attention_pool_finish<A, 1>, grid, kLanes, to, images);
}

template <typename A>
Destination<A> destination(std::vector<Sums<A>>& storage, void* abs, void* plain, int64_t images, int64_t tiles,
                           int64_t length, int64_t count) {
  storage.assign(tiles > 1 ? images * tiles * length : 0, {A(NAN), A(NAN)});
  return {tiles > 1 ? storage.data() : nullptr, static_cast<A*>(abs), static_cast<A*>(plain), tiles, length, A(count)};
}

template <typename T, typename A, int VEC>
void forward(const void* x, const MatrixView& view, int64_t row_tile, unsigned grid, bool groups, void** means) {
  const Tiling tiling{row_tile, kColTile<A>, ceil_div(view.rows, row_tile), ceil_div(view.cols, kColTile<A>)};
  std::vector<Sums<A>> rows, cols;
  const auto by_row = destination<A>(rows, means[0], means[1], view.images, tiling.col_tiles, view.rows, view.cols);
  const auto by_col = destination<A>(cols, means[2], means[3], view.images, tiling.row_tiles, view.cols, view.rows);
  launch(attention_pool_sums<T, A, VEC>, grid, kThreads, static_cast<const T*>(x), view, tiling, by_row, by_col);
  finish(by_row, view.images, grid, groups);
  finish(by_col, view.images, grid, groups);
}

template <typename T, typename A, int VEC, bool READ>
void backward(const void* x, const MatrixView& view, unsigned grid, void** grads, void* dx) {
  MatrixView dense = view;
  dense.row_stride = view.cols;
  dense.image_stride = view.rows * view.cols;
  const Tiling tiling{kGradientRows, kLanes * VEC, ceil_div(view.rows, int64_t(kGradientRows)),
                      ceil_div(view.cols, int64_t(kLanes * VEC))};
  const auto data = [&](int index) { return static_cast<const A*>(grads[index]); };
  const Source<A> by_row{data(0), data(1), view.rows, A(1) / A(view.cols)};
  const Source<A> by_col{data(2), data(3), view.cols, A(1) / A(view.rows)};
  launch(attention_pool_gradient<T, A, VEC, READ>, grid, kThreads, static_cast<const T*>(x), static_cast<T*>(dx), view,
         dense, tiling, by_row, by_col);
}

template <typename T, typename A>
void run(bool packs, const void* x, const MatrixView& view, int64_t row_tile, unsigned grid, bool groups, void** means,
         void** grads, void* dx) {
  constexpr int kVec = 16 / sizeof(T);
  packs ? forward<T, A, kVec>(x, view, row_tile, grid, groups, means)
        : forward<T, A, 1>(x, view, row_tile, grid, groups, means);
  const bool read = grads[0] != nullptr || grads[2] != nullptr;
  const bool wide = packs && view.cols % kVec == 0;
  if (wide)
    read ? backward<T, A, kVec, true>(x, view, grid, grads, dx) : backward<T, A, kVec, false>(nullptr, view, grid, grads, dx);
  else
    read ? backward<T, A, 1, true>(x, view, grid, grads, dx) : backward<T, A, 1, false>(nullptr, view, grid, grads, dx);
}

}  // namespace

// means and grads: row abs, row plain, column abs, column plain.
extern "C" void attention_pool(int dtype, bool packs, const void* x, const int64_t* size, const int64_t* stride,
                               int64_t row_tile, unsigned grid, bool groups, void** means, void** grads, void* dx) {
  const MatrixView view = matrix_view(size, stride);
  if (dtype == 0) run<float, float>(packs, x, view, row_tile, grid, groups, means, grads, dx);
  if (dtype == 1) run<double, double>(packs, x, view, row_tile, grid, groups, means, grads, dx);
  if (dtype == 2) run<__half, float>(packs, x, view, row_tile, grid, groups, means, grads, dx);
  if (dtype == 3) run<__nv_bfloat16, float>(packs, x, view, row_tile, grid, groups, means, grads, dx);
}
