"""What a distiller's checkpoint holds, and which checkpoints it takes."""

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from .feature_tap import unwrapped, wrapping_path
from .gradient_share import SHARE_STATE
from .pairing import memory
from .student_attributes import StudentAttributes

__all__ = ["drop_shared_names", "fit_names"]


def drop_shared_names(wrapper: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave one name to each tensor, as a hook of ``state_dict``. Safetensors refuses tensors that share memory."""
    for group in _shared_names(wrapper):
        present = [prefix + name for name in group if prefix + name in state]
        for name in present[1:]:
            del state[name]


def fit_names(wrapper: StudentAttributes, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take shared tensors under any of their names, and a plain student's checkpoint. A hook of ``load_state_dict``.

    Args:
        wrapper: says where its student is.
        state: the checkpoint, changed in place.
        prefix: of the wrapper's own names in it.

    Raises:
        RuntimeError: a checkpoint of which nothing would be loaded into the student, and which has other names.
    """
    _leave_out_share(state, wrapper, prefix)
    _move_to_student(state, wrapper, prefix)
    for group in _shared_names(wrapper):
        names = [prefix + name for name in group]
        present = next((name for name in names if name in state), None)
        if present is not None:
            for name in names:
                state.setdefault(name, state[present])


def _leave_out_share(state: dict[str, Any], wrapper: nn.Module, prefix: str) -> None:
    """Remove what ``gradient_share`` kept in a checkpoint, where it is not asked for now."""
    if getattr(wrapper, "share", None) is None:
        for name in SHARE_STATE:
            state.pop(f"{prefix}share.{name}", None)


def _move_to_student(state: dict[str, Any], wrapper: StudentAttributes, prefix: str) -> None:
    """Rename the entries of a plain student's checkpoint to the student's names in ``wrapper``."""
    names = [name for name in state if name.startswith(prefix)]
    student = wrapper.get_submodule(wrapper.student_path)
    student_prefix = f"{prefix}{wrapper.student_path}."
    student_names = _state_names(student, student_prefix)
    own_names = student_names | _state_names(wrapper, prefix)
    foreign = [name for name in names if name not in own_names]
    if not foreign or not student_names.isdisjoint(names):
        return
    plain_names = _state_names(unwrapped(student), prefix)
    plain = [name for name in foreign if name in plain_names]
    if not plain:
        raise RuntimeError(
            f"the checkpoint is neither a {type(wrapper).__name__}'s, with names like "
            f"{min(student_names, default='')!r}, nor its student's: its names are like {foreign[0]!r}, and none of "
            "them would be loaded into the student; rename them, or load them into distiller.student"
        )
    for name in plain:
        state[f"{student_prefix}{wrapping_path(student)}{name.removeprefix(prefix)}"] = state.pop(name)


def _state_names(module: nn.Module, prefix: str) -> set[str]:
    """Every name in the module's ``state_dict()``, those of shared tensors included."""
    names = set(module.state_dict(prefix=prefix, keep_vars=True))
    return names | {prefix + name for name, _ in _named_tensors(module)}


def _shared_names(module: nn.Module) -> list[list[str]]:
    """Return the names of each tensor that a module has under several names, in the order of its ``state_dict()``."""
    names: dict[Hashable, list[str]] = {}
    for name, tensor in _named_tensors(module):
        names.setdefault(memory(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of a parameter or persistent buffer, with the tensor."""
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, tensor
