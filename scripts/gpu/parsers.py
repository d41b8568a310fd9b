"""What the stages read from the output of pytest, compute-sanitizer, ncu and the package's own tools."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "NCU_METRICS",
    "Tests",
    "failed_rows",
    "kernel_name",
    "kernel_table",
    "library_states",
    "ncu_obstacle",
    "ncu_rows",
    "sanitizer_findings",
    "sanitizer_obstacle",
    "sanitizer_problems",
    "step_times",
    "tests_in",
]

# Column of the table: ncu's metric.
NCU_METRICS = {
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "us": "gpu__time_duration.sum",
}
_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
_MICROSECONDS |= {"s": 1e6, "second": 1e6}

_SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards? displayed)", re.MULTILINE)
_FINDING = re.compile(r"^=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)$", re.MULTILINE)


def library_states(info: str) -> dict[str, str]:
    """``{"cpu": "loaded", "cuda": ...}`` from the report of ``python -m fbkd_ops.info``."""
    return dict(re.findall(r"^(\w+) library\s+(.+)$", info, re.MULTILINE))


@dataclass
class Tests:
    """Results of one or more pytest processes."""

    counts: Counter = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)  # test: message
    skips: Counter = field(default_factory=Counter)  # reason: how many

    def add(self, other: "Tests") -> None:
        self.counts += other.counts
        self.failures |= other.failures
        self.skips += other.skips


def tests_in(path: Path) -> Tests | None:
    """The results in a file of ``--junitxml``; None where pytest has not written a whole one.

    A module that skips itself when it is imported is counted apart: pytest imports it before it selects by mark, so
    its reason says nothing about the tests that were asked for.
    """
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    tests = Tests()
    for case in cases:
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            tests.counts["passed"] += 1
        elif problem.get("message") == "collection skipped":
            tests.counts["modules skipped"] += 1
        elif problem.tag == "skipped":
            tests.counts["skipped"] += 1
            tests.skips[problem.get("message", "")] += 1
        else:
            tests.counts["failed"] += 1
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            tests.failures[name] = problem.get("message") or (problem.text or "").strip()
    return tests


def sanitizer_problems(output: str) -> int | None:
    """Errors and hazards in the summaries of compute-sanitizer; None where it has written none."""
    counts = [int(errors or hazards) for errors, hazards in _SUMMARY.findall(output)]
    return sum(counts) if counts else None


def sanitizer_findings(output: str, count: int = 5) -> list[str]:
    """The first different headings of what compute-sanitizer reports, each with the place below it."""
    found = {}
    for match in _FINDING.finditer(output):
        place = re.match(r"\n=+\s{2,}(at .+)", output[match.end() :])
        found[f"{match.group(1)} {place.group(1)}" if place else match.group(1)] = None
    return list(found)[:count]


def sanitizer_obstacle(output: str) -> str:
    """Why compute-sanitizer cannot check anything on this machine; empty if it can."""
    found = re.search(r"Device not supported|Unable to find injection library|No CUDA-capable device", output)
    return found.group() if found else ""


def ncu_obstacle(output: str) -> str:
    """Why ncu cannot measure anything on this machine; empty if it can."""
    if "ERR_NVGPUCTRPERM" in output:
        return "performance counters are not permitted to this user (ERR_NVGPUCTRPERM)"
    found = re.search(r"Failed to initialize the profiler[^\n]*|Profiling is not supported[^\n]*", output)
    return found.group() if found else ""


def ncu_rows(output: str) -> list[dict]:
    """``kernel``, ``dram_percent``, ``warps_percent`` and ``us`` of each launch in the output of ``ncu --csv``.

    A metric that a GPU does not have is None.
    """
    lines = output.splitlines()
    header = next((index for index, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    table = csv.DictReader(line for line in lines[header:] if line.startswith('"'))
    names = {metric: column for column, metric in NCU_METRICS.items()}
    launches = {}
    for row in table:
        empty = {"kernel": kernel_name(row["Kernel Name"])} | dict.fromkeys(NCU_METRICS)
        launch = launches.setdefault(row["ID"], empty)
        column = names.get(row["Metric Name"])
        if column:
            launch[column] = _value(row["Metric Value"], row["Metric Unit"])
    return list(launches.values())


def kernel_name(name: str) -> str:
    """Without return type, namespaces, template arguments and parameters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", name)[0].split("::")[-1].strip()


def _value(text: str, unit: str) -> float | None:
    try:
        return float(text.replace(",", "")) * _MICROSECONDS.get(unit, 1.0)
    except ValueError:
        return None


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


def step_times(report: dict, name: str = "fbkd_ops") -> dict[str, dict]:
    """Of each table of the benchmark's JSON, this implementation's forward and backward."""
    figures = {}
    for result in report["results"]:
        row = result["peers"].get(name, {})
        if row.get("status") == "ok":
            step = row["step"]
            speed = (step.get("speed_vs_eager") or {}).get("median")
            figures[_title(result)] = {
                "ms": _rounded(step["ms"]["median"], 4),
                "gb_s": _rounded(step["gb_s"], 1),
                "ceiling_percent": _rounded(step["ceiling_percent"], 1),
                "times_as_fast": _rounded(speed, 2),
            }
    return figures


def _rounded(value: float | None, digits: int) -> float | None:
    """A suite without a cost has no rate and no ceiling."""
    return None if value is None else round(value, digits)


def failed_rows(report: dict) -> list[str]:
    """The package's own rows of the benchmark's JSON that have no figures, and why."""
    return [
        f"{_title(result)}, {name}: {row['status']}"
        for result in report["results"]
        for name, row in result["peers"].items()
        if name.startswith("fbkd_ops") and re.match("WRONG|failed|killed|cannot be captured", row["status"])
    ]


def _title(result: dict) -> str:
    return f"{result['suite']}, {result['case']['title']}, {result['state']}"
