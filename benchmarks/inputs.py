"""What a suite is, and the maps that it runs on."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fbkd_ops import backends

# Feature maps of an 800x1344 image; the strides of P2..P6 are 4..64.
LEVELS = {
    "P2": (1, 256, 200, 336),
    "P3": (1, 256, 100, 168),
    "P4": (1, 256, 50, 84),
    "P5": (1, 256, 25, 42),
    "P6": (1, 256, 13, 21),
}
FINEST_STRIDE = 4  # an image has this many times the height and width of P2
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Largest error of an element, relative to its size and the RMS of its tensor: well above every correct
# implementation's rounding, well below any mistake in a formula.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
# Elements of a map, and pixels of all levels of one with non-local blocks, whose literal formula is quadratic in them.
MOST_CHECKED, MOST_CHECKED_PIXELS = 1 << 25, 16_000
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Implementation = Callable[..., Iterable[Tensor]]
"""A function of a suite's inputs, in order, to a tensor or a tuple of tensors."""


@dataclass(frozen=True)
class Case:
    """The map that a suite runs on. ``shape`` is (N, C, H, W); ``dtype`` and ``layout`` are names.

    A suite with non-local blocks has one pooling factor a level in ``strides``; the levels after the first are half as
    large as the one before. Without ``strides`` there is one map.
    """

    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    layout: str = "contiguous"
    device: str = "cpu"
    strides: tuple[int, ...] = ()

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        n, channels, height, width = self.shape
        factors = [2**level for level in range(max(1, len(self.strides)))]
        return [(n, channels, math.ceil(height / factor), math.ceil(width / factor)) for factor in factors]

    @property
    def title(self) -> str:
        names = {shape: name for name, shape in LEVELS.items()}
        ends = dict.fromkeys([self.shapes[0], self.shapes[-1]])
        words = ["..".join(names.get(shape, "x".join(map(str, shape))) for shape in ends)]
        if self.strides:
            pooled = any(stride > 1 for stride in self.strides)
            words.append(f"pooled by {', '.join(map(str, self.strides))}" if pooled else "without pooling")
        return " ".join([*words, self.dtype, self.layout])

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Beside 16-bit features the parameters are float32, as in training."""
        return torch.promote_types(getattr(torch, self.dtype), torch.float32)

    @property
    def map_bytes(self) -> int:
        """Of the first map."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def pixels(self) -> int:
        """Of all levels and images."""
        return sum(n * height * width for n, _, height, width in self.shapes)

    @property
    def checked(self) -> "Case":
        """The map on which results are checked: this one, unless it is too large for that or says too little.

        Another one has as many channels, unless those are very many. With non-local blocks it has several cells at
        each level but the last of a pyramid, ragged ones among them, and neither one image nor an inner width of 1:
        BatchNorm makes some of their gradients vanish. On more pixels float32 loses gradients of biases in rounding.
        """
        n, channels, height, width = self.shape
        if not self.strides:
            fits = math.prod(self.shape) <= MOST_CHECKED and channels <= 512
            smaller = (min(n, 2), min(channels, 512), min(height, 19), min(width, 28))
            return self if fits else replace(self, shape=smaller)
        if self._says_enough and self.pixels <= MOST_CHECKED_PIXELS:
            return self
        factor = 2 ** max(0, len(self.strides) - 4)
        return replace(self, shape=(2, min(max(channels, 32), 512), 39 * factor, 53 * factor))

    @property
    def _says_enough(self) -> bool:
        cells = [
            max(1, height // stride) * max(1, width // stride)
            for (_, _, height, width), stride in zip(self.shapes, self.strides, strict=True)
        ]
        return self.shape[0] > 1 and 32 <= self.shape[1] <= 512 and min(cells) > 1

    def features(self, seed: int, level: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed + 100 * level)
        x = torch.randn(self.shapes[level], generator=generator, device=self.device)
        return x.to(self.device, getattr(torch, self.dtype)).contiguous(memory_format=LAYOUTS[self.layout])

    def pyramid(self, seed: int) -> list[Tensor]:
        return [self.features(seed, level) for level in range(len(self.shapes))]


@dataclass(frozen=True)
class Cost:
    """The fewest bytes and floating-point operations that any implementation needs."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class Suite:
    """Implementations of one computation.

    ``op`` is the name in ``fbkd_ops.backends.FUNCTIONS``. Differentiable inputs are those that require a gradient.
    ``implementations`` makes them for a case, by name; the first is plain PyTorch, which the others' speed is compared
    with, ``reference`` the literal formula, which also takes float64 inputs in any case. An implementation that is a
    module is differentiated by its own parameters. ``cases`` are what is measured unless something else is asked for,
    ``brief`` what a run of minutes has instead, if not the same, without the peers ``not_in_brief``; ``strides`` a
    case's pooling factors by its shape. A suite without ``cost`` has no ceiling. ``checked_as`` names the suite in
    which the implementations of the same names are compared with the literal formula instead, and each backend by
    itself is measured; ``states`` are those of the CPU's memory to measure in. A CUDA graph can hold the calls of a
    ``capturable`` suite: none of them waits for the device.
    """

    op: str
    inputs: Callable[[Case], list[Tensor]]
    implementations: dict[str, Callable[[Case], Implementation]]
    cost: Callable[[Case], Cost] | None
    cases: tuple[Case, ...]
    strides: Callable[[tuple[int, int, int, int]], tuple[int, ...]] = lambda shape: ()
    tolerances: Mapping[str, float] = field(default_factory=lambda: TOLERANCES)
    checked_as: str = ""
    states: tuple[str, ...] = ("fresh", "warm")
    capturable: bool = True
    brief: tuple[Case, ...] = ()
    not_in_brief: tuple[str, ...] = ()

    @property
    def baseline(self) -> str:
        return next(iter(self.implementations))


def forced(function: Implementation, backend: str) -> Implementation:
    """``function`` with every op of the package on one backend."""

    def called(*arguments):
        with backends.use_backend(backend):
            return function(*arguments)

    return called
