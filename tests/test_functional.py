"""The public functions against the literal reference: values, gradients, dtypes, layouts and bad input."""

import copy

import pytest
import torch
from helpers import randomise, rms, within_eager_error
from op_cases import INTERPRETED, ON_CPU, ON_TRITON, with_pairs

import fbkd_ops
from fbkd_ops import NonLocalBlock2d, _extension, functional, reference
from fbkd_ops.non_local import modes
from fbkd_ops.presets import CHOICES, MODES
from fbkd_ops.types import AttentionPool, NonLocalWeights

ON_TORCH = pytest.param("torch", "cpu", id="torch")
# (size, stride): no pooling; ragged cells in both directions; stride 3 (odd); a stride beyond the height only;
# one pixel; one row.
SIZES_AND_STRIDES = [((6, 5), 1), ((9, 7), 2), ((8, 10), 3), ((3, 12), 8), ((1, 1), 4), ((1, 9), 2)]


def relation_pair(mode, stride, norm="batch", seed=0, widths=(4, 6), inner=3):
    """Two randomised blocks and an adaptation, in float64."""
    blocks = [
        # Before a BatchNorm the last bias has gradient 0, and rounding only.
        NonLocalBlock2d(width, inner, mode=mode, stride=stride, norm=norm, conv_out_bias=norm == "none")
        for width in widths
    ]
    parts = torch.nn.ModuleList([*blocks, torch.nn.Conv2d(*widths, 1)]).double()
    return randomise(parts, seed)


def run_relation(parts, student, teacher, function, mode, stride, autocast=False, **options):
    """The loss, the gradients of student and parameters, and the updated buffers of ``parts``."""
    student = student.detach().requires_grad_()
    student_block, teacher_block, adaptation = parts
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = function(
            student,
            teacher,
            student_block.weights(),
            teacher_block.weights(),
            adaptation.weight.flatten(1),
            adaptation.bias,
            mode=mode,
            stride=stride,
            student_norm=student_block.norm,
            teacher_norm=teacher_block.norm,
            **options,
        )
    loss.backward()
    gradients = {name: p.grad for name, p in parts.named_parameters()}
    return loss.detach(), student.grad, gradients, dict(parts.named_buffers())


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size,stride", SIZES_AND_STRIDES)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_relation_loss_equals_the_reference(mode, size, stride, norm):
    ours, literal = (relation_pair(mode, stride, norm=norm) for _ in range(2))
    student = torch.randn(3, 4, *size, dtype=torch.float64)
    teacher = torch.randn(3, 6, *size, dtype=torch.float64)
    results = run_relation(ours, student, teacher, functional.relation_loss, mode, stride)
    expected = run_relation(literal, student, teacher, reference.relation_loss, mode, stride)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-11)
    assert results[1].abs().max() > 1e-3


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", [1, 2])
def test_narrow_blocks_equal_the_reference(mode, stride):
    """So narrow that theirs is the cheaper of each pair of equal products."""
    ours, literal = (relation_pair(mode, stride, widths=(8, 13), inner=2 - stride % 2) for _ in range(2))
    student, teacher = (torch.randn(3, width, 5, 7, dtype=torch.float64) for width in (8, 13))
    results = run_relation(ours, student, teacher, functional.relation_loss, mode, stride)
    expected = run_relation(literal, student, teacher, reference.relation_loss, mode, stride)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize(
    "backend, device, stride, norm, training",
    with_pairs([ON_CPU, INTERPRETED, ON_TRITON, ON_TORCH], [1, 2], CHOICES["norm"], [True, False]),
)
def test_every_backend_equals_the_reference(monkeypatch, backend, device, stride, norm, training):
    if backend == "torch":
        monkeypatch.setattr(_extension, "cpu", _extension.Library(False, "not built"))
    ours, literal = (relation_pair("dot_product", stride, norm=norm).train(training).to(device) for _ in range(2))
    student, teacher = (torch.randn(2, width, 5, 6, dtype=torch.float64, device=device) for width in (4, 6))
    with fbkd_ops.use_backend("auto" if backend == "torch" else backend):
        results = run_relation(ours, student, teacher, functional.relation_loss, "dot_product", stride)
    expected = run_relation(literal, student, teacher, reference.relation_loss, "dot_product", stride)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-11)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """The sizes in bytes of all storages that forward saves for backward, those of ``known`` tensors left out."""

    def __init__(self, known):
        self.bytes, addresses = {}, {x.untyped_storage().data_ptr() for x in known}

        def pack(x):
            storage = x.untyped_storage()
            in_backward = torch._C._current_graph_task_id() != -1  # where a recomputation keeps what it needs itself
            if storage.data_ptr() not in addresses and not in_backward:
                self.bytes[storage.data_ptr()] = storage.nbytes()
            return x

        super().__init__(pack, lambda x: x)


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_memory_efficient_keeps_no_map_and_changes_nothing(mode, norm):
    ours, kept = (relation_pair(mode, 4, norm=norm) for _ in range(2))
    student, teacher = (torch.randn(2, width, 20, 24, dtype=torch.float64) for width in (4, 6))
    expected = run_relation(ours, student, teacher, functional.relation_loss, mode, 4)
    saved = Kept([student, teacher])
    with saved:
        results = run_relation(kept, student, teacher, functional.relation_loss, mode, 4, memory_efficient=True)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-11)
    assert max(saved.bytes.values(), default=0) < 2 * 20 * 24 * 8  # a single channel


def test_statistics_that_are_no_longer_tracked_stay():
    """BatchNorm reads the attribute, not only the constructor's argument."""
    norms = [randomise(torch.nn.BatchNorm2d(4).double(), seed=3) for _ in range(2)]
    block, x = randomise(NonLocalBlock2d(4, 2, norm="none").double()), torch.randn(2, 4, 5, 6).double()
    for norm in norms:
        norm.track_running_stats = False
    z = functional.non_local(x, block.weights(), norm=norms[0])
    torch.testing.assert_close(z, reference.non_local(x, block.weights(), norm=norms[1]))
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())
    assert norms[0].num_batches_tracked == 0


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("affine,track", [(True, True), (False, True), (True, False), (False, False)])
def test_every_kind_of_batch_norm(momentum, affine, track):
    norms = [randomise(torch.nn.BatchNorm2d(4, 1e-3, momentum, affine, track).double(), seed=3) for _ in range(2)]
    block = randomise(NonLocalBlock2d(4, 2, norm="none").double())
    for training in (True, True, True, False):
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        for norm in norms:
            norm.train(training)
        z = functional.non_local(x, block.weights(), norm=norms[0])
        torch.testing.assert_close(z, reference.non_local(x, block.weights(), norm=norms[1]))
        torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_16_bits_take_a_share_of_values_beyond_their_range(dtype, momentum):
    """A batch with a variance of 5e5, of which float16 can hold a tenth."""
    buffers = []
    for backend in ("auto", "reference"):
        norms = [torch.nn.BatchNorm2d(4, momentum=momentum).to(dtype) for _ in range(2)]
        for norm in norms:
            norm.num_batches_tracked.fill_(9)
        blocks = [randomise(NonLocalBlock2d(4, 2, norm="none"), seed=seed) for seed in (1, 2)]
        student, teacher = (8 * torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
        with fbkd_ops.use_backend(backend):
            functional.relation_loss(
                student,
                teacher,
                *(block.weights() for block in blocks),
                torch.eye(4),
                torch.zeros(4),
                student_norm=norms[0],
                teacher_norm=norms[1],
            )
        buffers.append([buffer.float() for norm in norms for buffer in norm.buffers()])
    assert 4e4 < max(float(buffer.max()) for buffer in buffers[0]) < 6e4
    torch.testing.assert_close(*buffers, rtol=2 * torch.finfo(dtype).eps, atol=0.1)


def test_an_empty_batch_leaves_the_statistics_as_batch_norm_does():
    ours, theirs = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    block = NonLocalBlock2d(4, 2, norm="none")
    z = functional.non_local(torch.zeros(0, 4, 3, 3), block.weights(), norm=ours)
    theirs(torch.zeros(0, 4, 3, 3))
    assert z.shape == (0, 4, 3, 3)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_nested_pools_give_ties_to_mmrazors_winner(mode):
    """Rare ones of both signs in equal channels: cells hold ties, of which the two orders break some differently."""
    x = torch.randn(2, 1, 16, 16).double().clamp(-1.2, 1.2).div(1.2).trunc().repeat(1, 3, 1, 1)
    block = randomise(NonLocalBlock2d(3, 2, mode=mode, norm="none").double(), seed=2)
    grads = {}
    for order in ("single", "nested"):
        for name, function in (("ours", functional.non_local), ("literal", reference.non_local)):
            leaf = x.clone().requires_grad_()
            z = function(leaf, block.weights(), mode=mode, stride=4, pool_order=order)
            z.square().sum().backward()
            grads[order, name] = leaf.grad
        torch.testing.assert_close(grads[order, "ours"], grads[order, "literal"])
    assert (grads["single", "ours"] - grads["nested", "ours"]).abs().max() > 1e-6


def test_concatenation_counts_pairs_at_the_threshold_as_relu_does():
    """Integers make a_i + b_j exactly 0 for many pairs, where relu has gradient 0."""
    x = torch.randint(-2, 3, (2, 3, 4, 4)).double()
    block = NonLocalBlock2d(3, 2, mode="concatenation", norm="none").double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    grads = []
    for function in (functional.non_local, reference.non_local):
        leaf = x.clone().requires_grad_()
        function(leaf, block.weights(), mode="concatenation").square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_nan_reaches_the_result(mode, norm):
    """Every pixel of its image, and of all images behind a BatchNorm in training."""
    x = torch.randn(2, 4, 5, 5)
    x[0, 1, 2, 3] = float("nan")
    block = randomise(NonLocalBlock2d(4, 2, mode=mode, stride=2, norm=norm))
    ours = functional.non_local(x, block.weights(), mode=mode, stride=2, norm=copy.deepcopy(block.norm))
    literal = reference.non_local(x, block.weights(), mode=mode, stride=2, norm=block.norm)
    for z in (ours, literal):
        assert z[0].isnan().all() and z[1].isnan().all() == (norm == "batch")


@pytest.mark.parametrize("mode", MODES)
def test_nan_reaches_the_gradients_that_it_reaches_in_plain_pytorch(mode):
    """Of an image of one pixel, whose own pair is all that theta's gradient comes from."""
    block = randomise(NonLocalBlock2d(3, 2, mode=mode)).eval()
    x = torch.randn(2, 3, 1, 1)
    x[0, 1] = float("nan")
    finite = {}
    for backend in ("auto", "reference"):
        leaves = [x.clone().requires_grad_(), *block.parameters()]
        with fbkd_ops.use_backend(backend):
            z = block(leaves[0])
        gradients = torch.autograd.grad(z, leaves, torch.ones_like(z), allow_unused=True)
        finite[backend] = [None if gradient is None else gradient.isfinite() for gradient in gradients]
    for mine, theirs in zip(finite["auto"], finite["reference"], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_a_nan_reaches_every_pixel_also_where_no_pair_counts():
    """relu(NaN) is NaN, beside pairs whose relu is 0 for every pixel."""
    phi = torch.tensor([[[-1.0, float("nan"), -2.0]]])
    operands = modes.Operands(torch.zeros(1, 1, 5), phi, torch.ones(2), False)
    y = modes.MODES["concatenation"].attend(operands, torch.ones(1, 1, 3))
    assert y.isnan().all()


@pytest.mark.usefixtures("relation_form")
def test_gradcheck_of_the_relation_loss():
    parts = relation_pair("dot_product", 2, norm="none")
    parameters = [p for p in parts.parameters()]

    def loss(student, *values):
        values = dict(zip((name for name, _ in parts.named_parameters()), values, strict=True))
        student_block, teacher_block = (
            NonLocalWeights(
                **{
                    f"{layer}_{entry}": values[f"{side}.{layer}.{entry}"].flatten(1 if entry == "weight" else 0)
                    for layer in ("g", "theta", "phi", "out")
                    for entry in ("weight", "bias")
                }
            )
            for side in (0, 1)
        )
        return functional.relation_loss(
            student, teacher, student_block, teacher_block, values["2.weight"].flatten(1), values["2.bias"], stride=2
        )

    student = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    # A second backward pass computes the gradient that the first took from the forward pass.
    assert torch.autograd.gradcheck(loss, (student, *parameters), nondet_tol=1e-12)


@pytest.mark.usefixtures("relation_form")
def test_relation_residual_has_no_second_derivative():
    parts = relation_pair("dot_product", 1)
    student = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    loss = functional.relation_loss(
        student,
        torch.randn(2, 6, 3, 3, dtype=torch.float64),
        parts[0].weights(),
        parts[1].weights(),
        parts[2].weight.flatten(1),
        parts[2].bias,
    )
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.usefixtures("relation_form")
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_and_mixed_dtypes_are_as_exact_as_eager(dtypes, autocast):
    """Values that are exact in the narrow dtypes, so that the float64 truth has the same inputs."""
    student = torch.randn(2, 4, 9, 8).to(dtypes[0])
    teacher = torch.randn(2, 6, 9, 8).to(dtypes[1])
    parts = relation_pair("dot_product", 2)
    truth = run_relation(
        copy.deepcopy(parts), student.double(), teacher.double(), reference.relation_loss, "dot_product", 2
    )
    accumulation = torch.float64 if torch.float64 in dtypes else torch.float32
    parts = parts.to(accumulation)
    eager = run_relation(
        copy.deepcopy(parts),
        student.to(accumulation),
        teacher.to(accumulation),
        reference.relation_loss,
        "dot_product",
        2,
    )
    ours = run_relation(parts, student, teacher, functional.relation_loss, "dot_product", 2, autocast)
    assert ours[0].dtype == accumulation and ours[1].dtype == dtypes[0]
    assert within_eager_error(ours[0], eager[0], truth[0], accumulation)
    for name, gradient in truth[2].items():
        # In front of a BatchNorm the terms of some cancel; one rounding to 16 bits is 10000 float32 eps and more.
        floor = 512 * torch.finfo(accumulation).eps * rms(gradient)
        assert rms(ours[2][name].double() - gradient) <= 2 * rms(eager[2][name].double() - gradient) + floor, name
    for name, buffer in truth[3].items():
        torch.testing.assert_close(ours[3][name].double(), buffer.double(), rtol=1e-5, atol=1e-6)
    # The gradient is rounded to the student's dtype as often as something is added to it; eager's here once.
    rounded_once = eager[1].to(dtypes[0])
    assert rms(ours[1].double() - truth[1]) <= 2 * rms(rounded_once.double() - truth[1]) + 1e-6 * rms(truth[1])


@pytest.mark.parametrize("backend, device", [INTERPRETED, ON_TRITON])
@pytest.mark.parametrize(
    "dtypes, stride, tolerance",
    [
        ((torch.bfloat16, torch.float32), 1, 2e-2),
        ((torch.float32, torch.float32), 1, 1e-5),
        ((torch.bfloat16, torch.float32), 2, 2e-2),
        ((torch.float32, torch.bfloat16), 2, 2e-2),
        ((torch.bfloat16, torch.bfloat16), 1, 2e-2),
        ((torch.bfloat16, torch.float64), 2, 1e-5),
    ],
    ids=str,
)
def test_triton_rounds_where_the_documentation_says_so(backend, device, dtypes, stride, tolerance):
    """The gradient of the adaptation: no element of it is rounded itself, only what it is made of."""
    student, teacher = (torch.randn(2, width, 16, 16).to(dtype) for width, dtype in zip((4, 6), dtypes, strict=True))
    parts = relation_pair("dot_product", stride, norm="none").float()
    sides = copy.deepcopy(parts).double(), student.double(), teacher.double()
    truth = run_relation(*sides, reference.relation_loss, "dot_product", stride)[2]["2.weight"]
    sides = parts.to(device), student.to(device), teacher.to(device)
    with fbkd_ops.use_backend(backend):
        ours = run_relation(*sides, functional.relation_loss, "dot_product", stride)[2]["2.weight"]
    error = (rms(ours.cpu().double() - truth)) / rms(truth)
    assert error < tolerance
    assert (error > 1e-5) == (tolerance > 1e-5)  # else the documentation could promise more


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda x: functional.attention_pool(x.int()), TypeError, r"x must have dtype float16, .* got int32"),
        (lambda x: functional.attention_pool(x.to(torch.complex64)), TypeError, r"got complex64"),
        (lambda x: functional.attention_pool(x[0]), ValueError, r"x must have shape \(N, C, H, W\), got \(3, 4, 5\)"),
        (lambda x: functional.attention_pool(x[:, :, :0]), ValueError, r"at least one channel and one pixel"),
        (lambda x: functional.attention_pool([x]), TypeError, r"x must be a torch.Tensor, got list"),
        (
            lambda x: functional.non_local(x, block_weights(), mode="dot"),
            ValueError,
            r"mode must be one of 'dot_product'.*got 'dot'",
        ),
        (lambda x: functional.non_local(x, block_weights(), stride=0), ValueError, r"stride must be an int >= 1"),
        (
            lambda x: functional.non_local(x, block_weights(5)),
            ValueError,
            r"weights.g_weight must have shape \(2, 3\), got \(2, 5\)",
        ),
        (
            lambda x: functional.non_local(x, block_weights(), mode="concatenation"),
            ValueError,
            r"weights.pair_weight must have shape \(4,\) in mode 'concatenation', got None",
        ),
        (
            lambda x: functional.non_local(x, block_weights()._replace(g_weight=None)),
            TypeError,
            r"weights.g_weight must be a torch.Tensor, got NoneType",
        ),
        (
            lambda x: functional.non_local(x, block_weights()._replace(g_bias=torch.zeros(2).int())),
            TypeError,
            r"weights.g_bias must be a floating-point tensor, got torch.int32",
        ),
        (
            lambda x: functional.non_local(x, block_weights(), norm=torch.nn.BatchNorm2d(4)),
            ValueError,
            r"norm must have num_features 3, got 4",
        ),
        (
            lambda x: functional.non_local(x, block_weights(), norm=torch.nn.GroupNorm(1, 3)),
            TypeError,
            r"norm must be a BatchNorm, a SyncBatchNorm, a frozen BatchNorm .* or None, got GroupNorm",
        ),
        (
            lambda x: functional.relation_loss(x, x, block_weights(), block_weights(), torch.eye(3), None),
            TypeError,
            r"adaptation_bias must be a torch.Tensor, got NoneType",
        ),
        (
            lambda x: functional.non_local(x, block_weights()._replace(g_weight=torch.zeros(0, 3))),
            ValueError,
            r"weights.g_weight must have shape \(c, 3\) with c >= 1, got \(0, 3\)",
        ),
        (
            lambda x: functional.non_local(x, block_weights()._replace(g_weight=torch.tensor(1.0))),
            ValueError,
            r"weights.g_weight must have shape \(c, 3\) with c >= 1, got \(\)",
        ),
        (lambda x: functional.non_local(x, None), TypeError, r"weights must be NonLocalWeights, got NoneType"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3, 4, 5))


def block_weights(width=3):
    return NonLocalBlock2d(width, 2).weights()


def test_forced_reference_runs_the_literal_formula():
    """Rounding tells the two apart: in float32 they differ in the last bits."""
    block = randomise(NonLocalBlock2d(8, 4, norm="none"))
    x = torch.randn(2, 8, 9, 9)
    with fbkd_ops.use_backend("reference"):
        forced = block(x)
    assert torch.equal(forced, reference.non_local(x, block.weights()))
    assert not torch.equal(forced, block(x))
    assert isinstance(functional.attention_pool(x), AttentionPool)


def concatenated(a, b, g):
    """Leaves of one image with inner width 1, and y of the linear form."""
    leaves = [x.clone().requires_grad_() for x in (a, b, g)]
    operands = modes.Operands(leaves[0], leaves[1], torch.ones(2, dtype=a.dtype), False)
    return leaves, operands, modes.MODES["concatenation"].attend(operands, leaves[2])


def test_infinities_of_both_signs_are_a_pair_that_counts():
    """inf - inf is NaN, which passes relu, and so does its gradient."""
    infinity = torch.full((1, 1, 1), float("inf"))
    for a, b in ((infinity, -infinity), (-infinity, infinity)):
        leaves, operands, y = concatenated(a, b, torch.ones(1, 1, 1))
        literal = modes.MODES["concatenation"].pairwise(operands) @ leaves[2].mT
        y.sum().backward()
        ours, leaves[0].grad = leaves[0].grad, None
        literal.sum().backward()
        assert y.isnan().all() and literal.isnan().all()
        assert torch.equal(ours, leaves[0].grad) and ours.item() == 1


def test_concatenation_keeps_the_digits_of_terms_that_cancel():
    """With a = 1e4 + small and b = -1e4 the sums are 1e4 times as large as their difference."""
    torch.manual_seed(0)
    a, b, g = 1e4 + torch.rand(1, 1, 64), -1e4 + torch.rand(1, 1, 64), torch.randn(1, 1, 64)
    grad = torch.randn(1, 1, 64)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves, operands, y = concatenated(*(x.to(dtype) for x in (a, b, g)))
        literal = modes.MODES["concatenation"].pairwise(operands) @ leaves[2].mT
        value = y if dtype == torch.float32 else literal.mT
        found.append([value, *torch.autograd.grad(value, leaves, grad.to(dtype))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-6)
