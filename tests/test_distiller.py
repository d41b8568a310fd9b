"""The distiller and its feature taps, on a small detector and on torchvision's own."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import randomise
from torch import nn

from fbkd_ops import Distiller, FBKDLoss
from fbkd_ops.feature_tap import FeatureTap


class Backbone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        fine = self.stem(x).relu()
        return {"fine": fine, "coarse": self.down(fine)}


class Detector(nn.Module):
    """Losses in training, a prediction in eval; counts how often its head runs."""

    def __init__(self, width=4, scalar=False):
        super().__init__()
        self.backbone, self.head = Backbone(width), nn.Conv2d(width, 1, 1)
        self.dropout, self.scalar, self.head_calls = nn.Dropout(0.5), scalar, 0

    def forward(self, images, targets=None):
        features = self.backbone(images)
        self.head_calls += 1
        prediction = self.head(self.dropout(features["coarse"]))
        if not self.training:
            return prediction
        loss = (prediction.mean() - targets).square()
        return loss if self.scalar else {"loss_box": loss, "loss_cls": 2 * loss}


def make_distiller(scalar=False, layers="backbone", teacher_layers=None):
    return Distiller(
        Detector(4, scalar),
        Detector(6),
        randomise(FBKDLoss(4, 6, num_levels=2)),
        student_layers=layers,
        teacher_layers=teacher_layers,
    )


IMAGES, TARGETS = torch.randn(2, 3, 8, 8), torch.tensor(1.0)
TERMS = {"loss_fbkd_feature", "loss_fbkd_channel", "loss_fbkd_spatial", "loss_fbkd_relation"}


def test_adds_the_terms_to_the_students_own_losses():
    distiller = make_distiller()
    losses = distiller(IMAGES, targets=TARGETS)
    assert set(losses) == {"loss_box", "loss_cls"} | TERMS
    with torch.no_grad():
        expected = copy.deepcopy(distiller.loss)(distiller.student.backbone(IMAGES), distiller.teacher.backbone(IMAGES))
    for name, term in expected.items():
        torch.testing.assert_close(losses[name].detach(), term)
        torch.testing.assert_close(distiller.terms()[name], term)
        assert not distiller.terms()[name].requires_grad


def test_gradients_reach_student_and_loss_but_not_the_teacher():
    distiller = make_distiller()
    sum(distiller(IMAGES, TARGETS).values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_a_scalar_loss_stays_a_scalar():
    distiller = make_distiller(scalar=True)
    distiller.student.dropout.p = 0.0
    total = distiller(IMAGES, TARGETS)
    own = distiller.student(IMAGES, TARGETS)
    torch.testing.assert_close(total, own + sum(distiller.terms().values()))


def test_the_teacher_is_in_no_parameters_and_no_checkpoint():
    distiller = make_distiller()
    own = set(distiller.student.parameters()) | set(distiller.loss.parameters())
    assert set(distiller.parameters()) == own
    keys = distiller.state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"student", "loss"}
    assert list(distiller.student.state_dict()) == list(Detector(4).state_dict())


def test_the_teacher_stays_in_eval_and_stops_after_its_backbone():
    distiller = make_distiller()
    teacher = distiller.teacher
    for _ in range(2):
        distiller.train()
        assert not teacher.training and not teacher.dropout.training and distiller.student.training
        teacher.train()  # someone else's .train() is undone before the next step
        distiller(IMAGES, TARGETS)
        assert not teacher.training
    assert teacher.head_calls == 0
    assert distiller.student.head_calls == 2
    teacher(IMAGES)  # outside the distiller the teacher runs whole
    assert teacher.head_calls == 1


def test_eval_mode_is_the_student():
    distiller = make_distiller().eval()
    torch.testing.assert_close(distiller(IMAGES), distiller.student(IMAGES))
    assert distiller.terms() == {}


def test_moves_the_teacher_along():
    distiller = make_distiller().double()
    assert next(distiller.teacher.parameters()).dtype == torch.float64
    losses = distiller(IMAGES.double(), TARGETS.double())
    assert losses["loss_fbkd_relation"].dtype == torch.float64


def test_several_paths_and_other_paths_for_the_teacher():
    distiller = make_distiller(layers=["backbone.stem", "backbone.down"], teacher_layers="backbone")
    losses = distiller(IMAGES, TARGETS)
    assert TERMS <= set(losses)


def test_looks_through_wrappers():
    student = torch.compile(Detector(4), backend="eager")
    tap = FeatureTap(student, "backbone", "student_layers")
    assert tap.paths == ["backbone"]
    wrapped = nn.DataParallel(Detector(4))
    assert FeatureTap(wrapped, "backbone.stem", "student_layers")


def test_a_checkpoint_resumes_to_equal_losses():
    first, second = make_distiller(), make_distiller()
    second.load_state_dict(first.state_dict())
    second.teacher.load_state_dict(first.teacher.state_dict())
    for distiller in (first, second):
        distiller.student.dropout.p = 0.0
    a, b = first(IMAGES, TARGETS), second(IMAGES, TARGETS)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_models_carry_no_hooks_outside_a_step():
    distiller = make_distiller()
    distiller(IMAGES, TARGETS)
    distiller.teacher.backbone.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        distiller(IMAGES, TARGETS)
    for model in (distiller.student, distiller.teacher):
        assert not any(module._forward_hooks for module in model.modules())


def fail(module, inputs):
    raise KeyError("the teacher breaks down")


def test_copies_and_pickles_are_whole_and_apart():
    distiller = make_distiller()
    distiller.student.dropout.p = 0.0
    expected = distiller(IMAGES, TARGETS)
    # The BatchNorm statistics moved, but in training they are not read.
    for other in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        losses = other(IMAGES, TARGETS)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)
        assert other.student is not distiller.student and other.teacher is not distiller.teacher
    average = copy.deepcopy(distiller.student)
    assert set(average(IMAGES, TARGETS)) == {"loss_box", "loss_cls"}


def test_compiled_students_and_teachers():
    plain = make_distiller()
    plain.student.dropout.p = 0.0
    compiled = Distiller(
        torch.compile(copy.deepcopy(plain.student), backend="eager"),
        torch.compile(copy.deepcopy(plain.teacher), backend="eager"),
        copy.deepcopy(plain.loss),
        student_layers="backbone",
    )
    for _ in range(3):
        images = torch.randn(2, 3, 8, 8)
        expected, losses = plain(images, TARGETS), compiled(images, TARGETS)
        assert all(torch.allclose(losses[name], expected[name], rtol=1e-5) for name in expected)


class Twice(Detector):
    def forward(self, images, targets=None):
        self.backbone(images)
        return super().forward(images, targets)


class Never(Detector):
    def forward(self, images, targets=None):
        return {"loss": images.mean()}


class Listing(Detector):
    def forward(self, images, targets=None):
        self.backbone(images)
        return [images.mean()]


@pytest.mark.parametrize(
    "path,message",
    [
        ("neck", r"student_layers: Detector has no module 'neck'; at the top there are 'backbone', 'head', 'dropout'"),
        ("backbone.body", r"no module 'backbone.body'; inside 'backbone' there are 'stem', 'down'"),
        ("head.0.conv", r"no module 'head.0.conv'; inside 'head' there are no modules"),
        ([], r"student_layers is empty"),
        (["head", "head"], r"student_layers names a module path twice: \['head', 'head'\]"),
    ],
)
def test_a_missing_path_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        make_distiller(layers=path)


@pytest.mark.parametrize("path", [None, 5, [5]])
def test_a_path_that_is_no_string_is_named(path):
    with pytest.raises(TypeError, match="student_layers must be a module path or a list of module paths, got"):
        make_distiller(layers=path)


def test_a_path_that_the_teacher_lacks_is_named():
    with pytest.raises(ValueError, match="teacher_layers: Detector has no module 'body'"):
        make_distiller(teacher_layers="body")


@pytest.mark.parametrize(
    "student,error,message",
    [
        (Twice(4), RuntimeError, "student_layers: module 'backbone' was called 2 times in one forward, expected once"),
        (Never(4), RuntimeError, "student_layers: module 'backbone' was called 0 times"),
        (Listing(4), TypeError, "must return a dict of losses or a scalar tensor in training, got list"),
    ],
)
def test_misuse_is_named(student, error, message):
    distiller = Distiller(student, Detector(4), FBKDLoss(4, num_levels=2), student_layers="backbone")
    with pytest.raises(error, match=message):
        distiller(IMAGES, TARGETS)


def test_the_teacher_runs_without_gradient():
    distiller, modes = make_distiller(), []
    distiller.teacher.backbone.register_forward_pre_hook(lambda module, inputs: modes.append(torch.is_grad_enabled()))
    distiller(IMAGES, TARGETS)
    assert modes == [False]


def test_a_failed_step_leaves_no_stale_features():
    """The student fails after its backbone was seen."""
    distiller = make_distiller()
    with pytest.raises(TypeError):
        distiller(IMAGES, "no tensor")
    assert TERMS <= set(distiller(IMAGES, TARGETS))


def test_a_dict_output_under_several_paths_is_named():
    distiller = make_distiller(layers=["backbone", "backbone.down"])
    with pytest.raises(
        TypeError, match="module 'backbone' must return one tensor where several paths are given, got dict"
    ):
        distiller(IMAGES, TARGETS)


def test_a_name_that_is_taken_is_refused():
    class Taken(Detector):
        def forward(self, images, targets=None):
            return {**super().forward(images, targets), "loss_fbkd_feature": images.mean()}

    distiller = Distiller(Taken(4), Detector(4), FBKDLoss(4, num_levels=2), student_layers="backbone")
    with pytest.raises(ValueError, match="already have 'loss_fbkd_feature'"):
        distiller(IMAGES, TARGETS)


def test_student_and_teacher_must_differ():
    model = Detector(4)
    with pytest.raises(ValueError, match="two modules"):
        Distiller(model, model, FBKDLoss(4, num_levels=2), student_layers="backbone")


def test_torchvision_faster_rcnn():
    """Another width, the head skipped in the teacher, and every parameter of the loss trained."""
    torchvision = pytest.importorskip("torchvision")
    detection = torchvision.models.detection

    def build(width):
        backbone = torchvision.models.mobilenet_v3_small(weights=None).features
        return detection.FasterRCNN(
            detection.backbone_utils.BackboneWithFPN(backbone, {"3": "0", "8": "1"}, [24, 48], width),
            num_classes=3,
            min_size=64,
            max_size=64,
            rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3),
        )

    student, teacher = build(16), build(32)
    loss = FBKDLoss(16, 32, num_levels=3)
    distiller = Distiller(student, teacher, loss, student_layers="backbone")
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = distiller(images, targets)
    assert set(losses) >= TERMS | {"loss_classifier", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert all(value.isfinite() for value in losses.values())
    assert len(distiller.eval()(images)) == 2
