"""The study's rows as tables: each arm beside another one, pair by pair."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.tables import table

from .protocol import ARMS

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """The mean difference of paired runs, with the confidence interval of Student's t; NaN for less than two pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]" if self.pairs > 1 else "-"


def difference(rows: pd.DataFrame, arm: str, other: str, value: str = "ap") -> Difference:
    """Return ``arm`` minus ``other`` over the seeds that both have.

    Args:
        rows: one setting's runs, a row each, with the columns ``arm``, ``seed`` and ``value``.
        arm, other: names of arms.
        value: the column that is compared.

    Example:
        >>> rows = pd.DataFrame({"arm": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "ap": [0.3, 0.5, 0.2, 0.2]})
        >>> print(difference(rows, "a", "b"))
        +0.200 [-1.071, +1.471]
    """
    by_seed = rows.pivot(index="seed", columns="arm", values=value)
    if not {arm, other} <= set(by_seed.columns):
        return Difference(np.nan, np.nan, np.nan, 0)
    found = (by_seed[arm] - by_seed[other]).dropna()
    mean, pairs = float(found.mean()), len(found)
    half = float(found.sem() * stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1)) if pairs > 1 else np.nan
    return Difference(mean, mean - half, mean + half, pairs)


def arms_table(rows: pd.DataFrame) -> str:
    """Return every arm of one setting: steps, mean AP, CPU time, and its differences, in the protocol's order."""
    header = ["arm", "pairs", "steps", "CPU s", "AP", "minus baseline", "minus time-matched"]
    lines = []
    for arm in ARMS:
        own = rows[rows["arm"] == arm]
        if len(own):
            against = [difference(rows, arm, other) for other in ("baseline", "time_matched")]
            cells = [f"{own['steps'].iloc[0]}", f"{own['seconds'].median():.0f}", f"{own['ap'].mean():.3f}"]
            told = [
                "" if arm == other else str(each)
                for each, other in zip(against, ("baseline", "time_matched"), strict=True)
            ]
            lines.append([f"`{arm}`", str(len(own)), *cells, *told])
    return table(header, lines)


def teacher_score(rows: pd.DataFrame) -> str:
    """Return the teacher's AP."""
    return f"{rows[rows['arm'] == 'teacher']['ap'].iloc[0]:.3f}"
