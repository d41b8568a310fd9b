"""The weighted roots of the loss, and the constants that they are multiplied with."""

import pytest
import torch

from fbkd_ops import _numerics
from fbkd_ops._numerics import constant_vector
from fbkd_ops.autograd.weighted_roots import weighted_roots

NAN, INF = float("nan"), float("inf")


def run(squares, scale, counts):
    squares = torch.tensor(squares, dtype=torch.float64, requires_grad=True)
    roots, terms = weighted_roots(squares, torch.tensor(scale, dtype=torch.float64), counts)
    return squares, roots, terms


def test_terms_are_weighted_sums_of_roots():
    _, roots, terms = run([4.0, 9.0, 16.0], [1.0, 2.0, 0.5], [2, 1])
    assert roots.tolist() == [2, 3, 4] and not roots.requires_grad
    assert [term.item() for term in terms] == [2 + 6, 2] and all(term.shape == () for term in terms)


def test_gradcheck():
    squares = torch.tensor([4.0, 9.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 2.0, 0.5, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: tuple(weighted_roots(x, scale, [1, 3])[1]), squares)


def test_only_an_exact_zero_has_no_gradient():
    """NaN stays NaN, in its own term alone; the smallest numbers have their gradient."""
    squares, _, terms = run([0.0, NAN, 1e-300, INF], [3.0, 1.0, 2.0, 1.0], [1, 1, 1, 1])
    (gradient,) = torch.autograd.grad(sum(terms), squares)
    torch.testing.assert_close(gradient, torch.tensor([0, NAN, 1e150, 0], dtype=torch.float64), equal_nan=True)
    assert [term.item() for term in terms[:1]] == [0] and terms[1].isnan() and terms[2].isfinite()


def test_a_term_that_is_not_used_brings_nothing():
    squares, _, terms = run([4.0, 9.0, 16.0], [1.0, 1.0, 1.0], [1, 2])
    (gradient,) = torch.autograd.grad(terms[1], squares)
    assert gradient.tolist() == [0, 1 / 6, 1 / 8]


def test_terms_may_be_changed_in_place():
    """As loops over a detector's losses do."""
    squares, _, terms = run([4.0, 9.0], [1.0, 1.0], [1, 1])
    for term in terms:
        term *= 2
    (gradient,) = torch.autograd.grad(sum(terms), squares)
    assert gradient.tolist() == pytest.approx([2 / 4, 2 / 6])


def test_second_derivatives():
    """Also beside a root of 0, whose gradient is 0 whatever the grad is."""
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    function = lambda x: tuple(weighted_roots(x, scale, [1, 2])[1])  # noqa: E731
    squares = torch.tensor([4.0, 9.0, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(function, squares)
    zero = torch.tensor([4.0, 0.0, 0.3], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sum(function(zero)), zero, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), zero)
    assert second[1] == 0 and second.isfinite().all()


def test_constants_are_made_once():
    kind = torch.float32, torch.device("cpu")
    passing = constant_vector([1.5, 2.0], *kind, keep=False)
    first = constant_vector([1.5, 2.0], *kind, keep=True)
    assert first.tolist() == passing.tolist() == [1.5, 2.0] and first.dtype == torch.float32
    assert first is not passing
    # A graph that is captured reads what is there already.
    assert constant_vector([1.5, 2.0], *kind, keep=True) is first is constant_vector([1.5, 2.0], *kind, keep=False)
    assert constant_vector([1.5, 2.0], torch.float64, torch.device("cpu"), keep=True).dtype == torch.float64


def test_no_more_constants_are_kept_than_there_is_room_for(monkeypatch):
    """And none is given up: a captured graph may read it."""
    kind = torch.float32, torch.device("cpu")
    monkeypatch.setattr(_numerics, "_constants", {})
    monkeypatch.setattr(_numerics, "MAX_CONSTANTS", 2)
    made = [constant_vector([value], *kind, keep=True) for value in (1.0, 2.0, 3.0)]
    again = [constant_vector([value], *kind, keep=True) for value in (1.0, 2.0, 3.0)]
    assert [a is b for a, b in zip(made, again, strict=True)] == [True, True, False]
    assert again[2].tolist() == [3.0]


def test_constants_of_a_validation_serve_training():
    with torch.inference_mode():
        constants = constant_vector([7.25], torch.float32, torch.device("cpu"), keep=True)
    leaf = torch.ones(1, requires_grad=True)
    (leaf * constants).sum().backward()
    assert leaf.grad.tolist() == [7.25]
