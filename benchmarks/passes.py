"""Counts how often a gradient of a student's size is written on the way to dS.

    python benchmarks/passes.py [--json benchmarks/results/passes.json]

Every op that PyTorch runs is seen by a dispatch mode; one that makes or changes a tensor with as many elements as the
student's map counts as a pass. Views do not count. The student's width differs from the teacher's, so that maps of the
teacher's size are not mistaken for it.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fbkd_ops

TERMS = {
    "feature": ("feature",),
    "feature, channel, spatial": ("feature", "channel", "spatial"),
    "all four": ("feature", "channel", "spatial", "relation"),
}


class Writes(TorchDispatchMode):
    """Names of the ops that write a tensor of ``numel`` elements."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = _tensors((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        memory = {tensor.untyped_storage().data_ptr() for tensor in given}
        written = [tensor for tensor in _tensors(out) if tensor.untyped_storage().data_ptr() not in memory]
        if func._schema.is_mutable:
            written += _tensors(args[0])
        self.ops += [str(func) for tensor in written if tensor.numel() == self.numel]
        return out


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def writes(backend: str, terms: tuple[str, ...], preset: str = "two_stage") -> dict[str, list[str]]:
    """Ops that write something of the student's size in the backward pass, and in the forward pass on its behalf."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 24, 10, 14, requires_grad=True), torch.randn(1, 40, 10, 14)
    absent = {f"{term}_weight": 0.0 for term in TERMS["all four"] if term not in terms}
    loss = fbkd_ops.FBKDLoss(24, 40, num_levels=1, preset=preset, **absent)
    forward, backward = Writes(student.numel()), Writes(student.numel())
    with fbkd_ops.use_backend(backend):
        with forward:
            total = sum(loss([student], [teacher]).values())
        with backward:
            total.backward()
    gradients = [op for op in forward.ops if "gradient" in op]
    return {"forward": gradients, "backward": backward.ops}


def measure() -> dict:
    return {
        terms: {backend: writes(backend, chosen) for backend in ("auto", "reference")}
        for terms, chosen in TERMS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the lists here")
    arguments = parser.parse_args()
    text = json.dumps(measure(), indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
