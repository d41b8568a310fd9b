// Tiles of two maps of the same shape on the CPU, which both are read in pieces.
#pragma once

#include "../pair_level.h"
#include "pieces.h"
#include "tiles.h"

namespace fbkd {

// Elements of a tile: whole rows, as many as are worth a thread's turn.
constexpr int64_t kPairTile = int64_t(1) << 16;
// Where channels are columns a tile writes a few numbers per channel, which is little beside the 64 or more rows that
// it reads. Up to 256 rows keep chains of additions short and, with 256 channels, both maps in the second cache.
constexpr int64_t kMinPixelRows = 64, kMaxPixelRows = 256;
constexpr int64_t kFinishChannels = 64;  // of a tile of the second stage

// Tiles for kernels that reduce each channel.
inline Tiling channel_tiling(const MatrixView& view) {
  const int64_t rows = ceil_div(kPairTile, view.cols);
  const int64_t pixel_rows = min64(kMaxPixelRows, max64(kMinPixelRows, rows));
  return tiling_of(view, view.rows_are_channels ? rows : pixel_rows, view.cols);
}

// First stage of a level's loss.
struct LevelLoss : StagedTiles {
  virtual double total() const = 0;  // after the second stage
};

// Tiles of a level, a PairLevel or what has one as its base.
template <typename A, class Level, class Base>
struct PairTiles : Base {
  PairTiles(const Level& level, const Tiling& tiling) : level(level), tiling(tiling) {}

  int64_t count() const override { return tiles_of(level.student, tiling); }
  int64_t elements() const override { return level.student.numel(); }

  // The tile's image, rows and columns.
  struct Block {
    int64_t image, first_row, last_row, first_col, last_col;
  };
  Block block_of(int64_t tile) const {
    const int64_t row = tile / tiling.col_tiles % tiling.row_tiles * tiling.row_tile;
    const int64_t col = tile % tiling.col_tiles * tiling.col_tile;
    return {tile / (tiling.row_tiles * tiling.col_tiles), row, min64(row + tiling.row_tile, level.student.rows), col,
            min64(col + tiling.col_tile, level.student.cols)};
  }

  // visit(image, row, col, s, t, cols) for every piece of a tile's rows.
  template <typename Visit>
  void pieces(int64_t tile, Visit&& visit) const {
    pieces(block_of(tile), visit);
  }
  template <typename Visit>
  void pieces(const Block& block, Visit&& visit) const {
    A s_buffer[kPiece], t_buffer[kPiece];
    const MatrixView &s_view = level.student, &t_view = level.teacher;
    const int64_t image = block.image;
    for (int64_t row = block.first_row; row < block.last_row; ++row) {
      for (int64_t col = block.first_col; col < block.last_col; col += kPiece) {
        const int64_t cols = min64(kPiece, block.last_col - col);
        const int64_t s_first = image * s_view.image_stride + row * s_view.row_stride + col;
        const int64_t t_first = image * t_view.image_stride + row * t_view.row_stride + col * t_view.col_stride;
        const A* s = load_piece(level.student_type, level.s, s_first, 1, cols, s_buffer);
        const A* t = load_piece(level.teacher_type, level.t, t_first, t_view.col_stride, cols, t_buffer);
        visit(image, row, col, s, t, cols);
      }
    }
  }

  Level level;
  Tiling tiling;
};

}  // namespace fbkd
