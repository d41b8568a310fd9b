"""Loads the compiled libraries and remembers why one is missing or broken.

``_C`` has the CPU kernels, ``_cuda12`` and ``_cuda13`` the CUDA kernels for a torch of that major version of CUDA. They
are apart because only such a torch has the symbols that they need. ``_build`` has no kernels but the facts of a build
from source, which a wheel for every Python goes without.
"""

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from . import _hub

__all__ = ["Library", "REBUILD", "build_facts", "build_report", "cpu", "cuda"]

REBUILD = "pip install --force-reinstall --no-deps . (in the source tree of fbkd_ops)"
_FOLDER = Path(__file__).resolve().parent


class Library(NamedTuple):
    """State of one compiled part; ``status`` is "loaded ...", "not built: ...", "not usable: ..." or "broken: ..."."""

    loaded: bool
    status: str


def build_report() -> dict:
    """Return what setup.py built and left out, and why; empty if it never ran."""
    path = _FOLDER / "_build_report.json"
    return json.loads(path.read_text()) if path.exists() else {}


def build_facts() -> dict:
    """Return compiler, flags, architectures and clone of the module ``_build``, else those that the report has."""
    try:
        return importlib.import_module(f"{__package__}._build").facts()
    except ImportError:
        report = build_report()
        return {name: report[name] for name in ("compiler", "flags", "archs") if name in report}


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)))


def _mismatch(report: dict) -> str:
    """Explain a failed load by what differs between the build and this process."""
    notes = []
    if "torch" in report and report["torch"] != torch.__version__:
        notes.append(f"built against torch {report['torch']}, running torch {torch.__version__}")
    if "stable_abi" in report and _version(torch.__version__) < _version(report["stable_abi"]):
        notes.append(f"the stable ABI of torch {report['stable_abi']} is needed")
    return f" ({'; '.join(notes)})" if notes else ""


def _files(name: str) -> list[Path]:
    return sorted(path for suffix in ("so", "pyd", "dylib") for path in _FOLDER.glob(f"{name}.*{suffix}"))


def _absent(part: str, report: dict) -> Library:
    if not report:
        return Library(False, "not built: setup.py has not run on this copy of the package")
    why = report["left_out"].get(part, "setup.py meant to build it, but the library is missing")
    return Library(False, f"not built: {why}")


def _broken(part: str, error: object, report: dict) -> Library:
    status = f"broken: {error}{_mismatch(report)}"
    warnings.warn(
        f"the compiled {part} part of fbkd_ops does not load, slower code runs instead. {status}. "
        f"Rebuild it: {REBUILD}",
        RuntimeWarning,
        stacklevel=2,
    )
    return Library(False, status)


def _load_cpu(report: dict) -> Library:
    files = _files("_C")
    if not files:
        return _absent("cpu", report)
    try:
        importlib.import_module(f"{__package__}._C")
    except ModuleNotFoundError:
        names = ", ".join(path.name for path in files)
        return _broken("cpu", f"{names} is not for this Python ({sys.implementation.cache_tag})", report)
    except (ImportError, OSError) as error:
        return _broken("cpu", error, report)
    return Library(True, "loaded")


def _load_cuda(report: dict) -> Library:
    files = {path.name.partition(".")[0]: path for path in _files("_cuda[0-9]*")}
    if not files:
        return _absent("cuda", report)
    if not cpu.loaded:
        return Library(False, f"not usable: it needs the cpu part, which is {cpu.status}")
    if torch.version.cuda is None:
        return Library(False, f"not usable: torch {torch.__version__} is built without CUDA")
    name = f"_cuda{torch.version.cuda.partition('.')[0]}"
    if name not in files:
        built = " and ".join(each.removeprefix("_cuda") for each in files)
        remedy = f"build again with the nvcc of CUDA {torch.version.cuda} (CUDA_HOME)"
        return Library(
            False, f"not usable: built for CUDA {built}, torch {torch.__version__} for {torch.version.cuda}; {remedy}"
        )
    try:
        torch.ops.load_library(str(files[name]))
    except (ImportError, OSError, RuntimeError) as error:
        return _broken("cuda", error, report)
    return Library(True, f"loaded: {files[name].name}, because torch is built for CUDA {torch.version.cuda}")


def _hub_libraries() -> tuple[Library, Library]:
    """Return the state of both parts in a build of kernel-builder, whose one library is loaded already."""
    loaded = Library(True, f"loaded: {_hub.NAMESPACE} of kernel-builder")
    absent = Library(False, "not built: kernel-builder built this copy for CPUs")
    return loaded, loaded if _hub.BACKEND == "cuda" else absent


_report = build_report()
if _hub.BACKEND:
    cpu, cuda = _hub_libraries()
else:
    cpu = _load_cpu(_report)
    cuda = _load_cuda(_report)
