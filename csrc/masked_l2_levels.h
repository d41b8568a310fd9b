// The masked distance's levels as the kernels of both devices take them: checks, allocations, pointers.
#pragma once

#include "tensors.h"

namespace fbkd {

struct MaskedLevel {
  ScalarType student_type, teacher_type;
  MatrixView student;  // rows and columns of the level
  MatrixView teacher;  // the same rows and columns: its col_stride is not 1 where the layouts differ
  const void* s;
  const void* t;
  const void* row_mask;  // (images, rows), in the accumulation type; nullptr: ones
  const void* col_mask;  // (images, cols)
  int64_t index;         // of the level in the op's result and in grad
  void* ds;              // backward only: gradient_view(student)

  ScalarType accumulation() const { return accumulation_type(student_type, teacher_type); }
};

// The levels that have elements. Gradients of all levels are allocated where `gradients` is given.
inline std::vector<MaskedLevel> masked_levels(const Tensors& student, const Tensors& teacher,
                                              const OptionalTensors& spatial_mask, const OptionalTensors& channel_mask,
                                              Tensors* gradients, const char* op) {
  STD_TORCH_CHECK(!student.empty(), op, ": student must have at least one level");
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
    MaskedLevel level{s.scalar_type(),
                      t.scalar_type(),
                      view,
                      oriented(teacher_view, view.rows_are_channels),
                      s.const_data_ptr(),
                      t.const_data_ptr(),
                      view.rows_are_channels ? channel : spatial,
                      view.rows_are_channels ? spatial : channel,
                      static_cast<int64_t>(index),
                      nullptr};
    if (gradients != nullptr) {
      gradients->push_back(empty_gradient(s, view));
      level.ds = gradients->back().mutable_data_ptr();
    }
    if (s.numel() > 0) levels.push_back(level);
  }
  return levels;
}

}  // namespace fbkd
