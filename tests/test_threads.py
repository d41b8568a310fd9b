"""What a thread chooses or computes again is its own affair."""

import threading

import pytest
import torch
from torch import nn

from fbkd_ops import FBKDLoss, backends, use_backend

X = torch.ones(1, 2, 3, 4)


def in_threads(*functions):
    """The results of the functions, each run in a thread of its own, all at once."""
    barrier, results = threading.Barrier(len(functions)), [None] * len(functions)

    def run(index, function):
        barrier.wait()
        results[index] = function(barrier)

    threads = [threading.Thread(target=run, args=each) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_the_backend_is_that_of_the_thread():
    def forced(barrier):
        with use_backend("reference"):
            barrier.wait()  # the other thread asks while this one is inside
            barrier.wait()
            return backends.resolve("relation_loss", X)

    def free(barrier):
        barrier.wait()
        found = backends.resolve("relation_loss", X)
        barrier.wait()
        return found

    with use_backend("reference"):
        assert in_threads(forced, free) == ["reference", backends.automatic("relation_loss", "cpu")]
        assert backends.resolve("relation_loss", X) == "reference"


def train(mode, steps=8):
    loss = FBKDLoss(4, num_levels=1, stride=1, mode=mode, memory_efficient=True)
    for _ in range(steps):
        student, teacher = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 6, 6)
        sum(loss([student], [teacher]).values()).backward()
    return [int(block.norm.num_batches_tracked) for block in blocks_of(loss)]


def blocks_of(loss):
    return loss.levels[0].student_non_local, loss.levels[0].teacher_non_local


@pytest.mark.parametrize("mode", ["dot_product", "gaussian"])
def test_batches_are_counted_once_in_every_thread(mode):
    assert in_threads(*[lambda _: train(mode)] * 3) == [[8, 8]] * 3
    assert train(mode) == [8, 8]


@pytest.mark.parametrize("mode", ["dot_product", "gaussian"])
def test_backward_on_another_thread_than_forward(mode):
    torch.manual_seed(0)
    block = nn.Conv2d(4, 4, 1)
    loss = FBKDLoss(4, num_levels=1, stride=2, mode=mode, memory_efficient=True)
    x, teacher = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    gradients = []
    for run in (lambda function: function(None), lambda function: in_threads(function)[0]):
        with use_backend("reference"):
            expected = torch.autograd.grad(sum(loss([block(x)], [teacher]).values()), block.weight)[0]
        total = sum(loss([block(x)], [teacher]).values())
        gradients.append(run(lambda _: torch.autograd.grad(total, block.weight)[0]))
        torch.testing.assert_close(gradients[-1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(*gradients)


def test_a_compiled_graph_follows_the_backend():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + ("auto", "reference").index(chosen(x)), fullgraph=True, backend="eager")
    expected = {"auto": X, "reference": X + 1}
    for name in ("auto", "reference", "auto"):
        with use_backend(name):
            assert torch.equal(compiled(X), expected[name])
    with use_backend("reference"):
        assert torch.equal(in_threads(lambda _: compiled(X))[0], X)
        assert torch.equal(compiled(X), X + 1)


def chosen(x):
    return "reference" if backends.resolve("relation_loss", x) == "reference" else "auto"
