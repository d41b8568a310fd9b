"""How often a program of a kernel runs each of its loops, and what it reads and writes, from Triton's code (TTIR).

TTIR is structured: loops, branches and integers. The integers are evaluated for a program's index and a launch's
arguments. What comes from memory, and a tensor whose elements differ, is not known; no loop may depend on it.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MOST_PASSES = 1 << 16  # of a while loop, one by one


class Pointer(NamedTuple):
    """Into the tensor of the kernel's argument of this name."""

    argument: str


Value = int | Pointer | None


@dataclass
class Operation:
    """One operation with its regions."""

    name: str
    results: list[str]
    operands: list[str]
    text: str  # behind the name, without types
    types: str
    size: float = 0.0  # see _size
    access: str = ""  # "load" or "store" of memory
    loop: int = 0  # a loop's index in preorder; the kernel itself has 0
    regions: list[list["Operation"]] = field(default_factory=list)
    parameters: list[list[str]] = field(default_factory=list)  # of each region


class Nest(NamedTuple):
    """A loop, by its index in preorder, and those inside it."""

    index: int
    inner: list["Nest"]


class TritonCode(NamedTuple):
    """A kernel."""

    arguments: list[tuple[str, str]]  # what the code calls them, what the source does
    body: list[Operation]
    loops: Nest
    sizes: list[float]  # of each loop's own operations


@dataclass
class Program:
    """What one program does; lists are by loop, in preorder."""

    passes: list[float]  # through the loop's own operations; a branch that is left out makes part of a pass
    bytes: list[float]  # read and written in whole tiles
    tensors: Counter  # the same bytes by (argument, "load" or "store")


def triton_code(text: str, threads: int) -> TritonCode:
    """The kernel in ``text``; ``threads`` of a program share the elements of a tile."""
    if " tt.call " in text:
        raise ValueError("a kernel calls a function: what runs there is not counted")
    header = next(line for line in text.splitlines() if line.strip().startswith("tt.func"))
    arguments = re.findall(r'(%[\w.$-]+): [^%]*?loc\("([^"]+)"\(', header)
    lines = [line for line in map(_without_location, text.splitlines()) if line and not line.startswith("#")]
    start = next(index for index, line in enumerate(lines) if line.startswith("tt.func"))
    body, _, _ = _region(lines[:start:-1])
    root, sizes = Nest(0, []), [0.0]
    _measure(body, root, sizes, threads)
    return TritonCode(arguments, body, root, sizes)


def _without_location(line: str) -> str:
    while (shorter := re.sub(r"\s*\bloc\([^()]*\)", "", line)) != line:
        line = shorter
    return line.strip()


def _region(lines: list[str]) -> tuple[list[Operation], list[str], str]:
    """Operations up to the closing brace, the region's parameters, and the line of that brace.

    ``lines`` stand in reverse order and are used up.
    """
    operations, parameters = [], []
    while lines and not (line := lines.pop()).startswith("}"):
        if line.startswith("^"):
            parameters = re.findall(r"(%[\w.$-]+):", line)
            continue
        operation = _operation(line)
        while line.endswith("{"):
            region, names, line = _region(lines)
            operation.regions.append(region)
            operation.parameters.append(names)
            operation.types += line
        operations.append(operation)
    return operations, parameters, line


def _operation(line: str) -> Operation:
    made = re.match(r"((?:%[\w.$-]+(?::\d+)?(?:, )?)+) = ", line)
    results = [name for label in (made.group(1).split(", ") if made else []) for name in _result_names(label)]
    name, rest = re.match(r'"?([\w.]+)"?(.*)', line[made.end() if made else 0 :]).groups()
    text, _, types = rest.partition(" : ")
    return Operation(name, results, re.findall(r"%[\w.$-]+(?:#\d+)?", text), text, types)


def _result_names(label: str) -> list[str]:
    name, _, count = label.partition(":")
    return [f"{name}#{index}" for index in range(int(count))] if count else [name]


def _measure(operations: list[Operation], loop: Nest, sizes: list[float], threads: int) -> None:
    """Set what operations do, number the loops, and add up ``sizes`` of each."""
    for operation in operations:
        operation.size, operation.access = _size(operation, threads), _access(operation.name)
        sizes[loop.index] += operation.size
        inside = loop
        if operation.name in ("scf.for", "scf.while"):
            inside = Nest(len(sizes), [])
            operation.loop = inside.index
            sizes.append(0.0)
            loop.inner.append(inside)
        if operation.name.startswith("scf."):
            for region in operation.regions:
                _measure(region, inside, sizes, threads)


def _size(operation: Operation, threads: int) -> float:
    """About how many instructions of a thread: one for each of its elements of the largest tensor."""
    if operation.name in ("arith.constant", "tt.make_range") or operation.name.startswith("scf."):
        return 0.0
    tensors = re.findall(r"tensor<((?:\d+x)+)", operation.types)
    return max([1.0, *(_elements(tensor) / threads for tensor in tensors)])


def _access(name: str) -> str:
    kind = re.match(r"tt\.(?:descriptor_)?(load|gather|store|atomic|reduce)(?:_rmw|_cas)?$", name)
    if kind is None or name in ("tt.reduce", "tt.gather"):
        return ""
    return "load" if kind.group(1) in ("load", "gather") else "store"


def _elements(extents: str) -> int:
    return math.prod(map(int, re.findall(r"\d+", extents)))


def evaluate(code: TritonCode, arguments: Mapping[str, Value], program: int) -> Program:
    """What program ``program`` does in a launch with ``arguments``, by their names in the source."""
    walk = _Walk({label: arguments.get(name) for label, name in code.arguments}, program, len(code.sizes))
    walk.run(code.body, 0, 1.0)
    passes = [done / size if size else 0.0 for done, size in zip(walk.done, code.sizes, strict=True)]
    return Program(passes, walk.bytes, walk.tensors)


class _Walk:
    """Runs a kernel's integers; ``factor`` says how many passes one run of a region stands for."""

    def __init__(self, values: dict[str, Value], program: int, loops: int):
        self.values, self.program = values, program
        self.done, self.bytes = [0.0] * loops, [0.0] * loops
        self.tensors: Counter = Counter()

    def run(self, operations: list[Operation], loop: int, factor: float) -> list[Value]:
        """Run a region of ``loop``; what it hands on."""
        for operation in operations:
            self.done[loop] += factor * operation.size
            if operation.name == "scf.for":
                results = self._for(operation, factor)
            elif operation.name == "scf.while":
                results = self._while(operation, factor)
            elif operation.name == "scf.if":
                results = self._if(operation, loop, factor)
            elif operation.name in ("scf.yield", "scf.condition"):
                return self._operands(operation)
            else:
                if operation.access:
                    self._move(operation, loop, factor)
                results = [self._result(operation)] * len(operation.results)
            self.values.update(zip(operation.results, results, strict=True))
        return []

    def _operands(self, operation: Operation) -> list[Value]:
        return [self.values.get(name) for name in operation.operands]

    def _for(self, operation: Operation, factor: float) -> list[Value]:
        """The first and the last pass stand for all: what depends on the counter is taken to grow evenly with it."""
        control, _, carried = operation.text.partition("iter_args(")
        index, *bounds = re.findall(r"%[\w.$-]+(?:#\d+)?", control)
        first, end, step = (self.values.get(name) for name in bounds)
        if not all(isinstance(bound, int) for bound in (first, end, step)):
            raise ValueError(f"the bounds of a loop are not known: {operation.text}")
        names = re.findall(r"(%[\w.$-]+) = (%[\w.$-]+(?:#\d+)?)", carried)
        values, passes = [self.values.get(value) for _, value in names], max(0, -(-(end - first) // step))
        ends = sorted({first, first + step * (passes - 1)}) if passes else []
        for at in ends:
            self.values[index] = at
            self.values.update(zip((name for name, _ in names), values, strict=True))
            given = self.run(operation.regions[0], operation.loop, factor * passes / len(ends))
            # What changes from pass to pass is not known before the last one.
            values = (
                given
                if at == ends[-1]
                else [old if old == new else None for old, new in zip(values, given, strict=True)]
            )
        return values

    def _while(self, operation: Operation, factor: float) -> list[Value]:
        """Pass by pass."""
        names = re.findall(r"(%[\w.$-]+) = (%[\w.$-]+(?:#\d+)?)", operation.text)
        values = [self.values.get(value) for _, value in names]
        for _ in range(MOST_PASSES):
            self.values.update(zip((name for name, _ in names), values, strict=True))
            goes_on, *values = self.run(operation.regions[0], operation.loop, factor)
            if goes_on is None:
                raise ValueError(f"the end of a loop is not known: {operation.text}")
            if not goes_on:
                return values
            self.values.update(zip(operation.parameters[1], values, strict=True))
            values = self.run(operation.regions[1], operation.loop, factor)
        raise ValueError(f"a loop does not end: {operation.text}")

    def _if(self, operation: Operation, loop: int, factor: float) -> list[Value]:
        """The first branch where the condition is not known."""
        (condition,) = self._operands(operation)[:1]
        if condition == 0:
            return self.run(operation.regions[1], loop, factor) if len(operation.regions) > 1 else []
        return self.run(operation.regions[0], loop, factor)

    def _move(self, operation: Operation, loop: int, factor: float) -> None:
        """Count the bytes of a tile, unless its mask is known to leave nothing of it."""
        target, *operands = self._operands(operation)
        mask = operands[0 if operation.access == "load" else 1 :][:1]
        if not isinstance(target, Pointer) or (mask == [0] and "descriptor" not in operation.name):
            return
        moved = factor * _tile_bytes(operation.types)
        self.bytes[loop] += moved
        self.tensors[target.argument, operation.access] += moved

    def _result(self, operation: Operation) -> Value:
        if operation.name == "tt.get_program_id":
            return self.program if operation.text.strip().startswith("x") else 0
        if operation.name == "tt.get_num_programs":
            return None
        if operation.name == "arith.constant":
            return _constant(operation.text)
        operands = self._operands(operation)
        if operation.name == "arith.cmpi":
            return _compared(operation.text.split(",")[0].strip(), *operands, operation.types)
        if operation.name == "arith.select":
            condition, chosen, other = operands
            return other if condition == 0 else chosen if condition == 1 or chosen == other else None
        if operation.name in ("arith.andi", "arith.muli") and 0 in operands:
            return 0
        if operation.name in _INTEGERS and all(isinstance(value, int) for value in operands):
            return _wrapped(_INTEGERS[operation.name](*operands), operation.types)
        if operation.name in _SAME or "ptr<" in operation.types or "tensordesc" in operation.types:
            return operands[0] if operands else None
        return None


def _tile_bytes(types: str) -> float:
    """Of the tile that a load or a store with these types moves."""
    tensor = re.search(r"tensor<((?:\d+x)+)", types)
    bits = re.search(r"ptr<[a-z]+(\d+)|x[a-z]+(\d+)>", types)
    return (_elements(tensor.group(1)) if tensor else 1) * max(int(next(filter(None, bits.groups()))), 8) / 8


def _constant(text: str) -> Value:
    literal = re.match(r"\s*(?:dense<)?(-?\d+|true|false)\b(?!\.)", text)
    if literal is None:
        return None
    return {"true": 1, "false": 0}.get(literal.group(1)) if literal.group(1).isalpha() else int(literal.group(1))


def _bits(types: str) -> int:
    """Of the integer that an operation makes."""
    found = re.findall(r"\bi(\d+)\b|xi(\d+)\b", types)
    return int(next(filter(None, found[-1]))) if found else 64


def _wrapped(value: int, types: str) -> int:
    bits = _bits(types)
    value &= (1 << bits) - 1
    return value - (1 << bits) if bits > 1 and value >> (bits - 1) else value


def _compared(predicate: str, left: Value, right: Value, types: str) -> int | None:
    if not isinstance(left, int) or not isinstance(right, int):
        return None
    if predicate.startswith("u"):
        left, right = (value & ((1 << _bits(types)) - 1) for value in (left, right))
    compared = {"eq": left == right, "ne": left != right}
    compared |= {"lt": left < right, "le": left <= right, "gt": left > right, "ge": left >= right}
    return int(compared[predicate if predicate in ("eq", "ne") else predicate[1:]])


def _quotient(left: int, right: int) -> int:
    """Rounded to 0, as the machine does."""
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1) if right else 0


_INTEGERS: dict[str, Callable[..., int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": _quotient,
    "arith.divui": _quotient,
    "arith.ceildivsi": lambda a, b: -(-a // b),
    "arith.floordivsi": lambda a, b: a // b,
    "arith.remsi": lambda a, b: a - _quotient(a, b) * b,
    "arith.remui": lambda a, b: a - _quotient(a, b) * b,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.shli": lambda a, b: a << b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.shrui": lambda a, b: a >> b,
    "arith.minsi": min,
    "arith.minui": min,
    "arith.maxsi": max,
    "arith.maxui": max,
    "arith.extsi": lambda a: a,
    "arith.extui": abs,
    "arith.trunci": lambda a: a,
    "arith.index_cast": lambda a: a,
}
# Of a uniform tensor these make the same uniform tensor.
_SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.addptr", "arith.bitcast")
