"""Compares random calls of the package with the literal formula in float64: ``make fuzz``.

    make fuzz                                          # 10 000 cases of the CPU's kernels, 500 of each other target
    make fuzz ARGS="--targets triton --cases 2000"     # more of one target
    make fuzz ARGS="--seed 7"                          # the same cases as another run with that seed
    PYTHONPATH=tests python -m fuzz --case '{...}'     # a single case, as it is printed where one fails

What is done is kept in ``build/fuzz``: an interrupted run goes on where it was, unless the code has changed.
Exit status 1 where a case failed.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from .worker import prepare

__all__ = ["main", "reproduction"]

ROOT = Path(__file__).resolve().parents[2]
GOALS = {"cpu": 10000, "triton": 500, "cuda-source": 500}
CODE = ("csrc", "src", "tests/fuzz", "tests/simt")
SECONDS_BETWEEN_LINES = 10


def reproduction(case: dict) -> str:
    """The command that runs one case alone."""
    return f"PYTHONPATH=tests {os.path.relpath(sys.executable)} -m fuzz --case '{json.dumps(case)}'"


def run_case(case: dict) -> int:
    """Run one case; 1 where it fails."""
    prepare(case["target"])
    from .check import mismatch_of

    found = mismatch_of(case)
    print(found or "right")
    return int(found is not None)


def digest_of_code() -> str:
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def load_state(path: Path, seed: int | None, goals: dict[str, int]) -> dict:
    """The state of an unfinished run of the same code and seed, or that of a new run."""
    code = digest_of_code()
    if path.exists():
        state = json.loads(path.read_text())
        unfinished = any(done_of(state, target)["cases"] < goal for target, goal in goals.items())
        if state["code"] == code and seed in (None, state["seed"]) and unfinished:
            return state
    return {"seed": random.SystemRandom().randrange(10**6) if seed is None else seed, "code": code, "targets": {}}


def done_of(state: dict, target: str) -> dict:
    return state["targets"].setdefault(target, {"batches": 0, "cases": 0, "seconds": 0.0, "failures": []})


def fuzz_target(target: str, goal: int, state: dict, path: Path) -> None:
    """Run workers until the target's goal is reached. A crash of one is a failure of the case that it was at."""
    done, current = done_of(state, target), path.parent / f"current-{target}.json"
    while done["cases"] < goal:
        command = [sys.executable, "-m", "fuzz.worker", target, f"--seed={state['seed']}", f"--first={done['batches']}"]
        command += [f"--cases={goal - done['cases']}", f"--current={current}"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"), str(ROOT / "src")))}
        current.unlink(missing_ok=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
            follow(worker, target, goal, state, path)
        if worker.returncode:
            if not current.exists():
                raise SystemExit(f"{target}: the worker ends with status {worker.returncode} before its first case")
            found = f"the process ends with status {worker.returncode}"
            take(
                state, target, {"cases": 1, "failure": {"case": json.loads(current.read_text()), "found": found}}, path
            )


def follow(worker: subprocess.Popen, target: str, goal: int, state: dict, path: Path) -> None:
    """Write down what a worker reports, and say how far it is."""
    started = said = time.monotonic()
    done = done_of(state, target)
    for line in worker.stdout:
        if not line.startswith("{"):  # from a library
            print(line, end="", flush=True)
            continue
        now = time.monotonic()
        done["seconds"] += now - started
        started = now
        take(state, target, json.loads(line), path)
        if now - said > SECONDS_BETWEEN_LINES or done["cases"] >= goal:
            print(f"{target}: {done['cases']} of {goal} cases, {len(done['failures'])} failed", flush=True)
            said = now


def take(state: dict, target: str, report: dict, path: Path) -> None:
    """Add a batch to the state, and print its failure."""
    done = done_of(state, target)
    done["batches"] += 1
    done["cases"] += report["cases"]
    if report["failure"]:
        done["failures"].append(report["failure"])
        print(f"{target}: {report['failure']['found']}\n  {reproduction(report['failure']['case'])}", flush=True)
    path.write_text(json.dumps(state, indent=1))


def write_result(state: dict, path: Path) -> None:
    """Put what the documentation shows of a run into the file, beside earlier runs' other targets."""
    import hypothesis
    import torch

    from benchmarks import environment

    facts = {"seed": state["seed"], "revision": environment.revision()}
    facts |= {"torch": torch.__version__, "hypothesis": hypothesis.__version__}
    result = json.loads(path.read_text()) if path.exists() else {}
    for target, done in state["targets"].items():
        numbers = {"cases": done["cases"], "failures": len(done["failures"])}
        result[target] = numbers | {"minutes": round(done["seconds"] / 60, 1)} | facts
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=tuple(GOALS), default=list(GOALS))
    parser.add_argument("--cases", type=int, help="of each target; 10000 of cpu and 500 of the others by default")
    parser.add_argument("--seed", type=int, help="by default that of an unfinished run, or a random one")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="where the state is kept")
    parser.add_argument("--result", type=Path, help="a file for what the documentation shows")
    parser.add_argument("--case", type=json.loads, help="run this case alone")
    arguments = parser.parse_args()
    if arguments.case is not None:
        return run_case(arguments.case)
    goals = {target: GOALS[target] if arguments.cases is None else arguments.cases for target in arguments.targets}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "state.json"
    state = load_state(path, arguments.seed, goals)
    print(f"seed {state['seed']}, state in {path}", flush=True)
    for target, goal in goals.items():
        fuzz_target(target, goal, state, path)
    if arguments.result:
        write_result(state, arguments.result)
    failures = sum(len(done["failures"]) for done in state["targets"].values())
    cases = sum(done["cases"] for done in state["targets"].values())
    print(f"fuzz: {cases} cases, {failures} failed (seed {state['seed']})")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
