// The attention pool on CUDA: chooses the kernels of each element type.
#include "launch.h"

#include <torch/csrc/stable/library.h>

#include "../attention_pool_levels.h"
#include "attention_pool.cuh"

namespace fbkd::cuda {
namespace {

Tensors pool_forward(const Tensors& x) {
  return fbkd::attention_pool_forward(x, [](const std::vector<PoolLevel>& levels, const Tensor& like) {
    Queue queue(like);
    by_type(levels, &PoolLevel::type, [&](auto element, const auto& same) {
      using T = typename decltype(element)::type;
      attention_pool_forward<T, Accumulator<T>>(same, queue);
    });
  });
}

Tensors pool_backward(const Tensors& x, const OptionalTensors& grads) {
  return fbkd::attention_pool_backward(x, grads, [](const std::vector<PoolGradientLevel>& levels, const Tensor& like) {
    Queue queue(like);
    by_type(levels, &PoolGradientLevel::type, [&](auto element, const auto& same) {
      using T = typename decltype(element)::type;
      attention_pool_backward<T, Accumulator<T>>(same, queue);
    });
  });
}

}  // namespace
}  // namespace fbkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CUDA, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&fbkd::cuda::pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&fbkd::cuda::pool_backward));
}
