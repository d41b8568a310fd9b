"""torchvision's detectors by configuration, their weights from local files, and the distiller around two of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torchvision.models import get_model
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from fbkd_ops import Distiller, size_free_weights
from fbkd_ops.losses.registry import LOSSES
from fbkd_ops.training.inherit import Inheritance, inherit

from .config import Config, ConfigError, DistillationConfig, ModelConfig

# The last layer of each stride (4, 8, 16, 32), and its channels.
STAGES = {
    "resnet18": {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512},
    "resnet34": {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512},
    "resnet50": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    "resnet101": {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": 2048},
    "mobilenet_v3_small": {"1": 16, "3": 24, "8": 48, "12": 576},
    "mobilenet_v3_large": {"3": 24, "6": 40, "12": 112, "16": 960},
}
DETECTORS = {"faster_rcnn": FasterRCNN, "retinanet": RetinaNet, "fcos": FCOS}
# Arguments of torchvision's classes that other keys of the configuration set.
TAKEN = {"self", "backbone", "num_classes", "min_size", "max_size", "rpn_anchor_generator", "anchor_generator"}
RESNET_STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")
SCORES = ("roi_heads.box_predictor.cls_score.bias", "head.classification_head.cls_logits.bias")
COUNTER = ".num_batches_tracked"  # absent where a norm was frozen; it changes nothing where momentum is set
FIRST_STRIDES = {"faster_rcnn": 4, "retinanet": 8, "fcos": 8}


def build_detector(
    model: ModelConfig, num_classes: int, min_size: int, max_size: int, *, name: str = "model"
) -> nn.Module:
    """Return a detector of ``num_classes`` classes beside the background, with random weights.

    In training it takes pictures in the size that they have, in evaluation it resizes them.

    Args:
        name: the configuration's section, for errors.

    Raises:
        ConfigError: ``arguments`` that torchvision's class does not take, anchor sizes of another number than levels.
    """
    if model.anchor_sizes is not None and len(model.anchor_sizes) != 5:
        raise ConfigError(f"{name}.anchor_sizes: got {len(model.anchor_sizes)} sizes, expected 5, one for each level")
    _check_arguments(model, f"{name}.arguments")
    sizes = dict(min_size=min_size, max_size=max_size, _skip_resize=True)
    build = {"faster_rcnn": _faster_rcnn, "retinanet": _retinanet, "fcos": _fcos}[model.detector]
    try:
        return build(_build_backbone(model), num_classes + 1, model.anchor_sizes, **sizes, **model.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}.arguments: got {model.arguments}: {error}") from None


def _check_arguments(model: ModelConfig, key: str) -> None:
    """Refuse what torchvision's class would swallow: it hands unknown names to its transform, which ignores them."""
    parameters = inspect.signature(DETECTORS[model.detector].__init__).parameters.values()
    known = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.name not in TAKEN]
    unknown = [argument for argument in model.arguments if argument not in known]
    if unknown:
        raise ConfigError(f"{key}: got {', '.join(map(repr, unknown))}, expected of {', '.join(known)}")


def _build_backbone(model: ModelConfig) -> BackboneWithFPN:
    """Return a pyramid of five levels: P2..P6 for Faster R-CNN, P3..P7 for RetinaNet and FCOS."""
    norm = FrozenBatchNorm2d if model.norm == "frozen" else nn.BatchNorm2d
    is_resnet = model.backbone.startswith("resnet")
    if not is_resnet and norm is nn.BatchNorm2d:
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)  # torchvision's for MobileNetV3
    trunk = get_model(model.backbone, weights=None, norm_layer=norm)
    if is_resnet:
        _freeze_stages(trunk, model.trainable_layers)
    stages = STAGES[model.backbone]
    extra: nn.Module = LastLevelMaxPool()
    if model.detector != "faster_rcnn":
        stages = dict(list(stages.items())[1:])
        extra = LastLevelP6P7(model.width, model.width)
    return BackboneWithFPN(
        trunk if is_resnet else trunk.features,
        return_layers={stage: str(level) for level, stage in enumerate(stages)},
        in_channels_list=list(stages.values()),
        out_channels=model.width,
        extra_blocks=extra,
    )


def _freeze_stages(resnet: nn.Module, trainable: int) -> None:
    learning = RESNET_STAGES[:trainable] + (("bn1",) if trainable == len(RESNET_STAGES) else ())
    for name, parameter in resnet.named_parameters():
        parameter.requires_grad_(name.startswith(learning) if learning else False)


def _anchors(sizes: Sequence[Sequence[int]], ratios: Sequence[float]) -> AnchorGenerator:
    return AnchorGenerator(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))


def _faster_rcnn(backbone: nn.Module, classes: int, sizes: list[int] | None, **arguments: Any) -> nn.Module:
    anchors = _anchors([[size] for size in sizes], (0.5, 1.0, 2.0)) if sizes else None
    return FasterRCNN(backbone, classes, rpn_anchor_generator=anchors, **arguments)


def _retinanet(backbone: nn.Module, classes: int, sizes: list[int] | None, **arguments: Any) -> nn.Module:
    octaves = [[size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))] for size in sizes or ()]
    return RetinaNet(
        backbone, classes, anchor_generator=_anchors(octaves, (0.5, 1.0, 2.0)) if sizes else None, **arguments
    )


def _fcos(backbone: nn.Module, classes: int, sizes: list[int] | None, **arguments: Any) -> nn.Module:
    anchors = _anchors([[size] for size in sizes], (1.0,)) if sizes else None
    return FCOS(backbone, classes, anchor_generator=anchors, **arguments)


def load_detector(detector: nn.Module, path: Path, classes: Sequence[str], key: str) -> None:
    """Load the weights of a detector of the same kind and classes.

    Args:
        key: of the configuration, for errors.

    Raises:
        ConfigError: a file that cannot be read or is no state dict, another number of classes, other names or shapes.
    """
    state = _read_state(path, key)
    own = detector.state_dict()
    scores = next(name for name in SCORES if name in own)
    if scores in state and state[scores].shape != own[scores].shape:
        anchors = own[scores].numel() // (len(classes) + 1)
        found = state[scores].numel() / anchors - 1
        raise ConfigError(
            f"{key}: {path} is a detector of {found:g} classes, but the data has {len(classes)}: "
            f"{_shortened(classes)}; give the weights of a detector of these classes, or train one"
        )
    own, state = ({k: v for k, v in each.items() if not k.endswith(COUNTER)} for each in (own, state))
    faults = [f"{name} is missing" for name in own if name not in state]
    faults += [f"{name} is not expected" for name in state if name not in own]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if faults:
        raise ConfigError(
            f"{key}: {path} does not fit a {type(detector).__name__} as configured, {len(faults)} entries differ: "
            f"{'; '.join(faults[:3])}"
        )
    detector.load_state_dict(state, strict=False)


def load_backbone(detector: nn.Module, path: Path, key: str) -> None:
    """Load the weights of torchvision's classifier into the detector's trunk, all that the trunk has.

    Raises:
        ConfigError: a file that cannot be read, one in which an entry of the trunk is missing or has another shape.
    """
    body = detector.backbone.body
    state = {name.removeprefix("features."): tensor for name, tensor in _read_state(path, key).items()}
    own = {name: tensor for name, tensor in body.state_dict().items() if not name.endswith(COUNTER)}
    wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        raise ConfigError(
            f"{key}: {path} does not fit this backbone, {len(wrong)} of its {len(own)} entries are missing or have "
            f"another shape, as {wrong[0]!r}"
        )
    body.load_state_dict({name: state[name] for name in own}, strict=False)


def _read_state(path: Path, key: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the archive, zlib or pickle do
        raise ConfigError(f"{key}: cannot read {path}: {str(error).splitlines()[0]}") from None
    for name in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{key}: {path} holds no state dict, expected names and tensors")
    state = dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def _shortened(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def build_task_model(task: str, config: Config, classes: Sequence[str]) -> tuple[nn.Module, nn.Module, list[str]]:
    """Return what is trained, the detector in it, and what there is to say about its beginning.

    For ``"teacher"`` and ``"baseline"`` both are the detector, for ``"distilled"`` the first is a `Distiller`.
    """
    name = "teacher" if task == "teacher" else "student"
    model = config.teacher if task == "teacher" else config.student
    detector = _build_loaded(model, config, classes, name)
    if task != "distilled":
        return detector, detector, []
    teacher = build_detector(config.teacher, len(classes), config.data.min_size, config.data.max_size, name="teacher")
    load_detector(teacher, config.teacher_weights(), classes, "teacher.weights")
    distiller, inherited = build_distiller(
        detector, teacher, config.distillation, FIRST_STRIDES[config.student.detector]
    )
    return distiller, detector, [] if inherited is None else [str(inherited)]


def _build_loaded(model: ModelConfig, config: Config, classes: Sequence[str], name: str) -> nn.Module:
    detector = build_detector(model, len(classes), config.data.min_size, config.data.max_size, name=name)
    if model.backbone_weights:
        load_backbone(detector, model.backbone_weights, f"{name}.backbone_weights")
    if model.weights:
        load_detector(detector, model.weights, classes, f"{name}.weights")
    return detector


def build_distiller(
    student: nn.Module, teacher: nn.Module, settings: DistillationConfig, first_stride: int
) -> tuple[Distiller, Inheritance | None]:
    """Return the distiller, and what the student has inherited.

    Raises:
        ConfigError: an argument that the loss, the distiller or `inherit` refuses.
    """
    inherited = None
    if settings.inherit:
        inherited = _configured("inherit", inherit, student, teacher, settings.inherit)
    widths = [
        _level_widths(model, levels)
        for model, levels in ((student, settings.student_levels), (teacher, settings.teacher_levels))
    ]
    overrides = dict(settings.loss)
    name = overrides.pop("type", "FBKDLoss")
    if name not in LOSSES:
        raise ConfigError(f"distillation.loss: type must be one of {', '.join(LOSSES)}, got {name!r}")
    if settings.size_free and name != "FBKDLoss":
        raise ConfigError(f"distillation.size_free: these weights are FBKDLoss's, and the loss is {name}")
    if settings.size_free:
        weights = size_free_weights(settings.preset, len(widths[0]), first_stride=first_stride)
        overrides = {"normalize": "mean", **weights, **overrides}
    if name != "ScoreWeightedLoss":
        overrides = {"preset": settings.preset, **overrides}
    if name == "MGDLoss" and torch.distributed.is_initialized():  # masks of its own for each process
        overrides = {"seed": torch.distributed.get_rank(), **overrides}
    loss = _configured("loss", LOSSES[name], *widths, **overrides)
    own = {"preset", "loss", "size_free", "inherit"}
    arguments = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.name not in own
    }
    layers = dict(student_layers="backbone", teacher_entry="backbone")
    return _configured("", Distiller, student, teacher, loss, **layers, **arguments), inherited


def _configured(key: str, function: Callable[..., Any], *values: Any, **arguments: Any) -> Any:
    """Return the function's result; its refusals are the configuration's."""
    try:
        return function(*values, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"distillation{key and '.'}{key}: {error}") from None


def _level_widths(detector: nn.Module, levels: list[str] | None) -> list[int]:
    pyramid = detector.backbone.fpn
    names = [str(level) for level in range(len(pyramid.layer_blocks))]
    names += ["pool"] if isinstance(pyramid.extra_blocks, LastLevelMaxPool) else ["p6", "p7"]
    for level in levels or ():
        if level not in names:
            raise ConfigError(f"distillation.student_levels, teacher_levels: got {level!r}, expected of {names}")
    return [detector.backbone.out_channels] * len(levels or names)
