"""The tensors of a case, made from its seed alone."""

import math

import torch
from op_cases import (
    batch_slice,
    channel_slice,
    channels_last,
    channels_last_slice,
    contiguous,
    expanded,
    permuted,
    spatial_slice,
)
from torch import Tensor


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def expanded_images(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def expanded_channels(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


def misaligned(x: Tensor) -> Tensor:
    """Begins one element behind a multiple of 64 bytes."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


def overlapping(x: Tensor) -> Tensor:
    """Images and pixels as windows that slide over one piece of memory."""
    n, channels, height, width = x.shape
    strides = (channels, 1, 2 * channels, channels)
    length = 1 + sum(max(size - 1, 0) * stride for size, stride in zip(x.shape, strides, strict=True))
    flat = x.flatten()
    memory = flat.repeat(-(-length // flat.numel()))[:length] if flat.numel() else x.new_zeros(length)
    return memory.as_strided(x.shape, strides)


def odd_strides(x: Tensor) -> Tensor:
    """Contiguous, with another stride where a dimension has one element: such a stride says nothing."""
    x = x.contiguous()
    return x.as_strided(x.shape, [7 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)])


LAYOUTS = {
    layout.__name__: layout
    for layout in (
        contiguous,
        channels_last,
        channel_slice,
        channels_last_slice,
        batch_slice,
        spatial_slice,
        permuted,
        expanded,
        expanded_images,
        expanded_channels,
        misaligned,
        overlapping,
        odd_strides,
    )
}


def strided(x: Tensor) -> Tensor:
    """The same numbers in a layout that no kernel reads in place."""
    return x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2]


class Source:
    """Draws tensors one after the other; the same seed gives the same ones."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-2, 3, shape, generator=self.generator).double()

    def index(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self.generator))

    def feature_map(self, shape: tuple[int, ...], settings: dict, spoiled: str | None = None) -> Tensor:
        """``(N, C, H, W)`` of the settings' values, dtype and layout; one element is ``spoiled`` where given."""
        dtype = dtype_of(settings["dtype"])
        x = self._values(shape, settings["values"], dtype).to(dtype).clone()
        if spoiled is not None and x.numel():
            x.view(-1)[self.index(x.numel())] = float(spoiled)
        return LAYOUTS[settings["layout"]](x)

    def _values(self, shape: tuple[int, ...], values: str, dtype: torch.dtype) -> Tensor:
        x = self.normal(shape)
        if values == "normal":
            zero = self.uniform(shape)
            return x.masked_fill(zero < 0.05, 0.0).masked_fill(zero > 0.95, -0.0)
        if values == "huge_pixel":
            if x.numel():
                x[self.index(shape[0]), :, self.index(shape[2]), self.index(shape[3])] *= 1e4
            return x
        made = {
            "integers": lambda: self.integers(shape),
            "large": lambda: 1e4 * x,
            "tiny": lambda: 1e-30 * x,
            "offset": lambda: 100 + 0.01 * x,
            "constant": lambda: torch.full(shape, 0.7, dtype=torch.float64),
            "constant_channels": lambda: self.normal((1, shape[1], 1, 1)).expand(shape),
            "denormal": lambda: self.integers(shape) * torch.finfo(dtype).smallest_normal / 4,
            "zeros": lambda: torch.zeros(shape, dtype=torch.float64).copysign(x),
        }
        return made[values]()

    def parameter(self, shape: tuple[int, ...], values: str) -> Tensor:
        """A weight or bias in float64."""
        if values == "identity":
            return torch.eye(*shape, dtype=torch.float64) if len(shape) == 2 else torch.zeros(shape).double()
        if values == "integers":
            return self.integers(shape)
        scale = {"normal": 1.0, "zeros": 0.0, "large": 1e4, "tiny": 1e-30}[values]
        return scale * self.normal(shape) / (math.prod(shape[1:]) ** 0.5)

    def mask(self, shape: tuple[int, ...], values: str) -> Tensor | None:
        """``>= 0``, in float64; peaked as a softmax that one element takes."""
        if values == "absent":
            return None
        if values == "zeros":
            return (self.uniform(shape) > 0.5).double()
        if values == "uniform":
            return 2 * self.uniform(shape)
        peaks = torch.softmax(20 * self.normal(shape).flatten(1), 1) if math.prod(shape) else torch.zeros(shape)
        return math.prod(shape[1:]) * peaks.double().reshape(shape)
