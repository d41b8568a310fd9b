"""Whether a student and a teacher can work side by side: nothing shared that learns, and the same images."""

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "check_apart",
    "check_exported_mode",
    "check_same_images",
    "memory",
    "put_teacher_into_eval_mode",
    "resizing_module",
    "training_modules",
]


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student and a teacher that share parameters or buffers.

    The teacher would learn along with the student, and would put the student's modules into eval mode.

    Raises:
        ValueError: the shared module, parameter or buffer is named.
    """
    paths = {module: path for path, module in teacher.named_modules()}
    for path, module in student.named_modules():
        if module in paths and next(_tensors(module), None) is not None:
            raise ValueError(_sharing("module", path, paths[module]))
    names = {memory(tensor): name for name, tensor in _tensors(teacher)}
    for name, tensor in _tensors(student):
        if memory(tensor) in names:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise ValueError(_sharing(kind, name, names[memory(tensor)]))


def _sharing(kind: str, name: str, teacher_name: str) -> str:
    same = "" if name == teacher_name else f" (the teacher's {teacher_name!r})"
    return (
        f"student and teacher share the {kind} {name!r}{same}, so the teacher would change with the student: give it a "
        "copy of its own, copy.deepcopy(teacher)"
    )


def training_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are in training mode. Frozen TorchScript has no mode."""
    return [module for module in model.modules() if getattr(module, "training", False)]


def put_teacher_into_eval_mode(student: nn.Module, teacher: nn.Module) -> list[nn.Module]:
    """Return the modules of both sides that were in training mode, to be put back into it after the teacher's part.

    They have no parameters and no buffers: an activation, say, of which a library has one for all of its models.
    """
    students = set(student.modules())
    shared = [module for module in training_modules(teacher) if module in students]
    try:
        teacher.eval()
    except NotImplementedError:  # a graph of torch.export has no mode but that of its export
        for module in teacher.modules():
            module.training = False
    return shared


def check_exported_mode(teacher: nn.Module) -> None:
    """Refuse a graph that ``torch.export`` made of a teacher in training mode: no eval mode reaches it.

    Raises:
        ValueError: a BatchNorm or dropout of the graph is in training mode.
    """
    for module in teacher.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload) and _is_training(node.target, node):
                raise ValueError(
                    f"the teacher was exported in training mode, where its {node.target} stays: export teacher.eval()"
                )


def _is_training(op: torch._ops.OpOverload, node: torch.fx.Node) -> bool:
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names[: len(node.args)], node.args, strict=True)) | dict(node.kwargs)
    return any(given.get(name) is True for name in ("training", "train"))


def memory(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same numbers in memory; where memory cannot be seen, for the same object."""
    has_memory = not tensor.is_meta and tensor.layout is torch.strided and tensor.numel() > 0
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or not has_memory:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def check_same_images(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse detectors that resize their images by themselves, in training to another size than the teacher's.

    Torchvision's do: in training to one of several sizes at random, in eval mode to the last one. Padded maps can then
    agree in size and not in what they show.

    Raises:
        ValueError: sizes that can differ; ``teacher_entry`` is the way out.
    """
    resizing, teacher_resizing = resizing_module(student), resizing_module(teacher)
    if resizing is None:
        return
    sizes = None if getattr(resizing, "_skip_resize", False) else _sizes(resizing)
    teacher_sizes = None if teacher_resizing is None else _sizes(teacher_resizing)[-1:]
    if sizes == teacher_sizes:
        return
    raise ValueError(
        f"the student resizes its images in training to {_described(sizes)} and the teacher to "
        f"{_described(teacher_sizes)}, so their features would be of different images: give teacher_entry, the path of "
        "the module that is given the resized images ('backbone'), or both models the same single size"
    )


def resizing_module(model: nn.Module) -> nn.Module | None:
    """Return torchvision's transform of images, recognised by what it has: this module imports no framework."""
    names = ("min_size", "max_size", "fixed_size", "size_divisible", "resize")
    return next((module for module in model.modules() if all(hasattr(module, name) for name in names)), None)


def _sizes(resizing: Any) -> list[Any]:
    """Every size that a transform may choose, with the largest side that it allows."""
    if resizing.fixed_size is not None:
        return [tuple(resizing.fixed_size)]
    return [(size, resizing.max_size) for size in resizing.min_size]


def _described(sizes: list[Any] | None) -> str:
    if sizes is None:
        return "no other size"
    return f"one of {sizes}" if len(sizes) > 1 else f"{sizes[0]}"
