"""Times of the attention pool against eager PyTorch and against one read of the input.

    python benchmarks/attention_pool.py [--device cpu] [--threads 2] [--rounds 15] [--json FILE]

Peers alternate, so that a slow spell of the machine hits all of them; the figures are medians in ms. Fewest
bytes: forward reads x once; backward reads x and writes dx (with plain-mean gradients alone it only writes).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from fbkd_ops import functional, reference

LEVELS = {"P2": (256, 200, 336), "P3": (256, 100, 168), "P4": (256, 50, 84), "P5": (256, 25, 42)}


def once(function, device):
    """Milliseconds of one call."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def medians(peers, device, rounds):
    """Interleaved medians of named functions."""
    for function in peers.values():
        function()
        function()
    times = {name: [] for name in peers}
    for _ in range(rounds):
        for name, function in peers.items():
            times[name].append(once(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


def backward_of(pool, x, fields):
    """A function that runs the backward pass from some of the outputs."""
    leaf = x.detach().requires_grad_()
    outputs = [getattr(pool(leaf), field) for field in fields]
    grads = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, leaf, grads, retain_graph=True)


def peers_of(x):
    plain, every = ("spatial_mean", "channel_mean"), reference.AttentionPool._fields
    return {
        "x.sum()": lambda: x.sum(),
        "eager": lambda: reference.attention_pool(x),
        "fbkd_ops": lambda: functional.attention_pool(x),
        "eager bwd": backward_of(reference.attention_pool, x, every),
        "bwd": backward_of(functional.attention_pool, x, every),
        "bwd plain": backward_of(functional.attention_pool, x, plain),
    }


def cases(device):
    """Name and input of every case."""
    for level, shape in LEVELS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(1, *shape, device=device).to(dtype).contiguous(memory_format=layout)
                yield f"{level} {str(dtype)[6:]} {str(layout)[6:].removesuffix('_format')}", x


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the medians here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {}
    for case, x in cases(options.device):
        rows[case] = medians(peers_of(x), options.device, options.rounds)
        if len(rows) == 1:
            print(f"{'':32}" + "".join(f"{name:>11}" for name in rows[case]))
        print(f"{case:32}" + "".join(f"{value:11.3f}" for value in rows[case].values()))
    if options.json:
        where = f"{options.threads} threads of {os.cpu_count()} cores" if options.device == "cpu" else options.device
        facts = {"where": where, "torch": torch.__version__, "rounds": options.rounds}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts | {"median_ms": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
