"""A copy of the source tree that is mutated in place of the tree itself, and its compiled library."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.environment import digest
from scripts.gpu.processes import Done, run_together

from .mutation import Mutation, Selection

FOLDERS = ("benchmarks", "csrc", "examples", "scripts", "src", "tests")
FILES = ("README.md", "pyproject.toml", "setup.py")
MADE = {".so", ".pyc"}  # by a build or a run, and never copied
BUILD_SECONDS, TEST_SECONDS = 1800, 600


class Sources:
    """The copy in ``folder`` of the tree in ``root``."""

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root, folder
        self.built = folder.parent / "built"  # names the sources that the library was made of

    def refresh(self) -> None:
        """Make the copy equal to the tree. Equal files keep their dates, so that nothing is compiled without need."""
        paths = {path.relative_to(self.root) for path in _files(self.root)}
        for path in [path for path in _files(self.folder) if path.relative_to(self.folder) not in paths]:
            path.unlink()
        for path in sorted(paths):
            _copy(self.root / path, self.folder / path)

    @contextlib.contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """Put the mutation into the copy for as long as the block runs."""
        path = self.folder / mutation.file
        original = path.read_bytes()
        mutation.apply(self.folder)
        try:
            yield
        finally:
            path.write_bytes(original)

    def build(self) -> str:
        """Compile what the library was not made of; return why that failed, or an empty string."""
        wanted = digest(self.folder, ("setup.py", "csrc/*.h", "csrc/*.cpp", "csrc/cpu"))  # without CUDA
        if self.built.exists() and self.built.read_text() == wanted:
            return ""
        self.built.unlink(missing_ok=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        (done,) = run_together([command], BUILD_SECONDS, self.folder, {"FBKD_OPS_CUDA": "0"})
        if done.problem:
            return "\n".join(["the build failed: " + done.problem, *done.last_lines(20)])
        self.built.write_text(wanted)
        return ""

    def test(self, tests: Selection) -> Done:
        """Run the tests on the copy up to the first failure."""
        options = ["-o", "addopts=", "-q", "-x", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, *tests.paths(), "-k", tests.keyword]
        # Python tells a changed file from its compiled form by whole seconds and size: no such form is written.
        variables = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(self.folder / "src")}
        (done,) = run_together([command], TEST_SECONDS, self.folder, variables)
        return done

    def digest(self) -> str:
        """Return a digest of all that a result depends on."""
        return digest(self.folder, ("csrc", "src", "tests", "scripts/mutants", "setup.py"))


def _files(root: Path) -> list[Path]:
    found = [path for folder in FOLDERS for path in (root / folder).rglob("*")]
    found = [path for path in found if path.is_file() and path.suffix not in MADE]
    return found + [root / name for name in FILES if (root / name).exists()]


def _copy(source: Path, target: Path) -> None:
    """Copy a file, with its mode, unless the target has the same bytes."""
    if target.exists() and target.read_bytes() == source.read_bytes():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    os.chmod(target, source.stat().st_mode)
