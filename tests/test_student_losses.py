"""Where the terms go in what a student returns: into its total, among its losses, or nowhere with an error."""

import collections
import dataclasses
import types
import warnings
from collections import OrderedDict

import pytest
import torch
from detectors import TERMS, Detector, images, make_distiller
from torch import nn

from fbkd_ops import Distiller
from fbkd_ops.training.student_losses import add_terms

TARGETS = torch.tensor(1.0)
NO_LOSS = "the student returned no loss: .*combine="


class Returning(Detector):
    """Returns what ``make`` makes of its loss and the map of predictions."""

    def __init__(self, make):
        super().__init__(4)
        self.make = make

    def forward(self, images, targets=None):
        logits = self.head(self.backbone(images)["coarse"])
        return self.make((logits.mean() - 1).square(), logits)


def returning(make, **arguments):
    distiller = make_distiller()
    return Distiller(Returning(make), distiller.teacher, distiller.loss, student_layers="backbone", **arguments)


class ModelOutput(OrderedDict):
    """As Hugging Face's: entries are attributes too, those that are None attributes only."""

    def __init__(self, **entries):
        super().__init__((name, value) for name, value in entries.items() if value is not None)
        self.__dict__.update(entries)

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        self.__dict__[name] = value


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: torch.Tensor
    logits: torch.Tensor


Pair = collections.namedtuple("Pair", ["loss", "logits"])
Slots = dataclasses.make_dataclass("Slots", ["loss", "logits"], slots=True)

TOTALS = {
    "dict": (lambda loss, logits: {"loss": loss, "logits": logits}, "loss", {}),
    "total_loss": (lambda loss, logits: {"iou_loss": 0.5 * loss, "total_loss": loss}, "total_loss", {}),
    "both": (lambda loss, logits: {"total_loss": 2 * loss, "loss": loss}, "loss", {}),
    "loss for the log": (lambda loss, logits: {"loss": loss.item(), "total_loss": loss}, "total_loss", {}),
    "detached": (lambda loss, logits: {"loss": loss.detach(), "total_loss": loss}, "total_loss", {}),
    "named": (lambda loss, logits: {"loss": 2 * loss, "cost": loss}, "cost", dict(total="cost")),
    "one of several": (lambda loss, logits: {"cost": loss}, "cost", dict(total=["sum", "cost"])),
    "ordered": (lambda loss, logits: OrderedDict(loss=loss, logits=logits), "loss", {}),
    "model output": (lambda loss, logits: ModelOutput(loss=loss, logits=logits), "loss", {}),
    "constant": (lambda loss, logits: ModelOutput(loss=torch.ones(()), logits=logits), "loss", {}),
    "attribute": (lambda loss, logits: types.SimpleNamespace(loss=loss, logits=logits), "loss", {}),
    "total as attribute": (lambda loss, logits: types.SimpleNamespace(total_loss=loss), "total_loss", {}),
    "frozen": (Frozen, "loss", {}),
    "named tuple": (Pair, "loss", {}),
    "slots": (Slots, "loss", {}),
    "read-only": (lambda loss, logits: types.MappingProxyType({"loss": loss}), "loss", {}),
}


def entries(output):
    if isinstance(output, (dict, types.MappingProxyType)):
        return dict(output)
    return {name: getattr(output, name) for name in ("loss", "total_loss", "logits") if hasattr(output, name)}


@pytest.mark.parametrize("form", TOTALS)
def test_the_terms_are_in_the_total_and_no_entries(form):
    make, name, arguments = TOTALS[form]
    distiller = returning(make, **arguments)
    x = images()
    output, own = distiller(x), distiller.student(x)
    expected = entries(own)
    assert list(entries(output)) == list(expected) and set(distiller.terms()) == TERMS
    for entry, value in entries(output).items():
        added = sum(distiller.terms().values()) if entry == name else 0
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected[entry]) + added)
    if isinstance(own, OrderedDict) and type(own) is not OrderedDict:
        assert type(output) is type(own) and output.loss is output["loss"]


LOOPS = {
    "the entry": lambda output, name: entries(output)[name],
    "the sum": lambda output, name: sum(v for v in entries(output).values() if getattr(v, "ndim", 1) == 0),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("form", [form for form in TOTALS if form != "constant"])
def test_the_losss_parameters_receive_their_gradient_once(form, loop):
    make, name, arguments = TOTALS[form]
    distiller, x = returning(make, **arguments), images()
    parameters = list(distiller.loss.parameters())
    terms = distiller.loss(*distiller.run(x)[1:])
    expected = torch.autograd.grad(sum(terms.values()), parameters)
    LOOPS[loop](distiller(x), name).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


UNLABELLED = {
    "model output": lambda loss, logits: ModelOutput(loss=None, logits=logits, features=[logits]),
    "dict": lambda loss, logits: {"loss": None, "logits": logits},
    "attribute": lambda loss, logits: types.SimpleNamespace(loss=None, logits=logits),
    "frozen": lambda loss, logits: Frozen(None, logits),
    "named tuple": lambda loss, logits: Pair(None, logits),
}


@pytest.mark.parametrize("form", UNLABELLED)
def test_images_without_labels_are_distilled(form):
    distiller = returning(UNLABELLED[form])
    output = distiller(images())
    own = distiller.student(images())
    assert type(output) is type(own) and list(entries(output))[0] == "loss"
    torch.testing.assert_close(entries(output)["loss"].detach(), sum(distiller.terms().values()))
    assert len(distiller.balance_report(images()).own) == 0
    entries(output)["loss"].backward()
    assert all(parameter.grad is not None for parameter in distiller.loss.parameters())


SEVERAL = {
    "lists, as MMDetection's": lambda loss, logits: {"loss_cls": [loss, 2 * loss], "acc": torch.tensor(97.0)},
    "only for the log": lambda loss, logits: {"loss_box": loss, "logits": logits.detach(), "lr": 0.1, "note": "a"},
    "one element": lambda loss, logits: {"loss_box": loss[None]},
    "another mapping": lambda loss, logits: types.MappingProxyType({"loss_box": loss}),
}


@pytest.mark.parametrize("form", SEVERAL)
def test_a_dict_of_losses_gets_the_terms_as_entries(form):
    distiller = returning(SEVERAL[form])
    losses = distiller(images())
    assert list(losses) == [*distiller.student(images()), *distiller.terms()]


def test_without_a_total_every_entry_is_a_loss():
    losses = returning(lambda loss, logits: {"loss": loss, "loss_box": loss}, total=None)(images())
    assert set(losses) == {"loss", "loss_box"} | TERMS


@pytest.mark.parametrize("frozen", ["by no_grad", "student", "all"])
def test_the_form_is_the_same_without_gradient(frozen):
    """A frozen copy, as averaged ones are, returns what the student does."""
    total = returning(lambda loss, logits: {"loss": loss, "logits": logits})
    several = returning(lambda loss, logits: {"loss_box": loss, "map": logits.detach()})
    lists = returning(lambda loss, logits: {"loss_box": [loss], "acc": torch.tensor(97.0)})
    for distiller in (total, several, lists):
        parts = {"by no_grad": [], "student": [distiller.student], "all": [distiller]}[frozen]
        for part in parts:
            part.requires_grad_(False)
    with torch.set_grad_enabled(frozen != "by no_grad"):
        assert set(total(images())) == {"loss", "logits"}
        assert set(several(images())) == {"loss_box", "map"} | TERMS
        assert set(lists(images())) == {"loss_box", "acc"} | TERMS
        with pytest.raises(TypeError, match=NO_LOSS):
            returning(lambda loss, logits: {"logits": logits})(images())


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda loss, logits: {"logits": logits}, NO_LOSS.replace(".*", r".*'logits' Tensor\(2, 1, 4, 4\).*")),
        (lambda loss, logits: {"loss": loss.detach()}, NO_LOSS),
        (lambda loss, logits: {"loss": logits}, NO_LOSS),
        (lambda loss, logits: {}, NO_LOSS.replace(".*", ".*empty dict.*")),
        (lambda loss, logits: logits, NO_LOSS),
        (lambda loss, logits: [logits], NO_LOSS),
        (lambda loss, logits: [], NO_LOSS),
        (lambda loss, logits: (loss, logits), NO_LOSS),
        (lambda loss, logits: None, NO_LOSS),
        (lambda loss, logits: types.SimpleNamespace(loss=logits), NO_LOSS),
        (lambda loss, logits: types.SimpleNamespace(logits=logits), NO_LOSS),
        (lambda loss, logits: {"loss_box": loss, "logits": logits}, r"'logits' .* is no loss .*total=.*combine="),
    ],
)
def test_a_student_without_a_loss_is_an_error(make, message):
    with pytest.raises(TypeError, match=message):
        returning(make)(images())


@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda loss, logits: {"loss_box": loss}, ValueError, "total names 'cost', which is not in .*'loss_box'"),
        (lambda loss, logits: loss, ValueError, "total names 'cost', which is not in what the student returned: Tens"),
        (lambda loss, logits: [loss], ValueError, "total names 'cost', which is not in what the student returned: lis"),
        (lambda loss, logits: types.SimpleNamespace(loss=loss), ValueError, "total names 'cost', which is not in"),
        (lambda loss, logits: {"cost": logits}, TypeError, "total names 'cost', which must be a scalar tensor or None"),
    ],
)
def test_a_total_that_is_not_there_is_named(make, error, message):
    with pytest.raises(error, match=message):
        returning(make, total="cost")(images())


def test_a_student_that_is_only_distilled():
    distiller = returning(lambda loss, logits: {"logits": logits}, combine=lambda output, terms: terms)
    assert set(distiller(images())) == TERMS


def test_a_report_has_the_total_once():
    report = returning(lambda loss, logits: {"loss": loss, "loss_box": loss})
    report = report.balance_report(images())
    assert [row.name for row in report.own] == ["loss"] and report.own_total.value == report.own[0].value


def test_an_output_is_not_changed_where_a_new_one_can_be_made():
    loss, terms = torch.ones((), requires_grad=True), {"loss_mimic": torch.ones(())}
    output = {"loss": loss}
    assert add_terms(output, terms, ("loss",)) == {"loss": 2} and output["loss"] is loss


@pytest.mark.parametrize(
    "form", [lambda loss: {"loss_box": loss}, lambda loss: {"loss": loss}, lambda loss: [loss], lambda loss: loss]
)
def test_terms_are_added_within_a_compiled_graph(form):
    torch._dynamo.reset()

    def step(loss, term):
        return add_terms(form(2 * loss), {"loss_mimic": term}, ("loss", "total_loss"))

    loss, term = torch.ones((), requires_grad=True), torch.ones(())
    assert torch.compile(step, backend="eager", fullgraph=True)(loss, term) == step(loss, term)


class Mimic(nn.Module):
    """A loss of somebody else's."""

    def forward(self, students, teachers):
        return {"loss_mimic": students["fine"].mean()}


@pytest.mark.parametrize("start_step", [0, 100])
def test_terms_in_no_backward_pass_are_warned_of_once(start_step):
    distiller = make_distiller(start_step=start_step)
    step = lambda: distiller(images(), TARGETS)["loss_box"].backward()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            step()
    with pytest.warns(UserWarning, match="in no backward pass in 10 training forwards.*total=") as caught:
        for _ in range(30):
            step()
    assert len(caught) == 1


def test_the_loops_own_losses_may_be_alive():
    """As in a loop that has them in a variable."""
    distiller = make_distiller()
    with pytest.warns(UserWarning, match="in no backward pass"):
        for _ in range(11):
            losses = distiller(images(), TARGETS)
    assert set(losses) >= TERMS


ACCUMULATIONS = {
    "each": lambda losses: [sum(each.values()).backward() for each in losses],
    "sum": lambda losses: sum(sum(each.values()) for each in losses).backward(),
    "one term": lambda losses: [each["loss_fbkd_spatial"].backward() for each in losses],
}


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
def test_accumulated_backward_passes_are_no_false_alarm(accumulation):
    distiller = make_distiller()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the terms of the distillation were in no backward pass")
        for _ in range(2):
            ACCUMULATIONS[accumulation]([distiller(images(), TARGETS) for _ in range(16)])
            optimizer.step()


def test_forwards_without_gradient_do_not_count():
    distiller = make_distiller()
    parameterless = Distiller(Detector(4), Detector(4), Mimic(), student_layers="backbone", start_step=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(15):
            with torch.no_grad():
                distiller(images(), TARGETS)
            sum(parameterless(images(), TARGETS).values()).backward()
