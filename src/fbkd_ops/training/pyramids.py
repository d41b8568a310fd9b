"""Where a model's feature maps are, for the model families that are known, and which maps of two models are a pair.

The families are told by what their models have: this module imports no framework.
"""

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from .blank_images import blank_image_features
from .feature_tap import Layer, Layers, find_module, unwrapped
from .token_maps import TokenMaps

__all__ = ["Pyramid", "find_pyramid", "levels_by_stride"]


class Pyramid(NamedTuple):
    """A model's feature maps.

    Attributes:
        family: what the model was recognised as.
        layers: where they are, as a :class:`fbkd_ops.Distiller` takes it.
        entry: the module that is given the images as the model has resized them; None where it does not.
        images: a module that is called with a batch of images alone, "" where it is the model; None: none is known.
        levels: the keys or indices of the maps.
        channels: of each map.
        strides: of each map: pixels of the image between two cells.
    """

    family: str
    layers: Layers
    entry: str | None
    images: str | None
    levels: list[Any]
    channels: list[int]
    strides: list[int]

    def __str__(self) -> str:
        maps = zip(self.levels, self.channels, self.strides, strict=True)
        text = ", ".join(f"{level!r}: {channels} channels, stride {stride}" for level, channels, stride in maps)
        return f"{self.family}, at {_written(self.layers)}: {text}"


class _Place(NamedTuple):
    family: str
    layers: Layers
    entry: str | None = None
    images: str | None = None


def channels_first(maps: Any) -> list[Tensor]:
    """Return maps ``(N, H, W, C)`` as ``(N, C, H, W)``."""
    return [x.permute(0, 3, 1, 2) for x in maps]


def only_maps(inputs: Any) -> Any:
    """Return the maps among a head's inputs: open-vocabulary heads are given text besides or, YOLOE's, behind them."""
    if isinstance(inputs, Tensor):
        return inputs
    maps = inputs[0] if isinstance(inputs[0], (list, tuple)) else inputs
    return [each for each in maps if each.dim() == 4]


TOKENS = "maps of tokens"  # a family whose last map is compared with every one of the student's
HEAD_INPUTS = Layer("model.-1", inputs=True, select=only_maps)  # of Ultralytics' models


def _has(model: nn.Module, *paths: str) -> bool:
    """Whether there is something at each path."""
    for path in paths:
        try:
            found = attrgetter(path)(model)
        except AttributeError:
            return False
        if found is None:
            return False
    return True


def _of_torchvision(model: Any) -> _Place | None:
    if _has(model, "backbone", "transform.image_mean"):
        return _Place("torchvision detector", "backbone", "backbone", "backbone")
    return None


def _of_detectron2(model: Any) -> _Place | None:
    if _has(model, "backbone.output_shape", "pixel_mean"):
        return _Place("Detectron2 detector", "backbone", "backbone", "backbone")
    return None


def _of_mmdet(model: Any) -> _Place | None:
    heads = ("bbox_head", "rpn_head", "mask_head", "panoptic_head")
    if any(_has(model, head) for head in heads) and _has(model, "neck"):
        return _Place("MMDetection detector", "neck", images="backbone")
    return None


def _of_ultralytics(model: Any) -> _Place | None:
    parts = getattr(model, "model", None)
    if isinstance(parts, nn.Sequential) and len(parts) and isinstance(getattr(parts[-1], "f", None), (list, tuple)):
        return _Place("Ultralytics model", HEAD_INPUTS, images="model.0")
    return None


def _of_hugging_face(model: Any) -> _Place | None:
    if _has(model, "model.encoder_input_proj", "model.encoder"):
        layer = Layer("model.encoder", select=attrgetter("last_hidden_state"))
        images = "model.backbone.model" if _has(model, "model.backbone.model") else None
        return _Place("Hugging Face detector with a hybrid encoder (RT-DETR, D-FINE, ...)", layer, images=images)
    if _has(model, "model.backbone.projector"):
        return _Place("Hugging Face detector with a projector (RF-DETR, LW-DETR)", "model.backbone.projector")
    if isinstance(getattr(getattr(model, "model", None), "input_proj", None), nn.ModuleList):
        count = len(model.model.input_proj)
        return _Place("Hugging Face Deformable DETR", [f"model.input_proj.{index}" for index in range(count)])
    if _has(model, "model.input_projection", "model.encoder"):
        return _Place("Hugging Face DETR", "model.input_projection")
    if _has(model, "model.pixel_level_module.decoder.level_embed"):  # a MaskFormer has one map
        layer = Layer("model.pixel_level_module.decoder", select=attrgetter("multi_scale_features"))
        return _Place("Hugging Face Mask2Former", layer)
    if _has(model, "segformer", "decode_head"):
        return _Place("Hugging Face SegFormer", Layer("segformer", select=attrgetter("hidden_states")))
    return None


def _of_timm(model: Any) -> _Place | None:
    for path, family in (("backbone", "model with a timm backbone"), ("", "timm backbone")):
        backbone = getattr(model, path) if path and _has(model, path) else None if path else model
        if backbone is not None and _has(backbone, "feature_info.channels"):
            is_last = getattr(backbone, "output_fmt", None) is not None and str(backbone.output_fmt).endswith("NHWC")
            return _Place(family, Layer(path, select=channels_first) if is_last else path, images=path)
    return None


def _of_token_maps(model: Any) -> _Place | None:
    return _Place(TOKENS, "", images="") if isinstance(model, TokenMaps) else None


FAMILIES: tuple[Callable[[Any], _Place | None], ...] = (
    _of_token_maps,
    _of_torchvision,
    _of_detectron2,
    _of_ultralytics,
    _of_hugging_face,
    _of_timm,
    _of_mmdet,
)


def _place_of(model: Any) -> _Place | None:
    return next((found for found in (of_family(model) for of_family in FAMILIES) if found is not None), None)


def find_pyramid(model: nn.Module, name: str) -> Pyramid:
    """Return where a model's feature maps are, their widths and strides, read off a blank image.

    Args:
        model: a detector or segmenter, wrapped or not; it stays as it is.
        name: what an error calls it.

    Raises:
        TypeError: no module.
        ValueError: a model of no known family, or one that takes no blank image.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name} must be a torch.nn.Module, got {type(model).__name__}: for several teachers give "
            "Distiller(...) the layers yourself"
        )
    inner = unwrapped(model)
    place = _place_of(inner)
    if place is None:
        held = getattr(inner, "model", None)
        hint = f"; its .model is a {known.family}: give that" if (known := _place_of(held)) else ""
        children = ", ".join(repr(child) for child, _ in inner.named_children()) or "no modules"
        raise ValueError(
            f"{name}: {type(inner).__name__} is of no model family that is known; at its top there are {children}"
            f"{hint}. Or give Distiller(...) the paths of its layers yourself: student_layers, teacher_layers"
        )
    sizes: list[tuple[int, ...]] = []

    def noted(image: Tensor) -> Tensor:
        sizes.append(tuple(image.shape[2:]))
        return image

    # A module that is given resized images tells its own strides; the whole model would resize the blank one first.
    part = inner if place.entry is None else find_module(inner, place.entry, name)
    layers = place.layers if place.entry is None else ""
    features: Any = blank_image_features(part, layers, name, "give Distiller(...) the layers yourself", noted)
    maps = features if isinstance(features, Mapping) else dict(enumerate(features))
    height = sizes[-1][0]
    return Pyramid(
        place.family,
        place.layers,
        place.entry,
        place.images,
        list(maps),
        [x.shape[1] for x in maps.values()],
        [_stride(inner, height, x.shape[2]) for x in maps.values()],
    )


def _stride(model: nn.Module, height: int, cells: int) -> int:
    """Return the stride of a map; the size of an image need not be a multiple of it."""
    if isinstance(model, TokenMaps):
        return model.stride
    powers = (2**power for power in range(10))
    return next((stride for stride in powers if math.ceil(height / stride) == cells), round(height / cells))


def levels_by_stride(student: Pyramid, teacher: Pyramid) -> list[tuple[int, int]]:
    """Return the positions of the maps that have the same stride: equal ones in their order; a single map fits all.

    Raises:
        ValueError: no stride that both have.
    """
    if teacher.family == TOKENS:
        return [(index, len(teacher.levels) - 1) for index in range(len(student.levels))]
    pairs, left = [], list(range(len(teacher.levels)))
    for index, stride in enumerate(student.strides):
        match = next((other for other in left if teacher.strides[other] == stride), None)
        if match is not None:
            left.remove(match)
            pairs.append((index, match))
    if not pairs:
        raise ValueError(
            f"student and teacher have no stride in common: {student.strides} and {teacher.strides}. Give "
            "Distiller(...) student_levels, teacher_levels and resize=True yourself"
        )
    return pairs


def _written(layers: Any) -> str:
    """Return layers as one would give them."""
    if isinstance(layers, Layer):
        return f"the inputs of {layers.path!r}" if layers.inputs else repr(layers.path)
    return repr(layers) if layers else "its output"
