"""The loss at the sizes that people train with: YOLO and FPN pyramids of small images, float32 and bfloat16.

    python -m benchmarks.small [--threads 1 2] [--dtype float32 bfloat16] [--rows yolo ...] [--csv FILE]

Forward and backward of the whole loss, beside the literal formulas and, where both sides have one width, beside
MMRazor eager; then the relation term of each level in each of its forms. All peers of a row take turns in one process.
"""

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pandas as pd
import torch
from torch import Tensor, nn

import fbkd_ops
from benchmarks import mmrazor, results, timing
from benchmarks.environment import environment
from fbkd_ops.non_local import relation
from fbkd_ops.non_local.forms import RelationSizes, cheaper_form

FORMS = ("cells", "collapsed")
DTYPES = ("float32", "bfloat16")
RESULT = Path(__file__).parent / "results" / "cpu-small.csv"
# Seconds that a row's rounds may take, and the most rounds.
SECONDS, ROUNDS = 2.0, 25
LEVEL_SECONDS = 0.5
TOLERANCE = 1e-3

WIDTHS = {"n": (64, 128, 256), "s": (128, 256, 512), "m": (192, 384, 576)}
STRIDES = {"one_stage": (8, 4, 2, 2, 2), "mmrazor": (16, 8, 4, 4, 4)}
RATIOS = (0.25, 0.25, 0.5, 0.5, 0.5)
OTHER_TERMS = ("feature", "channel", "spatial")


class Level(NamedTuple):
    """Sizes of one level; ``stride`` fits the map."""

    images: int
    student_channels: int
    teacher_channels: int
    height: int
    width: int
    stride: int
    ratio: float

    @property
    def sizes(self) -> RelationSizes:
        cells = (self.height // self.stride) * (self.width // self.stride)
        inner = (max(1, int(channels * self.ratio)) for channels in (self.student_channels, self.teacher_channels))
        return RelationSizes(
            self.images, self.height * self.width, cells, self.student_channels, self.teacher_channels, *inner
        )


class Row(NamedTuple):
    """A pyramid and the preset that it is distilled with."""

    name: str
    preset: str
    levels: tuple[Level, ...]

    @property
    def has_one_width(self) -> bool:
        """As MMRazor needs it."""
        return all(level.student_channels == level.teacher_channels for level in self.levels)

    def loss(self, **overrides) -> fbkd_ops.FBKDLoss:
        torch.manual_seed(0)
        loss = fbkd_ops.FBKDLoss(
            [level.student_channels for level in self.levels],
            [level.teacher_channels for level in self.levels],
            preset=self.preset,
            stride=[level.stride for level in self.levels],
            inter_channels=[level.ratio for level in self.levels],
            **overrides,
        )
        for parameter in loss.parameters():  # at the start of training the non-local blocks are the identity
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 0.5, 0.1)
        return loss

    def features(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator().manual_seed(1)
        sides = [
            [
                torch.randn(level.images, channels, level.height, level.width, generator=generator).to(dtype)
                for level, channels in zip(self.levels, widths, strict=True)
            ]
            for widths in zip(*((level.student_channels, level.teacher_channels) for level in self.levels), strict=True)
        ]
        return [x.requires_grad_() for x in sides[0]], sides[1]


def fitting(stride: int, side: int) -> int:
    """The largest halving of ``stride`` that is no larger than the map: MMRazor's pools refuse larger ones."""
    while stride > side:
        stride //= 2
    return stride


def pyramid(name: str, preset: str, images: int, widths: list[tuple[int, int]], sides: list[tuple[int, int]]) -> Row:
    count = len(widths)
    constants = zip(widths, sides, STRIDES[preset][:count], RATIOS[:count], strict=True)
    levels = (Level(images, *pair, *side, fitting(stride, min(side)), ratio) for pair, side, stride, ratio in constants)
    return Row(name, preset, tuple(levels))


def rows() -> Iterator[Row]:
    for pair, pixels, images in itertools.product(("n/s", "n/m", "s/m"), (160, 320, 640), (4, 16)):
        widths = list(zip(*(WIDTHS[side] for side in pair.split("/")), strict=True))
        sides = [(pixels // stride,) * 2 for stride in (8, 16, 32)]
        yield pyramid(f"yolo {pair} {pixels} px x{images}", "one_stage", images, widths, sides)
    for (detector, finest), pixels in itertools.product((("retinanet", 8), ("faster_rcnn", 4)), (128, 256, 512)):
        sides = [(-(-pixels // (finest * 2**level)),) * 2 for level in range(5)]
        yield pyramid(f"{detector} {pixels} px x2", "mmrazor", 2, [(256, 256)] * 5, sides)
    for side in ((13, 21), (25, 42)):
        yield pyramid(f"1024 channels {side[0]}x{side[1]} x2", "mmrazor", 2, [(1024, 1024)], [side])


def step(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    """Forward and backward, gradients None before."""

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = forward()
        loss.backward()
        return loss.detach()

    return run


def our_step(loss: fbkd_ops.FBKDLoss, features: tuple[list[Tensor], list[Tensor]], backend: str = "auto") -> Callable:
    def forward() -> Tensor:
        with fbkd_ops.use_backend(backend):
            return sum(loss(*features).values())

    return step(forward, [*features[0], *loss.parameters()])


def in_form(run: Callable[[], Tensor], form: str) -> Callable[[], Tensor]:
    """``run`` with every level's relation term in one form."""

    def forced() -> Tensor:
        with mock.patch.object(relation, "cheaper_form", lambda sizes: form):
            return run()

    return forced


def their_step(row: Row, features: tuple[list[Tensor], list[Tensor]]) -> Callable[[], Tensor]:
    """MMRazor's, whose maps are cast to float32, for its parameters are."""
    reductions = [round(1 / level.ratio) for level in row.levels]
    loss = mmrazor.Loss(row.levels[0].student_channels, [level.stride for level in row.levels], reductions)

    def forward() -> Tensor:
        return loss(*([x.float() for x in side] for side in features))

    return step(forward, [*features[0], *loss.parameters()])


def check(runs: dict[str, Callable[[], Tensor]]) -> None:
    """Refuse to time what computes something else."""
    values = {name: float(run()) for name, run in runs.items() if name != "mmrazor"}
    worst = max(abs(value / values["reference"] - 1) for value in values.values())
    if not worst <= TOLERANCE:
        raise SystemExit(f"the peers disagree by {worst:.1e}: {values}")


def measured(runs: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, dict[str, float]]:
    """Per peer its milliseconds, and how many times as long the first one takes, round by round."""
    times = timing.interleaved(runs, ROUNDS, "cpu", seconds)
    first, ratio = next(iter(times.values())), "times_first"
    return {
        name: timing.summary(values, "ms") | {ratio: timing.ratios(values, first, ratio)[ratio]}
        for name, values in times.items()
    }


def measure_row(row: Row, dtype: str) -> dict[str, dict[str, float]]:
    features, loss = row.features(getattr(torch, dtype)), row.loss()
    runs = {"fbkd_ops": our_step(loss, features), "reference": our_step(copy.deepcopy(loss), features, "reference")}
    check(runs)
    if row.has_one_width:
        runs["mmrazor"] = their_step(row, features)
        runs["mmrazor"]()
    return measured(runs, SECONDS)


def measure_level(level: Level, dtype: str) -> dict[str, dict[str, float]]:
    """Of the relation term alone."""
    row = Row("", "mmrazor", (level,))
    loss, features = row.loss(**{f"{term}_weight": 0.0 for term in OTHER_TERMS}), row.features(getattr(torch, dtype))
    run = our_step(loss, features)
    runs = {form: in_form(run, form) for form in FORMS}
    check(runs | {"reference": our_step(copy.deepcopy(loss), features, "reference")})
    return measured(runs, LEVEL_SECONDS)


def chosen_form(level: Level, dtype: str) -> str:
    return cheaper_form(level.sizes._replace(repeats=dtype != "float32"))


def measure(options: argparse.Namespace) -> Iterator[list[dict]]:
    """Yield the rows of each pyramid and then of each level, one per peer: a level's have no ``row``."""
    chosen = [row for row in rows() if not options.rows or any(row.name.startswith(name) for name in options.rows)]
    levels = list(dict.fromkeys(level for row in chosen for level in row.levels))
    for threads, dtype in itertools.product(options.threads, options.dtype):
        torch.set_num_threads(threads)
        for what in (*chosen, *levels):
            is_level = isinstance(what, Level)
            facts = {"row": "" if is_level else what.name} | dict.fromkeys(Level._fields)
            facts |= what._asdict() if is_level else {}
            found = measure_level(what, dtype) if is_level else measure_row(what, dtype)
            state = facts | {"threads": threads, "dtype": dtype}
            yield [state | {"peer": peer} | figures for peer, figures in found.items()]


def parser(description: str, threads: list[int]) -> argparse.ArgumentParser:
    """The options that every benchmark with a ``report`` has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--threads", nargs="+", type=int, default=threads)
    made.add_argument("--csv", type=Path, help="write the figures here, and their facts into a .json")
    return made


def parse(words: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__.splitlines()[0], [1, 2])
    options.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    options.add_argument("--rows", nargs="+", help="those whose names begin so; all by default")
    return options.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    report(measure(options), options)


def report(measured: Iterator[list[dict]], options: argparse.Namespace) -> None:
    """Print each table as it comes, and write all so far into ``options.csv``, where there is one."""
    facts, made = {"environment": environment("cpu", max(options.threads))}, []
    for found in measured:
        print(pd.DataFrame(found).dropna(axis=1).to_string(index=False), flush=True)
        made += found
        if options.csv:
            results.write(options.csv, facts, made)


if __name__ == "__main__":
    main()
