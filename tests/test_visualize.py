"""What the pictures show: the loss's own attention maps and masks, at the right place and under the right title."""

import io
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomise
from matplotlib.patches import Rectangle

from fbkd_ops import FBKDLoss
from fbkd_ops.functional import attention_mask, attention_pool
from fbkd_ops.visualize import attention, channel_attention

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(8, 12), (4, 6), (1, 1)]
IMAGE = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(1))


def pyramid(channels, seed=0, dtype=torch.float32, sizes=SIZES, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *size, generator=generator).to(dtype) for size in sizes]


def rows_of(figure):
    """The panels row by row, without the colour scales."""
    columns = figure.axes[0].get_gridspec().ncols
    panels = [axes for axes in figure.axes if axes.images or axes.texts]
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def heat(axes):
    """The map that lies over the image."""
    return torch.from_numpy(axes.images[1].get_array().filled(math.nan))


def steps(axes):
    (patch,) = axes.patches
    return torch.from_numpy(patch.get_data().values)


def titles(row):
    return [axes.get_title() for axes in row]


def render(figure):
    """The figure as a browser would show it: finds what only fails when drawn."""
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return file.getvalue()


def joint_mask(student, teacher, temperature=0.5):
    return attention_mask(student, teacher, temperature=temperature, mask_rule="joint")


# Spatial attention


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float64)])
def test_maps_and_masks_are_the_functional_ones(dtypes):
    student, teacher = pyramid(4, 0, dtypes[0]), pyramid(6, 1, dtypes[1])
    rows = rows_of(attention(IMAGE, student, teacher, index=1))
    assert len(rows) == 3 and titles(rows[0]) == ["image", "student", "teacher", "mask"]
    assert titles(rows[1]) == titles(rows[2]) == [""] * 4, "titles stand above the first row only"
    for row, s, t in zip(rows, student, teacher, strict=True):
        maps = [attention_pool(side).spatial_attention for side in (s, t)]
        assert torch.equal(heat(row[1]), maps[0][1]) and torch.equal(heat(row[2]), maps[1][1])
        torch.testing.assert_close(heat(row[3]), joint_mask(*maps)[1])


def test_the_loss_gives_each_level_its_temperature_and_rule():
    student, teacher = pyramid(4, 0), pyramid(4, 1)
    rules, temperatures = ["average", "joint", "joint"], [0.5, 0.05, 2.0]
    loss = FBKDLoss(4, num_levels=3, mask_rule=rules, spatial_temperature=temperatures)
    drawn = [heat(row[-1]) for row in rows_of(attention(IMAGE, student, teacher, loss=loss))]
    for values, s, t, rule, temperature in zip(drawn, student, teacher, rules, temperatures, strict=True):
        maps = [attention_pool(side).spatial_attention for side in (s, t)]
        expected = attention_mask(*maps, temperature=temperature, mask_rule=rule)[0]
        torch.testing.assert_close(values, expected)


def test_a_level_without_a_feature_term_has_no_mask():
    loss = FBKDLoss(4, num_levels=3, feature_weight=[1.0, 0, 1.0])
    rows = rows_of(attention(IMAGE, pyramid(4), pyramid(4, 1), loss=loss))
    assert [len(row[-1].images) for row in rows] == [2, 0, 2]
    assert rows[1][-1].texts[0].get_text() == "no feature term"


def test_others_stand_before_the_student_and_leave_the_mask_alone():
    student, teacher = pyramid(4), pyramid(6, 1)
    others = {"plain": pyramid(4, 2), "older": tuple(pyramid(3, 3, torch.bfloat16))}
    titled = dict(others=others, student_title="distilled", teacher_title="big")
    rows = rows_of(attention(IMAGE, student, teacher, index=1, **titled))
    assert titles(rows[0]) == ["image", "plain", "older", "distilled", "big", "mask"]
    alone = rows_of(attention(IMAGE, student, teacher, index=1))
    for row, bare, *features in zip(rows, alone, *others.values(), strict=True):
        for axes, feature in zip(row[1:3], features, strict=True):
            assert torch.equal(heat(axes), attention_pool(feature).spatial_attention[1])
        assert all(torch.equal(heat(one), heat(other)) for one, other in zip(row[3:], bare[1:], strict=True))


def test_dicts_are_matched_by_key_in_the_students_order():
    student = dict(zip(("p3", "p4", "p5"), pyramid(4), strict=True))
    teacher, other = ({"p5": p5, "p3": p3, "p4": p4} for p3, p4, p5 in (pyramid(6, 1), pyramid(5, 2)))
    rows = rows_of(attention(IMAGE, student, teacher, others={"other": other}))
    assert [row[0].get_ylabel() for row in rows] == ["p3, stride 4", "p4, stride 8", "p5, stride 48"]
    for key, row in zip(student, rows, strict=True):
        for axes, features in zip(row[1:4], (other, student, teacher), strict=True):
            assert torch.equal(heat(axes), attention_pool(features[key]).spatial_attention[0])
    rows = rows_of(attention(IMAGE, list(student.values()), {key: teacher[key] for key in student}))
    assert [row[0].get_ylabel().split(",")[0] for row in rows] == ["p3", "p4", "p5"]


def test_only_the_asked_levels_are_drawn():
    student, teacher = pyramid(4), pyramid(6, 1)
    loss = FBKDLoss([4] * 3, [6] * 3, spatial_temperature=[0.1, 0.5, 0.9])
    everything = rows_of(attention(IMAGE, student, teacher, loss=loss, others={"other": student}))
    chosen = rows_of(attention(IMAGE, student, teacher, loss=loss, others={"other": student}, levels=[2, 0]))
    assert [row[0].get_ylabel() for row in chosen] == ["level 2, stride 48", "level 0, stride 4"]
    for position, row in zip((2, 0), chosen, strict=True):
        assert all(torch.equal(heat(a), heat(b)) for a, b in zip(row[1:], everything[position][1:], strict=True))


@pytest.mark.parametrize("padded", [None, (32, 48), (40, 70), (64, 96)])
def test_maps_lie_where_their_pixels_are(padded):
    """Without the cells that only cover padding, and each cell over its own pixels."""
    student = pyramid(4, sizes=[(8, 12)])
    ((_, axes, *_),) = rows_of(attention(IMAGE, student, student, padded_size=padded))
    height, width = padded or (32, 48)
    rows, columns = math.ceil(32 * 8 / height), math.ceil(48 * 12 / width)
    assert torch.equal(heat(axes), attention_pool(student[0]).spatial_attention[0, :rows, :columns])
    left, right, bottom, top = axes.images[1].get_extent()
    assert (left, top) == (-0.5, -0.5)
    assert (right + 0.5, bottom + 0.5) == pytest.approx((columns * width / 12, rows * height / 8))
    assert axes.get_xlim() == (-0.5, 47.5) and axes.get_ylim() == (31.5, -0.5)


def test_colours_and_text_tell_the_range_over_the_image():
    student = torch.full((1, 1, 4, 4), 2.0)
    student[0, 0, 0, 0], student[0, 0, 3, 3] = -7.0, 100.0  # the last one covers padding only
    ((_, axes, *_),) = rows_of(attention(IMAGE, [student], [student], padded_size=(64, 96)))
    assert axes.get_xlabel() == "2 to 7" and axes.images[1].get_clim() == (2, 7)


@pytest.mark.parametrize("bytes_or_floats", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_the_image_is_shown_as_it_is(bytes_or_floats):
    pixels = (IMAGE * 255).to(torch.uint8)
    image = pixels if bytes_or_floats == torch.uint8 else (pixels / 255).to(bytes_or_floats)
    ((axes, under, *_),) = rows_of(attention(image, pyramid(4)[:1], pyramid(4)[:1]))
    shown = torch.from_numpy(axes.images[0].get_array().filled())
    tolerance = dict(rtol=0, atol=2**-8 if bytes_or_floats == torch.bfloat16 else 1e-6)
    torch.testing.assert_close(shown, pixels.permute(1, 2, 0) / 255, **tolerance)
    grey = torch.from_numpy(under.images[0].get_array().filled())
    torch.testing.assert_close(grey, pixels.float().mean(0) / 255, **tolerance)


def test_boxes_and_labels():
    boxes = torch.tensor([[4.0, 2, 14, 8], [20, 10, 40, 30]])
    rows = rows_of(attention(IMAGE, pyramid(4), pyramid(4), boxes=boxes, labels=["cat", 7]))
    for row in rows:
        drawn = [patch for patch in row[0].patches if isinstance(patch, Rectangle)]
        corners = [[*box.get_xy(), box.get_x() + box.get_width(), box.get_y() + box.get_height()] for box in drawn]
        assert corners == boxes.tolist()
        assert [(text.get_text(), text.get_position()) for text in row[0].texts] == [("cat", (4, 2)), ("7", (20, 10))]
        assert not any(axes.patches for axes in row[1:])
    row = rows_of(attention(IMAGE, pyramid(4), pyramid(4), boxes=boxes.int(), labels=torch.tensor([3, 5])))[0]
    assert [text.get_text() for text in row[0].texts] == ["3", "5"]
    row = rows_of(attention(IMAGE, pyramid(4), pyramid(4), boxes=boxes))[0]
    assert len(row[0].patches) == 2 and not row[0].texts


def test_a_nan_is_seen_and_counted():
    student, teacher = pyramid(4), pyramid(4, 1)
    student[0][0, 2, 3, 5], student[0][0, 2, 0, 0] = math.nan, math.inf
    figure = attention(IMAGE, student, teacher)
    row = rows_of(figure)[0]
    finite = attention_pool(student[0]).spatial_attention[0].isfinite()
    assert torch.equal(heat(row[1]).isfinite(), finite) and int((~finite).sum()) == 2
    assert row[1].get_xlabel().endswith(", 2 not finite")
    assert row[2].get_xlabel().count("finite") == 0 and row[3].get_xlabel() == "nothing finite"
    assert row[1].images[1].cmap.get_bad().tolist() == [0, 1, 1, 1]
    assert render(figure) != render(attention(IMAGE, [student[0].nan_to_num(1, 1), *student[1:]], teacher))


def test_figures_can_be_rendered():
    figures = [attention(IMAGE, pyramid(4), pyramid(6, 1)), channel_attention(pyramid(1), pyramid(1, 1))]
    assert all(render(figure).startswith(b"\x89PNG") for figure in figures)


def test_features_with_gradient_are_drawn_and_left_alone():
    layer = torch.nn.Conv2d(3, 4, 1)
    student = [layer(IMAGE[None])]
    state = torch.get_rng_state()
    attention(IMAGE.clone().requires_grad_(), student, student)
    channel_attention(student, student)
    assert layer.weight.grad is None and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state), "a picture must not change what is drawn at random later"


def test_a_picture_changes_nothing_in_the_loss():
    loss = randomise(FBKDLoss(4, num_levels=3, preset="one_stage"))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    attention(IMAGE, pyramid(4), pyramid(4), loss=loss)
    channel_attention(pyramid(4), pyramid(4), loss=loss)
    assert loss.training and all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


# Channel attention


def expected_channels(student, teacher, index=0):
    return [attention_pool(side).channel_attention[index] for side in (student, teacher)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_stand_in_the_teachers_order(dtype):
    student, teacher = pyramid(9, 0, dtype), pyramid(9, 1)
    figure = channel_attention(student, teacher, index=1)
    rows = [figure.axes[start : start + 3] for start in range(0, 9, 3)]
    assert len(figure.axes) == 9
    for row, s, t in zip(rows, student, teacher, strict=True):
        assert titles(row) == ["student, 9 channels", "teacher, 9 channels", "mask"]
        of_student, of_teacher = expected_channels(s, t, 1)
        order = of_teacher.argsort(descending=True)
        assert torch.equal(steps(row[0]), of_student[order]) and torch.equal(steps(row[1]), of_teacher[order])
        torch.testing.assert_close(steps(row[2]), joint_mask(of_student[None], of_teacher[None])[0][order])
    assert [row[0].get_ylabel() for row in rows] == ["level 0", "level 1", "level 2"]


def test_other_widths_stand_in_their_own_order_and_the_mask_is_the_teachers():
    student, teacher = pyramid(5)[:1], pyramid(9, 1)[:1]
    row = channel_attention({"p3": student[0]}, {"p3": teacher[0]}).axes
    of_student, of_teacher = expected_channels(student[0], teacher[0])
    assert titles(row)[:2] == ["student, 5 channels", "teacher, 9 channels"] and row[0].get_ylabel() == "p3"
    assert torch.equal(steps(row[0]), of_student.sort(descending=True).values)
    assert torch.equal(steps(row[1]), of_teacher.sort(descending=True).values)
    alone = joint_mask(None, of_teacher[None])[0]
    torch.testing.assert_close(steps(row[2]), alone[of_teacher.argsort(descending=True)])


def test_the_loss_adapts_a_student_of_another_width_for_the_mask():
    student, teacher = pyramid(5)[:1], pyramid(9, 1)[:1]
    loss = randomise(FBKDLoss([5], [9], preset="one_stage"))
    row = channel_attention(student, teacher, loss=loss).axes
    of_student, of_teacher = expected_channels(student[0], teacher[0])
    adapted = loss.levels[0].channel_adaptation(of_student[None])
    expected = attention_mask(adapted, of_teacher[None], temperature=0.1)[0]
    torch.testing.assert_close(steps(row[2]), expected[of_teacher.argsort(descending=True)])


@pytest.mark.parametrize(
    "overrides", [dict(preset="two_stage"), dict(preset="one_stage", feature_weight=0, channel_weight=0)]
)
def test_a_loss_without_a_channel_mask_says_so(overrides):
    loss = FBKDLoss([5], [9], **overrides)
    row = channel_attention(pyramid(5)[:1], pyramid(9, 1)[:1], loss=loss).axes
    assert row[2].get_title() == "mask" and not row[2].patches
    assert row[2].texts[0].get_text() == "no channel mask in the loss"


def test_channels_that_are_not_finite_are_counted():
    student, teacher = pyramid(5)[:1], pyramid(5, 1)[:1]
    student[0][0, 2], student[0][0, 3] = math.nan, -math.inf
    figure = channel_attention(student, teacher)
    assert render(figure)
    row = figure.axes
    assert int(steps(row[0]).isnan().sum()) == 2 and row[0].get_xlabel().endswith(", 2 not finite")
    assert row[1].get_xlabel().count("finite") == 0 and row[2].get_xlabel() == "nothing finite"


# Arguments


FEATURES = pyramid(4)
BAD_IMAGES = [
    (IMAGE.numpy(), TypeError, "image must be a torch.Tensor, got ndarray"),
    (IMAGE.int(), TypeError, "image must be of uint8 or floating-point, got int32"),
    (IMAGE[None], ValueError, r"image must have shape \(3, H, W\), got \(1, 3, 32, 48\)"),
    (IMAGE[:1], ValueError, r"image must have shape \(3, H, W\), got \(1, 32, 48\)"),
    (IMAGE[:, :0], ValueError, r"image must have shape \(3, H, W\), got \(3, 0, 48\)"),
    (IMAGE * 255, ValueError, r"image must be in 0..1 \(or uint8\), got .* to 255"),
    (IMAGE - 0.5, ValueError, r"image must be in 0..1 \(or uint8\), got -0.5 to 0.5"),
    (IMAGE * math.nan, ValueError, r"image must be in 0..1 \(or uint8\), got nan to nan"),
]
BAD_ARGUMENTS = [
    (dict(padded_size=(31, 48)), ValueError, r"padded_size must be .* the image's \(32, 48\), got \(31, 48\)"),
    (dict(padded_size=64), ValueError, "padded_size must be two ints, .* got 64"),
    (dict(padded_size=(64.0, 64.0)), ValueError, r"padded_size must be two ints, .* got \(64.0, 64.0\)"),
    (dict(boxes=[[0, 0, 1, 1]]), TypeError, "boxes must be a torch.Tensor, got list"),
    (dict(boxes=torch.zeros(4)), ValueError, r"boxes must have shape \(K, 4\), got \(4,\)"),
    (dict(boxes=torch.zeros(2, 5)), ValueError, r"boxes must have shape \(K, 4\), got \(2, 5\)"),
    (dict(boxes=torch.zeros(2, 4), labels=["one"]), ValueError, "labels must have 2 entries, one a box, got 1"),
    (dict(labels=["one"]), ValueError, "labels must have 0 entries, one a box, got 1"),
    (dict(boxes=torch.zeros(1, 4), labels="a"), TypeError, "labels must be a list of texts or numbers, got str"),
    (dict(others=FEATURES), TypeError, "others must be a dict of features by title, got list"),
    (dict(others={"plain": FEATURES[:2]}), ValueError, r"others\['plain'\] must have the same number of levels, got 3"),
    (dict(others={"plain": FEATURES[::-1]}), ValueError, r"others\['plain'\]\[0\] must agree in N, H and W"),
]
BAD_SELECTIONS = [
    (dict(index=2), ValueError, "index must be an int >= 0 and below the number of images, 2, got 2"),
    (dict(index=-1), ValueError, "index must be an int .* got -1"),
    (dict(index=0.0), ValueError, "index must be an int .* got 0.0"),
    (dict(index=True), ValueError, "index must be an int .* got True"),
    (dict(levels=[0, 3]), ValueError, "levels must be ints >= 0 and below the number of levels, 3, got 3"),
    (dict(levels=[-1]), ValueError, "levels must be ints .* got -1"),
    (dict(levels=[]), ValueError, r"levels must be a list of at least one position, got \[\]"),
    (dict(levels=2), ValueError, "levels must be a list of at least one position, got 2"),
    (dict(loss="two_stage"), TypeError, "loss must be an FBKDLoss or None, got str"),
    (dict(loss=FBKDLoss(4, num_levels=2)), ValueError, "student_features must have 2 levels, .* got 3"),
    (dict(loss=FBKDLoss(5, num_levels=3)), ValueError, r"student_features\[0\] must have 5 channels, got 4"),
    (dict(loss=FBKDLoss([4] * 3, [4, 4, 6])), ValueError, r"teacher_features\[2\] must have 6 channels, got 4"),
    (dict(loss=FBKDLoss(4, num_levels=3).to("meta")), ValueError, "on one device, got cpu and meta"),
    (dict(teacher=FEATURES[:2]), ValueError, "student_features and teacher_features must have the same number of lev"),
    (dict(teacher=FEATURES[::-1]), ValueError, r"student_features\[0\] and teacher_features\[0\] must agree in N, H"),
    (dict(teacher=FEATURES[0]), TypeError, "teacher_features must be a list, tuple or dict"),
]


@pytest.mark.parametrize("image, error, message", BAD_IMAGES)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        attention(image, FEATURES, FEATURES)


@pytest.mark.parametrize("arguments, error, message", BAD_ARGUMENTS)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        attention(IMAGE, FEATURES, FEATURES, **arguments)


@pytest.mark.parametrize("arguments, error, message", BAD_SELECTIONS)
def test_bad_features_and_selections(arguments, error, message):
    arguments = dict(arguments)
    pair = FEATURES, arguments.pop("teacher", FEATURES)
    for call in (lambda **rest: attention(IMAGE, *pair, **rest), lambda **rest: channel_attention(*pair, **rest)):
        with pytest.raises(error, match=message):
            call(**arguments)


def test_an_image_that_resizing_carried_out_of_its_range_is_fine(caplog):
    image = IMAGE.clone()
    image[0, 0, 0], image[0, 0, 1] = 1 + 1e-6, -1e-6
    shown = rows_of(attention(image, FEATURES, FEATURES))[0][0].images[0].get_array()
    assert shown.min() == 0 and shown.max() == 1 and not caplog.records, "matplotlib warns of colours out of range"


# Without matplotlib


def test_matplotlib_is_needed_for_drawing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    features = [torch.zeros(1, 1, 2, 2)]
    for call in (
        lambda: attention(torch.zeros(3, 4, 4), features, features),
        lambda: channel_attention(features, features),
    ):
        with pytest.raises(ImportError, match="^fbkd_ops.visualize needs matplotlib: pip install matplotlib$"):
            call()


def test_matplotlib_is_imported_to_draw_and_pyplot_never():
    """Nor is the compiler, by the package's import."""
    code = """
import sys, torch, fbkd_ops.visualize
print([name in sys.modules for name in ("matplotlib", "torch._dynamo")])
features = [torch.ones(1, 2, 2, 2)]
fbkd_ops.visualize.attention(torch.zeros(3, 4, 4), features, features)
print([name in sys.modules for name in ("matplotlib", "matplotlib.pyplot")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[False, False]", "[True, False]"], done.stderr


# Documentation


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "training.md").read_text()
    (code,) = re.findall(r"((?:^    .*\n)*^    .*visualize\.attention.*\n(?:^    .*\n)*)", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names = dict(image=IMAGE, student_features=FEATURES, teacher_features=FEATURES, loss=FBKDLoss(4, num_levels=3))
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), names)
    assert (tmp_path / "attention.png").stat().st_size > 1000
