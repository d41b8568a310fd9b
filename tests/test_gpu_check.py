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
from helpers import TEST_ALL
from op_cases import INTERPRETER, NO_CPU, NO_CUDA, NO_TRITON

from benchmarks import results
from fbkd_ops import backends
from scripts.gpu import __main__ as gpu_check
from scripts.gpu import op_calls, parsers, processes, smoke, stages, triton_cache
from scripts.gpu.processes import Done
from scripts.gpu.stages import Context, Outcome, Stage

ROOT = Path(__file__).resolve().parents[1]

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at masked_l2_sums(float *, int)+0x2d0
========= Invalid __global__ write of size 4 bytes
=========     at masked_l2_sums(float *, int)+0x2d0
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at attention_pool_sums(float *)+0x120
=========     and Read access at attention_pool_sums(float *)+0x1a0 [12 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
    "initcheck": "========= ERROR SUMMARY: 0 errors\n",
}
UNSUPPORTED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the release notes\n"
COLUMNS = '"ID","Kernel Name","Block Size","Metric Name","Metric Unit","Metric Value"'


def ncu_launch(number, kernel, dram, warps, nanoseconds):
    values = dict.fromkeys(parsers.NCU_METRICS, "25.0") | {"dram_percent": dram, "warps_percent": warps}
    values |= {"us": nanoseconds}
    where = f'"{number}","{kernel}","(256, 1, 1)"'
    return [f'{where},"{parsers.NCU_METRICS[name]}","unit","{value}"' for name, value in values.items()]


NCU = "\n".join(
    [
        "==PROF== Connected to process 71 (/usr/bin/python3)",
        "the program's own line",
        COLUMNS,
        *ncu_launch(0, "void fbkd::cuda::attention_pool_sums<float, 4>(float *, int)", "80.0", "50.0", "1,000"),
        *ncu_launch(1, "attention_pool_sums", "90.0", "70.0", "3,000"),
        *ncu_launch(2, "sum_tiles", "n/a", "40.0", "12,500"),
    ]
)
FORBIDDEN = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n"


# Parsers


def test_a_sanitizer_is_clean_when_it_ended_and_found_nothing():
    assert all(map(parsers.is_clean, CLEAN.values()))
    assert not any(map(parsers.is_clean, (MEMCHECK, RACECHECK, "========= COMPUTE-SANITIZER\nSegmentation fault\n")))
    found = ["Invalid __global__ write of size 4 bytes", "at masked_l2_sums(float *, int)+0x2d0"]
    assert [line.strip() for line in parsers.findings(MEMCHECK)] == [*found, "ERROR SUMMARY: 2 errors"]


@pytest.mark.parametrize("output", [UNSUPPORTED, FORBIDDEN, "==ERROR== Failed to initialize the profiler: X\n"])
def test_what_keeps_the_tools_from_working(output):
    assert parsers.obstacle(output) and not parsers.obstacle(MEMCHECK) and not parsers.obstacle(NCU)


def test_ncu_launches_are_weighed_by_time():
    rows = parsers.ncu_rows(NCU)
    others = {"l2_percent": 25.0, "sm_percent": 25.0}
    assert rows[0] == {"kernel": "attention_pool_sums", "dram_percent": 80.0, "warps_percent": 50.0, "us": 1.0} | others
    assert rows[2] == {"kernel": "sum_tiles", "dram_percent": None, "warps_percent": 40.0, "us": 12.5} | others
    assert parsers.ncu_rows(FORBIDDEN) == []
    table = parsers.kernel_table(rows)
    assert list(table) == ["sum_tiles", "attention_pool_sums"]  # the longest first
    expected = {"launches": 2, "us": 4.0, "dram_percent": 87.5, "warps_percent": 65.0} | others
    assert table["attention_pool_sums"] == expected and table["sum_tiles"]["dram_percent"] is None
    without = {"kernel": "k"} | dict.fromkeys(parsers.NCU_METRICS) | {"dram_percent": 5.0}
    assert parsers.kernel_table([without])["k"]["dram_percent"] is None


OUTCOMES = """
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "unequal"

def test_breaks(no_such_fixture):
    pass

@pytest.mark.parametrize("number", [0, 1])
def test_skips(number):
    pytest.skip("no library")
"""


def test_results_of_pytest(tmp_path):
    """As pytest writes them, beside a module that skips itself when it is imported and one that cannot be imported."""
    (tmp_path / "test_outcomes.py").write_text(OUTCOMES)
    (tmp_path / "test_absent.py").write_text("import pytest\npytest.importorskip('no_such_framework')\n")
    (tmp_path / "test_broken.py").write_text("import no_such_framework\n")
    path = tmp_path / "tests.xml"
    assert not parsers.tests_in(path)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    subprocess.run([*command, f"--junitxml={path}", str(tmp_path)], cwd=tmp_path, capture_output=True)
    expected = {"passed": 1, "modules skipped": 1, "failure": 1, "error": 2, "skipped": 2}
    assert parsers.tests_in(path) == expected
    path.write_text('<testsuites><testsuite><testcase time="0.0" /></testsuite></testsuites>')
    assert not parsers.tests_in(path)  # of a test that did not end


def test_stages_ignore_no_test_that_needs_a_gpu():
    for ignored in stages.WITHOUT_GPU:
        path = ROOT / ignored
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        assert files and not [file for file in files if re.search(r"mark\.gpu|\bcases import", file.read_text())]


def test_library_states():
    info = "torch         2.10\ncpu library   loaded\ncuda library  not built: no nvcc\n\nop device backend\n"
    assert parsers.library_states(info) == {"cpu": "loaded", "cuda": "not built: no nvcc"}


def benchmark_rows(status="ok", date="a", suite="attention_pool"):
    place = {"date": date, "suite": suite, "case": "P2", "state": "graphs", "pass": "step"}
    figures = {"ms": 1.5, "gb_s": 2000.0, "ceiling_percent": 80.0, "vs_baseline": 3.0}
    rows = [("eager", "failed: of no interest", {}), ("fbkd_ops", "ok", figures), ("fbkd_ops:cuda", status, {})]
    return [place | {"peer": peer, "status": why} | found for peer, why, found in rows]


def test_benchmark_figures_and_failures(tmp_path):
    path = tmp_path / "x.csv"
    results.write(path, {}, benchmark_rows("WRONG with gradients: off"))
    rows = results.text_rows(path)
    figures = {"ms": 1.5, "gb_s": 2000.0, "ceiling_percent": 80.0, "times_as_fast": 3.0}
    assert parsers.step_times(rows) == {"attention_pool, P2, graphs": figures}
    assert parsers.failed_rows(rows) == ["attention_pool, P2, graphs, fbkd_ops:cuda: WRONG with gradients: off"]
    (figures,) = parsers.step_times([rows[1] | {"gb_s": ""}]).values()
    assert "gb_s" not in figures and parsers.failed_rows(rows[:2]) == []


# Stages, on made-up output of their commands


def context_in(folder, dry):
    return Context(folder, folder, dry, cache=folder / "triton-cache")


@pytest.fixture
def on_gpu(tmp_path):
    """A context that is no dry run; its commands must not be run."""
    return context_in(tmp_path, dry=False)


def done(output="", returncode=0, timed_out=False):
    return Done(["command"], output, returncode, timed_out)


@pytest.fixture
def answer(monkeypatch):
    """Lets each command end as ``reply`` says; returns what was asked for. Every tool is there."""

    def prepare(reply):
        calls = []

        def run_together(commands, seconds, folder, variables):
            calls.append(SimpleNamespace(commands=commands, seconds=seconds, variables=variables))
            return [reply(command) for command in commands]

        monkeypatch.setattr(stages, "run_together", run_together)
        monkeypatch.setattr(stages, "tool", lambda name: name)
        return calls

    return prepare


def test_commands_find_the_source_tree_first_and_are_logged(on_gpu, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    (ended,) = on_gpu.run([python("import os; print(os.getcwd(), os.environ['PYTHONPATH'])")], 60)
    assert ended.output == f"{ROOT} {ROOT}{os.pathsep}/elsewhere\n"
    log = (on_gpu.out / "log.txt").read_text()
    assert log.startswith(f"$ {sys.executable} -c ") and log.endswith(f"{ended.output}\n[done]\n\n")


@pytest.mark.parametrize("archs, expected", [(None, "9.0"), ("8.0;9.0", "8.0;9.0")])
def test_build_is_for_the_gpu_that_is_there(on_gpu, answer, monkeypatch, archs, expected):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if archs:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    monkeypatch.setattr(stages, "architecture", lambda: "9.0")
    calls = answer(lambda command: done("cpu library   loaded\ncuda library  loaded\n"))
    assert stages.build(on_gpu, 100).status == "ok"
    assert calls[0].variables["TORCH_CUDA_ARCH_LIST"] == expected and calls[0].variables["FBKD_OPS_CUDA"] == "1"
    assert {"--no-build-isolation", "--no-deps", "-e"} <= set(calls[0].commands[0])


def test_build_fails_with_pip_and_with_a_library_that_does_not_load(on_gpu, answer):
    answer(lambda command: done("nvcc: fatal", 1))
    assert stages.build(on_gpu, 100).why == ["exit status 1", "nvcc: fatal"]
    answer(lambda command: done("cpu library   loaded\ncuda library  broken: undefined symbol\n"))
    outcome = stages.build(on_gpu, 100)
    assert outcome.status == "failed" and outcome.why == ["the cuda library is broken: undefined symbol"]


PASSED = '<testcase name="a" />'
FAILED = '<testcase name="b"><failure message="no" /></testcase>'
SKIPPED = '<testcase name="c"><skipped message="no library" /></testcase>'


@pytest.mark.parametrize(
    "cases, ended, why",
    [
        (PASSED, done(), []),
        (PASSED + FAILED, done("FAILED b", 1), ["exit status 1", "FAILED b"]),
        (PASSED + SKIPPED, done("SKIPPED [1] no library"), ["1 tests skipped", "SKIPPED [1] no library"]),
        (PASSED, done("slow", 1, True), ["out of time", "slow"]),
        ("", done("", 5), ["exit status 5"]),
        (SKIPPED, done(), ["no test passed", "1 tests skipped"]),
        (None, done("fatal error", -11), ["exit status -11", "fatal error"]),
    ],
)
def test_how_pytest_may_end(on_gpu, answer, cases, ended, why):
    def reply(command):
        if cases is not None:
            path = next(word for word in command if word.startswith("--junitxml=")).partition("=")[2]
            Path(path).write_text(f"<testsuites>{cases}</testsuites>")
        return ended

    answer(reply)
    outcome = stages.STAGES["test"].run(on_gpu, 100)
    assert outcome.why == why and outcome.status == ("failed" if why else "ok")


def test_gpu_tests_are_selected_once(on_gpu, answer):
    """Together the two stages run every test that is marked, none of them twice."""
    calls = answer(lambda command: done())
    for name in ("test", "more_tests"):
        stages.STAGES[name].run(on_gpu, 100)
    first, second = (call.commands[0] for call in calls)
    assert first[first.index("-k") + 1] == f"not ({second[second.index('-k') + 1]})"
    for command in (first, second):
        assert command[command.index("-m", 3) + 1] == "gpu" and "tests" in command


def sanitized(results):
    """Ends each tool as ``results`` has it by tool and backend, the others clean."""
    return lambda command: results.get((command[2], command[-1])) or done(CLEAN[command[2]])


def test_sanitizer_runs_every_tool_on_every_backend(on_gpu, answer):
    """The CUDA kernels first, of these memcheck, and Triton's last."""
    calls = answer(sanitized({}))
    outcome = stages.sanitizer(on_gpu, 100)
    rounds = [[f"{command[2]}_{command[-1]}" for command in call.commands] for call in calls]
    assert rounds == [
        ["memcheck_cuda"],
        ["racecheck_cuda", "initcheck_cuda"],
        ["memcheck_triton"],
        ["racecheck_triton", "initcheck_triton"],
    ]
    assert outcome.status == "ok" and outcome.figures == dict.fromkeys(sum(rounds, []), "clean")
    assert all(call.variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for call in calls)
    assert all(call.seconds <= 100 for call in calls)


def late(output):
    return done(output, -9, True)


BOTH = ("cuda", "triton")


@pytest.mark.parametrize(
    "ended, status, clean, told",
    [
        ({("memcheck", "cuda"): done(MEMCHECK)}, "failed", 5, "at masked_l2_sums(float *, int)+0x2d0"),
        ({("racecheck", "triton"): done(RACECHECK)}, "failed", 5, "racecheck of triton: problems"),
        ({("initcheck", "cuda"): done("killed", -9)}, "failed", 5, "killed"),
        # The program that it watches has failed.
        ({("memcheck", "cuda"): done(CLEAN["memcheck"], 1)}, "failed", 5, "memcheck of cuda: exit status 1"),
        # No time is no failure; what the others have found still is.
        ({("memcheck", "triton"): late("")}, "incomplete: out of time for memcheck of triton", 5, None),
        ({("memcheck", "triton"): late(""), ("memcheck", "cuda"): late(MEMCHECK)}, "failed", 4, "out of time"),
        # A tool that cannot work is named, and the others are kept.
        ({("initcheck", each): done(UNSUPPORTED, 1) for each in BOTH}, "failed", 4, "initcheck of cuda: does not run"),
    ],
)
def test_sanitizer_reports_what_it_found(on_gpu, answer, ended, status, clean, told):
    answer(sanitized(ended))
    outcome = stages.sanitizer(on_gpu, 100)
    assert outcome.status == status and list(outcome.figures.values()).count("clean") == clean
    assert told is None or any(told in line for line in outcome.why)


def test_sanitizer_without_time_says_so(on_gpu, answer):
    answer(sanitized({}))
    assert stages.sanitizer(on_gpu, 0).status.startswith("incomplete: out of time for memcheck of cuda, racecheck")


@pytest.mark.parametrize("name, output", [("sanitizer", UNSUPPORTED), ("ncu", FORBIDDEN), ("kernels", FORBIDDEN)])
def test_tools_that_cannot_work_here_are_skipped(on_gpu, answer, monkeypatch, name, output):
    answer(lambda command: done(output, 1))
    status = stages.STAGES[name].run(on_gpu, 100).status
    assert status.startswith("skipped: ") and parsers.obstacle(output) in status
    monkeypatch.setattr(stages, "tool", lambda name: None)
    assert stages.STAGES[name].run(on_gpu, 100).status.endswith("is not on PATH")


def test_ncu_leaves_the_clocks_alone(on_gpu, answer):
    texts = iter((NCU, NCU, NCU, "no kernels"))
    calls = answer(lambda command: done(next(texts)))
    outcome = stages.STAGES["kernels"].run(on_gpu, 100)
    names = [f"{backend}, every op, 4 images, P2, {dtype}" for backend, dtype in stages.PROFILED]
    assert outcome.status == "failed" and outcome.why[0] == f"{names[3]}: no kernel was measured"
    assert outcome.figures[names[0]]["sum_tiles"]["us"] == 12.5
    for command in (call.commands[0] for call in calls):
        assert command[command.index("--clock-control") + 1] == "none"
        assert command[command.index("--print-units") + 1] == "base"
        assert command[command.index("--metrics") + 1].split(",") == list(parsers.NCU_METRICS.values())
    assert sum(call.seconds for call in calls) == 100
    launches = json.loads((on_gpu.out / "ncu.json").read_text())
    assert list(launches) == names and [len(launches[name]) for name in names] == [3, 3, 3, 0]


def test_ncu_measures_the_five_kernels_that_take_longest(on_gpu, answer):
    """As the smoke run has seen them; their launches stand beside those of another stage."""
    (on_gpu.out / "ncu.json").write_text(json.dumps({"before": []}))
    calls = answer(lambda command: done(NCU))
    assert stages.STAGES["ncu"].run(on_gpu, 100).status == "ok"
    assert "--kernel-name" not in calls[0].commands[0]
    (on_gpu.out / "smoke.json").write_text(json.dumps({"kernels": {f"kernel_{index}": {} for index in range(7)}}))
    outcome = stages.STAGES["ncu"].run(on_gpu, 100)
    command = calls[1].commands[0]
    assert command[command.index("--kernel-name") + 1] == "regex:^(kernel_0|kernel_1|kernel_2|kernel_3|kernel_4)$"
    assert command[command.index("loss") :][:3] == ["loss", "--backend", "auto"]
    assert list(json.loads((on_gpu.out / "ncu.json").read_text())) == ["before", *outcome.figures]


def measured(folder, rows, ended=None, complete=True):
    """Lets the benchmark write ``rows``."""

    def reply(command):
        results.write(folder / "microbench.csv", {"complete": complete}, rows)
        return ended or done()

    return reply


def test_benchmark_keeps_the_tables_that_are_ready(on_gpu, answer):
    answer(measured(on_gpu.out, benchmark_rows(), done("interrupted after 1 tables", 1, True), complete=False))
    outcome = stages.STAGES["bench"].run(on_gpu, 10)
    assert outcome.status == "ok" and outcome.figures["complete"] is False
    assert outcome.figures["attention_pool, P2, graphs"]["ms"] == 1.5
    answer(measured(on_gpu.out, benchmark_rows("killed by signal 9", date="b")))
    outcome = stages.STAGES["bench"].run(on_gpu, 10)
    assert outcome.status == "failed" and "fbkd_ops:cuda: killed by signal 9" in outcome.why[0]


def test_other_suites_are_added_to_the_tables(on_gpu, answer):
    """A stage counts its own alone, and a failure of an earlier one is not its own."""
    calls = answer(measured(on_gpu.out, benchmark_rows("WRONG")))
    assert stages.STAGES["bench"].run(on_gpu, 10).status == "failed"
    both = benchmark_rows("WRONG") + benchmark_rows(date="b", suite="masked_l2")
    calls += answer(measured(on_gpu.out, both))
    outcome = stages.STAGES["suites"].run(on_gpu, 10)
    assert outcome.status == "ok" and list(outcome.figures) == ["complete", "masked_l2, P2, graphs"]
    large = calls[0].commands[0]
    assert "--update" not in large and "16,256,200,336" in large


def test_other_suites_keep_the_tables_that_are_there(on_gpu, answer):
    measured(on_gpu.out, benchmark_rows())(None)
    calls = answer(lambda command: done())
    outcome = stages.STAGES["suites"].run(on_gpu, 10)
    assert "--update" in calls[0].commands[0] and "train_step" in calls[0].commands[0]
    assert outcome.status == "failed" and outcome.why == ["no figures"]


@pytest.mark.parametrize("left", ["", "[", "{}"])
def test_benchmark_without_figures_fails(on_gpu, answer, left):
    (on_gpu.out / "microbench.csv").write_text(left)
    (on_gpu.out / "microbench.json").write_text(left)
    calls = answer(lambda command: done("compiling", -9, True))
    outcome = stages.STAGES["bench"].run(on_gpu, 10)
    assert outcome.status == "failed" and outcome.why == ["out of time", "compiling"]
    assert "--update" not in calls[0].commands[0]


SMOKE = {
    "mistakes": {"bfloat16": "", "float32": ""},
    "steps": {"16": {"event_ms": 9.5, "wall_ms": 31.0, "graph_ms": 9.0}, "1": {"event_ms": 1.0, "wall_ms": 29.0}},
    "kernels": {"residual_sums": {"launches": 3, "us": 1500.0, "predicted_us": 1600.0}},
    "others": {"launches": 1500, "us": 3000.0},
}


@pytest.mark.parametrize(
    "found, ended, why",
    [
        (SMOKE, done(), []),
        (SMOKE | {"mistakes": {"bfloat16": "WRONG", "float32": ""}}, done("", 1), ["bfloat16: WRONG"]),
        ({"mistakes": {"bfloat16": ""}}, done("slow", -9, True), ["out of time", "slow"]),
        (SMOKE | {"kernels": {}}, done(), ["the profiler has seen no kernel of the package"]),
        (None, done("no such module", 1), ["exit status 1", "no such module"]),
    ],
)
def test_smoke_tells_times_kernels_and_mistakes(on_gpu, answer, found, ended, why):
    def reply(command):
        if found:
            (on_gpu.out / "smoke.json").write_text(json.dumps(found))
        return ended

    answer(reply)
    outcome = stages.smoke(on_gpu, 60)
    assert outcome.why[: len(why)] == why and outcome.status == ("failed" if why else "ok")
    if not why:
        assert outcome.figures["N=16 wall_ms"] == 31.0 and outcome.figures["N=1 wall_ms"] == 29.0
        assert outcome.figures["others_launches"] == 1500
        assert outcome.figures["kernels"] == SMOKE["kernels"]


def event(key, count, us, kind):
    times = {"self_device_time_total": us, "self_cpu_time_total": 2 * us}
    return SimpleNamespace(key=key, count=count, device_type=kind, **times)


def test_profilers_kernels_stand_beside_the_models(tmp_path):
    path, kernels = tmp_path / "model.csv", [(16, "sums", 900.0), (16, "sums", 700.0), (16, "gone", 5.0), (1, "x", 3.0)]
    rows = [{"images": n, "dtype": "bfloat16", "kernel": name, "predicted_us": us} for n, name, us in kernels]
    assert smoke.predictions(16, "bfloat16", path) == {}
    results.write(path, {}, rows)
    predicted = smoke.predictions(16, "bfloat16", path)
    assert predicted == {"sums": 1600.0, "gone": 5.0}
    on, off = smoke.DeviceType.CUDA, smoke.DeviceType.CPU
    events = [event("void fbkd::cuda::attention_pool_sums<float, 4>(float *)", 1, 20.0, on)]
    events += [event("residual_sums", 3, 1500.0, on), event("aten::add", 9, 90.0, off)]
    events += [event("void at::native::(anonymous namespace)::elementwise_kernel<4>(int)", 5, 10.0, on)]
    found = smoke.beside_the_model(smoke.kernel_rows(events, "cuda"), {"residual_sums": 1600.0, "gone": 5.0})
    assert found["kernels"] == {
        "residual_sums": {"launches": 3, "us": 1500.0, "predicted_us": 1600.0},
        "attention_pool_sums": {"launches": 1, "us": 20.0, "predicted_us": None},
        "gone": {"launches": 0, "us": 0.0, "predicted_us": 5.0},
    }
    longest = {"elementwise_kernel": {"launches": 5, "us": 10.0}}
    assert found["others"] == {"launches": 5, "us": 10.0, "longest": longest}
    assert smoke.kernel_rows(events, "cpu") == {"add": {"launches": 9, "us": 180.0}}


def test_compilation_is_told(on_gpu, answer, monkeypatch):
    monkeypatch.setattr(stages, "architecture", lambda: "10.0")
    calls = answer(lambda command: done('{"kernels": 7, "hits": 5}'))
    assert stages.compile_kernels(on_gpu, 60) == Outcome("ok", {"kernels": 7, "hits": 5}, [])
    assert calls[0].commands[0][-3:] == [str(on_gpu.cache), "--arch", "100"]
    assert calls[0].variables["TRITON_CACHE_DIR"] == str(on_gpu.cache)
    answer(lambda command: done('sum_tiles: PTXASError: no\n{"kernels": 7, "hits": 5}', 1))
    assert stages.compile_kernels(on_gpu, 60).why == ["exit status 1", "sum_tiles: PTXASError: no"]
    answer(lambda command: done("", -9, True))
    assert stages.compile_kernels(on_gpu, 60).status == "incomplete: out of time"


# Triton's cache


def cache_entry(folder, digest, kernel, listed=None):
    """A folder of Triton's cache; its list of files says that it is in ``listed``."""
    place = folder / digest
    place.mkdir(parents=True)
    names = [f"{kernel}.{suffix}" for suffix in ("json", "cubin", "source")]
    for name in names:
        (place / name).write_text("")
    paths = {name: str((listed or folder) / digest / name) for name in names}
    (place / f"__grp__{kernel}.json").write_text(json.dumps({"child_paths": paths}))


def listed_files(folder, digest, kernel):
    return json.loads((folder / digest / f"__grp__{kernel}.json").read_text())["child_paths"]


def test_a_cache_that_was_moved_is_set_right(tmp_path):
    cache_entry(tmp_path, "A", "sum_tiles", Path("/elsewhere"))
    cache_entry(tmp_path, "B", "add_partials")
    cache_entry(tmp_path, "C", "triton_poi_fused_add")  # of torch.compile
    (tmp_path / "D").mkdir()  # a launcher
    assert triton_cache.entries(tmp_path) == {"A": "sum_tiles", "B": "add_partials"}
    assert triton_cache.entries(tmp_path / "none") == {}
    assert triton_cache.relocate(tmp_path) == 1
    assert all(Path(path).exists() for path in listed_files(tmp_path, "A", "sum_tiles").values())
    triton_cache.trim(tmp_path)
    assert list(listed_files(tmp_path, "A", "sum_tiles")) == ["sum_tiles.json", "sum_tiles.cubin"]
    assert not list(tmp_path.rglob("*.source"))


LAUNCH = """
import json, sys
from triton import knobs
from triton.runtime.driver import driver
from benchmarks import code_report

hits, launched = [], []
code_report.use_target(90)
known = driver.active

class Launching(type(known)):
    class utils:
        load_binary = staticmethod(lambda name, *_: (None, name, 0, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 1 << 20})
        unload_module = staticmethod(lambda module: None)

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *arguments: launched.append(metadata.name)

driver.set_active(Launching())
knobs.compilation.listener = lambda **facts: hits.append(facts["cache_hit"])
next(code_report.launches())()
print(json.dumps([hits, launched]))
"""


@pytest.fixture
def triton_process(tmp_path):
    """Runs a command with a compiler, not the interpreter, and a cache below ``tmp_path``."""

    def run(arguments, cache):
        variables = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


NEEDED = """
import json
from benchmarks import code_report
from benchmarks.inputs import Case
from benchmarks.suites import SUITES
from scripts.gpu import triton_cache

def kernels(images):
    suite, shape = SUITES["fbkd_loss"], (images, 32, 24, 40)
    call = lambda: triton_cache.passes(suite, Case(shape, "bfloat16", strides=suite.strides(shape)))
    return [[each.kernel.__name__, each.arguments[0]] for each in triton_cache.needed([call])]

code_report.use_target(90)
with triton_cache.on_the_cpu():
    print(json.dumps([kernels(1), kernels(3)]))
"""


@NO_TRITON
def test_the_number_of_images_changes_no_kernel(tmp_path, triton_process):
    """So one image stands for all when a cache is made."""
    one, three = triton_process(["-c", NEEDED], tmp_path)
    assert sorted(one) == sorted(three) and {"residual_sums", "pool_convolutions"} <= {name for name, _ in one}
    assert not triton_cache.entries(tmp_path)  # nothing was compiled


@NO_TRITON
def test_a_launch_hits_what_was_compiled_without_a_gpu(tmp_path, triton_process):
    """By Triton's own launch path, in another process, after the cache was moved and set right; not before.

    A dry run's stage has compiled it.
    """
    context, moved = context_in(tmp_path, dry=True), tmp_path / "moved"
    compiled = stages.compile_kernels(context, 600)
    assert compiled.status == "ok", compiled.why
    (kernel,) = triton_cache.entries(context.cache).values()
    assert compiled.figures["kernels"] == compiled.figures["compiled"] == 1 and compiled.figures["hits"] == 0
    context.cache.rename(moved)
    triton_cache.relocate(moved)
    before = triton_cache.entries(moved)
    hits, launched = triton_process(["-c", LAUNCH], moved)
    assert launched[0] == kernel and hits[0] is True
    assert before.items() <= triton_cache.entries(moved).items()
    assert kernel not in [name for key, name in triton_cache.entries(moved).items() if key not in before]


# The run as a whole


def run_stages(tmp_path, chosen, deadline, clock):
    gpu_check.check(chosen, context_in(tmp_path, dry=True), {"stages": {}}, deadline, clock)
    return json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize(
    "deadline, lasting, least, given",
    [
        (60, [1000, 5, 1000], [10, 10, 10], [40, 10, 15]),  # later stages get what is kept for them
        (500, [1000, 1000], [10, 10], [100, 100]),  # and no stage more than its limit
        (36, [1000, 1, 1], [30, 10, 5], [30, None, 6]),  # what the deadline leaves no time for is skipped
    ],
)
def test_the_deadline_is_shared_out(tmp_path, deadline, lasting, least, given):
    """By a clock that a stage alone moves."""
    now, seen = [0.0], {}

    def stage(name, seconds, least):
        def run(context, limit):
            seen[name] = limit
            now[0] += min(seconds, limit)
            return Outcome()

        return Stage(name, run, least, 100)

    chosen = [stage(*each) for each in zip("abc", lasting, least, strict=False)]
    summary = run_stages(tmp_path, chosen, deadline, lambda: now[0])
    assert [seen.get(each.name) for each in chosen] == given
    status = {name: entry["status"] for name, entry in summary["stages"].items()}
    assert [status[each.name] for each in chosen] == ["ok" if limit else "skipped: out of time" for limit in given]
    assert [summary["stages"][name]["seconds"] for name in seen] == [
        min(lasting["abc".index(n)], seen[n]) for n in seen
    ]
    assert summary["complete"]


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
    assert why in output and re.search(r"^first +failed\nsecond +ok$", output, re.MULTILINE)


@pytest.fixture
def signals():
    """Python's own handlers, also where the tests run in a shell's background, which ignores SIGINT; set back later."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_a_valid_summary(tmp_path, two_stages, signals, number):
    two_stages(lambda *_: os.kill(os.getpid(), number))
    code, summary = main(tmp_path)
    assert code == 130 and not summary["complete"]
    assert [entry["status"] for entry in summary["stages"].values()] == ["interrupted", "not run"]


def test_stages_can_be_chosen(tmp_path, two_stages):
    two_stages(broken)
    assert list(main(tmp_path, "--stages", "second")[1]["stages"]) == ["second"]


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


def test_kernels_that_later_stages_compile_are_told(tmp_path, capsys):
    """What a cache that was given lacks; the stage that compiles beforehand says its own."""

    def run(context, seconds):
        cache_entry(context.cache, f"entry-{len(triton_cache.entries(context.cache))}", "sum_tiles")
        return Outcome()

    chosen = [Stage(name, run, 1, 10) for name in ("compile", "smoke", "test")]
    summary = run_stages(tmp_path, chosen, 100, lambda: 0.0)
    counts = {name: entry["figures"].get("kernels_not_in_cache") for name, entry in summary["stages"].items()}
    assert counts == {"compile": None, "smoke": 1, "test": 1}
    assert "'kernels_not_in_cache': 1" in capsys.readouterr().out


def test_a_cache_that_is_given_is_used_where_it_is(tmp_path, two_stages, capsys):
    used = []
    two_stages(lambda context, seconds: used.append(context.cache) or Outcome())
    cache_entry(tmp_path / "cache", "A", "sum_tiles", Path("/elsewhere"))
    _, summary = main(tmp_path, "--cache", str(tmp_path / "cache"))
    assert used == [tmp_path / "cache"] and summary["cache"] == {"given": True, "kernels": 1}
    assert "Triton's cache: 1 kernels, 1 moved here" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(tmp_path, "--cache", str(tmp_path / "none"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "test", "tset"], "invalid choice: 'tset'"),
        (["--deadline", "0"], "--deadline must be > 0"),
        (["--deadline", "nan"], "--deadline must be > 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path):
    variables, command = os.environ | {"CUDA_VISIBLE_DEVICES": ""}, [sys.executable, "-m", "scripts.gpu", "--out"]
    done = subprocess.run([*command, tmp_path / "out"], cwd=ROOT, env=variables, capture_output=True, text=True)
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


# Stages that call the same function as an earlier one, with another selection, suites or program. `make test-all` has
# them in the dry run too, whose processes take 2.5 seconds each to import PyTorch, and "compile", which another test
# runs.
LIKE_EARLIER = {"more_tests": "test", "suites": "bench", "kernels": "ncu"}
DRY_STAGES = [name for name in stages.STAGES if TEST_ALL or name not in [*LIKE_EARLIER, "compile"]]


def test_stages_that_are_like_earlier_ones_call_the_same_function():
    for name, earlier in LIKE_EARLIER.items():
        assert stages.STAGES[name].run.__code__ is stages.STAGES[earlier].run.__code__


@NO_CPU
def test_a_dry_run_takes_its_stages(tmp_path, monkeypatch, capsys):
    """With stand-ins for the tools, which run the program that they are given and print what the tools would."""
    fake_tool(tmp_path, "compute-sanitizer", "sys.argv[2] == 'memcheck'", CLEAN)
    fake_tool(tmp_path, "ncu", "True", {}, NCU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    code, summary = main(tmp_path, "--stages", *DRY_STAGES)
    statuses = {name: entry["status"] for name, entry in summary["stages"].items()}
    assert statuses == dict.fromkeys(DRY_STAGES, "ok"), summary["stages"]
    assert code == 0 and summary["complete"] and summary["dry_run"]
    figures = {name: entry["figures"] for name, entry in summary["stages"].items()}
    assert all(figures[name]["passed"] for name in ("test", "more_tests") if name in figures)
    assert figures["smoke"]["others_launches"] > 0
    assert "compile" not in figures or figures["compile"]["compiled"] == 1
    assert set(figures["sanitizer"].values()) == {"clean"} and len(figures["sanitizer"]) == 3
    for name in {"ncu", "kernels"} & figures.keys():
        (kernels,) = (value for value in figures[name].values() if isinstance(value, dict))
        assert kernels["sum_tiles"]["us"] == 12.5
    assert figures["bench"]["complete"] and figures["build"]["cpu"] == "loaded"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.txt", "microbench.csv", "microbench.json", "ncu.json", "smoke.json", "summary.json"]
    *lines, _ = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-len(DRY_STAGES) :]] == [[name, "ok"] for name in DRY_STAGES]
    for name in DRY_STAGES:  # each was told as soon as it had ended
        assert lines[lines.index(f"{name} ...") + 1].startswith("{'status': 'ok'")
    assert "pip install" in (tmp_path / "out" / "log.txt").read_text()


# Processes


def python(text):
    return [sys.executable, "-c", text]


def test_outputs_and_exit_statuses(tmp_path):
    commands = [python("import os; print(os.environ['WORD'], os.getcwd())"), python("import sys; sys.exit('no')")]
    commands += [["/nonexistent/ncu"], python("import os; os.kill(os.getpid(), 9)")]
    fine, failed, absent, killed = processes.run_together(commands, 600, tmp_path, {"WORD": "hello"})
    assert fine.output == f"hello {tmp_path}\n" and fine.problem == ""
    assert failed.problem == "exit status 1" and failed.last_lines() == ["no"]
    assert absent.problem == "exit status 127" and "/nonexistent/ncu" in absent.output
    assert killed.problem == "exit status -9"  # by somebody else, as for want of memory


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("partial", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename("partial", "ready")
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
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.1)


@ON_LINUX
def test_commands_out_of_time_are_stopped(tmp_path, impatient):
    """Whether they listen or not."""
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); import time; time.sleep(600)"
    commands = [python("import time; time.sleep(600)"), python(deaf)]
    done = processes.run_together(commands, 0.5, tmp_path, {})
    assert [each.problem for each in done] == ["out of time"] * 2


@ON_LINUX
def test_what_a_command_leaves_behind_ends_with_it(tmp_path):
    (done,) = processes.run_together([python(STUBBORN)], 600, tmp_path, {})
    assert done.problem == ""
    assert_all_end(tmp_path / "ready")


@ON_LINUX
def test_an_interruption_ends_what_runs(tmp_path, signals):
    command = python(STUBBORN + f"os.kill({os.getpid()}, signal.SIGINT)\ntime.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        processes.run_together([command], 600, tmp_path, {})
    assert_all_end(tmp_path / "ready")


# The program that the tools watch


def test_every_op_of_the_package_has_a_case():
    assert set(backends.FUNCTIONS) <= set(op_calls.CASES)
    assert set(op_calls.cases_of("cuda")) == {name for name, kernels in backends.FUNCTIONS.items() if "cuda" in kernels}


@NO_CPU
def test_cases_call_every_op_on_the_cpu(capsys):
    op_calls.main(["small", "--device", "cpu", "--backend", "cpu"])
    assert f"called every op of the cpu backend: {len(op_calls.registered_ops('cpu'))}" in capsys.readouterr().out


@NO_TRITON
@INTERPRETER
def test_cases_call_every_triton_op():
    maps = [op_calls.features((1, 2, 2, 3), torch.float32, op_calls.contiguous, "cpu")]
    assert op_calls.small("triton", "cpu", maps) == op_calls.registered_ops("triton")


@NO_CUDA
@NO_CPU
def test_the_cuda_cases_call_every_op_that_has_a_cuda_kernel(monkeypatch):
    """Seen on the CPU, whose ops have the same names."""
    chosen = op_calls.cases_of("cuda")
    monkeypatch.setattr(op_calls, "CASES", chosen)
    maps = [op_calls.features((1, 2, 2, 3), torch.float32, op_calls.contiguous, "cpu")]
    assert op_calls.registered_ops("cuda") == op_calls.small("cpu", "cpu", maps)


@NO_CPU
def test_an_op_without_a_case_is_an_error(monkeypatch):
    chosen = {name: case for name, case in op_calls.CASES.items() if name == "masked_l2_loss"}
    monkeypatch.setattr(op_calls, "CASES", chosen)
    with pytest.raises(SystemExit, match="no case calls .*fbkd_ops::relation_residual_forward.*op_calls.py"):
        op_calls.main(["small", "--device", "cpu", "--backend", "cpu"])


def test_small_maps_are_of_every_dtype_in_every_layout():
    maps = [f.student for f in op_calls.small_features("cuda", "cpu")]
    assert {x.dtype for x in maps} == set(op_calls.DTYPES)
    for shape in op_calls.SHAPES:
        assert len({x.stride() for x in maps if tuple(x.shape) == shape}) == 3
    assert {x.dtype for x in (f.student for f in op_calls.small_features("triton", "cpu"))} == {
        torch.float32,
        torch.bfloat16,
    }


@NO_CPU
def test_large_runs_each_op_once_more_under_the_profiler(monkeypatch):
    calls = {name: 0 for name in op_calls.CASES}

    def counting(name, case):
        def counted(features):
            calls[name] += 1
            return case(features)

        return counted

    counted = {name: counting(name, case) for name, case in op_calls.CASES.items()}
    monkeypatch.setattr(op_calls, "CASES", counted)
    op_calls.main(["large", "--device", "cpu", "--backend", "cpu", "--shape", "2", "4", "5", "7"])
    assert calls == dict.fromkeys(backends.FUNCTIONS, 2) | {"whole_loss": 0}
