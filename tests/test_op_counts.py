"""How many operations a step dispatches, counted and bounded."""

import pytest
import torch
from cases import INTERPRETED, ON_CPU
from op_counts import count_ops

from fbkd_ops.autograd.attention_pool import attention_pools
from fbkd_ops.autograd.non_local_statistics import StatisticsRequest, non_local_statistics

# With the Triton kernels stubbed the terms are what was in the memory.
pytestmark = pytest.mark.filterwarnings("ignore:terms of the FBKD loss are not finite")

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
