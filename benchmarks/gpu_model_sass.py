"""What one pass through each loop of a kernel costs, read from its machine code for sm_90 (SASS)."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

WARPGROUP = 4  # warps that issue a product (HGMMA) together
WAVEFRONT = 128  # bytes that shared memory moves in a cycle

# Rows, columns and inner extent of a product of one warp, by the digits of the instruction's name.
WARP_PRODUCTS = {"1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "8x8x4": (8, 8, 4), "16x8x8": (16, 8, 8)}
OPERAND_BYTES = {"TF32": 4, "BF16": 2, "F16": 2}


@dataclass
class Block:
    """One pass of a program, all of its warps, through a loop's own instructions: those outside its inner loops."""

    instructions: int = 0  # of each warp
    flops: Counter = field(default_factory=Counter)  # on the tensor cores, by the operands' type: "BF16", "TF32", ...
    wavefronts: float = 0.0  # of shared memory and the L1 cache
    barriers: int = 0
    product_waits: int = 0  # for all products in flight
    loads: int = 0  # from global memory into registers
    copies: int = 0  # from global into shared memory, asynchronous
    groups: int = 0  # that these copies form
    pending: int | None = None  # groups of copies that may still be in flight behind the wait for one


class Loop(NamedTuple):
    """A loop and those inside it. The kernel itself is the outermost."""

    first: int  # address
    last: int
    inner: list["Loop"]


class Machine(NamedTuple):
    """A kernel's loops and, in preorder, their blocks."""

    loops: Loop
    blocks: list[Block]


def machine_code(sass: str, warps: int) -> Machine:
    """The kernel in the output of ``cuobjdump -sass``; ``warps`` are those of a program."""
    code = _instructions(sass)
    loops = _loops(code)
    return Machine(loops, [_block(_own_instructions(code, loop), warps) for loop in _preorder(loops)])


def _instructions(sass: str) -> list[tuple[int, str]]:
    """``(address, instruction)`` without predicates, and without what lies behind the last exit.

    There are subroutines for operands that the kernels never have, such as quotients of 64 bits.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([^;/]*?)\s*;", sass)
    code = [(int(address, 16), text) for address, text in lines]
    last = max(index for index, (_, text) in enumerate(code) if text.startswith("EXIT"))
    return code[: last + 1]


def _loops(code: list[tuple[int, str]]) -> Loop:
    """A branch back to an address is the end of a loop that starts there."""
    ends: dict[int, int] = {}
    for address, text in code:
        target = re.match(r"BRA\b.*?0x([0-9a-f]+)", text)
        if target and (first := int(target.group(1), 16)) < address:
            ends[first] = max(ends.get(first, 0), address)
    root = Loop(code[0][0], code[-1][0], [])
    for first, last in sorted(ends.items()):
        parent = root
        while around := [loop for loop in parent.inner if loop.first <= first and last <= loop.last]:
            parent = around[0]
        parent.inner.append(Loop(first, last, []))
    return root


def _preorder(loop: Loop) -> list[Loop]:
    return [loop, *(each for inner in loop.inner for each in _preorder(inner))]


def _own_instructions(code: list[tuple[int, str]], loop: Loop) -> list[str]:
    def is_own(address: int) -> bool:
        return loop.first <= address <= loop.last and not any(i.first <= address <= i.last for i in loop.inner)

    return [text for address, text in code if is_own(address)]


def _block(instructions: list[str], warps: int) -> Block:
    block = Block()
    for text in instructions:
        opcode, _, operands = text.partition(" ")
        name, *modifiers = opcode.split(".")
        if name == "NOP":
            continue
        block.instructions += 1
        if name.endswith("GMMA"):
            _add_warpgroup_product(block, modifiers, operands, warps)
        elif name.endswith("MMA"):
            kind = "F64" if name == "DMMA" else modifiers[-1]
            block.flops[kind] += 2 * math.prod(WARP_PRODUCTS[modifiers[0]]) * warps
            block.product_waits += 1
        elif name in ("LDS", "STS", "LDSM", "STSM", "SHFL", "LDG", "STG", "LDGSTS"):
            block.wavefronts += warps * _wavefronts(name, modifiers)
            block.loads += name == "LDG"
            block.copies += name == "LDGSTS"
        elif name == "BAR":
            block.barriers += 1
        elif opcode == "WARPGROUP.DEPBAR.LE":
            block.product_waits += operands.endswith(" 0x0")
        elif name == "LDGDEPBAR":
            block.groups += 1
        elif opcode == "DEPBAR.LE":
            block.pending = int(operands.rpartition("0x")[2], 16)
    return block


def _wavefronts(name: str, modifiers: list[str]) -> int:
    """Of one warp's access: four bytes a lane, or a matrix of 8x8 16-bit elements, take one."""
    if name in ("LDSM", "STSM"):
        return int(modifiers[-1]) if modifiers[-1].isdigit() else 1
    return next((int(width) // 32 for width in ("64", "128") if width in modifiers), 1)


def _add_warpgroup_product(block: Block, modifiers: list[str], operands: str, warps: int) -> None:
    """The second operand comes from shared memory, the first one too where it is a descriptor."""
    rows, cols, inner = map(int, modifiers[0].split("x"))
    kind, groups = modifiers[-1], warps // WARPGROUP
    shared_rows = cols + (rows if operands.split(", ")[1].startswith("gdesc") else 0)
    block.wavefronts += groups * shared_rows * inner * OPERAND_BYTES.get(kind, 1) / WAVEFRONT
    block.flops[kind] += groups * 2 * rows * cols * inner
