"""Made-up results of benchmarks/microbench.py, with the fields that plots and tables read."""

from benchmarks import series
from benchmarks.inputs import Case

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
COST = {
    "forward_bytes": 1_000_000,
    "backward_bytes": 2_000_000,
    "forward_flops": 4_000_000,
    "backward_flops": 8_000_000,
}


def summary(value):
    return {"median": value, "p20": value / 2, "p80": value * 2}


def figures(ms, ours, eager=None):
    return {
        "ms": summary(ms),
        "gb_s": 3.0,
        "ceiling_percent": 50.0,
        "speed_vs_eager": summary(eager / ms) if eager else None,
        "speed_of_fbkd_ops": summary(ms / ours),
    }


def result(times, shape=(1, 8, 4, 4), *, suite="relation", strides=(1,), state="warm", dtype="float32", memory=None):
    """``times``: each peer's milliseconds of forward and backward, twice those of forward, or why it has none."""
    case = Case(shape, dtype, strides=strides)
    ours, peers = times["fbkd_ops"], {}
    for peer, ms in times.items():
        if isinstance(ms, str):
            peers[peer] = {"status": ms}
            continue
        peers[peer] = {"status": "ok", "forward": figures(ms / 2, ours / 2), "step": figures(ms, ours)}
        if memory:
            peers[peer]["peak_extra_mb"] = memory[peer]
    facts = {"shape": list(shape), "dtype": dtype, "layout": case.layout, "strides": list(strides), "title": case.title}
    measured = {"rounds": 3, "ceilings": CEILINGS, "cost": COST}
    return {"suite": suite, "state": state, "case": facts, "peers": peers} | measured


def report(results, **changes):
    made = {"command": "python benchmarks/microbench.py", "environment": MACHINE, "complete": True, "results": results}
    return made | {"scaling": [], "slower": series.slower(results)} | changes
