"""Triton kernels of the masked squared difference after a 1x1 adaptation, and its gradients.

``D = weight @ S + bias - T`` and what follows from it exist a tile at a time in registers: the forward kernel's
epilogue turns a tile of products into one partial sum, and both backward kernels recompute the tiles that they need
(once for each block of student channels that a program's accumulator holds).

Products are added in float32. Operands keep their 16 bits where the student and the weight share a 16-bit dtype; else,
and wherever ``E = 2 * grad * Ms * Mc * D`` is an operand, they are float32, multiplied as TF32 where PyTorch may do so
and else as three TF32 products that together keep float32's precision. float64 has tensor cores of its own.
"""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import matrix_layout, matrix_view
from .._numerics import accumulation_dtype
from .products import (
    ALIGNED,
    STUDENT_PLANAR,
    TEACHER_PLANAR,
    across,
    add_product,
    add_up,
    dense_tile,
    error_product,
    fit_for_products,
    indices,
    precision,
    splits_of,
    sum_of_splits,
)
from .pyramid import (
    Level,
    add_partial_sums,
    aligned_to_16_bytes,
    find_level,
    find_tile,
    in_place_of_none,
    launch,
    load_mask,
    pick,
    pick_all,
    pick_sizes,
    scaled_gradient,
    store_rounded,
    tile_pointers,
    vector_length,
    whole_vectors,
)

__all__ = ["adapted_masked_l2_backward", "adapted_masked_l2_forward"]

# A level's sizes: Cs, Ct, pixels, the student's image stride and pitch, the teacher's, whether each mask is given; from
# index 9 on the kernel's own.


@triton.jit
def adapted_sums(
    student,  # a level: (N, Cs, H, W)
    weight,  # a level: (Ct, Cs)
    bias,  # a level: (Ct,)
    teacher,  # a level: (N, Ct, H, W)
    spatial_mask,  # a level: (N, H, W)
    channel_mask,  # a level: (N, Ct)
    partials,  # one a program
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    INNER: tl.constexpr,
):
    level, path, program = find_level(sizes)
    size = pick_sizes(sizes, level)
    inputs = pick_all((student, weight, bias, teacher, spatial_mask, channel_mask), level)
    first, pixel_tiles, channel_tiles = size[9:12]
    image, pixel_tile, channel_tile = find_tile(program, pixel_tiles, channel_tiles)
    pixel, channel = indices(pixel_tile, PIXELS), indices(channel_tile, TEACHER)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            known = known_sizes(inputs, size, PATHS[index])
            difference = difference_tile(inputs, known, image, pixel, channel, True, PATHS[index], PRECISION, INNER)
            squares = difference * difference * mask_tile(inputs, known, image, pixel, channel, True)
            tl.store(partials + first + program, tl.sum(squares).to(partials.dtype.element_ty))


@triton.jit
def student_gradients(
    student,  # a level: (N, Cs, H, W)
    weight,  # a level: (Ct, Cs)
    bias,  # a level: (Ct,)
    teacher,  # a level: (N, Ct, H, W)
    spatial_mask,  # a level: (N, H, W)
    channel_mask,  # a level: (N, Ct)
    gradient,  # a level: (N, Cs, H, W), densely packed
    grad_student,  # a level: (N, Cs, H, W), densely packed
    spatial_abs,  # a level: (N, H, W)
    channel_abs,  # a level: (N, Cs)
    spatial_plain,  # a level: (N, H, W)
    channel_plain,  # a level: (N, Cs)
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    INNER: tl.constexpr,
):
    level, path, program = find_level(sizes)
    size = pick_sizes(sizes, level)
    inputs = pick_all((student, weight, bias, teacher, spatial_mask, channel_mask), level)
    pools = pick_all((spatial_abs, channel_abs, spatial_plain, channel_plain), level)
    pixel_tiles, student_tiles = size[10:12]
    image, pixel_tile, student_tile = find_tile(program, pixel_tiles, student_tiles)
    pixel, column = indices(pixel_tile, PIXELS), indices(student_tile, STUDENT)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            known = known_sizes(inputs, size, PATHS[index])
            total = weighted_errors(
                inputs, grad, known, image, pixel, column, PIXELS, TEACHER, STUDENT, INNER, PATHS[index], PRECISION
            )
            total += pooled_gradients(inputs, pools, known, image, pixel, column, PATHS[index])
            at, inside = student_tile_of(pick(grad_student, level), known, image, pixel, column, PATHS[index])
            total += tl.load(at, mask=inside & (size[16] != 0), other=0.0).to(total.dtype)
            at, inside = student_tile_of(pick(gradient, level), known, image, pixel, column, PATHS[index])
            store_rounded(at, total, inside)


@triton.jit
def weight_gradients(
    student,  # a level: (N, Cs, H, W)
    weight,  # a level: (Ct, Cs)
    bias,  # a level: (Ct,)
    teacher,  # a level: (N, Ct, H, W)
    spatial_mask,  # a level: (N, H, W)
    channel_mask,  # a level: (N, Ct)
    partials,  # a level, in whole tiles: (splits, Ct, Cs) for the weight, then (splits, Ct) for the bias
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    INNER: tl.constexpr,
):
    level, path, program = find_level(sizes)
    size = pick_sizes(sizes, level)
    inputs = pick_all((student, weight, bias, teacher, spatial_mask, channel_mask), level)
    teacher_tiles, student_tiles, splits = size[10:13]
    split, teacher_tile, student_tile = find_tile(program, teacher_tiles, student_tiles)
    channel, column = indices(teacher_tile, TEACHER), indices(student_tile, STUDENT)
    to = pick(partials, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            known = known_sizes(inputs, size, PATHS[index])
            weight_sum, bias_sum = errors_by_student(
                inputs, grad, known, split, channel, column, PIXELS, TEACHER, STUDENT, INNER, PATHS[index], PRECISION
            )
            pitch = student_tiles * STUDENT
            stride = teacher_tiles * TEACHER * pitch
            at = tile_pointers(to, split, stride, pitch, channel[:, None], column[None, :], True, False)
            tl.store(at, weight_sum)
            at = to + splits * stride + split * teacher_tiles * TEACHER + channel
            tl.store(at, bias_sum, mask=(channel >= 0) & (student_tile == 0))


@triton.jit
def known_sizes(inputs, size, PATH: tl.constexpr):
    """The sizes, with those extents known to be whole vectors along which 16 bytes are read at a time.

    Extents, unlike offsets, fit 32 bits, which halves the registers of a tile's indices.
    """
    student, weight, _, teacher, _, _ = inputs
    VECTOR: tl.constexpr = vector_length(student.dtype.element_ty, weight.dtype.element_ty, teacher.dtype.element_ty)
    student_channels = whole_vectors(size[0].to(tl.int32), ALIGNED & PATH, VECTOR)
    BY_CHANNEL: tl.constexpr = (ALIGNED & PATH) and not (TEACHER_PLANAR & PATH)
    BY_PIXEL: tl.constexpr = (ALIGNED & PATH) and ((STUDENT_PLANAR | TEACHER_PLANAR) & PATH)
    teacher_channels = whole_vectors(size[1].to(tl.int32), BY_CHANNEL, VECTOR)
    pixels = whole_vectors(size[2].to(tl.int32), BY_PIXEL, VECTOR)
    return [student_channels, teacher_channels, pixels] + size[3:]


@triton.jit
def weighted_errors(
    inputs,
    grad,
    size,
    image,
    pixel,
    column,
    PIXELS: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    INNER: tl.constexpr,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile ``(pixels, student channels)`` of ``weight^T E``."""
    student_channels, teacher_channels = size[:2]
    weight = inputs[1]
    dtype: tl.constexpr = inputs[4].dtype.element_ty
    total = tl.zeros((PIXELS, STUDENT), dtype)
    for first in range(0, teacher_channels, TEACHER):
        channel = first + tl.arange(0, TEACHER)
        error = error_tile(inputs, grad, size, image, pixel, channel, True, PATH, PRECISION, INNER)
        at = tile_pointers(weight, 0, 0, student_channels, channel[:, None], column[None, :], ALIGNED & PATH, False)
        inside = (channel < teacher_channels)[:, None] & (column < student_channels)[None, :]
        total = error_product(error, tl.load(at, mask=inside, other=0.0), total, PRECISION)
    return total


@triton.jit
def errors_by_student(
    inputs,
    grad,
    size,
    split,
    channel,
    column,
    PIXELS: tl.constexpr,
    TEACHER: tl.constexpr,
    STUDENT: tl.constexpr,
    INNER: tl.constexpr,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A split's part of ``E S^T (teacher channels, student channels)`` and of the sum of E over the pixels."""
    student_channels, _, pixels, image_stride, pitch = size[:5]
    tiles_of_image, tiles, tiles_of_split = size[13:16]
    student = inputs[0]
    dtype: tl.constexpr = inputs[4].dtype.element_ty
    total = tl.zeros((TEACHER, STUDENT), dtype)
    errors = tl.zeros((TEACHER,), dtype)
    for tile in range(split * tiles_of_split, tl.minimum((split + 1) * tiles_of_split, tiles)):
        image = tile // tiles_of_image
        pixel = indices(tile % tiles_of_image, PIXELS)
        error = error_tile(inputs, grad, size, image, pixel, channel, False, PATH, PRECISION, INNER)
        errors += tl.sum(error, axis=1)
        at = tile_pointers(
            student, image, image_stride, pitch, pixel[:, None], column[None, :], ALIGNED & PATH, STUDENT_PLANAR & PATH
        )
        inside = (pixel < pixels)[:, None] & (column < student_channels)[None, :]
        total = error_product(error, tl.load(at, mask=inside, other=0.0), total, PRECISION)
    return total, errors


@triton.jit
def error_tile(
    inputs,
    grad,
    size,
    image,
    pixel,
    channel,
    PIXELS_FIRST: tl.constexpr,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of ``E = 2 * grad * Ms * Mc * D``."""
    difference = difference_tile(inputs, size, image, pixel, channel, PIXELS_FIRST, PATH, PRECISION, INNER)
    scale = 2 * tl.load(grad + size[9]).to(difference.dtype)
    return scale * mask_tile(inputs, size, image, pixel, channel, PIXELS_FIRST) * difference


@triton.jit
def difference_tile(
    inputs,
    size,
    image,
    pixel,
    channel,
    PIXELS_FIRST: tl.constexpr,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of ``D``, ``(pixels, teacher channels)`` or the other way round; zeros outside."""
    _, teacher_channels, pixels, _, _, image_stride, pitch = size[:7]
    bias, teacher = inputs[2], inputs[3]
    adapted = product_tile(inputs, size, image, pixel, channel, PIXELS_FIRST, PATH, PRECISION, INNER)
    row, col = across(pixel, PIXELS_FIRST), across(channel, not PIXELS_FIRST)
    at = tile_pointers(teacher, image, image_stride, pitch, row, col, ALIGNED & PATH, TEACHER_PLANAR & PATH)
    inside = (row < pixels) & (col < teacher_channels)
    value = tl.load(at, mask=inside, other=0.0).to(adapted.dtype)
    shift = tl.load(bias + col, mask=col < teacher_channels, other=0.0).to(adapted.dtype)
    return tl.where(inside, adapted + shift - value, 0.0)


@triton.jit
def product_tile(
    inputs,
    size,
    image,
    pixel,
    channel,
    PIXELS_FIRST: tl.constexpr,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """A tile of ``weight @ S``, ``(pixels, teacher channels)`` or the other way round."""
    student_channels, teacher_channels, pixels, image_stride, pitch = size[:5]
    student, weight = inputs[0], inputs[1]
    dtype: tl.constexpr = inputs[4].dtype.element_ty
    NARROW: tl.constexpr = student.dtype == weight.dtype and student.dtype.element_ty.primitive_bitwidth == 16
    operand: tl.constexpr = student.dtype.element_ty if NARROW and dtype == tl.float32 else dtype
    ROWS: tl.constexpr = pixel.shape[0] if PIXELS_FIRST else channel.shape[0]
    COLS: tl.constexpr = channel.shape[0] if PIXELS_FIRST else pixel.shape[0]
    return add_product(
        tl.zeros((ROWS, COLS), dtype),
        (student, image_stride, pitch),
        (weight, 0, student_channels),
        image,
        pixel,
        channel,
        (pixels, teacher_channels, student_channels),
        PIXELS_FIRST,
        STUDENT_PLANAR & PATH,
        False,
        ALIGNED & PATH,
        operand,
        PRECISION,
        INNER,
    )


@triton.jit
def mask_tile(inputs, size, image, pixel, channel, PIXELS_FIRST: tl.constexpr):
    """A tile of the product of the masks."""
    _, teacher_channels, pixels = size[:3]
    spatial_given, channel_given = size[7:9]
    row, col = across(pixel, PIXELS_FIRST), across(channel, not PIXELS_FIRST)
    spatial = load_mask(inputs[4], image * pixels + row, row < pixels, spatial_given)
    return spatial * load_mask(inputs[5], image * teacher_channels + col, col < teacher_channels, channel_given)


@triton.jit
def pooled_gradients(inputs, pools, size, image, pixel, column, PATH: tl.constexpr):
    """What the gradients of the student's four means add to a tile ``(pixels, student channels)``."""
    channels, _, pixels, image_stride, pitch = size[:5]
    spatial_abs_given, channel_abs_given, spatial_plain_given, channel_plain_given = size[12:16]
    spatial_abs, channel_abs, spatial_plain, channel_plain = pools
    row, col = pixel[:, None], column[None, :]
    spatial_at, channel_at = image * pixels + row, image * channels + col
    by_pixel = scaled_gradient(spatial_plain, spatial_at, row < pixels, spatial_plain_given, channels)
    total = by_pixel + scaled_gradient(channel_plain, channel_at, col < channels, channel_plain_given, pixels)
    if spatial_abs_given + channel_abs_given > 0:
        at = tile_pointers(inputs[0], image, image_stride, pitch, row, col, ALIGNED & PATH, STUDENT_PLANAR & PATH)
        value = tl.load(at, mask=(row < pixels) & (col < channels), other=0.0)
        sign = (value > 0).to(total.dtype) - (value < 0).to(total.dtype)
        by_pixel = scaled_gradient(spatial_abs, spatial_at, row < pixels, spatial_abs_given, channels)
        by_channel = scaled_gradient(channel_abs, channel_at, col < channels, channel_abs_given, pixels)
        total += sign * (by_pixel + by_channel)
    return total


@triton.jit
def student_tile_of(x, size, image, pixel, column, PATH: tl.constexpr):
    """Where a tile of a tensor lies that is densely packed in the student's layout."""
    return dense_tile(x, image, pixel, column, size[2], size[0], ALIGNED & PATH, STUDENT_PLANAR & PATH)


class _Blocks(NamedTuple):
    """Extents of a program's tiles, and its warps."""

    PIXELS: int
    TEACHER: int  # channels
    STUDENT: int  # channels of the gradient kernels' accumulator
    INNER: int  # student channels of one step of weight @ S
    num_warps: int


# By the bytes of an operand of weight @ S and by whether everything is read 16 bytes at a time, which takes fewer
# registers. The largest tiles without spills on sm_80, sm_90 and sm_100, as compiled; registers are the limit, shared
# memory stays below half of sm_80's. The warps of a gradient kernel lie along the rows of its accumulator, 16 rows
# each, so that the errors are operands where they were computed.
_SUMS = {
    (2, True): _Blocks(128, 128, 16, 64, 8),
    (2, False): _Blocks(64, 64, 16, 32, 4),
    (4, True): _Blocks(64, 64, 16, 32, 4),
    (4, False): _Blocks(64, 64, 16, 16, 4),
    (8, True): _Blocks(32, 64, 16, 16, 4),
    (8, False): _Blocks(32, 64, 16, 16, 4),
}
_STUDENT = {
    (2, True): _Blocks(128, 16, 128, 32, 8),
    (2, False): _Blocks(64, 32, 64, 32, 4),
    (4, True): _Blocks(64, 32, 64, 32, 4),
    (4, False): _Blocks(64, 32, 32, 16, 4),
    (8, True): _Blocks(64, 16, 32, 16, 4),
    (8, False): _Blocks(64, 16, 32, 16, 4),
}
_WEIGHT = {
    (2, True): _Blocks(32, 64, 128, 32, 4),
    (2, False): _Blocks(32, 32, 32, 32, 4),
    (4, True): _Blocks(32, 64, 64, 16, 4),
    (4, False): _Blocks(32, 32, 32, 16, 4),
    (8, True): _Blocks(16, 64, 32, 16, 4),
    (8, False): _Blocks(16, 32, 32, 16, 4),
}


class _Pair(NamedTuple):
    student: Tensor  # (N, Cs, H, W)
    weight: Tensor  # (Ct, Cs)
    bias: Tensor  # (Ct,)
    teacher: Tensor  # (N, Ct, H, W)
    spatial_mask: Optional[Tensor]  # (N, H, W)
    channel_mask: Optional[Tensor]  # (N, Ct)

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.student, self.teacher)

    @property
    def kind(self) -> tuple[int, bool]:
        """Bytes of an operand of weight @ S, and whether everything is read 16 bytes at a time."""
        narrow = self.student.dtype == self.weight.dtype and self.dtype == torch.float32
        return self.student.element_size() if narrow else self.dtype.itemsize, self.path % 2 == 1

    @property
    def path(self) -> int:
        view, teacher_view = matrix_view(self.student), matrix_view(self.teacher)
        student_channels, teacher_channels, pixels = self.extents
        extents = [student_channels]
        extents += [pixels] if view.rows_are_channels or teacher_view.rows_are_channels else []
        extents += [] if teacher_view.rows_are_channels else [teacher_channels]
        aligned = (
            aligned_to_16_bytes(self.student, view.image_stride, view.row_stride, *extents)
            and aligned_to_16_bytes(self.teacher, teacher_view.image_stride, teacher_view.row_stride, *extents)
            and aligned_to_16_bytes(self.weight, *extents)
        )
        return 4 * view.rows_are_channels + 2 * teacher_view.rows_are_channels + aligned

    @property
    def images(self) -> int:
        return self.student.shape[0]

    @property
    def extents(self) -> tuple[int, int, int]:
        """Student channels, teacher channels, pixels."""
        return self.weight.shape[1], self.weight.shape[0], self.student.shape[2] * self.student.shape[3]

    def tiles(self, blocks: _Blocks) -> tuple[int, int, int]:
        return tuple(triton.cdiv(n, block or 1) for n, block in zip(self.extents, (blocks[2], blocks[1], blocks[0])))


def _pairs(students, weights, biases, teachers, spatial_masks, channel_masks) -> list[_Pair]:
    pairs = []
    for student, weight, bias, teacher, *masks in zip(
        students, weights, biases, teachers, spatial_masks, channel_masks
    ):
        tensors, dtype = (
            (student, weight.contiguous(), bias.contiguous(), teacher),
            accumulation_dtype(student, teacher),
        )
        pairs.append(_Pair(*(fit_for_products(x, dtype) for x in tensors), *masks))
    return pairs


def _level(pair: _Pair, programs: int, pointers: tuple[Tensor, ...], sizes: tuple[int, ...]) -> Level:
    """A level with the pointers and the sizes that all kernels take, and the given ones of one kernel."""
    view, teacher_view = matrix_view(pair.student), matrix_view(pair.teacher)
    masks = pair.spatial_mask, pair.channel_mask
    strides = view.image_stride, view.row_stride, teacher_view.image_stride, teacher_view.row_stride
    sizes = *pair.extents, *strides, *(mask is not None for mask in masks), *sizes
    pointers = *pair[:4], *in_place_of_none(masks, pair.student, pair.dtype), *pointers
    return Level(programs, pointers, sizes, pair.path)


def _launch(kernel, pairs: list[_Pair], levels: list[Level], blocks: dict, *shared: Tensor) -> None:
    for kind, block in blocks.items():
        chosen = [level for level, pair in zip(levels, pairs) if pair.kind == kind]
        launch(kernel, chosen, *shared, by_path=True, PRECISION=precision(), **block._asdict())


def adapted_masked_l2_forward(
    students: list[Tensor],  # (N, Cs, H, W)
    weights: list[Tensor],  # (Ct, Cs)
    biases: list[Tensor],  # (Ct,)
    teachers: list[Tensor],  # (N, Ct, H, W)
    spatial_masks: list[Optional[Tensor]],  # (N, H, W)
    channel_masks: list[Optional[Tensor]],  # (N, Ct)
) -> Tensor:
    """``sum(Ms * Mc * (weight @ S + bias - T)**2)`` of each level, ``(levels,)``."""
    pairs = _pairs(students, weights, biases, teachers, spatial_masks, channel_masks)
    levels, first = [], 0
    for pair in pairs:
        _, teacher_tiles, pixel_tiles = pair.tiles(_SUMS[pair.kind])
        programs = pair.images * pixel_tiles * teacher_tiles
        levels.append(_level(pair, programs, (), (first, pixel_tiles, teacher_tiles)))
        first += programs
    partials = students[0].new_empty(first, dtype=accumulation_dtype(*students, *teachers))
    _launch(adapted_sums, pairs, levels, _SUMS, partials)
    return add_partial_sums(partials, [level.programs for level in levels])


def adapted_masked_l2_backward(
    students: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    teachers: list[Tensor],
    spatial_masks: list[Optional[Tensor]],
    channel_masks: list[Optional[Tensor]],
    grad: Tensor,  # (levels,)
    pool_grads: list[Optional[Tensor]],  # of the student's four means, 4 a level
    grad_students: list[Optional[Tensor]],  # like the students, densely packed
) -> list[Tensor]:
    """All gradients of the students, then of the weights, then of the biases."""
    pairs = _pairs(students, weights, biases, teachers, spatial_masks, channel_masks)
    extra = [(pool_grads[4 * at : 4 * at + 4], grad_students[at]) for at in range(len(pairs))]
    layouts = [matrix_layout(student) for student in students]
    dS = [torch.empty_like(pair.student, memory_format=layout) for pair, layout in zip(pairs, layouts)]
    levels = [_student_level(pair, dS[slot], *extra[slot], slot) for slot, pair in enumerate(pairs)]
    _launch(student_gradients, pairs, levels, _STUDENT, grad)
    gradients = zip([*dS, *_parameter_gradients(pairs, grad)], [*students, *weights, *biases])
    return [gradient.to(like.dtype) for gradient, like in gradients]


def _student_level(
    pair: _Pair, dS: Tensor, pool_grads: list[Optional[Tensor]], grad_student: Optional[Tensor], slot: int
) -> Level:
    student_tiles, _, pixel_tiles = pair.tiles(_STUDENT[pair.kind])
    pools = in_place_of_none(pool_grads, pair.student, pair.dtype)
    if grad_student is not None:
        grad_student = fit_for_products(grad_student, pair.dtype)
        if not aligned_to_16_bytes(grad_student):
            grad_student = grad_student.clone()  # the kernel reads it as it writes dS
    given = (gradient is not None for gradient in (*pool_grads, grad_student))
    sizes = slot, pixel_tiles, student_tiles, *given
    pointers = dS, dS if grad_student is None else grad_student, *pools
    return _level(pair, pair.images * pixel_tiles * student_tiles, pointers, sizes)


def _parameter_gradients(pairs: list[_Pair], grad: Tensor) -> list[Tensor]:
    """Gradients of all weights, then of all biases."""
    weights, biases = [torch.empty_like(pair.weight) for pair in pairs], [torch.empty_like(pair.bias) for pair in pairs]
    levels, parameters = [], []
    for slot, (pair, weight, bias) in enumerate(zip(pairs, weights, biases)):
        blocks = _WEIGHT[pair.kind]
        student_tiles, teacher_tiles, tiles_of_image = pair.tiles(blocks)
        splits, tiles_of_split = splits_of(pair.images * tiles_of_image, student_tiles * teacher_tiles, blocks.PIXELS)
        rows, pitch = teacher_tiles * blocks.TEACHER, student_tiles * blocks.STUDENT
        partials = pair.student.new_empty(splits * rows * (pitch + 1), dtype=pair.dtype)
        tiles = tiles_of_image, pair.images * tiles_of_image, tiles_of_split
        sizes = slot, teacher_tiles, student_tiles, splits, *tiles
        levels.append(_level(pair, splits * teacher_tiles * student_tiles, (partials,), sizes))
        parameters.append(sum_of_splits(weight, partials, 0, splits, rows * pitch, pitch))
        parameters.append(sum_of_splits(bias[None], partials, splits * rows * pitch, splits, rows, rows))
    _launch(weight_gradients, pairs, levels, _WEIGHT, grad)
    add_up(parameters)
    return [*weights, *biases]
