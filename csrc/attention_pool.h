// Arithmetic and directions of the attention pool that the CPU and the CUDA kernels share. No torch headers.
#pragma once

#include "layout.h"

namespace fbkd {

// d|x|/dx as torch.abs defines it: 0 at 0, at -0 and at NaN.
template <typename A>
FBKD_HOST_DEVICE A sign(A x) {
  return x > A(0) ? A(1) : x < A(0) ? A(-1) : A(0);
}

template <typename A>
FBKD_HOST_DEVICE A input_gradient(A x, A grad_abs, A grad_plain) {
  return sign(x) * grad_abs + grad_plain;
}

// The spatial and channel tensors of a level by the matrix's directions: row abs, row plain, column abs, column plain.
template <typename Pointer>
struct ByDirection {
  Pointer row_abs, row_plain;  // (images, rows)
  Pointer col_abs, col_plain;  // (images, cols)
};

template <typename Pointer>
ByDirection<Pointer> by_direction(const MatrixView& view, Pointer spatial_abs, Pointer channel_abs,
                                  Pointer spatial_plain, Pointer channel_plain) {
  if (view.rows_are_channels) return {channel_abs, channel_plain, spatial_abs, spatial_plain};
  return {spatial_abs, spatial_plain, channel_abs, channel_plain};
}

}  // namespace fbkd
