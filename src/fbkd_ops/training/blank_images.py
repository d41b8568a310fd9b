"""A model's features of a blank image, which tell their widths and sizes."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._validation import Features
from .feature_tap import FeatureTap, Layers, OutputTap, is_output

__all__ = ["blank_image_features", "image_channels"]

# Pixels. Enough for a P7; a position embedding for classification; the last level of SSD300; backbones that are trained
# with position embeddings for detection.
SIZES = (128, 224, 384, 512, 1024)


def blank_image_features(
    model: nn.Module, layers: Layers, name: str, remedy: str, make_input: Callable[[Tensor], Any] | None = None
) -> Features:
    """Return the features at ``layers``, maps of ``(1, C, H, W)``, for the first blank image that the model takes.

    Args:
        model: any model of one image tensor; its modes, buffers and parameters stay as they are.
        layers: as for :class:`fbkd_ops.FeatureTap`.
        name: what an error calls the layers.
        remedy: what the error for a model that takes no blank image tells the user to do.
        make_input: makes what the model is given of the image; the image itself by default.

    Raises:
        ValueError: a model that takes no blank image, a module path that does not exist.
        RuntimeError, TypeError: features that are not there after a forward, or are none.
    """
    tap: FeatureTap | OutputTap
    if is_output(layers):
        tap = OutputTap(layers, name)
    else:
        tap = FeatureTap(model, layers, name=name, stop_when_complete=True)
        tap.close()
    with _eval_mode(model), torch.no_grad():
        output = _run(model, tap, remedy, make_input)
    return tap.features_of(output)


def image_channels(model: nn.Module) -> int:
    """Return the channels of the images that a model takes, as its first convolution says; 3 where it has none."""
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


def _run(model: nn.Module, tap: FeatureTap | OutputTap, remedy: str, make_input: Callable[[Tensor], Any] | None) -> Any:
    """Run the first blank image that the model takes; None where the tap ended the run, else the output."""
    first = image_channels(model)
    channels = list(dict.fromkeys((first, 3, max(first // 4, 1))))  # a YOLOX stem makes four channels of one
    output = refusal = None
    for size, count in itertools.product(SIZES, channels):
        try:
            with tap:
                blank = _blank(model, count, size)
                output = model(blank if make_input is None else make_input(blank))
            return output
        except Exception as error:  # models refuse images by errors of any type
            refusal = refusal or error
    raise ValueError(
        f"{tap.name}: {type(model).__name__} takes no blank image of {', '.join(map(str, channels))} channels and "
        f"{SIZES[0]} to {SIZES[-1]} pixels, off which the shapes of its features are read ({type(refusal).__name__}: "
        f"{refusal}); {remedy}"
    ) from refusal


def _blank(model: nn.Module, channels: int, size: int) -> Tensor:
    like = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
    return torch.zeros(1, channels, size, size, dtype=like.dtype, device=like.device)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
