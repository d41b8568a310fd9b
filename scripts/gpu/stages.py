"""The stages of the check. Each gets the time it may take and says what came of it.

In a dry run, which needs no GPU, every stage takes the same way with commands for the CPU on tiny inputs.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from scripts.gpu import parsers
from scripts.gpu.processes import Done, run_together

__all__ = ["STAGES", "Context", "Outcome", "Stage", "missing_requirements"]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
CASES = [PYTHON, "-m", "scripts.gpu.op_calls"]
KEPT_OUTPUT = 60_000  # characters of each command in the log
LOG_SIZE = 8 << 20  # bytes of the log at which it ends
SHARDS = min(12, os.cpu_count() or 1)
THREADS = 2  # of the CPU, in each process
TOLD = 40  # failing tests that are named
SETUPTOOLS = 77  # the first that reads pyproject.toml's license
# compute-sanitizer's tools and the backends they watch, in turn: what says most and takes least comes first.
SANITIZED = (
    [("memcheck", "cuda")],
    [("racecheck", "cuda"), ("initcheck", "cuda")],
    [("memcheck", "triton")],
    [("racecheck", "triton"), ("initcheck", "triton")],
)
# The benchmark at the size that the package is made for, and what else it has, the suites that say most first.
LARGE = ["--suite", "fbkd_loss", "relation", "--shapes", "16,256,200,336", "--dtype", "bfloat16"]
LARGE += ["--peers", "mmrazor", "reference", "--seconds", "2"]
SUITES = ["attention_pool", "masked_l2", "adapted_masked_l2", "train_step", "fbkd_loss", "relation", "non_local"]
SMALL = ["--suite", *SUITES, "--shapes", "P2", "--dtype", "bfloat16", "float32", "--seconds", "1"]
DRY = ["--suite", "attention_pool", "--shapes", "1,4,6,7", "--rounds", "1", "--seconds", "0"]
DRY += ["--peers", "eager", "fbkd_ops"]
HEAVIEST = 5  # kernels of the whole loss that ncu measures
PROFILED = [("cuda", "bfloat16"), ("triton", "bfloat16"), ("cuda", "float32"), ("triton", "float32")]


@dataclass
class Outcome:
    """What a stage came to. ``why`` are the lines that explain a status other than "ok"."""

    status: str = "ok"  # or "failed", or "skipped: " or "incomplete: " and the reason
    figures: dict = field(default_factory=dict)
    why: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, problems: list[str], figures: dict) -> "Outcome":
        return cls("failed" if problems else "ok", figures, problems)


@dataclass(frozen=True)
class Context:
    """Where a run takes place and where its files go. ``cache`` is Triton's; ``packages`` has what WHEELS brought."""

    out: Path
    scratch: Path
    dry: bool
    cache: Path
    packages: Path | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def backends(self) -> list[str]:
        return ["cpu"] if self.dry else ["cuda", "triton"]

    def run(self, commands: list[list[str]], seconds: float, variables: dict | None = None) -> list[Done]:
        """Run commands side by side in the source tree; their output goes to the log."""
        paths = [str(ROOT), *map(str, filter(None, [self.packages, os.environ.get("PYTHONPATH")]))]
        common = {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": os.pathsep.join(paths)}
        common |= {"TRITON_CACHE_DIR": str(self.cache)}
        results = run_together(commands, seconds, ROOT, common | (variables or {}))
        for done in results:
            self.log(f"$ {shlex.join(done.command)}\n{done.output[-KEPT_OUTPUT:]}\n[{done.problem or 'done'}]\n\n")
        return results

    def log(self, text: str) -> None:
        path = self.out / "log.txt"
        if not path.exists() or path.stat().st_size < LOG_SIZE:
            with path.open("a") as file:
                file.write(text)


@dataclass(frozen=True)
class Stage:
    """``least`` seconds are kept for it by the stages before it; without them it is skipped."""

    name: str
    run: Callable[[Context, float], Outcome]
    least: float
    limit: float


def missing_requirements() -> list[str]:
    """What the stages need and this Python has not, a line each."""
    names = ("setuptools", "ninja", "pybind11", "pytest", "hypothesis", "rich", "triton")
    lines = [f"{name} is not installed" for name in names if importlib.util.find_spec(name) is None]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("setuptools")
        if int(version.split(".")[0]) < SETUPTOOLS:
            lines.append(f"setuptools {version} is too old to build: expected {SETUPTOOLS} or newer, maybe as a wheel")
    return lines


def build(context: Context, seconds: float) -> Outcome:
    """Install in place for this GPU, and see that what was built loads."""
    command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    command += ["--verbose", "-e", "."]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture()
    variables = {"TORCH_CUDA_ARCH_LIST": archs, "FBKD_OPS_CUDA": os.environ.get("FBKD_OPS_CUDA", "1")}
    if context.dry:
        context.log(f"would run: {shlex.join(command)} with {variables}\n\n")
    else:
        (installed,) = context.run([command], seconds, variables)
        if installed.problem:
            return Outcome("failed", {"architectures": archs}, [installed.problem, *installed.last_lines(12)])
    (info,) = context.run([[PYTHON, "-m", "fbkd_ops.info"]], 60)
    states = parsers.library_states(info.output)
    missing = [f"the {part} library is {states.get(part, 'unknown')}" for part in ("cpu", context.device)]
    problems = [info.problem, *info.last_lines()] if info.problem else [m for m in missing if not m.endswith(" loaded")]
    return Outcome.of(list(dict.fromkeys(problems)), {"architectures": archs} | states)


def architecture() -> str:
    """Of the GPU that is present, as TORCH_CUDA_ARCH_LIST takes it; "" without one."""
    return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""


def compile_kernels(context: Context, seconds: float) -> Outcome:
    """Compile the Triton kernels side by side that later stages would compile one after another."""
    command = [PYTHON, "-m", "scripts.gpu.triton_cache", str(context.cache)]
    if arch := architecture().replace(".", ""):
        command += ["--arch", arch]
    if context.dry:
        command += ["--most", "1", "--processes", "1"]
    (done,) = context.run([command], seconds, {"TRITON_INTERPRET": "0"})
    if done.timed_out:
        return Outcome("incomplete: out of time")  # what is in the cache stays there
    lines = done.last_lines(TOLD)
    figures = json.loads(lines.pop()) if lines and lines[-1].startswith("{") else {}
    return Outcome.of([done.problem, *lines] if done.problem else [], figures)


def smoke(context: Context, seconds: float) -> Outcome:
    """Whether the loss is right, what a step takes, and its kernels beside the model's."""
    path = context.out / "smoke.json"
    path.unlink(missing_ok=True)
    command = [PYTHON, "-m", "scripts.gpu.smoke", str(path), "--device", context.device]
    command += ["--shape", "1", "32", "24", "40"] if context.dry else []
    (done,) = context.run([command], seconds)
    found = json.loads(path.read_text()) if path.exists() else {}
    problems = [f"{dtype}: {text}" for dtype, text in found.get("mistakes", {}).items() if text]
    if done.problem and not problems:
        problems = [done.problem, *done.last_lines()]
    figures = {"checked": ", ".join(found.get("mistakes", {}))}
    for images, step in found.get("steps", {}).items():
        figures |= {f"N={images} {name}": value for name, value in step.items() if value is not None}
    if "others" in found:
        figures |= {"others_launches": found["others"]["launches"], "others_us": found["others"]["us"]}
    if not (context.dry or found.get("kernels")):
        problems.append("the profiler has seen no kernel of the package")
    return Outcome.of(problems, figures | {"kernels": found.get("kernels", {})})


@dataclass(frozen=True)
class Selection:
    """Tests that need a GPU, by name, and a few that stand for them in a dry run."""

    paths: tuple[str, ...]
    names: str
    dry_names: str
    shards: int = 1
    dry_shards: int = 1

    def commands(self, context: Context) -> list[list[str]]:
        paths, names = (("tests/test_masked_l2.py",), self.dry_names) if context.dry else (self.paths, self.names)
        mark = "not gpu" if context.dry else "gpu"
        count = self.dry_shards if context.dry else self.shards
        command = [PYTHON, "-m", "pytest", "-p", "scripts.gpu.shard", "-p", "no:cacheprovider", "-m", mark, *paths]
        command += ["-k", names] if names else []
        return [
            [*command, f"--shard={number}/{count}", f"--junitxml={self.result(context, number)}"]
            for number in range(1, count + 1)
        ]

    def result(self, context: Context, number: int) -> Path:
        return context.scratch / f"tests-{number}.xml"


def tests_of(selection: Selection) -> Callable[[Context, float], Outcome]:
    """The stage that runs a selection, in shares side by side."""

    def run(context: Context, seconds: float) -> Outcome:
        commands = selection.commands(context)
        for number in range(1, len(commands) + 1):
            selection.result(context, number).unlink(missing_ok=True)
        results = context.run(commands, seconds)
        found = [parsers.tests_in(selection.result(context, number)) for number in range(1, len(commands) + 1)]
        return judged(context, results, found)

    return run


def judged(context: Context, results: list[Done], found: list[parsers.Tests | None]) -> Outcome:
    """A failed test fails the stage, and so does one that skips itself on the GPU that it was selected for."""
    tests, problems = parsers.Tests(), []
    for done, part in zip(results, found, strict=True):
        if part:
            tests.add(part)
        # pytest: 1, some tests failed; 5, none in this share.
        if not part or done.timed_out or done.returncode not in (0, 1, 5):
            problems += [f"{done.problem or 'no results'}: {done.command[-2]}", *done.last_lines(3)]
    for name, message in list(tests.failures.items())[:TOLD]:
        problems.append(f"{name}: {(message.splitlines() or [''])[0][:200]}")
        context.log(f"FAILED {name}\n{message[:4000]}\n\n")
    problems += [f"skipped {count}: {reason}" for reason, count in tests.skips.items()]
    if not tests.counts["passed"]:
        problems.append("no test passed")
    return Outcome.of(problems, dict(tests.counts))


def sanitizer(context: Context, seconds: float) -> Outcome:
    """The tools of compute-sanitizer over every op, the CUDA kernels first; what time leaves for the others."""
    program = tool("compute-sanitizer")
    if program is None:
        return Outcome("skipped: compute-sanitizer is not on PATH")
    end, figures, problems, late, obstacles = time.monotonic() + seconds, {}, [], [], []
    rounds = [[("memcheck", "cpu")], [("racecheck", "cpu"), ("initcheck", "cpu")]] if context.dry else SANITIZED
    for names in rounds:
        left = end - time.monotonic()
        results = sanitized(context, program, names, left) if left > 0 else [None] * len(names)
        for (checker, backend), done in zip(names, results, strict=True):
            obstacle = parsers.sanitizer_obstacle(done.output) if done else ""
            if done is None or (done.timed_out and not parsers.sanitizer_problems(done.output)):
                late.append(f"{checker} of {backend}")
            elif obstacle:
                obstacles.append(f"{checker} of {backend}: does not run here ({obstacle})")
            else:
                figures[f"{checker}_{backend}"], found = sanitizer_result(checker, backend, done)
                problems += found
    if obstacles and not figures:
        return Outcome(f"skipped: compute-sanitizer: {obstacles[0]}")
    if late and not problems + obstacles:
        return Outcome(f"incomplete: out of time for {', '.join(late)}", figures)
    return Outcome.of(obstacles + problems, figures)


def sanitized(context: Context, program: str, names: list[tuple[str, str]], seconds: float) -> list[Done]:
    """Some tools at once. Without PyTorch's cache each tensor is an allocation, whose bounds and first use they see."""
    options = ["--target-processes", "application-only", "--print-limit", "20"]
    commands = [[program, "--tool", checker, *options, *small_cases(context, backend)] for checker, backend in names]
    return context.run(commands, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def sanitizer_result(checker: str, backend: str, done: Done) -> tuple[int | None, list[str]]:
    """How many problems a tool has found, and what to say of them."""
    found = parsers.sanitizer_problems(done.output)
    if found == 0 and not done.problem:
        return found, []
    told = parsers.sanitizer_findings(done.output) if found else done.last_lines()
    return found, [f"{checker} of {backend}: {done.problem or 'ended'}, problems: {found}", *told]


def small_cases(context: Context, backend: str) -> list[str]:
    return [*CASES, "small", "--device", context.device, "--backend", backend]


def bench_of(arguments: list[str]) -> Callable[[Context, float], Outcome]:
    """The stage that adds tables to those of the benchmark; where time runs out, those that are ready."""

    def run(context: Context, seconds: float) -> Outcome:
        path = context.out / "microbench.json"
        before = tables_in(path)
        command = [PYTHON, "benchmarks/microbench.py", "--device", context.device, "--json", str(path)]
        command += DRY if context.dry else arguments
        (done,) = context.run([[*command, "--update"] if before else command], seconds)
        report = json.loads(path.read_text()) if path.exists() else {"results": [], "complete": False}
        made = [result for result in report["results"] if result not in before]
        if not made:
            return Outcome("failed", {}, [done.problem or "no figures", *done.last_lines()])
        report = report | {"results": made}
        problems = parsers.failed_rows(report)
        if done.problem and not done.timed_out:
            problems += [done.problem, *done.last_lines()]
        figures = {"tables": len(made), "complete": report["complete"]} | parsers.step_times(report)
        return Outcome.of(problems, figures)

    return run


def tables_in(path: Path) -> list[dict]:
    """The tables that stages before have left in the benchmark's file; one that is no such file is removed."""
    try:
        return json.loads(path.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError):
        path.unlink(missing_ok=True)
        return []


def ncu_of(profiles: Callable[[Context], dict[str, list[str]]]) -> Callable[[Context, float], Outcome]:
    """The stage that measures kernels with ncu; ``profiles`` are options and programs by what they show."""

    def run(context: Context, seconds: float) -> Outcome:
        program = tool("ncu")
        if program is None:
            return Outcome("skipped: ncu is not on PATH")
        figures, rows, problems, jobs = {}, {}, [], profiles(context)
        for name, command in jobs.items():
            (done,) = context.run([[program, *NCU, *command]], seconds / len(jobs))
            obstacle = parsers.ncu_obstacle(done.output)
            if obstacle:
                return Outcome(f"skipped: ncu cannot measure here: {obstacle}")
            rows[name] = parsers.ncu_rows(done.output)
            if not rows[name] or done.problem:
                problems += [f"{name}: {done.problem or 'no kernel was measured'}", *done.last_lines(3)]
            figures[name] = parsers.kernel_table(rows[name])
            add_launches(context.out / "ncu.json", rows)
        return Outcome.of(problems, figures)

    return run


# The card's clocks stay as they are, which is not ncu's default.
NCU = ["--config-file", "off", "--csv", "--print-units", "base", "--print-kernel-base", "function"]
NCU += ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only"]
NCU += ["--metrics", ",".join(parsers.NCU_METRICS.values())]


def add_launches(path: Path, rows: dict[str, list[dict]]) -> None:
    """Write the launches of some profiles into a file beside those of others."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | rows, indent=1) + "\n")


def heaviest(context: Context) -> dict[str, list[str]]:
    """The kernels that take longest in a step of the whole loss, as the smoke run has seen; without it all kernels."""
    path = context.out / "smoke.json"
    kernels = json.loads(path.read_text()).get("kernels", {}) if path.exists() else {}
    chosen = ["--kernel-name", f"regex:^({'|'.join(list(kernels)[:HEAVIEST])})$"] if kernels else []
    program = [*CASES, "loss", "--backend", "auto", "--dtype", "bfloat16", "--device", context.device]
    size = ["--shape", "1", "32", "24", "40"] if context.dry else []
    return {"whole loss, 16 images, P2..P5, bfloat16": [*chosen, *program, *size]}


def every_op(context: Context) -> dict[str, list[str]]:
    """Every op by itself on P2 with four images."""
    jobs = [("cpu", "float32")] if context.dry else PROFILED
    size = ["--shape", "2", "8", "5", "7"] if context.dry else []
    command = [*CASES, "large", "--device", context.device]
    return {
        f"{backend}, every op, 4 images, P2, {dtype}": [*command, "--backend", backend, "--dtype", dtype, *size]
        for backend, dtype in jobs
    }


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; None where there is none."""
    roots = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(root, "bin") for root in roots if root)]
    return shutil.which(name, path=os.pathsep.join(folders))


# Nothing in the ignored files needs a GPU, and to collect them every process would import their frameworks.
WITHOUT_GPU = ("tests/integrations", "tests/test_demo.py", "tests/test_visualize.py")
TESTS = ("tests", *(f"--ignore={path}" for path in WITHOUT_GPU))
OTHERS = "not opcheck and not gradcheck and not cuda_graph"
# The ops without matrix products take little of a step and have most of the tests.
LIGHT = "(test_attention_pool or test_attention_masks or test_masked_l2)"
MAIN_TESTS = Selection(TESTS, f"not {LIGHT} and {OTHERS}", "twice and cpu", SHARDS, dry_shards=2)
MORE_TESTS = Selection(TESTS, f"{LIGHT} and {OTHERS}", "autocast and cpu", SHARDS)
OP_CHECKS = Selection(TESTS, "(opcheck or gradcheck) and not cuda_graph", "test_opcheck and cpu", SHARDS)
GRAPHS = Selection(("tests/test_cuda_graph.py",), "", "test_gradcheck and cpu-contiguous")

# What says most comes first: a run may be cut off at any moment.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("build", build, 60, 200),
        Stage("compile", compile_kernels, 20, 120),
        Stage("smoke", smoke, 30, 90),
        Stage("test", tests_of(MAIN_TESTS), 40, 120),
        Stage("bench", bench_of(LARGE), 60, 150),
        Stage("ncu", ncu_of(heaviest), 30, 60),
        Stage("more_tests", tests_of(MORE_TESTS), 30, 100),
        Stage("opcheck", tests_of(OP_CHECKS), 30, 80),
        Stage("graph", tests_of(GRAPHS), 15, 40),
        Stage("suites", bench_of(SMALL), 40, 150),
        Stage("kernels", ncu_of(every_op), 30, 80),
        Stage("sanitizer", sanitizer, 30, 150),
    )
}
