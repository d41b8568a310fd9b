"""Machine code of the CPU library: a clone of each vectorised function for each vector width."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from op_cases import NO_CPU

from fbkd_ops import _extension

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(_extension.__file__).parent
WIDTHS = ("arch_x86_64_v3", "arch_x86_64_v4", "default")


def cloned_functions():
    """The names behind FBKD_CLONES in the sources."""
    found = set()
    for path in sorted((ROOT / "csrc" / "cpu").iterdir()):
        found |= set(re.findall(r"^FBKD_CLONES \w+ (\w+)\(", path.read_text(), re.MULTILINE))
    return found


@NO_CPU
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_each_vectorised_function_has_a_clone_for_each_vector_width():
    compiler = _extension.build_facts()["compiler"]
    if platform.machine() != "x86_64" or not re.match(r"gcc (1[2-9]|[2-9]\d)", compiler):
        pytest.skip(f"{compiler} makes no clones for {platform.machine()}")
    (library,) = LIBRARY.glob("_C*.so")
    symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout.split()
    functions = cloned_functions()
    assert {"sum_of", "masked_squares", "convolve_row"} <= functions
    for name in functions:
        mangled = f"{len(name)}{name}I"
        found = {symbol.rpartition(".")[2] for symbol in symbols if mangled in symbol and "." in symbol}
        assert found >= set(WIDTHS), name
