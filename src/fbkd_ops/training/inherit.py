"""A student that starts from parts of its teacher."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._validation import as_list, check_module, check_text
from .feature_tap import find_module, unwrapped

__all__ = ["Inheritance", "inherit"]


class Inheritance(NamedTuple):
    """What :func:`inherit` did; print it for a summary."""

    copied: list[str]  # names of parameters and buffers, as in the student's state dict
    left: dict[str, str]  # the student's other names in the modules, and why each stayed as it was

    def __str__(self) -> str:
        lines = [f"inherited {len(self.copied)} tensors, left {len(self.left)}"]
        return "\n".join([*lines, *(f"  left {name}: {why}" for name, why in self.left.items())])


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, modules: str | Sequence[str]) -> Inheritance:
    """Copy the teacher's parameters and buffers of some modules into the student, where names and shapes agree.

    Args:
        student: the model that is changed, on any device and in any dtype.
        teacher: a trained one.
        modules: module paths in both, as ``"neck"`` or ``["neck", "head"]``; ``""`` is the whole model.
            ``DistributedDataParallel``, ``torch.compile`` and ``AveragedModel`` around either are looked through.

    Returns:
        An :class:`Inheritance`: what was copied, and what was not, with the reason.

    Raises:
        TypeError: a model that is no module, a path that is no text.
        ValueError: no path, a path that a model does not have, or modules of which nothing at all fits.

    Example:
        >>> student, teacher = torchvision.models.resnet18(), torchvision.models.resnet34()
        >>> inherited = inherit(student, teacher, ["conv1", "layer1"])
        >>> inherited.copied[0], len(inherited.left)
        ('conv1.weight', 0)

    Source: the option ``init_student`` of Yang et al. 2022, "Focal and Global Knowledge Distillation for Detectors".
    """
    check_module(student, "student")
    check_module(teacher, "teacher")
    names = {id(tensor): name for name, tensor in _tensors(student).items()}
    copied: list[str] = []
    left: dict[str, str] = {}
    for path in _checked_paths(modules):
        ours, theirs = (_tensors(find_module(model, path, "modules")) for model in (student, teacher))
        for name, tensor in ours.items():
            why = _obstacle(tensor, theirs.get(name))
            if why:
                left[names[id(tensor)]] = why
            else:
                tensor.copy_(theirs[name])
                copied.append(names[id(tensor)])
    if not copied:
        raise ValueError(
            f"modules: nothing of the teacher's {modules!r} fits the student's, {len(left)} tensors differ in name or "
            f"shape: {'; '.join(f'{name}: {why}' for name, why in list(left.items())[:3])}"
        )
    return Inheritance(copied, left)


def _checked_paths(modules: str | Sequence[str]) -> list[str]:
    paths = [modules] if isinstance(modules, str) else as_list(modules, "a module path or a list of them", "modules")
    if not paths:
        raise ValueError("modules is empty, expected at least one module path")
    for path in paths:
        check_text(path, "modules")
    return paths


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what the module's state dict has, the very tensors."""
    state = unwrapped(module).state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _obstacle(ours: Tensor, theirs: Tensor | None) -> str:
    """Why a tensor cannot be taken over; empty if it can."""
    if theirs is None:
        return "the teacher has none of this name"
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)}, the teacher's is {tuple(theirs.shape)}"
    return ""
