"""The study's rows as tables: each arm beside another one, pair by pair."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.tables import table

from .protocol import ARMS, BASELINES, COSTS_LIKE, RECIPE, SETTINGS, STUDIES, Study, changed, recipe

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


def rows_of(rows: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Return the runs of a part of the study, without its teacher's."""
    own = _of_numbers(rows, study)
    return own[own["seed"].isin(study.seeds) & own["arm"].isin(ARMS)]


def _of_numbers(rows: pd.DataFrame, study: Study) -> pd.DataFrame:
    changes = rows["changes"] == study.changes if study.changes else rows["changes"].isna()
    return rows[(rows["setting"] == study.setting) & changes]


def arms_table(rows: pd.DataFrame, costs: pd.DataFrame) -> str:
    """Return every arm of a part: steps, cost, mean AP, and its paired differences, in the protocol's order.

    Args:
        rows: the runs of one part.
        costs: a row for each setting and arm, with ``ms`` a step and ``peak_mb`` of the whole process; "-" where one
            is missing.
    """
    header = ["arm", "runs", "steps", "ms a step", "peak MB", "AP", *(f"minus {name}" for name in BASELINES)]
    by_arm = costs[costs["setting"] == rows["setting"].iloc[0]].set_index("arm")
    lines = []
    for arm in ARMS:
        own = rows[rows["arm"] == arm]
        if len(own):
            name = COSTS_LIKE.get(arm, arm)
            cost = [f"{by_arm.loc[name, column]:.0f}" if name in by_arm.index else "-" for column in ("ms", "peak_mb")]
            cells = [f"{own['steps'].iloc[0]}", *cost, f"{own['ap'].mean():.3f}"]
            differences = ["" if arm == other else str(difference(rows, arm, other)) for other in BASELINES]
            lines.append([f"`{arm}`", str(len(own)), *cells, *differences, _beside_base(rows, arm)])
    return table([*header, "minus its own base"], lines)


def trainers_table(rows: pd.DataFrame) -> str:
    """Return what Ultralytics' trainers made of a student, the best way last, each beside those without this package.

    Args:
        rows: runs of ``benchmarks.study.yolo``; the name of an arm with one of our losses has its share behind a colon.
    """
    teacher, students = rows[rows["arm"] == "teacher"], rows[rows["arm"] != "teacher"]
    arms = list(students.groupby("arm")["ap"].mean().sort_values().index)
    others = [arm for arm in arms if ":" not in arm]
    lines = [["teacher", str(len(teacher)), *_run_cells(teacher), *[""] * len(others)]]
    for arm in arms:
        own = students[students["arm"] == arm]
        differences = ["" if arm == other else str(difference(students, arm, other)) for other in others]
        lines.append([f"`{arm}`", str(len(own)), *_run_cells(own), *differences])
    return table(["arm", "runs", "steps", "CPU seconds", "AP", *(f"minus {name}" for name in others)], lines)


def _run_cells(rows: pd.DataFrame) -> list[str]:
    return [f"{rows['steps'].iloc[0]}", f"{rows['seconds'].mean():.0f}", f"{rows['ap'].mean():.3f}"]


def _beside_base(rows: pd.DataFrame, arm: str) -> str:
    base = ARMS[arm][0]
    return "" if base is None or base in BASELINES else f"`{base}`: {difference(rows, arm, base)}"


def share_table(rows: pd.DataFrame) -> str:
    """Return how the measured gradient share kept to its target in the second halves of the trainings of each arm.

    Args:
        rows: runs of any parts.
    """
    header = ["data", "pixels", "arm", "trainings", "target"]
    header += ["median (smallest to largest)", "80 % from", "80 % to"]
    lines = []
    runs = rows.dropna(subset="share_p50")
    for (setting, changes, arm), own in runs.groupby(["setting", "changes", "arm"], sort=False, dropna=False):
        size = changed(SETTINGS[setting], "" if pd.isna(changes) else changes).image_size
        medians = own["share_p50"]
        spread = f"{medians.median():.2f} ({medians.min():.2f} to {medians.max():.2f})"
        ends = [f"{own['share_p10'].min():.2f}", f"{own['share_p90'].max():.2f}"]
        lines.append([setting, str(size), f"`{arm}`", str(len(own)), str(recipe(arm).pull), spread, *ends])
    return table(header, lines)


def headline(rows: pd.DataFrame) -> str:
    """Return the recipe beside the baselines, a row for each part that has both."""
    lines = []
    for name, part in STUDIES.items():
        own = rows_of(rows, part)
        found = [difference(own, RECIPE, other) for other in BASELINES if other in set(own["arm"])]
        if found and RECIPE in set(own["arm"]):
            pairs = min(each.pairs for each in found)
            count = str(pairs) if pairs == len(part.seeds) else f"{pairs} of {len(part.seeds)} so far"
            ap = own[own["arm"] == RECIPE]["ap"].mean()
            lines.append([name, count, f"{ap:.3f}", *map(str, found), *[""] * (len(BASELINES) - len(found))])
    return table(["data", "pairs", "AP with the recipe", *(f"minus {name}" for name in BASELINES)], lines)


def teacher_score(rows: pd.DataFrame, study: Study) -> str:
    """Return the AP of the teacher of a part."""
    own = _of_numbers(rows, study)
    return f"{own[own['arm'] == 'teacher']['ap'].iloc[0]:.3f}"
