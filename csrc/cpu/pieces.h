// Pieces of rows of any element type as float or double, in cache.
#pragma once

#include "../tensors.h"
#include "simd.h"

namespace fbkd {

// Columns that are handled at a time: small beside the first cache, and few enough additions for one float sum.
constexpr int64_t kPiece = 1024;
// Rows that a column's sum takes one at a time in the accumulation type: longer sums are made of pieces.
constexpr int64_t kRowsOfPiece = 128;

// `count` elements, `stride` apart, from element `first` on. The address itself where nothing has to be changed.
const float* load_piece(ScalarType type, const void* data, int64_t first, int64_t stride, int64_t count, float* buffer);
const double* load_piece(ScalarType type, const void* data, int64_t first, int64_t stride, int64_t count,
                         double* buffer);

template <typename A>
bool is_accumulator(ScalarType type) {
  return type == (std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
}

// Where elements from element `first` on may be written as A: in place or in the buffer, for store_piece.
template <typename A>
A* piece_to_fill(ScalarType type, void* data, int64_t first, A* buffer) {
  return is_accumulator<A>(type) ? static_cast<A*>(data) + first : buffer;
}

void store_piece(ScalarType type, void* data, int64_t first, int64_t count, const float* piece);
void store_piece(ScalarType type, void* data, int64_t first, int64_t count, const double* piece);

}  // namespace fbkd
