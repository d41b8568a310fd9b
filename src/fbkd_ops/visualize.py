"""Pictures of what the loss compares: attention maps of student and teacher, and the masks made of them.

matplotlib is imported when a picture is drawn, not before. Nothing here touches pyplot, so that a figure belongs to the
caller alone.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from ._validation import FLOAT_DTYPES, Features, as_list, check_dense, check_text, is_int, is_list, paired_levels
from .functional import attention_mask, attention_pool
from .loss import FBKDLoss
from .presets import PRESETS
from .types import AttentionPool

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

__all__ = ["attention", "channel_attention"]

ATTENTION_COLOURS, MASK_COLOURS, NOT_FINITE_COLOUR = "inferno", "viridis", "cyan"
INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
RANGE_SLACK = 1e-3  # how far resizing may carry an image out of 0..1


class _Level(NamedTuple):
    """One image at one level."""

    position: int
    name: str
    student: AttentionPool  # (1, H, W) and (1, Cs)
    teacher: AttentionPool  # (1, H, W) and (1, Ct)
    spatial_mask: Tensor | None  # (1, H, W), None where the loss has no feature term
    channel_mask: Tensor | None  # (1, Ct), None where the loss has none


class _Picture(NamedTuple):
    """An image and the area, in its pixels and from its top left corner, that the features cover."""

    pixels: Tensor  # (3, H, W), float32 in 0..1
    padded_size: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        _, height, width = self.pixels.shape
        return height, width


@torch.no_grad()
def attention(
    image: Tensor,
    student_features: Features,
    teacher_features: Features,
    *,
    loss: FBKDLoss | None = None,
    index: int = 0,
    levels: Sequence[int] | None = None,
    boxes: Tensor | None = None,
    labels: Sequence[Any] | None = None,
    padded_size: tuple[int, int] | None = None,
    others: Mapping[str, Features] | None = None,
    student_title: str = "student",
    teacher_title: str = "teacher",
) -> "Figure":
    """Where student and teacher look: their spatial attention and the mask made of both, over an image.

    One row a level; its columns are the image, the others, the student, the teacher and the mask. The colours of each
    panel run from the lowest to the highest value over the image, written below it; values that are not finite are
    cyan and counted. The arrays drawn are the maps as they are, smoothed on the screen only.

    Args:
        image: ``(3, H, W)``, floats in 0..1 or uint8.
        student_features: one ``(N, Cs, h, w)`` a level, in a list, a tuple or a dict, as the loss takes them.
        teacher_features: one ``(N, Ct, h, w)`` a level; two dicts are matched by key.
        loss: gives each level's temperature and mask rule, and leaves the mask of a level without a feature term
            empty; without a loss they are those of the preset ``"paper"``.
        index: which image of the batch the picture is of.
        levels: positions of the levels to draw, all by default.
        boxes: ``(K, 4)``, left, top, right, bottom in pixels of the image.
        labels: K texts or numbers to write at the boxes.
        padded_size: height and width, in pixels of the image, of the area that the features cover, where a detector
            pads the image at the bottom and on the right; the image's own by default.
        others: features of further detectors, of the student's sizes, by the title of their column.
        student_title: of the student's column.
        teacher_title: of the teacher's column.

    Returns:
        A :class:`matplotlib.figure.Figure`; ``figure.savefig("attention.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an image, boxes, features, others or a loss of another type.
        ValueError: an image of another shape or out of 0..1; features that do not agree with each other or with the
            loss; an index or a level that there is not; boxes, labels or a padded size that do not fit.

    Example:
        >>> features = {"p3": torch.randn(2, 64, 16, 16), "p4": torch.randn(2, 64, 8, 8)}
        >>> figure = fbkd_ops.visualize.attention(torch.rand(3, 128, 128), features, features, index=1)
        >>> [axes.get_title() for axes in figure.axes[:4]]
        ['image', 'student', 'teacher', 'mask']

    Source: Zhang & Ma 2021, the spatial attention map ``G^s`` and the mask ``M^s``.
    """
    _require_matplotlib()
    check_text(student_title, "student_title")
    check_text(teacher_title, "teacher_title")
    picture = _checked_picture(image, padded_size)
    boxes, labels = _checked_boxes(boxes, labels)
    drawn = _levels(student_features, teacher_features, loss, index, levels)
    pyramids = _other_pyramids(student_features, others)
    figure, panels = _image_grid(len(drawn), len(pyramids) + 4, picture.size)
    titles = ["image", *pyramids, student_title, teacher_title, "mask"]
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    for row, level in zip(panels, drawn, strict=True):
        pools = [attention_pool(pyramid[level.position][index : index + 1]) for pyramid in pyramids.values()]
        row[0].imshow(picture.pixels.permute(1, 2, 0).numpy())
        _draw_boxes(row[0], boxes, labels)
        stride = picture.padded_size[1] / level.teacher.spatial_attention.shape[-1]
        row[0].set_ylabel(f"{level.name}, stride {round(stride)}", fontsize=10)
        for axes, pool in zip(row[1:-1], [*pools, level.student, level.teacher], strict=True):
            _draw_heat(axes, picture, pool.spatial_attention[0], ATTENTION_COLOURS)
        if level.spatial_mask is None:
            _draw_nothing(row[-1], "no feature term")
        else:
            _draw_heat(row[-1], picture, level.spatial_mask[0], MASK_COLOURS)
    return figure


@torch.no_grad()
def channel_attention(
    student_features: Features,
    teacher_features: Features,
    *,
    loss: FBKDLoss | None = None,
    index: int = 0,
    levels: Sequence[int] | None = None,
) -> "Figure":
    """Which channels student and teacher use: their channel attention and the channel mask.

    One row a level; its columns are the student, the teacher and the mask, with channels in descending order of the
    teacher's attention. A student of another width is in the order of its own. The range of the values is written
    below each panel; those that are not finite are left out and counted.

    Args:
        student_features: one ``(N, Cs, H, W)`` a level, in a list, a tuple or a dict, as the loss takes them.
        teacher_features: one ``(N, Ct, H, W)`` a level; two dicts are matched by key.
        loss: gives each level's temperature, mask rule and what the student contributes to the mask; the panel stays
            empty where the loss has no channel mask. Without a loss the mask is that of the preset ``"paper"``, of
            the teacher alone where the widths differ.
        index: which image of the batch is drawn.
        levels: positions of the levels to draw, all by default.

    Returns:
        A :class:`matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: features or a loss of another type.
        ValueError: features that do not agree with each other or with the loss, an index or a level that there is not.

    Example:
        >>> student, teacher = [torch.randn(1, 32, 16, 16)], [torch.randn(1, 64, 16, 16)]
        >>> figure = fbkd_ops.visualize.channel_attention(student, teacher)
        >>> [axes.get_title() for axes in figure.axes]
        ['student, 32 channels', 'teacher, 64 channels', 'mask']

    Source: Zhang & Ma 2021, the channel attention map ``G^c`` and the mask ``M^c``.
    """
    _require_matplotlib()
    drawn = _levels(student_features, teacher_features, loss, index, levels)
    figure = _new_figure(9, 1.8 * len(drawn) + 0.4)
    panels = figure.subplots(len(drawn), 3, squeeze=False)
    for row, level in zip(panels, drawn, strict=True):
        _draw_channel_row(row, level)
    figure.supxlabel(
        "channels by falling attention of the teacher, or of their own where the widths differ", fontsize=9
    )
    return figure


def _require_matplotlib() -> None:
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError("fbkd_ops.visualize needs matplotlib: pip install matplotlib") from error


def _levels(
    student: Features, teacher: Features, loss: FBKDLoss | None, index: int, levels: Sequence[int] | None
) -> list[_Level]:
    """Attention and masks of image ``index`` at each of ``levels``."""
    pairs = paired_levels(student, teacher)
    for name, feature, _, _ in pairs:
        _check_values(feature, name)
    _check_loss(loss, pairs)
    _check_index(index, min(s.shape[0] for _, s, _, _ in pairs))
    names = _level_names(student, teacher)
    drawn = []
    for position in _checked_positions(levels, len(pairs)):
        _, s, _, t = pairs[position]
        pools = attention_pool(s[index : index + 1]), attention_pool(t[index : index + 1])
        drawn.append(_Level(position, names[position], *pools, *_masks(loss, position, *pools)))
    return drawn


def _masks(
    loss: FBKDLoss | None, position: int, student: AttentionPool, teacher: AttentionPool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the masks ``(1, H, W)`` and ``(1, Ct)`` of a level, None for one that the loss does not have."""
    if loss is None:
        return _paper_masks(student, teacher)
    level = loss.levels[position]
    if level.feature_adaptation is None:
        return None, None
    spatial, *channel = dispatch.attention_masks(level.mask_requests(student, teacher))
    return spatial, channel[0] if channel else None


def _paper_masks(student: AttentionPool, teacher: AttentionPool) -> tuple[Tensor, Tensor]:
    """Return the masks ``(1, H, W)`` and ``(1, Ct)`` of the preset ``"paper"``, before any layer has been trained."""
    constants = PRESETS["paper"]
    masks = []
    for axis in ("spatial", "channel"):
        s, t = (getattr(pool, f"{axis}_attention") for pool in (student, teacher))
        s = s if s.shape == t.shape else None
        temperature = constants[f"{axis}_temperature"]
        masks.append(attention_mask(s, t, temperature=temperature, mask_rule=constants["mask_rule"]))
    return masks[0], masks[1]


def _level_names(student: Features, teacher: Features) -> list[str]:
    """Return the keys where there are some, numbers elsewhere, in the student's order."""
    for features in (student, teacher):
        if isinstance(features, Mapping):
            return [str(key) for key in features]
    return [f"level {position}" for position in range(len(student))]


def _other_pyramids(student: Features, others: Mapping[str, Features] | None) -> dict[str, list[Tensor]]:
    """Return the levels ``(N, C, h, w)`` of each of ``others``, in the student's order."""
    if others is None:
        return {}
    if not isinstance(others, Mapping):
        raise TypeError(f"others must be a dict of features by title, got {type(others).__name__}")
    return {
        title: [level for _, _, _, level in paired_levels(student, features, f"others[{title!r}]")]
        for title, features in others.items()
    }


def _check_loss(loss: Any, pairs: list[tuple[str, Tensor, str, Tensor]]) -> None:
    if loss is None:
        return
    if not isinstance(loss, FBKDLoss):
        raise TypeError(f"loss must be an FBKDLoss or None, got {type(loss).__name__}")
    loss.check_levels(pairs)


def _check_values(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} must have values to draw, got a meta tensor")


def _check_index(index: Any, batch: int) -> None:
    if not is_int(index) or not 0 <= index < batch:
        raise ValueError(f"index must be an int >= 0 and below the number of images, {batch}, got {index!r}")


def _checked_positions(levels: Any, count: int) -> list[int]:
    """Return the positions to draw, of ``count``."""
    if levels is None:
        return list(range(count))
    positions = as_list(levels, "a list", "levels") if is_list(levels) else []
    if not positions:
        raise ValueError(f"levels must be a list of at least one position, got {levels!r}")
    for position in positions:
        if not is_int(position) or not 0 <= position < count:
            raise ValueError(f"levels must be ints >= 0 and below the number of levels, {count}, got {position!r}")
    return positions


def _checked_picture(image: Any, padded_size: Any) -> _Picture:
    """Return the image ``(3, H, W)`` as float32 in 0..1 on the CPU, and the area that the features cover."""
    check_dense(image, "image")
    if image.dtype not in (torch.uint8, *FLOAT_DTYPES):
        raise TypeError(f"image must be of uint8 or floating-point, got {str(image.dtype).removeprefix('torch.')}")
    if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must have shape (3, H, W), got {tuple(image.shape)}")
    _check_values(image, "image")
    pixels = image.detach().cpu().float()
    pixels = pixels / 255 if image.dtype == torch.uint8 else pixels
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
        raise ValueError(
            f"image must be in 0..1 (or uint8), got {low:.3g} to {high:.3g}; draw it before normalizing it"
        )
    size = tuple(image.shape[1:])
    return _Picture(pixels.clamp(0, 1), size if padded_size is None else _checked_padding(padded_size, size))


def _checked_padding(padded_size: Any, size: tuple[int, int]) -> tuple[int, int]:
    sides = as_list(padded_size, "two ints", "padded_size") if is_list(padded_size) else []
    is_pair = len(sides) == 2 and all(map(is_int, sides))
    if not is_pair or any(padded < own for padded, own in zip(sides, size, strict=True)):
        raise ValueError(
            f"padded_size must be two ints, height and width, no less than the image's {size}, got {padded_size!r}"
        )
    return int(sides[0]), int(sides[1])


def _checked_boxes(boxes: Any, labels: Any) -> tuple[Tensor, list[str]]:
    """Boxes ``(K, 4)``, none where there are none, and K texts."""
    if boxes is None:
        boxes = torch.empty(0, 4)
    check_dense(boxes, "boxes")
    if boxes.dtype not in (*INT_DTYPES, *FLOAT_DTYPES):
        raise TypeError(f"boxes must be of ints or floating-point, got {str(boxes.dtype).removeprefix('torch.')}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (K, 4), got {tuple(boxes.shape)}")
    _check_values(boxes, "boxes")
    if labels is None:
        labels = [""] * len(boxes)
    labels = as_list(labels, "a list of texts or numbers", "labels")
    if len(labels) != len(boxes):
        raise ValueError(f"labels must have {len(boxes)} entries, one a box, got {len(labels)}")
    return boxes, [str(label) for label in labels]


def _new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _image_grid(rows: int, columns: int, size: tuple[int, int]) -> tuple["Figure", list[list["Axes"]]]:
    """Return a figure with panels for images of ``size`` (height, width) and the two colour scales below them."""
    figure = _new_figure(2.3 * columns, 2.5 * rows * size[0] / size[1] + 0.9)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1] * rows + [0.05])
    panels = [
        [figure.add_subplot(grid[row, column], xticks=[], yticks=[]) for column in range(columns)]
        for row in range(rows)
    ]
    _add_scale(figure, grid[-1, 1:-1], ATTENTION_COLOURS, "spatial attention: mean of |feature| over channels")
    _add_scale(figure, grid[-1, -1], MASK_COLOURS, "weight in the loss (mean 1)")
    return figure, panels


def _add_scale(figure: "Figure", place: "SubplotSpec", colours: str, label: str) -> None:
    """Draw a colour bar without numbers: each panel has its own range."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap=colours), cax=figure.add_subplot(place), orientation="horizontal")
    bar.set_ticks([0.03, 0.97], labels=["lowest", "highest"], fontsize=8)
    bar.ax.tick_params(length=0)
    bar.set_label(label, fontsize=9)


def _draw_boxes(axes: "Axes", boxes: Tensor, labels: list[str]) -> None:
    """Outline ``boxes (K, 4)``, and write each one's label above it."""
    from matplotlib.patches import Rectangle

    for (left, top, right, bottom), label in zip(boxes.tolist(), labels, strict=True):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="white", lw=1.2))
        plate = {"facecolor": "black", "alpha": 0.6, "pad": 1, "linewidth": 0}
        if label:
            axes.text(left, top, label, color="white", fontsize=7, va="bottom", bbox=plate, parse_math=False)


def _draw_heat(axes: "Axes", picture: _Picture, values: Tensor, colours: str) -> None:
    """Lay ``values (h, w)``, which cover the padded area, over the grey picture, and write their range below."""
    (height, width), (padded_height, padded_width) = picture.size, picture.padded_size
    map_height, map_width = values.shape
    rows = -(-map_height * height // padded_height)  # those that the image reaches
    columns = -(-map_width * width // padded_width)
    values = values[:rows, :columns]
    low, high = _finite_range(values)
    right, bottom = columns * padded_width / map_width, rows * padded_height / map_height
    axes.imshow(picture.pixels.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.imshow(
        values.cpu().numpy(),
        cmap=_colour_map(colours),
        vmin=low,
        vmax=high,
        alpha=0.7,
        interpolation="bilinear",
        extent=(-0.5, right - 0.5, bottom - 0.5, -0.5),  # pixels of the image have their centres at whole numbers
    )
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_xlabel(_range_text(values), fontsize=8)


def _colour_map(colours: str) -> "Colormap":
    from matplotlib import colormaps

    return colormaps[colours].with_extremes(bad=NOT_FINITE_COLOUR)


def _draw_channel_row(row: Sequence["Axes"], level: _Level) -> None:
    """Draw the channel attention of both sides and the mask of one level, in three panels."""
    student, teacher = level.student.channel_attention[0], level.teacher.channel_attention[0]  # (Cs,), (Ct,)
    order = teacher.argsort(descending=True)
    own_order = order if len(student) == len(teacher) else student.argsort(descending=True)
    _draw_steps(row[0], f"student, {len(student)} channels", student[own_order], "tab:orange")
    _draw_steps(row[1], f"teacher, {len(teacher)} channels", teacher[order], "tab:purple")
    row[0].sharey(row[1])
    row[0].set_ylabel(level.name, fontsize=10)
    if level.channel_mask is None:
        row[2].set_title("mask", fontsize=10)
        _draw_nothing(row[2], "no channel mask in the loss")
    else:
        _draw_steps(row[2], "mask", level.channel_mask[0][order], "tab:green")


def _draw_steps(axes: "Axes", title: str, values: Tensor, colour: str) -> None:
    """One step a value of ``values (C,)``, filled down to 0."""
    axes.stairs(values.where(values.isfinite(), math.nan).cpu().numpy(), fill=True, color=colour)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.margins(x=0)
    axes.set_xlabel(_range_text(values), fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_nothing(axes: "Axes", reason: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, reason, ha="center", va="center", fontsize=8, transform=axes.transAxes)


def _finite_range(values: Tensor) -> tuple[float, float]:
    """Return the lowest and the highest finite value, 0 and 0 where there is none."""
    finite = values[values.isfinite()]
    return (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)


def _range_text(values: Tensor) -> str:
    missing = int((~values.isfinite()).sum())
    if missing == values.numel():
        return "nothing finite"
    low, high = _finite_range(values)
    return f"{low:.3g} to {high:.3g}" + (f", {missing} not finite" if missing else "")
