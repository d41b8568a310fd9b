"""One suite on one map in one state of memory: checked, then timed, in a process of its own.

``python -m benchmarks.measurement`` reads a job as JSON from its input and writes the result as JSON's last line.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Optional

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.cases import Case, Cost, Implementation, Suite
from benchmarks.mmrazor import NotInstalledError
from benchmarks.suites import SUITES, outputs_of, peers_of
from benchmarks.timing import interleaved, ratios, summary

__all__ = ["DOES_NOT_FIT", "OURS", "Job", "measure"]

DOES_NOT_FIT = "does not fit in memory"
PASSES = ("forward", "step")
OURS = "fbkd_ops"


@dataclass(frozen=True)
class Job:
    suite: str
    case: Case
    state: str
    peers: list[str]
    threads: int
    rounds: int
    seconds: float


class Runner:
    """A peer on its inputs: ``forward`` without gradients, ``step`` forward and backward."""

    def __init__(self, function: Callable, arguments: list[Tensor]):
        self.function, self.arguments = function, arguments
        self.leaves = [x for x in arguments if x.requires_grad]
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
    """Everything that is known of a job's peers: ``status`` is "ok" or says why there are no figures."""
    suite, case = SUITES[job.suite], job.case
    peers = peers_of(suite, case.device)
    missing = {name: f"{job.suite} has none on {case.device}" for name in job.peers if name not in peers}
    peers = {name: peers[name] for name in job.peers if name in peers}
    status = missing | {name: _wrong(suite, make, case.small) for name, make in peers.items()}
    result = {"suite": job.suite, "case": asdict(case) | {"title": case.title}, "state": job.state}
    try:
        arguments = suite.inputs(case)
        ceilings = _ceilings(case, suite.cost(case))
        for ceiling in ceilings.values():
            ceiling()
    except (RuntimeError, MemoryError) as error:
        status = {name: problem or _reason(error) for name, problem in status.items()}
        return result | {"peers": {name: {"status": status[name]} for name in job.peers}}
    runners = {name: Runner(peers[name](case), arguments) for name, problem in status.items() if not problem}
    status |= {name: _attempt(runner) for name, runner in runners.items()}
    runners = {name: runner for name, runner in runners.items() if not status[name]}
    rows = {name: {"status": status[name] or "ok"} for name in job.peers}
    for name, runner in runners.items():
        rows[name] |= _memory_of(runner, job)
    calls = {(name, which): getattr(runner, which) for name, runner in runners.items() for which in PASSES}
    times = interleaved(ceilings | calls, job.rounds, case.device, job.seconds)
    rates = _rates(case, {name: times[name] for name in ceilings})
    for name in runners:
        for which in PASSES:
            beside = {other: times.get((other, which)) for other in (suite.baseline, OURS)}
            least = _least(suite.cost(case), rates, which)
            rows[name][which] = _figures(times[name, which], beside[suite.baseline], beside[OURS], least)
    if case.device == "cpu":
        rates["copy_to_new_page_faults"] = memory.page_faults(ceilings["copy_to_new"])
    return result | {"rounds": len(times["sum"]), "ceilings": rates, "peers": rows}


def _wrong(suite: Suite, make: Callable[[Case], Implementation], case: Case) -> str:
    """How a peer's outputs or gradients differ from the literal formula's in float64; empty if they do not."""
    arguments = suite.inputs(case)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in arguments]
    truth = Runner(suite.implementations["reference"](case), exact)
    try:
        runner = Runner(make(case), arguments)
        problem = _difference(runner.forward(), truth.forward(), suite.tolerances[case.dtype])
        if problem:
            return f"WRONG without gradients: {problem}"
        results = runner.step()
    except Exception as error:
        return _reason(error)
    truth.grads = [grad.double() for grad in runner.grads]
    problem = _difference(results, truth.step(), suite.tolerances[case.dtype])
    return f"WRONG with gradients: {problem}" if problem else ""


def _difference(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float) -> str:
    if [x.shape for x in ours] != [x.shape for x in truth]:
        return f"shapes {[tuple(x.shape) for x in ours]}, expected {[tuple(x.shape) for x in truth]}"
    for index, (x, exact) in enumerate(zip(ours, truth)):
        error = ((x.double() - exact).abs() / (exact.abs() + exact.square().mean().sqrt())).max().item()
        if not error <= tolerance:
            return f"tensor {index} is off by {error:.2g}, allowed {tolerance:g}"
    return ""


def _attempt(runner: Runner) -> str:
    """Call a peer as it will be timed; why that fails, or nothing. The step comes first: it needs the most memory."""
    try:
        for which in (*reversed(PASSES), *PASSES):
            getattr(runner, which)()
    except Exception as error:
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, NotInstalledError):
        return text
    full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    return DOES_NOT_FIT if full or "bad_alloc" in text else f"failed: {type(error).__name__}: {text.splitlines()[0]}"


def _memory_of(runner: Runner, job: Job) -> dict[str, Optional[float]]:
    facts = {}
    if job.state == "warm":
        memory.settle(runner.step)
    else:
        extra = memory.peak_extra_bytes(runner.step, job.case.device)
        facts["peak_extra_mb"] = None if extra is None else extra / 1e6
    if job.case.device == "cpu":
        facts["step_page_faults"] = memory.page_faults(runner.step)
    return facts


def _ceilings(case: Case, cost: Cost) -> dict[str, Callable[[], object]]:
    """What the machine can do with a map of this size (the first of a pyramid): reading it, copying it, and, where the
    suite has matrix products, one with a square matrix of the channels' width.

    Reading and copying treat the map's memory as float32, whose sum needs no conversion.
    """
    features = case.features(0)
    words = torch.zeros(max(1, case.map_bytes // 4), device=case.device)
    target = torch.empty_like(words)
    ceilings = {"sum": words.sum, "copy": lambda: target.copy_(words), "copy_to_new": words.clone}
    if cost.forward_flops:
        matrix = features.flatten(2) if case.layout == "contiguous" else features.permute(0, 2, 3, 1).flatten(1, 2).mT
        weight = torch.randn(case.shape[1], case.shape[1]).to(features).expand(case.shape[0], -1, -1)
        product = torch.empty_like(matrix)
        ceilings["matmul"] = lambda: torch.matmul(weight, matrix, out=product)
    return ceilings


def _rates(case: Case, times: dict[str, list[float]]) -> dict[str, float]:
    """GB/s of reading, copying and copying into newly allocated memory (read + written); GFLOP/s of the product."""
    moved = 4 * max(1, case.map_bytes // 4) / 1e6
    median = {name: summary(values)["median"] for name, values in times.items()}
    rates = {"sum_gb_s": moved / median["sum"]}
    rates |= {f"{name}_gb_s": 2 * moved / median[name] for name in ("copy", "copy_to_new")}
    if "matmul" in median:
        n, channels, height, width = case.shape
        rates["matmul_gflop_s"] = 2 * n * channels * channels * height * width / 1e6 / median["matmul"]
    return rates


def _least(cost: Cost, rates: dict[str, float], which: str) -> tuple[float, float]:
    """Fewest bytes of a pass, and its least time in ms at the measured ceilings.

    Forward only reads: its bytes at the rate of the sum; backward's at that of the copy into existing memory.
    """

    def milliseconds(size: int, rate: float, flops: int) -> float:
        return max(size / 1e6 / rate, flops / 1e6 / rates["matmul_gflop_s"] if flops else 0.0)

    forward = milliseconds(cost.forward_bytes, rates["sum_gb_s"], cost.forward_flops)
    if which == "forward":
        return cost.forward_bytes, forward
    backward = milliseconds(cost.backward_bytes, rates["copy_gb_s"], cost.backward_flops)
    return cost.forward_bytes + cost.backward_bytes, forward + backward


def _figures(
    times: list[float], eager: Optional[list[float]], ours: Optional[list[float]], least: tuple[float, float]
) -> dict:
    """``eager`` and ``ours`` are the times of the baseline and of fbkd_ops in the same rounds."""
    ms = summary(times)
    size, least_ms = least
    return {
        "ms": ms,
        "gb_s": size / 1e6 / ms["median"],
        "ceiling_percent": 100 * least_ms / ms["median"],
        "speed_vs_eager": ratios(times, eager) if eager else None,
        "speed_of_fbkd_ops": ratios(ours, times) if ours else None,
    }


def main() -> None:
    job = json.load(sys.stdin)
    case = Case(**job["case"] | {name: tuple(job["case"][name]) for name in ("shape", "strides")})
    job = Job(**job | {"case": case})
    torch.set_num_threads(job.threads)
    if case.device == "cpu":
        memory.limit_to_available()
    print("\n" + json.dumps(measure(job)))


if __name__ == "__main__":
    main()
