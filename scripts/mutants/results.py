"""What is known of each mutation, on disk after every step, and what follows from it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.results import write_json

from .mutation import Mutation

CAUGHT, SURVIVED, BROKEN = "caught", "survived", "broken"
SHARE = 0.95  # of the mutations have to be caught


@dataclass(frozen=True)
class Result:
    """What came of a mutation, or of tests on the sources as they are."""

    outcome: str  # "caught", "survived" or "broken": it could not be tested
    detail: str  # the test that failed, or why it is broken
    seconds: float


class Results:
    """Results by name in a JSON file, which count until the code changes; a broken one is of its own run alone."""

    def __init__(self, path: Path, code: str):
        self.path, self.code = path, code
        content = json.loads(path.read_text()) if path.exists() else {}
        known = content["results"] if content.get("code") == code else {}
        self.by_name = {name: Result(**each) for name, each in known.items() if each["outcome"] != BROKEN}

    def store(self, name: str, result: Result) -> None:
        self.by_name[name] = result
        results = {name: asdict(each) for name, each in self.by_name.items()}
        write_json(self.path, {"code": self.code, "results": results})


def summary(mutations: list[Mutation], results: dict[str, Result]) -> tuple[list[str], bool]:
    """Return the last lines of a run, and whether it is good."""
    caught, survivors, broken = (
        [each for each in mutations if results[each.name].outcome == outcome] for outcome in (CAUGHT, SURVIVED, BROKEN)
    )
    lines = [f"  survived: {each.name}: {each.reason or 'no reason is given'}" for each in survivors]
    lines += [f"  broken: {each.name}: {results[each.name].detail}" for each in broken]
    share, counts = len(caught) / len(mutations), f"{len(survivors)} survived, {len(broken)} broken"
    lines.append(f"mutants: {len(caught)} of {len(mutations)} caught ({100 * share:.1f} %), {counts}")
    return lines, share >= SHARE and all(each.reason for each in survivors) and not broken
