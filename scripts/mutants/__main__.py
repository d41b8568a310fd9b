"""Checks that the tests notice small faults; see ``make mutants``.

    python -m scripts.mutants [--only NAME ...] [--result FILE] [--list]

Works on a copy of the sources in ``build/mutants``. A result is written as soon as it is known, so that an interrupted
run goes on where it was. Ends with 1 if fewer than 95 % of the mutations are caught, if one survives without a reason
in the list, or if one could not be tested.
"""

import argparse
import json
import re
import signal
import sys
import time
from pathlib import Path

from benchmarks import environment
from benchmarks.results import write_json
from scripts.gpu.processes import Done

from . import cpp, cuda, python, triton
from .mutation import Mutation, Selection
from .results import BROKEN, CAUGHT, SURVIVED, Result, Results, summary
from .sources import Sources

ROOT = Path(__file__).resolve().parents[2]
# Python first: what needs no compiler.
GROUPS = {
    "autograd and algebra": python.MUTATIONS,
    "Triton": triton.MUTATIONS,
    "CUDA": cuda.MUTATIONS,
    "C++": cpp.MUTATIONS,
}
FAILED_TESTS = 1  # pytest's exit status


def main(arguments: list[str] | None = None) -> int:
    mutations = [mutation for group in GROUPS.values() for mutation in group]
    parser = argparse.ArgumentParser(prog="make mutants", description="Checks that the tests notice small faults.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutations to test, by name or beginning of a name")
    parser.add_argument("--result", type=Path, help="a file to which this run's numbers are added")
    parser.add_argument("--list", action="store_true", help="print the mutations and test nothing")
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if not any(mutation.name.startswith(name) for mutation in mutations):
            parser.error(f"--only: no mutation is named {name!r}; --list prints the names")
    if options.only:
        mutations = [each for each in mutations if each.name.startswith(tuple(options.only))]
    if options.list:
        print(*(f"{mutation.name}  {mutation.file}" for mutation in mutations), sep="\n")
        return 0
    sources = Sources(ROOT, ROOT / "build" / "mutants" / "source")
    try:
        sources.refresh()
        found = run(mutations, sources, Results(sources.folder.parent / "results.json", sources.digest()))
    except KeyboardInterrupt:
        print("mutants: interrupted; the next run goes on from here")
        return 130
    lines, good = summary(mutations, found)
    print(*lines, sep="\n")
    if options.result:
        add_run(options.result, mutations, found)
    return 0 if good else 1


def add_run(path: Path, mutations: list[Mutation], found: dict[str, Result]) -> None:
    """Add what the documentation shows of a run to those in the file."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    groups = {}
    for name, group in GROUPS.items():
        outcomes = [found[each.name].outcome for each in group if each in mutations]
        groups[name] = {"faults": len(outcomes), "caught": outcomes.count(CAUGHT)}
    survivors = [each.name for each in mutations if found[each.name].outcome == SURVIVED]
    minutes = sum(found[each.name].seconds for each in mutations) / 60
    run = {"revision": environment.revision(), "groups": groups, "survivors": survivors, "minutes": round(minutes)}
    write_json(path, {"runs": [*runs, run]})


def run(mutations: list[Mutation], sources: Sources, results: Results) -> dict[str, Result]:
    """Test the mutations that have no result yet; return all results by name."""
    for number, mutation in enumerate(mutations, 1):
        if mutation.name not in results.by_name:
            results.store(mutation.name, _result(mutation, sources, results))
        result = results.by_name[mutation.name]
        done = f"[{number}/{len(mutations)}] {mutation.name}"
        print(f"{done}: {result.outcome} {result.seconds:.0f} s {result.detail}", flush=True)
    return results.by_name


def _result(mutation: Mutation, sources: Sources, results: Results) -> Result:
    tests = mutation.tests
    if tests.name not in results.by_name:
        results.store(tests.name, _tested(tests, sources))
    unchanged = results.by_name[tests.name]
    if unchanged.outcome != SURVIVED:
        return Result(BROKEN, f"without the mutation: {unchanged.detail}", 0.0)
    with sources.mutated(mutation):
        return _tested(tests, sources)


def _tested(tests: Selection, sources: Sources) -> Result:
    """Build the copy and run the tests on it."""
    begin = time.monotonic()
    why = sources.build()
    if why:
        return Result(BROKEN, why, time.monotonic() - begin)
    outcome, detail = verdict(sources.test(tests))
    return Result(outcome, detail, time.monotonic() - begin)


def verdict(done: Done) -> tuple[str, str]:
    """What the tests' exit status and output say: a failing test, a crash and an endless loop all catch a fault."""
    if done.timed_out:
        return CAUGHT, "the tests do not end"
    if done.returncode < 0:
        return CAUGHT, f"the tests crash with signal {-done.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.output, re.MULTILINE)
    if done.returncode == FAILED_TESTS and failed:
        return CAUGHT, failed.group(1)
    if done.returncode == 0 and re.search(r"\b\d+ passed", done.output):
        return SURVIVED, ""
    return BROKEN, " / ".join(["no test passed or failed", *done.last_lines(3)])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
