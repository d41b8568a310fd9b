"""How many operations a step dispatches, counted and bounded."""

import pytest
import torch
from op_cases import INTERPRETED, ON_CPU
from op_counts import count_ops

from fbkd_ops import FBKDLoss
from fbkd_ops.dispatch import attention_pools
from fbkd_ops.non_local.relation import relation_squares
from fbkd_ops.ops.non_local_statistics import StatisticsRequest, non_local_statistics

SIZES = [(40, 64), (20, 32), (10, 16), (5, 8)]
ONE_WIDTH = [256] * 4, [256] * 4
SIX_WIDTHS = [64, 128, 256], [192, 384, 576]  # YOLO n and m

# With the Triton kernels stubbed the terms are what was in the memory.
pytestmark = pytest.mark.filterwarnings("ignore:terms of the loss are not finite")

ON_EACH_PATH = pytest.mark.parametrize("backend, device", [ON_CPU, INTERPRETED])


def test_neither_views_nor_allocations_are_counted():
    def function():
        x = torch.empty(2, 6)
        x.view(3, 4)[1:].mT.unbind()
        torch.stack([x.sum(), x.flatten(1).add(1).add_(1).mean()])

    assert count_ops("cpu", function).small == {"sum": 1, "add": 1, "add_": 1, "mean": 1, "stack": 1}


@ON_EACH_PATH
def test_calls_inside_the_packages_ops_are_counted(backend, device):
    x, mean, projection = torch.randn(2, 8, 5, 7), torch.randn(2, 8), torch.randn(3, 8)
    counts = count_ops(backend, lambda: non_local_statistics(backend, [StatisticsRequest(x, mean, projection)]))
    if backend == "cpu":
        assert counts == ({"mm": 1}, {"non_local_statistics_forward": 1})
    else:
        assert counts == ({"mm": 1, "bmm": 1}, {"covariance_tiles": 1, "finish_covariances": 1})


@ON_EACH_PATH
def test_a_backward_pass_is_counted(backend, device):
    leaf = torch.randn(2, 8, 5, 7, requires_grad=True)
    counts = count_ops(backend, lambda: attention_pools([leaf])[0].spatial_mean.sum().backward())
    assert counts.small == {"sum": 1, "ones_like": 1, "clone": 1}  # the op wants its gradient contiguous
    assert leaf.grad is not None and sum(counts.fused.values()) == {"cpu": 2, "triton": 3}[backend]


def relation_counts(backend, widths, preset, dtype):
    """The relation term's operations, forward and backward."""
    torch.manual_seed(0)
    loss = FBKDLoss(*widths, preset=preset, num_levels=len(widths[0]))
    students, teachers = (
        [torch.randn(2, width, *size).to(dtype) for width, size in zip(side, SIZES[: len(side)], strict=True)]
        for side in widths
    )
    pools = zip(attention_pools(students), attention_pools(teachers), strict=True)
    leaves = [x.requires_grad_() for x in students]
    terms = [
        level.relation_term(student, teacher, *pair)
        for level, student, teacher, pair in zip(loss.levels, leaves, teachers, pools, strict=True)
    ]

    grads = [torch.ones(()) for _ in terms]

    def step():
        torch.autograd.backward(relation_squares(backend, terms), grads)

    return count_ops(backend, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["two_stage", "one_stage", "mmrazor", "paper"])
@pytest.mark.usefixtures("relation_form")
@ON_EACH_PATH
def test_the_relation_term(backend, device, preset, dtype):
    one, six = (relation_counts(backend, widths, preset, dtype) for widths in (ONE_WIDTH, SIX_WIDTHS))
    print(f"{backend}, {preset}, {dtype}\none width: {one}\nsix widths: {six}")
    assert sum(one.small.values()) <= 140
    assert sum(six.small.values()) <= 200
    # In Triton three kernels have a launch for each width of pooling cells, of which there are three; one of them also
    # for each power of two of channels.
    for counts, more in ((one, 3 * 2), (six, 3 * 2 + 3)):
        assert sum(counts.fused.values()) <= {"cpu": 4, "triton": 11 + more}[backend]
