"""Masks of a whole pyramid in one launch. They carry no gradient."""

from typing import NamedTuple

from torch import Tensor

from .._numerics import accumulation_dtype
from .registry import kernel, register

__all__ = ["MaskRequest", "attention_masks"]


class MaskRequest(NamedTuple):
    """One mask: a softmax over all but the batch dimension of one or two attention maps."""

    student: Tensor | None  # (N, ...), None: the teacher alone
    teacher: Tensor  # (N, ...)
    temperature: float
    mask_rule: str  # "average" or "joint"


def attention_masks(backend: str, requests: list[MaskRequest]) -> list[Tensor]:
    """Return the mask of each request, in its teacher's shape."""
    return kernel("attention_masks", backend)(
        [None if request.student is None else request.student.detach().contiguous() for request in requests],
        [request.teacher.detach().contiguous() for request in requests],
        [float(request.temperature) for request in requests],
        [request.mask_rule == "joint" for request in requests],
    )


def _fake(students, teachers, temperatures, joint):
    return [
        t.new_empty(t.shape, dtype=accumulation_dtype(t) if s is None else accumulation_dtype(s, t))
        for s, t in zip(students, teachers, strict=True)
    ]


register(
    "attention_masks",
    "(Tensor?[] student, Tensor[] teacher, float[] temperature, bool[] joint) -> Tensor[]",
    _fake,
    compiled=("cpu", "cuda"),
    triton="attention_masks",
)
