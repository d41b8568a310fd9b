// Layout and tiling of feature maps that the CPU and the CUDA kernels share. No torch headers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FBKD_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FBKD_HOST_DEVICE inline __attribute__((always_inline))  // into the clones of simd.h
#else
#define FBKD_HOST_DEVICE inline
#endif

namespace fbkd {

FBKD_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FBKD_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
FBKD_HOST_DEVICE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FBKD_HOST_DEVICE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// A batch of feature maps (N, C, H, W) as `images` matrices.
//   rows are channels: rows = C,  cols = HW  (contiguous and channel slices of it)
//   rows are pixels:   rows = HW, cols = C   (channels_last and channel slices of it)
struct MatrixView {
  int64_t images;
  int64_t rows;
  int64_t cols;
  int64_t image_stride;
  int64_t row_stride;
  int64_t col_stride;  // 1, except in a view that `oriented` has transposed
  bool rows_are_channels;
  bool channels_last;  // the layout that a gradient of this input gets
  bool valid;          // false: neither view exists, the caller has to make a copy

  FBKD_HOST_DEVICE int64_t numel() const { return images * rows * cols; }
  FBKD_HOST_DEVICE int64_t channels() const { return rows_are_channels ? rows : cols; }
  FBKD_HOST_DEVICE int64_t pixels() const { return rows_are_channels ? cols : rows; }
};

// The same rule as src/fbkd_ops/_layout.py. Strides of size-1 dimensions mean nothing.
inline MatrixView matrix_view(const int64_t* size,      // (4) N, C, H, W
                              const int64_t* stride) {  // (4)
  const int64_t channels = size[1], height = size[2], width = size[3];
  const int64_t pixels = height * width;
  const int64_t channel_pitch = channels > 1 ? stride[1] : pixels;
  const int64_t pixel_pitch = width > 1 ? stride[3] : height > 1 ? stride[2] : channels;
  const bool pixels_evenly_spaced = height <= 1 || width <= 1 || stride[2] == width * pixel_pitch;
  const bool by_channel = pixels_evenly_spaced && (pixels <= 1 || pixel_pitch == 1) && channel_pitch >= pixels;
  const bool by_pixel = pixels_evenly_spaced && (channels <= 1 || stride[1] == 1) && pixel_pitch >= channels;

  MatrixView view{};
  view.images = size[0];
  view.image_stride = size[0] > 1 ? stride[0] : 0;
  view.col_stride = 1;
  view.valid = by_channel || by_pixel || size[0] * channels * pixels == 0;
  view.channels_last = by_pixel && !by_channel;
  // One pixel: a row of C columns instead of C rows of one column.
  view.rows_are_channels = !by_pixel || (by_channel && pixels > 1);
  view.rows = view.rows_are_channels ? channels : pixels;
  view.cols = view.rows_are_channels ? pixels : channels;
  view.row_stride = view.rows_are_channels ? channel_pitch : pixel_pitch;
  return view;
}

// The same memory with rows and columns as another view of that size has them.
inline MatrixView oriented(const MatrixView& view, bool rows_are_channels) {
  if (view.rows_are_channels == rows_are_channels) return view;
  MatrixView transposed = view;
  transposed.rows_are_channels = rows_are_channels;
  transposed.rows = view.cols, transposed.cols = view.rows;
  transposed.row_stride = view.col_stride, transposed.col_stride = view.row_stride;
  return transposed;
}

// The densely packed view that the gradient of an input with this view has.
inline MatrixView gradient_view(const MatrixView& view) {
  MatrixView dense = view;
  dense.row_stride = view.cols;
  dense.image_stride = view.rows * view.cols;
  return dense;
}

// One image's matrix cut into row_tiles x col_tiles equal pieces. Functions of the shape alone, so that the order of
// every sum is the same on any number of threads or multiprocessors, and beside any other levels.
struct Tiling {
  int64_t row_tile;
  int64_t col_tile;
  int64_t row_tiles;
  int64_t col_tiles;
};

FBKD_HOST_DEVICE Tiling tiling_of(const MatrixView& view, int64_t row_tile, int64_t col_tile) {
  return {row_tile, col_tile, ceil_div(view.rows, row_tile), ceil_div(view.cols, col_tile)};
}

FBKD_HOST_DEVICE int64_t tiles_of(const MatrixView& view, const Tiling& tiling) {
  return view.images * tiling.row_tiles * tiling.col_tiles;
}

}  // namespace fbkd
