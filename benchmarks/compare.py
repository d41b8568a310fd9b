"""Two results of benchmarks/microbench.py side by side: how far the speed of fbkd_ops beside each peer has moved.

    python -m benchmarks.compare BEFORE.json AFTER.json [--percent 15]

Times of two runs differ with whatever else a machine did, ratios within a round less. The machine's own
ratios, of a copy beside a sum and the like in the same rounds, say how steady it is. Ends with 1 where a ratio of
fbkd_ops moved by more than ``--percent``, either way.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.microbench import console
from benchmarks.series import CEILINGS, OURS, PASSES, place_of, read_report

__all__ = ["Change", "ceilings", "changes", "machine_percents", "main", "percent_apart"]


class Change(NamedTuple):
    """How many times as fast as a peer fbkd_ops was, before and after."""

    suite: str
    map: str
    state: str
    peer: str
    which: str
    before: float
    after: float

    @property
    def percent(self) -> float:
        return percent_apart(self.before, self.after)


def percent_apart(before: float, after: float) -> float:
    """The same for a ratio and its inverse: 50 from 2 to 3, from 3 to 2, and from 1/2 to 1/3."""
    return 100 * (max(before, after) / min(before, after) - 1)


def changes(before: dict, after: dict) -> list[Change]:
    """Of every ratio that both reports have."""
    earlier = dict(_ratios(before))
    return [Change(*place, earlier[place], ratio) for place, ratio in _ratios(after) if place in earlier]


def alone(before: dict, after: dict) -> int:
    """How many ratios only one report has."""
    return len(dict(_ratios(before)).keys() ^ dict(_ratios(after)).keys())


def _ratios(report: dict) -> Iterator[tuple[tuple[str, ...], float]]:
    for result in report["results"]:
        for peer, row in result["peers"].items():
            for which in PASSES:
                speed = row.get(which, {}).get("speed_of_fbkd_ops")
                if speed and peer != OURS:
                    yield (*place_of(result), peer, which), speed["median"]


def ceilings(before: dict, after: dict) -> dict[str, dict[str, float]]:
    """By state of memory: how many times as fast as before the machine was at each, the median of all maps."""
    earlier, found = dict(_rates(before)), {}
    for (*place, name), rate in _rates(after):
        if (*place, name) in earlier:
            found.setdefault(place[-1], {}).setdefault(name, []).append(rate / earlier[(*place, name)])
    return {state: {name: statistics.median(all) for name, all in rates.items()} for state, rates in found.items()}


def _rates(report: dict) -> Iterator[tuple[tuple[str, ...], float]]:
    for result in report["results"]:
        for key, (name, _) in CEILINGS.items():
            if key in result.get("ceilings", {}):
                yield (*place_of(result), name), result["ceilings"][key]


def machine_percents(before: dict, after: dict) -> list[float]:
    """How far the machine's own ratios moved: of each table two of its rates at a time, one over the other."""
    earlier, found = dict(_rates(before)), {}
    for place, rate in _rates(after):
        if place in earlier:
            found.setdefault(place[:-1], []).append((earlier[place], rate))
    pairs = (pair for rates in found.values() for pair in itertools.combinations(rates, 2))
    return [percent_apart(one[0] / other[0], one[1] / other[1]) for one, other in pairs]


def apart_text(percents: Iterable[float], limit: float) -> str:
    found = list(percents)
    beyond = sum(percent > limit for percent in found)
    text = (
        f"median {statistics.median(found):.0f} % apart, at most {max(found):.0f} %; {beyond} by more than {limit:g} %"
    )
    return f"{len(found)} ratios: {text}"


def table_of(found: list[Change]):
    from rich.table import Table

    table = Table()
    for column in ("suite", "map", "memory", f"{OURS} beside", "", "before", "after", "% apart"):
        table.add_column(column)
    for change in sorted(found, key=lambda change: -change.percent):
        ratios = (f"{ratio:.2f}" for ratio in (change.before, change.after))
        table.add_row(*change[:4], PASSES[change.which], *ratios, f"{change.percent:.0f}")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("before", "after"):
        parser.add_argument(name, type=Path, metavar=f"{name.upper()}.json", help="of benchmarks/microbench.py")
    parser.add_argument("--percent", type=float, default=15.0, help="name the ratios that moved by more; 15 by default")
    options = parser.parse_args(arguments)
    try:
        reports = read_report(options.before), read_report(options.after)
    except ValueError as error:
        parser.error(str(error))
    found = changes(*reports)
    if not found:
        parser.error("BEFORE.json and AFTER.json have no ratio in common")
    output, limit = console(), options.percent
    moved = [change for change in found if change.percent > limit]
    if moved:
        output.print(table_of(moved))
    text = apart_text((change.percent for change in found), limit)
    output.print(f"{OURS} beside peers: {text}; {alone(*reports)} more in one run only")
    if machine := machine_percents(*reports):
        output.print(f"the machine's rates beside each other: {apart_text(machine, limit)}")
    for state, rates in ceilings(*reports).items():
        output.print(f"{state} memory: " + ", ".join(f"{name} × {ratio:.2f}" for name, ratio in rates.items()))
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
