"""Weights of other implementations' non-local blocks in a ``NonLocalBlock2d``."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..non_local.block import NonLocalBlock2d
from ..non_local.modes import MODES
from ..training.feature_tap import unwrapped

__all__ = ["differences", "load_non_local", "module_settings", "our_key", "state_problems"]

Source = nn.Module | Mapping[str, Tensor]

# A Sequential with a max-pool, or one a pool, may be around g and phi, and one with ReLU around the pair's projection.
_LAYERS = {
    r"g(\.0)*(\.conv)?": "g",
    r"theta(\.conv)?": "theta",
    r"phi(\.0)*(\.conv)?": "phi",
    r"concat_project\.(0|conv)": "pair",
    r"conv_out\.conv|W(\.0)?": "out",
    r"conv_out\.bn|W\.1": "norm",
}


def load_non_local(block: NonLocalBlock2d, source: Source) -> None:
    """Copy the weights and BatchNorm buffers of another implementation's block into ``block``.

    ``source`` is mmcv's ``NonLocal2d``, MMRazor's ``NonLocal2dMaxpoolNstride`` or the ``NonLocalBlockND`` of FBKD's
    authors (and its relatives with another pairwise function). Given a module, its pooling, eps and momentum of its
    norm, and mode and scale where it has such attributes, are compared with the block's; a state dict holds none of
    these.

    Args:
        block: of the same widths, with a norm where the source has one, and a last bias (``conv_out_bias``) where the
            source has one: mmcv's has it without a norm only, the authors' always.
        source: the other block, or its state dict. Compilation and data parallelism around either block are looked
            through.

    Raises:
        TypeError: a block that is no NonLocalBlock2d, a source that is neither a module nor a state dict.
        ValueError: settings that differ, missing or surplus keys, shapes that do not fit; all are listed, and nothing
            is copied then.

    Example:
        >>> block = NonLocalBlock2d(256, mode="dot_product", stride=2, conv_out_bias=False)
        >>> load_non_local(block, mmcv_block)  # NonLocal2d(256, mode="dot_product", sub_sample=True, norm_cfg=...)

    Source: mmcv 2.1.0, ``mmcv/cnn/bricks/non_local.py``; github.com/AlexHex7/Non-local_pytorch, from which the authors'
    block descends.
    """
    ours = unwrapped(block) if isinstance(block, nn.Module) else block
    if not isinstance(ours, NonLocalBlock2d):
        raise TypeError(f"block must be a NonLocalBlock2d, got {type(ours).__name__}")
    problems: list[str] = []
    state: Mapping[str, Tensor]
    if isinstance(source, nn.Module):
        theirs = unwrapped(source)
        problems, state = differences(module_settings(theirs), ours, "the block"), theirs.state_dict()
        problems += differences(_norm_settings(theirs, ours.norm), ours.norm, "the block's norm")
    elif isinstance(source, Mapping):
        state = source
    else:
        raise TypeError(f"source must be a module or a state dict, got {type(source).__name__}")
    twice = [key for key, times in Counter(map(our_key, state)).items() if times > 1]
    problems += [f"{key} is there twice" for key in twice]
    renamed = {our_key(key): value for key, value in state.items()}
    problems += state_problems(ours.state_dict(), renamed)
    if problems:
        raise ValueError(f"source does not fit the block: {'; '.join(problems)}")
    ours.load_state_dict(renamed)


def our_key(key: str) -> str:
    """Our name of a block's entry ``key``; an unknown one keeps its name, to be reported as surplus."""
    layer, _, entry = key.rpartition(".")
    for pattern, ours in _LAYERS.items():
        if re.fullmatch(pattern, layer):
            return f"{ours}.{entry}"
    return key


def module_settings(block: nn.Module) -> dict[str, Any]:
    """Return the settings of another implementation's block, under our names, as far as it tells them."""
    sides = _pool_sides(getattr(block, "g", nn.Identity()))
    settings: dict[str, Any] = {"stride": math.prod(sides)}
    if settings["stride"] > 2:
        settings["pool_order"] = "nested" if len(sides) > 1 else "single"
    if hasattr(block, "mode"):
        settings["mode"] = block.mode
    if settings.get("mode") in MODES and MODES[settings["mode"]].has_scale and hasattr(block, "use_scale"):
        settings["use_scale"] = block.use_scale
    return settings


def _norm_settings(block: nn.Module, ours: nn.Module | None) -> dict[str, Any]:
    """Return the settings of another implementation's BatchNorm that our norm has too."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return {name: getattr(norm, name) for norm in norms for name in ("eps", "momentum") if hasattr(ours, name)}


def _pool_sides(projection: nn.Module) -> list[int]:
    """Return the kernel sides of the max-pools around a projection, those of 1 left out."""
    pools = [module.kernel_size for module in projection.modules() if isinstance(module, nn.MaxPool2d)]
    sides = [kernel if isinstance(kernel, int) else kernel[0] for kernel in pools]
    return [side for side in sides if side > 1]


def differences(theirs: dict[str, Any], ours: Any, owner: str) -> list[str]:
    """Describe each setting that differs from the attribute of ``ours``."""
    return [
        f"{name} is {value!r}, {owner} has {getattr(ours, name)!r}"
        for name, value in theirs.items()
        if value != getattr(ours, name)
    ]


def state_problems(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Describe the entries whose keys or shapes are not those of ``own``, or that are no tensors."""
    problems = []
    missing, surplus = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing:
        problems.append(f"missing {', '.join(missing)}")
    if surplus:
        problems.append(f"surplus {', '.join(surplus)}")
    for key in sorted(set(own) & set(state)):
        if not isinstance(state[key], Tensor):
            problems.append(f"{key} must be a tensor, got {type(state[key]).__name__}")
        elif own[key].shape != state[key].shape:
            problems.append(f"{key} must have shape {tuple(own[key].shape)}, got {tuple(state[key].shape)}")
    return problems
