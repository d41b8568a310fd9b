"""What the README's commands take in time and disk: each is run once, in this order, in a fresh clone.

    python benchmarks/commands.py [--json benchmarks/results/cpu-commands.json]

Needs git, make, Python and a package index, and about 15 GB for the clone's environment and pip's cache.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "make venv": "environment, PyTorch, build (the first of the commands does this)",
    "make test": "every test that needs no GPU",
    "make demo": "teacher, plain and distilled student, report",
}


def minutes_of(command: str, folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, shell=True, cwd=folder, check=True)
    return (time.perf_counter() - start) / 60


def disk_gb(folder: Path) -> float:
    done = subprocess.run(["du", "-s", "--block-size=1M", folder], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) / 1e3


def revision() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure() -> dict:
    with tempfile.TemporaryDirectory() as parent:
        clone = Path(parent) / "fbkd_ops"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        rows = []
        for command, note in COMMANDS.items():
            minutes = minutes_of(command, clone)
            rows.append({"command": command, "minutes": round(minutes, 2), "note": note})
        gigabytes = disk_gb(clone / ".venv")
    machine = f"{os.cpu_count()} CPU cores without a GPU (Python {platform.python_version()})"
    where = f"Measured once, in a fresh clone, on {machine}."
    return {"where": where, "revision": revision(), "rows": rows, "venv_gb": round(gigabytes, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    result = measure()
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
