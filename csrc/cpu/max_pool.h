// Max-pooling of the rows of a map, with the winners' positions.
#pragma once

#include <cmath>

#include "../layout.h"
#include "simd.h"

namespace fbkd {
namespace {

// One more row of a row of cells: in every column the largest value so far, and its row; a NaN wins.
template <typename A>
FBKD_CLONES void fold_row(const A* __restrict__ y, A bias, int32_t row, int64_t count, A* __restrict__ best,
                          int32_t* __restrict__ best_row) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A value = y[i] + bias;
    const bool wins = row == 0 || value > best[i] || value != value;
    best[i] = wins ? value : best[i];
    best_row[i] = wins ? row : best_row[i];
  }
}

}  // namespace

// The cells of a max-pool, whose candidates are visited in the nested order of two pools: cells of fy x fx pixels
// first.
struct Pool {
  int64_t ky, kx, fy, fx;

  bool fits(int64_t height, int64_t width) const {
    return 1 <= ky && ky <= height && 1 <= kx && kx <= width && fy >= 1 && fx >= 1 && ky % fy == 0 && kx % fx == 0;
  }

  int64_t rank(int64_t dy, int64_t dx) const {
    return (dy / fy * (kx / fx) + dx / fx) * fy * fx + dy % fy * fx + dx % fx;
  }

  // The column of a cell that has its largest value, from the best of each column and their rows: NaN of the highest
  // rank, else the greatest value of the lowest rank.
  template <typename A>
  int64_t winner(const A* best, const int32_t* best_row) const {
    int64_t chosen = 0;
    for (int64_t col = 1; col < kx; ++col) {
      if (best[col] < best[chosen]) continue;
      const bool nan = std::isnan(best[col]), chosen_nan = std::isnan(best[chosen]);
      const bool later = rank(best_row[col], col) > rank(best_row[chosen], chosen);
      const bool wins = nan ? !chosen_nan || later : !chosen_nan && (best[col] > best[chosen] || !later);
      if (wins) chosen = col;
    }
    return chosen;
  }
};

}  // namespace fbkd
