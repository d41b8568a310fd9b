"""Pass the names that a wrapper lacks on to its student, for frameworks that look for them on the model."""

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from .feature_tap import unwrapped

__all__ = ["StudentAttributes"]

# What PyTorch and Accelerate write on a module about this very module: each one needs its own.
_MODULE_STATE = frozenset(
    (
        "_ddp_params_and_buffers_to_ignore",
        "_former_parameters",
        "_fsdp_use_orig_params",
        "_fsdp_wrapped_module",
        "_hf_hook",
        "_is_fsdp_managed_module",
        "_is_replica",
        "_old_forward",
        "_orig_mod",
        "_original_forward",
    )
)
_MODULE_NAMES = _MODULE_STATE | frozenset(dir(nn.Module())) | frozenset(("_parameters", "_buffers", "_modules"))


if TYPE_CHECKING:
    _Module = nn.Module
else:  # the mixin is no module itself
    _Module = object


class StudentAttributes(_Module):
    """Mixin for modules with a submodule ``student``: what they lack is read, written and deleted on the student.

    - A name that the wrapper has is the wrapper's, also where the student has it too.
    - A name that only the student has is the student's: reading it gives the student's value (a method is bound to the
      student), writing and deleting change the student. ``hasattr`` agrees.
    - A name that neither has is written on the wrapper.
    - The names of ``nn.Module`` (``state_dict``, ``parameters``, ``train``, hooks, ...), names that begin with two
      underscores, and what PyTorch and Accelerate write on each module are the wrapper's, whether it has them or not.

    ``DistributedDataParallel``, ``torch.compile`` and ``AveragedModel`` around the student are looked through.

    Name it before ``nn.Module`` among the bases. The student is asked as soon as it is there, so the wrapper's own
    attributes are assigned before it; ``register_module("student", None)`` keeps its place in ``parameters()``.

    Attributes:
        student_path: where the student is, for a wrapper that holds it in a submodule: ``"distiller.student"``.

    Example:
        >>> class Wrapper(StudentAttributes, nn.Module):
        ...     def __init__(self, student):
        ...         super().__init__()
        ...         self.student = student
        >>> wrapper = Wrapper(nn.Conv2d(3, 8, 1))
        >>> wrapper.out_channels
        8
    """

    student_path = "student"

    def __getattr__(self, name: str) -> Any:
        """Read the student's attribute where the ordinary look-up found none, or ended in a property's error."""
        student = None if _owns(self, name) else _student_in(self)
        if student is not None:
            if has_name(student, name):
                return _value(student, name)
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}, nor has its student "
                f"({type(student).__name__!r})",
                name=name,
                obj=self,
            )
        if _is_property(self, name):
            return _value(self, name)  # nn.Module would replace the property's own message
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        student = None if _owns(self, name) else _student_in(self)
        if student is not None and has_name(student, name):
            setattr(student, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        student = None if _owns(self, name) else _student_in(self)
        if student is not None and has_name(student, name):
            delattr(student, name)
        else:
            super().__delattr__(name)


def has_name(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute. A property counts, also where it raises an AttributeError."""
    return _is_property(module, name) or hasattr(module, name)


def _owns(wrapper: nn.Module, name: str) -> bool:
    if name in _MODULE_NAMES or name.startswith("__"):
        return True
    state = wrapper.__dict__
    places = (state, state.get("_modules", ()), state.get("_parameters", ()), state.get("_buffers", ()))
    return any(name in place for place in places) or _in_class(wrapper, name)


def _in_class(module: nn.Module, name: str) -> bool:
    return any(name in vars(base) for base in type(module).__mro__)


def _student_in(wrapper: StudentAttributes) -> nn.Module | None:
    """Return the student, or None before it is there. Read from the registry: an attribute would ask for it again."""
    module: Any = wrapper
    for part in type(wrapper).student_path.split("."):
        module = module.__dict__.get("_modules", {}).get(part)
        if module is None:
            return None
        module = unwrapped(module)
    return module


def _is_property(module: nn.Module, name: str) -> bool:
    return isinstance(_class_attribute(module, name), (property, functools.cached_property))


def _value(module: nn.Module, name: str) -> Any:
    """Return the attribute, where a property's own AttributeError survives: nn.Module replaces its message."""
    if _is_property(module, name) and name not in module.__dict__:
        return _class_attribute(module, name).__get__(module, type(module))
    return getattr(module, name)


def _class_attribute(module: nn.Module, name: str) -> Any:
    return next((vars(base)[name] for base in type(module).__mro__ if name in vars(base)), None)
