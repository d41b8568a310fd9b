"""Two results side by side."""

import json

import pytest

pytest.importorskip("rich")

from reports import report, result  # noqa: E402

from benchmarks import compare  # noqa: E402

BEFORE = report([result({"mmrazor": 30.0, "compile": 8.0, "fbkd_ops": 10.0}), result({"fbkd_ops": 1.0}, state="fresh")])
AFTER = report([result({"mmrazor": 33.0, "compile": "failed: x", "eager": 2.0, "fbkd_ops": 10.0})])


def test_ratios_that_both_have_are_compared():
    forward, step = compare.changes(BEFORE, AFTER)
    assert step == ("relation", "1x8x4x4 without pooling float32 contiguous", "warm", "mmrazor", "step", 3.0, 3.3)
    assert forward.which == "forward" and step.percent == pytest.approx(10)


def test_the_machines_own_rates_are_compared():
    slower = result({"fbkd_ops": 1.0})
    slower["ceilings"] = {"sum_gb_s": 5.0, "copy_to_new_gb_s": 6.0, "copy_to_new_page_faults": 9}
    rates = compare.ceilings(BEFORE, report([slower, result({"fbkd_ops": 1.0}, state="fresh")]))
    assert rates["warm"] == {"sum": 0.5, "copy into new memory": 1.2}
    assert set(rates["fresh"].values()) == {1.0} and len(rates["fresh"]) == 4


def test_the_machines_own_ratios_are_a_control():
    slower = result({"fbkd_ops": 1.0})
    slower["ceilings"] = {"sum_gb_s": 5.0, "copy_gb_s": 10.0, "copy_to_new_gb_s": 5.0}  # copying into new memory is not
    others = result({"fbkd_ops": 1.0}, state="fresh") | {"ceilings": {"sum_gb_s": 1.0}}
    new = result({"fbkd_ops": 1.0}, state="default")  # not in the report before
    assert sorted(compare.machine_percents(BEFORE, report([slower, others, new]))) == pytest.approx([0, 100, 100])


def test_slower_and_faster_count_alike():
    places = ["relation", "a map", "warm", "mmrazor", "step"]
    apart = [compare.Change(*places, before, after).percent for before, after in [(2, 3), (3, 2), (0.5, 0.75), (1, 1)]]
    assert apart == pytest.approx([50, 50, 50, 0])


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, made in {"before": BEFORE, "after": AFTER, "empty": report([])}.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(made))
    return [str(path) for path in paths]


def test_what_moved_is_named_and_the_status_says_so(files, capsys):
    before, after, _ = files
    assert compare.main([before, after]) == 0
    summary, control, machine = capsys.readouterr().out.splitlines()
    apart = "2 ratios: median 10 % apart, at most 10 %; 0 by more than 15 %"
    assert summary == f"fbkd_ops beside peers: {apart}; 4 more in one run only"
    apart = "6 ratios: median 0 % apart, at most 0 %; 0 by more than 15 %"
    assert control == f"the machine's rates beside each other: {apart}"
    assert machine == "warm memory: sum × 1.00, copy × 1.00, copy into new memory × 1.00, matrix product × 1.00"
    assert compare.main([before, after, "--percent", "5"]) == 1
    text = capsys.readouterr().out
    assert "2 by more than 5 %" in text and text.count("mmrazor") == 2 and "3.00" in text and "3.30" in text


def test_what_cannot_be_compared_is_refused(files, tmp_path, capsys):
    before, _, empty = files
    for other, message in ((empty, "no ratio in common"), (str(tmp_path / "none.json"), "expected a result of")):
        with pytest.raises(SystemExit) as ended:
            compare.main([before, other])
        assert ended.value.code == 2 and message in capsys.readouterr().err
