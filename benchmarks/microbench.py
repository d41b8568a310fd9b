"""Times, memory and traffic of the ops beside plain PyTorch, torch.compile and what the machine can do.

    python benchmarks/microbench.py [--suite masked_l2 ...] [--shapes P2 1,256,50,84 ...] [--json FILE] [--plot FOLDER]

One table for each suite, map and state of memory; docs/performance.md says what the columns mean. Each is measured
in a process of its own. Without --shapes, --dtype, --layout, --pooling and --sweep a suite's own maps are taken.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks import plots, sweep  # noqa: E402
from benchmarks.environment import ROOT, environment, revision  # noqa: E402
from benchmarks.inputs import DTYPES, LAYOUTS, LEVELS, Case, Suite  # noqa: E402
from benchmarks.measurement import DOES_NOT_FIT, Job  # noqa: E402
from benchmarks.memory import STATES, states_of  # noqa: E402
from benchmarks.series import (  # noqa: E402
    CEILINGS,
    FASTER,
    OURS,
    is_pooled,
    is_slower,
    place_of,
    read_report,
    series,
    slower,
    slower_text,
    state_text,
)
from benchmarks.suites import PEERS, SUITES, peers_of  # noqa: E402

POOLINGS = ("preset", "none")
COLUMNS = ("forward ms", "× eager", "forward + backward ms", "× eager", "GB/s", "% of ceiling", "peak extra MB")


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
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="P2|N,C,H,W")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS)
    parser.add_argument("--pooling", nargs="+", choices=POOLINGS, help="in the suites that have non-local blocks")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="beside fbkd_ops; all that a suite has by default")
    parser.add_argument("--brief", action="store_true", help="fewer of the suites' own maps and peers")
    parser.add_argument(
        "--sweep",
        nargs="+",
        choices=sweep.DIMENSIONS,
        help=f"one size at a time away from a base case, in the suites {' and '.join(sweep.SUITES)}",
    )
    parser.add_argument("--json", type=Path, help="write the figures here, after each table")
    parser.add_argument("--update", action="store_true", help="keep what FILE has and this run does not measure")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the figures here, at the end")
    options = parser.parse_args(arguments)
    check_cases(parser, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU")
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def check_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the suites, and refuse what cannot be asked for together."""
    options.suite = options.suite or list(sweep.SUITES if options.sweep else SUITES)
    wrong = [name for name in options.suite if name not in sweep.SUITES]
    if options.sweep and wrong:
        parser.error(f"--sweep: expected suites among {', '.join(sweep.SUITES)}, got {', '.join(wrong)}")
    if options.sweep and options.shapes:
        parser.error("--sweep has shapes of its own: expected no --shapes beside it")
    if options.update and not options.json:
        parser.error("--update needs the file of --json")
    if options.brief and not own_maps(options):
        parser.error(
            "--brief takes the suites' own maps: expected none of --shapes, --dtype, --layout, --pooling, --sweep"
        )


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


def kept(path: Path, report: dict, jobs: list[Job]) -> dict:
    """The results of an earlier report that these jobs do not replace, and where those come from.

    Exits where they were measured on another machine or are of other kernels.
    """
    try:
        before = read_report(path)
    except ValueError as error:
        sys.exit(f"--update: {error}")
    for key in ("cpu", "gpu", "threads", "torch", "sources"):
        old, new = (facts.get(key) for facts in (before["environment"], report["environment"]))
        if old != new:
            sys.exit(f"--update: {path} was measured with {key} {old}, expected {new}")
    replaced = places_of(jobs)
    results = [x for x in before["results"] if place_of(x) not in replaced]
    run = {key: before[key] for key in ("command", "environment", "complete")}
    return {"results": results, "earlier": still_there([*before.get("earlier", []), run], replaced)}


def places_of(jobs: Iterable[Job]) -> set[tuple[str, str, str]]:
    """What tells their tables from others."""
    return {(job.suite, job.case.title, job.state) for job in jobs}


def still_there(runs: list[dict], replaced: set[tuple[str, str, str]]) -> list[dict]:
    """Those of which a later run, or what is ``replaced`` now, has left a table."""
    left, later = [], set(replaced)
    for run in reversed(runs):
        places = places_of(jobs_of(parse(shlex.split(run["command"])[2:])))
        if places - later:
            left.append(run)
        later |= places
    return left[::-1]


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
    case = asdict(job.case) | {"title": job.case.title}
    rows = {name: {"status": problem} for name in job.peers}
    return {"suite": job.suite, "case": case, "state": job.state, "peers": rows}


def spread(figure: dict | None, digits: int) -> str:
    """Median and, in brackets, the 20th and the 80th percentile."""
    if figure is None:
        return "–"
    median, low, high = (f"{figure[key]:.{digits}f}" for key in ("median", "p20", "p80"))
    return f"{median} ({low}–{high})"


def cells(peer: str, row: dict) -> list[str]:
    passes = [row[which] for which in ("forward", "step")]
    times = [spread(p["ms"], 2) + (FASTER if is_slower(peer, p) else "") for p in passes]
    timings = [text for time, p in zip(times, passes, strict=True) for text in (time, spread(p["speed_vs_eager"], 1))]
    rates, shares = "–", "–"
    if passes[0]["gb_s"] is not None:
        rates = " / ".join(f"{p['gb_s']:.1f}" for p in passes)
        shares = " / ".join(f"{p['ceiling_percent']:.0f}" for p in passes)
    peak = row.get("peak_extra_mb")
    return [*timings, rates, shares, "–" if peak is None else f"{peak:.0f}"]


def ceilings_text(result: dict) -> str:
    """One line on what the machine can do."""
    rates = result["ceilings"]
    parts = [f"{name} {rates[key]:.1f} {unit}" for key, (name, unit) in CEILINGS.items() if key in rates]
    if "copy_to_new_page_faults" in rates:
        parts.append(f"{rates['copy_to_new_page_faults']} page faults of the copy into new memory")
    return ", ".join(parts)


def table_of(result: dict):
    """A rich table of one suite on one map in one state of memory."""
    from rich.table import Table

    title = f"{result['suite']} · {result['case']['title']} · {state_text([result['state']])}"
    if "rounds" in result:
        title += f" · {result['rounds']} rounds"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("implementation", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, row in result["peers"].items():
        shown = cells(name, row) if row["status"] == "ok" else [row["status"]]
        table.add_row(name, *shown)
    captions = ["ceilings: " + ceilings_text(result)] if "ceilings" in result else []
    if result.get("baseline") == "reference":
        captions.append("× eager: beside reference")
    if slower([result]):
        captions.append(f"{FASTER.strip()} faster than {OURS}")
    table.caption = "\n".join(captions) or None
    return table


def findings(results: list[dict]) -> dict[str, list[dict]]:
    """What the results say together."""
    return {"scaling": scaling(results), "slower": slower(results)}


def scaling(results: list[dict]) -> list[dict]:
    """How time grows with the map, without pooling: each pair of neighbouring sizes in the same suite and state."""
    rows = []
    for group in series([result for result in results if result["case"]["strides"] and not is_pooled(result)], "H·W"):
        for (pixels, small), (more_pixels, large) in itertools.pairwise(group):
            sizes = ["x".join(map(str, result["case"]["shape"][2:])) for result in (small, large)]
            row = {"suite": small["suite"], "state": small["state"], "sizes": sizes, "pixels": more_pixels / pixels}
            rows.append(row | {"time": _growth(small["peers"], large["peers"])})
    return rows


def _growth(small: dict, large: dict) -> dict[str, float]:
    """Of each peer that has figures in both, the ratio of its times of forward and backward."""
    both = [name for name, row in small.items() if row["status"] == "ok" == large.get(name, {}).get("status")]
    return {name: large[name]["step"]["ms"]["median"] / small[name]["step"]["ms"]["median"] for name in both}


def console():
    """Where tables go; wide enough for them also where the output is no terminal."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        sys.exit("the tables need rich: pip install rich")
    return Console(width=None if sys.stdout.isatty() else 160)


def save(path: Path | None, report: dict) -> None:
    """Replace the file as a whole, so that an interrupted run leaves the last complete one."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(path)


def draw(options: argparse.Namespace, report: dict, output) -> None:
    if options.plot:
        name = options.json.stem if options.json else f"{options.device}-microbench"
        for line in plots.draw(report, options.plot, name):
            output.print(line)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    output = console()
    if options.plot:
        plots.require_matplotlib()
    command = shlex.join(["python", "benchmarks/microbench.py", *(sys.argv[1:] if arguments is None else arguments)])
    report = {"command": command, "environment": environment(options.device, options.threads), "complete": False}
    jobs = list(jobs_of(options))
    report |= kept(options.json, report, jobs) if options.update else {"results": []}
    report |= findings(report["results"])
    first, checked = len(report["results"]), {}
    save(options.json, report)
    try:
        for job in jobs:
            known = checked.setdefault(job.check, {})
            result = measured(replace(job, checked=known))
            known |= result.pop("checked", {})
            report["results"].append(result)
            report |= findings(report["results"])
            save(options.json, report)
            output.print(table_of(report["results"][-1]))
    except KeyboardInterrupt:
        draw(options, report, output)
        sys.exit(f"interrupted after {len(report['results']) - first} tables")
    for row in report["scaling"]:
        growth = ", ".join(f"{name} {ratio:.1f}" for name, ratio in row["time"].items())
        output.print(
            f"{row['suite']}, {state_text([row['state']])}, {' to '.join(row['sizes'])}, "
            f"{row['pixels']:.1f} times the pixels: time × {growth or '–'}"
        )
    report["complete"] = True
    if revision() != report["environment"]["revision"]:
        report["environment"]["modified"] = True  # of a mixture
    save(options.json, report)
    draw(options, report, output)
    for line in slower_text(report["slower"]):
        output.print(line)


if __name__ == "__main__":
    main()
