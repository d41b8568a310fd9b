"""The CUDA kernels' source on the CPU: outputs and gradients of the ops that have such kernels."""

import torch
from test_cuda_kernels import l2_gradients, l2_squares, pool_gradients, pool_means, run_masks
from torch import Tensor

from fbkd_ops import AttentionPool
from fbkd_ops._layout import in_place_layout
from fbkd_ops._numerics import accumulation_dtype, root

from .problems import Problem

ONE_ORDER = {"orders": (1,)}


def run(case: dict, problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients by name, as the package would give them on a GPU."""
    wanted = {name for index, name in enumerate(problem.students) if case["wanted"] >> index % 8 & 1}
    return RUNS[case["op"]](case, problem, wanted)


def random_gradients(outputs: list[Tensor]) -> list[Tensor]:
    """As check.py draws them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]


def _attention_pools(case: dict, problem: Problem, wanted: set[str]) -> tuple[dict, dict]:
    xs = [in_place_layout(x) for x in problem.students.values()]
    means = pool_means(xs, **ONE_ORDER)
    fields = AttentionPool._fields
    outputs = {f"{fields[index % 4]}{index // 4}": mean for index, mean in enumerate(means)}
    gradients = pool_gradients(xs, random_gradients(means), **ONE_ORDER)
    found = zip(problem.students, gradients, strict=True)
    return outputs, {name: x for name, x in found if name in wanted}


def _mask(case: dict, student: Tensor | None, teacher: Tensor, temperature: float) -> Tensor:
    student = None if student is None else student.contiguous()
    joint = case["mask_rule"] == "joint"
    return run_masks([student], [teacher.contiguous()], [temperature], [joint], **ONE_ORDER)[0]


def _attention_mask(case: dict, problem: Problem, wanted: set[str]) -> tuple[dict, dict]:
    student, teacher = problem.students.get("student"), problem.constants["teacher"]
    return {"mask": _mask(case, student, teacher, case["temperature"])}, {}


def _attention_masks(case: dict, problem: Problem, wanted: set[str]) -> tuple[dict, dict]:
    maps = problem.students | problem.constants
    spatial = [maps[f"{side}_spatial"][:, 0] for side in ("student", "teacher")]
    channel = [maps[f"{side}_channel"][:, :, 0, 0] for side in ("student", "teacher")]
    spatial_mask = _mask(case, *spatial, case["temperature"])
    return {"spatial_mask": spatial_mask, "channel_mask": _mask(case, *channel, case["channel_temperature"])}, {}


def _masked_l2_loss(case: dict, problem: Problem, wanted: set[str]) -> tuple[dict, dict]:
    """The root around the kernels' sums is the package's own, and plain PyTorch."""
    student, teacher = in_place_layout(problem.students["student"]), in_place_layout(problem.constants["teacher"])
    dtype = accumulation_dtype(student, teacher)
    masks = [problem.constants.get(name) for name in ("spatial_mask", "channel_mask")]
    masks = [[None if mask is None else mask.to(dtype).contiguous()] for mask in masks]
    squares = l2_squares([student], [teacher], *masks, dtype == torch.float64, **ONE_ORDER)
    leaf = squares[0].clone().requires_grad_()
    loss = root(leaf)
    (grad,) = torch.autograd.grad(loss, leaf, *random_gradients([loss]))
    if not wanted:
        return {"loss": loss.detach()}, {}
    (gradient,) = l2_gradients([student], [teacher], *masks, grad[None], **ONE_ORDER)
    return {"loss": loss.detach()}, {"student": gradient}


RUNS = {
    "attention_pools": _attention_pools,
    "attention_mask": _attention_mask,
    "attention_masks": _attention_masks,
    "masked_l2_loss": _masked_l2_loss,
}
