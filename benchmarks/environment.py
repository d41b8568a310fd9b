"""Where a figure was measured."""

import datetime
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import mmrazor

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"cpu": ("csrc/cpu", "csrc/*.h"), "cuda": ("csrc/cuda", "csrc/*.h", "src/fbkd_ops/kernels")}
_REVISION_VARIABLE, _DIRTY = "FBKD_OPS_REVISION", "-dirty"  # for a copy without git: what this file prints where git is
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment(device: str, threads: int) -> dict:
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        "huge_pages": _HUGE_PAGES.read_text().strip() if _HUGE_PAGES.exists() else None,
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": mmrazor.versions(),
        "revision": revision(),
        "modified": modified(),
        "sources": sources(device),
    }
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver_version()}
    return facts


def revision() -> str | None:
    """The commit that the tree is of; None where neither FBKD_OPS_REVISION nor git says."""
    told = os.environ.get(_REVISION_VARIABLE, "").removesuffix(_DIRTY)
    return told or _output("git", "rev-parse", "--short", "HEAD")


def modified() -> bool | None:
    """Whether the tree differs from that commit, results and documentation apart; None where nobody says."""
    if told := os.environ.get(_REVISION_VARIABLE):
        return told.endswith(_DIRTY)
    changes = _output("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results", ":(exclude)docs")
    return None if changes is None else bool(changes)


def sources(device: str) -> str:
    """A digest of the device's kernels: a result with another one is older than they are."""
    return digest(ROOT, KERNELS[device])


def digest(root: Path, patterns: Iterable[str]) -> str:
    """A digest of the sources below a folder that the patterns match, and of those in the folders that they match."""
    found = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.suffix in (".h", ".cpp", ".cu", ".cuh", ".py"):
                    found.update(file.read_bytes())
    return found.hexdigest()[:12]


def driver_version() -> str | None:
    """Of the GPU's driver; None where nvidia-smi does not tell."""
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", path.read_text()) if path.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    print(f"{revision()}{_DIRTY if modified() else ''}")
