"""The non-local block as a module."""

from typing import Optional

from torch import Tensor, nn

from . import functional
from ._batch_norm import FrozenBatchNorm2d, is_frozen
from ._validation import check_choice, check_stride, is_int
from .linear_non_local import Block, BlockSettings, as_matrices
from .presets import CHOICES
from .types import NonLocalWeights

__all__ = ["NonLocalBlock2d"]

_NORMS = {"batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm, "frozen": FrozenBatchNorm2d}


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

    Example:
        >>> block = NonLocalBlock2d(256, inter_channels=64, stride=8)
        >>> block(torch.randn(1, 256, 50, 84)).shape
        torch.Size([1, 256, 50, 84])

    Source: Wang et al. 2018, "Non-local Neural Networks".
    """

    def __init__(
        self,
        in_channels: int,
        inter_channels: Optional[int] = None,
        *,
        reduction: Optional[int] = None,
        mode: str = "dot_product",
        stride: int = 1,
        pool_order: str = "single",
        use_scale: bool = True,
        norm: str = "batch",
        conv_out_bias: bool = True,
    ):
        super().__init__()
        if not is_int(in_channels) or in_channels < 1:
            raise ValueError(f"in_channels must be an int >= 1, got {in_channels!r}")
        inner = _inner_width(in_channels, inter_channels, reduction)
        for name, value in (("mode", mode), ("norm", norm), ("pool_order", pool_order)):
            check_choice(value, CHOICES[name], name)
        check_stride(stride)
        self.in_channels, self.inter_channels = in_channels, inner
        self.mode, self.stride, self.pool_order, self.use_scale = mode, stride, pool_order, use_scale
        embeds = mode != "gaussian"
        self.g = nn.Conv2d(in_channels, inner, 1)
        self.theta = nn.Conv2d(in_channels, inner, 1) if embeds else None
        self.phi = nn.Conv2d(in_channels, inner, 1) if embeds else None
        self.pair = nn.Conv2d(2 * inner, 1, 1, bias=False) if mode == "concatenation" else None
        self.out = nn.Conv2d(inner, in_channels, 1, bias=conv_out_bias)
        self.norm = None if norm == "none" else _NORMS[norm](in_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start over at ``z = x``."""
        for layer in (self.g, self.theta, self.phi):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        if self.pair is not None:
            self.pair.reset_parameters()
        self.out.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()
        learns = self.norm is not None and not is_frozen(self.norm)
        last = self.norm if learns else self.out
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)

    def weights(self) -> NonLocalWeights:
        """The block's convolutions as matrices, in the layout that the functions take."""
        return as_matrices(self._convolutions())

    def _convolutions(self) -> NonLocalWeights:
        """Weights in the layers' own shapes."""

        def weight(layer: Optional[nn.Conv2d]) -> Optional[Tensor]:
            return None if layer is None else layer.weight

        def bias(layer: Optional[nn.Conv2d]) -> Optional[Tensor]:
            return None if layer is None else layer.bias

        return NonLocalWeights(
            g_weight=weight(self.g),
            g_bias=bias(self.g),
            out_weight=weight(self.out),
            out_bias=bias(self.out),
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


def _inner_width(channels: int, inner: Optional[int], reduction: Optional[int]) -> int:
    if inner is None:
        reduction = 2 if reduction is None else reduction
        if not is_int(reduction) or reduction < 1:
            raise ValueError(f"reduction must be an int >= 1, got {reduction!r}")
        return max(channels // reduction, 1)
    if reduction is not None:
        raise ValueError(f"give inter_channels or reduction, got both: {inner!r} and {reduction!r}")
    if not is_int(inner) or not 1 <= inner <= channels:
        raise ValueError(f"inter_channels must be between 1 and in_channels={channels}, got {inner!r}")
    return inner
