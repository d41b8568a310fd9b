// Launchers of the attention pool's CUDA kernels.
#include "../stable_abi.h"

#include "attention_pool.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "../attention_pool_tensors.h"

namespace fbkd::cuda {
namespace {

constexpr int64_t kMaxBlocks = int64_t(1) << 20;
// Rows of a forward tile: many where that still leaves enough tiles to fill a large GPU (fewer partial sums), else few.
constexpr int64_t kManyRows = 128;
constexpr int64_t kFewRows = 32;
constexpr int64_t kEnoughTiles = 512;

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

unsigned blocks(int64_t work) { return static_cast<unsigned>(min64(work, kMaxBlocks)); }

Tiling tiling_of(const MatrixView& view, int64_t row_tile, int64_t col_tile) {
  return {row_tile, col_tile, ceil_div(view.rows, row_tile), ceil_div(view.cols, col_tile)};
}

template <typename A>
Tiling forward_tiling(const MatrixView& view) {
  const Tiling many = tiling_of(view, kManyRows, kColTile<A>);
  return tiles_of(view, many) >= kEnoughTiles ? many : tiling_of(view, kFewRows, kColTile<A>);
}

// Whether every row starts on a 16-byte boundary.
bool rows_aligned(const void* data, const MatrixView& view, int64_t element_size) {
  const auto aligned = [&](int64_t elements) { return elements * element_size % 16 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (view.rows == 1 || aligned(view.row_stride)) &&
         (view.images == 1 || aligned(view.image_stride));
}

template <typename A>
struct Direction {
  Destination<A> destination;
  std::optional<Tensor> storage;  // keeps the partial sums alive until the launches are queued
};

template <typename A>
Direction<A> direction(const Tensor& x, A* mean_abs, A* mean_plain, int64_t images, int64_t tiles, int64_t length,
                       int64_t count) {
  Direction<A> result{{nullptr, mean_abs, mean_plain, tiles, length, static_cast<A>(count)}, std::nullopt};
  if (tiles == 1) return result;
  result.storage = empty_like_device(x, {images * tiles * length, 2}, accumulation_type(x.scalar_type()));
  result.destination.partial = static_cast<Sums<A>*>(result.storage->mutable_data_ptr());
  return result;
}

template <typename A>
void launch_finish(const Destination<A>& to, int64_t images, cudaStream_t stream) {
  if (to.partial == nullptr || images * to.length == 0) return;
  const unsigned grid = blocks(ceil_div(images * to.length, kLanes));
  if (to.tiles >= kFinishGroups)
    attention_pool_finish<A, kFinishGroups><<<grid, kLanes * kFinishGroups, 0, stream>>>(to, images);
  else
    attention_pool_finish<A, 1><<<grid, kLanes, 0, stream>>>(to, images);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename A>
void launch_forward(const Tensor& x, const MatrixView& view, const PoolOutputs& outputs, cudaStream_t stream) {
  const Tiling tiling = forward_tiling<A>(view);
  const Means<A> means = means_of<A>(outputs, view);
  const auto by_row =
      direction<A>(x, means.row_abs, means.row_plain, view.images, tiling.col_tiles, view.rows, view.cols);
  const auto by_col =
      direction<A>(x, means.col_abs, means.col_plain, view.images, tiling.row_tiles, view.cols, view.rows);
  const T* data = static_cast<const T*>(x.const_data_ptr());
  const int64_t tiles = tiles_of(view, tiling);
  if (tiles > 0) {
    constexpr int kVec = 16 / sizeof(T);
    const auto kernel = rows_aligned(data, view, sizeof(T)) ? attention_pool_sums<T, A, kVec>
                                                            : attention_pool_sums<T, A, 1>;
    kernel<<<blocks(tiles), kThreads, 0, stream>>>(data, view, tiling, by_row.destination, by_col.destination);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  launch_finish(by_row.destination, view.images, stream);
  launch_finish(by_col.destination, view.images, stream);
}

template <typename T, typename A, int VEC, bool READ>
void launch_gradient(const T* x, T* dx, const MatrixView& from, const Gradients<A>& grads, cudaStream_t stream) {
  const MatrixView to = gradient_view(from);
  const Tiling tiling = tiling_of(from, kGradientRows, kLanes * VEC);
  const Source<A> by_row{grads.row_abs, grads.row_plain, from.rows, A(1) / static_cast<A>(from.cols)};
  const Source<A> by_col{grads.col_abs, grads.col_plain, from.cols, A(1) / static_cast<A>(from.rows)};
  attention_pool_gradient<T, A, VEC, READ>
      <<<blocks(tiles_of(from, tiling)), kThreads, 0, stream>>>(x, dx, from, to, tiling, by_row, by_col);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename A>
void launch_backward(const Tensor& x, const Tensor& dx, const MatrixView& view, const Gradients<A>& grads,
                     cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(dx.mutable_data_ptr());
  const bool read = grads.needs_input();
  const bool packs = view.cols % kVec == 0 && rows_aligned(to, gradient_view(view), sizeof(T)) &&
                     (!read || rows_aligned(from, view, sizeof(T)));
  const auto launch = packs ? (read ? launch_gradient<T, A, kVec, true> : launch_gradient<T, A, kVec, false>)
                            : (read ? launch_gradient<T, A, 1, true> : launch_gradient<T, A, 1, false>);
  launch(from, to, view, grads, stream);
}

PoolOutputs attention_pool_forward(const Tensor& x) {  // (N, C, H, W)
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const MatrixView view = checked_view(x);
  const PoolOutputs outputs = allocate_outputs(x);
  const cudaStream_t stream = current_stream(x);
  switch (x.scalar_type()) {
    case ScalarType::Float: launch_forward<float, float>(x, view, outputs, stream); break;
    case ScalarType::Double: launch_forward<double, double>(x, view, outputs, stream); break;
    case ScalarType::Half: launch_forward<__half, float>(x, view, outputs, stream); break;
    case ScalarType::BFloat16: launch_forward<__nv_bfloat16, float>(x, view, outputs, stream); break;
    default: STD_TORCH_CHECK(false, "attention_pool: x must be float16, bfloat16, float32 or float64");
  }
  return outputs;
}

template <typename T, typename A>
Tensor backward_of(const Tensor& x, const std::optional<Tensor>& grad_spatial_attention,
                   const std::optional<Tensor>& grad_channel_attention,
                   const std::optional<Tensor>& grad_spatial_mean, const std::optional<Tensor>& grad_channel_mean) {
  const MatrixView view = checked_view(x);
  const Gradients<A> grads = checked_gradients<A>(x, view, grad_spatial_attention, grad_channel_attention,
                                                  grad_spatial_mean, grad_channel_mean);
  const Tensor dx = allocate_gradient(x, view);
  if (x.numel() > 0) launch_backward<T, A>(x, dx, view, grads, current_stream(x));
  return dx;
}

Tensor attention_pool_backward(const Tensor& x,                                      // (N, C, H, W)
                               const std::optional<Tensor>& grad_spatial_attention,  // (N, H, W)
                               const std::optional<Tensor>& grad_channel_attention,  // (N, C)
                               const std::optional<Tensor>& grad_spatial_mean,       // (N, H, W)
                               const std::optional<Tensor>& grad_channel_mean) {     // (N, C)
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto run = [&](auto function) {
    return function(x, grad_spatial_attention, grad_channel_attention, grad_spatial_mean, grad_channel_mean);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: return run(backward_of<float, float>);
    case ScalarType::Double: return run(backward_of<double, double>);
    case ScalarType::Half: return run(backward_of<__half, float>);
    case ScalarType::BFloat16: return run(backward_of<__nv_bfloat16, float>);
    default: STD_TORCH_CHECK(false, "attention_pool: x must be float16, bfloat16, float32 or float64");
  }
  return x;
}

}  // namespace
}  // namespace fbkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CUDA, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&fbkd::cuda::attention_pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&fbkd::cuda::attention_pool_backward));
}
