"""Draws cases of one target batch by batch, and tells what each batch has found, a line of JSON a batch.

python -m fuzz.worker cpu --seed 1 --first 0 --cases 1000 --current build/fuzz/current-cpu.json
"""

import argparse
import faulthandler
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["batches", "prepare"]

BATCH = 50
SHRINKING = 100  # cases that are tried to make a failing one smaller
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
        ``{"batch", "op", "cases", "failure"}`` after each batch; ``failure`` is None or ``{"case", "found"}``.
    """
    from .strategies import OPS

    tried, number = 0, first
    while tried < cases:
        op = OPS[target][number % len(OPS[target])]
        results: dict[str, str | None] = {}
        failure = _failure(target, op, seed * 1_000_003 + number, results, before or (lambda case: None), size)
        tried += len(results)
        yield {"batch": number, "op": op, "cases": len(results), "failure": failure}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first batch")
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--current", type=Path, required=True, help="receives each case before it is tried")
    arguments = parser.parse_args()
    prepare(arguments.target)
    import torch

    torch.set_num_threads(1)  # of the literal formula; a case has its own number

    def before(case: dict) -> None:
        arguments.current.write_text(json.dumps(case))
        faulthandler.dump_traceback_later(HANGS, exit=True)

    for report in batches(arguments.target, arguments.seed, arguments.first, arguments.cases, before):
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
