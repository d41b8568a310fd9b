"""A non-local block as functions take it: its convolutions, its settings, its norm."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..types import NonLocalWeights, weights_of
from .batch_norm import Norm

__all__ = ["Block", "BlockSettings", "as_matrices", "block_tensors", "with_tensors"]


@dataclass(frozen=True)
class BlockSettings:
    """How a non-local block compares pixels; see :class:`fbkd_ops.presets.LevelSettings`."""

    mode: str = "dot_product"
    stride: int = 1
    pool_order: str = "single"
    use_scale: bool = True


class Block(NamedTuple):
    """A non-local block: its convolutions, how it compares pixels, its norm if it has one.

    The convolutions' weights are matrices ``(out, in)``, or ``(out, in, 1, 1)`` as the layers hold them.
    """

    weights: NonLocalWeights
    settings: BlockSettings
    norm: Norm | None = None
    norm_parameters: tuple[Tensor | None, Tensor | None] | None = None  # weight and bias in place of its own
    updates_statistics: bool = True  # False: those of the norm have seen this batch already


def block_tensors(block: Block) -> list[Tensor | None]:
    """All of a block that learns."""
    return [*block.weights, *((None, None) if block.norm is None else (block.norm.weight, block.norm.bias))]


def with_tensors(block: Block, tensors: Sequence[Tensor | None], updates_statistics: bool) -> Block:
    """Return the block with other tensors in place of its :func:`block_tensors`."""
    *weights, norm_weight, norm_bias = tensors
    return Block(weights_of(weights), block.settings, block.norm, (norm_weight, norm_bias), updates_statistics)


def as_matrices(weights: NonLocalWeights) -> NonLocalWeights:
    """Return the convolutions' weights as matrices."""
    return weights_of(w.flatten(1) if w is not None and w.dim() == 4 else w for w in weights)
