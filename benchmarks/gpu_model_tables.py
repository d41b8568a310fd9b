"""Markdown of what ``benchmarks.gpu_model`` predicts."""

from collections import Counter
from typing import Any

from benchmarks.tables import table

__all__ = ["model_tables"]

Report = dict[str, Any]
ABSENT = "–"


def model_tables(report: Report, before: Report | None = None) -> str:
    """The steps, the kernels of the first case, and the constants; ``before`` is a report of an earlier revision."""
    case = report["cases"][0]
    earlier = _case(before, case["images"], case["dtype"])
    parts = [
        _provenance(report) + (f" Before: {_revision(before)}." if before else ""),
        _steps(report, before),
        f"Kernels, {case['images']} images, {case['dtype']}:",
        _kernels(case, earlier),
        "The machine, as the model knows it:",
        _constants(report["constants"]),
    ]
    return "\n\n".join(parts)


def _provenance(report: Report) -> str:
    return f"{_revision(report).capitalize()}, Triton {report['triton']}, torch {report['torch']}."


def _revision(report: Report) -> str:
    return f"revision {report['revision'] or 'unknown'}" + (" with changes" if report["modified"] else "")


def _case(report: Report | None, images: int, dtype: str) -> dict | None:
    cases = report["cases"] if report else []
    return next((case for case in cases if (case["images"], case["dtype"]) == (images, dtype)), None)


def _steps(report: Report, before: Report | None) -> str:
    columns = {
        "fused kernels ms": lambda case: _ms(case["fused_us"]),
        "small ops": lambda case: str(sum(case["small_ops"].values())),
        "small ops ms": lambda case: _ms(case["small_us"]),
        "GPU ms, as in a CUDA graph": lambda case: _ms(case["gpu_us"]),
        "host ms": lambda case: _ms(case["host_us"]),
        "eager step ms": lambda case: _ms(case["eager_us"]),
        "roofline ms": lambda case: _ms(case["roofline_us"]),
    }
    rows = []
    for case in report["cases"]:
        earlier = _case(before, case["images"], case["dtype"])
        cells = [_change(value(earlier) if earlier else None, value(case)) for value in columns.values()]
        rows.append([str(case["images"]), case["dtype"], *cells])
    return table(["images", "features", *columns], rows)


def _change(before: str | None, now: str) -> str:
    return now if before in (None, now) else f"{before} → {now}"


def _kernels(case: dict, earlier: dict | None) -> str:
    header = ["kernel", "launches", "warps", "registers / shared KB / programs at once", "waves", "GFLOP"]
    header += ["L2 GB", "most used", "floor ms", "predicted ms"]
    now, before = _by_kernel(case), _by_kernel(earlier) if earlier else {}
    rows = []
    for name in {**before, **now}:
        rows.append([f"`{name}`", *(_kernel_cells(now[name]) if name in now else [ABSENT] * 8)])
        figures = [_ms(_sum(rows_of[name], "predicted_us")) if name in rows_of else ABSENT for rows_of in (before, now)]
        rows[-1].append(_change(figures[0] if earlier else None, figures[1]))
    totals = [_ms(each["fused_us"]) if each else None for each in (earlier, case)]
    return table(header, [*rows, ["sum", *[""] * 8, _change(*totals)]])


def _by_kernel(case: dict) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in case["launches"]:
        groups.setdefault(row["kernel"], []).append(row)
    return groups


def _kernel_cells(rows: list[dict]) -> list[str]:
    """Figures of all launches; what one of them has alone is that of the longest."""
    longest, products = max(rows, key=lambda row: row["predicted_us"]), Counter()
    for row in rows:
        products.update(row.get("gflop", {}))
    code = [str(longest["warps"]), " / ".join(_resources(longest))] if "registers" in longest else [ABSENT] * 2
    if "waves" in longest:
        flops = ", ".join(f"{value:.0f} {kind}" for kind, value in sorted(products.items()) if value >= 0.5)
        done = [f"{longest['waves']:.1f}", flops or ABSENT, f"{_sum(rows, 'l2_gb'):.1f}"]
    else:
        done = [ABSENT] * 3
    return [str(len(rows)), *code, *done, longest["busiest"], _ms(_sum(rows, "floor_us"))]


def _resources(row: dict) -> list[str]:
    return [str(row["registers"]), f"{row['shared'] / 1024:.0f}", str(row["programs_at_once"])]


def _sum(rows: list[dict], key: str) -> float:
    return sum(row.get(key, 0.0) for row in rows)


def _ms(us: float) -> str:
    return f"{us / 1000:.1f}" if us >= 10_000 else f"{us / 1000:.2f}"


def _constants(constants: dict[str, dict]) -> str:
    rows = []
    for name, each in constants.items():
        value = f"{each['value']:g} {each['unit']}".strip()
        rows.append([f"`{name}`", value, each["source"], "lead" if each["lead"] else "known"])
    return table(["constant", "value", "source", "how sure"], rows)
