"""Second derivatives: right in plain PyTorch, and an error everywhere else, however one asks for them."""

import pytest
import torch
from helpers import randomise

from fbkd_ops import FBKDLoss, NonLocalBlock2d, use_backend
from fbkd_ops.ops.spatial_l2 import SpatialLevels, spatial_l2_squares


def terms_and_leaves(backend, **settings):
    """The terms of a loss that have a gradient, and all that they depend on."""
    torch.manual_seed(0)
    loss = randomise(FBKDLoss(4, 5, num_levels=1, stride=2, inter_channels=2, **settings).double())
    student, teacher = (torch.randn(2, width, 5, 4, dtype=torch.float64) for width in (4, 5))
    scale = torch.full((), 1.5, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        terms = loss([scale * student], [teacher])  # a student that is no leaf, and that nobody else holds
    return [term for term in terms.values() if term.requires_grad], [scale, *loss.parameters()]


def first_derivatives(term, leaves):
    return torch.autograd.grad(term, leaves, create_graph=True, allow_unused=True)


def second_derivatives(gradient, leaves):
    """Of a number that depends on the gradient alone."""
    return torch.autograd.grad(gradient.square().sum(), leaves, retain_graph=True, allow_unused=True)


def assert_no_second_derivative(**settings):
    expected_terms, expected_leaves = terms_and_leaves("reference", **settings)
    terms, leaves = terms_and_leaves("auto", **settings)
    for expected, term in zip(expected_terms, terms, strict=True):
        asked, gradients = 0, first_derivatives(term, leaves)
        for truth, gradient in zip(first_derivatives(expected, expected_leaves), gradients, strict=True):
            if truth is None:
                continue
            for second, leaf in zip(second_derivatives(truth, expected_leaves), leaves, strict=True):
                if second is not None and second.any():
                    asked += 1
                    with pytest.raises(RuntimeError, match="no second derivative"):
                        second_derivatives(gradient, leaf)
        assert asked > 4


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_of_every_pair_of_tensors(norm, memory_efficient):
    assert_no_second_derivative(norm=norm, memory_efficient=memory_efficient)


@pytest.mark.parametrize("mode", ["gaussian", "embedded_gaussian", "concatenation"])
def test_of_every_pair_in_every_mode(mode):
    weights = {f"{term}_weight": 0.0 for term in ("feature", "channel", "spatial")}
    assert_no_second_derivative(mode=mode, norm="none", **weights)


def test_of_inputs_alone_where_the_incoming_gradient_depends_on_none():
    """Sums of squares, without a root: what the op saves, its leaves and the history of the others are all there is."""
    weight, bias = torch.randn(3, 3, requires_grad=True), torch.randn(1, requires_grad=True)
    scale = torch.tensor(1.5, requires_grad=True)
    levels = SpatialLevels([scale * torch.randn(2, 5, 4)], [weight], [bias], [torch.randn(2, 5, 4)])
    (gradient,) = first_derivatives(spatial_l2_squares("cpu", levels).sum(), [weight])
    for leaf in (weight, bias, scale):
        with pytest.raises(RuntimeError, match="no second derivative"):
            second_derivatives(gradient, leaf)


def test_of_a_block_whose_output_is_summed():
    block = randomise(NonLocalBlock2d(4, 2, norm="none"))
    (gradient,) = first_derivatives(block(torch.randn(2, 4, 5, 4)).sum(), [block.g.weight])
    with pytest.raises(RuntimeError, match="no second derivative"):
        second_derivatives(gradient, block.out.weight)
