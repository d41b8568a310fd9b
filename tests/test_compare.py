"""Two results side by side."""

import pytest

pytest.importorskip("pandas")

from reports import facts, frame, result

from benchmarks import compare, results

BEFORE = [*result({"mmrazor": 30.0, "compile": 8.0, "fbkd_ops": 10.0}), *result({"fbkd_ops": 1.0}, state="fresh")]
AFTER = result({"mmrazor": 33.0, "compile": "failed: x", "eager": 2.0, "fbkd_ops": 10.0})


def test_ratios_that_both_have_are_compared():
    found = compare.changes(frame(BEFORE), frame(AFTER)).dropna()
    assert [key[2:] for key in found.index] == [("warm", "mmrazor", "forward"), ("warm", "mmrazor", "step")]
    assert list(found.iloc[1][["before", "after"]]) == [3.0, 3.3] and found["percent"].iloc[1] == pytest.approx(10)


def test_the_machines_own_ratios_are_a_control():
    rates = {"sum_gb_s": 5.0, "copy_gb_s": 10.0, "matmul_gflop_s": None}
    slower = [row | rates for row in result({"fbkd_ops": 1.0})]
    new = result({"fbkd_ops": 1.0}, state="default")  # not in the result before
    assert sorted(compare.machine_percents(frame(BEFORE), frame(slower, new))) == pytest.approx([0, 100, 100])


def test_slower_and_faster_count_alike():
    before, after = frame([{"x": x} for x in (2, 3, 0.5, 1)])["x"], frame([{"x": x} for x in (3, 2, 0.75, 1)])["x"]
    assert list(compare.percent_apart(before, after)) == pytest.approx([50, 50, 50, 0])


def test_what_moved_is_named_and_the_status_says_so(tmp_path, capsys):
    before, after, empty = (str(tmp_path / f"{name}.csv") for name in ("before", "after", "empty"))
    for path, rows in ((before, BEFORE), (after, AFTER), (empty, [])):
        results.write(tmp_path / path, facts(), rows)
    assert compare.main([before, after]) == 0
    ours, machine = capsys.readouterr().out.splitlines()
    assert ours.endswith("2 ratios: median 10 % apart, at most 10 %; 0 by more than 15 %; 4 more in one run only")
    assert "6 ratios: median 0 % apart" in machine
    assert compare.main([before, after, "--percent", "5"]) == 1
    assert capsys.readouterr().out.count("mmrazor") == 2
    for other in (empty, str(tmp_path / "none.csv")):
        with pytest.raises(SystemExit) as ended:
            compare.main([before, other])
        assert ended.value.code == 2
