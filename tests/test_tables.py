"""Markdown of results, and that docs/render.py finds them: no figure upside down, swapped, or hidden."""

import importlib.util
import json
import sys

import pytest

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from reports import MACHINE, facts, frame, result

from benchmarks import plots, results, tables
from benchmarks.environment import ROOT, sources

PAIR = {"mmrazor": 30.0, "fbkd_ops": 10.0}
MEMORY = {"mmrazor": 900.0, "compile": 70.0, "fbkd_ops": 60.0}
BOTH = [result(PAIR | {"compile": 8.0}, state="fresh", memory=MEMORY), result(PAIR | {"compile": 40.0})]


def cells_of(text):
    """The cells of a table, without the line below its header."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if set("".join(line)) != {"-", " "}]


def test_a_suite_has_a_row_a_peer_and_a_figure_a_state_of_memory():
    text, ceilings = tables.suite_tables(frame(*BOTH)).split("### Ceilings of relation")
    header, mmrazor, ours, compiled = cells_of(text)
    assert text.startswith("### relation\n\n") and header[2] == "forward ms warm / fresh"
    assert mmrazor[:4] == ["1x8x4x4 without pooling float32 contiguous", "`mmrazor`", "15.00 / 15.00", "30.00 / 30.00"]
    assert mmrazor[-1] == "900" and ours[-1] == "60"
    assert compiled[2:4] == ["20.00 / 4.00 *", "40.00 / 8.00 *"]  # fbkd_ops is slower in fresh memory
    assert cells_of(ceilings)[1][3:] == ["10", "20", "5", "100", "", "3"]


def test_a_state_that_was_not_measured_is_a_dash():
    alone = result(PAIR, (1, 8, 8, 8), state="fresh", memory={"mmrazor": 9.0, "fbkd_ops": 3.0})
    *_, ours, absent = cells_of(tables.suite_tables(frame(*BOTH, alone)).split("### Ceilings")[0])
    assert absent[1:3] == ["`compile`", "– / –"] and ours[1:5] == ["`fbkd_ops`", "– / 5.00", "– / 10.00", "– / –"]
    _, small, large = cells_of(tables.sweep_table(frame(*BOTH, alone)))
    assert small[3:] == ["10.0 / 10.0", "60", "3 / 3", "900", "4 / 0.8 *", "70"]
    assert large[3:] == ["– / 10.0", "3", "– / 3", "9", "– / –", "–"]


def test_a_suite_without_a_cost_has_no_rates_and_no_ceilings():
    rows = frame(result(PAIR, suite="train_step", state="default"))
    rows[["gb_s", "ceiling_percent", "sum_gb_s"]] = float("nan")
    text = tables.suite_tables(rows)
    assert "Ceilings" not in text and cells_of(text)[1][2:] == ["15.00", "30.00", "–", "–", "–", "–"]


def test_what_has_no_figures_says_why():
    rows = frame(result(PAIR | {"mmrazor": "does not fit in memory"}))
    header, mmrazor, ours = cells_of(tables.suite_tables(rows))[:3]
    assert mmrazor[1:3] == ["`mmrazor`", "does not fit in memory"] and len(mmrazor) == len(header)
    assert ours[2] == "5.00" and tables.comparisons(rows).endswith(": `mmrazor` does not fit in memory.")
    (line,) = tables.comparisons(frame(result({"mmrazor": 1.0, "fbkd_ops": "killed"}))).splitlines()
    assert line.endswith(": `fbkd_ops` killed.")


def test_a_comparison_has_ratios_of_speed_and_memory():
    (line,) = tables.comparisons(frame(*BOTH)).splitlines()
    expected = "4.0 / 0.8 times as fast as `compile` in 1/1.2 of the memory"
    assert "warm / fresh memory: 3.0 / 3.0 times as fast as `mmrazor` in 1/15.0 of the memory" in line
    assert expected in line
    (alone,) = tables.comparisons(frame(result({"fbkd_ops": 1.0}))).splitlines()
    assert alone.endswith(": nothing to compare with.")


@pytest.mark.parametrize(
    "ours, other, text",
    [
        (90.0, 60.0, "1.5 times the memory"),
        (60.0, 90.0, "1/1.5 of the memory"),
        (63.0, 60.0, "as much memory"),
        (0.3, 60.0, ""),
    ],
)
def test_memory_is_compared_the_right_way_up(ours, other, text):
    rows = frame(result(PAIR, memory={"mmrazor": other, "fbkd_ops": ours}))
    assert tables.share_of_memory(tables.one_pass(rows), "mmrazor") == text


def test_growth_is_from_each_map_to_the_next_larger_one():
    sizes = {(16, 16): {"mmrazor": "failed", "fbkd_ops": 40.0}, (2, 4): {"mmrazor": 1.0, "fbkd_ops": 2.0}}
    sizes[8, 8] = {"mmrazor": 64.0, "fbkd_ops": 10.0}
    pooled = result(PAIR, (1, 8, 4, 4), strides=(2,))
    maps = [result(times, (1, 8, *size)) for size, times in sizes.items()]
    header, first, second = cells_of(tables.growth_table(frame(pooled, *maps)))
    assert header[-2:] == ["× time of `mmrazor`", "× time of `fbkd_ops`"]
    assert first == ["relation", "2x4 → 8x8", "warm", "8.0", "64.0", "5.0"] and second[3:] == ["4.0", "–", "4.0"]
    assert tables.growth_table(frame(pooled)) == ""


def test_a_sweep_has_a_row_a_size():
    memory = {"mmrazor": 9.0, "fbkd_ops": 3.0}
    sizes = {1: PAIR, 2: {"mmrazor": 6.0, "fbkd_ops": 12.0}, 4: {"mmrazor": "does not fit in memory", "fbkd_ops": 40.0}}
    found = [
        result(times, (n, 8, 4, 4), state=state, memory=memory if state == "fresh" else None)
        for n, times in sizes.items()
        for state in ("fresh", "warm")
    ]
    header, *rows = cells_of(tables.sweep_table(frame(*found, result(PAIR, strides=(2,)))))
    assert header[3:] == ["`fbkd_ops` ms warm / fresh", "`fbkd_ops` MB", "× `mmrazor` warm / fresh", "its MB"]
    assert rows == [
        ["relation, C=8, 4×4, without pooling", "N", "1", "10.0 / 10.0", "3", "3 / 3", "9"],
        ["", "N", "2", "12.0 / 12.0", "3", "0.5 * / 0.5 *", "9"],
        ["", "N", "4", "40.0 / 40.0", "3", "does not fit in memory", ""],
    ]


def test_where_fbkd_ops_is_slower_is_a_table():
    slow = result({"compile": 8.0, "no_distillation": 1.0, "fbkd_ops:memory_efficient": 2.0, "fbkd_ops": 10.0})
    _, forward, step = cells_of(tables.slower_table(frame(slow)))
    assert forward[:2] == ["`compile`", "relation"] and forward[3:] == ["warm", "forward", "0.80"]
    assert step[3:] == ["warm", "forward + backward", "0.80"]
    assert tables.slower_table(frame(result(PAIR))) == "None: `fbkd_ops` is the fastest in every row."


def test_a_machine_says_what_it_is_and_whether_the_kernels_have_changed():
    on_gpu = MACHINE | {"gpu": "A GPU", "driver": "580.1", "modified": True, "sources": "0" * 12}
    text = tables.machine(on_gpu)
    assert text.startswith("A GPU, torch 2.14.1, driver 580.1, revision abc1234 with changes, before the last change")
    assert "before" not in tables.machine(MACHINE | {"sources": sources("cpu")})
    assert tables.provenance(facts(complete=False)).endswith("UTC. The run was interrupted.")
    later = facts(earlier=[facts(command="python x.py")])
    assert "\n\nThe tables that this run did not replace: `python x.py`: A CPU" in tables.provenance(later)


SUMS = {"launches": 2, "us": 9.5}
STAGES = {
    "build": {"status": "ok", "seconds": 60.0, "figures": {"cuda": "loaded"}},
    "bench": {"status": "skipped: out of time"},
    "smoke": {"status": "ok", "figures": {"N=1 wall_ms": 5.0, "kernels": {"sums": SUMS | {"predicted_us": 9.0}}}},
    "ncu": {"status": "ok", "figures": {"cuda": {"sums": SUMS | {"dram_percent": 91.0, "warps_percent": None}}}},
}


def test_stages_and_kernels_of_a_gpu():
    rows = cells_of(tables.stage_tables({"environment": MACHINE, "stages": STAGES}))
    assert ["build", "ok", "60.0", "cuda loaded"] in rows and ["bench", "skipped: out of time", "–", ""] in rows
    assert ["`sums`", "2", "9.5", "9.0"] in rows and ["`sums`", "2", "9.5", "91.0", "–"] in rows


@pytest.fixture
def render(tmp_path, monkeypatch):
    """docs/render.py over a folder of results without any."""
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    return module


def test_what_is_not_measured_says_so(render):
    assert render.study() == "Not yet measured." and render.stale_pictures() == []
    assert render.gpu() == render.gpu_headline() == "Not yet measured on a GPU."


def gpu_results(folder, date, times):
    environment = MACHINE | {"gpu": "A GPU", "date": date}
    rows = result(times, state="eager")
    results.write(folder / "microbench.csv", facts(environment=environment), rows)
    (folder / "summary.json").write_text(json.dumps({"environment": environment, "stages": STAGES}))


def test_the_newest_gpu_results_are_shown(render, tmp_path):
    gpu_results(tmp_path / "a-gpu-2026-11-25", "2026-11-25 09:00 UTC", PAIR)
    gpu_results(tmp_path / "z-gpu-2026-11-24", "2026-11-24 09:00 UTC", PAIR | {"mmrazor": 70.0})
    (tmp_path / "dry-run").mkdir()
    (tmp_path / "dry-run" / "summary.json").write_text(json.dumps({"environment": MACHINE | {"date": "2027"}}))
    text, headline = render.gpu(), render.gpu_headline()
    assert "3.0 times as fast as `mmrazor`" in headline and "A GPU" in headline
    assert "| build | ok |" in text and "(images/a-gpu-2026-11-25-speedup.png)" in text
    assert render.stale_pictures() == ["a-gpu-2026-11-25"]
    plots.draw(render.drawn_reports()["a-gpu-2026-11-25"][0], tmp_path, "a-gpu-2026-11-25")
    assert render.stale_pictures() == []


def test_a_check_changes_nothing_and_fails_where_something_is_out_of_date(render, tmp_path, monkeypatch):
    pytest.importorskip("cogapp")
    sweep = [row for n in (1, 2) for row in result(PAIR, (n, 8, 4, 4))]
    results.write(tmp_path / render.SWEEP, facts(), sweep)
    page = tmp_path / "README.md"
    page.write_text('<!-- [[[cog cog.outl(render.pictures("cpu-sweep")) ]]] -->\n<!-- [[[end]]] -->\n')
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "render", render)
    before = page.read_text()
    assert render.main(["--check"]) != 0 and page.read_text() == before and not list(tmp_path.glob("*.png"))
    assert render.main([]) == 0 and render.main(["--check"]) == 0
    assert "![growth, cpu-sweep](images/cpu-sweep-growth.png)" in page.read_text()
    assert [path.name for path in tmp_path.glob("*.png")] == ["cpu-sweep-growth.png"]
    (tmp_path / "cpu-sweep-growth.png").unlink()
    assert render.main(["--check"]) == 1


def test_costs_are_a_row_for_each_peer(render, tmp_path):
    loss = [row for rows in BOTH for row in rows]
    step = result({"no_distillation": 5.0, "fbkd_ops": 10.0}, suite="train_step", state="default")
    rows = [row | {"suite": "fbkd_loss"} for row in loss] + step
    rows += [row | {"case": "P3 without pooling"} for row in result(PAIR)]
    results.write(tmp_path / render.MICROBENCH, facts(), rows)
    places = [(row, peer, threads) for _, row, peer, _ in render.SMALL_COSTS for threads in (2, 1)]
    small = [
        {"row": row, "threads": threads, "dtype": "float32", "peer": peer, "times_first": 1 / (2 * threads)}
        for row, peer, threads in places
    ]
    results.write(tmp_path / render.SMALL, {"environment": MACHINE}, small)
    ways = [("alone", 160, 0.5), ("built-in", 160, 1.0), ("fbkd_ops", 160, 0.5), ("fbkd_ops", 640, 0.8)]
    steps = [{"way": way, "imgsz": pixels, "times_built_in": ratio} for way, pixels, ratio in ways]
    trainer = {"environment": MACHINE, "rows": steps, "student": "yolo11n.yaml", "teacher": "yolo11s.yaml"}
    (tmp_path / render.ULTRALYTICS).write_text(json.dumps(trainer))
    _, mmrazor, compiled, relation, whole, yolo, retinanet, trainer = cells_of(render.costs().partition("\n\n")[0])
    assert mmrazor[1:] == ["MMRazor", "3.0 / 3.0", "1/15.0"]
    assert compiled[1:] == ["MMRazor, compiled", "4.0 / 0.8", "1/1.2"]
    assert relation[2:] == ["3.0", ""] and whole[2:] == ["0.5", ""]
    assert yolo[1:3] == ["the literal formulas", "2.0 / 4.0"] and retinanet[1:3] == ["MMRazor", "2.0 / 4.0"]
    assert "YOLO11n from YOLO11s" in trainer[0] and "160 and 640 px" in trainer[0] and trainer[2] == "1.25 to 2.00"


def test_where_several_runs_were_made_is_one_sentence(render):
    changes = {"threads": 1, "date": "2026-11-26 09:00 UTC", "revision": "def5678", "sources": "0" * 12}
    same = "Measured on A CPU with {}, torch 2.14.1, revision abc1234, {}."
    assert render.measured_on([MACHINE, MACHINE]) == same.format("2 threads", "2026-11-25")
    text = render.measured_on([MACHINE | changes, MACHINE])
    assert "with 1 or 2 threads," in text and text.endswith("2026-11-25 or 2026-11-26.")
    assert "revision abc1234 or revision def5678, before the last change of the kernels," in text
