"""Compiles a matrix product for sm_90 and prints what benchmarks.gpu_model makes of it, as JSON.

A process of its own: Triton's interpreter, in which the tests run the kernels, replaces the compiler.
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_model  # noqa: E402
from benchmarks.gpu_model_step import launches_noted  # noqa: E402
from benchmarks.gpu_model_ttir import evaluate  # noqa: E402

SIZE, TILE, STEP = 1024, 128, 32


@triton.jit
def product(a, b, out, size, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """A tile ``(TILE, TILE)`` of ``a @ b``, ``(size, size)`` each. Programs above the diagonal do nothing."""
    tiles = size // TILE
    row, col = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if row >= col:
        rows, cols = row * TILE + tl.arange(0, TILE), col * TILE + tl.arange(0, TILE)
        total = tl.zeros((TILE, TILE), tl.float32)
        for first in range(0, size, STEP):
            k = first + tl.arange(0, STEP)
            left = tl.load(a + rows[:, None] * size + k[None, :])
            right = tl.load(b + k[:, None] * size + cols[None, :])
            total = tl.dot(left, right, total, input_precision=PRECISION)
        tl.store(out + rows[:, None] * size + cols[None, :], total)


def predicted(dtype: torch.dtype, precision: str) -> dict:
    a, b = (torch.empty(SIZE, SIZE, dtype=dtype, device="meta") for _ in range(2))
    out = torch.empty(SIZE, SIZE, device="meta")
    launches = []
    with launches_noted(launches):
        product[((SIZE // TILE) ** 2,)](a, b, out, SIZE, PRECISION=precision, TILE=TILE, STEP=STEP, num_warps=8)
    (launch,) = launches
    kernel = gpu_model.compiled_kernel(launch.compiled)
    program = evaluate(kernel.code, launch.arguments, (SIZE // TILE) ** 2 - 1)
    costs = gpu_model.program_costs(kernel, program, 0.0)
    return gpu_model.predict_triton(launch, kernel) | {"tensor_cycles": costs.resources["tensor cores"]}


if __name__ == "__main__":
    kinds = {"bf16": (torch.bfloat16, "tf32"), "tf32": (torch.float32, "tf32"), "tf32x3": (torch.float32, "tf32x3")}
    print(json.dumps({name: predicted(*kind) for name, kind in kinds.items()}))
