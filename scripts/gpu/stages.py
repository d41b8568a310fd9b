"""The stages of the check. Each gets the time it may take and says what came of it.

In a dry run, which needs no GPU, every stage takes the same way with commands for the CPU on tiny inputs.
"""

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

from benchmarks import results
from scripts.gpu import parsers
from scripts.gpu.processes import Done, run_together

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
CASES = [PYTHON, "-m", "scripts.gpu.op_calls"]
KEPT_OUTPUT = 60_000  # characters of each command in the log
PROCESSES = min(12, os.cpu_count() or 1)  # of pytest
THREADS = 2  # of the CPU, in each process
TOLD, LAST = 40, 20  # lines that explain a status, and the last of pytest's among them
# compute-sanitizer's tools and the backends they watch, in turn: what says most and takes least comes first.
SANITIZED = (
    [("memcheck", "cuda")],
    [("racecheck", "cuda"), ("initcheck", "cuda")],
    [("memcheck", "triton")],
    [("racecheck", "triton"), ("initcheck", "triton")],
)
DRY_SANITIZED = ([("memcheck", "cpu")], [("racecheck", "cpu"), ("initcheck", "cpu")])
# The benchmark at the size that the package is made for, and what else it has, the suites that say most first.
LARGE = ["--suite", "fbkd_loss", "relation", "--shapes", "16,256,200,336", "--dtype", "bfloat16"]
LARGE += ["--peers", "mmrazor", "reference", "--seconds", "2"]
SUITES = ["attention_pool", "masked_l2", "adapted_masked_l2", "train_step", "fbkd_loss", "relation", "non_local"]
SUITES += ["channel_correlation", "channel_divergence"]
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
    """Where a run takes place and where its files go. ``cache`` is Triton's."""

    out: Path
    scratch: Path
    dry: bool
    cache: Path

    @property
    def summary(self) -> Path:
        return self.out / "summary.json"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def run(self, commands: list[list[str]], seconds: float, variables: dict | None = None) -> list[Done]:
        """Run commands side by side in the source tree; their output goes to the log."""
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        common = {"OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": paths}
        common |= {"TRITON_CACHE_DIR": str(self.cache)}
        ended = run_together(commands, seconds, ROOT, common | (variables or {}))
        for done in ended:
            self.log(f"$ {shlex.join(done.command)}\n{done.output[-KEPT_OUTPUT:]}\n[{done.problem or 'done'}]\n\n")
        return ended

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
    (info,) = context.run([[PYTHON, "-m", "fbkd_ops"]], 60)
    states = parsers.library_states(info.output)
    parts = {part: states.get(part, "unknown") for part in ("cpu", context.device)}
    missing = [f"the {part} library is {state}" for part, state in parts.items() if not state.startswith("loaded")]
    problems = [info.problem, *info.last_lines()] if info.problem else missing
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


def tests_of(names: str, dry_names: str) -> Callable[[Context, float], Outcome]:
    """The stage that runs the GPU tests of some names, side by side, and in a dry run a few tests of the CPU."""

    def run(context: Context, seconds: float) -> Outcome:
        path = context.scratch / "tests.xml"
        path.unlink(missing_ok=True)
        command = [PYTHON, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--dist", "worksteal", f"--junitxml={path}"]
        if context.dry:
            command += ["-n", "1", "-m", "not gpu", "-k", dry_names, "tests/test_masked_l2.py"]
        else:
            command += ["-n", str(PROCESSES), "-m", "gpu", "-k", names, *TESTS]
        (done,) = context.run([command], seconds)
        counts, problems = parsers.tests_in(path), []
        if done.problem or not counts["passed"]:
            problems = [done.problem or "no test passed", *done.last_lines(LAST)]  # pytest's own summary
        if counts["skipped"]:  # by itself, though it was selected for the GPU that is here
            skips = [line for line in done.output.splitlines() if line.startswith("SKIPPED")]
            problems += [f"{counts['skipped']} tests skipped", *skips]
        return Outcome.of(problems, dict(counts))

    return run


def sanitizer(context: Context, seconds: float) -> Outcome:
    """The tools of compute-sanitizer over every op, the CUDA kernels first; what time leaves for the others."""
    program = tool("compute-sanitizer")
    if program is None:
        return Outcome("skipped: compute-sanitizer is not on PATH")
    end, figures, problems, late, obstacles = time.monotonic() + seconds, {}, [], [], []
    for names in DRY_SANITIZED if context.dry else SANITIZED:
        left = end - time.monotonic()
        ended = sanitized(context, program, names, left) if left > 0 else [None] * len(names)
        for (checker, backend), done in zip(names, ended, strict=True):
            name = f"{checker} of {backend}"
            if done is None or (done.timed_out and "SUMMARY" not in done.output):
                late.append(name)
            elif found := parsers.obstacle(done.output):
                obstacles.append(f"{name}: does not run here ({found})")
            else:
                is_clean = parsers.is_clean(done.output) and not done.problem
                figures[f"{checker}_{backend}"] = "clean" if is_clean else "problems"
                if not is_clean:
                    told = parsers.findings(done.output) or done.last_lines()
                    problems += [f"{name}: {done.problem or 'problems'}", *told]
    if obstacles and not figures:
        return Outcome(f"skipped: compute-sanitizer: {obstacles[0]}")
    if late and not problems + obstacles:
        return Outcome(f"incomplete: out of time for {', '.join(late)}", figures)
    return Outcome.of(obstacles + problems, figures)


def sanitized(context: Context, program: str, names: list[tuple[str, str]], seconds: float) -> list[Done]:
    """Some tools at once. Without PyTorch's cache each tensor is an allocation, whose bounds and first use they see."""
    options = ["--target-processes", "application-only", "--print-limit", "20", "--error-exitcode", "1"]
    cases = [*CASES, "small", "--device", context.device, "--backend"]
    commands = [[program, "--tool", checker, *options, *cases, backend] for checker, backend in names]
    return context.run(commands, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def bench_of(arguments: list[str]) -> Callable[[Context, float], Outcome]:
    """The stage that adds tables to those of the benchmark; where time runs out, those that are ready."""

    def run(context: Context, seconds: float) -> Outcome:
        path = context.out / "microbench.csv"
        before, _ = dated_rows(path)
        command = [PYTHON, "benchmarks/microbench.py", "--device", context.device, "--csv", str(path)]
        command += DRY if context.dry else arguments
        (done,) = context.run([[*command, "--update"] if before else command], seconds)
        rows, complete = dated_rows(path)
        made = [row for date in rows.keys() - before.keys() for row in rows[date]]
        if not made:
            return Outcome("failed", {}, [done.problem or "no figures", *done.last_lines()])
        problems = parsers.failed_rows(made)
        if done.problem and not done.timed_out:
            problems += [done.problem, *done.last_lines()]
        return Outcome.of(problems, {"complete": complete} | parsers.step_times(made))

    return run


def dated_rows(path: Path) -> tuple[dict[str, list[dict]], bool]:
    """The benchmark's rows by the date of their run, and whether the last run came to its end; none of another file."""
    dates = {}
    try:
        complete = results.read_facts(path)["complete"]
        for row in results.text_rows(path):
            dates.setdefault(row["date"], []).append(row)
    except (ValueError, KeyError):
        return {}, False
    return dates, complete


def ncu_of(profiles: Callable[[Context], dict[str, list[str]]]) -> Callable[[Context, float], Outcome]:
    """The stage that measures kernels with ncu; ``profiles`` are options and programs by what they show."""

    def run(context: Context, seconds: float) -> Outcome:
        program = tool("ncu")
        if program is None:
            return Outcome("skipped: ncu is not on PATH")
        figures, problems, jobs, path = {}, [], profiles(context), context.out / "ncu.json"
        launches = json.loads(path.read_text()) if path.exists() else {}  # also of another stage
        for name, command in jobs.items():
            (done,) = context.run([[program, *NCU, *command]], seconds / len(jobs))
            if found := parsers.obstacle(done.output):
                return Outcome(f"skipped: ncu cannot measure here: {found}")
            launches[name] = parsers.ncu_rows(done.output)
            if not launches[name] or done.problem:
                problems += [f"{name}: {done.problem or 'no kernel was measured'}", *done.last_lines(3)]
            figures[name] = parsers.kernel_table(launches[name])
            results.write_json(path, launches)
        return Outcome.of(problems, figures)

    return run


# The card's clocks stay as they are, which is not ncu's default.
NCU = ["--config-file", "off", "--csv", "--print-units", "base", "--print-kernel-base", "function"]
NCU += ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only"]
NCU += ["--metrics", ",".join(parsers.NCU_METRICS.values())]


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
# The ops without matrix products take little of a step and have most of the tests; all others run first.
LATER = "test_attention_pool or test_attention_masks or test_masked_l2 or opcheck or gradcheck or cuda_graph"

# What says most comes first: a run may be cut off at any moment.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("build", build, 60, 200),
        Stage("compile", compile_kernels, 20, 120),
        Stage("smoke", smoke, 30, 90),
        Stage("test", tests_of(f"not ({LATER})", "twice and cpu"), 40, 120),
        Stage("bench", bench_of(LARGE), 60, 150),
        Stage("ncu", ncu_of(heaviest), 30, 60),
        Stage("more_tests", tests_of(LATER, "autocast and cpu"), 75, 220),
        Stage("suites", bench_of(SMALL), 40, 150),
        Stage("kernels", ncu_of(every_op), 30, 80),
        Stage("sanitizer", sanitizer, 30, 150),
    )
}
