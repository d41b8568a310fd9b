"""Made-up results of benchmarks/microbench.py, with the columns that plots and tables read."""

import pandas as pd

from benchmarks.inputs import Case
from benchmarks.measurement import Job, empty_rows
from benchmarks.results import Report

MACHINE = {
    "cpu": "A CPU",
    "cores": 4,
    "threads": 2,
    "torch": "2.14.1",
    "huge_pages": None,
    "revision": "abc1234",
    "modified": False,
    "date": "2026-11-25 10:00 UTC",
}
CEILINGS = {"sum_gb_s": 10.0, "copy_gb_s": 20.0, "copy_to_new_gb_s": 5.0, "matmul_gflop_s": 100.0}
# Of a pass, in bytes and operations; a step's are forward's and backward's.
COST = {"forward": {"bytes": 1_000_000, "flops": 4_000_000}, "step": {"bytes": 3_000_000, "flops": 12_000_000}}


def spread(name, value):
    return {name: value, f"{name}_p20": value / 2, f"{name}_p80": value * 2}


def result(times, shape=(1, 8, 4, 4), *, suite="relation", strides=(1,), state="warm", dtype="float32", memory=None):
    """``times``: each peer's milliseconds of forward and backward, twice those of forward, or why it has none."""
    job = Job(suite, Case(shape, dtype, strides=strides), state, [], 1, 1, 0.0)
    rows = empty_rows(job, {peer: ms if isinstance(ms, str) else "ok" for peer, ms in times.items()})
    for row in rows:
        ms, ours = times[row["peer"]], times["fbkd_ops"]
        if row["status"] == "ok":
            row |= spread("ms", ms if row["pass"] == "step" else ms / 2)
            row |= {} if isinstance(ours, str) else spread("speed", ms / ours)
            row |= {"gb_s": 3.0, "ceiling_percent": 50.0, "rounds": 3} | COST[row["pass"]] | CEILINGS
            row |= {"peak_mb": memory[row["peer"]]} if memory else {}
    return rows


def frame(*results):
    """The rows of some results, as a file has them."""
    rows = pd.DataFrame([row for result in results for row in result])
    return rows.fillna(float("nan")).infer_objects()


def facts(**changes):
    return {"command": "python benchmarks/microbench.py", "environment": MACHINE, "complete": True} | changes


def report(*results, **changes):
    return Report(facts(**changes), frame(*results))
