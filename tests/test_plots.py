"""Plots and series of results: the figures that they show, and which result a picture is of."""

import pytest

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from reports import CEILINGS, MACHINE, frame, report, result

from benchmarks import plots, series, sweep
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
    found = plots.bars(frame(result(PAIR | memory_efficient), result(PAIR, state="fresh")))
    columns = ["peer", "state", "speed", "speed_p20", "speed_p80"]
    assert list(found[columns].itertuples(index=False, name=None)) == [
        ("mmrazor", "warm", 3.0, 1.5, 6.0),
        ("fbkd_ops:memory_efficient", "warm", 2.0, 1.0, 4.0),
        ("mmrazor", "fresh", 3.0, 1.5, 6.0),
    ]


def test_points_and_roofs_are_of_the_same_pass():
    without = [row | {"flops": 0} for row in result(PAIR, suite="masked_l2")]
    points = plots.roof_points(frame(result(PAIR), without)).query("peer == 'fbkd_ops'").set_index("pass")
    assert list(points.loc["forward", ["intensity", "gflop_s"]]) == [4.0, 4.0 / 5.0]
    assert list(points.loc["step", ["intensity", "gflop_s"]]) == [4.0, 12.0 / 10.0]
    assert points.at["forward", "roof_gb_s"] == CEILINGS["sum_gb_s"]
    # One byte at 10 and two at 20 bytes a second: 0.2 seconds for three.
    assert points.at["step", "roof_gb_s"] == pytest.approx(3 / 0.2)


def of_peer(growth, peer):
    found = growth.rows[growth.rows["peer"] == peer]
    return list(found["size"]), list(found["value"])


def test_growth_is_shown_along_each_size_of_enough_values():
    time, memory = plots.growths(frame(*UNPOOLED))
    assert (time.dimension, time.quantity, memory.quantity) == ("H·W", "ms", "MB")
    assert time.title == "relation, N=1, C=8, without pooling"
    assert of_peer(time, "mmrazor") == ([16, 64], [256.0, 4096.0])
    assert series.exponent(*of_peer(time, "mmrazor")) == pytest.approx(2)
    assert series.exponent(*of_peer(memory, "fbkd_ops")) == pytest.approx(0)
    images = [result(PAIR, (n, 8, 4, 4), strides=(2,)) for n in (1, 2, 4)]
    assert [growth.dimension for growth in plots.growths(frame(*images))] == ["N"]
    assert plots.growths(frame(images[0])) == []


def test_growth_is_of_the_settled_state():
    fresh = [result({"fbkd_ops": 99.0}, (1, 8, side, side), state="fresh") for side in (4, 8)]
    time, _ = plots.growths(frame(*UNPOOLED, *fresh))
    assert of_peer(time, "fbkd_ops")[1] == [16.0, 64.0]


@pytest.mark.parametrize(
    "other",
    [
        {"suite": "non_local"},
        {"dtype": "bfloat16"},
        {"strides": (2,)},
        {"shape": (2, 8, 9, 9)},
        {"shape": (1, 8, 2, 8)},  # as many pixels
    ],
)
def test_series_do_not_mix(other):
    base, other = result(PAIR), result(PAIR, **({"shape": (1, 8, 9, 9)} | other))
    assert not list(series.series(frame(base, other), "H·W"))
    assert len(list(series.series(frame(base, result(PAIR, (1, 8, 9, 9))), "H·W"))) == 1


def test_pyramids_of_other_depths_are_a_series():
    pyramids = [result(PAIR, strides=strides) for strides in ((16, 8, 4), (16,), (16, 8), (1, 1))]
    (deep,) = series.series(frame(*pyramids), series.PYRAMID)
    assert list(deep["size"].unique()) == [1, 2, 3]


def test_a_caption_says_where_it_was_measured_and_what_is_not_shown():
    shown = report(result(PAIR | {"compile": "does not fit in memory"}), complete=False)
    text = plots.caption(shown, "Median.")
    assert text.startswith("Median. A CPU, 2 threads, torch 2.14.1, revision abc1234.")
    assert "interrupted" in text and "compile does not fit in memory: relation 1x8x4x4 without pooling" in text
    on_gpu = report(result(PAIR), environment=MACHINE | {"gpu": "A GPU"})
    assert plots.caption(on_gpu, "Median.").startswith("Median. A GPU, torch")


def test_pictures_are_drawn_of_what_has_figures(tmp_path):
    whole = report(*UNPOOLED, result(PAIR, state="fresh", dtype="bfloat16"))
    files = plots.draw(whole, tmp_path / "new", "cpu")
    assert files == [f"cpu-{kind}.png" for kind in ("speedup", "growth", "roofline")]
    assert all((tmp_path / "new" / file).read_bytes().startswith(b"\x89PNG") for file in files)
    alone = [row | {"flops": None} for row in result({"fbkd_ops": 1.0})]
    assert plots.draw(report(alone), tmp_path / "other", "x") == []


def test_a_picture_is_of_one_result(tmp_path):
    before, after = report(result(PAIR)), report(result(PAIR | {"mmrazor": 31.0}))
    path = tmp_path / "cpu-speedup.png"
    assert plots.is_stale(path, before)
    plots.draw(before, tmp_path, "cpu")
    first = path.read_bytes()
    assert not plots.is_stale(path, before) and plots.is_stale(path, after)
    plots.draw(before, tmp_path, "cpu")
    assert path.read_bytes() == first


def test_the_slope_is_printed():
    axes = plots.draw_growths(report(*UNPOOLED)).axes
    legends = [{text.get_text() for text in ax.get_legend().get_texts()} for ax in axes]
    assert legends[0] == {"mmrazor: k = 2.00", "fbkd_ops: k = 1.00"}
    assert legends[1] == {"mmrazor: k = 2.00", "fbkd_ops: k = 0.00"}


def test_sweeps_change_one_size_at_a_time():
    sizes = {dimension: sweep.cases(SUITES["fbkd_loss"], dimension) for dimension in sweep.DIMENSIONS}
    assert [case.shape for case in sizes["N"]] == [(n, 256, 128, 128) for n in (1, 2, 4, 8, 16, 32)]
    assert [case.shape for case in sizes["image"]] == [(1, 256, side, side) for side in (64, 128, 256, 512)]
    assert [case.shape for case in sizes["C"]] == [(1, width, 128, 128) for width in (64, 128, 256, 512, 1024)]
    assert [case.strides for case in sizes["levels"]] == [(16, 8, 4, 4, 4, 4)[:count] for count in range(1, 7)]
    assert {case.shape for case in sizes["levels"]} == {(1, 256, 128, 128)}
    assert sweep.cases(SUITES["relation"], "levels") == []
    assert [case.strides for case in sweep.cases(SUITES["relation"], "C", dtype="bfloat16")] == [(16,)] * 5
