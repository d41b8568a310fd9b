"""How many operations a step of the loss dispatches, beside the relation term and with it."""

import pytest
import torch
from op_cases import INTERPRETED, ON_CPU
from op_counts import count_ops

from fbkd_ops import FBKDLoss
from fbkd_ops.presets import PRESETS

# With the Triton kernels stubbed the terms are what was in the memory: NaN, of which the loss warns in the first step.
pytestmark = [
    pytest.mark.filterwarnings("ignore:terms of the loss are not finite"),
    pytest.mark.usefixtures("poison"),
]

ON_EACH_PATH = pytest.mark.parametrize("backend, device", [ON_CPU, INTERPRETED])
SIDES = (32, 16, 8, 4)
# The distances' own ops, whose number does not depend on that of the levels: pools of both sides, masks, distances.
FUSED_FORWARD = {"cpu": 4, "triton": 8}
FUSED_BACKWARD = {"cpu": 1, "triton": 3}


def counts_of(backend, student_widths, teacher_widths, dtype=torch.float32, relation_weight=0.0, **settings):
    """Of the second step, forward and backward: the first one makes constants, and copies for a warning.

    ``relation_weight=None`` is the preset's.
    """
    settings |= {} if relation_weight is None else {"relation_weight": relation_weight}
    loss = FBKDLoss(list(student_widths), list(teacher_widths), **settings)
    terms = None

    def forward():
        nonlocal terms
        terms = loss(students, teachers)

    sides = SIDES[: len(student_widths)]
    for _ in range(2):
        loss.zero_grad(set_to_none=True)
        students, teachers = (
            [torch.randn(2, width, side, side).to(dtype) for width, side in zip(widths, sides, strict=True)]
            for widths in (student_widths, teacher_widths)
        )
        students = [x.requires_grad_() for x in students]
        counts = count_ops(backend, forward), count_ops(backend, lambda: sum(terms.values()).backward())
    assert all(leaf.grad is not None for leaf in (*students, *loss.parameters()))
    return counts


def small(counts):
    return sum(counts.small.values())


@pytest.mark.parametrize("normalize", ["none", "mean"])
@pytest.mark.parametrize("preset", PRESETS)
@ON_EACH_PATH
def test_four_levels_of_one_width(backend, device, preset, normalize):
    forward, backward = counts_of(backend, (16,) * 4, (16,) * 4, preset=preset, normalize=normalize)
    assert small(forward) <= 18 and small(backward) <= 40, f"{forward}\n{backward}"
    assert sum(forward.fused.values()) <= FUSED_FORWARD[backend]
    assert sum(backward.fused.values()) <= FUSED_BACKWARD[backend]


@pytest.mark.parametrize("preset", ["two_stage", "paper"])
@ON_EACH_PATH
def test_three_levels_of_six_widths(backend, device, preset):
    forward, backward = counts_of(backend, (8, 16, 32), (12, 24, 40), preset=preset)
    assert small(forward) <= 25 and small(backward) <= 36, f"{forward}\n{backward}"
    assert sum(forward.fused.values()) <= FUSED_FORWARD[backend]
    assert sum(backward.fused.values()) <= FUSED_BACKWARD[backend]


@ON_EACH_PATH
def test_more_levels_do_not_take_more_launches(backend, device):
    forward, backward = counts_of(backend, (4,) * 2, (4,) * 2, preset="paper")
    assert sum(forward.fused.values()) <= FUSED_FORWARD[backend]
    assert sum(backward.fused.values()) <= FUSED_BACKWARD[backend]


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ON_EACH_PATH
def test_the_whole_loss(backend, device, dtype):
    """Beside the fused launches: 16 + 11 in Triton at aligned sizes before the small operations were put together.

    The kernels that take whole pooling cells have a launch for each width of these, one of them also for each power of
    two of channels.
    """
    for preset in PRESETS:
        one = counts_of(backend, (256,) * 4, (256,) * 4, dtype, relation_weight=None, preset=preset)
        yolo_n, yolo_m = (64, 128, 256), (192, 384, 576)
        six = counts_of(backend, yolo_n, yolo_m, dtype, relation_weight=None, preset=preset)
        print(f"{backend}, {preset}, {dtype}: one width {sum(map(small, one))}, six widths {sum(map(small, six))}")
        assert sum(map(small, one)) <= 200, one
        assert sum(map(small, six)) <= 300, six
        for (forward, backward), most in ((one, 16), (six, 18)):
            assert sum(forward.fused.values()) <= most and sum(backward.fused.values()) <= 13
