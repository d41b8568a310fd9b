"""Short trainings of the demo's student, in float32 and under bfloat16 autocast, from several seeds.

    python -m benchmarks.autocast_training [--steps 120] [--seeds 0 1 2] [--image-size 96] [--csv FILE]

Both dtypes have the same teacher and, seed by seed, the same weights and batches. They are compared by the mean of each
loss over the last fifth of the steps.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from benchmarks.results import write
from examples.demo.detectors import STUDENT, TEACHER, build_detector
from examples.demo.digits import load_digit_scenes
from examples.demo.distillation import build_distiller
from examples.demo.training import Budget, train

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")
PRESET, STRENGTH = "two_stage", 0.3  # the demo's


class Autocast(nn.Module):
    """A model whose forward runs under autocast; its losses are float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *arguments) -> Mapping[str, Tensor]:
        with torch.autocast("cpu", self.dtype):
            losses = self.model(*arguments)
        return {name: loss.float() for name, loss in losses.items()}


def final_losses(losses: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each loss over the last fifth of the steps; ``detector`` is the sum of the student's own."""
    last = losses[-max(len(losses) // 5, 1) :]
    means = {name: statistics.mean(step[name] for step in last) for name in last[0]}
    terms = {name: value for name, value in means.items() if name.startswith("loss_fbkd_")}
    return terms | {"detector": sum(value for name, value in means.items() if name not in terms)}


def distilled(data, teacher: nn.Module, arguments: argparse.Namespace, seed: int, dtype: str) -> dict[str, float]:
    student = build_detector(STUDENT, len(data.classes), arguments.image_size, seed)
    torch.manual_seed(seed)
    model = build_distiller(student, teacher, [data.train[0][0]], PRESET, STRENGTH)
    if DTYPES[dtype] is not None:
        model = Autocast(model, DTYPES[dtype])
    return final_losses(train(model, data.train, Budget(arguments.steps, arguments.batch_size, seed), CPU).losses)


def compared(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of each loss in both dtypes over the seeds, and the standard deviation of float32's."""
    losses = runs.pivot_table(index="loss", columns="dtype", values="value", sort=False)
    spread = runs[runs["dtype"] == "float32"].groupby("loss")["value"].std()
    return losses.assign(deviation=spread, apart=(losses["bfloat16"] - losses["float32"]).abs() / spread)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--csv", type=Path, help="write the losses here, and their facts into a .json")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    data = load_digit_scenes(arguments.image_size, 400, 1)
    teacher = build_detector(TEACHER, len(data.classes), arguments.image_size, 0)
    train(teacher, data.train, Budget(arguments.steps, arguments.batch_size, 0), CPU)
    rows = [
        {"dtype": dtype, "seed": seed, "loss": name, "value": value}
        for dtype in DTYPES
        for seed in arguments.seeds
        for name, value in distilled(data, teacher, arguments, seed, dtype).items()
    ]
    print(compared(pd.DataFrame(rows)).to_string(float_format="%.4f"))
    if arguments.csv:
        size = {name: value for name, value in vars(arguments).items() if name != "csv"}
        write(arguments.csv, {"environment": environment("cpu", torch.get_num_threads()), "size": size}, rows)


if __name__ == "__main__":
    main()
