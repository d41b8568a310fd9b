"""Weights of MMRazor 1.0.0's FBKD connectors in an ``FBKDLoss(preset="mmrazor")``."""

from collections.abc import Mapping, Sequence
from typing import Any, Union

from torch import Tensor, nn

from ..loss import FBKDLevel, FBKDLoss
from .non_local import differences, module_settings, our_key, state_problems

__all__ = ["load_connectors"]

Connector = Union[nn.Module, Mapping[str, Tensor]]

_STUDENT_LAYERS = {
    "adaptation_layers": "feature_adaptation",
    "channel_wise_adaptation": "channel_adaptation",
    "spatial_wise_adaptation": "spatial_adaptation",
    "non_local_adaptation": "relation_adaptation",
}


def load_connectors(
    loss: FBKDLoss, student_connectors: Sequence[Connector], teacher_connectors: Sequence[Connector]
) -> None:
    """Copy the weights and BatchNorm buffers of MMRazor's connectors into ``loss``.

    One parameter of ours takes one parameter of theirs, so optimizer settings carry over. Given modules, their pooling,
    mode and temperatures are compared with the loss's settings; state dicts hold none of these.

    Args:
        loss: ``FBKDLoss(channels, preset="mmrazor")``, with as many levels as there are connectors.
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
    if not isinstance(loss, FBKDLoss):
        raise TypeError(f"loss must be an FBKDLoss, got {type(loss).__name__}")
    _check_count(student_connectors, len(loss.levels), "student_connectors")
    _check_count(teacher_connectors, len(loss.levels), "teacher_connectors")
    states = []
    for index, (level, student, teacher) in enumerate(zip(loss.levels, student_connectors, teacher_connectors)):
        state = {}
        for side, connector in (("student", student), ("teacher", teacher)):
            connector = _state_of(connector, side, level, f"level {index}, {side} connector")
            state |= {_our_key(key, side): value for key, value in connector.items()}
        _check_state(state, level, f"level {index}")
        states.append(state)
    for level, state in zip(loss.levels, states):
        level.load_state_dict(state)


def _check_count(connectors: Any, expected: int, name: str) -> None:
    if not isinstance(connectors, (Sequence, nn.ModuleList)):
        raise TypeError(f"{name} must be a list with one entry a level, got {type(connectors).__name__}")
    if len(connectors) != expected:
        raise ValueError(f"{name} must have one entry a level, expected {expected}, got {len(connectors)}")


def _state_of(connector: Any, side: str, level: FBKDLevel, where: str) -> Mapping[str, Tensor]:
    """The connector's state dict, after its settings were compared where it is a module."""
    if isinstance(connector, Mapping):
        return connector
    if not isinstance(connector, nn.Module):
        raise TypeError(f"{where} must be a module or a state dict, got {type(connector).__name__}")
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
    """The connector module's constants against the level's."""
    theirs = {"spatial_temperature": connector.spatial_T, "channel_temperature": connector.channel_T}
    theirs |= module_settings(getattr(connector, f"{side}_non_local"))
    problems = differences(theirs, level.settings, "the loss")
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
