// The adapted masked distance's levels as the kernels take them: checks, allocations, pointers.
#pragma once

#include "attention_pool_levels.h"
#include "masked_l2_levels.h"

namespace fbkd {

struct AdaptedLevel {
  ScalarType student_type, teacher_type, weight_type, bias_type;
  MatrixView student;  // (Cs, HW) or (HW, Cs)
  MatrixView teacher;  // (Ct, HW) or (HW, Ct), rows and columns as the student's; col_stride is 1 in equal layouts
  const void* s;
  const void* t;
  const void* weight;        // (Ct, Cs)
  const void* bias;          // (Ct)
  const void* spatial_mask;  // (images, HW), in the accumulation type; nullptr: ones
  const void* channel_mask;  // (images, Ct)
  ScalarType accumulation() const { return accumulation_type(student_type, teacher_type); }
  int64_t student_channels() const { return student.channels(); }
  int64_t teacher_channels() const { return teacher.channels(); }
  int64_t pixels() const { return student.pixels(); }
};

// A student's gradient and what flows into it besides the distance.
struct StudentGradient {
  ByDirection<const void*> pool;  // gradients of the four means, nullptr where absent
  const void* incoming;           // gradient_view(student), of the student's type, nullptr where absent
  void* ds;                       // gradient_view(student)
};

struct AdaptedGradients {
  StudentGradient student;
  void* dweight;  // (Ct, Cs)
  void* dbias;    // (Ct)
};

// The arguments that every variant of the op has.
struct AdaptedArguments {
  const Tensors& student;
  const Tensors& weight;
  const Tensors& bias;
  const Tensors& teacher;
  const OptionalTensors& spatial_mask;
  const OptionalTensors& channel_mask;
};

inline AdaptedLevel adapted_level(const AdaptedArguments& arguments, size_t index, const char* op) {
  const Tensor &s = arguments.student[index], &t = arguments.teacher[index], &weight = arguments.weight[index],
               &bias = arguments.bias[index];
  const MatrixView view = checked_view(s, op, "student");
  const MatrixView teacher = oriented(checked_view(t, op, "teacher"), view.rows_are_channels);
  check_pair(s, t, false, op);
  check_device(s, arguments.student[0], op, "student");
  check_device(t, s, op, "teacher");
  const ScalarType type = accumulation_type(s.scalar_type(), t.scalar_type());
  const int64_t images = s.size(0), width = t.size(1), pixels = s.size(2) * s.size(3);
  for (const Tensor* parameter : {&weight, &bias}) check_type(*parameter, op, "weight and bias");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == width && weight.size(1) == s.size(1), op,
                  ": weight must have shape (", width, ", ", s.size(1), ")");
  return {s.scalar_type(),
          t.scalar_type(),
          weight.scalar_type(),
          bias.scalar_type(),
          view,
          teacher,
          s.const_data_ptr(),
          t.const_data_ptr(),
          checked_data(weight, weight.scalar_type(), width * s.size(1), s, op, "weight"),
          checked_data(bias, bias.scalar_type(), width, s, op, "bias"),
          checked_data(arguments.spatial_mask[index], type, images * pixels, s, op, "spatial_mask"),
          checked_data(arguments.channel_mask[index], type, images * width, s, op, "channel_mask")};
}

// Every level, those without elements too: their parameters' gradients are zeros.
inline std::vector<AdaptedLevel> adapted_levels(const AdaptedArguments& arguments, const char* op) {
  const size_t count = arguments.student.size();
  STD_TORCH_CHECK(count > 0, op, ": student must have at least one level");
  check_length(arguments.weight, count, op, "weight");
  check_length(arguments.bias, count, op, "bias");
  check_length(arguments.teacher, count, op, "teacher");
  check_length(arguments.spatial_mask, count, op, "spatial_mask");
  check_length(arguments.channel_mask, count, op, "channel_mask");
  std::vector<AdaptedLevel> levels;
  for (size_t index = 0; index < count; ++index) levels.push_back(adapted_level(arguments, index, op));
  return levels;
}

inline StudentGradient student_gradient(const Tensor& s, const MatrixView& view, ScalarType accumulation,
                                        const OptionalTensors& pool_grads, const OptionalTensors& grad_student,
                                        size_t index, const Tensor& ds, const char* op) {
  const auto& incoming = grad_student[index];
  return {pool_gradients(pool_grads, 4 * index, s, view, accumulation, op),
          incoming.has_value() ? checked_gradient(*incoming, s, view, op, "grad_student") : nullptr,
          checked_gradient(ds, s, view, op, "gradient")};
}

}  // namespace fbkd
