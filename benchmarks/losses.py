"""What a step of each loss takes: forward and backward of the whole module, in float32, on pyramids of several sizes.

    python -m benchmarks.losses [--threads 1 2] [--rows yolo ...] [--losses pkd ...] [--csv FILE]

Beside the same loss in plain PyTorch and, where both sides have one width, MMRazor's modules for it. All peers of a row
take turns in one process.
"""

import argparse
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import fbkd_ops
from benchmarks import mmrazor, small
from fbkd_ops.losses.feature_loss import FeatureLoss
from fbkd_ops.losses.registry import LOSSES

RESULT = Path(__file__).parent / "results" / "cpu-losses.csv"
SECONDS = 2.0
SMALL_ROWS = ("yolo n/s 160 px x4", "yolo n/s 640 px x4", "retinanet 128 px x2", "retinanet 512 px x2")
STRIDES = (4, 8, 16, 32, 64)
KINDS = {kind.term_names[0].split("_")[1]: kind for kind in LOSSES.values()}  # fbkd, pkd, ...


def rows() -> list[small.Row]:
    """Pyramids of small images, and that of one image of the usual size."""
    found = [row for row in small.rows() if row.name in SMALL_ROWS]
    sides = [(math.ceil(800 / stride), math.ceil(1344 / stride)) for stride in STRIDES]
    return [*found, small.pyramid("faster_rcnn 800x1344 px x1", "mmrazor", 1, [(256, 256)] * len(sides), sides)]


def loss_of(name: str, row: small.Row) -> FeatureLoss:
    if name == "fbkd":
        return row.loss()
    torch.manual_seed(0)
    widths = [[getattr(level, f"{side}_channels") for level in row.levels] for side in ("student", "teacher")]
    return KINDS[name](*widths)


def needed(loss: FeatureLoss, row: small.Row) -> list:
    """What the loss takes besides the features: boxes of a quarter of the image's sides, random scores."""
    generator = torch.Generator().manual_seed(2)
    finest, images = row.levels[0], row.levels[0].images
    size = 8 * finest.height, 8 * finest.width
    corners = torch.rand(images, 10, 2, generator=generator) * 0.75 * torch.tensor([size[1], size[0]])
    boxes = torch.cat([corners, corners + 0.25 * torch.tensor([size[1], size[0]])], dim=2)
    scores = [torch.rand(images, level.height, level.width, generator=generator) for level in row.levels]
    values = {"boxes": list(boxes), "image_size": size, "scores": scores}
    return [values[name] for name in loss.needs]


def our_step(loss: FeatureLoss, features: tuple[list[Tensor], list[Tensor]], others: list, backend: str) -> Callable:
    def forward() -> Tensor:
        with fbkd_ops.use_backend(backend):
            return sum(loss(*features, *others).values())

    return small.step(forward, [*features[0], *loss.parameters()])


class _Generated(nn.Module):
    """MMRazor's MGD: its connector, which generates, and its loss."""

    def __init__(self, width: int):
        super().__init__()
        modules = mmrazor.installed()
        self.connector = modules.mgd_connector.MGDConnector(width, width)
        self.loss = modules.mgd.MGDLoss()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(self.connector(student), teacher)


def their_step(name: str, row: small.Row, features: tuple[list[Tensor], list[Tensor]]) -> Callable[[], Tensor] | None:
    """MMRazor's; None where it has no such loss, or none of two widths."""
    if name == "fbkd" and row.has_one_width:
        return small.their_step(row, features)
    modules = mmrazor.installed()
    makers = {
        "pkd": lambda width: modules.pkd.PKDLoss(),
        "cwd": lambda width: modules.cwd.ChannelWiseDivergence(),
        "mgd": _Generated,
    }
    if name not in makers or not row.has_one_width:
        return None
    levels = nn.ModuleList(makers[name](level.teacher_channels) for level in row.levels)

    def forward() -> Tensor:
        return sum(level(s, t) for level, s, t in zip(levels, *features, strict=True))

    return small.step(forward, [*features[0], *levels.parameters()])


def measure_row(name: str, row: small.Row) -> dict[str, dict[str, float]]:
    features, loss = row.features(torch.float32), loss_of(name, row)
    others = needed(loss, row)
    runs = {
        "fbkd_ops": our_step(loss, features, others, "auto"),
        "reference": our_step(copy.deepcopy(loss), features, others, "reference"),
    }
    if name == "fbkd" and max(level.height * level.width for level in row.levels) > 10000:
        del runs["reference"]  # the matrix of all pairs of pixels
    else:
        small.check(runs)
    theirs = their_step(name, row, features)
    if theirs is not None:
        runs["mmrazor"] = theirs
    for run in runs.values():
        run()
    return small.measured(runs, SECONDS)


def measure(options: argparse.Namespace) -> Iterator[list[dict]]:
    """Yield the rows of each pyramid and loss, one per peer."""
    chosen = [row for row in rows() if not options.rows or any(row.name.startswith(name) for name in options.rows)]
    for threads, row, name in itertools.product(options.threads, chosen, options.losses):
        torch.set_num_threads(threads)
        state = {"row": row.name, "loss": name, "threads": threads}
        yield [state | {"peer": peer} | figures for peer, figures in measure_row(name, row).items()]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = small.parser(__doc__.splitlines()[0], [1, 2])
    parser.add_argument("--rows", nargs="+", help="those whose names begin so; all by default")
    parser.add_argument("--losses", nargs="+", choices=KINDS, default=list(KINDS))
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    small.report(measure(options), options)


if __name__ == "__main__":
    main()
