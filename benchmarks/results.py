"""Results as files: figures as rows of CSV, and where they were measured as JSON of the same name beside it.

pandas is imported by what reads them: `make oldest`, which compiles kernels with this package's tools, has none.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

OURS = "fbkd_ops"
LESS_WORK = "no_distillation"  # no peer to be faster than: it computes no loss
PASSES = {"forward": "forward", "step": "forward + backward"}
PLACE = ["suite", "case", "state"]  # columns that tell a table of benchmarks/microbench.py from the others
# States of benchmarks/memory.py in the order in which they are shown.
STATES = ("graphs", "eager", "warm", "default", "fresh")
CEILINGS = {  # columns of the machine's own rates in the same rounds: name, unit
    "sum_gb_s": ("sum", "GB/s"),
    "copy_gb_s": ("copy", "GB/s"),
    "copy_to_new_gb_s": ("copy into new memory", "GB/s"),
    "matmul_gflop_s": ("matrix product", "GFLOP/s"),
}


class Report(NamedTuple):
    """A result with its facts: of benchmarks/microbench.py ``command``, ``environment``, ``complete``, ``earlier``."""

    facts: dict
    rows: "pd.DataFrame"


def write(path: Path, facts: dict, rows: list[Mapping[str, Any]]) -> None:
    """Write ``rows`` into a CSV, a float to eight digits, and ``facts`` into the JSON beside it."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: _cell(value) for column, value in row.items()} for row in rows)
    replace(path, file.getvalue())
    write_json(path.with_suffix(".json"), facts)


def write_json(path: Path, facts: Any) -> None:
    replace(path, json.dumps(facts, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Replace a file as a whole, so that an interrupted run leaves a valid one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _cell(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value


def read(path: Path) -> Report:
    """Return a result of ``write``.

    Raises:
        ValueError: the files cannot be read or are something else.
    """
    import pandas as pd

    return Report(read_facts(path), pd.read_csv(path, dtype={"strides": str}).fillna({"strides": ""}))


def read_facts(path: Path) -> dict:
    """Return the facts beside the rows in ``path``.

    Raises:
        ValueError: one of the two files cannot be read.
    """
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        if path.suffix == ".csv" and path.stat().st_size and isinstance(facts, dict):
            return facts
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a result, FILE.csv beside FILE.json, got {path} ({error!r})") from error
    raise ValueError(f"expected a result, FILE.csv beside FILE.json, got {path}")


def text_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a result as text, without pandas."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_slower(peer: str, speed: float | None) -> bool:
    """Whether fbkd_ops lost to somebody else's implementation: ``speed`` times as fast in the median round."""
    return not peer.startswith(OURS) and peer != LESS_WORK and speed is not None and speed < 1


def state_text(states: Iterable[str]) -> str:
    """``warm / fresh memory`` of a CPU's states, ``graphs / eager`` of a GPU's."""
    text = " / ".join(states)
    return text if set(states) <= {"graphs", "eager"} else f"{text} memory"


def states_in(found: Iterable[str]) -> list[str]:
    """The states among ``found`` in the order of STATES."""
    found = set(found)
    return [state for state in STATES if state in found]
