"""Mutations of the CUDA kernels, which the tests compile with g++ and run on the CPU."""

from .mutation import Selection, faults

FILES = ("test_cuda_kernels.py",)
POOL = Selection(FILES, "(pool_of_a_pyramid or pool_of_slices) and float32")
DISTANCE = Selection(FILES, "l2_of_a_pyramid and float32")
MASKS = Selection(FILES, "masks_of_a_pyramid or masks_of_many_levels")

MUTATIONS = [
    *faults(
        "cuda.pool",
        "csrc/cuda/attention_pool.cuh",
        POOL,
        plain_mean=("mean_plain[index] = sums.plain / count;", "mean_plain[index] = sums.abs / count;"),
        row_beyond_the_step=("if (at.lane < 2 * rows)", "if (at.lane <= 2 * rows)"),
        last_tile_of_a_mean=(
            "for (int64_t tile = group; tile < to.tiles; tile += groups)",
            "for (int64_t tile = group; tile + 1 < to.tiles; tile += groups)",
        ),
        thread_of_a_column=(
            "shared + thread % VEC * kPitch + thread / VEC;",
            "shared + thread / VEC * kPitch + thread % VEC;",
        ),
        swapped_gradients=("input_gradient<A>(values[i], abs, plain);", "input_gradient<A>(values[i], plain, abs);"),
        count_of_a_gradient=("length, A(1) / static_cast<A>(count),", "length, A(1) / static_cast<A>(length),"),
    ),
    *faults(
        "cuda.distance",
        "csrc/cuda/masked_l2.cuh",
        DISTANCE,
        column_mask=("sum += col_mask[i] * (difference * difference);", "sum += difference * difference;"),
        scale=("scale = A(2) * grad", "scale = A(1) * grad"),
        turned_column=("* pitch + at.lane * VEC + i];", "* pitch + at.lane + i];"),
        row_mask_of_the_first_image=(
            "level.row_mask + at.image * level.student.rows + at.first_row;",
            "level.row_mask + at.first_row;",
        ),
    ),
    *faults(
        "cuda.masks",
        "csrc/cuda/attention_masks.cuh",
        MASKS,
        peak_of_a_tile=("sum += peaks[i].sum * exponential(peaks[i].maximum - maximum, A());", "sum += peaks[i].sum;"),
        sign_of_the_teacher=("student.at(index) + teacher.at(index);", "student.at(index) - teacher.at(index);"),
        half_of_an_average=("(level.softmaxes() * sum);", "sum;"),
    ),
    *faults(
        "cuda.device",
        "csrc/cuda/device.cuh",
        POOL,
        lanes_of_a_sum=(
            "given = upper ? values[i] : values[i + half];",
            "given = upper ? values[i + half] : values[i];",
        ),
        last_column=("min64(VEC, view.cols - at.col)", "min64(VEC, view.cols - at.col - 1)"),
    ),
    *faults(
        "cuda.device",
        "csrc/cuda/device.cuh",
        DISTANCE,
        last_warp=("for (int warp = 1; warp < kWarps; ++warp)", "for (int warp = 1; warp < kWarps - 1; ++warp)"),
    ),
    *faults(
        "cuda.plan",
        "csrc/cuda/plan.h",
        POOL,
        alignment_of_images=("(view.images == 1 || aligned(view.image_stride));", "true;"),
    ),
]
