"""Every public callable with wrong values for each of its arguments: an exception that names the argument."""

import dataclasses
import inspect
import re
from array import array
from collections import UserList, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import fbkd_ops
from fbkd_ops import (
    AttentionPool,
    CWDLoss,
    FBKDLoss,
    FeatureTap,
    FGDLoss,
    Layer,
    LevelSettings,
    MGDLoss,
    NonLocalBlock2d,
    PKDLoss,
    ScoreWeightedLoss,
    functional,
    visualize,
)
from fbkd_ops.presets import PRESETS, TERMS
from fbkd_ops.training.data_parallel import data_parallel
from fbkd_ops.weights.non_local import load_non_local

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.quantize:UserWarning", "ignore:The PyTorch API of nested", "ignore:stride 8"
)

MAPS = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
POOL = functional.attention_pool(MAPS)
IMAGE = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(0))


def unreadable(tensor: torch.Tensor) -> list[Any]:
    """What has the values and the shape of ``tensor``, but in a form that no kernel reads."""
    return [
        None,
        tensor.tolist(),
        tensor.numpy(),
        "tensor",
        torch.Tensor,
        tensor.int(),
        tensor.bool(),
        tensor.to(torch.complex64),
        tensor.to(torch.float8_e4m3fn),
        tensor.to_sparse(),
        tensor.to_mkldnn(),
        torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    ]


def nested(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [torch.nested.nested_tensor(list(tensor), layout=layout) for layout in (torch.strided, torch.jagged)]


def wrong_tensors(tensor: torch.Tensor) -> list[Any]:
    """What is no tensor of exactly this shape on this device."""
    others = [tensor[None], tensor[..., :0], torch.zeros(()), tensor.to("meta")]
    return unreadable(tensor) + nested(tensor if tensor.dim() > 1 else tensor[None]) + others


MAP = wrong_tensors(MAPS) + [MAPS[0], MAPS[:, :0], MAPS[:, :, :0], MAPS[0, 0].to_sparse_csr()]
ALONE = [each for each in MAP if not (isinstance(each, torch.Tensor) and each.is_meta)]  # where nothing is compared
LISTS = [None, MAPS, {MAPS}, "maps", b"maps", 3, {}, iter([MAPS]), UserList([3]), [MAPS.numpy()]]
FEATURES = [*LISTS, [], *([each] for each in MAP), {"p3": MAPS[0]}, UserList([])]
FLAG = [None, "no", "False", b"", 0, 1, 1.0, [], [True], np.int64(1), np.array([True]), torch.tensor(True), bool]
TEXT = [None, 3, True, b"text", ["text"], str]
INT = [0, -1, 2.0, True, "2", b"2", [2], {2}, float("nan"), 2j, torch.tensor(2), np.array(2), np.float64(2), int]
NUMBER = [-1, -1e-9, float("nan"), float("inf"), -float("inf"), 10**400, True, None, "1", b"1", 1j, {1}]
NUMBER += [torch.tensor(1.0), np.array(1.0), np.float32("nan"), np.bool_(True), float]
POSITIVE = [0, 0.0, -0.0, *NUMBER]
CHOICE = [None, 3, True, "other", "", b"average", {"average"}, str]
BOXES = torch.tensor([[1.0, 2.0, 5.0, 6.0]])
MODULE = [3, "module", {}, [], nn.Conv2d, lambda x: x]
PER_LEVEL = ["many", {}, {1: 2}, iter([1, 2]), object()]
CHANNELS = [*INT, *PER_LEVEL, b"\x04\x04", bytearray(b"\x04\x04"), memoryview(b"\x04\x04"), "44", [4, 0], [4, "4"]]
CHANNELS += [[4, 4.0], [4, True], [4, None], [], (4,), np.array([4.0, 4.0]), np.array([[4, 4]]), np.array([True, True])]
CHANNELS += [torch.tensor([4.0, 4.0]), UserList([4, 4, 4]), range(0, 2)]
NORM = ["batch", 3, nn.BatchNorm2d, nn.GroupNorm(1, 4), nn.BatchNorm2d(5), nn.BatchNorm2d(4, device="meta")]
NORM += [NonLocalBlock2d(4, norm="frozen").norm.to("meta"), nn.Identity()]

SETTINGS = {
    "spatial_temperature": POSITIVE,
    "channel_temperature": POSITIVE,
    "mask_rule": CHOICE,
    "use_channel_mask": FLAG,
    **{f"{term}_weight": NUMBER for term in TERMS},
    "inter_channels": [0, -1, 1.5, -0.5, 0.0, True, "2", b"2", None, float("nan"), 2j, torch.tensor(2), {2}],
    "stride": [*INT, None],
    "conv_out_bias": FLAG,
    "pool_order": CHOICE,
    "mode": CHOICE,
    "use_scale": FLAG,
    "norm": CHOICE,
    "pooled_terms": CHOICE,
    "channel_mask_source": CHOICE,
    "normalize": CHOICE,
    "feature_norm": CHOICE,
}
PRESET = {name: value[0] if isinstance(value, tuple) else value for name, value in PRESETS["two_stage"].items()}


def weights_with(**fields: Any) -> fbkd_ops.NonLocalWeights:
    return NonLocalBlock2d(4, 2).weights()._replace(**fields)


def wrong_weights() -> list[Any]:
    """No weights, and weights of which one field is wrong."""
    fields = NonLocalBlock2d(4, 2).weights()._asdict()
    pairs = [(name, wrong) for name, w in fields.items() if w is not None for wrong in wrong_tensors(w.detach())]
    return [
        "weights",
        fields,
        tuple(fields.values()),
        NonLocalBlock2d(5, 2).weights(),
        *(weights_with(**{name: wrong}) for name, wrong in pairs if not (name == "out_bias" and wrong is None)),
    ]


def wrong_pools() -> list[Any]:
    """No pool, and pools of which an attention map is wrong."""
    pairs = [
        (name, wrong)
        for name in ("spatial_attention", "channel_attention")
        for wrong in [*wrong_tensors(getattr(POOL, name)), getattr(POOL, name)[:1]]
    ]
    return ["pool", MAPS, tuple(POOL), [POOL], AttentionPool] + [
        POOL._replace(**{name: wrong}) for name, wrong in pairs
    ]


def wrong_boxes() -> list[Any]:
    """All but the integers, which are fine, and None."""
    boxes = torch.zeros(1, 4)
    return [each for each in wrong_tensors(boxes) if each is not None and getattr(each, "dtype", None) != torch.int32]


class Public(NamedTuple):
    """A public callable: arguments with which it works, and wrong values for each argument it has."""

    call: Callable
    arguments: dict[str, Any]
    wrong: dict[str, list[Any]]
    variadic: tuple[str, ...] = ()  # arguments that stand for others: covered by name, or passed on to PyTorch


def levelwise(kind, **constants):
    """Entries of a loss of one term that needs nothing but the features; ``constants`` are its own arguments."""
    maps = {"student_features": [MAPS], "teacher_features": [MAPS]}
    wrong_maps = dict.fromkeys(maps, FEATURES)
    arguments = {
        "student_channels": [*CHANNELS, None],
        "teacher_channels": CHANNELS,
        "num_levels": INT,
        "preset": [*CHOICE, ["two_stage"]],
        "weight": [wrong for wrong in [*NUMBER, [], [-1, -1], np.array([])] if wrong is not None],
        "resize": [wrong for wrong in CHOICE if wrong is not None],
    }
    name = kind.__name__
    return {
        name: Public(kind, dict(student_channels=4, num_levels=2), arguments | constants),
        f"{name}.from_features": Public(kind.from_features, maps, wrong_maps, ("arguments",)),
        f"{name}.forward": Public(kind(4, num_levels=1).forward, maps, wrong_maps),
    }


BLOCK = {
    "mode": [*CHOICE, "concatenation"],
    "stride": [*INT, None],
    "pool_order": CHOICE,
    "use_scale": FLAG,
}
RELATION = dict(
    student=MAPS,
    teacher=MAPS,
    student_weights=NonLocalBlock2d(4, 2).weights(),
    teacher_weights=NonLocalBlock2d(4, 2).weights(),
    adaptation_weight=torch.eye(4),
    adaptation_bias=torch.zeros(4),
)
ADAPTATION = wrong_tensors(torch.eye(4)) + [torch.eye(5)]
SPATIAL_MASK = [each for each in wrong_tensors(MAPS[:, 0]) if each is not None]
CHANNEL_MASK = [each for each in wrong_tensors(MAPS[:, :, 0, 0]) if each is not None]
PICTURE = {
    "student_features": FEATURES,
    "teacher_features": FEATURES,
    "loss": ["two_stage", 3, FBKDLoss, nn.Identity(), FBKDLoss(4, num_levels=1).to("meta")],
    "index": [-1, 2, 0.0, True, "0", None, [0], torch.tensor(0)],
    "levels": [[], "0", b"\x00", 0, [1], [-1], [0.0], [True], ["p3"], {0}, np.array([0.0]), np.array([]), {0: 0}],
}
CALLABLES = {
    "FBKDLoss": Public(
        FBKDLoss,
        dict(student_channels=4, num_levels=2),
        {
            "student_channels": [*CHANNELS, None],
            "teacher_channels": CHANNELS,
            "num_levels": INT,
            "preset": [*CHOICE, ["two_stage"]],
            "memory_efficient": FLAG,
            "synchronize": FLAG,
            **{
                name: [*wrong, [], [wrong[0]] * 2, np.array([]), UserList([wrong[0]] * 2)]
                for name, wrong in SETTINGS.items()
            },
        },
        ("overrides",),
    ),
    "FBKDLoss.from_features": Public(
        FBKDLoss.from_features,
        dict(student_features=[MAPS], teacher_features=[MAPS]),
        {"student_features": FEATURES, "teacher_features": FEATURES},
        ("arguments",),
    ),
    "FBKDLoss.forward": Public(
        FBKDLoss(4, num_levels=1).forward,
        dict(student_features=[MAPS], teacher_features=[MAPS]),
        {"student_features": FEATURES, "teacher_features": FEATURES},
    ),
    **levelwise(PKDLoss, eps=POSITIVE),
    **levelwise(CWDLoss, temperature=POSITIVE),
    **levelwise(
        MGDLoss,
        mask_ratio=[wrong for wrong in [*NUMBER, 1.5] if wrong is not None],
        mask_on=CHOICE,
        seed=[0.5, "0", None, True],
    ),
    "FGDLoss": Public(
        FGDLoss,
        dict(student_channels=4, num_levels=2),
        {
            "student_channels": [*CHANNELS, None],
            "teacher_channels": CHANNELS,
            "num_levels": INT,
            "preset": [*CHOICE, ["two_stage"]],
            **dict.fromkeys(
                ("foreground_weight", "background_weight", "attention_weight", "global_weight"),
                [wrong for wrong in [*NUMBER, [], [-1, -1], np.array([])] if wrong is not None],
            ),
            "temperature": [wrong for wrong in POSITIVE if wrong is not None],
            "feature_norm": CHOICE,
        },
    ),
    "FGDLoss.from_features": Public(
        FGDLoss.from_features,
        dict(student_features=[MAPS], teacher_features=[MAPS]),
        {"student_features": FEATURES, "teacher_features": FEATURES},
        ("arguments",),
    ),
    "FGDLoss.forward": Public(
        FGDLoss(4, num_levels=1).forward,
        dict(student_features=[MAPS], teacher_features=[MAPS], boxes=[BOXES] * len(MAPS), image_size=(8, 8)),
        {
            "student_features": FEATURES,
            "teacher_features": FEATURES,
            "boxes": [None, 3, "boxes", BOXES, [], [BOXES], [None] * len(MAPS), [BOXES[:, :3]] * len(MAPS)],
            "image_size": [None, 8, "88", (8,), (8, 8, 8), (8, 0), (8, -1), (8, float("nan")), (8, "8"), (8, None)],
        },
    ),
    "ScoreWeightedLoss": Public(
        ScoreWeightedLoss,
        dict(student_channels=4, num_levels=2),
        {
            "student_channels": [*CHANNELS, None],
            "teacher_channels": CHANNELS,
            "num_levels": INT,
            "weight": [*NUMBER, [], [-1, -1], np.array([])],
            "resize": [wrong for wrong in [*CHOICE, "teacher"] if wrong is not None],
        },
    ),
    "ScoreWeightedLoss.from_features": Public(
        ScoreWeightedLoss.from_features,
        dict(student_features=[MAPS], teacher_features=[MAPS]),
        {"student_features": FEATURES, "teacher_features": FEATURES},
        ("arguments",),
    ),
    "ScoreWeightedLoss.forward": Public(
        ScoreWeightedLoss(4, num_levels=1).forward,
        dict(student_features=[MAPS], teacher_features=[MAPS], scores=[MAPS[:, 0]]),
        {
            "student_features": FEATURES,
            "teacher_features": FEATURES,
            "scores": [None, 3, "scores", [], [MAPS], [None], [MAPS[:, 0].long()], [MAPS[:1, 0]], [MAPS[:, 0]] * 2],
        },
    ),
    "LevelSettings": Public(LevelSettings, PRESET, SETTINGS),
    "NonLocalBlock2d": Public(
        NonLocalBlock2d,
        dict(in_channels=4),
        {
            "in_channels": [*INT, None],
            "inter_channels": [*INT, 5],
            "reduction": INT,
            **{name: [each for each in wrong if each != "concatenation"] for name, wrong in BLOCK.items()},
            "norm": CHOICE,
            "conv_out_bias": FLAG,
        },
    ),
    "NonLocalBlock2d.forward": Public(NonLocalBlock2d(4).forward, dict(x=MAPS), {"x": ALONE}),
    "size_free_weights": Public(
        fbkd_ops.size_free_weights,
        dict(preset="two_stage", num_levels=3),
        {
            "preset": [*CHOICE, ["two_stage"]],
            "num_levels": [*INT, None],
            "strength": NUMBER,
            "first_stride": [*INT, None],
            "strides": ["48", [4, 8, 16.0], [4, 8, 0], [4, 8]],
        },
    ),
    "sum_losses": Public(
        fbkd_ops.sum_losses,
        dict(losses=[torch.ones(())]),
        {"losses": [None, 3, "loss", [], {}, MAPS, [MAPS], {"loss": 1.0}, ["loss"], object()]},
    ),
    "FrozenBatchNorm2d": Public(
        fbkd_ops.FrozenBatchNorm2d, dict(num_features=4), {"num_features": [*INT, None], "eps": POSITIVE}
    ),
    "FeatureTap": Public(
        FeatureTap,
        dict(model=nn.Sequential(nn.Identity()), layers="0"),
        {
            "model": [None, *MODULE],
            "layers": [None, 3, b"0", [], {}, ["0", "0"], ["0", 3], [b"0"], {"0"}, nn.Identity(), "1", np.array([0])],
            "name": TEXT,
            "stop_when_complete": FLAG,
        },
    ),
    "Layer": Public(Layer, {}, {"path": TEXT, "inputs": FLAG, "select": [3, "select", []]}),
    "Renormalize": Public(
        fbkd_ops.Renormalize,
        dict(student=([0.5], [0.5]), teacher=([0.4], [0.3])),
        {side: [None, 3, "pair", [0.5], ([0.5], [0.0]), ([0.5], [0.5, 0.5])] for side in ("student", "teacher")},
    ),
    "TokenMaps": Public(
        fbkd_ops.TokenMaps,
        dict(model=nn.Sequential(nn.Identity()), layers="0", patch_size=4),
        {
            "model": [None, *MODULE],
            "layers": [None, 3, b"0", [], {}, ["0", "0"], ["0", 3], {"0"}, nn.Identity(), "1"],
            "stride": INT,
            "patch_size": INT,
            "call": [3, "call", []],
        },
    ),
    "inherit": Public(
        fbkd_ops.inherit,
        dict(student=nn.Linear(2, 2), teacher=nn.Linear(2, 2), modules=""),
        {
            "student": [None, *MODULE[:4]],
            "teacher": [None, *MODULE[:4]],
            "modules": [None, 3, b"", [], [3], ["x"], {1}],
        },
    ),
    "use_backend": Public(
        lambda name: fbkd_ops.use_backend(name).__enter__(),
        dict(name="auto"),
        {"name": [None, 3, "gpu", b"cpu", ["cpu"], str]},
    ),
    "distributed.data_parallel": Public(
        data_parallel, dict(module=nn.Identity()), {"module": [None, *MODULE], "sync_batch_norm": FLAG}, ("options",)
    ),
    "functional.attention_pool": Public(functional.attention_pool, dict(x=MAPS), {"x": ALONE}),
    "functional.attention_pools": Public(
        functional.attention_pools,
        dict(features=[MAPS]),
        {"features": [*LISTS, *([MAPS, each] for each in MAP)]},
    ),
    "functional.attention_mask": Public(
        functional.attention_mask,
        dict(student=POOL.spatial_attention, teacher=POOL.spatial_attention, temperature=0.5),
        {
            "student": [each for each in [*wrong_tensors(POOL.spatial_attention), MAPS[0, 0]] if each is not None],
            "teacher": [*wrong_tensors(POOL.spatial_attention), torch.zeros(2)],
            "temperature": POSITIVE,
            "mask_rule": CHOICE,
        },
    ),
    "functional.attention_masks": Public(
        functional.attention_masks,
        dict(student=POOL, teacher=POOL, spatial_temperature=0.5, channel_temperature=0.5),
        {
            "student": wrong_pools(),
            "teacher": wrong_pools(),
            "spatial_temperature": POSITIVE,
            "channel_temperature": POSITIVE,
            "mask_rule": CHOICE,
        },
    ),
    "functional.masked_l2_loss": Public(
        functional.masked_l2_loss,
        dict(student=MAPS, teacher=MAPS),
        {"student": MAP, "teacher": MAP, "spatial_mask": SPATIAL_MASK, "channel_mask": CHANNEL_MASK},
    ),
    "functional.adapted_masked_l2_loss": Public(
        functional.adapted_masked_l2_loss,
        dict(student=MAPS, weight=torch.eye(4), bias=torch.zeros(4), teacher=MAPS),
        {
            "student": MAP,
            "weight": ADAPTATION,
            "bias": wrong_tensors(torch.zeros(4)),
            "teacher": MAP,
            "spatial_mask": SPATIAL_MASK,
            "channel_mask": CHANNEL_MASK,
        },
    ),
    "functional.channel_correlation_loss": Public(
        functional.channel_correlation_loss,
        dict(student=MAPS, teacher=MAPS),
        {"student": MAP, "teacher": MAP, "eps": POSITIVE},
    ),
    "functional.channel_divergence_loss": Public(
        functional.channel_divergence_loss,
        dict(student=MAPS, teacher=MAPS),
        {"student": MAP, "teacher": MAP, "temperature": POSITIVE},
    ),
    "functional.spatial_l2_loss": Public(
        functional.spatial_l2_loss,
        dict(student=MAPS[:, 0], weight=torch.eye(3), bias=torch.zeros(1), teacher=MAPS[:, 1]),
        {
            "student": [*wrong_tensors(MAPS[:, 0]), MAPS],
            "weight": wrong_tensors(torch.eye(3)),
            "bias": wrong_tensors(torch.zeros(1)),
            "teacher": [*wrong_tensors(MAPS[:, 0]), MAPS],
        },
    ),
    "functional.non_local": Public(
        functional.non_local,
        dict(x=MAPS, weights=NonLocalBlock2d(4, 2).weights()),
        {"x": ALONE, "weights": [None, *wrong_weights()], **BLOCK, "norm": NORM},
    ),
    "functional.relation_loss": Public(
        functional.relation_loss,
        RELATION,
        {
            "student": MAP,
            "teacher": MAP,
            "student_weights": [None, *wrong_weights()],
            "teacher_weights": [None, *wrong_weights()],
            "adaptation_weight": ADAPTATION,
            "adaptation_bias": wrong_tensors(torch.zeros(4)),
            **BLOCK,
            "student_norm": NORM,
            "teacher_norm": NORM,
            "memory_efficient": FLAG,
        },
    ),
    "visualize.attention": Public(
        visualize.attention,
        dict(image=IMAGE, student_features=[MAPS], teacher_features=[MAPS], boxes=torch.zeros(1, 4)),
        {
            **PICTURE,
            "image": [*wrong_tensors(IMAGE), IMAGE[:2], IMAGE * 255, IMAGE - 1, IMAGE / 0],
            "boxes": [3, "boxes", [[0, 0, 1, 1]], torch.zeros(4), *wrong_boxes()],
            "labels": ["a", b"a", 3, {"a"}, {"a": 1}, [], ["a", "b"], iter("a")],
            "padded_size": [32, "32", b"\x20\x20", (24,), (23, 20), (24.0, 20.0), (True, True), {24, 20}, (24, 20, 3)],
            "others": [3, "others", [MAPS], MAPS, *({"plain": each} for each in FEATURES)],
            "student_title": TEXT,
            "teacher_title": TEXT,
        },
    ),
    "visualize.channel_attention": Public(
        visualize.channel_attention, dict(student_features=[MAPS], teacher_features=[MAPS]), PICTURE
    ),
    "load_non_local": Public(
        load_non_local,
        dict(block=NonLocalBlock2d(4), source=NonLocalBlock2d(4).state_dict()),
        {
            "block": [None, nn.Identity(), NonLocalBlock2d, "block"],
            "source": [None, 3, "block", [], {}, nn.Identity(), NonLocalBlock2d, {"g.weight": 3}],
        },
    ),
}
CASES = [
    pytest.param(name, argument, value, id=f"{name}-{argument}-{index}")
    for name, public in CALLABLES.items()
    for argument, wrong in public.wrong.items()
    for index, value in enumerate(wrong)
]
# How a message calls an argument whose name says little.
OTHER_NAMES = {"use_backend": {"name": "backend"}}


def named(name: str, argument: str) -> str:
    return OTHER_NAMES.get(name, {}).get(argument, argument)


@pytest.mark.parametrize("name", CALLABLES)
def test_the_arguments_work_before_one_is_wrong(name):
    public = CALLABLES[name]
    public.call(**public.arguments)


@pytest.mark.parametrize("name, argument, value", CASES)
def test_a_wrong_argument_is_named(name, argument, value):
    public = CALLABLES[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        public.call(**public.arguments | {argument: value})
    assert re.search(rf"\b{named(name, argument)}\b", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", CALLABLES)
def test_no_argument_is_left_out(name):
    public = CALLABLES[name]
    parameters = set(inspect.signature(public.call).parameters) - set(public.variadic)
    assert parameters <= set(public.wrong)


def test_no_callable_is_left_out():
    modules = {
        "": fbkd_ops,
        "functional.": functional,
        "visualize.": visualize,
        "distributed.": fbkd_ops.training.data_parallel,
    }
    public = {prefix + name for prefix, module in modules.items() for name in module.__all__}
    callables = {name for name in public if callable(eval(f"fbkd_ops.{name}"))}
    # Tuples without checks of their own: the functions that take them check each field.
    callables -= {name for name in callables if name.endswith("Warning")}
    assert callables - {"AttentionPool", "BalanceReport", "Distiller", "NonLocalWeights"} <= set(CALLABLES)


# Lists of any kind are one value per level, wherever an argument takes that.


class Registered:
    """A sequence by registration only, as duck types of configuration libraries are."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


Sequence.register(Registered)


def omega_list(values):
    return pytest.importorskip("omegaconf").OmegaConf.create(list(values))


LIST_KINDS = {
    "list": list,
    "tuple": tuple,
    "UserList": UserList,
    "deque": deque,
    "registered": Registered,
    "numpy": lambda values: np.array(list(values)),
    "numpy scalars": lambda values: [np.array(value)[()] for value in values],
    "omegaconf": omega_list,
    "torch": lambda values: torch.tensor(list(values)),
    "array": lambda values: array("d" if isinstance(values[0], float) else "q", values),
}
TWO_VALUES = {
    "spatial_temperature": (0.5, 0.25),
    "channel_temperature": (0.5, 0.25),
    "mask_rule": ("average", "joint"),
    "use_channel_mask": (True, False),
    **{f"{term}_weight": (0.5, 0.25) for term in TERMS},
    "inter_channels": (2, 4),
    "stride": (2, 1),
    "conv_out_bias": (True, False),
    "pool_order": ("single", "nested"),
    "mode": ("gaussian", "dot_product"),
    "use_scale": (True, False),
    "norm": ("batch", "none"),
    "pooled_terms": ("mean", "attention"),
    "channel_mask_source": ("both", "teacher"),
    "normalize": ("none", "mean"),
    "feature_norm": ("channel", "none"),
}


def test_every_setting_is_tried_as_a_list():
    assert set(TWO_VALUES) == set(SETTINGS) == {field.name for field in dataclasses.fields(LevelSettings)}


def can_hold(kind, value):
    """Whether a list of that kind takes such a value."""
    return not isinstance(value, {"torch": str, "array": (str, bool)}.get(kind, ()))


OVERRIDES = [(name, kind) for name, values in TWO_VALUES.items() for kind in LIST_KINDS if can_hold(kind, values[0])]


@pytest.mark.parametrize("name, kind", OVERRIDES)
def test_every_override_takes_a_list_of_any_kind(name, kind):
    values = TWO_VALUES[name]
    loss = FBKDLoss(8, num_levels=2, **{name: LIST_KINDS[kind](values)})
    found = tuple(getattr(level.settings, name) for level in loss.levels)
    assert found == values and [type(each) for each in found] == [type(each) for each in values]
    loss([torch.randn(2, 8, 5, 5)] * 2, [torch.randn(2, 8, 5, 5)] * 2)


@pytest.mark.parametrize("kind", LIST_KINDS)
def test_channels_take_a_list_of_any_kind(kind):
    loss = FBKDLoss(LIST_KINDS[kind]((4, 6)), LIST_KINDS[kind]((5, 7)))
    widths = [(level.student_channels, level.teacher_channels) for level in loss.levels]
    assert widths == [(4, 5), (6, 7)] and all(type(width) is int for pair in widths for width in pair)
    assert len(FBKDLoss(range(4, 7)).levels) == 3
    assert FBKDLoss(4, num_levels=3, stride=range(1, 4)).levels[2].settings.stride == 3


@pytest.mark.parametrize("kind", LIST_KINDS)
def test_pictures_take_lists_of_any_kind(kind):
    features, make = [MAPS] * 3, LIST_KINDS[kind]
    figure = visualize.attention(
        IMAGE,
        features,
        features,
        levels=make((2, 0)),
        padded_size=make((32, 40)),
        boxes=torch.zeros(2, 4),
        labels=make((1, 2)),
    )
    assert [axes.get_ylabel().split(",")[0] for axes in figure.axes if "level" in axes.get_ylabel()] == [
        "level 2",
        "level 0",
    ]


@pytest.mark.parametrize("kind", [kind for kind in LIST_KINDS if can_hold(kind, "0")])
def test_a_tap_takes_a_list_of_any_kind(kind):
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    with FeatureTap(model, LIST_KINDS[kind](("0", "1"))) as tap:
        model(MAPS)
    first, second = tap.features()
    assert torch.equal(first, MAPS) and torch.equal(second, MAPS.relu())


@pytest.mark.parametrize("kind", [list, tuple, UserList, deque, Registered])
def test_features_come_in_a_list_of_any_kind(kind):
    loss, features = FBKDLoss(4, num_levels=2).eval(), [MAPS, MAPS[:, :, 1:]]
    assert loss(kind(features), kind(features)) == loss(features, features)
    assert len(functional.attention_pools(kind(features))) == 2
    assert len(FBKDLoss.from_features(kind(features), kind(features)).levels) == 2


@pytest.mark.parametrize("kind", [list, tuple, UserList, deque, Registered])
def test_a_model_may_return_a_list_of_any_kind(kind):
    model = nn.Sequential(nn.Identity())
    with FeatureTap(model, Layer("0", select=lambda x: kind([x, -x]))) as tap:
        model(MAPS)
    assert [torch.equal(a, b) for a, b in zip(tap.features(), [MAPS, -MAPS], strict=True)] == [True, True]


@pytest.mark.parametrize("flag", [np.True_, np.bool_(False)])
def test_numpys_flags_are_flags(flag):
    loss = FBKDLoss(4, num_levels=1, memory_efficient=flag, synchronize=flag, use_scale=flag)
    assert loss.memory_efficient is bool(flag) and loss.synchronize is bool(flag)
    assert loss.levels[0].student_non_local.use_scale is bool(flag)
    assert NonLocalBlock2d(4, use_scale=flag).use_scale is bool(flag)
