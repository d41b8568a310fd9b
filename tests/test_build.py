"""setup.py: what it builds, what it leaves out and what it says. No test here needs nvcc or a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import TEST_ALL

from fbkd_ops import _extension

ROOT = Path(__file__).resolve().parents[1]
NO_SOURCE = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
NO_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
pytestmark = NO_SOURCE


def environment(**changes):
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree without anything built, beside a stale library of an earlier build."""
    copy = tmp_path / "source"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_report.json")
    for folder in ("csrc", "src"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("fbkd_ops\n")
    return copy


def setup_py(source, **changes):
    command = [sys.executable, "setup.py", "-q", "build_py"]
    return subprocess.run(command, cwd=source, env=environment(**changes), capture_output=True, text=True, timeout=300)


def wheel(source, **changes):
    """Builds a wheel; its file names and the report inside."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    done = subprocess.run(command, cwd=source, env=environment(**changes), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        return path, names, json.loads(archive.read("fbkd_ops/_build_report.json"))


def empty_kernels(source):
    """Leave nothing of size to compile: no test here loads the libraries, and the installation has compiled them."""
    for path in (source / "csrc" / "build_facts.cpp", *(source / "csrc" / "cpu").glob("*.cpp")):
        path.write_text("")


def fake_toolkit(folder, release):
    """A toolkit whose nvcc knows its release and one architecture, and whose headers are empty."""
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (folder / "toolkit" / "include").mkdir()
    for name in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / "toolkit" / "include" / name).touch()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\necho compute_90\n")
    nvcc.chmod(0o755)
    return str(nvcc.parents[1])


CPP_EXTENSION = """
import os
from setuptools import Extension
from setuptools.command.build_ext import build_ext as BuildExtension

def CppExtension(name, sources, **options):
    return Extension(name, sources, py_limited_api=options["py_limited_api"])

CUDAExtension = CppExtension

def _get_cuda_arch_flags():
    names = os.environ["TORCH_CUDA_ARCH_LIST"].replace("+PTX", "").split(";")
    numbers = [f"{float(name) * 10:.0f}" for name in names]  # a ValueError for a name, as PyTorch's
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
"""


def stub_torch(folder, version="2.10.0", headers=(), cuda=None):
    """A torch of that version for that release of CUDA, with empty headers; the path to import it from.

    It answers what setup.py asks before anything is compiled, and its import takes none of PyTorch's 2.5 seconds.
    """
    package = folder / "stub" / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text(f"class version: cuda = {cuda!r}\n__version__ = {version!r}\n")
    (package / "utils" / "cpp_extension.py").write_text(CPP_EXTENSION)
    for header in headers:
        (package / "include" / header).parent.mkdir(parents=True, exist_ok=True)
        (package / "include" / header).touch()
    return str(package.parent)


def replaced_folders(folder, **paths):
    """Where to import a sitecustomize from that changes the answers of sysconfig.get_path."""
    texts = {name: str(path) for name, path in paths.items()}
    code = f"import sysconfig\nget_path, replaced = sysconfig.get_path, {texts}\n"
    code += "sysconfig.get_path = lambda name, *rest: replaced.get(name) or get_path(name, *rest)\n"
    (folder / "sitecustomize.py").write_text(code)
    return str(folder)


def torch_headers():
    """Those that the sources include."""
    texts = [path.read_text() for path in (ROOT / "csrc").rglob("*.*")]
    return {header for text in texts for header in re.findall(r"#include <(torch/[^>]+)>", text)}


def stub_for_cuda(folder):
    """A torch for CUDA 13.0 that has every header."""
    return stub_torch(folder, headers=torch_headers(), cuda="13.0")


@pytest.mark.parametrize("value", ["2", "yes", ""])
def test_unknown_choice_is_an_error(source, tmp_path, value):
    done = setup_py(source, PYTHONPATH=stub_torch(tmp_path), FBKD_OPS_CUDA=value)
    assert done.returncode != 0
    assert f"FBKD_OPS_CUDA must be 0, 1 or unset, got {value!r}" in done.stderr


@NO_COMPILER
def test_forced_cuda_without_nvcc_is_an_error(source, tmp_path):
    done = setup_py(source, PYTHONPATH=stub_torch(tmp_path), FBKD_OPS_CUDA="1", CUDA_HOME="/nonexistent")
    assert done.returncode != 0
    expected = "no working nvcc in /nonexistent/bin"
    assert f"FBKD_OPS_CUDA=1 but the CUDA part cannot be built: {expected}" in done.stderr


@NO_COMPILER
@pytest.mark.parametrize("release", ["12.8", "13.0"])
@pytest.mark.parametrize("cuda", ["13.0", None])
def test_the_cuda_part_follows_nvcc_whatever_the_torch_of_the_build(source, tmp_path, release, cuda):
    path = stub_torch(tmp_path, headers=torch_headers(), cuda=cuda)
    done = setup_py(source, PYTHONPATH=path, CUDA_HOME=fake_toolkit(tmp_path, release), FBKD_OPS_CUDA=None)
    assert done.returncode == 0 and "building the cuda part" in done.stderr, done.stderr


@NO_COMPILER
def test_pytorchs_own_extensions_take_a_torch_without_cuda(source, tmp_path):
    """What a torch without CUDA answers, which looks for no toolkit."""
    code = "import runpy, torch\ntorch.version.cuda, torch.cuda._is_compiled = None, lambda: False\n"
    code += "runpy.run_path('setup.py', run_name='__main__')\n"
    command = [sys.executable, "-c", code, "-q", "build_py"]
    variables = environment(CUDA_HOME=fake_toolkit(tmp_path, "13.0"), FBKD_OPS_CUDA="1")
    done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "building the cuda part" in done.stderr, done.stderr


@NO_COMPILER
def test_an_nvcc_that_compiles_nothing_is_left_out(source, tmp_path):
    toolkit, path = fake_toolkit(tmp_path, "13.0"), stub_for_cuda(tmp_path)
    nvcc = Path(toolkit, "bin", "nvcc")
    fails = 'case "$*" in *probe.cu*) echo "nvcc: error: unsupported host compiler" >&2; exit 1;; esac\n'
    nvcc.write_text(nvcc.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{fails}"))
    done = setup_py(source, PYTHONPATH=path, CUDA_HOME=toolkit, FBKD_OPS_CUDA=None)
    expected = f"leaving out the cuda part: no working nvcc in {toolkit}/bin (nvcc: error: unsupported host compiler)"
    assert done.returncode == 0 and expected in done.stderr, done.stderr


@NO_COMPILER
def test_an_architecture_that_nvcc_does_not_know_is_refused(source, tmp_path):
    toolkit, path = fake_toolkit(tmp_path, "13.0"), stub_for_cuda(tmp_path)
    for archs in ("bogus", "9.0;5.0"):
        variables = dict(CUDA_HOME=toolkit, FBKD_OPS_CUDA=None, TORCH_CUDA_ARCH_LIST=archs)
        done = setup_py(source, PYTHONPATH=path, **variables)
        assert done.returncode != 0
        expected = f"TORCH_CUDA_ARCH_LIST={archs!r} names what torch or nvcc 13.0 does not know ("
        assert done.stderr.splitlines()[-1].startswith(expected) and "nvcc has 9.0;" in done.stderr, done.stderr


@NO_COMPILER
def test_an_nvcc_that_is_too_old_is_left_out(source, tmp_path):
    toolkit, path = fake_toolkit(tmp_path, "9.2"), stub_for_cuda(tmp_path)
    done = setup_py(source, PYTHONPATH=path, CUDA_HOME=toolkit, FBKD_OPS_CUDA=None)
    expected = "nvcc is 9.2, and 12 or later is needed"
    assert done.returncode == 0 and f"leaving out the cuda part: {expected}" in done.stderr, done.stderr
    done = setup_py(source, PYTHONPATH=path, CUDA_HOME=toolkit, FBKD_OPS_CUDA="1")
    assert done.returncode != 0 and expected in done.stderr


@NO_COMPILER
def test_wrapper_scripts_are_seen_through(source, tmp_path):
    """nvcc on PATH may be a script somewhere else; its dry run names the real folder."""
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    real = fake_toolkit(tmp_path, "13.0")
    dryrun = f'case "$*" in *--dryrun*) echo \'#$ _HERE_={real}/bin\' >&2;; *) exec {real}/bin/nvcc "$@";; esac'
    wrapper.write_text(f"#!/bin/sh\n{dryrun}\n")
    wrapper.chmod(0o755)
    names = dict(PATH=f"{wrapper.parent}:{os.environ['PATH']}", CUDA_HOME=None, CUDA_PATH=None, FBKD_OPS_CUDA=None)
    done = setup_py(source, PYTHONPATH=stub_for_cuda(tmp_path), **names)
    assert f"in {real}," in done.stderr, done.stderr


def test_missing_torch_says_what_to_install(source, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text("raise ImportError('no torch here')\n")
    done = setup_py(source, PYTHONPATH=str(stub))
    assert done.returncode != 0
    assert "no torch here" in done.stderr and "without build isolation, first `pip install torch" in done.stderr


def test_a_torch_that_is_too_old_is_named(source, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text("__version__ = '2.9.1+cpu'\n")
    done = setup_py(source, PYTHONPATH=str(stub), FBKD_OPS_CUDA=None)
    assert done.returncode != 0
    assert done.stderr.startswith(
        "fbkd_ops needs torch 2.10 or later, with build isolation and without, but torch 2.9.1+c"
    )


def test_a_torch_that_is_too_old_is_named_where_the_build_has_another(source, tmp_path):
    """pip's isolated build has a torch of its own, and pip would then replace that of the environment."""
    installed = tmp_path / "site" / "torch-2.8.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.8.0\n")
    path = replaced_folders(tmp_path, purelib=installed.parent)
    done = setup_py(source, PYTHONPATH=f"{path}{os.pathsep}{stub_torch(tmp_path)}", FBKD_OPS_CUDA=None)
    assert done.returncode != 0
    assert done.stderr.endswith('without, but torch 2.8.0 is installed: pip install "torch>=2.10"\n')


@NO_COMPILER
def test_a_torch_without_a_header_is_named_before_anything_is_compiled(source, tmp_path):
    """A release candidate of the oldest torch passes as that release, but may not have all of its headers."""
    headers, lacking = torch_headers(), "torch/csrc/stable/accelerator.h"
    assert lacking in headers
    path = stub_torch(tmp_path, "2.10.0a0+git1234567", headers - {lacking})
    done = setup_py(source, PYTHONPATH=path, FBKD_OPS_CUDA=None)
    expected = "fbkd_ops needs the headers of torch 2.10 or later, but torch 2.10.0a0+git1234567 has no"
    assert done.returncode != 0
    assert done.stderr == f"{expected} {lacking} in {path}/torch/include.\n"


def test_a_torch_without_headers_is_fine_where_nothing_is_compiled(source, tmp_path):
    done = setup_py(source, PYTHONPATH=stub_torch(tmp_path), CXX="/nonexistent/c++", FBKD_OPS_CUDA=None)
    assert done.returncode == 0 and "leaving out the cpu part: no C++ compiler" in done.stderr


def test_a_setuptools_that_is_too_old_is_named(source, tmp_path):
    """pip reads pyproject.toml's requirement only where it isolates the build."""
    (tmp_path / "sitecustomize.py").write_text("import setuptools\nsetuptools.__version__ = '76.1'\n")
    done = setup_py(source, PYTHONPATH=str(tmp_path), FBKD_OPS_CUDA=None)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        'fbkd_ops needs setuptools 77 or later to build, but 76.1 is installed: pip install "setuptools>=77", '
        "or leave out --no-build-isolation"
    )


def test_the_floors_of_setup_and_pyproject_are_the_same():
    setup, project = ((ROOT / name).read_text() for name in ("setup.py", "pyproject.toml"))
    for name, constant in (("setuptools", "SETUPTOOLS"), ("torch", "STABLE_ABI")):
        (floor,) = re.findall(rf'^{constant} = "([\d.]+)"', setup, re.MULTILINE)
        assert set(re.findall(rf'"{name}>=([\d.]+)"', project)) == {floor}


@NO_COMPILER
def test_without_pythons_headers_the_c_part_is_left_out(source, tmp_path):
    path = replaced_folders(tmp_path, include="/nonexistent")
    done = setup_py(source, PYTHONPATH=f"{path}{os.pathsep}{stub_torch(tmp_path)}", FBKD_OPS_CUDA=None)
    assert done.returncode == 0, done.stderr
    assert "leaving out the cpu part: no Python.h in /nonexistent (install Python's headers" in done.stderr


@NO_COMPILER
def test_a_toolkit_without_headers_is_left_out(source, tmp_path):
    toolkit, path = fake_toolkit(tmp_path, "13.0"), stub_for_cuda(tmp_path)
    (tmp_path / "toolkit" / "include" / "cuda_bf16.h").unlink()
    done = setup_py(source, PYTHONPATH=path, CUDA_HOME=toolkit, FBKD_OPS_CUDA=None)
    expected = f"no cuda_bf16.h in {toolkit}/include"
    assert done.returncode == 0 and f"leaving out the cuda part: {expected}" in done.stderr
    done = setup_py(source, PYTHONPATH=path, CUDA_HOME=toolkit, FBKD_OPS_CUDA="1")
    assert done.returncode != 0 and expected in done.stderr


def test_without_a_compiler_the_package_is_pure_python(source, tmp_path):
    path, names, report = wheel(source, PYTHONPATH=stub_torch(tmp_path), CXX="/nonexistent/c++", FBKD_OPS_CUDA=None)
    assert not [name for name in names if name.endswith(".so")]
    assert report["built"] == []
    assert "/nonexistent/c++" in report["left_out"]["cpu"]
    assert "/nonexistent/c++" in report["left_out"]["cuda"]
    installed = source.parent / "installed"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(installed)
    without_source = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    code = without_source + "import runpy; runpy.run_module('fbkd_ops.info', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(PYTHONPATH=str(installed)),
    )
    assert "nothing: pure Python" in done.stdout, done.stderr
    assert "not built: no C++ compiler ('/nonexistent/c++'" in done.stdout


def without_kernels(source, tmp_path):
    """Variables of a build of the modules alone, but of everything under `make test-all`."""
    if TEST_ALL:
        return {"FBKD_OPS_CUDA": "0"}
    empty_kernels(source)
    return {"FBKD_OPS_CUDA": "0", "PYTHONPATH": stub_torch(tmp_path, headers=torch_headers())}


@NO_COMPILER
def test_cpu_only_wheel_ships_no_stale_library(source, tmp_path):
    variables = without_kernels(source, tmp_path)
    stale = source / "build" / f"lib.{sys.platform}-x86_64-{sys.implementation.cache_tag}" / "fbkd_ops"
    stale.mkdir(parents=True)
    (stale / "_cuda.so").write_bytes(b"of an earlier build")
    (source / "src" / "fbkd_ops" / "_cuda.so").write_bytes(b"of an earlier build in place")
    _, names, report = wheel(source, **variables)
    facts, kernels = sorted((name for name in names if name.endswith(".so")), reverse=True)
    assert kernels == "fbkd_ops/_C.abi3.so" and facts.startswith("fbkd_ops/_build.")
    assert report["built"] == ["cpu"] and report["left_out"] == {"cuda": "FBKD_OPS_CUDA=0"}
    assert not [name for name in names if name.startswith("csrc")]


@NO_COMPILER
def test_a_build_in_place_replaces_what_an_earlier_one_left(source, tmp_path):
    """Python would prefer a library with its own name in it to that of the limited API."""
    empty_kernels(source)
    package = source / "src" / "fbkd_ops"
    (package / "_C.cpython-311-x86_64-linux-gnu.so").write_bytes(b"of an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    path = stub_torch(tmp_path, headers=torch_headers())
    variables = environment(PYTHONPATH=path, FBKD_OPS_CUDA="0")
    done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in package.glob("_C*.so")] == ["_C.abi3.so"]
    assert json.loads((package / "_build_report.json").read_text())["built"] == ["cpu"]


@NO_COMPILER
def test_a_wheel_for_every_python_has_no_module_of_one(source, tmp_path):
    path, names, report = wheel(source, FBKD_OPS_WHEEL="1", **without_kernels(source, tmp_path))
    assert "-cp310-abi3-" in path.name
    assert [name for name in names if name.endswith(".so")] == ["fbkd_ops/_C.abi3.so"]
    assert str(tmp_path) not in json.dumps(report)


def test_what_this_copy_was_built_with_is_loaded():
    """A library that does not load would otherwise only turn tests into skips."""
    report = _extension.build_report()
    assert report, "the package under test was not built"
    libraries = {"cpu": _extension.cpu, "cuda": _extension.cuda}
    for part in report["built"]:
        assert libraries[part].loaded, f"{part}: {libraries[part].status}"


@NO_COMPILER
def test_what_this_machine_can_build_was_built():
    built, left_out = _extension.build_report()["built"], _extension.build_report()["left_out"]
    assert "cpu" in built
    release = re.search(r"release (\d+)", nvcc_version())
    if release and int(release.group(1)) >= 12:
        assert "cuda" in built or left_out["cuda"] == "FBKD_OPS_CUDA=0"


def nvcc_version() -> str:
    if shutil.which("nvcc") is None:
        return ""
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


def test_a_compiler_that_does_not_run_is_left_out(source, tmp_path):
    done = setup_py(source, PYTHONPATH=stub_torch(tmp_path), CXX="false", FBKD_OPS_CUDA=None)
    assert done.returncode == 0, done.stderr
    assert "no working C++ compiler ('false' fails: exit status 1; set CXX)" in done.stderr


def test_a_compiler_that_fails_is_left_out_with_its_first_error(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'In a file:' >&2\necho 'cc1plus: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = setup_py(source, PYTHONPATH=stub_torch(tmp_path), CXX=str(compiler), FBKD_OPS_CUDA=None)
    assert done.returncode == 0, done.stderr
    assert f"no working C++ compiler ('{compiler}' fails: cc1plus: error: no such header; set CXX)" in done.stderr
