// The masks' maps as the kernels of both devices take them: checks, allocations, pointers.
#pragma once

#include "tensors.h"

namespace fbkd {

// One mask: a softmax over the `length` elements of each of `images` rows.
struct MaskLevel {
  ScalarType student_type, teacher_type;
  int64_t images, length;
  const void* student;  // (images, length), nullptr: the teacher's map alone
  const void* teacher;  // (images, length)
  void* mask;           // (images, length), in the accumulation type of the two
  double temperature;
  bool joint;

  ScalarType accumulation() const { return accumulation_type(student_type, teacher_type); }
};

// The levels that have elements. The masks of all levels are allocated.
inline std::vector<MaskLevel> mask_levels(const OptionalTensors& student, const Tensors& teacher,
                                          const std::vector<double>& temperature, const std::vector<bool>& joint,
                                          Tensors& masks, const char* op) {
  check_length(student, teacher.size(), op, "student");
  check_length(temperature, teacher.size(), op, "temperature");
  check_length(joint, teacher.size(), op, "joint");
  std::vector<MaskLevel> levels;
  for (size_t index = 0; index < teacher.size(); ++index) {
    const Tensor& t = teacher[index];
    check_type(t, op, "teacher");
    check_device(t, teacher[0], op, "teacher");
    STD_TORCH_CHECK(t.dim() >= 1 && t.is_contiguous(), op, ": teacher must be contiguous with a batch dimension");
    const void* s = nullptr;
    ScalarType student_type = t.scalar_type();
    if (student[index].has_value()) {
      check_type(*student[index], op, "student");
      student_type = student[index]->scalar_type();
      s = checked_data(student[index], student_type, t.numel(), t, op, "student");
      STD_TORCH_CHECK(student[index]->size(0) == t.size(0), op, ": student and teacher must have the same shape");
    }
    masks.push_back(empty_like_device(t, shape_of(t), accumulation_type(student_type, t.scalar_type())));
    if (t.numel() == 0) continue;
    levels.push_back({student_type, t.scalar_type(), t.size(0), t.numel() / t.size(0), s, t.const_data_ptr(),
                      masks.back().mutable_data_ptr(), temperature[index], joint[index]});
  }
  return levels;
}

}  // namespace fbkd
