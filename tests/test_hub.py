"""The layout for kernel-builder and the package ``kernels`` of Hugging Face, without the former and the network."""

import ast
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

import fbkd_ops

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "build.toml").exists(), reason="needs the source tree")
HOST_FLAGS = re.compile(r"^HOST_FLAGS = \((.*)\)$", re.MULTILINE)
HAS_KERNELS = importlib.util.find_spec("kernels") is not None
NAME = "_fbkd_ops_cpu_test"  # as kernel-builder names a build: the package, the backend, and what is unique to it
REGISTRATION = """#include <Python.h>
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define REGISTER_EXTENSION(name) \\
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernels", nullptr, 0, nullptr}; \\
  PyMODINIT_FUNC JOIN(PyInit_, name)() { return PyModule_Create(&definition); }
"""


@pytest.fixture(scope="module")
def config():
    return tomllib.loads((ROOT / "build.toml").read_text())


def sources(config, backend):
    named = [path for kernel in config["kernel"].values() if kernel["backend"] == backend for path in kernel["src"]]
    return config["torch"]["src"] + named


def in_csrc(*suffixes):
    """What build.toml has to name: all but the modules of setup.py, which lie in csrc itself."""
    paths = {path for suffix in suffixes for path in (ROOT / "csrc").rglob(f"*{suffix}")}
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix != ".cpp" or path.parent.name != "csrc"}


def test_builds_have_every_source_once(config):
    binding = "torch-ext/torch_binding.cpp"
    cpu_only = {path for path in in_csrc(".h", ".cpp") if not path.startswith("csrc/cuda/")}
    assert sorted(sources(config, "cpu")) == sorted(cpu_only | {binding})
    assert sorted(sources(config, "cuda")) == sorted(in_csrc(".h", ".cpp", ".cu", ".cuh") | {binding})
    assert (ROOT / binding).exists()


def test_builds_are_compiled_as_setup_py_does(config):
    stable_abi = (ROOT / "csrc" / "stable_abi.h").read_text()
    major, minor = (int(digits, 16) for digits in re.search(r"VERSION 0x(..)(..)0{12}", stable_abi).groups())
    assert config["torch"]["stable-abi"] == dict.fromkeys(config["general"]["backends"], f"{major}.{minor}")
    setup, own = (ROOT / "setup.py").read_text(), {"-Dfbkd_ops=TORCH_EXTENSION_NAME", "-UTORCH_TARGET_VERSION"}
    for kernel in config["kernel"].values():
        for flags in (kernel["cxx-flags"], kernel.get("cuda-flags", [*own])):
            assert own <= {*flags} and all(f'"{flag}"' in setup for flag in flags if flag not in own)
        assert {*HOST_FLAGS.findall(setup)[0].replace('"', "").split(", ")} - {"-std=c++20"} <= {*kernel["cxx-flags"]}
    assert config["kernel"]["cpu"]["cxx-flags"] == config["kernel"]["cuda"]["cxx-flags"]


def test_package_imports_itself_by_relative_paths_only():
    """A build is loaded under a name of its own, beside other builds and perhaps an installed fbkd_ops."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.partition(".")[0] == "fbkd_ops" for name in names), f"{path}:{node.lineno}"


def test_card_example_runs(config, monkeypatch):
    jinja2 = pytest.importorskip("jinja2")
    facts = dict(repo_id=config["general"]["hub"]["repo-id"], version=0, license="apache-2.0", has_benchmark=True)
    template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(
        (ROOT / "CARD.md").read_text()
    )
    card = template.render(functions=fbkd_ops.__all__, **facts)
    asked = []
    stand_in = types.SimpleNamespace(get_kernel=lambda *names, **options: asked.append(names) or fbkd_ops)
    monkeypatch.setitem(sys.modules, "kernels", stand_in)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    variables = {}
    exec(compile(code, "CARD.md", "exec"), variables)
    assert asked == [("fbkd-ops/fbkd-ops",)]
    assert len(variables["terms"]) == 4 and all(x.grad.abs().sum() > 0 for x in variables["students"])
    assert "- `FBKDLoss`\n" in card and "{" not in card.replace(code, "")


@pytest.fixture(scope="module")
def hub(config, tmp_path_factory):
    """The tree of ``make hub`` with a build in it as kernel-builder leaves one, of the masked distance alone."""
    tree = tmp_path_factory.mktemp("kernel") / "hub"
    if shutil.which("c++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("needs a C++ compiler and Python's headers")
    done = subprocess.run(["make", "hub", f"HUB={tree}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    build = tree / "build" / f"torch-stable-abi210-cpu-{platform.machine()}-{platform.system().lower()}"
    shutil.copytree(tree / "torch-ext" / "fbkd_ops", build)
    (build / "_ops.py").write_text(f"import torch\nfrom . import {NAME}\n\nops = torch.ops.{NAME}\n")
    metadata = {"name": config["general"]["name"], "id": NAME, "version": 0, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (build / "metadata.json").write_text(json.dumps(metadata))
    compile_library(tree, build / f"{NAME}.abi3.so", config["kernel"]["cpu"]["cxx-flags"])
    return tree


def compile_library(tree, library, flags):
    torch_folder = Path(torch.__file__).parent
    (tree / "torch-ext" / "registration.h").write_text(REGISTRATION)
    command = ["c++", "-std=c++20", "-fPIC", "-shared", *flags, "-O0", f"-DTORCH_EXTENSION_NAME={NAME}"]
    command += ["-DTORCH_TARGET_VERSION=0x20a000000000000", "-DPy_LIMITED_API=0x03090000"]
    command += [f"-I{torch_folder}/include", f"-I{sysconfig.get_path('include')}"]
    command += ["torch-ext/torch_binding.cpp", "csrc/cpu/masked_l2.cpp", "csrc/cpu/pieces.cpp"]
    command += [f"-L{torch_folder}/lib", "-ltorch_cpu", "-ltorch", "-o", str(library)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def kernel(hub):
    """The build as ``kernels`` loads it; where that is not installed, in the same way."""
    if HAS_KERNELS:
        import kernels

        return kernels.get_local_kernel(hub, backend="cpu")
    (build,) = (hub / "build").iterdir()
    spec = importlib.util.spec_from_file_location(NAME, build / "__init__.py")
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not HAS_KERNELS, reason="needs the package kernels: pip install kernels")
def test_kernels_knows_the_build(hub, kernel):
    import kernels

    (loaded,) = [each for each in kernels.get_loaded_kernels() if each.module is kernel]
    assert loaded.metadata.id == NAME and str(loaded.metadata.name) == "fbkd-ops"


def test_build_runs_kernels_of_its_own_namespace(kernel):
    assert kernel.__file__ != fbkd_ops.__file__ and kernel.FBKDLoss is not fbkd_ops.FBKDLoss
    student, teacher = torch.randn(2, 2, 3, 8, 9).unbind()
    with fbkd_ops.use_backend("reference"):
        expected = fbkd_ops.functional.masked_l2_loss(student, teacher)
    with kernel.use_backend("cpu"):
        torch.testing.assert_close(kernel.functional.masked_l2_loss(student, teacher), expected)
    assert "kernel-builder built this copy for CPUs" in kernel.backends.available("cuda", "cuda")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAME}::masked_l2_forward", "CPU")
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        with kernel.use_backend("triton"):
            torch.testing.assert_close(kernel.functional.masked_l2_loss(student, teacher), expected)
        assert f"{NAME}.kernels.masked_l2" in sys.modules


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark of the installed package as ``kernels benchmark`` makes one, on maps of few channels and pixels."""
    if not HAS_KERNELS:
        attributes = {"seed": None, "device": "cpu"}
        stand_in = types.SimpleNamespace(Benchmark=type("Benchmark", (), attributes))
        monkeypatch.setitem(sys.modules, "kernels", types.SimpleNamespace(benchmark=stand_in))
        monkeypatch.setitem(sys.modules, "kernels.benchmark", stand_in)
    spec = importlib.util.spec_from_file_location("benchmark_module", ROOT / "benchmarks" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_benchmark_repeats_shapes_and_tolerance(benchmark):
    from benchmarks import inputs

    assert benchmark.LEVELS.items() <= inputs.LEVELS.items()
    assert inputs.TOLERANCES["float32"] == benchmark.TOLERANCE


@pytest.mark.parametrize("workload", ["attention_pool", "masked_l2_loss", "loss"])
def test_benchmark_agrees_with_the_literal_formula(benchmark, monkeypatch, workload):
    small = {level: (1, 256, *(side // 4 for side in shape[2:])) for level, shape in benchmark.LEVELS.items()}
    monkeypatch.setattr(benchmark, "LEVELS", small)
    torch.manual_seed(benchmark.FBKDBenchmark.seed)
    instance = benchmark.FBKDBenchmark()
    instance.kernel = fbkd_ops
    getattr(instance, f"setup_{workload}")()
    getattr(instance, f"benchmark_{workload}")()
    expected = getattr(instance, f"verify_{workload}")()
    assert expected.square().mean().sqrt().item() == pytest.approx(benchmark.RMS, rel=1e-3)
    assert torch.allclose(instance.out, expected, atol=1e-2)  # as `kernels benchmark` compares them
