"""Fills the generated blocks of README.md and docs/*.md from the code and from committed results; draws the plots.

A block stands between ``<!-- name: ... -->`` and ``<!-- /name -->``. ``--check`` changes nothing and exits with 1 where
a file or a plot is out of date.
"""

import argparse
import ast
import json
import math
import re
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_model_tables, plots, tables  # noqa: E402
from benchmarks.tables import table  # noqa: E402
from fbkd_ops.presets import PRESETS, TERMS, default_num_levels  # noqa: E402

RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
MICROBENCH, SWEEP = "cpu-microbench.json", "cpu-sweep.json"
FUZZ = "cpu-fuzz.json"
SMALL, ULTRALYTICS = "cpu-small.json", "cpu-ultralytics-step.json"
STAGES, GPU_BENCH = "summary.json", "microbench.json"  # in a GPU's folder
NOT_YET, NOT_YET_ON_A_GPU = "Not yet measured.", "Not yet measured on a GPU."
OPS = ("attention_pool", "masked_l2", "adapted_masked_l2")
LOSSES, STEP = ("non_local", "relation", "fbkd_loss"), ("train_step",)
EXAMPLES, TESTS = ROOT / "examples" / "frameworks", ROOT / "tests" / "integrations"
IMAGE, CHANNELS = (800, 1344), 256
PYRAMID = {"P2": 4, "P3": 8, "P4": 16, "P5": 32, "P6": 64}


def presets() -> str:
    header = [
        "preset",
        "τ s/c",
        "mask rule",
        "channel mask",
        "weights feature / channel / spatial / relation",
        "levels",
        "pooling factor",
        "`inter_channels`",
        "pooled terms",
        "last bias",
    ]
    rows = []
    for name, values in PRESETS.items():
        weights = " / ".join(f"{values[f'{term}_weight']:.2g}" for term in TERMS)
        rows.append(
            [
                f"`{name}`",
                f"{values['spatial_temperature']}/{values['channel_temperature']}",
                values["mask_rule"],
                "yes" if values["use_channel_mask"] else "no",
                weights,
                str(default_num_levels(name) or "any"),
                ", ".join(map(str, values["stride"])),
                ", ".join(map(str, values["inter_channels"])),
                values.get("pooled_terms", "mean"),
                "yes" if values["conv_out_bias"] else "no",
            ]
        )
    return table(header, rows)


def normalization() -> str:
    rows = []
    for level, stride in PYRAMID.items():
        pixels = math.prod(math.ceil(side / stride) for side in IMAGE)
        elements = (CHANNELS * pixels, CHANNELS, pixels)
        rows.append([level, *(f"{math.sqrt(count):.1f}" for count in elements)])
    return table(["level", "feature, relation", "channel", "spatial"], rows)


def commands() -> str:
    path = RESULTS / "cpu-commands.json"
    if not path.exists():
        return "Not yet measured."
    result = json.loads(path.read_text())
    rows = [[f"`{row['command']}`", f"{row['minutes']:.1f}", row["note"]] for row in result["rows"]]
    disk = f"The environment in `.venv` takes {result['venv_gb']:.1f} GB of disk, PyTorch's CUDA libraries most of it."
    where = f"{result['where']} Revision {result['revision']}: later ones have more tests."
    return f"{where}\n\n" + table(["command", "minutes", "what is in it"], rows) + f"\n\n{disk}"


def report_of(file: str) -> dict | None:
    path = RESULTS / file
    return json.loads(path.read_text()) if path.exists() else None


def results_of(names: Container[str]) -> list[dict]:
    """The results of some suites on a CPU."""
    report = report_of(MICROBENCH) or {"results": []}
    return [result for result in report["results"] if result["suite"] in names]


def microbench() -> str:
    report = report_of(MICROBENCH)
    return tables.provenance(report) if report else NOT_YET


def suites(names: Container[str]) -> str:
    return tables.suite_tables(results_of(names)) or NOT_YET


def summary(names: Container[str]) -> str:
    """What fbkd_ops is beside the others, one line a map."""
    return tables.comparisons(results_of(names)) or NOT_YET


class Cost(NamedTuple):
    """A row of README's table: what a suite measured, beside one of its peers."""

    what: str
    suite: str
    is_shown: Callable[[dict], bool]  # of a result's case
    peer: str
    peer_name: str


COSTS = (
    Cost("the loss, P2..P5 of an 800×1344 image", "fbkd_loss", lambda case: True, "mmrazor", "MMRazor"),
    Cost("the same", "fbkd_loss", lambda case: True, "compile", "MMRazor, compiled"),
    Cost(
        "its relation term alone, P3 of that image without pooling",
        "relation",
        lambda case: case["strides"] == [1] and case["title"].startswith("P3"),
        "mmrazor",
        "MMRazor",
    ),
    Cost(
        "a training step of Faster R-CNN, its teacher included",
        "train_step",
        lambda case: True,
        "no_distillation",
        "the same step without distillation",
    ),
)
SMALL_COSTS = (
    ("the loss, YOLO11 n from s, 4 images of 160 px", "yolo n/s 160 px x4", "reference", "the literal formulas"),
    ("the loss, RetinaNet of 256 channels, 2 images of 256 px", "retinanet 256 px x2", "mmrazor", "MMRazor"),
)


def costs() -> str:
    """README's table: what the loss and a step cost beside what one would run in their place."""
    rows = [*_suite_costs(), *_small_costs(), *_trainer_costs()]
    if not rows:
        return NOT_YET
    reports = [report for report in map(report_of, (MICROBENCH, SMALL, ULTRALYTICS)) if report]
    places = dict.fromkeys(tables.machine(report["environment"]) for report in reports)
    header = ["forward and backward of", "beside", "times as fast", "memory"]
    return table(header, rows) + "\n\nMeasured on " + "; ".join(places) + "."


def _suite_costs() -> Iterator[list[str]]:
    for cost in COSTS:
        found = [result for result in results_of((cost.suite,)) if cost.is_shown(result["case"])]
        found.sort(key=lambda result: result["state"] == "fresh")  # the last
        rows = [(result["peers"]["fbkd_ops"], result["peers"][cost.peer]) for result in found]
        if rows:
            yield [cost.what, cost.peer_name, *tables.speeds_and_memory(*zip(*rows, strict=True))]


def _small_costs() -> Iterator[list[str]]:
    report = report_of(SMALL)
    for what, row, peer, peer_name in SMALL_COSTS if report else ():
        found = [entry for entry in report["entries"] if entry.get("row") == row and entry["dtype"] == "float32"]
        speeds = [1 / entry["peers"][peer]["ratio"] for entry in sorted(found, key=lambda entry: entry["threads"])]
        yield [f"{what}, one / two threads", peer_name, " / ".join(f"{speed:.1f}" for speed in speeds), ""]


def _trainer_costs() -> Iterator[list[str]]:
    report = report_of(ULTRALYTICS)
    if report:
        size, times = report["size"], report["milliseconds"]
        names = [size[side].removesuffix(".yaml").replace("yolo", "YOLO") for side in ("student", "teacher")]
        what = f"a step of Ultralytics' trainer, {' from '.join(names)}, {size['batch']} images of {size['imgsz']} px"
        yield [what, "Ultralytics' own distillation", f"{times['built-in'] / times['fbkd_ops']:.2f}", ""]


def scaling() -> str:
    """How time grows with the map, without pooling."""
    report = report_of(MICROBENCH)
    return tables.scaling_table(report["scaling"]) if report and report["scaling"] else NOT_YET


def sweep() -> str:
    report = report_of(SWEEP)
    return f"{tables.provenance(report)}\n\n{tables.sweep_table(report['results'])}" if report else NOT_YET


def small() -> str:
    """The grid of small pyramids: how many times as fast as each peer, and milliseconds."""
    report = report_of(SMALL)
    if report is None:
        return NOT_YET
    grid = {}
    for entry in report["entries"]:
        if "row" in entry:
            grid.setdefault(entry["row"], {})[entry["threads"], entry["dtype"]] = entry["peers"]
    states = list(dict.fromkeys(state for row in grid.values() for state in row))
    header = ["pyramid", *(f"{dtype}, {threads} thread{'s'[: threads - 1]}" for threads, dtype in states)]
    rows = [[name, *(small_cell(row.get(state)) for state in states)] for name, row in grid.items()]
    return f"`python -m benchmarks.small`: {tables.machine(report['environment'])}.\n\n{table(header, rows)}"


def small_cell(peers: dict | None) -> str:
    if peers is None:
        return "-"
    ratios = " / ".join(f"{1 / peers[name]['ratio']:.2f}" for name in ("reference", "mmrazor") if name in peers)
    return f"{ratios} ({peers['fbkd_ops']['median']:.3g} ms)"


def ultralytics_step() -> str:
    report = report_of(ULTRALYTICS)
    if report is None:
        return NOT_YET
    times, size = report["milliseconds"], report["size"]
    rows = [[name, f"{value:.0f}", f"{value / times['built-in']:.2f}"] for name, value in times.items()]
    what = f"{size['student']} from {size['teacher']}, {size['batch']} images of {size['imgsz']} px"
    return f"{what}. {tables.machine(report['environment'])}.\n\n" + table(["step", "ms", "of the built-in"], rows)


def slower() -> str:
    """Where fbkd_ops loses to a peer, in all results of the CPU."""
    reports = [report for report in map(report_of, (MICROBENCH, SWEEP)) if report]
    return tables.slower_table(reports) if reports else NOT_YET


def gpu_folder(file: str) -> str | None:
    """The newest folder of results of ``make gpu`` that has a file, other than of a dry run."""
    facts = {path.parent.name: json.loads(path.read_text())["environment"] for path in RESULTS.glob(f"*/{file}")}
    dates = {name: environment["date"] for name, environment in facts.items() if "gpu" in environment}
    return max(dates, key=dates.get, default=None)


def gpu() -> str:
    """Everything that ``make gpu`` found out."""
    stages, benchmark = gpu_folder(STAGES), gpu_folder(GPU_BENCH)
    parts = [tables.stage_tables(report_of(f"{stages}/{STAGES}"))] if stages else []
    if benchmark:
        report = report_of(f"{benchmark}/{GPU_BENCH}")
        parts += [tables.provenance(report), tables.suite_tables(report["results"]), pictures(benchmark)]
    return "\n\n".join(parts) or NOT_YET_ON_A_GPU


def gpu_headline() -> str:
    report = report_of(f"{gpu_folder(GPU_BENCH)}/{GPU_BENCH}")
    if report is None:
        return NOT_YET_ON_A_GPU
    return f"{tables.machine(report['environment'])}:\n\n{tables.comparisons(report['results'])}"


def drawn_reports() -> dict[str, dict]:
    """The reports whose pictures stand in the documentation, by the pictures' name."""
    files = {Path(file).stem: file for file in (MICROBENCH, SWEEP)}
    if folder := gpu_folder(GPU_BENCH):
        files[folder] = f"{folder}/{GPU_BENCH}"
    reports = {name: report_of(file) for name, file in files.items()}
    return {name: report for name, report in reports.items() if report}


def drawn_kinds(name: str) -> tuple[str, ...]:
    """Of a sweep a page has the growth alone: a bar or a point for each of its sizes would be too many."""
    return ("growth",) if name == Path(SWEEP).stem else tuple(plots.KINDS)


def pictures(name: str, folder: str = "images", kinds: Container[str] = ()) -> str:
    """A report's pictures, all that are drawn or those of ``kinds``; ``folder`` is the way to them from the page."""
    report = drawn_reports().get(name)
    if report is None:
        return NOT_YET
    files = plots.pictures(report, name, kinds or drawn_kinds(name))
    return "\n\n".join(f"![{kind}, {name}]({folder}/{file})" for kind, file in files.items())


def stale_pictures() -> list[str]:
    """Names of the reports that have a picture that is not there or is of another result."""

    def has_stale(name: str, report: dict) -> bool:
        files = plots.pictures(report, name, drawn_kinds(name)).values()
        return any(plots.is_stale(IMAGES / file, report) for file in files)

    return [name for name, report in drawn_reports().items() if has_stale(name, report)]


def compiled_code() -> str:
    report = report_of("code.json")
    return tables.code_tables(report) if report else "Not yet compiled."


def predicted() -> str:
    """What benchmarks.gpu_model predicts now, and predicted first."""
    report, before = report_of("gpu-model.json"), report_of("gpu-model-before.json")
    if report is None:
        return "Not yet predicted."
    return gpu_model_tables.model_tables(report, before)


def passes() -> str:
    path = RESULTS / "passes.json"
    if not path.exists():
        return "Not yet measured."
    rows = []
    for terms, backends in json.loads(path.read_text()).items():
        ours, literal = backends["auto"], backends["reference"]
        ops = ", ".join(f"`{op.split('.')[-2]}`" for op in (*ours["forward"], *ours["backward"]))
        rows.append([terms, str(len(ours["forward"])), str(len(ours["backward"])), ops, str(len(literal["backward"]))])
    header = ["terms", "forward", "backward", "by", "literal formulas with autograd"]
    return table(header, rows)


def fuzz() -> str:
    """How many random calls were compared, and how many failed."""
    report = report_of(FUZZ)
    if report is None:
        return NOT_YET
    rows = [
        [f"`{target}`", str(done["cases"]), str(done["failures"]), f"{done['minutes']:.0f}"]
        for target, done in report["targets"].items()
    ]
    where = f"Seed {report['seed']}, revision {report['revision']}, torch {report['torch']}."
    return f"{where}\n\n" + table(["target", "calls", "failed", "minutes"], rows)


def frameworks() -> str:
    """A row for each file in examples/frameworks."""
    header = ["framework", "tap", "lines", "example", "test"]
    return table(header, [framework_row(path) for path in framework_examples()])


def framework_examples() -> list[Path]:
    return [path for path in sorted(EXAMPLES.glob("*.py")) if path.name != "__init__.py"]


def framework_row(path: Path) -> list[str]:
    """What an example's docstring says of it, how long it is, and the test of its name."""
    source = path.read_text()
    first, _, rest = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
    tap = re.search(r"^Tap: (.+)$", rest, re.MULTILINE)
    if not first or tap is None:
        raise SystemExit(f"{path.name}: expected a docstring with a first line and a line 'Tap: ...'")
    test = TESTS / f"test_{path.name}"
    if not test.exists():
        raise SystemExit(f"{path.name}: expected a test {test.relative_to(ROOT)}")
    links = [f"[{each.name}]({each.relative_to(ROOT)})" for each in (path, test)]
    return [first.rstrip("."), tap.group(1), str(code_lines(source)), *links]


def code_lines(source: str) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in source.splitlines())


BLOCKS: dict[str, Callable[[], str]] = {
    "presets": presets,
    "normalization": normalization,
    "frameworks": frameworks,
    "commands": commands,
    "costs": costs,
    "headline_picture": lambda: pictures("cpu-microbench", "docs/images", {"speedup"}),
    "gpu_headline": gpu_headline,
    "microbench": microbench,
    "pictures": lambda: pictures("cpu-microbench"),
    "train_step": lambda: suites(STEP),
    "ops": lambda: suites(OPS),
    "losses": lambda: suites(LOSSES),
    "losses_summary": lambda: summary(LOSSES),
    "scaling": scaling,
    "sweep": sweep,
    "sweep_pictures": lambda: pictures("cpu-sweep"),
    "small": small,
    "ultralytics_step": ultralytics_step,
    "slower": slower,
    "gpu": gpu,
    "predicted": predicted,
    "compiled_code": compiled_code,
    "passes": passes,
    "fuzz": fuzz,
}


def rendered(text: str) -> str:
    """``text`` with the inside of every block replaced."""

    def fill(match: re.Match) -> str:
        name = match.group(1)
        if name not in BLOCKS:
            raise SystemExit(f"unknown block {name!r}, expected one of {', '.join(BLOCKS)}")
        return f"<!-- {name}: written by make docs -->\n{BLOCKS[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+)(?:: [^>]*)? -->.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 where a file is out of date")
    arguments = parser.parse_args()
    stale = stale_pictures()
    if not arguments.check:
        for name in stale:
            plots.draw(drawn_reports()[name], IMAGES, name, drawn_kinds(name))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text()
        after = rendered(before)
        if after == before:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not arguments.check:
            path.write_text(after)
    if stale:
        print(("out of date: " if arguments.check else "updated: ") + ", ".join(stale))
    sys.exit(bool(stale) and arguments.check)


if __name__ == "__main__":
    main()
