"""Commands with a time limit, side by side, of which none outlives the call."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Seconds between asking a process to stop and stopping it. The benchmark writes its results, and pytest after it has
# waited 10 seconds for its workers.
GRACE = 15
LATE = "timeout: sending signal INT to command"  # what `timeout --verbose` adds to the output


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


def run_together(commands: list[list[str]], seconds: float, folder: Path, variables: Mapping[str, str]) -> list[Done]:
    """Start all commands at once and wait for them; `timeout` stops those that still run after ``seconds``."""
    limit = ["timeout", "--verbose", "--signal=INT", f"--kill-after={GRACE}", f"{max(seconds, 0.001):.3f}"]
    options = dict(cwd=folder, env=os.environ | dict(variables), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    started, done = [], []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        try:
            for command, output in zip(commands, outputs, strict=True):
                process = subprocess.Popen([*limit, *command], stdout=output, start_new_session=True, **options)
                started.append(process)
            for process in started:
                process.wait()
        finally:
            for process in started:  # with all that it has left behind
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for command, output, process in zip(commands, outputs, started, strict=True):
            output.seek(0)
            text = output.read().decode(errors="replace")
            done.append(Done(command, text, process.returncode, LATE in text))
    return done
