"""Two results of benchmarks/microbench.py side by side: how far the speed of fbkd_ops beside each peer has moved.

    python -m benchmarks.compare BEFORE.csv AFTER.csv [--percent 15]

Times of two runs differ with whatever else a machine did, ratios within a round less. The machine's own
ratios, of a copy beside a sum and the like in the same rounds, say how steady it is. Ends with 1 where a ratio of
fbkd_ops moved by more than ``--percent``, either way.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.results import CEILINGS, OURS, PLACE, read

KEYS = [*PLACE, "peer", "pass"]


def percent_apart(before: pd.Series, after: pd.Series) -> pd.Series:
    """The same for a ratio and its inverse: 50 from 2 to 3, from 3 to 2, and from 1/2 to 1/3."""
    return 100 * (np.maximum(before, after) / np.minimum(before, after) - 1)


def changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Return each ``speed`` of fbkd_ops beside a peer, ``before`` and ``after``; NaN where one result has none."""
    speeds = [rows[rows["peer"] != OURS].set_index(KEYS)["speed"].dropna() for rows in (before, after)]
    found = pd.concat(speeds, axis=1, keys=["before", "after"])
    return found.assign(percent=percent_apart(found["before"], found["after"]))


def _rates(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.reindex(columns=[*PLACE, *CEILINGS]).groupby(PLACE).first()


def machine_percents(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """Return how far the machine's own ratios moved: of each table two of its rates at a time, one over the other."""
    old, new = _rates(before), _rates(after)
    pairs = itertools.combinations(CEILINGS, 2)
    return pd.concat([percent_apart(old[one] / old[two], new[one] / new[two]).dropna() for one, two in pairs])


def summary(percents: pd.Series, limit: float) -> str:
    text = f"{len(percents)} ratios: median {percents.median():.0f} % apart, at most {percents.max():.0f} %; "
    return text + f"{(percents > limit).sum()} by more than {limit:g} %"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("before", "after"):
        parser.add_argument(name, type=Path, metavar=f"{name.upper()}.csv", help="of benchmarks/microbench.py")
    parser.add_argument("--percent", type=float, default=15.0, help="name the ratios that moved by more; 15 by default")
    options = parser.parse_args(arguments)
    try:
        before, after = read(options.before).rows, read(options.after).rows
    except ValueError as error:
        parser.error(str(error))
    found, limit = changes(before, after), options.percent
    both = found.dropna()
    if both.empty:
        parser.error("BEFORE.csv and AFTER.csv have no ratio in common")
    moved = both[both["percent"] > limit].sort_values("percent", ascending=False)
    if len(moved):
        print(moved.reset_index().to_string(index=False, float_format="%.2f"))
    print(f"{OURS} beside peers: {summary(both['percent'], limit)}; {len(found) - len(both)} more in one run only")
    machine = machine_percents(before, after)
    if len(machine):
        print(f"the machine's rates beside each other: {summary(machine, limit)}")
    return 1 if len(moved) else 0


if __name__ == "__main__":
    sys.exit(main())
