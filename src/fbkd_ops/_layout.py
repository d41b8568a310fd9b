"""Layouts that the kernels read in place: each image as a matrix with unit column stride."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._numerics import residual_dtype

__all__ = ["MatrixView", "empty_gradient", "empty_residual", "in_place_layout", "matrix_layout", "matrix_view"]


class MatrixView(NamedTuple):
    """Images of ``x (N, C, H, W)`` as matrices; the same rule as ``matrix_view`` in csrc/layout.h."""

    rows_are_channels: bool  # rows = C, cols = HW; else rows = HW, cols = C
    images: int
    rows: int
    cols: int
    image_stride: int
    row_stride: int


def _pitches(x: Tensor) -> tuple[int, int, bool]:
    """Distance of channels, distance of pixels, and whether all pixels have the same distance."""
    _, channels, height, width = x.shape
    stride = x.stride()
    channel_pitch = stride[1] if channels > 1 else height * width
    pixel_pitch = stride[3] if width > 1 else stride[2] if height > 1 else channels
    evenly_spaced = height <= 1 or width <= 1 or stride[2] == width * pixel_pitch
    return channel_pitch, pixel_pitch, evenly_spaced


def _readable(x: Tensor) -> tuple[bool, bool]:
    """Whether ``x`` can be read with channels as rows, and with pixels as rows."""
    channel_pitch, pixel_pitch, evenly_spaced = _pitches(x)
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    by_channel = evenly_spaced and (pixels <= 1 or pixel_pitch == 1) and channel_pitch >= pixels
    by_pixel = evenly_spaced and (channels <= 1 or x.stride(1) == 1) and pixel_pitch >= channels
    return by_channel, by_pixel


def matrix_layout(x: Tensor) -> torch.memory_format | None:
    """Layout in which the kernels read ``x (N, C, H, W)`` in place, and which its gradient gets.

    ``torch.contiguous_format``: the pixels of a channel lie side by side. ``torch.channels_last``: the
    channels of a pixel do. Batch and channel slices keep either. None: ``x`` has to be copied first.
    """
    by_channel, by_pixel = _readable(x)
    if by_channel:
        return torch.contiguous_format
    if by_pixel:
        return torch.channels_last
    return torch.contiguous_format if x.numel() == 0 else None


def in_place_layout(x: Tensor) -> Tensor:
    """``x`` itself if it can be read in place, else a contiguous copy."""
    return x.contiguous() if matrix_layout(x) is None else x


def empty_gradient(x: Tensor) -> Tensor:
    """Memory for the gradient of an ``x`` that is read in place: densely packed in its layout."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=matrix_layout(x))


def empty_residual(student: Tensor, teacher: Tensor) -> Tensor:
    """Memory for a kept residual ``(N, Ct, H, W)``: densely packed in the teacher's layout."""
    dtype, layout = residual_dtype(student, teacher), matrix_layout(teacher)
    return torch.empty(teacher.shape, dtype=dtype, device=teacher.device, memory_format=layout)


def matrix_view(x: Tensor) -> MatrixView:
    """Return the matrices of an ``x`` whose :func:`matrix_layout` is not None."""
    images, channels, height, width = x.shape
    pixels = height * width
    channel_pitch, pixel_pitch, _ = _pitches(x)
    by_channel, by_pixel = _readable(x)
    if not by_pixel or (by_channel and pixels > 1):
        return MatrixView(True, images, channels, pixels, x.stride(0), channel_pitch)
    return MatrixView(False, images, pixels, channels, x.stride(0), pixel_pitch)
