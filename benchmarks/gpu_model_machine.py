"""Everything that ``benchmarks.gpu_model`` knows of the machine."""

from typing import NamedTuple


class Constant(NamedTuple):
    """One number about the machine; a ``lead`` was neither measured by us nor taken from a data sheet."""

    value: float
    unit: str
    source: str
    lead: bool = True


CONSTANTS = {
    "multiprocessors": Constant(132, "", "H200 data sheet", lead=False),
    "clock": Constant(1.755e9, "Hz", "boost clock of an H100 SXM under load"),
    "registers": Constant(65536, "of a multiprocessor", "CUDA programming guide, 9.0", lead=False),
    "shared": Constant(227 * 1024, "bytes of a multiprocessor for programs", "CUDA programming guide, 9.0", lead=False),
    "shared_reserved": Constant(1024, "bytes of each program", "CUDA programming guide, 9.0", lead=False),
    "warps": Constant(64, "of a multiprocessor", "CUDA programming guide, 9.0", lead=False),
    "programs": Constant(32, "of a multiprocessor", "CUDA programming guide, 9.0", lead=False),
    "issue": Constant(4, "instructions a cycle of a multiprocessor", "CUDA programming guide, 9.0", lead=False),
    "dram": Constant(4.3e12, "bytes/s", "copy measured on an H200", lead=False),
    "l2": Constant(5.5e12, "bytes/s into all multiprocessors", "assumed"),
    "BF16": Constant(780e12, "flop/s", "dense product measured on an H200: 770 to 800", lead=False),
    "F16": Constant(780e12, "flop/s", "as BF16", lead=False),
    "TF32": Constant(390e12, "flop/s", "half of BF16, as in the data sheet"),
    "F64": Constant(67e12, "flop/s", "H200 data sheet, tensor cores", lead=False),
    "float32": Constant(67e12, "flop/s without tensor cores", "H200 data sheet", lead=False),
    "instruction": Constant(1.75, "cycles of a warp that runs alone", "4 of a dependent one, two chains or more"),
    "product_wait": Constant(30, "cycles until a finished product is seen", "order of published microbenchmarks"),
    "barrier": Constant(20, "cycles", "order of published microbenchmarks"),
    "l2_wait": Constant(300, "cycles for bytes that L2 has", "published microbenchmarks of an H100: 260"),
    "dram_wait": Constant(800, "cycles for bytes that L2 does not have", "the same without load: 480 to 600"),
    "launch": Constant(2.0, "us between two kernels of a stream", "usual in a CUDA graph: 1.5 to 2"),
    "small_kernel": Constant(1.75, "us of a kernel on little data, and to the next", "usual in a CUDA graph: 1.5 to 2"),
    "host_op": Constant(6.0, "us of a dispatched op with a kernel", "usual in eager PyTorch: 4 to 6"),
    "host_view": Constant(3.0, "us of a view or an allocation", "half of host_op: no launch"),
    "host_node": Constant(8.0, "us of a node of the autograd graph, made and run", "somewhat more than an op"),
    "host_triton": Constant(27.0, "us of a Triton launch's binder and key", "683 us for 25, best of 30", lead=False),
}


def constant(name: str) -> float:
    if name not in CONSTANTS:
        raise KeyError(f"the model has no constant {name!r}: add it to CONSTANTS, with its source")
    return CONSTANTS[name].value
