// What the launchers decide on the host: tilings, sizes of moves, batches of levels. No torch headers: the tests run
// the same decisions without a GPU.
//
// A Queue is what launchers work with: scratch<A>(count) gives device memory for as long as the launches need it, and
// launch(kernel, blocks, parameters) queues a kernel with blocks of kThreads threads. launch.h has that of a stream.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "device.cuh"

namespace fbkd::cuda {

// Tiles grow as long as there are this many of them: two for each of the blocks that a large GPU runs at once. Those of
// the smaller levels fill what is left at the end.
constexpr int64_t kEnoughTiles = 1024;
constexpr int kMinLaneBits = 3;
constexpr int kMaxLaneBits = 5;

// A matrix's tiles: as many of a warp's lanes side by side as reach the last column, and then steps of all the threads'
// ROWS rows below one another.
template <int VEC, int ROWS>
TileShape tile_shape(const MatrixView& view, int most_steps) {
  int lane_bits = kMinLaneBits;
  while (lane_bits < kMaxLaneBits && int64_t(VEC) << lane_bits < view.cols) ++lane_bits;
  const int64_t col_tile = int64_t(VEC) << lane_bits;
  int64_t row_tile = int64_t(ROWS) * (kThreads >> lane_bits);
  for (int steps = 2; steps <= most_steps; steps *= 2)
    if (tiles_of(view, tiling_of(view, 2 * row_tile, col_tile)) >= kEnoughTiles) row_tile *= 2;
  return {tiling_of(view, row_tile, col_tile), lane_bits};
}

// Whether every row starts on a multiple of `bytes`.
inline bool rows_aligned(const void* data, const MatrixView& view, int64_t element_size, int64_t bytes) {
  const auto aligned = [&](int64_t elements) { return elements * element_size % bytes == 0; };
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && (view.rows == 1 || aligned(view.row_stride)) &&
         (view.images == 1 || aligned(view.image_stride));
}

// Whether rows of T's can be read and written `move` elements (or 16 bytes) at a time.
template <typename T>
bool movable(const void* data, const MatrixView& view, int move) {
  return view.cols % move == 0 && rows_aligned(data, view, sizeof(T), min64(16, move * sizeof(T)));
}

// Elements of T in one load or store: 16 bytes, 4 bytes where 16-bit rows are aligned to no more, or one element.
template <typename T, typename Movable>
int elements_per_move(Movable&& movable_by) {
  if (movable_by(kVec<T>)) return kVec<T>;
  return movable_by(kWord<T>) ? kWord<T> : 1;
}

// Whether load_numbers may read VEC numbers of a (images, cols) tensor as packs.
inline bool numbers_aligned(const void* data, int64_t cols, int vec) {
  return cols % vec == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <typename Level, int COUNT = kMaxLevels>
Batch<Level, COUNT> empty_batch() {
  static_assert(sizeof(Batch<Level, COUNT>) <= 4096, "a launch takes 4 KB of parameters");
  Batch<Level, COUNT> batch{};
  for (int64_t& first : batch.first_tile) first = std::numeric_limits<int64_t>::max();
  return batch;
}

template <typename Level, int COUNT>
void add_level(Batch<Level, COUNT>& batch, const Level& level, int64_t tiles) {
  int slot = 0;
  while (batch.first_tile[slot] != std::numeric_limits<int64_t>::max()) ++slot;
  batch.level[slot] = level;
  batch.first_tile[slot] = batch.tiles;
  batch.tiles += tiles;
}

// Calls f(first, last) for each group of levels that one launch takes.
template <typename Level, typename F>
void in_batches(const std::vector<Level>& levels, F&& f) {
  const Level* end = levels.data() + levels.size();
  for (const Level* first = levels.data(); first < end; first += kMaxLevels)
    f(first, end - first < kMaxLevels ? end : first + kMaxLevels);
}

}  // namespace fbkd::cuda
