"""The loss's own layers: how they start after a reset from outside, and hooks on them."""

import copy

import pytest
import torch
from helpers import randomise
from torch import nn
from torch.nn.utils import parametrizations, prune

import fbkd_ops
from fbkd_ops import FBKDLoss, NonLocalBlock2d, functional
from fbkd_ops.non_local.batch_norm import FrozenBatchNorm2d
from fbkd_ops.presets import CHOICES, MODES, PRESETS

MODULES = {
    **{
        f"block, {norm}, {mode}": (NonLocalBlock2d, (64,), dict(norm=norm, mode=mode))
        for norm in CHOICES["norm"]
        for mode in MODES
    },
    "block without a last bias": (NonLocalBlock2d, (64,), dict(norm="none", conv_out_bias=False)),
    "frozen norm": (FrozenBatchNorm2d, (64,), {}),
    **{f"loss, {preset}": (FBKDLoss, (64, 48), dict(num_levels=2, preset=preset)) for preset in PRESETS},
    "loss, mixed": (FBKDLoss, (64,), dict(num_levels=2, norm=["frozen", "sync"], mode=["concatenation", "gaussian"])),
}


def parents_first(module):
    return list(module.modules())


def children_first(module):
    return list(module.modules())[::-1]


def reset_from_meta(make, arguments, settings, order):
    """A module that was made without memory, filled with NaN and then reset layer by layer, as FSDP does it."""
    with torch.device("meta"):
        module = make(*arguments, **settings)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    for each in order(module):
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()
    return module


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("order", [parents_first, children_first])
def test_reset_layer_by_layer_a_module_starts_as_a_new_one(name, order):
    make, arguments, settings = MODULES[name]
    module, new = reset_from_meta(*MODULES[name], order), make(*arguments, **settings)
    for (entry, value), expected in zip(module.state_dict().items(), new.state_dict().values(), strict=True):
        if expected.numel() < 2 or torch.equal(expected, expected.flatten()[:1].expand_as(expected)):
            is_random = expected.is_floating_point() and expected.numel() == 1 and expected != 0
            assert value.isfinite().all() and (is_random or torch.equal(value, expected)), entry
        else:
            ratio = value.std() / expected.std()
            assert 0.5 < ratio < 2, f"{entry}: {ratio}"


@pytest.mark.parametrize("norm", CHOICES["norm"])
@pytest.mark.parametrize("order", [parents_first, children_first])
def test_reset_layer_by_layer_a_block_is_the_identity(norm, order):
    x = torch.randn(2, 8, 5, 5)
    block = reset_from_meta(NonLocalBlock2d, (8,), dict(norm=norm), order)
    assert torch.equal(block(x), x)
    level = reset_from_meta(FBKDLoss, (8,), dict(num_levels=1, norm=norm), order).levels[0]
    assert torch.equal(level.student_non_local(x), x) and torch.equal(level.teacher_non_local(x), x)


def observe(*_):
    """A hook that changes nothing."""


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(observe),
    "forward pre": lambda layer: layer.register_forward_pre_hook(observe),
    "backward": lambda layer: layer.register_full_backward_hook(observe),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(observe),
}
OLD_STYLE = {
    "weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
old_style = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm. is deprecated")


def features():
    return [torch.randn(2, 8, 6, 5, requires_grad=True)], [torch.randn(2, 8, 6, 5)]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_would_never_run_is_an_error(hook):
    """On every module inside the loss, containers among them; the loss itself is called, so that its own hooks run."""
    names = [name for name, _ in FBKDLoss(8, num_levels=1, mode="concatenation").named_modules() if name]
    assert "levels.0.student_non_local.pair" in names and "levels.0.teacher_non_local.norm" in names
    for name in names:
        loss = FBKDLoss(8, num_levels=1, mode="concatenation")
        HOOKS[hook](loss.get_submodule(name))
        with pytest.raises(RuntimeError, match=f"the loss's {name} has hooks, which would never run"):
            loss(*features())


@old_style
@pytest.mark.parametrize("how", OLD_STYLE)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_old_style_weights_are_an_error(how, backend):
    for name in ("feature_adaptation", "channel_adaptation", "spatial_adaptation", "teacher_non_local.g"):
        loss = FBKDLoss(8, num_levels=1)
        OLD_STYLE[how](loss.levels[0].get_submodule(name))
        with fbkd_ops.use_backend(backend), pytest.raises(RuntimeError, match=f"the loss's levels.0.{name} has hooks"):
            loss(*features())
    block = NonLocalBlock2d(8)
    OLD_STYLE[how](block.theta)
    with (
        fbkd_ops.use_backend(backend),
        pytest.raises(RuntimeError, match="theta has hooks, .*parametrizations .* work"),
    ):
        block(torch.randn(2, 8, 4, 4))


def test_a_norm_with_a_hook_is_an_error():
    norm = nn.BatchNorm2d(8)
    norm.register_forward_hook(observe)
    with pytest.raises(RuntimeError, match="norm has hooks"):
        functional.non_local(torch.randn(2, 8, 4, 4), NonLocalBlock2d(8).weights(), norm=norm)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_what_is_called_run(hook):
    seen = []
    hooks = {
        "forward": lambda module: module.register_forward_hook(lambda *_: seen.append(module)),
        "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: seen.append(module)),
        "backward": lambda module: module.register_full_backward_hook(lambda *_: seen.append(module)),
        "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: seen.append(module)),
    }
    block = NonLocalBlock2d(8)
    hooks[hook](block)
    block(torch.randn(2, 8, 4, 4, requires_grad=True)).sum().backward()
    assert seen == [block]
    loss = FBKDLoss(8, num_levels=1)
    if "backward" not in hook:  # whose hooks take tensors only, not lists of features
        hooks[hook](loss)
        loss(*features())
        assert seen == [block, loss]


def test_a_copy_of_a_loss_that_ran_is_looked_at_again():
    loss = FBKDLoss(8, num_levels=1)
    loss(*features())
    other = copy.deepcopy(loss)
    other.levels[0].feature_adaptation.register_forward_hook(observe)
    loss(*features())
    with pytest.raises(RuntimeError, match="levels.0.feature_adaptation has hooks"):
        other(*features())


def test_a_compiled_loss_refuses_hooks_too():
    torch.compiler.reset()
    loss = FBKDLoss(8, num_levels=1)
    loss.levels[0].feature_adaptation.register_forward_hook(observe)
    with pytest.raises(Exception, match="levels.0.feature_adaptation has hooks"):
        torch.compile(loss, backend="eager")(*features())


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_work(parametrize):
    """The loss is that of the weights which the parametrised layers have, and gradients reach the originals."""
    loss = randomise(FBKDLoss(8, num_levels=1).double(), seed=2).eval()
    plain, sides = copy.deepcopy(loss), [[x.double() for x in side] for side in features()]
    level = loss.levels[0]
    for layer in (level.feature_adaptation, level.relation_adaptation, level.student_non_local.g):
        parametrize(layer)
    loss.eval()
    for name in ("feature_adaptation", "relation_adaptation", "student_non_local.g"):
        plain.levels[0].get_submodule(name).weight.data = level.get_submodule(name).weight.detach()
    terms, expected = loss(*sides), plain(*sides)
    torch.testing.assert_close(terms, expected, rtol=1e-12, atol=1e-12)
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_a_layer_on_another_device_is_named():
    loss = FBKDLoss(8, num_levels=1)
    loss.levels[0].teacher_non_local.norm.to("meta")
    with pytest.raises(
        ValueError, match=r"the loss's levels.0.teacher_non_local.norm.weight and its .* got meta and cpu"
    ):
        loss(*features())
