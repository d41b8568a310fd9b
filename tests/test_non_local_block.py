"""NonLocalBlock2d: its arguments and norms, and the weights of other implementations in it."""

import copy
import warnings

import pytest
import torch
from helpers import randomise
from torch import nn

import fbkd_ops
from fbkd_ops import FBKDLoss, NonLocalBlock2d, _validation, functional, reference
from fbkd_ops.presets import CHOICES, MODES
from fbkd_ops.weights.non_local import load_non_local

TOLERANCE = dict(rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(inter_channels=0), "inter_channels must be between 1 and in_channels=4, got 0"),
        (dict(inter_channels=2.0), "inter_channels must be between 1 and in_channels=4, got 2.0"),
        (dict(inter_channels=5), "inter_channels must be between 1 and in_channels=4, got 5"),
        (dict(reduction=0), "reduction must be an int >= 1, got 0"),
        (dict(reduction=0.5), "reduction must be an int >= 1, got 0.5"),
        (dict(reduction=True), "reduction must be an int >= 1, got True"),
        (dict(inter_channels=2, reduction=2), "give inter_channels or reduction, got both: 2 and 2"),
        (dict(mode="dot"), "mode must be one of 'dot_product', .* got 'dot'"),
        (dict(norm="layer"), "norm must be one of 'batch', 'sync', 'frozen', 'none', got 'layer'"),
        (dict(pool_order="double"), "pool_order must be one of 'single', 'nested', got 'double'"),
        (dict(stride=0), r"stride must be an int >= 1 \(1: no pooling\), got 0"),
        (dict(stride=2.0), r"stride must be an int >= 1 \(1: no pooling\), got 2.0"),
    ],
    ids=str,
)
def test_bad_blocks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NonLocalBlock2d(4, **arguments)


@pytest.mark.parametrize(
    "arguments,width",
    [({}, 3), (dict(reduction=1), 7), (dict(reduction=3), 2), (dict(reduction=8), 1), (dict(inter_channels=4), 4)],
    ids=str,
)
def test_the_inner_width(arguments, width):
    assert NonLocalBlock2d(7, **arguments).inter_channels == width
    assert NonLocalBlock2d(1).inter_channels == 1


@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_a_block_starts_as_the_identity(norm):
    block = NonLocalBlock2d(6, stride=2, norm=norm)
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(block(x), x)
    randomise(block).reset_parameters()
    torch.testing.assert_close(block(x), x)
    block(x).square().sum().backward()
    assert any(parameter.grad.abs().max() > 1e-3 for parameter in block.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_every_norm_equals_the_reference(mode, norm):
    bias = norm in ("frozen", "none")  # elsewhere its gradient is rounding only
    block = randomise(NonLocalBlock2d(5, mode=mode, stride=2, norm=norm, conv_out_bias=bias).double())
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    results = []
    for backend in ("auto", "reference"):
        own, leaf = copy.deepcopy(block), x.clone().requires_grad_()
        with fbkd_ops.use_backend(backend):
            z = own(leaf)
        z.square().sum().backward()
        results.append((z, leaf.grad, {name: p.grad for name, p in own.named_parameters()}, dict(own.named_buffers())))
    torch.testing.assert_close(*results, **TOLERANCE)
    assert (results[0][0] - x).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_the_variance_of_a_channel_far_smaller_than_its_terms(mode):
    block = randomise(NonLocalBlock2d(5, inter_channels=2, mode=mode))
    with torch.no_grad():
        g_weight, g_bias, out_weight = block.g.weight, block.g.bias, block.out.weight
        g_weight[1], g_bias[1] = g_weight[0] * (1 + 2**-12), g_bias[0]
        out_weight[:, 1] = -out_weight[:, 0]  # u is 2^-12 as large as its two terms
        block.norm.eps = 1e-12
    x = torch.randn(2, 5, 6, 7)
    exact = copy.deepcopy(block).double()
    expected = reference.non_local(x.double(), exact.weights(), mode=mode, norm=exact.norm)
    plain = reference.non_local(x, block.weights(), mode=mode, norm=copy.deepcopy(block.norm))
    error, allowed = ((z.double() - expected).square().mean().sqrt() for z in (block(x), plain))
    assert error < 4 * allowed


def test_a_map_of_one_pixel():
    block = randomise(NonLocalBlock2d(4, mode="embedded_gaussian", stride=3).double())
    x = torch.randn(3, 4, 1, 1, dtype=torch.float64)
    expected = reference.non_local(
        x, block.weights(), mode="embedded_gaussian", stride=3, norm=copy.deepcopy(block.norm)
    )
    torch.testing.assert_close(block(x), expected, **TOLERANCE)


def test_one_value_a_channel_raises_as_batch_norm_does():
    block = NonLocalBlock2d(4, 2)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 4, 1, 1))
    assert block.norm.num_batches_tracked == 0
    assert block.eval()(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)
    block.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block(torch.randn(1, 4, 1, 1))
    for norm in ("frozen", "none"):
        assert NonLocalBlock2d(4, 2, norm=norm)(torch.randn(1, 4, 1, 1)).shape == (1, 4, 1, 1)


def test_a_frozen_norm_loads_a_batch_norm_and_stays_as_it_is():
    trained = randomise(NonLocalBlock2d(4, stride=2).double())
    trained(torch.randn(2, 4, 5, 5, dtype=torch.float64))
    block = NonLocalBlock2d(4, stride=2, norm="frozen").double()
    block.load_state_dict(trained.state_dict())
    before = copy.deepcopy(block.norm.state_dict())
    block = nn.SyncBatchNorm.convert_sync_batchnorm(block).train()
    assert not list(block.norm.parameters()) and all(p.requires_grad for p in block.parameters())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x), trained.eval()(x), **TOLERANCE)
    for width in (torch.float32, torch.float64):
        with fbkd_ops.use_backend("reference"):  # which casts the norm to the features' dtype and back
            block.double()(x.to(width))
    torch.testing.assert_close(block.norm.state_dict(), before, rtol=0, atol=0)
    NonLocalBlock2d(4, stride=2).load_state_dict(block.state_dict())


def test_torchvisions_frozen_batch_norm():
    misc = pytest.importorskip("torchvision.ops.misc")
    norm = randomise(misc.FrozenBatchNorm2d(4, eps=1e-3).double()).train()
    block = randomise(NonLocalBlock2d(4, stride=2, norm="none").double(), seed=1)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    z = functional.non_local(x, block.weights(), stride=2, norm=norm)
    u = reference.non_local(x, block.weights(), stride=2) - x
    torch.testing.assert_close(z, x + norm(u), **TOLERANCE)
    torch.testing.assert_close(reference.non_local(x, block.weights(), stride=2, norm=norm), z, **TOLERANCE)


@pytest.mark.parametrize(
    "norm,error,message",
    [
        (nn.GroupNorm(1, 4), TypeError, "norm must be a BatchNorm, a SyncBatchNorm, a frozen .* got GroupNorm"),
        # Has all of a frozen BatchNorm's tensors, but two of them learn.
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), TypeError, "or None, got InstanceNorm2d"),
        ("batch", TypeError, "or None, got str"),
        (NonLocalBlock2d(5, norm="frozen").norm, ValueError, "norm must have num_features 4, got 5"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_norms_are_refused(norm, error, message):
    with pytest.raises(error, match=message):
        functional.non_local(torch.randn(2, 4, 3, 3), NonLocalBlock2d(4).weights(), norm=norm)


def relation(x, stride):
    blocks = NonLocalBlock2d(4), NonLocalBlock2d(4)
    return functional.relation_loss(
        x, x, blocks[0].weights(), blocks[1].weights(), torch.eye(4), torch.zeros(4), stride=stride
    )


CLAMPING = {
    "non_local": lambda x: functional.non_local(x, NonLocalBlock2d(4).weights(), stride=4),
    "relation_loss": lambda x: relation(x, 4),
    "FBKDLoss": lambda x: FBKDLoss(4, num_levels=1, stride=4)([x.clone().requires_grad_()], [x]),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CLAMPING)
def test_a_clamped_stride_is_said_once(name, backend, monkeypatch):
    monkeypatch.setattr(_validation, "_warned_of_clamping", False)
    with warnings.catch_warnings(record=True) as caught, fbkd_ops.use_backend(backend):
        warnings.simplefilter("always")
        CLAMPING[name](torch.randn(2, 4, 4, 5))
        assert not caught
        for _ in range(2):
            CLAMPING[name](torch.randn(2, 4, 5, 3))
    assert [str(warning.message) for warning in caught] == [
        "stride 4 is larger than a map of 5x3 pixels and is clamped to it (said once a process)"
    ]
    assert caught[0].category is UserWarning


def test_a_clamped_stride_and_a_frozen_norm_compile_into_one_graph(monkeypatch):
    monkeypatch.setattr(_validation, "_warned_of_clamping", False)
    block = randomise(NonLocalBlock2d(4, stride=4, norm="frozen"))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(compiled(x), reference.non_local(x, block.weights(), stride=4, norm=block.norm))
    assert not _validation._warned_of_clamping


class AuthorsBlock(nn.Module):
    """The structure of the block in the authors' code and its relatives: plain convolutions, Sequentials with pools."""

    def __init__(self, channels, inner, stride=1, bn_layer=True, mode="dot_product"):
        super().__init__()
        self.inner, self.function = inner, mode
        pool = [nn.MaxPool2d((stride, stride))] if stride > 1 else []
        pooled = nn.Sequential if pool else lambda layer: layer
        self.g = pooled(nn.Conv2d(channels, inner, 1), *pool)
        if mode != "gaussian":
            self.theta = nn.Conv2d(channels, inner, 1)
            self.phi = pooled(nn.Conv2d(channels, inner, 1), *pool)
        elif pool:
            self.phi = pool[0]
        last = nn.Conv2d(inner, channels, 1)
        self.W = nn.Sequential(last, nn.BatchNorm2d(channels)) if bn_layer else last
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(2 * inner, 1, 1, bias=False), nn.ReLU())

    def forward(self, x):
        gaussian = self.function == "gaussian"
        theta = x if gaussian else self.theta(x)
        phi = self.phi(x) if hasattr(self, "phi") else x
        theta, phi, g = theta.flatten(2), phi.flatten(2), self.g(x).flatten(2)
        if self.function == "concatenation":
            pixels, cells = theta.shape[2], phi.shape[2]
            pairs = [theta[..., None].expand(-1, -1, -1, cells), phi[:, :, None].expand(-1, -1, pixels, -1)]
            f = self.concat_project(torch.cat(pairs, dim=1))[:, 0] / cells
        else:
            f = torch.einsum("nci,ncj->nij", theta, phi)
            f = f / f.shape[2] if self.function == "dot_product" else f.softmax(dim=2)
        y = torch.einsum("nij,ncj->nci", f, g).reshape(len(x), self.inner, *x.shape[2:])
        return x + self.W(y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("as_state", [False, True])
def test_mmcvs_block(mode, sub_sample, normed, as_state):
    mmcv = pytest.importorskip("mmcv.cnn.bricks.non_local")
    norm_cfg = dict(type="BN") if normed else None
    theirs = mmcv.NonLocal2d(6, reduction=3, mode=mode, sub_sample=sub_sample, norm_cfg=norm_cfg)
    randomise(theirs.double())
    ours = NonLocalBlock2d(
        6,
        reduction=3,
        mode=mode,
        stride=2 if sub_sample else 1,
        norm="batch" if normed else "none",
        conv_out_bias=not normed,
    ).double()
    load_non_local(ours, theirs.state_dict() if as_state else theirs)
    assert_same_block(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("bn_layer", [False, True])
@pytest.mark.parametrize("as_state", [False, True])
def test_the_authors_block(mode, stride, bn_layer, as_state):
    theirs = randomise(AuthorsBlock(6, 2, stride, bn_layer, mode).double())
    norm = "batch" if bn_layer else "none"
    ours = NonLocalBlock2d(6, 2, mode=mode, stride=stride, use_scale=False, norm=norm).double()
    load_non_local(ours, theirs.state_dict() if as_state else theirs)
    assert_same_block(ours, theirs)


def assert_same_block(ours, theirs):
    """The same output in training and, with the statistics of that step, in eval."""
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
        assert (ours(x) - x).abs().max() > 0.1
        theirs(x)
        ours.eval(), theirs.eval()


def test_a_frozen_block_takes_an_authors_batch_norm():
    theirs = randomise(AuthorsBlock(6, 2, 2).double())
    ours = NonLocalBlock2d(6, 2, stride=2, norm="frozen").double()
    load_non_local(ours, theirs)
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.eval()(x), **TOLERANCE)


def test_everything_that_does_not_fit_is_listed_and_nothing_is_copied():
    state = AuthorsBlock(4, 1, 2).state_dict()
    del state["theta.bias"]
    state |= {"head.weight": torch.zeros(3), "phi.weight": torch.zeros(2, 4, 1, 1)}
    block = NonLocalBlock2d(4, 2, norm="none")
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="source does not fit the block") as caught:
        load_non_local(block, state)
    message = str(caught.value)
    assert "phi.weight is there twice" in message
    assert "missing theta.bias" in message
    norm = "norm.bias, norm.num_batches_tracked, norm.running_mean, norm.running_var, norm.weight"
    assert f"surplus head.weight, {norm};" in message
    for layer, theirs in (("g.weight", (1, 4, 1, 1)), ("out.weight", (4, 1, 1, 1)), ("phi.bias", (1,))):
        assert f"{layer} must have shape {tuple(before[layer].shape)}, got {theirs}" in message
    torch.testing.assert_close(block.state_dict(), before, rtol=0, atol=0)


def test_settings_of_a_module_are_compared():
    source = AuthorsBlock(4, 2, stride=4)
    block = NonLocalBlock2d(4, 2, stride=2)
    with pytest.raises(ValueError, match="source does not fit the block: stride is 4, the block has 2$"):
        load_non_local(block, source)
    source.mode, source.use_scale = "embedded_gaussian", False
    expected = (
        "stride is 4, the block has 2; mode is 'embedded_gaussian', the block has 'dot_product'; use_scale is False"
    )
    with pytest.raises(ValueError, match=expected):
        load_non_local(block, source)
    load_non_local(block, source.state_dict())


def test_nested_pools_are_seen():
    source = AuthorsBlock(4, 2, stride=2)
    source.g = nn.Sequential(source.g, nn.MaxPool2d((4, 4)))
    source.phi = nn.Sequential(source.phi, nn.MaxPool2d((4, 4)))
    with pytest.raises(ValueError, match="pool_order is 'nested', the block has 'single'"):
        load_non_local(NonLocalBlock2d(4, 2, stride=8), source)
    block = NonLocalBlock2d(4, 2, stride=8, pool_order="nested")
    load_non_local(block, source)
    assert torch.equal(block.phi.weight, source.phi[0][0].weight)
    with pytest.raises(ValueError, match="pool_order is 'single', the block has 'nested'"):
        load_non_local(block, AuthorsBlock(4, 2, stride=8))


def test_what_a_norm_has_beside_its_state_is_compared():
    source = AuthorsBlock(4, 2)
    source.W[1].eps, source.W[1].momentum = 1e-3, None
    block = NonLocalBlock2d(4, 2)
    with pytest.raises(ValueError, match="eps is 0.001, the block's norm has 1e-05; momentum is None, .* has 0.1"):
        load_non_local(block, source)
    block.norm.eps, block.norm.momentum = 1e-3, None
    load_non_local(block, source)
    frozen = NonLocalBlock2d(4, 2, norm="frozen")
    frozen.norm.eps = 1e-3
    load_non_local(frozen, source)


@pytest.mark.parametrize(
    "block,source,message",
    [
        (nn.Conv2d(4, 4, 1), {}, "block must be a NonLocalBlock2d, got Conv2d"),
        (NonLocalBlock2d(4), "weights.pth", "source must be a module or a state dict, got str"),
    ],
)
def test_other_things_than_blocks_are_refused(block, source, message):
    with pytest.raises(TypeError, match=message):
        load_non_local(block, source)


def test_wrapped_blocks_are_looked_through():
    source, block = randomise(AuthorsBlock(4, 2, stride=2)), NonLocalBlock2d(4, 2, stride=2)
    load_non_local(torch.compile(block), torch.optim.swa_utils.AveragedModel(source))
    assert torch.equal(block.theta.weight, source.theta.weight)
    with pytest.raises(ValueError, match="stride is 2, the block has 4"):
        load_non_local(NonLocalBlock2d(4, 2, stride=4), torch.compile(source))
