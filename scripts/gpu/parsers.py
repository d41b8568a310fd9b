"""What the stages read from the files and the output of pytest, compute-sanitizer, ncu and the benchmark."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.results import OURS

# Column of the table: ncu's metric.
NCU_METRICS = {
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "us": "gpu__time_duration.sum",
}
_OBSTACLES = r"Device not supported|Unable to find injection library|No CUDA-capable device|ERR_NVGPUCTRPERM"
_OBSTACLES += r"|Failed to initialize the profiler[^\n]*|Profiling is not supported[^\n]*"


def library_states(info: str) -> dict[str, str]:
    """``{"cpu": "loaded", "cuda": ...}`` from the report of ``python -m fbkd_ops``."""
    return dict(re.findall(r"^(\w+) library\s+(.+)$", info, re.MULTILINE))


def obstacle(output: str) -> str:
    """Why compute-sanitizer or ncu cannot work on this machine; empty if it can."""
    found = re.search(_OBSTACLES, output)
    return found.group() if found else ""


def tests_in(path: Path) -> Counter:
    """Count the tests in a file of ``--junitxml`` by what came of them; none where pytest has not written it.

    A module that skips itself is counted apart: pytest imports it before it selects by mark. A case without a name is a
    test that did not end.
    """
    counts = Counter()
    for case in ElementTree.parse(path).iter("testcase") if path.exists() else ():
        result = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if result is not None and result.get("message") == "collection skipped":
            counts["modules skipped"] += 1
        elif "name" in case.attrib:
            counts["passed" if result is None else result.tag] += 1
    return counts


def is_clean(output: str) -> bool:
    """Whether compute-sanitizer has come to its end and found nothing."""
    return bool(re.search(r"^=+ (ERROR|RACECHECK) SUMMARY: 0 ", output, re.MULTILINE))


def findings(output: str, count: int = 6) -> list[str]:
    """The first different lines of compute-sanitizer's report, its heading apart."""
    lines = (line.strip("= ") for line in output.splitlines() if line.startswith("========="))
    return [line for line in dict.fromkeys(lines) if line and line != "COMPUTE-SANITIZER"][:count]


def ncu_rows(output: str) -> list[dict]:
    """``kernel`` and the columns of NCU_METRICS of each launch in the output of ``ncu --csv --print-units base``.

    A metric that a GPU does not have is None.
    """
    lines = output.splitlines()
    header = next((index for index, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    names, launches = {metric: column for column, metric in NCU_METRICS.items()}, {}
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        empty = {"kernel": kernel_name(row["Kernel Name"])} | dict.fromkeys(NCU_METRICS)
        launch, column = launches.setdefault(row["ID"], empty), names.get(row["Metric Name"])
        if column and re.match(r"\d", row["Metric Value"]):
            value = float(row["Metric Value"].replace(",", ""))
            launch[column] = value / 1e3 if column == "us" else value  # the base unit of time is 1 ns
    return list(launches.values())


def kernel_name(name: str) -> str:
    """Without return type, namespaces, template arguments and parameters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].split("::")[-1].strip()


def kernel_table(rows: list[dict]) -> dict[str, dict]:
    """By kernel, the longest in all first: launches, their time, and percentages weighted by time."""
    kernels = {}
    for row in rows:
        kernels.setdefault(row["kernel"], []).append(row)
    table = {name: _kernel_figures(launches) for name, launches in kernels.items()}
    return dict(sorted(table.items(), key=lambda entry: -entry[1]["us"]))


def _kernel_figures(launches: list[dict]) -> dict:
    timed = [row for row in launches if row["us"]]
    figures = {"launches": len(launches), "us": round(sum(row["us"] for row in timed), 1)}
    for column in (name for name in NCU_METRICS if name.endswith("_percent")):
        known = [row for row in timed if row[column] is not None]
        total = sum(row["us"] for row in known)
        figures[column] = round(sum(row["us"] * row[column] for row in known) / total, 1) if known else None
    return figures


def step_times(rows: Iterable[dict[str, str]]) -> dict[str, dict]:
    """Of each table of the benchmark forward and backward of fbkd_ops; a suite without a cost has no rate."""
    columns = {"ms": "ms", "gb_s": "gb_s", "ceiling_percent": "ceiling_percent", "vs_baseline": "times_as_fast"}
    return {
        _title(row): {name: float(f"{float(row[column]):.4g}") for column, name in columns.items() if row[column]}
        for row in rows
        if (row["peer"], row["pass"], row["status"]) == (OURS, "step", "ok")
    }


def failed_rows(rows: Iterable[dict[str, str]]) -> list[str]:
    """The package's own rows of the benchmark that have no figures, and why."""
    return [
        f"{_title(row)}, {row['peer']}: {row['status']}"
        for row in rows
        if row["peer"].startswith(OURS)
        and row["pass"] == "step"
        and re.match("WRONG|failed|killed|cannot be captured", row["status"])
    ]


def _title(row: dict[str, str]) -> str:
    return f"{row['suite']}, {row['case']}, {row['state']}"
