"""Catch what modules of a model return, or what they are given, by module path."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .._validation import Features, as_list, check_callable, check_flag, check_module, check_text, did_you_mean, is_list

__all__ = [
    "Branches",
    "FeatureTap",
    "Layer",
    "Layers",
    "OutputTap",
    "find_module",
    "is_output",
    "kept_arguments",
    "unwrapped",
    "versions",
    "wrapping_path",
]

# Earlier compilers cannot trace an exception of one's own: a compiled part runs to its end there.
CAN_END_IN_A_GRAPH = torch.__version__ >= "2.12"


@dataclass(frozen=True)
class Layer:
    """Where a feature is, for a :class:`FeatureTap` or a :class:`fbkd_ops.Distiller`.

    Args:
        path: a module path (``"backbone"``), ``""`` for the model itself. A number may count from the end of an
            ``nn.Sequential`` or ``nn.ModuleList``: ``"model.-1"``.
        inputs: whether to catch what the module is given instead of what it returns.
        select: makes the features of what was caught; a tensor, list, tuple or dict are features as they are.

    Raises:
        TypeError: a path that is no text, ``inputs`` that is no bool, ``select`` that cannot be called.

    Example:
        >>> detect_inputs = Layer("model.-1", inputs=True)  # the maps that a YOLO's head is given
        >>> channels_first = Layer("backbone", select=lambda maps: [x.permute(0, 3, 1, 2) for x in maps])
    """

    path: str = ""
    inputs: bool = False
    select: Callable[[Any], Any] | None = None

    def __post_init__(self):
        check_text(self.path, "path")
        check_flag(self.inputs, "inputs")
        if self.select is not None:
            check_callable(self.select, "select")


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)

Place = str | Layer
Layers = Place | Sequence[Place] | Mapping[str, Place] | Callable[[Any], Features]


class Branches(tuple):
    """What each of several losses is given, where a tap's values were split for them."""


class FeatureTap:
    """Catches features while a model runs.

    It listens from the start until :meth:`close`, or inside a ``with`` block of its own. Every forward of the model
    begins anew, :meth:`features` hands out what was caught and forgets it. A copy or pickle of the tap comes with its
    own model; a copy of the model alone catches nothing. What a checkpoint computes again in a backward pass is not
    caught.

    Args:
        model: any module; ``DistributedDataParallel``, ``torch.compile``, ``AveragedModel`` and ``DataParallel`` (on
            one device) are looked through.
        layers: a module path or :class:`Layer` whose output is the features, be it a tensor, list, tuple or dict;
            several in a list, or in a dict with a name for each, of which each gives one tensor; or a function that
            takes the model's output and returns the features.
        name: what an error calls the layers.
        stop_when_complete: end the model's forward as soon as every layer was seen, by an exception that the tap's
            ``with`` block keeps to itself. For a teacher, of which nothing else is needed; a second call of a module
            is not seen then. A compiled model runs through.

    Raises:
        TypeError: a model that is no module, an argument of another type.
        ValueError: no layer, the same one twice, or a path that the model does not have.

    Example:
        >>> model = torchvision.models.resnet18()
        >>> with FeatureTap(model, ["layer3", "layer4"]) as tap:
        ...     output = model(torch.randn(1, 3, 64, 64))
        >>> [tuple(feature.shape) for feature in tap.features()]
        [(1, 256, 4, 4), (1, 512, 2, 2)]
    """

    _branches: Callable[[int, Any], Branches] | None = None  # inside the block of split()

    def __init__(self, model: nn.Module, layers: Layers, *, name: str = "layers", stop_when_complete: bool = False):
        check_module(model, "model")
        check_text(name, "name")
        stop_when_complete = check_flag(stop_when_complete, "stop_when_complete")
        self.model, self.name = model, name
        self._layers = _checked_layers(layers, name)  # by name where they came in a dict, by number else
        self._is_single = isinstance(layers, (str, Layer)) or callable(layers)
        self._is_named = isinstance(layers, Mapping)
        for layer in self._layers.values():
            _check_listening(model, layer.path, name)
        self._is_compiled = any(_is_inside_compiled(model, layer.path, name) for layer in self._layers.values())
        self._recorder = _Recorder(len(self._layers), stop_when_complete and not self._is_compiled)
        self._handles: list[Any] = []
        self.open()

    def open(self) -> None:
        """Listen, if it does not already; what was caught before is forgotten."""
        self._recorder.clear()
        if self._handles:
            return
        root = unwrapped(self.model)
        self._handles = [root.register_forward_pre_hook(self._recorder.restart, prepend=True)]
        for index, layer in enumerate(self._layers.values()):
            module, hook = find_module(self.model, layer.path, self.name), _Hook(self._recorder, index)
            if layer.inputs:
                handle = module.register_forward_pre_hook(hook.before, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook.after)
            self._handles.append(handle)

    def close(self) -> None:
        """Take the hooks off the model; what was caught stays until it is handed out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Forget what was caught."""
        self._recorder.clear()

    def count(self) -> int:
        """How many layers are tapped."""
        return len(self._layers)

    @contextlib.contextmanager
    def ending(self, others: Sequence["FeatureTap"] = ()) -> Iterator[None]:
        """Inside the block, end the model's forward as with ``stop_when_complete``.

        Args:
            others: taps of the same model; a layer of theirs that comes later is waited for, without an end after it.
        """
        recorder = self._recorder
        before = recorder.stops, recorder.others
        recorder.stops, recorder.others = not self._is_compiled, [other._recorder for other in others]
        try:
            yield
        finally:
            recorder.stops, recorder.others = before

    def paths(self) -> list[str]:
        """Return the paths of the tapped modules."""
        return [layer.path for layer in self._layers.values()]

    @contextlib.contextmanager
    def split(
        self,
        split: Callable[[int, Any], tuple[Any, Any]],
        branches: Callable[[int, Any], Branches] | None = None,
    ) -> Iterator[None]:
        """Inside the block, let each layer's value go through ``split``.

        Args:
            split: of a layer's number and its value. Returns what is caught, and what the model goes on with.
            branches: of a layer's number and what was caught. Makes of it what :meth:`features` then hands out. (In the
                compiled graph of a model several views of one map lose the nodes that made them.)
        """
        self._recorder.split, self._branches = split, branches
        try:
            yield
        except RuntimeError as error:
            if "is a view and is being modified inplace" not in str(error):
                raise
            paths = " or ".join(map(repr, self.paths()))
            raise RuntimeError(_changed_in_place(self.name, paths)) from error
        finally:
            self._recorder.split = self._branches = None

    def __enter__(self) -> "FeatureTap":
        self.open()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        self.close()
        is_end = isinstance(error, _Complete)  # of this tap, or of one around it that has seen enough
        if error is not None and not is_end:
            self.clear()
        return is_end and error.recorder is self._recorder

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._recorder.is_live = True

    def caught(self) -> list[Any]:
        """Return each layer's output, or its inputs as ``(args, kwargs)``, in order, and forget them.

        Raises:
            RuntimeError: a module that was not called, or called more than once; values that were changed in place
                since they were caught.
        """
        values, calls, at_call = self._recorder.values, self._recorder.calls, self._recorder.versions
        self._recorder.clear()
        for layer, count, value, version in zip(self._layers.values(), calls, values, at_call, strict=True):
            if count != 1:
                raise RuntimeError(f"{self.name}: {self._miscounted(layer, count)}")
            if version is not None and version != versions(value):
                raise RuntimeError(_changed_in_place(self.name, repr(layer.path)))
        return values

    def features_of(self, output: Any) -> "Features | Branches":
        """:meth:`features`; an :class:`OutputTap` reads them from ``output``."""
        return self.features()

    def _miscounted(self, layer: Layer, count: int) -> str:
        called = f"module {layer.path!r}" if layer.path else "the model"
        message = f"{called} was called {count} times in one forward, expected once"
        if count == 0 and _is_inside_compiled(self.model, layer.path, self.name):
            message += "; a graph compiled before the tap was there does not have it: torch.compiler.reset()"
        return message

    def features(self) -> "Features | Branches":
        """Return the features of the last forward, and forget them.

        Returns:
            The list, tuple or dict that a single layer gives, else one tensor a layer, in a list or by name. Inside
            the block of :meth:`split`, where it was given ``branches``, as many of these.

        Raises:
            RuntimeError: a module that was not called, or called more than once; values that were changed in place
                since they were caught.
            TypeError: one of several layers that gave something other than a tensor, or a single one no features.
        """
        values = self.caught()
        if self._branches is None:
            return self._features(values)
        by_layer = [self._branches(index, value) for index, value in enumerate(values)]
        return Branches([self._features(list(branch)) for branch in zip(*by_layer, strict=True)])

    def _features(self, caught: list[Any]) -> Features:
        """Return the features in what was caught of each layer."""
        values = [_selected(layer, value) for layer, value in zip(self._layers.values(), caught, strict=True)]
        if self._is_single:
            return _as_features(values[0], self.name)
        for layer, value in zip(self._layers.values(), values, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{self.name}: module {layer.path!r} must give one tensor where several layers are given, "
                    f"got {type(value).__name__}"
                )
        return dict(zip(self._layers, values, strict=True)) if self._is_named else values


def _changed_in_place(name: str, path: str) -> str:
    return (
        f"{name}: what was caught at {path} was changed in place after that, by an in-place activation or sum, say; "
        "tap the module that changes it, or let it not do so in place"
    )


class OutputTap:
    """The features in what a model returns. It needs no hook, which TorchScript and ``torch.export`` do not have.

    Used as a :class:`FeatureTap` is in a :class:`fbkd_ops.Distiller`.
    """

    def __init__(self, layers: Layers, name: str):
        (self.layer,) = _checked_layers(layers, name).values()
        self.name = name

    def features_of(self, output: Any) -> Features:
        """Return the features in ``output``."""
        return _as_features(_selected(self.layer, output), self.name)

    def clear(self) -> None:
        """There is nothing to forget."""

    def ending(self, others: Sequence[FeatureTap] = ()) -> contextlib.AbstractContextManager:
        """Return a block in which nothing changes: the model's forward ends with its output."""
        return contextlib.nullcontext()

    def __enter__(self) -> "OutputTap":
        return self

    def __exit__(self, *error: Any) -> None:
        """There is nothing to take off the model."""


def is_output(layers: Layers) -> bool:
    """Whether the features are in the model's own output."""
    if isinstance(layers, str):
        return layers == ""
    if isinstance(layers, Layer):
        return layers.path == "" and not layers.inputs
    return callable(layers) and not isinstance(layers, (nn.Module, Mapping, Sequence))


class _Complete(Exception):
    """Every layer was seen; the rest of the forward is skipped."""

    def __init__(self, recorder: "_Recorder"):
        super().__init__("a FeatureTap ended the forward; run the model inside the tap's with block")
        self.recorder = recorder


class _Recorder:
    """The last value of each layer and how often it came. A copy is deaf until a copy of its tap takes it up."""

    def __init__(self, count: int, stops: bool):
        self.count, self.stops, self.is_live = count, stops, True
        self.others: list[_Recorder] = []  # what has to be complete, too, where a forward ends
        # Makes two of a layer's value: for the features, and for the model to go on with.
        self.split: Callable[[int, Any], tuple[Any, Any]] | None = None
        self.clear()

    def take(self, index: int, value: Any) -> Any:
        """Keep a layer's value; return what the model goes on with in its place, None for the value itself."""
        if self.split is None or _is_recomputation():
            self.add(index, value)
            return None
        kept, passed = self.split(index, value)
        self.add(index, kept)
        return passed

    def clear(self) -> None:
        self.values: list[Any] = [None] * self.count
        self.versions: list[list[int] | None] = [None] * self.count
        self.calls = [0] * self.count

    def restart(self, module: nn.Module, args: tuple) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "a FeatureTap would mix up the replicas of DataParallel on several devices: use DistributedDataParallel"
            )
        if not _is_recomputation():
            self.clear()

    def add(self, index: int, value: Any) -> None:
        if not self.is_live or _is_recomputation():
            return
        self.values[index] = value
        self.versions[index] = None if torch.compiler.is_compiling() else versions(value)
        self.calls[index] += 1
        if not self.stops or (torch.compiler.is_compiling() and not CAN_END_IN_A_GRAPH):
            return
        if all(all(each.calls) for each in (self, *self.others)):
            raise _Complete(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "stops": self.stops}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Recorder.__init__(self, **state)
        self.is_live = False


class _Hook:
    """One layer's hook, before or after its module."""

    def __init__(self, recorder: _Recorder, index: int):
        self.recorder, self.index = recorder, index

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.recorder.take(self.index, kept_arguments(args, kwargs))

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self.recorder.take(self.index, _kept(output))


def kept_arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Copy the lists and dicts among a call's arguments, which the callee may change."""
    return tuple(map(_kept, args)), {key: _kept(value) for key, value in kwargs.items()}


def _kept(value: Any) -> Any:
    """Copy a list or dict: the model may change the one it has (a YOLO's head does)."""
    return type(value)(value) if type(value) in (list, dict, OrderedDict) else value


def versions(value: Any) -> list[int]:
    """How often each tensor in a tensor, list, tuple or dict was changed in place."""
    if isinstance(value, Tensor):
        return [] if value.is_inference() else [value._version]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [version for part in parts for version in versions(part)]


def _is_recomputation() -> bool:
    """Whether this forward is a checkpoint's, inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _selected(layer: Layer, value: Any) -> Any:
    """Return the features in what was caught."""
    if layer.inputs:
        args, kwargs = value
        value = (args[0] if len(args) == 1 else args) if args else kwargs
    return layer.select(value) if layer.select is not None else value


def _as_features(value: Any, name: str) -> Features:
    if isinstance(value, Tensor):
        return [value]
    if not is_list(value) and not isinstance(value, Mapping):
        raise TypeError(
            f"{name}: the features must be a tensor, list, tuple or dict, got {type(value).__name__}; "
            "Layer(path, select=...) makes them of something else"
        )
    return value


def _checked_layers(layers: Layers, name: str) -> dict[Any, Layer]:
    places: dict[Any, Any]
    if isinstance(layers, (str, Layer)):
        places = {0: layers}
    elif isinstance(layers, Mapping):
        places = dict(layers)
    elif is_list(layers):
        places = dict(enumerate(as_list(layers, "a list", name)))
    elif callable(layers) and not isinstance(layers, nn.Module):
        places = {0: Layer(select=layers)}
    else:
        places = {0: layers}
    if not all(isinstance(place, (str, Layer)) for place in places.values()):
        raise TypeError(
            f"{name} must be a module path, a Layer, a list or dict of these, or a function of the model's output, "
            f"got {layers!r}"
        )
    if not places:
        raise ValueError(f"{name} is empty, expected at least one module path")
    checked = {key: Layer(place) if isinstance(place, str) else place for key, place in places.items()}
    if len(set(checked.values())) < len(checked):
        raise ValueError(f"{name} names a module path twice: {[layer.path for layer in checked.values()]}")
    return checked


def _check_listening(model: nn.Module, path: str, name: str) -> None:
    """Refuse modules that no hook of Python's sees: TorchScript's, and those that a traced graph does not call."""
    way = list(_way(model, path, name))
    parts = path.split(".") if path else []
    for depth, module in enumerate(way):
        kind = None
        if isinstance(module, torch.jit.ScriptModule):
            kind = "TorchScript"
        elif isinstance(module, torch.fx.GraphModule) and not _calls(module, parts[depth:]):
            kind = "a traced graph"
        if kind is not None:
            raise ValueError(
                f"{name}: {path!r} is inside {kind}, which runs without the modules' hooks, so nothing can be caught "
                f"there: let the model return its features, and give {name}=<function of its output>"
            )


def _calls(graph: torch.fx.GraphModule, parts: list[str]) -> bool:
    """Whether a graph calls the module at ``parts``, or one that contains it."""
    targets = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    return not parts or any(".".join(parts[:count]) in targets for count in range(1, len(parts) + 1))


def find_module(model: nn.Module, path: str, name: str) -> nn.Module:
    """Return the module of ``model`` at ``path``; errors call the argument ``name``.

    Raises:
        ValueError: there is none; the message lists what is there.
    """
    return list(_way(model, path, name))[-1]


def _way(model: nn.Module, path: str, name: str) -> Iterator[nn.Module]:
    """Return the model and every module on the way to ``path``."""
    module = unwrapped(model)
    yield module
    parts = path.split(".") if path else []
    for depth, part in enumerate(parts):
        child = _child(module, part)
        if child is None:
            place = f"inside {'.'.join(parts[:depth])!r}" if depth else "at the top"
            children = [child for child, _ in module.named_children()]
            raise ValueError(
                f"{name}: {type(unwrapped(model)).__name__} has no module {path!r}; {place} there are "
                f"{', '.join(map(repr, children)) or 'no modules'}{did_you_mean(part, children)}"
            )
        module = child
        yield module


def _child(module: nn.Module, part: str) -> nn.Module | None:
    children = dict(module.named_children())
    if part in children:
        return children[part]
    counts_from_end = part.startswith("-") and part[1:].isdigit()
    if counts_from_end and isinstance(module, (nn.Sequential, nn.ModuleList)) and int(part[1:]) <= len(module):
        return module[int(part)]
    inner = getattr(module, "_orig_mod", None)
    return None if inner is None else _child(inner, part)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside data parallelism, ``torch.compile`` and averaged copies."""
    while (name := _inner_name(model)) is not None:
        model = getattr(model, name)
    return model


def wrapping_path(model: nn.Module) -> str:
    """Where :func:`unwrapped` found the model, as the names of its parameters begin: ``"module._orig_mod."``."""
    path = ""
    while (name := _inner_name(model)) is not None:
        path, model = f"{path}{name}.", getattr(model, name)
    return path


def _inner_name(model: nn.Module) -> str | None:
    if hasattr(model, "_orig_mod"):
        return "_orig_mod"
    return "module" if isinstance(model, _WRAPPERS) else None


def _is_inside_compiled(model: nn.Module, path: str, name: str) -> bool:
    """Whether the module at ``path`` runs as part of a compiled graph."""
    wrapped, around = model, []
    while (inner := _inner_name(wrapped)) is not None:
        around.append(wrapped)
        wrapped = getattr(wrapped, inner)
    around += list(_way(model, path, name))[:-1]
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in around)
