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
    by_type(same_student, &MaskedLevel::teacher_type, [&](auto teacher, const auto& same) {
      f(student, teacher, same);
    });
  });
}

Tensor l2_forward(const Tensors& student, const Tensors& teacher, const OptionalTensors& spatial_mask,
                  const OptionalTensors& channel_mask) {
  const auto run = [](const std::vector<MaskedLevel>& levels, const Tensor& squares) {
    Queue queue(squares);
    const bool is_double = squares.scalar_type() == ScalarType::Double;
    by_types(levels, [&](auto student, auto teacher, const auto& same) {
      using S = typename decltype(student)::type;
      using T = typename decltype(teacher)::type;
      masked_l2_forward<S, T, Accumulator<S, T>>(same, squares.mutable_data_ptr(), is_double, queue);
    });
  };
  return fbkd::masked_l2_forward(student, teacher, spatial_mask, channel_mask, run);
}

Tensors l2_backward(const Tensors& student, const Tensors& teacher, const OptionalTensors& spatial_mask,
                    const OptionalTensors& channel_mask, const Tensor& grad) {
  const auto run = [](const std::vector<MaskedLevel>& levels, const Tensor& grad) {
    Queue queue(grad);
    const bool is_double = grad.scalar_type() == ScalarType::Double;
    by_types(levels, [&](auto student, auto teacher, const auto& same) {
      using S = typename decltype(student)::type;
      using T = typename decltype(teacher)::type;
      masked_l2_backward<S, T, Accumulator<S, T>>(same, grad.const_data_ptr(), is_double, queue);
    });
  };
  return fbkd::masked_l2_backward(student, teacher, spatial_mask, channel_mask, grad, run);
}

}  // namespace
}  // namespace fbkd::cuda

STABLE_TORCH_LIBRARY_IMPL(fbkd_ops, CUDA, m) {
  m.impl("masked_l2_forward", TORCH_BOX(&fbkd::cuda::l2_forward));
  m.impl("masked_l2_backward", TORCH_BOX(&fbkd::cuda::l2_backward));
}
