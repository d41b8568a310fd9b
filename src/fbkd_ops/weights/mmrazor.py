"""Weights of MMRazor 1.0.0's FBKD connectors, and of the authors' detectors, in an ``FBKDLoss``."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._validation import as_list, check_text
from ..level import FBKDLevel
from ..loss import FBKDLoss
from ..training.feature_tap import unwrapped
from .non_local import differences, module_settings, our_key, state_problems

__all__ = ["load_authors", "load_checkpoint", "load_connectors"]

Connector = nn.Module | Mapping[str, Tensor]
Names = str | Sequence[str]

_STUDENT_LAYERS = {
    "adaptation_layers": "feature_adaptation",
    "channel_wise_adaptation": "channel_adaptation",
    "spatial_wise_adaptation": "spatial_adaptation",
    "non_local_adaptation": "relation_adaptation",
}
_BLOCKS = ("student_non_local", "teacher_non_local")


def load_connectors(
    loss: FBKDLoss, student_connectors: Sequence[Connector], teacher_connectors: Sequence[Connector]
) -> None:
    """Copy the weights and BatchNorm buffers of MMRazor's connectors into ``loss``.

    One parameter of ours takes one parameter of theirs, so optimizer settings carry over. Given modules, their pooling,
    mode and temperatures are compared with the loss's settings; state dicts hold none of these.

    Args:
        loss: ``FBKDLoss(channels, preset="mmrazor")``, with as many levels as there are connectors. Compilation and
            data parallelism around it, or around a connector, are looked through.
        student_connectors: one ``FBKDStudentConnector``, or its state dict, a level.
        teacher_connectors: one ``FBKDTeacherConnector``, or its state dict, a level.

    Raises:
        TypeError: a loss that is no FBKDLoss, connectors that are no sequence of modules or state dicts.
        ValueError: another number of connectors than levels, missing or surplus keys (all are listed), a shape that
            does not fit, a setting that differs. Nothing is copied then.

    Example:
        >>> loss = FBKDLoss(256, preset="mmrazor")
        >>> load_connectors(loss, [connectors[f"loss_s{i}_sfeat"] for i in range(4)],
        ...                 [connectors[f"loss_s{i}_tfeat"] for i in range(4)])
    """
    loss = _checked_loss(loss)
    _check_count(student_connectors, len(loss.levels), "student_connectors")
    _check_count(teacher_connectors, len(loss.levels), "teacher_connectors")
    states = []
    for index, (level, student, teacher) in enumerate(
        zip(loss.levels, student_connectors, teacher_connectors, strict=True)
    ):
        state: dict[str, Tensor] = {}
        for side, connector in (("student", student), ("teacher", teacher)):
            connector = _state_of(connector, side, level, f"level {index}, {side} connector")
            state |= {_our_key(key, side): value for key, value in connector.items()}
        _check_state(state, level, f"level {index}")
        states.append(state)
    for level, state in zip(loss.levels, states, strict=True):
        level.load_state_dict(state)


def load_checkpoint(
    loss: FBKDLoss,
    checkpoint: Mapping[str, Any],
    *,
    student_names: Names = "loss_s{}_sfeat",
    teacher_names: Names = "loss_s{}_tfeat",
    prefix: str = "distiller.connectors.",
) -> None:
    """Copy the connectors in a checkpoint of an MMRazor algorithm into ``loss``; other weights in it are ignored.

    Args:
        loss: ``FBKDLoss(channels, preset="mmrazor")``, with as many levels as there are connectors a side.
        checkpoint: the state dict of a ``SingleTeacherDistill`` with FBKD connectors, or what the runner saved, which
            has it under ``"state_dict"``.
        student_names, teacher_names: the connectors' names in the config, one a level, or a pattern with the level's
            number in ``{}``, which may be left out of a single level's; those of MMRazor's own config by default.
        prefix: what stands before a connector's name.

    Raises:
        TypeError: a loss that is no FBKDLoss, a checkpoint that is no mapping.
        ValueError: another number of names than levels, a pattern without ``{}``, connectors that are not there (all
            are listed) or, with a pattern, of a further level, and what :func:`load_connectors` refuses. Nothing is
            copied then.

    Example:
        >>> loss = FBKDLoss(256, preset="mmrazor")
        >>> load_checkpoint(loss, torch.load("epoch_12.pth"))  # doctest: +SKIP

    Source: MMRazor 1.0.0, ``configs/distill/mmdet/fbkd``.
    """
    loss, state = _checked_loss(loss), _checked_state(checkpoint)
    names = [
        _level_names(student_names, len(loss.levels), "student_names"),
        _level_names(teacher_names, len(loss.levels), "teacher_names"),
    ]
    sides = [[_below(state, f"{prefix}{name}.") for name in side] for side in names]
    missing = [
        name
        for side, found in zip(names, sides, strict=True)
        for name, connector in zip(side, found, strict=True)
        if not connector
    ]
    if missing:
        there = sorted({key.partition(".")[0] for key in _below(state, prefix)})
        raise ValueError(
            f"checkpoint has no connectors {', '.join(missing)}, under {prefix!r} are {', '.join(there) or 'none'}"
        )
    for pattern in (student_names, teacher_names):
        further = _name(pattern, len(loss.levels)) if isinstance(pattern, str) and "{}" in pattern else None
        if further and _below(state, f"{prefix}{further}."):
            raise ValueError(f"checkpoint has a connector {further}, the loss has {len(loss.levels)} levels")
    load_connectors(loss, *sides)


def load_authors(loss: FBKDLoss, checkpoint: Mapping[str, Any], prefix: str = "") -> None:
    """Copy the distillation layers of a detector of FBKD's authors into ``loss``; its other weights are ignored.

    Their two-stage and one-stage detectors have one list a layer with an entry a level: ``adaptation_layers``,
    ``channel_wise_adaptation``, ``spatial_wise_adaptation``, ``non_local_adaptation``, ``student_non_local`` and
    ``teacher_non_local``. A state dict holds no pooling, temperatures or weights of the terms: take the preset.

    Args:
        loss: ``FBKDLoss(256, preset="two_stage")`` or ``"one_stage"``, with the detector's levels.
        checkpoint: the detector's state dict, or a checkpoint that has it under ``"state_dict"``.
        prefix: what stands before the six names, as ``"module."``.

    Raises:
        TypeError: a loss that is no FBKDLoss, a checkpoint that is no mapping.
        ValueError: missing or surplus entries of the six lists, shapes that do not fit; all are listed, and nothing is
            copied then.

    Example:
        >>> loss = FBKDLoss(256, preset="two_stage")
        >>> load_authors(loss, torch.load("epoch_24.pth"))  # doctest: +SKIP

    Source: public descendants of github.com/ArchipLab-LinfengZhang/Object-Detection-Knowledge-Distillation-ICLR2021,
    which holds no code itself.
    """
    loss, state = _checked_loss(loss), {}
    for key, value in _checked_state(checkpoint).items():
        ours = _our_key_of_authors(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if ours is not None:
            state[ours] = value
    problems = state_problems(loss.state_dict(), state)
    if problems:
        raise ValueError(f"the detector's distillation layers do not fit the loss: {'; '.join(problems)}")
    loss.load_state_dict(state)


def _checked_loss(loss: Any) -> FBKDLoss:
    """Return the loss inside what is wrapped around it."""
    inner = unwrapped(loss) if isinstance(loss, nn.Module) else loss
    if not isinstance(inner, FBKDLoss):
        raise TypeError(f"loss must be an FBKDLoss, got {type(inner).__name__}")
    return inner


def _checked_state(checkpoint: Any) -> Mapping[str, Tensor]:
    """Return the state dict in a checkpoint."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"checkpoint must be a state dict, or a dict that has one, got {type(checkpoint).__name__}")
    inner = checkpoint.get("state_dict")
    return inner if isinstance(inner, Mapping) else checkpoint


def _level_names(names: Any, levels: int, argument: str) -> list[str]:
    if isinstance(names, str):
        if levels > 1 and "{}" not in names:
            raise ValueError(f"{argument} must have {{}} for the level's number in it, or be a list, got {names!r}")
        return [_name(names, level) for level in range(levels)]
    chosen = as_list(names, "a pattern or a list of names", argument)
    if len(chosen) != levels:
        raise ValueError(f"{argument} must have one entry per level, expected {levels}, got {len(chosen)}")
    for name in chosen:
        check_text(name, f"each entry of {argument}")
    return chosen


def _name(pattern: str, level: int) -> str:
    return pattern.replace("{}", str(level))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _our_key_of_authors(key: str) -> str | None:
    """Our name of ``student_non_local.0.g.weight`` and its like; None for a key of another part of the detector."""
    name, _, rest = key.partition(".")
    level, _, entry = rest.partition(".")
    if name in _BLOCKS:
        return f"levels.{level}.{name}.{our_key(entry)}"
    return f"levels.{level}.{_STUDENT_LAYERS[name]}.{entry}" if name in _STUDENT_LAYERS else None


def _check_count(connectors: Any, expected: int, name: str) -> None:
    if not isinstance(connectors, nn.ModuleList):
        as_list(connectors, "a list with one entry per level", name)
    if len(connectors) != expected:
        raise ValueError(f"{name} must have one entry per level, expected {expected}, got {len(connectors)}")


def _state_of(connector: Any, side: str, level: FBKDLevel, where: str) -> Mapping[str, Tensor]:
    """Return the connector's state dict; compare a module's settings first."""
    if isinstance(connector, Mapping):
        return connector
    if not isinstance(connector, nn.Module):
        raise TypeError(f"{where} must be a module or a state dict, got {type(connector).__name__}")
    connector = unwrapped(connector)
    if not hasattr(connector, f"{side}_non_local"):
        raise ValueError(f"{where}: {type(connector).__name__} has no {side}_non_local, is it the other side's?")
    _check_settings(connector, side, level, where)
    return connector.state_dict()


def _our_key(key: str, side: str) -> str:
    """Our name of the connector's entry ``key``; an unknown one keeps its name and is reported as surplus."""
    block = f"{side}_non_local."
    if not key.startswith(block):
        layer, _, entry = key.rpartition(".")
        return f"{_STUDENT_LAYERS[layer]}.{entry}" if side == "student" and layer in _STUDENT_LAYERS else key
    return block + our_key(key.removeprefix(block))


def _check_state(state: dict[str, Tensor], level: FBKDLevel, where: str) -> None:
    problems = state_problems(level.state_dict(), state)
    if problems:
        raise ValueError(f"{where}: the connectors do not fit the loss: {'; '.join(problems)}")


def _check_settings(connector: nn.Module, side: str, level: FBKDLevel, where: str) -> None:
    """Compare the connector module's constants with the level's."""
    theirs = {"spatial_temperature": connector.spatial_T, "channel_temperature": connector.channel_T}
    theirs |= module_settings(getattr(connector, f"{side}_non_local"))
    problems = differences(theirs, level.settings, "the loss")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
