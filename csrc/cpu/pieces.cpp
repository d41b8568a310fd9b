#include "pieces.h"

namespace fbkd {
namespace {

#define FBKD_CONVERT(T, A)                                                                                \
  FBKD_CLONES void convert_in(const T* __restrict__ from, int64_t stride, int64_t count, A* __restrict__ to) { \
    if (stride == 1) {                                                                                    \
      _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(load(from[i]));      \
    } else {                                                                                              \
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<A>(load(from[i * stride]));                 \
    }                                                                                                     \
  }

#define FBKD_CONVERT_BACK(T, A)                                                                           \
  FBKD_CLONES void convert_out(const A* __restrict__ from, int64_t count, T* __restrict__ to) {           \
    _Pragma("omp simd") for (int64_t i = 0; i < count; ++i) store(to[i], narrowed<T>(from[i]));           \
  }

// What `store` takes: 16-bit types are rounded from float.
template <typename T, typename A>
FBKD_INLINE auto narrowed(A value) {
  if constexpr (std::is_same_v<T, double>)
    return static_cast<double>(value);
  else
    return static_cast<float>(value);
}

FBKD_CONVERT(float, float)
FBKD_CONVERT(double, float)
FBKD_CONVERT(Half, float)
FBKD_CONVERT(BFloat16, float)
FBKD_CONVERT(float, double)
FBKD_CONVERT(double, double)
FBKD_CONVERT(Half, double)
FBKD_CONVERT(BFloat16, double)
FBKD_CONVERT_BACK(float, float)
FBKD_CONVERT_BACK(double, float)
FBKD_CONVERT_BACK(Half, float)
FBKD_CONVERT_BACK(BFloat16, float)
FBKD_CONVERT_BACK(float, double)
FBKD_CONVERT_BACK(double, double)
FBKD_CONVERT_BACK(Half, double)
FBKD_CONVERT_BACK(BFloat16, double)
#undef FBKD_CONVERT
#undef FBKD_CONVERT_BACK

template <typename A>
const A* load_as(ScalarType type, const void* data, int64_t first, int64_t stride, int64_t count, A* buffer) {
  return dispatch<Cpu>(type, [&](auto tag) -> const A* {
    using T = typename decltype(tag)::type;
    const T* from = static_cast<const T*>(data) + first;
    if constexpr (std::is_same_v<T, A>)
      if (stride == 1) return from;
    convert_in(from, stride, count, buffer);
    return buffer;
  });
}

template <typename A>
void store_as(ScalarType type, void* data, int64_t first, int64_t count, const A* piece) {
  dispatch<Cpu>(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* to = static_cast<T*>(data) + first;
    if (static_cast<const void*>(to) != piece) convert_out(piece, count, to);
  });
}

}  // namespace

const float* load_piece(ScalarType type, const void* data, int64_t first, int64_t stride, int64_t count,
                        float* buffer) {
  return load_as(type, data, first, stride, count, buffer);
}
const double* load_piece(ScalarType type, const void* data, int64_t first, int64_t stride, int64_t count,
                         double* buffer) {
  return load_as(type, data, first, stride, count, buffer);
}
void store_piece(ScalarType type, void* data, int64_t first, int64_t count, const float* piece) {
  store_as(type, data, first, count, piece);
}
void store_piece(ScalarType type, void* data, int64_t first, int64_t count, const double* piece) {
  store_as(type, data, first, count, piece);
}

}  // namespace fbkd
