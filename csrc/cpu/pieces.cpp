#include "pieces.h"

namespace fbkd {
namespace {

template <typename T, typename A>
FBKD_CLONES void convert_from(const T* __restrict__ x, int64_t stride, int64_t count, A* __restrict__ result) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) result[i] = static_cast<A>(load(x[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) result[i] = static_cast<A>(load(x[i * stride]));
  }
}

// 16-bit types are rounded from float.
template <typename T, typename A>
FBKD_CLONES void convert_to(const A* __restrict__ x, int64_t count, T* __restrict__ result) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(result[i], static_cast<Wide>(x[i]));
}

template <typename A>
const A* load_as(ScalarType type, const void* data, int64_t first, int64_t stride, int64_t count, A* buffer) {
  return dispatch<Cpu>(type, [&](auto tag) -> const A* {
    using T = typename decltype(tag)::type;
    const T* x = static_cast<const T*>(data) + first;
    if constexpr (std::is_same_v<T, A>)
      if (stride == 1) return x;
    convert_from(x, stride, count, buffer);
    return buffer;
  });
}

template <typename A>
void store_as(ScalarType type, void* data, int64_t first, int64_t count, const A* piece) {
  dispatch<Cpu>(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* result = static_cast<T*>(data) + first;
    if (static_cast<const void*>(result) != piece) convert_to(piece, count, result);
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
