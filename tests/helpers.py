"""What several test files need."""

import itertools
import os
from collections.abc import Iterable

import torch
from torch import nn

# Set by `make test-all`: every architecture, and more random cases.
TEST_ALL = bool(os.environ.get("FBKD_OPS_TEST_ALL"))


def pairs_of(*values: Iterable) -> list[tuple]:
    """Return combinations of the values, so few that each two values meet; under `make test-all` every combination."""
    rows = list(itertools.product(*values))
    if TEST_ALL:
        return rows
    chosen, missing = [], set().union(*map(_pairs_in, rows))
    while missing:
        chosen.append(max(rows, key=lambda row: len(_pairs_in(row) & missing)))
        missing -= _pairs_in(chosen[-1])
    return chosen


def _pairs_in(row: tuple) -> set[tuple]:
    return set(itertools.combinations(enumerate(row), 2))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters and BatchNorm statistics: at the zero initialisation most gradients are 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                values = values.abs() + 0.5
            elif tensor.dim() > 1:
                values = values / tensor[0].numel() ** 0.5
            tensor.copy_(values)
    return module


def within_eager_error(ours, eager, truth, accumulation: torch.dtype, eps: float = 8.0) -> bool:
    """Elementwise no further from the float64 truth than twice eager's error, plus a few eps of the accumulation."""
    truth = truth.double()
    floor = eps * torch.finfo(accumulation).eps * truth.square().mean().sqrt()
    error = (ours.double() - truth).abs()
    return bool((error <= 2 * (eager.double() - truth).abs() + floor).all())


def rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()
