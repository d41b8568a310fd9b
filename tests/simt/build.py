"""Builds tests/simt/<name>.cpp, a driver of CUDA kernels on the CPU, and calls its functions.

build("masked_l2").run("masked_l2_forward", x, sizes, out, outputs=[out])
"""

import atexit
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent
COMMON = ["-std=c++20", "-fPIC", "-g1", "-w", "-U_FORTIFY_SOURCE", "-fno-gnu-unique", "-ffp-contract=off"]
# Only the calls that the compiler puts in: accesses.cpp has what they call, and the sanitizers' libraries stay out.
# A load moved out of a loop would be one that the kernel may not make.
CHECKED = ["-O1", "-fno-tree-loop-im", "-fsanitize=thread,alignment,bounds-strict"]
LINKED = ["-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic"]
ORDERS = (0, 1, 2, 3)


class KernelError(Exception):
    """What a kernel did wrong, with block, thread and line."""


def cuda_headers():
    """Folder of cuda_fp16.h and what it includes: of a toolkit, or of the wheels that torch brings; else None."""
    site = Path(sysconfig.get_paths()["purelib"])
    candidates = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include", *site.glob("nvidia/*/include")]
    needed = ("cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h")
    return next((folder for folder in candidates if all((folder / name).exists() for name in needed)), None)


@functools.cache
def output_folder():
    folder = tempfile.mkdtemp(prefix="simt_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def compile(*arguments):
    command = ["g++", *COMMON, f"-I{cuda_headers()}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done.stderr if done.returncode else ""


@functools.cache
def compile_runtime():
    objects = {output_folder() / f"{name}.o": FOLDER / f"{name}.cpp" for name in ("fibers", "accesses")}
    return "".join(compile("-O2", "-c", source, "-o", result) for result, source in objects.items()), [*objects]


@functools.cache
def compile_driver(name):
    """Compiler's errors, and the library. Once a session, even where it fails."""
    compiled, library = output_folder() / f"{name}.o", output_folder() / f"{name}.so"
    errors, runtime = compile_runtime()
    errors = errors or compile(*CHECKED, "-c", FOLDER / f"{name}.cpp", "-o", compiled)
    return errors or compile(*LINKED, compiled, *runtime, "-o", library), library


@functools.cache
def build(name):
    """The driver's library; skips the test where the compiler, CUDA's headers or the kernels' sources are missing."""
    if shutil.which("g++") is None or cuda_headers() is None or not (FOLDER.parents[1] / "csrc").exists():
        pytest.skip("needs g++, CUDA's headers and the source tree")
    errors, library = compile_driver(name)
    if errors:
        pytest.fail(f"{name}.cpp does not compile:\n{errors[:5000]}", pytrace=False)
    return Library(library)


def elements(tensor):
    """From the first to the last element, in elements."""
    return (
        1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel()
        else 0
    )


def flat(tensor):
    """Memory of a densely packed tensor, in any order of dimensions, as bytes."""
    assert elements(tensor) == tensor.numel(), "outputs have to be densely packed"
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def guarded(tensor):
    """Copy with the same strides and alignment in memory of its own: what lies between its elements is NaN."""
    size = elements(tensor) * tensor.element_size()
    memory = torch.full((size + 128,), 255, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64 + tensor.data_ptr() % 64
    inside = memory[begin : begin + size].view(tensor.dtype)
    distinct = tensor
    for dim, stride in enumerate(tensor.stride()):
        distinct = distinct.narrow(dim, 0, 1) if stride == 0 and tensor.numel() else distinct  # of an expanded tensor
    inside.as_strided(distinct.shape, distinct.stride()).copy_(distinct)
    return inside.as_strided(tensor.shape, tensor.stride())


class Library:
    def __init__(self, path):
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.simt_unwritten.restype = ctypes.c_int64

    def run(self, name, *arguments, outputs, orders=ORDERS):
        """Calls the driver's function under several orders of threads and blocks and compares `outputs` bit by bit.

        Arguments: tensors (as pointers), None, int (int64_t), float (double), bool, and lists of these (as arrays).
        Outputs are those among the tensors that kernels write, every byte of them; the others are only for reading.
        """
        first = None
        for order in orders:
            self.library.simt_order(ctypes.c_uint(order))
            for output in outputs:
                flat(output).fill_(255)
            self.call(name, arguments, outputs)
            results = [flat(output).clone() for output in outputs]
            first = first or results
            for index, (mine, theirs) in enumerate(zip(results, first, strict=True)):
                if not torch.equal(mine, theirs):
                    raise KernelError(f"{name}: the order of threads changes output {index} (order {order})")

    def call(self, name, arguments, outputs):
        alive = []  # the copies
        self.library.simt_clear()
        converted = [self.convert(argument, f"argument {i}", outputs, alive) for i, argument in enumerate(arguments)]
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*converted)
        if message is not None:
            raise KernelError(f"{name}: {self.with_lines(message.decode())}")
        for index, output in enumerate(outputs):
            byte = self.library.simt_unwritten(ctypes.c_void_p(output.data_ptr())) if output.numel() else -1
            if byte >= 0:
                raise KernelError(f"{name}: no kernel writes output {index} at element {byte // output.element_size()}")
        self.library.simt_clear()

    def convert(self, value, name, outputs, alive):
        if isinstance(value, (list, tuple)):
            items = [self.convert(item, f"{name}[{i}]", outputs, alive) for i, item in enumerate(value)]
            return (type(items[0]) * len(items))(*items) if items else ctypes.c_void_p()
        if isinstance(value, torch.Tensor):
            return self.pointer(value, name, outputs, alive)
        kinds = {type(None): ctypes.c_void_p, bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}
        return kinds[type(value)](value)

    def pointer(self, tensor, name, outputs, alive):
        if tensor.numel() == 0:
            return ctypes.c_void_p()
        written = any(tensor is output for output in outputs)
        if not written:
            tensor = guarded(tensor.detach())
            alive.append(tensor)
        address, size = ctypes.c_void_p(tensor.data_ptr()), elements(tensor) * tensor.element_size()
        self.library.simt_add(address, ctypes.c_size_t(size), ctypes.c_bool(written), name.encode())
        return address

    def with_lines(self, message):
        """Replaces code+0x12ab by file:line."""

        def line(match):
            command = ["addr2line", "-e", str(self.path), match.group(1)]
            if shutil.which("addr2line") is None:
                return match.group(0)
            return Path(subprocess.run(command, capture_output=True, text=True).stdout.split()[0]).name

        return re.sub(r"code\+(0x[0-9a-f]+)", line, message)
