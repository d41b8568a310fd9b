"""What editors and type checkers are told of arguments is what the package takes, and a misspelt name is understood.

`make lint` runs the type checker, on typed_idioms.py.
"""

import inspect
import re
import runpy
import textwrap
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

import fbkd_ops
from fbkd_ops import Distiller, FBKDLoss, FeatureTap, NonLocalBlock2d, backends, presets, sum_losses
from fbkd_ops._validation import did_you_mean
from fbkd_ops.non_local.modes import MODES, ModeName
from fbkd_ops.training.levels import chosen_levels
from fbkd_ops.training.student_losses import add_terms
from fbkd_ops.types import PerLevel

ROOT = Path(__file__).resolve().parents[1]
MAP = torch.ones(1, 4, 2, 2)


def test_names_of_presets_and_modes_are_those_of_their_records():
    assert get_args(presets.PresetName) == tuple(presets.PRESETS)
    assert get_args(ModeName) == tuple(MODES)


def test_overrides_have_the_types_of_the_settings():
    settings = get_type_hints(presets.LevelSettings)
    assert get_type_hints(presets.Overrides) == {name: PerLevel[kind] for name, kind in settings.items()}


def test_every_text_among_the_overrides_has_its_choices():
    choices = {name: get_args(kind) for name, kind in get_type_hints(presets.LevelSettings).items()}
    assert {name: texts for name, texts in choices.items() if isinstance((*texts, None)[0], str)} == presets.CHOICES


def test_arguments_of_the_loss_have_its_types():
    parameters = inspect.signature(FBKDLoss).parameters.values()
    own = {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert get_type_hints(presets.LossArguments) == own | get_type_hints(presets.Overrides)


def test_size_free_weights_has_a_weight_for_each_term():
    weights = fbkd_ops.size_free_weights("paper", 2)
    assert list(weights) == list(get_type_hints(presets.TermWeights)) == [f"{term}_weight" for term in presets.TERMS]


def test_the_readmes_loop_is_what_type_checkers_read():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    imports, _, loop = code.partition("\n\n")
    checked = (ROOT / "tests" / "typed_idioms.py").read_text()
    assert textwrap.indent(loop, "    ") in checked
    assert all(f"    {name},\n" in checked for name in imports.removeprefix("from fbkd_ops import ").split(", "))


@pytest.mark.parametrize(
    "name, known, meant",
    [
        ("two_stages", ["two_stage", "one_stage"], "two_stage"),
        ("One-Stage", ["two_stage", "one_stage"], "one_stage"),
        ("PAPER", ["mmrazor", "paper"], "paper"),
        ("p3", [0, "p3_out", None, "p33"], "p33"),
        ("gpu", ["auto", "reference"], None),
        (3, ["3"], None),
        ("3", [], None),
    ],
)
def test_the_nearest_name_is_offered(name, known, meant):
    assert did_you_mean(name, known) == ("" if meant is None else f"; did you mean {meant!r}?")


STUDENT = nn.Sequential(nn.ModuleDict({"backbone": nn.Identity()}))


@pytest.mark.parametrize(
    "call, meant",
    [
        (lambda: FBKDLoss(4, preset="two_stages"), "two_stage"),
        (lambda: FBKDLoss(4, strides=1), "stride"),
        (lambda: FBKDLoss(4, num_level=1), "num_levels"),
        (lambda: FBKDLoss(4, norm="frozn"), "frozen"),
        (lambda: FBKDLoss.from_features([MAP], [MAP], presets="paper"), "preset"),
        (lambda: fbkd_ops.size_free_weights("mmrasor", 4), "mmrazor"),
        (lambda: NonLocalBlock2d(4, mode="dot-product"), "dot_product"),
        (lambda: fbkd_ops.use_backend("tritn").__enter__(), "triton"),
        (lambda: FeatureTap(STUDENT, "0.backbon"), "backbone"),
        (lambda: chosen_levels({"p3_out": MAP, "p4_out": MAP}, ["p4out"], "student_levels"), "p4_out"),
        (lambda: add_terms({"losses": torch.ones(())}, {}, "loses"), "losses"),
        (lambda: Distiller(nn.Linear(1, 1), nn.Linear(1, 1), STUDENT, student_layers="", decay="cosin"), "cosine"),
    ],
)
def test_errors_about_names_say_which_was_meant(call, meant):
    with pytest.raises((TypeError, ValueError), match=rf"; did you mean '{meant}'\?$"):
        call()


def test_losses_are_added_up_as_python_does():
    losses = {name: torch.rand(()).requires_grad_() for name in "abcde"}
    total = sum_losses(losses)
    assert torch.equal(total, sum(losses.values())) and total.requires_grad
    assert torch.equal(sum_losses(list(losses.values())), total)
    assert torch.equal(sum_losses(iter(losses.values())), total)
    assert sum_losses(losses["a"]) is losses["a"]


@pytest.mark.parametrize(
    "losses, error, message",
    [
        ({}, ValueError, "losses is empty, expected at least one loss"),
        ([], ValueError, "losses is empty"),
        ({"loss_box": 1.0}, TypeError, r"losses\['loss_box'\] must be a scalar tensor, got float"),
        ([torch.ones(()), torch.ones(2)], TypeError, r"losses\[1\] must be a scalar tensor, got Tensor\(2,\)"),
        (torch.ones(2), TypeError, r"losses must be a dict or list of scalar tensors, .* got Tensor\(2,\)"),
        ("loss", TypeError, "losses must be a dict or list of scalar tensors, .* got str"),
        (None, TypeError, "losses must be a dict or list of scalar tensors, .* got NoneType"),
    ],
)
def test_losses_that_cannot_be_added_up(losses, error, message):
    with pytest.raises(error, match=message):
        sum_losses(losses)


def test_the_package_as_a_command(capsys):
    runpy.run_module("fbkd_ops", run_name="__main__")
    facts, choices = (text.splitlines() for text in capsys.readouterr().out.split("\n\n"))
    assert re.fullmatch(rf"fbkd_ops +{re.escape(fbkd_ops.__version__)}", facts[0])
    assert re.search(rf"^docs +{re.escape(str(ROOT / 'docs'))}$", "\n".join(facts), re.MULTILINE)
    assert len(choices) == 1 + 2 * len(backends.FUNCTIONS)
    # Each column begins where its heading does.
    for heading in ("device", "backend"):
        start = choices[0].index(heading)
        assert all(line[start - 2 : start] == "  " and line[start] != " " for line in choices)
    start = facts[0].index(fbkd_ops.__version__)
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in facts)
