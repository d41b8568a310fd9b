"""The non-local block as a module."""

from typing import Optional

from torch import Tensor, nn

from . import functional
from ._validation import check_choice, check_stride, is_int
from .presets import CHOICES
from .types import NonLocalWeights

__all__ = ["NonLocalBlock2d"]


class NonLocalBlock2d(nn.Module):
    """Non-local block ``z = x + Norm(Wz y + bz)`` in memory linear in the number of pixels.

    The weights start as mmcv's do (normal with std 0.01, biases 0), and BatchNorm's weight and bias (without a
    norm: those of the last convolution) start at 0, so that ``z = x`` at first.

    Args:
        in_channels: width C of the features, >= 1.
        inter_channels: inner width c, 1 to C; C // 2, at least 1, by default.
        mode: ``"dot_product"``, ``"embedded_gaussian"``, ``"gaussian"`` or ``"concatenation"``.
        stride: factor by which phi and g are max-pooled, >= 1; clamped to the map.
        pool_order: ``"single"``, or ``"nested"`` for a pool by 2 followed by a pool by ``stride / 2``.
        use_scale: whether ``embedded_gaussian`` divides by the root of the inner width.
        norm: ``"batch"`` for an ``nn.BatchNorm2d`` after the last convolution, or ``"none"``.
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
        inner = max(in_channels // 2, 1) if inter_channels is None else inter_channels
        if not is_int(inner) or not 1 <= inner <= in_channels:
            raise ValueError(f"inter_channels must be between 1 and in_channels={in_channels}, got {inner!r}")
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
        self.norm = nn.BatchNorm2d(in_channels) if norm == "batch" else None
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
        last = self.out
        if self.norm is not None:
            self.norm.reset_parameters()
            last = self.norm
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)

    def weights(self) -> NonLocalWeights:
        """The block's convolutions as matrices, in the layout that the functions take."""

        def matrix(layer: Optional[nn.Conv2d]) -> Optional[Tensor]:
            return None if layer is None else layer.weight.flatten(1)

        def bias(layer: Optional[nn.Conv2d]) -> Optional[Tensor]:
            return None if layer is None else layer.bias

        return NonLocalWeights(
            g_weight=matrix(self.g),
            g_bias=bias(self.g),
            out_weight=matrix(self.out),
            out_bias=bias(self.out),
            theta_weight=matrix(self.theta),
            theta_bias=bias(self.theta),
            phi_weight=matrix(self.phi),
            phi_bias=bias(self.phi),
            pair_weight=None if self.pair is None else self.pair.weight.flatten(),
        )

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
