"""Catch what modules of a model return, by module path."""

from collections.abc import Sequence
from typing import Any, Union

from torch import Tensor, nn

from ._validation import Features

__all__ = ["FeatureTap", "Paths"]

Paths = Union[str, Sequence[str]]


class FeatureTap:
    """Runs a model and hands out what some of its modules returned on the way.

    The hooks are on the model during :meth:`run` only, so that it can be copied and saved as if there were no tap.

    Args:
        model: any module; ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` are looked through.
        paths: one module path (``"backbone"``) whose output is the features, be it a tensor, list, tuple or dict, or
            several (``["neck.0", "neck.1"]``), each of which returns one tensor.
        name: what an error calls the paths.
        stop_when_complete: end the model's forward as soon as every path was seen. For a teacher, of which nothing
            else is needed.

    Raises:
        TypeError: paths that are no strings.
        ValueError: no path, the same one twice, or one that the model does not have.

    Example:
        >>> tap = FeatureTap(torchvision.models.resnet18(), ["layer3", "layer4"], "student_layers")
        >>> output, features = tap.run(torch.randn(1, 3, 64, 64))
        >>> [tuple(feature.shape) for feature in features]
        [(1, 256, 4, 4), (1, 512, 2, 2)]
    """

    def __init__(self, model: nn.Module, paths: Paths, name: str, stop_when_complete: bool = False):
        self.model, self.name, self.stop_when_complete = model, name, stop_when_complete
        self.is_single = isinstance(paths, str)
        self.paths = _checked_paths(paths, name)
        for path in self.paths:
            _find(model, path, name)

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, Features]:
        """Call the model.

        Args:
            *args, **kwargs: what the model takes.

        Returns:
            The model's output, None where the forward was stopped, and the features.

        Raises:
            RuntimeError: a module that was not called, or called more than once.
            TypeError: one of several paths that returned something other than a tensor.
        """
        captures: dict[str, list[Any]] = {path: [] for path in self.paths}
        handles = []
        try:
            for path in self.paths:
                hook = self._hook(path, captures)
                handles.append(_find(self.model, path, self.name).register_forward_hook(hook))
            output = self.model(*args, **kwargs)
        except _Complete:
            output = None
        finally:
            for handle in handles:
                handle.remove()
        return output, self._features(captures)

    def _hook(self, path: str, captures: dict[str, list[Any]]):
        def capture(module: nn.Module, inputs: tuple, output: Any) -> None:
            captures[path].append(output)
            if self.stop_when_complete and all(captures.values()):
                raise _Complete

        return capture

    def _features(self, captures: dict[str, list[Any]]) -> Features:
        for path, outputs in captures.items():
            if len(outputs) != 1:
                raise RuntimeError(
                    f"{self.name}: module {path!r} was called {len(outputs)} times in one forward, expected once"
                )
        if not self.is_single:
            return [_only_tensor(outputs[0], path, self.name) for path, outputs in captures.items()]
        ((output,),) = captures.values()
        return [output] if isinstance(output, Tensor) else output


class _Complete(Exception):
    """Every path was seen; the rest of the forward is skipped."""


def _checked_paths(paths: Paths, name: str) -> list[str]:
    several = [paths] if isinstance(paths, str) else paths
    if not isinstance(several, Sequence) or not all(isinstance(path, str) for path in several):
        raise TypeError(f"{name} must be a module path or a list of module paths, got {paths!r}")
    if not several:
        raise ValueError(f"{name} is empty, expected at least one module path")
    if len(set(several)) < len(several):
        raise ValueError(f"{name} names a module path twice: {list(several)}")
    return list(several)


def _only_tensor(output: Any, path: str, name: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name}: module {path!r} must return one tensor where several paths are given, got {type(output).__name__}"
        )
    return output


def _find(model: nn.Module, path: str, name: str) -> nn.Module:
    model = _unwrapped(model)
    try:
        return model.get_submodule(path)
    except AttributeError:
        present = _deepest_parent(model, path)
        inside = f"inside {present!r}" if present else "at the top"
        children = ", ".join(repr(child) for child, _ in model.get_submodule(present).named_children())
        raise ValueError(
            f"{name}: {type(model).__name__} has no module {path!r}; {inside} there are {children or 'no modules'}"
        ) from None


def _deepest_parent(model: nn.Module, path: str) -> str:
    """The longest leading part of ``path`` that exists in the model."""
    parts, present = path.split("."), ""
    modules = dict(model.named_modules())
    for end in range(1, len(parts)):
        candidate = ".".join(parts[:end])
        if candidate not in modules:
            break
        present = candidate
    return present


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner
