"""The tuples that pass between the layers of the package, and the types of arguments that several of them take."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from torch import Tensor

__all__ = ["Array", "AttentionPool", "NonLocalWeights", "PerLevel", "present", "weights_of"]

Value = TypeVar("Value")


class Array(Protocol):
    """What a NumPy array and a tensor have in common."""

    @property
    def ndim(self) -> int: ...
    def tolist(self) -> Any: ...


# One value for all levels, or a list of any kind with one value per level.
PerLevel: TypeAlias = Value | Sequence[Value] | Array


class AttentionPool(NamedTuple):
    """The four means of a feature map ``x (N, C, H, W)``.

    The attention maps are means of ``abs(x)`` (Zhang & Ma 2021, ``G^s`` and ``G^c``);
    the other two are plain means.
    """

    spatial_attention: Tensor  # (N, H, W), mean over channels of abs(x)
    channel_attention: Tensor  # (N, C),    mean over pixels of abs(x)
    spatial_mean: Tensor  # (N, H, W), mean over channels of x
    channel_mean: Tensor  # (N, C),    mean over pixels of x


class NonLocalWeights(NamedTuple):
    """The 1x1 convolutions of a non-local block, each as a matrix.

    ``C`` is the block's width, ``c`` its inner width. ``gaussian`` mode has no theta and phi;
    only ``concatenation`` has ``pair_weight``, the projection of ``[theta_i; phi_j]`` to a scalar.
    """

    g_weight: Tensor  # (c, C)
    g_bias: Tensor  # (c,)
    out_weight: Tensor  # (C, c)
    out_bias: Tensor | None = None  # (C,)
    theta_weight: Tensor | None = None  # (c, C)
    theta_bias: Tensor | None = None  # (c,)
    phi_weight: Tensor | None = None  # (c, C)
    phi_bias: Tensor | None = None  # (c,)
    pair_weight: Tensor | None = None  # (2c,), theta's half first


def weights_of(tensors: Iterable[Any]) -> NonLocalWeights:
    """Return the weights of tensors in the order of their fields."""
    return NonLocalWeights(*tensors)


def present(value: Value | None) -> Value:
    """Return a value whose type allows None, where the caller knows that it is there."""
    return value  # type: ignore[return-value]  # torch.compile need not trace a check that cannot fail
