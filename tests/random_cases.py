"""A few of the random cases of `make fuzz`, for the tests."""

from fuzz import worker
from fuzz.__main__ import reproduction
from helpers import TEST_ALL

__all__ = ["assert_random_cases_are_right"]

# Cases of each op; `make test-all` tries more.
CASES = {"cpu": 5, "triton": 2, "cuda-source": 4}
if TEST_ALL:
    CASES = {"cpu": 25, "triton": 3, "cuda-source": 10}


def assert_random_cases_are_right(target: str) -> None:
    """Try the first batch of each op of a target; a failure says how to run its case again."""
    from fuzz.strategies import OPS

    failures = []
    for number, _ in enumerate(OPS[target]):
        (report,) = worker.batches(target, seed=0, first=number, cases=1, size=CASES[target])
        if report["failure"]:
            failures.append(f"{report['failure']['found']}\n{reproduction(report['failure']['case'])}")
    assert not failures, "\n".join(failures)
