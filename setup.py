"""Builds fbkd_ops: the C++ part where there is a compiler, the CUDA part where nvcc and torch agree.

What a build needs is looked for before anything is compiled. A torch or setuptools that is too old ends the build with
one sentence; without a compiler, nvcc or the headers of Python or CUDA their part is left out, and the report says why.

Environment:
    FBKD_OPS_CUDA         0 leaves the CUDA part out, 1 makes a missing one an error; unset: built where possible
    TORCH_CUDA_ARCH_LIST  architectures of the CUDA part; default 7.5;8.0;9.0;10.0+PTX as far as nvcc knows them
    CUDA_HOME, CUDA_PATH  root of the toolkit; default: where nvcc on PATH says it lives
    CXX, MAX_JOBS         compiler and number of parallel compilations
"""

import glob
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "fbkd_ops"
STABLE_ABI = "2.10"  # as csrc/stable_abi.h says; an older torch is refused
DEFAULT_ARCHS = ("7.5", "8.0", "9.0", "10.0")
SETUPTOOLS = "77"  # as pyproject.toml says, which pip does not read without build isolation
CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")
INSTALL_HINT = "pip install torch ninja pybind11; pip install --no-build-isolation ."


def run(*command):
    """Output of a command, None if it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


def toolkit_root():
    """Root of the CUDA toolkit, None if there is none.

    nvcc's dry run prints where it really lives, which sees through wrapper scripts on PATH.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return named
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "/usr/local/cuda" if os.path.exists("/usr/local/cuda/bin/nvcc") else None
    here = re.search(r"^#\$ _HERE_=(.+)$", run(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull) or "", re.MULTILINE)
    bin_dir = here.group(1).strip() if here else os.path.dirname(os.path.realpath(nvcc))
    return os.path.dirname(os.path.normpath(bin_dir))


def nvcc_release(root):
    """nvcc's release as text ("13.0"), None if it does not run."""
    found = re.search(r"release (\d+\.\d+)", run(os.path.join(root, "bin", "nvcc"), "--version") or "")
    return found.group(1) if found else None


def default_archs(root):
    """The default architectures that this nvcc knows; PTX of the newest serves what comes after."""
    known = run(os.path.join(root, "bin", "nvcc"), "--list-gpu-arch") or ""
    archs = [arch for arch in DEFAULT_ARCHS if f"compute_{arch.replace('.', '')}" in known.split()]
    return ";".join(archs) + "+PTX" if archs else None


def import_torch():
    try:
        import torch
    except ImportError as error:
        message = f"fbkd_ops is built against the installed torch, and there is none ({error}). {INSTALL_HINT}"
        raise SystemExit(message) from None
    if release_of(torch.__version__) < release_of(STABLE_ABI):
        raise SystemExit(f"fbkd_ops needs torch {STABLE_ABI} or later, but torch {torch.__version__} is installed.")
    return torch


def release_of(version):
    """``(2, 10)`` of "2.10.0+cu128"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def missing_for_cpu():
    """Why the C++ part cannot be built, None if it can."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler!r} is not on PATH; set CXX)"
    if run(compiler, "--version") is None:
        return f"no working C++ compiler ({compiler!r} --version fails; set CXX)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"no Python.h in {headers} (install Python's headers: python3-dev or python3-devel)"
    return None


def require_setuptools():
    if release_of(setuptools.__version__) < release_of(SETUPTOOLS):
        raise SystemExit(
            f"fbkd_ops needs setuptools {SETUPTOOLS} or later to build, but {setuptools.__version__} is installed: "
            f'pip install "setuptools>={SETUPTOOLS}"'
        )


def require_torch_headers(torch):
    """Refuse a torch without a header that the sources include, as a release candidate of the oldest one may be."""
    include = Path(torch.__file__).parent / "include"
    texts = [(ROOT / path).read_text() for path in sources("csrc/*.*", "csrc/*/*.*")]
    wanted = {header for text in texts for header in re.findall(r"#include <(torch/[^>]+)>", text)}
    missing = sorted(header for header in wanted if not (include / header).exists())
    if missing:
        raise SystemExit(
            f"fbkd_ops needs the headers of torch {STABLE_ABI} or later, but torch {torch.__version__} has no "
            f"{', '.join(missing)} in {include}."
        )


def missing_for_cuda(torch, root):
    """Why the CUDA part cannot be built, None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if root is None:
        return "no CUDA toolkit (nvcc is not on PATH; set CUDA_HOME)"
    release = nvcc_release(root)
    if release is None:
        return f"no working nvcc in {root}/bin"
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {release} but torch {torch.__version__} is built with CUDA {torch.version.cuda}"
    folders = [Path(root, "include"), *Path(root, "targets").glob("*/include")]
    missing = [name for name in CUDA_HEADERS if not any((folder / name).exists() for folder in folders)]
    if missing:
        return f"no {', '.join(missing)} in {root}/include (the toolkit's runtime headers are not installed)"
    return None


def plan(torch, root):
    """What is built, what is left out and why, as the report that the package carries."""
    choice = os.environ.get("FBKD_OPS_CUDA")
    if choice not in (None, "0", "1"):
        raise SystemExit(f"FBKD_OPS_CUDA must be 0, 1 or unset, got {choice!r}")
    left_out = {}
    no_cpu = missing_for_cpu()
    no_cuda = no_cpu or missing_for_cuda(torch, root)
    if choice == "1" and no_cuda:
        raise SystemExit(f"FBKD_OPS_CUDA=1 but the CUDA part cannot be built: {no_cuda}")
    if no_cpu:
        left_out["cpu"] = no_cpu
    else:
        require_torch_headers(torch)
    if choice == "0":
        left_out["cuda"] = "FBKD_OPS_CUDA=0"
    elif no_cuda:
        left_out["cuda"] = no_cuda
    built = [part for part in ("cpu", "cuda") if part not in left_out]
    return {
        "built": built,
        "left_out": left_out,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "stable_abi": STABLE_ABI,
        "python": f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}",
        "nvcc": nvcc_release(root) if root else None,
        "cuda_home": root,
        "archs": os.environ.get("TORCH_CUDA_ARCH_LIST") if "cuda" in built else None,
    }


def sources(*patterns):
    found = [path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT)]
    return sorted(found)


def without_torch_python(extension):
    """The stable ABI lives in libtorch; libtorch_python would tie the library to one torch and one Python."""
    extension.libraries = [name for name in extension.libraries if name != "torch_python"]
    return extension


def extensions(report):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    host = ["-O3", "-fopenmp-simd", "-ffp-contract=off", "-fvisibility=hidden"]
    headers = sources("csrc/*.h", "csrc/*/*.h", "csrc/cuda/*.cuh")
    result = []
    if "cpu" in report["built"]:
        facts = [f'-DFBKD_OPS_STABLE_ABI="{STABLE_ABI}"']
        if "cuda" in report["built"]:
            facts += [f'-DFBKD_OPS_CUDA_VERSION="{report["nvcc"]}"', f'-DFBKD_OPS_ARCHS="{report["archs"]}"']
        result.append(
            CppExtension(
                f"{PACKAGE}._C",
                sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
                extra_compile_args=host + facts,
                depends=headers,
            )
        )
    if "cuda" in report["built"]:
        result.append(
            CUDAExtension(
                f"{PACKAGE}._cuda",
                sources("csrc/cuda/*.cu"),
                extra_compile_args={"cxx": host, "nvcc": ["-O3", "--threads=2", "-Xptxas=-v", "-DUSE_CUDA"]},
                depends=headers,
            )
        )
    return [without_torch_python(extension) for extension in result]


def summary(report):
    lines = [f"fbkd_ops: building for torch {report['torch']}, {report['python']}"]
    lines += [f"fbkd_ops: building the {part} part" for part in report["built"]]
    lines += [f"fbkd_ops: leaving out the {part} part: {why}" for part, why in report["left_out"].items()]
    if "cuda" in report["built"]:
        archs = report["archs"] or "of the visible GPUs"
        lines.append(f"fbkd_ops: nvcc {report['nvcc']} in {report['cuda_home']}, architectures {archs}")
    return "\n".join(lines)


def remove_libraries(folder):
    """Libraries of an earlier build, which a build without that part would otherwise ship."""
    for pattern in ("_C*.so", "_cuda*.so"):
        for path in Path(folder).glob(pattern):
            path.unlink()


class BuildPython(build_py):
    """Writes the report that `python -m fbkd_ops.info` reads."""

    def run(self):
        print(summary(REPORT), file=sys.stderr)
        folder = (ROOT / "src" if self.editable_mode else Path(self.build_lib)) / PACKAGE
        remove_libraries(folder)
        super().run()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_report.json").write_text(json.dumps(REPORT, indent=2) + "\n")


require_setuptools()
toolkit = toolkit_root()
if toolkit is not None:
    os.environ["CUDA_HOME"] = toolkit  # torch.utils.cpp_extension reads it when it is imported
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(toolkit) or ""
REPORT = plan(import_torch(), toolkit)

commands = {"build_py": BuildPython}
if REPORT["built"]:
    from torch.utils.cpp_extension import BuildExtension

    commands["build_ext"] = BuildExtension

setup(ext_modules=extensions(REPORT) if REPORT["built"] else [], cmdclass=commands)
