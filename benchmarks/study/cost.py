"""What a step of each arm costs: time in rounds, arm beside arm, and the memory of a process of its own.

    python -m benchmarks.study.cost digits

The protocol's ``time_factor`` is the quotient of the arms ``size_free`` and ``baseline``. Time is CPU time of one
thread. The teacher is untrained, which costs the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from benchmarks import results  # noqa: E402
from benchmarks.environment import environment  # noqa: E402
from benchmarks.memory import peak_bytes  # noqa: E402
from benchmarks.study import runs  # noqa: E402
from benchmarks.study.protocol import ARMS, COSTS_LIKE, SETTINGS, changed, recipe  # noqa: E402
from examples.demo.training import Budget, train  # noqa: E402

RESULTS = Path("benchmarks/results/cpu-study-cost.csv")
ROUNDS, STEPS = 12, 10  # a round has one step that measures the gradient share
SMALL = "teacher_pictures=40 pictures=40 val_pictures=1"
MEASURED = tuple(arm for arm in ARMS if arm not in COSTS_LIKE)


def milliseconds(name: str, arms: Sequence[str], rounds: int = ROUNDS, folder: Path | None = None) -> dict[str, float]:
    """Return the median over rounds of each arm's CPU time a step; the first round is not counted."""
    torch.set_num_threads(1)
    setting = changed(SETTINGS[name], SMALL)
    data = runs.load(setting, folder)
    teacher = None  # a plain student's training has none in its memory
    if any(recipe(arm).pull is not None for arm in arms):
        teacher = runs.detector(setting, "teacher", data, runs.TEACHER_SEED).eval()
    models = {arm: runs.student_of(setting, arm, 0, data, teacher)[1] for arm in arms}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds + 1):
        for arm, model in models.items():
            start = time.process_time()
            train(model, data.train, Budget(STEPS, setting.batch_size, 0), runs.CPU)
            times[arm].append((time.process_time() - start) / STEPS * 1000)
    return {arm: statistics.median(found[1:]) for arm, found in times.items()}


def peak_mb(name: str, arm: str, folder: Path | None = None) -> float:
    """Return the largest memory of a new process that trains an arm alone for a round."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_trained_peak, name, arm, folder).result()


def _trained_peak(name: str, arm: str, folder: Path | None) -> float:
    milliseconds(name, [arm], 1, folder)
    return peak_bytes() / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.cost", description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data", type=Path, metavar="PATH", help="the Pascal VOC folder of the blood cells")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="CSV", help="%(default)s")
    options = parser.parse_args(arguments)
    if (options.setting == "bccd") != (options.data is not None):
        parser.error("bccd needs --data, the folder of the set; the other settings take none")
    name, folder = options.setting, options.data
    rows = (
        [row for row in results.text_rows(options.output) if row["setting"] != name] if options.output.exists() else []
    )
    for arm, step in milliseconds(name, MEASURED, folder=folder).items():
        rows.append({"setting": name, "arm": arm, "ms": step, "peak_mb": peak_mb(name, arm, folder)})
        print(rows[-1], flush=True)
    facts = {"command": f"python -m benchmarks.study.cost {name}", "environment": environment("cpu", 1)}
    results.write(options.output, facts, rows)


if __name__ == "__main__":
    main()
