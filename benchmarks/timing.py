"""Times that can be compared: everything alternates, round by round, so that a slow spell hits all alike."""

import statistics
import time
from collections.abc import Callable

import torch

LEAST_ROUNDS = 3


class CaptureError(RuntimeError):
    """CUDA cannot capture ``peer``. The allocator of this process may stay in an unknown state: measure in another."""

    def __init__(self, peer: str, error: Exception):
        super().__init__(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        self.peer = peer


def interleaved(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    seconds: float = float("inf"),
    by_wall_clock: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of each function in each round, A B C A B C ...

    After ``seconds`` no new round begins, except that LEAST_ROUNDS (or ``rounds``, if fewer) are always made. The
    functions must have been called before: nothing is warmed up here. On a GPU the time is that between two events, or
    ``by_wall_clock`` from the call until the device has finished.
    """
    once = _cpu_ms if device == "cpu" else _wall_ms if by_wall_clock else _cuda_ms
    times = {name: [] for name in functions}
    begin = time.perf_counter()
    for made in range(rounds):
        if made >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name, function in functions.items():
            times[name].append(once(function))
    return times


def calls_of(peers: dict[str, list[Callable[[], object]]], as_graphs: bool) -> dict[str, Callable[[], object]]:
    """All calls of each peer as one call, or as one CUDA graph, in which no time between launches counts.

    Raises:
        CaptureError: a peer cannot be captured.
    """
    plain = {name: _together(calls) for name, calls in peers.items()}
    if not as_graphs:
        return plain
    pool = torch.cuda.graph_pool_handle()  # one for all: graphs run one after another, and nobody reads their results
    graphs = {}
    for name, call in plain.items():
        try:
            graphs[name] = _captured(call, pool)
        except RuntimeError as error:
            raise CaptureError(name, error) from error
    return graphs


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


def _wall_ms(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def summary(values: list[float], name: str) -> dict[str, float]:
    """Return ``name``, the median, ``name_p20`` and ``name_p80``, the 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {name: statistics.median(values), f"{name}_p20": fifths[0], f"{name}_p80": fifths[-1]}


def ratios(times: list[float], baseline: list[float], name: str) -> dict[str, float]:
    """Return the summary of how many times as fast as the baseline each round was."""
    return summary([base / value for base, value in zip(baseline, times, strict=True)], name)
