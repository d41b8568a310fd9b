// The masked distance of a piece of a row, and numbers of a small tensor.
#pragma once

#include "pieces.h"

namespace fbkd {

// Sum of weight * (s - t)^2; weights nullptr: ones.
float masked_squares(const float* s, const float* t, const float* weight, int64_t count);
double masked_squares(const double* s, const double* t, const double* weight, int64_t count);

// scale * weight * (s - t)
void masked_gradient(const float* s, const float* t, float scale, const float* weight, int64_t count, float* out);
void masked_gradient(const double* s, const double* t, double scale, const double* weight, int64_t count, double* out);

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
