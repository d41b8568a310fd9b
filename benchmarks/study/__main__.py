"""Train what is missing of the study and write its results, one run at a time; an interrupted study goes on.

python -m benchmarks.study quick
python -m benchmarks.study bccd --data PATH --seeds 0-5 --jobs 2
python -m benchmarks.study digits --arms baseline --seeds 1000-1002 --change steps=2000 --output build/pilot.csv
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when PyTorch is loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import results  # noqa: E402
from benchmarks.environment import environment  # noqa: E402
from benchmarks.study import tables  # noqa: E402
from benchmarks.study.jobs import KEY, TEACHER, check_teacher, is_done, jobs_of, run  # noqa: E402
from benchmarks.study.protocol import ARMS, STUDIES  # noqa: E402

RESULTS, QUICK_RESULTS = Path("benchmarks/results/cpu-study.csv"), Path("build/study/quick.csv")


def finish(jobs: Sequence[Any], processes: int, output: Path, do: Callable[[Any], dict[str, Any]] = run) -> None:
    """Do the jobs that are missing in ``output``; write every line as soon as there is one.

    Args:
        jobs: the teacher's, then its students'.
        processes: how many are done at a time.
        output: the table.
        do: does a job in a process of its own, and returns its line.
    """
    rows: list[dict[str, Any]] = list(results.text_rows(output)) if output.exists() else []
    facts = {"command": "python -m benchmarks.study", "environment": environment("cpu", 1)}
    left = [job for job in jobs if not is_done(job, rows)]
    teachers, students = ([job for job in left if (job.arm == TEACHER) is wanted] for wanted in (True, False))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for stage in (teachers, students):
            if stage is students:
                check_teacher(jobs[0], rows)
            for done in as_completed([pool.submit(do, job) for job in stage]):
                row = _result(done, pool)
                rows = [each for each in rows if any(str(each[name]) != str(row[name]) for name in KEY)] + [row]
                results.write(output, facts, rows)
                print(", ".join(f"{name} {row[name]}" for name in (*KEY, "steps", "ap", "seconds")), flush=True)


def _result(done: Future, pool: Executor) -> dict[str, Any]:
    """Return a job's line; where it failed, what is left is not begun."""
    try:
        return done.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def seeds(text: str) -> range:
    """An argparse type: ``"0-7"`` or ``"3"``."""
    start, _, stop = text.partition("-")
    found = range(int(start), int(stop or start) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"expected FIRST-LAST with FIRST <= LAST, got {text!r}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("study", choices=STUDIES, help="a part of the study")
    add("--data", type=Path, metavar="PATH", help="the Pascal VOC folder of the blood cells")
    add("--arms", nargs="+", choices=ARMS, help="some of the part's")
    add("--seeds", type=seeds, metavar="FIRST-LAST", help="other seeds")
    add("--change", nargs="+", metavar="NAME=NUMBER", help="other numbers of the setting, for a pilot")
    add("--jobs", type=int, default=2, help="trainings at a time, a core each (%(default)s)")
    add("--output", type=Path, metavar="CSV", help=f"({RESULTS}, of the quick part {QUICK_RESULTS})")
    options = parser.parse_args(arguments)
    study = STUDIES[options.study]
    if (study.setting == "bccd") != (options.data is not None):
        parser.error("bccd needs --data, the folder of the set; the other parts take none")
    output = options.output or (QUICK_RESULTS if options.study == "quick" else RESULTS)
    study = study._replace(
        arms=tuple(options.arms or study.arms),
        seeds=options.seeds or study.seeds,
        changes=" ".join(sorted(options.change)) if options.change else study.changes,
    )
    finish(jobs_of(study, options.data), options.jobs, output)
    rows = tables.rows_of(results.read(output).rows, study)
    for arm in study.arms[1:]:
        print(f"{arm} minus baseline: {tables.difference(rows, arm, 'baseline')} AP")


if __name__ == "__main__":
    main()
