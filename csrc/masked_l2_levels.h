// The masked distance's levels as the kernels of both devices take them: checks, allocations, pointers.
#pragma once

#include "masked_l2.h"
#include "tensors.h"

namespace fbkd {

struct MaskedLevel {
  ScalarType student_type, teacher_type;
  MatrixView student;    // rows and columns of the level
  MatrixView teacher;    // the same rows and columns: its col_stride is not 1 where the layouts differ
  const void* s;
  const void* t;
  const void* row_mask;  // (images, rows), in the accumulation type; nullptr: ones
  const void* col_mask;  // (images, cols)
  int64_t index;         // of the level in the op's result and in grad
  void* ds;              // backward only: gradient_view(student)

  ScalarType accumulation() const { return accumulation_type(student_type, teacher_type); }
};

inline void check_pair(const Tensor& student, const Tensor& teacher, bool same_width, const char* op) {
  bool same = true;
  for (int64_t dim = 0; dim < 4; ++dim) same = same && ((dim == 1 && !same_width) || student.size(dim) == teacher.size(dim));
  STD_TORCH_CHECK(same, op, ": student and teacher must agree in ", same_width ? "N, C, H and W" : "N, H and W");
}

inline ScalarType total_type(const Tensors& student, const Tensors& teacher) {
  ScalarType type = ScalarType::Float;
  for (size_t index = 0; index < student.size(); ++index)
    type = accumulation_type(type, accumulation_type(student[index].scalar_type(), teacher[index].scalar_type()));
  return type;
}

// Levels without elements are left out. Gradients are allocated where `gradients` is given.
inline std::vector<MaskedLevel> masked_levels(const Tensors& student, const Tensors& teacher,
                                              const OptionalTensors& spatial_mask,
                                              const OptionalTensors& channel_mask, Tensors* gradients,
                                              const char* op) {
  check_length(teacher, student.size(), op, "teacher");
  check_length(spatial_mask, student.size(), op, "spatial_mask");
  check_length(channel_mask, student.size(), op, "channel_mask");
  std::vector<MaskedLevel> levels;
  for (size_t index = 0; index < student.size(); ++index) {
    const Tensor &s = student[index], &t = teacher[index];
    const MatrixView view = checked_view(s, op, "student"), teacher_view = checked_view(t, op, "teacher");
    check_pair(s, t, true, op);
    check_device(s, student[0], op, "student");
    check_device(t, student[0], op, "teacher");
    const ScalarType type = accumulation_type(s.scalar_type(), t.scalar_type());
    const int64_t pixels = s.size(0) * s.size(2) * s.size(3), channels = s.size(0) * s.size(1);
    const void* spatial = checked_data(spatial_mask[index], type, pixels, s, op, "spatial_mask");
    const void* channel = checked_data(channel_mask[index], type, channels, s, op, "channel_mask");
    MaskedLevel level{s.scalar_type(), t.scalar_type(), view, oriented(teacher_view, view.rows_are_channels),
                      s.const_data_ptr(), t.const_data_ptr(), view.rows_are_channels ? channel : spatial,
                      view.rows_are_channels ? spatial : channel, static_cast<int64_t>(index), nullptr};
    if (gradients != nullptr) {
      gradients->push_back(empty_gradient(s, view));
      level.ds = gradients->back().mutable_data_ptr();
    }
    if (s.numel() > 0) levels.push_back(level);
  }
  return levels;
}

// run(levels, squares) writes the sum of each level into squares (all levels), of type total_type, which holds zeros.
template <typename Run>
Tensor masked_l2_forward(const Tensors& student, const Tensors& teacher, const OptionalTensors& spatial_mask,
                         const OptionalTensors& channel_mask, Run&& run) {
  const char* op = "masked_l2";
  STD_TORCH_CHECK(!student.empty(), op, ": student must have at least one level");
  const auto levels = masked_levels(student, teacher, spatial_mask, channel_mask, nullptr, op);
  const Tensor squares = empty_like_device(student[0], {static_cast<int64_t>(student.size())}, total_type(student, teacher));
  torch::stable::zero_(const_cast<Tensor&>(squares));
  if (!levels.empty()) run(levels, squares);
  return squares;
}

// run(levels, grad) writes the gradient of every level; grad (all levels) is of type total_type.
template <typename Run>
Tensors masked_l2_backward(const Tensors& student, const Tensors& teacher, const OptionalTensors& spatial_mask,
                           const OptionalTensors& channel_mask, const Tensor& grad, Run&& run) {
  const char* op = "masked_l2_backward";
  STD_TORCH_CHECK(!student.empty(), op, ": student must have at least one level");
  Tensors gradients;
  const auto levels = masked_levels(student, teacher, spatial_mask, channel_mask, &gradients, op);
  checked_data(grad, total_type(student, teacher), static_cast<int64_t>(student.size()), student[0], op, "grad");
  if (!levels.empty()) run(levels, grad);
  return gradients;
}

}  // namespace fbkd
