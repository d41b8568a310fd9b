"""Shared test set-up. Without a GPU the Triton kernels run in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by Triton when a kernel is defined, so before anything imports one.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def triton_compiler(arch: int, cache: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.code_report", "--compile-for", str(arch)],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.nice(10),  # the tests go first
    )


@pytest.fixture(scope="session", autouse=True)
def triton_compilers(request, tmp_path_factory):
    """By architecture, a process that compiles the Triton kernels for it. That takes minutes, so it begins at once,
    beside the tests before those that wait for it; where none does, there are no processes."""
    processes = {}
    if any("triton_instances" in item.fixturenames for item in request.session.items):
        from benchmarks.code_report import ARCHS

        processes = {arch: triton_compiler(arch, tmp_path_factory.mktemp(f"sm_{arch}")) for arch in ARCHS}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
