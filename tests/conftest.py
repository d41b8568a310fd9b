"""Shared test set-up. Without a GPU the Triton kernels run in Triton's interpreter."""

import importlib.util
import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by Triton when a kernel is defined, so before anything imports one.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
from helpers import TEST_ALL  # noqa: E402
from hypothesis import settings  # noqa: E402

# PyTorch's default rounds the operands of float32 convolutions to TF32 on a GPU: the reference would then be off by
# 1e-3, and nothing that is compared with it could fail.
torch.backends.cudnn.allow_tf32 = False


if not HAS_GPU and importlib.util.find_spec("triton"):
    from interpreter import patch_language_once_per_launch

    patch_language_once_per_launch()

# A failure prints the decorator that replays it: @reproduce_failure(...).
settings.register_profile("fbkd_ops", max_examples=60 if TEST_ALL else 25, deadline=None, print_blob=True)
settings.load_profile("fbkd_ops")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


# Files that take a minute or more: they come first, so that parallel processes end together.
LONGEST = ("test_triton_compile.py", "test_gpu_check.py", "test_compile.py", "test_microbench.py")
LONGEST += ("test_cuda_kernels.py", "test_adapted_masked_l2.py")


def repeats_another(item) -> bool:
    """Return whether a test is the same as that of the other form of the relation term: only the CPU has two."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("relation_form") == "cells" and parameters.get("backend") == "triton"


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if repeats_another(item)])
    items[:] = [item for item in items if not repeats_another(item)]
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # the keywords have the names of the folders too
            item.add_marker(skip)


@pytest.fixture(scope="module")
def one_thread():
    """One thread of PyTorch's, for the tests of a file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cells", "collapsed"])
def relation_form(request, monkeypatch):
    """Every relation term of a CPU in one form, whatever its sizes."""
    from fbkd_ops.non_local import relation

    monkeypatch.setattr(relation, "cheaper_form", lambda sizes: request.param)
    return request.param


@pytest.fixture
def tiles_of(monkeypatch):
    """Choose the Triton kernels' tiles as on a GPU of the compute capability that the fixture is called with."""

    def choose(gpu):
        from fbkd_ops.kernels import tiles

        monkeypatch.setattr(tiles, "architecture", lambda like: gpu)

    return choose


@pytest.fixture
def poison():
    """NaN in every new tensor, those that C++ allocates too: an unwritten output cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
