"""Several losses in one distiller: their terms, levels and shares."""

import copy

import pytest
import torch
from test_gradient_share import TEACHER_WIDTH, WIDTH, Detector, batch, norm
from torch import nn

import fbkd_ops
from fbkd_ops import CWDLoss, Distiller, FBKDLoss, PKDLoss

LAYERS = ["backbone.output1", "backbone.output2"]


def pkd(levels=2):
    return PKDLoss(WIDTH, TEACHER_WIDTH, num_levels=levels)


def cwd(levels=2):
    return CWDLoss(WIDTH, TEACHER_WIDTH, num_levels=levels)


def make(loss, seed=0, **arguments) -> Distiller:
    torch.manual_seed(seed)
    student, teacher = Detector(WIDTH), Detector(TEACHER_WIDTH)
    return Distiller(student, teacher, loss, **{"student_layers": "backbone", **arguments})


def train(module, steps, rate=0.01):
    optimizer = torch.optim.SGD(module.parameters(), rate)
    for step in range(steps):
        optimizer.zero_grad()
        fbkd_ops.sum_losses(module(batch(step))).backward()
        optimizer.step()


def test_the_terms_of_all_losses_come_together():
    losses = {"fbkd": FBKDLoss(WIDTH, TEACHER_WIDTH, num_levels=2, preset="one_stage"), "pkd": pkd()}
    module = make(losses)
    result = module(batch(0))
    assert list(result) == ["loss_box", *FBKDLoss.term_names, "loss_pkd"]
    assert list(module.terms()) == module.loss.term_names == [*FBKDLoss.term_names, "loss_pkd"]
    _, students, teachers = module.run(batch(0))
    for loss in losses.values():
        for name, term in loss(students, teachers).items():
            torch.testing.assert_close(result[name], term)
    assert {name.split(".")[1] for name in module.state_dict() if name.startswith("loss.")} == {"fbkd", "pkd"}


def test_a_term_that_two_losses_give_has_the_loss_s_name():
    levels = {"fine": ["fine"], "coarse": ["coarse"]}
    module = make({"fine": cwd(1), "coarse": cwd(1)}, student_levels=levels, teacher_levels=levels)
    result = module(batch(0))
    assert list(result) == ["loss_box", "loss_cwd_fine", "loss_cwd_coarse"] and result["loss_cwd_fine"] > 0
    assert module.loss.term_names == ["loss_cwd_fine", "loss_cwd_coarse"]


def test_each_loss_has_its_own_levels():
    levels = {"pkd": [1], "cwd": [0]}
    module = make({"pkd": pkd(1), "cwd": cwd(1)}, student_layers=LAYERS, student_levels=levels, teacher_levels=levels)
    result = module(batch(0))
    _, students, teachers = module.run(batch(0))
    for name, index in (("pkd", 1), ("cwd", 0)):
        expected = module.loss[name]([students[index]], [teachers[index]])[f"loss_{name}"]
        torch.testing.assert_close(result[f"loss_{name}"], expected)


def test_each_side_has_its_own_levels():
    torch.manual_seed(0)
    student, teacher = Detector(WIDTH), Detector(TEACHER_WIDTH)
    layers = {"student_layers": LAYERS, "teacher_layers": LAYERS[::-1]}
    levels = {"student_levels": {"cwd": [1]}, "teacher_levels": {"cwd": [0]}}
    module = Distiller(student, teacher, {"cwd": cwd(1)}, **layers, **levels)
    result = module(batch(0))["loss_cwd"]
    _, students, teachers = module.run(batch(0))
    torch.testing.assert_close(result, module.loss["cwd"]([students[1]], [teachers[0]])["loss_cwd"])


def test_levels_of_some_losses_and_of_all():
    losses = {"pkd": pkd(1), "cwd": cwd()}
    some = make(copy.deepcopy(losses), student_levels={"pkd": ["fine"]}, teacher_levels={"pkd": ["fine"]})
    every = make({"pkd": losses["pkd"]}, student_levels=["fine"], teacher_levels=["fine"])
    assert some(batch(0))["loss_pkd"] == every(batch(0))["loss_pkd"]


def test_idle_steps_have_the_same_terms():
    levels = {"cwd": ["fine"]}
    module = make({"cwd": cwd(1), "pkd": pkd()}, student_levels=levels, teacher_levels=levels, start_step=1)
    idle, busy = module(batch(0)), module(batch(1))
    assert list(idle) == list(busy) and idle["loss_pkd"] == 0 < busy["loss_pkd"]


def exact_shares(module, images):
    """Of each loss with a factor of 1, at the maps that it reads: by separate backward passes."""
    output, students, teachers = module.run(images)
    own = dict(
        zip(students, torch.autograd.grad(output["loss_box"], list(students.values()), retain_graph=True), strict=True)
    )
    found = {}
    for name, loss in module.loss.items():
        levels = module.loss.student_levels[name] or list(students)
        read = [students[level] for level in levels]
        total = sum(loss(read, [teachers[level] for level in levels]).values())
        found[name] = norm(torch.autograd.grad(total, read, retain_graph=True)) / norm([own[level] for level in levels])
    return found


def test_each_loss_has_its_own_share():
    shares, levels = {"fbkd": 0.5, "cwd": 0.1}, {"cwd": ["fine"]}
    losses = {"fbkd": FBKDLoss(WIDTH, TEACHER_WIDTH, num_levels=2, preset="one_stage"), "cwd": cwd(1)}
    levels = {"student_levels": levels, "teacher_levels": levels}
    module = make(losses, gradient_share=shares, share_every=1, **levels)
    exact = exact_shares(make(copy.deepcopy(losses), **levels), batch(0))
    assert module.share.factor(1.0).tolist() == [pytest.approx(1e-3)] * 2
    train(module, 1, rate=0.0)
    module(batch(1))  # takes in what the first step has measured
    for name in shares:
        measured = module.weights()[f"fbkd_gradient_share_{name}"].item()
        assert measured == pytest.approx(1e-3 * exact[name].item(), rel=1e-3)
    train(module, 30, rate=0.0)
    for name, share in shares.items():
        assert abs(module.weights()[f"fbkd_gradient_share_{name}"].item() / share - 1) < 0.2


def test_a_number_is_the_share_of_all_together():
    module = make({"pkd": pkd(), "cwd": cwd()}, gradient_share=0.3, share_every=1)
    train(module, 20, rate=0.0)
    assert set(module.weights()) == {"fbkd_weight", "fbkd_gradient_share"}
    assert abs(module.weights()["fbkd_gradient_share"].item() / 0.3 - 1) < 0.2
    terms, (_, students, teachers) = module.terms(), module.run(batch(19))
    raw = module.loss(students, teachers)
    torch.testing.assert_close(terms["loss_pkd"] / terms["loss_cwd"], raw["loss_pkd"] / raw["loss_cwd"])


def test_the_factors_multiply_the_terms_that_are_returned():
    module = make({"pkd": pkd(), "cwd": cwd()}, gradient_share={"pkd": 0.3, "cwd": 0.1}, share_every=2)
    train(module, 6, rate=0.0)
    for step in (6, 7):  # one that measures, and one that does not
        factors = module.share.factor(1.0) if step == 7 else None
        result, (_, students, teachers) = module(batch(step)), module.run(batch(step))
        factors = [module.weights()[f"fbkd_weight_{name}"] for name in ("pkd", "cwd")] if factors is None else factors
        raw = module.loss(students, teachers)
        for factor, name in zip(factors, raw, strict=True):
            torch.testing.assert_close(result[name], factor * raw[name])


def test_shares_resume_bit_for_bit():
    arguments = {"gradient_share": {"pkd": 0.3, "cwd": 0.1}, "share_every": 2}
    whole, resumed = (make({"pkd": pkd(), "cwd": cwd()}, **arguments) for _ in range(2))
    train(whole, 3)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for module in (whole, resumed):
        train(module, 4)
    for ours, theirs in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_losses_compile_to_one_graph():
    torch._dynamo.reset()
    levels = {"cwd": ["fine"]}
    module = make({"pkd": pkd(), "cwd": cwd(1)}, student_levels=levels, teacher_levels=levels)
    _, *features = module.run(batch(0))
    compiled, factors = torch.compile(module.loss, fullgraph=True, backend="aot_eager"), torch.tensor([2.0, 0.5])
    for name, value in module.loss(*features, factors).items():
        torch.testing.assert_close(compiled(*features, factors)[name], value)


def test_the_balance_report_has_all_terms():
    report = make({"pkd": pkd(), "cwd": cwd()}).balance_report(batch(0))
    assert [row.name for row in report.distillation] == ["loss_pkd", "loss_cwd"]


def test_a_loss_of_ones_own_tells_its_terms_later():
    class Mine(nn.Module):
        def forward(self, students, teachers):
            return {"loss_mine": students["fine"].mean()}

    module = make({"mine": Mine(), "pkd": pkd()}, start_step=1)
    assert list(module(batch(0))) == ["loss_box", "loss_mine", "loss_pkd"]  # its name, by the loss's


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"loss": {}}, ValueError, "loss is empty"),
        ({"loss": {"a.b": pkd()}}, ValueError, r"the name 'a.b' must be an identifier"),
        ({"loss": {"keys": pkd()}}, ValueError, "the name 'keys'"),
        ({"loss": {"training": pkd()}}, ValueError, "the name 'training'"),
        ({"loss": {"term_names": pkd()}}, ValueError, "the name 'term_names'"),
        ({"loss": {"student_levels": pkd()}}, ValueError, "the name 'student_levels'"),
        ({"loss": {3: pkd()}}, TypeError, "the name of a loss"),
        ({"loss": {"pkd": lambda s, t: {}}}, TypeError, r"loss\['pkd'\] must be a torch.nn.Module, got function"),
        (
            {"student_levels": {"fgd": [0]}},
            ValueError,
            "student_levels names the loss 'fgd', but there are 'pkd', 'cwd'",
        ),
        ({"teacher_levels": {"pkd": []}}, ValueError, r"teacher_levels\['pkd'\] is empty"),
        ({"gradient_share": {"pkd": 0.1}}, ValueError, "a share for each of 'pkd', 'cwd', got 'pkd'"),
        (
            {"gradient_share": {"pkd": 0.1, "cwd": 0}},
            ValueError,
            r"gradient_share\['cwd'\] must be a finite number > 0",
        ),
        ({"loss": pkd(), "gradient_share": {"pkd": 0.1}}, ValueError, "must be a number where there is one loss"),
        ({"loss": pkd(), "student_levels": {"pkd": [0]}}, TypeError, "student_levels must be a list"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        make(arguments.pop("loss", {"pkd": pkd(), "cwd": cwd()}), **arguments)


def test_a_module_dict_will_do():
    assert list(make(nn.ModuleDict({"pkd": pkd(), "cwd": cwd()}))(batch(0))) == ["loss_box", "loss_pkd", "loss_cwd"]


class Named(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.names = names

    def forward(self, students, teachers):
        return {name: students["fine"].mean() for name in self.names}


def test_no_term_is_lost_to_another_one_s_name():
    with pytest.raises(ValueError, match="two terms are called 'loss_x_b'"):
        make({"a": Named("loss_x", "loss_x_b"), "b": Named("loss_x")})(batch(0))


WHOLE = pytest.param("distiller", marks=pytest.mark.skipif(torch.__version__ < (2, 11), reason="PyTorch 2.10 cannot"))


@pytest.mark.parametrize("part", ["student", WHOLE])
def test_shares_of_a_compiled_module(part):
    torch._dynamo.reset()
    arguments = {"gradient_share": {"pkd": 0.3, "cwd": 0.1}, "share_every": 2}
    eager, compiled = (make({"pkd": pkd(), "cwd": cwd()}, **arguments) for _ in range(2))
    compiled.loss.load_state_dict(eager.loss.state_dict())
    if part == "student":
        compiled.student.compile(backend="aot_eager", fullgraph=True)
    step = torch.compile(compiled, backend="aot_eager") if part == "distiller" else compiled
    for index in range(4):
        for each in (eager, step):
            fbkd_ops.sum_losses(each(batch(index))).backward()
    for name, value in eager.weights().items():
        torch.testing.assert_close(compiled.weights()[name], value, rtol=1e-3, atol=0)


def test_levels_that_are_not_there_are_named():
    module = make({"pkd": pkd(), "cwd": cwd()}, student_levels={"cwd": ["fin"]})
    with pytest.raises(ValueError, match=r"student_levels\['cwd'\] names a level 'fin'.*did you mean 'fine'"):
        module(batch(0))


def test_a_loss_that_returns_no_scalars_is_named():
    class Wrong(nn.Module):
        def forward(self, students, teachers):
            return students

    with pytest.raises(TypeError, match=r"loss\['wrong'\] must return a dict of scalar tensors"):
        make({"pkd": pkd(), "wrong": Wrong()})(batch(0))
