"""What happens in every way to install the package: each is tried in an environment of its own, with a call afterwards.

    python -m benchmarks.installs [--only WAY ...]

Needs the files of `make wheel`, uv, and nvcc. Rows of earlier runs stay where a run does not replace them.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from benchmarks.environment import revision
from benchmarks.results import write_json

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "installs"
DIST = ROOT / "build" / "wheel" / "dist"
CSV = ROOT / "benchmarks" / "results" / "installs.csv"

TORCH = "torch==2.14.1"
BUILD = ("ninja", "pybind11", "setuptools>=77")
# In a folder of its own: which parts are loaded, and that a call runs.
CALL = """
import torch, fbkd_ops
from fbkd_ops import _extension
fbkd_ops.functional.attention_pool(torch.ones(1, 2, 3, 4))
print(f"cpu: {_extension.cpu.status}; cuda: {_extension.cuda.status}")
"""
SAID = re.compile(
    r"^\s*(?:.*(?:SystemExit|Warning): )?(fbkd_ops (?:needs|is built|on)\b.*|TORCH_CUDA_ARCH_LIST=.*|cpu: .*)$",
    re.MULTILINE,
)


class Way(NamedTuple):
    """One way to install: what is there before, and the command that is timed."""

    name: str
    command: str
    before: tuple[str, ...] = (TORCH,)
    python: str = "3.11"
    variables: dict[str, str] = {}


def without_isolation(name, *before, **variables):
    command = "pip install --no-build-isolation ."
    return Way(name, command, before or (TORCH, *BUILD), variables={"FBKD_OPS_CUDA": "0", **variables})


WHEEL = "pip install --no-index --find-links DIST fbkd_ops"
WAYS = (
    Way("wheel", WHEEL),
    Way("wheel, PyTorch 2.10.0", WHEEL, ("torch==2.10.0",)),
    Way("wheel, PyTorch without CUDA", WHEEL, ("torch==2.13.0+cpu",)),
    Way("wheel, Python 3.12", WHEEL, python="3.12"),
    Way("pip", "pip install ."),
    Way("pip, from the sdist", "pip install DIST/fbkd_ops-*.tar.gz"),
    Way("uv", "uv pip install ."),
    Way("uv lock", "uv lock && test -s uv.lock && uv pip install .", variables={"FBKD_OPS_CUDA": "0"}),
    without_isolation("pip without build isolation", FBKD_OPS_CUDA="1"),
    without_isolation("built with a PyTorch without CUDA", "torch==2.13.0+cpu", *BUILD, FBKD_OPS_CUDA="1"),
    Way("editable", "pip install --no-build-isolation -e .", (TORCH, *BUILD), variables={"FBKD_OPS_CUDA": "0"}),
    without_isolation("no compiler", CXX="no-such-compiler"),
    without_isolation("a compiler that fails", CXX="false"),
    Way("no nvcc", "pip install --no-build-isolation .", (TORCH, *BUILD), variables={"CUDA_HOME": "/nonexistent"}),
    without_isolation("PyTorch 2.9.1", "torch==2.9.1", *BUILD),
    Way("PyTorch 2.9.1, isolated build", "pip install .", ("torch==2.9.1",)),
    # Later releases of PyTorch do not install beside it.
    without_isolation("setuptools 65", "torch==2.10.0", "ninja", "pybind11", "setuptools==65.5.0"),
    without_isolation("no PyTorch", *BUILD),
    without_isolation("an architecture that is none", FBKD_OPS_CUDA="1", TORCH_CUDA_ARCH_LIST="bogus"),
    Way("in the checkout, not built", "export PYTHONPATH=src"),
)


def run(command, folder, **variables):
    """Output of a shell command and its exit status."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, errors="replace"
    )
    return done.returncode, done.stdout + done.stderr


def source_tree(folder):
    """A copy of what git has of this tree."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def try_way(way):
    """A row of the result: the command, its seconds and exit status, and what it or the first call said."""
    environment = FOLDER / "venv"
    shutil.rmtree(environment, ignore_errors=True)
    source = source_tree(FOLDER / "source")
    uv = shutil.which("uv")
    for command in (
        [uv, "venv", "--quiet", "--seed", "--python", way.python, str(environment)],
        [uv, "pip", "install", "--quiet", "--python", str(environment / "bin/python"), "numpy", *way.before],
    ):
        subprocess.run(command, check=True)
    variables = {"PATH": f"{environment}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": str(environment), **way.variables}
    start = time.perf_counter()
    status, output = run(f"set -e; {way.command.replace('DIST', str(DIST))}", source, **variables)
    seconds = time.perf_counter() - start
    if status == 0:
        keep = f"{way.command}; " if way.command.startswith("export") else ""
        python = shlex.quote(CALL)
        status, called = run(f"{keep}python -W always -c {python}", source if keep else FOLDER, **variables)
        output += called
    said = SAID.findall(output)
    names = " ".join(f"{name}={value}" for name, value in way.variables.items())
    return {
        "way": way.name,
        "command": f"{names} {way.command}".strip(),
        "python": way.python,
        "before": " ".join(way.before),
        "seconds": round(seconds),
        "status": status,
        "said": "; ".join(dict.fromkeys(said)) or output.strip().splitlines()[-1],
        "revision": revision(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WAY", choices=[way.name for way in WAYS])
    options = parser.parse_args()
    if shutil.which("uv") is None or not list(DIST.glob("*.whl")):
        sys.exit("needs uv on PATH, and the files of make wheel")
    rows = pd.read_csv(CSV).to_dict("records") if CSV.exists() else []
    for way in WAYS:
        if options.only and way.name not in options.only:
            continue
        row = try_way(way)
        print(f"{row['way']}: {row['seconds']} s, status {row['status']}: {row['said']}", flush=True)
        rows = [other for other in rows if other["way"] != way.name] + [row]
        order = [each.name for each in WAYS]
        rows.sort(key=lambda each: order.index(each["way"]))
        pd.DataFrame(rows).to_csv(CSV, index=False)
        where = f"{os.cpu_count()} CPU cores without a GPU, with g++ and nvcc, beside other work"
        write_json(CSV.with_suffix(".json"), {"where": where})
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
