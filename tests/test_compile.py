"""torch.compile of the criterion: no graph break, no recompilation for a new size, the fused ops inside."""

import copy

import pytest
import torch
from helpers import TEST_ALL, randomise

import fbkd_ops
from fbkd_ops import FBKDLoss
from fbkd_ops.non_local import relation
from fbkd_ops.presets import MODES

# Both levels are larger than every preset's strides: a clamped stride is another graph.
SIZES = [(34, 40), (50, 36), (39, 64), (41, 41)]
# Tracing takes seconds a level, and a level alone is traced as one of two is: `make test` has two where levels differ.
LEVELS = 2 if TEST_ALL else 1


class Recorder:
    """A compiler that keeps the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward


def pyramid(size, channels, generator, requires_grad=False, levels=2):
    maps = [torch.randn(2, channels, size[0] // 2**i, size[1] // 2**i, generator=generator) for i in range(levels)]
    return [each.requires_grad_(requires_grad) for each in maps]


def run_sizes(loss, function, sizes=SIZES):
    """Terms and gradients of each size."""
    seen, generator = [], torch.Generator().manual_seed(0)
    for size in sizes:
        levels = len(loss.levels)
        student = pyramid(size, 4, generator, requires_grad=True, levels=levels)
        teacher = pyramid(size, 6, generator, levels=levels)
        terms = function(student, teacher)
        leaves = [*student, *(each for each in loss.parameters())]
        seen.append((terms, torch.autograd.grad(sum(terms.values()), leaves, allow_unused=True)))
    return seen


CONFIGURATIONS = [
    {"preset": "one_stage", "normalize": "mean", "num_levels": 2},
    {"preset": "mmrazor", "num_levels": LEVELS},
    {"preset": "paper", "memory_efficient": True, "num_levels": LEVELS},
    {"mode": "embedded_gaussian", "norm": "none", "num_levels": LEVELS},
    {"mode": "concatenation", "norm": "frozen", "relation_weight": [0.0, 1e-3], "num_levels": 2},
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS if TEST_ALL else CONFIGURATIONS[::4], ids=str)
def test_one_graph_for_every_size(configuration):
    """The first size compiles static shapes, the second dynamic ones, and those after it nothing."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    loss = randomise(FBKDLoss(4, 6, **configuration))
    eager, recorder = copy.deepcopy(loss), Recorder()
    # Watches, warnings and a forced backend before it leave no trace in the graph.
    with fbkd_ops.use_backend("reference"):
        copy.deepcopy(loss)(*(pyramid((8, 8), channels, None, levels=len(loss.levels)) for channels in (4, 6)))
    compiled = torch.compile(loss, fullgraph=True, backend=recorder)
    results = run_sizes(loss, compiled)
    assert len(recorder.graphs) <= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    for result, expected in zip(results, run_sizes(eager, eager), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-5)


# Two more modes are in the configurations.
@pytest.mark.parametrize("mode", MODES if TEST_ALL else ["embedded_gaussian", "gaussian"])
def test_every_mode_compiles_with_and_without_pooling(mode):
    """Through AOTAutograd, which runs the ops' fakes; a level without a pool takes another way in every mode."""
    torch.compiler.reset()
    loss = randomise(FBKDLoss(4, 6, num_levels=2, mode=mode, stride=(1, 2)))
    eager = copy.deepcopy(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ((result, expected),) = zip(run_sizes(loss, compiled, [(12, 10)]), run_sizes(eager, eager, [(12, 10)]), strict=True)
    torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-5)


RELATION_OPS = {"cells": ["cell_relation"], "collapsed": ["relation_residual", "non_local_statistics"]}


@pytest.mark.parametrize("form", RELATION_OPS)
def test_the_fused_ops_are_in_the_graph(monkeypatch, form):
    monkeypatch.setattr(relation, "cheaper_form", lambda sizes: form)
    torch.compiler.reset()
    loss, recorder = randomise(FBKDLoss(4, 6, num_levels=LEVELS)), Recorder()
    run_sizes(loss, torch.compile(loss, fullgraph=True, backend=recorder), SIZES[:1])
    (graph,) = recorder.graphs
    code = "".join(module.code for module in graph.modules() if hasattr(module, "code"))
    ops = ["attention_pool", "attention_masks", "adapted_masked_l2", "spatial_l2"]
    for op in ops + RELATION_OPS[form]:
        assert f"fbkd_ops.{op}" in code, op


def test_another_backend_is_another_graph():
    """A forced backend holds inside a compiled criterion too, also when it changes."""
    torch.compiler.reset()
    loss, recorder = randomise(FBKDLoss(4, 6, num_levels=LEVELS)), Recorder()
    compiled = torch.compile(loss, fullgraph=True, backend=recorder)
    run_sizes(loss, compiled, SIZES[:1])
    with fbkd_ops.use_backend("reference"):
        run_sizes(loss, compiled, SIZES[:1])
    first, second = ("".join(m.code for m in graph.modules() if hasattr(m, "code")) for graph in recorder.graphs)
    assert "fbkd_ops.cell_relation" in first and "fbkd_ops.cell_relation" not in second


def test_training_steps_do_not_compile_anew():
    """The counters of warnings, running statistics and parameter updates move; the graph stays."""
    torch.compiler.reset()
    loss, recorder = randomise(FBKDLoss(4, 6, num_levels=LEVELS)), Recorder()
    compiled = torch.compile(loss, fullgraph=True, backend=recorder)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(15):
        loss.train(step % 5 != 4)
        optimizer.zero_grad()
        student, teacher = (pyramid((8, 8), width, generator, width == 4, LEVELS) for width in (4, 6))
        sum(compiled(student, teacher).values()).backward()
        optimizer.step()
    assert len(recorder.graphs) == 2  # training and evaluation
