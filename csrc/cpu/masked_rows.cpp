#include "masked_rows.h"

#include "../masked_l2.h"

namespace fbkd {

#define FBKD_MASKED_ROWS(A)                                                                                          \
  FBKD_CLONES A masked_squares(const A* __restrict__ s, const A* __restrict__ t, const A* __restrict__ weight,       \
                               int64_t count) {                                                                      \
    A sum = 0;                                                                                                       \
    if (weight == nullptr) {                                                                                         \
      _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < count; ++i) sum +=                              \
          weighted_difference<A>(s[i], t[i], A(1)) * (s[i] - t[i]);                                                  \
    } else {                                                                                                         \
      _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < count; ++i) sum +=                              \
          weighted_difference<A>(s[i], t[i], weight[i]) * (s[i] - t[i]);                                             \
    }                                                                                                                \
    return sum;                                                                                                      \
  }                                                                                                                  \
  FBKD_CLONES void masked_gradient(const A* __restrict__ s, const A* __restrict__ t, A scale,                        \
                                   const A* __restrict__ weight, int64_t count, A* __restrict__ out) {               \
    if (weight == nullptr) {                                                                                         \
      _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) out[i] = weighted_difference<A>(s[i], t[i], scale);    \
    } else {                                                                                                         \
      _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) out[i] =                                               \
          weighted_difference<A>(s[i], t[i], scale * weight[i]);                                                     \
    }                                                                                                                \
  }

FBKD_MASKED_ROWS(float)
FBKD_MASKED_ROWS(double)
#undef FBKD_MASKED_ROWS

}  // namespace fbkd
