"""``make gpu`` without a GPU: a dry run, what its stages make of the tools' output, deadline and interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import INTERPRETER, NO_CPU, NO_CUDA, NO_TRITON

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import environment  # noqa: E402
from fbkd_ops import backends  # noqa: E402
from scripts.gpu import __main__ as gpu_check  # noqa: E402
from scripts.gpu import cases as gpu_cases  # noqa: E402
from scripts.gpu import parsers, processes, shard, stages  # noqa: E402
from scripts.gpu.processes import Done  # noqa: E402
from scripts.gpu.stages import Context, Outcome, Stage  # noqa: E402

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at masked_l2_sums(float *, int)+0x2d0
=========     by thread (33,0,0) in block (1,0,0)
=========     Address 0x7f5c4e000084 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5c4e000000 of size 132 bytes
=========
========= Invalid __global__ write of size 4 bytes
=========     at masked_l2_sums(float *, int)+0x2d0
=========     by thread (34,0,0) in block (1,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at attention_pool_sums(float *)+0x120
=========     and Read access at attention_pool_sums(float *)+0x1a0 [12 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
    "initcheck": "========= ERROR SUMMARY: 0 errors\n",
}
UNSUPPORTED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the release notes\n"
COLUMNS = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
    '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def ncu_line(number, kernel, metric, unit, value):
    where = f'"{number}","71","python3","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(132, 1, 1)","0","9.0"'
    return f'{where},"Command line profiler metrics","{metric}","{unit}","{value}"'


def ncu_launch(number, kernel, dram, warps, nanoseconds):
    values = {"dram_percent": ("%", dram), "warps_percent": ("%", warps), "us": ("ns", nanoseconds)}
    return [ncu_line(number, kernel, parsers.NCU_METRICS[name], *value) for name, value in values.items()]


NCU = "\n".join(
    [
        "==PROF== Connected to process 71 (/usr/bin/python3)",
        '==PROF== Profiling "attention_pool_sums": 0%....50%....100% - 2 passes',
        "the program's own line",
        "==PROF== Disconnected from process 71",
        COLUMNS,
        *ncu_launch(0, "void fbkd::cuda::attention_pool_sums<float, 4>(float *, int)", "80.0", "50.0", "1,000"),
        *ncu_launch(1, "attention_pool_sums", "90.0", "70.0", "3,000"),
        *ncu_launch(2, "sum_tiles", "n/a", "40.0", "12,500"),
    ]
)
FORBIDDEN = (
    "==PROF== Connected to process 71 (/usr/bin/python3)\n==ERROR== ERR_NVGPUCTRPERM - The user does not have "
    "permission to access NVIDIA GPU Performance Counters on the target device 0.\n"
)
JUNIT = """\
<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" errors="1" failures="1" skipped="2" tests="5">
<testcase classname="tests.test_a" name="test_passes[cuda]" time="0.1" />
<testcase classname="tests.test_a" name="test_fails[cuda]" time="0.1"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.test_a" name="test_breaks" time="0.1"><error message="no fixture">trace</error></testcase>
<testcase classname="tests.test_a" name="test_b" time="0"><skipped type="pytest.skip" message="cuda library is missing">x</skipped></testcase>
<testcase classname="tests.test_a" name="test_c" time="0"><skipped type="pytest.skip" message="cuda library is missing">x</skipped></testcase>
</testsuite></testsuites>
"""  # noqa: E501


# Parsers


def test_sanitizer_summaries_are_added_up():
    assert parsers.sanitizer_problems(MEMCHECK) == 2
    assert parsers.sanitizer_problems(RACECHECK) == 1
    assert parsers.sanitizer_problems(MEMCHECK + RACECHECK) == 3
    assert [parsers.sanitizer_problems(text) for text in CLEAN.values()] == [0, 0, 0]
    assert parsers.sanitizer_problems("========= COMPUTE-SANITIZER\nSegmentation fault\n") is None


def test_sanitizer_findings_name_what_and_where_once():
    (finding,) = parsers.sanitizer_findings(MEMCHECK)
    assert finding == "Invalid __global__ write of size 4 bytes at masked_l2_sums(float *, int)+0x2d0"
    (race,) = parsers.sanitizer_findings(RACECHECK)
    assert race == "Error: Race reported between Write access at attention_pool_sums(float *)+0x120"
    assert parsers.sanitizer_findings(CLEAN["racecheck"]) == []


def test_what_keeps_the_tools_from_working():
    assert parsers.sanitizer_obstacle(UNSUPPORTED) == "Device not supported"
    assert not parsers.sanitizer_obstacle(MEMCHECK)
    assert "ERR_NVGPUCTRPERM" in parsers.ncu_obstacle(FORBIDDEN)
    assert "LibraryNotLoaded" in parsers.ncu_obstacle("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n")
    assert not parsers.ncu_obstacle(NCU)


def test_ncu_launches():
    rows = parsers.ncu_rows(NCU)
    assert [row["kernel"] for row in rows] == ["attention_pool_sums", "attention_pool_sums", "sum_tiles"]
    assert rows[0] == {"kernel": "attention_pool_sums", "dram_percent": 80.0, "warps_percent": 50.0, "us": 1.0}
    assert rows[2] == {"kernel": "sum_tiles", "dram_percent": None, "warps_percent": 40.0, "us": 12.5}
    assert parsers.ncu_rows(FORBIDDEN) == parsers.ncu_rows("") == []


@pytest.mark.parametrize("unit, microseconds", [("nsecond", 0.002), ("us", 2.0), ("msecond", 2000.0), ("second", 2e6)])
def test_ncu_units_of_time(unit, microseconds):
    line = ncu_line(0, "k", parsers.NCU_METRICS["us"], unit, "2")
    assert parsers.ncu_rows(f"{COLUMNS}\n{line}")[0]["us"] == pytest.approx(microseconds)


def test_kernels_weigh_their_launches_by_time():
    table = parsers.kernel_table(parsers.ncu_rows(NCU))
    assert list(table) == ["sum_tiles", "attention_pool_sums"]  # the longest first
    assert table["attention_pool_sums"] == {"launches": 2, "us": 4.0, "dram_percent": 87.5, "warps_percent": 65.0}
    assert table["sum_tiles"]["dram_percent"] is None


def test_kernel_without_a_time():
    row = {"kernel": "k", "dram_percent": 5.0, "warps_percent": None, "us": None}
    assert parsers.kernel_table([row])["k"] == {"launches": 1, "us": 0, "dram_percent": None, "warps_percent": None}


def test_junit_results(tmp_path):
    path = tmp_path / "tests.xml"
    assert parsers.tests_in(path) is None
    path.write_text(JUNIT[:200])
    assert parsers.tests_in(path) is None
    path.write_text(JUNIT)
    tests = parsers.tests_in(path)
    assert tests.counts == {"passed": 1, "failed": 2, "skipped": 2}
    assert tests.failures["tests.test_a::test_fails[cuda]"].startswith("assert 1 == 2")
    assert tests.failures["tests.test_a::test_breaks"] == "no fixture"
    assert tests.skips == {"cuda library is missing": 2}


def test_modules_that_skip_themselves_are_no_failures(tmp_path, on_gpu):
    """As pytest writes them; a module that cannot be imported is a failure."""
    (tmp_path / "test_absent.py").write_text("import pytest\npytest.importorskip('no_such_framework')\n")
    (tmp_path / "test_present.py").write_text("def test_passes():\n    pass\n")
    results = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += [f"--junitxml={results}", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    tests = parsers.tests_in(results)
    assert tests.counts == {"passed": 1, "modules skipped": 1} and not tests.skips, done.stdout
    assert stages.judged(on_gpu, [Done(command, done.stdout, done.returncode)], [tests]).status == "ok"
    (tmp_path / "test_broken.py").write_text("import no_such_framework\n")
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert parsers.tests_in(results).counts == {"passed": 1, "modules skipped": 1, "failed": 1}


def test_stages_ignore_no_test_that_needs_a_gpu():
    for ignored in stages.WITHOUT_GPU:
        path = ROOT / ignored
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        assert files and not [file for file in files if re.search(r"mark\.gpu|\bcases import", file.read_text())]
    for selection in (stages.GPU_TESTS, stages.OP_CHECKS):
        assert {f"--ignore={path}" for path in stages.WITHOUT_GPU} < set(selection.paths)


def test_library_states():
    info = "torch         2.10\ncpu library   loaded\ncuda library  not built: no nvcc\n\nop device backend\n"
    assert parsers.library_states(info) == {"cpu": "loaded", "cuda": "not built: no nvcc"}


def benchmark(status="ok", complete=True):
    step = {"ms": {"median": 1.5}, "gb_s": 2000.0, "ceiling_percent": 80.0, "speed_vs_eager": {"median": 3.0}}
    peers = {"eager": {"status": "failed: of no interest"}, "fbkd_ops": {"status": "ok", "step": step}}
    peers["fbkd_ops:cuda"] = {"status": status}
    table = {"suite": "attention_pool", "case": {"title": "P2 float32 contiguous"}, "peers": peers}
    return {"results": [table], "complete": complete}


def test_benchmark_figures_and_failures():
    figures = {"ms": 1.5, "gb_s": 2000.0, "ceiling_percent": 80.0, "times_as_fast": 3.0}
    assert parsers.step_times(benchmark()) == {"attention_pool, P2 float32 contiguous": figures}
    without_cost = benchmark()
    without_cost["results"][0]["peers"]["fbkd_ops"]["step"] |= {"gb_s": None, "ceiling_percent": None}
    (figures,) = parsers.step_times(without_cost).values()
    assert figures == {"ms": 1.5, "gb_s": None, "ceiling_percent": None, "times_as_fast": 3.0}
    assert parsers.failed_rows(benchmark()) == []
    (failed,) = parsers.failed_rows(benchmark("WRONG with gradients: off"))
    assert failed == "attention_pool, P2 float32 contiguous, fbkd_ops:cuda: WRONG with gradients: off"


# Stages, on made-up output of their commands


@pytest.fixture
def on_gpu(tmp_path):
    """A context that is no dry run; its commands must not be run."""
    return Context(tmp_path, tmp_path, dry=False)


@pytest.fixture
def answer(monkeypatch):
    """Lets commands end with given outputs, one each, and keeps what was asked for."""

    def prepare(*outputs, returncode=0, timed_out=False):
        calls = []

        def run_together(commands, seconds, folder, variables):
            calls.append(SimpleNamespace(commands=commands, seconds=seconds, variables=variables))
            texts = outputs if len(outputs) == len(commands) else outputs[len(calls) - 1 :][:1]
            return [Done(command, text, returncode, timed_out) for command, text in zip(commands, texts, strict=True)]

        monkeypatch.setattr(stages, "run_together", run_together)
        return calls

    return prepare


def test_commands_find_the_source_tree_first_and_are_logged(on_gpu, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    (done,) = on_gpu.run([python("import os; print(os.getcwd(), os.environ['PYTHONPATH'])")], 60)
    assert done.output == f"{ROOT} {ROOT}{os.pathsep}/elsewhere\n"
    log = (on_gpu.out / "log.txt").read_text()
    assert log.startswith(f"$ {sys.executable} -c ") and log.endswith(f"{done.output}\n[done]\n\n")


INFO = "cpu library   loaded\ncuda library  {}\n"


def test_build_is_for_the_gpu_that_is_there(on_gpu, answer, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(stages, "architecture", lambda: "9.0")
    calls = answer("built", INFO.format("loaded"))
    assert stages.build(on_gpu, 100).status == "ok"
    install = calls[0]
    assert install.variables["TORCH_CUDA_ARCH_LIST"] == "9.0" and install.variables["FBKD_OPS_CUDA"] == "1"
    assert {"--no-build-isolation", "--no-deps", "-e"} <= set(install.commands[0])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    calls = answer("built", INFO.format("loaded"))
    stages.build(on_gpu, 100)
    assert calls[0].variables["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"


def test_build_fails_with_pip_and_with_a_library_that_does_not_load(on_gpu, answer):
    answer("nvcc: fatal", returncode=1)
    outcome = stages.build(on_gpu, 100)
    assert outcome.status == "failed" and outcome.why == ["exit status 1", "nvcc: fatal"]
    answer("built", INFO.format("broken: undefined symbol"))
    outcome = stages.build(on_gpu, 100)
    assert outcome.status == "failed" and outcome.why == ["the cuda library is broken: undefined symbol"]


def junit_stage(context, done):
    """The outcome of one share of tests that left JUNIT."""
    path = context.scratch / "tests-1.xml"
    path.write_text(JUNIT)
    return stages.judged(context, [done], [parsers.tests_in(path)])


def test_failed_and_skipped_tests_fail_a_stage(on_gpu):
    outcome = junit_stage(on_gpu, Done(["pytest", "--shard=1/1", "--junitxml=x"], "", 1))
    assert outcome.status == "failed" and outcome.figures == {"passed": 1, "failed": 2, "skipped": 2}
    assert "tests.test_a::test_fails[cuda]: assert 1 == 2" in outcome.why
    assert "skipped 2: cuda library is missing" in outcome.why
    assert "assert 1 == 2\nmore" in (on_gpu.out / "log.txt").read_text()


def passed(count=1):
    return parsers.Tests(counts=parsers.Counter(passed=count))


PYTEST = ["pytest", "--shard=2/8", "--junitxml=x"]


@pytest.mark.parametrize(
    "done, part, why",
    [
        (Done(PYTEST, "fatal error", -11), None, ["exit status -11: --shard=2/8", "fatal error", "no test passed"]),
        (Done(PYTEST, "slow", 1, True), passed(), ["out of time: --shard=2/8", "slow"]),
        (Done(PYTEST, "usage", 4), passed(), ["exit status 4: --shard=2/8", "usage"]),
        (Done(PYTEST, "", 5), passed(0), ["no test passed"]),
        (Done(PYTEST, "", 0), passed(), []),
    ],
)
def test_how_pytest_may_end(on_gpu, done, part, why):
    outcome = stages.judged(on_gpu, [done], [part])
    assert outcome.why == why and outcome.status == ("failed" if why else "ok")


def test_an_empty_share_beside_others_is_no_failure(on_gpu):
    assert stages.judged(on_gpu, [Done(PYTEST, "", 0), Done(PYTEST, "", 5)], [passed(), passed(0)]).status == "ok"


def test_gpu_tests_are_selected_once():
    """Together the three stages run every test that is marked, none of them twice."""
    chosen = [stages.GPU_TESTS, stages.OP_CHECKS, stages.GRAPHS]
    for file, name in [("a", "test_layouts"), ("a", "test_opcheck"), ("a", "test_gradcheck"), ("cuda_graph", "test_x")]:
        path = f"tests/test_{file}.py"
        there = [selection for selection in chosen if selection.paths[0] in ("tests", path)]
        assert sum(matches(selection.names, f"{path}::{name}") for selection in there) == 1, name


def matches(expression, name):
    """As ``pytest -k`` decides it."""
    word = r"\b(?!not\b|and\b|or\b)\w+"
    return not expression or eval(re.sub(word, lambda found: str(found.group() in name), expression))


def test_shares_are_a_partition():
    items = [f"test_{number}" for number in range(11)]
    shares = []
    for number in range(1, 5):
        chosen, dropped = list(items), []
        hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
        config = SimpleNamespace(getoption=lambda name, n=number: shard.share(f"{n}/4"), hook=hook)
        shard.pytest_collection_modifyitems(config, chosen)
        assert sorted(chosen + dropped) == sorted(items)
        shares += chosen
    assert sorted(shares) == sorted(items)
    with pytest.raises(ValueError, match="5/4"):
        shard.share("5/4")


def test_sanitizer_runs_every_tool_on_every_backend(on_gpu, answer, monkeypatch):
    monkeypatch.setattr(stages, "tool", lambda name: name)
    calls = answer(*(CLEAN[checker] for checker in stages.SANITIZER_TOOLS for _ in ("cuda", "triton")))
    outcome = stages.sanitizer(on_gpu, 100)
    names = [f"{checker}_{backend}" for checker in stages.SANITIZER_TOOLS for backend in ("cuda", "triton")]
    assert outcome.status == "ok" and outcome.figures == dict.fromkeys(names, 0)
    assert [f"{command[2]}_{command[-1]}" for command in calls[0].commands] == names
    assert calls[0].variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_sanitizer_reports_what_it_found(on_gpu, answer, monkeypatch):
    monkeypatch.setattr(stages, "tool", lambda name: name)
    answer(MEMCHECK, CLEAN["memcheck"], CLEAN["racecheck"], RACECHECK, "killed", CLEAN["initcheck"])
    outcome = stages.sanitizer(on_gpu, 100)
    assert outcome.status == "failed"
    assert outcome.figures["memcheck_cuda"] == 2 and outcome.figures["racecheck_triton"] == 1
    assert outcome.figures["initcheck_cuda"] is None
    assert any("masked_l2_sums" in line for line in outcome.why) and "killed" in outcome.why


def test_sanitizer_names_the_tool_that_cannot_work_and_keeps_the_others(on_gpu, answer, monkeypatch):
    monkeypatch.setattr(stages, "tool", lambda name: name)
    answer(*(CLEAN[checker] for checker in ("memcheck", "racecheck") for _ in range(2)), UNSUPPORTED, UNSUPPORTED)
    outcome = stages.sanitizer(on_gpu, 100)
    assert outcome.status == "failed" and outcome.figures["racecheck_triton"] == 0 and len(outcome.figures) == 4
    assert outcome.why[0] == "initcheck of cuda: does not run here (Device not supported)"


def test_sanitizer_fails_with_the_program_that_it_watches(on_gpu, answer, monkeypatch):
    monkeypatch.setattr(stages, "tool", lambda name: name)
    answer(*[CLEAN["memcheck"]] * 6, returncode=1)
    assert stages.sanitizer(on_gpu, 100).status == "failed"


@pytest.mark.parametrize(
    "run, output, reason",
    [(stages.sanitizer, UNSUPPORTED, "Device not supported"), (stages.ncu, FORBIDDEN, "not permitted")],
)
def test_tools_that_cannot_work_here_are_skipped(on_gpu, answer, monkeypatch, run, output, reason):
    monkeypatch.setattr(stages, "tool", lambda name: None)
    assert run(on_gpu, 100).status.endswith("is not on PATH")
    monkeypatch.setattr(stages, "tool", lambda name: name)
    answer(*[output] * 6, returncode=1)
    status = run(on_gpu, 100).status
    assert status.startswith("skipped: ") and reason in status


def test_ncu_leaves_the_clocks_alone(on_gpu, answer, monkeypatch):
    monkeypatch.setattr(stages, "tool", lambda name: name)
    calls = answer(NCU, NCU, NCU, "no kernels")
    outcome = stages.ncu(on_gpu, 100)
    assert outcome.status == "failed" and outcome.why[0] == "triton float32: no kernel was measured"
    assert outcome.figures["cuda bfloat16"]["sum_tiles"]["us"] == 12.5
    commands = [call.commands[0] for call in calls]
    for command in commands:
        assert command[command.index("--clock-control") + 1] == "none"
        assert command[command.index("--metrics") + 1].split(",") == list(parsers.NCU_METRICS.values())
    assert sum(call.seconds for call in calls) == 100
    launches = json.loads((on_gpu.out / "ncu.json").read_text())
    assert len(launches) == 3 * 3
    expected = {"backend": "cuda", "dtype": "bfloat16", "kernel": "sum_tiles", "dram_percent": None}
    assert launches[2] == expected | {"warps_percent": 40.0, "us": 12.5}


def test_benchmark_keeps_the_tables_that_are_ready(on_gpu, monkeypatch):
    def run_together(commands, seconds, folder, variables):
        (on_gpu.out / "microbench.json").write_text(json.dumps(report))
        return [done]

    monkeypatch.setattr(stages, "run_together", run_together)
    report, done = benchmark(complete=False), Done(["python"], "interrupted after 1 tables", 1, True)
    outcome = stages.bench(on_gpu, 10)
    assert outcome.status == "ok" and outcome.figures["tables"] == 1 and outcome.figures["complete"] is False
    report, done = benchmark("killed by signal 9"), Done(["python"], "", 0)
    outcome = stages.bench(on_gpu, 10)
    assert outcome.status == "failed" and "fbkd_ops:cuda: killed by signal 9" in outcome.why[0]


def test_benchmark_without_figures_fails(on_gpu, answer, monkeypatch):
    (on_gpu.out / "microbench.json").write_text(json.dumps(benchmark()))  # of an earlier run
    answer("compiling", returncode=-9, timed_out=True)
    outcome = stages.bench(on_gpu, 10)
    assert outcome.status == "failed" and outcome.why == ["out of time", "compiling"]
    answer("compiling", returncode=1, timed_out=True)
    run_together = stages.run_together

    def without_tables(*arguments):
        (on_gpu.out / "microbench.json").write_text(json.dumps(benchmark(complete=False) | {"results": []}))
        return run_together(*arguments)

    monkeypatch.setattr(stages, "run_together", without_tables)
    assert stages.bench(on_gpu, 10).status == "failed"


# The run as a whole


class Clock:
    """Time that passes only when a stage says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lasting(clock, name, seconds, least=10, limit=100, outcome=None):
    """A stage that takes all of its time or ``seconds``, and keeps what it was given."""

    def run(context, given):
        given_to[name] = given
        clock.now += min(seconds, given)
        return outcome or Outcome()

    given_to = clock.__dict__.setdefault("given", {})
    return Stage(name, run, least, limit)


def run_stages(tmp_path, chosen, deadline, clock):
    report = gpu_check.Report(tmp_path / "summary.json", {}, [stage.name for stage in chosen])
    gpu_check.check(chosen, Context(tmp_path, tmp_path, True), report, deadline, clock)
    return report, json.loads((tmp_path / "summary.json").read_text())


def test_later_stages_get_what_is_kept_for_them(tmp_path):
    clock = Clock()
    chosen = [lasting(clock, "a", 1000), lasting(clock, "b", 5), lasting(clock, "c", 1000)]
    report, summary = run_stages(tmp_path, chosen, 60, clock)
    assert clock.given == {"a": 40, "b": 10, "c": 15}
    assert [summary["stages"][name]["seconds"] for name in "abc"] == [40, 5, 15]
    assert summary["complete"] and not report.failed


def test_stages_keep_to_their_limits(tmp_path):
    clock = Clock()
    run_stages(tmp_path, [lasting(clock, "a", 1000), lasting(clock, "b", 1000)], 500, clock)
    assert clock.given == {"a": 100, "b": 100}


def test_stages_that_the_deadline_leaves_no_time_for_are_skipped(tmp_path, capsys):
    clock = Clock()
    chosen = [lasting(clock, "a", 1000, least=30), lasting(clock, "b", 1), lasting(clock, "c", 1, least=5)]
    report, summary = run_stages(tmp_path, chosen, 36, clock)
    assert list(clock.given) == ["a", "c"]
    assert summary["stages"]["b"]["status"] == "skipped: out of time" and not report.failed
    assert re.search(r"^b +skipped +0.0  out of time$", gpu_check.table(report), re.MULTILINE)


@pytest.fixture
def two_stages(monkeypatch):
    """Replaces the stages by "first", which a test gives, and "second"."""

    def replace(run):
        chosen = {"first": Stage("first", run, 1, 10), "second": Stage("second", lambda *_: Outcome(), 1, 10)}
        monkeypatch.setattr(gpu_check, "STAGES", chosen)

    return replace


def main(tmp_path, *arguments):
    code = gpu_check.main(["--dry-run", "--out", str(tmp_path / "out"), *arguments])
    return code, json.loads((tmp_path / "out" / "summary.json").read_text())


def broken(*_):
    raise KeyError("figures")


@pytest.mark.parametrize(
    "run, why", [(lambda *_: Outcome("failed", {}, ["it broke"]), "it broke"), (broken, "KeyError: 'figures'")]
)
def test_a_failed_stage_does_not_end_the_run(tmp_path, two_stages, capsys, run, why):
    two_stages(run)
    code, summary = main(tmp_path)
    assert code == 1 and summary["complete"]
    assert summary["stages"]["first"]["status"] == "failed" and summary["stages"]["first"]["why"] == [why]
    assert summary["stages"]["second"]["status"] == "ok"
    output = capsys.readouterr().out
    assert f"  {why}\n" in output
    assert re.search(r"^first +failed .*\nsecond +ok ", output, re.MULTILINE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_a_valid_summary(tmp_path, two_stages, capsys, number):
    two_stages(lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    code, summary = main(tmp_path)
    assert code == 130 and not summary["complete"] and signal.getsignal(number) == before
    assert [entry["status"] for entry in summary["stages"].values()] == ["interrupted", "not run"]
    assert f"interrupted by {number.name}" in capsys.readouterr().out


def test_stages_can_be_chosen(tmp_path, two_stages, monkeypatch):
    two_stages(broken)
    assert list(main(tmp_path, "--stages", "second")[1]["stages"]) == ["second"]
    monkeypatch.setenv("STAGES", "second")
    assert list(main(tmp_path)[1]["stages"]) == ["second"]


def test_other_stages_stay_as_an_earlier_run_left_them(tmp_path, two_stages, monkeypatch):
    two_stages(lambda *_: Outcome("failed", {"passed": 3}))
    assert main(tmp_path)[0] == 1
    code, summary = main(tmp_path, "--stages", "second")
    assert code == 0  # what failed before is not of this run
    assert {name: entry["status"] for name, entry in summary["stages"].items()} == {"first": "failed", "second": "ok"}
    assert summary["stages"]["first"]["figures"] == {"passed": 3}
    of_now = gpu_check.environment
    monkeypatch.setattr(gpu_check, "environment", lambda *arguments: of_now(*arguments) | {"sources": "other"})
    assert list(main(tmp_path, "--stages", "second")[1]["stages"]) == ["second"]
    (tmp_path / "out" / "summary.json").write_text("[")
    assert list(main(tmp_path, "--stages", "second")[1]["stages"]) == ["second"]


def test_unknown_stages_are_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--stages", "test", "tset"])
    assert stopped.value.code == 2
    assert f"unknown stage tset; there are {', '.join(stages.STAGES)}" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_deadline_must_be_positive(seconds, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--deadline", seconds])
    assert "--deadline must be > 0" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path):
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run([ROOT / "scripts" / "gpu_check.sh"], env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "no CUDA device\n", done.stderr
    assert not (tmp_path / "out").exists()


FAKE = """\
#!{python}
import subprocess, sys
start = sys.argv.index({python!r})
if {runs}:
    subprocess.run(sys.argv[start:], check=True)
print({texts!r}.get(sys.argv[2], {other!r}))
"""


def fake_tool(folder, name, runs, texts, other=""):
    path = folder / name
    path.write_text(FAKE.format(python=sys.executable, runs=runs, texts=texts, other=other))
    path.chmod(0o755)


@NO_CPU
def test_dry_run_takes_every_stage(tmp_path, monkeypatch, capsys):
    """With stand-ins for the tools, which run the program that they are given and print what the tools would."""
    pytest.importorskip("rich")
    fake_tool(tmp_path, "compute-sanitizer", "sys.argv[2] == 'memcheck'", CLEAN)
    fake_tool(tmp_path, "ncu", "True", {}, NCU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    code, summary = main(tmp_path)
    statuses = {name: entry["status"] for name, entry in summary["stages"].items()}
    assert statuses == dict.fromkeys(stages.STAGES, "ok"), summary["stages"]
    assert code == 0 and summary["complete"] and summary["dry_run"]
    assert {"cpu", "torch", "revision", "modified"} <= set(summary["environment"])
    figures = {name: entry["figures"] for name, entry in summary["stages"].items()}
    assert all(figures[name]["passed"] for name in ("test", "opcheck", "graph"))
    assert figures["sanitizer"] == {"memcheck_cpu": 0, "racecheck_cpu": 0, "initcheck_cpu": 0}
    assert figures["ncu"]["cpu float32"]["sum_tiles"]["us"] == 12.5
    assert figures["bench"]["complete"] and figures["build"]["cpu"] == "loaded"
    files = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(files) == ["log.txt", "microbench.json", "ncu.json", "summary.json"]
    lines = capsys.readouterr().out.splitlines()
    rows = lines[lines.index(next(line for line in lines if line.startswith("stage "))) + 1 :]
    assert [row.split()[:2] for row in rows[:-1]] == [[name, "ok"] for name in stages.STAGES]
    assert "pip install" in (tmp_path / "out" / "log.txt").read_text()


def test_names_of_default_folders(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200 (MIG 1g/18gb)")
    assert re.fullmatch(r"nvidia-h200-mig-1g-18gb-\d{4}-\d\d-\d\d", gpu_check.default_folder(False).name)
    assert gpu_check.default_folder(True) == ROOT / "build" / "gpu-dry-run"


@pytest.mark.parametrize("answer, version", [("print('580.159.04')", "580.159.04"), ("sys.exit(9)", None)])
def test_driver_version(tmp_path, monkeypatch, answer, version):
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!{sys.executable}\nimport sys\n{answer}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.driver_version() == version
    path.unlink()
    assert environment.driver_version() is None


# Processes


def python(text):
    return [sys.executable, "-c", text]


def test_outputs_and_exit_statuses(tmp_path):
    commands = [python("import os; print(os.environ['WORD'], os.getcwd())"), python("import sys; sys.exit('no')")]
    fine, failed = processes.run_together(commands, 60, tmp_path, {"WORD": "hello"})
    assert fine.output == f"hello {tmp_path}\n" and fine.problem == ""
    assert failed.problem == "exit status 1" and failed.last_lines() == ["no"]
    (absent,) = processes.run_together([["/nonexistent/ncu"]], 60, tmp_path, {})
    assert absent.problem == "exit status 127" and "cannot run /nonexistent/ncu: No such file" in absent.output


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("partial", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename("partial", "ready")
"""
WRITING = """
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    pathlib.Path("ready").touch()
    time.sleep(600)
except KeyboardInterrupt:
    print("results")
"""


def assert_all_end(path):
    """The processes named in a file end; killed ones may take a moment."""
    pids = path.read_text().split()
    for _ in range(6000):
        pids = [pid for pid in pids if is_alive(pid)]
        if not pids:
            return
        time.sleep(0.01)
    raise AssertionError(f"still running: {pids}")


def is_alive(pid):
    """Whether there is more of a process than its entry."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


ON_LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from Linux's /proc")


@pytest.fixture
def until_ready(tmp_path, monkeypatch):
    """Time stands still until a command has written the file "ready"; then it is late."""
    begun = []

    def monotonic():
        while begun and not (tmp_path / "ready").exists():
            time.sleep(0.01)
        begun.append(True)
        return 0.0 if len(begun) == 1 else 1e6

    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=monotonic))


@ON_LINUX
def test_commands_out_of_time_are_stopped_with_all_that_they_started(tmp_path, monkeypatch, until_ready):
    monkeypatch.setattr(processes, "GRACE", 0.1)
    (done,) = processes.run_together([python(STUBBORN + "time.sleep(600)")], 5, tmp_path, {})
    assert done.timed_out and done.problem == "out of time"
    assert_all_end(tmp_path / "ready")


def test_a_command_out_of_time_may_write_its_results(tmp_path, monkeypatch, until_ready):
    monkeypatch.setattr(processes, "GRACE", 600.0)
    (done,) = processes.run_together([python(WRITING)], 5, tmp_path, {})
    assert done.timed_out and done.output == "results\n"


@ON_LINUX
def test_an_interruption_ends_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.1)
    command = python(STUBBORN + "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)")
    with pytest.raises(processes.Interrupted, match="SIGTERM"), processes.interruptible():
        processes.run_together([command], 600, tmp_path, {})
    assert_all_end(tmp_path / "ready")


# The program that the tools watch


def test_every_op_of_the_package_has_a_case():
    assert set(backends.OPS) <= set(gpu_cases.CASES)
    assert set(gpu_cases.cases_of("cuda")) == {name for name, kernels in backends.OPS.items() if "cuda" in kernels}


@NO_CPU
def test_cases_call_every_op_on_the_cpu(capsys):
    gpu_cases.main(["small", "--device", "cpu", "--backend", "cpu"])
    assert f"called every op of the cpu backend: {len(gpu_cases.registered_ops('cpu'))}" in capsys.readouterr().out


@NO_TRITON
@INTERPRETER
def test_cases_call_every_triton_op():
    maps = [gpu_cases.features((1, 2, 2, 3), torch.float32, gpu_cases.contiguous, "cpu")]
    assert gpu_cases.small("triton", "cpu", maps) == gpu_cases.registered_ops("triton")


@NO_CUDA
@NO_CPU
def test_the_cuda_cases_call_every_op_that_has_a_cuda_kernel(monkeypatch):
    """Seen on the CPU, whose ops have the same names."""
    chosen = gpu_cases.cases_of("cuda")
    monkeypatch.setattr(gpu_cases, "CASES", chosen)
    maps = [gpu_cases.features((1, 2, 2, 3), torch.float32, gpu_cases.contiguous, "cpu")]
    assert gpu_cases.registered_ops("cuda") == gpu_cases.small("cpu", "cpu", maps)


@NO_CPU
def test_an_op_without_a_case_is_an_error(monkeypatch):
    chosen = {name: case for name, case in gpu_cases.CASES.items() if name == "masked_l2_loss"}
    monkeypatch.setattr(gpu_cases, "CASES", chosen)
    with pytest.raises(SystemExit, match="no case calls .*fbkd_ops::relation_residual_forward.*cases.py"):
        gpu_cases.main(["small", "--device", "cpu", "--backend", "cpu"])


def test_small_maps_are_of_every_dtype_in_every_layout():
    maps = [f.student for f in gpu_cases.small_features("cuda", "cpu")]
    assert {x.dtype for x in maps} == set(gpu_cases.DTYPES)
    for shape in gpu_cases.SHAPES:
        assert len({x.stride() for x in maps if tuple(x.shape) == shape}) == 3
    assert {x.dtype for x in (f.student for f in gpu_cases.small_features("triton", "cpu"))} == {
        torch.float32,
        torch.bfloat16,
    }


@NO_CPU
def test_large_runs_each_op_once_more_under_the_profiler(monkeypatch):
    calls = {name: 0 for name in gpu_cases.CASES}

    def counting(name, case):
        def counted(features):
            calls[name] += 1
            return case(features)

        return counted

    counted = {name: counting(name, case) for name, case in gpu_cases.CASES.items()}
    monkeypatch.setattr(gpu_cases, "CASES", counted)
    gpu_cases.main(["large", "--device", "cpu", "--backend", "cpu", "--shape", "2", "4", "5", "7"])
    assert calls == dict.fromkeys(backends.OPS, 2) | {"whole_loss": 0}
