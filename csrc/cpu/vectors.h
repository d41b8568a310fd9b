// Vectors in cache: their sums, and sums and multiples in place. Sums are in A, so keep them short or A wide.
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

template <typename A>
FBKD_CLONES void add_number(A* x, A number, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] += number;
}

template <typename A>
FBKD_CLONES void add_multiple(A* __restrict__ sum, A factor, const A* __restrict__ x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sum[i] += factor * x[i];
}

template <typename A>
FBKD_CLONES void multiply_by(A* x, A factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
}

}  // namespace
}  // namespace fbkd
