"""Fills the generated blocks of README.md and docs/*.md from the code and from committed results.

A block stands between ``<!-- name -->`` and ``<!-- /name -->``. ``--check`` changes nothing and exits with 1 where a
file is out of date.
"""

import argparse
import ast
import json
import math
import re
import sys
from pathlib import Path
from typing import Callable, Optional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.environment import sources  # noqa: E402
from fbkd_ops.presets import PRESETS, TERMS, default_num_levels  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES, TESTS = ROOT / "examples" / "frameworks", ROOT / "tests" / "integrations"
IMAGE, CHANNELS = (800, 1344), 256
PYRAMID = {"P2": 4, "P3": 8, "P4": 16, "P5": 32, "P6": 64}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    return f"{result['where']}\n\n" + table(["command", "minutes", "what is in it"], rows) + f"\n\n{disk}"


def microbench() -> str:
    return figures("cpu-microbench.json", "Not yet measured.")


def microbench_gpu() -> str:
    return figures("cuda-microbench.json", "Not yet measured on a GPU.")


def relation() -> str:
    return figures("cpu-relation.json", "Not yet measured.")


def figures(file: str, absent: str) -> str:
    """A table for each suite in a result of benchmarks/microbench.py."""
    report = result_of(file)
    if report is None:
        return absent
    text = [f"`{report['command']}`: {machine(report['environment'])}."]
    if not report["complete"]:
        text.append("The run was interrupted.")
    for suite in dict.fromkeys(result["suite"] for result in report["results"]):
        text.append(f"### {suite}\n\n" + suite_table([r for r in report["results"] if r["suite"] == suite]))
    return "\n\n".join([*text, "### Ceilings\n\n" + ceilings_table(report["results"])])


def result_of(file: str) -> Optional[dict]:
    path = RESULTS / file
    return json.loads(path.read_text()) if path.exists() else None


def machine(facts: dict) -> str:
    parts = [facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores"]
    if "load" in facts:
        parts.append(f"load average {facts['load']} at the start")
    parts += [f"{name} {version}" for name, version in ({"torch": facts["torch"]} | facts.get("peers", {})).items()]
    if facts["huge_pages"]:
        parts.append(f"huge pages `{facts['huge_pages']}`")
    tree = f"revision {facts['revision'] or 'unknown'}" + (" with changes" if facts["modified"] else "")
    if "sources" in facts and facts["sources"] != sources("cuda" if "gpu" in facts else "cpu"):
        tree += ", before the last change of the kernels"
    return ", ".join([*parts, tree, facts["date"]])


def suite_table(results: list[dict]) -> str:
    """Rows: maps and implementations; cells: one figure a state of memory."""
    by_map, states = by_map_and_state(results)
    header = ["map", "implementation", "forward ms", "forward + backward ms", "× eager", "GB/s", "% of ceiling", "MB"]
    shown = f" {' / '.join(states)}" if len(states) > 1 else ""
    rows = []
    for title, by_state in by_map.items():
        for index, peer in enumerate(results[0]["peers"]):
            found = [by_state[state]["peers"][peer] for state in states if state in by_state]
            rows.append(["" if index else title, f"`{peer}`", *peer_cells(found, len(header) - 2)])
    return table([name + shown if name in header[2:7] else name for name in header], rows)


def by_map_and_state(results: list[dict]) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """One suite's results, and the states in the order in which they are shown: warm before fresh."""
    by_map = {}
    for result in results:
        by_map.setdefault(result["case"]["title"], {})[result["state"]] = result
    return by_map, sorted({result["state"] for result in results}, reverse=True)


def relation_summary() -> str:
    """What fbkd_ops is beside the others, one line a map."""
    return comparisons(lambda result: True)


def headline() -> str:
    """The whole loss, and the relation term without pooling."""
    return comparisons(lambda result: result["suite"] == "fbkd_loss" or set(result["case"]["strides"]) == {1})


def comparisons(shown: Callable[[dict], bool]) -> str:
    """fbkd_ops beside the others, one line for each map of the results that are shown."""
    report = result_of("cpu-relation.json")
    if report is None:
        return "Not yet measured."
    results, lines = [result for result in report["results"] if shown(result)], []
    for suite in dict.fromkeys(result["suite"] for result in results):
        by_map, states = by_map_and_state([result for result in results if result["suite"] == suite])
        for title, by_state in by_map.items():
            rows = [by_state[state]["peers"] for state in states if state in by_state]
            lines.append(f"- `{suite}`, {title}: {comparison(rows)}.")
    return "\n".join(lines)


def comparison(states: list[dict]) -> str:
    """fbkd_ops beside each other peer; ``states`` are the rows of one map in each state of memory."""
    ours = [peers["fbkd_ops"] for peers in states]
    if any(row["status"] != "ok" for row in ours):
        return f"`fbkd_ops` {ours[0]['status']}"
    parts = []
    for name in states[0]:
        rows = [peers[name] for peers in states]
        problem = next((row["status"] for row in rows if row["status"] != "ok"), "")
        if problem:
            parts.append(f"`{name}` {problem}")
        elif name != "fbkd_ops":
            speeds = " / ".join(f"{row['step']['speed_of_fbkd_ops']['median']:.1f}" for row in rows)
            parts.append(f"{speeds} times as fast as `{name}`{share_of(peak_of(ours), peak_of(rows))}")
    return ", ".join(parts or ["nothing to compare with"])


def share_of(ours: Optional[float], other: Optional[float]) -> str:
    """``ours`` megabytes beside another's; nothing below 1 MB, what the system counts is no finer."""
    if ours is None or other is None or min(ours, other) < 1:
        return ""
    if max(ours, other) < 1.1 * min(ours, other):
        return " in as much memory"
    return f" in 1/{other / ours:.1f} of the memory" if ours < other else f" in {ours / other:.1f} times the memory"


def peak_of(rows: list[dict]) -> Optional[float]:
    """Peak extra megabytes in the state of memory that has them."""
    return next((row["peak_extra_mb"] for row in rows if row.get("peak_extra_mb") is not None), None)


def scaling() -> str:
    """How time grows with the map, from the entries that benchmarks/microbench.py makes of neighbouring sizes."""
    report = result_of("cpu-relation.json")
    if report is None or not report["scaling"]:
        return "Not yet measured."
    peers = list(dict.fromkeys(name for row in report["scaling"] for name in row["time"]))
    rows = []
    for row in report["scaling"]:
        growth = [f"{row['time'][name]:.1f}" if name in row["time"] else "–" for name in peers]
        rows.append([" → ".join(row["sizes"]), row["state"], f"{row['pixels']:.1f}", *growth])
    return table(["map", "memory", "× pixels", *(f"× time of `{name}`" for name in peers)], rows)


def peer_cells(found: list[dict], count: int) -> list[str]:
    """A peer's figures, one for each state of memory, or why it has none."""
    problem = next((row["status"] for row in found if row["status"] != "ok"), "")
    if problem:
        return [problem, *[""] * (count - 1)]
    steps = [row["step"] for row in found]
    peak = peak_of(found)
    cells = [
        [f"{row['forward']['ms']['median']:.2f}" for row in found],
        [f"{step['ms']['median']:.2f}" for step in steps],
        [f"{step['speed_vs_eager']['median']:.1f}" if step["speed_vs_eager"] else "–" for step in steps],
        ["–" if step["gb_s"] is None else f"{step['gb_s']:.1f}" for step in steps],
        ["–" if step["ceiling_percent"] is None else f"{step['ceiling_percent']:.0f}" for step in steps],
        ["–" if peak is None else f"{peak:.0f}"],
    ]
    return [" / ".join(cell) for cell in cells]


def ceilings_table(results: list[dict]) -> str:
    names = {
        "sum_gb_s": "sum GB/s",
        "copy_gb_s": "copy GB/s",
        "copy_to_new_gb_s": "copy into new memory GB/s",
        "copy_to_new_page_faults": "its page faults",
        "matmul_gflop_s": "matrix product GFLOP/s",
    }
    rows = []
    for result in results:
        if "ceilings" in result:
            rates = [f"{result['ceilings'][key]:.0f}" if key in result["ceilings"] else "" for key in names]
            rows.append([result["suite"], result["case"]["title"], result["state"], *rates, str(result["rounds"])])
    return table(["suite", "map", "memory", *names.values(), "rounds"], rows)


def compiled_code() -> str:
    """Tables of a result of benchmarks/code_report.py."""
    path = RESULTS / "code.json"
    if not path.exists():
        return "Not yet compiled."
    report = json.loads(path.read_text())
    cuda = code_table(report["cuda"]) if report["cuda"] else "The CUDA library was not built."
    text = [f"CUDA, nvcc {report['nvcc']}:", cuda, f"Triton {report['triton']}:", code_table(report["triton_kernels"])]
    return "\n\n".join(text)


def code_table(rows: list[dict]) -> str:
    """Rows: kernels; cells: one figure an architecture, or one for all of them where they agree."""
    archs = sorted({row["arch"] for row in rows})
    columns = {
        "instances": lambda row: str(row["instances"]),
        "registers": lambda row: "–".join(map(str, dict.fromkeys(row["registers"]))),
        "spilling instructions": lambda row: str(row["spills"]),
        "stack": lambda row: str(row["stack"]),
        "shared memory": lambda row: str(row["shared"]),
        "widest load (in how many)": lambda row: f"{row['widest_load']} ({row['with_widest_load']})",
    }
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        same = [row for row in rows if row["kernel"] == kernel]
        cells = [[show(row) for row in same] for show in columns.values()]
        lines.append([f"`{kernel}`", *(cell[0] if len(set(cell)) == 1 else " / ".join(cell) for cell in cells)])
    return table(["sm_" + " / ".join(map(str, archs)), *columns], lines)


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


BLOCKS = {
    block.__name__: block
    for block in (
        presets,
        normalization,
        commands,
        microbench,
        relation,
        relation_summary,
        headline,
        scaling,
        microbench_gpu,
        compiled_code,
        passes,
        frameworks,
    )
}


def rendered(text: str) -> str:
    """``text`` with the inside of every block replaced."""

    def fill(match: re.Match) -> str:
        name = match.group(1)
        if name not in BLOCKS:
            raise SystemExit(f"unknown block {name!r}, expected one of {', '.join(BLOCKS)}")
        return f"<!-- {name} -->\n{BLOCKS[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 where a file is out of date")
    arguments = parser.parse_args()
    stale = []
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
