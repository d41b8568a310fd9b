"""Builds fbkd_ops: the C++ part where there is a compiler, the CUDA part where there is nvcc too.

What a build needs is looked for before anything is compiled. A torch or setuptools that is too old ends the build with
one sentence; without a working compiler, nvcc or the headers of Python or CUDA their part is left out, and the report
says why. Every library keeps to the stable ABI of torch and to Python's limited API, so that any torch can build it,
one without CUDA too. The CUDA part that fits the running torch is chosen when the package is imported.

Environment:
    FBKD_OPS_CUDA         0 leaves the CUDA part out, 1 makes a missing one an error; unset: built where possible
    FBKD_OPS_WHEEL        1 for a wheel that serves every Python from 3.10 on, without the module of the build's facts
    TORCH_CUDA_ARCH_LIST  architectures of the CUDA part; default 7.5;8.0;9.0;10.0+PTX as far as nvcc knows them
    CUDA_HOME, CUDA_PATH  root of the toolkit; default: where nvcc on PATH says it lives
    CXX, MAX_JOBS         compiler and number of parallel compilations
"""

import glob
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "fbkd_ops"
STABLE_ABI = "2.10"  # as csrc/stable_abi.h says; an older torch is refused
OLDEST_CUDA = 12
DEFAULT_ARCHS = ("7.5", "8.0", "9.0", "10.0")
SETUPTOOLS = "77"  # as pyproject.toml says, which pip does not read without build isolation
CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")
INSTALL_HINT = (
    "`pip install .` brings one for the build; without build isolation, first `pip install torch ninja pybind11 "
    f'"setuptools>={SETUPTOOLS}"`, then `pip install --no-build-isolation .`'
)
HOST_FLAGS = ("-std=c++20", "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fvisibility=hidden")
NVCC_FLAGS = ("-std=c++20", "-O3", "--threads=2", "-Xptxas=-v", "-DUSE_CUDA")
LIMITED_API = "-DPy_LIMITED_API=0x030A0000"  # as torch defines it; free-threaded Pythons refuse it


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
    archs = [arch for arch in DEFAULT_ARCHS if arch in known_architectures(root)]
    return ";".join(archs) + "+PTX" if archs else None


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"fbkd_ops is built against a torch, and there is none ({error}): {INSTALL_HINT}") from None
    for version in (torch.__version__, *environment_torch()):
        if release_of(version) < release_of(STABLE_ABI):
            raise SystemExit(
                f"fbkd_ops needs torch {STABLE_ABI} or later, with build isolation and without, but torch {version} is "
                f'installed: pip install "torch>={STABLE_ABI}"'
            )
    return torch


def environment_torch():
    """Versions of torch in the environment that pip installs into, where an isolated build has a torch of its own."""
    folders = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    return [found.version for found in importlib.metadata.distributions(name="torch", path=folders)]


def release_of(version):
    """``(2, 10)`` of "2.10.0+cu128"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def cxx():
    """The C++ compiler and the arguments that CXX has for it."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def missing_for_cpu():
    """Why the C++ part cannot be built, None if it can."""
    compiler = cxx()
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler ({compiler[0]!r} is not on PATH; set CXX)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"no Python.h in {headers} (install Python's headers: python3-dev or python3-devel)"
    code = "#include <Python.h>\n#include <vector>\nint probe() { return std::vector<int>{1}[0]; }\n"
    variables = [flag for name in ("CFLAGS", "LDFLAGS") for flag in shlex.split(os.environ.get(name, ""))]
    command = [*compiler, "-fPIC", *HOST_FLAGS, LIMITED_API, f"-I{headers}", *variables]
    error = first_error(command, "probe.cpp", code)
    return error and f"no working C++ compiler ({shlex.join(compiler)!r} fails: {error}; set CXX)"


def first_error(command, name, code):
    """First error of a compiler that makes a small library of a source, None if it makes it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, name)
        source.write_text(code)
        command = [*command, "-shared", str(source), "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return None
    lines = (done.stderr + done.stdout).splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {done.returncode}")


def require_setuptools():
    if release_of(setuptools.__version__) < release_of(SETUPTOOLS):
        raise SystemExit(
            f"fbkd_ops needs setuptools {SETUPTOOLS} or later to build, but {setuptools.__version__} is installed: "
            f'pip install "setuptools>={SETUPTOOLS}", or leave out --no-build-isolation'
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
    if getattr(torch.version, "hip", None):
        return f"torch {torch.__version__} is built for ROCm"
    if root is None:
        return "no CUDA toolkit (nvcc is not on PATH; set CUDA_HOME)"
    release = nvcc_release(root)
    if release is None:
        return f"no working nvcc in {root}/bin"
    if release_of(release)[0] < OLDEST_CUDA:
        return f"nvcc is {release}, and {OLDEST_CUDA} or later is needed"
    folders = [Path(root, "include"), *Path(root, "targets").glob("*/include")]
    missing = [name for name in CUDA_HEADERS if not any((folder / name).exists() for folder in folders)]
    if missing:
        return f"no {', '.join(missing)} in {root}/include (the toolkit's runtime headers are not installed)"
    nvcc = os.path.join(root, "bin", "nvcc")
    error = first_error([nvcc, "-std=c++20", "-Xcompiler=-fPIC"], "probe.cu", "__global__ void probe() {}\n")
    return error and f"no working nvcc in {root}/bin ({error})"


def variable(name, *values):
    """Value of an environment variable, None if it is unset."""
    value = os.environ.get(name)
    if value not in (None, *values):
        raise SystemExit(f"{name} must be {', '.join(values)} or unset, got {value!r}")
    return value


def known_architectures(root):
    """Those that this nvcc knows, as TORCH_CUDA_ARCH_LIST takes them; empty where it does not list them."""
    listed = run(os.path.join(root, "bin", "nvcc"), "--list-gpu-arch") or ""
    return [".".join(digits) for digits in re.findall(r"compute_(\d+)(\d)\b", listed)]


def require_architectures(root):
    """Refuse what torch or this nvcc does not know before anything is compiled."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    archs, known = os.environ["TORCH_CUDA_ARCH_LIST"], known_architectures(root)
    try:
        flags = " ".join(_get_cuda_arch_flags())
    except (ValueError, IndexError) as error:  # of a name that torch does not know, or of a GPU that is not there
        unknown = str(error)
    else:
        wanted = {".".join(digits) for digits in re.findall(r"code=(?:sm|compute)_(\d+)(\d)", flags)}
        unknown = ", ".join(sorted(wanted - set(known))) if known else ""
    if unknown:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST={archs!r} names what torch or nvcc {nvcc_release(root)} does not know ({unknown}). "
            f"nvcc has {', '.join(known)}; separate them by semicolons, +PTX after the newest serves later GPUs."
        )


def plan(torch, root):
    """What is built, what is left out and why, as the report that the package carries."""
    choice = variable("FBKD_OPS_CUDA", "0", "1")
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
    else:
        require_architectures(root)
    built = [part for part in ("cpu", "cuda") if part not in left_out]
    report = {"built": built, "left_out": left_out, "torch": torch.__version__, "stable_abi": STABLE_ABI}
    if built:
        version = run(*cxx(), "--version") or "unknown"
        report |= {"compiler": version.splitlines()[0], "flags": " ".join(HOST_FLAGS)}
        if pybind11_helpers() is None and not variable("FBKD_OPS_WHEEL", "1"):
            left_out["facts"] = "pybind11 is not installed"
    if "cuda" in built:
        report |= {"nvcc": nvcc_release(root), "archs": os.environ["TORCH_CUDA_ARCH_LIST"]}
    return report


def sources(*patterns):
    found = [path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT)]
    return sorted(found)


def extensions(report, root):
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = root  # a torch without CUDA looks for none
    options = {"py_limited_api": True, "depends": sources("csrc/*.h", "csrc/*/*.h", "csrc/cuda/*.cuh")}
    result = []
    if "cpu" in report["built"]:
        files = ["csrc/module.cpp", *sources("csrc/cpu/*.cpp")]
        result.append(
            cpp_extension.CppExtension(f"{PACKAGE}._C", files, extra_compile_args=list(HOST_FLAGS), **options)
        )
    if "cuda" in report["built"]:
        name = f"{PACKAGE}._cuda{release_of(report['nvcc'])[0]}"
        flags = {"cxx": list(HOST_FLAGS), "nvcc": list(NVCC_FLAGS)}
        result.append(cpp_extension.CUDAExtension(name, sources("csrc/cuda/*.cu"), extra_compile_args=flags, **options))
    return result


def pybind11_helpers():
    try:
        from pybind11 import setup_helpers
    except ImportError:
        return None
    return setup_helpers


def facts_extension(report):
    """The module with the build's facts, for this Python alone."""
    texts = {"FBKD_OPS_FLAGS": report["flags"], "FBKD_OPS_ARCHS": report.get("archs", "")}
    return pybind11_helpers().Pybind11Extension(
        f"{PACKAGE}._build",
        ["csrc/build_facts.cpp"],
        cxx_std=20,
        define_macros=[(name, f'"{text}"') for name, text in texts.items()],
        depends=["csrc/cpu/simd.h"],
    )


def build_extension_command(torch, report):
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        """Links the CUDA part without the CUDA libraries of torch, so that one of another CUDA, or of none, will do."""

        def run(self):
            if self.inplace:
                remove_libraries(ROOT / "src" / PACKAGE)
            super().run()
            if self.inplace:
                write_report(ROOT / "src" / PACKAGE)

        def build_extensions(self):
            for extension in self.extensions:
                if extension.name.startswith(f"{PACKAGE}._cuda"):
                    self.link_torch_cuda(extension)
            super().build_extensions()

        def link_torch_cuda(self, extension):
            torch.version.cuda = report["nvcc"]  # torch refuses an nvcc that differs from its own
            extension.libraries = [name for name in extension.libraries if name not in ("c10_cuda", "torch_cuda")]
            # Without --no-as-needed the linker drops a library that has none of the symbols, as the empty one.
            extension.extra_link_args.append("-Wl,--push-state,--no-as-needed,-ltorch_cuda,--pop-state")
            if not Path(torch.__file__).with_name("lib").joinpath("libtorch_cuda.so").exists():
                extension.library_dirs.append(self.empty_library("libtorch_cuda.so"))

        def empty_library(self, name):
            """Folder of a library without symbols, which stands in for one of a torch that has CUDA."""
            folder = Path(self.build_temp).resolve() / "empty"
            folder.mkdir(parents=True, exist_ok=True)
            command = [*cxx(), "-shared", f"-Wl,-soname,{name}", "-x", "c++", os.devnull, "-o", str(folder / name)]
            subprocess.run(command, check=True)
            return str(folder)

    return BuildLibraries


def summary(report, root):
    lines = [f"fbkd_ops: building with torch {report['torch']}"]
    lines += [f"fbkd_ops: building the {part} part" for part in report["built"]]
    lines += [f"fbkd_ops: leaving out the {part} part: {why}" for part, why in report["left_out"].items()]
    if "cuda" in report["built"]:
        lines.append(f"fbkd_ops: nvcc {report['nvcc']} in {root}, architectures {report['archs']}")
    return "\n".join(lines)


def remove_libraries(folder):
    """Libraries of an earlier build, which a build without that part would otherwise ship."""
    for pattern in ("_C*.so", "_cuda*.so", "_build*.so"):
        for path in Path(folder).glob(pattern):
            path.unlink()


def write_report(folder):
    """What `python -m fbkd_ops` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_report.json").write_text(json.dumps(REPORT, indent=2) + "\n")


class BuildPython(build_py):
    """Says what is built, and replaces what an earlier build left."""

    def run(self):
        print(summary(REPORT, toolkit), file=sys.stderr)
        folder = (ROOT / "src" if self.editable_mode else Path(self.build_lib)) / PACKAGE
        remove_libraries(folder)
        super().run()
        write_report(folder)


require_setuptools()
toolkit = toolkit_root()
if toolkit is not None:
    os.environ["CUDA_HOME"] = toolkit  # torch.utils.cpp_extension reads it when it is imported
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(toolkit) or ""
torch = import_torch()
REPORT = plan(torch, toolkit)

modules, commands, options = [], {"build_py": BuildPython}, {}
if REPORT["built"]:
    modules = extensions(REPORT, toolkit)
    commands["build_ext"] = build_extension_command(torch, REPORT)
    if variable("FBKD_OPS_WHEEL", "1"):
        options["bdist_wheel"] = {"py_limited_api": "cp310"}
    elif "facts" not in REPORT["left_out"]:
        modules.append(facts_extension(REPORT))

setup(ext_modules=modules, cmdclass=commands, options=options)
