"""The parts of the losses as functions: FBKD's attention maps, masks, feature and relation loss, and PKD's correlation.

All take float16, bfloat16, float32 or float64 in any mixture, accumulate in float32 (float64 where a map of student or
teacher is float64), give results in that accumulation dtype and are indifferent to autocast, backward passes included.
The correlation is computed in float64. No gradient ever reaches a teacher. Second and forward-mode derivatives raise,
except inside ``use_backend("reference")``.

Triton, which runs :func:`adapted_masked_l2_loss` and :func:`relation_loss` on a GPU, accumulates in the same dtypes.
But it rounds weights and matrices to 16 bits before it multiplies a 16-bit map by them: where student and teacher share
that dtype, and in the pooled convolutions of a block (``stride`` > 1) whatever the other side's dtype. In bfloat16 that
puts a loss off by about 1e-4 of its value and a gradient by up to 2e-2, as PyTorch's own layers do under autocast.
Beside a float64 map nothing is rounded.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from . import dispatch
from ._numerics import accumulation_dtype, root
from ._validation import (
    as_list,
    check_attention_map,
    check_attention_pools,
    check_choice,
    check_feature,
    check_flag,
    check_norm,
    check_pair,
    check_positive,
    check_same_device,
    check_spatial_map,
    check_stride,
    check_tensor,
    check_weights,
    warn_of_clamping,
)
from .non_local.modes import ModeName
from .non_local.parameters import Block, BlockSettings
from .non_local.relation import RelationTerm
from .ops.adapted_masked_l2 import AdaptedLevels
from .ops.attention_masks import MaskRequest
from .ops.spatial_l2 import SpatialLevels
from .presets import CHOICES, MODES, MaskRule, PoolOrder
from .types import AttentionPool, NonLocalWeights

__all__ = [
    "adapted_masked_l2_loss",
    "attention_mask",
    "attention_masks",
    "attention_pool",
    "attention_pools",
    "channel_correlation_loss",
    "channel_divergence_loss",
    "masked_l2_loss",
    "non_local",
    "relation_loss",
    "spatial_l2_loss",
]


def attention_pool(x: Tensor) -> AttentionPool:
    """Both attention maps and both plain means of a feature map, in one read of it.

    Args:
        x: ``(N, C, H, W)``. Contiguous and channels_last maps, and slices of them along N or C, are read in place;
            other strides are copied once.

    Returns:
        :class:`AttentionPool` of ``spatial_attention (N, H, W)``, ``channel_attention (N, C)``,
        ``spatial_mean (N, H, W)`` and ``channel_mean (N, C)``, contiguous, float32 (float64 for float64).
        All four are differentiable, once; the gradient of ``abs`` at 0 is 0.

    Raises:
        TypeError: x is no tensor, or not a floating-point one.
        ValueError: x is not ``(N, C, H, W)``, or has no channel or pixel.
        RuntimeError: a backend chosen with :func:`fbkd_ops.use_backend` cannot serve the call.

    Example:
        >>> pool = attention_pool(torch.randn(2, 256, 50, 84))
        >>> pool.spatial_attention.shape, pool.channel_attention.shape
        (torch.Size([2, 50, 84]), torch.Size([2, 256]))

    Source: Zhang & Ma 2021, the spatial and channel attention maps; the plain means are those of the released code.
    """
    check_feature(x, "x")
    return dispatch.attention_pools([x])[0]


def attention_pools(features: Sequence[Tensor]) -> list[AttentionPool]:
    """:func:`attention_pool` of every level of a pyramid; they share launches on a GPU, parallel regions on the CPU.

    Args:
        features: ``(N, C, H, W)`` maps on one device, of any sizes and dtypes.

    Returns:
        One :class:`AttentionPool` a level, bit for bit those of :func:`attention_pool`.

    Raises:
        TypeError, ValueError: as :func:`attention_pool`, and for levels on different devices.

    Example:
        >>> pools = attention_pools([torch.randn(2, 64, 32, 32), torch.randn(2, 64, 16, 16)])
        >>> [pool.spatial_mean.shape[1] for pool in pools]
        [32, 16]
    """
    if isinstance(features, Tensor):
        raise TypeError("features must be a list of (N, C, H, W) tensors, got one tensor: use attention_pool")
    features = as_list(features, "a list of (N, C, H, W) tensors", "features")
    for index, x in enumerate(features):
        check_feature(x, f"features[{index}]")
        check_same_device(x, features[0], f"features[{index}]", "features[0]")
    return dispatch.attention_pools(features) if features else []


def attention_mask(
    student: Tensor | None, teacher: Tensor, *, temperature: float, mask_rule: MaskRule = "average"
) -> Tensor:
    """One mask, without gradient, from the student's and the teacher's attention map.

    Args:
        student: ``(N, ...)``, or None for a mask of the teacher alone.
        teacher: ``(N, ...)`` of the same shape.
        temperature: tau > 0; the softmax runs over everything but N.
        mask_rule: ``"average"``, ``L/2 * (softmax(s/tau) + softmax(t/tau))``, or ``"joint"``,
            ``L * softmax((s + t)/tau)``, with L the number of elements an image. Both have mean 1 an image.

    Returns:
        The mask in the teacher's shape.

    Raises:
        TypeError: an argument that is no dense floating-point tensor.
        ValueError: another mask rule, a temperature that is not a finite number > 0, different shapes, maps without a
            value.

    Example:
        >>> mask = attention_mask(torch.rand(2, 8, 8), torch.rand(2, 8, 8), temperature=0.5)
        >>> round(mask.mean().item(), 4)
        1.0

    Source: the released code for ``average``, Zhang & Ma 2021 for ``joint``.
    """
    check_choice(mask_rule, CHOICES["mask_rule"], "mask_rule")
    temperature = check_positive(temperature, "temperature")
    check_attention_map(teacher, "teacher")
    if student is not None:
        check_attention_map(student, "student")
        if student.shape != teacher.shape:
            raise ValueError(
                f"student must have shape {tuple(teacher.shape)}, got {tuple(student.shape)}: student and teacher are "
                "maps of the same pixels or channels"
            )
        check_same_device(student, teacher, "student", "teacher")
    return dispatch.attention_masks([MaskRequest(student, teacher, temperature, mask_rule)])[0]


def attention_masks(
    student: AttentionPool,
    teacher: AttentionPool,
    *,
    spatial_temperature: float,
    channel_temperature: float,
    mask_rule: MaskRule = "average",
) -> tuple[Tensor, Tensor]:
    """Return the spatial and the channel mask of a level, without gradient.

    Args:
        student: the student's four means; where the widths differ, with its channel attention already adapted
            to the teacher's width.
        teacher: the teacher's four means.
        spatial_temperature: tau > 0 of the softmax over pixels.
        channel_temperature: tau > 0 of the softmax over channels.
        mask_rule: ``"average"`` or ``"joint"``, see :func:`attention_mask`.

    Returns:
        ``(spatial_mask (N, H, W), channel_mask (N, C))``, each of mean 1 an image.

    Raises:
        TypeError: an argument that is no AttentionPool, attention maps that are no dense floating-point tensors.
        ValueError: shapes, devices or widths that do not agree, another mask rule, a temperature that is not a finite
            number > 0.

    Example:
        >>> student, teacher = (attention_pool(torch.randn(2, 64, 25, 42)) for _ in range(2))
        >>> masks = attention_masks(student, teacher, spatial_temperature=0.5, channel_temperature=0.5)
        >>> spatial_mask, channel_mask = masks
        >>> spatial_mask.shape, channel_mask.shape
        (torch.Size([2, 25, 42]), torch.Size([2, 64]))

    Source: Zhang & Ma 2021, the attention masks ``M^s`` and ``M^c``.
    """
    check_attention_pools(student, teacher)
    check_choice(mask_rule, CHOICES["mask_rule"], "mask_rule")
    spatial_temperature = check_positive(spatial_temperature, "spatial_temperature")
    channel_temperature = check_positive(channel_temperature, "channel_temperature")
    spatial_mask, channel_mask = dispatch.attention_masks(
        [
            MaskRequest(student.spatial_attention, teacher.spatial_attention, spatial_temperature, mask_rule),
            MaskRequest(student.channel_attention, teacher.channel_attention, channel_temperature, mask_rule),
        ]
    )
    return spatial_mask, channel_mask


def masked_l2_loss(
    student: Tensor,
    teacher: Tensor,
    spatial_mask: Tensor | None = None,
    channel_mask: Tensor | None = None,
) -> Tensor:
    """``sqrt(sum(Ms * Mc * (S - T)**2))`` over the whole batch; the gradient at 0 is 0.

    Args:
        student: ``(N, C, H, W)``, already in the teacher's width.
        teacher: ``(N, C, H, W)``.
        spatial_mask: ``(N, H, W)``, or None for ones. No gradient.
        channel_mask: ``(N, C)``, or None for ones. No gradient.

    Returns:
        A scalar. It grows with ``sqrt(N * H * W)``.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes or devices that do not agree.

    Example:
        >>> masked_l2_loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
        tensor(4.)

    Source: Zhang & Ma 2021, attention-masked loss ``L_AM``.
    """
    check_feature(student, "student")
    check_feature(teacher, "teacher")
    check_pair(student, teacher, "student", "teacher", "N, C, H and W")
    _check_masks(spatial_mask, channel_mask, teacher)
    return root(dispatch.masked_l2_squares([student], [teacher], [spatial_mask], [channel_mask])[0])


def adapted_masked_l2_loss(
    student: Tensor,
    weight: Tensor,
    bias: Tensor,
    teacher: Tensor,
    spatial_mask: Tensor | None = None,
    channel_mask: Tensor | None = None,
) -> Tensor:
    """``sqrt(sum(Ms * Mc * (A S + a - T)**2))`` over the whole batch; the gradient at 0 is 0.

    The adapted map ``A S + a``, its difference to T and its square exist in blocks only. Student, weight and bias
    receive gradients.

    Args:
        student: ``(N, Cs, H, W)``.
        weight: ``A (Ct, Cs)``, of the 1x1 convolution that adapts the student: ``conv.weight.flatten(1)``.
        bias: ``a (Ct,)``.
        teacher: ``(N, Ct, H, W)``.
        spatial_mask: ``(N, H, W)``, or None for ones. No gradient.
        channel_mask: ``(N, Ct)``, or None for ones. No gradient.

    Returns:
        A scalar. It grows with ``sqrt(N * H * W)``.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes or devices that do not agree.

    Example:
        >>> student, teacher = torch.randn(2, 32, 20, 20), torch.randn(2, 64, 20, 20)
        >>> adaptation = torch.nn.Conv2d(32, 64, 1)
        >>> loss = adapted_masked_l2_loss(student, adaptation.weight.flatten(1), adaptation.bias, teacher)
        >>> torch.allclose(loss, masked_l2_loss(adaptation(student), teacher), rtol=1e-4)
        True

    Source: Zhang & Ma 2021, attention-masked loss ``L_AM`` with its adaptation layer.
    """
    check_feature(student, "student")
    check_feature(teacher, "teacher")
    check_pair(student, teacher, "student", "teacher")
    check_tensor(weight, (teacher.shape[1], student.shape[1]), student, "weight")
    check_tensor(bias, (teacher.shape[1],), student, "bias")
    _check_masks(spatial_mask, channel_mask, teacher)
    levels = AdaptedLevels([student], [weight], [bias], [teacher], [spatial_mask], [channel_mask])
    return root(dispatch.adapted_masked_l2_squares(levels)[0])


def channel_correlation_loss(student: Tensor, teacher: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Half the mean square of the difference of both maps, each standardised per channel over the batch.

    Of n values a channel it is, up to eps, ``(n - 1) / n`` times the mean over channels of ``1 - r``, with Pearson's
    correlation r of the channel in both maps. One read of both maps, and another in backward.

    Args:
        student: ``(N, C, H, W)``, already in the teacher's width.
        teacher: ``(N, C, H, W)``. No gradient.
        eps: what is added to each standard deviation, > 0.

    Returns:
        A scalar from 0 (the maps agree up to a scale and a shift of each channel) to 2. A channel without variance in
        one of the maps is 0 there after standardising, and adds ``1 / (2 C)`` at most.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes or devices that do not agree, an eps that is not a finite number > 0.

    Example:
        >>> teacher = torch.randn(2, 64, 20, 20)
        >>> round(channel_correlation_loss(3 * teacher + 1, teacher).item(), 4)
        0.0
        >>> round(channel_correlation_loss(-teacher, teacher).item(), 2)
        2.0

    Source: Cao et al. 2022 (PKD), equations 3 and 4; MMRazor's ``PKDLoss`` for eps and the deviation's ``n - 1``.
    """
    check_feature(student, "student")
    check_feature(teacher, "teacher")
    check_pair(student, teacher, "student", "teacher", "N, C, H and W")
    eps = check_positive(eps, "eps")
    return dispatch.channel_correlation_losses([student], [teacher], eps)[0]


def channel_divergence_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the mean divergence of the channels' distributions over pixels from the teacher's.

    ``tau**2 * mean(KL(softmax(T / tau) || softmax(S / tau)))``, with softmaxes over the pixels of a channel and the
    mean over the channels of all images. One read of both maps, and another in backward.

    Args:
        student: ``(N, C, H, W)``, already in the teacher's width.
        teacher: ``(N, C, H, W)``. No gradient.
        temperature: tau > 0.

    Returns:
        A scalar, >= 0 up to rounding.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes or devices that do not agree, a temperature that is not a finite number > 0.

    Example:
        >>> teacher = torch.randn(2, 64, 20, 20)
        >>> abs(channel_divergence_loss(teacher + 3, teacher).item()) < 1e-5
        True

    Source: Shu et al. 2021 (CWD), equations 3 and 4; MMRazor's ``ChannelWiseDivergence``.
    """
    check_feature(student, "student")
    check_feature(teacher, "teacher")
    check_pair(student, teacher, "student", "teacher", "N, C, H and W")
    temperature = check_positive(temperature, "temperature")
    return dispatch.channel_divergence_losses([student], [teacher], temperature)[0]


def spatial_l2_loss(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
    """``sqrt(sum((conv3x3(s) + b - t)**2))`` over the whole batch, zeros around the maps; the gradient at 0 is 0.

    Student, weight and bias receive gradients, once.

    Args:
        student: spatial attention map or mean ``(N, H, W)``, see :func:`attention_pool`.
        weight: ``(3, 3)``, of the convolution that adapts the map: ``conv.weight[0, 0]``.
        bias: ``(1,)``.
        teacher: ``(N, H, W)``.

    Returns:
        A scalar. It grows with ``sqrt(N * H * W)``.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes or devices that do not agree, a map without pixels.

    Example:
        >>> student, teacher = torch.randn(2, 25, 42), torch.randn(2, 25, 42)
        >>> layer = torch.nn.Conv2d(1, 1, 3, padding=1)
        >>> loss = spatial_l2_loss(student, layer.weight[0, 0], layer.bias, teacher)
        >>> torch.allclose(loss, (layer(student[:, None])[:, 0] - teacher).norm(), rtol=1e-4)
        True

    Source: Zhang & Ma 2021, attention transfer loss ``L_AT``, with the adaptation layer of the released code.
    """
    check_spatial_map(student, "student")
    check_spatial_map(teacher, "teacher")
    check_tensor(teacher, student.shape, teacher, "teacher")
    check_same_device(teacher, student, "teacher", "student")
    check_tensor(weight, (3, 3), student, "weight")
    check_tensor(bias, (1,), student, "bias")
    return root(dispatch.spatial_l2_squares(SpatialLevels([student], [weight], [bias], [teacher]))[0])


def _check_masks(spatial_mask: Tensor | None, channel_mask: Tensor | None, teacher: Tensor) -> None:
    n, channels, height, width = teacher.shape
    if spatial_mask is not None:
        check_tensor(spatial_mask, (n, height, width), teacher, "spatial_mask")
    if channel_mask is not None:
        check_tensor(channel_mask, (n, channels), teacher, "channel_mask")


def non_local(
    x: Tensor,
    weights: NonLocalWeights,
    *,
    mode: ModeName = "dot_product",
    stride: int = 1,
    pool_order: PoolOrder = "single",
    use_scale: bool = True,
    norm: nn.Module | None = None,
) -> Tensor:
    """Return the non-local block ``z = x + Norm(Wz y + bz)`` without its ``(HW, K)`` matrix.

    Args:
        x: ``(N, C, H, W)``.
        weights: the block's 1x1 convolutions, see :class:`fbkd_ops.NonLocalWeights`.
        mode: ``"dot_product"``, ``"embedded_gaussian"``, ``"gaussian"`` or ``"concatenation"``.
        stride: factor by which phi and g are max-pooled, >= 1; clamped to the map, with a warning once a process.
        pool_order: ``"single"``, or ``"nested"`` for a pool by 2 followed by a pool by ``stride / 2``.
        use_scale: whether ``embedded_gaussian`` divides by the root of the inner width.
        norm: a BatchNorm whose statistics, mode and buffers are used (and updated in training) as its own forward
            would, or None. An ``nn.SyncBatchNorm`` takes the statistics of all processes, on the CPU too; a frozen one
            (torchvision's FrozenBatchNorm2d, or any module with eps and such buffers) always its buffers.

    Returns:
        z, ``(N, C, H, W)``, in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a bad x, mode, stride or flag; weights that do not fit x or lack what the mode needs; a
            norm of another kind, width or device.
        RuntimeError: a norm with hooks (an old-style ``weight_norm`` is one), which would never run.
        ValueError: one value a channel under a BatchNorm in training, as BatchNorm raises.

    Example:
        >>> block = fbkd_ops.NonLocalBlock2d(16, inter_channels=8, stride=2)
        >>> non_local(torch.randn(2, 16, 9, 7), block.weights(), stride=2, norm=block.norm).shape
        torch.Size([2, 16, 9, 7])

    Source: Wang et al. 2018, "Non-local Neural Networks"; Zhang & Ma 2021 use ``dot_product``.
    """
    check_feature(x, "x")
    settings = _block_settings(x, mode, stride, pool_order, use_scale)
    check_weights(weights, x, mode, "weights")
    norm = check_norm(norm, x, "norm")
    return dispatch.non_local(x.to(accumulation_dtype(x)), Block(weights, settings, norm))


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    student_weights: NonLocalWeights,
    teacher_weights: NonLocalWeights,
    adaptation_weight: Tensor,
    adaptation_bias: Tensor,
    *,
    mode: ModeName = "dot_product",
    stride: int = 1,
    pool_order: PoolOrder = "single",
    use_scale: bool = True,
    student_norm: nn.Module | None = None,
    teacher_norm: nn.Module | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """``|| NL_t(T) - B(NL_s(S)) ||`` over the whole batch, without a ``(HW, K)`` matrix and without z.

    Both blocks' weights and ``B`` receive gradients, the teacher's features do not; the gradient at 0 is 0.

    Args:
        student: ``(N, Cs, H, W)``.
        teacher: ``(N, Ct, H, W)``.
        student_weights: of the student's block, width Cs.
        teacher_weights: of the teacher's block, width Ct.
        adaptation_weight: the 1x1 convolution B, ``(Ct, Cs)``.
        adaptation_bias: its bias, ``(Ct,)``.
        mode, stride, pool_order, use_scale: as in :func:`non_local`, for both blocks.
        student_norm, teacher_norm: the blocks' BatchNorms, or None, as in :func:`non_local`.
        memory_efficient: keep nothing of a feature map's size for the backward pass, which then computes it again.
            Else ``dot_product`` mode keeps one map, the other modes the responses of both blocks as well.

    Returns:
        A scalar. It grows with ``sqrt(N * H * W)``.

    Raises:
        TypeError, ValueError: as :func:`non_local`, and for N, H, W, devices or widths that do not agree.
        RuntimeError: a forced backend that cannot serve the call; a second derivative.

    Example:
        >>> student, teacher = torch.randn(2, 8, 9, 7), torch.randn(2, 16, 9, 7)
        >>> blocks = fbkd_ops.NonLocalBlock2d(8), fbkd_ops.NonLocalBlock2d(16)
        >>> adaptation = torch.nn.Conv2d(8, 16, 1)
        >>> loss = relation_loss(
        ...     student, teacher, blocks[0].weights(), blocks[1].weights(),
        ...     adaptation.weight.flatten(1), adaptation.bias,
        ...     student_norm=blocks[0].norm, teacher_norm=blocks[1].norm,
        ... )
        >>> loss.shape
        torch.Size([])

    Source: Zhang & Ma 2021, non-local distillation loss ``L_NLD``; ``docs/math.md`` for the collapse.
    """
    check_feature(student, "student")
    check_feature(teacher, "teacher")
    check_pair(student, teacher, "student", "teacher")
    settings = _block_settings(student, mode, stride, pool_order, use_scale)
    check_weights(student_weights, student, mode, "student_weights")
    check_weights(teacher_weights, teacher, mode, "teacher_weights")
    expected = (teacher.shape[1], student.shape[1])
    check_tensor(adaptation_weight, expected, student, "adaptation_weight")
    check_tensor(adaptation_bias, expected[:1], student, "adaptation_bias")
    student_norm = check_norm(student_norm, student, "student_norm")
    teacher_norm = check_norm(teacher_norm, teacher, "teacher_norm")
    memory_efficient = check_flag(memory_efficient, "memory_efficient")
    blocks = Block(student_weights, settings, student_norm), Block(teacher_weights, settings, teacher_norm)
    term = RelationTerm(student, teacher.detach(), *blocks, adaptation_weight, adaptation_bias)
    return root(dispatch.relation_squares([term], memory_efficient)[0])


def _block_settings(x: Tensor, mode: ModeName, stride: int, pool_order: PoolOrder, use_scale: bool) -> BlockSettings:
    check_choice(mode, MODES, "mode")
    check_choice(pool_order, CHOICES["pool_order"], "pool_order")
    stride, use_scale = check_stride(stride), check_flag(use_scale, "use_scale")
    warn_of_clamping(stride, x)
    return BlockSettings(mode, stride, pool_order, use_scale)
