// A level of two maps of the same shape, as the kernels of both devices take it: checks and pointers.
#pragma once

#include "tensors.h"

namespace fbkd {

struct PairLevel {
  ScalarType student_type, teacher_type;
  MatrixView student;  // rows and columns of the level
  MatrixView teacher;  // the same rows and columns: its col_stride is not 1 where the layouts differ
  const void* s;
  const void* t;
  int64_t index;  // of the level in the op's result and in grad
  void* ds;       // backward only: gradient_view(student)

  ScalarType accumulation() const { return accumulation_type(student_type, teacher_type); }
};

inline void check_pair_lists(const Tensors& student, const Tensors& teacher, const char* op) {
  STD_TORCH_CHECK(!student.empty(), op, ": student must have at least one level");
  check_length(teacher, student.size(), op, "teacher");
}

// One level; its gradient is allocated where `gradients` is given.
inline PairLevel pair_level(const Tensors& student, const Tensors& teacher, size_t index, Tensors* gradients,
                            const char* op) {
  const Tensor &s = student[index], &t = teacher[index];
  const MatrixView view = checked_view(s, op, "student"), teacher_view = checked_view(t, op, "teacher");
  check_pair(s, t, true, op);
  check_device(s, student[0], op, "student");
  check_device(t, student[0], op, "teacher");
  PairLevel level{s.scalar_type(),
                  t.scalar_type(),
                  view,
                  oriented(teacher_view, view.rows_are_channels),
                  s.const_data_ptr(),
                  t.const_data_ptr(),
                  static_cast<int64_t>(index),
                  nullptr};
  if (gradients != nullptr) {
    gradients->push_back(empty_gradient(s, view));
    level.ds = gradients->back().mutable_data_ptr();
  }
  return level;
}

}  // namespace fbkd
