"""Catch what modules of a model return, by module path."""

from collections.abc import Sequence
from typing import Any, Optional, Union

from torch import Tensor, nn

from ._validation import Features

__all__ = ["FeatureTap"]

Paths = Union[str, Sequence[str]]


class FeatureTap:
    """Keeps the outputs of a model's modules until they are taken.

    Args:
        model: any module; ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` wrappers are looked through.
        paths: one module path (``"backbone"``) whose output is the features, be it a tensor, list, tuple or dict, or
            several (``["neck.0", "neck.1"]``), each of which returns one tensor.
        name: what an error calls the paths.
        stop_when_complete: end the model's forward as soon as every path was seen, by raising
            :class:`FeatureTap.Complete`. For a teacher, of which nothing else is needed.

    Raises:
        ValueError: a path that the model does not have.

    Example:
        >>> tap = FeatureTap(torchvision.models.resnet18(), ["layer3", "layer4"], "student_layers")
        >>> tap.open()
        >>> _ = tap.model(torch.randn(1, 3, 64, 64))
        >>> [tuple(feature.shape) for feature in tap.take()]
        [(1, 256, 4, 4), (1, 512, 2, 2)]
    """

    class Complete(Exception):
        """Every path was seen; the rest of the forward was skipped."""

    def __init__(self, model: nn.Module, paths: Paths, name: str, stop_when_complete: bool = False):
        self.model, self.name = model, name
        self.is_single = isinstance(paths, str)
        self.paths = [paths] if self.is_single else list(paths)
        if not self.paths:
            raise ValueError(f"{name} is empty, expected at least one module path")
        self.stop_when_complete = stop_when_complete
        self._captures: dict[str, list[Any]] = {path: [] for path in self.paths}
        self._is_open = False
        modules = [_find(model, path, name) for path in self.paths]
        self._handles = [
            module.register_forward_hook(self._hook(path)) for path, module in zip(self.paths, modules)
        ]

    def open(self) -> None:
        """Forget earlier captures and catch from now on."""
        self._captures = {path: [] for path in self.paths}
        self._is_open = True

    def take(self) -> Features:
        """The features caught since :meth:`open`; the tap is closed and empty afterwards.

        Raises:
            RuntimeError: a module that was not called, or called more than once.
            TypeError: one of several paths that returned something other than a tensor.
        """
        captures, self._captures = self._captures, {path: [] for path in self.paths}
        self._is_open = False
        for path, outputs in captures.items():
            if len(outputs) != 1:
                raise RuntimeError(
                    f"{self.name}: module {path!r} was called {len(outputs)} times in one forward, expected once"
                )
        outputs = [outputs[0] for outputs in captures.values()]
        if self.is_single:
            return [outputs[0]] if isinstance(outputs[0], Tensor) else outputs[0]
        return [_only_tensor(output, path, self.name) for output, path in zip(outputs, self.paths)]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str):
        def capture(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not self._is_open:
                return
            self._captures[path].append(output)
            if self.stop_when_complete and all(self._captures.values()):
                raise FeatureTap.Complete

        return capture


def _only_tensor(output: Any, path: str, name: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name}: module {path!r} must return one tensor where several paths are given, "
            f"got {type(output).__name__}"
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
    for end in range(1, len(parts)):
        candidate = ".".join(parts[:end])
        if candidate not in dict(model.named_modules()):
            break
        present = candidate
    return present


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner: Optional[nn.Module] = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner
