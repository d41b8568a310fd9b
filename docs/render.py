"""The generated parts of README.md and docs/*.md, made from the code and from committed results.

Each part is a block of cog that calls a function of this file. ``python docs/render.py`` draws the plots that are out
of date and runs cog; ``--check`` changes nothing and fails where a page or a plot is out of date.
"""

import ast
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_model_tables, plots, results, tables  # noqa: E402
from benchmarks.losses import KINDS  # noqa: E402
from benchmarks.results import Report  # noqa: E402
from benchmarks.study import tables as study_tables  # noqa: E402
from benchmarks.study.protocol import STUDIES  # noqa: E402
from benchmarks.tables import table  # noqa: E402
from fbkd_ops.presets import PRESETS, TERMS, default_num_levels  # noqa: E402

RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
MICROBENCH, SWEEP, SMALL = "cpu-microbench.csv", "cpu-sweep.csv", "cpu-small.csv"
TEACHER_COST = "cpu-teacher-cost.csv"
CHANNEL_OPS, LOSSES = "cpu-channel-ops.csv", "cpu-losses.csv"
FUZZ, MUTANTS, ULTRALYTICS = "cpu-fuzz.json", "cpu-mutants.json", "cpu-ultralytics-step.json"
STUDY, STUDY_COST, PILOT = "cpu-study.csv", "cpu-study-cost.csv", "cpu-study-pilot.csv"
YOLO_STUDY, YOLO_PILOT = "cpu-study-yolo.csv", "cpu-study-yolo-pilot.csv"
STAGES, GPU_BENCH = "summary.json", "microbench.csv"  # in a GPU's folder
NOT_YET, NOT_YET_ON_A_GPU = "Not yet measured.", "Not yet measured on a GPU."
EXAMPLES, TEACHERS = ROOT / "examples" / "frameworks", ROOT / "examples" / "teachers"
TESTS = ROOT / "tests" / "integrations"
IMAGE, CHANNELS = (800, 1344), 256
PYRAMID = {"P2": 4, "P3": 8, "P4": 16, "P5": 32, "P6": 64}


def presets() -> str:
    header = ["preset", "τ s/c", "mask rule", "channel mask", "weights feature / channel / spatial / relation"]
    header += ["levels", "pooling factor", "`inter_channels`", "pooled terms", "last bias"]
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
    result = facts_of("cpu-commands.json")
    columns = ("minutes", "revision", "note")
    rows = [row for row in result["rows"] if row["command"] != "make test-all"]  # which last_run() has
    rows = [[f"`{row['command']}`", *(str(row[column]) for column in columns)] for row in rows]
    disk = f"The environment in `.venv` takes {result['venv_gb']:.1f} GB of disk, PyTorch's CUDA libraries most of it."
    return f"{result['where']}\n\n" + table(["command", "minutes", "revision", "what is in it"], rows) + f"\n\n{disk}"


def last_run() -> str:
    """What the last `make test-all` said, and how long it took."""
    (row,) = (row for row in facts_of("cpu-commands.json")["rows"] if row["command"] == "make test-all")
    lines = "".join(f"\n    {line}" for line in row["pytest"])
    where = f"At {row['revision']} it took {row['minutes']} minutes"
    return f"{where}, the ops' tests for each vector width included:\n{lines}"


def facts_of(file: str) -> dict:
    return json.loads((RESULTS / file).read_text())


def report_of(file: str) -> Report:
    return results.read(RESULTS / file)


def rows_of(*suites: str, file: str = MICROBENCH) -> pd.DataFrame:
    """The rows of some suites on a CPU."""
    rows = report_of(file).rows
    return rows[rows["suite"].isin(suites)]


def microbench(file: str = MICROBENCH) -> str:
    return tables.provenance(report_of(file).facts)


def suites(*names: str, file: str = MICROBENCH) -> str:
    return tables.suite_tables(rows_of(*names, file=file))


def comparisons(*suites: str, file: str = MICROBENCH) -> str:
    """What fbkd_ops is beside the others, one line a map."""
    return tables.comparisons(rows_of(*suites, file=file))


# Rows of README's table: what is measured, its suite, how the map's title begins, the peer, and what that is.
COSTS = (
    ("the loss, P2..P5 of an 800×1344 image", "fbkd_loss", "", "mmrazor", "MMRazor"),
    ("the same", "fbkd_loss", "", "compile", "MMRazor, compiled"),
    ("its relation term alone, P3 of that image without pooling", "relation", "P3 without", "mmrazor", "MMRazor"),
    (
        "a training step of Faster R-CNN, its teacher included, default / fresh memory",
        "train_step",
        "",
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
    header = ["forward and backward of", "beside", "times as fast", "memory beside it"]
    rows = [*_suite_costs(), *_small_costs(), _trainer_costs()]
    files = [file.replace(".csv", ".json") for file in (MICROBENCH, SMALL, ULTRALYTICS)]
    where = measured_on([facts_of(file)["environment"] for file in files])
    return f"{table(header, rows)}\n\n{where} The [tables](docs/performance.md#on-a-cpu) say more of each run."


def measured_on(environments: list[dict]) -> str:
    """One sentence about several runs, which names what they have in common once."""

    def values(value: Callable[[dict], Any]) -> str:
        return " or ".join(map(str, sorted({value(environment) for environment in environments})))

    threads = values(lambda environment: environment["threads"])
    parts = [
        f"{values(lambda environment: environment['cpu'])} with {threads} thread{'' if threads == '1' else 's'}",
        f"torch {values(lambda environment: environment['torch'])}",
        values(tables.revision),
        values(lambda environment: environment["date"][:10]),
    ]
    return f"Measured on {', '.join(parts)}."


def _suite_costs() -> Iterator[list[str]]:
    for what, suite, case, peer, name in COSTS:
        rows = rows_of(suite)
        step = tables.one_pass(rows[rows["case"].str.startswith(case)])
        memory = tables.share_of_memory(step, peer).removesuffix(" of the memory").removesuffix(" memory")
        yield [what, name, tables.speeds(step, peer), memory]


def _small_costs() -> Iterator[list[str]]:
    rows = report_of(SMALL).rows
    for what, row, peer, peer_name in SMALL_COSTS:
        found = rows[rows["dtype"] == "float32"].set_index(["row", "peer"]).loc[(row, peer)]
        speeds = " / ".join(f"{1 / ratio:.1f}" for ratio in found.sort_values("threads")["times_first"])
        yield [f"{what}, one / two threads", peer_name, speeds, ""]


def _trainer_costs() -> list[str]:
    report = facts_of(ULTRALYTICS)
    names = [report[side].removesuffix(".yaml").replace("yolo", "YOLO") for side in ("student", "teacher")]
    ours = [row for row in report["rows"] if row["way"] == "fbkd_ops"]
    speeds = [1 / row["times_built_in"] for row in ours]
    sizes = " and ".join(map(str, sorted({row["imgsz"] for row in ours})))
    what = f"a step of Ultralytics' trainer, {' from '.join(names)}, 4 and 16 images of {sizes} px"
    return [what, "Ultralytics' own distillation", f"{min(speeds):.2f} to {max(speeds):.2f}", ""]


def scaling() -> str:
    """How time grows with the map, without pooling."""
    return tables.growth_table(report_of(MICROBENCH).rows)


def sweep() -> str:
    report = report_of(SWEEP)
    return f"{tables.provenance(report.facts)}\n\n{tables.sweep_table(report.rows)}"


def small() -> str:
    """The grid of small pyramids: how many times as fast as each peer, and milliseconds."""
    report = report_of(SMALL)
    rows = report.rows.dropna(subset="row")
    states = list(rows.groupby(["threads", "dtype"], sort=False).groups)
    cells = rows.groupby(["row", "threads", "dtype"]).apply(small_cell)
    lines = [[row, *(cells.get((row, *state), "-") for state in states)] for row in rows["row"].unique()]
    header = ["pyramid", *(f"{dtype}, {threads} thread{'s'[: threads - 1]}" for threads, dtype in states)]
    machine = tables.machine(report.facts["environment"])
    return f"`python -m benchmarks.small`: {machine}.\n\n{table(header, lines)}"


def losses() -> str:
    """A step of each loss: how many times as fast as plain PyTorch and as MMRazor, and milliseconds."""
    report = report_of(LOSSES)
    cells = report.rows.groupby(["row", "threads", "loss"]).apply(small_cell)
    names = list(report.rows["loss"].unique())
    places = list(report.rows.groupby(["row", "threads"], sort=False).groups)
    lines = [[row, str(threads), *(cells.get((row, threads, name), "-") for name in names)] for row, threads in places]
    machine = tables.machine(report.facts["environment"])
    header = ["pyramid", "threads", *(f"`{KINDS[name].__name__}`" for name in names)]
    return f"`python -m benchmarks.losses`: {machine}.\n\n{table(header, lines)}"


def small_cell(found: pd.DataFrame) -> str:
    peers = found.set_index("peer")
    ratios = " / ".join(
        f"{1 / peers.at[name, 'times_first']:.2f}" if name in peers.index else "-" for name in ("reference", "mmrazor")
    ).removesuffix(" / -")
    return f"{ratios} ({peers.at['fbkd_ops', 'ms']:.3g} ms)"


def ultralytics_step() -> str:
    """A step in Ultralytics' trainer, in each way and at each size."""
    report = facts_of(ULTRALYTICS)
    header = ["pixels", "images", "way", "steps", "ms", "images a second", "of the built-in", "peak MB"]
    names = ("imgsz", "batch", "way", "steps", "ms", "images_a_second", "times_built_in", "peak_mb")
    rows = [[str(row[name]) for name in names] for row in report["rows"]]
    what = f"{report['student']} from {report['teacher']}"
    return f"{what}. {tables.machine(report['environment'])}.\n\n{table(header, rows)}"


def ultralytics_study() -> str:
    """A student of Ultralytics alone, with its own distillation and with ours."""
    return study_tables.trainers_table(report_of(YOLO_STUDY).rows) if (RESULTS / YOLO_STUDY).exists() else NOT_YET


def slower() -> str:
    """Where fbkd_ops loses to a peer, in all results of the CPU."""
    return tables.slower_table(pd.concat([report_of(file).rows for file in (MICROBENCH, SWEEP)]))


def gpu_folder(file: str) -> str:
    """The newest folder of results of ``make gpu`` that has a file, other than of a dry run; empty without one."""
    dates = {}
    for path in RESULTS.glob(f"*/{Path(file).stem}.json"):
        environment = json.loads(path.read_text())["environment"]
        if "gpu" in environment:
            dates[path.parent.name] = environment["date"]
    return max(dates, key=dates.get, default="")


def gpu() -> str:
    """Everything that ``make gpu`` found out."""
    stages, benchmark = gpu_folder(STAGES), gpu_folder(GPU_BENCH)
    parts = [tables.stage_tables(facts_of(f"{stages}/{STAGES}"))] if stages else []
    if benchmark:
        report = report_of(f"{benchmark}/{GPU_BENCH}")
        parts += [tables.provenance(report.facts), tables.suite_tables(report.rows), pictures(benchmark)]
    return "\n\n".join(parts) or NOT_YET_ON_A_GPU


def gpu_headline() -> str:
    folder = gpu_folder(GPU_BENCH)
    if not folder:
        return NOT_YET_ON_A_GPU
    report = report_of(f"{folder}/{GPU_BENCH}")
    return f"{tables.machine(report.facts['environment'])}:\n\n{tables.comparisons(report.rows)}"


def drawn_reports() -> dict[str, tuple[Report, Iterable[str]]]:
    """The reports whose pictures stand in the documentation, by the pictures' name, and which kinds.

    Of a sweep that is the growth alone: a bar or a point for each of its sizes would be too many.
    """
    files = {MICROBENCH: plots.BENCHMARK, SWEEP: ["growth"]}
    files[f"{gpu_folder(GPU_BENCH)}/{GPU_BENCH}"] = plots.BENCHMARK
    files[STUDY] = ["curves"]
    found = [(Path(file), kinds) for file, kinds in files.items() if (RESULTS / file).exists()]
    return {path.parent.name or path.stem: (report_of(path), kinds) for path, kinds in found}


def pictures(name: str) -> str:
    """A report's pictures, for a page in docs/."""
    if name not in drawn_reports():
        return NOT_YET
    report, kinds = drawn_reports()[name]
    files = plots.pictures(report, name, kinds)
    return "\n\n".join(f"![{kind}, {name}](images/{file})" for kind, file in files.items())


def stale_pictures() -> list[str]:
    """Names of the reports that have a picture that is not there or is of another result."""
    return [
        name
        for name, (report, kinds) in drawn_reports().items()
        if any(plots.is_stale(IMAGES / file, report) for file in plots.pictures(report, name, kinds).values())
    ]


def compiled_code() -> str:
    return tables.code_tables(*report_of("code.csv"))


def predicted() -> str:
    """What benchmarks.gpu_model predicts now, and predicted first."""
    return gpu_model_tables.model_tables(report_of("gpu-model.csv"), report_of("gpu-model-before.csv"))


def passes() -> str:
    rows = []
    for terms, backends in facts_of("passes.json").items():
        ours, literal = backends["auto"], backends["reference"]
        ops = ", ".join(f"`{op.split('.')[-2]}`" for op in (*ours["forward"], *ours["backward"]))
        rows.append([terms, str(len(ours["forward"])), str(len(ours["backward"])), ops, str(len(literal["backward"]))])
    header = ["terms", "forward", "backward", "by", "literal formulas with autograd"]
    return table(header, rows)


def fuzz() -> str:
    """How many random calls were compared, and how many failed."""
    names = ("cases", "failures", "minutes", "seed", "revision", "torch")
    rows = [[f"`{target}`", *(str(done[name]) for name in names)] for target, done in facts_of(FUZZ).items()]
    return table(["target", "calls", "failed", *names[2:]], rows)


def mutants() -> str:
    """How many small faults the tests noticed, run by run."""
    runs, rows = facts_of(MUTANTS)["runs"], []
    for run in runs:
        counts = [f"{each['caught']} of {each['faults']}" if each["faults"] else "" for each in run["groups"].values()]
        survivors = ", ".join(f"`{name}`" for name in run["survivors"]) or "none"
        rows.append([run["revision"], *counts, survivors, str(run["minutes"])])
    return table(["revision", *runs[0]["groups"], "survived", "minutes"], rows)


def study_pilot(file: str = PILOT) -> str:
    """What was tried to find a study's budget."""
    rows = [
        [
            row.setting,
            f"`{row.arm}`",
            str(row.seed),
            row.changes,
            str(row.steps),
            f"{row.ap:.3f}",
            f"{row.seconds:.0f}",
            "" if math.isnan(row.share_p50) else f"{row.share_p50:.2f}",
        ]
        for row in report_of(file).rows.itertuples()
    ]
    header = ["data", "arm", "seed", "numbers", "steps", "AP", "CPU s", "median share, second half"]
    return table(header, rows)


def study() -> str:
    """Every arm beside the baselines, a table for each part of the study that has runs."""
    if not (RESULTS / STUDY).exists():
        return NOT_YET
    runs, costs, parts = report_of(STUDY).rows, report_of(STUDY_COST).rows, []
    for name, part in STUDIES.items():
        rows = study_tables.rows_of(runs, part)
        if len(rows) and "baseline" in part.arms:
            teacher = study_tables.teacher_score(runs, part)
            parts.append(f"**`{name}`**, teacher {teacher} AP:\n\n{study_tables.arms_table(rows, costs)}")
    return "\n\n".join(parts)


def study_shares() -> str:
    """How the gradient share kept to its target in the study's trainings."""
    return study_tables.share_table(report_of(STUDY).rows) if (RESULTS / STUDY).exists() else NOT_YET


def study_headline() -> str:
    """The recipe beside both baselines, a line for each part of the study."""
    return study_tables.headline(report_of(STUDY).rows) if (RESULTS / STUDY).exists() else NOT_YET


def frameworks() -> str:
    """A row for each file in examples/frameworks, for the page that has their code."""
    rows = [[*described(path), f"[`{path.stem}`](#{path.stem})"] for path in framework_examples()]
    return table(["framework", "tap", "example"], rows)


def framework_list() -> str:
    """README's shorter table of the same files."""
    rows = []
    for path in framework_examples():
        name, tap = described(path)
        rows.append([f"[{name}]({path.relative_to(ROOT)})", tap])
    return table(["framework", "where its features are"], rows)


def framework_code() -> str:
    """Every file in examples/frameworks, under a heading of its name: its first line, its test and its code."""
    return "\n\n".join(map(framework_section, framework_examples()))


def framework_section(path: Path) -> str:
    source = path.read_text()
    docstring, *_ = ast.parse(source).body
    code = "\n".join(source.splitlines()[docstring.end_lineno :]).strip()
    file, test = (f"[`{each}`](../{each})" for each in (path.relative_to(ROOT), test_of(path).relative_to(ROOT)))
    heading = f"### {path.stem}\n\n{docstring.value.value.splitlines()[0]} The file is {file}, its test {test}."
    return f"{heading}\n\n```python\n{code}\n```"


def teacher_code() -> str:
    """Every file in examples/teachers likewise."""
    return "\n\n".join(map(framework_section, framework_examples(TEACHERS)))


def teacher_cost() -> str:
    """What each way to make a teacher cheaper takes."""
    if not (RESULTS / TEACHER_COST).exists():
        return NOT_YET
    report = report_of(TEACHER_COST)
    header = ["pixels", "threads", "teacher", "ms a step", "without a teacher / with it", "teacher MB"]
    lines = [
        [row.pixels, str(row.threads), row.way, f"{row.ms:.0f}", f"{row.times_first:.2f}", f"{row.teacher_mb:.0f}"]
        for row in report.rows.itertuples()
    ]
    return f"{tables.machine(report.facts['environment'])}.\n\n{table(header, lines)}"


def framework_examples(folder: Path = EXAMPLES) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]


def described(path: Path) -> tuple[str, str]:
    """What an example's docstring says that it is, and where its features are."""
    first, _, rest = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")
    tap = re.search(r"^Tap: (.+)$", rest, re.MULTILINE)
    if not first or tap is None:
        raise SystemExit(f"{path.name}: expected a docstring with a first line and a line 'Tap: ...'")
    return first.rstrip("."), tap.group(1)


def test_of(path: Path) -> Path:
    """The test of an example, which has its name."""
    test = TESTS / f"test_{path.name}"
    if not test.exists():
        raise SystemExit(f"{path.name}: expected a test {test.relative_to(ROOT)}")
    return test


def frameworks_tested() -> str:
    """Which releases of the frameworks stand beside the tests, and which the project asks for."""
    facts = facts_of("versions.json")
    asked = {re.match(r"[\w-]+", line)[0]: line for line in extra("test") + extra("bench") + extra("demo")}
    rows = [[name, asked.get(name, "").removeprefix(name) or "any", found] for name, found in facts["packages"].items()]
    return f"{facts['where']}\n\n" + table(["package", "asked for", "installed"], rows)


def installs() -> str:
    """Ways to install that were tried: what was there before, the time, and what the command or the first call said."""
    rows = pd.read_csv(RESULTS / "installs.csv").astype(str)
    columns = [rows["way"], "`" + rows["command"] + "`", rows["python"], rows["before"], rows["seconds"], rows["said"]]
    header = ["way", "command", "Python", "installed before", "seconds", "what it, or the first call, said"]
    revisions = " and ".join(rows["revision"].unique())
    return f"On {facts_of('installs.json')['where']}, at {revisions}.\n\n" + table(header, zip(*columns, strict=True))


def extra(name: str) -> list[str]:
    """The requirements of one of pyproject.toml's extras."""
    block = re.search(rf"^{name} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    return re.findall(r'"([^"]+)"', block)


def main(arguments: list[str]) -> int:
    """Draw what is out of date and fill the pages; ``--check`` and all else are options of cog."""
    from cogapp import Cog

    check, stale = "--check" in arguments, stale_pictures()
    for name in stale:
        print(f"pictures of {name} are out of date")
        if not check:
            report, kinds = drawn_reports()[name]
            plots.draw(report, IMAGES, name, kinds)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages = [str(page) for page in pages if "[[[cog" in page.read_text()]
    options = ["-e", "-I", str(ROOT / "docs"), "-p", "import render", *([] if check else ["-r"])]
    code = Cog().main(["cog", *options, *arguments, *pages])
    return code or int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
