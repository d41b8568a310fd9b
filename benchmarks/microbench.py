"""Times, memory and traffic of the ops beside plain PyTorch, torch.compile and what the machine can do.

    python benchmarks/microbench.py [--suite masked_l2 ...] [--shapes P2 1,256,50,84 ...] [--csv FILE] [--plot FOLDER]

One table for each suite, map and state of memory; docs/performance.md says what the columns mean. Each is measured
in a process of its own. Without --shapes, --dtype, --layout, --pooling and --sweep a suite's own maps are taken.
"""

import argparse
import importlib
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from benchmarks import results, sweep, tables  # noqa: E402
from benchmarks.environment import ROOT, environment, revision  # noqa: E402
from benchmarks.inputs import DTYPES, LAYOUTS, LEVELS, Case, Suite  # noqa: E402
from benchmarks.measurement import DOES_NOT_FIT, Job, empty_rows  # noqa: E402
from benchmarks.memory import STATES, states_of  # noqa: E402
from benchmarks.results import OURS, PLACE, state_text  # noqa: E402
from benchmarks.suites import PEERS, SUITES, peers_of  # noqa: E402

POOLINGS = ("preset", "none")
SAME = ("cpu", "gpu", "threads", "torch", "sources")  # facts of results that may stand in one file


def shape_of(text: str) -> tuple[int, ...]:
    """The shape that ``P3`` or ``1,256,100,168`` names."""
    if text in LEVELS:
        return LEVELS[text]
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {', '.join(LEVELS)} nor N,C,H,W")
    return tuple(map(int, sizes))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count()), help="of the CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="begin no new round after these; 3 at least are made"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--shapes", nargs="+", type=shape_of, metavar="P2|N,C,H,W")
    sizes.add_argument("--sweep", nargs="+", choices=sweep.DIMENSIONS, help="one size at a time away from a base case")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS)
    parser.add_argument("--pooling", nargs="+", choices=POOLINGS, help="in the suites that have non-local blocks")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="beside fbkd_ops; all that a suite has by default")
    parser.add_argument("--brief", action="store_true", help="fewer of the suites' own maps and peers")
    parser.add_argument("--csv", type=Path, help="write the figures here, after each table, and facts into a .json")
    parser.add_argument("--update", action="store_true", help="keep what FILE has and this run does not measure")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the figures of --csv here, at the end")
    options = parser.parse_args(arguments)
    options.suite = options.suite or list(sweep.SUITES if options.sweep else SUITES)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    if options.sweep and not set(options.suite) <= set(sweep.SUITES):
        parser.error(f"--sweep: expected suites among {', '.join(sweep.SUITES)}, got {', '.join(options.suite)}")
    if options.brief and not own_maps(options):
        parser.error("--brief is of the suites' own maps: expected no --shapes, --dtype, --layout, --pooling, --sweep")
    if options.csv and options.csv.suffix != ".csv":
        parser.error(f"--csv: expected a file FILE.csv, got {options.csv}")
    for name in ("update", "plot"):
        if getattr(options, name) and not options.csv:
            parser.error(f"--{name} needs the file of --csv")
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def own_maps(options: argparse.Namespace) -> bool:
    return not (options.shapes or options.dtype or options.layout or options.pooling or options.sweep)


def cases_of(suite: Suite, options: argparse.Namespace) -> list[Case]:
    if own_maps(options):
        own = (options.brief and suite.brief) or suite.cases
        return [replace(case, device=options.device) for case in own]
    cases = []
    for dtype, layout, pooling in itertools.product(
        options.dtype or ["float32"], options.layout or ["contiguous"], options.pooling or POOLINGS[:1]
    ):
        for case in shaped(suite, options, dtype=dtype, layout=layout, device=options.device):
            cases.append(case if pooling == "preset" else replace(case, strides=(1,) * len(case.strides)))
    return list(dict.fromkeys(cases))  # without non-local blocks poolings do not differ; a sweep's base comes often


def shaped(suite: Suite, options: argparse.Namespace, **facts) -> list[Case]:
    """A case for each shape that is asked for, with the preset's pooling; ``facts`` are its other fields."""
    if options.sweep:
        return [case for dimension in options.sweep for case in sweep.cases(suite, dimension, **facts)]
    return [Case(shape, strides=suite.strides(shape), **facts) for shape in options.shapes or [LEVELS["P2"]]]


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    for name in options.suite:
        left_out = SUITES[name].not_in_brief if options.brief else ()
        own = [peer for peer in peers_of(SUITES[name], options.device) if peer not in left_out]
        peers = list(dict.fromkeys([*(options.peers or own), OURS]))
        states = states_of(options.device, SUITES[name].states, SUITES[name].capturable)
        for case, state in itertools.product(cases_of(SUITES[name], options), states):
            yield Job(name, case, state, peers, options.threads, options.rounds, options.seconds)


def kept(path: Path, run: dict, jobs: list[Job]) -> tuple[list[dict], list[dict]]:
    """Return the rows of an earlier result that these jobs do not replace, and the runs that those come from.

    Exits where they were measured on another machine or are of other kernels.
    """
    try:
        before = results.read_facts(path)
    except ValueError as error:
        sys.exit(f"--update: {error}")
    for key in SAME:
        old, new = (facts.get(key) for facts in (before["environment"], run["environment"]))
        if old != new:
            sys.exit(f"--update: {path} was measured with {key} {old}, expected {new}")
    replaced = {(job.suite, job.case.title, job.state) for job in jobs}
    rows = [row for row in results.text_rows(path) if tuple(row[name] for name in PLACE) not in replaced]
    dates = {row["date"] for row in rows}
    runs = [*before.pop("earlier", []), before]
    return rows, [earlier for earlier in runs if earlier["environment"]["date"] in dates]


def measured(job: Job) -> dict:
    """The result of a job. A peer that CUDA cannot capture is left out, and the others get a new process."""
    result = measured_once(job)
    while "uncaptured" in result:
        job = replace(job, uncaptured=job.uncaptured | result["uncaptured"])
        result = measured_once(job)
    return result


def measured_once(job: Job) -> dict:
    """What a process has made of a job; the process begins in the job's state."""
    variables = os.environ | STATES[job.state] | {"OMP_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "benchmarks.measurement"]
    text = json.dumps(asdict(job))
    done = subprocess.run(command, input=text, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or [""])[-1]
    problem = f"failed: {last}" if done.returncode > 0 else f"killed by signal {-done.returncode}; maybe {DOES_NOT_FIT}"
    return {"rows": empty_rows(job, dict.fromkeys(job.peers, problem))}


def table_of(rows: list[dict]) -> str:
    """One suite on one map in one state of memory, as text."""
    found = pd.DataFrame(rows)
    return f"{state_text(found['state'].unique())}\n\n{tables.suite_tables(found)}\n"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    plots = importlib.import_module("benchmarks.plots") if options.plot else None  # fails now and not at the end
    command = shlex.join(["python", "benchmarks/microbench.py", *(sys.argv[1:] if arguments is None else arguments)])
    facts = {"command": command, "environment": environment(options.device, options.threads), "complete": False}
    jobs, checked, made = list(jobs_of(options)), {}, []
    before, facts["earlier"] = kept(options.csv, facts, jobs) if options.update else ([], [])

    def save() -> None:
        if options.csv:
            results.write(options.csv, facts, [*before, *made])

    def draw() -> None:
        if plots and (made or before):
            print("drawn:", *plots.draw(results.read(options.csv), options.plot, options.csv.stem))

    save()
    try:
        for job in jobs:
            known = checked.setdefault(job.check, {})
            found = measured(replace(job, checked=known))
            known |= found.get("checked", {})
            made += [{"date": facts["environment"]["date"]} | row for row in found["rows"]]
            save()
            print(table_of(found["rows"]), flush=True)
    except KeyboardInterrupt:
        draw()
        sys.exit(f"interrupted after {len({tuple(row[name] for name in PLACE) for row in made})} tables")
    facts["complete"] = True
    if revision() != facts["environment"]["revision"]:
        facts["environment"]["modified"] = True  # of a mixture
    save()
    draw()
    if made:
        print(tables.slower_table(pd.DataFrame(made)))


if __name__ == "__main__":
    main()
