"""Checks at the public boundary. Every error names the argument, what came and what was expected."""

import difflib
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .non_local.batch_norm import Norm, is_frozen
from .non_local.modes import MODES
from .types import AttentionPool, NonLocalWeights

__all__ = [
    "as_list",
    "check_attention_map",
    "check_attention_pools",
    "check_callable",
    "check_channels",
    "check_choice",
    "check_dense",
    "check_feature",
    "check_flag",
    "check_layer",
    "check_module",
    "check_norm",
    "check_number",
    "check_pair",
    "check_same_device",
    "check_spatial_map",
    "check_stride",
    "check_positive",
    "check_tensor",
    "check_text",
    "check_weights",
    "did_you_mean",
    "feature_levels",
    "is_int",
    "is_list",
    "paired_levels",
    "values_per_level",
    "warn_of_clamping",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_TEXTS = (str, bytes, bytearray, memoryview)

Features = Sequence[Tensor] | Mapping[Any, Tensor]

Choice = TypeVar("Choice")


def is_int(value: Any) -> bool:
    """Return whether the value is an integer of any kind that is no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    """Whether ``value`` is a list of any kind: a sequence that is no text, or an array or tensor with a dimension."""
    if isinstance(value, (list, tuple)):
        return True
    if isinstance(value, _TEXTS):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0)


def as_list(value: Any, expected: str, name: str) -> list[Any]:
    """Return the entries of a list of any kind; those of an array or tensor as Python's own numbers or texts.

    Args:
        value: list, tuple, range, another sequence (OmegaConf's), NumPy array or tensor.
        expected: what the error says was expected, as "a list of ints".
        name: of the argument.

    Raises:
        TypeError: anything else, texts among it.
    """
    if not is_list(value):
        raise TypeError(f"{name} must be {expected}, got {_kind(value)}")
    return list(value) if isinstance(value, Sequence) else value.tolist()


def values_per_level(value: Any, levels: int, name: str) -> list[Any]:
    """Return one value per level: the entries of a list of any kind, or a single value repeated.

    Raises:
        ValueError: another number of entries than ``levels``.
    """
    if not is_list(value):
        return [value] * levels
    values = as_list(value, "a list", name)
    if len(values) != levels:
        raise ValueError(f"{name} has {len(values)} values, expected one value or {levels}, one a level")
    return values


def check_flag(value: Any, name: str) -> bool:
    """Return a flag, NumPy's among them, as a bool.

    Raises:
        TypeError: anything else. The text "no" would count as true, and a 0 may be meant as a number.
    """
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def check_callable(value: Any, name: str) -> None:
    """Refuse what cannot be called, with a TypeError."""
    if not callable(value):
        raise TypeError(f"{name} must be a function or another callable, got {_kind(value)}")


def check_text(value: Any, name: str) -> None:
    """Refuse what is no text, with a TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a text, got {_kind(value)}")


def check_module(value: Any, name: str) -> None:
    """Refuse what is no module, a module's class among it, with a TypeError."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {_kind(value)}")


def check_number(value: Any, expected: str, accepts: Callable[[float], bool], name: str) -> float:
    """Return a finite number, for which ``accepts`` is true, as a float; ``expected`` completes the error."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not _is_finite(value) or not accepts(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def _is_finite(value: numbers.Real) -> bool:
    """Return whether the number is finite as a float."""
    try:
        return abs(float(value)) < math.inf
    except OverflowError:
        return False


def check_choice(value: Choice, choices: tuple[str, ...], name: str) -> Choice:
    """Return one of ``choices`` as Python's own text, in the type that it came in (a ``Literal``)."""
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {expected}, got {value!r}{did_you_mean(value, choices)}")
    return str(value)  # type: ignore[return-value]


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """Return the end of an error about an unknown name: the known one that is most like it; empty without such a one.

    Capitals make no difference, and neither do hyphens and spaces in place of underscores.
    """
    if not isinstance(name, str):
        return ""
    texts = {_plain(text): text for text in known if isinstance(text, str)}
    close = difflib.get_close_matches(_plain(name), texts, n=1, cutoff=0.7)  # "gpu" is not meant to be "cpu"
    return f"; did you mean {texts[close[0]]!r}?" if close else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def check_positive(value: Any, name: str) -> float:
    """Return a number > 0, such as a softmax's temperature, as a float."""
    return check_number(value, "a number > 0", lambda number: number > 0, name)


def check_stride(stride: Any) -> int:
    """Return a stride as Python's own int."""
    if not is_int(stride) or stride < 1:
        raise ValueError(f"stride must be an int >= 1 (1: no pooling), got {stride!r}")
    return int(stride)


_warned_of_clamping = False


def warn_of_clamping(stride: int, feature: Tensor) -> None:
    """Say once a process that ``stride`` is larger than a map ``(N, C, H, W)``; not while a graph is compiled."""
    global _warned_of_clamping
    if torch.compiler.is_compiling() or _warned_of_clamping or stride <= min(feature.shape[2:]):
        return
    _warned_of_clamping = True
    height, width = feature.shape[2:]
    warnings.warn(
        f"stride {stride} is larger than a map of {height}x{width} pixels and is clamped to it (said once a process)"
    )


def check_feature(feature: Any, name: str) -> None:
    """Require a feature map: a dense floating-point tensor ``(N, C, H, W)`` with at least one channel and pixel."""
    check_dense(feature, name)
    if feature.dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must have dtype {expected}, got {str(feature.dtype).removeprefix('torch.')}")
    if feature.dim() != 4:
        raise ValueError(f"{name} must have shape (N, C, H, W), got {_shape(feature)}")
    if 0 in feature.shape[1:]:
        raise ValueError(f"{name} must have at least one channel and one pixel, got {_shape(feature)}")


def check_spatial_map(x: Any, name: str) -> None:
    """Require a spatial map: a dense floating-point tensor ``(N, H, W)`` with at least one pixel."""
    check_tensor(x, None, x, name)
    if x.dim() != 3:
        raise ValueError(f"{name} must have shape (N, H, W), got {_shape(x)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one pixel, got {_shape(x)}")


def check_attention_map(x: Any, name: str) -> None:
    """Require an attention map: a dense floating-point tensor ``(N, ...)`` with at least one value per image."""
    check_tensor(x, None, x, name)
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (N, ...) with at least one dimension beside N, got {_shape(x)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one value per image, got {_shape(x)}")


def check_dense(tensor: Any, name: str) -> None:
    """Require a tensor whose values lie in memory by strides: the kernels read nothing else."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_kind(tensor)}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; use to_padded_tensor()")
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got layout {layout}; use to_dense()")


def check_pair(
    student: Tensor, teacher: Tensor, student_name: str, teacher_name: str, agree: str = "N, H and W"
) -> None:
    """Two feature maps of one level that agree in the dimensions that are named, on one device."""
    if any(letter in agree and a != b for letter, a, b in zip("NCHW", student.shape, teacher.shape, strict=True)):
        raise ValueError(
            f"{student_name} and {teacher_name} must agree in {agree}, got {_shape(student)} and {_shape(teacher)}"
        )
    check_same_device(student, teacher, student_name, teacher_name)


def check_same_device(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    if first.device != second.device:
        raise ValueError(
            f"{first_name} and {second_name} must be on one device, got {first.device} and {second.device}"
        )


def check_channels(feature: Tensor, expected: int, name: str) -> None:
    if feature.shape[1] != expected:
        raise ValueError(f"{name} must have {expected} channels, got {feature.shape[1]} in {_shape(feature)}")


def check_tensor(tensor: Any, expected: tuple[int, ...] | None, like: Tensor, name: str) -> None:
    """Require a dense floating-point tensor on the device of ``like``, of shape ``expected`` where one is given."""
    check_dense(tensor, name)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if expected is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {_shape(tensor)}")
    check_same_device(tensor, like, name, "the features")


def check_norm(norm: Any, like: Tensor, name: str) -> Norm | None:
    """Return a BatchNorm of any kind, or None, that fits features ``like (N, C, H, W)`` and is on their device.

    Its tensors are read without a call of the norm, so :func:`check_layer` holds for it too.
    """
    if norm is None:
        return None
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        width = norm.num_features
    elif isinstance(norm, nn.Module) and is_frozen(norm):
        width = norm.running_mean.numel()
    else:
        raise TypeError(
            f"{name} must be a BatchNorm, a SyncBatchNorm, a frozen BatchNorm (with eps and the buffers weight, bias, "
            f"running_mean and running_var) or None, got {_kind(norm)}"
        )
    if width != like.shape[1]:
        raise ValueError(f"{name} must have num_features {like.shape[1]}, got {width}")
    for entry in ("weight", "bias", "running_mean", "running_var"):
        if getattr(norm, entry) is not None:
            check_same_device(getattr(norm, entry), like, f"{name}.{entry}", "the features")
    check_layer(norm, name)
    return norm


def check_layer(layer: nn.Module, name: str) -> None:
    """Refuse a layer with hooks: its weights are read directly, and the hooks would never run.

    Old-style ``weight_norm``, ``spectral_norm`` and pruning are such hooks, which make the layer's weight.
    """
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    if any(hooks):
        raise RuntimeError(
            f"{name} has hooks, which would never run because its weights are read without a call of it: remove them. "
            "torch.nn.utils.weight_norm, spectral_norm and prune are such hooks, as is fully_shard on a part of the "
            "loss; torch.nn.utils.parametrizations and fully_shard on the whole loss work"
        )


def check_weights(weights: NonLocalWeights, x: Tensor, mode: str, name: str) -> None:
    """Require that ``weights`` has what ``mode`` needs, in shapes that fit ``x (N, C, H, W)``, on its device."""
    if not isinstance(weights, NonLocalWeights):
        raise TypeError(f"{name} must be NonLocalWeights, got {_kind(weights)}")
    check_tensor(weights.g_weight, None, x, f"{name}.g_weight")
    channels, shape = x.shape[1], tuple(weights.g_weight.shape)
    if not shape or shape[0] < 1:
        raise ValueError(f"{name}.g_weight must have shape (c, {channels}) with c >= 1, got {shape}")
    inner = shape[0]
    expected = {
        "g_weight": (inner, channels),
        "g_bias": (inner,),
        "out_weight": (channels, inner),
    }
    if MODES[mode].embeds:
        for projection in ("theta", "phi"):
            expected[f"{projection}_weight"] = (inner, channels)
            expected[f"{projection}_bias"] = (inner,)
    if MODES[mode].has_pair_weight:
        expected["pair_weight"] = (2 * inner,)
    if weights.out_bias is not None:
        expected["out_bias"] = (channels,)
    for field, shape in expected.items():
        if getattr(weights, field) is None:
            raise ValueError(f"{name}.{field} must have shape {shape} in mode {mode!r}, got None")
        check_tensor(getattr(weights, field), shape, x, f"{name}.{field}")


def check_attention_pools(student: Any, teacher: Any) -> None:
    """Two :class:`AttentionPool` whose attention maps have the same N, C, H and W; the plain means are not read."""
    for name, pool in (("student", student), ("teacher", teacher)):
        _check_attention_pool(pool, name)
    for field in ("spatial_attention", "channel_attention"):
        s, t = getattr(student, field), getattr(teacher, field)
        if s.shape != t.shape:
            hint = ""
            if field == "channel_attention" and s.shape[0] == t.shape[0]:
                hint = "; adapt the student's channel attention to the teacher's width first"
            raise ValueError(
                f"student.{field} and teacher.{field} must have the same shape, got {_shape(s)} and {_shape(t)}{hint}"
            )
        check_same_device(s, t, f"student.{field}", f"teacher.{field}")


def _check_attention_pool(pool: Any, name: str) -> None:
    """Attention maps ``(N, H, W)`` and ``(N, C)`` of the same images."""
    if not isinstance(pool, AttentionPool):
        raise TypeError(f"{name} must be an AttentionPool, got {_kind(pool)}")
    check_spatial_map(pool.spatial_attention, f"{name}.spatial_attention")
    channels = pool.channel_attention
    check_attention_map(channels, f"{name}.channel_attention")
    if channels.dim() != 2 or channels.shape[0] != pool.spatial_attention.shape[0]:
        raise ValueError(
            f"{name}.channel_attention must have shape (N, C) with N = {pool.spatial_attention.shape[0]} as in "
            f"{name}.spatial_attention, got {_shape(channels)}"
        )


def feature_levels(features: Features, name: str) -> dict[str, Tensor]:
    """Return the levels of a list or dict of any kind, keyed by how an error should call each one."""
    if isinstance(features, Mapping):
        levels = {f"{name}[{key!r}]": feature for key, feature in features.items()}
    elif is_list(features) and not isinstance(features, Tensor):
        levels = {f"{name}[{index}]": feature for index, feature in enumerate(features)}
    else:
        raise TypeError(f"{name} must be a list, tuple or dict of (N, C, H, W) tensors, got {_kind(features)}")
    if not levels:
        raise ValueError(f"{name} has no levels, expected at least one")
    for label, feature in levels.items():
        check_feature(feature, label)
    return levels


def paired_levels(
    student: Features, teacher: Features, teacher_name: str = "teacher_features", same_size: bool = True
) -> list[tuple[str, Tensor, str, Tensor]]:
    """``(student label, student map, teacher label, teacher map)`` of every level, checked against each other.

    Two dicts are matched by key in the student's order, everything else by position. ``same_size`` says whether H and
    W have to agree, as N does.
    """
    students = feature_levels(student, "student_features")
    teachers = feature_levels(teacher, teacher_name)
    if len(students) != len(teachers):
        raise ValueError(
            f"student_features and {teacher_name} must have the same number of levels, "
            f"got {len(students)} and {len(teachers)}"
        )
    if isinstance(student, Mapping) and isinstance(teacher, Mapping):
        if set(student) != set(teacher):
            raise ValueError(
                f"student_features and {teacher_name} must have the same keys, got {list(student)} and {list(teacher)}"
            )
        teachers = {f"{teacher_name}[{key!r}]": teacher[key] for key in student}
    pairs = [(*s, *t) for s, t in zip(students.items(), teachers.items(), strict=True)]
    for student_label, s, teacher_label, t in pairs:
        check_pair(s, t, student_label, teacher_label, "N, H and W" if same_size else "N")
    return pairs


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _kind(value: Any) -> str:
    """Describe a value of a wrong type for an error; say so where a class came in place of an object."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
