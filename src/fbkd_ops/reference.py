"""The literal formulas of FBKD in plain PyTorch: the oracle for every kernel, never optimised.

``S (N, Cs, H, W)`` is the student's feature map, ``T (N, Ct, H, W)`` the teacher's. Everything here may
hold several copies of a feature map, and :func:`non_local` forms the ``(HW, K)`` matrix that the rest of
the package exists to avoid.

Source: Zhang & Ma, "Improve Object Detection with Feature-based Knowledge Distillation", ICLR 2021, and
the authors' released code for its constants.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._numerics import accumulation_dtype, root
from .non_local.batch_norm import uses_batch_statistics
from .non_local.modes import MODES, Operands
from .types import AttentionPool, NonLocalWeights, present, weights_of

__all__ = [
    "adapted_masked_l2_loss",
    "adapted_masked_l2_square",
    "attention_mask",
    "attention_masks",
    "attention_pool",
    "channel_correlation_loss",
    "channel_divergence_loss",
    "channel_moments",
    "level_terms",
    "masked_l2_loss",
    "masked_l2_square",
    "max_pool",
    "non_local",
    "relation_loss",
    "relation_square",
    "spatial_l2_loss",
    "spatial_l2_square",
    "standardised",
]


def attention_pool(x: Tensor) -> AttentionPool:
    """Both attention maps and both plain means of ``x (N, C, H, W)``."""
    x = x.to(accumulation_dtype(x))
    magnitude = x.abs()
    return AttentionPool(
        spatial_attention=magnitude.mean(dim=1),
        channel_attention=magnitude.mean(dim=(2, 3)),
        spatial_mean=x.mean(dim=1),
        channel_mean=x.mean(dim=(2, 3)),
    )


def attention_mask(
    student: Tensor | None,  # (N, ...), None for a mask of the teacher alone
    teacher: Tensor,  # (N, ...)
    *,
    temperature: float,
    mask_rule: str = "average",
) -> Tensor:
    """One mask from two attention maps; the softmax runs over all but the batch dimension."""
    maps = [teacher] if student is None else [student, teacher]
    dtype = accumulation_dtype(*maps)
    maps = [attention.detach().flatten(1).to(dtype) for attention in maps]  # each (N, L)
    if mask_rule == "average":
        softened = [torch.softmax(attention / temperature, dim=1) for attention in maps]
        mask = sum(softened[1:], softened[0]) / len(maps)
    else:
        mask = torch.softmax(sum(maps[1:], maps[0]) / temperature, dim=1)
    return (mask.shape[1] * mask).reshape(teacher.shape)


def attention_masks(
    student: AttentionPool,
    teacher: AttentionPool,
    *,
    spatial_temperature: float,
    channel_temperature: float,
    mask_rule: str = "average",
) -> tuple[Tensor, Tensor]:
    """Spatial mask ``(N, H, W)`` and channel mask ``(N, C)``, without gradient."""
    spatial = attention_mask(
        student.spatial_attention,
        teacher.spatial_attention,
        temperature=spatial_temperature,
        mask_rule=mask_rule,
    )
    channel = attention_mask(
        student.channel_attention,
        teacher.channel_attention,
        temperature=channel_temperature,
        mask_rule=mask_rule,
    )
    return spatial, channel


def masked_l2_loss(
    student: Tensor,  # (N, C, H, W)
    teacher: Tensor,  # (N, C, H, W)
    spatial_mask: Tensor | None = None,  # (N, H, W)
    channel_mask: Tensor | None = None,  # (N, C)
) -> Tensor:
    """``sqrt(sum(Ms * Mc * (S - T)**2))`` over the whole batch."""
    return root(masked_l2_square(student, teacher, spatial_mask, channel_mask))


def masked_l2_square(
    student: Tensor, teacher: Tensor, spatial_mask: Tensor | None = None, channel_mask: Tensor | None = None
) -> Tensor:
    """Return the square of :func:`masked_l2_loss`."""
    dtype = accumulation_dtype(student, teacher)
    squares = (student.to(dtype) - teacher.detach().to(dtype)) ** 2
    if spatial_mask is not None:
        squares = squares * spatial_mask.detach().to(dtype)[:, None]
    if channel_mask is not None:
        squares = squares * channel_mask.detach().to(dtype)[:, :, None, None]
    return squares.sum()


def adapted_masked_l2_loss(
    student: Tensor,  # (N, Cs, H, W)
    weight: Tensor,  # (Ct, Cs)
    bias: Tensor,  # (Ct,)
    teacher: Tensor,  # (N, Ct, H, W)
    spatial_mask: Tensor | None = None,  # (N, H, W)
    channel_mask: Tensor | None = None,  # (N, Ct)
) -> Tensor:
    """``sqrt(sum(Ms * Mc * (A S + a - T)**2))`` over the whole batch."""
    return root(adapted_masked_l2_square(student, weight, bias, teacher, spatial_mask, channel_mask))


def adapted_masked_l2_square(
    student: Tensor,
    weight: Tensor,
    bias: Tensor,
    teacher: Tensor,
    spatial_mask: Tensor | None = None,
    channel_mask: Tensor | None = None,
) -> Tensor:
    """Return the square of :func:`adapted_masked_l2_loss`."""
    dtype = accumulation_dtype(student, teacher)
    adapted = _conv1x1(student.to(dtype), weight.to(dtype), bias.to(dtype))
    return masked_l2_square(adapted, teacher, spatial_mask, channel_mask)


def channel_correlation_loss(student: Tensor, teacher: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Half the mean square of the difference of both maps, each standardised per channel over the batch.

    Source: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022, equations 3 and 4; eps and the deviation's ``n - 1`` as in MMRazor's ``PKDLoss``. A
    channel of one value has the deviation 0.
    """
    dtype = accumulation_dtype(student, teacher)
    difference = _standardised(student.to(dtype), eps) - _standardised(teacher.detach().to(dtype), eps)
    return difference.square().sum() / (2 * max(difference.numel(), 1))


def _standardised(x: Tensor, eps: float) -> Tensor:
    """Return ``x (N, C, H, W)`` with mean 0 and deviation 1 in each channel."""
    values = x.shape[0] * x.shape[2] * x.shape[3]
    centred = x - x.sum(dim=(0, 2, 3), keepdim=True) / max(values, 1)
    variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / max(values - 1, 1)
    return centred / (root(variance) + eps)


def channel_moments(x: Tensor) -> Tensor:
    """Mean and variance of each channel of ``x (N, C, H, W)`` over the batch, ``(2, C)``."""
    x = x.to(accumulation_dtype(x))
    values = max(x.shape[0] * x.shape[2] * x.shape[3], 1)
    mean = x.sum(dim=(0, 2, 3)) / values
    variance = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3)) / values
    return torch.stack([mean, variance])


def standardised(x: Tensor) -> Tensor:
    """``x (N, C, H, W)`` as a BatchNorm in training without weights gives it.

    Source: ``NormConnector`` of MMRazor, with ``dict(type="BN", affine=False, track_running_stats=False)``.
    """
    mean, variance = channel_moments(x)[:, :, None, None]
    return (x - mean) / (variance + 1e-5).sqrt()


def channel_divergence_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``tau**2`` times the divergence of the softmaxes over pixels, mean over the channels of all images.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, equations 3 and 4, as in
    MMRazor's ``ChannelWiseDivergence``.
    """
    dtype = accumulation_dtype(student, teacher)
    rows = [x.to(dtype).flatten(2) / temperature for x in (student, teacher.detach())]  # each (N, C, HW)
    of_student, of_teacher = (torch.log_softmax(each, dim=2) for each in rows)
    divergences = (of_teacher.exp() * (of_teacher - of_student)).sum(dim=2)
    return temperature**2 * divergences.sum() / max(divergences.numel(), 1)


def spatial_l2_loss(
    student: Tensor,  # (N, H, W)
    weight: Tensor,  # (3, 3)
    bias: Tensor,  # (1,)
    teacher: Tensor,  # (N, H, W)
) -> Tensor:
    """``sqrt(sum((conv3x3(s) + b - t)**2))`` over the whole batch, zeros around the maps."""
    return root(spatial_l2_square(student, weight, bias, teacher))


def spatial_l2_square(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
    """Return the square of :func:`spatial_l2_loss`."""
    dtype = accumulation_dtype(student, teacher)
    adapted = F.conv2d(student.to(dtype)[:, None], weight.to(dtype)[None, None], bias.to(dtype), padding=1)
    return ((teacher.detach().to(dtype)[:, None] - adapted) ** 2).sum()


def max_pool(x: Tensor, stride: int, pool_order: str = "single") -> Tensor:
    """Max-pool ``x (N, C, H, W)`` by ``stride`` into ragged-edge-dropping cells.

    A stride larger than the map is clamped to it. ``nested`` pools by 2 first and by the rest then:
    the same cells, but among equal values another winner may receive the gradient.
    """
    for kernel in _pool_kernels(x.shape[-2], x.shape[-1], stride, pool_order):
        x = F.max_pool2d(x, kernel)
    return x


def _pool_kernels(height: int, width: int, stride: int, pool_order: str) -> list[tuple[int, int]]:
    """Return the kernels of the pools that together pool ``(H, W)`` by ``stride``."""
    total = min(stride, height), min(stride, width)
    if total == (1, 1):
        return []
    if pool_order == "single":
        return [total]
    first = 2 if total[0] % 2 == 0 else 1, 2 if total[1] % 2 == 0 else 1
    return [first, (total[0] // first[0], total[1] // first[1])]


def non_local(
    x: Tensor,  # (N, C, H, W)
    weights: NonLocalWeights,
    *,
    mode: str = "dot_product",
    stride: int = 1,
    pool_order: str = "single",
    use_scale: bool = True,
    norm: nn.Module | None = None,
) -> Tensor:
    """Return the non-local block ``z = x + Norm(Wz y + bz)``, ``(N, C, H, W)``."""
    weights = weights_of(w if w is None else w.to(x.dtype) for w in weights)
    g = max_pool(_conv1x1(x, weights.g_weight, weights.g_bias), stride, pool_order).flatten(2)
    if MODES[mode].embeds:
        theta = _conv1x1(x, present(weights.theta_weight), weights.theta_bias)
        phi = max_pool(_conv1x1(x, present(weights.phi_weight), weights.phi_bias), stride, pool_order)
    else:
        theta, phi = x, max_pool(x, stride, pool_order)
    pairs = MODES[mode].pairwise(Operands(theta.flatten(2), phi.flatten(2), weights.pair_weight, use_scale))
    y = (pairs @ g.mT).mT.reshape(x.shape[0], g.shape[1], *x.shape[2:])  # (N, c, H, W)
    u = _conv1x1(y, weights.out_weight, weights.out_bias)
    return x + (u if norm is None else _normalized(u, norm))


def _normalized(u: Tensor, norm: nn.Module) -> Tensor:
    """``norm(u)`` in u's dtype, whatever the norm's own; a frozen BatchNorm is one module like another."""
    tensors = dict(norm.named_parameters()) | dict(norm.named_buffers())
    cast = {name: value.to(u.dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    out = torch.func.functional_call(norm, cast, (u,))
    if uses_batch_statistics(norm):
        with torch.no_grad():
            for name, buffer in norm.named_buffers():
                if cast[name] is not buffer:
                    buffer.copy_(cast[name])
    return out


def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight[:, :, None, None], bias)


def relation_loss(
    student: Tensor,  # (N, Cs, H, W)
    teacher: Tensor,  # (N, Ct, H, W)
    student_weights: NonLocalWeights,
    teacher_weights: NonLocalWeights,
    adaptation_weight: Tensor,  # (Ct, Cs)
    adaptation_bias: Tensor,  # (Ct,)
    *,
    mode: str = "dot_product",
    stride: int = 1,
    pool_order: str = "single",
    use_scale: bool = True,
    student_norm: nn.Module | None = None,
    teacher_norm: nn.Module | None = None,
) -> Tensor:
    """``|| NL_t(T) - B(NL_s(S)) ||`` over the whole batch."""
    sides = student, teacher, student_weights, teacher_weights, adaptation_weight, adaptation_bias
    block: dict[str, Any] = dict(mode=mode, stride=stride, pool_order=pool_order, use_scale=use_scale)
    return root(relation_square(*sides, student_norm=student_norm, teacher_norm=teacher_norm, **block))


def relation_square(
    student: Tensor,
    teacher: Tensor,
    student_weights: NonLocalWeights,
    teacher_weights: NonLocalWeights,
    adaptation_weight: Tensor,
    adaptation_bias: Tensor,
    *,
    student_norm: nn.Module | None,
    teacher_norm: nn.Module | None,
    **block: Any,
) -> Tensor:
    """Return the square of :func:`relation_loss`."""
    dtype = accumulation_dtype(student, teacher)
    z_s = non_local(student.to(dtype), student_weights, norm=student_norm, **block)
    z_t = non_local(teacher.detach().to(dtype), teacher_weights, norm=teacher_norm, **block)
    adapted = _conv1x1(z_s, adaptation_weight.to(dtype), adaptation_bias.to(dtype))
    return ((z_t - adapted) ** 2).sum()


def level_terms(student: Tensor, teacher: Tensor, level) -> dict[str, Tensor]:
    """Return the unweighted terms of one level that its settings ask for, keyed by the term's name.

    Args:
        student: ``(N, Cs, H, W)``.
        teacher: ``(N, Ct, H, W)``.
        level: an :class:`fbkd_ops.level.FBKDLevel`, read for its parameters and settings only.
    """
    settings = level.settings
    dtype = accumulation_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    pool_s, pool_t = attention_pool(student), attention_pool(teacher)
    terms = {}
    if level.feature_adaptation is not None:
        layer = level.feature_adaptation
        s, t = (standardised(x) if settings.feature_norm == "channel" else x for x in (student, teacher))
        terms["feature"] = adapted_masked_l2_loss(
            s, layer.weight.flatten(1), layer.bias, t, *_masks(pool_s, pool_t, level)
        )
    attention = settings.pooled_terms == "attention"
    if level.channel_adaptation is not None:
        s = pool_s.channel_attention if attention else pool_s.channel_mean
        t = pool_t.channel_attention if attention else pool_t.channel_mean
        terms["channel"] = root(((t - _linear(level.channel_adaptation, s)) ** 2).sum())
    if level.spatial_adaptation is not None:
        s = pool_s.spatial_attention if attention else pool_s.spatial_mean
        t = pool_t.spatial_attention if attention else pool_t.spatial_mean
        layer = level.spatial_adaptation
        terms["spatial"] = spatial_l2_loss(s, layer.weight[0, 0], layer.bias, t)
    if level.relation_adaptation is not None:
        terms["relation"] = relation_loss(
            student,
            teacher,
            level.student_non_local.weights(),
            level.teacher_non_local.weights(),
            level.relation_adaptation.weight.flatten(1),
            level.relation_adaptation.bias,
            mode=settings.mode,
            stride=settings.stride,
            pool_order=settings.pool_order,
            use_scale=settings.use_scale,
            student_norm=level.student_non_local.norm,
            teacher_norm=level.teacher_non_local.norm,
        )
    return terms


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply the layer to ``x``, in x's dtype."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _masks(pool_s: AttentionPool, pool_t: AttentionPool, level) -> tuple[Tensor, Tensor | None]:
    """Return the feature term's masks ``(N, H, W)`` and ``(N, Ct)``, None where the settings have none."""
    settings = level.settings
    spatial = attention_mask(
        pool_s.spatial_attention,
        pool_t.spatial_attention,
        temperature=settings.spatial_temperature,
        mask_rule=settings.mask_rule,
    )
    if not settings.use_channel_mask:
        return spatial, None
    attention_s: Tensor | None = pool_s.channel_attention
    if settings.channel_mask_source == "teacher":
        attention_s = None
    elif pool_s.channel_attention.shape != pool_t.channel_attention.shape:
        attention_s = _linear(level.channel_adaptation, pool_s.channel_attention)
    channel = attention_mask(
        attention_s,
        pool_t.channel_attention,
        temperature=settings.channel_temperature,
        mask_rule=settings.mask_rule,
    )
    return spatial, channel
