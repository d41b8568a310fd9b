// The attention pool on CUDA: chooses the kernels of each element type.
#include "launch.h"

#include <torch/csrc/stable/library.h>

#include "../attention_pool_levels.h"
#include "attention_pool.cuh"

namespace fbkd::cuda {
namespace {

void launch_forward(const std::vector<PoolLevel>& levels, const Tensor& like) {
  Queue queue(like);
  by_type(levels, &PoolLevel::type, [&](auto element, const auto& same) {
    using T = typename decltype(element)::type;
    launch_attention_pool_forward<T, Accumulator<T>>(same, queue);
  });
}

void launch_backward(const std::vector<PoolGradientLevel>& levels, const Tensor& like) {
  Queue queue(like);
  by_type(levels, &PoolGradientLevel::type, [&](auto element, const auto& same) {
    using T = typename decltype(element)::type;
    launch_attention_pool_backward<T, Accumulator<T>>(same, queue);
  });
}

Tensors attention_pool_forward(const Tensors& x) {
  Tensors means;
  const auto levels = pool_levels(x, means, "attention_pool");
  if (!levels.empty()) launch_forward(levels, x[0]);
  return means;
}

Tensors attention_pool_backward(const Tensors& x, const OptionalTensors& grads) {
  Tensors gradients;
  const auto levels = pool_gradient_levels(x, grads, gradients, "attention_pool_backward");
  if (!levels.empty()) launch_backward(levels, x[0]);
  return gradients;
}

}  // namespace
}  // namespace fbkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CUDA, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&fbkd::cuda::attention_pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&fbkd::cuda::attention_pool_backward));
}
