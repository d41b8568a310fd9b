"""BatchNorm as an affine map a channel, from the moments of what it normalises instead of its values.

A norm is one of PyTorch's BatchNorms, ``nn.SyncBatchNorm`` among them, or a frozen one: any module with ``eps`` and the
buffers of :class:`FrozenBatchNorm2d`, as torchvision's class of that name.
"""

import numbers
import sys
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..autograd.first_order import first_order, save
from ..types import present

__all__ = [
    "Fold",
    "FrozenBatchNorm2d",
    "Moments",
    "Norm",
    "RunningUpdate",
    "SharedMoments",
    "batch_moments",
    "check_count",
    "fixed_statistics",
    "fold",
    "folded_offsets",
    "is_frozen",
    "moment_gradients",
    "scale_and_shift",
    "shared_moment_gradients",
    "shared_moments",
    "synchronizes",
    "update_running_statistics",
    "uses_batch_statistics",
    "weight_gradient",
]


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d whose statistics, weight and bias are buffers: neither an optimizer nor training changes them.

    The keys are all of BatchNorm2d's, ``num_batches_tracked`` included, so that state dicts go both ways.

    Args:
        num_features: C, an int >= 1.
        eps: added to the variance, > 0.

    Shape:
        ``(N, C, H, W)`` to ``(N, C, H, W)``.

    Raises:
        ValueError: a number of features or an eps out of its range.

    Example:
        >>> frozen = FrozenBatchNorm2d(64)
        >>> frozen.load_state_dict(torch.nn.BatchNorm2d(64).state_dict())
        <All keys matched successfully>
        >>> frozen(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])

    Source: the norm of that name in torchvision, with the count of batches beside its buffers.
    """

    weight: Tensor  # (C,) each
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        if not isinstance(num_features, numbers.Integral) or isinstance(num_features, bool) or num_features < 1:
            raise ValueError(f"num_features must be an int >= 1, got {num_features!r}")
        if not isinstance(eps, numbers.Real) or isinstance(eps, bool) or not 0 < eps <= sys.float_info.max:
            raise ValueError(f"eps must be a finite number > 0, got {eps!r}")
        self.num_features: int = int(num_features)
        self.eps: float = float(eps)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start over as the identity, up to eps."""
        for ones in (self.weight, self.running_var):
            nn.init.ones_(ones)
        for zeros in (self.bias, self.running_mean, self.num_batches_tracked):
            nn.init.zeros_(zeros)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


# Of frozen ones any class that :func:`is_frozen` knows.
Norm = _BatchNorm | FrozenBatchNorm2d


def is_frozen(norm: nn.Module) -> TypeGuard[FrozenBatchNorm2d]:
    """Whether ``norm`` has BatchNorm's weight, bias and statistics, all of them as buffers."""
    buffers = dict(norm.named_buffers())
    return hasattr(norm, "eps") and {"weight", "bias", "running_mean", "running_var"} <= set(buffers)


class Moments(NamedTuple):
    """Mean and biased variance of ``u (N, C, H, W)`` over each image's pixels."""

    image_means: Tensor  # (N, C)
    variances: Tensor  # (N, C)
    pixels: int  # H * W


def uses_batch_statistics(norm: nn.Module | None) -> TypeGuard[_BatchNorm]:
    """Whether ``norm`` normalises with the batch's own moments: in training, or without running statistics."""
    return isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)


def fixed_statistics(norm: Norm | None) -> tuple[Tensor, Tensor] | None:
    """Return the mean and variance ``(C,)`` that ``norm`` has; None where it is None or takes the batch's own."""
    if norm is None or uses_batch_statistics(norm):
        return None
    return present(norm.running_mean), present(norm.running_var)


def synchronizes(norm: nn.Module | None) -> bool:
    """Whether the moments of ``norm`` are those of several processes: a SyncBatchNorm in training."""
    distributed = torch.distributed
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not distributed.is_available():
        return False
    return distributed.is_initialized() and distributed.get_world_size(norm.process_group) > 1


def scale_and_shift(
    norm: Norm,
    moments: Moments | None,
    like: Tensor,
    parameters: tuple[Tensor | None, Tensor | None] | None = None,
    updates: bool = True,
) -> tuple[Tensor, Tensor]:
    """``(C,), (C,)`` in the dtype of ``like``, with ``norm(u) = scale * u + shift``.

    In training the running statistics are updated as the norm's own forward does it.

    Args:
        norm: the BatchNorm.
        moments: those of this process' u; needed only where :func:`uses_batch_statistics`.
        like: a tensor of the wanted dtype.
        parameters: weight and bias ``(C,)`` to take instead of the norm's own, each None where it has none.
        updates: whether the running statistics are updated: not by a batch that they have seen already.

    Raises:
        ValueError: one value a channel where :func:`uses_batch_statistics`.
    """
    mean, variance = _statistics(norm, moments, like, updates)
    weight, bias = (norm.weight, norm.bias) if parameters is None else parameters
    scale = (variance + norm.eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    shift = -scale * mean
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    return scale, shift


def _statistics(norm: Norm, moments: Moments | None, like: Tensor, updates: bool) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance ``(C,)`` to normalise with."""
    if not uses_batch_statistics(norm):
        return present(norm.running_mean).to(like.dtype), present(norm.running_var).to(like.dtype)
    mean, variance, count = _over_images(present(moments))
    if synchronizes(norm):
        mean, variance, count = _OverProcesses.apply(mean, variance, count, norm.process_group)
        count = int(count)
    check_count(count, len(mean))
    if updates:
        update_running_statistics([RunningUpdate(norm, mean.detach(), variance.detach(), count)])
    return mean.to(like.dtype), variance.to(like.dtype)


def check_count(count: int, channels: int) -> None:
    """Refuse a single value a channel, as BatchNorm does."""
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {[1, channels, 1, 1]}")


def _over_images(moments: Moments) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance ``(C,)`` of u over all images, zeros for none, and the number of values a channel."""
    mean, variance, _ = batch_moments(moments.image_means, moments.variances)
    return mean, variance, len(moments.image_means) * moments.pixels


def batch_moments(image_means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` over images from those of each image ``(N, C)``, and ``image_means - mean``."""
    if not image_means.shape[0]:
        zeros = image_means.sum(dim=0)
        return zeros, torch.zeros_like(zeros), image_means
    mean = image_means.mean(dim=0)
    deviations = image_means - mean
    return mean, torch.addcmul(variances, deviations, deviations).mean(dim=0), deviations


class _OverProcesses(torch.autograd.Function):
    """Mean and biased variance of the values of all processes, by the law of total variance, and their number.

    Each process has its own number of values, possibly none; also one without any has to run both passes, because the
    others wait for it there.
    """

    @staticmethod
    def forward(ctx, mean: Tensor, variance: Tensor, count: int, group) -> tuple[Tensor, Tensor, Tensor]:
        found = shared_moments(mean, variance, torch.full_like(mean, count), group)
        ctx.group = group
        save(ctx, [found.deviations, found.shares], [mean, variance])
        total = found.counts[0]
        ctx.mark_non_differentiable(total)
        return found.means, found.variances, total

    @staticmethod
    @first_order
    def backward(ctx, mean_gradient: Tensor, variance_gradient: Tensor, _):
        deviations, shares = ctx.saved_tensors
        return *shared_moment_gradients(mean_gradient, variance_gradient, deviations, shares, ctx.group), None, None


class SharedMoments(NamedTuple):
    """The moments of the values of several processes, a channel each, and what their gradients need."""

    means: Tensor  # (C,)
    variances: Tensor  # (C,), biased
    counts: Tensor  # (C,) of all processes' values
    deviations: Tensor  # (C,), of this process' means from all processes'
    shares: Tensor  # (C,), of this process in all counts


def shared_moments(means: Tensor, variances: Tensor, counts: Tensor, group) -> SharedMoments:
    """Combine the moments ``(C,)`` of all processes' values by the law of total variance."""
    own = torch.stack([means, variances, counts])
    every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, own, group=group)
    process_means, process_variances, process_counts = torch.stack(every, dim=1)  # (P, C) each
    total = process_counts.sum(dim=0)
    shares = process_counts / total.clamp(min=1)
    global_means = (shares * process_means).sum(dim=0)
    within_and_between = process_variances + (process_means - global_means).square()
    global_variances = (shares * within_and_between).sum(dim=0)
    return SharedMoments(global_means, global_variances, total, means - global_means, counts / total.clamp(min=1))


def shared_moment_gradients(
    mean_gradient: Tensor, variance_gradient: Tensor, deviations: Tensor, shares: Tensor, group
) -> tuple[Tensor, Tensor]:
    """Gradients of a process' own moments, given its loss's gradients of the shared ones: the others' are added."""
    gradients = torch.stack([mean_gradient, variance_gradient])
    torch.distributed.all_reduce(gradients, group=group)
    mean_gradient, variance_gradient = shares * gradients
    return mean_gradient + 2 * deviations * variance_gradient, variance_gradient


class Fold(NamedTuple):
    """A norm as ``scale * (u - mean) + bias``, for channels ``(C,)``."""

    mean: Tensor
    inverse_deviation: Tensor  # 1 / sqrt(variance + eps)
    scale: Tensor


def fold(mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None) -> Fold:
    """Return the norm with this mean and biased variance ``(C,)`` as a scale; see :class:`Fold`."""
    inverse = (variance + eps).rsqrt_()
    return Fold(mean, inverse, inverse if weight is None else inverse * weight)


def folded_offsets(folded: Fold, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Return the norm's result for ``offsets (N, C)``."""
    if bias is None:
        return folded.scale * (offsets - folded.mean)
    shift = torch.addcmul(bias, folded.scale, folded.mean, value=-1)
    return torch.addcmul(shift, folded.scale, offsets)


def weight_gradient(folded: Fold, scale_gradient: Tensor, shift_gradient: Tensor) -> Tensor:
    """``(C,)``, given the gradients of ``scale`` and ``shift`` in ``scale * u + shift``."""
    return torch.addcmul(scale_gradient, shift_gradient, folded.mean, value=-1).mul_(folded.inverse_deviation)


def moment_gradients(
    folded: Fold, weight_gradient: Tensor, shift_gradient: Tensor, images: int
) -> tuple[Tensor, Tensor]:
    """``d mean / N`` and ``2 d variance / N (C,)`` of the batch's moments, N its number of images."""
    factor = folded.scale * (-1 / max(images, 1))
    return shift_gradient * factor, (weight_gradient * factor).mul_(folded.inverse_deviation)


class RunningUpdate(NamedTuple):
    """What a batch tells a norm in training."""

    norm: _BatchNorm
    mean: Tensor  # (C,)
    variance: Tensor  # (C,), biased
    values: int  # of a channel


def update_running_statistics(updates: list[RunningUpdate]) -> None:
    """Update the buffers as BatchNorm does in training: unbiased variance, momentum or average.

    An empty batch is counted, but leaves the statistics. A norm that has none, or does not train, is left alone.
    """
    updates = [update for update in updates if _tracks(update.norm)]
    while updates:
        distinct: list[RunningUpdate] = []
        repeated: list[RunningUpdate] = []  # a norm that two blocks share is updated twice, one after the other
        for update in updates:
            known = any(update.norm is other.norm for other in distinct)
            (repeated if known else distinct).append(update)
        _update_distinct(distinct)
        updates = repeated


def _tracks(norm: _BatchNorm) -> bool:
    return norm.training and norm.track_running_stats and norm.running_mean is not None


def _update_distinct(updates: list[RunningUpdate]) -> None:
    counters = [update.norm.num_batches_tracked for update in updates if update.norm.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    groups: dict[float | None, list[RunningUpdate]] = {}
    for update in updates:
        if update.values != 0:
            groups.setdefault(update.norm.momentum, []).append(update)
    for momentum, group in groups.items():
        unbiased = torch._foreach_mul(
            [update.variance for update in group], [update.values / (update.values - 1) for update in group]
        )
        buffers = [present(update.norm.running_mean) for update in group]
        buffers += [present(update.norm.running_var) for update in group]
        values = [update.mean for update in group] + list(unbiased)
        if momentum is None:  # the average over all batches so far
            _move_towards(buffers, values, [_average_weight(update.norm) for update in group] * 2)
        else:
            _move_towards(buffers, values, momentum)


def _average_weight(norm: _BatchNorm) -> Tensor:
    batches = norm.num_batches_tracked
    if batches is None:
        return present(norm.running_mean).new_zeros((), dtype=torch.float64)
    return batches.double().reciprocal()


def _move_towards(buffers: list[Tensor], values: list[Tensor], weights: float | list[Tensor]) -> None:
    """``lerp_``; buffers of 16 bits in the values' dtype, because a value that float16 cannot hold may have a share."""
    wide = [x.to(value.dtype) if x.dtype.itemsize < 4 else x for x, value in zip(buffers, values, strict=True)]
    values = [value.to(x.dtype) for x, value in zip(wide, values, strict=True)]
    if isinstance(weights, list):
        for x, value, weight in zip(wide, values, weights, strict=True):
            x.lerp_(value, weight.to(x.dtype))
    else:
        torch._foreach_lerp_(wide, values, weights)
    for buffer, x in zip(buffers, wide, strict=True):
        if buffer is not x:
            buffer.copy_(x)
