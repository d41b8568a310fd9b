"""Training in mixed and in half precision: the loss stays float32 and finite, and learns."""

import copy

import pytest
import torch
from detectors import TERMS, images, make_distiller

from fbkd_ops import Distiller, FBKDLoss

TARGETS = torch.tensor(1.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def without_dropout(distiller):
    distiller.student.dropout.p = 0.0
    return distiller


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_leaves_the_loss_in_float32(dtype):
    """The terms are those of the same half-precision features outside of autocast, bit for bit."""
    distiller, batch = without_dropout(make_distiller()), images()
    outside = copy.deepcopy(distiller)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        losses = distiller(batch, TARGETS)
        _, student_features, teacher_features = outside.run(batch, TARGETS)
    assert student_features["coarse"].dtype == dtype
    expected = outside.loss(student_features, teacher_features)
    for name in TERMS:
        assert losses[name].dtype == torch.float32
        assert torch.equal(losses[name], expected[name])
    sum(losses.values()).backward()
    for parameter in distiller.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_with_a_gradient_scaler(dtype):
    """With a scale that overflows float16 at first: the scaler skips those steps and goes on."""
    distiller = make_distiller()
    before = [parameter.clone() for parameter in distiller.parameters()]
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=100)
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            total = sum(distiller(images(), TARGETS).values())
        assert total.isfinite()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**30 or dtype != torch.float16
    moved = [not torch.equal(parameter, start) for parameter, start in zip(distiller.parameters(), before, strict=True)]
    assert all(parameter.isfinite().all() for parameter in distiller.parameters())
    # float32 does not hold the smallest steps of the largest weights.
    assert sum(moved) > 0.75 * len(moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_loss", [False, True])
def test_half_precision_models(dtype, half_loss):
    distiller = without_dropout(make_distiller())
    distiller.student.to(dtype), distiller.teacher.to(dtype)
    if half_loss:
        distiller.loss.to(dtype)
    losses = distiller(images().to(dtype), TARGETS.to(dtype))
    assert all(losses[name].dtype == torch.float32 and losses[name].isfinite() for name in TERMS)
    sum(value.float() for value in losses.values()).backward()
    for parameter in distiller.parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all()


@pytest.mark.parametrize("student,teacher", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_a_teacher_of_another_precision(student, teacher):
    distiller = without_dropout(make_distiller())
    distiller.student.to(student), distiller.teacher.to(teacher)
    distiller.teacher.backbone.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(teacher),))
    losses = distiller(images().to(student), TARGETS.to(student))
    assert all(losses[name].dtype == torch.float32 and losses[name].isfinite() for name in TERMS)


def test_large_float16_features_do_not_overflow():
    """The sum of squares of these is far beyond float16."""
    loss = FBKDLoss(4, num_levels=2)
    student, teacher = ([torch.randn(2, 4, size, size) * 3e4 for size in (16, 8)] for _ in range(2))
    half = (
        [each.clamp(-6e4, 6e4).half().requires_grad_() for each in student],
        [each.clamp(-6e4, 6e4).half() for each in teacher],
    )
    terms = loss(*half)
    expected = copy.deepcopy(loss).double()(*([each.double() for each in side] for side in half))
    for name, value in terms.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=0)


def test_student_equal_to_teacher_has_no_nan():
    """The root has no derivative at 0; equal features and the identity as adaptation make every sum 0."""
    loss = FBKDLoss(3, num_levels=1, norm="none")
    level = loss.levels[0]
    with torch.no_grad():
        for layer in (level.feature_adaptation, level.relation_adaptation):
            layer.weight.copy_(torch.eye(3)[:, :, None, None]), layer.bias.zero_()
        level.channel_adaptation.weight.copy_(torch.eye(3)), level.channel_adaptation.bias.zero_()
        level.spatial_adaptation.weight.zero_(), level.spatial_adaptation.bias.zero_()
        level.spatial_adaptation.weight[0, 0, 1, 1] = 1
        for block in (level.student_non_local, level.teacher_non_local):
            block.out.weight.zero_(), block.out.bias.zero_()
    student = torch.randn(2, 3, 8, 8, requires_grad=True)
    terms = loss([student], [student.detach().clone()])
    sum(terms.values()).backward()
    assert all(term == 0 for term in terms.values())
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in loss.parameters())


def test_compiled_criterion_inside_a_distiller():
    """Half-precision features of a student under autocast go into a loss that is one graph."""
    torch.compiler.reset()
    plain = without_dropout(make_distiller())
    compiled = Distiller(
        copy.deepcopy(plain.student),
        copy.deepcopy(plain.teacher),
        torch.compile(copy.deepcopy(plain.loss), fullgraph=True, backend="aot_eager"),
        student_layers="backbone",
    )
    for size in (8, 10, 12):
        batch = images(size=size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, losses = plain(batch, TARGETS), compiled(batch, TARGETS)
        for name in TERMS:
            torch.testing.assert_close(losses[name], expected[name])


def test_references_are_not_rounded_to_tf32():
    """What conftest.py sets: else float32 references on a GPU are off by 1e-3, and no comparison can fail."""
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
