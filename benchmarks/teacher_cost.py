"""What each way to make a teacher cheaper saves of a training step.

    python -m benchmarks.teacher_cost [--threads 2] [--size 320 512] [--csv FILE]

torchvision's Faster R-CNN with a ResNet-50 learns from one with a ResNet-101, both at random weights; all ways take
turns in one process. A turn is four steps, forward and backward: a teacher of every fourth step runs once in it.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fbkd_ops
from benchmarks import small
from benchmarks.inputs import FINEST_STRIDE, Case
from benchmarks.train_step import Step, images_of, make_detector

RESULT = Path(__file__).parent / "results" / "cpu-teacher-cost.csv"
STEPS, SECONDS = 4, 240.0
STUDENT, TEACHER = 50, 101  # layers of their ResNets
WAYS: dict[str, dict] = {
    "float32": {},
    "bfloat16": {"teacher_dtype": torch.bfloat16},
    "every 2nd step": {"teacher_every": 2},
    "every 4th step": {"teacher_every": 4},
    "compiled": {},
}


def case_of(size: tuple[int, int]) -> Case:
    """A picture whose pixels are ``size``."""
    return Case((1, 256, *(side // FINEST_STRIDE for side in size)))


def made(way: str, case: Case) -> tuple[Step, float]:
    """Return a student with its teacher, and the megabytes of the teacher's parameters."""
    student, teacher = make_detector(case, STUDENT), make_detector(case, TEACHER)
    if way == "compiled":
        teacher.backbone.compile()
    distiller = fbkd_ops.Distiller(
        student,
        teacher,
        fbkd_ops.FBKDLoss(256, num_levels=5),
        student_layers="backbone",
        teacher_entry="backbone",
        **WAYS[way],
    )
    megabytes = sum(parameter.numel() * parameter.itemsize for parameter in teacher.backbone.parameters()) / 1e6
    return Step(distiller, case), megabytes


def turn(step: Step, case: Case) -> Callable[[], None]:
    """Return what makes ``STEPS`` steps."""
    images = images_of(case)

    def run() -> None:
        for _ in range(STEPS):
            step.zero_grad()
            step(*images).backward()

    return run


def measure(options: argparse.Namespace) -> Iterator[list[dict]]:
    """Yield the rows of each number of threads, one per way and one for the student alone."""
    case = case_of(tuple(options.size))
    for threads in options.threads:
        torch.set_num_threads(threads)
        steps = {way: made(way, case) for way in WAYS}
        runs = {"no teacher": turn(Step(make_detector(case, STUDENT), case), case)}
        runs |= {way: turn(step, case) for way, (step, _) in steps.items()}
        for run in runs.values():
            run()
        found = small.measured(runs, SECONDS)
        state = {"pixels": "x".join(map(str, options.size)), "threads": threads}
        yield [
            state | {"way": way, "teacher_mb": steps[way][1] if way in steps else 0.0} | _per_step(figures)
            for way, figures in found.items()
        ]


def _per_step(figures: dict[str, float]) -> dict[str, float]:
    return {name: value / STEPS if name.startswith("ms") else value for name, value in figures.items()}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = small.parser(__doc__.splitlines()[0], [2])
    parser.add_argument("--size", nargs=2, type=int, default=[320, 512], help="height and width of the picture")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    small.report(measure(options), options)


if __name__ == "__main__":
    main()
