"""Builds, tests, measures and profiles the package on a GPU in one call; see ``make gpu``.

    python -m scripts.gpu [--stages test bench] [--out FOLDER] [--deadline SECONDS] [--dry-run]

The defaults come from the variables STAGES, OUT and DEADLINE. Ends with 0 if no stage failed, 1 if one did, 2 without
a CUDA device and for a wrong argument, 130 if interrupted. ``summary.json`` in the folder is complete at any time.
"""

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Optional

try:
    import torch
except ModuleNotFoundError:
    sys.exit("PyTorch is not installed for this Python: give another one with PYTHON=")

from benchmarks.environment import environment
from scripts.gpu.processes import Interrupted, interruptible
from scripts.gpu.stages import ROOT, STAGES, THREADS, TOLD, Context, Outcome, Stage

__all__ = ["Report", "check", "main", "parse", "shown"]

DEADLINE = 520.0  # seconds
COLUMNS = "{:<10} {:<11} {:>7}  {}"
SHOWN_FIGURES = 100  # characters
SAME = ("revision", "modified", "sources", "gpu", "torch")  # of the environments of runs that belong together


class Report:
    """The summary of a run, written anew after every change.

    Stages that the run does not have stay as an earlier run left them in the same file, if the sources are the same.
    """

    def __init__(self, path: Path, facts: dict, names: list[str]):
        self.path, self.names, self.content = path, names, facts | {"complete": False}
        entries = earlier_stages(path, facts) | {name: {"status": "not run"} for name in names}
        self.content["stages"] = {name: entries[name] for name in dict.fromkeys([*STAGES, *entries]) if name in entries}
        self.write()

    def begin(self, name: str) -> None:
        self.content["stages"][name] = {"status": "interrupted"}  # unless end() replaces it
        self.write()

    def end(self, name: str, outcome: Outcome, seconds: float) -> None:
        entry = {"status": outcome.status, "seconds": round(seconds, 1), "figures": outcome.figures}
        self.content["stages"][name] = entry | {"why": outcome.why}
        self.write()

    def finish(self) -> None:
        self.content["complete"] = True
        self.write()

    def write(self) -> None:
        """Replace the file as a whole, so that there is a valid one at any time."""
        partial = self.path.with_name("summary.partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    @property
    def failed(self) -> list[str]:
        return [name for name in self.names if self.content["stages"][name]["status"] == "failed"]


def earlier_stages(path: Path, facts: dict) -> dict[str, dict]:
    """What an earlier run of the same sources on the same machine has found; nothing otherwise."""
    try:
        before = json.loads(path.read_text())
        same = all(before["environment"].get(key) == facts["environment"].get(key) for key in SAME)
        return before["stages"] if same and before["dry_run"] == facts["dry_run"] else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def check(
    stages: list[Stage],
    context: Context,
    report: Report,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the stages one after another, each within its limit and what the deadline leaves for it."""
    end = clock() + deadline
    for index, stage in enumerate(stages):
        reserved = sum(later.least for later in stages[index + 1 :])
        left = end - clock()
        if left < stage.least:
            report.end(stage.name, Outcome("skipped: out of time"), 0.0)
            continue
        print(f"{stage.name} ...", flush=True)
        report.begin(stage.name)
        begin = clock()
        outcome = attempt(stage, context, min(stage.limit, max(stage.least, left - reserved)))
        report.end(stage.name, outcome, clock() - begin)
        for line in outcome.why[:TOLD]:
            print(f"  {line}", flush=True)
    report.finish()


def attempt(stage: Stage, context: Context, seconds: float) -> Outcome:
    """A stage's outcome; a mistake in the stage itself is one too, and does not end the run."""
    try:
        return stage.run(context, seconds)
    except Exception as error:
        return Outcome("failed", {}, [f"{type(error).__name__}: {error}"])


def table(report: Report) -> str:
    lines = [COLUMNS.format("stage", "status", "seconds", "figures")]
    for name, entry in report.content["stages"].items():
        status, _, reason = entry["status"].partition(": ")
        told = reason or shown(entry.get("figures", {}))
        lines.append(COLUMNS.format(name, status, entry.get("seconds", "–"), told).rstrip())
    return "\n".join(lines)


def shown(figures: dict) -> str:
    """The figures that are no tables of their own, as many as fit on a line."""
    text = ", ".join(f"{name} {value}" for name, value in figures.items() if not isinstance(value, (dict, list)))
    return text if len(text) <= SHOWN_FIGURES else text[: SHOWN_FIGURES - 1] + "…"


def default_folder(dry_run: bool) -> Path:
    """Committed are results of a GPU alone."""
    if dry_run:
        return ROOT / "build" / "gpu-dry-run"
    name = torch.cuda.get_device_name()
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{words}-{datetime.date.today():%Y-%m-%d}"


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu", description=__doc__.splitlines()[0])
    names = os.environ.get("STAGES", "").split()
    parser.add_argument("--stages", nargs="+", default=names, metavar="STAGE", help="all by default, or STAGES")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="folder of the results, or OUT")
    seconds = os.environ.get("DEADLINE") or DEADLINE
    parser.add_argument("--deadline", type=float, default=seconds, help="seconds for all stages, or DEADLINE")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, on tiny inputs, building nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if not options.deadline > 0:
        parser.error(f"--deadline must be > 0 seconds, got {options.deadline:g}")
    return options


def main(arguments: Optional[list[str]] = None) -> int:
    options = parse(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        print("no CUDA device")
        return 2
    out = Path(options.out or default_folder(options.dry_run)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")  # of the latest run
    stages = [stage for stage in STAGES.values() if not options.stages or stage.name in options.stages]
    with interruptible(), tempfile.TemporaryDirectory() as scratch:
        context = Context(out, Path(scratch), options.dry_run)
        facts = {"environment": environment(context.device, THREADS), "dry_run": options.dry_run}
        report = Report(out / "summary.json", facts, [stage.name for stage in stages])
        try:
            check(stages, context, report, options.deadline)
            code = 1 if report.failed else 0
        except Interrupted as interruption:
            print(f"interrupted by {interruption}")
            code = 130
    print(f"\n{table(report)}\nwritten to {out}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
