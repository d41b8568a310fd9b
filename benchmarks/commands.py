"""What the README's commands take in time and disk: each is run once, in this order, in a fresh clone.

    python -m benchmarks.commands --json benchmarks/results/cpu-commands.json [--only "make venv" "make test"]

Needs git, make, Python and a package index, and about 15 GB for the clone's environment and pip's cache. A command that
is left out keeps its row, with the revision that it was measured at.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.environment import ROOT, revision
from benchmarks.results import write_json

COMMANDS = {
    "make venv": "environment, PyTorch, build (the first of the commands does this)",
    "make test": "every test that needs no GPU",
    "make demo": "teacher, distilled and plain students, report",
    "make test-all": "the tests that take longer, too",
}
SUMMARY = re.compile(r"^\d+ (?:passed|failed).* in .*s.*$", re.MULTILINE)  # a line of pytest's


def measure(commands: list[str], earlier: list[dict]) -> dict:
    rows = {row["command"]: row for row in earlier}
    with tempfile.TemporaryDirectory() as parent:
        clone = Path(parent) / "fbkd_ops"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        for command in commands:
            start = time.perf_counter()
            done = subprocess.run(command, shell=True, cwd=clone, check=True, stdout=subprocess.PIPE, text=True)
            minutes = (time.perf_counter() - start) / 60
            row = {"command": command, "minutes": round(minutes, 1), "note": COMMANDS[command]}
            rows[command] = row | {"revision": revision(), "pytest": SUMMARY.findall(done.stdout)}
        size = subprocess.run(["du", "-s", "--block-size=1M", clone / ".venv"], capture_output=True, check=True).stdout
    machine = f"{os.cpu_count()} CPU cores without a GPU (Python {platform.python_version()})"
    where = f"Measured once, in a fresh clone, on {machine}."
    ordered = [rows[command] for command in COMMANDS if command in rows]
    return {"where": where, "rows": ordered, "venv_gb": round(int(size.split()[0]) / 1e3, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="all by default")
    options = parser.parse_args()
    earlier = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    write_json(options.json, measure(options.only, earlier))


if __name__ == "__main__":
    main()
