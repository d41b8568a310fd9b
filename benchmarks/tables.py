"""Markdown of committed results, which docs/render.py puts into the documentation. Pictures are in plots.py."""

from collections.abc import Callable, Iterable, Sequence

from benchmarks.environment import sources
from benchmarks.series import (
    CEILINGS,
    DIMENSIONS,
    FASTER,
    LEAST_SIZES,
    OURS,
    PASSES,
    is_slower,
    place_of,
    series,
    state_text,
    states_in,
    title_of,
)

__all__ = [
    "code_tables",
    "comparisons",
    "provenance",
    "scaling_table",
    "slower_table",
    "speeds_and_memory",
    "stage_tables",
    "suite_tables",
    "sweep_table",
    "table",
]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(report: dict) -> str:
    """The command that made a report of benchmarks/microbench.py, where, and whether it came to its end."""
    runs = [report, *reversed(report.get("earlier", []))]
    return "\n\nThe tables that this run did not replace: ".join(map(_run, runs))


def _run(run: dict) -> str:
    text = f"`{run['command']}`: {machine(run['environment'])}."
    return text if run["complete"] else f"{text} The run was interrupted."


def machine(facts: dict) -> str:
    parts = [facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads of {facts['cores']} cores"]
    if "load" in facts:
        parts.append(f"load average {facts['load']} at the start")
    parts += [f"{name} {version}" for name, version in ({"torch": facts["torch"]} | facts.get("peers", {})).items()]
    if "driver" in facts:
        parts.append(f"driver {facts['driver']}")
    elif facts["huge_pages"]:
        parts.append(f"huge pages `{facts['huge_pages']}`")
    tree = f"revision {facts['revision'] or 'unknown'}" + (" with changes" if facts["modified"] else "")
    if "sources" in facts and facts["sources"] != sources("cuda" if "gpu" in facts else "cpu"):
        tree += ", before the last change of the kernels"
    return ", ".join([*parts, tree, facts["date"]])


def suite_tables(results: list[dict]) -> str:
    """A headed table a suite, and one of the ceilings."""
    suites = list(dict.fromkeys(result["suite"] for result in results))
    parts = [f"### {suite}\n\n" + _suite_table([x for x in results if x["suite"] == suite]) for suite in suites]
    ceilings = _ceilings_table(results)
    return "\n\n".join([*parts, f"### Ceilings of {', '.join(suites)}\n\n{ceilings}"] if ceilings else parts)


def _suite_table(results: list[dict]) -> str:
    """Rows: maps and implementations; cells: one figure a state of memory."""
    by_map, states = _by_map_and_state(results)
    peers = _peers_in(results)
    header = ["map", "implementation", "forward ms", "forward + backward ms", "× eager", "GB/s", "% of ceiling", "MB"]
    shown = f" {' / '.join(states)}" if len(states) > 1 else ""
    rows = []
    for title, by_state in by_map.items():
        for index, peer in enumerate(peers):
            found = [by_state[state]["peers"].get(peer) if state in by_state else None for state in states]
            rows.append(["" if index else title, f"`{peer}`", *_peer_cells(peer, found, len(header) - 2)])
    return table([name + shown if name in header[2:7] else name for name in header], rows)


def _by_map_and_state(results: list[dict]) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """One suite's results, and the states in the order in which they are shown."""
    by_map = {}
    for result in results:
        by_map.setdefault(result["case"]["title"], {})[result["state"]] = result
    return by_map, states_in(results)


def _peers_in(results: Iterable[dict]) -> list[str]:
    return list(dict.fromkeys(peer for result in results for peer in result["peers"]))


def _peer_cells(peer: str, found: Sequence[dict | None], count: int) -> list[str]:
    """A peer's figures, one for each state of memory, or why it has none."""
    if problem := _problem(found):
        return [problem, *[""] * (count - 1)]
    figures = (
        lambda row: _time(peer, row["forward"]),
        lambda row: _time(peer, row["step"]),
        lambda row: f"{row['step']['speed_vs_eager']['median']:.1f}" if row["step"]["speed_vs_eager"] else "–",
        lambda row: "–" if row["step"]["gb_s"] is None else f"{row['step']['gb_s']:.1f}",
        lambda row: "–" if row["step"]["ceiling_percent"] is None else f"{row['step']['ceiling_percent']:.0f}",
    )
    return [*(_in_each_state(found, shown) for shown in figures), _megabytes(found)]


def _in_each_state(rows: Iterable[dict | None], shown: Callable[[dict], str]) -> str:
    """A figure a state of memory, a dash where none was measured."""
    return " / ".join("–" if row is None else shown(row) for row in rows)


def _problem(rows: Iterable[dict | None]) -> str:
    """Why a peer has no figures in one of the measured states; empty if it has them in all."""
    return next((row["status"] for row in rows if row and row["status"] != "ok"), "")


def _time(peer: str, figures: dict) -> str:
    return f"{figures['ms']['median']:.2f}" + (FASTER if is_slower(peer, figures) else "")


def _ceilings_table(results: list[dict]) -> str:
    rows = []
    for result in results:
        if "ceilings" in result and result["cost"]:
            shown = [_plain_number(result["ceilings"].get(key)) for key in (*CEILINGS, "copy_to_new_page_faults")]
            rows.append([*place_of(result), *shown, str(result["rounds"])])
    rates = [f"{name} {unit}" for name, unit in CEILINGS.values()]
    header = ["suite", "map", "memory", *rates, "page faults of the copy into new memory", "rounds"]
    return table(header, rows) if rows else ""


def _plain_number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def comparisons(results: list[dict]) -> str:
    """fbkd_ops beside the others, one line for each map."""
    lines = []
    for suite in dict.fromkeys(result["suite"] for result in results):
        by_map, states = _by_map_and_state([result for result in results if result["suite"] == suite])
        for title, by_state in by_map.items():
            measured = [state for state in states if state in by_state]
            memory = f", {state_text(measured)}" if measured != ["default"] else ""
            lines.append(f"- `{suite}`, {title}{memory}: {comparison([by_state[x]['peers'] for x in measured])}.")
    return "\n".join(lines)


def comparison(states: list[dict]) -> str:
    """fbkd_ops beside each other peer; ``states`` are the rows of one map in each state of memory."""
    ours = [peers[OURS] for peers in states]
    if problem := _problem(ours):
        return f"`{OURS}` {problem}"
    parts = []
    for name in states[0]:
        rows = [peers[name] for peers in states if name in peers]
        if len(rows) < len(states):
            continue
        if problem := _problem(rows):
            parts.append(f"`{name}` {problem}")
        elif name != OURS:
            speeds = " / ".join(f"{_speed(row):.1f}" for row in rows)
            parts.append(f"{speeds} times as fast as `{name}`{share_of(_peak_of(ours), _peak_of(rows))}")
    return ", ".join(parts or ["nothing to compare with"])


def speeds_and_memory(ours: Sequence[dict], theirs: Sequence[dict]) -> tuple[str, str]:
    """How many times as fast fbkd_ops is in each state of memory, and how much of the other's memory it takes."""
    if problem := _problem([*ours, *theirs]):
        return problem, ""
    share = share_of(_peak_of(ours), _peak_of(theirs)).removeprefix(" in ")
    return _in_each_state(theirs, lambda row: f"{_speed(row):.1f}"), share


def _speed(row: dict) -> float:
    """How many times as fast as this peer fbkd_ops is, forward and backward."""
    return row["step"]["speed_of_fbkd_ops"]["median"]


def share_of(ours: float | None, other: float | None) -> str:
    """``ours`` megabytes beside another's; nothing below 1 MB, what the system counts is no finer."""
    if ours is None or other is None or min(ours, other) < 1:
        return ""
    if max(ours, other) < 1.1 * min(ours, other):
        return " in as much memory"
    return f" in 1/{other / ours:.1f} of the memory" if ours < other else f" in {ours / other:.1f} times the memory"


def _peak_of(rows: Iterable[dict | None]) -> float | None:
    """Peak extra megabytes in the state of memory that has them."""
    return next((row["peak_extra_mb"] for row in rows if row and row.get("peak_extra_mb") is not None), None)


def scaling_table(rows: list[dict]) -> str:
    """How time grows with the map, from the entries that benchmarks/microbench.py makes of neighbouring sizes."""
    peers = list(dict.fromkeys(name for row in rows for name in row["time"]))
    lines = []
    for row in rows:
        growth = [f"{row['time'][name]:.1f}" if name in row["time"] else "–" for name in peers]
        lines.append([row["suite"], " → ".join(row["sizes"]), row["state"], f"{row['pixels']:.1f}", *growth])
    return table(["suite", "map", "memory", "× pixels", *(f"× time of `{name}`" for name in peers)], lines)


def sweep_table(results: list[dict]) -> str:
    """Series in which one size changes: fbkd_ops' time and memory, and how many times as fast it is as others."""
    peers = [peer for peer in _peers_in(results) if peer != OURS]
    states, rows = states_in(results), []
    for dimension in DIMENSIONS:
        for title, by_size in _sizes(results, dimension).items():
            for index, (size, by_state) in enumerate(sorted(by_size.items())):
                found = [by_state[state]["peers"] if state in by_state else None for state in states]
                place = ["" if index else title, dimension, f"{size:,}"]
                rows.append([*place, *_sweep_cells(found, peers)])
    shown = f" {' / '.join(states)}" if len(states) > 1 else ""
    header = ["series", "size", "", f"`{OURS}` ms{shown}", f"`{OURS}` MB"]
    return table([*header, *(text for peer in peers for text in (f"× `{peer}`{shown}", "its MB"))], rows)


def _sizes(results: list[dict], dimension: str) -> dict[str, dict[int, dict[str, dict]]]:
    """By what a series has in common and by size: the results in each state of memory, failed ones too."""
    found, in_each_state = {}, {}
    for result in results:
        in_each_state.setdefault((result["suite"], result["case"]["title"]), {})[result["state"]] = result
    for group in series(results, dimension):
        for size, result in group:
            by_size = found.setdefault(title_of(result, dimension), {})
            by_size[size] = in_each_state[result["suite"], result["case"]["title"]]
    return {title: by_size for title, by_size in found.items() if len(by_size) >= LEAST_SIZES}


def _sweep_cells(states: list[dict | None], peers: Sequence[str]) -> list[str]:
    """Of one size, in each state of memory: fbkd_ops' figures, then those of its peers."""
    ours = [rows and rows[OURS] for rows in states]
    if problem := _problem(ours):
        return [problem, *[""] * (1 + 2 * len(peers))]
    cells = [_in_each_state(ours, lambda row: f"{row['step']['ms']['median']:.1f}"), _megabytes(ours)]
    for peer in peers:
        theirs = [rows and rows.get(peer) for rows in states]
        problem = _problem(theirs)
        speeds = problem or _in_each_state(theirs, lambda row: _marked_speed(peer, row))
        cells += [speeds, "" if problem else _megabytes(theirs)]
    return cells


def _marked_speed(peer: str, row: dict) -> str:
    return f"{_speed(row):.2g}" + (FASTER if is_slower(peer, row["step"]) else "")


def _megabytes(rows: Iterable[dict | None]) -> str:
    peak = _peak_of(rows)
    return "–" if peak is None else f"{peak:.0f}"


def slower_table(reports: Iterable[dict]) -> str:
    """A row for each pass in which a peer is faster, by peer."""
    rows = sorted((row for report in reports for row in report["slower"]), key=lambda row: row["peer"])
    cells = [
        [f"`{row['peer']}`", row["suite"], row["case"], row["state"], PASSES[row["pass"]], f"{row['speed']:.2f}"]
        for row in rows
    ]
    header = ["faster", "suite", "map", "memory", "", "its time / that of `fbkd_ops`"]
    return table(header, cells) if cells else f"None: `{OURS}` is the fastest in every row."


def stage_tables(summary: dict) -> str:
    """What ``make gpu`` ran, the kernels that the profiler saw beside the model's, and those of each profile of ncu."""
    stages = summary["stages"]
    rows = [
        [name, entry["status"], _or_dash(entry.get("seconds")), _plain(entry.get("figures", {}))]
        for name, entry in stages.items()
    ]
    parts = [f"{machine(summary['environment'])}.", table(["stage", "status", "seconds", "figures"], rows)]
    seen = stages.get("smoke", {}).get("figures", {}).get("kernels")
    if seen:
        parts.append(
            f"A step of the whole loss, P2..P5, 16 images, bfloat16, by the profiler:\n\n{_kernel_table(seen)}"
        )
    for stage in ("ncu", "kernels"):
        for profile, kernels in stages.get(stage, {}).get("figures", {}).items():
            if isinstance(kernels, dict) and kernels:
                parts.append(f"ncu, {profile}:\n\n{_kernel_table(kernels)}")
    return "\n\n".join(parts)


KERNEL_COLUMNS = {
    "launches": "launches",
    "us": "µs",
    "predicted_us": "µs predicted",
    "dram_percent": "% of DRAM bandwidth",
    "l2_percent": "% of L2 bandwidth",
    "sm_percent": "% of the multiprocessors' rate",
    "warps_percent": "% of warps active",
}


def _kernel_table(kernels: dict[str, dict]) -> str:
    columns = [name for name in KERNEL_COLUMNS if any(name in figures for figures in kernels.values())]
    lines = [[f"`{kernel}`", *(_or_dash(row.get(name)) for name in columns)] for kernel, row in kernels.items()]
    return table(["kernel", *(KERNEL_COLUMNS[name] for name in columns)], lines)


def _or_dash(value: float | None) -> str:
    return "–" if value is None else str(value)


def _plain(figures: dict) -> str:
    """The figures that are no tables of their own."""
    return ", ".join(f"{name} {value}" for name, value in figures.items() if not isinstance(value, (dict, list)))


def code_tables(report: dict) -> str:
    """Tables of a result of benchmarks/code_report.py."""
    cuda = _code_table(report["cuda"]) if report["cuda"] else "The CUDA library was not built."
    text = [f"CUDA, nvcc {report['nvcc']}:", cuda, f"Triton {report['triton']}:", _code_table(report["triton_kernels"])]
    return "\n\n".join(text)


def _code_table(rows: list[dict]) -> str:
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
