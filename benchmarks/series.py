"""Series of results of benchmarks/microbench.py: rows that differ in one size alone."""

import math
import statistics
from collections.abc import Iterator, Sequence

import pandas as pd

PYRAMID = "levels"  # of a pyramid; each has a quarter of the pixels of the one before, so time follows no power of them
# Columns that are the same along each dimension. Pyramids of other depths begin with the same pooling factor.
DIMENSIONS = {
    "H·W": ["n", "channels", "strides"],
    "N": ["channels", "height", "width", "strides"],
    "C": ["n", "height", "width", "strides"],
    PYRAMID: ["n", "channels", "height", "width", "first_stride"],
}


def series(rows: pd.DataFrame, dimension: str) -> Iterator[pd.DataFrame]:
    """Yield rows of two sizes or more that differ in one of DIMENSIONS alone, ascending by their column ``size``."""
    strides = rows["strides"].str
    levels, first = strides.count(r"\d+"), strides.replace(r" .*", "", regex=True)
    sizes = {"H·W": rows["height"] * rows["width"], "N": rows["n"], "C": rows["channels"], PYRAMID: levels}
    sized = rows.assign(size=sizes[dimension], first_stride=first)
    for _, found in sized.groupby(["suite", "dtype", "layout", *DIMENSIONS[dimension]], sort=False):
        if found["size"].nunique() > 1:
            yield found.sort_values("size", kind="stable")


def title_of(found: pd.DataFrame, dimension: str) -> str:
    """Return the words for all that a series has in common."""
    row = found.iloc[0]
    sizes = {"N": f"N={row['n']}", "C": f"C={row['channels']}", "H·W": f"{row['height']}×{row['width']}"}
    words = [row["suite"], *(text for name, text in sizes.items() if name != dimension)]
    if row["strides"]:
        pooled = "pooled" if dimension == PYRAMID else f"pooled by {row['strides'].replace(' ', ', ')}"
        words.append("without pooling" if set(row["strides"].split()) == {"1"} else pooled)
    return ", ".join([*words, *(x for x in (row["dtype"], row["layout"]) if x not in ("float32", "contiguous"))])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The k of the power law size**k that fits best: least squares between the logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope
