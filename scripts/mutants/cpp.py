"""Mutations of the C++ kernels."""

from .mutation import Mutation, Selection

__all__ = ["MUTATIONS"]

POOL = Selection(
    ("test_attention_pool.py",), "cpu and (sizes_in_both_layouts or any_shape or gradcheck or each_output)"
)
MASKS = Selection(("test_attention_masks.py",), "cpu and (test_lengths or temperatures or average or joint)")
DISTANCE = Selection(("test_masked_l2.py",), "cpu and (small_sizes or large_sizes or gradcheck)")
ADAPTED = Selection(("test_adapted_masked_l2.py",), "cpu and (large_sizes or gradcheck or test_layouts)")
SPATIAL = Selection(("test_spatial_l2.py",), "cpu and (shapes or gradcheck)")
STATISTICS = Selection(
    ("test_non_local_statistics.py",), "cpu and (small_sizes or large_sizes or winners or gradcheck or finite)"
)
RESIDUAL = Selection(("test_relation_residual.py",), "cpu and (small_sizes or large_sizes or gradcheck)")
CELLS = Selection(("test_cell_relation.py",), "literal_formula or every_norm or square or finite or gradcheck")

POOL_CPP = "csrc/cpu/attention_pool.cpp"
MASKS_CPP = "csrc/cpu/attention_masks.cpp"
DISTANCE_CPP = "csrc/cpu/masked_l2.cpp"
ADAPTED_CPP = "csrc/cpu/adapted_masked_l2.cpp"
SPATIAL_CPP = "csrc/cpu/spatial_l2.cpp"
STATISTICS_CPP = "csrc/cpu/non_local_statistics.cpp"
RESIDUAL_CPP = "csrc/cpu/relation_residual.cpp"
CELLS_CPP = "csrc/cpu/cell_relation.cpp"
PIECES_CPP = "csrc/cpu/pieces.cpp"
POOL_H = "csrc/attention_pool.h"
POOL_GRADIENT_H = "csrc/cpu/pool_gradient.h"
MAX_POOL_H = "csrc/cpu/max_pool.h"

# One file's mutations beside each other: a build compiles the file that was restored as well as the next one.
MUTATIONS = [
    Mutation(
        "cpp.pool.sign_of_a_row",
        POOL_CPP,
        POOL,
        "accumulate<First>(col_plain[j], (v0 + v1) + (v2 + v3));",
        "accumulate<First>(col_plain[j], (v0 + v1) + (v2 - v3));",
    ),
    Mutation(
        "cpp.pool.last_column_of_later_rows",
        POOL_CPP,
        POOL,
        "add_vector(col_plain, plain, cols);",
        "add_vector(col_plain, plain, cols - 1);",
    ),
    Mutation(
        "cpp.pool.count_of_a_row_mean",
        POOL_CPP,
        POOL,
        "finish(by_row, image, block, view.cols);",
        "finish(by_row, image, block, view.rows);",
    ),
    Mutation("cpp.pool.sign_of_zero", POOL_H, POOL, "x < A(0) ? A(-1)", "x <= A(0) ? A(-1)"),
    Mutation(
        "cpp.pool.gradient_of_the_first_image",
        POOL_GRADIENT_H,
        POOL,
        "c = image * view.cols + col;",
        "c = col;",
    ),
    Mutation(
        "cpp.pool.count_of_a_gradient",
        POOL_GRADIENT_H,
        POOL,
        "[i] / static_cast<A>(count);",
        "[i] / static_cast<A>(count + 1);",
    ),
    Mutation(
        "cpp.masks.temperature_between_tiles",
        MASKS_CPP,
        MASKS,
        "other.sum * std::exp((other.largest - both) / temperature));",
        "other.sum * std::exp(other.largest - both));",
    ),
    Mutation(
        "cpp.masks.half_of_an_average",
        MASKS_CPP,
        MASKS,
        "(static_cast<A>(first.maps) * norm.sum);",
        "norm.sum;",
    ),
    Mutation(
        "cpp.masks.normaliser_of_the_other_map",
        MASKS_CPP,
        MASKS,
        "norm = total[image * first.maps + map];",
        "norm = total[image * first.maps];",
    ),
    Mutation(
        "cpp.distance.scale", DISTANCE_CPP, DISTANCE, "scale(static_cast<A>(2 * grad))", "scale(static_cast<A>(grad))"
    ),
    Mutation(
        "cpp.distance.mask_of_the_wrong_image",
        DISTANCE_CPP,
        DISTANCE,
        "(level.col_mask) + image * level.student.cols + col;",
        "(level.col_mask) + col;",
    ),
    Mutation(
        "cpp.distance.second_piece_of_the_teacher",
        DISTANCE_CPP,
        DISTANCE,
        "row * t_view.row_stride + col * t_view.col_stride;",
        "row * t_view.row_stride + col;",
    ),
    Mutation(
        "cpp.distance.sign_of_the_difference",
        DISTANCE_CPP,
        DISTANCE,
        "sum += weight[i] * (s[i] - t[i]) * (s[i] - t[i]);",
        "sum += weight[i] * (s[i] - t[i]) * (s[i] + t[i]);",
    ),
    Mutation("cpp.pieces.stride", PIECES_CPP, DISTANCE, "load(x[i * stride])", "load(x[i])"),
    Mutation(
        "cpp.adapted.sign_of_the_bias",
        ADAPTED_CPP,
        ADAPTED,
        "d[i] + bias[i] - t[i];",
        "d[i] - bias[i] - t[i];",
    ),
    Mutation(
        "cpp.adapted.last_block_of_a_group",
        ADAPTED_CPP,
        ADAPTED,
        "index < (group + 1) * blocks / groups; ++index)",
        "index + 1 < (group + 1) * blocks / groups; ++index)",
    ),
    Mutation(
        "cpp.adapted.last_rows_of_the_bias",
        ADAPTED_CPP,
        ADAPTED,
        "(row % kRowsOfPiece == kRowsOfPiece - 1 || row == rows.count - 1)",
        "(row % kRowsOfPiece == kRowsOfPiece - 1)",
    ),
    Mutation(
        "cpp.spatial.mirrored_weight",
        SPATIAL_CPP,
        SPATIAL,
        "-2 * weight[kWeights - 1 - k];",
        "-2 * weight[k];",
    ),
    Mutation(
        "cpp.spatial.error_beyond_the_tile",
        SPATIAL_CPP,
        SPATIAL,
        "for (int64_t row = max64(0, error.first); row < min64(level.height, last + halo); ++row) {",
        "for (int64_t row = max64(0, error.first); row < last; ++row) {",
    ),
    Mutation(
        "cpp.spatial.sign_of_the_bias", SPATIAL_CPP, SPATIAL, "sums[1 + kWeights] -= 2", "sums[1 + kWeights] += 2"
    ),
    Mutation(
        "cpp.statistics.sign_of_the_mean",
        STATISTICS_CPP,
        STATISTICS,
        "add_multiple(&offsets[image * channels], A(-1), back, channels);",
        "add_multiple(&offsets[image * channels], A(1), back, channels);",
    ),
    Mutation(
        "cpp.statistics.lower_half",
        STATISTICS_CPP,
        STATISTICS,
        "out[col] += share * partial[col * channels + row];",
        "out[col] += share * partial[row * channels + col];",
    ),
    Mutation(
        "cpp.statistics.row_of_the_winner",
        STATISTICS_CPP,
        STATISTICS,
        "(cell_row * level.pool.ky + best_row[col]) * level.width",
        "(cell_row * level.pool.kx + best_row[col]) * level.width",
    ),
    Mutation("cpp.max_pool.not_a_number", MAX_POOL_H, STATISTICS, " || value != value;", ";"),
    Mutation(
        "cpp.max_pool.rank_of_cells_that_are_not_square",
        MAX_POOL_H,
        STATISTICS,
        "(dy / fy * (kx / fx) + dx / fx)",
        "(dy / fy * (ky / fy) + dx / fx)",
    ),
    Mutation(
        "cpp.residual.sign_of_the_matrix_gradient",
        RESIDUAL_CPP,
        RESIDUAL,
        "row * student_channels, first, end, A(-1));",
        "row * student_channels, first, end, A(1));",
    ),
    Mutation(
        "cpp.residual.groups_of_an_image",
        RESIDUAL_CPP,
        RESIDUAL,
        "first = tile / teacher_channels * groups, end = first + groups;",
        "first = tile / teacher_channels * groups, end = first + 1;",
    ),
    Mutation(
        "cpp.residual.square_after_scaling",
        RESIDUAL_CPP,
        RESIDUAL,
        "if (total != nullptr) total[row] += sum;",
        "if (total != nullptr) total[row] = sum;",
    ),
    Mutation(
        "cpp.cells.variance_between_images",
        CELLS_CPP,
        CELLS,
        "size.all_cells()) + between) / images;",
        "size.all_cells())) / images;",
    ),
    Mutation(
        "cpp.cells.scale_of_the_variance_gradient",
        CELLS_CPP,
        CELLS,
        "/ (2 * deviation[c] * deviation[c] * images);",
        "/ (deviation[c] * deviation[c] * images);",
    ),
    Mutation("cpp.cells.share_of_a_pixel", CELLS_CPP, CELLS, "= 2 * share * dvariance[c]", "= 2 * dvariance[c]"),
]
