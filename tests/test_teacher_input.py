"""What the teacher is given in place of the student's images."""

import copy
import pickle

import pytest
import torch
from detectors import TERMS, Backbone, images, make_distiller
from torch import Tensor, nn

from fbkd_ops import Distiller, FBKDLoss, Renormalize

TARGETS = torch.tensor(1.0)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALVES = ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


def renormalize() -> Renormalize:
    return Renormalize(student=IMAGENET, teacher=HALVES)


def normalized(raw: Tensor, side) -> Tensor:
    mean, std = (torch.tensor(each, dtype=raw.dtype).view(3, 1, 1) for each in side)
    return (raw - mean) / std


RAW = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_renormalized_images_are_the_teachers(dtype, layout):
    given = normalized(RAW, IMAGENET).to(dtype).contiguous(memory_format=layout)
    before = given.clone()
    found = renormalize()(given)
    assert found.dtype == dtype and torch.equal(given, before)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), normalized(RAW, HALVES), rtol=bound, atol=8 * bound)


def test_the_form_of_the_images_stays():
    make, given, expected = renormalize(), normalized(RAW, IMAGENET), normalized(RAW, HALVES)
    mask, ids = torch.ones(2, 8, 8), [1, 2]
    found = [
        make(list(given)),
        make(tuple(given)),
        list(make({"pixel_values": given, "pixel_mask": mask})["pixel_values"]),
        [each["image"] for each in make([{"image": x, "image_id": i} for x, i in zip(given, ids, strict=True)])],
    ]
    for each in found:
        torch.testing.assert_close(torch.stack(list(each)), expected)
    assert isinstance(found[1], tuple)
    assert make({"pixel_values": given, "pixel_mask": mask})["pixel_mask"] is mask


def test_renormalizing_compiles_to_one_graph_and_is_pickled():
    torch._dynamo.reset()
    make, given = renormalize(), normalized(RAW, IMAGENET)
    compiled = torch.compile(make.__call__, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(given), make(given))
    assert torch.equal(pickle.loads(pickle.dumps(make))(given), make(given))


@pytest.mark.parametrize(
    "given,error,message",
    [
        (RAW.byte(), TypeError, "images that are normalised for the student, got torch.uint8: such images are raw"),
        (RAW[:, :1], ValueError, r"numbers for 3 channels, got images of shape \(2, 1, 8, 8\)"),
        (RAW[0, 0], ValueError, r"numbers for 3 channels, got images of shape \(8, 8\)"),
        ({"labels": RAW}, TypeError, r"under 'pixel_values', .* got a dict with \['labels'\]: give teacher_inp"),
        (3, TypeError, "got int"),
    ],
)
def test_other_images_are_named(given, error, message):
    with pytest.raises(error, match=message):
        renormalize()(given)


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (dict(student=IMAGENET[0]), TypeError, r"student must be a pair of lists, \(mean, std\), .* got \[0.485"),
        (dict(teacher=(0.5, 0.5)), TypeError, r"teacher must be a pair of lists, .* got \(0.5, 0.5\)"),
        (dict(teacher=([0.5], [0.5, 0.5])), ValueError, "teacher must be a pair of lists, .* got 1 and 2 numbers"),
        (dict(teacher=([], [])), ValueError, "got 0 and 0 numbers"),
        (dict(teacher=([0.5], [0.5])), ValueError, "numbers for as many channels, got 3 and 1"),
        (dict(student=([0.0] * 3, [1.0, 0.0, 1.0])), ValueError, "student: the std must be a list of numbers > 0, got"),
        (dict(student=([float("nan")] * 3, [1.0] * 3)), ValueError, "student: the mean must be a list of finite numb"),
    ],
)
def test_numbers_that_cannot_be_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Renormalize(**(dict(student=IMAGENET, teacher=HALVES) | arguments))


def test_buffers_of_a_preprocessor_are_numbers_too():
    """MMDetection's are ``(3, 1, 1)``."""
    buffers = [tuple(torch.tensor(each).view(3, 1, 1) for each in side) for side in (IMAGENET, HALVES)]
    torch.testing.assert_close(Renormalize(*buffers)(RAW), renormalize()(RAW), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "value,message",
    [
        (3, "teacher_input must be a function or another callable, got int"),
        ([IMAGENET, HALVES], r"teacher_input must be a function of the images, got a list; .* Renormalize\(student="),
        (dict(mean=[0.5]), r"teacher_input must have the entries 'student' and 'teacher', .* got \['mean'\]"),
    ],
)
def test_a_teacher_input_of_another_kind_is_named_at_construction(value, message):
    with pytest.raises(TypeError, match=message):
        make_distiller(teacher_input=value)


class Seen:
    """What a module is given."""

    def __init__(self, module: nn.Module):
        self.calls = []
        module.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module, args, kwargs):
        self.calls.append((args, kwargs))


@pytest.mark.parametrize("form", ["positional", "keyword", "entry"])
def test_the_teacher_is_given_the_function_of_its_first_argument(form):
    modes = []

    def halved(given):
        modes.append(torch.is_grad_enabled())
        return given / 2

    distiller = make_distiller(teacher_input=halved, teacher_entry="backbone" if form == "entry" else None)
    teacher, student = distiller.teacher.backbone, distiller.student.backbone
    seen, seen_by_student, x = Seen(teacher), Seen(student), images()
    losses = distiller(targets=TARGETS, images=x) if form == "keyword" else distiller(x, TARGETS)
    assert torch.equal(seen.calls[0][0][0], x / 2) and torch.equal(seen_by_student.calls[0][0][0], x)
    assert modes == [False]
    with torch.no_grad():
        expected = copy.deepcopy(distiller.loss)(student(x), teacher(x / 2))
    for name in TERMS:
        torch.testing.assert_close(losses[name].detach(), expected[name])
    assert distiller.balance_report(x, TARGETS).distillation_total.value == pytest.approx(
        float(sum(distiller.terms().values())), rel=1e-5
    )


class Listed(nn.Module):
    """Takes a list of images, as torchvision's detectors do, or by another name, as Hugging Face's."""

    def __init__(self, width: int):
        super().__init__()
        self.backbone = Backbone(width)

    def forward(self, pixel_values, labels=None):
        maps = self.backbone(torch.stack(pixel_values) if isinstance(pixel_values, list) else pixel_values)
        return {"loss_box": maps["coarse"].mean()}


@pytest.mark.parametrize("form", ["list", "keyword", "config"])
def test_lists_and_keywords_of_images(form):
    change = dict(student=IMAGENET, teacher=HALVES) if form == "config" else renormalize()
    loss = FBKDLoss(4, 6, num_levels=2)
    distiller = Distiller(Listed(4), Listed(6), loss, student_layers="backbone", teacher_input=change)
    seen, x = Seen(distiller.teacher.backbone), normalized(RAW, IMAGENET).float()
    if form == "list":
        distiller(list(x), TARGETS)
    else:
        distiller(labels=TARGETS, pixel_values=x)
    torch.testing.assert_close(seen.calls[0][0][0].double(), normalized(RAW, HALVES), rtol=1e-5, atol=1e-5)


def test_an_argument_that_is_not_there_is_named():
    distiller = make_distiller(teacher_input=renormalize())
    (side,) = distiller._sides.values()
    side.first_argument = "pixels"  # as of a teacher whose forward names it so
    message = "teacher_input makes the teacher's first argument, pixels, but the teacher is given 'images', 'targets'"
    with pytest.raises(TypeError, match=message):
        distiller(images=images(), targets=TARGETS)


def test_under_autocast_and_with_a_compiled_student():
    torch._dynamo.reset()
    plain = make_distiller(teacher_input=renormalize())
    plain.student.dropout.p = 0.0
    compiled = copy.deepcopy(plain)
    compiled.student.compile(backend="aot_eager", fullgraph=True)
    x = images()
    expected = plain(x, TARGETS)
    for _ in range(2):
        losses = compiled(x, TARGETS)
    for name in TERMS:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)
    seen = Seen(plain.teacher.backbone)
    with torch.autocast("cpu", torch.bfloat16):
        plain(x, TARGETS)
    torch.testing.assert_close(seen.calls[0][0][0], renormalize()(x))


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3, 1, 1), 2.0))

    def forward(self, x):
        return self.scale * x


def test_a_module_moves_along_and_is_in_no_checkpoint():
    distiller = make_distiller(teacher_input=Learned()).double()
    assert distiller.teacher_input.scale.dtype == torch.float64
    assert not [name for name in distiller.state_dict() if "scale" in name]
    assert all(each is not distiller.teacher_input.scale for each in distiller.parameters())
    sum(distiller(images().double(), TARGETS.double()).values()).backward()
    assert distiller.teacher_input.scale.grad is None
