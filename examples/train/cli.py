"""The command line: a configuration, the data, and one task after the other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from examples.datasets import DataError

from .config import Config, ConfigError, as_yaml, load_config, missing_files
from .data import Sets, read_sets
from .log import score_table
from .loop import Result, TrainingError, run_task
from .processes import Processes, join, leave

DESCRIPTION = """
Train a teacher, a baseline and a distilled student with torchvision's detectors, and compare their COCO AP.
Several processes: torchrun --nproc-per-node 8 -m examples.train CONFIG.yaml data.root=FOLDER
"""


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; wrong ones end the program with status 2."""
    parser = OneLineParser(prog="python -m examples.train", description=DESCRIPTION)
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG.yaml | key=value", help="a file first, then changes to it"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of each task")
    parser.add_argument("--print-config", action="store_true", help="print every key with its value, and end")
    options = parser.parse_intermixed_args(arguments)
    options.file = None
    if options.settings and "=" not in options.settings[0]:
        options.file = Path(options.settings.pop(0))
    return options


def run(config: Config, processes: Processes, console: Console, resume: bool = False) -> list[Result]:
    """Read the data, then train every task."""
    missing = missing_files(config)
    if missing:
        raise ConfigError("\n".join(missing))
    sets = read_sets(config.data)
    if processes.is_main:
        _report_data(sets, config.output, console)
    results = {task: run_task(task, config, sets, processes, console, resume) for task in config.tasks}
    if processes.is_main:
        console.print(score_table({task: result.folder for task, result in results.items()}))
        for result in results.values():
            console.print(f"wrote {result.folder}", markup=False, highlight=False, soft_wrap=True)
    return list(results.values())


def _report_data(sets: Sets, folder: Path, console: Console) -> None:
    """Say what was wrong with the files, and leave their names in the folder."""
    for split, pictures in sets.by_name().items():
        findings = sets.findings[split]
        text = f"{split}: {len(pictures)} pictures, {len(sets.classes)} classes; {findings.summary()}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            findings.write(folder / f"findings-{split}.csv")
        except OSError as error:
            raise ConfigError(f"output: cannot write to {folder}: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 when all went well, 1 when the training failed or a file could not be written, 2 for wrong input."""
    options = parse_arguments(arguments)
    console, errors = Console(), Console(stderr=True)
    is_main = True

    def report(error: Exception) -> None:
        for line in str(error).splitlines() if is_main else ():
            errors.print(f"error: {line}", markup=False, highlight=False, soft_wrap=True)

    try:
        config = load_config(options.file, options.settings)
        if options.print_config:
            print(as_yaml(config), end="")
            return 0
        processes = join(config.device)
        is_main = processes.is_main
        results = run(config, processes, console, options.resume)
    except (ConfigError, DataError) as error:
        report(error)
        return 2
    except TrainingError as error:
        report(error)
        return 1
    except KeyboardInterrupt:
        report(KeyboardInterrupt("interrupted; --resume goes on from the last finished epoch"))
        return 130
    finally:
        leave()
    return 1 if any(result.failures for result in results) else 0
