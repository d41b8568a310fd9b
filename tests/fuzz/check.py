"""Run a case on the package's code and judge it by the float64 truth.

A tensor is right when, over all of it and over every slice of it (an image, a channel, a row, a column), the root mean
square of its error is at most twice that of plain PyTorch in the same dtypes, plus ``FACTOR`` times the rounding error
that the literal formula has with every operation rounded at random (rounding.py), plus the rounding to the tensor's own
dtype. Slices keep one huge pixel from hiding the others.
"""

import contextlib
import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from op_cases import correlation_terms, divergence_terms, threads, units_of_sum
from torch import Tensor

import fbkd_ops
from fbkd_ops.non_local import relation

from .problems import Problem, problem_of
from .rounding import RandomRounding, Trace

# The package adds in another order than the literal formula, in blocks, and has other terms in between.
FACTOR = 64
# All pixels of these maps are alike, some of them beside a bias or around 100, and so are their rounding errors: they
# add up where random ones average out to the root of their number.
ALIKE = ("constant", "constant_channels", "tiny", "denormal", "zeros", "offset")
# An update of running statistics has three operations on the old value and the batch's, which may cancel.
UPDATE_FACTOR = 4
# The same where operands are rounded to 16 bits, of which there are as many as in the literal formula.
OPERANDS_FACTOR = 4
# Random roundings that are tried before a result is called wrong: few for nearly all cases, many where winners of a
# max-pool or the sign of a relu hang by a rounding error, as they do for constant maps.
SAMPLES = (3, 10, 30)
# In float64 the truth has rounding errors of its own, and is plain PyTorch's result, whose error seems to be 0.
TRUTH_FACTOR = 8
# 1 / sqrt(variance + eps) is 316 where a channel is constant.
LARGEST_FACTOR = 100.0
# Fused attention's gradients are off by a factor of up to exp(logit * eps).
LARGEST_LOGIT_ERROR = 0.1
PRODUCTS = ("adapted_masked_l2_loss", "relation_loss", "FBKDLoss")
# These modes are PyTorch's fused attention. It subtracts one rounded number, dO O, from all pairs of a pixel, whose
# errors do not average out either; and of a NaN pixel that is no key only the loss may be NaN, or one channel, and the
# gradients and running statistics finite.
FUSED_ATTENTION, ATTENTION_FACTOR = ("gaussian", "embedded_gaussian"), 8
# Plain PyTorch also multiplies an infinite g with the 0 of a pair that does not count in concatenation, which is NaN.
LOSING = (*FUSED_ATTENTION, "concatenation")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass
class Results:
    """What a call gives: outputs with the module's buffers, and the gradients that were wanted."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def all(self) -> dict[str, Tensor]:
        return self.outputs | {f"gradient of {name}": x for name, x in self.gradients.items()}


class Mismatch(Exception):
    """A result that is wrong."""


def mismatch_of(case: dict) -> str | None:
    """What is wrong with a case; None where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(case)
        except Mismatch as mismatch:
            return str(mismatch)
    return None


def _check(case: dict) -> None:
    problem, trace = problem_of(case), Trace()
    wide = problem.widened()
    expected = _attempt(lambda: _on_reference(wide, case))
    if isinstance(expected, Exception):
        ours = _attempt(lambda: _on_package(case))
        if type(ours) is not type(expected):
            raise Mismatch(f"the literal formula raises {expected!r}, the package gives {_short(ours)}")
        return
    with RandomRounding(0.0, 0, trace):
        truth = _on_reference(wide, case)
    eager = _attempt(lambda: _on_reference(problem, case))
    ours = _attempt(lambda: _on_package(case))
    for name, results in (("the package", ours), ("plain PyTorch", eager)):
        if isinstance(results, Exception):
            raise Mismatch(f"{name} raises {type(results).__name__}: {results}")
    _compare_forms(ours, eager)
    # Gradients tell nothing where a loss is not finite, which shows by itself; where it is too large for plain PyTorch
    # alone, whose gradients are then those of another function; where rounding errors are divided by the root of a
    # variance that should be 0; where a rounded logit changes its exponential; and where a root is taken of nothing but
    # rounding errors, as of equal features: its gradient has their signs.
    has_lost_logits = _is_fused_attention(case) and trace.largest_logit * _eps(problem, case) > LARGEST_LOGIT_ERROR
    has_lost_variance = trace.largest_factor() > LARGEST_FACTOR
    if (
        _has_no_loss(truth, case)
        or _overflows(eager, truth)
        or has_lost_variance
        or has_lost_logits
        or _is_noise(ours, truth)
    ):
        ours.gradients, eager.gradients, truth.gradients = {}, {}, {}
    samples, found = [], None
    for count in SAMPLES:
        while len(samples) < count:
            samples.append(_rounded_at_random(wide, case, problem, trace, len(samples)))
        found = _first_excess(problem, ours.all(), eager.all(), truth.all(), [each.all() for each in samples], case)
        if found is None:
            return
    raise Mismatch(found)


def _attempt(function: Callable[[], Results]) -> Results | Exception:
    """What a function returns, or the error that it raises."""
    try:
        return function()
    except Mismatch:
        raise
    except Exception as error:
        return error


def _short(results: Results | Exception) -> str:
    return repr(results) if isinstance(results, Exception) else "a result"


def _rounded_at_random(wide: Problem, case: dict, problem: Problem, trace: Trace, seed: int) -> Results:
    with RandomRounding(_eps(problem, case), seed, trace, problem.exact):
        return _on_reference(wide, case)


def _eps(problem: Problem, case: dict) -> float:
    """Of the dtype in which the least precise level is computed, as docs/architecture.md says it."""
    levels = {}
    for name, x in problem.features().items():
        levels.setdefault(re.sub(r"student|teacher", "", name), []).append(x.dtype)
    return max(_level_eps(dtypes, case) for dtypes in levels.values())


def _level_eps(dtypes: list[torch.dtype], case: dict) -> float:
    """Of one level, from the dtypes of its maps."""
    op, differ, single = case["op"], len(set(dtypes)) > 1, torch.finfo(torch.float32).eps
    if torch.float64 in dtypes:
        has_means_in_float32 = op == "FBKDLoss" and differ
        return single if has_means_in_float32 else TRUTH_FACTOR * torch.finfo(torch.float64).eps
    if case["target"] != "triton" or op not in PRODUCTS or (op == "adapted_masked_l2_loss" and differ):
        return single
    operands = max(torch.finfo(dtype).eps for dtype in dtypes)  # matrices are rounded to 16 bits
    return max(single, operands * OPERANDS_FACTOR / FACTOR)


def _on_reference(problem: Problem, case: dict) -> Results:
    with fbkd_ops.use_backend("reference"):
        return _run(dataclasses.replace(problem, module=copy.deepcopy(problem.module)), case["wanted"])


def _on_package(case: dict) -> Results:
    """The case; on the CPU twice, with the same bits."""
    if case["target"] == "cuda-source":
        from . import cuda_source  # builds the kernels

        return Results(*cuda_source.run(case, problem_of(case)))
    results = _run_package(case)
    if case["target"] == "cpu":
        again = _run_package(case).all()
        for name, x in results.all().items():
            if not torch.equal(_bits(x), _bits(again[name])):
                raise Mismatch(f"{name} is not bit-equal from run to run")
    return results


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.element_size()])


def _run_package(case: dict) -> Results:
    problem = problem_of(case)
    with contextlib.ExitStack() as stack:
        stack.enter_context(threads(case["threads"]))
        torch.use_deterministic_algorithms(True)  # NaN in every new tensor: an element that nothing writes shows
        stack.callback(torch.use_deterministic_algorithms, False)
        if "form" in case:  # of every relation term, whatever its sizes
            stack.enter_context(mock.patch.object(relation, "cheaper_form", lambda sizes: case["form"]))
        stack.enter_context(fbkd_ops.use_backend(case["target"]))
        return _run(problem, case["wanted"], case["autocast"], teacher_wants=case["seed"] % 2 == 1)


def _run(problem: Problem, wanted: int, autocast: list | None = None, teacher_wants: bool = False) -> Results:
    """Outputs and gradients, from random gradients of the outputs.

    Args:
        problem: what is called.
        wanted: bit i asks for the gradient of leaf i.
        autocast: a dtype, and whether the backward pass runs under autocast too.
        teacher_wants: whether the tensors that never receive a gradient ask for one.
    """
    dtype, in_backward = autocast or ("bfloat16", False)
    leaves = {name: x.detach() for name, x in problem.students.items()}
    constants = {name: x.detach().requires_grad_(teacher_wants) for name, x in problem.constants.items()}
    if problem.module is not None:
        leaves |= dict(problem.module.named_parameters())
    for index, leaf in enumerate(leaves.values()):
        leaf.requires_grad_(bool(wanted >> index % 8 & 1))
    tensors = {name: leaves[name] for name in problem.students}
    with torch.autocast("cpu", getattr(torch, dtype), enabled=autocast is not None):
        outputs = problem.function(tensors | constants, problem.module)
    with torch.autocast("cpu", getattr(torch, dtype), enabled=in_backward):
        gradients = _gradients(outputs, leaves | constants)
    for name in constants:
        if gradients.pop(name, None) is not None:
            raise Mismatch(f"a gradient reaches {name}")
    results = {name: x.detach() for name, x in outputs.items()}
    if problem.module is not None:
        buffers = problem.module.named_buffers()
        results |= {f"buffer {name}": x if x.is_floating_point() else x.double() for name, x in buffers}
    return Results(results, gradients)


def _gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that arrive, by the leaf's name."""
    generator, reached, grads = torch.Generator().manual_seed(1), [], []
    for x in outputs.values():
        grad = torch.randn(x.shape, generator=generator)
        if x.requires_grad:
            reached.append(x)
            grads.append(grad.to(x.dtype))
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not reached or not asked:
        return {}
    found = torch.autograd.grad(reached, list(asked.values()), grads, allow_unused=True)
    return {name: x for name, x in zip(asked, found, strict=True) if x is not None}


def _compare_forms(ours: Results, eager: Results) -> None:
    """Names, shapes and dtypes; a gradient that only one of them has is 0 in the other."""
    for name in ours.gradients.keys() ^ eager.gradients.keys():
        side = ours if name in ours.gradients else eager
        if side.gradients.pop(name).count_nonzero():
            raise Mismatch(f"gradient of {name}: {'unexpected' if side is ours else 'missing'}")
    mine, theirs = ours.all(), eager.all()
    if mine.keys() != theirs.keys():
        raise Mismatch(f"outputs {sorted(mine)}, expected {sorted(theirs)}")
    for name, x in mine.items():
        if (x.shape, x.dtype) != (theirs[name].shape, theirs[name].dtype):
            expected = f"{tuple(theirs[name].shape)} {theirs[name].dtype}"
            raise Mismatch(f"{name}: {tuple(x.shape)} {x.dtype}, expected {expected}")


def _has_no_loss(truth: Results, case: dict) -> bool:
    outputs = [x for x in truth.outputs.values() if x.dim() == 0 or _has_mode(case, LOSING)]
    is_lost = any(x.numel() and not bool(x.isfinite().any()) for x in truth.outputs.values())
    return is_lost or any(not bool(x.isfinite().all()) for x in outputs)


def _is_noise(ours: Results, truth: Results) -> bool:
    """Whether a loss has no digit in common with the truth. That it is near enough is checked all the same."""
    scalars = [(x.double(), truth.outputs[name]) for name, x in ours.outputs.items() if x.dim() == 0]
    return any(bool((x - exact).abs() > 0.5 * exact.abs()) for x, exact in scalars)


def _overflows(eager: Results, truth: Results) -> bool:
    """Whether an output is too large for plain PyTorch's dtype alone."""
    pairs = ((x, truth.outputs[name]) for name, x in eager.outputs.items())
    return any(bool((~x.isfinite() & exact.isfinite()).any()) for x, exact in pairs)


def _first_excess(
    problem: Problem,
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    truth: dict[str, Tensor],
    samples: list[dict[str, Tensor]],
    case: dict,
) -> str | None:
    """What is wrong with the first result that is; None where all are right."""
    may_lose_nans = _has_mode(case, LOSING) and not all(x.isfinite().all() for x in ours.values())
    for name, mine in ours.items():
        noise = [each[name] for each in samples]
        rounding = _own_rounding(problem, mine, truth[name], case)
        if case["op"] == "channel_correlation_loss":  # what nearly agrees cancels, in float64 whatever the maps' dtype
            terms = correlation_terms(problem.students["student"], problem.constants["teacher"])[mine.dim() > 0]
            rounding += torch.finfo(torch.float64).eps * units_of_sum(_pixels(case)) * terms.nan_to_num(0, 0)
        if case["op"] == "channel_divergence_loss":
            maps = problem.students["student"], problem.constants["teacher"]
            terms = divergence_terms(*maps, case["temperature"])[mine.dim() > 0].reshape(mine.shape)
            rounding += _eps(problem, case) * units_of_sum(_pixels(case)) * terms.nan_to_num(0, 0)
        if name.startswith("buffer"):
            before = problem.module.get_buffer(name.removeprefix("buffer "))
            rounding = UPDATE_FACTOR * (rounding + torch.finfo(mine.dtype).eps * before.double().abs())
        # A result in float64 of sums in float32 has their range.
        smallest = torch.finfo(_computed_dtype(mine.dtype, _eps(problem, case))).smallest_normal
        if name.endswith("mask"):  # a softmax, whose elements are 0 below the range, times their number
            smallest *= mine.numel() / max(len(mine), 1)
        if "denormal" in _values(case):  # each may be 0 in a product, and their sum over the pixels with them
            smallest *= _pixels(case)
        excess = _excess(mine, eager[name], truth[name], noise, rounding, smallest, _factor(case), may_lose_nans)
        if excess:
            return f"{name}: {excess}"
    return None


def _computed_dtype(dtype: torch.dtype, eps: float) -> torch.dtype:
    """The dtype of a result, or float32 where that is all that its sums have."""
    return torch.float32 if dtype == torch.float64 and eps >= torch.finfo(torch.float32).eps else dtype


def _own_rounding(problem: Problem, x: Tensor, truth: Tensor, case: dict) -> Tensor:
    """The error of rounding to a result's own dtype."""
    eps = torch.finfo(x.dtype).eps
    if case["target"] == "triton" and x.dtype == torch.bfloat16:
        eps *= 2  # Triton's interpreter truncates where GPUs round
    sizes = truth.double().abs()
    if problem.rounded_terms and truth.numel():
        # Gradients that are each rounded before they are added may cancel in one place; they are as large as elsewhere.
        sizes = 4 * (sizes + sizes.square().mean().sqrt())
    return eps * sizes


def _factor(case: dict) -> float:
    factor = FACTOR * (ATTENTION_FACTOR if _is_fused_attention(case) else 1)
    if not _values(case) & set(ALIKE):
        return factor
    root = _pixels(case) ** 0.5
    # Triton's random roundings to 16 bits are large enough as they are.
    return factor * (min(root, ATTENTION_FACTOR) if case["target"] == "triton" else root)


def _values(case: dict) -> set[str]:
    """What the maps are made of."""
    sides = case.get("maps", [case])
    return {side[name]["values"] for side in sides for name in ("student", "teacher") if name in side}


def _pixels(case: dict) -> int:
    """The pixels of all images, of the largest level."""
    sizes = case.get("sizes") or [case["size"]]
    return max(n * height * width for n, _, _, height, width in sizes)


def _is_fused_attention(case: dict) -> bool:
    return _has_mode(case, FUSED_ATTENTION)


def _has_mode(case: dict, wanted: tuple[str, ...]) -> bool:
    modes = case.get("mode") or case.get("overrides", {}).get("mode")
    return any(mode in wanted for mode in ([modes] if isinstance(modes, str) else modes or []))


def _excess(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    samples: list[Tensor],
    own: Tensor,
    smallest: float,
    factor: float = FACTOR,
    may_lose_nans: bool = False,
) -> str | None:
    """How much too far a tensor is from the truth; None where it is not."""
    dtype = ours.dtype
    largest = torch.finfo(dtype).max
    ours, eager, truth = ours.double(), eager.double(), truth.double()
    wrong = ~eager.isfinite() & ~truth.isfinite() & ours.isfinite()
    if wrong.any() and not may_lose_nans:
        return f"{int(wrong.sum())} values that are not finite in plain PyTorch are finite"
    noise = torch.stack([sample.double() - truth for sample in samples])
    # Where gradients cancel that are each rounded before they are added, these have to fit, too.
    sizes = torch.maximum(truth.abs(), own / torch.finfo(dtype).eps)
    within_range = sizes + factor * noise.abs().amax(0) < largest / 4
    fits = truth.isfinite() & eager.isfinite() & noise.isfinite().all(0) & within_range
    wrong = fits & ~ours.isfinite()
    if wrong.any():
        return f"{int(wrong.sum())} values are not finite, expected finite ones"
    errors = torch.stack([ours - truth, eager - truth, own, *noise]).masked_fill(~fits, 0.0)
    unit = float(errors.abs().max()) if errors.count_nonzero() else 1.0  # squares of 1e-162 are 0
    for described, means in _root_mean_squares(errors / unit):
        mine, theirs, rounding, random = means[0], means[1], means[2], means[3:].square().mean(0).sqrt()
        allowed = 2 * theirs + rounding + factor * random + 16 * smallest / unit
        ratio = (mine / allowed).nan_to_num(0.0)
        if ratio.numel() and ratio.max() > 1:
            index = int(ratio.argmax())
            mine, allowed, theirs = (float(x.flatten()[index]) * unit for x in (mine, allowed, theirs))
            return f"error {mine:.3g}, allowed {allowed:.3g} {described.format(index)}(plain PyTorch {theirs:.3g})"
    return None


def _root_mean_squares(errors: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of every row of errors ``(E, ...)``: over all elements ``(E, 1)``, and over each slice of each dimension."""
    if not errors.numel():
        return
    errors = errors[:, None] if errors.dim() == 1 else errors
    yield "", errors.flatten(1).square().mean(1, keepdim=True).sqrt()
    for dim in range(1, errors.dim()):
        by_slice = errors.movedim(dim, 1).flatten(2) if errors.dim() > 2 else errors[:, :, None]
        yield f"in slice {{}} of dimension {dim - 1} ", by_slice.square().mean(2).sqrt()
