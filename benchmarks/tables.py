"""Markdown of committed results, which docs/render.py puts into the documentation. Pictures are in plots.py."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from benchmarks.environment import sources
from benchmarks.results import CEILINGS, OURS, PASSES, PLACE, is_slower, state_text, states_in
from benchmarks.series import DIMENSIONS, series, title_of

ABSENT = "–"
FASTER = " *"  # behind a time that fbkd_ops does not reach


def table(header: list[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(facts: dict) -> str:
    """The command that made a result of benchmarks/microbench.py, where, and whether it came to its end."""
    runs = [facts, *reversed(facts.get("earlier", []))]
    return "\n\nThe tables that this run did not replace: ".join(map(_run, runs))


def _run(run: dict) -> str:
    text = f"`{run['command']}`: {machine(run['environment'])}."
    return text if run["complete"] else f"{text} The run was interrupted."


def machine(facts: dict) -> str:
    threads = f"{facts['threads']} thread{'s'[: facts['threads'] - 1]}"
    parts = [facts.get("gpu") or f"{facts['cpu']}, {threads} of {facts['cores']} cores"]
    if "load" in facts:
        parts.append(f"load average {facts['load']} at the start")
    parts += [f"{name} {version}" for name, version in ({"torch": facts["torch"]} | facts.get("peers", {})).items()]
    if "driver" in facts:
        parts.append(f"driver {facts['driver']}")
    elif facts["huge_pages"]:
        parts.append(f"huge pages `{facts['huge_pages']}`")
    return ", ".join([*parts, revision(facts), facts["date"]])


def revision(facts: dict) -> str:
    """The commit of a run, and whether the kernels have changed since."""
    tree = f"revision {facts['revision'] or 'unknown'}" + (" with changes" if facts["modified"] else "")
    is_old = "sources" in facts and facts["sources"] != sources("cuda" if "gpu" in facts else "cpu")
    return f"{tree}, before the last change of the kernels" if is_old else tree


def one_pass(rows: pd.DataFrame, name: str = "step") -> pd.DataFrame:
    return rows[rows["pass"] == name]


def by_state(rows: pd.DataFrame, keys: list[str], cell: Callable[[pd.Series], str]) -> pd.Series:
    """Return ``warm / fresh`` cells of one pass by ``keys``: a status that is not "ok", a dash where unmeasured."""
    states = states_in(rows["state"])
    wide = rows.assign(cell=[cell(row) for _, row in rows.iterrows()]).pivot(index=keys, columns="state", values="cell")
    cells = wide.reindex(columns=states).fillna(ABSENT).agg(" / ".join, axis=1)
    failed = rows[rows["status"] != "ok"]
    cells.update(failed.groupby(keys)["status"].first())
    return cells


def number(value: float, digits: int, form: str = "f") -> str:
    return ABSENT if pd.isna(value) else f"{value:.{digits}{form}}"


def marked(text: str, row: pd.Series) -> str:
    return text + (FASTER if is_slower(row["peer"], row["speed"]) else "")


def suite_tables(rows: pd.DataFrame) -> str:
    """A headed table a suite, and one of the ceilings."""
    parts = [f"### {suite}\n\n{_suite_table(found)}" for suite, found in rows.groupby("suite", sort=False)]
    ceilings = _ceilings_table(rows)
    return "\n\n".join(
        [*parts, f"### Ceilings of {', '.join(rows['suite'].unique())}\n\n{ceilings}"] if ceilings else parts
    )


def _suite_table(rows: pd.DataFrame) -> str:
    """Rows: maps and implementations; cells: one figure a state of memory."""
    keys, step = ["case", "peer"], one_pass(rows)
    columns = {
        "forward ms": by_state(one_pass(rows, "forward"), keys, lambda row: marked(number(row["ms"], 2), row)),
        "forward + backward ms": by_state(step, keys, lambda row: marked(number(row["ms"], 2), row)),
        "× eager": by_state(step, keys, lambda row: number(row["vs_baseline"], 1)),
        "GB/s": by_state(step, keys, lambda row: number(row["gb_s"], 1)),
        "% of ceiling": by_state(step, keys, lambda row: number(row["ceiling_percent"], 0)),
    }
    states = states_in(rows["state"])
    shown = f" {' / '.join(states)}" if len(states) > 1 else ""
    header = ["map", "implementation", *(f"{name}{shown}" for name in columns), "MB"]
    peaks, failed = step.groupby(keys)["peak_mb"].first(), set(map(tuple, step[step["status"] != "ok"][keys].values))
    unmeasured, lines = " / ".join([ABSENT] * len(states)), []
    for case in rows["case"].unique():
        for index, peer in enumerate(rows["peer"].unique()):
            cells = [column.get((case, peer), unmeasured) for column in columns.values()]
            cells = [cells[0], "", "", "", "", ""] if (case, peer) in failed else [*cells, _peak(peaks, (case, peer))]
            lines.append(["" if index else case, f"`{peer}`", *cells])
    return table(header, lines)


def _peak(peaks: pd.Series, key: object) -> str:
    return number(peaks.get(key, float("nan")), 0)


def _ceilings_table(rows: pd.DataFrame) -> str:
    names = [*CEILINGS, "copy_to_new_page_faults", "rounds"]
    first = rows.reindex(columns=[*PLACE, *names]).groupby(PLACE, sort=False).first().dropna(subset="sum_gb_s")
    lines = [[*place, *(number(x, 0).replace(ABSENT, "") for x in found)] for place, found in first.iterrows()]
    rates = [f"{name} {unit}" for name, unit in CEILINGS.values()]
    header = ["suite", "map", "memory", *rates, "page faults of the copy into new memory", "rounds"]
    return table(header, lines) if lines else ""


def comparisons(rows: pd.DataFrame) -> str:
    """fbkd_ops beside the others, one line for each map."""
    lines = []
    for (suite, case), found in one_pass(rows).groupby(["suite", "case"], sort=False):
        states = states_in(found["state"])
        memory = f", {state_text(states)}" if states != ["default"] else ""
        lines.append(f"- `{suite}`, {case}{memory}: {_comparison(found)}.")
    return "\n".join(lines)


def _comparison(step: pd.DataFrame) -> str:
    if problem := _problem(step[step["peer"] == OURS]):
        return f"`{OURS}` {problem}"
    parts = []
    for peer, rows in step[step["peer"] != OURS].groupby("peer", sort=False):
        if problem := _problem(rows):
            parts.append(f"`{peer}` {problem}")
        elif rows["state"].nunique() == step["state"].nunique():
            share = share_of_memory(step, peer)
            parts.append(f"{speeds(step, peer)} times as fast as `{peer}`" + (f" in {share}" if share else ""))
    return ", ".join(parts or ["nothing to compare with"])


def _problem(rows: pd.DataFrame) -> str:
    """Why a peer has no figures in one of the measured states; empty if it has them in all."""
    return next((status for status in rows["status"] if status != "ok"), "")


def speeds(step: pd.DataFrame, peer: str) -> str:
    """How many times as fast as a peer fbkd_ops is on one map, forward and backward, in each state of memory."""
    found = step[step["peer"].isin([peer, OURS])]
    return _problem(found) or by_state(found, ["peer"], lambda row: number(row["speed"], 1))[peer]


def share_of_memory(step: pd.DataFrame, peer: str) -> str:
    """The memory of fbkd_ops beside a peer's; nothing below 1 MB, what the system counts is no finer."""
    peaks = step.groupby("peer")["peak_mb"].first()
    ours, other = peaks[OURS], peaks[peer]
    if _problem(step[step["peer"].isin([peer, OURS])]) or not min(ours, other) >= 1:
        return ""
    if max(ours, other) < 1.1 * min(ours, other):
        return "as much memory"
    return f"1/{other / ours:.1f} of the memory" if ours < other else f"{ours / other:.1f} times the memory"


def growth_table(rows: pd.DataFrame) -> str:
    """How time grows from each map to the next larger one, without pooling; empty without two of them."""
    groups = list(series(one_pass(rows[rows["strides"].str.fullmatch("1( 1)*")]), "H·W"))
    if not groups:
        return ""
    lines, peers = [], pd.concat(groups)["peer"].unique()
    for (suite, state), found in (each for group in groups for each in group.groupby(["suite", "state"], sort=False)):
        wide = found.pivot(index=["size", "height", "width"], columns="peer", values="ms").reindex(columns=peers)
        growth = wide / wide.shift(1)
        for before, place in itertools.pairwise(wide.index):
            sizes = " → ".join(f"{height}x{width}" for _, height, width in (before, place))
            factors = [number(growth.at[place, peer], 1) for peer in peers]
            lines.append([suite, sizes, state, f"{place[0] / before[0]:.1f}", *factors])
    return table(["suite", "map", "memory", "× pixels", *(f"× time of `{peer}`" for peer in peers)], lines)


def sweep_table(rows: pd.DataFrame) -> str:
    """Series in which one size changes: fbkd_ops' time and memory, and how many times as fast it is as others."""
    step, lines = one_pass(rows), []
    peers, states = [peer for peer in rows["peer"].unique() if peer != OURS], states_in(rows["state"])
    for dimension in DIMENSIONS:
        for found in series(step, dimension):
            keys, sizes = ["size", "peer"], found["size"].unique()
            times = by_state(found, keys, lambda row: number(row["ms"], 1))
            ratios = by_state(found, keys, lambda row: marked(number(row["speed"], 2, "g"), row))
            peaks = found.groupby(keys)["peak_mb"].first()
            failed = set(map(tuple, found[found["status"] != "ok"][keys].values))
            for index, size in enumerate(sizes):
                cells = [times[size, OURS], _peak(peaks, (size, OURS))]
                for peer in peers:
                    peak = "" if (size, peer) in failed else _peak(peaks, (size, peer))
                    cells += [ratios.get((size, peer), " / ".join([ABSENT] * len(states))), peak]
                lines.append(["" if index else title_of(found, dimension), dimension, f"{size:,}", *cells])
    shown = f" {' / '.join(states)}" if len(states) > 1 else ""
    header = ["series", "size", "", f"`{OURS}` ms{shown}", f"`{OURS}` MB"]
    return table([*header, *(text for peer in peers for text in (f"× `{peer}`{shown}", "its MB"))], lines)


def slower_table(rows: pd.DataFrame) -> str:
    """A row for each pass in which a peer is faster, by peer."""
    lost = rows[[is_slower(peer, speed) for peer, speed in zip(rows["peer"], rows["speed"], strict=True)]]
    lines = [
        [f"`{row['peer']}`", *row[PLACE], PASSES[row["pass"]], f"{row['speed']:.2f}"]
        for _, row in lost.sort_values("peer", kind="stable").iterrows()
    ]
    header = ["faster", "suite", "map", "memory", "", "its time / that of `fbkd_ops`"]
    return table(header, lines) if lines else f"None: `{OURS}` is the fastest in every row."


KERNEL_COLUMNS = {
    "launches": "launches",
    "us": "µs",
    "predicted_us": "µs predicted",
    "dram_percent": "% of DRAM bandwidth",
    "l2_percent": "% of L2 bandwidth",
    "sm_percent": "% of the multiprocessors' rate",
    "warps_percent": "% of warps active",
}


def stage_tables(summary: dict) -> str:
    """What ``make gpu`` ran, the kernels that the profiler saw beside the model's, and those of each profile of ncu."""
    stages = summary["stages"]
    rows = [
        [name, entry["status"], str(entry.get("seconds", ABSENT)), _plain(entry.get("figures", {}))]
        for name, entry in stages.items()
    ]
    parts = [f"{machine(summary['environment'])}.", table(["stage", "status", "seconds", "figures"], rows)]
    titles = {"kernels": "A step of the whole loss, P2..P5, 16 images, bfloat16, by the profiler"}
    for name in ("smoke", "ncu", "kernels"):
        for profile, kernels in stages.get(name, {}).get("figures", {}).items():
            if isinstance(kernels, dict) and kernels:
                parts.append(f"{titles.get(profile, f'ncu, {profile}')}:\n\n{_kernel_table(kernels)}")
    return "\n\n".join(parts)


def _kernel_table(kernels: dict[str, dict]) -> str:
    columns = [name for name in KERNEL_COLUMNS if any(name in figures for figures in kernels.values())]
    shown = [[ABSENT if row.get(name) is None else str(row[name]) for name in columns] for row in kernels.values()]
    lines = [[f"`{kernel}`", *cells] for kernel, cells in zip(kernels, shown, strict=True)]
    return table(["kernel", *(KERNEL_COLUMNS[name] for name in columns)], lines)


def _plain(figures: dict) -> str:
    """The figures that are no tables of their own."""
    return ", ".join(f"{name} {value}" for name, value in figures.items() if not isinstance(value, (dict, list)))


def code_tables(facts: dict, rows: pd.DataFrame) -> str:
    """Tables of a result of benchmarks/code_report.py."""
    text = []
    for compiler, title in (("cuda", f"CUDA, nvcc {facts['nvcc']}:"), ("triton", f"Triton {facts['triton']}:")):
        found = rows[rows["compiler"] == compiler]
        text += [title, _code_table(found) if len(found) else "Nothing was built."]
    return "\n\n".join(text)


def _code_table(rows: pd.DataFrame) -> str:
    """Rows: kernels; cells: one figure an architecture, or one for all of them where they agree."""
    text = rows.astype(str)
    ends = zip(text["registers_min"], text["registers_max"], strict=True)
    text["registers"] = ["–".join(dict.fromkeys(pair)) for pair in ends]
    text["widest"] = text["widest_load"] + " (" + text["with_widest_load"] + ")"
    columns = ["instances", "registers", "spills", "stack", "shared", "widest"]
    cells = text.groupby("kernel", sort=False)[columns].agg(lambda x: x.iloc[0] if x.nunique() == 1 else " / ".join(x))
    header = ["instances", "registers", "spilling instructions", "stack", "shared memory", "widest load (in how many)"]
    archs = " / ".join(map(str, sorted(rows["arch"].unique())))
    return table([f"sm_{archs}", *header], [[f"`{kernel}`", *row] for kernel, row in cells.iterrows()])
