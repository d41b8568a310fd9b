// Vectors in cache: sums, and elementwise operations that write or change one. Sums are in A: keep them short or A
// wide.
#pragma once

#include "simd.h"

namespace fbkd {
namespace {

template <typename A>
FBKD_CLONES A sum_of(const A* x, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

template <typename A>
FBKD_CLONES A dot(const A* __restrict__ x, const A* __restrict__ y, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

// result = x + number
template <typename A>
FBKD_CLONES void write_sum(A* __restrict__ result, const A* __restrict__ x, A number, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) result[i] = x[i] + number;
}

// result = x + y
template <typename A>
FBKD_CLONES void write_sum(A* __restrict__ result, const A* __restrict__ x, const A* __restrict__ y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) result[i] = x[i] + y[i];
}

// result = x - y
template <typename A>
FBKD_CLONES void write_difference(A* __restrict__ result, const A* __restrict__ x, const A* __restrict__ y,
                                  int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) result[i] = x[i] - y[i];
}

// sum += number
template <typename A>
FBKD_CLONES void add_number(A* sum, A number, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += number;
}

// sum += x
template <typename A>
FBKD_CLONES void add_vector(A* __restrict__ sum, const A* __restrict__ x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += x[i];
}

// sum += factor * x
template <typename A>
FBKD_CLONES void add_multiple(A* __restrict__ sum, A factor, const A* __restrict__ x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += factor * x[i];
}

// x *= factor
template <typename A>
FBKD_CLONES void multiply_by(A* x, A factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

}  // namespace
}  // namespace fbkd
