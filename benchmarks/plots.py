"""Pictures of a result: roofline, speed-up bars and growth with the size of benchmarks/microbench.py, learning curves.

A picture is made of the result alone and notes its digest: of the same result comes the same file, and ``is_stale``
finds one of another result.
"""

import hashlib
import itertools
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from benchmarks.results import OURS, PASSES, Report, state_text, states_in
from benchmarks.series import DIMENSIONS, PYRAMID, exponent, series, title_of
from benchmarks.study.protocol import HEADLINE, SETTINGS, STUDIES, recipe
from benchmarks.study.tables import rows_of
from benchmarks.tables import one_pass

COLOURS = {
    "eager": "#56b4e9",
    "no_distillation": "#666666",
    "mmrazor": "#0072b2",
    "compile": "#e69f00",
    "reference": "#999999",
    "fbkd_ops": "#d55e00",
    "fbkd_ops:memory_efficient": "#cc79a7",
    "fbkd_ops:cuda": "#009e73",
    "fbkd_ops:triton": "#000000",
}
ARM_COLOURS = dict(zip(HEADLINE, ("#bbbbbb", "#777777", "#000000", "#d55e00", "#56b4e9", "#0072b2"), strict=True))
MARKERS = "osD^vP*X"  # of suites
ALPHAS = {"fresh": 0.45, "eager": 0.45}  # of the bars, by state; 1 in any other
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "fbkd_ops"}
DPI, WIDTH, ROW_HEIGHT = 110, 9.0, 2.9
CAPTION_COLUMNS = 150


class Growth(NamedTuple):
    """Peers' times or megabytes along one size: rows with a positive ``value``."""

    title: str
    dimension: str
    quantity: str
    rows: pd.DataFrame


def map_of(case: str) -> str:
    return case.removesuffix(" contiguous").removesuffix(" float32")


def bars(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows whose ``speed`` is shown: forward and backward of every peer but fbkd_ops itself."""
    found = one_pass(rows)
    return found[(found["peer"] != OURS) & found["speed"].notna()]


def roof_points(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the measured rows with products, each with its point and what the machine reached beside it.

    ``intensity``: the fewest operations per fewest byte, ``gflop_s``: those operations over the measured time.
    ``roof_gb_s`` and ``matmul_gflop_s`` are the roof: forward's bytes at the rate of the sum, backward's at the copy's.
    """
    columns = ["bytes", "flops", "sum_gb_s", "copy_gb_s", "matmul_gflop_s"]
    found = rows.reindex(columns=[*rows.columns, *(name for name in columns if name not in rows.columns)])
    found = found[(found["flops"] > 0) & found["matmul_gflop_s"].notna()]
    forward = one_pass(found, "forward").drop_duplicates(["suite", "case"]).set_index(["suite", "case"])["bytes"]
    read = forward.reindex(pd.MultiIndex.from_frame(found[["suite", "case"]])).to_numpy()
    seconds = read / found["sum_gb_s"] + (found["bytes"] - read) / found["copy_gb_s"]
    points = {"intensity": found["flops"] / found["bytes"], "gflop_s": found["flops"] / 1e6 / found["ms"]}
    return found.assign(**points, roof_gb_s=found["bytes"] / seconds)


def growths(rows: pd.DataFrame) -> list[Growth]:
    """Time in the state that a loop settles in (warm), memory in the one that it is read in, along each dimension."""
    step, found = one_pass(rows), []
    settled = step[step["state"].isin(states_in(step["state"])[:1])]
    quantities = {"ms": settled.assign(value=settled["ms"]), "MB": step.assign(value=step["peak_mb"])}
    for dimension, (quantity, shown) in itertools.product(DIMENSIONS, quantities.items()):
        for group in series(shown[shown["value"] > 0], dimension):
            found.append(Growth(title_of(group, dimension), dimension, quantity, group))
    return found


def left_out(rows: pd.DataFrame) -> list[str]:
    """Why a peer is not shown, each reason with its places."""
    failed = rows[rows["status"] != "ok"]
    reasons = failed["peer"] + " " + failed["status"].map(lambda text: textwrap.shorten(text, 80))
    places = failed["suite"] + " " + failed["case"].map(map_of)
    return [f"{why}: {'; '.join(dict.fromkeys(names))}" for why, names in places.groupby(reasons, sort=False)]


def caption(report: Report, note: str) -> str:
    facts = report.facts["environment"]
    machine = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    lines = [f"{note} {machine}, torch {facts['torch']}, revision {facts['revision']}. float32 unless named."]
    if not report.facts["complete"]:
        lines.append("The run was interrupted.")
    if missing := left_out(report.rows):
        lines.append(f"Not shown: {'. '.join(missing)}.")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, CAPTION_COLUMNS))


def alpha_of(state: str) -> float:
    return ALPHAS.get(state, 1)


def colour(peer: str) -> str:
    return COLOURS.get(peer, "#666666")


def draw_bars(report: Report) -> Figure:
    """A panel a suite; a peer's bars of warm and fresh memory stand together and begin at 1, equally fast."""
    shown = bars(report.rows)
    suites = dict(list(shown.groupby("suite", sort=False)))
    heights = [len(group) + 2 * group["case"].nunique() for group in suites.values()]
    figure, axes = panels(len(suites), 1, 1.2 + 0.115 * sum(heights), heights, sharex=True)
    states = states_in(report.rows["state"])
    for ax, (suite, group) in zip(axes[:, 0], suites.items(), strict=True):
        bar_panel(ax, group, states)
        ax.set_title(suite, loc="left", fontweight="bold")
    axes[-1, 0].set_xlabel("times as fast as the peer is fbkd_ops, forward + backward; left of 1 fbkd_ops is slower")
    handles = [patch(colour(peer), 1, peer) for peer in shown["peer"].unique()]
    if len(states) > 1:
        for alpha in dict.fromkeys(map(alpha_of, states)):
            alike = [state for state in states if alpha_of(state) == alpha]
            handles.append(patch("#444444", alpha, state_text(alike).replace(" / ", " or ")))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    return captioned(figure, caption(report, "Median, whiskers: 20th and 80th percentile of the rounds."))


def bar_panel(ax: Axes, group: pd.DataFrame, states: list[str]) -> None:
    place, ticks = 0.0, {}
    for case, same in group.groupby("case", sort=False):
        order = [([*COLOURS, row.peer].index(row.peer), states.index(row.state)) for row in same.itertuples()]
        ticks[place + (len(same) - 1) / 2] = map_of(case)
        for _, row in sorted(zip(order, same.itertuples(), strict=True), key=lambda entry: entry[0]):
            ax.barh(place, row.speed - 1, left=1, height=0.9, color=colour(row.peer), alpha=alpha_of(row.state))
            ax.plot([row.speed_p20, row.speed_p80], [place, place], color="black", linewidth=0.8)
            ax.annotate(
                f"{row.speed:.2g}" if row.speed < 10 else f"{row.speed:.0f}",
                (max(row.speed_p80, 1), place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
            )
            place += 1
        place += 1.2
    ax.set_yticks(list(ticks), list(ticks.values()))
    ax.tick_params(axis="y", length=0)
    ax.set_xscale("log")
    plain_numbers(ax.xaxis)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.margins(x=0.06)
    ax.set_ylim(place - 0.7, -1)


def draw_growths(report: Report) -> Figure:
    """A row a series: time and memory on logarithmic axes."""
    shown = {(growth.title, growth.dimension, growth.quantity): growth for growth in growths(report.rows)}
    titles = list(dict.fromkeys(key[:2] for key in shown))
    figure, axes = panels(len(titles), 2, 0.8 + ROW_HEIGHT * len(titles))
    names = {"ms": "ms, forward + backward", "MB": "MB beyond the inputs, at the peak"}
    for row, title in zip(axes, titles, strict=True):
        for ax, (quantity, name) in zip(row, names.items(), strict=True):
            if (*title, quantity) not in shown:
                ax.set_axis_off()
                continue
            growth_panel(ax, shown[(*title, quantity)])
            ax.set_ylabel(name)
        row[0].set_title(title[0], loc="left", fontweight="bold")
    state = states_in(report.rows["state"])[0]
    note = f"Time in {state_text([state])}. k: least-squares slope, time or memory ∝ size^k."
    return captioned(figure, caption(report, note))


def growth_panel(ax: Axes, growth: Growth) -> None:
    for peer, found in growth.rows.groupby("peer", sort=False):
        sizes, values = list(found["size"]), list(found["value"])
        slope = f": k = {exponent(sizes, values):.2f}" if len(set(sizes)) > 1 and growth.dimension != PYRAMID else ""
        ours = peer == OURS
        style = dict(color=colour(peer), linewidth=2 if ours else 1.2, zorder=3 if ours else 2)
        ax.plot(sizes, values, marker="o", markersize=4, label=f"{peer}{slope}", **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = sorted(set(growth.rows["size"]))
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
    ax.minorticks_off()
    plain_numbers(ax.yaxis)
    ax.set_xlabel(growth.dimension)
    ax.grid(color="#dddddd", linewidth=0.5)
    ax.margins(0.1)
    ax.legend(fontsize=7)


def draw_roofline(report: Report) -> Figure:
    """A row a dtype, a column a pass. The roof is the median of those measured beside the results, its band all."""
    points = roof_points(report.rows)
    dtypes, suites = points["dtype"].unique(), list(points["suite"].unique())
    figure, axes = panels(len(dtypes), 2, 1.2 + 3.2 * len(dtypes), sharex=True, sharey=True)
    markers = {suite: MARKERS[number % len(MARKERS)] for number, suite in enumerate(suites)}
    states = states_in(points["state"])
    for (dtype, which), ax in zip(itertools.product(dtypes, PASSES), axes.flat, strict=True):
        inside = points[(points["dtype"] == dtype) & (points["pass"] == which)]
        roof_panel(ax, inside, points["intensity"])
        for point in inside.itertuples():
            face = colour(point.peer) if point.state == states[0] else "none"
            style = dict(markersize=5, markerfacecolor=face, markeredgecolor=colour(point.peer))
            ax.plot(point.intensity, point.gflop_s, markers[point.suite], **style)
        ax.set_title(f"{PASSES[which]}, {dtype}", loc="left", fontweight="bold")
        ax.set_xlabel("FLOP / byte")
        ax.set_ylabel("GFLOP/s")
    handles = [patch(colour(peer), 1, peer) for peer in points["peer"].unique()]
    handles += [dot(markers[suite], "#444444", suite) for suite in suites]
    if len(states) > 1:
        handles += [dot("o", "#444444" if state == states[0] else "none", state_text([state])) for state in states]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    note = "Fewest FLOP of matrix products and fewest bytes of any implementation, over the measured time;"
    note += " roof: ceilings measured in the same rounds, median and range."
    without = [suite for suite in report.rows["suite"].unique() if suite not in suites]
    if without:
        note += f" No products counted: {', '.join(without)}."
    return captioned(figure, caption(report, note))


def roof_panel(ax: Axes, inside: pd.DataFrame, intensities: pd.Series) -> None:
    """The roof over all intensities of the figure, to the left until it slopes: one for each map and state."""
    roofs = inside.drop_duplicates(["suite", "case", "state"])[["roof_gb_s", "matmul_gflop_s"]]
    low, high, middle = (tuple(roofs.agg(summary)) for summary in ("min", "max", "median"))
    ends = min(*intensities, middle[1] / middle[0]) / 3, max(intensities) * 3
    grid = sorted([*ends, *(gflop_s / gb_s for gb_s, gflop_s in (low, high, middle))])
    below, above, line = ([min(x * gb_s, gflop_s) for x in grid] for gb_s, gflop_s in (low, high, middle))
    ax.fill_between(grid, below, above, color="#eeeeee", linewidth=0)
    ax.plot(grid, line, color="black", linewidth=1.2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_numbers(ax.xaxis)
    plain_numbers(ax.yaxis)


def panels(rows: int, columns: int, height: float, heights: Sequence[float] | None = None, **sharing: bool) -> tuple:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ratios = heights or [1] * rows
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": ratios}, **sharing)


def captioned(figure: Figure, text: str) -> Figure:
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color="#444444")
    return figure


def plain_numbers(axis: Any) -> None:
    """10 instead of 10^1."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def patch(face: str, alpha: float, label: str) -> Patch:
    return Patch(facecolor=face, alpha=alpha, label=label)


def dot(marker: str, face: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, markerfacecolor=face, markeredgecolor="#444444", label=label)


class Kind(NamedTuple):
    data: Callable[[pd.DataFrame], Any]
    draw: Callable[[Report], Figure]


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each point of the learning curves of the study's main arms: ``time`` in a plain student's steps."""
    points = []
    parts = pd.concat([rows_of(rows, part) for part in STUDIES.values() if "baseline" in part.arms])
    for run in parts[parts["arm"].isin(HEADLINE)].itertuples():
        setting = SETTINGS[run.setting]
        factor = 1 if recipe(run.arm).pull is None else setting.time_factor
        for place, point in enumerate(run.curve.split()):
            step, ap = map(float, point.split(":"))
            place_and_time = {"place": place, "time": step * factor}
            points.append({"setting": run.setting, "arm": run.arm, "seed": run.seed, **place_and_time, "ap": ap})
    return pd.DataFrame(points)


def draw_curves(report: Report) -> Figure:
    """A panel a data set: the mean over the seeds, and one standard error of it to both sides."""
    points = curves(report.rows)
    settings = points["setting"].unique()
    figure, axes = panels(1, len(settings), 1.0 + ROW_HEIGHT)
    for ax, setting in zip(axes[0], settings, strict=True):
        for arm in HEADLINE:
            found = points[(points["setting"] == setting) & (points["arm"] == arm)]
            if len(found):
                summary = found.groupby("place").agg({"time": "first", "ap": ["mean", "sem"]})
                time, mean, error = (summary[column] for column in summary)
                (line,) = ax.plot(time, mean, marker="o", markersize=3, color=ARM_COLOURS[arm], label=arm)
                ax.fill_between(time, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.set_title(setting, loc="left", fontweight="bold")
        ax.set_xlabel("time of training, in steps of a student alone")
        ax.set_ylabel("COCO AP")
        ax.legend(frameon=False)
    seeds = ", ".join(f"{count} of {name}" for name, count in points.groupby("setting")["seed"].nunique().items())
    note = f"Mean over the seeds ({seeds}) and its standard error, which is not that of the difference of a pair."
    return captioned(figure, note)


KINDS = {
    "speedup": Kind(bars, draw_bars),
    "growth": Kind(growths, draw_growths),
    "roofline": Kind(roof_points, draw_roofline),
    "curves": Kind(curves, draw_curves),
}
BENCHMARK = ("speedup", "growth", "roofline")


def pictures(report: Report, name: str, kinds: Iterable[str] = BENCHMARK) -> dict[str, str]:
    """The files that ``draw`` makes of a report, by kind."""
    return {kind: f"{name}-{kind}.png" for kind in kinds if len(KINDS[kind].data(report.rows))}


def draw(report: Report, folder: Path, name: str, kinds: Iterable[str] = BENCHMARK) -> list[str]:
    """Draw those of ``kinds`` that the report has figures for; return their files."""
    files = pictures(report, name, kinds)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, file in files.items():
        with style.context(["default", STYLE]):
            noted = {"Software": None, "Digest": digest(report)}
            KINDS[kind].draw(report).savefig(folder / file, dpi=DPI, metadata=noted)
    return list(files.values())


def digest(report: Report) -> str:
    text = json.dumps(report.facts, sort_keys=True) + report.rows.to_csv(index=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_stale(path: Path, report: Report) -> bool:
    """Whether a picture is not there, or is of another result."""
    return not path.exists() or Image.open(path).text.get("Digest") != digest(report)
