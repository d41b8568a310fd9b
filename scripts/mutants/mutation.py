"""What a mutation is, and the tests that have to notice it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Selection:
    """The tests of one op: files of the folder ``tests``, and pytest's ``-k`` expression."""

    files: tuple[str, ...]
    keyword: str

    @property
    def name(self) -> str:
        """Of the result of these tests on the sources as they are."""
        return f"unchanged: {' '.join(self.files)} -k {self.keyword}"

    def paths(self) -> list[str]:
        return [f"tests/{file}" for file in self.files]


@dataclass(frozen=True)
class Mutation:
    """A fault: ``replacement`` in place of ``text``, which the file has exactly once."""

    name: str
    file: str  # relative to the repository's root
    tests: Selection
    text: str
    replacement: str
    reason: str | None = None  # why no test has to notice it; for a survivor that is accepted

    def apply(self, root: Path) -> None:
        """Write the mutated file.

        Raises:
            ValueError: the file has the text more than once, or not at all.
        """
        path = root / self.file
        source = path.read_text()
        if (found := source.count(self.text)) != 1:
            raise ValueError(f"{self.name}: {self.file} must have {self.text!r} once, but has it {found} times")
        path.write_text(source.replace(self.text, self.replacement))


def faults(prefix: str, file: str, tests: Selection, **texts: tuple[str, ...]) -> list[Mutation]:
    """Return the mutations of one file, by the last part of their names: text, replacement and maybe the reason."""
    return [Mutation(f"{prefix}.{name}", file, tests, *each) for name, each in texts.items()]
