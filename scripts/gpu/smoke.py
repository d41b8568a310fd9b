"""The first minute on a GPU: whether the whole loss is right, what a step of it takes, and which kernels take it.

    python -m scripts.gpu.smoke FILE [--device cpu --shape 1 32 24 40]

The file is written anew after each part, so that a run that is cut off has told what it had:

* ``mistakes``: bfloat16 features beside float32 parameters, two images, small maps; outputs and gradients beside the
  literal formula in float64.
* ``steps``: forward and backward of P2..P5 of 800x1344 with 16 images and with 1: ``event_ms`` between two events,
  ``wall_ms`` with the host's time, and ``graph_ms``, replayed from a CUDA graph.
* ``kernels`` and ``others``: the profiler's time of each kernel of the package in the step with 16 images, beside the
  model's, and of everything that PyTorch launches.
"""

import argparse
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import ROOT
from benchmarks.inputs import LEVELS, Case
from benchmarks.loss_suites import STRIDES
from benchmarks.measurement import Job, mistakes
from benchmarks.results import OURS, text_rows, write_json
from benchmarks.timing import CaptureError, calls_of, interleaved
from scripts.gpu.op_calls import SIZES, loss_step
from scripts.gpu.parsers import kernel_name

DTYPE = "bfloat16"
MODEL = ROOT / "benchmarks" / "results" / "gpu-model.csv"
ROUNDS, SECONDS = 20, 3.0
NAMED = 12  # of PyTorch's kernels


def predictions(images: int, dtype: str, path: Path = MODEL) -> dict[str, float]:
    """Microseconds that `python -m benchmarks.gpu_model` predicts for each kernel of a step; empty without its file."""
    found = Counter()
    for launch in text_rows(path) if path.exists() else ():
        if (launch["images"], launch["dtype"]) == (str(images), dtype):
            found[launch["kernel"]] += float(launch["predicted_us"])
    return dict(found)


def own_kernels() -> set[str]:
    """Names of the package's CUDA and Triton kernels."""
    defined = r"(?:@triton\.jit\s+def|__global__\s+void\s+(?:\w+\([^)]*\)\s+)?)\s*(\w+)\("
    files = [*(ROOT / "src" / "fbkd_ops" / "kernels").glob("*.py"), *(ROOT / "csrc" / "cuda").glob("*.cu*")]
    return {name for file in files for name in re.findall(defined, file.read_text())}


def kernel_rows(averages: Iterable, device: str) -> dict[str, dict]:
    """Launches and microseconds by kernel, the longest first, of ``torch.profiler.profile.key_averages()``.

    On the CPU, for a trial, of its ops.
    """
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    rows = {}
    for each in averages:
        if each.device_type == kind:
            row = rows.setdefault(kernel_name(each.key), {"launches": 0, "us": 0.0})
            row["launches"] += each.count
            row["us"] += each.self_device_time_total if device == "cuda" else each.self_cpu_time_total
    rounded = {name: row | {"us": round(row["us"], 1)} for name, row in rows.items()}
    return dict(sorted(rounded.items(), key=lambda entry: -entry[1]["us"]))


def beside_the_model(rows: dict[str, dict], predicted: dict[str, float]) -> dict:
    """The package's kernels with what was predicted of each, those that were not launched too, and all the others."""
    own = {name: row for name, row in rows.items() if name in own_kernels()}
    absent = {name: {"launches": 0, "us": 0.0} for name in predicted if name not in own}
    kernels = {name: row | {"predicted_us": predicted.get(name)} for name, row in (own | absent).items()}
    others = {name: row for name, row in rows.items() if name not in own}
    total = {key: round(sum(row[key] for row in others.values()), 1) for key in ("launches", "us")}
    return {"kernels": kernels, "others": total | {"longest": dict(list(others.items())[:NAMED])}}


def profiled(step, device: str) -> dict[str, dict]:
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return kernel_rows(profiler.key_averages(), device)


def median_ms(call, device: str, **how) -> float:
    times = interleaved({"step": call}, ROUNDS if device == "cuda" else 1, device, SECONDS, **how)
    return round(statistics.median(times["step"]), 3)


def graph_figures(step) -> dict:
    """After a capture that failed nothing more may be measured in this process."""
    try:
        return {"graph_ms": median_ms(calls_of({"step": [step]}, as_graphs=True)["step"], "cuda")}
    except CaptureError as error:
        return {"graph_ms": None, "graph_problem": str(error)}


def checked(device: str, shape: tuple[int, ...]) -> dict[str, str]:
    """What is wrong with the loss in each dtype, empty if nothing is."""
    found = {}
    for dtype in (DTYPE, "float32") if device == "cuda" else (DTYPE,):
        job = Job("fbkd_loss", Case(shape, dtype, device=device, strides=STRIDES), "default", [OURS], 1, 1, 0.0)
        found |= {dtype: mistakes(job, [OURS])[OURS]}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", type=int, nargs=4, default=SIZES["loss"], metavar=("N", "C", "H", "W"), help="of P2")
    options = parser.parse_args(arguments)
    device, shape = options.device, tuple(options.shape)
    torch.backends.cudnn.allow_tf32 = False
    steps, figures, findings = {}, {}, {}

    def add(**parts) -> None:
        findings.update(parts)
        write_json(options.file, findings)

    add(mistakes=checked(device, shape if device == "cpu" else LEVELS["P2"]))
    for images in dict.fromkeys((shape[0], 1)):
        step = steps[images] = loss_step((images, *shape[1:]), DTYPE, device)
        for _ in range(3 if device == "cuda" else 1):  # the allocator's blocks are there from the second one on
            step()
        predicted = predictions(images, DTYPE)
        figures[images] = {
            "event_ms": median_ms(step, device),
            "wall_ms": median_ms(step, device, by_wall_clock=True),
            "predicted_kernels_ms": round(sum(predicted.values()) / 1e3, 3) if predicted else None,
        }
        add(steps=figures)
        if images == shape[0]:
            add(**beside_the_model(profiled(step, device), predicted))
    for images, step in steps.items() if device == "cuda" else ():
        figures[images] |= graph_figures(step)
        add(steps=figures)
        if "graph_problem" in figures[images]:
            break
    return 1 if any(findings["mistakes"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
