"""What student and teacher may share, teachers without Python modules, and detectors that resize their images."""

import copy
import warnings

import pytest
import torch
from detectors import TERMS, Backbone, Detector, images, make_distiller
from torch import nn

from fbkd_ops import Distiller, FBKDLoss, FeatureTap, Layer

TARGETS = torch.tensor(1.0)


def share_module(student, teacher):
    teacher.stem = student.backbone.stem


def share_container(student, teacher):
    teacher.backbone = student.backbone


def share_parameter(student, teacher):
    teacher.head.weight = student.head.weight


def share_memory(student, teacher):
    teacher.head.weight.data = student.head.weight.data


def share_buffer(student, teacher):
    anchors = torch.rand(3)
    student.register_buffer("anchors", anchors, persistent=False)
    teacher.backbone.register_buffer("grid", anchors)


@pytest.mark.parametrize(
    "share,message",
    [
        (share_module, r"share the module 'backbone.stem' \(the teacher's 'stem'\), so the teacher would change"),
        (share_container, "share the module 'backbone', so the teacher would change.*copy.deepcopy"),
        (share_parameter, "share the parameter 'head.weight', so"),
        (share_memory, "share the parameter 'head.weight', so"),
        (share_buffer, r"share the buffer 'anchors' \(the teacher's 'backbone.grid'\), so"),
    ],
)
def test_shared_state_is_an_error(share, message):
    student, teacher = Detector(4), Detector(4)
    share(student, teacher)
    for each in (student, torch.compile(student, backend="eager")):
        with pytest.raises(ValueError, match=message):
            Distiller(each, teacher, FBKDLoss(4, num_levels=2), student_layers="backbone")
        message = message.split("'")[0]
    assert teacher.training
    Distiller(student, copy.deepcopy(teacher), FBKDLoss(4, num_levels=2), student_layers="backbone")


def test_stateless_modules_may_be_shared_and_keep_the_students_mode():
    """A library may have one activation for all of its models."""
    student, teacher = Detector(4), Detector(4)
    student.dropout, modes = nn.Dropout(0.5), []
    student.backbone = nn.Sequential(Backbone(4))
    teacher.backbone = nn.Sequential(Backbone(4))
    student.backbone[0].stem = nn.Sequential(student.backbone[0].stem, student.dropout)
    teacher.backbone[0].stem = nn.Sequential(teacher.backbone[0].stem, student.dropout)
    student.dropout.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller = Distiller(student, teacher, FBKDLoss(4, num_levels=2), student_layers="backbone.0")
        assert student.dropout.training
        for _ in range(2):
            assert set(distiller(images(), TARGETS)) >= TERMS
            assert student.dropout.training and not teacher.backbone.training
    assert modes == [True, True, False] * 2  # the student's two calls, the teacher's one


def test_a_shared_activation_keeps_the_warning_of_a_teacher_in_training_mode():
    distiller = make_distiller()
    distiller.teacher.dropout.train()
    with pytest.warns(UserWarning, match="the teacher was in training mode"):
        distiller(images(), TARGETS)
    assert not distiller.teacher.dropout.training


class Trunk(nn.Module):
    """With modules whose mode matters."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.5))

    def forward(self, images, targets):
        return [self.backbone(images)]


def first(output):
    return output[0]


def scripted(trunk):
    return torch.jit.script(trunk)


def traced(trunk):
    return torch.jit.trace(trunk.eval(), (images(), TARGETS))


def frozen(trunk):
    return torch.jit.freeze(torch.jit.script(trunk.eval()))


def exported(trunk):
    return torch.export.export(trunk.eval(), (images(), TARGETS)).module()


class Nested(nn.Module):
    """A graph inside a Python module."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def forward(self, images, targets):
        return self.graph(images, targets)


FILES = [scripted, traced, frozen, exported, lambda trunk: Nested(exported(trunk)), lambda trunk: Nested(traced(trunk))]


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("layers", [list, Layer("", select=first), ""])
@pytest.mark.parametrize("make", FILES)
def test_teachers_without_python_modules_give_their_output(make, layers):
    trunk = Trunk()
    teacher, x = make(trunk), images()
    distiller = make_distiller(layers=["backbone.stem"])
    arguments = dict(student_layers=["backbone.stem"], teacher_layers=layers)
    distiller = Distiller(distiller.student, teacher, FBKDLoss(4, 6, num_levels=1), **arguments)
    losses = distiller(x, TARGETS)
    expected = copy.deepcopy(distiller.loss)([distiller.student.backbone.stem(x)], trunk.eval()(x, TARGETS))
    for name in TERMS:
        torch.testing.assert_close(losses[name], expected[name])
    assert int(trunk.backbone[1].num_batches_tracked) == 0


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("make", FILES)
def test_paths_inside_such_a_teacher_are_an_error_that_says_why(make):
    teacher = make(Trunk())
    path = "graph.backbone" if isinstance(teacher, Nested) else "backbone"
    if make is frozen:
        path = ""
        with pytest.raises(ValueError, match="teacher_layers: '' is inside TorchScript"):
            FeatureTap(teacher, path, name="teacher_layers")
        return
    with pytest.raises(ValueError, match=f"teacher_layers: '{path}' is inside .* without the modules' hooks.*function"):
        Distiller(Detector(4), teacher, FBKDLoss(4, 6), student_layers=["backbone.stem"], teacher_layers=[path])


def test_modules_that_a_traced_graph_calls_are_caught():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.ReLU())
    graph = torch.fx.symbolic_trace(model)
    with FeatureTap(graph, ["0.0", "1"]) as tap:
        output = graph(images())
    assert tap.features()[1] is output
    with pytest.raises(ValueError, match="'0' is inside a traced graph"):
        FeatureTap(graph, "0")


@pytest.mark.parametrize("module", [nn.BatchNorm2d(3), nn.Dropout(0.5)])
def test_a_teacher_exported_in_training_mode_is_an_error(module):
    teacher = torch.export.export(nn.Sequential(module), (images(),)).module()
    with pytest.raises(ValueError, match=r"exported in training mode.*export teacher.eval\(\)"):
        Distiller(Detector(4), teacher, FBKDLoss(4, 3), student_layers=["backbone.stem"], teacher_layers=list)


def test_an_output_of_the_teacher_beside_an_entry_is_an_error():
    with pytest.raises(ValueError, match="teacher_layers reads the teacher's output, but with teacher_entry"):
        make_distiller(teacher_entry="backbone", teacher_layers=lambda output: output)


def faster_rcnn(**sizes):
    detection = pytest.importorskip("torchvision").models.detection
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8, padding=1))
    trunk.out_channels = 4
    anchors = detection.anchor_utils.AnchorGenerator(((16,),), ((1.0,),))
    return detection.FasterRCNN(trunk, num_classes=2, rpn_anchor_generator=anchors, **sizes)


def distil_rcnn(student_sizes, teacher_sizes, **arguments):
    models = faster_rcnn(**student_sizes), faster_rcnn(**teacher_sizes)
    return Distiller(*models, FBKDLoss(4), student_layers="backbone", **arguments)


SEVERAL, SINGLE = dict(min_size=(64, 80, 96), max_size=128), dict(min_size=96, max_size=128)


@pytest.mark.parametrize(
    "student,teacher,message",
    [
        (SEVERAL, SEVERAL, r"one of \[\(64, 128\), .*\] and the teacher to \(96, 128\).*teacher_entry"),
        (SEVERAL, SINGLE, "teacher_entry"),
        (SINGLE, dict(min_size=80, max_size=128), r"in training to \(96, 128\) and the teacher to \(80, 128\)"),
        (SINGLE, dict(min_size=96, max_size=160), "teacher_entry"),
        (SINGLE | dict(_skip_resize=True), SINGLE, "in training to no other size and the teacher to"),
    ],
)
def test_detectors_that_resize_to_other_sizes_need_an_entry(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        distil_rcnn(student, teacher)
    distil_rcnn(student, teacher, teacher_entry="backbone")


def test_detectors_that_resize_to_one_size_need_none():
    distiller = distil_rcnn(SINGLE, SINGLE)
    assert distiller.teacher.transform.min_size == (96,)
    distil_rcnn(SINGLE, SEVERAL)  # the teacher takes its last one
    distil_rcnn(dict(fixed_size=(64, 64)), dict(fixed_size=(64, 64), min_size=(8, 9)))


@pytest.mark.parametrize("has_parameters", [True, False])
def test_idle_terms_and_reports_are_where_the_student_is(has_parameters):
    """Whatever PyTorch's default device."""
    distiller, x = make_distiller(start_step=100), images()
    distiller.loss.requires_grad_(has_parameters)
    with torch.device("meta"):
        losses = distiller(x, TARGETS)
        report = distiller.balance_report(x, TARGETS)
    assert all(loss.device.type == "cpu" for loss in losses.values())
    assert report.own_total.value > 0 and report.distillation_total.value > 0


def test_an_exported_program_is_told_from_its_module():
    program = torch.export.export(Detector(4).eval(), (images(),))
    with pytest.raises(TypeError, match=r"teacher must be .* got ExportedProgram: its module\(\) is one"):
        Distiller(Detector(4), program, FBKDLoss(4, num_levels=2), student_layers="backbone")


class WithFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        maps = self.backbone(images)
        return {"loss": maps.square().mean(), "maps": maps}


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_student_of_torchscript_learns():
    student = torch.jit.script(WithFeatures())
    arguments = dict(student_layers=lambda output: output["maps"], teacher_layers="backbone")
    distiller = Distiller(student, WithFeatures(), FBKDLoss([4]), **arguments).train()
    distiller(images())["loss"].backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
