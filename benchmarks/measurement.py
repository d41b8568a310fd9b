"""One suite on one map in one state of memory: checked, then timed, in a process of its own.

``python -m benchmarks.measurement`` reads a job as JSON from its input and writes the result as JSON's last line.
"""

import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.inputs import Case, Cost, Implementation, Suite
from benchmarks.mmrazor import NotInstalledError
from benchmarks.results import CEILINGS, OURS, PASSES
from benchmarks.suites import SUITES, outputs_of, peers_of
from benchmarks.timing import CaptureError, calls_of, interleaved, ratios, summary

DOES_NOT_FIT = "does not fit in memory"
MOST_SETS = 32
QUICK = 1.0  # seconds
# What a row has besides its place, peer, pass and status; None where it was not measured.
FIGURES = [f"{name}{part}" for name in ("ms", "vs_baseline", "speed") for part in ("", "_p20", "_p80")]
FIGURES += ["bytes", "flops", "gb_s", "ceiling_percent", "peak_mb", "page_faults", "baseline", "input_sets", "rounds"]
FIGURES += [*CEILINGS, "copy_to_new_page_faults"]
LARGE_BYTES, LARGE_SIDE = 1 << 30, 8192  # of a GPU's ceilings


@dataclass(frozen=True)
class Job:
    suite: str
    case: Case
    state: str
    peers: list[str]
    threads: int
    rounds: int
    seconds: float
    checked: dict[str, str] = field(default_factory=dict)  # peers whose results are known, and what is wrong with them
    uncaptured: dict[str, str] = field(default_factory=dict)  # peers that an earlier process could not capture, and why

    @property
    def check(self) -> tuple[str, Case]:
        """Jobs that have this in common compare the same results with the literal formula."""
        return SUITES[self.suite].checked_as or self.suite, self.case.checked


class Runner:
    """A peer on one set of inputs: ``forward`` without gradients, ``step`` forward and backward."""

    def __init__(self, function: Callable, arguments: list[Tensor]):
        self.function, self.arguments = function, arguments
        own = function.parameters() if isinstance(function, nn.Module) else ()
        self.leaves = [x for x in (*arguments, *own) if x.requires_grad]
        self.grads = None

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return outputs_of(self.function(*self.arguments))

    def step(self) -> tuple[Tensor, ...]:
        """Outputs and gradients of the inputs, from random gradients of the outputs that are the same for all peers."""
        outputs = outputs_of(self.function(*self.arguments))
        if self.grads is None:
            generator = torch.Generator().manual_seed(4)
            self.grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        return (*outputs, *torch.autograd.grad(outputs, self.leaves, self.grads))


def measure(job: Job) -> dict:
    """Return ``rows``, one per peer and pass, and ``checked``, the mistakes of each peer beside the literal formula.

    A row's ``status`` is "ok" or says why it has no figures; a peer's mistakes are "" if it is right.

    Raises:
        CaptureError: a peer cannot be captured in a CUDA graph.
    """
    suite, case = SUITES[job.suite], job.case
    makers = peers_of(suite, case.device)
    wrongs = mistakes(job, [name for name in job.peers if name in makers])
    status = {name: wrongs.get(name, f"{job.suite} has none on {case.device}") for name in job.peers}
    status |= {name: f"cannot be captured: {why}" for name, why in job.uncaptured.items()}
    if suite.checked_as:
        torch.backends.cudnn.allow_tf32 = True  # a whole model as users run it
    cost = suite.cost(case) if suite.cost else None
    try:
        sets = _input_sets(suite, case)
        ceilings = _ceilings(case, cost) if cost else {}
        for ceiling in ceilings.values():
            ceiling.call()
    except (RuntimeError, MemoryError) as error:
        failed = {name: problem or _reason(error) for name, problem in status.items()}
        return {"rows": empty_rows(job, failed), "checked": wrongs}
    runners, facts = {}, {}
    for name, problem in status.items():
        ready, facts[name] = (None, {"status": problem}) if problem else _prepared(makers[name], sets, job)
        if ready:
            runners[name] = ready
    times = _times(runners, ceilings, job)
    baseline = _baseline(suite, facts)
    shared = {"baseline": baseline, "input_sets": len(sets), "rounds": max(map(len, times.values()), default=0)}
    rates = _rates(ceilings, times)
    shared |= rates
    if ceilings and case.device == "cpu":
        shared["copy_to_new_page_faults"] = memory.page_faults(ceilings["copy_to_new"].call)
    rows = empty_rows(job, {name: known["status"] for name, known in facts.items()})
    for row in rows:
        peer, which = row["peer"], row["pass"]
        if peer in runners:
            rounds = (times.get((name, which)) for name in (peer, baseline, OURS))
            row |= _figures(*rounds) | (_traffic(cost, rates, which, times[peer, which]) if cost else {})
            row |= facts[peer] | shared
    return {"rows": rows, "checked": wrongs}


def empty_rows(job: Job, status: dict[str, str]) -> list[dict]:
    """Return a job's rows without figures, by peer and pass."""
    case = job.case
    place = {"suite": job.suite, "case": case.title}
    place |= dict(zip(("n", "channels", "height", "width"), case.shape, strict=True))
    place |= {"strides": " ".join(map(str, case.strides)), "dtype": case.dtype, "layout": case.layout}
    return [
        place | {"state": job.state, "peer": name, "pass": which, "status": problem} | dict.fromkeys(FIGURES)
        for (name, problem), which in itertools.product(status.items(), PASSES)
    ]


def mistakes(job: Job, peers: list[str]) -> dict[str, str]:
    """What is wrong with each peer, as it is known or as a comparison shows: in the suite's own terms or, by name, in
    those of the suite that it is checked as."""
    name, case = job.check
    makers, truth = peers_of(SUITES[name], case.device), Truth(SUITES[name], case)

    def wrong(peer: str) -> str:
        if peer in job.checked:
            return job.checked[peer]
        return _wrong(truth, makers[peer]) if peer in makers else ""

    return {peer: wrong(peer) for peer in peers}


def _baseline(suite: Suite, facts: dict[str, dict]) -> str:
    """Whose speed the others' is compared with: the literal formula's where the suite's own one is not installed."""
    status = facts.get(suite.baseline, {}).get("status", "")
    return "reference" if status.startswith("not installed") else suite.baseline


def _prepared(
    make: Callable[[Case], Implementation], sets: list[list[Tensor]], job: Job
) -> tuple[list[Runner] | None, dict]:
    """A peer on each set of inputs, and what its rows say: its memory, or why it has no figures."""
    try:
        runners = _ready(make(job.case), sets)
        return runners, {"status": "ok"} | _memory_of(runners[0], job)
    except Exception as error:
        return None, {"status": _reason(error)}


class Truth:
    """The literal formula in float64, once for all that are compared with it."""

    def __init__(self, suite: Suite, case: Case):
        self.suite, self.case = suite, case
        self._steps = {}

    @functools.cached_property
    def runner(self) -> Runner:
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in self.suite.inputs(self.case)]
        return Runner(self.suite.implementations["reference"](self.case), exact)

    @functools.cached_property
    def forward(self) -> tuple[Tensor, ...]:
        return self.runner.forward()

    def step(self, grads: list[Tensor]) -> tuple[Tensor, ...]:
        """From the same gradients of the outputs; those of all peers are alike but for their dtype."""
        dtypes = tuple(grad.dtype for grad in grads)
        if dtypes not in self._steps:
            self.runner.grads = [grad.double() for grad in grads]
            self._steps[dtypes] = self.runner.step()
        return self._steps[dtypes]


def _wrong(truth: Truth, make: Callable[[Case], Implementation]) -> str:
    """How a peer's outputs or gradients differ from the literal formula's in float64; empty if they do not."""
    tolerance = truth.suite.tolerances[truth.case.dtype]
    try:
        runner = Runner(make(truth.case), truth.suite.inputs(truth.case))
        problem = _difference(runner.forward(), truth.forward, tolerance)
        if problem:
            return f"WRONG without gradients: {problem}"
        results = runner.step()
    except Exception as error:
        return _reason(error)
    problem = _difference(results, truth.step(runner.grads), tolerance)
    return f"WRONG with gradients: {problem}" if problem else ""


def _difference(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float) -> str:
    if [x.shape for x in ours] != [x.shape for x in truth]:
        return f"shapes {[tuple(x.shape) for x in ours]}, expected {[tuple(x.shape) for x in truth]}"
    for index, (x, exact) in enumerate(zip(ours, truth, strict=True)):
        error = ((x.double() - exact).abs() / (exact.abs() + exact.square().mean().sqrt())).max().item()
        if not error <= tolerance:
            return f"tensor {index} is off by {error:.2g}, allowed {tolerance:g}"
    return ""


def _ready(function: Implementation, sets: list[list[Tensor]]) -> list[Runner]:
    """A peer on each set of inputs, called as it will be timed. The step comes first: it needs the most memory."""
    runners = [Runner(function, arguments) for arguments in sets]
    begin = time.perf_counter()
    runners[0].step()
    runners[0].forward()
    if time.perf_counter() - begin < QUICK:  # where what only a first call does would matter
        runners[0].forward()
        runners[0].step()
    return runners


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, NotInstalledError):
        return text
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    return DOES_NOT_FIT if full or "bad_alloc" in text else f"failed: {type(error).__name__}: {text.splitlines()[0]}"


def _times(runners: dict[str, list[Runner]], ceilings: dict[str, "Ceiling"], job: Job) -> dict:
    """Milliseconds of each round: of ceilings by name, of a pass by peer and pass and for one set of inputs."""
    calls = {}
    for which in PASSES:
        of_sets = {name: [getattr(runner, which) for runner in each] for name, each in runners.items()}
        made = calls_of(of_sets, as_graphs=job.state == "graphs")
        calls |= {(name, which): call for name, call in made.items()}
    everything = {name: ceiling.call for name, ceiling in ceilings.items()} | calls
    times = interleaved(everything, job.rounds, job.case.device, job.seconds, by_wall_clock=job.state == "eager")
    counts = {(name, which): len(each) for name, each in runners.items() for which in PASSES}
    return {key: [value / counts.get(key, 1) for value in found] for key, found in times.items()}


def _memory_of(runner: Runner, job: Job) -> dict[str, float | None]:
    facts = {}

    def step() -> None:
        """With the peak of its memory, where that can be told."""
        extra = memory.peak_extra_bytes(runner.step, job.case.device)
        facts["peak_mb"] = None if extra is None else extra / 1e6

    if job.case.device == "cuda":
        step()
    elif job.state == "warm":
        facts["page_faults"] = memory.settle(runner.step)
    else:
        facts["page_faults"] = memory.page_faults(step if job.state == "fresh" else runner.step)
    return facts


class Ceiling(NamedTuple):
    """Something that the machine does as fast as it can."""

    call: Callable[[], object]
    unit: str  # of its rate
    size: float  # what one call does, in 1e-6 of that unit's bytes or operations a millisecond


def _input_sets(suite: Suite, case: Case) -> list[list[Tensor]]:
    """On a GPU sets of the inputs, up to MOST_SETS: so many that a set has left the cache before it comes again.

    One on the CPU, and of a suite that takes its time between kernels anyway.
    """
    sets = [suite.inputs(case)]
    if case.device != "cuda" or not suite.capturable:
        return sets
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(x.nbytes for x in sets[0])
    count = min(MOST_SETS, 1 + math.ceil(2 * cache / size))
    return sets + [suite.inputs(case) for _ in range(count - 1)]


def _ceilings(case: Case, cost: Cost | None) -> dict[str, Ceiling]:
    """What the machine can do with a map of this size (the first of a pyramid): reading it, copying it, and, where the
    suite has matrix products, one with a square matrix of the channels' width. On a GPU memory and matrices are large.

    Reading and copying treat the memory as float32, whose sum needs no conversion.
    """
    size = max(case.map_bytes, LARGE_BYTES if case.device == "cuda" else 4) // 4 * 4
    words = torch.zeros(size // 4, device=case.device)
    target = torch.empty_like(words)
    ceilings = {
        "sum": Ceiling(words.sum, "gb_s", size / 1e6),
        "copy": Ceiling(lambda: target.copy_(words), "gb_s", 2 * size / 1e6),
        "copy_to_new": Ceiling(words.clone, "gb_s", 2 * size / 1e6),
    }
    if cost is not None and cost.forward_flops:
        ceilings["matmul"] = _matmul(case)
    return ceilings


def _matmul(case: Case) -> Ceiling:
    if case.device == "cuda":
        left, right = (
            torch.randn(LARGE_SIDE, LARGE_SIDE, device="cuda").to(getattr(torch, case.dtype)) for _ in range(2)
        )
    else:
        features = case.features(0)
        right = features.flatten(2) if case.layout == "contiguous" else features.permute(0, 2, 3, 1).flatten(1, 2).mT
        left = torch.randn(case.shape[1], case.shape[1]).to(features).expand(case.shape[0], -1, -1)
    product = torch.empty_like(right)
    flops = 2 * left.shape[-1] * right.numel()
    return Ceiling(lambda: torch.matmul(left, right, out=product), "gflop_s", flops / 1e6)


def _rates(ceilings: dict[str, Ceiling], times: dict[Any, list[float]]) -> dict[str, float]:
    """GB/s of reading, copying and copying into newly allocated memory (read + written); GFLOP/s of the product."""
    return {f"{name}_{each.unit}": each.size / statistics.median(times[name]) for name, each in ceilings.items()}


def fewest(cost: Cost, which: str) -> tuple[int, int]:
    """Return the fewest bytes and operations of a pass; a step has forward's and backward's."""
    if which == "forward":
        return cost.forward_bytes, cost.forward_flops
    return cost.forward_bytes + cost.backward_bytes, cost.forward_flops + cost.backward_flops


def _least_ms(cost: Cost, rates: dict[str, float], which: str) -> float:
    """The least time of a pass at the measured ceilings.

    Forward only reads: its bytes at the rate of the sum; backward's at that of the copy into existing memory.
    """

    def milliseconds(size: int, rate: float, flops: int) -> float:
        return max(size / 1e6 / rate, flops / 1e6 / rates["matmul_gflop_s"] if flops else 0.0)

    forward = milliseconds(cost.forward_bytes, rates["sum_gb_s"], cost.forward_flops)
    if which == "forward":
        return forward
    return forward + milliseconds(cost.backward_bytes, rates["copy_gb_s"], cost.backward_flops)


def _traffic(cost: Cost, rates: dict[str, float], which: str, times: list[float]) -> dict:
    size, flops = fewest(cost, which)
    ms = statistics.median(times)
    rate, percent = size / 1e6 / ms, 100 * _least_ms(cost, rates, which) / ms
    return {"bytes": size, "flops": flops, "gb_s": rate, "ceiling_percent": percent}


def _figures(times: list[float], baseline: list[float] | None, ours: list[float] | None) -> dict:
    """Times, and ratios within rounds: times as fast as the baseline, and how many times as fast fbkd_ops is."""
    found = summary(times, "ms") | (ratios(times, baseline, "vs_baseline") if baseline else {})
    return found | (ratios(ours, times, "speed") if ours else {})


def main() -> None:
    job = json.load(sys.stdin)
    case = Case(**job["case"] | {name: tuple(job["case"][name]) for name in ("shape", "strides")})
    job = Job(**job | {"case": case})
    torch.set_num_threads(job.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for all; PyTorch's default is TF32 in convolutions
    if case.device == "cpu":
        memory.limit_to_available()
    try:
        result = measure(job)
    except CaptureError as error:
        result = {"uncaptured": {error.peer: str(error)}}
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
