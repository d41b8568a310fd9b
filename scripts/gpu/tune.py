"""Measures which tiles of the Triton kernels are fastest on the GPU that is here: ``make gpu-tune``.

    python -m scripts.gpu.tune [--shape 16 256 200 336] [--dtypes bfloat16 float32] [--kernels NAME ...]

For each kernel and operand of ``kernels/tiles.json`` that a step of the loss launches, a search starts from the present
tile: an extent twice or half as large, twice or half the warps, a stage more or less; from the best of these again,
until none is better. A tile that does not compile, that needs more shared memory than there is or that spills is left
out. What is compared is the time of the kernel's own launches in a step, a median between CUDA events.

Tiles that are better by more than the noise are written under the GPU's compute capability; the others stay. Run the
tests of the ops (``make gpu ARGS="--stages test"``) and commit the file.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from fbkd_ops.kernels import pyramid, tiles
from fbkd_ops.kernels.tiles import Blocks
from scripts.gpu.op_calls import SIZES, loss_step

ROUNDS = 10
MARGIN = 0.03  # of the present time: what is less is noise
LEAST = Blocks(16, 16, 16, 2, 1)
MOST = Blocks(256, 256, 128, 16, 5)


class Entry(NamedTuple):
    """A place in the table."""

    kernel: str
    operand: str


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """Yield the tiles that differ in one number."""
    for name in Blocks._fields:
        value = getattr(blocks, name)
        others = (value - 1, value + 1) if name == "num_stages" else (value // 2, 2 * value)
        for other in others:
            if getattr(LEAST, name) <= other <= getattr(MOST, name):
                yield blocks._replace(**{name: other})


def search(present: Blocks, measured: Callable[[Blocks], float]) -> Blocks:
    """Return the fastest tile that steps to ever faster neighbours lead to.

    Args:
        present: where the search starts; it stays unless another one is faster by more than MARGIN.
        measured: the time with a tile; infinite where it cannot run.
    """
    times = {present: measured(present)}
    best = present
    while True:
        for candidate in neighbours(best):
            if candidate not in times:
                times[candidate] = measured(candidate)
        fastest = min(times, key=times.__getitem__)
        if fastest == best:
            break
        best = fastest
    return best if times[best] < (1 - MARGIN) * times[present] else present


@contextlib.contextmanager
def chosen(entry: Entry, blocks: Blocks) -> Iterator[None]:
    """Give the entry's levels this tile."""
    usual = tiles._chosen

    def choose(kernel: str, operand: str, gpu: str) -> Blocks:
        return blocks if (kernel, operand) == entry else usual(kernel, operand, gpu)

    with mock.patch.object(tiles, "_chosen", choose):
        yield


def entries_of(step: Callable[[], object]) -> dict[Entry, Blocks]:
    """Return the entries that a step uses, with their present tiles."""
    found: dict[Entry, Blocks] = {}
    usual = tiles._chosen

    def note(kernel: str, operand: str, gpu: str) -> Blocks:
        return found.setdefault(Entry(kernel, operand), usual(kernel, operand, gpu))

    with mock.patch.object(tiles, "_chosen", note):
        step()
    return found


def kernel_ms(step: Callable[[], object], kernel: str) -> float:
    """Return the time of a kernel's launches in a step, a median over ROUNDS; infinite where one cannot run."""
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    launch = pyramid._launch_once

    def timed(launched, *arguments) -> None:
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        compiled = launch(launched, *arguments)
        pair[1].record()
        if launched.__name__ == kernel:
            if compiled.n_spills:
                raise RuntimeError(f"{kernel} spills {compiled.n_spills} registers")
            pairs.append(pair)

    with mock.patch.object(pyramid, "_launch_once", timed):
        try:
            step()  # compiles
            times = []
            for _ in range(ROUNDS):
                pairs.clear()
                step()
                torch.cuda.synchronize()
                times.append(sum(begin.elapsed_time(end) for begin, end in pairs))
        except Exception as error:  # Triton has no common class of what a tile can be too large for
            if "CUDA error" in str(error):  # nothing that follows could be trusted
                raise
            return float("inf")
    return statistics.median(times)


def tuned(step: Callable[[], object], only: list[str] | None = None) -> dict[Entry, Blocks]:
    """Return the entries of a step's kernels for which another tile than the present one is faster."""
    better = {}
    for entry, present in entries_of(step).items():
        if only and entry.kernel not in only:
            continue

        def measured(blocks: Blocks, entry: Entry = entry) -> float:
            with chosen(entry, blocks):
                return kernel_ms(step, entry.kernel)

        best = search(present, measured)
        print(f"{entry.kernel} {entry.operand}: {tuple(present)} -> {tuple(best)}", flush=True)
        if best != present:
            better[entry] = best
    return better


def write(path: Path, gpu: str, better: dict[Entry, Blocks]) -> None:
    """Add entries to a file of tiles."""
    content = json.loads(path.read_text())
    for (kernel, operand), blocks in better.items():
        content.setdefault(gpu, {}).setdefault(kernel, {})[operand] = list(blocks)
    path.write_text(text_of(content))


def text_of(content: dict) -> str:
    """Return the file's text: a line for each tile."""
    lines: list[str] = []
    for line in json.dumps(content, indent=2).splitlines():
        if lines and "[" in lines[-1] and "]" not in lines[-1]:
            number = line.strip()
            lines[-1] += number.replace(",", ", ") if number[0].isdigit() else number
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=SIZES["loss"], metavar="N", help="of P2: N C H W")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the features")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only these")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device: tiles are measured, not predicted")
    for dtype in options.dtypes:
        better = tuned(loss_step(tuple(options.shape), dtype, "cuda"), options.kernels)
        write(tiles.TABLE, tiles.architecture(torch.empty(0, device="cuda")), better)
        tiles.table.cache_clear()
        tiles._chosen.cache_clear()


if __name__ == "__main__":
    main()
