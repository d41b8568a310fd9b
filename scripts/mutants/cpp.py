"""Mutations of the C++ kernels."""

from .mutation import Selection, faults

POOL = Selection(
    ("test_attention_pool.py",), "cpu and (sizes_in_both_layouts or any_shape or gradcheck or each_output)"
)
MASKS = Selection(("test_attention_masks.py",), "cpu and (test_lengths or temperatures or average or joint)")
DISTANCE = Selection(("test_masked_l2.py",), "cpu and (small_sizes or large_sizes or gradcheck)")
CHANNELS = "test_channel_ops.py"
CORRELATION = Selection(
    (CHANNELS, "test_channel_correlation.py", "test_feature_norm.py"),
    "channel_correlation and cpu and (small_sizes or large_sizes or gradcheck or constant or zero or digits)"
    " or test_moments and cpu",
)
DIVERGENCE = Selection(
    (CHANNELS, "test_channel_divergence.py"),
    "channel_divergence and cpu and (small_sizes or large_sizes or gradcheck or temperatures or infinity)",
)
ADAPTED = Selection(("test_adapted_masked_l2.py",), "cpu and (large_sizes or gradcheck or test_layouts)")
SPATIAL = Selection(("test_spatial_l2.py",), "cpu and (shapes or gradcheck)")
STATISTICS = Selection(
    ("test_non_local_statistics.py",), "cpu and (small_sizes or large_sizes or winners or gradcheck or finite)"
)
RESIDUAL = Selection(("test_relation_residual.py",), "cpu and (small_sizes or large_sizes or gradcheck)")
CELLS = Selection(("test_cell_relation.py",), "literal_formula or every_norm or square or finite or gradcheck")

# One file's mutations beside each other: a build compiles the file that was restored as well as the next one.
MUTATIONS = [
    *faults(
        "cpp.pool",
        "csrc/cpu/attention_pool.cpp",
        POOL,
        sign_of_a_row=(
            "accumulate<First>(col_plain[j], (v0 + v1) + (v2 + v3));",
            "accumulate<First>(col_plain[j], (v0 + v1) + (v2 - v3));",
        ),
        last_column_of_later_rows=("add_vector(col_plain, plain, cols);", "add_vector(col_plain, plain, cols - 1);"),
        count_of_a_row_mean=("finish(by_row, image, block, view.cols);", "finish(by_row, image, block, view.rows);"),
    ),
    *faults(
        "cpp.pool",
        "csrc/attention_pool.h",
        POOL,
        sign_of_zero=("x < A(0) ? A(-1)", "x <= A(0) ? A(-1)"),
    ),
    *faults(
        "cpp.pool",
        "csrc/cpu/pool_gradient.h",
        POOL,
        gradient_of_the_first_image=("c = image * view.cols + col;", "c = col;"),
        count_of_a_gradient=("[i] / static_cast<A>(count);", "[i] / static_cast<A>(count + 1);"),
    ),
    *faults(
        "cpp.masks",
        "csrc/cpu/attention_masks.cpp",
        MASKS,
        temperature_between_tiles=(
            "other.sum * std::exp((other.largest - both) / temperature));",
            "other.sum * std::exp(other.largest - both));",
        ),
        half_of_an_average=("(static_cast<A>(first.maps) * norm.sum);", "norm.sum;"),
        normaliser_of_the_other_map=("norm = total[image * first.maps + map];", "norm = total[image * first.maps];"),
    ),
    *faults(
        "cpp.correlation",
        "csrc/cpu/channel_correlation.cpp",
        CORRELATION,
        degrees_of_freedom=("return values > 1 ? values - 1 : 1;", "return values;"),
        shift_of_the_other_map=("v = t[i] - t_shift[i];", "v = t[i] - s_shift[i];"),
        factor_that_is_rounded=("-scale * (1 / (a * b))", "-scale / (a * b)"),
        squares_that_are_not_centred=("put(kCentredTeacherSquares, tt);", "put(kCentredTeacherSquares, tt + t_mean);"),
        gradient_of_a_constant_channel=("deviation == 0 ? 0 :", "deviation < 0 ? 0 :"),
        sums_of_the_first_image=("partials[(image * kSums + sum)", "partials[(0 * kSums + sum)"),
    ),
    *faults(
        "cpp.divergence",
        "csrc/cpu/channel_divergence.cpp",
        DIVERGENCE,
        maximum_of_the_other_map=("y = (t[i] - t_max) * inverse, weight", "y = (t[i] - s_max) * inverse, weight"),
        divergence_between_pieces=("weight * (divergence + t_sum * (y - x));", "weight * divergence;"),
        sum_between_pieces=("s_sum *= std::exp(x), t_sum *= weight;", "s_sum *= std::exp(x);"),
        last_rows_of_a_chain=("min64(row + kChain, block.last_row)", "min64(row + kChain, block.last_row - 1)"),
        images_of_the_mean=("(level.student.images * channels())))", "(channels())))"),
        normalisers_of_the_first_image=(
            "level.normalisers) + image * kNormalisers * channels();",
            "level.normalisers);",
        ),
        maximum_of_minus_infinity=("std::numeric_limits<A>::lowest();", "-std::numeric_limits<A>::infinity();"),
    ),
    *faults(
        "cpp.distance",
        "csrc/cpu/pair_tiles.h",
        DISTANCE,
        second_piece_of_the_teacher=(
            "row * t_view.row_stride + col * t_view.col_stride;",
            "row * t_view.row_stride + col;",
        ),
    ),
    *faults(
        "cpp.distance",
        "csrc/cpu/masked_l2.cpp",
        DISTANCE,
        scale=("scale(static_cast<A>(2 * grad))", "scale(static_cast<A>(grad))"),
        mask_of_the_wrong_image=("mask + image * this->level.student.cols + col;", "mask + col;"),
        sign_of_the_difference=(
            "sum += weight[i] * (s[i] - t[i]) * (s[i] - t[i]);",
            "sum += weight[i] * (s[i] - t[i]) * (s[i] + t[i]);",
        ),
    ),
    *faults(
        "cpp.pieces",
        "csrc/cpu/pieces.cpp",
        DISTANCE,
        stride=("load(x[i * stride])", "load(x[i])"),
    ),
    *faults(
        "cpp.adapted",
        "csrc/cpu/adapted_masked_l2.cpp",
        ADAPTED,
        sign_of_the_bias=("d[i] + bias[i] - t[i];", "d[i] - bias[i] - t[i];"),
        last_block_of_a_group=(
            "index < (group + 1) * blocks / groups; ++index)",
            "index + 1 < (group + 1) * blocks / groups; ++index)",
        ),
        last_rows_of_the_bias=(
            "(row % kRowsOfPiece == kRowsOfPiece - 1 || row == rows.count - 1)",
            "(row % kRowsOfPiece == kRowsOfPiece - 1)",
        ),
    ),
    *faults(
        "cpp.spatial",
        "csrc/cpu/spatial_l2.cpp",
        SPATIAL,
        mirrored_weight=("-2 * weight[kWeights - 1 - k];", "-2 * weight[k];"),
        error_beyond_the_tile=(
            "for (int64_t row = max64(0, error.first); row < min64(level.height, last + halo); ++row) {",
            "for (int64_t row = max64(0, error.first); row < last; ++row) {",
        ),
        sign_of_the_bias=("sums[1 + kWeights] -= 2", "sums[1 + kWeights] += 2"),
    ),
    *faults(
        "cpp.statistics",
        "csrc/cpu/non_local_statistics.cpp",
        STATISTICS,
        sign_of_the_mean=(
            "add_multiple(&offsets[image * channels], A(-1), back, channels);",
            "add_multiple(&offsets[image * channels], A(1), back, channels);",
        ),
        lower_half=(
            "out[col] += share * partial[col * channels + row];",
            "out[col] += share * partial[row * channels + col];",
        ),
        row_of_the_winner=(
            "(cell_row * level.pool.ky + best_row[col]) * level.width",
            "(cell_row * level.pool.kx + best_row[col]) * level.width",
        ),
    ),
    *faults(
        "cpp.max_pool",
        "csrc/cpu/max_pool.h",
        STATISTICS,
        not_a_number=(" || value != value;", ";"),
        rank_of_cells_that_are_not_square=("(dy / fy * (kx / fx) + dx / fx)", "(dy / fy * (ky / fy) + dx / fx)"),
    ),
    *faults(
        "cpp.residual",
        "csrc/cpu/relation_residual.cpp",
        RESIDUAL,
        sign_of_the_matrix_gradient=(
            "row * student_channels, first, end, A(-1));",
            "row * student_channels, first, end, A(1));",
        ),
        groups_of_an_image=(
            "first = tile / teacher_channels * groups, end = first + groups;",
            "first = tile / teacher_channels * groups, end = first + 1;",
        ),
        square_after_scaling=("if (total != nullptr) total[row] += sum;", "if (total != nullptr) total[row] = sum;"),
    ),
    *faults(
        "cpp.cells",
        "csrc/cpu/cell_relation.cpp",
        CELLS,
        variance_between_images=("size.all_cells()) + between) / images;", "size.all_cells())) / images;"),
        scale_of_the_variance_gradient=(
            "/ (2 * deviation[c] * deviation[c] * images);",
            "/ (deviation[c] * deviation[c] * images);",
        ),
        share_of_a_pixel=("= 2 * share * dvariance[c]", "= 2 * dvariance[c]"),
    ),
]
