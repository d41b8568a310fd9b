"""Mutations of the CUDA kernels, which the tests compile with g++ and run on the CPU."""

from .mutation import Mutation, Selection

__all__ = ["MUTATIONS"]

FILES = ("test_cuda_kernels.py",)
POOL = Selection(FILES, "(pool_of_a_pyramid or pool_of_slices) and float32")
DISTANCE = Selection(FILES, "l2_of_a_pyramid and float32")
MASKS = Selection(FILES, "masks_of_a_pyramid or masks_of_many_levels")

POOL_CUH = "csrc/cuda/attention_pool.cuh"
DISTANCE_CUH = "csrc/cuda/masked_l2.cuh"
MASKS_CUH = "csrc/cuda/attention_masks.cuh"
DEVICE_CUH = "csrc/cuda/device.cuh"
PLAN_H = "csrc/cuda/plan.h"

MUTATIONS = [
    Mutation(
        "cuda.pool.plain_mean",
        POOL_CUH,
        POOL,
        "mean_plain[index] = sums.plain / count;",
        "mean_plain[index] = sums.abs / count;",
    ),
    Mutation("cuda.pool.row_beyond_the_step", POOL_CUH, POOL, "if (at.lane < 2 * rows)", "if (at.lane <= 2 * rows)"),
    Mutation(
        "cuda.pool.last_tile_of_a_mean",
        POOL_CUH,
        POOL,
        "for (int64_t tile = group; tile < to.tiles; tile += groups)",
        "for (int64_t tile = group; tile + 1 < to.tiles; tile += groups)",
    ),
    Mutation(
        "cuda.pool.thread_of_a_column",
        POOL_CUH,
        POOL,
        "shared + thread % VEC * kPitch + thread / VEC;",
        "shared + thread / VEC * kPitch + thread % VEC;",
    ),
    Mutation(
        "cuda.pool.swapped_gradients",
        POOL_CUH,
        POOL,
        "input_gradient<A>(values[i], abs, plain);",
        "input_gradient<A>(values[i], plain, abs);",
    ),
    Mutation(
        "cuda.pool.count_of_a_gradient",
        POOL_CUH,
        POOL,
        "length, A(1) / static_cast<A>(count),",
        "length, A(1) / static_cast<A>(length),",
    ),
    Mutation(
        "cuda.distance.column_mask",
        DISTANCE_CUH,
        DISTANCE,
        "sum += col_mask[i] * (difference * difference);",
        "sum += difference * difference;",
    ),
    Mutation("cuda.distance.scale", DISTANCE_CUH, DISTANCE, "scale = A(2) * grad", "scale = A(1) * grad"),
    Mutation(
        "cuda.distance.turned_column",
        DISTANCE_CUH,
        DISTANCE,
        "* pitch + at.lane * VEC + i];",
        "* pitch + at.lane + i];",
    ),
    Mutation(
        "cuda.distance.row_mask_of_the_first_image",
        DISTANCE_CUH,
        DISTANCE,
        "level.row_mask + at.image * level.student.rows + at.first_row;",
        "level.row_mask + at.first_row;",
    ),
    Mutation(
        "cuda.masks.peak_of_a_tile",
        MASKS_CUH,
        MASKS,
        "sum += peaks[i].sum * exponential(peaks[i].maximum - maximum, A());",
        "sum += peaks[i].sum;",
    ),
    Mutation(
        "cuda.masks.sign_of_the_teacher",
        MASKS_CUH,
        MASKS,
        "student.at(index) + teacher.at(index);",
        "student.at(index) - teacher.at(index);",
    ),
    Mutation("cuda.masks.half_of_an_average", MASKS_CUH, MASKS, "(level.softmaxes() * sum);", "sum;"),
    Mutation(
        "cuda.device.lanes_of_a_sum",
        DEVICE_CUH,
        POOL,
        "given = upper ? values[i] : values[i + half];",
        "given = upper ? values[i + half] : values[i];",
    ),
    Mutation(
        "cuda.device.last_warp",
        DEVICE_CUH,
        DISTANCE,
        "for (int warp = 1; warp < kWarps; ++warp)",
        "for (int warp = 1; warp < kWarps - 1; ++warp)",
    ),
    Mutation(
        "cuda.device.last_column",
        DEVICE_CUH,
        POOL,
        "min64(VEC, view.cols - at.col)",
        "min64(VEC, view.cols - at.col - 1)",
    ),
    Mutation(
        "cuda.plan.alignment_of_images",
        PLAN_H,
        POOL,
        "(view.images == 1 || aligned(view.image_stride));",
        "true;",
    ),
]
