"""Pictures of a result of benchmarks/microbench.py: roofline, speed-up bars, growth with the size.

    python -m benchmarks.plots RESULT.json [RESULT.json ...] --out docs/images

A picture is made of the result alone and notes its digest: of the same result comes the same file, and ``is_stale``
finds one of another result. matplotlib is imported when something is drawn, not before.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.series import (
    DIMENSIONS,
    LEAST_SIZES,
    OURS,
    PASSES,
    PYRAMID,
    exponent,
    read_report,
    series,
    state_text,
    states_in,
    title_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["KINDS", "bars", "draw", "growths", "is_stale", "pictures", "require_matplotlib", "roof_points", "roofs"]

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
MARKERS = "osD^vP*X"  # of suites
ALPHAS = {"fresh": 0.45, "eager": 0.45}  # of the bars, by state; 1 in any other
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "fbkd_ops"}
DPI, WIDTH, ROW_HEIGHT = 110, 9.0, 2.9
CAPTION_COLUMNS = 150


class Bar(NamedTuple):
    """How many times as fast fbkd_ops is as a peer, in forward and backward."""

    suite: str
    map: str
    peer: str
    state: str
    value: float
    low: float
    high: float


class RoofPoint(NamedTuple):
    """A pass: the fewest operations per fewest byte, and those operations over the measured time."""

    suite: str
    peer: str
    state: str
    dtype: str
    which: str
    intensity: float
    gflop_s: float


class Roof(NamedTuple):
    """What the machine reached beside a pass."""

    dtype: str
    which: str
    gb_s: float
    gflop_s: float


class Growth(NamedTuple):
    """Peers' times or megabytes along one size: of each peer its sizes and values."""

    title: str
    dimension: str
    quantity: str
    peers: dict[str, tuple[list[float], list[float]]]


def rows_of(result: dict) -> dict[str, dict]:
    """The peers that have figures."""
    return {name: row for name, row in result["peers"].items() if row["status"] == "ok"}


def map_of(result: dict) -> str:
    return result["case"]["title"].removesuffix(" contiguous").removesuffix(" float32")


def bars(results: Iterable[dict]) -> list[Bar]:
    """Of every peer but fbkd_ops itself; of results from before they had ``speed_of_fbkd_ops`` none."""
    found = []
    for result in results:
        for peer, row in rows_of(result).items():
            speed = row["step"].get("speed_of_fbkd_ops")
            if peer != OURS and speed:
                figures = (speed[key] for key in ("median", "p20", "p80"))
                found.append(Bar(result["suite"], map_of(result), peer, result["state"], *figures))
    return found


def fewest(cost: dict, which: str) -> tuple[int, int]:
    """Bytes and operations of a pass."""
    size, flops = cost["forward_bytes"], cost["forward_flops"]
    return (size, flops) if which == "forward" else (size + cost["backward_bytes"], flops + cost["backward_flops"])


def with_products(results: Iterable[dict]) -> list[dict]:
    """The measured results of suites that have matrix products: without operations there is no intensity."""
    return [x for x in results if (x.get("cost") or {}).get("forward_flops") and "ceilings" in x]


def roof_points(results: Iterable[dict]) -> list[RoofPoint]:
    points = []
    for result in with_products(results):
        for (peer, row), which in itertools.product(rows_of(result).items(), PASSES):
            size, flops = fewest(result["cost"], which)
            place = result["suite"], peer, result["state"], result["case"]["dtype"], which
            points.append(RoofPoint(*place, flops / size, flops / 1e6 / row[which]["ms"]["median"]))
    return points


def roofs(results: Iterable[dict]) -> list[Roof]:
    """Of each result and pass; backward's bytes at the rate of the copy, forward's at that of the sum."""
    found = []
    for result in with_products(results):
        rates, cost = result["ceilings"], result["cost"]
        forward, backward = cost["forward_bytes"], cost["backward_bytes"]
        step = (forward + backward) / (forward / rates["sum_gb_s"] + backward / rates["copy_gb_s"])
        for which, gb_s in (("forward", rates["sum_gb_s"]), ("step", step)):
            found.append(Roof(result["case"]["dtype"], which, gb_s, rates["matmul_gflop_s"]))
    return found


def growths(results: list[dict]) -> list[Growth]:
    """Time in the state that a loop settles in (warm), memory in the one that it is read in, along each dimension."""
    found = []
    settled = [result for result in results if result["state"] == states_in(results)[0]]
    quantities = {
        "ms": (settled, lambda row: row["step"]["ms"]["median"]),
        "MB": (results, lambda row: row.get("peak_extra_mb")),
    }
    for dimension, (quantity, (shown, value)) in itertools.product(DIMENSIONS, quantities.items()):
        for group in series(shown, dimension):
            peers = along(group, value)
            if any(len(set(sizes)) >= LEAST_SIZES for sizes, _ in peers.values()):
                found.append(Growth(title_of(group[0][1], dimension), dimension, quantity, peers))
    return found


def along(group: list[tuple[int, dict]], value: Callable[[dict], float | None]) -> dict:
    """Of each peer the sizes and values of a series; nothing where it has no figure that a logarithm can show."""
    peers = {}
    for size, result in group:
        for peer, row in rows_of(result).items():
            if (value(row) or 0) > 0:
                sizes, values = peers.setdefault(peer, ([], []))
                sizes.append(size)
                values.append(value(row))
    return peers


def left_out(results: Iterable[dict]) -> list[str]:
    """Why a peer is not shown, each reason with its places."""
    places = {}
    for result in results:
        for peer, row in result["peers"].items():
            if row["status"] != "ok":
                shown = places.setdefault(f"{peer} {textwrap.shorten(row['status'], 80)}", {})
                shown[f"{result['suite']} {map_of(result)}"] = None
    return [f"{reason}: {'; '.join(names)}" for reason, names in places.items()]


def caption(report: dict, note: str) -> str:
    facts = report["environment"]
    machine = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    lines = [f"{note} {machine}, torch {facts['torch']}, revision {facts['revision']}. float32 unless named."]
    if not report["complete"]:
        lines.append("The run was interrupted.")
    if missing := left_out(report["results"]):
        lines.append(f"Not shown: {'. '.join(missing)}.")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, CAPTION_COLUMNS))


def alpha_of(state: str) -> float:
    return ALPHAS.get(state, 1)


def colour(peer: str) -> str:
    return COLOURS.get(peer, "#666666")


def distinct(values: Iterable[Any]) -> list:
    return list(dict.fromkeys(values))


def draw_bars(report: dict) -> "Figure":
    """A panel a suite; a peer's bars of warm and fresh memory stand together and begin at 1, equally fast."""
    shown = bars(report["results"])
    suites = {suite: [bar for bar in shown if bar.suite == suite] for suite in distinct(bar.suite for bar in shown)}
    heights = [len(group) + 2 * len({bar.map for bar in group}) for group in suites.values()]
    figure, axes = panels(len(suites), 1, 1.2 + 0.115 * sum(heights), heights, sharex=True)
    states = states_in(report["results"])
    for ax, (suite, group) in zip(axes[:, 0], suites.items(), strict=True):
        bar_panel(ax, group, states)
        ax.set_title(suite, loc="left", fontweight="bold")
    axes[-1, 0].set_xlabel("times as fast as the peer is fbkd_ops, forward + backward; left of 1 fbkd_ops is slower")
    handles = [patch(colour(peer), 1, peer) for peer in distinct(bar.peer for bar in shown)]
    if len(states) > 1:
        for alpha in distinct(map(alpha_of, states)):
            alike = [state for state in states if alpha_of(state) == alpha]
            handles.append(patch("#444444", alpha, state_text(alike, " or ")))
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    return captioned(figure, caption(report, "Median, whiskers: 20th and 80th percentile of the rounds."))


def bar_panel(ax: "Axes", group: list[Bar], states: list[str]) -> None:
    place, ticks = 0.0, {}
    for name in distinct(bar.map for bar in group):
        same = [bar for bar in group if bar.map == name]
        same.sort(key=lambda bar: ([*COLOURS, bar.peer].index(bar.peer), states.index(bar.state)))
        ticks[place + (len(same) - 1) / 2] = name
        for bar in same:
            ax.barh(place, bar.value - 1, left=1, height=0.9, color=colour(bar.peer), alpha=alpha_of(bar.state))
            ax.plot([bar.low, bar.high], [place, place], color="black", linewidth=0.8)
            ax.annotate(
                f"{bar.value:.2g}" if bar.value < 10 else f"{bar.value:.0f}",
                (max(bar.high, 1), place),
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


def draw_growths(report: dict) -> "Figure":
    """A row a series: time and memory on logarithmic axes."""
    shown = growths(report["results"])
    titles = distinct((growth.title, growth.dimension) for growth in shown)
    figure, axes = panels(len(titles), 2, 0.8 + ROW_HEIGHT * len(titles))
    names = {"ms": "ms, forward + backward", "MB": "MB beyond the inputs, at the peak"}
    for row, title in zip(axes, titles, strict=True):
        for ax, (quantity, name) in zip(row, names.items(), strict=True):
            found = [x for x in shown if (x.title, x.dimension) == title and x.quantity == quantity]
            if not found:
                ax.set_axis_off()
                continue
            growth_panel(ax, found[0])
            ax.set_ylabel(name)
        row[0].set_title(title[0], loc="left", fontweight="bold")
    state = states_in(report["results"])[0]
    note = f"Time in {state_text([state])}. k: least-squares slope, time or memory ∝ size^k."
    return captioned(figure, caption(report, note))


def growth_panel(ax: "Axes", growth: Growth) -> None:
    for peer, (sizes, values) in growth.peers.items():
        slope = f": k = {exponent(sizes, values):.2f}" if len(set(sizes)) > 1 and growth.dimension != PYRAMID else ""
        ours = peer == OURS
        style = dict(color=colour(peer), linewidth=2 if ours else 1.2, zorder=3 if ours else 2)
        ax.plot(sizes, values, marker="o", markersize=4, label=f"{peer}{slope}", **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = sorted({size for sizes, _ in growth.peers.values() for size in sizes})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
    ax.minorticks_off()
    plain_numbers(ax.yaxis)
    ax.set_xlabel(growth.dimension)
    ax.grid(color="#dddddd", linewidth=0.5)
    ax.margins(0.1)
    ax.legend(fontsize=7)


def draw_roofline(report: dict) -> "Figure":
    """A row a dtype, a column a pass. The roof is the median of those measured beside the results, its band all."""
    points, found = roof_points(report["results"]), roofs(report["results"])
    dtypes, suites = distinct(point.dtype for point in points), distinct(point.suite for point in points)
    figure, axes = panels(len(dtypes), 2, 1.2 + 3.2 * len(dtypes), sharex=True, sharey=True)
    markers = {suite: MARKERS[number % len(MARKERS)] for number, suite in enumerate(suites)}
    states = states_in(with_products(report["results"]))
    for (dtype, which), ax in zip(itertools.product(dtypes, PASSES), axes.flat, strict=True):
        inside = [point for point in points if (point.dtype, point.which) == (dtype, which)]
        roof_panel(ax, [roof for roof in found if (roof.dtype, roof.which) == (dtype, which)], points)
        for point in inside:
            face = colour(point.peer) if point.state == states[0] else "none"
            ax.plot(
                point.intensity,
                point.gflop_s,
                markers[point.suite],
                markersize=5,
                markerfacecolor=face,
                markeredgecolor=colour(point.peer),
            )
        ax.set_title(f"{PASSES[which]}, {dtype}", loc="left", fontweight="bold")
        ax.set_xlabel("FLOP / byte")
        ax.set_ylabel("GFLOP/s")
    handles = [patch(colour(peer), 1, peer) for peer in distinct(point.peer for point in points)]
    handles += [dot(markers[suite], "#444444", suite) for suite in suites]
    if len(states) > 1:
        handles += [dot("o", "#444444" if state == states[0] else "none", state_text([state])) for state in states]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    note = "Fewest FLOP of matrix products and fewest bytes of any implementation, over the measured time;"
    note += " roof: ceilings measured in the same rounds, median and range."
    without = distinct(x["suite"] for x in report["results"] if x["suite"] not in suites)
    if without:
        note += f" No products counted: {', '.join(without)}."
    return captioned(figure, caption(report, note))


def roof_panel(ax: "Axes", found: list[Roof], points: list[RoofPoint]) -> None:
    """The roof over all intensities of the figure, to the left until it slopes."""
    summaries = [
        [summary([getattr(roof, key) for roof in found]) for key in ("gb_s", "gflop_s")] for summary in (min, max)
    ]
    middle = [statistics.median([getattr(roof, key) for roof in found]) for key in ("gb_s", "gflop_s")]
    intensities = [point.intensity for point in points]
    ends = min(*intensities, middle[1] / middle[0]) / 3, max(intensities) * 3
    grid = sorted([*ends, *(gflop_s / gb_s for gb_s, gflop_s in (*summaries, middle))])
    low, high, line = ([min(x * gb_s, gflop_s) for x in grid] for gb_s, gflop_s in (*summaries, middle))
    ax.fill_between(grid, low, high, color="#eeeeee", linewidth=0)
    ax.plot(grid, line, color="black", linewidth=1.2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_numbers(ax.xaxis)
    plain_numbers(ax.yaxis)


def panels(rows: int, columns: int, height: float, heights: Sequence[float] | None = None, **sharing: bool) -> tuple:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    ratios = heights or [1] * rows
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": ratios}, **sharing)


def captioned(figure: "Figure", text: str) -> "Figure":
    figure.supxlabel(text, x=0.01, ha="left", fontsize=7, color="#444444")
    return figure


def plain_numbers(axis: Any) -> None:
    """10 instead of 10^1."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def patch(face: str, alpha: float, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=face, alpha=alpha, label=label)


def dot(marker: str, face: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker=marker, markerfacecolor=face, markeredgecolor="#444444", label=label)


class Kind(NamedTuple):
    data: Callable[[list[dict]], list]
    draw: Callable[[dict], "Figure"]
    needs: str


KINDS = {
    "speedup": Kind(bars, draw_bars, "figures of a peer beside fbkd_ops"),
    "growth": Kind(growths, draw_growths, "2 sizes of one series"),
    "roofline": Kind(roof_points, draw_roofline, "a suite with products, and its cost in the result"),
}


def pictures(report: dict, name: str, kinds: Container[str] = tuple(KINDS)) -> dict[str, str]:
    """The files that ``draw`` makes of a report, by kind."""
    return {
        kind: f"{name}-{kind}.png" for kind, what in KINDS.items() if kind in kinds and what.data(report["results"])
    }


def draw(report: dict, folder: Path, name: str, kinds: Container[str] = tuple(KINDS)) -> list[str]:
    """Draw those of ``kinds`` that the report has figures for; a line on each, drawn or left out."""
    require_matplotlib()
    from matplotlib import style

    files, lines = pictures(report, name, kinds), []
    for kind, what in KINDS.items():
        if kind not in kinds:
            continue
        if kind not in files:
            lines.append(f"{name}: no {kind} plot, it needs {what.needs}")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with style.context(["default", STYLE]):
            noted = {"Software": None, "Digest": digest(report)}
            what.draw(report).savefig(folder / files[kind], dpi=DPI, metadata=noted)
        lines.append(f"drawn: {folder / files[kind]}")
    return lines


def require_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        sys.exit("the plots need matplotlib: pip install matplotlib")


def digest(report: dict) -> str:
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()[:16]


def is_stale(path: Path, report: dict) -> bool:
    """Whether a picture is not there, or is of another result."""
    return not path.exists() or noted_digest(path.read_bytes()) != digest(report)


def noted_digest(png: bytes) -> str | None:
    """The PNG's text of that name. A chunk is a length, a name of 4 bytes, that many bytes and a checksum of 4."""
    place = 8
    while place < len(png):
        length, kind = int.from_bytes(png[place : place + 4], "big"), png[place + 4 : place + 8]
        key, _, text = png[place + 8 : place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key == b"Digest":
            return text.decode()
        place += length + 12
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="of benchmarks/microbench.py")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    for path in options.results:
        try:
            report = read_report(path)
        except ValueError as error:
            parser.error(f"RESULT.json: {error}")
        print("\n".join(draw(report, options.out, path.stem)))


if __name__ == "__main__":
    main()
