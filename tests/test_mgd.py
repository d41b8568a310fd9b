"""MGD's loss: against the literal formula, and its masks."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fbkd_ops import MGDLoss

SIZES = [(16, 20), (8, 10), (1, 3)]


def maps(channels=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in SIZES]


def literal(loss, students, teachers):
    """The term by PyTorch, with the masks that the loss's call has drawn."""
    total = 0
    adapted = [layer(s) for layer, s in zip(loss.adaptations, students, strict=True)]
    for level, (s, t, mask) in enumerate(zip(adapted, teachers, loss.masks(adapted), strict=True)):
        generated = loss.generations[level](s * mask)
        total = total + loss.weights[level] * F.mse_loss(generated, t, reduction="sum") / len(s)
    return total


@pytest.mark.parametrize("preset, weight, ratio", [("two_stage", 5e-7, 0.45), ("one_stage", 2e-5, 0.65)])
@pytest.mark.parametrize("mask_on", ["pixels", "channels"])
@pytest.mark.parametrize("widths", [(8, 8), (8, 12)])
def test_the_literal_formula(widths, mask_on, preset, weight, ratio):
    torch.manual_seed(0)
    loss = MGDLoss(*widths, num_levels=3, preset=preset, mask_on=mask_on).double()
    assert loss.weights == [weight] * 3 and loss.mask_ratio == ratio
    students, teachers = [x.requires_grad_() for x in maps(8, 1, torch.float64)], maps(widths[1], 2, torch.float64)
    term, expected = loss(students, teachers)["loss_mgd"], literal(loss, students, teachers)
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=0)
    leaves = [*students, *loss.parameters()]
    gradients = [torch.autograd.grad(each, leaves) for each in (term, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-18)


def test_a_weight_for_each_level():
    loss = MGDLoss(8, num_levels=3, weight=[1, 0, 2.5])
    assert {name.split(".")[1] for name, _ in loss.named_parameters()} == {"0", "2"}
    students, teachers = maps(seed=1), maps(seed=2)
    students[1][0, 0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match="carry no gradient"):
        term = loss(students, teachers)["loss_mgd"]
    used = students[::2]
    generated = [
        loss.generations[level](s * mask) for level, s, mask in zip((0, 2), used, loss.masks(used), strict=True)
    ]
    distances = [F.mse_loss(x, t, reduction="sum") / 2 for x, t in zip(generated, teachers[::2], strict=True)]
    torch.testing.assert_close(term, distances[0] + 2.5 * distances[1])


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.65, 1.0])
def test_as_much_is_masked_as_asked(ratio):
    loss = MGDLoss(8, num_levels=2, mask_ratio=ratio)
    for mask in loss.masks([torch.empty(4, 8, 100, 90), torch.empty(4, 8, 50, 45)]):
        assert mask.shape[1] == 1
        for image in mask:
            assert abs(image.float().mean() - (1 - ratio)) < 0.03  # five standard deviations
    (mask,) = MGDLoss(2000, num_levels=1, mask_ratio=ratio, mask_on="channels").masks([torch.empty(2, 2000, 3, 4)])
    assert mask.shape == (2, 2000, 1, 1) and abs(mask.float().mean() - (1 - ratio)) < 0.05


def test_masks_do_not_depend_on_the_defaults_of_the_process():
    expected = drawn(MGDLoss(8, num_levels=1, seed=3))
    loss = MGDLoss(8, num_levels=1, seed=3)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        (mask,) = loss.masks([torch.empty(2, 8, 64, 64, device="cpu")])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(mask.flatten().float(), expected)


def test_a_ratio_of_1_masks_the_largest_number_too():
    assert torch.tensor(2**32 - 1) < round(1.0 * 2**32)
    assert not drawn(MGDLoss(8, num_levels=1, mask_ratio=1), (2, 8, 512, 512)).any()


def drawn(loss, size=(2, 8, 64, 64)):
    (mask,) = loss.masks([torch.empty(size)])
    return mask.flatten().float()


def correlation(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].abs()


def test_masks_of_other_calls_seeds_places_and_images_are_unrelated():
    losses = [MGDLoss(8, num_levels=1, seed=seed) for seed in (0, 1, -1, 2**40 + 5)]
    masks = [drawn(loss) for loss in losses]
    for loss in losses:
        loss.draws += 1
        masks.append(drawn(loss))
    for index, mask in enumerate(masks):
        assert correlation(mask[:4096], mask[4096:]) < 0.08  # two images; five standard deviations
        assert correlation(mask[1:], mask[:-1]) < 0.06
        assert correlation(mask[64:], mask[:-64]) < 0.06
        assert all(correlation(mask, other) < 0.06 for other in masks[:index])


def test_a_resumed_training_draws_what_it_would_have_drawn():
    loss = MGDLoss(8, num_levels=3)
    students, teachers = [x.requires_grad_() for x in maps(seed=1)], maps(seed=2)
    for _ in range(3):
        loss(students, teachers)
    state, resumed = copy.deepcopy(loss.state_dict()), MGDLoss(8, num_levels=3)
    resumed.load_state_dict(state)
    for _ in range(2):
        terms = [each(students, teachers)["loss_mgd"] for each in (loss, resumed)]
        assert torch.equal(*terms)
    assert loss.draws == 5


def test_each_training_call_draws_anew_and_no_other():
    loss = MGDLoss(8, num_levels=3)
    students, teachers = [x.requires_grad_() for x in maps(seed=1)], maps(seed=2)
    first, second = (loss(students, teachers)["loss_mgd"].item() for _ in range(2))
    assert first != second
    loss.eval()
    assert loss(students, teachers)["loss_mgd"].item() == loss(students, teachers)["loss_mgd"].item() == second


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision(dtype, autocast):
    torch.manual_seed(0)
    loss = MGDLoss(8, 12, num_levels=3, weight=1)
    students, teachers = [x.requires_grad_() for x in maps(8, 1, dtype)], maps(12, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        term = loss(students, teachers)["loss_mgd"]
    expected = literal(loss, [x.float() for x in students], teachers)
    torch.testing.assert_close(term, expected, rtol=2e-2, atol=0)
    gradients = torch.autograd.grad(term, [*students, *loss.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert term.dtype == torch.float32 and gradients[0].dtype == dtype


def test_a_compiled_loss_is_one_graph():
    torch._dynamo.reset()
    loss = MGDLoss(8, [8, 8, 12])
    students, teachers = [x.requires_grad_() for x in maps()], [*maps(8, 1)[:2], maps(12, 1)[2]]
    compiled = torch.compile(copy.deepcopy(loss), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(students, teachers)["loss_mgd"], loss(students, teachers)["loss_mgd"])


def test_no_image():
    loss = MGDLoss(8, num_levels=1)
    student = torch.zeros(0, 8, 4, 5, requires_grad=True)
    term = loss([student], [torch.zeros(0, 8, 4, 5)])["loss_mgd"]
    term.backward()
    assert term == 0 and student.grad.shape == student.shape


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"mask_ratio": 1.5}, ValueError, r"mask_ratio must be a number in \[0, 1\], got 1.5"),
        ({"mask_ratio": "half"}, (TypeError, ValueError), "mask_ratio"),
        ({"mask_on": "rows"}, ValueError, "mask_on must be one of 'pixels', 'channels', got 'rows'"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got 0.5"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        MGDLoss(8, **arguments)
