"""Fills the generated blocks of README.md and docs/*.md from the code and from committed results.

A block stands between ``<!-- name -->`` and ``<!-- /name -->``. ``--check`` changes nothing and exits with 1 where a
file is out of date.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from fbkd_ops.presets import PRESETS, TERMS, default_num_levels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
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


def attention_pool() -> str:
    path = RESULTS / "cpu-attention_pool.json"
    if not path.exists():
        return "Not yet measured."
    result = json.loads(path.read_text())
    rows = []
    for case, ms in result["median_ms"].items():
        forward, backward = (f"{ms[name]:.2f}" for name in ("fbkd_ops", "bwd"))
        ratios = (ms["eager"] / ms["fbkd_ops"], ms["fbkd_ops"] / ms["x.sum()"], ms["eager bwd"] / ms["bwd"])
        rows.append([case, forward, *(f"{ratio:.1f}" for ratio in ratios[:2]), backward, f"{ratios[2]:.1f}"])
    header = ["1×256 channels", "forward ms", "eager / ours", "ours / `x.sum()`", "backward ms", "eager / ours"]
    where = f"{result['where']}, torch {result['torch']}, medians of {result['rounds']} interleaved rounds."
    return f"{where}\n\n" + table(header, rows)


BLOCKS = {block.__name__: block for block in (presets, normalization, commands, attention_pool)}


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
