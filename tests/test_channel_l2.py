"""The channel term's squared distances against the plain formula, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, accumulation_of, assert_as_good, draw, name_of

from fbkd_ops.autograd.channel_l2 import ChannelLevels, channel_l2_squares


def level(n, widths, dtypes=(torch.float32,) * 3):
    """Student, weight, bias and teacher; ``dtypes`` of the student, the parameters and the teacher."""
    student, parameters, teacher = dtypes
    return [
        draw((n, widths[0]), student).requires_grad_(),
        draw((widths[1], widths[0]), parameters).requires_grad_(),
        draw((widths[1],), parameters).requires_grad_(),
        draw((n, widths[1]), teacher),
    ]


def lists(levels):
    return ChannelLevels(*map(list, zip(*levels, strict=True)))


def plain(levels, of=None):
    """The formula, level by level, in ``of`` or the accumulation dtype."""
    squares = []
    for student, weight, bias, teacher in levels:
        dtype = of or accumulation_of(student.dtype, teacher.dtype)
        adapted = F.linear(student.to(dtype), weight.to(dtype), bias.to(dtype))
        squares.append((teacher.to(dtype) - adapted).square().sum())
    return torch.stack([square.to(of or accumulation_of(*(s.dtype for s in squares))) for square in squares])


def results(squares, levels):
    """The sums and the gradients of each of them times another number."""
    leaves = [x for each in levels for x in each[:3]]
    return squares.detach(), *torch.autograd.grad(squares @ torch.arange(1, len(levels) + 1).to(squares.dtype), leaves)


def check(levels):
    ours = results(channel_l2_squares(lists(levels)), levels)
    eager, exact = results(plain(levels), levels), results(plain(levels, torch.float64), levels)
    for result, expected, truth in zip(ours, eager, exact, strict=True):
        extra = torch.finfo(result.dtype).eps if result.element_size() == 2 else 0.0
        assert_as_good(result, expected, truth.double(), accumulation=torch.float32, extra=extra)


# Levels alike beside others, between others, and none of them.
PYRAMIDS = [
    [(2, (5, 7))],
    [(2, (5, 7))] * 4,
    [(2, (5, 7)), (2, (6, 3)), (2, (5, 7)), (2, (4, 3))],
    [(2, (5, 7)), (3, (5, 7)), (1, (1, 1)), (0, (5, 7))],
    [(3, (64, 192)), (3, (128, 384)), (3, (256, 576))],
]


@pytest.mark.parametrize("shapes", PYRAMIDS, ids=str)
def test_pyramids(shapes):
    check([level(*shape) for shape in shapes])


@pytest.mark.parametrize("student", DTYPES, ids=name_of)
@pytest.mark.parametrize("parameters", DTYPES, ids=name_of)
def test_dtypes(student, parameters):
    """Beside a level of float32, which the sums of another level must not round."""
    check([level(2, (5, 7), (student, parameters, student)), level(2, (5, 7)), level(2, (5, 7), (student,) * 3)])


def test_levels_of_one_width_are_subtracted_together():
    names = [node.name for node in torch.fx.experimental.proxy_tensor.make_fx(graph_of)().graph.nodes]
    assert sum(name.startswith("sub") for name in names) == 2


def graph_of():
    return channel_l2_squares(lists([level(2, (5, 7)), level(2, (6, 3)), level(2, (5, 7))]))


def test_gradcheck():
    levels = [level(2, widths, (torch.float64,) * 3) for widths in ((3, 2), (2, 3), (3, 2))]
    flat = [x for each in levels for x in each]

    def function(*tensors):
        return channel_l2_squares(lists([tensors[first : first + 4] for first in range(0, len(tensors), 4)]))

    assert torch.autograd.gradcheck(function, flat)


def test_teachers_get_no_gradient():
    levels = [[x.detach().requires_grad_() for x in level(2, (3, 4))]]
    channel_l2_squares(lists(levels)).sum().backward()
    assert [x.grad is None for x in levels[0]] == [False, False, False, True]
