"""Every autograd Function under what PyTorch does to saved tensors: checkpointing and hooks that pack them."""

from collections import Counter

import pytest
import torch
from helpers import randomise
from op_cases import INTERPRETED, ON_CPU, ON_TRITON, draw
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fbkd_ops
from fbkd_ops import FBKDLoss
from fbkd_ops.autograd.channel_l2 import ChannelLevels, channel_l2_squares
from fbkd_ops.dispatch import attention_pools
from fbkd_ops.ops.adapted_masked_l2 import AdaptedLevels, adapted_masked_l2_squares, student_pyramid
from fbkd_ops.ops.channel_correlation import channel_correlation_losses
from fbkd_ops.ops.channel_divergence import channel_divergence_losses
from fbkd_ops.ops.masked_l2 import masked_l2_squares
from fbkd_ops.ops.spatial_l2 import SpatialLevels, spatial_l2_squares

WIDTHS, TEACHER_WIDTHS, MAPS = (3, 4), (5, 2), ((4, 5), (2, 2))


def features(widths, device):
    return [draw((2, width, *size), torch.float32, device) for width, size in zip(widths, MAPS, strict=True)]


def masks(widths, device):
    """Spatial and channel masks of every level."""
    spatial = [torch.rand(2, *size, device=device) for size in MAPS]
    return spatial, [torch.rand(2, width, device=device) for width in widths]


def weighted(tensors):
    """A scalar of which every element has another gradient."""
    return sum(x.sin().sum() for x in tensors)


def parameters(device):
    weights = [draw((to, width), torch.float32, device) for to, width in zip(TEACHER_WIDTHS, WIDTHS, strict=True)]
    return [*weights, *(draw((to,), torch.float32, device) for to in TEACHER_WIDTHS)]


# Each gives a function of the students and of further leaves, and those.


def pools(backend, device):
    return lambda *students: weighted(mean for pool in attention_pools(list(students)) for mean in pool), []


def masked_l2(backend, device):
    fixed = features(WIDTHS, device), *masks(WIDTHS, device)
    return lambda *students: weighted(masked_l2_squares(backend, list(students), *fixed)), []


def channel_correlation(backend, device):
    teachers = features(WIDTHS, device)
    return lambda *students: weighted(channel_correlation_losses(backend, list(students), teachers, 1e-6)), []


def channel_divergence(backend, device):
    teachers = features(WIDTHS, device)
    return lambda *students: weighted(channel_divergence_losses(backend, list(students), teachers, 1.0)), []


def levels_of(leaves, fixed):
    return AdaptedLevels(list(leaves[:2]), list(leaves[2:4]), list(leaves[4:]), *fixed)


def adapted_masked_l2(backend, device):
    fixed = features(TEACHER_WIDTHS, device), *masks(TEACHER_WIDTHS, device)
    return lambda *leaves: weighted(adapted_masked_l2_squares(backend, levels_of(leaves, fixed))), parameters(device)


def pyramid(backend, device):
    fixed = features(TEACHER_WIDTHS, device), *masks(TEACHER_WIDTHS, device)

    def function(*leaves):
        with torch.no_grad():
            means = attention_pools(list(leaves[:2]))
        squares, means, students = student_pyramid(backend, levels_of(leaves, fixed), means)
        return weighted([squares, *students, *(mean for pool in means for mean in pool)])

    return function, parameters(device)


def spatial_l2(backend, device):
    """Of the students' means, so that the parameters' gradients and theirs are both seen."""
    teachers = [draw((2, *size), torch.float32, device) for size in MAPS]

    def function(*leaves):
        students = [x.mean(1) for x in leaves[:2]]
        return weighted(spatial_l2_squares(backend, SpatialLevels(students, leaves[2:4], leaves[4:], teachers)))

    return function, [draw(shape, torch.float32, device) for shape in ((3, 3), (3, 3), (1,), (1,))]


def channel_l2(backend, device):
    teachers = [draw((2, width), torch.float32, device) for width in TEACHER_WIDTHS]

    def function(*leaves):
        students = [x.mean((2, 3)) for x in leaves[:2]]
        return weighted(channel_l2_squares(ChannelLevels(students, leaves[2:4], leaves[4:], teachers)))

    return function, parameters(device)


def loss(backend, device):
    module = randomise(FBKDLoss(list(WIDTHS), list(TEACHER_WIDTHS), num_levels=2)).to(device)
    teachers = features(TEACHER_WIDTHS, device)
    return lambda *leaves: weighted(module(list(leaves[:2]), teachers).values()), list(module.parameters())


FUNCTIONS = [
    pools,
    masked_l2,
    channel_correlation,
    channel_divergence,
    adapted_masked_l2,
    pyramid,
    spatial_l2,
    channel_l2,
]
FUNCTIONS += [loss]
ON_EVERY_BACKEND = pytest.mark.parametrize("backend, device", [ON_CPU, INTERPRETED, ON_TRITON])
OF_EVERY_FUNCTION = pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)


def prepared(make, backend, device):
    """A function and leaves of everything that it differentiates."""
    function, further = make(backend, device)
    return function, [x.detach().requires_grad_() for x in features(WIDTHS, device)] + [
        x.detach().requires_grad_() if make is not loss else x for x in further
    ]


@OF_EVERY_FUNCTION
@ON_EVERY_BACKEND
def test_checkpointing_gives_the_same_gradients(backend, device, make):
    with fbkd_ops.use_backend(backend):
        function, leaves = prepared(make, backend, device)
        expected = torch.autograd.grad(function(*leaves), leaves)
        ours = torch.autograd.grad(checkpoint(function, *leaves, use_reentrant=False), leaves)
    assert any(gradient.any() for gradient in expected)
    torch.testing.assert_close(ours, expected)


@OF_EVERY_FUNCTION
@ON_EVERY_BACKEND
def test_saved_tensors_are_unpacked_once(backend, device, make):
    """By each of two backward passes: hooks may fetch a tensor from far away."""
    packed, unpacked = [], Counter()

    def pack(tensor):
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    def unpack(index):
        unpacked[index] += 1
        return packed[index]

    with fbkd_ops.use_backend(backend):
        function, leaves = prepared(make, backend, device)
        expected = torch.autograd.grad(function(*leaves), leaves)
        with saved_tensors_hooks(pack, unpack):
            total = function(*leaves)
        for passes in (1, 2):
            gradients = torch.autograd.grad(total, leaves, retain_graph=True)
            torch.testing.assert_close(gradients, expected)
            assert packed and unpacked == {index: passes for index in range(len(packed))}
