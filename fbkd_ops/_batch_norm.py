"""BatchNorm as an affine map a channel, from the moments of what it normalises instead of its values.

A norm is one of PyTorch's BatchNorms, ``nn.SyncBatchNorm`` among them, or a frozen one: any module with ``eps`` and the
buffers of :class:`FrozenBatchNorm2d`, as torchvision's class of that name.
"""

import contextlib
from typing import Iterator, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "FrozenBatchNorm2d",
    "Moments",
    "is_frozen",
    "refuse_one_value",
    "scale_and_shift",
    "synchronizes",
    "uses_batch_statistics",
    "without_updates",
]

# A plain global, as in backends.py.
_updates = True


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d whose statistics, weight and bias are buffers: neither an optimizer nor training changes them.

    The keys are all of BatchNorm2d's, ``num_batches_tracked`` included, so that state dicts go both ways.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
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


def is_frozen(norm: nn.Module) -> bool:
    """Whether ``norm`` has BatchNorm's weight, bias and statistics, all of them as buffers."""
    buffers = dict(norm.named_buffers())
    return hasattr(norm, "eps") and {"weight", "bias", "running_mean", "running_var"} <= set(buffers)


class Moments(NamedTuple):
    """Mean and biased variance of ``u (N, C, H, W)`` over each image's pixels."""

    image_means: Tensor  # (N, C)
    variances: Tensor  # (N, C)
    pixels: int  # H * W


def uses_batch_statistics(norm: Optional[nn.Module]) -> bool:
    """Whether ``norm`` normalises with the batch's own moments: in training, or without running statistics."""
    return isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)


def synchronizes(norm: nn.Module) -> bool:
    """Whether the moments of ``norm`` are those of several processes: a SyncBatchNorm in training."""
    distributed = torch.distributed
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not distributed.is_available():
        return False
    return distributed.is_initialized() and distributed.get_world_size(norm.process_group) > 1


@contextlib.contextmanager
def without_updates() -> Iterator[None]:
    """Leave running statistics alone: what is computed inside has been computed before."""
    global _updates
    previous, _updates = _updates, False
    try:
        yield
    finally:
        _updates = previous


def scale_and_shift(norm: nn.Module, moments: Optional[Moments], like: Tensor) -> tuple[Tensor, Tensor]:
    """``(C,), (C,)`` in the dtype of ``like``, with ``norm(u) = scale * u + shift``.

    In training the running statistics are updated as the norm's own forward does it.

    Args:
        norm: the BatchNorm.
        moments: those of this process' u; needed only where :func:`uses_batch_statistics`.
        like: a tensor of the wanted dtype.

    Raises:
        ValueError: one value a channel where :func:`uses_batch_statistics`.
    """
    mean, variance = _statistics(norm, moments, like)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(scale.dtype)
    shift = -scale * mean
    if norm.bias is not None:
        shift = shift + norm.bias.to(shift.dtype)
    return scale, shift


def _statistics(norm: nn.Module, moments: Optional[Moments], like: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance ``(C,)`` to normalise with."""
    if not uses_batch_statistics(norm):
        return norm.running_mean.to(like.dtype), norm.running_var.to(like.dtype)
    mean, variance, count = _over_images(moments)
    if synchronizes(norm):
        mean, variance, count = _OverProcesses.apply(mean, variance, count, norm.process_group)
        count = int(count)
    refuse_one_value(count, len(mean))
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        _update_running_statistics(norm, mean.detach(), variance.detach(), count)
    return mean.to(like.dtype), variance.to(like.dtype)


def refuse_one_value(count: int, channels: int) -> None:
    """Raise what BatchNorm raises where its own statistics would be those of ``count`` = 1 values a channel."""
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {[1, channels, 1, 1]}")


def _over_images(moments: Moments) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance ``(C,)`` of u over all images, zeros for none, and the number of values a channel."""
    images = len(moments.image_means)
    mean = moments.image_means.sum(dim=0) / max(images, 1)
    between = (moments.image_means - mean).square()  # (N, C)
    return mean, (moments.variances + between).sum(dim=0) / max(images, 1), images * moments.pixels


class _OverProcesses(torch.autograd.Function):
    """Mean and biased variance of the values of all processes, by the law of total variance, and their number.

    Each process has its own number of values, possibly none; also one without any has to run both passes, because the
    others wait for it there.
    """

    @staticmethod
    def forward(ctx, mean: Tensor, variance: Tensor, count: int, group) -> tuple[Tensor, Tensor, Tensor]:
        own = torch.cat([mean, variance, mean.new_tensor([count])])
        every = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(every, own, group=group)
        means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], dim=1)  # (P, C), (P, C), (P, 1)
        total = counts.sum()
        shares = counts / total.clamp(min=1)
        global_mean = (shares * means).sum(dim=0)
        within_and_between = variances + (means - global_mean).square()
        ctx.group = group
        ctx.save_for_backward(mean - global_mean, count / total.clamp(min=1))
        ctx.mark_non_differentiable(total)
        return global_mean, (shares * within_and_between).sum(dim=0), total

    @staticmethod
    @once_differentiable
    def backward(ctx, mean_gradient: Tensor, variance_gradient: Tensor, _):
        deviation, share = ctx.saved_tensors
        gradients = torch.stack([mean_gradient, variance_gradient])
        torch.distributed.all_reduce(gradients, group=ctx.group)
        mean_gradient, variance_gradient = share * gradients
        return mean_gradient + 2 * deviation * variance_gradient, variance_gradient, None, None


def _update_running_statistics(norm: nn.Module, mean: Tensor, variance: Tensor, count: int) -> None:
    """What BatchNorm does to its buffers in training: unbiased variance, momentum or average.

    An empty batch is counted, but leaves the statistics.
    """
    if not _updates:
        return
    batches, momentum = norm.num_batches_tracked, norm.momentum
    if batches is not None:
        batches.add_(1)
    if count == 0:
        return
    if momentum is None:
        momentum = 0.0 if batches is None else batches.to(norm.running_mean.dtype).reciprocal()
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    unbiased = variance * (count / (count - 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
