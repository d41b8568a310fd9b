"""The measuring tools: what is checked, reported and survived. No test depends on a time."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import code_report, measurement, memory, microbench, suites, timing  # noqa: E402

TOOL = Path(microbench.__file__)
PLAIN = ["eager", "reference", "fbkd_ops"]
ARGUMENTS = ["--shapes", "2,4,6,5", "--rounds", "1", "--threads", "1", "--peers", *PLAIN]


@pytest.fixture
def inside(monkeypatch):
    """Measures in this process, where a test can change the suites."""
    monkeypatch.setattr(microbench, "measured", measurement.measure)


def replace(monkeypatch, name, **functions):
    monkeypatch.setitem(suites.SUITES, name, dataclasses.replace(suites.SUITES[name], **functions))


def run(capsys, path, *arguments):
    """The tables' text and the JSON of one run."""
    microbench.main([*ARGUMENTS, "--json", str(path), *arguments])
    return capsys.readouterr().out, json.loads(path.read_text())


def test_the_tool_measures_in_processes_of_its_own(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, TOOL, *ARGUMENTS, "--suite", "masked_l2", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["complete"] and report["command"].startswith("python benchmarks/microbench.py --shapes 2,4,6,5")
    assert {"cpu", "cores", "threads", "torch", "revision", "modified", "huge_pages"} <= set(report["environment"])
    assert [result["state"] for result in report["results"]] == memory.states_of("cpu")
    assert all(row["status"] == "ok" for result in report["results"] for row in result["peers"].values())
    for state in memory.states_of("cpu"):
        assert f"masked_l2 · 2x4x6x5 float32 contiguous · {state} memory · 1 rounds" in done.stdout


def test_every_suite_has_figures_for_every_peer(inside, capsys, tmp_path):
    text, report = run(capsys, tmp_path / "figures.json")
    jobs = [(result["suite"], result["state"]) for result in report["results"]]
    assert jobs == [(suite, state) for suite in suites.SUITES for state in memory.states_of("cpu")]
    for result in report["results"]:
        assert list(result["peers"]) == PLAIN
        for row in result["peers"].values():
            assert row["status"] == "ok"
            for which in ("forward", "step"):
                assert row[which]["ms"]["median"] > 0 and row[which]["gb_s"] > 0
        assert result["peers"]["eager"]["step"]["speed_vs_eager"]["median"] == 1
        assert result["ceilings"]["copy_gb_s"] > 0
        assert ("matmul_gflop_s" in result["ceilings"]) == (result["suite"] == "adapted_masked_l2")


def test_torch_compile_is_a_peer():
    case = suites.Case((1, 4, 3, 5))
    peers = suites.peers_of(suites.SUITES["masked_l2"], "cpu")
    assert measurement._wrong(suites.SUITES["masked_l2"], peers["compile"], case) == ""


@pytest.mark.parametrize("dtype", suites.DTYPES)
@pytest.mark.parametrize("layout", suites.LAYOUTS)
@pytest.mark.parametrize("name", suites.SUITES)
def test_every_peer_is_right(name, layout, dtype):
    """In all dtypes and layouts: the tolerances do not reject a correct implementation."""
    suite = suites.SUITES[name]
    for peer in PLAIN:
        function = suites.peers_of(suite, "cpu")[peer]
        assert measurement._wrong(suite, function, suites.Case((2, 24, 9, 7), dtype, layout)) == "", peer


def wrong_value(student, teacher, mask):
    return 1.01 * suites.SUITES["masked_l2"].reference(student, teacher, mask)


def wrong_gradient(student, teacher, mask):
    half = 0.5 * student + 0.5 * student.detach()
    return suites.SUITES["masked_l2"].reference(half, teacher, mask)


def wrong_shape(student, teacher, mask):
    return suites.SUITES["masked_l2"].reference(student, teacher, mask)[None]


def wrong_with_gradients_only(student, teacher, mask):
    return (1 + 0.1 * torch.is_grad_enabled()) * suites.SUITES["masked_l2"].reference(student, teacher, mask)


@pytest.mark.parametrize(
    "peer,message",
    [
        (wrong_value, "WRONG without gradients: tensor 0 is off by 0.005"),
        (wrong_gradient, "WRONG with gradients: tensor 1 is off by"),
        (wrong_shape, "WRONG without gradients: shapes [(1,)], expected [()]"),
        (wrong_with_gradients_only, "WRONG with gradients: tensor 0 is off by 0.05"),
    ],
)
def test_a_wrong_peer_gets_no_figures(peer, message, inside, monkeypatch, capsys, tmp_path):
    replace(monkeypatch, "masked_l2", fbkd_ops=peer)
    text, report = run(capsys, tmp_path / "figures.json", "--suite", "masked_l2")
    rows = report["results"][0]["peers"]
    assert rows["fbkd_ops"].keys() == {"status"} and rows["fbkd_ops"]["status"].startswith(message)
    assert rows["eager"]["status"] == "ok" and "WRONG" in text


def test_without_eager_there_is_no_ratio(inside, capsys, tmp_path):
    text, report = run(capsys, tmp_path / "figures.json", "--suite", "masked_l2", "--peers", "fbkd_ops")
    (row,) = report["results"][0]["peers"].values()
    assert row["step"]["speed_vs_eager"] is None and "–" in text


def test_a_failing_peer_does_not_stop_the_others(inside, monkeypatch, capsys, tmp_path):
    def failing(*_):
        raise RuntimeError("no such kernel\nlong explanation")

    replace(monkeypatch, "attention_pool", eager=failing)
    _, report = run(capsys, tmp_path / "figures.json", "--suite", "attention_pool")
    rows = report["results"][0]["peers"]
    assert rows["eager"] == {"status": "failed: RuntimeError: no such kernel"}
    assert rows["fbkd_ops"]["step"]["speed_vs_eager"] is None


def test_a_map_that_does_not_fit_is_said_and_the_rest_goes_on(tmp_path):
    """Two terabytes."""
    path = tmp_path / "figures.json"
    arguments = [
        "--suite",
        "masked_l2",
        "--shapes",
        "1,2000000,500,500",
        "1,4,3,5",
        "--rounds",
        "1",
        "--peers",
        "eager",
    ]
    done = subprocess.run([sys.executable, TOOL, *arguments, "--json", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status = [result["peers"]["eager"]["status"] for result in json.loads(path.read_text())["results"]]
    states = len(memory.states_of("cpu"))
    assert status == ["does not fit in memory"] * states + ["ok"] * states
    assert "does not fit in memory" in done.stdout


def test_a_process_that_dies_is_said(monkeypatch):
    (job, *_) = microbench.jobs_of(microbench.parse([*ARGUMENTS, "--suite", "masked_l2"]))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert microbench.measured(job)["peers"]["eager"]["status"].startswith("failed")


def test_an_interrupted_run_leaves_what_it_has(monkeypatch, tmp_path):
    """Ctrl-C during the second table."""
    done = []

    def measured(job):
        if done:
            raise KeyboardInterrupt
        done.append(job)
        return measurement.measure(job)

    monkeypatch.setattr(microbench, "measured", measured)
    path = tmp_path / "figures.json"
    with pytest.raises(SystemExit, match="interrupted after 1 tables"):
        microbench.main([*ARGUMENTS, "--json", str(path)])
    report = json.loads(path.read_text())
    assert not report["complete"] and len(report["results"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    "arguments,listed",
    [
        (["--suite", "pooling"], list(suites.SUITES)),
        (["--peers", "numpy"], list(suites.PEERS)),
        (["--shapes", "P9"], list(suites.LEVELS)),
        (["--shapes", "1,2,0,4"], ["N,C,H,W"]),
        (["--dtype", "int8"], list(suites.DTYPES)),
        (["--rounds", "0"], ["--rounds must be at least 1"]),
    ],
)
def test_unknown_choices_are_answered_with_the_known_ones(arguments, listed, capsys):
    with pytest.raises(SystemExit):
        microbench.main(arguments)
    message = capsys.readouterr().err
    assert all(name in message for name in listed)


def test_tables_need_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit, match="pip install rich"):
        microbench.console()


def test_rounds_alternate_and_end_with_the_time():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleaved(functions, 4, "cpu")
    assert "".join(calls) == "abababab" and [len(values) for values in times.values()] == [4, 4]
    assert len(timing.interleaved(functions, 100, "cpu", seconds=0.0)["a"]) == timing.LEAST_ROUNDS


def test_summaries_and_ratios():
    assert timing.summary([5.0]) == {"median": 5.0, "p20": 5.0, "p80": 5.0}
    assert timing.summary([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    # Round by round: a slow round of both is no difference.
    assert timing.ratios([1.0, 100.0], [3.0, 300.0])["median"] == 3.0


MEMORY_SCRIPT = """
import torch
from benchmarks import memory
torch.set_num_threads(1)

def three_and_one():
    x = torch.ones(4 << 20)
    y = x + 1
    z = x + y
    del x, y, z
    return torch.ones(4 << 20)

memory.settle(three_and_one)
# The fewest of a few calls: a system that is short of memory takes pages back from anybody.
faults = min(memory.page_faults(three_and_one) for _ in range(4))
print(memory.peak_extra_bytes(three_and_one, "cpu"), faults)
"""


@pytest.mark.skipif("fresh" not in memory.states_of("cpu"), reason="the C library is not glibc")
def test_states_of_memory_are_what_they_say():
    """Three of 16 MiB at the peak; each allocation is new memory in the fresh state, none in the warm one."""
    figures = {}
    for state in ("fresh", "warm"):
        variables = {"PATH": "/usr/bin:/bin", **memory.STATES[state]}
        command = [sys.executable, "-c", MEMORY_SCRIPT]
        done = subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1], env=variables)
        assert done.returncode == 0, done.stderr
        figures[state] = [None if text == "None" else int(text) for text in done.stdout.split()]
    peak, faults = figures["fresh"]
    if peak is None:
        pytest.skip("the peak of the resident set cannot be set back here")
    assert abs(peak - 3 * (16 << 20)) < 2 << 20
    assert faults > 100 and figures["warm"][1] < 20  # with huge pages everywhere, 32; else 16384


RESOURCES = """
Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN4fbkd4cuda4poolI6__halffLi8EEEvPKT_NS_6TilingE:
  REG:30 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1104 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function finish:
  REG:255 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:1104 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """
        Function : _ZN4fbkd4cuda4poolI6__halffLi8EEEvPKT_NS_6TilingE
        /*0000*/    LDG.E.CONSTANT R2, desc[UR4][R2.64] ;    /* 0x00000a00ff017b82 */
        /*0010*/    LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/    STG.E.64 desc[UR4][R2.64], R4 ;
        Function : finish
        /*0000*/    LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0010*/    STL [R1], R4 ;
        /*0020*/    LDL R4, [R1] ;
"""


def test_compiled_code_is_read():
    pool, finish = code_report.instances_of(RESOURCES, CODE, 90)
    assert pool == ("pool", 90, 30, 0, 1024, 0, 16, 8, False)
    assert finish == ("finish", 90, 255, 16, 0, 2, 2, 0, False)
    other = pool._replace(registers=40, widest_load=4)
    assert code_report.summaries([pool, other]) == [
        {
            "kernel": "pool",
            "arch": 90,
            "instances": 2,
            "registers": [30, 40],
            "spills": 0,
            "stack": 0,
            "shared": 1024,
            "widest_load": 16,
            "with_widest_load": 1,
        }
    ]


@pytest.mark.parametrize(
    "name,width", [("LDGSTS.E.BYPASS.128", 16), ("LD.E", 4), ("STG.E.128", 0), ("LDG.E.64.SYS", 8)]
)
def test_widths_of_loads(name, width):
    assert code_report.widest_load(f"  {name} R2, [R4] ;") == width


@pytest.mark.parametrize("name", ["HMMA.16816.F32.BF16", "HGMMA.64x64x16.F32", "DMMA.8x8x4", "UTCHMMA", "FFMA"])
def test_tensor_cores(name):
    code = f"Function : product\n  {name} R2, R4, R6, R2 ;"
    (product,) = code_report.instances_of("Function product:\n REG:30 STACK:0 SHARED:0 LOCAL:0", code, 90)
    assert product.tensor_cores == (name != "FFMA")
