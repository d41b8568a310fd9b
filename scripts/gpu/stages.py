"""The stages of the check. Each gets the time it may take and says what came of it.

In a dry run, which needs no GPU, every stage takes the same way with commands for the CPU on tiny inputs.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch

from scripts.gpu import parsers
from scripts.gpu.processes import Done, run_together

__all__ = ["STAGES", "Context", "Outcome", "Stage"]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
CASES = [PYTHON, "-m", "scripts.gpu.cases"]
KEPT_OUTPUT = 60_000  # characters of each command in the log
SHARDS = min(8, os.cpu_count() or 1)
THREADS = 2  # of the CPU, in each process
TOLD = 40  # failing tests that are named
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
# The suites that say most come first, where time should run out.
SUITES = ("fbkd_loss", "train_step", "attention_pool", "masked_l2", "adapted_masked_l2", "relation", "non_local")
PROFILED = [("cuda", "bfloat16"), ("triton", "bfloat16"), ("cuda", "float32"), ("triton", "float32")]


@dataclass
class Outcome:
    """What a stage came to. ``why`` are the lines that explain a status other than "ok"."""

    status: str = "ok"  # or "failed", or "skipped: " and the reason
    figures: dict = field(default_factory=dict)
    why: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, problems: list[str], figures: dict) -> "Outcome":
        return cls("failed" if problems else "ok", figures, problems)


@dataclass(frozen=True)
class Context:
    """Where a run takes place and where its files go."""

    out: Path
    scratch: Path
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def backends(self) -> list[str]:
        return ["cpu"] if self.dry else ["cuda", "triton"]

    def run(self, commands: list[list[str]], seconds: float, variables: Optional[dict] = None) -> list[Done]:
        """Run commands side by side in the source tree; their output goes to the log."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        common = {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": os.pathsep.join(paths)}
        results = run_together(commands, seconds, ROOT, common | (variables or {}))
        for done in results:
            self.log(f"$ {shlex.join(done.command)}\n{done.output[-KEPT_OUTPUT:]}\n[{done.problem or 'done'}]\n\n")
        return results

    def log(self, text: str) -> None:
        with (self.out / "log.txt").open("a") as file:
            file.write(text)


@dataclass(frozen=True)
class Stage:
    """``least`` seconds are kept for it by the stages before it; without them it is skipped."""

    name: str
    run: Callable[[Context, float], Outcome]
    least: float
    limit: float


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


@dataclass(frozen=True)
class Selection:
    """Tests that need a GPU, by name, and a few that stand for them in a dry run."""

    paths: tuple[str, ...]
    names: str
    dry_names: str
    shards: int = 1

    def commands(self, context: Context) -> list[list[str]]:
        paths, names = (("tests/test_masked_l2.py",), self.dry_names) if context.dry else (self.paths, self.names)
        mark = "not gpu" if context.dry else "gpu"
        count = min(2, self.shards) if context.dry else self.shards
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


def judged(context: Context, results: list[Done], found: list[Optional[parsers.Tests]]) -> Outcome:
    """A failed test fails the stage, and so does one that skips itself on the GPU that it was selected for."""
    tests, problems = parsers.Tests(), []
    for done, part in zip(results, found):
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
    """Every tool of compute-sanitizer over every op, all side by side."""
    program = tool("compute-sanitizer")
    if program is None:
        return Outcome("skipped: compute-sanitizer is not on PATH")
    # Without PyTorch's cache every tensor is an allocation of its own, whose bounds and first use the tools can see.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    names = [(checker, backend) for checker in SANITIZER_TOOLS for backend in context.backends]
    options = ["--target-processes", "application-only", "--print-limit", "20"]
    results = context.run(
        [[program, "--tool", checker, *options, *small_cases(context, backend)] for checker, backend in names],
        seconds,
        variables,
    )
    obstacles = [parsers.sanitizer_obstacle(done.output) for done in results]
    if all(obstacles):
        return Outcome(f"skipped: compute-sanitizer does not run here ({obstacles[0]})")
    figures, problems = {}, []
    for (checker, backend), obstacle, done in zip(names, obstacles, results):
        if obstacle:
            problems.append(f"{checker} of {backend}: does not run here ({obstacle})")
            continue
        found = parsers.sanitizer_problems(done.output)
        figures[f"{checker}_{backend}"] = found
        if found or done.problem or found is None:
            problems.append(f"{checker} of {backend}: {done.problem or 'ended'}, problems: {found}")
            problems += parsers.sanitizer_findings(done.output) if found else done.last_lines()
    return Outcome.of(problems, figures)


def small_cases(context: Context, backend: str) -> list[str]:
    return [*CASES, "small", "--device", context.device, "--backend", backend]


def bench(context: Context, seconds: float) -> Outcome:
    """The benchmark's own tables; where time runs out, those that are ready."""
    path = context.out / "microbench.json"
    path.unlink(missing_ok=True)
    command = [PYTHON, "benchmarks/microbench.py", "--device", context.device, "--json", str(path)]
    if context.dry:
        command += ["--suite", "attention_pool", "--shapes", "1,4,6,7", "--rounds", "1", "--seconds", "0"]
        command += ["--peers", "eager", "fbkd_ops"]
    else:
        command += ["--suite", *SUITES, "--shapes", "P2", "--dtype", "bfloat16", "float32", "--seconds", "1"]
    (done,) = context.run([command], seconds)
    report = json.loads(path.read_text()) if path.exists() else {"results": []}
    if not report["results"]:
        return Outcome("failed", {}, [done.problem or "no figures", *done.last_lines()])
    figures = {"tables": len(report["results"]), "complete": report["complete"]} | parsers.step_times(report)
    problems = parsers.failed_rows(report)
    if done.problem and not done.timed_out:
        problems += [done.problem, *done.last_lines()]
    return Outcome.of(problems, figures)


def ncu(context: Context, seconds: float) -> Outcome:
    """Achieved bandwidth, occupancy and time of every kernel on P2 with four images."""
    program = tool("ncu")
    if program is None:
        return Outcome("skipped: ncu is not on PATH")
    path, figures, rows, problems = context.out / "ncu.json", {}, [], []
    path.unlink(missing_ok=True)
    jobs = [("cpu", "float32")] if context.dry else PROFILED
    for backend, dtype in jobs:
        (done,) = context.run([ncu_command(context, program, backend, dtype)], seconds / len(jobs))
        obstacle = parsers.ncu_obstacle(done.output)
        if obstacle:
            return Outcome(f"skipped: ncu cannot measure here: {obstacle}")
        launches = parsers.ncu_rows(done.output)
        if not launches or done.problem:
            problems += [f"{backend} {dtype}: {done.problem or 'no kernel was measured'}", *done.last_lines(3)]
        figures[f"{backend} {dtype}"] = parsers.kernel_table(launches)
        rows += [{"backend": backend, "dtype": dtype} | launch for launch in launches]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return Outcome.of(problems, figures)


def ncu_command(context: Context, program: str, backend: str, dtype: str) -> list[str]:
    """The card's clocks stay as they are, which is not ncu's default."""
    command = [program, "--config-file", "off", "--csv", "--print-units", "base", "--print-kernel-base", "function"]
    command += ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only"]
    command += ["--metrics", ",".join(parsers.NCU_METRICS.values()), *CASES, "large", "--device", context.device]
    command += ["--backend", backend, "--dtype", dtype]
    return command + (["--shape", "2", "8", "5", "7"] if context.dry else [])


def tool(name: str) -> Optional[str]:
    """A program of the CUDA toolkit; None where there is none."""
    roots = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(root, "bin") for root in roots if root)]
    return shutil.which(name, path=os.pathsep.join(folders))


# Nothing in the ignored files needs a GPU, and to collect them every process would import their frameworks.
WITHOUT_GPU = ("tests/integrations", "tests/test_demo.py", "tests/test_visualize.py")
TESTS = ("tests", *(f"--ignore={path}" for path in WITHOUT_GPU))
OTHERS = "not opcheck and not gradcheck and not cuda_graph"
GPU_TESTS = Selection(TESTS, OTHERS, "(autocast or twice) and cpu", SHARDS)
OP_CHECKS = Selection(TESTS, "(opcheck or gradcheck) and not cuda_graph", "test_opcheck and cpu", SHARDS)
GRAPHS = Selection(("tests/test_cuda_graph.py",), "", "test_gradcheck and cpu-contiguous")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("build", build, 60, 200),
        Stage("test", tests_of(GPU_TESTS), 60, 200),
        Stage("sanitizer", sanitizer, 40, 120),
        Stage("opcheck", tests_of(OP_CHECKS), 30, 100),
        Stage("graph", tests_of(GRAPHS), 20, 60),
        Stage("bench", bench, 40, 500),
        Stage("ncu", ncu, 60, 100),
    )
}
