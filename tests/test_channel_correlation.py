"""The channel correlation: what it promises besides tests/test_channel_ops.py."""

import pytest
import torch
from channel_ops import CORRELATION, check, draw_pair, run
from op_cases import BACKENDS, PAIRS_OF_LAYOUTS, name_of

from fbkd_ops.functional import channel_correlation_loss

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_maps_that_nearly_agree_keep_their_digits(backend, device, dtype):
    """The loss is 5e-11 of what its sums are: in float32 they would leave nothing of it."""
    teacher = torch.randn(2, 4, 6, 7, dtype=torch.float64, device=device).to(dtype)
    student = (2 * teacher + 1e-5 * torch.randn_like(teacher)).to(dtype)
    ours, exact = (
        run(CORRELATION, student, teacher, backend),
        run(CORRELATION, student.double(), teacher.double(), "reference"),
    )
    assert 0 < exact[0] < 1e-10
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-3, atol=1e-3 * exact[1].abs().max().item())


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_scale_and_a_shift_of_each_channel_change_nothing(backend, device):
    student, teacher = draw_pair((2, 3, 4, 5), (torch.float64, torch.float64), device)
    factor, shift = torch.rand(1, 3, 1, 1).to(student) + 0.5, 1e4 * torch.randn(1, 3, 1, 1).to(student)
    expected, _ = run(CORRELATION, student, teacher, backend)
    torch.testing.assert_close(
        run(CORRELATION, factor * student + shift, teacher, backend)[0], expected, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_constant_channels(backend, device, constant, layouts):
    """A channel without variance is 0 after standardising; its deviation has no gradient."""
    maps = dict(zip(("student", "teacher"), draw_pair((2, 3, 4, 5), (torch.float32,) * 2, device), strict=True))
    for name in maps if constant == "both" else (constant,):
        maps[name][:, 1] = 0.1
    student, teacher = (layout(maps[name]) for layout, name in zip(layouts, maps, strict=True))
    loss, gradient = check(CORRELATION, student, teacher, backend)
    assert loss.isfinite() and gradient.isfinite().all()
    # n - 1 of n from the one that is not constant, less what eps takes
    others = run(CORRELATION, student[:, ::2].contiguous(), teacher[:, ::2].contiguous(), backend)[0]
    share = 0 if constant == "both" else 39 / 40 / 2
    torch.testing.assert_close(3 * loss, 2 * others + share, rtol=1e-4, atol=0)


@pytest.mark.parametrize("eps", [0, -1e-6, float("nan"), float("inf"), "1e-6", None, True])
def test_bad_eps_is_named(eps):
    with pytest.raises((TypeError, ValueError), match="eps must be a number > 0"):
        channel_correlation_loss(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), eps=eps)
