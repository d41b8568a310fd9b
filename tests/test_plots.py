"""Plots and series of results: the figures that they show, and which result a picture is of."""

import json
import subprocess
import sys

import pytest
from reports import CEILINGS, COST, MACHINE, report, result

from benchmarks import plots, series, sweep
from benchmarks.environment import ROOT
from benchmarks.suites import SUITES

PAIR = {"mmrazor": 30.0, "fbkd_ops": 10.0}
UNPOOLED = [  # time grows with the square of the pixels, and with the pixels
    result(
        {"mmrazor": side**4 * 1.0, "fbkd_ops": side**2 * 1.0},
        (1, 8, side, side),
        memory={"mmrazor": 8.0 * side**4, "fbkd_ops": 3.0},
    )
    for side in (8, 4)
]


def test_bars_have_every_peer_but_fbkd_ops():
    memory_efficient = {"fbkd_ops:memory_efficient": 20.0, "compile": "failed: x"}
    found = plots.bars([result(PAIR | memory_efficient), result(PAIR, state="fresh")])
    assert [(bar.peer, bar.state, bar.value) for bar in found] == [
        ("mmrazor", "warm", 3.0),
        ("fbkd_ops:memory_efficient", "warm", 2.0),
        ("mmrazor", "fresh", 3.0),
    ]
    assert (found[0].suite, found[0].map, found[0].low, found[0].high) == (
        "relation",
        "1x8x4x4 without pooling",
        1.5,
        6.0,
    )


def test_points_and_roofs_are_of_the_same_pass():
    shown = [result(PAIR), result(PAIR) | {"cost": None}, result(PAIR) | {"cost": COST | {"forward_flops": 0}}]
    forward, step = (point for point in plots.roof_points(shown) if point.peer == "fbkd_ops")
    assert (forward.which, forward.intensity, forward.gflop_s) == ("forward", 4.0, 4.0 / 5.0)
    assert (step.which, step.intensity, step.gflop_s) == ("step", 4.0, 12.0 / 10.0)
    forward, step = plots.roofs(shown)
    assert (forward.gb_s, forward.gflop_s) == (CEILINGS["sum_gb_s"], CEILINGS["matmul_gflop_s"])
    # One byte at 10 and two at 20 bytes a second: 0.2 seconds for three.
    assert step.gb_s == pytest.approx(3 / 0.2)


def test_growth_is_shown_along_each_size_of_enough_values():
    time, memory = plots.growths(UNPOOLED)
    assert (time.dimension, time.quantity, memory.quantity) == ("H·W", "ms", "MB")
    assert time.title == "relation, N=1, C=8, without pooling"
    assert time.peers["mmrazor"] == ([16, 64], [256.0, 4096.0])
    assert series.exponent(*time.peers["mmrazor"]) == pytest.approx(2)
    assert series.exponent(*time.peers["fbkd_ops"]) == pytest.approx(1)
    assert series.exponent(*memory.peers["fbkd_ops"]) == pytest.approx(0)
    images = [result(PAIR, (n, 8, 4, 4), strides=(2,)) for n in (1, 2, 4)]
    assert [growth.dimension for growth in plots.growths(images)] == ["N"]
    assert plots.growths(images[:1]) == []


def test_growth_is_of_the_settled_state():
    fresh = [result({"fbkd_ops": 99.0}, (1, 8, side, side), state="fresh") for side in (4, 8)]
    (time, _) = plots.growths([*UNPOOLED, *fresh])
    assert time.peers["fbkd_ops"][1] == [16.0, 64.0]


def test_series_do_not_mix():
    """Other suites, states, dtypes and pooling factors are other series; so is what has no figures."""
    others = [
        result(PAIR, (1, 8, 9, 9)),
        result(PAIR, (1, 8, 5, 5), suite="non_local"),
        result(PAIR, (1, 8, 6, 6), state="fresh"),
        result(PAIR, (1, 8, 7, 7), dtype="bfloat16"),
        result(PAIR, (1, 8, 8, 8), strides=(2,)),
        result(PAIR, (2, 8, 9, 9)),
    ]
    assert plots.growths([result(PAIR, (1, 8, 4, 6)), result(PAIR, (1, 8, 6, 4))]) == []  # as many pixels
    failed = {key: value for key, value in result(PAIR, (1, 8, 3, 3)).items() if key != "rounds"}
    groups = series.series([result(PAIR), *others, failed], "H·W")
    assert [[size for size, _ in group] for group in groups] == [[16, 81], [25], [36], [49], [64], [81]]


def test_pyramids_of_other_depths_are_a_series():
    pyramids = [result(PAIR, strides=strides) for strides in ((16, 8, 4), (16,), (16, 8), (1, 1))]
    deep, unpooled = series.series(pyramids, series.PYRAMID)
    assert [size for size, _ in deep] == [1, 2, 3] and [size for size, _ in unpooled] == [2]


def test_where_fbkd_ops_is_slower_is_said():
    times = {
        "no_distillation": 1.0,
        "compile": 9.0,
        "mmrazor": 20.0,
        "fbkd_ops:memory_efficient": 2.0,
        "fbkd_ops": 10.0,
    }
    rows = series.slower([result(times)])
    assert [(row["peer"], row["pass"], row["speed"]) for row in rows] == [
        ("compile", "forward", 0.9),
        ("compile", "step", 0.9),
    ]
    (line,) = series.slower_text(rows)
    case = "relation 1x8x4x4 without pooling float32 contiguous, warm memory"
    assert line == f"slower than compile at: {case}, forward (0.90); {case}, forward + backward (0.90)"
    assert series.slower([result(times | {"fbkd_ops": 1.0, "compile": 1.0})]) == []


def test_a_caption_says_where_it_was_measured_and_what_is_not_shown():
    shown = report([result(PAIR | {"compile": "does not fit in memory"})], complete=False)
    text = plots.caption(shown, "Median.")
    assert text.startswith("Median. A CPU, 2 threads, torch 2.14.1, revision abc1234.")
    assert "interrupted" in text and "compile does not fit in memory: relation 1x8x4x4 without pooling" in text
    on_gpu = report([result(PAIR)], environment=MACHINE | {"gpu": "A GPU"})
    assert plots.caption(on_gpu, "Median.").startswith("Median. A GPU, torch")


def test_pictures_are_drawn_of_what_has_figures(tmp_path):
    pytest.importorskip("matplotlib")
    whole = report([*UNPOOLED, result(PAIR, state="fresh", dtype="bfloat16")])
    lines = plots.draw(whole, tmp_path / "new", "cpu")
    files = [f"cpu-{kind}.png" for kind in ("speedup", "growth", "roofline")]
    assert list(plots.pictures(whole, "cpu").values()) == files
    assert lines == [f"drawn: {tmp_path / 'new' / file}" for file in files]
    assert all((tmp_path / "new" / file).read_bytes().startswith(b"\x89PNG") for file in files)
    lines = plots.draw(report([result({"fbkd_ops": 1.0}) | {"cost": None}]), tmp_path / "other", "x")
    assert [line.split(",")[0] for line in lines] == ["x: no speedup plot", "x: no growth plot", "x: no roofline plot"]
    assert not (tmp_path / "other").exists()


def test_a_picture_is_of_one_result(tmp_path):
    pytest.importorskip("matplotlib")
    before, after = report([result(PAIR)]), report([result(PAIR | {"mmrazor": 31.0})])
    path = tmp_path / "cpu-speedup.png"
    assert plots.is_stale(path, before)
    plots.draw(before, tmp_path, "cpu")
    first = path.read_bytes()
    assert not plots.is_stale(path, before) and plots.is_stale(path, after)
    plots.draw(before, tmp_path, "cpu")
    assert path.read_bytes() == first


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_slope_is_printed():
    pytest.importorskip("matplotlib")
    time, memory = plots.draw_growths(report(UNPOOLED)).axes
    assert legend_of(time) == ["mmrazor: k = 2.00", "fbkd_ops: k = 1.00"]
    assert legend_of(memory) == ["mmrazor: k = 2.00", "fbkd_ops: k = 0.00"]
    assert time.get_xscale() == time.get_yscale() == memory.get_yscale() == "log"


def test_plots_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plots.require_matplotlib()


def test_a_committed_result_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(report([result(PAIR)])))
    command = [sys.executable, "-m", "benchmarks.plots", str(path), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "gpu-speedup.png").exists(), done.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", None])
def test_what_is_no_result_is_refused(text, tmp_path, capsys):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        plots.main([str(path)])
    assert ended.value.code == 2
    assert f"expected a result of benchmarks/microbench.py, got {path}" in capsys.readouterr().err


def test_sweeps_change_one_size_at_a_time():
    sizes = {dimension: sweep.cases(SUITES["fbkd_loss"], dimension) for dimension in sweep.DIMENSIONS}
    assert [case.shape for case in sizes["N"]] == [(n, 256, 128, 128) for n in (1, 2, 4, 8, 16, 32)]
    assert [case.shape for case in sizes["image"]] == [(1, 256, side, side) for side in (64, 128, 256, 512)]
    assert [case.shape for case in sizes["C"]] == [(1, width, 128, 128) for width in (64, 128, 256, 512, 1024)]
    assert [case.strides for case in sizes["levels"]] == [
        (16,),
        (16, 8),
        (16, 8, 4),
        (16, 8, 4, 4),
        (16, 8, 4, 4, 4),
        (16, 8, 4, 4, 4, 4),
    ]
    assert {case.shape for case in sizes["levels"]} == {(1, 256, 128, 128)}
    assert sweep.cases(SUITES["relation"], "levels") == []
    assert [case.strides for case in sweep.cases(SUITES["relation"], "C", dtype="bfloat16")] == [(16,)] * 5
