"""Builds, tests, measures and profiles the package on a GPU in one call: ``make gpu``.

    python -m scripts.gpu [--stages test bench] [--out FOLDER] [--deadline SECONDS] [--cache FOLDER] [--dry-run]

Ends with 0 if no stage failed, 1 if one did, 2 without a CUDA device and for a wrong argument, 130 if interrupted. What
is known is printed and stands in the folder's ``summary.json`` after each stage.
"""

import argparse
import datetime
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from pprint import pprint

try:
    import torch
except ModuleNotFoundError:
    sys.exit("PyTorch is not installed for this Python: give another one with PYTHON=")

from benchmarks.environment import environment
from benchmarks.results import write_json
from scripts.gpu.stages import ROOT, STAGES, THREADS, Context, Outcome, Stage
from scripts.gpu.triton_cache import entries, relocate

DEADLINE = 700.0  # seconds
COMPILE = "compile"  # the stage whose own figures say what it compiled
SAME = ("revision", "modified", "sources", "gpu", "torch")  # of the environments of runs that belong together


def summary_of(path: Path, facts: dict, names: list[str]) -> dict:
    """The summary of a run that begins.

    Stages that the run does not have stay as an earlier run left them in the same file, if the sources are the same.
    """
    found = earlier_stages(path, facts) | {name: {"status": "not run"} for name in names}
    in_order = {name: found[name] for name in dict.fromkeys([*STAGES, *found]) if name in found}
    return facts | {"complete": False, "stages": in_order}


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
    summary: dict,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the stages one after another, each within its limit and what the deadline leaves for it."""

    def note(stage: Stage, outcome: Outcome, seconds: float) -> None:
        summary["stages"][stage.name] = asdict(outcome) | {"seconds": round(seconds, 1)}
        write_json(context.summary, summary)

    end = clock() + deadline
    for index, stage in enumerate(stages):
        begin, reserved = clock(), sum(later.least for later in stages[index + 1 :])
        if end - begin < stage.least:
            note(stage, Outcome("skipped: out of time"), 0.0)
            continue
        print(f"{stage.name} ...", flush=True)
        note(stage, Outcome("interrupted"), 0.0)  # unless it comes to its end
        outcome = attempt(stage, context, min(stage.limit, max(stage.least, end - begin - reserved)))
        note(stage, outcome, clock() - begin)
        pprint(summary["stages"][stage.name], width=160, sort_dicts=False)
        sys.stdout.flush()
    summary["complete"] = True
    write_json(context.summary, summary)


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


def default_folder(dry_run: bool) -> Path:
    """Committed are results of a GPU alone."""
    if dry_run:
        return ROOT / "build" / "gpu-dry-run"
    name = torch.cuda.get_device_name()
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{words}-{datetime.date.today():%Y-%m-%d}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds for all stages together")
    parser.add_argument("--cache", type=Path, help="of `make gpu-cache`; it grows")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, on tiny inputs, building nothing")
    options = parser.parse_args(arguments)
    if not options.deadline > 0:
        parser.error(f"--deadline must be > 0 seconds, got {options.deadline:g}")
    if options.cache and not options.cache.is_dir():
        parser.error(f"there is no folder {options.cache}")
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = Path(options.out or default_folder(options.dry_run)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")  # of the latest run
    stages = [stage for stage in STAGES.values() if stage.name in options.stages]
    with tempfile.TemporaryDirectory() as folder:
        context = Context(out, Path(folder), options.dry_run, cache_of(options, Path(folder)))
        facts = {"environment": environment(context.device, THREADS), "dry_run": options.dry_run}
        facts["cache"] = {"given": bool(options.cache), "kernels": len(entries(context.cache))}
        summary = summary_of(context.summary, facts, [stage.name for stage in stages])
        try:
            check(stages, context, summary, options.deadline)
            code = int(any(summary["stages"][stage.name]["status"] == "failed" for stage in stages))
        except KeyboardInterrupt:
            print("interrupted")
            code = 130
    for name, entry in summary["stages"].items():
        print(f"{name:10} {entry['status']}")
    print(f"written to {out}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
