"""The channel divergence: what it promises besides tests/test_channel_ops.py."""

import os

import pytest
import torch
from op_cases import BACKENDS, COMPILED, PAIRS_OF_LAYOUTS, assert_as_good, divergence_terms, draw, name_of, units_of_sum

import fbkd_ops
from fbkd_ops import _extension
from fbkd_ops.functional import channel_divergence_loss

pytestmark = pytest.mark.usefixtures("poison")


def results(student, teacher, temperature, backend):
    """The loss and the student's gradient."""
    leaf = student.detach().requires_grad_()
    with fbkd_ops.use_backend(backend):
        loss = channel_divergence_loss(leaf, teacher, temperature=temperature)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def check(student, teacher, temperature, backend):
    ours, eager = (results(student, teacher, temperature, name) for name in (backend, "reference"))
    exact = results(student.double(), teacher.double(), temperature, "reference")
    units = units_of_sum(student[0, 0].numel())
    for mine, theirs, true, size in zip(
        ours, eager, exact, divergence_terms(student, teacher, temperature), strict=True
    ):
        assert_as_good(mine, theirs, true, 0.0, units=units, terms=true.abs() + size.reshape(true.shape))
    return ours


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_temperatures_and_magnitudes(backend, device, layouts):
    for temperature in (0.1, 1.0, 20.0):
        for magnitude in (1e-3, 1.0, 1e4):
            student, teacher = (magnitude * draw((2, 3, 5, 6), torch.float32, device) for _ in range(2))
            loss, gradient = check(layouts[0](student), layouts[1](teacher), temperature, backend)
            assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_shift_of_each_channel_changes_nothing(backend, device):
    student, teacher = (draw((2, 3, 4, 5), torch.float64, device) for _ in range(2))
    expected = results(student, teacher, 0.5, backend)
    shifts = 100 * draw((2, 3, 1, 1), torch.float64, device), 100 * draw((2, 3, 1, 1), torch.float64, device)
    shifted = results(student + shifts[0], teacher + shifts[1], 0.5, backend)
    for mine, true in zip(shifted, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)


# Where a sum runs along one chain and not along the lanes of a vector, it has more rounding than plain PyTorch's: in
# builds without wide vectors, and in those with a sanitizer, which is loaded first.
HAS_LANES = _extension.build_facts().get("clone", "").endswith(("v3", "v4")) and "san" not in os.getenv(
    "LD_PRELOAD", ""
)


@pytest.mark.skipif(not HAS_LANES, reason="the CPU's library was built without wide vectors")
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_maps_that_nearly_agree_keep_their_digits(backend, device, layouts):
    """The loss is a millionth of the sums that it is the difference of: fewer digits are lost than by plain PyTorch."""
    losses, gradients = [], []
    for _ in range(5):
        teacher = 2 * draw((1, 8, 60, 80), torch.float32, device) + 3
        student = teacher + 1e-3 * draw(teacher.shape, torch.float32, device)
        maps = layouts[0](student), layouts[1](teacher)
        ours, eager = (results(*maps, 1.0, name) for name in (backend, "reference"))
        exact = results(student.double(), teacher.double(), 1.0, "reference")
        assert 1e-7 < exact[0] < 1e-6
        losses.append([(each[0].double() - exact[0]).abs() for each in (ours, eager)])
        gradients.append([(each[1].double() - exact[1]).norm() for each in (ours, eager)])
    for errors in (losses, gradients):
        mine, theirs = (sum(each) for each in zip(*errors, strict=True))
        assert mine <= theirs


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("where", [(0, 0), (0, 20)], ids=["first", "last"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_one_pixel_has_all_the_weight(backend, device, where, layouts):
    """All others underflow, and so do whole tiles of them."""
    student, teacher = (draw((1, 2, 70, 21), torch.float32, device) for _ in range(2))
    for x in (student, teacher):
        x[..., where[0], where[1]] = 1e4
    loss, gradient = check(layouts[0](student), layouts[1](teacher), 1.0, backend)
    assert loss == 0 and gradient.count_nonzero() == 0


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_rows_of_minus_infinity_in_the_student(backend, device, layouts):
    """A pixel that the student excludes and the teacher does not: the divergence is infinite, as in plain PyTorch."""
    student, teacher = (draw((1, 2, 140, 9), torch.float32, device) for _ in range(2))
    student[:, :, :130] = float("-inf")
    loss, _ = results(layouts[0](student), layouts[1](teacher), 1.0, backend)
    assert loss == float("inf")


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_bad_temperature_is_named(temperature):
    with pytest.raises((TypeError, ValueError), match="temperature must be a number > 0"):
        channel_divergence_loss(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), temperature=temperature)
