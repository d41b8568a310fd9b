"""Feature terms of maps that are standardised per channel: in FBKD, folded into its op, and in FGD, by PyTorch."""

import pytest
import torch
from helpers import pairs_of, randomise
from op_cases import (
    BACKENDS,
    DTYPES,
    IN_PLACE,
    LAYOUTS,
    accumulation_of,
    assert_close_to_truth,
    channels_last,
    contiguous,
    name_of,
    precision_of,
    truncation,
)
from torch import nn

import fbkd_ops
from fbkd_ops import FBKDLoss, FGDLoss, _extension, functional
from fbkd_ops.autograd.channel_moments import channel_moments
from fbkd_ops.ops import registry

BATCH_NORM = dict(affine=False, track_running_stats=False)
BOXES, IMAGE = [torch.tensor([[4.0, 2.0, 30.0, 40.0]]), torch.zeros(0, 4)], (48, 56)

pytestmark = pytest.mark.usefixtures("poison")


def draw(shape, seed, dtype=torch.float64, offset=2.0):
    """A map whose channels have deviations of their own, and means of up to ``offset`` of them."""
    generator = torch.Generator().manual_seed(seed)
    scale, shift = (torch.rand(2, shape[1], 1, 1, generator=generator) * 2).double()
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((scale + 0.1) * (x + offset * (shift - 1))).to(dtype)


def pair(widths=(6, 9), size=(2, 6, 7), dtype=torch.float64, offset=2.0):
    batch, *pixels = size
    student, teacher = (draw((batch, width, *pixels), width + side, dtype, offset) for side, width in enumerate(widths))
    return student.requires_grad_(), teacher


def make(widths=(6, 9), **overrides):
    weights = {f"{term}_weight": 1.0 for term in ("feature", "channel", "spatial", "relation")}
    options = dict(num_levels=1, use_channel_mask=True, feature_norm="channel") | weights | overrides
    return randomise(FBKDLoss(*widths, **options).double())


def results(loss, student, teacher, backend):
    """The feature term and the gradients of all terms together."""
    with fbkd_ops.use_backend(backend):
        terms = loss([student], [teacher])
    sought = {"student": student, **dict(loss.named_parameters())}
    return terms, dict(zip(sought, torch.autograd.grad(sum(terms.values()), [*sought.values()]), strict=True))


@pytest.mark.parametrize("widths", [(6, 6), (6, 9)], ids=name_of)
def test_the_feature_term_is_that_of_maps_after_a_batch_norm(widths):
    """Masks and other terms stay those of the raw maps."""
    loss, (student, teacher) = make(widths, mask_rule="joint"), pair(widths)
    terms = loss([student], [teacher])
    plain = make(widths, mask_rule="joint", feature_norm="none")([student], [teacher])
    for name in set(terms) - {"loss_fbkd_feature"}:
        torch.testing.assert_close(terms[name], plain[name], rtol=1e-12, atol=0)
    pools = functional.attention_pool(student.detach()), functional.attention_pool(teacher)
    requests = loss.levels[0].mask_requests(*pools)
    masks = [fbkd_ops.reference.attention_mask(s, t, temperature=tau, mask_rule=rule) for s, t, tau, rule in requests]
    norm_s, norm_t = (nn.BatchNorm2d(width, **BATCH_NORM) for width in widths)
    adapted = loss.levels[0].feature_adaptation(norm_s(student))
    expected = functional.masked_l2_loss(adapted, norm_t(teacher), *masks)
    torch.testing.assert_close(terms["loss_fbkd_feature"], expected, rtol=1e-12, atol=0)
    ours, theirs = (
        torch.autograd.grad(term, student, retain_graph=True)[0] for term in (terms["loss_fbkd_feature"], expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layouts", pairs_of(LAYOUTS, LAYOUTS), ids=name_of)
@pytest.mark.parametrize("widths", [(6, 6), (6, 9)], ids=name_of)
def test_layouts(widths, layouts):
    loss, (student, teacher) = make(widths), pair(widths)
    student, teacher = (layout(x.detach()) for layout, x in zip(layouts, (student, teacher), strict=True))
    student.requires_grad_()
    ours, literal = (results(loss, student, teacher, backend) for backend in ("auto", "reference"))
    torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("offset", [0, 2, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_as_exact_as_plain_pytorch(backend, device, layout, dtype, offset):
    """Up to a factor that the means have over the deviations: the folded layer multiplies maps that are not centred."""
    widths = (6, 9)
    student, teacher = (layout(x.detach()).to(device) for x in pair(widths, dtype=dtype, offset=offset))
    loss = make(widths, relation_weight=0, channel_weight=0, spatial_weight=0, channel_mask_source="teacher").to(device)
    truth = results(loss, student.double().requires_grad_(), teacher.double(), "reference")
    loss.to(accumulation_of(dtype, dtype))
    ours, eager = (results(loss, student.requires_grad_(), teacher, name) for name in (backend, "reference"))
    # Four times what a single product may be off: here the layer, the differences and their products are all rounded.
    eps = 4 * precision_of(backend, student, teacher)[1] * (1 + offset)
    for mine, theirs, exact in zip(ours, eager, truth, strict=True):
        for name in mine:
            extra = truncation(backend, device, mine[name].dtype) + 4 * torch.finfo(mine[name].dtype).eps
            assert_close_to_truth(mine[name], theirs[name], exact[name], eps + extra)


def test_levels_of_their_own():
    """Each level standardises or not; the op takes all of them at once."""
    sizes = [(6, 7), (3, 4), (1, 1)]
    loss = make((6, [6, 9, 4]), num_levels=3, feature_norm=["none", "channel", "channel"], norm="none")
    students = [draw((2, 6, *size), index).requires_grad_() for index, size in enumerate(sizes)]
    teachers = [draw((2, width, *size), 9 - width) for width, size in zip((6, 9, 4), sizes, strict=True)]
    both = []
    for backend in ("auto", "reference"):
        with fbkd_ops.use_backend(backend):
            terms = loss(students, teachers)
        both.append((terms, torch.autograd.grad(sum(terms.values()), [*students, *loss.parameters()])))
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11)


def test_gradcheck():
    loss, (student, teacher) = (
        make((3, 4), norm="none", mask_rule="joint", channel_mask_source="teacher"),
        pair((3, 4), (2, 2, 3)),
    )
    loss.levels[0].settings.__dict__["spatial_temperature"] = 1e9  # masks have no gradient: of 1 they need none

    def feature(x, *_):
        return loss([x], [teacher])["loss_fbkd_feature"]

    # What the forward pass made is finished once; a second backward pass computes it anew.
    inputs = student, *loss.levels[0].feature_adaptation.parameters()
    assert torch.autograd.gradcheck(feature, inputs, nondet_tol=1e-12)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("widths", [(6, 6), (6, 9)], ids=name_of)
def test_a_constant_channel_is_0(widths, side):
    """Its deviation is that of BatchNorm's eps, and its own gradient finite."""
    student, teacher = (x.detach().float() for x in pair(widths))
    {"student": student, "teacher": teacher}[side][:, 2] = 7.3
    loss = make(widths, relation_weight=0)
    ours, literal = (
        results(loss.to(dtype), student.to(dtype).requires_grad_(), teacher.to(dtype), backend)
        for dtype, backend in ((torch.float32, "auto"), (torch.float64, "reference"))
    )
    for mine, exact in zip(ours, literal, strict=True):
        for name in mine:
            assert mine[name].isfinite().all()
            if not exact[name].any():
                continue
            error = (mine[name] - exact[name]).norm() / exact[name].norm()
            assert error < 1e-3, (name, error)  # the mean is 2300 times what the channel is divided by


@pytest.mark.parametrize("size", [(1, 1, 1), (0, 3, 4)], ids=["one value", "no image"])
def test_one_value_a_channel_and_none(size):
    loss, (student, teacher) = make(norm="none"), pair(size=size)
    ours, literal = (results(loss, student, teacher, backend) for backend in ("auto", "reference"))
    torch.testing.assert_close(ours, literal, rtol=1e-9, atol=1e-12)
    assert all(gradient.isfinite().all() for gradient in ours[1].values())
    if size[0]:  # what is left is the layer's bias, under masks of 1 and 9 channels' softmax
        assert ours[0]["loss_fbkd_feature"] > 0


@pytest.mark.skipif(not _extension.cpu.loaded, reason="counts the C++ ops")
@pytest.mark.parametrize("widths", [(6, 6), (6, 9)], ids=name_of)
def test_one_launch_for_all_levels(monkeypatch, widths):
    """One read more of each map in forward; one of the students and their gradients in backward, and one write."""
    called = []
    kernel = registry.kernel

    def counted(name, backend):
        called.append(name)
        return kernel(name, backend)

    monkeypatch.setattr("fbkd_ops.autograd.channel_moments.kernel", counted)
    loss = make(widths, num_levels=2, norm="none")
    students, teachers = zip(pair(widths), pair(widths, (2, 3, 4)), strict=True)
    terms = loss(list(students), list(teachers))
    assert called == ["channel_correlation_forward"]
    sum(terms.values()).backward()
    assert called == ["channel_correlation_forward", "channel_correlation_backward"]


@pytest.mark.parametrize("layout", IN_PLACE, ids=name_of)
@pytest.mark.parametrize("grads", [(True, True), (True, False), (False, True)], ids=["both", "map", "moments"])
@pytest.mark.parametrize("widths", [(6, 6), (6, 9)], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_moments(backend, device, widths, grads, layout):
    """Mean and variance of both sides, and their gradients beside that of the returned student."""
    student, teacher = (layout(x.detach()).to(device) for x in pair(widths))
    weights = [torch.randn(size, dtype=torch.float64, device=device) for size in (student.shape, (2, 6))]

    def total(returned, moments):
        both = [(returned * weights[0]).sum(), (moments * weights[1]).sum()]
        return sum(part for part, is_used in zip(both, grads, strict=True) if is_used)

    leaf, other = (student.clone().requires_grad_() for _ in range(2))
    (returned,), (moments,) = channel_moments(backend, [leaf], [teacher])
    expected = [torch.stack(torch.var_mean(x, (0, 2, 3), correction=0)[::-1]) for x in (other, teacher)]
    torch.testing.assert_close([*moments], expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(total(*of), x)[0]
        for of, x in (((returned, moments.student), leaf), ((other, expected[0]), other))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_compiled_without_a_break():
    """The compiled loss is the eager one."""
    torch._dynamo.reset()
    loss, (student, teacher) = make().float(), [x.detach().float() for x in pair()]
    student.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, terms = loss([student], [teacher]), compiled([student], [teacher])
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=0)
    ours, theirs = (torch.autograd.grad(sum(each.values()), student)[0] for each in (terms, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_no_second_derivative():
    loss, (student, teacher) = make(), pair()
    (gradient,) = torch.autograd.grad(loss([student], [teacher])["loss_fbkd_feature"], student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def make_fgd(widths, **arguments):
    weights = {"foreground_weight": 0.7, "background_weight": 0.2, "attention_weight": 0, "global_weight": 0}
    return randomise(FGDLoss(*widths, num_levels=1, feature_norm="channel", **weights | arguments).double())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("widths", [(6, 6), (6, 9)], ids=name_of)
def test_fgd_compares_maps_after_a_batch_norm(widths, backend):
    """As the loss without it does when it is given such maps, but for the masks."""
    loss, (student, teacher) = make_fgd(widths, temperature=1e9), pair(widths)
    plain = FGDLoss(
        *widths,
        num_levels=1,
        foreground_weight=0.7,
        background_weight=0.2,
        attention_weight=0,
        global_weight=0,
        temperature=1e9,
    ).double()
    plain.load_state_dict(loss.state_dict())
    norm_s, norm_t = (nn.BatchNorm2d(width, **BATCH_NORM) for width in widths)
    with fbkd_ops.use_backend(backend):
        ours = loss([student], [teacher], BOXES, IMAGE)["loss_fgd_focal"]
        theirs = plain([norm_s(student)], [norm_t(teacher)], BOXES, IMAGE)["loss_fgd_focal"]
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    gradients = [torch.autograd.grad(term, student)[0] for term in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-10)


def test_fgd_keeps_the_masks_and_terms_of_the_raw_maps():
    arguments = dict(attention_weight=1.0, global_weight=1.0, temperature=0.5)
    student, teacher = pair((6, 6))
    terms = make_fgd((6, 6), **arguments)([student], [teacher], BOXES, IMAGE)
    other = randomise(FGDLoss(6, num_levels=1, foreground_weight=0.7, background_weight=0.2, **arguments).double())
    expected = other([student], [teacher], BOXES, IMAGE)
    for name in ("loss_fgd_attention", "loss_fgd_global"):
        assert torch.equal(terms[name], expected[name])
    assert terms["loss_fgd_focal"] != expected["loss_fgd_focal"]
    # Under the raw masks: a teacher of another scale has other masks, though the same standardised map.
    scaled = make_fgd((6, 6), **arguments)([student], [2 * teacher], BOXES, IMAGE)
    assert (scaled["loss_fgd_focal"] / terms["loss_fgd_focal"] - 1).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("widths", [(6, 6), (6, 9)], ids=name_of)
def test_fgd_in_half_precision(widths, dtype):
    loss, (student, teacher) = make_fgd(widths, temperature=0.5).float(), [x.detach().to(dtype) for x in pair(widths)]
    term = loss([student.requires_grad_()], [teacher], BOXES, IMAGE)["loss_fgd_focal"]
    expected = loss([student.detach().float()], [teacher.float()], BOXES, IMAGE)["loss_fgd_focal"]
    assert term.dtype == torch.float32
    torch.testing.assert_close(term, expected, rtol=2e-2, atol=0)
    (gradient,) = torch.autograd.grad(term, student)
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("size", [(2, 1, 1), (1, 1, 1), (0, 3, 4)], ids=["a pixel", "one value", "no image"])
def test_fgd_of_few_values(size):
    loss, (student, teacher) = make_fgd((6, 6)), pair((6, 6), size)
    term = loss([student], [teacher], BOXES[: size[0]], IMAGE)["loss_fgd_focal"]
    (gradient,) = torch.autograd.grad(term, student)
    assert term.isfinite() and gradient.isfinite().all()
    if size == (1, 1, 1):
        assert term < 1e-20


@pytest.mark.parametrize("kind", [FBKDLoss, FGDLoss])
@pytest.mark.parametrize("value", ["batch", True, None])
def test_another_value_is_named(kind, value):
    with pytest.raises(ValueError, match="feature_norm must be one of 'none', 'channel'"):
        kind(8, num_levels=2, feature_norm=value)
