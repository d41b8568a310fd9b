"""Extents of the tiles that programs with matrix products take, from a table for each architecture of GPUs.

``tiles.json`` has, by kernel and by the bytes of an operand, ``[ROWS, COLS, INNER, num_warps, num_stages]``: under
``"default"`` for all GPUs, under a compute capability (``"90"`` for 9.0) what is better there. "tf32" is for operands
of 4 bytes that PyTorch may multiply as TF32: one product in place of three takes fewer registers. ``make gpu-tune``
measures a GPU's own entries. Nothing is tuned while a model is trained.

"unaligned" tiles are those of levels that are not read 16 bytes at a time; they take more registers. All tiles are
without spills on sm_80, sm_90 and sm_100, as compiled, and the default ones fit the 99 KB of shared memory that the
smallest GPUs since sm_80 have. ``tests/test_triton_compile.py`` checks both.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

__all__ = ["Blocks", "blocks_of", "most_programs", "precision"]

TABLE = Path(__file__).with_suffix(".json")
DEFAULT = "default"
# Programs of a sum that is split: enough to fill every multiprocessor, in whole waves of one or two programs at a time.
WAVES, MULTIPROCESSORS = 4, 132  # the latter where there is no GPU to ask


class Blocks(NamedTuple):
    """Extents of a program's tile of a product, of one step of its sum, and how Triton compiles it."""

    ROWS: int  # pixels; where the product is summed over pixels: channels
    COLS: int  # channels
    INNER: int  # channels; where the product is summed over pixels: pixels
    num_warps: int
    num_stages: int = 3


@functools.cache
def table() -> Mapping[str, Mapping[str, Mapping[str, Blocks]]]:
    """Return the file's contents: architecture, kernel, operand."""
    read = json.loads(TABLE.read_text())
    return {
        architecture: {
            kernel: {operand: Blocks(*extents) for operand, extents in tiles.items()}
            for kernel, tiles in kernels.items()
        }
        for architecture, kernels in read.items()
    }


def blocks_of(kernel, like: Tensor, operand: torch.dtype, aligned: bool) -> Blocks:
    """Return the tile of a level.

    Args:
        kernel: Triton's; the table has its name.
        like: a tensor on the device.
        operand: the dtype in which the kernel multiplies.
        aligned: whether the level is read 16 bytes at a time.
    """
    key = "tf32" if operand == torch.float32 and precision() == "tf32" else str(operand.itemsize)
    return _chosen(kernel.__name__, key if aligned else f"{key} unaligned", architecture(like))


def precision() -> str:
    """Triton's name of the precision in which PyTorch lets float32 matrices be multiplied."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@functools.cache
def _chosen(kernel: str, key: str, gpu: str) -> Blocks:
    tables = [table().get(name, {}).get(kernel, {}) for name in (gpu, DEFAULT)]
    keys = dict.fromkeys((key, key.replace("tf32", "4")))
    return next(entries[each] for each in keys for entries in tables if each in entries)


def architecture(like: Tensor) -> str:
    """Return the compute capability of the GPU that kernels on a tensor are compiled for, ``"90"`` for 9.0.

    ``"default"`` in Triton's interpreter.
    """
    if like.is_cuda:
        return _capability(like.device)
    return DEFAULT if triton.knobs.runtime.interpret else str(triton.runtime.driver.active.get_current_target().arch)


@functools.cache
def _capability(device: torch.device) -> str:
    return "".join(map(str, torch.cuda.get_device_capability(device)))


def most_programs(like: Tensor) -> int:
    """Return among how many programs a sum is split at most on a tensor's device."""
    return WAVES * (_multiprocessors(like.device) if like.is_cuda else MULTIPROCESSORS)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
