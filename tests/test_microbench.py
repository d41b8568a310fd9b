"""The measuring tools: what is checked, reported and survived. No test depends on a time."""

import dataclasses
import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas")

from benchmarks import (
    code_report,
    environment,
    inputs,
    loss_suites,
    measurement,
    memory,
    microbench,
    mmrazor,
    results,
    suites,
    sweep,
    timing,
    train_step,
)

TOOL = Path(microbench.__file__)
PLAIN = ["eager", "reference", "fbkd_ops"]
LOSSES = ["relation", "fbkd_loss"]
BESIDE_MMRAZOR = ["non_local", *LOSSES]
CHECKED = [name for name, suite in suites.SUITES.items() if not suite.checked_as]
ARGUMENTS = ["--shapes", "2,4,6,5", "--rounds", "1", "--threads", "1", "--peers", *PLAIN]


@pytest.fixture
def inside(monkeypatch):
    """Measures in this process, where a test can change the suites."""
    monkeypatch.setattr(microbench, "measured", measurement.measure)


@pytest.fixture
def handed_over(monkeypatch, capsys):
    """Measures in this process what it reads as JSON, as a process of its own does; returns the jobs."""

    def measured_once(job):
        asked.append(job)
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(dataclasses.asdict(job))))
        measurement.main()
        return json.loads(capsys.readouterr().out)

    asked, threads = [], torch.get_num_threads()
    monkeypatch.setattr(microbench, "measured_once", measured_once)
    monkeypatch.setattr(memory, "limit_to_available", lambda: None)
    yield asked
    torch.set_num_threads(threads)


def replace(monkeypatch, name, **functions):
    """Other implementations in a suite, the same for every case."""
    makers = {peer: lambda case, function=function: function for peer, function in functions.items()}
    suite = suites.SUITES[name]
    changed = dataclasses.replace(suite, implementations=suite.implementations | makers)
    monkeypatch.setitem(suites.SUITES, name, changed)


def wrong_of(suite, peer, case):
    truth = measurement.Truth(suites.SUITES[suite], case)
    return measurement._wrong(truth, suites.peers_of(truth.suite, "cpu")[peer])


def run(capsys, path, *arguments):
    """The tables' text and the result of one run."""
    microbench.main([*ARGUMENTS, "--csv", str(path), *arguments])
    return capsys.readouterr().out, results.read(path)


def places(report):
    return list(report.rows[["suite", "state"]].drop_duplicates().itertuples(index=False, name=None))


def one(report, peer="fbkd_ops", which="step"):
    """The first row of a peer and a pass."""
    return report.rows[(report.rows["peer"] == peer) & (report.rows["pass"] == which)].iloc[0]


@pytest.fixture(scope="module")
def tool_run(tmp_path_factory):
    """What the tool prints, started in another folder on a map of two terabytes and on a small one, and its result."""
    folder = tmp_path_factory.mktemp("tool")
    arguments = ["--shapes", "1,2000000,500,500", *ARGUMENTS[1:], "--suite", "masked_l2"]
    command = [sys.executable, TOOL, *arguments, "--csv", "figures.csv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, results.read(folder / "figures.csv")


def test_the_tool_measures_in_processes_of_its_own(tool_run):
    text, report = tool_run
    assert report.facts["complete"]
    command = "python benchmarks/microbench.py --shapes 1,2000000,500,500 2,4,6,5 --rounds 1"
    assert report.facts["command"].startswith(command)
    assert {"cpu", "cores", "threads", "torch", "revision", "modified", "huge_pages"} <= set(
        report.facts["environment"]
    )
    assert places(report) == [("masked_l2", state) for state in memory.states_of("cpu")]
    assert set(report.rows.query("channels == 4")["status"]) == {"ok"}
    for state in memory.states_of("cpu"):
        assert f"{state} memory\n\n### masked_l2" in text


def test_a_map_that_does_not_fit_is_said_and_the_rest_goes_on(tool_run):
    """Two terabytes."""
    text, report = tool_run
    status = report.rows.query("peer == 'eager' and `pass` == 'step'")["status"]
    states = len(memory.states_of("cpu"))
    assert list(status) == ["does not fit in memory"] * states + ["ok"] * states
    assert "does not fit in memory" in text


def test_every_suite_has_figures_for_every_peer(inside, capsys, tmp_path):
    _, report = run(capsys, tmp_path / "figures.csv", "--suite", *CHECKED)
    assert places(report) == [(suite, state) for suite in CHECKED for state in memory.states_of("cpu")]
    for (suite, _), rows in report.rows.groupby(["suite", "state"]):
        found = rows.set_index(["peer", "pass"])
        assert list(dict.fromkeys(rows["peer"])) == PLAIN
        baseline = "mmrazor" if suite in BESIDE_MMRAZOR else "eager"
        if baseline == "mmrazor":
            assert set(found.loc["eager", "status"]) == {f"{suite} has none on cpu"}
        measured = rows[rows["status"] == "ok"]
        assert set(measured["peer"]) == set(PLAIN) - ({"eager"} if baseline == "mmrazor" else set())
        assert (measured["ms"] > 0).all() and (measured["gb_s"] > 0).all() and (measured["copy_gb_s"] > 0).all()
        assert found.at[("fbkd_ops", "step"), "speed"] == 1 and set(measured["baseline"]) == {baseline}
        if baseline == "eager":
            assert found.at[("eager", "step"), "vs_baseline"] == 1
        assert measured["matmul_gflop_s"].notna().all() == (suite in ["adapted_masked_l2", *BESIDE_MMRAZOR])


def test_a_whole_step_has_figures_without_a_ceiling(inside, monkeypatch, capsys, tmp_path):
    """With smaller ResNets, whose pyramids are as wide, and few proposals."""
    detection = pytest.importorskip("torchvision.models.detection")
    pool = pytest.importorskip("torchvision.ops").MultiScaleRoIAlign(
        ["0", "1", "2", "3"], output_size=2, sampling_ratio=2
    )
    few = dict(rpn_pre_nms_top_n_train=20, rpn_pre_nms_top_n_test=20, box_batch_size_per_image=16, box_roi_pool=pool)
    monkeypatch.setattr(detection, "FasterRCNN", functools.partial(detection.FasterRCNN, **few))
    detector, smaller = train_step.make_detector, {50: 18, 101: 34}
    monkeypatch.setattr(train_step, "make_detector", lambda case, depth: detector(case, smaller[depth]))
    monkeypatch.setattr(measurement, "_wrong", lambda *arguments: "")
    peers = ["no_distillation", "fbkd_ops"]
    arguments = ["--suite", "train_step", "--shapes", "1,256,16,16", "--peers", *peers]
    _, report = run(capsys, tmp_path / "figures.csv", *arguments)
    assert places(report) == [("train_step", "default"), ("train_step", "fresh")]
    rows = report.rows
    assert list(rows["peer"].unique()) == peers and set(rows["status"]) == {"ok"}
    assert (rows["ms"] > 0).all() and (rows["vs_baseline"] > 0).all()
    assert rows[["gb_s", "ceiling_percent", "sum_gb_s"]].isna().all(axis=None)
    assert (rows["peak_mb"].notna() == (rows["state"] == "fresh")).all()


def test_ratios_are_the_right_way_up_and_of_the_same_rounds(inside, monkeypatch, capsys, tmp_path):
    """A peer of 6 ms in each round beside 2 ms of fbkd_ops: 3 times as fast, and three times eager's speed."""

    def timed(calls, *_, **__):
        return {key: [2.0, 20.0] if key[0] == "fbkd_ops" else [6.0, 60.0] for key in calls}

    monkeypatch.setattr(measurement, "interleaved", timed)
    text, report = run(capsys, tmp_path / "figures.csv", "--suite", "masked_l2")
    eager, ours = one(report, "eager"), one(report)
    assert (eager["ms"], eager["speed"], eager["vs_baseline"]) == (33.0, 3.0, 1.0)
    assert (ours["ms"], ours["speed"], ours["vs_baseline"]) == (11.0, 1.0, 3.0)
    cost = suites.SUITES["masked_l2"].cost(inputs.Case((2, 4, 6, 5)))
    assert one(report, which="forward")["bytes"] == cost.forward_bytes
    assert ours["bytes"] == cost.forward_bytes + cost.backward_bytes
    assert ours["gb_s"] == pytest.approx(ours["bytes"] / 1e6 / 11.0)
    assert text.endswith("None: `fbkd_ops` is the fastest in every row.\n")


def test_a_whole_steps_loss_is_checked_as_the_loss(monkeypatch):
    broken = dict(loss_suites.FBKD_LOSS.implementations)
    broken["fbkd_ops"] = lambda case: lambda *tensors: 2 * broken["reference"](case)(*tensors)
    monkeypatch.setitem(suites.SUITES, "fbkd_loss", dataclasses.replace(loss_suites.FBKD_LOSS, implementations=broken))
    peers, (case,) = ["no_distillation", "fbkd_ops"], suites.SUITES["train_step"].cases
    wrong = measurement.mistakes(measurement.Job("train_step", case, "default", peers, 1, 1, 0.0), peers)
    assert wrong["no_distillation"] == "" and wrong["fbkd_ops"].startswith("WRONG")


def test_a_whole_step_follows_dtype_and_layout(monkeypatch):
    """16 bits under autocast, as in training; the features are in the layout that is asked for."""
    pytest.importorskip("torchvision")
    made = suites.SUITES["train_step"].implementations["fbkd_ops"]
    for dtype, layout in (("float32", "contiguous"), ("bfloat16", "channels_last")):
        case = inputs.Case((1, 256, 16, 24), dtype, layout, strides=loss_suites.STRIDES)
        step, seen = made(case), []
        step.detector.loss.register_forward_pre_hook(lambda module, maps, seen=seen: seen.extend(maps[0]))
        total = step(*suites.SUITES["train_step"].inputs(case))
        assert total.isfinite() and seen[0].dtype == getattr(torch, dtype)
        assert seen[0].is_contiguous(memory_format=inputs.LAYOUTS[layout])


def test_a_whole_step_needs_torchvision(inside, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    monkeypatch.setattr(measurement, "_wrong", lambda *arguments: "")
    _, report = run(capsys, tmp_path / "figures.csv", "--suite", "train_step", "--peers", "fbkd_ops")
    assert set(report.rows["status"]) == {"not installed: pip install torchvision"}


def small_case(suite, dtype="float32", layout="contiguous"):
    shape = (2, 24, 9, 7)
    case = inputs.Case(shape, dtype, layout, strides=suite.strides(shape))
    return case.checked if case.strides else case


@pytest.mark.parametrize("dtype", inputs.DTYPES)
@pytest.mark.parametrize("layout", inputs.LAYOUTS)
@pytest.mark.parametrize("name", CHECKED)
def test_every_peer_is_right(name, layout, dtype):
    """In all dtypes and layouts: the tolerances do not reject a correct implementation."""
    suite = suites.SUITES[name]
    for peer in suite.implementations:
        if peer != "mmrazor":
            wrong = wrong_of(name, peer, small_case(suite, dtype, layout))
            assert wrong == "", peer


@pytest.mark.skipif(mmrazor.versions().get("mmrazor") != mmrazor.VERSION, reason="MMRazor 1.0.0 is not installed")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", BESIDE_MMRAZOR)
def test_mmrazor_is_right(name, dtype):
    suite = suites.SUITES[name]
    assert suite.baseline == "mmrazor"
    assert wrong_of(name, "mmrazor", small_case(suite, dtype)) == ""


WITHOUT_UNUSED = """
import importlib.util, sys
sys.modules["transformers"] = None  # which mmengine imports if it can, and which needs a real yaml
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("cv2", "yaml") else find(name, *rest)
from benchmarks import mmrazor
mmrazor.Loss(8, (2,), (2,))
print(sorted(name for name in ("cv2", "yaml") if isinstance(sys.modules[name], mmrazor._StandIn)))
"""


@pytest.mark.skipif(mmrazor.versions().get("mmrazor") != mmrazor.VERSION, reason="MMRazor 1.0.0 is not installed")
def test_mmrazor_needs_no_compiled_package():
    """Those that its three files do not use may be absent: a GPU's machine without a network gets wheels."""
    command = [sys.executable, "-c", WITHOUT_UNUSED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TOOL.parents[1])
    assert done.stdout == "['cv2', 'yaml']\n", done.stderr


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_of_a_loss_vanishes(name):
    """Neither that of a map nor that of a parameter: one that did would be compared with nothing."""
    suite = suites.SUITES[name]
    case = small_case(suite, "float64")
    runner = measurement.Runner(suite.implementations["reference"](case), suite.inputs(case))
    gradients = runner.step()[1:]
    assert len(gradients) > 20 and all(gradient.abs().max() > 1e-3 for gradient in gradients)


@pytest.mark.parametrize("channels", [32, 256, 512])
def test_projections_are_exact_in_float32(channels):
    """So that no max-pool's winner depends on rounding."""
    suite = suites.SUITES["relation"]
    case = inputs.Case((1, channels, 9, 7), strides=(4,))
    student, teacher, *parameters = suite.inputs(case)
    names = [name for name, _ in loss_suites.RelationTerm(loss_suites.loss_of(case)).named_parameters()]
    named = dict(zip(names, parameters, strict=True))
    for side, x in (("student", student), ("teacher", teacher)):
        for layer in ("phi", "g"):
            arguments = x, named[f"{side}_non_local.{layer}.weight"], named[f"{side}_non_local.{layer}.bias"]
            exact = torch.nn.functional.conv2d(*(argument.double() for argument in arguments))
            assert torch.equal(torch.nn.functional.conv2d(*arguments).double(), exact)


@pytest.mark.parametrize("name", LOSSES)
def test_an_error_of_two_percent_is_found_in_every_gradient_of_a_loss(name):
    suite = suites.SUITES[name]
    case = small_case(suite)
    runner = measurement.Runner(suite.implementations["reference"](case), suite.inputs(case))
    results = runner.step()
    for index in range(1, len(results)):
        changed = [0.98 * x if place == index else x for place, x in enumerate(results)]
        found = measurement._difference(changed, [x.double() for x in results], suite.tolerances["float32"])
        assert found.startswith(f"tensor {index} is off by")


def test_results_are_compared_once_for_a_suite_and_a_map(inside, monkeypatch, capsys, tmp_path):
    """In the other states of memory and on other maps that are checked on the same one what was found holds."""
    seen, op = [], suites.SUITES["masked_l2"].op

    def wrong(truth, make):
        name = next(name for name, known in truth.suite.implementations.items() if known is make)
        seen.append((truth.suite.op, name, truth.case.shape))
        return "WRONG" if name == "eager" else ""

    monkeypatch.setattr(measurement, "_wrong", wrong)
    run(capsys, tmp_path / "own.csv", "--suite", "masked_l2")
    assert seen == [(op, name, (2, 4, 6, 5)) for name in PLAIN]
    seen.clear()
    shapes = [",".join(map(str, shape)) for shape in ((1, 4, 6, 5), (1, 4, 5, 6))]
    _, report = run(capsys, tmp_path / "two.csv", "--suite", "relation", "masked_l2", "--shapes", *shapes)
    relation = [("relation_loss", name, (2, 32, 39, 53)) for name in PLAIN[1:]]
    assert seen == relation + [(op, name, shape) for shape in ((1, 4, 6, 5), (1, 4, 5, 6)) for name in PLAIN]
    eager = report.rows.query("suite == 'masked_l2' and peer == 'eager'")
    assert set(eager["status"]) == {"WRONG"} and len(eager) == 2 * 2 * len(memory.states_of("cpu"))


def test_results_are_checked_on_the_map_itself_unless_it_is_large():
    small, large = inputs.Case((2, 64, 20, 30)), inputs.Case((8, 1024, 200, 336))
    assert small.checked is small and inputs.Case(inputs.LEVELS["P2"]).checked.shape == inputs.LEVELS["P2"]
    assert large.checked.shape == (2, 512, 19, 28)
    levels = inputs.Case((2, 256, 50, 84), strides=(16, 8, 4, 4))
    assert levels.checked is levels
    # One image, a single cell at the last level, too few channels, too many pixels.
    for shape in ((1, 256, 50, 84), (2, 256, 16, 16), (2, 16, 50, 84), (2, 256, 200, 336)):
        other = dataclasses.replace(levels, shape=shape).checked
        assert other.shape == (2, max(32, shape[1]), 39, 53) and other.strides == levels.strides
    for strides in ((1,), (16,), (16, 8, 4)):
        assert inputs.Case((1, 256, 9, 9), strides=strides).checked._says_enough


def without_mmrazor(monkeypatch, versions):
    monkeypatch.setattr(mmrazor, "versions", lambda: versions)
    mmrazor.installed.cache_clear()


@pytest.mark.parametrize("versions", [{}, {"mmrazor": "0.3.1", "mmcv-lite": "2.1.0", "mmengine": "0.10.7"}])
def test_what_is_not_installed_is_said_and_the_rest_goes_on(versions, inside, monkeypatch, capsys, tmp_path):
    """The reference is the baseline then."""
    without_mmrazor(monkeypatch, versions)
    arguments = ["--suite", "relation", "--peers", "mmrazor", "compile", "reference"]
    _, report = run(capsys, tmp_path / "figures.csv", *arguments)
    for peer in ("mmrazor", "compile"):
        assert one(report, peer)["status"] == "not installed: pip install mmrazor==1.0.0 mmcv-lite==2.1.0"
    assert one(report, "reference")["vs_baseline"] == 1 and one(report)["vs_baseline"] > 0
    assert set(report.rows["baseline"].dropna()) == {"reference"}


def masked_l2(*tensors):
    return suites.SUITES["masked_l2"].implementations["reference"](None)(*tensors)


def wrong_value(student, teacher, mask):
    return 1.01 * masked_l2(student, teacher, mask)


def wrong_gradient(student, teacher, mask):
    half = 0.5 * student + 0.5 * student.detach()
    return masked_l2(half, teacher, mask)


def wrong_shape(student, teacher, mask):
    return masked_l2(student, teacher, mask)[None]


def wrong_with_gradients_only(student, teacher, mask):
    return (1 + 0.1 * torch.is_grad_enabled()) * masked_l2(student, teacher, mask)


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
    text, report = run(capsys, tmp_path / "figures.csv", "--suite", "masked_l2")
    ours = one(report)
    assert ours["status"].startswith(message) and ours[measurement.FIGURES].isna().all()
    assert one(report, "eager")["status"] == "ok" and "WRONG" in text


def failing(*_):
    raise RuntimeError("no such kernel\nlong explanation")


def too_large(*_):
    raise MemoryError


@pytest.mark.parametrize(
    "place, error, status",
    [
        ("Runner.step", failing, "failed: RuntimeError: no such kernel"),
        ("_memory_of", too_large, "does not fit in memory"),  # after it was called once
    ],
)
def test_a_failing_peer_does_not_stop_the_others(place, error, status, inside, monkeypatch, capsys, tmp_path):
    owner, name = (measurement.Runner, "step") if "." in place else (measurement, place)
    original, eager = getattr(owner, name), suites.SUITES["masked_l2"].implementations["eager"](None)

    def broken(runner, *arguments):
        return (error if runner.function is eager else original)(runner, *arguments)

    monkeypatch.setattr(measurement, "_wrong", lambda *arguments: "")
    monkeypatch.setattr(owner, name, broken)
    _, report = run(capsys, tmp_path / "figures.csv", "--suite", "masked_l2")
    assert one(report, "eager")["status"] == status and one(report)["status"] == "ok"
    assert report.rows["vs_baseline"].isna().all()


def test_a_job_of_a_pyramid_reaches_its_process(handed_over):
    arguments = ["--suite", "fbkd_loss", "--shapes", "2,4,40,53", "--rounds", "1", "--threads", "1"]
    (job, *_) = microbench.jobs_of(microbench.parse([*arguments, "--peers", "fbkd_ops"]))
    row = microbench.measured(job)["rows"][0]
    assert row["status"] == "ok" and row["strides"] == "16 8 4 4"
    assert [row[name] for name in ("n", "channels", "height", "width")] == [2, 4, 40, 53]
    assert row["case"] == "2x4x40x53..2x4x5x7 pooled by 16, 8, 4, 4 float32 contiguous"


@pytest.mark.parametrize(
    "arguments,title",
    [
        (["masked_l2", "--pooling", "preset", "none"], "P2 float32 contiguous"),
        (["relation", "--shapes", "P3"], "P3 pooled by 8 float32 contiguous"),
        (["relation", "--shapes", "1,8,9,7"], "1x8x9x7 pooled by 16 float32 contiguous"),
        (["relation", "--pooling", "none"], "P2 without pooling float32 contiguous"),
        (["fbkd_loss"], "P2..P5 pooled by 16, 8, 4, 4 float32 contiguous"),
        (["fbkd_loss", "--pooling", "none"], "P2..P5 without pooling float32 contiguous"),
    ],
)
def test_maps_are_what_is_asked_for(arguments, title):
    options = microbench.parse(["--suite", *arguments])
    assert [case.title for case in microbench.cases_of(suites.SUITES[arguments[0]], options)] == [title]


def test_a_brief_run_has_every_suite_on_fewer_maps():
    whole, brief = (list(microbench.jobs_of(microbench.parse(arguments))) for arguments in ([], ["--brief"]))
    assert {job.suite for job in brief} == set(suites.SUITES) and len(brief) < len(whole)
    assert brief[0].peers == ["eager", "compile", "fbkd_ops"] and "reference" in whole[0].peers
    assert brief[-1].peers == ["no_distillation", "mmrazor", "fbkd_ops"] and "compile" in whole[-1].peers
    (asked, *_) = microbench.jobs_of(microbench.parse(["--brief", "--suite", "train_step", "--peers", "compile"]))
    assert asked.peers == ["compile", "fbkd_ops"]
    on_gpu = microbench.parse(["--brief"])
    on_gpu.device = "cuda"
    jobs = list(microbench.jobs_of(on_gpu))
    assert jobs[0].peers == [*brief[0].peers, "fbkd_ops:cuda", "fbkd_ops:triton"] and jobs[0].case.device == "cuda"
    assert {job.state for job in jobs if job.suite == "masked_l2"} == {"graphs", "eager"}
    # A whole step waits for the device, and an op's backends are measured in the op's suite.
    assert [(job.state, job.peers) for job in jobs if job.suite == "train_step"] == [("eager", brief[-1].peers)]


def test_a_sweep_has_its_base_once():
    options = microbench.parse(["--sweep", "N", "image", "C", "levels"])
    titles = {name: [case.title for case in microbench.cases_of(suites.SUITES[name], options)] for name in sweep.SUITES}
    assert any(title.startswith("4x256x128x128") for title in titles["relation"])  # of 512 pixels a side
    counts = {name: len(found) for name, found in titles.items()}
    assert counts == {"relation": 6 + 3 + 4, "fbkd_loss": 6 + 3 + 4 + 5}
    assert all(len(set(found)) == len(found) for found in titles.values())


def test_a_run_says_where_a_peer_is_faster(inside, monkeypatch, capsys, tmp_path):
    def twice_as_slow(functions, *_, **__):
        return {name: [2.0 if name[0] == "fbkd_ops" else 1.0] for name in functions}

    monkeypatch.setattr(measurement, "interleaved", twice_as_slow)
    text, _ = run(capsys, tmp_path / "figures.csv", "--suite", "masked_l2")
    states = len(memory.states_of("cpu"))
    assert text.count(" * |") == 2 * 2 * states and text.count("| `eager` | masked_l2 |") == 2 * states
    assert "| `fbkd_ops` | masked_l2 |" not in text


@pytest.mark.parametrize(
    "peer, speed, lost",
    [
        ("compile", 0.99, True),
        ("compile", 1.0, False),
        ("compile", None, False),
        ("compile", float("nan"), False),
        ("no_distillation", 0.5, False),
        ("fbkd_ops:memory_efficient", 0.5, False),
    ],
)
def test_what_counts_as_a_loss(peer, speed, lost):
    assert results.is_slower(peer, speed) == lost


def test_an_update_keeps_other_tables(inside, monkeypatch, capsys, tmp_path):
    path, dates = tmp_path / "figures.csv", iter("abc")
    facts = environment.environment
    monkeypatch.setattr(microbench, "environment", lambda *given: facts(*given) | {"date": next(dates)})
    _, before = run(capsys, path, "--suite", "masked_l2", "attention_pool")
    lines = path.read_text().splitlines()
    _, after = run(capsys, path, "--suite", "attention_pool", "--peers", "fbkd_ops", "--update")
    states, kept = memory.states_of("cpu"), len(memory.states_of("cpu")) * 2 * len(PLAIN)
    assert path.read_text().splitlines()[: 1 + kept] == lines[: 1 + kept] and after.facts["complete"]
    assert list(after.rows["peer"][kept:]) == ["fbkd_ops"] * 2 * len(states)
    (earlier,) = after.facts["earlier"]
    assert earlier["command"] == before.facts["command"] != after.facts["command"]
    _, last = run(capsys, path, "--suite", "attention_pool", "--update")
    assert last.facts["earlier"] == [earlier]  # of the second run no table is left


def test_an_update_is_of_the_same_kernels_and_of_a_result(inside, monkeypatch, capsys, tmp_path):
    path = tmp_path / "figures.csv"
    _, before = run(capsys, path, "--suite", "masked_l2")
    other = before.facts | {"environment": before.facts["environment"] | {"sources": "other"}}
    path.with_suffix(".json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="was measured with sources other, expected"):
        run(capsys, path, "--suite", "masked_l2", "--update")
    with pytest.raises(SystemExit, match="expected a result"):
        run(capsys, tmp_path / "none.csv", "--suite", "masked_l2", "--update")


def test_times_are_of_one_set_of_inputs(monkeypatch):
    monkeypatch.setattr(measurement, "interleaved", lambda calls, *_, **__: {name: [6.0] for name in calls})
    (job, *_) = microbench.jobs_of(microbench.parse(["--suite", "masked_l2"]))
    runner = measurement.Runner(lambda: None, [])
    ceilings = {"sum": measurement.Ceiling(lambda: None, "gb_s", 1.0)}
    times = measurement._times({"eager": [runner] * 2, "fbkd_ops": [runner] * 3}, ceilings, job)
    assert times["sum"] == [6.0] and times["eager", "step"] == [3.0] and times["fbkd_ops", "forward"] == [2.0]


@pytest.mark.parametrize("name, allowed", [("train_step", True), ("relation", False)])
def test_whole_steps_alone_keep_the_tf32_of_their_users(monkeypatch, name, allowed):
    def sets(suite, case):
        seen.append(torch.backends.cudnn.allow_tf32)
        raise MemoryError

    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(measurement, "_input_sets", sets)
    (job, *_) = microbench.jobs_of(microbench.parse(["--suite", name]))
    measurement.measure(dataclasses.replace(job, checked=dict.fromkeys(job.peers, "")))
    assert seen == [allowed]


def test_an_update_that_is_interrupted_at_once_leaves_the_kept_tables(inside, monkeypatch, capsys, tmp_path):
    def interrupted(job):
        raise KeyboardInterrupt

    path = tmp_path / "figures.csv"
    run(capsys, path, "--suite", "masked_l2", "attention_pool")
    monkeypatch.setattr(microbench, "measured", interrupted)
    with pytest.raises(SystemExit, match="interrupted after 0 tables"):
        run(capsys, path, "--suite", "masked_l2", "--update")
    left = results.read(path)
    assert set(left.rows["suite"]) == {"attention_pool"} and not left.facts["complete"]


def test_plots_are_drawn_of_what_was_measured(inside, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run(capsys, tmp_path / "figures.csv", "--suite", "masked_l2", "--plot", str(tmp_path / "plots"))
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["figures-speedup.png"]


def test_levels_of_a_pyramid_are_halves_rounded_up():
    case = inputs.Case(inputs.LEVELS["P2"], strides=(16, 8, 4, 4))
    assert case.shapes == [inputs.LEVELS[level] for level in ("P2", "P3", "P4", "P5")]
    maps = case.pyramid(0)
    assert [tuple(x.shape) for x in maps] == case.shapes and case.pixels == sum(x[0, 0].numel() for x in maps)


def test_the_products_of_the_relation_are_counted():
    """By hand, with C=4 channels and c=1 inner one: products of 4x4 take 32 operations a pixel, of 1x4 take 8."""
    forward = [4 * 8, 2 * 2 * 8, 32, 2 * 8]  # phi and g, covariances, P s, R t
    backward = [2 * 8, 2 * 32, 3 * 8]  # student's covariance; e's products with P and s; gradient of R
    cell = 2 * 2, 6 * 8 + 4 * 2  # M; the winners' weights and dS, gradients of M
    pooled = 10 * sum(forward) + 2 * cell[0], 10 * sum(backward) + 2 * cell[1]
    assert loss_suites._relation_flops(4, 1, 10, 2) == pooled
    full = 2 * 32 + 32 + 2 * 8, 32 + 2 * 32 + 3 * 8
    assert loss_suites._relation_flops(4, 1, 10, 10) == (10 * full[0], 10 * full[1])
    block = suites.SUITES["non_local"].cost(inputs.Case((1, 4, 6, 5), strides=(1,)))
    assert (block.forward_flops, block.backward_flops) == (30 * (32 + 16), 30 * 3 * 16)
    pooled = suites.SUITES["non_local"].cost(inputs.Case((1, 16, 32, 32), strides=(16,)))  # c = 4, four cells
    low_rank = 2 * 2 * 16 * 4
    assert pooled.forward_flops == 1024 * 3 * low_rank + 4 * 2 * 4 * 4
    assert pooled.backward_flops == 1024 * 3 * low_rank + 4 * (3 * low_rank // 2 + 2 * 2 * 4 * 4)
    relation, whole = (suites.SUITES[name].cost(inputs.Case((1, 4, 6, 5), strides=(1,))) for name in LOSSES)
    product = 2 * 4 * 4 * 30
    assert whole.forward_flops - relation.forward_flops == product
    assert whole.backward_flops - relation.backward_flops == 2 * product


@pytest.mark.parametrize("layout", inputs.LAYOUTS)
def test_the_rates_are_those_of_what_was_timed(layout):
    case, cost = inputs.Case((2, 4, 6, 5), layout=layout), inputs.Cost(1, 1, 1, 1)
    ceilings = measurement._ceilings(case, cost)
    rates = measurement._rates(ceilings, {"sum": [1.0], "copy": [1.0], "copy_to_new": [4.0], "matmul": [2.0]})
    moved = 4 * 2 * 4 * 6 * 5 / 1e6
    assert rates["sum_gb_s"] == moved and rates["copy_gb_s"] == 2 * moved
    assert rates["copy_to_new_gb_s"] == 2 * moved / 4
    assert rates["matmul_gflop_s"] == pytest.approx(2 * 4 * 4 * 60 / 1e6 / 2.0)


def test_a_call_makes_all_calls():
    """A GPU's inputs come in several sets, and a call is timed over all of them."""
    seen = []
    timing.calls_of({"x": [lambda: seen.append("a"), lambda: seen.append("b")]}, as_graphs=False)["x"]()
    assert seen == ["a", "b"]


@pytest.mark.gpu
def test_on_a_gpu_calls_are_replayed_from_a_graph():
    x = torch.zeros(4, device="cuda")
    calls = timing.calls_of({"changes": [lambda: x.add_(1), lambda: x.mul_(2)]}, as_graphs=True)
    x.zero_()
    calls["changes"]()
    assert x.tolist() == [2.0] * 4


@pytest.fixture
def one_waits(monkeypatch):
    """Captures everything but what returns "waits"."""

    def captured(function, pool):
        if function() == "waits":
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA error")
        return lambda: "graph"

    monkeypatch.setattr(timing, "_captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def test_a_peer_that_cannot_be_captured_is_named(one_waits):
    peers = {"a": [lambda: "kernels"], "b": [lambda: "waits"]}
    assert timing.calls_of({"a": peers["a"]}, as_graphs=True)["a"]() == "graph"
    assert timing.calls_of(peers, as_graphs=False)["b"]() == "waits"
    with pytest.raises(timing.CaptureError, match="^RuntimeError: operation not permitted .* capturing$") as stopped:
        timing.calls_of(peers, as_graphs=True)
    assert stopped.value.peer == "b"


def test_after_a_failed_capture_the_others_get_a_new_process(monkeypatch, handed_over):
    """The allocator's state is unknown after it, so nothing may be measured in the process in which it failed."""
    (job, *_) = microbench.jobs_of(microbench.parse([*ARGUMENTS, "--suite", "masked_l2"]))

    def calls_of(calls, as_graphs):
        waiting = [name for name in ("eager", "reference") if name in calls]
        if waiting:
            raise timing.CaptureError(waiting[0], RuntimeError("it waits"))
        return timing.calls_of(calls, as_graphs=False)

    monkeypatch.setattr(measurement, "calls_of", calls_of)
    rows = microbench.measured(dataclasses.replace(job, state="graphs"))["rows"]
    status = {row["peer"]: row["status"] for row in rows}
    assert [list(job.uncaptured) for job in handed_over] == [[], ["eager"], ["eager", "reference"]]
    assert status == dict.fromkeys(PLAIN[:2], "cannot be captured: RuntimeError: it waits") | {"fbkd_ops": "ok"}


def test_a_process_that_dies_is_said(monkeypatch):
    (job, *_) = microbench.jobs_of(microbench.parse([*ARGUMENTS, "--suite", "masked_l2"]))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    rows = microbench.measured(job)["rows"]
    assert len(rows) == 2 * len(PLAIN) and all(row["status"].startswith("failed") for row in rows)


def test_an_interrupted_run_leaves_what_it_has(monkeypatch, tmp_path):
    """Ctrl-C during the second table."""
    done = []

    def measured(job):
        if done:
            raise KeyboardInterrupt
        done.append(job)
        return measurement.measure(job)

    monkeypatch.setattr(microbench, "measured", measured)
    path = tmp_path / "figures.csv"
    with pytest.raises(SystemExit, match="interrupted after 1 tables"):
        microbench.main([*ARGUMENTS, "--csv", str(path)])
    report = results.read(path)
    assert not report.facts["complete"] and len(places(report)) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figures.csv", "figures.json"]


@pytest.mark.parametrize(
    "arguments,listed",
    [
        (["--shapes", "P9"], list(inputs.LEVELS)),
        (["--shapes", "1,2,0,4"], ["N,C,H,W"]),
        (["--rounds", "0"], ["--rounds must be at least 1"]),
        (["--update"], ["--update needs the file of --csv"]),
        (["--sweep", "N", "--suite", "masked_l2"], ["expected suites among relation, fbkd_loss, got masked_l2"]),
        (["--shapes", "P2", "--brief"], ["--brief is of the suites' own maps"]),
        (["--csv", "figures.json"], ["expected a file FILE.csv"]),
        (["--sweep", "N", "--shapes", "P2"], ["not allowed with argument"]),
    ],
)
def test_what_cannot_be_asked_for_is_refused(arguments, listed, capsys):
    with pytest.raises(SystemExit):
        microbench.main(arguments)
    message = capsys.readouterr().err
    assert all(name in message for name in listed)


def test_rounds_alternate_and_end_with_the_time():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.interleaved(functions, 4, "cpu")
    assert "".join(calls) == "abababab" and [len(values) for values in times.values()] == [4, 4]
    assert len(timing.interleaved(functions, 100, "cpu", seconds=0.0)["a"]) == timing.LEAST_ROUNDS


def test_summaries_and_ratios():
    assert timing.summary([5.0], "ms") == {"ms": 5.0, "ms_p20": 5.0, "ms_p80": 5.0}
    assert timing.summary([6.0, 1.0, 2.0, 3.0, 4.0, 5.0], "ms") == {"ms": 3.5, "ms_p20": 2.0, "ms_p80": 5.0}
    # Round by round: a slow round of both is no difference.
    assert timing.ratios([1.0, 100.0], [3.0, 300.0], "speed")["speed"] == 3.0


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

def faults_of(function):
    memory.settle(function)
    # The fewest of a few calls: a system that is short of memory takes pages back from anybody.
    return min(memory.page_faults(function) for _ in range(4))

faults = faults_of(three_and_one)
print(memory.peak_extra_bytes(three_and_one, "cpu"), faults)
try:
    torch.empty(1 << 50)
except RuntimeError:
    print(faults_of(lambda: torch.ones(24 << 20)))  # a peer that does not fit leaves the state as it is
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
    peak, faults, _ = figures["fresh"]
    if peak is None:
        pytest.skip("the peak of the resident set cannot be set back here")
    assert abs(peak - 3 * (16 << 20)) < 2 << 20
    assert faults > 100 and max(figures["warm"][1:]) < 20  # with huge pages everywhere, 32; else 16384


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
    assert pool[:9] == ("pool", 90, 30, 0, 1024, 0, 16, 8, False)
    assert finish[:9] == ("finish", 90, 255, 16, 0, 2, 2, 0, False)
    (row,) = code_report.summaries([pool, pool._replace(registers=40, widest_load=4, spills=3)])
    assert (row["kernel"], row["arch"], row["instances"], row["spills"]) == ("pool", 90, 2, 3)
    assert (row["registers_min"], row["registers_max"], row["shared"]) == (30, 40, 1024)
    assert (row["widest_load"], row["with_widest_load"]) == (16, 1)


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
