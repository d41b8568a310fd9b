"""Draws cases of one target batch by batch, and tells what each batch has found."""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

BATCH = 50
SHRINKING = 100  # cases that are tried to make a failing one smaller
SECONDS_BETWEEN_LINES = 10
HANGS = 600  # seconds after which a case counts as one that never ends


class Failure(Exception):
    """A case that went wrong, with what was found."""

    def __init__(self, case: dict, found: str):
        super().__init__(found)
        self.case, self.found = case, found


def prepare(target: str) -> None:
    """What has to be set before the package and Triton are imported."""
    if target == "triton":
        os.environ["TRITON_INTERPRET"] = "1"


def batches(
    target: str, seed: int, first: int, cases: int, before: Callable[[dict], None] | None = None, size: int = BATCH
) -> Iterator[dict]:
    """Run batches until that many cases were tried, one op after the other.

    Args:
        target: one of ``strategies.TARGETS``.
        seed: of everything that is drawn; a batch depends on it and on its own number only.
        first: number of the first batch.
        cases: how many cases to try at least; 0 gives nothing.
        before: called with each case before it is tried.
        size: cases a batch at most.

    Yields:
        ``{"cases", "failure"}`` after each batch; ``failure`` is None or ``{"case", "found"}``.
    """
    from .strategies import OPS

    tried, number = 0, first
    while tried < cases:
        op = OPS[target][number % len(OPS[target])]
        results: dict[str, str | None] = {}
        failure = _failure(target, op, seed * 1_000_003 + number, results, before or (lambda case: None), size)
        tried += len(results)
        yield {"cases": len(results), "failure": failure}
        number += 1


def _failure(
    target: str,
    op: str,
    seed: int,
    results: dict[str, str | None],
    before: Callable[[dict], None],
    size: int,
) -> dict | None:
    """The smallest failing case of a batch; ``results`` receives what was found for each case that was tried."""
    import hypothesis

    from .check import mismatch_of
    from .strategies import cases

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=size,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(case=cases(target, op))
    def explore(case: dict) -> None:
        key = json.dumps(case)
        if key not in results:
            if len(results) > size + SHRINKING:
                hypothesis.reject()
            before(case)
            results[key] = mismatch_of(case)
        if results[key] is not None:
            raise Failure(case, results[key])

    try:
        explore()
    except Failure as failure:
        return {"case": failure.case, "found": failure.found}
    return None


def find_failures(target: str, seed: int, cases: int, current: str) -> dict:
    """Try cases of a target, printing those that fail; return how many there were, and the minutes.

    The file ``current`` receives each case before it is tried.
    """
    prepare(target)
    import torch

    torch.set_num_threads(1)  # of the literal formula; a case has its own number

    def before(case: dict) -> None:
        Path(current).write_text(json.dumps(case))
        faulthandler.dump_traceback_later(HANGS, exit=True)

    begin = said = time.monotonic()
    tried, failures = 0, 0
    for report in batches(target, seed, 0, cases, before):
        tried += report["cases"]
        if failure := report["failure"]:
            failures += 1
            print(f"{target}: {failure['found']}\n  {reproduction(failure['case'])}", flush=True)
        if time.monotonic() - said > SECONDS_BETWEEN_LINES or tried >= cases:
            said = time.monotonic()
            print(f"{target}: {tried} of {cases} cases, {failures} failed", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return {"cases": tried, "failures": failures, "minutes": round((time.monotonic() - begin) / 60, 1)}


def run_case(case: dict) -> int:
    """Run one case; 1 where it fails."""
    prepare(case["target"])
    from .check import mismatch_of

    found = mismatch_of(case)
    print(found or "right")
    return int(found is not None)


def reproduction(case: dict) -> str:
    """The command that runs one case alone."""
    return f"PYTHONPATH=tests {os.path.relpath(sys.executable)} -m fuzz --case '{json.dumps(case)}'"
