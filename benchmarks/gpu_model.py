"""Predicts what a training step of a loss takes on an H200, without a GPU.

    python -m benchmarks.gpu_model [--csv benchmarks/results/gpu-model.csv]

A kernel's time follows from its compiled code and the launch's sizes: what a pass through each of its loops costs is
read from the machine code, how often a program passes from Triton's code, how many programs fit a multiprocessor from
registers and shared memory. ``gpu_model_machine.py`` has all that is known of the machine; nothing else was measured.

A program that runs alone needs the sum of what it waits for: its instructions, products, barriers, memory. k programs
that share a multiprocessor need at best that time or k times the resource that they use most, whichever is longer, at
worst that time and k - 1 times the resource, as customers of a closed queue; the mean of both is taken. Programs are
dealt to the multiprocessors in order.
"""

import argparse
import functools
import heapq
import math
import os
import random
import re
import tempfile
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.code_report import cuda_libraries, cuobjdump, instances_of, kernel_name, resource_usage
from benchmarks.environment import modified, revision
from benchmarks.gpu_model_machine import CONSTANTS, constant
from benchmarks.gpu_model_sass import Block, Loop, machine_code
from benchmarks.gpu_model_step import ARCH, CUDA_SOURCES, CudaLaunch, SmallOp, Step, TritonLaunch, captured_step
from benchmarks.gpu_model_ttir import Program, evaluate, triton_code
from benchmarks.inputs import LEVELS, Case, Cost
from benchmarks.loss_suites import FBKD_LOSS, STRIDES
from benchmarks.results import write
from benchmarks.suites import SUITES

CASES = ((16, "bfloat16"), (1, "bfloat16"), (16, "float32"), (1, "float32"))
# Losses of one op beside it, with the suite that knows their least traffic.
OTHERS = {"PKDLoss": "channel_correlation", "CWDLoss": "channel_divergence"}
# Neighbouring programs that stand for all of a launch, and how many such groups there are.
GROUP, GROUPS = 4, 24
KERNELS_OF_OP = {"select_backward": 2, "slice_backward": 2}  # zeros, then a copy into them


# --- Kernels ----------------------------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """What a program needs, in cycles: to itself, and of each resource that a multiprocessor's programs share."""

    alone: float
    resources: dict[str, float]

    def together(self, programs: int) -> float:
        """Cycles until each of ``programs`` that share a multiprocessor has ended."""
        busiest = max(self.resources.values())
        return (max(self.alone, programs * busiest) + self.alone + (programs - 1) * busiest) / 2


class Kernel(NamedTuple):
    """A compiled kernel."""

    blocks: list[Block]  # of the loops of Triton's code, in preorder
    matched: bool  # whether those of the machine code have the same nesting
    code: Any  # TritonCode
    registers: int
    shared: int  # bytes
    warps: int

    @property
    def programs_at_once(self) -> int:
        """That a multiprocessor runs."""
        warp_registers = 32 * math.ceil(self.registers / 8) * 8
        limits = (
            constant("registers") // (warp_registers * self.warps),
            constant("shared") // (self.shared + constant("shared_reserved")),
            constant("warps") // self.warps,
            constant("programs"),
        )
        return int(min(limits))


def compiled_kernel(compiled: Any) -> Kernel:
    """Read what Triton compiled for sm_90."""
    warps = compiled.metadata.num_warps
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = cuobjdump("-sass", "-res-usage", file.name)
    (instance,) = instances_of(sass, sass, ARCH)
    machine, code = machine_code(sass, warps), triton_code(compiled.asm["ttir"], 32 * warps)
    matched = _nesting(machine.loops) == _nesting(code.loops)
    blocks = machine.blocks if matched else _shared_out(machine.blocks, code.sizes)
    return Kernel(blocks, matched, code, instance.registers, compiled.metadata.shared, warps)


def _nesting(loop: Loop) -> list:
    return [_nesting(inner) for inner in loop.inner]


def _shared_out(blocks: list[Block], sizes: list[float]) -> list[Block]:
    """The machine's blocks dealt to loops of another nesting, by the sizes of these: a compiler has unrolled some."""
    shares, result = [size / sum(sizes) for size in sizes], []
    for share in shares:
        total = Block()
        for block in blocks:
            total.instructions += round(share * block.instructions)
            total.wavefronts += share * block.wavefronts
            total.flops.update({kind: share * count for kind, count in block.flops.items()})
            total.barriers += round(share * block.barriers)
            total.product_waits += round(share * block.product_waits)
            total.loads += round(share * (block.loads + block.copies))
        result.append(total)
    return result


def program_costs(kernel: Kernel, program: Program, wait: float) -> Costs:
    """The cost of one program, whose reads take ``wait`` cycles."""
    alone, resources = 0.0, dict.fromkeys(("issue", "tensor cores", "shared memory", "L2"), 0.0)
    l2 = constant("l2") / constant("multiprocessors") / constant("clock")  # bytes a cycle
    for block, passes, moved in zip(kernel.blocks, program.passes, program.bytes, strict=True):
        alone += passes * pass_alone(block, kernel.warps, wait)
        resources["issue"] += passes * block.instructions * kernel.warps / constant("issue")
        resources["tensor cores"] += passes * product_cycles(block)
        resources["shared memory"] += passes * block.wavefronts
        resources["L2"] += moved / l2
    return Costs(max(alone, *resources.values()), resources)


def product_cycles(block: Block) -> float:
    """Of a multiprocessor's tensor cores, for one pass."""
    cycles = constant("multiprocessors") * constant("clock")
    return sum(count * cycles / constant(kind) for kind, count in block.flops.items())


def pass_alone(block: Block, warps: int, wait: float) -> float:
    """Cycles of one pass by a program that has a multiprocessor to itself, and whose reads take ``wait``."""
    instructions = block.instructions * max(constant("instruction"), warps / constant("issue"))
    products = product_cycles(block)
    # Products that are waited for stand between the instructions that make their operands and those that use them.
    cycles = instructions + products if block.product_waits else max(instructions, products)
    cycles += block.product_waits * constant("product_wait") + block.barriers * constant("barrier")
    if block.loads:
        cycles += wait
    if block.copies:
        # Copies for the next pass but one have a whole pass to arrive; others are waited for.
        in_time = block.pending is not None and block.pending >= block.groups > 0
        cycles = max(cycles, wait) if in_time else cycles + wait
    return cycles


def predict_triton(launch: TritonLaunch, kernel: Kernel) -> dict:
    """A launch's row."""
    chosen = sampled_programs(launch.programs)
    programs = [evaluate(kernel.code, launch.arguments, index) for index in chosen]
    scale = launch.programs / len(programs)
    moved, dram = scale * sum(sum(program.bytes) for program in programs), dram_bytes(launch, programs)
    missed = min(dram / moved, 1) if moved else 0
    wait = missed * constant("dram_wait") + (1 - missed) * constant("l2_wait")
    costs = [program_costs(kernel, program, wait) for program in programs]
    multiprocessors = int(constant("multiprocessors"))
    at_once = min(kernel.programs_at_once, math.ceil(launch.programs / multiprocessors))
    times = [each.together(at_once) for each in costs]
    schedule = scheduled(times, launch.programs, multiprocessors * at_once) / constant("clock")
    flops = {
        kind: scale
        * sum(
            passes * block.flops[kind] for p in programs for passes, block in zip(p.passes, kernel.blocks, strict=True)
        )
        for kind in {kind for block in kernel.blocks for kind in block.flops}
    }
    total = {name: sum(each.resources[name] for each in costs) for name in costs[0].resources}
    return {
        "kernel": launch.kernel,
        "programs": launch.programs,
        "warps": kernel.warps,
        "registers": kernel.registers,
        "shared": kernel.shared,
        "programs_at_once": kernel.programs_at_once,
        "waves": round(launch.programs / (multiprocessors * kernel.programs_at_once), 2),
        **{f"{kind}_gflop": round(count / 1e9, 3) for kind, count in sorted(flops.items())},
        "l2_gb": round(moved / 1e9, 4),
        "dram_gb": round(dram / 1e9, 4),
        "busiest": max(total, key=total.get),
        "matched": kernel.matched,
        "floor_us": round(1e6 * dram / constant("dram"), 2),
        "predicted_us": round(1e6 * max(schedule, dram / constant("dram")) + constant("launch"), 2),
    }


def sampled_programs(programs: int) -> list[int]:
    """Indices of programs that stand for all: groups of neighbours, evenly spread but for a random shift."""
    if programs <= GROUP * GROUPS:
        return list(range(programs))
    spread, generator = programs / GROUPS, random.Random(0)
    firsts = [int(spread * index + generator.random() * (spread - GROUP)) for index in range(GROUPS)]
    return [first + offset for first in firsts for offset in range(GROUP)]


def scheduled(times: list[float], programs: int, slots: int) -> float:
    """When the last of ``programs`` ends that are dealt to ``slots`` in order; ``times`` are of some, evenly spread."""
    if programs > 32 * slots:
        return programs * sum(times) / len(times) / slots + max(times) / 2
    ends = [0.0] * min(slots, programs)
    for index in range(programs):
        heapq.heapreplace(ends, ends[0] + times[index * len(times) // programs])
    return max(ends)


def dram_bytes(launch: TritonLaunch, programs: list[Program]) -> float:
    """Each tensor is read once, and written once, whatever L2 reads again."""
    moved: dict[tuple[int, str], float] = {}
    sizes: dict[int, int] = {}
    for program in programs:
        for (argument, kind), count in program.tensors.items():
            storage, size = launch.tensors[argument]
            sizes[storage] = max(sizes.get(storage, 0), size)
            moved[storage, kind] = moved.get((storage, kind), 0) + count * launch.programs / len(programs)
    return sum(min(count, sizes[storage]) for (storage, _), count in moved.items())


def predict_cuda(launch: CudaLaunch) -> dict:
    """The row of a kernel that is limited by memory; registers and shared memory only where its library is built."""
    seconds = launch.bytes / constant("dram")
    kernel = cuda_resources().get(launch.kernel)
    row = {"kernel": launch.kernel}
    if kernel:
        row |= {"warps": kernel.warps, "registers": kernel.registers, "shared": kernel.shared}
        row |= {"programs_at_once": kernel.programs_at_once}
    row |= {"dram_gb": round(launch.bytes / 1e9, 4), "busiest": "DRAM"}
    return row | {"floor_us": round(1e6 * seconds, 2), "predicted_us": round(1e6 * seconds + constant("launch"), 2)}


@functools.cache
def cuda_resources() -> dict[str, Kernel]:
    """What the kernels of the CUDA library take, by name: the instance with the most registers, of any dtype."""
    kernels: dict[str, Kernel] = {}
    warps = int(re.search(r"kWarps = (\d+)", (CUDA_SOURCES / "device.cuh").read_text()).group(1))
    for library in cuda_libraries(ARCH):
        for symbol, size in resource_usage(cuobjdump("-arch", f"sm_{ARCH}", "-res-usage", library)):
            kernel = Kernel([], True, None, size["REG"], size["SHARED"], warps)
            known = kernels.setdefault(kernel_name(symbol), kernel)
            if kernel.registers > known.registers:
                kernels[kernel_name(symbol)] = kernel
    return kernels


# --- The step ---------------------------------------------------------------------------------------------------------


def small_op_us(op: SmallOp) -> float:
    """GPU time of an op of PyTorch."""
    kernels = KERNELS_OF_OP.get(op.name, 1)
    seconds = max(op.bytes / constant("dram"), op.flops / constant("float32"))
    return kernels * constant("small_kernel") + 1e6 * seconds


def host_us(step: Step) -> float:
    """Time of the host to queue a step."""
    ops = [op for phase in step.ops.values() for op in phase]
    triton = sum(isinstance(launch, TritonLaunch) for launch in step.launches)
    dispatched = len(ops) + len(step.launches)
    return (
        dispatched * constant("host_op")
        + step.views * constant("host_view")
        + step.nodes * constant("host_node")
        + triton * constant("host_triton")
    )


def least_cost(case: Case, loss: str) -> Cost:
    """What any implementation has to move and to multiply: of the other losses that of each level's op."""
    if loss not in OTHERS:
        return FBKD_LOSS.cost(case)
    levels = [SUITES[OTHERS[loss]].cost(Case(shape, case.dtype)) for shape in case.shapes]
    return Cost(*(sum(column) for column in zip(*map(astuple, levels), strict=True)))


def roofline_us(case: Case, loss: str) -> float:
    """The least time for the products and the bytes that any implementation needs."""
    cost = least_cost(case, loss)
    rate = constant("TF32" if case.dtype == "float32" else "BF16")
    passes = ((cost.forward_bytes, cost.forward_flops), (cost.backward_bytes, cost.backward_flops))
    return 1e6 * sum(max(moved / constant("dram"), flops / rate) for moved, flops in passes)


def predict(case: Case, kernels: dict[str, Kernel], loss: str = "FBKDLoss") -> tuple[dict, list[dict]]:
    """Return a step's figures and the rows of its launches; ``kernels`` keeps what was read of compiled ones."""
    step = captured_step(case, loss)
    key, rows = {"loss": loss, "images": case.shape[0], "dtype": case.dtype}, []
    for launch in step.launches:
        if isinstance(launch, CudaLaunch):
            rows.append(key | predict_cuda(launch))
            continue
        code = launch.compiled.hash
        if code not in kernels:
            kernels[code] = compiled_kernel(launch.compiled)
        rows.append(key | predict_triton(launch, kernels[code]))
    ops = [op for phase in step.ops.values() for op in phase]
    fused, small, host = sum(row["predicted_us"] for row in rows), sum(map(small_op_us, ops)), host_us(step)
    times = {"fused_us": fused, "small_us": small, "gpu_us": fused + small, "host_us": host}
    times |= {"eager_us": max(fused + small, host), "roofline_us": roofline_us(case, loss)}
    counts = {"small_ops": len(ops), "views": step.views, "nodes": step.nodes}
    times["floor_us"] = sum(row["floor_us"] for row in rows)
    return key | counts | {name: round(us, 1) for name, us in times.items()}, rows


def report() -> tuple[dict, list[dict]]:
    """Return the facts, the figures of each step among them, and the rows of all launches."""
    import torch
    import triton

    kernels: dict[str, Kernel] = {}
    shape = LEVELS["P2"][1:]
    facts = {"revision": revision(), "modified": modified(), "torch": torch.__version__, "triton": triton.__version__}
    facts["constants"] = {name: each.value for name, each in CONSTANTS.items()}
    cases = [Case((images, *shape), dtype, strides=STRIDES) for images, dtype in CASES]
    steps = [predict(case, kernels, loss) for loss in ("FBKDLoss", *OTHERS) for case in cases]
    return facts | {"steps": [figures for figures, _ in steps]}, [row for _, rows in steps for row in rows]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the launches here, and the steps into a .json")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted and not compiled")
    facts, rows = report()
    if options.csv:
        write(options.csv, facts, rows)
    for step in facts["steps"]:
        print(", ".join(f"{name} {value}" for name, value in step.items()))


if __name__ == "__main__":
    main()
