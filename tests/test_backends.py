"""Choice of the backend, and what is said when a compiled library is missing or broken."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from helpers import TEST_ALL

import fbkd_ops
from fbkd_ops import _extension, backends, functional, info
from fbkd_ops.functional import attention_pool
from fbkd_ops.non_local import relation
from fbkd_ops.ops import registry

PACKAGE = Path(fbkd_ops.__file__).parent
X = torch.ones(1, 2, 3, 4)
BLOCK = fbkd_ops.NonLocalBlock2d(2, 2, norm="none").requires_grad_(False)


def run_in(folder, code, **environment):
    """Run code with the package that lies in a folder; environment variables given as None are removed."""
    merged = {**os.environ, "PYTHONPATH": str(folder), **environment}
    merged = {name: value for name, value in merged.items() if value is not None}
    # An editable install would find in the source tree what is missing in the copy.
    without_source = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    command = [sys.executable, "-W", "always", "-c", without_source + code]
    return subprocess.run(command, env=merged, capture_output=True, text=True, cwd=folder, timeout=120)


@pytest.fixture
def package_copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fbkd_ops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """A package that has only what loads the libraries, and the CPU's. A process can import it beside the whole one.

    As long as its library does not load: one that does would register its kernels a second time.
    """
    package = tmp_path / "fbkd_loader"
    package.mkdir()
    (package / "__init__.py").touch()
    names = ("_extension.py", "_hub.py", "_build_report.json")
    for path in (*(PACKAGE / name for name in names), *PACKAGE.glob("_C*.so")):
        shutil.copy(path, package)
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == package.name]:
        del sys.modules[name]


def status_of_broken(loader):
    """What the loader says of the CPU's library, of which it warns."""
    with pytest.warns(RuntimeWarning) as warned:
        extension = importlib.import_module(f"{loader.name}._extension")
    assert not extension.cpu.loaded and len(warned) == 1
    assert extension.cpu.status in str(warned[0].message)
    assert _extension.REBUILD in str(warned[0].message)
    return extension.cpu.status


def library(package, name):
    found = sorted(package.glob(f"{name}*.so"))
    if not found:
        pytest.skip(f"{name} is not built")
    return found[0]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'cuda', 'triton', 'reference', got 'gpu'$"), fbkd_ops.use_backend("gpu"):
        pass


def test_nesting_and_exceptions_restore():
    with fbkd_ops.use_backend("reference"):
        with pytest.raises(KeyError), fbkd_ops.use_backend("auto"):
            raise KeyError
        assert backends.resolve("attention_pool", X) == "reference"
    assert backends.resolve("attention_pool", X) == ("cpu" if _extension.cpu.loaded else "reference")


def test_the_relation_stays_linear_where_no_kernels_run(monkeypatch):
    monkeypatch.setattr(_extension, "cpu", _extension.Library(False, "not built"))
    for op in ("non_local", "relation_loss"):
        assert backends.resolve(op, X) == "torch"
        with fbkd_ops.use_backend("reference"):
            assert backends.resolve(op, X) == "reference"
        with fbkd_ops.use_backend("cuda"), pytest.raises(RuntimeError, match=f"{op}.*'cuda'.*got a cpu tensor"):
            backends.resolve(op, X)


# Every op that has kernels, called with X and tensors that fit it.
CALLS = {
    "attention_pool": lambda x: functional.attention_pool(x).spatial_mean,
    "attention_masks": lambda x: functional.attention_mask(x, x, temperature=1.0),
    "masked_l2_loss": lambda x: functional.masked_l2_loss(x, 2 * x),
    "channel_correlation_loss": lambda x: functional.channel_correlation_loss(x, 2 * x),
    "channel_divergence_loss": lambda x: functional.channel_divergence_loss(x, 2 * x),
    "non_local": lambda x: functional.non_local(x, BLOCK.weights(), stride=2),
    "relation_loss": lambda x: functional.relation_loss(
        x, 2 * x, BLOCK.weights(), BLOCK.weights(), BLOCK.weights().out_weight, BLOCK.weights().out_bias
    ),
    "adapted_masked_l2_loss": lambda x: functional.adapted_masked_l2_loss(x, x[0, :, :2, 0], x[0, :, 0, 0], x),
    "spatial_l2_loss": lambda x: functional.spatial_l2_loss(x[:, 0], torch.eye(3), x[0, 0, 0, :1], x[:, 1]),
}

# The kernels that each of them takes where nothing needs a gradient.
KERNELS = {
    "attention_pool": {"attention_pool_forward"},
    "attention_masks": {"attention_masks"},
    "masked_l2_loss": {"masked_l2_forward"},
    "channel_correlation_loss": {"channel_correlation_forward"},
    "channel_divergence_loss": {"channel_divergence_forward"},
    "adapted_masked_l2_loss": {"adapted_masked_l2_forward"},
    "spatial_l2_loss": {"spatial_l2"},
    "non_local": {"non_local_statistics_forward"},
    "relation_loss": {"attention_pool_forward", "non_local_statistics_forward", "relation_residual_forward"},
}


def test_every_op_with_kernels_is_called_here():
    assert set(CALLS) == {op for op, having in backends.FUNCTIONS.items() if having}


@pytest.mark.parametrize("op", CALLS)
def test_forced_cuda_on_the_wrong_device(op):
    """Also for the op that the CUDA library has no kernels of: the tensor is on no device of its."""
    with fbkd_ops.use_backend("cuda"), pytest.raises(RuntimeError, match=f"{op}.*'cuda'.*got a cpu tensor"):
        CALLS[op](X)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_the_forced_backend_runs(monkeypatch, op, backend):
    """What reaches the ops' own code, or none of it."""
    if backend == "cpu" and not _extension.cpu.loaded:
        pytest.skip(f"cpu library is {_extension.cpu.status}")
    if backend == "triton" and (importlib.util.find_spec("triton") is None or torch.cuda.is_available()):
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(relation, "cheaper_form", lambda sizes: "collapsed")
    expected, called = CALLS[op](X), set()
    for key, kernel in list(registry._kernels.items()):
        if key[1] == backend:
            spy = lambda *arguments, key=key, kernel=kernel: called.add(key[0]) or kernel(*arguments)  # noqa: E731
            monkeypatch.setitem(registry._kernels, key, spy)
        else:
            monkeypatch.delitem(registry._kernels, key)
    with fbkd_ops.use_backend(backend):
        torch.testing.assert_close(CALLS[op](X), expected)
    assert called == (set() if backend == "reference" else KERNELS[op])


def test_an_op_without_kernels_of_the_forced_backend_takes_the_automatic_choice(monkeypatch):
    """The CUDA library has no adapted distance; on its device Triton's is the automatic choice."""
    on_cuda = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(_extension, "cuda", _extension.Library(True, "loaded"))
    monkeypatch.setattr(backends, "_TRITON", True)
    with fbkd_ops.use_backend("cuda"):
        assert backends.resolve("masked_l2_loss", on_cuda) == "cuda"
        assert backends.resolve("adapted_masked_l2_loss", on_cuda) == "triton"
        monkeypatch.setattr(backends, "_TRITON", False)
        assert backends.resolve("adapted_masked_l2_loss", on_cuda) == "reference"
        assert backends.resolve("non_local", on_cuda) == "torch"
    monkeypatch.setattr(backends, "_INTERPRET", False)
    with fbkd_ops.use_backend("triton"), pytest.raises(RuntimeError, match="non_local.*triton is not installed"):
        backends.resolve("non_local", X)


@pytest.mark.gpu
def test_forced_cpu_with_a_cuda_tensor():
    with fbkd_ops.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu'.*got a cuda tensor"):
        attention_pool(X.cuda())


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON", True)
    monkeypatch.setattr(backends, "_INTERPRET", False)
    with fbkd_ops.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        attention_pool(X)
    monkeypatch.setattr(backends, "_INTERPRET", True)
    with fbkd_ops.use_backend("triton"):
        assert backends.resolve("attention_pool", X) == "triton"
    monkeypatch.setattr(backends, "_TRITON", False)
    with fbkd_ops.use_backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        attention_pool(X)


def test_order_of_preference(monkeypatch):
    missing = _extension.Library(False, "not built: test")
    loaded = _extension.Library(True, "loaded")
    monkeypatch.setattr(backends, "_TRITON", True)
    for cuda, expected in ((loaded, "cuda"), (missing, "triton")):
        monkeypatch.setattr(_extension, "cuda", cuda)
        assert backends.automatic("attention_pool", "cuda") == expected
    monkeypatch.setattr(backends, "_TRITON", False)
    assert backends.automatic("attention_pool", "cuda") == "reference"
    assert backends.automatic("attention_pool", "mps") == "reference"
    monkeypatch.setattr(_extension, "cpu", missing)
    assert backends.automatic("attention_pool", "cpu") == "reference"
    with fbkd_ops.use_backend("cpu"), pytest.raises(RuntimeError, match="cpu part is not built: test"):
        attention_pool(X)


@pytest.mark.parametrize(
    "status, triton, said",
    [
        ("not built: no nvcc", True, None),  # as planned: Triton's kernels are what runs there
        (
            "not built: no nvcc",
            False,
            "plain PyTorch runs, which is slower, because the compiled cuda part is not built",
        ),
        ("not usable: built for CUDA 12", True, "Triton's kernels run, because the compiled cuda part is not usable"),
        ("loaded", True, None),
        ("broken: no symbol", True, None),  # said when it was loaded
    ],
)
def test_a_compiled_part_that_does_not_run_is_said_once(monkeypatch, status, triton, said):
    on_cuda = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(_extension, "cpu", _extension.Library(True, "loaded"))
    monkeypatch.setattr(_extension, "cuda", _extension.Library(status == "loaded", status))
    monkeypatch.setattr(backends, "_TRITON", triton)
    monkeypatch.setattr(backends, "_warned_of_slow", set())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")  # Python itself would say the same only once
        for _ in range(2):
            backends.resolve("attention_pool", on_cuda)
    messages = [str(warning.message) for warning in found]
    assert len(messages) == (said is not None)
    assert all(said in message and _extension.REBUILD in message for message in messages)


def test_a_gpu_says_that_nothing_was_built(monkeypatch, recwarn):
    unbuilt = _extension.Library(False, "not built: setup.py has not run on this copy of the package")
    for part in ("cpu", "cuda"):
        monkeypatch.setattr(_extension, part, unbuilt)
    monkeypatch.setattr(backends, "_TRITON", True)
    monkeypatch.setattr(backends, "_warned_of_slow", set())
    assert backends.resolve("attention_pool", types.SimpleNamespace(device=torch.device("cuda"))) == "triton"
    assert "Triton's kernels run, because the compiled cuda part is not built: setup.py" in str(recwarn[0].message)


@pytest.mark.parametrize(
    "release, status",
    [
        ("12.8", "loaded: _cuda12.abi3.so, because torch is built for CUDA 12.8"),
        ("13.1", "loaded: _cuda13.abi3.so, because torch is built for CUDA 13.1"),
        (
            "14.0",
            "not usable: built for CUDA 12 and 13, torch {torch} for 14.0; build again with",
        ),
        (None, "not usable: torch {torch} is built without CUDA"),
    ],
)
def test_the_cuda_library_of_torchs_own_release_is_loaded(monkeypatch, tmp_path, release, status):
    for name in ("_cuda12.abi3.so", "_cuda13.abi3.so", "_cuda.cpython-311-x86_64-linux-gnu.so"):
        (tmp_path / name).touch()
    loaded = []
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(_extension, "cpu", _extension.Library(True, "loaded"))
    monkeypatch.setattr(torch.version, "cuda", release)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    found = _extension._load_cuda({})
    assert found.status.startswith(status.format(torch=torch.__version__))
    assert found.loaded == bool(loaded) == status.startswith("loaded")
    assert all(path.endswith(found.status.split()[1].rstrip(",")) for path in loaded)


def test_backward_uses_the_backend_of_its_forward():
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    with fbkd_ops.use_backend("triton"):
        outputs = attention_pool(x)
    with fbkd_ops.use_backend("cuda"):
        (dx,) = torch.autograd.grad(outputs.channel_mean.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(x, 1 / 12))


def test_report_names_every_op_and_library():
    text = info.report()
    for line in ("fbkd_ops", "torch", "triton", "cpu library", "cuda library", *backends.FUNCTIONS):
        assert line in text


USE = """
import torch, fbkd_ops
from fbkd_ops import info
from fbkd_ops.functional import attention_pool
print(info.report())
print("sum", float(attention_pool(torch.ones(1, 2, 3, 4)).channel_mean.sum()))
with fbkd_ops.use_backend("cpu"):
    attention_pool(torch.ones(1, 2, 3, 4))
"""


# What a library's file has instead of its own bytes.
DAMAGE = {
    "empty": lambda content: b"",
    "text": lambda content: b"not a library",
    "truncated": lambda content: content[:100],
}


def damage_library(package, damage):
    path = library(package, "_C")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))


@pytest.mark.parametrize("damage", DAMAGE)
def test_broken_library_is_named(loader, damage):
    damage_library(loader, damage)
    assert status_of_broken(loader).startswith("broken: ")


@pytest.mark.parametrize("damage", DAMAGE if TEST_ALL else ["empty"])
def test_broken_library_is_reported(package_copy, damage):
    damage_library(package_copy / "fbkd_ops", damage)
    done = run_in(package_copy, USE)
    assert done.stderr.count("RuntimeWarning") == 1
    assert _extension.REBUILD in done.stderr
    assert re.search(r"^cpu library +broken:", done.stdout, re.MULTILINE)
    assert "sum 2.0" in done.stdout
    assert "the compiled cpu part is broken:" in done.stderr.splitlines()[-1]


def test_missing_library_is_reported(package_copy):
    library(package_copy / "fbkd_ops", "_C").unlink()
    done = run_in(package_copy, USE)
    assert done.stderr.count("RuntimeWarning") == 1
    assert "fbkd_ops on cpu tensors: plain PyTorch runs, which is slower, because" in done.stderr
    assert "not built: setup.py meant to build it" in done.stdout
    assert "sum 2.0" in done.stdout


def test_undefined_symbol_is_reported(loader):
    """A library that wants a symbol this torch does not have, as after a change of the stable ABI."""
    path = library(loader, "_C")
    content = path.read_bytes()
    assert b"\0torch_parallel_for\0" in content
    path.write_bytes(content.replace(b"\0torch_parallel_for\0", b"\0torch_parallel_foX\0"))
    status = status_of_broken(loader)
    assert status.startswith("broken: ") and "undefined symbol" in status


def test_other_python_is_reported(loader):
    path = library(loader, "_C")
    path.rename(path.with_name("_C.cpython-38-x86_64-linux-gnu.so"))
    expected = "broken: _C.cpython-38-x86_64-linux-gnu.so is not for this Python"
    assert status_of_broken(loader).startswith(expected)


def test_other_torch_is_named(loader):
    library(loader, "_C").write_bytes(b"")
    report = loader / "_build_report.json"
    report.write_text(report.read_text().replace(torch.__version__, "2.10.0"))
    assert f"built against torch 2.10.0, running torch {torch.__version__}" in status_of_broken(loader)


def test_broken_cuda_library_leaves_the_cpu_alone(package_copy):
    library(package_copy / "fbkd_ops", "_cuda").write_bytes(b"not a library")
    done = run_in(package_copy, USE)
    assert "cuda library  broken:" in done.stdout or "cuda library  not usable:" in done.stdout
    assert "cpu library   loaded" in done.stdout
    assert done.returncode == 0


def test_earlier_import_paths_are_the_same_modules():
    from fbkd_ops import _earlier_paths, weights

    for path, current in _earlier_paths._PATHS.items():
        module = importlib.import_module(f"fbkd_ops.{path}")
        assert module is importlib.import_module(f"fbkd_ops.{current}")
    assert fbkd_ops.integrations.mmrazor is weights.mmrazor and fbkd_ops.distributed.data_parallel
    documented = {"distributed", "integrations.mmrazor", "integrations.non_local", "student_attributes"}
    assert documented | {"distiller", "feature_tap", "non_local_block"} <= set(_earlier_paths._PATHS)
