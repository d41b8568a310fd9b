"""The score-weighted loss: its formula, and the scores that teachers' heads give."""

import copy

import pytest
import torch
from torch import nn

import fbkd_ops
from fbkd_ops import CWDLoss, Distiller, ScoreWeightedLoss
from fbkd_ops.training import teacher_scores

SIZES = [(8, 10), (4, 5)]
TERM = "loss_score_weighted"


def maps(channels=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in SIZES]


def some_scores(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2, *size, generator=generator) for size in SIZES]


def literal(student, teacher, score):
    return (score[:, None] * (student - teacher) ** 2).sum() / (student.shape[1] * score.sum())


@pytest.mark.parametrize("weight", [1.0, [0.5, 2.0]])
def test_the_literal_formula(weight):
    students, teachers, scores = [x.requires_grad_() for x in maps(seed=1)], maps(seed=2), some_scores()
    term = ScoreWeightedLoss(8, num_levels=2, weight=weight)(students, teachers, scores)[TERM]
    weights = weight if isinstance(weight, list) else [weight] * 2
    expected = sum(w * literal(*level) for w, *level in zip(weights, students, teachers, scores, strict=True))
    torch.testing.assert_close(term, expected)
    gradients = [torch.autograd.grad(each, students) for each in (term, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_level_of_weight_0_is_left_out():
    students, teachers, scores = [x.requires_grad_() for x in maps(seed=1)], maps(seed=2), some_scores()
    students[0].data[0, 0, 0, 0] = float("nan")
    term = ScoreWeightedLoss(8, num_levels=2, weight=[0, 3])(students, teachers, scores)[TERM]
    torch.testing.assert_close(term, 3 * literal(students[1], teachers[1], scores[1]))


def test_only_the_proportions_of_the_scores_count():
    students, teachers, scores = maps(seed=1), maps(seed=2), some_scores()
    loss = ScoreWeightedLoss(8, num_levels=2).eval()
    terms = [loss(students, teachers, [factor * each for each in scores])[TERM] for factor in (1, 1e-3)]
    torch.testing.assert_close(*terms)
    even = loss(students, teachers, [torch.ones_like(each) for each in scores])[TERM]
    torch.testing.assert_close(even, sum((s - t).square().mean() for s, t in zip(students, teachers, strict=True)))


def test_no_score_at_all_is_a_loss_of_0():
    students = [x.requires_grad_() for x in maps(seed=1)]
    nothing = [torch.zeros_like(each) for each in some_scores()]
    term = ScoreWeightedLoss(8, num_levels=2)(students, maps(seed=2), nothing)[TERM]
    term.backward()
    assert term == 0 and not any(x.grad.any() for x in students)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_widths_and_sizes(dtype):
    torch.manual_seed(0)
    loss = ScoreWeightedLoss(8, 12, num_levels=2, resize="student").double()
    students = [torch.randn(2, 8, 16, 20).to(dtype).requires_grad_(), maps(8, 1, dtype)[1].requires_grad_()]
    term = loss(students, maps(12, 2, dtype), some_scores())[TERM]
    term.backward()
    assert term.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(x.grad.isfinite().all() and x.grad.any() for x in [*students, *loss.parameters()])


def test_a_compiled_loss_is_one_graph():
    torch._dynamo.reset()
    loss, students = ScoreWeightedLoss(8, num_levels=2), [x.requires_grad_() for x in maps()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    given = students, maps(seed=1), some_scores()
    torch.testing.assert_close(compiled(*given)[TERM], loss(*given)[TERM])


@pytest.mark.parametrize(
    "scores, error, message",
    [
        (some_scores()[:1], ValueError, "scores must have one map for each of the 2 levels, got 1"),
        (maps(), ValueError, r"scores\[0\] must have shape \(2, 8, 10\), as the teacher's map, got \(2, 8, 8, 10\)"),
        ([None, None], TypeError, r"scores\[0\] must be a floating-point tensor \(N, H, W\), got NoneType"),
        ([each.long() for each in some_scores()], TypeError, "must be a floating-point tensor"),
        (None, TypeError, "scores must be a list of maps"),
    ],
)
def test_bad_scores_are_named(scores, error, message):
    with pytest.raises(error, match=message):
        ScoreWeightedLoss(8, num_levels=2)(maps(), maps(seed=1), scores)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"student_channels": 8}, "num_levels is needed: the loss fits any number of levels"),
        ({"student_channels": 8, "num_levels": 2, "resize": "teacher"}, "resize must be None or 'student'"),
        ({"student_channels": 8, "num_levels": 2, "weight": -1}, "weight must be a number >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScoreWeightedLoss(**arguments)


class Detector(nn.Module):
    """Two maps, a head that scores them, and a loss."""

    def __init__(self, channels, stride=2):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride, 1)
        self.deep = nn.Conv2d(channels, channels, 3, 2, 1)
        self.scorer = nn.Conv2d(channels, 1, 1)

    def forward(self, images):
        return {"loss_own": self.scorer(self.deep(self.stem(images).relu())).square().mean()}


def own_scores(teacher, features):
    return [teacher.scorer(x)[:, 0].sigmoid() for x in features]


IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def distiller(loss, stride=2, **options):
    torch.manual_seed(0)
    student, teacher = Detector(8), Detector(12, stride)
    return Distiller(student, teacher, loss, student_layers=["stem", "deep"], **options)


def test_in_a_distiller():
    module = distiller(ScoreWeightedLoss(8, 12, num_levels=2), teacher_scores=own_scores)
    losses = module(IMAGES)
    _, students, teachers = module.run(IMAGES)
    with torch.no_grad():
        scores = own_scores(module.teacher, teachers)
    torch.testing.assert_close(losses[TERM], module.loss(students, teachers, scores)[TERM])
    fbkd_ops.sum_losses(losses).backward()
    assert all(each.grad is None for each in module.teacher.parameters())
    assert [row.name for row in module.balance_report(IMAGES).distillation] == [TERM]


def test_beside_another_loss_with_levels_of_its_own():
    losses, levels = {"score": ScoreWeightedLoss(8, 12, num_levels=1), "cwd": CWDLoss(8, 12, num_levels=2)}, [1]
    own = {"score": levels}
    alone = distiller(
        copy.deepcopy(losses["score"]), student_levels=levels, teacher_levels=levels, teacher_scores=own_scores
    )
    both = distiller(losses, student_levels=own, teacher_levels=own, teacher_scores=own_scores)
    assert both(IMAGES)[TERM] == alone(IMAGES)[TERM]


def test_resized_teachers_have_resized_scores():
    module = distiller(ScoreWeightedLoss(8, 12, num_levels=2), stride=1, resize=True, teacher_scores=own_scores)
    _, students, teachers, others = module.run_for_loss((IMAGES,), {})
    assert [score.shape[1:] for score in others["scores"]] == [x.shape[2:] for x in students]
    assert module(IMAGES)[TERM].isfinite()


def test_a_head_that_is_not_known_and_functions_that_nobody_needs():
    with pytest.raises(TypeError, match=r"the head of Detector is not known: give Distiller\(teacher_scores=\.\.\.\)"):
        distiller(ScoreWeightedLoss(8, 12, num_levels=2))
    with pytest.raises(ValueError, match="teacher_scores is for a loss that needs them"):
        distiller(CWDLoss(8, 12, num_levels=2), teacher_scores=own_scores)


def torchvision_detector(kind):
    torchvision = pytest.importorskip("torchvision")
    detection = torchvision.models.detection
    torch.manual_seed(0)
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[3, 4]
    )
    ratios = (1.0,) if kind == "FCOS" else (0.5, 1.0)
    name = "rpn_anchor_generator" if kind == "FasterRCNN" else "anchor_generator"
    options = {name: detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,)), (ratios,) * 3)}
    if kind == "FasterRCNN":
        options["box_roi_pool"] = torchvision.ops.MultiScaleRoIAlign(["0", "1", "pool"], 7, 2)
    return getattr(detection, kind)(backbone, 3, min_size=64, max_size=64, **options).eval()


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "FasterRCNN"])
def test_the_heads_of_torchvision(kind):
    detector, (image, row, col) = torchvision_detector(kind), (1, 1, 1)
    features = {key: torch.randn(2, 256, *size) for key, size in (("0", (8, 6)), ("1", (4, 3)), ("pool", (2, 2)))}
    assert teacher_scores.find_scores(detector) is teacher_scores.of_torchvision
    with torch.no_grad():
        scores = teacher_scores.of_torchvision(detector, features)
        for score, x in zip(scores, features.values(), strict=True):
            assert score.shape == (2, *x.shape[2:]) and (score >= 0).all() and (score <= 1).all()
            if kind == "FasterRCNN":
                expected = detector.rpn.head([x])[0][0][image, :, row, col].sigmoid().max()
            else:
                output, cell = detector.head([x]), row * x.shape[3] + col
                anchors = output["cls_logits"].shape[1] // (x.shape[2] * x.shape[3])
                expected = output["cls_logits"][image, cell * anchors : (cell + 1) * anchors].sigmoid().max()
                if kind == "FCOS":
                    expected = (expected * output["bbox_ctrness"][image, cell, 0].sigmoid()).sqrt()
            torch.testing.assert_close(score[image, row, col], expected)


@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "FasterRCNN"])
def test_a_torchvision_teacher(kind):
    student, teacher = torchvision_detector(kind).train(), torchvision_detector(kind)
    loss = ScoreWeightedLoss(256, num_levels=3)
    module = Distiller(student, teacher, loss, student_layers="backbone", teacher_entry="backbone")
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    losses = module([torch.rand(3, 64, 64)] * 2, targets)
    assert losses[TERM].isfinite() and not any(each.training for each in teacher.modules())
