"""Mutations of the Triton kernels, which run in Triton's interpreter where there is no GPU."""

from .mutation import Selection, faults

POOL = Selection(
    ("test_attention_pool.py",), "interpreter and (sizes_in_both or triton_tiles or each_output or together)"
)
MASKS = Selection(("test_attention_masks.py",), "interpreter and (lengths or temperatures or together)")
DISTANCE = Selection(("test_masked_l2.py",), "interpreter and (tiles_in or mixtures or together or test_layouts)")
CHANNELS = "test_channel_ops.py"
CORRELATION = Selection(
    (CHANNELS, "test_channel_correlation.py", "test_feature_norm.py"),
    "channel_correlation and interpreter and (tiles_in or mixtures or together or constant or zero)"
    " or test_moments and interpreter",
)
DIVERGENCE = Selection(
    (CHANNELS, "test_channel_divergence.py"),
    "channel_divergence and interpreter and (tiles_in or mixtures or together or temperatures or infinity)",
)
ADAPTED = Selection(
    ("test_adapted_masked_l2.py",), "interpreter and (gradcheck or tiles or kept or beyond or together)"
)
SPATIAL = Selection(("test_spatial_l2.py",), "interpreter and (test_shapes or gradcheck or together)")
STATISTICS = Selection(
    ("test_non_local_statistics.py",),
    "interpreter and (tiles_in or tiles_of or winners or gradcheck or finite or differences)",
)
RESIDUAL = Selection(("test_relation_residual.py",), "interpreter and (test_tiles or gradcheck or together)")

MUTATIONS = [
    *faults(
        "triton.pool",
        "src/fbkd_ops/kernels/attention_pool.py",
        POOL,
        plain_row_sum=("* rows + row, tl.sum(value, axis=1)", "* rows + row, tl.sum(magnitude, axis=1)"),
        sign_of_zero=("sign = (value > 0)", "sign = (value >= 0)"),
        plain_sums_of_images=("add_tiles(at + images * tiles * length,", "add_tiles(at + tiles * length,"),
    ),
    *faults(
        "triton.masks",
        "src/fbkd_ops/kernels/attention_masks.py",
        MASKS,
        temperature_between_tiles=("tl.exp((tile_peak - peak) / temperature)", "tl.exp(tile_peak - peak)"),
        half_of_an_average=("share /= 2", "share /= 1"),
        sign_of_the_student=("value += tl.load(student + at", "value -= tl.load(student + at"),
    ),
    *faults(
        "triton.distance",
        "src/fbkd_ops/kernels/masked_l2.py",
        DISTANCE,
        sum_of_the_masks=(
            "return Tile(difference, by_row[:, None] * by_col[None, :],",
            "return Tile(difference, by_row[:, None] + by_col[None, :],",
        ),
        gradient_of_the_first_level=("tl.load(grad + size.slot)", "tl.load(grad)"),
    ),
    *faults(
        "triton.distance",
        "src/fbkd_ops/kernels/pairs.py",
        DISTANCE,
        transposed_teacher=("ALIGN, IS_TRANSPOSED\n    )", "ALIGN, False\n    )"),
    ),
    *faults(
        "triton.correlation",
        "src/fbkd_ops/kernels/channel_correlation.py",
        CORRELATION,
        degrees_of_freedom=("degrees = tl.maximum(count - 1, 1)", "degrees = count"),
        part_of_the_first_image=("pair.image * size.col_tiles + pair.col_tile", "pair.col_tile"),
        gradient_of_the_first_level=("tl.load(grad + size.slot)", "tl.load(grad)"),
        squares_of_the_student=("5 * size.channels, tt", "5 * size.channels, ss"),
        constant_channel=("tl.where(deviation == 0, 1.0, deviation)", "deviation"),
    ),
    *faults(
        "triton.divergence",
        "src/fbkd_ops/kernels/channel_divergence.py",
        DIVERGENCE,
        divergence_between_tiles=(" + of_teacher * (y - x)", ""),
        maximum_of_the_student=("t_max = largest_of_tiles(at + count,", "t_max = largest_of_tiles(at,"),
        part_of_the_first_image=("pair.image * size.col_tiles + pair.col_tile", "pair.col_tile"),
        images_of_the_mean=("(size.images * channels)", "channels"),
        gradient_of_the_first_level=("tl.load(grad + size.slot)", "tl.load(grad)"),
        maximum_of_minus_infinity=(
            "s_max = tl.maximum(tl.max(tl.where(inside, student, LOWEST), axis=AXIS), LOWEST)",
            "s_max = tl.max(tl.where(inside, student, LOWEST), axis=AXIS)",
        ),
    ),
    *faults(
        "triton.spatial",
        "src/fbkd_ops/kernels/spatial_l2.py",
        SPATIAL,
        mirrored_weight=("w[8 - k] * residual", "w[k] * residual"),
        row_of_a_neighbour=("(radius + down + k // 3 - 1)", "(radius + down + k % 3 - 1)"),
    ),
    *faults(
        "triton.pyramid",
        "src/fbkd_ops/kernels/pyramid.py",
        POOL,
        first_program_of_a_level=("program >= decoded(firsts[index])", "program > decoded(firsts[index])"),
    ),
    *faults(
        "triton.pyramid",
        "src/fbkd_ops/kernels/pyramid.py",
        DISTANCE,
        last_partials=("mask=at < count, other=0.0).to(tl.float64)", "mask=at < count - 1, other=0.0).to(tl.float64)"),
    ),
    *faults(
        "triton.products",
        "src/fbkd_ops/kernels/products.py",
        ADAPTED,
        last_split=("errors += tl.sum(wide, axis=1)", "errors = tl.sum(wide, axis=1)"),
        scale_of_the_weights=("wide *= (weights.scale * factor)[None, :]", "wide *= factor[None, :]"),
    ),
    *faults(
        "triton.adapted",
        "src/fbkd_ops/kernels/adapted_masked_l2.py",
        ADAPTED,
        sign_of_the_bias=("value += tl.load(bias + channel", "value -= tl.load(bias + channel"),
        channel_mask_of_the_first_image=("at = image * size.teacher_channels + row", "at = row"),
    ),
    *faults(
        "triton.residual",
        "src/fbkd_ops/kernels/relation_residual.py",
        RESIDUAL,
        sign_of_the_student_gradient=(
            "store_rounded(at, -2 * tl.load(grad + size.slot)",
            "store_rounded(at, 2 * tl.load(grad + size.slot)",
        ),
        offset_of_the_first_image=("tl.load(offset + image * teacher_channels + col", "tl.load(offset + col"),
    ),
    *faults(
        "triton.statistics",
        "src/fbkd_ops/kernels/non_local_statistics.py",
        STATISTICS,
        rank_of_cells_that_are_not_square=(
            "outer * first_height + row % first_height) * first_width + column % first_width",
            "outer * first_width + row % first_height) * first_width + column % first_width",
        ),
        diagonal=(
            "value = add_tiles(at, splits, pitch * pitch, col <= row, TILES, OUTPUTS)",
            "value = add_tiles(at, splits, pitch * pitch, col < row, TILES, OUTPUTS)",
        ),
        rest_of_a_wide_cell=("range(ROWS, cell_width, ROWS)", "range(ROWS, ROWS, ROWS)"),
        last_nan=("tl.max(tl.where(is_nan, order, -1), axis=1)", "tl.max(tl.where(is_nan, 0, -1), axis=1)"),
        scale_of_centred_maps=("return 0.5 if dtype", "return 1.0 if dtype"),
        next_cell_of_a_row=("in_map & (column < cell_width)", "in_map"),
        row_of_a_step=("tile * (PIXELS // WIDTH), rest // parts,", "tile * (PIXELS // WIDTH), rest % parts,"),
    ),
]
