// The attention pool's levels as the kernels of both devices take them: checks, allocations, pointers.
#pragma once

#include "attention_pool.h"
#include "tensors.h"

namespace fbkd {

struct PoolLevel {
  ScalarType type;  // of x; the means are in its accumulation type
  MatrixView view;
  const void* x;
  ByDirection<void*> means;
};

struct PoolGradientLevel {
  ScalarType type;  // of x and dx
  MatrixView view;  // of x; dx has gradient_view(view)
  const void* x;    // nullptr where it is not needed
  void* dx;
  ByDirection<const void*> grads;  // nullptr where absent
};

// The levels that have elements. The four means of all levels are allocated.
inline std::vector<PoolLevel> pool_levels(const Tensors& x, Tensors& outputs, const char* op) {
  std::vector<PoolLevel> levels;
  for (const Tensor& map : x) {
    const MatrixView view = checked_view(map, op, "x");
    check_device(map, x[0], op, "x");
    const ScalarType type = accumulation_type(map.scalar_type());
    const std::vector<int64_t> spatial{map.size(0), map.size(2), map.size(3)}, channel{map.size(0), map.size(1)};
    const Tensor means[4] = {empty_like_device(map, spatial, type), empty_like_device(map, channel, type),
                             empty_like_device(map, spatial, type), empty_like_device(map, channel, type)};
    outputs.insert(outputs.end(), means, means + 4);
    if (map.numel() == 0) continue;
    const auto data = [&](int index) { return means[index].mutable_data_ptr(); };
    levels.push_back(
        {map.scalar_type(), view, map.const_data_ptr(), by_direction(view, data(0), data(1), data(2), data(3))});
  }
  return levels;
}

// The gradients of one map's four means, checked; pixels and channels count those of all images.
inline ByDirection<const void*> pool_gradients(const OptionalTensors& grads, size_t first, const Tensor& map,
                                               const MatrixView& view, ScalarType type, const char* op) {
  const int64_t pixels = map.size(0) * map.size(2) * map.size(3), channels = map.size(0) * map.size(1);
  return by_direction(view, checked_data(grads[first], type, pixels, map, op, "grad_spatial_attention"),
                      checked_data(grads[first + 1], type, channels, map, op, "grad_channel_attention"),
                      checked_data(grads[first + 2], type, pixels, map, op, "grad_spatial_mean"),
                      checked_data(grads[first + 3], type, channels, map, op, "grad_channel_mean"));
}

// The levels that have elements. The gradients of all levels are allocated.
inline std::vector<PoolGradientLevel> pool_gradient_levels(const Tensors& x, const OptionalTensors& grads,
                                                           Tensors& outputs, const char* op) {
  check_length(grads, 4 * x.size(), op, "grads");
  std::vector<PoolGradientLevel> levels;
  for (size_t index = 0; index < x.size(); ++index) {
    const Tensor& map = x[index];
    const MatrixView view = checked_view(map, op, "x");
    check_device(map, x[0], op, "x");
    const auto by = pool_gradients(grads, 4 * index, map, view, accumulation_type(map.scalar_type()), op);
    const Tensor dx = empty_gradient(map, view);
    outputs.push_back(dx);
    if (map.numel() == 0) continue;
    const bool reads = by.row_abs != nullptr || by.col_abs != nullptr;
    levels.push_back({map.scalar_type(), view, reads ? map.const_data_ptr() : nullptr, dx.mutable_data_ptr(), by});
  }
  return levels;
}

}  // namespace fbkd
