"""What the checks of a wheel, of an sdist and of the ways to install see and say."""

import io
import tarfile
import zipfile

import pytest

from benchmarks import installs
from scripts import wheel_contents

GOOD = ("fbkd_ops/__init__.py", "fbkd_ops/_C.abi3.so", "fbkd_ops/_cuda13.abi3.so", "fbkd_ops-1.0.dist-info/METADATA")


def wheel(folder, names, tag="cp310-abi3-manylinux_2_28_x86_64"):
    path = folder / f"fbkd_ops-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def sdist(folder, names):
    path = folder / "fbkd_ops-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"fbkd_ops-1.0/{name}"), io.BytesIO())
    return path


def test_a_good_wheel_has_no_problem(tmp_path):
    assert not wheel_contents.problems_of_wheel(wheel(tmp_path, GOOD))


@pytest.mark.parametrize(
    "names, tag, problem",
    [
        ((*GOOD, "tests/test_loss.py"), "cp310-abi3-linux_x86_64", "has tests/test_loss.py"),
        (GOOD, "cp311-cp311-linux_x86_64", "is not for every Python"),
        ((*GOOD, "fbkd_ops/_build.cpython-311.so"), "cp310-abi3-linux_x86_64", "_build.cpython-311.so"),
        ((GOOD[0], GOOD[2]), "cp310-abi3-linux_x86_64", "has the libraries ['_cuda13.abi3.so']"),
        (GOOD[:2], "cp310-abi3-linux_x86_64", "has no CUDA part"),
    ],
)
def test_what_is_wrong_with_a_wheel_is_named(tmp_path, names, tag, problem):
    (found,) = wheel_contents.problems_of_wheel(wheel(tmp_path, names, tag))
    assert problem in found


def test_an_sdist_needs_every_file_that_the_pages_name(tmp_path):
    named = wheel_contents.named_files()
    assert {"docs/install.md", "scripts/wheel.sh", "examples/distillation.ipynb", "CHANGELOG.md"} <= named
    assert not wheel_contents.problems_of_sdist(sdist(tmp_path, named))
    (missing,) = wheel_contents.problems_of_sdist(sdist(tmp_path, named - {"docs/install.md"}))
    assert missing.endswith("lacks docs/install.md")


@pytest.mark.parametrize(
    "output, said",
    [
        (
            "  fbkd_ops needs torch 2.10 or later, but torch 2.9.1 is installed.\n  [end of output]",
            "fbkd_ops needs torch",
        ),
        ("/x/backends.py:146: RuntimeWarning: fbkd_ops on cpu tensors: plain PyTorch runs", "fbkd_ops on cpu tensors"),
        ("built\ncpu: loaded; cuda: not built: no nvcc\n", "cpu: loaded; cuda: not built: no nvcc"),
    ],
)
def test_what_an_installation_said_is_found_in_its_output(output, said):
    (found,) = installs.SAID.findall(output)
    assert found.startswith(said)
