"""Compares random calls of the package with the literal formula in float64: ``make fuzz``.

    make fuzz                                          # 10 000 cases of the CPU's kernels, 500 of each other target
    make fuzz ARGS="--targets triton --cases 2000"     # more of one target
    make fuzz ARGS="--seed 7"                          # the same cases as another run with that seed
    PYTHONPATH=tests python -m fuzz --case '{...}'     # a single case, as it is printed where one fails

Exit status 1 where a case failed.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from .worker import find_failures, reproduction, run_case

GOALS = {"cpu": 10000, "triton": 500, "cuda-source": 500}


def fuzz_target(target: str, seed: int, cases: int) -> dict | None:
    """What a process of its own finds in a target's cases; None where it crashes, which fails the case it was at."""
    context = multiprocessing.get_context("spawn")
    with tempfile.NamedTemporaryFile() as current, ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(find_failures, target, seed, cases, current.name).result()
        except BrokenProcessPool:
            case = current.read()
            where = reproduction(json.loads(case)) if case else "before its first case"
            print(f"{target}: the process has crashed\n  {where}")
            return None


def write_result(path: Path, seed: int, found: dict[str, dict]) -> None:
    """Put what the documentation shows of a run into the file, beside earlier runs' other targets."""
    import hypothesis
    import torch

    from benchmarks import environment
    from benchmarks.results import write_json

    facts = {"seed": seed, "revision": environment.revision()}
    facts |= {"torch": torch.__version__, "hypothesis": hypothesis.__version__}
    before = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, before | {target: numbers | facts for target, numbers in found.items()})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=tuple(GOALS), default=list(GOALS))
    parser.add_argument("--cases", type=int, help="of each target; 10000 of cpu and 500 of the others by default")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--result", type=Path, help="a file for what the documentation shows")
    parser.add_argument("--case", type=json.loads, help="run this case alone")
    arguments = parser.parse_args()
    if arguments.case is not None:
        return run_case(arguments.case)
    print(f"seed {arguments.seed}", flush=True)
    found = {}
    for target in arguments.targets:
        found[target] = fuzz_target(
            target, arguments.seed, GOALS[target] if arguments.cases is None else arguments.cases
        )
    if arguments.result and all(found.values()):
        write_result(arguments.result, arguments.seed, found)
    return int(any(numbers is None or numbers["failures"] for numbers in found.values()))


if __name__ == "__main__":
    sys.exit(main())
