// Feature maps cut into blocks of pixels that stay in cache, as operands of the vendor's matrix product.
#pragma once

#include <vector>

#include "buffer.h"
#include "matmul.h"
#include "pieces.h"
#include "tiles.h"

namespace fbkd {

// Pixels of a block: the widest of its maps is about 1 MB at most. Two blocks at least, for two threads; more of them,
// and smaller, do not pay: with 4, 8 and 12 a level of 256 channels at 25x42 took 1.1, 1.4 and 1.8 times as long.
constexpr int64_t kBlockElements = int64_t(1) << 18;
constexpr int64_t kMinBlock = 64, kMaxBlock = 4096;
constexpr int64_t kMinBlocks = 2;
// A level's blocks are dealt to groups, each with partial sums of its own: of 8 MB together.
constexpr int64_t kGroupBytes = int64_t(1) << 23;
constexpr int64_t kMaxGroups = 32;
// With fewer groups than these the product's own threads do better.
constexpr int64_t kMinGroups = 4;

// In each of `images` with `pixels`: all blocks are of this size but the last, which is hardly smaller.
inline int64_t block_pixels_of(int64_t channels, int64_t images, int64_t pixels) {
  const int64_t most = min64(kMaxBlock, max64(kMinBlock, kBlockElements / channels));
  const int64_t wanted = min64(ceil_div(kMinBlocks, max64(1, images)), pixels / kMinBlock);
  return max64(1, ceil_div(pixels, max64(wanted, ceil_div(pixels, most))));
}

// The most groups of partial sums of so many bytes each.
inline int64_t groups_of(int64_t bytes) { return max64(1, min64(kMaxGroups, kGroupBytes / max64(1, bytes))); }

// Neighbouring pixels of an image.
struct Block {
  int64_t image, first, size;  // pixels first .. first + size
};

// A block's rows in the memory of a view of `channels` channels.
struct BlockRows {
  int64_t count, first_row, first_col, cols;

  int64_t offset(const MatrixView& view, int64_t image, int64_t row = 0) const {
    return image * view.image_stride + (first_row + row) * view.row_stride + first_col * view.col_stride;
  }
};

inline BlockRows rows_of(const Block& block, bool rows_are_channels, int64_t channels) {
  if (rows_are_channels) return {channels, 0, block.first, block.size};
  return {block.size, block.first, 0, channels};
}

inline BlockRows rows_of(const Block& block, const MatrixView& view) {
  return rows_of(block, view.rows_are_channels, view.channels());
}

// A compact matrix (channels, pixels) with the rows of a view side by side.
template <typename A>
Matrix<A> block_matrix(A* data, bool rows_are_channels, int64_t channels, int64_t pixels) {
  if (rows_are_channels) return {data, channels, pixels, pixels, 1};
  return {data, channels, pixels, 1, channels};
}

// A block of a map whose elements are of type A, where it lies.
template <typename A>
Matrix<A> block_in_place(void* data, const MatrixView& view, const Block& block) {
  A* first = static_cast<A*>(data) + rows_of(block, view).offset(view, block.image);
  if (view.rows_are_channels) return {first, view.channels(), block.size, view.row_stride, view.col_stride};
  return {first, view.channels(), block.size, view.col_stride, view.row_stride};
}

template <typename A>
A* reserve(Buffer<A>& space, int64_t count) {
  if (static_cast<int64_t>(space.size()) < count) space.resize(static_cast<size_t>(count));
  return space.data();
}

// A block (channels, pixels) of a map of any type: where it lies, or a copy in `space`.
template <typename A>
Matrix<A> read_block(ScalarType type, const void* data, const MatrixView& view, const Block& block, Buffer<A>& space) {
  if (is_accumulator<A>(type)) return block_in_place<A>(const_cast<void*>(data), view, block);
  const BlockRows rows = rows_of(block, view);
  A* copy = reserve(space, rows.count * rows.cols);
  for (int64_t row = 0; row < rows.count; ++row)
    load_piece(type, data, rows.offset(view, block.image, row), view.col_stride, rows.cols, copy + row * rows.cols);
  return block_matrix(copy, view.rows_are_channels, view.channels(), block.size);
}

// A row-major matrix that is only read.
template <typename A>
Matrix<A> row_major(const A* data, int64_t rows, int64_t cols) {
  return {const_cast<A*>(data), rows, cols, cols, 1};
}

// A level whose tiles are groups of blocks, each with partial sums of its own.
struct ProductTiles : StagedTiles {
  virtual int64_t partial_bytes() const = 0;
};

struct SumOfSquares : ProductTiles {
  virtual double total() const = 0;
};

// Adds the sums over a piece of the pixels to those over all of them, unless nullptr, and begins anew.
template <typename A>
void flush(A* sums, int64_t count, double* totals) {
  for (int64_t i = 0; totals != nullptr && i < count; ++i) totals[i] += sums[i];
  std::fill(sums, sums + count, A(0));
}

// All levels in one parallel region, except those that have too few groups for it: these run on the product's threads.
template <class Level>
void run_products(const std::vector<std::unique_ptr<Level>>& levels) {
  std::vector<Tiles*> together;
  for (const auto& level : levels) {
    if (groups_of(level->partial_bytes()) >= kMinGroups)
      together.push_back(level.get());
    else
      for (int64_t tile = 0; tile < level->count(); ++tile) level->run(tile);
  }
  run_tiles(together, 2);
}

}  // namespace fbkd
