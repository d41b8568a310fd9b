"""Machine code without a GPU: Triton kernels compiled for three GPUs, and the CUDA library's own code.

Triton's interpreter replaces the compiler for a whole process, so compilation happens in a subprocess.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fbkd_ops import _extension

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ARCHS = (80, 90, 100)

COMPILE = """
import json, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fbkd_ops.kernels import attention_pool as kernels

arch, folder = int(sys.argv[1]), Path(sys.argv[2])
SIZES = ["rows", "cols", "image_stride", "row_stride"]
TILES = ["row_tiles", "col_tiles"]
BLOCKS = {"BLOCK_ROWS": kernels.BLOCK_ROWS, "BLOCK_COLS": kernels.BLOCK_COLS}

def build(name, function, pointers, integers, constants):
    '''Compile as for aligned tensors: pointers and the sizes in SIZES are multiples of 16.'''
    signature, attributes = {}, {}
    for index, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = pointers[argument] if argument in pointers else "i64"
            if argument in pointers or argument in SIZES:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    (folder / f"{name}.cubin").write_bytes(compiled.asm["cubin"])
    (folder / f"{name}.ptx").write_text(compiled.asm["ptx"])

for dtype, sums in (("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
    accumulators = {name: f"*{sums}" for name in ("row_abs", "row_plain", "col_abs", "col_plain")}
    tensors = {"x": f"*{dtype}", **accumulators}
    build(f"sums_{dtype}", kernels.sum_tiles, tensors, SIZES + TILES, {"ROW_TILE": kernels.MANY_ROWS, **BLOCKS})
    element = kernels.tl.float64 if sums == "fp64" else kernels.tl.float32
    constants = {"DTYPE": element, **BLOCKS}
    build(f"gradient_{dtype}", kernels.input_gradient, {"dx": f"*{dtype}", **tensors}, SIZES + TILES, constants)
    absent = {"x": None, "row_abs": None, "col_abs": None}
    plain = {"dx": f"*{dtype}", "row_plain": f"*{sums}", "col_plain": f"*{sums}"}
    build(f"plain_{dtype}", kernels.input_gradient, plain, SIZES + TILES, {**constants, **absent})
for sums in ("fp32", "fp64"):
    constants = {"TILES": kernels.FINISH_TILES, "OUTPUTS": kernels.FINISH_OUTPUTS}
    build(f"finish_{sums}", kernels.finish_means, {"partial": f"*{sums}", "mean": f"*{sums}"}, [], constants)
"""


def cuobjdump(*arguments):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.fixture(scope="module", params=ARCHS)
def compiled(request, tmp_path_factory):
    """Folder with the cubin and PTX of every kernel for one architecture."""
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    script = folder / "compile_kernels.py"
    script.write_text(COMPILE)
    command = [sys.executable, script, str(request.param), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_triton_kernels_load_16_bytes_and_do_not_spill(compiled):
    cubins = sorted(compiled.glob("*.cubin"))
    assert len(cubins) == 14
    for cubin in cubins:
        sass = cuobjdump("-sass", str(cubin))
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{cubin.stem} uses local memory"
        if cubin.stem.startswith(("sums", "gradient")):
            assert re.search(r"LDG\.E[.\w]*\.128", sass), f"{cubin.stem} has no 16-byte load"
        if cubin.stem.startswith(("gradient", "plain")):
            assert re.search(r"STG\.E[.\w]*\.128", sass), f"{cubin.stem} has no 16-byte store"


def test_plain_gradient_reads_no_input(compiled):
    """Only the two small gradients are loaded; with x there are more loads."""
    for dtype in ("fp16", "bf16", "fp32", "fp64"):
        loads = {
            name: (compiled / f"{name}_{dtype}.ptx").read_text().count("ld.global") for name in ("plain", "gradient")
        }
        assert 0 < loads["plain"] < loads["gradient"]


@pytest.fixture(scope="module")
def cuda_library():
    files = sorted(Path(_extension.__file__).parent.glob("_cuda*.so"))
    if not files:
        pytest.skip(f"the CUDA library is {_extension.cuda.status}")
    return str(files[0])


def test_cuda_library_has_every_requested_architecture(cuda_library):
    report = json.loads((Path(_extension.__file__).parent / "_build_report.json").read_text())
    asked = report["archs"].replace(" ", ";").split(";")
    binaries, ptx = cuobjdump("--list-elf", cuda_library), cuobjdump("--list-ptx", cuda_library)
    for arch in asked:
        number = arch.removesuffix("+PTX").replace(".", "")
        assert f"sm_{number}.cubin" in binaries
        assert not arch.endswith("+PTX") or f"sm_{number}.ptx" in ptx


def test_cuda_kernels_load_16_bytes_and_do_not_spill(cuda_library):
    usages = re.findall(r"Function \S*attention_pool\S*:\s*\n.*", cuobjdump("-res-usage", cuda_library))
    assert usages
    for usage in usages:
        assert "LOCAL:0" in usage and "STACK:0" in usage, usage
    sass = cuobjdump("-sass", cuda_library)
    functions = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", sass, re.S))
    wide = [name for name in functions if re.search(r"attention_pool_sums|attention_pool_gradient", name)]
    assert wide
    for name in wide:
        vector = re.search(r"ELi(\d)E(Lb(\d)E)?EEv", name) or re.search(r"Li(\d)(ELb(\d))?", name)
        if vector.group(1) != "1" and vector.group(3) != "0":
            assert re.search(r"LDG\.E[.\w]*\.128", functions[name]), name
