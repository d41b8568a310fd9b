"""What a run leaves in its folder and on the terminal: CSV files, TensorBoard scalars, a progress bar."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from .checkpoints import DiskError


class CsvLog:
    """A CSV file whose columns are those of its first row."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, str]]:
        """Return all rows, none where there is no file yet."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def keep_epochs(self, last: int) -> None:
        """Drop the rows of later epochs, which a resumed run makes anew."""
        kept = [row for row in self.rows() if row["epoch"].isdigit() and int(row["epoch"]) <= last]
        self.path.unlink(missing_ok=True)
        for row in kept:
            self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; OSError where the disk is full."""
        columns = list(row)
        is_new = not self.path.exists() or not self.path.stat().st_size
        if not is_new:
            with self.path.open(newline="", encoding="utf-8") as file:
                columns = next(csv.reader(file))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())


class RunLog:
    """The log of one task. On all processes but the main one nothing is written or shown.

    A file that cannot be written is said once and counted in `failures`; the training goes on.
    """

    def __init__(self, folder: Path, console: Console, is_main: bool):
        self.folder, self.console, self.is_main = folder, console, is_main
        self.failures = 0
        self.steps, self.scores = CsvLog(folder / "steps.csv"), CsvLog(folder / "scores.csv")
        self.unreadable: dict[str, str] = {}  # lines of text, and where they came up
        self._said: set[str] = set()
        self._board: SummaryWriter | None = None
        self._progress: Progress | None = None

    def begin(self, epoch: int, step: int) -> None:
        """Go on after ``epoch`` finished epochs, of ``step`` updates in all."""
        if not self.is_main:
            return
        self._attempt(lambda: self.steps.keep_epochs(epoch))
        self._attempt(lambda: self.scores.keep_epochs(epoch))
        self._attempt(self._open_board, step)

    def _open_board(self, step: int) -> None:
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else None)

    def say(self, text: str) -> None:
        """Print a line."""
        if self.is_main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def step(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of an update."""
        self._write(self.steps, "train", row)

    def score(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of an evaluation."""
        self._write(self.scores, "score", row)

    def report_unreadable(self, lines: Iterable[str], place: str) -> None:
        """Say once of each picture that it could not be read, and keep the list in ``unreadable.txt``."""
        new = [line for line in lines if line not in self.unreadable]
        for line in new:
            self.unreadable[line] = place
            self.say(f"cannot use a {place} picture: {line}")
        if new and self.is_main:
            text = "".join(f"{where}\t{line}\n" for line, where in self.unreadable.items())
            self._attempt(lambda: (self.folder / "unreadable.txt").write_text(text, encoding="utf-8"))

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[str], None]]:
        """Show a bar; the function that comes out moves it by one and shows a text beside it."""
        if not (self.is_main and self.console.is_terminal):
            yield lambda text="": None
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console, transient=True) as bar:
            task = bar.add_task(description, total=total, text="")
            yield lambda text="": bar.update(task, advance=1, text=text)

    def track(self, description: str, items: Any) -> Iterator[Any]:
        """Yield the items under a bar."""
        with self.progress(description, len(items)) as advance:
            for item in items:
                yield item
                advance("")

    def fail(self, error: Exception) -> None:
        """Count a file that could not be written, and say so."""
        self.failures += 1
        self.say_once(f"warning: {error}")

    def close(self) -> None:
        if self._board is not None:
            self._attempt(self._board.close)

    def _write(self, file: CsvLog, group: str, row: Mapping[str, Any]) -> None:
        if not self.is_main:
            return
        self._attempt(file.write, {name: _short(value) for name, value in row.items()})
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._attempt(self._board.add_scalar, f"{group}/{name}", value, row["step"])

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.fail(DiskError(f"cannot write to {self.folder}: {error.strerror or error}"))


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def score_table(folders: Mapping[str, Path]) -> Table:
    """Return the last scores of each task."""
    table = Table(title="COCO average precision, validation pictures")
    columns = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
    table.add_column("task")
    for heading in ("epoch", *columns):
        table.add_column(heading, justify="right")
    for task, folder in folders.items():
        rows = CsvLog(folder / "scores.csv").rows()
        if rows:
            table.add_row(task, rows[-1]["epoch"], *(f"{float(rows[-1][name]):.3f}" for name in columns))
    return table
