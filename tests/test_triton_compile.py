"""Machine code without a GPU: Triton kernels compiled for one or for three GPUs, and the CUDA library's own code.

benchmarks/code_report.py compiles and reads it. Triton's interpreter replaces the compiler for a whole process, so
compilation happens in a subprocess.
"""

import json
import re
from pathlib import Path

import pytest
from helpers import TEST_ALL

from benchmarks import code_report
from fbkd_ops import _extension

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(code_report.cuobjdump_path() is None, reason="there is no triton that has cuobjdump")

# Triton kernels: limited by memory; with a gradient of a map or of a weight as output; with matrix products.
MEMORY_BOUND = {"sum_tiles", "input_gradients", "sum_squares", "difference_gradients"}
MEMORY_BOUND |= {"sum_products", "correlation_gradients", "reduce_tiles", "divergence_gradients"}
GRADIENTS = {"input_gradients", "difference_gradients", "student_gradients", "weight_gradients"}
GRADIENTS |= {"student_residual_gradients", "residual_products", "correlation_gradients"}
GRADIENTS |= {"divergence_gradients"}
PRODUCTS = {"adapted_sums", "student_gradients", "weight_gradients"}
PRODUCTS |= {"residual_sums", "student_residual_gradients", "residual_products"}
GRADIENTS |= {"add_map_gradients", "pool_weight_gradients"}
PRODUCTS |= {"pool_convolutions", "covariance_tiles", "add_map_gradients", "pool_weight_gradients"}
# Kernels of the residuals of two features, and Triton's names of the dtypes of their maps.
RESIDUALS = {"adapted_sums", "student_gradients", "weight_gradients"}
RESIDUALS |= {"residual_sums", "student_residual_gradients", "residual_products"}
# All instances for one architecture take minutes: `make test-all` compiles them, for every architecture.
# sm_89 has the least shared memory, and no tiles of its own.
ARCHS = (*code_report.ARCHS, 89) if TEST_ALL else (90,)
MAPS = ("bf16",), ("fp32",)
SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what a block can have


def kernels_in(files, pattern):
    return {name for file in files for name in re.findall(pattern, file.read_text())}


def by_kernel(instances):
    return {name: [each for each in instances if each.kernel == name] for name in {each.kernel for each in instances}}


def assert_no_local_memory(instances):
    assert not [each for each in instances if each.spills or each.stack]


@pytest.fixture(scope="module")
def triton_compilers(request, tmp_path_factory):
    """A process for each architecture of the selected tests, all at once: most of the time is the compiler's."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    archs = {each["triton_instances"] for each in parameters if "triton_instances" in each}
    caches = {arch: str(tmp_path_factory.mktemp(f"sm_{arch}")) for arch in archs}
    processes = {
        arch: code_report.triton_compiler(arch, not TEST_ALL, TRITON_CACHE_DIR=path) for arch, path in caches.items()
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module", params=ARCHS, ids="sm_{}".format)
def triton_instances(request, triton_compilers):
    """Instances of every Triton kernel for one architecture."""
    return code_report.finished(triton_compilers[request.param], timeout=600)


def test_triton_kernels_use_the_hardware_and_do_not_spill(triton_instances):
    """No local memory, no more shared memory than there is, 16-byte accesses, and tensor cores for all products."""
    kernels = by_kernel(triton_instances)
    # Launchers pass the kernel first; those that take it as a parameter call it `kernel`.
    launched = kernels_in((ROOT / "src" / "fbkd_ops" / "kernels").glob("*.py"), r"\b_?launch\w*\((?!kernel\b)(\w+), ")
    assert set(kernels) == launched >= MEMORY_BOUND | GRADIENTS | PRODUCTS
    assert_no_local_memory(triton_instances)
    assert max(each.shared for each in triton_instances) <= SHARED_MEMORY[triton_instances[0].arch]
    for name in MEMORY_BOUND | PRODUCTS:
        assert max(each.widest_load for each in kernels[name]) >= 16, f"{name} never loads 16 bytes"
    for name in GRADIENTS:
        assert max(each.widest_store for each in kernels[name]) >= 16, f"{name} never stores 16 bytes"
    assert not [each for name in PRODUCTS for each in kernels[name] if not each.tensor_cores]


def test_features_of_16_bits_are_multiplied_as_such(triton_instances):
    """Beside float32 parameters too: as TF32, three products of twice the cost each would take the place of one."""
    kernels = by_kernel(triton_instances)
    for name in RESIDUALS:
        tf32 = {maps: {each.tf32 for each in kernels[name] if tuple(each.maps) == maps} for maps in MAPS}
        assert tf32 == {("bf16",): {False}, ("fp32",): {True}}, name


@pytest.fixture(scope="module")
def cuda_library():
    files = sorted(Path(_extension.__file__).parent.glob("_cuda*.so"))
    if not files:
        pytest.skip(f"the CUDA library is {_extension.cuda.status}")
    return files[0]


def test_cuda_library_has_every_requested_architecture(cuda_library):
    report = json.loads((Path(_extension.__file__).parent / "_build_report.json").read_text())
    asked = report["archs"].replace(" ", ";").split(";")
    binaries = code_report.cuobjdump("--list-elf", cuda_library)
    ptx = code_report.cuobjdump("--list-ptx", cuda_library)
    for arch in asked:
        number = arch.removesuffix("+PTX").replace(".", "")
        assert f"sm_{number}.cubin" in binaries
        assert not arch.endswith("+PTX") or f"sm_{number}.ptx" in ptx


def test_cuda_kernels_load_16_bytes_and_do_not_spill(cuda_library):
    """Every kernel of csrc/cuda, in one architecture; under `make test-all` in each that the report knows."""
    archs = [arch for arch in code_report.ARCHS if code_report.cuda_libraries(arch)]
    if not archs:
        pytest.skip(f"the CUDA library has no code for {code_report.ARCHS}")
    instances = list(code_report.cuda_instances(archs if TEST_ALL else archs[-1:]))
    assert_no_local_memory(instances)
    assert instances
    defined = kernels_in((ROOT / "csrc" / "cuda").glob("*.cu*"), r"__global__\s+void\s+(?:\w+\([^)]*\)\s+)?(\w+)\(")
    for arch in {each.arch for each in instances}:
        assert {each.kernel for each in instances if each.arch == arch} == defined
    for each in instances:
        assert each.widest_load >= 16 or not each.kernel.endswith(("_sums", "_gradient")), each
        assert each.widest_store >= 16 or not each.kernel.endswith("_gradient"), each
