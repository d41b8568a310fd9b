// Argument checks and allocations of the attention pool that the CPU and the CUDA launchers share.
#pragma once

#include "stable_abi.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "attention_pool.h"

namespace fbkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using PoolOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline MatrixView checked_view(const Tensor& x) {  // (N, C, H, W)
  STD_TORCH_CHECK(x.dim() == 4, "attention_pool: x must have 4 dimensions (N, C, H, W), got ", x.dim());
  const MatrixView view = matrix_view(x.sizes().data(), x.strides().data());
  STD_TORCH_CHECK(view.valid,
                  "attention_pool: x must be contiguous, channels_last or a batch or channel slice of one of them; "
                  "call x.contiguous() first");
  return view;
}

inline Tensor empty_like_device(const Tensor& x, std::vector<int64_t> size, ScalarType type,
                                bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(size, type, std::nullopt, x.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// spatial_attention (N, H, W), channel_attention (N, C), spatial_mean (N, H, W), channel_mean (N, C)
inline PoolOutputs allocate_outputs(const Tensor& x) {
  const ScalarType type = accumulation_type(x.scalar_type());
  const std::vector<int64_t> spatial{x.size(0), x.size(2), x.size(3)};
  const std::vector<int64_t> channel{x.size(0), x.size(1)};
  return {empty_like_device(x, spatial, type), empty_like_device(x, channel, type),
          empty_like_device(x, spatial, type), empty_like_device(x, channel, type)};
}

inline Tensor allocate_gradient(const Tensor& x, const MatrixView& view) {
  const auto size = x.sizes();
  return empty_like_device(x, std::vector<int64_t>(size.begin(), size.end()), x.scalar_type(), view.channels_last);
}

// The densely packed view that the gradient of an input with this view has.
inline MatrixView gradient_view(const MatrixView& view) {
  MatrixView dense = view;
  dense.row_stride = view.cols;
  dense.image_stride = view.rows * view.cols;
  return dense;
}

// Data of an optional gradient, nullptr where it is absent.
template <typename A>
const A* gradient_data(const std::optional<Tensor>& grad, int64_t numel, const Tensor& x, const char* name) {
  if (!grad.has_value()) return nullptr;
  STD_TORCH_CHECK(grad->scalar_type() == accumulation_type(x.scalar_type()), "attention_pool_backward: ", name,
                  " must be float64 for a float64 x and float32 otherwise");
  STD_TORCH_CHECK(grad->is_contiguous() && grad->numel() == numel, "attention_pool_backward: ", name,
                  " must be contiguous with ", numel, " elements, got ", grad->numel());
  STD_TORCH_CHECK(grad->device() == x.device(), "attention_pool_backward: ", name, " must be on the device of x");
  return static_cast<const A*>(grad->const_data_ptr());
}

template <typename A>
struct Gradients {
  const A* row_abs;    // (images, rows) or nullptr
  const A* row_plain;  // (images, rows) or nullptr
  const A* col_abs;    // (images, cols) or nullptr
  const A* col_plain;  // (images, cols) or nullptr

  bool needs_input() const { return row_abs != nullptr || col_abs != nullptr; }
};

template <typename A>
Gradients<A> checked_gradients(const Tensor& x, const MatrixView& view,
                               const std::optional<Tensor>& grad_spatial_attention,  // (N, H, W)
                               const std::optional<Tensor>& grad_channel_attention,  // (N, C)
                               const std::optional<Tensor>& grad_spatial_mean,       // (N, H, W)
                               const std::optional<Tensor>& grad_channel_mean) {     // (N, C)
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3), channels = x.size(0) * x.size(1);
  const A* spatial_abs = gradient_data<A>(grad_spatial_attention, pixels, x, "grad_spatial_attention");
  const A* channel_abs = gradient_data<A>(grad_channel_attention, channels, x, "grad_channel_attention");
  const A* spatial_plain = gradient_data<A>(grad_spatial_mean, pixels, x, "grad_spatial_mean");
  const A* channel_plain = gradient_data<A>(grad_channel_mean, channels, x, "grad_channel_mean");
  if (view.rows_are_channels) return {channel_abs, channel_plain, spatial_abs, spatial_plain};
  return {spatial_abs, spatial_plain, channel_abs, channel_plain};
}

// The four outputs' data, by matrix direction.
template <typename A>
struct Means {
  A* row_abs;    // (images, rows)
  A* row_plain;  // (images, rows)
  A* col_abs;    // (images, cols)
  A* col_plain;  // (images, cols)
};

template <typename A>
Means<A> means_of(const PoolOutputs& outputs, const MatrixView& view) {
  const auto data = [](const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
  A* spatial_abs = data(std::get<0>(outputs));
  A* channel_abs = data(std::get<1>(outputs));
  A* spatial_plain = data(std::get<2>(outputs));
  A* channel_plain = data(std::get<3>(outputs));
  if (view.rows_are_channels) return {channel_abs, channel_plain, spatial_abs, spatial_plain};
  return {spatial_abs, spatial_plain, channel_abs, channel_plain};
}

}  // namespace fbkd
