"""Triton kernels compiled beforehand, in parallel and for a GPU that need not be here: ``make gpu-cache``.

    python -m scripts.gpu.triton_cache build/triton-cache [--arch 90] [--processes 16]

What has to be compiled is found by the calls that ``make gpu`` makes later, on CPU tensors: a launch notes what it
would compile, and launches nothing. Triton then compiles into its own cache, one folder a kernel below the given one.

A folder's name is a digest of the kernel, its options, the GPU's architecture, ptxas, Triton's own files and those
TRITON_ variables that change code. A cache so serves every machine that has the same wheel of Triton, hence the same
Python version, and the same sources of this package. PyTorch, the path of the checkout and the GPU do not matter.
Triton's launchers, which up to 3.6 are compiled C, are made too.
"""

import argparse
import contextlib
import ctypes.util
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

ARCH = 90
GROUP = "__grp__"  # how Triton's file begins that lists an entry's other files
BENCHMARKED = ("fbkd_loss", "relation", "non_local", "adapted_masked_l2", "attention_pool", "masked_l2")
BENCHMARKED += ("channel_correlation", "channel_divergence")
DTYPES = ("bfloat16", "float32")


class Compilation(NamedTuple):
    """A kernel and what Triton's own launch path hands to its compiler."""

    kernel: Any  # triton.JITFunction
    arguments: tuple


class Compiled(NamedTuple):
    kernel: str
    hit: bool  # it was in the cache
    problem: str  # empty if there is none


def entries(folder: Path) -> dict[str, str]:
    """Names of the cache's folders that hold a kernel, and the kernels' names. Those of torch.compile do not count."""
    files = (path for path in folder.glob("*/*.json") if not path.name.startswith(GROUP))
    return {path.parent.name: path.stem for path in files if not path.stem.startswith("triton_")}


def relocate(folder: Path) -> int:
    """Make a cache usable that was moved or trimmed: its lists of files are of absolute paths that must be there.

    Returns how many lists have changed.
    """
    changed = 0
    for path in folder.glob(f"*/{GROUP}*.json"):
        files = json.loads(path.read_text())["child_paths"]
        here = {name: str(path.parent / name) for name in files if (path.parent / name).exists()}
        if here != files:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"child_paths": here}))
            partial.replace(path)
            changed += 1
    return changed


def trim(folder: Path) -> None:
    """Remove what is only there to be read: two thirds of the cache."""
    for path in folder.glob("*/*.source"):
        path.unlink()
    relocate(folder)


def needed(calls: Iterable[Callable[[], object]], most: int | None = None) -> list[Compilation]:
    """What the launches in the calls would compile, each once; nothing is compiled or launched."""
    from triton.runtime.jit import JITFunction

    found = {}

    def note(kernel, key, *arguments) -> None:
        """Triton launches nothing where its compiler returns nothing."""
        found.setdefault((kernel, key), Compilation(kernel, (key, *arguments)))

    with mock.patch.object(JITFunction, "_do_compile", note):
        for call in calls:
            if most is not None and len(found) >= most:
                break
            call()
    return list(found.values())[:most]


def calls() -> Iterator[Callable[[], object]]:
    """Everything that ``make gpu`` launches with Triton, tests apart. The number of images changes no kernel."""
    from benchmarks import code_report
    from benchmarks.inputs import LEVELS, Case
    from benchmarks.suites import SUITES
    from scripts.gpu import op_calls

    yield from code_report.launches()
    for name, dtype in itertools.product(BENCHMARKED, DTYPES):
        suite = SUITES[name]
        case = Case(LEVELS["P2"], dtype, strides=suite.strides(LEVELS["P2"]))
        for shaped in dict.fromkeys((case, case.checked)):
            yield lambda suite=suite, case=shaped: passes(suite, case)
    for dtype in DTYPES:
        maps = [op_calls.features((1, *op_calls.SIZES["large"][1:]), getattr(torch, dtype), op_calls.contiguous, "cpu")]
        yield lambda maps=maps: op_calls.small("triton", "cpu", maps)
    yield lambda: op_calls.small("triton", "cpu", op_calls.small_features("triton", "cpu"))


def passes(suite, case) -> None:
    """The benchmark's passes of every implementation of this package."""
    from benchmarks.measurement import Runner

    for name, make in suite.implementations.items():
        if name.startswith("fbkd_ops"):
            runner = Runner(make(case), suite.inputs(case))
            runner.step()
            runner.forward()


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Triton's kernels take CPU tensors, and the benchmark's maps are memory that nobody fills."""
    from benchmarks.inputs import LAYOUTS, Case
    from fbkd_ops import backends

    def features(case, seed: int, level: int = 0) -> torch.Tensor:
        layout = LAYOUTS[case.layout]
        return torch.empty(case.shapes[level], dtype=getattr(torch, case.dtype), memory_format=layout)

    with (
        mock.patch.object(backends, "_triton_obstacle", lambda device: ""),
        mock.patch.object(Case, "features", features),
        backends.use_backend("triton"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of values that are not finite
        yield


_compilations: list[Compilation] = []  # of this process, which its children inherit


def compile_all(compilations: list[Compilation], processes: int) -> list[Compiled]:
    """Compile in as many processes; what the cache has is not compiled again."""
    _compilations[:] = compilations
    with linkable_driver(), multiprocessing.get_context("fork").Pool(processes) as pool:
        return list(pool.imap_unordered(compile_one, range(len(compilations))))


@contextlib.contextmanager
def linkable_driver() -> Iterator[None]:
    """A library for launchers to be linked with, in place of the GPU's driver where there is none."""
    known = ctypes.util.find_library("cuda") or os.environ.get("TRITON_LIBCUDA_PATH")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if known or not compiler:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        name = "libcuda.so.1"
        command = [compiler, "-shared", f"-Wl,-soname,{name}", "-x", "c", os.devnull, "-o", f"{folder}/{name}"]
        subprocess.run(command, check=True)
        logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)  # launchers cannot be loaded here
        with mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": folder}):
            yield


def compile_one(index: int) -> Compiled:
    from triton import knobs

    compilation, hits = _compilations[index], []
    knobs.compilation.listener = lambda **facts: hits.append(facts["cache_hit"])
    name = compilation.kernel.__name__
    try:
        make_launcher(compilation.kernel._do_compile(*compilation.arguments))
    except Exception as error:
        return Compiled(name, False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return Compiled(name, hits == [True], "")


def make_launcher(kernel: Any) -> None:
    """Compile the C code that launches a kernel, where Triton has such. It cannot be loaded without a driver."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(ImportError):
            driver.CudaLauncher(kernel.src, kernel.metadata)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu.triton_cache", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the cache: what TRITON_CACHE_DIR is set to")
    parser.add_argument("--arch", type=int, default=ARCH, help="of the GPU: 90 for 9.0, an H100 or H200")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--most", type=int, help="compile no more than these, for a trial")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Read by Triton at each compilation, and by this package at its import.
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1", "TRITON_INTERPRET": "0"}
    moved = relocate(folder)
    from benchmarks.code_report import use_target

    use_target(options.arch)
    with on_the_cpu():
        compilations = needed(calls(), options.most)
    made = compile_all(compilations, options.processes)
    trim(folder)
    problems = [f"{each.kernel}: {each.problem}" for each in made if each.problem]
    hits = sum(each.hit for each in made)
    figures = {"kernels": len(made), "hits": hits, "compiled": len(made) - hits - len(problems), "moved": moved}
    print("\n".join(problems))
    print(json.dumps(figures | {"megabytes": round(size_of(folder) / 1e6, 1)}))
    return 1 if problems else 0


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
