"""Builds, tests, measures and profiles the package on a GPU in one call; see ``make gpu``.

    python -m scripts.gpu [--stages test bench] [--out FOLDER] [--deadline SECONDS] [--cache FOLDER] [--wheels FOLDER]
        [--dry-run]

The defaults come from the variables STAGES, OUT, DEADLINE, CACHE and WHEELS. Ends with 0 if no stage failed, 1 if one
did, 2 without a CUDA device and for a wrong argument, 130 if interrupted. What is known is printed and stands in the
folder's ``summary.json`` after each stage.
"""

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    sys.exit("PyTorch is not installed for this Python: give another one with PYTHON=")

from benchmarks.environment import environment
from benchmarks.results import write_json
from scripts.gpu.processes import Interrupted, interruptible
from scripts.gpu.stages import PYTHON, ROOT, STAGES, THREADS, TOLD, Context, Outcome, Stage, missing_requirements
from scripts.gpu.triton_cache import entries, relocate

DEADLINE = 700.0  # seconds
COLUMNS = "{:<10} {:<11} {:>7}  {}"
SHOWN_FIGURES = 120  # characters
COMPILE = "compile"  # the stage whose own figures say what it compiled
SAME = ("revision", "modified", "sources", "gpu", "torch")  # of the environments of runs that belong together


class Report:
    """The summary of a run, written anew after every change.

    Stages that the run does not have stay as an earlier run left them in the same file, if the sources are the same.
    """

    def __init__(self, path: Path, facts: dict, names: list[str]):
        self.path, self.names, self.content = path, names, facts | {"complete": False}
        entries = earlier_stages(path, facts) | {name: {"status": "not run"} for name in names}
        self.content["stages"] = {name: entries[name] for name in dict.fromkeys([*STAGES, *entries]) if name in entries}
        write_json(path, self.content)

    def note(self, name: str, outcome: Outcome, seconds: float) -> None:
        self.content["stages"][name] = asdict(outcome) | {"seconds": round(seconds, 1)}
        write_json(self.path, self.content)

    def finish(self) -> None:
        self.content["complete"] = True
        write_json(self.path, self.content)

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
        begin, reserved = clock(), sum(later.least for later in stages[index + 1 :])
        if end - begin < stage.least:
            report.note(stage.name, Outcome("skipped: out of time"), 0.0)
            continue
        print(f"{stage.name} ...", flush=True)
        report.note(stage.name, Outcome("interrupted"), 0.0)  # unless it comes to its end
        outcome = attempt(stage, context, min(stage.limit, max(stage.least, end - begin - reserved)))
        report.note(stage.name, outcome, clock() - begin)
        told = [row(stage.name, report.content["stages"][stage.name]), *details(outcome.figures)]
        print("\n".join([*told, *(f"  {line}" for line in outcome.why[:TOLD])]), flush=True)
    report.finish()


def attempt(stage: Stage, context: Context, seconds: float) -> Outcome:
    """A stage's outcome, with the kernels that it compiled; a mistake in the stage itself does not end the run."""
    before = entries(context.cache)
    try:
        outcome = stage.run(context, seconds)
    except Exception as error:
        outcome = Outcome("failed", {}, [f"{type(error).__name__}: {error}"])
    if stage.name != COMPILE and (compiled := len(entries(context.cache).keys() - before.keys())):
        outcome.figures["kernels_not_in_cache"] = compiled
    return outcome


def table(report: Report) -> str:
    rows = [row(name, entry) for name, entry in report.content["stages"].items()]
    return "\n".join([COLUMNS.format("stage", "status", "seconds", "figures"), *rows])


def row(name: str, entry: dict) -> str:
    """A stage's line of the table; figures that are tables of their own are told when it ends."""
    status, _, reason = entry["status"].partition(": ")
    told = reason or shown(entry.get("figures", {}))[:SHOWN_FIGURES]
    return COLUMNS.format(name, status, entry.get("seconds", "–"), told).rstrip()


def shown(figures: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items() if not isinstance(value, dict))


def details(figures: dict, indent: str = "  ") -> list[str]:
    """The tables among a stage's figures, a line each row."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}: {shown(value)}".rstrip(": "), *details(value, indent + "  ")]
    return lines


def unpacked(wheels: Path, scratch: Path) -> Path:
    """A folder for PYTHONPATH with the packages of the wheels in a folder; nothing else is installed or asked for.

    Raises:
        SystemExit: there are none, or pip cannot install them.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        sys.exit(f"WHEELS: there is no *.whl in {wheels}")
    target = scratch / "packages"
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), *files], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"WHEELS: {done.stderr.strip()}")
    sys.path.insert(0, str(target))  # the summary names their versions
    importlib.invalidate_caches()
    return target


def default_folder(dry_run: bool) -> Path:
    """Committed are results of a GPU alone."""
    if dry_run:
        return ROOT / "build" / "gpu-dry-run"
    name = torch.cuda.get_device_name()
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{words}-{datetime.date.today():%Y-%m-%d}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu", description=__doc__.splitlines()[0])
    told = {name: os.environ.get(name) or None for name in ("STAGES", "OUT", "DEADLINE", "CACHE", "WHEELS")}
    stages = (told["STAGES"] or " ".join(STAGES)).split()
    parser.add_argument("--stages", nargs="+", default=stages, metavar="STAGE", help="all by default, or STAGES")
    parser.add_argument("--out", type=Path, default=told["OUT"], help="folder of the results, or OUT")
    parser.add_argument("--deadline", type=float, default=told["DEADLINE"] or DEADLINE, help="seconds, or DEADLINE")
    parser.add_argument("--cache", type=Path, default=told["CACHE"], help="of `make gpu-cache`, or CACHE; it grows")
    parser.add_argument("--wheels", type=Path, default=told["WHEELS"], help="folder of packages to use, or WHEELS")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, on tiny inputs, building nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if not options.deadline > 0:
        parser.error(f"--deadline must be > 0 seconds, got {options.deadline:g}")
    for folder in filter(None, (options.cache, options.wheels)):
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}")
    return options


def cache_of(options: argparse.Namespace, scratch: Path) -> Path:
    """The folder that Triton compiles into: the one that was given, or one that stays for the next run."""
    if options.cache:
        cache = options.cache.resolve()
        print(f"Triton's cache: {len(entries(cache))} kernels, {relocate(cache)} moved here")
        return cache
    return scratch / "triton-cache" if options.dry_run else ROOT / "build" / "triton-cache"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        print("no CUDA device")
        return 2
    out = Path(options.out or default_folder(options.dry_run)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")  # of the latest run
    stages = [stage for stage in STAGES.values() if stage.name in options.stages]
    with interruptible(), tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        packages = unpacked(options.wheels.resolve(), scratch) if options.wheels else None
        context = Context(out, scratch, options.dry_run, cache_of(options, scratch), packages)
        missing = missing_requirements()
        for line in missing:
            print(line, flush=True)
        facts = {"environment": environment(context.device, THREADS), "dry_run": options.dry_run}
        facts |= {"missing": missing, "cache": {"given": bool(options.cache), "kernels": len(entries(context.cache))}}
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
