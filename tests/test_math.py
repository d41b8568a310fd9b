"""The numbered steps of docs/math.md, each against the formula it replaces, in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randomise
from op_cases import NO_CPU

from fbkd_ops import NonLocalBlock2d, reference
from fbkd_ops.non_local.batch_norm import Moments, _over_images, scale_and_shift
from fbkd_ops.non_local.collapsed_algebra import all_pairs, fill_covariances, pooled_pairs, project_moments
from fbkd_ops.non_local.modes import MODES, Operands
from fbkd_ops.non_local.relation import RelationTerm, collapsed_levels
from fbkd_ops.non_local.responses import Response, _moments
from fbkd_ops.ops.non_local_statistics import NO_POOL, StatisticsRequest, non_local_statistics
from fbkd_ops.ops.registry import kernel
from fbkd_ops.ops.relation_residual import RelationLevels, relation_residual

BACKEND = "cpu"
pytestmark = NO_CPU
IMAGES, CHANNELS, INNER, HEIGHT, WIDTH = 3, 9, 4, 7, 8


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def features(seed: int = 0, channels: int = CHANNELS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(IMAGES, channels, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return x + torch.arange(IMAGES)[:, None, None, None]  # images of different means


def block_of(inner: int = INNER, **settings) -> NonLocalBlock2d:
    return randomise(NonLocalBlock2d(CHANNELS, inner, **settings).double(), seed=1)


def level_of(student, teacher, student_block, teacher_block, weight, bias):
    """P, ``U W`` and v of one level."""
    term = RelationTerm(student, teacher, student_block.block(), teacher_block.block(), weight, bias)
    _, (p,), _, (u,), (w,), (v,) = collapsed_levels(BACKEND, [term])
    return p, u if w is None else u @ w, v


def conv(x, layer):
    """``layer`` on x, ``(N, c, L)``."""
    return F.conv2d(x, layer.weight, layer.bias).flatten(2)


def covariance(vectors):
    """Biased, of ``(N, c, L)`` over L."""
    centred = vectors - vectors.mean(2, keepdim=True)
    return centred @ centred.mT / vectors.shape[2]


def test_1_the_sum_over_pairs_comes_first():
    theta, phi, g = (torch.randn(IMAGES, INNER, n, dtype=torch.float64) for n in (56, 12, 12))
    literal = torch.einsum("nci,ncj,ndj->ndi", theta, phi, g) / 12
    close(pooled_pairs(torch.cat([phi, g], 1)[None], [12])[0].mT @ theta, literal)


@pytest.mark.parametrize("inner", [3, INNER, CHANNELS])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_2_the_block_is_an_affine_map_of_its_input(inner, stride):
    block, x = block_of(inner, stride=stride, norm="none"), features()
    nothing = torch.zeros(CHANNELS, CHANNELS).double(), torch.zeros(CHANNELS).double()  # is left of the student
    matrix, offset = level_of(x, x, block, block, *nothing)[1:]
    z = x.flatten(2) + matrix @ x.flatten(2) + offset[:, :, None]
    close(z.reshape(x.shape), reference.non_local(x, block.weights(), stride=stride))


@pytest.mark.parametrize("narrow", [False, True])
def test_3_pairs_of_all_pixels_from_a_covariance(narrow):
    block, x = block_of(), features()
    weights, mean = block.weights(), x.mean((2, 3))
    projection = torch.cat([weights.theta_weight, weights.phi_weight, weights.g_weight])
    bias = torch.cat([weights.theta_bias, weights.phi_bias, weights.g_bias])
    statistics = kernel("non_local_statistics_forward", BACKEND)
    *_, found = statistics([x], [mean], [projection if narrow else None], [None], [None], NO_POOL)
    moments = torch.zeros(1, IMAGES, 2 + 3 * INNER, CHANNELS, dtype=torch.float64)
    moments[0, :, 1] = mean
    if narrow:
        moments[0, :, 2:] = found
    else:
        fill_covariances(moments[:, :, 2:], projection[None], found[None])
    probes = project_moments(moments, projection[None])
    probes[:, :, :2] += bias
    phi, g, pairs = conv(x, block.phi), conv(x, block.g), all_pairs(probes, INNER)
    close(pairs[0], phi @ g.mT / (HEIGHT * WIDTH))


def test_4_concatenation_from_suffix_sums():
    theta, phi, g = (torch.randn(IMAGES, INNER, n, dtype=torch.float64) for n in (56, 12, 12))
    pair = torch.randn(2 * INNER, dtype=torch.float64)
    a, b = pair[:INNER] @ theta, pair[INNER:] @ phi
    literal = torch.relu(a[:, :, None] + b[:, None, :]) @ g.mT / 12
    close(MODES["concatenation"].attend(Operands(theta, phi, pair, False), g), literal.mT)


def test_5_variance_within_and_between_images():
    response = Response(
        features(channels=INNER).flatten(2), torch.randn(IMAGES, CHANNELS, INNER).double(), torch.ones(1)
    )
    u = response.matrix @ response.vectors + response.bias  # (N, C, L)
    mean, variance, count = _over_images(_moments(response))
    close(mean, u.mean((0, 2)))
    close(variance, u.var((0, 2), correction=0))
    assert count == IMAGES * HEIGHT * WIDTH


def test_6_normalisation_is_a_scale_and_a_shift():
    ours, theirs = (randomise(torch.nn.BatchNorm2d(CHANNELS).double(), seed=2) for _ in range(2))
    u = features()
    moments = Moments(u.mean((2, 3)), u.var((2, 3), correction=0), HEIGHT * WIDTH)
    scale, shift = scale_and_shift(ours, moments, u)
    close(scale[:, None, None] * u + shift[:, None, None], theirs(u))
    close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("narrow", [False, True])
def test_7_gradients_of_a_covariance(narrow):
    x = features().requires_grad_()
    projection = torch.randn(3, CHANNELS, dtype=torch.float64, requires_grad=True) if narrow else None
    rank = 3 if narrow else CHANNELS
    d_covariance, d_mean = torch.randn(IMAGES, rank, rank).double(), torch.randn(IMAGES, CHANNELS).double()
    (ours,) = non_local_statistics(BACKEND, [StatisticsRequest(x, x.detach().mean((2, 3)), projection)])
    vectors = x.flatten(2) if projection is None else projection @ x.flatten(2)
    literal = covariance(vectors), x.mean((2, 3))
    close(ours.covariance, literal[0])
    leaves = [x] if projection is None else [x, projection]
    directions = (d_covariance, d_mean)
    expected = torch.autograd.grad(literal, leaves, directions)
    close(torch.autograd.grad((ours.covariance, ours.mean), leaves, directions), expected)

    symmetric = d_covariance + d_covariance.mT
    centred = (x - x.mean((2, 3), keepdim=True)).flatten(2).detach()
    inner = symmetric if projection is None else projection.mT @ symmetric @ projection
    dx = inner @ centred / centred.shape[2] + d_mean[:, :, None] / centred.shape[2]
    close(expected[0].flatten(2), dx.detach())
    if projection is not None:
        close(expected[1], (symmetric @ projection @ covariance(x.flatten(2))).sum(0).detach())


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_8_winners_get_the_gradients_of_pooled_values(stride):
    x, layer = features().requires_grad_(), block_of().g
    weight, bias = layer.weight, layer.bias
    full = F.conv2d(x, weight, bias)
    pooled, winners = F.max_pool2d(full, stride, return_indices=True)
    d_pooled = torch.randn(pooled.shape, dtype=torch.float64)
    expected = torch.autograd.grad(pooled, (x, weight), d_pooled)
    (ours,) = non_local_statistics(
        BACKEND, [StatisticsRequest(x, weight=weight.flatten(1), bias=bias, pool=(stride,) * 4)]
    )
    close(ours.pooled, pooled.flatten(2))
    close(torch.autograd.grad(ours.pooled, (x, weight), d_pooled.flatten(2)), expected)

    values = x.detach().flatten(2)
    dx, dw = torch.zeros_like(values), torch.zeros(INNER, CHANNELS, dtype=torch.float64)
    for image in range(IMAGES):
        for channel in range(INNER):
            for winner, grad in zip(winners[image, channel].flatten(), d_pooled[image, channel].flatten(), strict=True):
                dw[channel] += grad * values[image, :, winner]
                dx[image, :, winner] += grad * weight[channel].flatten().detach()
    close(expected[0].flatten(2), dx)
    close(expected[1].flatten(1), dw)


@pytest.mark.parametrize("inner", [3, CHANNELS])
def test_9_the_relation_residual_is_affine_in_both_maps(inner):
    student_block = block_of(inner, stride=2)
    teacher_block = randomise(NonLocalBlock2d(6, 2, stride=2).double(), seed=4)
    adaptation = randomise(torch.nn.Conv2d(CHANNELS, 6, 1).double(), seed=3)
    s, t = features(), features(5, channels=6)
    literal = teacher_block(t) - adaptation(student_block(s))
    p, matrix, v = level_of(s, t, student_block, teacher_block, adaptation.weight.flatten(1), adaptation.bias)
    r = torch.eye(6, dtype=torch.float64) + matrix
    close((r @ t.flatten(2) - p @ s.flatten(2) + v[:, :, None]).reshape(t.shape), literal)


@pytest.mark.parametrize("projects", [False, True])
def test_10_gradients_of_the_relation_residual(projects):
    s, t = features().requires_grad_(), features(5, channels=6)
    shapes = (IMAGES, 6, CHANNELS), (IMAGES, 6, 2 if projects else 6), (2, 6), (IMAGES, 6)
    p, u, w, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    leaves = [s, p, u, v] + ([w] if projects else [])
    levels = RelationLevels([s], [p], [t], [u], [w if projects else None], [v])
    (squares,) = relation_residual(BACKEND, levels)
    ours = torch.autograd.grad(squares, leaves)

    s, t, p, u, w, v = (x.detach() for x in (s.flatten(2), t.flatten(2), p, u, w, v))
    r = torch.eye(6, dtype=torch.float64) + (u @ w if projects else u)
    e = r @ t - p @ s + v[:, :, None]
    close(squares.detach(), e.square().sum())
    dr = 2 * e @ t.mT
    expected = [-2 * p.mT @ e, -2 * e @ s.mT, dr @ w.mT if projects else dr, 2 * e.sum(2)]
    close(ours[0].flatten(2), expected[0])
    close(list(ours[1:4]), expected[1:])
    if projects:
        close(ours[4], (u.mT @ dr).sum(0))
