"""FGD's loss: boxes on maps, weights, and inside a distiller. tests/test_oracle.py compares it with the authors'."""

import copy

import pytest
import torch
from torch import nn

import fbkd_ops
from fbkd_ops import CWDLoss, Distiller, FGDLoss
from fbkd_ops.losses.boxes import checked_boxes, inside_and_outside

SIZES, IMAGE = [(8, 10), (4, 5)], (64, 80)
BOXES = [torch.tensor([[8.0, 8.0, 40.0, 30.0], [4.0, 2.0, 70.0, 60.0]]), torch.zeros(0, 4)]


def maps(channels=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in SIZES]


def make(student=8, teacher=8, seed=0, **arguments):
    torch.manual_seed(seed)
    loss = FGDLoss(student, teacher, num_levels=2, **arguments)
    for name, parameter in loss.named_parameters():
        if "expand" in name:  # 0 at first
            parameter.data = 0.1 * torch.randn_like(parameter)
    return loss


def on_map(boxes, size=(4, 5), image=(40, 50)):
    """Of one image, whose cells are 10 x 10 pixels."""
    inside, outside = inside_and_outside(torch.tensor([boxes]).reshape(1, -1, 4), image, size)
    return inside[0], outside[0]


def test_a_box_covers_its_cells_and_the_one_behind():
    inside, outside = on_map([[10.0, 0.0, 30.0, 15.0]])
    expected = torch.zeros(4, 5)
    expected[0:3, 1:4] = 1 / 9  # rows 0 to ceil(1.5), columns 1 to 3
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(outside, (expected == 0) / 11)


def test_where_boxes_overlap_the_smaller_one_counts():
    small, _ = on_map([[10.0, 10.0, 11.0, 11.0]])
    large, _ = on_map([[0.0, 0.0, 50.0, 40.0]])
    for order in (1, -1):
        both, outside = on_map([[10.0, 10.0, 11.0, 11.0], [0.0, 0.0, 50.0, 40.0]][::order])
        assert torch.equal(both, torch.maximum(small, large)) and not outside.any()
    assert small.count_nonzero() == 4 and small.max() == 0.25  # thinner than a cell: its own and the one behind
    assert large.unique().tolist() == pytest.approx([1 / 30])  # one more row and column than the map has


@pytest.mark.parametrize(
    "box",
    [
        [60.0, 10.0, 70.0, 20.0],
        [-30.0, 5.0, -10.0, 20.0],
        [10.0, 45.0, 20.0, 50.0],
        [10.0, -9.0, 20.0, 0.0],
        [20.0, 10.0, 20.0, 30.0],
        [30.0, 10.0, 20.0, 30.0],
        [0.0, 0.0, 0.0, 0.0],
        [float("nan")] * 4,
    ],
    ids=["right", "left", "below", "above", "no width", "turned", "zeros", "nan"],
)
def test_a_box_outside_or_without_area_marks_nothing(box):
    inside, outside = on_map([box])
    assert not inside.any() and torch.equal(outside, torch.full((4, 5), 1 / 20))
    other = [10.0, 10.0, 20.0, 20.0]
    for mine, alone in zip(on_map([box, other]), on_map([other]), strict=True):
        assert torch.equal(mine, alone)


def test_a_box_that_leaves_the_image_is_cut():
    inside, _ = on_map([[-20.0, -5.0, 15.0, 400.0]])
    assert inside.count_nonzero() == 4 * 3 and inside.max() == pytest.approx(1 / (5 * 3))


@pytest.mark.parametrize("cells", [100, 167, 7])
def test_a_corner_on_a_cell_s_border_is_in_no_further_cell(cells):
    width = 8 * cells
    for index in range(cells):
        inside, _ = on_map([[8.0 * index, 0.0, 8.0 * index + 1, 8.0]], (1, cells), (8, width))
        assert inside[0].nonzero()[0] == index


def test_no_box_and_many():
    for mine, expected in zip(on_map([]), (torch.zeros(4, 5), torch.full((4, 5), 1 / 20)), strict=True):
        assert torch.equal(mine, expected)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(70, 2, generator=generator) * torch.tensor([50.0, 40.0])
    many = torch.cat([corners, corners + 15 * torch.rand(70, 2, generator=generator) + 1], dim=1)
    inside, _ = on_map(many.tolist())
    assert torch.equal(inside, torch.stack([on_map([box])[0] for box in many.tolist()]).amax(0))


@pytest.mark.parametrize(
    "preset, weights, temperature",
    [
        ("two_stage", (5e-5, 2.5e-5, 5e-5, 5e-7), 0.5),
        ("one_stage", (1e-3, 5e-4, 5e-4, 5e-6), 0.5),
        ("anchor_free", (1.6e-3, 8e-4, 8e-4, 8e-6), 0.8),
    ],
)
def test_presets_and_weights(preset, weights, temperature):
    """Each weight is a factor of its part."""
    students, teachers = [x.requires_grad_() for x in maps(8, 1)], maps(8, 2)
    names = ("foreground_weight", "background_weight", "attention_weight", "global_weight")
    chosen = make(preset=preset)
    terms = chosen(students, teachers, BOXES, IMAGE)
    assert list(terms) == list(FGDLoss.term_names)
    parts = []
    for name in names:
        alone = FGDLoss(8, num_levels=2, temperature=temperature, **{each: float(each == name) for each in names})
        alone.load_state_dict(chosen.state_dict(), strict=False)
        parts.append(sum(alone(students, teachers, BOXES, IMAGE).values()))
    focal = weights[0] * parts[0] + weights[1] * parts[1]
    for term, expected in zip(terms.values(), (focal, weights[2] * parts[2], weights[3] * parts[3]), strict=True):
        torch.testing.assert_close(term, expected)


def test_a_context_that_closes_the_gap_is_no_negative_loss():
    loss = FGDLoss(4, num_levels=1, foreground_weight=0, background_weight=0, attention_weight=0, global_weight=1)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(2, 4, 40, 50, generator=generator)
        gap = 3 * torch.randn(4, generator=generator)
        loss.student_contexts[0].expand.bias.data = gap
        term = loss([teacher - gap[:, None, None]], [teacher], BOXES, IMAGE)["loss_fgd_global"]
        assert 0 <= term < 1e-4 * teacher.square().sum()


def test_the_focal_term_s_literal_formula():
    (student, *_), (teacher, *_) = maps(8, 1), maps(8, 2)
    weights = {"foreground_weight": 0.7, "background_weight": 0.2, "attention_weight": 0, "global_weight": 0}
    term = FGDLoss(8, num_levels=1, temperature=0.5, **weights)([student.requires_grad_()], [teacher], BOXES, IMAGE)
    boxes = torch.nn.utils.rnn.pad_sequence(BOXES, batch_first=True)
    inside, outside = inside_and_outside(boxes, IMAGE, SIZES[0])
    over_pixels, over_channels = teacher.abs().mean(1).flatten(1), teacher.abs().mean((2, 3))
    pixels = (80 * torch.softmax(over_pixels / 0.5, dim=1)).reshape(2, 1, *SIZES[0])
    channels = (8 * torch.softmax(over_channels / 0.5, dim=1))[:, :, None, None]
    weight = (0.7 * inside + 0.2 * outside)[:, None]
    torch.testing.assert_close(
        term["loss_fgd_focal"], (pixels * channels * weight * (student - teacher) ** 2).sum() / 2
    )


def test_a_weight_of_0_leaves_the_part_out_with_its_layers():
    students, teachers = [x.requires_grad_() for x in maps(8, 1)], maps(12, 2)
    loss = make(8, 12, global_weight=[0, 1], attention_weight=0, foreground_weight=[0, 1], background_weight=0)
    assert {name.split(".")[1] for name, _ in loss.named_parameters()} == {"1"}
    students[0].data[0, 0, 0, 0] = float("nan")
    terms = loss(students, teachers, BOXES, IMAGE)
    assert terms["loss_fgd_attention"] == 0 and all(term.isfinite() for term in terms.values())
    nothing = make(**dict.fromkeys(("foreground_weight", "background_weight", "attention_weight", "global_weight"), 0))
    assert all(term == 0 for term in nothing(students, maps(8), BOXES, IMAGE).values())


def test_all_parameters_are_trained():
    students, teachers = [x.requires_grad_() for x in maps(8, 1)], maps(12, 2)
    loss = make(8, 12)
    sum(loss(students, teachers, BOXES, IMAGE).values()).backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None and (parameter.grad.any() or name.endswith("weight.bias")), name
    assert all(x.grad.any() for x in students) and not any(x.requires_grad for x in teachers)


def test_gradcheck():
    loss = make(3, 4).double()
    students, teachers = maps(3, 1, torch.float64), maps(4, 2, torch.float64)

    def total(*students):
        return sum(loss(list(students), teachers, BOXES, IMAGE).values())

    assert torch.autograd.gradcheck(total, [x.requires_grad_() for x in students], fast_mode=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision(dtype, autocast):
    loss, students, teachers = make(8, 12, preset="one_stage"), maps(8, 1, dtype), maps(12, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = loss([x.requires_grad_() for x in students], teachers, BOXES, IMAGE)
    expected = loss([x.detach().float() for x in students], teachers, BOXES, IMAGE)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, expected[name], rtol=2e-2, atol=0)
    gradients = torch.autograd.grad(sum(terms.values()), [*students, *loss.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients) and gradients[0].dtype == dtype


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_layouts(layout):
    loss, students, teachers = make(), maps(8, 1), maps(8, 2)
    expected = loss([x.requires_grad_() for x in students], teachers, BOXES, IMAGE)
    moved = [x.detach().contiguous(memory_format=layout).requires_grad_() for x in students]
    for name, term in loss(moved, teachers, BOXES, IMAGE).items():
        torch.testing.assert_close(term, expected[name])


def test_no_image():
    loss = make()
    students = [torch.zeros(0, 8, *size, requires_grad=True) for size in SIZES]
    terms = loss(students, [torch.zeros(0, 8, *size) for size in SIZES], [], IMAGE)
    sum(terms.values()).backward()
    assert all(term == 0 for term in terms.values()) and students[0].grad.shape == students[0].shape


def test_a_compiled_loss_is_one_graph():
    torch._dynamo.reset()
    loss, students, teachers = make(8, 12), [x.requires_grad_() for x in maps(8, 1)], maps(12, 2)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for count in (*range(20), 40):  # of boxes in an image
        boxes = [torch.rand(count, 4) * 30 + torch.tensor([0.0, 0.0, 34.0, 34.0]), BOXES[0]]
        expected = loss(students, teachers, boxes, IMAGE)
        for name, term in compiled(students, teachers, boxes, IMAGE).items():
            torch.testing.assert_close(term, expected[name])


@pytest.mark.parametrize(
    "boxes, error, message",
    [
        (BOXES[:1], ValueError, "boxes must have one tensor for each of the 2 images, got 1"),
        ([*BOXES[:1], None], TypeError, r"boxes\[1\] must be a tensor \(K, 4\), got NoneType"),
        ([BOXES[0], torch.zeros(3, 5)], ValueError, r"boxes\[1\] must have shape \(K, 4\): .* got \(3, 5\)"),
        (None, TypeError, "boxes must be a list"),
        ([BOXES[0] / 80, BOXES[1]], ValueError, "boxes must be in pixels, but no number is above 1"),
        ([torch.tensor([[40.0, 30.0, 10.0, 12.0]]), BOXES[1]], ValueError, "in 1 of 1 the second corner is left of"),
    ],
)
def test_bad_boxes_are_named(boxes, error, message):
    with pytest.raises(error, match=message):
        make()(maps(), maps(seed=1), boxes, IMAGE)


@pytest.mark.parametrize("size", [64, (64,), (64, 0), (64, "80"), None])
def test_a_bad_image_size_is_named(size):
    with pytest.raises((TypeError, ValueError), match="image_size must be a pair"):
        checked_boxes(BOXES, size, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"preset": "paper"}, ValueError, "preset must be one of 'two_stage', 'one_stage', 'anchor_free', got 'paper'"),
        ({"global_weight": -1}, ValueError, "global_weight must be a number >= 0, got -1"),
        ({"foreground_weight": [1, 2, 3]}, ValueError, "foreground_weight has 3 values"),
        ({"temperature": 0}, ValueError, "temperature must be a number > 0, got 0"),
        ({"student_channels": 1, "teacher_channels": 1}, ValueError, "teacher_channels must be >= 2"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FGDLoss(**{"student_channels": 8, "num_levels": 2, **arguments})


class Detector(nn.Module):
    """Two maps and a loss of its own; images and targets as Hugging Face gives them."""

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.deep = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, pixel_values, labels):
        return {"loss_own": self.deep(self.stem(pixel_values).relu()).square().mean()}


IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))
LABELS = [{"boxes": torch.tensor([[0.5, 0.5, 0.25, 0.5]])}, {"boxes": torch.zeros(0, 4)}]
IN_PIXELS = [torch.tensor([[18.0, 8.0, 30.0, 24.0]]), torch.zeros(0, 4)]


def distiller(loss=None, **options):
    torch.manual_seed(0)
    student, teacher = Detector(8), Detector(12)
    loss = make(8, 12) if loss is None else loss
    return Distiller(student, teacher, loss, student_layers=["stem", "deep"], **options)


def test_in_a_distiller():
    module = distiller()
    losses = module(pixel_values=IMAGES, labels=LABELS)
    assert set(losses) == {"loss_own", *FGDLoss.term_names}
    _, students, teachers = module.run(pixel_values=IMAGES, labels=LABELS)
    for name, term in module.loss(students, teachers, IN_PIXELS, IMAGES.shape[2:]).items():
        torch.testing.assert_close(losses[name], term)
    fbkd_ops.sum_losses(losses).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    report = module.balance_report(pixel_values=IMAGES, labels=LABELS)
    assert [row.name for row in report.distillation] == list(FGDLoss.term_names)


def test_beside_another_loss_and_with_a_share():
    losses = {"fgd": make(8, 12), "cwd": CWDLoss(8, 12, num_levels=2)}
    module = distiller(losses, gradient_share={"fgd": 0.2, "cwd": 0.1}, share_every=1)
    for _ in range(20):
        module.zero_grad()
        fbkd_ops.sum_losses(module(pixel_values=IMAGES, labels=LABELS)).backward()
    for name, share in (("fgd", 0.2), ("cwd", 0.1)):
        assert module.weights()[f"fbkd_gradient_share_{name}"].item() == pytest.approx(share, rel=0.2)


def test_boxes_by_a_function_of_ones_own():
    module = distiller(boxes=lambda pixel_values, labels: (IN_PIXELS, (32, 48)))
    expected = distiller()(pixel_values=IMAGES, labels=LABELS)
    for name, value in module(pixel_values=IMAGES, labels=None).items():
        assert torch.equal(value, expected[name])


def test_idle_steps_need_no_boxes():
    module = distiller(start_step=1)
    idle = module(pixel_values=IMAGES, labels=None)
    assert set(idle) == {"loss_own", *FGDLoss.term_names}
    with pytest.raises(TypeError, match="the loss needs the batch's boxes, but they are not found in Tensor, NoneType"):
        module(pixel_values=IMAGES, labels=None)


def test_a_copy_has_its_own_student():
    original = distiller()
    expected = original(pixel_values=IMAGES, labels=LABELS)
    module = copy.deepcopy(original)
    for parameter in original.parameters():
        parameter.data.fill_(float("nan"))
    for name, value in module(pixel_values=IMAGES, labels=LABELS).items():
        assert torch.equal(value, expected[name])


def test_boxes_are_refused_where_no_loss_needs_them():
    with pytest.raises(ValueError, match="boxes is for a loss that needs them"):
        distiller(CWDLoss(8, 12, num_levels=2), boxes=lambda *_: None)
    with pytest.raises(TypeError, match="boxes must be a function|boxes must be callable"):
        distiller(boxes=3)
