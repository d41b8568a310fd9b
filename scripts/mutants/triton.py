"""Mutations of the Triton kernels, which run in Triton's interpreter where there is no GPU."""

from .mutation import Mutation, Selection

__all__ = ["MUTATIONS"]

POOL = Selection(
    ("test_attention_pool.py",), "interpreter and (sizes_in_both or triton_tiles or each_output or together)"
)
MASKS = Selection(("test_attention_masks.py",), "interpreter and (lengths or temperatures or together)")
DISTANCE = Selection(("test_masked_l2.py",), "interpreter and (tiles_in or mixtures or together or test_layouts)")
ADAPTED = Selection(
    ("test_adapted_masked_l2.py",), "interpreter and (gradcheck or tiles or kept or beyond or together)"
)
SPATIAL = Selection(("test_spatial_l2.py",), "interpreter and (test_shapes or gradcheck or together)")
STATISTICS = Selection(
    ("test_non_local_statistics.py",), "interpreter and (tiles_in or winners or gradcheck or finite)"
)
RESIDUAL = Selection(("test_relation_residual.py",), "interpreter and (test_tiles or gradcheck or together)")

KERNELS = "src/fbkd_ops/kernels"

MUTATIONS = [
    Mutation(
        "triton.pool.plain_row_sum",
        f"{KERNELS}/attention_pool.py",
        POOL,
        "* rows + row, tl.sum(value, axis=1)",
        "* rows + row, tl.sum(magnitude, axis=1)",
    ),
    Mutation(
        "triton.pool.sign_of_zero",
        f"{KERNELS}/attention_pool.py",
        POOL,
        "sign = (value > 0)",
        "sign = (value >= 0)",
    ),
    Mutation(
        "triton.pool.plain_sums_of_images",
        f"{KERNELS}/attention_pool.py",
        POOL,
        "add_tiles(at + images * tiles * length,",
        "add_tiles(at + tiles * length,",
    ),
    Mutation(
        "triton.masks.temperature_between_tiles",
        f"{KERNELS}/attention_masks.py",
        MASKS,
        "tl.exp((tile_peak - peak) / temperature)",
        "tl.exp(tile_peak - peak)",
    ),
    Mutation("triton.masks.half_of_an_average", f"{KERNELS}/attention_masks.py", MASKS, "share /= 2", "share /= 1"),
    Mutation(
        "triton.masks.sign_of_the_student",
        f"{KERNELS}/attention_masks.py",
        MASKS,
        "value += tl.load(student + at",
        "value -= tl.load(student + at",
    ),
    Mutation(
        "triton.distance.sum_of_the_masks",
        f"{KERNELS}/masked_l2.py",
        DISTANCE,
        "return Tile(difference, by_row[:, None] * by_col[None, :],",
        "return Tile(difference, by_row[:, None] + by_col[None, :],",
    ),
    Mutation(
        "triton.distance.gradient_of_the_first_level",
        f"{KERNELS}/masked_l2.py",
        DISTANCE,
        "tl.load(grad + size.slot)",
        "tl.load(grad)",
    ),
    Mutation(
        "triton.distance.transposed_teacher",
        f"{KERNELS}/masked_l2.py",
        DISTANCE,
        "IS_ALIGNED, IS_TRANSPOSED\n    )",
        "IS_ALIGNED, False\n    )",
    ),
    Mutation(
        "triton.spatial.mirrored_weight", f"{KERNELS}/spatial_l2.py", SPATIAL, "w[8 - k] * residual", "w[k] * residual"
    ),
    Mutation(
        "triton.spatial.row_of_a_neighbour",
        f"{KERNELS}/spatial_l2.py",
        SPATIAL,
        "(radius + down + k // 3 - 1)",
        "(radius + down + k % 3 - 1)",
    ),
    Mutation(
        "triton.pyramid.first_program_of_a_level",
        f"{KERNELS}/pyramid.py",
        POOL,
        "program >= decoded(firsts[index])",
        "program > decoded(firsts[index])",
    ),
    Mutation(
        "triton.pyramid.last_partials",
        f"{KERNELS}/pyramid.py",
        DISTANCE,
        "mask=at < count, other=0.0).to(tl.float64)",
        "mask=at < count - 1, other=0.0).to(tl.float64)",
    ),
    Mutation(
        "triton.products.last_split",
        f"{KERNELS}/products.py",
        ADAPTED,
        "errors += tl.sum(wide, axis=1)",
        "errors = tl.sum(wide, axis=1)",
    ),
    Mutation(
        "triton.products.scale_of_the_weights",
        f"{KERNELS}/products.py",
        ADAPTED,
        "wide *= (weights.scale * factor)[None, :]",
        "wide *= factor[None, :]",
    ),
    Mutation(
        "triton.adapted.sign_of_the_bias",
        f"{KERNELS}/adapted_masked_l2.py",
        ADAPTED,
        "value += tl.load(bias + channel",
        "value -= tl.load(bias + channel",
    ),
    Mutation(
        "triton.adapted.channel_mask_of_the_first_image",
        f"{KERNELS}/adapted_masked_l2.py",
        ADAPTED,
        "at = image * size.teacher_channels + row",
        "at = row",
    ),
    Mutation(
        "triton.residual.sign_of_the_student_gradient",
        f"{KERNELS}/relation_residual.py",
        RESIDUAL,
        "store_rounded(at, -2 * tl.load(grad + size.slot)",
        "store_rounded(at, 2 * tl.load(grad + size.slot)",
    ),
    Mutation(
        "triton.residual.offset_of_the_first_image",
        f"{KERNELS}/relation_residual.py",
        RESIDUAL,
        "tl.load(offset + image * teacher_channels + col",
        "tl.load(offset + col",
    ),
    Mutation(
        "triton.statistics.rank_of_cells_that_are_not_square",
        f"{KERNELS}/non_local_statistics.py",
        STATISTICS,
        "outer * first_height + row % first_height) * first_width + column % first_width",
        "outer * first_width + row % first_height) * first_width + column % first_width",
    ),
    Mutation(
        "triton.statistics.diagonal",
        f"{KERNELS}/non_local_statistics.py",
        STATISTICS,
        "value = add_tiles(at, splits, pitch * pitch, col <= row, TILES, OUTPUTS)",
        "value = add_tiles(at, splits, pitch * pitch, col < row, TILES, OUTPUTS)",
    ),
]
