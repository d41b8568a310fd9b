// Schemas of every op. The kernels register themselves beside their code.
#include "stable_abi.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fbkd_ops, m) {
  m.def("attention_pool_forward(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_pool_backward(Tensor x, Tensor? grad_spatial_attention, Tensor? grad_channel_attention, "
      "Tensor? grad_spatial_mean, Tensor? grad_channel_mean) -> Tensor");
}
