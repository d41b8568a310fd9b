"""Commands with a time limit, side by side, of which none outlives the call."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Done", "Interrupted", "interruptible", "run_together"]

# Seconds between asking a process to stop and stopping it. The benchmark writes its results, and pytest after it has
# waited 10 seconds for its workers.
GRACE = 15.0


class Interrupted(BaseException):
    """SIGINT or SIGTERM."""


@dataclass(frozen=True)
class Done:
    """A command that has ended or was stopped."""

    command: list[str]
    output: str  # both streams, in order
    returncode: int
    timed_out: bool = False

    @property
    def problem(self) -> str:
        """Why it did not succeed; empty if it did."""
        if self.timed_out:
            return "out of time"
        return f"exit status {self.returncode}" if self.returncode else ""

    def last_lines(self, count: int = 5) -> list[str]:
        return [line for line in self.output.splitlines() if line.strip()][-count:]


@contextlib.contextmanager
def interruptible():
    """The first SIGINT or SIGTERM in the block raises :class:`Interrupted`; more of them do not disturb the ending."""

    def stop(number, frame):
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_together(commands: list[list[str]], seconds: float, folder: Path, variables: Mapping[str, str]) -> list[Done]:
    """Start all commands at once and wait for them; those still running after ``seconds`` are stopped."""
    started = []
    try:
        for command in commands:
            started.append(_Running(command, folder, variables))
        deadline = time.monotonic() + seconds
        late = [running.still_runs_at(deadline) for running in started]
    finally:
        _stop([running for running in started if running.process])
    return [running.done(timed_out) for running, timed_out in zip(started, late, strict=True)]


class _Running:
    """A process in a group of its own, so that what it starts ends with it."""

    def __init__(self, command: list[str], folder: Path, variables: Mapping[str, str]):
        self.command, self.process = command, None
        self.output = tempfile.TemporaryFile()
        options = dict(cwd=folder, env=os.environ | dict(variables), stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT, **options)
        except OSError as error:
            self.output.write(f"cannot run {command[0]}: {error.strerror}\n".encode())

    def still_runs_at(self, deadline: float) -> bool:
        if self.process is None:
            return False
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return True
        return False

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def done(self, timed_out: bool) -> Done:
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        self.output.close()
        return Done(self.command, text, 127 if self.process is None else self.process.returncode, timed_out)


def _stop(started: list[_Running]) -> None:
    """End what still runs; whole groups, since a process may leave others behind."""
    running = [each for each in started if each.process.poll() is None]
    for each in running:
        each.signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for each in running:
        each.still_runs_at(deadline)
    for each in started:
        each.signal(signal.SIGKILL)
        each.process.wait()
