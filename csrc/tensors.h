// Tensors at the boundary of the ops: checks, allocations and the choice of element types, for both devices.
#pragma once

#include "stable_abi.h"

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <type_traits>
#include <vector>

#include "layout.h"

// Headers of torch up to 2.11 have only the older name, whose exception leaves out the message of the call that failed.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace fbkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

inline ScalarType accumulation_type(ScalarType a, ScalarType b = ScalarType::Float) {
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What sums of elements of these types accumulate in.
template <typename... T>
using Accumulator = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>) for the device's element type of `type`. Device::Half and Device::BFloat16 are its 16-bit types.
template <class Device, typename F>
auto dispatch(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Double:
      return f(Type<double>());
    case ScalarType::Half:
      return f(Type<typename Device::Half>());
    case ScalarType::BFloat16:
      return f(Type<typename Device::BFloat16>());
    default:
      return f(Type<float>());  // check_type has refused everything else
  }
}

// Calls f(Type<double>) or f(Type<float>): what elements of this type accumulate in.
template <typename F>
auto with_accumulator(ScalarType type, F&& f) {
  return type == ScalarType::Double ? f(Type<double>()) : f(Type<float>());
}

inline int64_t element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

inline void check_type(const Tensor& tensor, const char* op, const char* name) {
  STD_TORCH_CHECK(is_floating(tensor.scalar_type()), op, ": ", name, " must be float16, bfloat16, float32 or float64");
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the device of the others");
}

// A feature map (N, C, H, W) as matrices.
inline MatrixView checked_view(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " must have 4 dimensions (N, C, H, W), got ", x.dim());
  check_type(x, op, name);
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, op, ": ", name,
                  " must have at least one channel and one pixel");
  const MatrixView view = matrix_view(x.sizes().data(), x.strides().data());
  STD_TORCH_CHECK(view.valid, op, ": ", name,
                  " must be contiguous, channels_last or a batch or channel slice of one of them; call ", name,
                  ".contiguous() first");
  return view;
}

// Data of a contiguous tensor of a given type and size.
inline const void* checked_data(const Tensor& tensor, ScalarType type, int64_t numel, const Tensor& like,
                                const char* op, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type, op, ": ", name, " must be ",
      type == ScalarType::Double ? "float64 where the features are" : "float32 unless the features are float64");
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == numel, op, ": ", name, " must be contiguous with ", numel,
                  " elements, got ", tensor.numel());
  check_device(tensor, like, op, name);
  return tensor.const_data_ptr();
}

// The same; nullptr where the tensor is absent.
inline const void* checked_data(const std::optional<Tensor>& tensor, ScalarType type, int64_t numel, const Tensor& like,
                                const char* op, const char* name) {
  return tensor.has_value() ? checked_data(*tensor, type, numel, like, op, name) : nullptr;
}

// Student and teacher of a level agree in N, H and W, and in C where they have the same width.
inline void check_pair(const Tensor& student, const Tensor& teacher, bool same_width, const char* op) {
  bool same = true;
  for (int64_t dim = 0; dim < 4; ++dim)
    same = same && ((dim == 1 && !same_width) || student.size(dim) == teacher.size(dim));
  STD_TORCH_CHECK(same, op, ": student and teacher must agree in ", same_width ? "N, C, H and W" : "N, H and W");
}

// The type of a tensor with one sum per level.
inline ScalarType total_type(const Tensors& student, const Tensors& teacher) {
  ScalarType type = ScalarType::Float;
  for (size_t index = 0; index < student.size(); ++index)
    type = accumulation_type(type, accumulation_type(student[index].scalar_type(), teacher[index].scalar_type()));
  return type;
}

// The grad of each level's sum, checked.
inline const void* checked_grad(const Tensor& grad, const Tensors& student, const Tensors& teacher, const char* op) {
  const int64_t levels = static_cast<int64_t>(student.size());
  return checked_data(grad, total_type(student, teacher), levels, student[0], op, "grad");
}

template <typename T>
void check_length(const std::vector<T>& list, size_t expected, const char* op, const char* name) {
  STD_TORCH_CHECK(list.size() == expected, op, ": ", name, " must have ", expected, " entries, got ", list.size());
}

inline Tensor empty_like_device(const Tensor& like, std::vector<int64_t> size, ScalarType type,
                                bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(size, type, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline Tensor empty_gradient(const Tensor& x, const MatrixView& view) {
  return empty_like_device(x, shape_of(x), x.scalar_type(), view.channels_last);
}

// One sum per level, undefined.
inline Tensor empty_squares(const Tensors& student, const Tensors& teacher) {
  return empty_like_device(student[0], {static_cast<int64_t>(student.size())}, total_type(student, teacher));
}

// Data of a tensor of x's type that is packed as the gradient of x is.
inline void* checked_gradient(const Tensor& grad, const Tensor& x, const MatrixView& view, const char* op,
                              const char* name) {
  const auto size = x.sizes(), given_size = grad.sizes();
  bool fits = grad.scalar_type() == x.scalar_type() && given_size.size() == 4;
  for (size_t dim = 0; fits && dim < 4; ++dim) fits = given_size[dim] == size[dim];
  if (fits && x.numel() > 0) {
    const MatrixView given = oriented(matrix_view(size.data(), grad.strides().data()), view.rows_are_channels);
    const MatrixView dense = gradient_view(view);
    fits = (given.cols == 1 || given.col_stride == 1) && (given.rows == 1 || given.row_stride == dense.row_stride) &&
           (given.images == 1 || given.image_stride == dense.image_stride) && given.valid;
  }
  STD_TORCH_CHECK(fits, op, ": ", name, " must have the shape and the type of the map, and its gradient's layout");
  check_device(grad, x, op, name);
  return grad.mutable_data_ptr();
}

// Temporary device buffer. May be freed right after the launch: the caching allocator reuses memory in stream order.
template <typename A>
struct Scratch {
  Tensor storage;

  Scratch(const Tensor& like, int64_t count)
      : storage(empty_like_device(like, {count}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float)) {}
  A* data() const { return static_cast<A*>(storage.mutable_data_ptr()); }
};

// An element of a contiguous tensor on the CPU, of float or double.
inline double number_at(const Tensor& numbers, int64_t index) {
  if (numbers.scalar_type() == ScalarType::Double) return static_cast<const double*>(numbers.const_data_ptr())[index];
  return static_cast<const float*>(numbers.const_data_ptr())[index];
}

inline void put_number(const Tensor& numbers, int64_t index, double value) {
  if (numbers.scalar_type() == ScalarType::Double)
    static_cast<double*>(numbers.mutable_data_ptr())[index] = value;
  else
    static_cast<float*>(numbers.mutable_data_ptr())[index] = static_cast<float>(value);
}

}  // namespace fbkd
