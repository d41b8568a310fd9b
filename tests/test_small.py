"""The suite of small pyramids: what it measures, and the choice of forms held to its committed result."""

import pytest
import torch
from op_cases import NO_CPU

pytest.importorskip("pandas")

from benchmarks import results, small
from benchmarks.mmrazor import versions

# The rule may pick a form that was up to so much slower than the other one.
MOST_SLOWER = 1.1


ROWS = results.read(small.RESULT).rows
LEVELS = ROWS[ROWS["row"].isna()]


def level_of(values):
    *sizes, ratio = values
    return small.Level(*map(int, sizes), ratio)


@pytest.mark.parametrize("dtype", small.DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_form_of_a_level_was_not_the_slower_one(threads, dtype):
    measured = LEVELS[(LEVELS["threads"] == threads) & (LEVELS["dtype"] == dtype)]
    times = measured.pivot(index=list(small.Level._fields), columns="peer", values="ms")
    assert len(times) >= 60 and set(times.columns) == set(small.FORMS)
    slower = {}
    for level, row in times.iterrows():
        form = small.chosen_form(level_of(level), dtype)
        slower[level] = row[form] / row.drop(form).item()
    assert {level: ratio for level, ratio in slower.items() if ratio > MOST_SLOWER} == {}


def test_the_rule_picks_each_form_somewhere():
    levels = LEVELS[list(small.Level._fields)].itertuples(index=False, name=None)
    assert {small.chosen_form(level_of(level), "float32") for level in levels} == set(small.FORMS)


def test_the_result_has_every_row():
    columns = ["row", "threads", "dtype"]
    measured = set(ROWS.dropna(subset="row")[columns].itertuples(index=False, name=None))
    assert measured == {(row.name, n, dtype) for row in small.rows() for n in (1, 2) for dtype in small.DTYPES}


def test_rows_have_the_sizes_that_their_names_say():
    rows = {row.name: row for row in small.rows()}
    assert len(rows) == 26
    assert [tuple(level)[:5] for level in rows["yolo n/m 320 px x16"].levels] == [
        (16, 64, 192, 40, 40),
        (16, 128, 384, 20, 20),
        (16, 256, 576, 10, 10),
    ]
    assert [level.height for level in rows["faster_rcnn 512 px x2"].levels] == [128, 64, 32, 16, 8]
    assert [level.stride for level in rows["retinanet 128 px x2"].levels] == [16, 8, 4, 2, 1]
    assert not rows["yolo s/m 160 px x4"].has_one_width and rows["1024 channels 13x21 x2"].has_one_width


@NO_CPU
@pytest.mark.skipif("mmrazor" not in versions(), reason="MMRazor is not installed")
def test_peers_compute_the_same():
    row = small.pyramid("", "mmrazor", 2, [(16, 16)] * 2, [(8, 8), (4, 4)])
    features, loss = row.features(torch.float32), row.loss()
    runs = {"fbkd_ops": small.our_step(loss, features), "reference": small.our_step(loss, features, "reference")}
    runs |= {form: small.in_form(runs["fbkd_ops"], form) for form in small.FORMS}
    values = {name: float(run()) for name, run in runs.items()}
    assert len({round(value, 6) for value in values.values()}) == 1
    assert features[0][0].grad is not None and small.their_step(row, features)().isfinite()


@NO_CPU
def test_what_computes_something_else_is_not_timed():
    with pytest.raises(SystemExit, match="the peers disagree by 1.0e"):
        small.check({"fbkd_ops": lambda: torch.tensor(1.1), "reference": lambda: torch.tensor(1.0)})


def test_times_are_beside_the_first_peers_round_by_round(monkeypatch):
    times = {"fbkd_ops": [1.0, 10.0], "reference": [4.0, 40.0]}
    monkeypatch.setattr(small.timing, "interleaved", lambda *_: times)
    found = small.measured({}, 1.0)
    assert found["reference"]["ms"] == 22.0 and found["reference"]["times_first"] == 0.25
    assert found["fbkd_ops"]["times_first"] == 1


@NO_CPU
def test_a_brief_run_writes_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "SECONDS", 0.0)
    monkeypatch.setattr(small, "LEVEL_SECONDS", 0.0)
    path, count = tmp_path / "small.csv", torch.get_num_threads()
    try:
        small.main(["--threads", "1", "--dtype", "float32", "--rows", "yolo n/s 160 px x4", "--csv", str(path)])
    finally:
        torch.set_num_threads(count)
    report = results.read(path)
    assert report.facts["environment"]["revision"] and (report.rows["ms"] > 0).all()
    pyramid, levels = (report.rows[report.rows["row"].isna() == is_level] for is_level in (False, True))
    assert list(pyramid["peer"]) == ["fbkd_ops", "reference"] and pyramid["times_first"].iloc[0] == 1
    assert list(levels["peer"]) == [*small.FORMS] * 3 and list(levels["height"].unique()) == [20, 10, 5]
