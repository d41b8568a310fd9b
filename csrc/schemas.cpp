// Schemas of every op. The kernels register themselves beside their code.
#include "stable_abi.h"

#include <torch/csrc/stable/library.h>

// Every op takes a whole pyramid: lists of one entry a level (grads: four a level, in the order of the means).
STABLE_TORCH_LIBRARY(fbkd_ops, m) {
  m.def("attention_pool_forward(Tensor[] x) -> Tensor[]");
  m.def("attention_pool_backward(Tensor[] x, Tensor?[] grads) -> Tensor[]");
  m.def("attention_masks(Tensor?[] student, Tensor[] teacher, float[] temperature, bool[] joint) -> Tensor[]");
  // Sums (levels, 1): squares; with gradient (levels, 11): also their derivatives by the nine weights and the bias for
  // a grad of 1, followed by that of each level's student.
  m.def("spatial_l2(Tensor[] student, Tensor[] weight, Tensor[] bias, Tensor[] teacher, bool gradient) -> Tensor[]");
  m.def(
      "masked_l2_forward(Tensor[] student, Tensor[] teacher, Tensor?[] spatial_mask, Tensor?[] channel_mask) -> "
      "Tensor");
  m.def(
      "masked_l2_backward(Tensor[] student, Tensor[] teacher, Tensor?[] spatial_mask, Tensor?[] channel_mask, "
      "Tensor grad) -> Tensor[]");
  m.def(
      "adapted_masked_l2_forward(Tensor[] student, Tensor[] weight, Tensor[] bias, Tensor[] teacher, "
      "Tensor?[] spatial_mask, Tensor?[] channel_mask, bool keep) -> Tensor[]");
  m.def(
      "adapted_masked_l2_backward(Tensor[] student, Tensor[] weight, Tensor[] bias, Tensor[] teacher, "
      "Tensor?[] spatial_mask, Tensor?[] channel_mask, Tensor[] residual, Tensor grad, Tensor?[] pool_grads, "
      "Tensor?[] grad_student) -> Tensor[]");
  // `..._with_gradient` also returns the gradients for grad = 1; `..._finish_` turns these into the real ones.
  m.def(
      "adapted_masked_l2_with_gradient(Tensor[] student, Tensor[] weight, Tensor[] bias, Tensor[] teacher, "
      "Tensor?[] spatial_mask, Tensor?[] channel_mask) -> Tensor[]");
  m.def(
      "adapted_masked_l2_finish_(Tensor(a!)[] gradient, Tensor[] student, Tensor grad, Tensor?[] pool_grads, "
      "Tensor?[] grad_student) -> ()");
  m.def(
      "non_local_statistics_forward(Tensor[] x, Tensor?[] mean, Tensor?[] projection, Tensor?[] weight, "
      "Tensor?[] bias, int[] pool) -> Tensor[]");
  m.def(
      "non_local_statistics_backward_(Tensor(a!)[] gradient, Tensor(b!)[] grad_weight, Tensor[] x, "
      "Tensor?[] mean, Tensor?[] projection, Tensor?[] inner, Tensor?[] shift, Tensor?[] weight, Tensor[] winners, "
      "Tensor?[] grad_pooled, int[] pool) -> ()");
  m.def(
      "relation_residual_forward(Tensor[] student, Tensor[] student_matrix, Tensor[] teacher, "
      "Tensor[] teacher_matrix, Tensor?[] teacher_projection, Tensor[] offset, bool keep) -> Tensor[]");
  m.def(
      "relation_residual_backward(Tensor[] student, Tensor[] student_matrix, Tensor[] teacher, "
      "Tensor[] teacher_matrix, Tensor?[] teacher_projection, Tensor[] offset, Tensor[] residual, Tensor grad, "
      "bool student_gradient) -> Tensor[]");
  // `..._with_gradient` also returns the gradients for grad = 1.
  m.def(
      "relation_residual_with_gradient(Tensor[] student, Tensor[] student_matrix, Tensor[] teacher, "
      "Tensor[] teacher_matrix, Tensor?[] teacher_projection, Tensor[] offset, bool student_gradient) -> Tensor[]");
  m.def(
      "cell_relation_forward(Tensor[] student, Tensor[] teacher, Tensor?[] parameters, int[] pools, float[] eps) -> "
      "Tensor[]");
  m.def(
      "cell_relation_backward(Tensor[] student, Tensor[] teacher, Tensor?[] parameters, int[] pools, float[] eps, "
      "Tensor grad, bool student_gradient) -> Tensor[]");
  m.def(
      "cell_relation_with_gradient(Tensor[] student, Tensor[] teacher, Tensor?[] parameters, int[] pools, float[] eps, "
      "bool student_gradient) -> Tensor[]");
}
