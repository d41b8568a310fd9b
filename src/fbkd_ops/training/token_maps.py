"""Vision transformers as teachers: their tokens as feature maps, at the strides of a detector."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._numerics import accumulation_dtype
from .._validation import check_callable, check_module, is_int
from .feature_tap import Layers, unwrapped
from .teacher_side import closed_tap

__all__ = ["TokenMaps"]


class TokenMaps(nn.Module):
    """Make a teacher of a vision transformer: a module of images that returns the maps of its layers' tokens.

    A layer gives ``(N, P + HW, C)``: P tokens in front that belong to no place (class, registers), then those of the
    patches, row by row. Its map is ``(N, C, H, W)``. Known to fit are the transformers of timm (made with
    ``dynamic_img_size=True``) and Hugging Face's ViT, DINOv2, DINOv3, SigLIP and SigLIP2.

    Args:
        model: the transformer.
        layers: paths of modules that give tokens: ``["blocks.7", "norm"]``. One path gives a list of one map.
        stride: pixels of an image between two cells of the maps, such that they lie on a detector's: the images are
            resized by ``patch_size / stride`` before the model sees them. With a patch of 14 and a stride of 16 one of
            640×480 pixels becomes one of 560×420, whose maps have 40×30 cells. By default ``patch_size``: images keep
            their size. Those that end within a cell are padded with zeros, at the right and below.
        patch_size: pixels of a patch; by default what the model says.
        call: calls the model, as ``call(model, images)``; by default ``model(images)``, with
            ``interpolate_pos_encoding=True`` where it takes that.

    Raises:
        TypeError, ValueError: an argument of another type, a model that tells no ``patch_size``, a path that it does
            not have.

    Example:
        >>> vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True)
        >>> [tuple(x.shape) for x in TokenMaps(vit, "norm")(torch.randn(1, 3, 64, 96))]
        [(1, 192, 4, 6)]

    A pyramid: ``Distiller(..., teacher_layers="", teacher_levels=[0, 0, 0], resize=True)`` compares the map with three
    of the student's, in the sizes of each. There is no learned layer on the teacher's side, for the loss would be
    smallest where that gives 0; the loss has learned layers on the student's.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        stride: int | None = None,
        patch_size: int | None = None,
        call: Callable[[nn.Module, Tensor], Any] | None = None,
    ):
        super().__init__()
        check_module(model, "model")
        self.model = model
        self.patch_size = _checked_pixels(_found_patch_size(model) if patch_size is None else patch_size, "patch_size")
        self.stride = _checked_pixels(self.patch_size if stride is None else stride, "stride")
        if call is not None:
            check_callable(call, "call")
        self.call = self._default_call if call is None else call
        self._tap = closed_tap(model, [layers] if isinstance(layers, str) else layers, "layers", True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per layer.

        Args:
            images: ``(N, C, H, W)``, normalised as the model was trained.

        Raises:
            TypeError: images in another form, a layer that gives no tokens.
            ValueError: fewer tokens than patches.
        """
        if not isinstance(images, Tensor) or images.dim() != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"TokenMaps takes images (N, C, H, W), got {found}; with teacher_entry=('backbone', '') a detector's "
                "backbone is given such a batch"
            )
        grid = [math.ceil(side / self.stride) for side in images.shape[2:]]
        missing = [cells * self.stride - side for cells, side in zip(grid, images.shape[2:], strict=True)]
        if any(missing):
            images = F.pad(images, (0, missing[1], 0, missing[0]))
        size = [cells * self.patch_size for cells in grid]
        if self.stride != self.patch_size:
            wide = images.to(accumulation_dtype(images))
            images = F.interpolate(wide, size, mode="bilinear", align_corners=False, antialias=True).to(images.dtype)
        with self._tap:
            self.call(self.model, images)
        in_front = _found_tokens_in_front(self.model)
        caught = zip(self._tap.caught(), self._tap.paths(), strict=True)
        return [_map(value, grid, path, in_front) for value, path in caught]

    def _default_call(self, model: nn.Module, images: Tensor) -> Any:
        takes = inspect.signature(unwrapped(model).forward).parameters
        if "spatial_shapes" in takes:
            return model(**packed(images, self.patch_size))
        if "interpolate_pos_encoding" in takes:
            return model(images, interpolate_pos_encoding=True)
        return model(images)


def packed(images: Tensor, patch_size: int) -> dict[str, Tensor]:
    """Return whole images ``(N, C, H, W)`` as SigLIP2's models of any resolution take them.

    The patches are ``(N, HW, PPC)``, row by row, a pixel's channels side by side.
    """
    rows, columns = (side // patch_size for side in images.shape[2:])
    cells = images.unflatten(2, (rows, patch_size)).unflatten(4, (columns, patch_size))  # (N, C, H, P, W, P)
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long, device=images.device),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(images), device=images.device),
    }


def _map(value: Any, grid: list[int], path: str, expected: int | None) -> Tensor:
    """Return ``(N, C, H, W)`` of a layer's tokens ``(N, P + HW, C)``; what is in front of the patches is dropped.

    Args:
        value: the tokens, or a tuple that begins with them.
        grid: rows and columns of patches.
        path: of the layer.
        expected: how many tokens are in front, where the model tells.
    """
    tokens = value[0] if isinstance(value, (list, tuple)) and value else value
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"layers: {path!r} must give tokens (N, P + HW, C), got {found}")
    in_front = tokens.shape[1] - math.prod(grid)
    if in_front < 0 or expected not in (None, in_front):
        besides = "" if not expected else f" and {expected} in front of them"
        raise ValueError(
            f"layers: {path!r} gave {tokens.shape[1]} tokens, but there are {grid[0]}x{grid[1]} patches{besides}: is "
            "patch_size right?"
        )
    return tokens[:, in_front:].transpose(1, 2).unflatten(2, grid)


def _found_tokens_in_front(model: nn.Module) -> int | None:
    """Return how many tokens timm's models, and Hugging Face's with registers, have in front of the patches'."""
    model = unwrapped(model)
    registers = getattr(getattr(model, "config", None), "num_register_tokens", None)
    return getattr(model, "num_prefix_tokens", None if registers is None else 1 + registers)


def _found_patch_size(model: nn.Module) -> Any:
    """Return what timm's and Hugging Face's models say of their patches."""
    model = unwrapped(model)
    for holder in (getattr(model, "patch_embed", None), getattr(model, "config", None)):
        size = getattr(holder, "patch_size", None)
        if isinstance(size, (list, tuple)) and len(set(size)) == 1:
            size = size[0]
        if size is not None:
            return size
    raise ValueError(f"patch_size is needed: {type(model).__name__} does not tell its own")


def _checked_pixels(value: Any, name: str) -> int:
    if not is_int(value) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    return int(value)
