"""Markdown of results, and that docs/render.py finds them."""

import importlib.util
import json
import re
import sys

import pytest
from reports import MACHINE, report, result

from benchmarks import plots, tables
from benchmarks.environment import ROOT, sources

PAIR = {"mmrazor": 30.0, "fbkd_ops": 10.0}
BOTH = [
    result(PAIR | {"compile": 8.0}, state="fresh", memory={"mmrazor": 900.0, "compile": 70.0, "fbkd_ops": 60.0}),
    result(PAIR | {"compile": 40.0}),
]


def rows_of(text):
    """The cells of a table, without the line below its header."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines if set("".join(line)) != {"-", " "}]


def test_a_suite_has_a_row_a_peer_and_a_figure_a_state_of_memory():
    text = tables.suite_tables(BOTH)
    assert text.startswith("### relation\n\n") and "### Ceilings of relation" in text
    header, mmrazor, ours, compiled = rows_of(text.split("### Ceilings")[0])
    assert header[2] == "forward ms warm / fresh" and header[-1] == "MB"
    assert mmrazor[:4] == ["1x8x4x4 without pooling float32 contiguous", "`mmrazor`", "15.00 / 15.00", "30.00 / 30.00"]
    assert mmrazor[-1] == "900" and ours[-1] == "60"
    assert compiled[2:4] == ["20.00 / 4.00 *", "40.00 / 8.00 *"]  # fbkd_ops is slower in fresh memory
    assert rows_of(text.split("### Ceilings")[1])[1][3:] == ["10", "20", "5", "100", "", "3"]


def test_a_state_that_was_not_measured_is_a_dash():
    alone = result(PAIR, (1, 8, 8, 8), state="fresh", memory={"mmrazor": 9.0, "fbkd_ops": 3.0})
    *_, last, absent = rows_of(tables.suite_tables([*BOTH, alone]).split("### Ceilings")[0])
    assert absent[1:3] == ["`compile`", "– / –"] and len(absent) == len(last)
    assert last[1:5] == ["`fbkd_ops`", "– / 5.00", "– / 10.00", "– / –"] and last[-1] == "3"
    _, small, large = rows_of(tables.sweep_table([*BOTH, alone]))
    assert small[3:] == ["10.0 / 10.0", "60", "3 / 3", "900", "4 / 0.8 *", "70"]
    assert large[3:] == ["– / 10.0", "3", "– / 3", "9", "– / –", "–"]
    killed = result(PAIR, (1, 8, 8, 8)) | {"peers": {name: {"status": "killed by signal 9"} for name in PAIR}}
    del killed["rounds"]
    *_, large = rows_of(tables.sweep_table([*BOTH, alone, killed]))
    assert large[2:4] == ["64", "killed by signal 9"]


def test_a_suite_without_a_cost_has_no_rates_and_no_ceilings():
    whole = result(PAIR, suite="train_step", state="default") | {"cost": None}
    for row in whole["peers"].values():
        row["step"] |= {"gb_s": None, "ceiling_percent": None}
    text = tables.suite_tables([whole])
    assert "Ceilings" not in text
    assert rows_of(text)[1][2:] == ["15.00", "30.00", "–", "–", "–", "–"]


def test_what_has_no_figures_says_why():
    header, mmrazor, ours = rows_of(tables.suite_tables([result(PAIR | {"mmrazor": "does not fit in memory"})]))[:3]
    assert mmrazor[1:3] == ["`mmrazor`", "does not fit in memory"] and len(mmrazor) == len(header)
    assert ours[2] == "5.00"


def test_a_comparison_has_ratios_of_speed_and_memory():
    (line,) = tables.comparisons(BOTH).splitlines()
    expected = "3.0 / 3.0 times as fast as `mmrazor` in 1/15.0 of the memory, "
    expected += "4.0 / 0.8 times as fast as `compile` in 1/1.2 of the memory"
    assert line == f"- `relation`, 1x8x4x4 without pooling float32 contiguous, warm / fresh memory: {expected}."
    states = tables.comparisons([result(PAIR, state=state) for state in ("fresh", "default")])
    assert "contiguous, default / fresh memory:" in states
    assert "contiguous: 3.0 times" in tables.comparisons([result(PAIR, state="default")])
    absent = [result(PAIR | {"mmrazor": "failed: x"}), result({"fbkd_ops": 1.0}, suite="non_local")]
    failing, alone = tables.comparisons(absent).splitlines()
    assert failing.endswith(": `mmrazor` failed: x.") and alone.endswith(": nothing to compare with.")
    states = [{"fbkd_ops": {"status": "ok"}}, {"fbkd_ops": {"status": "failed: y"}}]
    assert tables.comparison(states) == "`fbkd_ops` failed: y"
    assert tables.share_of(90.0, 60.0) == " in 1.5 times the memory" and tables.share_of(0.3, 60.0) == ""
    assert tables.share_of(63.0, 60.0) == tables.share_of(60.0, 63.0) == " in as much memory"


def test_growth_names_suite_and_sizes():
    row = {"suite": "relation", "state": "warm", "sizes": ["2x4", "8x8"], "pixels": 8.0}
    other = row | {"sizes": ["8x8", "16x16"], "pixels": 4.0, "time": {"fbkd_ops": 4.0}}
    header, first, second = rows_of(tables.scaling_table([row | {"time": {"mmrazor": 64.0, "fbkd_ops": 8.0}}, other]))
    assert header[-2:] == ["× time of `mmrazor`", "× time of `fbkd_ops`"]
    assert first == ["relation", "2x4 → 8x8", "warm", "8.0", "64.0", "8.0"] and second[-2:] == ["–", "4.0"]


def test_a_sweep_has_a_row_a_size():
    memory = {"mmrazor": 9.0, "fbkd_ops": 3.0}
    sizes = {1: PAIR, 2: {"mmrazor": 6.0, "fbkd_ops": 12.0}, 4: {"mmrazor": "does not fit in memory", "fbkd_ops": 40.0}}
    results = [
        result(times, (n, 8, 4, 4), state=state, memory=memory if state == "fresh" else None)
        for n, times in sizes.items()
        for state in ("fresh", "warm")
    ]
    header, *rows = rows_of(tables.sweep_table([*results, result(PAIR, strides=(2,))]))
    assert header == [
        "series",
        "size",
        "",
        "`fbkd_ops` ms warm / fresh",
        "`fbkd_ops` MB",
        "× `mmrazor` warm / fresh",
        "its MB",
    ]
    assert rows == [
        ["relation, C=8, 4×4, without pooling", "N", "1", "10.0 / 10.0", "3", "3 / 3", "9"],
        ["", "N", "2", "12.0 / 12.0", "3", "0.5 * / 0.5 *", "9"],
        ["", "N", "4", "40.0 / 40.0", "3", "does not fit in memory", ""],
    ]


def test_where_fbkd_ops_is_slower_is_a_table():
    slow = report([result({"compile": 8.0, "fbkd_ops": 10.0})])
    header, forward, step = rows_of(tables.slower_table([report([]), slow]))
    assert forward[:2] == ["`compile`", "relation"] and forward[3:] == ["warm", "forward", "0.80"]
    assert step[3:] == ["warm", "forward + backward", "0.80"] and len(header) == len(step)
    assert tables.slower_table([report([result(PAIR)])]) == "None: `fbkd_ops` is the fastest in every row."


def test_a_machine_is_described_by_what_matters_there():
    on_gpu = MACHINE | {"gpu": "A GPU", "driver": "580.1", "modified": True, "sources": "0" * 12}
    text = tables.machine(on_gpu)
    assert text.startswith("A GPU, torch 2.14.1, driver 580.1, revision abc1234 with changes, before the last change")
    current = tables.machine(MACHINE | {"sources": sources("cpu"), "huge_pages": "[always]"})
    assert (
        current
        == "A CPU, 2 threads of 4 cores, torch 2.14.1, huge pages `[always]`, revision abc1234, 2026-11-25 10:00 UTC"
    )
    assert tables.provenance(report([], complete=False)).endswith("UTC. The run was interrupted.")
    later = report([], earlier=[{"command": "python x.py", "environment": MACHINE, "complete": True}])
    assert "\n\nThe tables that this run did not replace: `python x.py`: A CPU" in tables.provenance(later)


SUMS = {"launches": 2, "us": 9.5}
STAGES = {
    "build": {"status": "ok", "seconds": 60.0, "figures": {"cuda": "loaded"}},
    "bench": {"status": "skipped: out of time"},
    "smoke": {"status": "ok", "figures": {"N=1 wall_ms": 5.0, "kernels": {"sums": SUMS | {"predicted_us": 9.0}}}},
    "ncu": {
        "status": "ok",
        "seconds": 70.0,
        "figures": {"cuda float32": {"sums": SUMS | {"dram_percent": 91.0, "warps_percent": None}}},
    },
    "kernels": {"status": "ok", "figures": {"triton float32": {"sums": SUMS | {"dram_percent": 90.0}}, "launches": 2}},
}


def test_stages_and_kernels_of_a_gpu():
    text = tables.stage_tables({"environment": MACHINE, "stages": STAGES})
    stages, seen, kernels, others = re.split("A step of the whole loss|ncu, cuda float32|ncu, triton float32", text)
    assert rows_of(stages)[1:] == [
        ["build", "ok", "60.0", "cuda loaded"],
        ["bench", "skipped: out of time", "–", ""],
        ["smoke", "ok", "–", "N=1 wall_ms 5.0"],
        ["ncu", "ok", "70.0", ""],
        ["kernels", "ok", "–", "launches 2"],
    ]
    assert rows_of(seen) == [["kernel", "launches", "µs", "µs predicted"], ["`sums`", "2", "9.5", "9.0"]]
    assert rows_of(kernels)[1] == ["`sums`", "2", "9.5", "91.0", "–"]
    assert rows_of(others)[1] == ["`sums`", "2", "9.5", "90.0"]


@pytest.fixture
def render(tmp_path, monkeypatch):
    """docs/render.py over a folder of results without any."""
    spec = importlib.util.spec_from_file_location("render", ROOT / "docs" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    return module


MEASURED = (
    "commands",
    "costs",
    "headline_picture",
    "microbench",
    "pictures",
    "train_step",
    "ops",
    "losses",
    "scaling",
)


def test_what_is_not_measured_says_so(render):
    for block in (*MEASURED, "losses_summary", "sweep", "sweep_pictures", "slower", "passes", "fuzz"):
        assert render.BLOCKS[block]() == "Not yet measured."
    assert render.gpu() == render.gpu_headline() == "Not yet measured on a GPU."
    assert render.stale_pictures() == []


def gpu_results(folder, date, times):
    folder.mkdir()
    environment = MACHINE | {"gpu": "A GPU", "date": date}
    benchmark = report([result(times, state="default")], environment=environment)
    (folder / "summary.json").write_text(json.dumps({"environment": environment, "stages": STAGES}))
    (folder / "microbench.json").write_text(json.dumps(benchmark))
    return benchmark


def test_the_newest_gpu_results_are_shown(render, tmp_path):
    pytest.importorskip("matplotlib")
    benchmark = gpu_results(tmp_path / "a-gpu-2026-11-25", "2026-11-25 09:00 UTC", PAIR)
    gpu_results(tmp_path / "z-gpu-2026-11-24", "2026-11-24 09:00 UTC", PAIR | {"mmrazor": 70.0})
    (tmp_path / "dry-run").mkdir()
    (tmp_path / "dry-run" / "summary.json").write_text(json.dumps({"environment": MACHINE | {"date": "2027"}}))
    text, headline = render.gpu(), render.gpu_headline()
    assert "3.0 times as fast as `mmrazor`" in headline and "A GPU" in headline
    assert "| build | ok |" in text and "### relation" in text
    assert "(images/a-gpu-2026-11-25-speedup.png)" in text
    assert render.stale_pictures() == ["a-gpu-2026-11-25"]
    (tmp_path / "a-gpu-2026-11-26").mkdir()  # without the benchmark
    later = {"environment": MACHINE | {"gpu": "A GPU", "date": "2026-11-26"}, "stages": {"test": {"status": "ok"}}}
    (tmp_path / "a-gpu-2026-11-26" / "summary.json").write_text(json.dumps(later))
    assert "| test | ok |" in render.gpu() and render.gpu_headline() == headline
    plots.draw(benchmark, tmp_path, "a-gpu-2026-11-25")
    assert render.stale_pictures() == []


def test_a_sweep_has_the_one_picture_that_its_page_shows(render, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    sweep = report([result(PAIR, (n, 8, 4, 4)) for n in (1, 2)])
    (tmp_path / render.SWEEP).write_text(json.dumps(sweep))
    assert render.pictures("cpu-sweep") == "![growth, cpu-sweep](images/cpu-sweep-growth.png)"
    assert render.stale_pictures() == ["cpu-sweep"]
    (tmp_path / "README.md").write_text("")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["render.py"])
    with pytest.raises(SystemExit):
        render.main()
    assert [path.name for path in tmp_path.glob("*.png")] == ["cpu-sweep-growth.png"]
    assert render.stale_pictures() == []


def test_blocks_show_the_results_of_their_suites(render, tmp_path):
    results = [result(PAIR, suite=suite) for suite in (*render.OPS, *render.LOSSES, *render.STEP)]
    (tmp_path / render.MICROBENCH).write_text(json.dumps(report(results)))
    for block, names in {"ops": render.OPS, "losses": render.LOSSES, "train_step": render.STEP}.items():
        headings = [line[4:] for line in render.BLOCKS[block]().splitlines() if line.startswith("### ")]
        assert headings == [*names, f"Ceilings of {', '.join(names)}"]


def test_costs_are_a_row_for_each_peer(render, tmp_path):
    memory = {"mmrazor": 900.0, "compile": 70.0, "fbkd_ops": 60.0}
    loss = [
        result(PAIR | {"compile": 8.0}, suite="fbkd_loss", state="fresh", memory=memory),
        result(PAIR | {"compile": 40.0}, suite="fbkd_loss"),
    ]
    step = result({"no_distillation": 5.0, "fbkd_ops": 10.0}, suite="train_step", state="default")
    (tmp_path / render.MICROBENCH).write_text(json.dumps(report([*loss, step, result(PAIR, strides=(2,))])))
    header, mmrazor, compiled, whole = rows_of(render.costs().partition("\n\n")[0])
    assert header == ["forward and backward of", "beside", "times as fast", "memory"]
    assert mmrazor[1:] == ["MMRazor", "3.0 / 3.0", "1/15.0 of the memory"]
    assert compiled[1:] == ["MMRazor, compiled", "4.0 / 0.8", "1/1.2 of the memory"]
    assert whole[2:] == ["0.5", ""]
    entries = [
        {"row": row, "threads": threads, "dtype": "float32", "peers": {peer: {"ratio": 1 / (2 * threads)}}}
        for _, row, peer, _ in render.SMALL_COSTS
        for threads in (2, 1)
    ]
    small = {"environment": MACHINE, "entries": entries}
    (tmp_path / render.SMALL).write_text(json.dumps(small))
    times = {"alone": 1.0, "built-in": 3.0, "fbkd_ops": 2.0}
    size = {"student": "yolo11n.yaml", "teacher": "yolo11s.yaml", "batch": 4, "imgsz": 160}
    step = {"environment": MACHINE, "milliseconds": times, "size": size}
    (tmp_path / render.ULTRALYTICS).write_text(json.dumps(step))
    *_, yolo, retinanet, trainer = rows_of(render.costs().partition("\n\n")[0])
    assert yolo[1:3] == ["the literal formulas", "2.0 / 4.0"] and retinanet[1:3] == ["MMRazor", "2.0 / 4.0"]
    assert "YOLO11n from YOLO11s" in trainer[0] and trainer[2] == "1.50"
    assert len(rows_of(render.costs())) <= 1 + 8


def test_a_block_of_an_unknown_name_is_an_error(render):
    with pytest.raises(SystemExit, match="unknown block 'speeds', expected one of presets"):
        render.rendered("<!-- speeds --><!-- /speeds -->")
