"""What is known of each mutation, on disk after every step, and what follows from it."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from .mutation import Mutation, Selection

__all__ = ["Result", "Results", "summary"]

CAUGHT, SURVIVED, BROKEN = "caught", "survived", "broken"
SHARE = 0.95  # of the mutations have to be caught
SOURCES = {".cpp", ".cu", ".cuh", ".h", ".py"}

Tested = Mutation | Selection  # a selection: the tests on the sources as they are


@dataclass(frozen=True)
class Result:
    """What came of a mutation, or of tests on the sources as they are."""

    outcome: str  # "caught", "survived" or "broken": it could not be tested
    detail: str  # the test that failed, or why it is broken
    seconds: float


class Results:
    """Results in a JSON file. One counts until its mutation, the file with the fault or a file of its tests changes.

    ``root`` is the copy that is tested: the tree itself may be edited meanwhile.
    """

    def __init__(self, path: Path, root: Path):
        self.path, self.root = path, root
        self.content = json.loads(path.read_text()) if path.exists() else {}

    def find(self, tested: Tested) -> Result | None:
        """Return an earlier run's result, or None if there is none that still counts. A broken one never does."""
        entry = self.content.get(_key(tested))
        if entry is None or entry["outcome"] == BROKEN or entry["signature"] != self._signature(tested):
            return None
        return Result(**{name: value for name, value in entry.items() if name != "signature"})

    def store(self, tested: Tested, result: Result) -> None:
        self.content[_key(tested)] = {**vars(result), "signature": self._signature(tested)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".part")
        written.write_text(json.dumps(self.content, indent=2, sort_keys=True) + "\n")
        os.replace(written, self.path)

    def _signature(self, tested: Tested) -> str:
        """A digest of a mutation with its file and tests, or of tests with all sources that they can reach."""
        if isinstance(tested, Mutation):
            tests, texts, paths = tested.tests, [tested.text, tested.replacement], [self.root / tested.file]
        else:
            tests, texts = tested, []
            folders = [self.root / name for name in ("csrc", "src")]
            paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in SOURCES]
        digest = hashlib.sha256("\0".join([*texts, *tests.files, tests.keyword]).encode())
        for path in [*paths, *(self.root / path for path in tests.paths())]:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _key(tested: Tested) -> str:
    if isinstance(tested, Mutation):
        return tested.name
    return f"unchanged: {' '.join(tested.files)} -k {tested.keyword}"


def summary(mutations: list[Mutation], results: dict[str, Result]) -> tuple[list[str], bool]:
    """Return the last lines of a run, and whether it is good.

    Args:
        mutations: all that the run had.
        results: of those that were tested, by name.
    """
    by_outcome = {outcome: [] for outcome in (CAUGHT, SURVIVED, BROKEN)}
    for mutation in mutations:
        if mutation.name in results:
            by_outcome[results[mutation.name].outcome].append(mutation)
    survivors, broken = by_outcome[SURVIVED], by_outcome[BROKEN]
    missing = [mutation.name for mutation in mutations if mutation.name not in results]
    lines = [f"  survived: {each.name}: {each.reason or 'no reason is given'}" for each in survivors]
    lines += [f"  broken: {each.name}: {results[each.name].detail}" for each in broken]
    lines += [f"  not run: {name}" for name in missing]
    caught = len(by_outcome[CAUGHT])
    share = caught / len(mutations) if mutations else 1.0
    lines.append(
        f"mutants: {caught} of {len(mutations)} caught ({100 * share:.1f} %), {len(survivors)} survived, "
        f"{len(broken)} broken, {len(missing)} not run"
    )
    good = share >= SHARE and all(each.reason for each in survivors) and not broken and not missing
    return lines, good
