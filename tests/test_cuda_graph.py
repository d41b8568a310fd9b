"""The loss in a CUDA graph: captured once, replayed on other values."""

import copy

import pytest
import torch
from helpers import randomise

from fbkd_ops import FBKDLoss

pytestmark = pytest.mark.gpu


def pyramid(channels, requires_grad=False):
    maps = [torch.randn(2, channels, size, size, device="cuda") for size in (24, 12)]
    return [each.requires_grad_(requires_grad) for each in maps]


def step(loss, students, teachers):
    terms = loss(students, teachers)
    sum(terms.values()).backward()
    return terms


@pytest.mark.parametrize("memory_efficient, normalize", [(False, "none"), (True, "mean")])
def test_forward_and_backward_replay(memory_efficient, normalize):
    """In training, so with the watches' hooks at the warm-up, and with running statistics that move at every replay."""
    loss = randomise(FBKDLoss(8, 12, num_levels=2, memory_efficient=memory_efficient, normalize=normalize)).cuda()
    eager = copy.deepcopy(loss)
    students, teachers = pyramid(8, requires_grad=True), pyramid(12)
    start = copy.deepcopy(dict(loss.named_buffers()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(loss, students, teachers)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        for name, buffer in loss.named_buffers():
            buffer.copy_(start[name])
    for each in (*students, *loss.parameters()):
        each.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = step(loss, students, teachers)
    with torch.no_grad():
        for name, buffer in loss.named_buffers():
            buffer.copy_(start[name])
    for _ in range(2):
        values = pyramid(8), pyramid(12)
        with torch.no_grad():
            for static, value in zip((*students, *teachers), (*values[0], *values[1]), strict=True):
                static.copy_(value)
        graph.replay()
        eager.zero_grad()
        leaves = [value.clone().requires_grad_() for value in values[0]]
        torch.testing.assert_close(terms, step(eager, leaves, values[1]), rtol=1e-5, atol=1e-6)
        pairs = zip((*students, *loss.parameters()), (*leaves, *eager.parameters()), strict=True)
        for captured, expected in pairs:
            torch.testing.assert_close(captured.grad, expected.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(loss.named_buffers()), dict(eager.named_buffers()))


def test_a_step_waits_for_nothing():
    """Nor does the first one: what it makes for all others is filled on the device."""
    loss = randomise(FBKDLoss(8, 12, num_levels=2, normalize="mean")).cuda()
    students, teachers = pyramid(8, requires_grad=True), pyramid(12)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step(loss, students, teachers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
