"""The attention masks on every backend: values, what a softmax does at its edges, determinism, compilation, errors."""

import itertools
import math

import pytest
import torch
from op_cases import (
    BACKENDS,
    COMPILED,
    DTYPES,
    INTERPRETED,
    NO_CPU,
    accumulation_of,
    assert_as_good,
    assert_compiled_agrees,
    assert_same_bits,
    name_of,
    op_of,
    threads,
    units_of_sum,
)

import fbkd_ops
from fbkd_ops import functional
from fbkd_ops.dispatch import attention_masks
from fbkd_ops.ops.attention_masks import MaskRequest

pytestmark = pytest.mark.usefixtures("poison")

RULES = ["average", "joint"]
MIXTURES = list(itertools.product(DTYPES, DTYPES))
# Around pieces of 1024 (CPU) and tiles of 1024 (Triton), 2048 (CUDA) and 4096 (CPU).
LENGTHS = [1, 2, 3, 17, 255, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 12293]


def draw(shape, dtype, device, scale=3.0):
    """An attention map: means of absolute values."""
    return (scale * torch.randn(shape, dtype=torch.float64, device=device).abs()).to(dtype)


def run(student, teacher, temperature, rule, backend):
    with fbkd_ops.use_backend(backend):
        return functional.attention_mask(student, teacher, temperature=temperature, mask_rule=rule)


def check(student, teacher, temperature, rule, backend):
    """A softmax's elements have relative errors of their own: those of e^x, and of x / tau in front of it."""
    ours = run(student, teacher, temperature, rule, backend)
    eager = run(student, teacher, temperature, rule, "reference")
    maps = [x if x is None else x.double() for x in (student, teacher)]
    exact = run(*maps, temperature, rule, "reference")
    accumulation = accumulation_of(teacher.dtype if student is None else student.dtype, teacher.dtype)
    assert ours.dtype == accumulation and ours.is_contiguous() and not ours.requires_grad
    largest = sum(0.0 if x is None or not x.numel() else x.abs().max().item() for x in maps)
    relative = 4 + largest / temperature
    assert_as_good(ours, eager, exact, extra=relative * torch.finfo(accumulation).eps)
    return ours


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_lengths(backend, device, length, rule):
    for dtype in DTYPES:
        student, teacher = (draw((3, length), dtype, device) for _ in range(2))
        check(student, teacher, 0.5, rule, backend)
        check(None, teacher, 0.5, rule, backend)


@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_lengths_in_the_interpreter(backend, device):
    for length, rule in ((1, "average"), (17, "joint"), (1025, "average"), (1024, "joint")):
        check(*(draw((2, length), torch.float32, device) for _ in range(2)), 0.5, rule, backend)
    check(None, draw((1, 2049), torch.float64, device), 0.5, "average", backend)
    # More tiles than one step adds (64).
    check(None, draw((1, 64 * 1024 + 1), torch.float32, device), 0.5, "average", backend)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_mixtures_of_dtypes(backend, device, dtypes):
    for rule in RULES:
        check(*(draw((2, 3, 7), dtype, device) for dtype in dtypes), 0.5, rule, backend)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.7, 1, 3.0])
@pytest.mark.parametrize("backend, device", COMPILED)
def test_temperatures(backend, device, temperature, rule):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        check(*(draw((2, 50, 84), dtype, device) for _ in range(2)), temperature, rule, backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_temperature_keeps_its_float64(backend, device):
    """1/3 in float32 would be off by 1e-8."""
    check(*(draw((2, 9), torch.float64, device) for _ in range(2)), 1 / 3, "average", backend)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_large_activations(backend, device, rule):
    """e^x alone would overflow, and underflow to a sum of 0."""
    for dtype, scale in ((torch.float16, 100.0), (torch.bfloat16, 1e4), (torch.float32, 1e4), (torch.float64, 1e4)):
        for sign in (1, -1):
            maps = [sign * draw((2, 5, 8), dtype, device, scale) for _ in range(2)]
            mask = check(*maps, 0.5, rule, backend)
            torch.testing.assert_close(mask.mean((1, 2)), torch.ones_like(mask[:, 0, 0]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_equal_activations_have_masks_of_ones(backend, device, rule):
    """Also where every element is the largest float16 number."""
    for value in (0.0, 65504.0):
        x = torch.full((2, 4, 4), value, dtype=torch.float16, device=device)
        torch.testing.assert_close(run(x, x, 0.5, rule, backend), torch.ones_like(x).float())


NAN, INF = float("nan"), float("inf")


def assert_same_softmax(ours, eager):
    """Both in float32: an element is off by what e^x is and by what their sum is."""
    relative = (4 + units_of_sum(eager[0].numel())) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours, eager, rtol=relative, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [5, 4099])
@pytest.mark.parametrize("backend, device", COMPILED)
def test_nan_and_infinity_spread_as_in_softmax(backend, device, length, rule):
    check_spread(backend, device, length, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_nan_and_infinity_spread_as_in_softmax_in_the_interpreter(backend, device, rule):
    check_spread(backend, device, 5, rule)


def check_spread(backend, device, length, rule):
    """Image by image: NaN, +Inf, -Inf (an element of 0), both, nothing else than -Inf, and none."""
    spoilt = draw((6, length), torch.float32, device)
    spoilt[0, 3], spoilt[1, 3], spoilt[2, 3], spoilt[3, 0], spoilt[3, length - 1] = NAN, INF, -INF, INF, -INF
    spoilt[4] = -INF
    whole = draw((6, length), torch.float32, device)
    for student, teacher in ((spoilt, whole), (whole, spoilt), (spoilt, spoilt), (None, spoilt)):
        ours, eager = (run(student, teacher, 0.5, rule, name) for name in (backend, "reference"))
        assert_same_softmax(ours, eager)
        assert ours[5].isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_minus_infinity_in_a_whole_tile(backend, device, rule):
    """The tile has no maximum to subtract; its elements are 0 as long as another tile has a finite one."""
    student, teacher = (draw((1, 4096 + 3), torch.float32, device) for _ in range(2))
    for part in (slice(0, 4096), slice(4096, None)):
        spoilt = teacher.clone()
        spoilt[:, part] = -INF
        ours, eager = (run(student, spoilt, 0.5, rule, name) for name in (backend, "reference"))
        assert_same_softmax(ours, eager)
        assert not ours.isnan().any()


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 4), (2, 1), (2, 1, 1)], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty_batches_and_single_elements(backend, device, shape):
    for rule in RULES:
        mask = check(*(draw(shape, torch.float32, device) for _ in range(2)), 0.5, rule, backend)
        assert torch.equal(mask, torch.ones_like(mask))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_maps_that_are_not_contiguous(backend, device):
    student, teacher = draw((4, 7, 3), torch.float32, device).mT, draw((2, 3, 7), torch.float32, device)
    student = student[::2]
    for maps in ((student, teacher), (teacher, student), (None, student)):
        check(*maps, 0.5, "average", backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_maps_with_gradient_give_masks_without(backend, device):
    student, teacher = (draw((2, 6), torch.float32, device).requires_grad_() for _ in range(2))
    assert not run(student, teacher, 0.5, "average", backend).requires_grad


def requests(device):
    """A small pyramid of every kind: rules, teacher alone, dtypes, temperatures, no image, several tiles."""
    return [
        MaskRequest(draw((2, 9, 8), torch.float32, device), draw((2, 9, 8), torch.float32, device), 0.5, "average"),
        MaskRequest(None, draw((2, 7), torch.bfloat16, device), 0.1, "average"),
        MaskRequest(draw((2, 9), torch.float16, device), draw((2, 9), torch.float64, device), 1 / 3, "joint"),
        MaskRequest(draw((0, 4), torch.float32, device), draw((0, 4), torch.float32, device), 1.0, "joint"),
        MaskRequest(draw((1, 1030), torch.float32, device), draw((1, 1030), torch.float32, device), 0.3, "joint"),
        MaskRequest(draw((3, 2), torch.float32, device), draw((3, 2), torch.bfloat16, device), 2.0, "average"),
        MaskRequest(draw((2, 3), torch.float64, device), draw((2, 3), torch.float16, device), 1.0, "average"),
    ]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_masks_together_equal_masks_alone(backend, device):
    of = requests(device)
    with fbkd_ops.use_backend(backend):
        assert_same_bits(attention_masks(of), [attention_masks([request])[0] for request in of])
        assert attention_masks([]) == []


@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(backend, device):
    maps = [draw((2, 200, 336), torch.float32, device) for _ in range(2)]
    first = run(*maps, 0.5, "average", backend)
    for _ in range(3):
        assert_same_bits([first], [run(*maps, 0.5, "average", backend)])


@NO_CPU
def test_bit_equal_for_any_number_of_threads():
    large = [MaskRequest(*(draw((2, 200, 336), torch.float32, "cpu") for _ in range(2)), 0.5, rule) for rule in RULES]
    results = []
    for count in (1, 2, 3):
        with threads(count), fbkd_ops.use_backend("cpu"):
            results.append(attention_masks([*requests_of_seed_one(), *large]))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def requests_of_seed_one():
    torch.manual_seed(1)
    return requests("cpu")


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device):
    of = requests(device)
    arguments = (
        [request.student for request in of],
        [request.teacher for request in of],
        [float(request.temperature) for request in of],
        [request.mask_rule == "joint" for request in of],
    )
    torch.library.opcheck(op_of("attention_masks", backend), arguments)


@NO_CPU
def test_op_names_what_is_wrong():
    op, x = torch.ops.fbkd_ops.attention_masks, torch.rand(2, 3)
    with pytest.raises(RuntimeError, match="student must have 2 entries, got 1"):
        op([None], [x, x], [1.0, 1.0], [False, False])
    with pytest.raises(RuntimeError, match="temperature must have 1 entries, got 2"):
        op([None], [x], [1.0, 1.0], [False])
    with pytest.raises(RuntimeError, match="joint must have 1 entries, got 0"):
        op([None], [x], [1.0], [])
    with pytest.raises(RuntimeError, match="student must be contiguous with 6 elements, got 4"):
        op([x[:, :2].contiguous()], [x], [1.0], [False])
    with pytest.raises(RuntimeError, match="teacher must be contiguous"):
        op([None], [x.mT], [1.0], [False])
    with pytest.raises(RuntimeError, match="teacher must be float16, bfloat16, float32 or float64"):
        op([None], [x.int()], [1.0], [False])


def total_of(student, teacher):
    """Of masks of both rules times the student's map: the masks are constants of its gradient."""
    masks = [
        functional.attention_mask(*maps, temperature=0.5, mask_rule=rule)
        for maps in ((student, teacher), (None, teacher))
        for rule in RULES
    ]
    return sum((mask * student).square().sum() for mask in masks)


@pytest.mark.parametrize("backend, device", [*BACKENDS, ("reference", "cpu")])
def test_compiles_to_a_full_graph(backend, device):
    assert_compiled_agrees(total_of, inputs_to_compile(device), backend, "aot_eager")


@NO_CPU
def test_compiles_through_inductor():
    assert_compiled_agrees(total_of, inputs_to_compile("cpu"), "cpu", "inductor")


def inputs_to_compile(device):
    shapes = ((2, 3, 4), (3, 5, 7))
    return [[draw(s, torch.float32, device).requires_grad_(), draw(s, torch.float32, device)] for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
def test_attention_masks_of_pools(rule, dtype):
    """Both masks of a level, against a softmax written out by hand."""
    pools = [functional.attention_pool((100 * torch.randn(2, 6, 5, 7)).to(dtype).requires_grad_()) for _ in range(2)]
    spatial, channel = functional.attention_masks(
        *pools, spatial_temperature=0.5, channel_temperature=0.25, mask_rule=rule
    )
    for mask, field, tau in ((spatial, "spatial_attention", 0.5), (channel, "channel_attention", 0.25)):
        s, t = (getattr(pool, field).detach().double().flatten(1) / tau for pool in pools)

        def softmax(x):
            shifted = (x - x.amax(1, keepdim=True)).exp()
            return shifted / shifted.sum(1, keepdim=True)

        expected = (softmax(s) + softmax(t)) / 2 if rule == "average" else softmax(s + t)
        expected = s.shape[1] * expected
        torch.testing.assert_close(mask.double(), expected.reshape(mask.shape), rtol=1e-4, atol=1e-6)
        assert not mask.requires_grad
        assert mask.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, NAN, INF, "warm", True, None], ids=str)
def test_bad_temperatures_are_named(temperature):
    x = torch.rand(2, 3)
    pool = functional.attention_pool(torch.rand(2, 3, 4, 5))
    message = rf"temperature must be a number > 0, got {temperature!r}"
    with pytest.raises(ValueError, match=rf"^{message}"):
        functional.attention_mask(x, x, temperature=temperature)
    for name in ("spatial_temperature", "channel_temperature"):
        temperatures = dict(spatial_temperature=1.0, channel_temperature=1.0) | {name: temperature}
        with pytest.raises(ValueError, match=rf"^{name.split('_')[0]}_{message}"):
            functional.attention_masks(pool, pool, **temperatures)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda x: (x, x, "mean"), ValueError, r"mask_rule must be one of 'average', 'joint', got 'mean'"),
        (lambda x: (x, None, "average"), TypeError, r"teacher must be a torch.Tensor, got NoneType"),
        (lambda x: (x.cfloat(), x, "average"), TypeError, r"student must be a floating-point tensor, got .*complex64"),
        (lambda x: (x, x.int(), "average"), TypeError, r"teacher must be a floating-point tensor, got torch.int32"),
        (lambda x: (x[:, :2], x, "average"), ValueError, r"student must have shape \(2, 3\), got \(2, 2\)"),
        (lambda x: (x[:1], x, "joint"), ValueError, r"student must have shape \(2, 3\), got \(1, 3\)"),
        (lambda x: (x.to("meta"), x, "joint"), ValueError, r"student .* one device, got meta and cpu"),
    ],
)
def test_bad_maps_are_named(call, error, message):
    student, teacher, rule = call(torch.rand(2, 3))
    with pytest.raises(error, match=message):
        functional.attention_mask(student, teacher, temperature=1.0, mask_rule=rule)


def test_pools_that_do_not_fit_are_named():
    pools = [functional.attention_pool(torch.randn(2, width, 4, 4)) for width in (3, 5)]
    taus = dict(spatial_temperature=1, channel_temperature=1)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 5\); adapt the student's channel attention"):
        functional.attention_masks(*pools, **taus)
    with pytest.raises(TypeError, match=r"student must be an AttentionPool, got Tensor"):
        functional.attention_masks(pools[0].channel_mean, pools[0], **taus)
    with pytest.raises(ValueError, match=r"mask_rule must be one of"):
        functional.attention_masks(pools[0], pools[0], **taus, mask_rule="max")
    elsewhere = fbkd_ops.AttentionPool(*(mean.to("meta") for mean in pools[0]))
    with pytest.raises(ValueError, match=r"must be on one device, got meta and cpu"):
        functional.attention_masks(elsewhere, pools[0], **taus)


def test_masks_have_mean_one_an_image():
    for rule in RULES:
        mask = functional.attention_mask(*(torch.rand(3, 20, 30) for _ in range(2)), temperature=0.1, mask_rule=rule)
        assert all(math.isclose(mean, 1, rel_tol=1e-5) for mean in mask.mean((1, 2)).tolist())
