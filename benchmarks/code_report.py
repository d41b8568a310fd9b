"""What the compilers made of the GPU kernels, without a GPU: registers, spills, shared memory, widest accesses.

    python benchmarks/code_report.py [--csv benchmarks/results/code.csv]

CUDA kernels: every instance in the built library. Triton kernels: what the launchers ask the compiler for on a pyramid
of five levels, in the dtypes and layouts of ``launches``. Both are read with the cuobjdump that Triton ships.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.environment import ROOT, modified, revision  # noqa: E402
from benchmarks.inputs import LAYOUTS, LEVELS  # noqa: E402
from benchmarks.results import write  # noqa: E402
from fbkd_ops import _extension  # noqa: E402
from fbkd_ops._numerics import accumulation_dtype  # noqa: E402

ARCHS = (80, 90, 100)
INSTRUCTION = 16  # bytes of machine code
# Dtypes and layouts of the student and the teacher of the adapted distance, whose parameters are float32: they are
# rounded before a kernel multiplies them. Triton cannot compile products of 16 bits beside float64: the launchers have
# to know.
ADAPTED = (
    (torch.float16, torch.float16, "contiguous"),
    (torch.bfloat16, torch.bfloat16, "contiguous"),
    (torch.bfloat16, torch.bfloat16, "channels_last"),
    (torch.bfloat16, torch.float32, "contiguous"),
    (torch.float32, torch.float32, "contiguous"),
    (torch.bfloat16, torch.float64, "contiguous"),
)
RELATION = ADAPTED[1:]  # the same of the relation residual
# Dtypes and layouts of the maps of a non-local block's statistics.
STATISTICS = (
    (torch.float16, "contiguous"),
    (torch.bfloat16, "contiguous"),
    (torch.bfloat16, "channels_last"),
    (torch.float32, "contiguous"),
    (torch.float64, "contiguous"),
)
# What `make test` compiles of those: bfloat16 and float32, both layouts, and float64 beside 16 bits, but not all in
# each op. float16 shares the code of bfloat16.
FEW_ADAPTED = ADAPTED[1], ADAPTED[4]
FEW_RELATION = RELATION[1], RELATION[3], RELATION[4]
FEW_STATISTICS = STATISTICS[2], STATISTICS[3]
MAPS = ("student", "teacher", "residual", "x")  # names of feature maps among a Triton kernel's arguments


class Instance(NamedTuple):
    """One compiled kernel; memory in bytes, ``spills`` in instructions."""

    kernel: str
    arch: int
    registers: int
    stack: int
    shared: int
    spills: int
    widest_load: int
    widest_store: int
    tensor_cores: bool
    tf32: bool = False  # whether it multiplies float32 on them; of Triton kernels
    maps: tuple[str, ...] = ()  # Triton's names of the dtypes of its feature maps


def cuobjdump_path() -> Path | None:
    """The tool that Triton ships; None without it."""
    triton = importlib.util.find_spec("triton")
    tool = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if tool and tool.exists() else None


def cuobjdump(*arguments: object) -> str:
    tool = cuobjdump_path() or sys.exit("needs a triton that has cuobjdump")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def kernel_name(symbol: str) -> str:
    """The last name of a mangled one, without namespaces and template arguments: ``_ZN4fbkd4pool...`` -> ``pool``."""
    if not symbol.startswith("_Z"):
        return symbol
    rest, name = symbol[2:].lstrip("NK"), symbol
    while found := re.match(r"\d+", rest):
        length, begin = int(found.group()), found.end()
        name, rest = rest[begin : begin + length], rest[begin + length :]
    return name


def widest_load(code: str) -> int:
    """Bytes that the widest load from global memory moves per thread; 0 without one.

    Asynchronous copies into shared memory (LDGSTS) count; bulk copies (UBLKCP, UTMALDG) are not per thread.
    """
    return _widest("LDG|LDGSTS|LD", code)


def widest_store(code: str) -> int:
    """The same of stores to global memory."""
    return _widest("STG|ST", code)


def _widest(instructions: str, code: str) -> int:
    accesses = re.findall(rf"\b(?:{instructions})\.E(?=[.\s])([.\w]*)", code)
    return max((_access_bytes(modifiers.split(".")) for modifiers in accesses), default=0)


def _access_bytes(modifiers: list[str]) -> int:
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((narrow[part] for part in modifiers if part in narrow), 4)


def instances_of(resources: str, code: str, arch: int) -> Iterator[Instance]:
    """Every kernel in the outputs of ``cuobjdump -res-usage`` and ``-sass`` for one architecture."""
    bodies = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", code, re.DOTALL))
    for symbol, size in resource_usage(resources):
        body = bodies[symbol]
        yield Instance(
            kernel=kernel_name(symbol),
            arch=arch,
            registers=size["REG"],
            stack=size["STACK"] + size["LOCAL"],
            shared=size["SHARED"],
            spills=len(re.findall(r"\b(?:LDL|STL)\b", body)),
            widest_load=widest_load(body),
            widest_store=widest_store(body),
            tensor_cores=bool(re.search(r"\b(?:HMMA|HGMMA|DMMA|UTC\w*MMA)\b", body)),
        )


def resource_usage(resources: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Symbol and REG, STACK, SHARED, LOCAL of every kernel in the output of ``cuobjdump -res-usage``."""
    for symbol, usage in re.findall(r"Function (\S+?):\s*\n(.*)", resources):
        yield symbol, {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def cuda_instances(archs: Sequence[int] = ARCHS) -> Iterator[Instance]:
    """Of the built library; nothing where there is none."""
    for arch in archs:
        for library in cuda_libraries(arch):
            selected = ("-arch", f"sm_{arch}")
            resources = cuobjdump(*selected, "-res-usage", library)
            yield from instances_of(resources, cuobjdump(*selected, "-sass", library), arch)


def cuda_libraries(arch: int) -> list[Path]:
    """The built CUDA library if it has code for an architecture."""
    built = sorted(Path(_extension.__file__).parent.glob("_cuda*.so"))
    return [library for library in built if f"sm_{arch}.cubin" in cuobjdump("--list-elf", library)]


def _pyramid(dtype: torch.dtype, layout: str = "contiguous") -> list[torch.Tensor]:
    """P2..P6, whose memory nobody touches."""
    return [torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[layout]) for shape in LEVELS.values()]


def _pools(pyramid: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = [(x.shape[0], *size) for x in pyramid for size in (x.shape[2:], x.shape[1:2]) * 2]
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def launches(few: bool = False) -> Iterator[Callable[[], object]]:
    """Calls of the Triton launchers whose kernels are reported: every kernel, width of elements and mixed layouts.

    float16 shares the code of bfloat16 but for the weights' gradient of the adapted distance.

    Args:
        few: less than half of the calls, with every kernel; float64 beside 16 bits only.
    """
    from fbkd_ops.kernels import (
        attention_masks,
        attention_pool,
        channel_correlation,
        channel_divergence,
        masked_l2,
        spatial_l2,
    )

    for dtype in (torch.bfloat16, torch.float32, torch.float64)[: 2 if few else 3]:
        student, teacher, other = _pyramid(dtype), _pyramid(dtype), _pyramid(dtype, "channels_last")
        sums = accumulation_dtype(*student)
        pools, grad, absent = _pools(student, sums), torch.empty(len(student), dtype=sums), [None] * len(student)
        yield lambda: attention_pool.attention_pool_forward(student)
        yield lambda: attention_pool.attention_pool_backward(student, pools)
        rules = (pools, False), (pools, True), ([None] * len(pools), False)
        for maps, joint in rules[:1] if few and dtype != torch.bfloat16 else rules:
            settings = [0.5] * len(pools), [joint] * len(pools)
            yield lambda: attention_masks.attention_masks(maps, pools, *settings)
        seconds = teacher, other
        if few:
            seconds = [other if dtype == torch.float32 else teacher]
        for second in seconds:
            pair = student, second, pools[::4], absent
            yield lambda: masked_l2.masked_l2_forward(*pair)
            yield lambda: masked_l2.masked_l2_backward(*pair, grad)
            maps, coefficients = (student, second), [torch.empty(6, x.shape[1], dtype=torch.float64) for x in student]
            yield lambda: channel_correlation.channel_correlation_forward(*maps, 1e-6)
            yield lambda: channel_correlation.channel_correlation_backward(*maps, coefficients, grad)
            normalisers = [torch.empty(x.shape[0], 4, x.shape[1], dtype=sums) for x in student]
            yield lambda: channel_divergence.channel_divergence_forward(*maps, 1.0)
            yield lambda: channel_divergence.channel_divergence_backward(*maps, normalisers, 1.0, grad)
    for dtype in (torch.float32, torch.float64)[: 1 if few else 2]:
        maps = [torch.empty(shape[0], *shape[2:], dtype=dtype) for shape in LEVELS.values()]
        layers = [[torch.empty(count, dtype=dtype) for _ in maps] for count in (9, 1)]
        for gradient in (False, True):
            yield lambda: spatial_l2.spatial_l2(maps, *layers, maps, gradient)
    yield from _adapted_launches(FEW_ADAPTED if few else ADAPTED)
    yield from _relation_launches(FEW_RELATION if few else RELATION)
    yield from _statistics_launches(FEW_STATISTICS if few else STATISTICS)


def _adapted_launches(cases: Sequence[tuple]) -> Iterator[Callable[[], object]]:
    from fbkd_ops.kernels import adapted_masked_l2

    for of_student, of_teacher, layout in cases:
        student, teacher = _pyramid(of_student, layout), _pyramid(of_teacher, layout)
        sums = accumulation_dtype(*student, *teacher)
        pools, grad, absent = _pools(student, sums), torch.empty(len(student), dtype=sums), [None] * len(student)
        weights = [torch.empty(x.shape[1], x.shape[1]) for x in student]
        biases = [torch.empty(x.shape[1]) for x in student]
        level = student, weights, biases, teacher, pools[::4], pools[1::4]
        yield lambda: adapted_masked_l2.adapted_masked_l2_forward(*level, False)
        yield lambda: adapted_masked_l2.adapted_masked_l2_backward(*level, [], grad, pools, absent)


def _relation_launches(cases: Sequence[tuple]) -> Iterator[Callable[[], object]]:
    from fbkd_ops.kernels import relation_residual

    for of_student, of_teacher, layout in cases:
        student, teacher = _pyramid(of_student, layout), _pyramid(of_teacher, layout)
        sums = accumulation_dtype(*student, *teacher)
        matrices = [torch.empty(x.shape[0], x.shape[1], x.shape[1], dtype=sums) for x in student]
        offsets = [torch.empty(x.shape[:2], dtype=sums) for x in student]
        level, grad = (student, matrices, teacher, matrices, [None] * len(student), offsets), torch.empty(len(student))
        yield lambda: relation_residual.relation_residual_forward(*level, False)
        yield lambda: relation_residual.relation_residual_backward(*level, [], grad.to(sums), True)


def _statistics_launches(cases: Sequence[tuple]) -> Iterator[Callable[[], object]]:
    from fbkd_ops.kernels import non_local_statistics

    strides = 8, 4, 2, 2, 2
    for dtype, layout in cases:
        maps = _pyramid(dtype, layout)
        channels, sums = maps[0].shape[1], accumulation_dtype(*maps)
        shapes = (1, channels), (64, channels), (1, 64, channels), (128, channels), (128,)
        means, projections, inner, weights, biases = ([torch.empty(s, dtype=sums) for _ in maps] for s in shapes)
        cells = [(1, 128, (x.shape[2] // side) * (x.shape[3] // side)) for x, side in zip(maps, strides, strict=True)]
        pooled, winners = ([torch.empty(shape, dtype=of) for shape in cells] for of in (sums, torch.int32))
        pools = [side for stride in strides for side in 4 * (stride,)]
        forward = maps, means, projections, weights, biases, pools
        backward = maps, weights, maps, means, projections, inner, means, weights, winners, pooled, pools
        yield lambda: non_local_statistics.non_local_statistics_forward(*forward)
        yield lambda: non_local_statistics.non_local_statistics_backward_(*backward)


def compile_launches(arch: int, few: bool = False) -> list[Instance]:
    """Compile, for a GPU that is not here, what the launchers launch."""
    compiled = {}

    def note(_, kernel, *__) -> None:
        compiled[kernel.hash] = kernel

    with compiled_for(arch, note):
        for launch in launches(few):
            launch()
    return _triton_instances(list(compiled.values()), arch)


def use_target(arch: int) -> None:
    """Make an absent GPU the target of Triton in this process."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    driver.set_active(Driver())


@contextlib.contextmanager
def compiled_for(arch: int, note: Callable) -> Iterator[None]:
    """Compile Triton kernels in place of launching them, for a GPU that is not here.

    Args:
        arch: of the GPU. It stays Triton's target in this process.
        note: called with each launch: the kernel, what it was compiled to, its arguments by name, the grid.
    """
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        # Launchers pass the constants, which come last, by name.
        positional = dict(zip(self.arg_names[: len(arguments)], arguments, strict=True))
        note(self, kernel, positional | options, grid)

    use_target(arch)
    with mock.patch.object(JITFunction, "run", compile_only):
        yield


def _triton_instances(kernels: list, arch: int) -> list[Instance]:
    codes = [_text_section(kernel.asm["cubin"], kernel.name) for kernel in kernels]
    bodies = disassembled(codes, arch)
    return [_triton_instance(kernel, body, arch) for kernel, body in zip(kernels, bodies, strict=True)]


def _triton_instance(kernel, body: str, arch: int) -> Instance:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = cuobjdump("-res-usage", file.name)
    (instance,) = instances_of(resources, f"Function : {kernel.name}\n{body}", arch)
    maps = {kernel.src.signature.get(name, ("",))[0].removeprefix("*") for name in MAPS} - {""}
    tf32 = bool(re.search(r"mma.*[.:]tf32\b", kernel.asm["ptx"]))
    return instance._replace(shared=kernel.metadata.shared, tf32=tf32, maps=tuple(sorted(maps)))


def disassembled(codes: list[bytes], arch: int) -> list[str]:
    """Return the instructions of each code, a line each, from one call of nvdisasm, whose start takes half a second."""
    tool = cuobjdump_path().with_name("nvdisasm")
    target = f"SM{arch}a" if arch >= 90 else f"SM{arch}"  # with the products of warp groups, which Triton uses
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [tool, "-b", target, file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in listing.splitlines() if line.endswith(";")]
    if len(lines) != sum(map(len, codes)) // INSTRUCTION:
        raise RuntimeError(f"nvdisasm shows {len(lines)} lines, expected one each {INSTRUCTION} bytes of machine code")
    rest = iter(lines)
    return ["\n".join(itertools.islice(rest, len(code) // INSTRUCTION)) for code in codes]


def _text_section(cubin: bytes, name: str) -> bytes:
    """Return the machine code of a kernel from its ELF file (64 bits, little endian)."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: where its name begins, and offset and length of its contents.
    sections = [struct.unpack_from("<I20xQQ", cubin, table + index * size) for index in range(count)]
    first = sections[names][1]
    text = f".text.{name}\0".encode()
    (code,) = [cubin[at : at + length] for start, at, length in sections if cubin.startswith(text, first + start)]
    return code


def triton_instances() -> Iterator[Instance]:
    """Compiled in a process for each architecture, without the interpreter that tests may have asked for."""
    for arch in ARCHS:
        yield from finished(triton_compiler(arch))


def triton_compiler(arch: int, few: bool = False, **variables: str) -> subprocess.Popen:
    """A process that compiles for one architecture; ``variables`` are added to its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.code_report", "--compile-for", str(arch), *["--few"] * few]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment | variables, **pipes)


def finished(compiler: subprocess.Popen, timeout: float | None = None) -> list[Instance]:
    """What a compiler has made, once it ends."""
    out, errors = compiler.communicate(timeout=timeout)
    if compiler.returncode:
        raise RuntimeError(f"compilation ended with {compiler.returncode}: {errors[-3000:]}")
    return [Instance(*fields) for fields in json.loads(out.splitlines()[-1])]


def summaries(instances: list[Instance]) -> list[dict]:
    """One row for each kernel and architecture."""
    rows = []
    for kernel, arch in sorted({(instance.kernel, instance.arch) for instance in instances}):
        same = [instance for instance in instances if (instance.kernel, instance.arch) == (kernel, arch)]
        registers = [instance.registers for instance in same]
        widest = max(instance.widest_load for instance in same)
        row = {"kernel": kernel, "arch": arch, "instances": len(same)}
        row |= {"registers_min": min(registers), "registers_max": max(registers)}
        row |= {"spills": sum(instance.spills for instance in same)}
        row |= {name: max(getattr(instance, name) for instance in same) for name in ("stack", "shared", "widest_load")}
        rows.append(row | {"with_widest_load": sum(instance.widest_load == widest for instance in same)})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the figures here, and the compilers into a .json")
    parser.add_argument("--compile-for", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--few", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.compile_for:
        print(json.dumps(compile_launches(options.compile_for, options.few)))
        return
    import triton

    facts = {"revision": revision(), "modified": modified()}
    facts |= {"nvcc": _extension.build_report().get("nvcc"), "triton": triton.__version__}
    found = {"cuda": summaries([*cuda_instances()]), "triton": summaries([*triton_instances()])}
    rows = [{"compiler": compiler} | row for compiler, group in found.items() for row in group]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if options.csv:
        write(options.csv, facts, rows)


if __name__ == "__main__":
    main()
