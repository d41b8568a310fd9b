"""What is built, what runs and why, and where the documentation is: ``python -m fbkd_ops``."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from . import __version__, _extension, backends

__all__ = ["report"]


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return triton.__version__


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none visible"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def _versions() -> Iterator[tuple[str, str]]:
    yield "fbkd_ops", __version__
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    yield "triton", _triton_version()
    yield "gpu", _gpus()


def _build() -> Iterator[tuple[str, str]]:
    report = _extension.build_report()
    if not report:
        yield "build", "setup.py has not run on this copy of the package"
        return
    yield "built", ", ".join(report["built"]) or "nothing: pure Python"
    for part, why in report["left_out"].items():
        yield f"no {part}", why
    yield "against", f"torch {report['torch']}, for torch {report['stable_abi']} and later (its stable ABI)"
    facts = _extension.build_facts()
    if "nvcc" in report:
        yield "nvcc", f"{report['nvcc']}, architectures {facts['archs']}"
    if facts:
        yield "compiler", f"{facts['compiler']}, {facts['flags']}"
    if "clone" in facts:
        yield "vectors", f"clones for {facts['clone']} run on this CPU"


def _libraries() -> Iterator[tuple[str, str]]:
    yield "cpu library", _extension.cpu.status
    yield "cuda library", _extension.cuda.status


def _documentation() -> Iterator[tuple[str, str]]:
    """Yield the pages of a source tree, and the addresses that pyproject.toml names."""
    pages = Path(__file__).resolve().parents[2] / "docs"
    if (pages / "architecture.md").exists():
        yield "docs", str(pages)
    for name, address in _addresses():
        yield name.lower(), address
    yield "help", "help(fbkd_ops.FBKDLoss), help(fbkd_ops.Distiller), help(fbkd_ops.functional)"


def _addresses() -> list[tuple[str, str]]:
    try:
        urls = importlib.metadata.metadata("fbkd_ops").get_all("Project-URL", [])
    except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
        return []
    return [(name, address) for name, _, address in (url.partition(", ") for url in urls)]


def _choice(function: str, device: str) -> tuple[str, str]:
    """Backend of a call on a device under "auto", and why it is not the first choice."""
    backend = backends.automatic(function, device)
    first = device if device in backends.FUNCTIONS[function] else backend
    return backend, "" if backend == first else backends.available(first, device)


def _choices() -> Iterator[tuple[str, str, str]]:
    yield "function", "device", "backend"
    for function in backends.FUNCTIONS:
        for device in ("cpu", "cuda"):
            backend, reason = _choice(function, device)
            yield function, device, f"{backend}  ({reason})" if reason else backend


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a line per row, with columns as wide as their longest text."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def report() -> str:
    """Return the whole report as text."""
    pairs = [*_versions(), *_build(), *_libraries(), *_documentation()]
    return "\n".join([*_aligned(pairs), "", *_aligned(_choices())])


if __name__ == "__main__":
    print(report())
