"""The non-local block as a module."""

from typing import Any

from torch import Tensor, nn

from .. import functional
from .._validation import check_choice, check_flag, check_layer, check_stride, is_int
from ..presets import CHOICES, NormName, PoolOrder
from ..types import NonLocalWeights
from .batch_norm import FrozenBatchNorm2d
from .modes import MODES, ModeName
from .parameters import Block, BlockSettings, as_matrices

__all__ = ["NonLocalBlock2d"]


# Each layer of a block knows how it starts, so that whoever resets all modules one by one, in any order, as FSDP does
# after ``to_empty()``, gets the block's start and not PyTorch's.
class SmallConv2d(nn.Conv2d):
    """A convolution that starts as mmcv's do: normal with std 0.01, biases 0."""

    bias: Tensor

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d whose weight starts at 0."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class ZeroSyncBatchNorm(nn.SyncBatchNorm):
    """A SyncBatchNorm whose weight starts at 0."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


_NORMS = {"batch": ZeroBatchNorm2d, "sync": ZeroSyncBatchNorm, "frozen": FrozenBatchNorm2d}
_LEARNED_NORMS = ("batch", "sync")


class NonLocalBlock2d(nn.Module):
    """Non-local block ``z = x + Norm(Wz y + bz)`` in memory linear in the number of pixels.

    The weights start as mmcv's do (normal with std 0.01, biases 0), and BatchNorm's weight and bias (without a
    norm that learns: those of the last convolution) start at 0, so that ``z = x`` at first.

    Args:
        in_channels: width C of the features, >= 1.
        inter_channels: inner width c, 1 to C.
        reduction: instead of ``inter_channels``, an int >= 1: c is C // reduction, at least 1; 2 by default.
        mode: ``"dot_product"``, ``"embedded_gaussian"``, ``"gaussian"`` or ``"concatenation"``.
        stride: factor by which phi and g are max-pooled, >= 1; clamped to the map, with a warning once a process.
        pool_order: ``"single"``, or ``"nested"`` for a pool by 2 followed by a pool by ``stride / 2``.
        use_scale: whether ``embedded_gaussian`` divides by the root of the inner width.
        norm: what follows the last convolution: ``"batch"``, an ``nn.BatchNorm2d``; ``"sync"``, an
            ``nn.SyncBatchNorm`` (which works on the CPU too); ``"frozen"``, a BatchNorm of buffers only, which loads a
            BatchNorm2d's state dict; or ``"none"``.
        conv_out_bias: whether the last convolution has a bias.

    Shape:
        ``(N, C, H, W)`` to ``(N, C, H, W)``.

    Raises:
        ValueError: a width, mode, stride or norm out of its range; see also :func:`fbkd_ops.functional.non_local`.
        TypeError: a flag that is no bool.
        RuntimeError: at a call, a layer with hooks (an old-style ``weight_norm`` is one), which would never run.

    Example:
        >>> block = NonLocalBlock2d(256, inter_channels=64, stride=8)
        >>> block(torch.randn(1, 256, 50, 84)).shape
        torch.Size([1, 256, 50, 84])

    Source: Wang et al. 2018, "Non-local Neural Networks".
    """

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        *,
        reduction: int | None = None,
        mode: ModeName = "dot_product",
        stride: int = 1,
        pool_order: PoolOrder = "single",
        use_scale: bool = True,
        norm: NormName = "batch",
        conv_out_bias: bool = True,
    ):
        super().__init__()
        if not is_int(in_channels) or in_channels < 1:
            raise ValueError(f"in_channels must be an int >= 1, got {in_channels!r}")
        inner = _inner_width(in_channels, inter_channels, reduction)
        mode = check_choice(mode, CHOICES["mode"], "mode")
        norm = check_choice(norm, CHOICES["norm"], "norm")
        pool_order = check_choice(pool_order, CHOICES["pool_order"], "pool_order")
        self.in_channels, self.inter_channels = int(in_channels), inner
        self.mode, self.stride, self.pool_order = mode, check_stride(stride), pool_order
        self.use_scale = check_flag(use_scale, "use_scale")
        embeds, last = MODES[mode].embeds, nn.Conv2d if norm in _LEARNED_NORMS else ZeroConv2d
        self.g = SmallConv2d(in_channels, inner, 1)
        self.theta = SmallConv2d(in_channels, inner, 1) if embeds else None
        self.phi = SmallConv2d(in_channels, inner, 1) if embeds else None
        self.pair = nn.Conv2d(2 * inner, 1, 1, bias=False) if MODES[mode].has_pair_weight else None
        self.out = last(inner, in_channels, 1, bias=check_flag(conv_out_bias, "conv_out_bias"))
        self.norm = None if norm == "none" else _NORMS[norm](in_channels)

    def reset_parameters(self) -> None:
        """Start over at ``z = x``. The block has no parameters of its own: each layer resets its own ones."""
        layer: Any  # torch's types know no reset_parameters
        for layer in self.children():
            layer.reset_parameters()

    def weights(self) -> NonLocalWeights:
        """Return the block's convolutions as matrices, in the layout that the functions take.

        Raises:
            RuntimeError: a layer with hooks, which would never run.
        """
        for name, layer in self.named_children():
            check_layer(layer, name)
        return as_matrices(self._convolutions())

    def _convolutions(self) -> NonLocalWeights:
        """Weights in the layers' own shapes."""

        def weight(layer: nn.Conv2d | None) -> Tensor | None:
            return None if layer is None else layer.weight

        def bias(layer: nn.Conv2d | None) -> Tensor | None:
            return None if layer is None else layer.bias

        return NonLocalWeights(
            g_weight=self.g.weight,
            g_bias=self.g.bias,
            out_weight=self.out.weight,
            out_bias=self.out.bias,
            theta_weight=weight(self.theta),
            theta_bias=bias(self.theta),
            phi_weight=weight(self.phi),
            phi_bias=bias(self.phi),
            pair_weight=None if self.pair is None else self.pair.weight.flatten(),
        )

    def block(self) -> Block:
        """Weights, settings and norm as the layers below take them.

        The weights keep the layers' shapes: each view of a parameter is a node of the autograd graph.
        """
        settings = BlockSettings(self.mode, self.stride, self.pool_order, self.use_scale)
        return Block(self._convolutions(), settings, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return functional.non_local(
            x,
            self.weights(),
            mode=self.mode,
            stride=self.stride,
            pool_order=self.pool_order,
            use_scale=self.use_scale,
            norm=self.norm,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, inter_channels={self.inter_channels}, mode={self.mode!r}, "
            f"stride={self.stride}, pool_order={self.pool_order!r}"
        )


def _inner_width(channels: int, inner: int | None, reduction: int | None) -> int:
    if inner is None:
        reduction = 2 if reduction is None else reduction
        if not is_int(reduction) or reduction < 1:
            raise ValueError(f"reduction must be an int >= 1, got {reduction!r}")
        return max(int(channels // reduction), 1)
    if reduction is not None:
        raise ValueError(f"give inter_channels or reduction, got both: {inner!r} and {reduction!r}")
    if not is_int(inner) or not 1 <= inner <= channels:
        raise ValueError(f"inter_channels must be between 1 and in_channels={channels}, got {inner!r}")
    return int(inner)
