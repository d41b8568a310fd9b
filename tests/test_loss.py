"""FBKDLoss: presets, overrides, different widths, hard edges and bad input."""

import copy
import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TEST_ALL, randomise

import fbkd_ops
from fbkd_ops import FBKDLoss
from fbkd_ops.presets import MODES, PRESETS, TERMS

SIZES = [(17, 20), (9, 10), (5, 5), (3, 3), (2, 2), (1, 1)]


def pyramid(channels, levels, dtype=torch.float64, batch=2, seed=0):
    """Features ``(batch, channels, H, W)`` from 17x20 down to 1x1."""
    widths = channels if isinstance(channels, list) else [channels] * levels
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, width, *size, generator=generator, dtype=torch.float64).to(dtype)
        for width, size in zip(widths, SIZES[: len(widths)], strict=True)
    ]


def run(loss, students, teachers, backend="auto"):
    """Terms, gradients of the features, gradients of the parameters, buffers."""
    loss = copy.deepcopy(loss)
    students = [x.clone().requires_grad_() for x in students]
    with fbkd_ops.use_backend(backend):
        terms = loss(students, teachers)
    sum(terms.values()).backward()
    grads = {name: parameter.grad for name, parameter in loss.named_parameters()}
    return terms, [x.grad for x in students], grads, dict(loss.named_buffers())


@pytest.mark.parametrize("preset,levels", [("two_stage", 5), ("one_stage", 5), ("mmrazor", 4), ("paper", 6)])
@pytest.mark.parametrize("widths", [(8, None), (6, 10)], ids=["same width", "6 to 10 channels"])
def test_presets_equal_the_reference(preset, levels, widths):
    loss = randomise(FBKDLoss(*widths, num_levels=levels, preset=preset).double())
    students = pyramid(widths[0], levels)
    teachers = pyramid(widths[1] or widths[0], levels, seed=1)
    ours, literal = (run(loss, students, teachers, backend) for backend in ("auto", "reference"))
    torch.testing.assert_close(ours, literal, rtol=1e-10, atol=1e-12)
    for name, value in ours[0].items():
        assert value > 1e-6, name
    for grad in ours[1]:
        assert grad.abs().max() > 1e-8


@pytest.mark.parametrize(
    "override",
    [
        dict(mask_rule="joint"),
        dict(use_channel_mask=True),
        dict(use_channel_mask=True, channel_mask_source="teacher"),
        dict(use_channel_mask=True, mask_rule="joint", channel_mask_source="teacher"),
        dict(pooled_terms="attention"),
        dict(spatial_temperature=0.1),
        dict(use_channel_mask=True, channel_temperature=0.05),
        dict(normalize="mean"),
        dict(feature_norm="channel"),
        dict(norm="none"),
        dict(conv_out_bias=False),
        dict(stride=[1, 3]),
        dict(inter_channels=[1, 6]),
        dict(pool_order="nested"),
        *(dict(mode=mode) for mode in MODES),
        dict(mode=["gaussian", "concatenation"]),
        dict(mode="embedded_gaussian", use_scale=False),
        *({f"{term}_weight": [0.5, 2.0]} for term in TERMS),
    ],
    ids=str,
)
def test_every_override_equals_the_reference_and_matters(override):
    base = dict(num_levels=2, **{f"{term}_weight": 1.0 for term in TERMS})
    students, teachers = pyramid(6, 2), pyramid(8, 2, seed=1)
    loss = randomise(FBKDLoss(6, 8, **base | override).double())
    ours, literal = (run(loss, students, teachers, backend) for backend in ("auto", "reference"))
    torch.testing.assert_close(ours, literal, rtol=1e-10, atol=1e-10)
    if override in (dict(mode="dot_product"), dict(pool_order="nested")):
        return  # the preset's own mode; an order that only ties can tell apart
    default = randomise(FBKDLoss(6, 8, **base).double())
    before = run(default, students, teachers)
    if override == dict(conv_out_bias=False):
        # BatchNorm removes the bias in training: it shows in eval only.
        before, ours = (run(module.eval(), students, teachers) for module in (default, loss))
    assert any(abs(ours[0][name] - before[0][name]) > 1e-9 for name in ours[0])


def test_feature_term_written_out():
    """The one_stage feature term of one level from the definition, element by element."""
    loss = randomise(FBKDLoss(3, num_levels=1, preset="one_stage").double())
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    layer = loss.levels[0].feature_adaptation
    total = 0.0
    for n in range(2):
        maps = [x[n].abs() for x in (student, teacher)]
        spatial = sum((m.mean(0) / 0.1).exp() / (m.mean(0) / 0.1).exp().sum() for m in maps) * 20 / 2
        channel = sum((m.mean((1, 2)) / 0.1).exp() / (m.mean((1, 2)) / 0.1).exp().sum() for m in maps) * 3 / 2
        for i in range(4):
            for j in range(5):
                adapted = layer.weight[:, :, 0, 0] @ student[n, :, i, j] + layer.bias
                total += (spatial[i, j] * channel * (adapted - teacher[n, :, i, j]) ** 2).sum()
    term = loss([student], [teacher])["loss_fbkd_feature"]
    torch.testing.assert_close(term, 6 * 7e-5 * total.sqrt())


def test_normalize_mean_is_invariant_to_batch_and_size():
    """Repeating images or tiling pixels changes the sum, not the mean. The spatial term has borders, which differ."""
    options = dict(num_levels=1, norm="none", stride=1, mode="dot_product", pooled_terms="mean")
    loss = randomise(FBKDLoss(4, **options, normalize="mean").double())
    student, teacher = pyramid(4, 1)[0], pyramid(4, 1, seed=1)[0]
    once = loss([student], [teacher])
    tiled = loss([student.repeat(3, 1, 2, 2)], [teacher.repeat(3, 1, 2, 2)])
    for term in ("feature", "channel", "relation"):
        torch.testing.assert_close(once[f"loss_fbkd_{term}"], tiled[f"loss_fbkd_{term}"])
    plain = randomise(FBKDLoss(4, **options).double())([student], [teacher])
    n, channels, height, width = student.shape
    of_maps, of_means = n * channels * height * width, {"channel": n * channels, "spatial": n * height * width}
    for term in TERMS:
        elements = of_means.get(term, of_maps)
        torch.testing.assert_close(plain[f"loss_fbkd_{term}"], once[f"loss_fbkd_{term}"] * math.sqrt(elements))


def test_the_preset_table():
    """Against the constants of the released code, the MMRazor configuration and the paper, typed here once more."""
    two_stage = [level.settings for level in FBKDLoss(256).levels]
    assert [s.stride for s in two_stage] == [8, 4, 2, 2, 2]
    assert [s.inner_width(256) for s in two_stage] == [64, 64, 128, 128, 128]
    first = two_stage[0]
    assert (first.feature_weight, first.channel_weight, first.spatial_weight, first.relation_weight) == (
        7e-5,
        4e-3,
        4e-3,
        7e-5,
    )
    assert (first.spatial_temperature, first.channel_temperature, first.mask_rule) == (0.5, 0.5, "average")
    assert not first.use_channel_mask and first.conv_out_bias and first.mode == "dot_product" and first.norm == "batch"
    one_stage = FBKDLoss(256, preset="one_stage").levels[4].settings
    assert one_stage.feature_weight == pytest.approx(42e-5) and one_stage.spatial_weight == pytest.approx(24e-3)
    assert one_stage.use_channel_mask and one_stage.channel_temperature == one_stage.spatial_temperature == 0.1
    mmrazor = [level.settings for level in FBKDLoss(256, preset="mmrazor").levels]
    assert [s.stride for s in mmrazor] == [16, 8, 4, 4] and not mmrazor[0].conv_out_bias
    assert {s.pool_order for s in mmrazor} == {"nested"} and mmrazor[3].inner_width(256) == 128
    paper = FBKDLoss(256, preset="paper", num_levels=7).levels[6].settings
    assert paper.mask_rule == "joint" and paper.use_channel_mask and paper.pooled_terms == "attention"
    assert paper.stride == 2 and paper.inner_width(3) == 1
    assert set(PRESETS) == {"two_stage", "one_stage", "mmrazor", "paper"}


def test_overrides_are_the_settings_fields():
    """What FBKDLoss documents is what LevelSettings has."""
    documented = set(re.findall(r"``(\w+)``", FBKDLoss.__doc__.split("**overrides")[1].split("Raises")[0]))
    assert {field.name for field in dataclasses.fields(fbkd_ops.LevelSettings)} <= documented


def test_dicts_lists_and_tuples_agree():
    loss = randomise(FBKDLoss(4, num_levels=2)).eval()
    students, teachers = pyramid(4, 2, torch.float32), pyramid(4, 2, torch.float32, seed=1)
    expected = loss(students, teachers)
    reordered = {"b": teachers[1], "a": teachers[0]}
    for s, t in ((tuple(students), teachers), (dict(a=students[0], b=students[1]), reordered)):
        torch.testing.assert_close(loss(s, t), expected)


def test_every_parameter_receives_a_gradient_and_the_teacher_none():
    loss = FBKDLoss([4, 6], [8, 5], preset="paper")
    students = [x.requires_grad_() for x in pyramid([4, 6], 2, torch.float32)]
    teachers = [x.requires_grad_() for x in pyramid([8, 5], 2, torch.float32, seed=1)]
    sum(loss(students, teachers).values()).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert all(x.grad is None for x in teachers)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_weight_zero_takes_its_parameters_along(term):
    loss = FBKDLoss(4, num_levels=2, **{f"{term}_weight": 0})
    students = [x.requires_grad_() for x in pyramid(4, 2, torch.float32)]
    terms = loss(students, pyramid(4, 2, torch.float32, seed=1))
    assert terms[f"loss_fbkd_{term}"] == 0 and len(terms) == 4
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    whole = {name for name, _ in FBKDLoss(4, num_levels=2).named_parameters()}
    gone = whole - {name for name, _ in loss.named_parameters()}
    assert gone and all(term in name or (term == "relation" and "non_local" in name) for name in gone)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("batch,size", [(0, (6, 5)), (0, (1, 1)), (2, (1, 1)), (2, (1, 7))])
def test_empty_batches_and_tiny_levels(preset, batch, size):
    loss = randomise(FBKDLoss(4, 6, num_levels=1, preset=preset).double())
    student = torch.randn(batch, 4, *size, dtype=torch.float64)
    teacher = torch.randn(batch, 6, *size, dtype=torch.float64)
    ours, literal = (run(loss, [student], [teacher], backend) for backend in ("auto", "reference"))
    torch.testing.assert_close(ours[:3], literal[:3], rtol=1e-9, atol=1e-10)
    for grad in [*ours[1], *ours[2].values()]:
        assert grad.isfinite().all()
    if batch == 0:
        assert all(value == 0 for value in ours[0].values())


def test_one_value_a_channel_is_refused_before_anything_is_updated():
    loss = FBKDLoss(4, num_levels=2)
    features = [torch.randn(1, 4, 3, 3), torch.randn(1, 4, 1, 1)]
    with pytest.raises(
        ValueError, match=r"student_features\[1\]: Expected more than 1 value per channel when training"
    ):
        loss(features, features)
    assert loss.levels[0].student_non_local.norm.num_batches_tracked == 0
    loss.eval()(features, features)
    FBKDLoss(4, num_levels=2, norm="none")(features, features)


def test_equal_features_give_finite_gradients():
    """With identity adaptations every term is exactly 0 at the initial non-local weights."""
    loss = FBKDLoss(3, num_levels=1)
    level = loss.levels[0]
    with torch.no_grad():
        for layer in (level.feature_adaptation, level.relation_adaptation):
            layer.weight.copy_(torch.eye(3)[:, :, None, None])
            layer.bias.zero_()
        level.channel_adaptation.weight.copy_(torch.eye(3))
        level.channel_adaptation.bias.zero_()
        level.spatial_adaptation.weight.zero_()[0, 0, 1, 1] = 1
        level.spatial_adaptation.bias.zero_()
    student = torch.randn(2, 3, 8, 8, requires_grad=True)
    terms = loss([student], [student.detach().clone()])
    assert all(value == 0 for value in terms.values()), terms
    sum(terms.values()).backward()
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())


def test_a_second_derivative_raises():
    """The ops have first derivatives only, and the roots in front of them must not hide it."""
    loss = randomise(FBKDLoss(4, num_levels=1, stride=1))
    student, teacher = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randn(2, 4, 5, 6)
    for term in loss([student], [teacher]).values():
        (gradient,) = torch.autograd.grad(term, student, create_graph=True, retain_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_a_nan_feature_is_not_silenced():
    student, teacher = pyramid(4, 1)[0], pyramid(4, 1, seed=1)[0]
    student[0, 0, 0, 0] = float("nan")
    assert all(value.isnan() for value in FBKDLoss(4, num_levels=1).double()([student], [teacher]).values())


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float32, torch.float64)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_mixed_dtypes_layouts_and_autocast(dtypes, channels_last):
    """A float32 loss under autocast against float64 on the same, exactly representable, values."""
    loss = randomise(FBKDLoss(8, num_levels=2, **{f"{term}_weight": 1.0 for term in TERMS}))
    students, teachers = pyramid(8, 2, dtypes[0]), pyramid(8, 2, dtypes[1], seed=1)
    if channels_last:
        students = [x.contiguous(memory_format=torch.channels_last) for x in students]
    truth = run(
        copy.deepcopy(loss).double(), [x.double() for x in students], [x.double() for x in teachers], "reference"
    )
    students = [x.clone().requires_grad_() for x in students]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(students, teachers)
    sum(terms.values()).backward()
    for name, value in terms.items():
        assert value.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
        torch.testing.assert_close(value.double(), truth[0][name], rtol=2e-6, atol=1e-6)
    for student, grad in zip(students, truth[1], strict=True):
        assert student.grad.dtype == dtypes[0]
        error = (student.grad.double() - grad).norm() / grad.norm()
        # Each term's gradient is rounded to the student's dtype once, and once more where they add up.
        assert error < max(torch.finfo(dtypes[0]).eps, 5e-6), error


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_relation_of_features_of_different_precision_has_that_of_the_wider(dtypes, stride):
    loss = randomise(FBKDLoss(8, num_levels=1, stride=stride).double())
    student, teacher = pyramid(8, 1, dtypes[0]), pyramid(8, 1, dtypes[1], seed=1)
    ours, truth = (
        loss_of(s, t)["loss_fbkd_relation"]
        for loss_of, s, t in (
            (copy.deepcopy(loss), student, teacher),
            (loss, [student[0].double()], [teacher[0].double()]),
        )
    )
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_every_term_beside_a_float64_map_has_the_documented_precision(narrow, side):
    """Means and masks of the narrower map are float32's; all else is float64."""
    options = dict(num_levels=2, use_channel_mask=True, **{f"{term}_weight": 1.0 for term in TERMS})
    loss = randomise(FBKDLoss(8, **options).double())
    students = pyramid(8, 2, narrow if side == "student" else torch.float64)
    teachers = pyramid(8, 2, narrow if side == "teacher" else torch.float64, seed=1)
    terms = copy.deepcopy(loss)(students, teachers)
    truth = loss([x.double() for x in students], [x.double() for x in teachers])
    for name, value in terms.items():
        tolerance = 1e-12 if name == "loss_fbkd_relation" else 1e-8
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, truth[name], rtol=tolerance, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_half_precision_loss_module_accumulates_in_float32(backend):
    loss = randomise(FBKDLoss(4, num_levels=1).double())
    half = copy.deepcopy(loss).bfloat16()
    truth = copy.deepcopy(half).double()
    student, teacher = pyramid(4, 1, torch.bfloat16)[0], pyramid(4, 1, torch.bfloat16, seed=1)[0]
    with fbkd_ops.use_backend("reference"):
        expected = truth([student.double()], [teacher.double()])
    with fbkd_ops.use_backend(backend):
        terms = half([student], [teacher])
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_wider_features_than_parameters_update_the_statistics(backend):
    """float64 features under a float32 loss: float64 terms, and the float32 buffers of BatchNorm move."""
    loss = randomise(FBKDLoss(4, num_levels=1))
    truth = copy.deepcopy(loss).double()
    student, teacher = pyramid(4, 1)[0], pyramid(4, 1, seed=1)[0]
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    with fbkd_ops.use_backend("reference"):
        expected = truth([student], [teacher])
    with fbkd_ops.use_backend(backend):
        torch.testing.assert_close(loss([student], [teacher]), expected, rtol=1e-12, atol=1e-12)
    for (name, buffer), wide in zip(loss.named_buffers(), truth.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), wide.double(), rtol=1e-6, atol=1e-6)
        assert not torch.equal(buffer, before[name])


def test_narrow_features_leave_wider_frozen_statistics_alone():
    """The literal formula casts the buffers to float32; what it casts back would be rounded."""
    loss = randomise(FBKDLoss(4, num_levels=1).double()).eval()
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    with fbkd_ops.use_backend("reference"):
        loss([torch.randn(2, 4, 8, 8)], [torch.randn(2, 4, 8, 8)])
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())


@pytest.mark.parametrize("normalize", ["none", "mean"])
@pytest.mark.parametrize("synchronize", [False, True])
def test_no_image_gives_zero_terms(normalize, synchronize):
    loss = FBKDLoss(4, num_levels=1, normalize=normalize, synchronize=synchronize)
    student = torch.randn(0, 4, 8, 8, requires_grad=True)
    terms = loss([student], [torch.randn(0, 4, 8, 8)])
    sum(terms.values()).backward()
    assert all(term == 0 for term in terms.values())
    assert not any(parameter.grad.any() for parameter in loss.parameters())


# test_compile.py has every mode through AOTAutograd, at one size.
COMPILED = [("dot_product", "inductor"), *[("concatenation", "aot_eager")] * TEST_ALL]


@pytest.mark.parametrize("mode,backend", COMPILED)
def test_compiles_into_one_graph_for_any_size(mode, backend):
    """In training, so with BatchNorm's updates; the second size must not compile anew into static shapes or fail."""
    torch.compiler.reset()
    loss = randomise(FBKDLoss(4, num_levels=1, mode=mode, stride=2).double())
    compiled = torch.compile(copy.deepcopy(loss), fullgraph=True, backend=backend)
    for size in ((12, 10), (15, 9), (8, 20)):
        student, teacher = (torch.randn(2, 4, *size, dtype=torch.float64) for _ in range(2))
        results = []
        for function in (loss, compiled):
            leaf = student.clone().requires_grad_()
            terms = function([leaf], [teacher])
            results.append((terms, torch.autograd.grad(sum(terms.values()), leaf)))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(compiled.named_buffers()), {f"_orig_mod.{k}": v for k, v in loss.named_buffers()})


def test_from_features_reads_channels_and_levels():
    features = {"p3": torch.zeros(1, 4, 8, 8), "p4": torch.zeros(1, 6, 4, 4)}
    wide = {"p3": torch.zeros(1, 8, 8, 8), "p4": torch.zeros(1, 9, 4, 4)}
    loss = FBKDLoss.from_features(features, wide, preset="one_stage", stride=1)
    assert [(level.student_channels, level.teacher_channels) for level in loss.levels] == [(4, 8), (6, 9)]
    assert loss.levels[1].settings.stride == 1 and loss.preset == "one_stage"


MAPS = torch.zeros(2, 4, 5, 6)


@pytest.mark.parametrize(
    "students,teachers,error,message",
    [
        ([], [], ValueError, "student_features has no levels"),
        ([MAPS] * 2, [MAPS], ValueError, "same number of levels, got 2 and 1"),
        ([MAPS], [MAPS], ValueError, "student_features must have 2 levels, as the loss was made with, got 1"),
        (MAPS, MAPS, TypeError, "student_features must be a list, tuple or dict .* got Tensor"),
        ([MAPS, None], [MAPS] * 2, TypeError, r"student_features\[1\] must be a torch.Tensor, got NoneType"),
        ([MAPS] * 2, [MAPS, MAPS.long()], TypeError, r"teacher_features\[1\] must have dtype .* got int64"),
        ([MAPS.cfloat(), MAPS], [MAPS] * 2, TypeError, r"student_features\[0\] must have dtype .* got complex64"),
        (
            [MAPS, MAPS[0]],
            [MAPS] * 2,
            ValueError,
            r"student_features\[1\] must have shape \(N, C, H, W\), got \(4, 5, 6\)",
        ),
        (
            [MAPS, MAPS[:, :3]],
            [MAPS] * 2,
            ValueError,
            r"student_features\[1\] must have 4 channels, got 3 in \(2, 3, 5, 6\)",
        ),
        ([MAPS] * 2, [MAPS, MAPS[:, :3]], ValueError, r"teacher_features\[1\] must have 4 channels, got 3"),
        (
            [MAPS, MAPS[:1]],
            [MAPS] * 2,
            ValueError,
            r"student_features\[1\] and teacher_features\[1\] must agree in N, H and W, got \(1, .* and \(2, 4, 5, 6\)",
        ),
        ([MAPS, MAPS[:, :, 1:]], [MAPS] * 2, ValueError, r"must agree in N, H and W, got \(2, 4, 4, 6\)"),
        (
            [MAPS] * 2,
            [MAPS, MAPS.to("meta")],
            ValueError,
            r"student_features\[1\] and teacher_features\[1\] must be on one device, got cpu and meta",
        ),
        (
            [MAPS.to("meta")] * 2,
            [MAPS.to("meta")] * 2,
            ValueError,
            r"student_features\[0\] and the loss's parameters must be on one device, got meta and cpu",
        ),
        ({"a": MAPS, "b": MAPS}, {"a": MAPS, "c": MAPS}, ValueError, r"same keys, got \['a', 'b'\] and \['a', 'c'\]"),
        (
            [MAPS, MAPS[:, :, :0]],
            [MAPS] * 2,
            ValueError,
            r"student_features\[1\] must have at least one channel and one pixel",
        ),
    ],
)
def test_bad_features_are_named(students, teachers, error, message):
    with pytest.raises(error, match=message):
        FBKDLoss(4, num_levels=2)(students, teachers)


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (
            dict(preset="three_stage"),
            ValueError,
            "preset must be one of 'two_stage', 'one_stage', 'mmrazor', 'paper', got 'three_stage'",
        ),
        (dict(temperature=0.5), TypeError, "unknown override 'temperature'; the overrides are spatial_temperature"),
        (dict(preset="paper", num_levels=None), ValueError, "num_levels is needed: preset 'paper' fits any number"),
        (dict(num_levels=0), ValueError, "num_levels must be an int >= 1, got 0"),
        (dict(student_channels=[4, 4, 4]), ValueError, "student_channels has 3 entries, expected an int or 2"),
        (dict(student_channels=0), ValueError, "student_channels must be >= 1, got 0 at level 0"),
        (dict(student_channels=4.0), TypeError, "student_channels must be an int or a list of ints, got 4.0"),
        (dict(stride=[1, 2, 3]), ValueError, "stride has 3 values, expected one value or 2, one a level"),
        (dict(stride=[1, 0]), ValueError, r"level 1: stride must be an int >= 1 \(1: no pooling\), got 0"),
        (dict(stride=2.0), ValueError, "level 0: stride must be an int >= 1"),
        (dict(stride=0, relation_weight=0), ValueError, "level 0: stride must be an int >= 1"),
        (dict(mode="dot"), ValueError, "level 0: mode must be one of 'dot_product'"),
        (dict(mask_rule="sum"), ValueError, "level 0: mask_rule must be one of 'average', 'joint', got 'sum'"),
        (dict(norm="layer"), ValueError, "norm must be one of 'batch', 'sync', 'frozen', 'none'"),
        (dict(pooled_terms="max"), ValueError, "pooled_terms must be one of 'mean', 'attention'"),
        (dict(normalize="sum"), ValueError, "normalize must be one of 'none', 'mean'"),
        (dict(channel_mask_source="student"), ValueError, "channel_mask_source must be one of 'both', 'teacher'"),
        (dict(spatial_temperature=0), ValueError, "spatial_temperature must be a number > 0, got 0"),
        (dict(feature_weight=-1), ValueError, "feature_weight must be a finite number >= 0, got -1"),
        (dict(relation_weight=float("nan")), ValueError, "relation_weight must be a finite number >= 0, got nan"),
        (dict(use_channel_mask=1), TypeError, "use_channel_mask must be True or False, got 1"),
        (dict(inter_channels=0), ValueError, "inter_channels must be an int >= 1 or a ratio"),
        (dict(inter_channels=[4, 5]), ValueError, "level 1: inter_channels must be between 1 and in_channels=4, got 5"),
        (dict(inter_channels=1.5), ValueError, "inter_channels must be an int >= 1 or a ratio"),
        (
            dict(teacher_channels=6, use_channel_mask=True, channel_weight=0),
            ValueError,
            "needs the channel term's linear layer",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    arguments = dict(student_channels=4, num_levels=2) | arguments
    with pytest.raises(error, match=message):
        FBKDLoss(**arguments)


MEMORY_SCRIPT = """
import re, torch, fbkd_ops
student = torch.randn(1, 256, 200, 336, requires_grad=True)
teacher = torch.randn(1, 256, 200, 336)
loss = fbkd_ops.FBKDLoss(256, num_levels=1, preset="two_stage", stride=1, inter_channels=0.25)
optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
def peak():
    # Not getrusage's figure: that starts at the size of the process this one was forked from.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
before = peak()
sum(loss([student], [teacher]).values()).backward()
optimizer.step()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_a_large_level_without_pooling_trains_in_linear_memory():
    """One 256x200x336 pair; a single (HW, HW) matrix would take 18 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 1e9


def test_weights_without_size_are_the_presets_at_full_size():
    """At the size the preset was made for, the root of a mean with these weights is the root of the sum."""
    weights = fbkd_ops.size_free_weights("two_stage", 4, strength=2.0)
    assert weights["feature_weight"][0] == pytest.approx(2 * 7e-5 * math.sqrt(2 * 256 * 200 * 336))
    assert weights["spatial_weight"][3] == pytest.approx(2 * 4e-3 * math.sqrt(2 * 25 * 42))
    assert weights["channel_weight"] == [pytest.approx(2 * 4e-3 * math.sqrt(2 * 256))] * 4
    assert (
        fbkd_ops.size_free_weights("two_stage", 3, 2.0, first_stride=8)["spatial_weight"]
        == weights["spatial_weight"][1:]
    )
