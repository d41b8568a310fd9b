"""Times that can be compared: everything alternates, round by round, so that a slow spell hits all alike."""

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["calls_of", "interleaved", "ratios", "summary"]

LEAST_ROUNDS = 3


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int, device: str, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of each function in each round, A B C A B C ...

    After ``seconds`` no new round begins, except that LEAST_ROUNDS (or ``rounds``, if fewer) are always made. The
    functions must have been called before: nothing is warmed up here.
    """
    once = _cuda_ms if device == "cuda" else _cpu_ms
    times = {name: [] for name in functions}
    begin = time.perf_counter()
    for made in range(rounds):
        if made >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            times[name].append(once(function))
    return times


def calls_of(
    peers: dict[str, list[Callable[[], object]]], device: str, capturable: bool = True
) -> tuple[dict[str, Callable[[], object]], bool]:
    """Of each peer all of its calls as one, and whether as CUDA graphs, in which no time between launches counts.

    Where one peer cannot be captured none is, so that the same is measured of all.
    """
    plain = {name: _together(calls) for name, calls in peers.items()}
    if device != "cuda" or not capturable:
        return plain, False
    try:
        pool = (
            torch.cuda.graph_pool_handle()
        )  # one for all: graphs run one after another, and nobody reads their results
        return {name: _captured(call, pool) for name, call in plain.items()}, True
    except RuntimeError:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return plain, False


def _together(calls: list[Callable[[], object]]) -> Callable[[], object]:
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def _captured(function: Callable[[], object], pool: object) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream as the current one; the outer block sets that right.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
        function()
    return graph.replay


def _cpu_ms(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()  # its results are freed before the clock stops
    return (time.perf_counter() - begin) * 1e3


def _cuda_ms(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def summary(values: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[-1]}


def ratios(times: list[float], baseline: list[float]) -> dict[str, float]:
    """Summary of how many times as fast as the baseline each round was."""
    return summary([base / value for base, value in zip(baseline, times, strict=True)])
