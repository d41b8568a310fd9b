// The masked squared distance on CUDA: chooses the kernels of each pair of element types.
#include "launch.h"

#include <torch/csrc/stable/library.h>

#include "../masked_l2_levels.h"
#include "masked_l2.cuh"

namespace fbkd::cuda {
namespace {

// Calls f(Type<S>, Type<T>, levels) for each pair of element types.
template <typename F>
void by_types(const std::vector<MaskedLevel>& levels, F&& f) {
  by_type(levels, &MaskedLevel::student_type, [&](auto student, const auto& same_student) {
    by_type(same_student, &MaskedLevel::teacher_type,
            [&](auto teacher, const auto& same) { f(student, teacher, same); });
  });
}

void launch_forward(const std::vector<MaskedLevel>& levels, const Tensor& squares) {
  Queue queue(squares);
  const bool is_double = squares.scalar_type() == ScalarType::Double;
  by_types(levels, [&](auto student, auto teacher, const auto& same) {
    using S = typename decltype(student)::type;
    using T = typename decltype(teacher)::type;
    launch_masked_l2_forward<S, T, Accumulator<S, T>>(same, squares.mutable_data_ptr(), is_double, queue);
  });
}

void launch_backward(const std::vector<MaskedLevel>& levels, const Tensor& grad) {
  Queue queue(grad);
  const bool is_double = grad.scalar_type() == ScalarType::Double;
  by_types(levels, [&](auto student, auto teacher, const auto& same) {
    using S = typename decltype(student)::type;
    using T = typename decltype(teacher)::type;
    launch_masked_l2_backward<S, T, Accumulator<S, T>>(same, grad.const_data_ptr(), is_double, queue);
  });
}

Tensor masked_l2_forward(const Tensors& student, const Tensors& teacher, const OptionalTensors& spatial_mask,
                         const OptionalTensors& channel_mask) {
  const auto levels = masked_levels(student, teacher, spatial_mask, channel_mask, nullptr, "masked_l2");
  Tensor squares = empty_squares(student, teacher);
  torch::stable::zero_(squares);
  if (!levels.empty()) launch_forward(levels, squares);
  return squares;
}

Tensors masked_l2_backward(const Tensors& student, const Tensors& teacher, const OptionalTensors& spatial_mask,
                           const OptionalTensors& channel_mask, const Tensor& grad) {
  const char* op = "masked_l2_backward";
  Tensors gradients;
  const auto levels = masked_levels(student, teacher, spatial_mask, channel_mask, &gradients, op);
  checked_grad(grad, student, teacher, op);
  if (!levels.empty()) launch_backward(levels, grad);
  return gradients;
}

}  // namespace
}  // namespace fbkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CUDA, m) {
  m.impl("masked_l2_forward", TORCH_BOX(&fbkd::cuda::masked_l2_forward));
  m.impl("masked_l2_backward", TORCH_BOX(&fbkd::cuda::masked_l2_backward));
}
