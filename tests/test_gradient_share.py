"""The factor that gives the terms a share of the detector's own gradient: measured, followed, saved, left alone."""

import collections
import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers import TEST_ALL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fbkd_ops import Distiller, FBKDLoss, Layer
from fbkd_ops.training.gradient_share import FIRST_FACTOR, MAPS, BranchSquares

WIDTH, TEACHER_WIDTH, BATCH = 8, 12, 2


class Pyramid(nn.Module):
    """Two stages, and an FPN's lateral convolutions and outputs."""

    def __init__(self, width: int):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.lateral1, self.lateral2 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.output1, self.output2 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stage1(x)
        coarse = self.lateral2(self.stage2(fine))
        merged = self.lateral1(fine) + nn.functional.interpolate(coarse, scale_factor=2)
        return {"fine": self.output1(merged), "coarse": self.output2(coarse)}


class Head(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.convolution = nn.Conv2d(width, 4, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return sum((self.convolution(x) - 1).square().mean() for x in maps)


class Detector(nn.Module):
    def __init__(self, width: int, in_place: bool = False, checkpoints: bool = False):
        super().__init__()
        self.backbone, self.head = Pyramid(width), Head(width)
        self.in_place, self.checkpoints = in_place, checkpoints

    def forward(self, images: Tensor, targets: None = None) -> dict[str, Tensor]:
        maps = checkpoint(self.backbone, images, use_reentrant=False) if self.checkpoints else self.backbone(images)
        if self.in_place:
            maps["coarse"].relu_()
        return {"loss_box": self.head(list(maps.values()))}


def make(share: float | None = 0.3, layers="backbone", width: int = WIDTH, seed: int = 0, **arguments) -> Distiller:
    torch.manual_seed(seed)
    student, teacher = Detector(width), Detector(TEACHER_WIDTH)
    loss = FBKDLoss([width] * 2, [TEACHER_WIDTH] * 2, stride=2)
    return Distiller(student, teacher, loss, student_layers=layers, gradient_share=share, **arguments)


def batch(step: int, size: int = 16) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(step))


def exact_share(distiller: Distiller, images: Tensor) -> float:
    """The share that the present factor gives, from separate backward passes to the tapped maps."""
    twin = copy.deepcopy(distiller)
    output, students, teachers = twin.run(images)
    terms = sum(twin.loss(students, teachers).values()) * twin.step_weight() * float(twin.share.factor(1.0))
    maps = list(students.values()) if isinstance(students, dict) else students
    own = torch.autograd.grad(output["loss_box"], maps, retain_graph=True)
    return float(norm(torch.autograd.grad(terms, maps)) / norm(own))


def norm(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()


def train(distiller, steps: int, first: int = 0, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """The measured share after each step."""
    optimizer = optimizer or torch.optim.SGD(distiller.parameters(), lr=0.01)
    shares = []
    for step in range(first, first + steps):
        losses = distiller(batch(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        shares.append(float(distiller.weights()["fbkd_gradient_share"]))
    return shares


# The stages are made of one another: the lower one's gradient also has what the terms send down.
LAYERS = {
    "dict of maps": ("backbone", 1e-4),
    "inputs": (Layer("head", inputs=True), 1e-4),
    "lateral convolutions": (["backbone.lateral1", "backbone.lateral2"], 1e-4),
    "stages": (["backbone.stage1", "backbone.stage2"], 0.2),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_measured_share_is_the_exact_one(kind):
    layers, tolerance = LAYERS[kind]
    distiller = make(layers=layers, share_every=1)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for step in range(8):
        expected = exact_share(distiller, batch(step))
        train(distiller, 1, step, optimizer)
        distiller.share.collect()
        assert float(distiller.share.share) == pytest.approx(expected, rel=tolerance)


def test_maps_apart_are_measured_exactly():
    """In the first step the terms send nothing of weight down."""
    distiller = make()
    expected = exact_share(distiller, batch(0))
    train(distiller, 1)
    distiller.share.collect()
    assert float(distiller.share.share) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("target", [0.1, 1.0])
@pytest.mark.parametrize("size", [16, 32])
def test_the_share_is_held(target, size):
    distiller = make(target, share_every=2)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    measured = []
    for step in range(60):
        losses = distiller(batch(step, size))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if step > 30 and step % 2:
            measured.append(float(distiller.share.share))
    assert torch.tensor(measured).median() == pytest.approx(target, rel=0.2)
    assert sum(target / 2 < share < 2 * target for share in measured) >= 0.8 * len(measured)


def test_nothing_but_a_thousandth_before_the_first_measurement():
    plain, shared = make(None), make()
    full, terms = plain(batch(0)), shared(batch(0))
    for name in FBKDLoss.term_names:
        torch.testing.assert_close(terms[name], FIRST_FACTOR * full[name])
        torch.testing.assert_close(shared.terms()[name], terms[name].detach())
    assert float(shared.weights()["fbkd_weight"]) == pytest.approx(FIRST_FACTOR)


def test_the_students_loss_and_gradient_stay_as_they_are():
    """But for the terms: the identities change no bit."""
    distiller = make()
    alone = copy.deepcopy(distiller.student)
    distiller(batch(0))["loss_box"].backward()
    alone(batch(0))["loss_box"].backward()
    for ours, theirs in zip(distiller.student.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_only_every_few_steps_and_no_more_after_the_last():
    distiller = make(share_every=3, share_steps=6, start_step=1)
    measured = []
    for step in range(12):
        before = int(distiller.share.measured)
        train(distiller, 1, step)
        measured.append(int(distiller.share.measured) - before)
    # Steps 1 and 4 measure, and the next forward takes it in.
    assert measured == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    factor = float(distiller.share.factor(1.0))
    train(distiller, 3, 12)
    assert float(distiller.share.factor(1.0)) == factor


def test_warm_up_and_weight_come_on_top():
    distiller = make(warmup_steps=4, weight=0.5, share_every=1)
    assert distiller.step_weight() == 0.125
    plain = make(share_every=1)
    train(distiller, 5)
    train(plain, 5)
    # The factor makes the share with a full weight, whatever the schedule.
    assert float(distiller.weights()["fbkd_weight"]) == pytest.approx(0.5 * float(distiller.share.factor(1.0)))
    assert float(distiller.share.factor(1.0)) == pytest.approx(float(plain.share.factor(1.0)), rel=0.2)


@pytest.mark.parametrize("form", ["state_dict", "pickle", "deepcopy"])
def test_resumed_bit_for_bit(form):
    """Also between a backward pass and the forward that takes it in."""
    for steps in (3, 4):
        straight = make(share_every=2)
        optimizer = torch.optim.SGD(straight.parameters(), lr=0.01)
        train(straight, steps, 0, optimizer)
        resumed = make(share_every=2, seed=1)
        if form == "state_dict":
            file = io.BytesIO()
            torch.save(straight.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file))
            resumed.teacher.load_state_dict(straight.teacher.state_dict())
        else:
            resumed = pickle.loads(pickle.dumps(straight)) if form == "pickle" else copy.deepcopy(straight)
        expected = train(straight, 4, steps, optimizer)
        assert train(resumed, 4, steps) == expected
        for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_checkpoints_of_a_training_without_a_share_load():
    distiller = make()
    distiller.load_state_dict(make(None, seed=1).state_dict())
    train(distiller, 3)
    assert int(distiller.share.measured) == 1
    assert not [name for name in make(None).state_dict() if "share" in name]


def test_an_overflow_changes_nothing():
    distiller = make(share_every=1)
    train(distiller, 3)
    before = float(distiller.share.factor(1.0))
    losses = distiller(batch(3))
    before = float(distiller.share.factor(1.0))
    (sum(losses.values()) * 1e38 * 1e30).backward()
    distiller.zero_grad()
    distiller(batch(4))
    assert float(distiller.share.factor(1.0)) == before and int(distiller.share.failed) == 1


def test_scaled_gradients_and_accumulation_have_the_same_share():
    plain, scaled = make(share_every=1), make(share_every=1)
    for step in range(4):
        for distiller, scale in ((plain, 1.0), (scaled, 2.0**16)):
            (scale * sum(distiller(batch(step)).values())).backward()
    torch.testing.assert_close(scaled.share.factor(1.0), plain.share.factor(1.0))


def test_a_detector_without_own_gradient_keeps_the_factor_and_is_told():
    distiller = make(share_every=1)
    for parameter in distiller.student.head.parameters():
        nn.init.zeros_(parameter.requires_grad_(False))
    with pytest.warns(UserWarning, match="gradient_share: in 10 measurements in a row.*was 0 or not finite"):
        train(distiller, 12)
    assert float(distiller.share.factor(1.0)) == pytest.approx(FIRST_FACTOR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(distiller, 12)


def test_one_backward_pass_of_several_batches():
    """Each measurement meets its own factor, although it comes after the next forward."""
    apart, together = make(share_every=1), make(share_every=1)
    for pair in range(10):
        losses = [sum(together(batch(2 * pair + part)).values()) for part in range(2)]
        sum(losses).backward()
        for part in range(2):
            sum(apart(batch(2 * pair + part)).values()).backward()
    together.share.collect()
    apart.share.collect()
    assert int(together.share.measured) == 20 and int(together.share.failed) == 0
    assert float(together.share.factor(1.0)) == pytest.approx(float(apart.share.factor(1.0)), rel=0.5)


def test_the_last_step_measures_again_until_one_could():
    distiller = make(share_every=1, share_steps=1)
    (sum(distiller(batch(0)).values()) * 1e38 * 1e30).backward()
    train(distiller, 3, 1)
    assert int(distiller.share.measured) == 1
    factor = float(distiller.share.factor(1.0))
    train(distiller, 3, 4)
    assert float(distiller.share.factor(1.0)) == factor


def test_the_state_is_where_the_student_is():
    student, teacher = (Detector(width).to("meta") for width in (WIDTH, TEACHER_WIDTH))
    loss = FBKDLoss([WIDTH] * 2, [TEACHER_WIDTH] * 2, stride=2).to("meta")
    distiller = Distiller(student, teacher, loss, student_layers="backbone", gradient_share=0.1)
    assert {buffer.device.type for buffer in distiller.share.buffers()} == {"meta"}
    distiller.to_empty(device="cpu")
    assert all(torch.equal(buffer, torch.zeros_like(buffer)) for buffer in distiller.share.buffers())


def test_a_move_between_forward_and_backward_is_no_failure():
    distiller = make(share_every=1)
    losses = distiller(batch(0))
    distiller.to("cpu")
    sum(losses.values()).backward()
    train(distiller, 2, 1)
    assert (int(distiller.share.failed), int(distiller.share.measured)) == (0, 1)


def test_checkpoints_of_a_training_with_a_share_load_without_one():
    distiller = make(None)
    distiller.load_state_dict(make(seed=1).state_dict())


def test_maps_in_a_dict_that_is_not_made_of_another():
    class Defaults(Pyramid):
        def forward(self, x):
            maps = collections.defaultdict(list)
            maps.update(super().forward(x))
            return maps

    distiller = make(share_every=1)
    distiller.student.backbone.__class__ = Defaults
    train(distiller, 2)
    assert int(distiller.share.measured) == 1


def test_evaluation_and_forwards_without_gradient_measure_nothing():
    distiller = make(share_every=1)
    with torch.no_grad():
        distiller(batch(0))
    distiller.eval()(batch(1))
    assert not distiller.share.is_waiting()


def test_activation_checkpointing_measures_once():
    plain, saving = make(share_every=1), make(share_every=1)
    saving.student.checkpoints = True
    assert train(plain, 4) == pytest.approx(train(saving, 4), rel=1e-5)


def test_a_change_in_place_is_an_error():
    distiller = make()
    distiller.student.in_place = True
    with pytest.raises(RuntimeError, match="what was caught at 'backbone' was changed in place"):
        distiller(batch(0))


def test_half_precision_keeps_the_state_in_float32():
    distiller = make().to(torch.bfloat16)
    assert {buffer.dtype for buffer in distiller.share.buffers()} == {torch.float32}
    for step in range(2):
        sum(distiller(batch(step).bfloat16()).values()).backward()
    assert float(distiller.weights()["fbkd_gradient_share"]) > 0


@pytest.mark.parametrize("part", ["student", "distiller"] if TEST_ALL else ["student"])
def test_compiled(part):
    """A student in one whole graph, which has the identities in it; a distiller in several."""
    torch._dynamo.reset()
    eager, compiled = make(share_every=2), make(share_every=2)
    if part == "student":
        compiled.student.compile(backend="aot_eager", fullgraph=True)
    expected = train(eager, 5)
    step = torch.compile(compiled, backend="aot_eager") if part == "distiller" else compiled
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.01)
    found = []
    for index in range(5):
        optimizer.zero_grad()
        sum(step(batch(index)).values()).backward()
        optimizer.step()
        found.append(float(compiled.weights()["fbkd_gradient_share"]))
    assert found == pytest.approx(expected, rel=1e-4) and expected[-1] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(share=0.0), "gradient_share must be a finite number > 0, got 0.0"),
        (dict(share="all"), "gradient_share must be a finite number > 0, got 'all'"),
        (dict(share_every=0), "share_every must be an int >= 1, got 0"),
        (dict(share_steps=0.5), "share_steps must be None or an int >= 1, got 0.5"),
        (dict(layers=lambda output: output), "gradient_share needs student_layers by module path"),
        (dict(weight=-1), "weight must be a finite number >= 0, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_maps_that_the_loss_does_not_read_do_not_count():
    torch.manual_seed(0)
    loss = FBKDLoss([WIDTH], [TEACHER_WIDTH], stride=2)
    distiller = Distiller(
        Detector(WIDTH),
        Detector(TEACHER_WIDTH),
        loss,
        student_layers="backbone",
        gradient_share=0.3,
        student_levels=["fine"],
        teacher_levels=["fine"],
    )
    expected = exact_share(distiller, batch(0))
    train(distiller, 1)
    distiller.share.collect()
    assert float(distiller.share.share) == pytest.approx(expected, rel=1e-4)


def test_squares_of_half_precision_gradients_do_not_overflow():
    sums = torch.zeros(MAPS, requires_grad=True)
    (x,) = BranchSquares.apply(sums, torch.zeros(4, dtype=torch.float16, requires_grad=True))
    (300 * x).sum().backward()
    assert sums.grad[0] == 4 * 300.0**2 and not sums.grad[1:].any()


def test_terms_far_larger_than_the_detectors_losses_are_warned_of_once():
    large, small = make(None, weight=1e4), make(None, weight=1e-4)
    with pytest.warns(UserWarning, match="times as large as the detector's own losses.*gradient_share=0.1"):
        large(batch(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*as large as the detector's own.*")
        large(batch(1))
        small(batch(0))
