"""Markdown of what ``benchmarks.gpu_model`` predicts."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from benchmarks.gpu_model_machine import CONSTANTS
from benchmarks.results import Report
from benchmarks.tables import ABSENT, table

FBKD = "FBKDLoss"
KEY = ["images", "dtype"]  # of a step
STEP_COLUMNS = {
    "fused_us": "fused kernels ms",
    "small_ops": "small ops",
    "small_us": "small ops ms",
    "gpu_us": "GPU ms, as in a CUDA graph",
    "host_us": "host ms",
    "eager_us": "eager step ms",
    "roofline_us": "roofline ms",
}
OTHER_COLUMNS = {
    "fused_us": "fused kernels ms",
    "floor_us": "floor ms",
    "small_us": "small ops ms",
    "host_us": "host ms",
    "roofline_us": "roofline ms",
}
KERNEL_HEADER = ["kernel", "launches", "warps", "registers / shared KB / programs at once", "waves", "GFLOP"]
KERNEL_HEADER += ["L2 GB", "most used", "floor ms", "predicted ms"]


def model_tables(report: Report, before: Report) -> str:
    """FBKD's steps, the kernels of the first one, the other losses' steps, and the constants.

    ``before`` is a result of an earlier revision, of FBKD alone.
    """
    facts, first = report.facts, report.facts["steps"][0]
    revision = f"{_revision(facts).capitalize()}, Triton {facts['triton']}, torch {facts['torch']}."
    parts = [
        f"{revision} Before: {_revision(before.facts)}.",
        _steps(report, before),
        f"Kernels, {first['images']} images, {first['dtype']}:",
        _kernels(_launches(report, first), _launches(before, first)),
        "The step of losses of one op, of equal widths:",
        _others(facts["steps"]),
        "The machine, as the model knows it:",
        _constants(facts["constants"]),
    ]
    return "\n\n".join(parts)


def _revision(facts: dict[str, Any]) -> str:
    return f"revision {facts['revision'] or 'unknown'}" + (" with changes" if facts["modified"] else "")


def _steps(report: Report, before: Report) -> str:
    now, earlier = (
        pd.DataFrame([step for step in each.facts["steps"] if _loss(step) == FBKD])
        .set_index(KEY)[list(STEP_COLUMNS)]
        .apply(_shown)
        for each in (report, before)
    )
    rows = []
    for key, cells in now.iterrows():
        old = earlier.loc[key] if key in earlier.index else cells
        rows.append([*map(str, key), *map(_change, old, cells)])
    return table(["images", "features", *STEP_COLUMNS.values()], rows)


def _others(steps: list[dict[str, Any]]) -> str:
    """A row per step of the other losses."""
    lines = [
        [f"`{_loss(step)}`", str(step["images"]), step["dtype"], *(_ms(step[name]) for name in OTHER_COLUMNS)]
        for step in steps
        if _loss(step) != FBKD
    ]
    return table(["loss", "images", "features", *OTHER_COLUMNS.values()], lines)


def _loss(step: Mapping[str, Any]) -> str:
    """Return the name of a step's loss; results that are older than the other losses do not name it."""
    return step.get("loss", FBKD)


def _shown(column: pd.Series) -> pd.Series:
    return column.map(_ms if column.name.endswith("_us") else str)


def _change(before: str, now: str) -> str:
    return now if before == now else f"{before} → {now}"


def _launches(report: Report, step: dict[str, Any]) -> pd.DataFrame:
    rows = report.rows
    if "loss" in rows:
        rows = rows[rows["loss"] == _loss(step)]
    return rows[(rows["images"] == step["images"]) & (rows["dtype"] == step["dtype"])]


def _kernels(now: pd.DataFrame, before: pd.DataFrame) -> str:
    """A row per kernel: sums of its launches, and of the longest one what one launch has."""
    times = [rows.groupby("kernel", sort=False)["predicted_us"].sum().map(_ms) for rows in (before, now)]
    lines = []
    for kernel in dict.fromkeys([*times[0].index, *times[1].index]):
        launches = now[now["kernel"] == kernel]
        cells = _kernel_cells(launches) if len(launches) else [ABSENT] * 8
        lines.append([f"`{kernel}`", *cells, _change(*(each.get(kernel, ABSENT) for each in times))])
    totals = [_ms(rows["predicted_us"].sum()) for rows in (before, now)]
    return table(KERNEL_HEADER, [*lines, ["sum", *[""] * 8, _change(*totals)]])


def _kernel_cells(launches: pd.DataFrame) -> list[str]:
    longest, sums = launches.loc[launches["predicted_us"].idxmax()], launches.sum(numeric_only=True)
    code, done = [ABSENT] * 2, [ABSENT] * 3
    if pd.notna(longest["registers"]):
        sizes = f"{longest['registers']:.0f} / {longest['shared'] / 1024:.0f} / {longest['programs_at_once']:.0f}"
        code = [f"{longest['warps']:.0f}", sizes]
    if pd.notna(longest["waves"]):
        kinds = sorted(name for name in sums.index if name.endswith("_gflop") and sums[name] >= 0.5)
        products = ", ".join(f"{sums[name]:.0f} {name.removesuffix('_gflop')}" for name in kinds)
        done = [f"{longest['waves']:.1f}", products or ABSENT, f"{sums['l2_gb']:.1f}"]
    return [str(len(launches)), *code, *done, longest["busiest"], _ms(sums["floor_us"])]


def _ms(us: float) -> str:
    return f"{us / 1000:.1f}" if us >= 10_000 else f"{us / 1000:.2f}"


def _constants(values: dict[str, float]) -> str:
    rows = []
    for name, each in CONSTANTS.items():
        value = f"{values[name]:g} {each.unit}".strip()
        rows.append([f"`{name}`", value, each.source, "lead" if each.lead else "known"])
    return table(["constant", "value", "source", "how sure"], rows)
