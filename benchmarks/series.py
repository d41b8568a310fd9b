"""What results of benchmarks/microbench.py say together: series of sizes, and where fbkd_ops is slower than a peer."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = [
    "CEILINGS",
    "DIMENSIONS",
    "FASTER",
    "LEAST_SIZES",
    "OURS",
    "PASSES",
    "PYRAMID",
    "exponent",
    "is_pooled",
    "is_slower",
    "place_of",
    "read_report",
    "series",
    "slower",
    "slower_text",
    "state_text",
    "states_in",
    "title_of",
]

OURS = "fbkd_ops"
AXES = {"H·W": (2, 3), "N": (0,), "C": (1,)}  # of a case's shape
PYRAMID = "levels"  # of a pyramid; each has a quarter of the pixels of the one before, so time follows no power of them
DIMENSIONS = (*AXES, PYRAMID)
LEAST_SIZES = 2  # of a series that is shown
# States of benchmarks/memory.py in the order in which they are shown.
STATES = ("graphs", "eager", "warm", "default", "fresh")
FASTER = " *"  # behind a time that fbkd_ops does not reach
PASSES = {"forward": "forward", "step": "forward + backward"}
CEILINGS = {  # what the machine did beside a result, and its unit
    "sum_gb_s": ("sum", "GB/s"),
    "copy_gb_s": ("copy", "GB/s"),
    "copy_to_new_gb_s": ("copy into new memory", "GB/s"),
    "matmul_gflop_s": ("matrix product", "GFLOP/s"),
}
LESS_WORK = "no_distillation"  # no peer to be faster than: it computes no loss


def read_report(path: Path) -> dict:
    """A result of benchmarks/microbench.py.

    Raises:
        ValueError: the file cannot be read or is something else.
    """
    try:
        report = json.loads(path.read_text())
        report["results"], report["environment"], report["complete"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected a result of benchmarks/microbench.py, got {path} ({error!r})") from error
    return report


def place_of(result: dict) -> tuple[str, str, str]:
    """What tells a result from the others of its report."""
    return result["suite"], result["case"]["title"], result["state"]


def is_pooled(result: dict) -> bool:
    """Whether a suite with non-local blocks pools at some level; of the others False."""
    return any(stride > 1 for stride in result["case"].get("strides", ()))


def series(results: Iterable[dict], dimension: str) -> list[list[tuple[int, dict]]]:
    """Measured results that differ in nothing but one of DIMENSIONS: each with its size, ascending."""
    groups = {}
    for result in results:
        if "rounds" in result:
            case = result["case"]
            size, others = size_of(case, dimension)
            key = (result["suite"], result["state"], case["dtype"], case["layout"], others)
            groups.setdefault(key, []).append((size, result))
    return [sorted(group, key=lambda entry: entry[0]) for group in groups.values()]


def size_of(case: dict, dimension: str) -> tuple[int, tuple]:
    """A case's size along one of DIMENSIONS, and what has to be the same for another case to be compared with it.

    Pyramids with more levels or fewer begin with the same factor: the preset's, or 1 without pooling.
    """
    shape, strides = tuple(case["shape"]), tuple(case.get("strides", ()))
    if dimension == PYRAMID:
        return len(strides), (shape, strides[:1])
    axes = AXES[dimension]
    others = tuple(size for axis, size in enumerate(shape) if axis not in axes)
    return math.prod(shape[axis] for axis in axes), (others, strides)


def title_of(result: dict, dimension: str) -> str:
    """What a series has in common."""
    case = result["case"]
    n, channels, height, width = case["shape"]
    sizes = {"N": f"N={n}", "C": f"C={channels}", "H·W": f"{height}×{width}"}
    factors = ", ".join(map(str, case.get("strides", ())))
    words = [result["suite"], *(text for name, text in sizes.items() if name != dimension)]
    if factors:
        pooled = f"pooled by {factors}" if dimension != PYRAMID else "pooled"
        words.append(pooled if is_pooled(result) else "without pooling")
    return ", ".join([*words, *(x for x in (case["dtype"], case["layout"]) if x not in ("float32", "contiguous"))])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The k of the power law size**k that fits best: least squares between the logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def state_text(states: Sequence[str], separator: str = " / ") -> str:
    """``warm / fresh memory`` of a CPU's states, ``graphs / eager`` of a GPU's."""
    text = separator.join(states)
    return text if set(states) <= {"graphs", "eager"} else f"{text} memory"


def states_in(results: Iterable[dict]) -> list[str]:
    """The states that results were measured in, in the order of STATES."""
    found = {result["state"] for result in results}
    return [state for state in STATES if state in found]


def is_slower(peer: str, figures: dict) -> bool:
    """Whether fbkd_ops was slower than somebody else's implementation in the median round of a pass."""
    speed = figures.get("speed_of_fbkd_ops")
    return not peer.startswith(OURS) and peer != LESS_WORK and speed is not None and speed["median"] < 1


def slower(results: Iterable[dict]) -> list[dict]:
    """Every pass of every peer that fbkd_ops was slower than; ``speed`` below 1 says by how much."""
    rows = []
    for result in results:
        place = {"suite": result["suite"], "case": result["case"]["title"], "state": result["state"]}
        for peer, row in result["peers"].items():
            for which in PASSES:
                if which in row and is_slower(peer, row[which]):
                    speed = row[which]["speed_of_fbkd_ops"]["median"]
                    rows.append({"peer": peer, **place, "pass": which, "speed": speed})
    return rows


def slower_text(rows: Iterable[dict]) -> list[str]:
    """A line a peer: ``slower than eager at: ...``."""
    places = {}
    for row in rows:
        text = f"{row['suite']} {row['case']}, {state_text([row['state']])}, {PASSES[row['pass']]} ({row['speed']:.2f})"
        places.setdefault(row["peer"], []).append(text)
    return [f"slower than {peer} at: {'; '.join(texts)}" for peer, texts in places.items()]
