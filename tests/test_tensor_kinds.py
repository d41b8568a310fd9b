"""Tensors of special kinds: made in inference mode, without values, with a forward-mode derivative."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import TEST_ALL, randomise
from torch._subclasses.fake_tensor import FakeTensorMode

import fbkd_ops
from fbkd_ops import FBKDLoss, functional, use_backend

MODES = ("dot_product", "gaussian", "embedded_gaussian", "concatenation")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def arguments():
    """Of each function that has a gradient: what it is called with, by position."""
    block = randomise(fbkd_ops.NonLocalBlock2d(4, 2, norm="none"))
    weights = [x.detach() for x in block.weights() if x is not None]
    student, teacher, weight, bias = draw(2, 4, 5, 6), draw(2, 4, 5, 6) + 1, draw(4, 4), draw(4)
    masks = draw(2, 5, 6).exp(), draw(2, 4).exp()
    return {
        "masked_l2_loss": [student, teacher, *masks],
        "channel_correlation_loss": [student, teacher],
        "channel_divergence_loss": [student, teacher],
        "adapted_masked_l2_loss": [student, weight, bias, teacher, *masks],
        "spatial_l2_loss": [student[:, 0], draw(3, 3), draw(1), teacher[:, 0]],
        "attention_pool": [student],
        "non_local": [student, *weights],
        "relation_loss": [student, teacher, *weights, *weights, weight, bias],
    }


def call(name, tensors):
    """A scalar."""
    weights = fbkd_ops.NonLocalWeights
    if name == "non_local":
        return functional.non_local(tensors[0], weights(*tensors[1:]), stride=2).square().sum()
    if name == "relation_loss":
        count = (len(tensors) - 4) // 2
        blocks = weights(*tensors[2 : 2 + count]), weights(*tensors[2 + count : -2])
        return functional.relation_loss(*tensors[:2], *blocks, *tensors[-2:], stride=2)
    if name in ("masked_l2_loss", "adapted_masked_l2_loss"):
        return getattr(functional, name)(*tensors[:-2], spatial_mask=tensors[-2], channel_mask=tensors[-1])
    found = getattr(functional, name)(*tensors)
    return sum(x.square().sum() for x in found) if name == "attention_pool" else found


FUNCTIONS = list(arguments())


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_argument_made_in_inference_mode(name):
    tensors = arguments()[name]
    for place in range(len(tensors)):
        made = list(tensors)
        with torch.inference_mode():
            made[place] = tensors[place].clone()
        leaves = [x for x in range(len(tensors)) if x != place]
        gradients = []
        for given in (made, tensors):
            given = [x.detach().requires_grad_() if index in leaves else x for index, x in enumerate(given)]
            value = call(name, given)
            wanted = [given[index] for index in leaves]
            gradients.append(torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else ())
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("relation_form")
def test_a_loss_of_features_made_in_inference_mode(mode, memory_efficient):
    loss = randomise(FBKDLoss(4, num_levels=1, stride=2, mode=mode, memory_efficient=memory_efficient))
    student, teacher = draw(2, 4, 5, 6).requires_grad_(), draw(2, 4, 5, 6) + 1
    with torch.inference_mode():
        made = teacher.clone()
    gradients = [
        torch.autograd.grad(sum(loss([student], [x]).values()), [student, *loss.parameters()]) for x in (made, teacher)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with torch.inference_mode():
        inside = loss([student], [made])
    torch.testing.assert_close(inside, loss([student], [teacher]))


@pytest.mark.parametrize("mode", MODES if TEST_ALL else MODES[:2])
@pytest.mark.parametrize("context", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_a_step_without_values(context, mode):
    real = FBKDLoss(4, num_levels=2, mode=mode)
    sum(real([draw(2, 4, 8, 8)] * 2, [draw(2, 4, 8, 8)] * 2).values())  # constants of a step with values
    with context():
        loss = FBKDLoss(4, num_levels=2, mode=mode)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        for _ in range(12):  # as many as the watches look at
            students = [torch.rand(2, 4, 8, 8, requires_grad=True) for _ in range(2)]
            losses = loss(students, [torch.rand(2, 4, 8, 8) for _ in range(2)])
            sum(losses.values()).backward()
            optimizer.step()
    assert all(x.grad.shape == x.shape for x in (*students, *loss.parameters()))
    assert {(x.shape, x.dtype) for x in losses.values()} == {(torch.Size(), torch.float32)}
    sum(real([draw(2, 4, 8, 8)] * 2, [draw(2, 4, 8, 8)] * 2).values()).backward()


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_forward_mode_derivative_is_refused_or_right(name):
    tensors, leaf = arguments()[name], 0
    with forward_ad.dual_level():
        tensors[leaf] = forward_ad.make_dual(tensors[leaf], draw(*tensors[leaf].shape))
        with use_backend("reference"):
            assert forward_ad.unpack_dual(call(name, tensors)).tangent is not None
        with pytest.raises(NotImplementedError, match="jvp"):
            call(name, tensors)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_under_autocast_are_those_outside(name):
    """Also where backward runs inside of it: nothing is multiplied in half precision."""
    tensors = arguments()[name]
    assert_indifferent_to_autocast(lambda given: call(name, given), tensors)


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_a_loss_under_autocast_are_those_outside(mode, memory_efficient):
    loss = randomise(FBKDLoss(4, num_levels=1, stride=2, mode=mode, memory_efficient=memory_efficient))
    teacher = draw(2, 4, 5, 6) + 1
    parameters = list(loss.parameters())
    assert_indifferent_to_autocast(
        lambda given: sum(loss([given[0]], [teacher]).values()), [draw(2, 4, 5, 6)], parameters
    )


def assert_indifferent_to_autocast(function, tensors, parameters=()):
    gradients = []
    for inside in (False, True):
        leaves = [x.clone().requires_grad_() for x in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            value = function(leaves)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                gradients.append(torch.autograd.grad(value, [*leaves, *parameters], allow_unused=True))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
