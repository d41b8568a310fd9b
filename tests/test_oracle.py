"""The loss and the reference against numbers that MMRazor 1.0.0 and mmcv produced (tests/oracle/make_oracle.py)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import make_oracle
from oracle.make_oracle import LEARNING_RATE, MOMENTUM, STEPS, TERMS, WEIGHTS

import fbkd_ops
from fbkd_ops.weights.mmrazor import _our_key, load_connectors

FOLDER = Path(__file__).parent / "oracle"
OTHERS = "pooled_gaussian_block", "pkd", "cwd", "mgd", "fgd"
FILES = sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem not in OTHERS)
TOLERANCE = dict(rtol=1e-10, atol=1e-10)

both_backends = pytest.mark.parametrize("backend", ["reference", "auto"])


class OracleFile:
    def __init__(self, name: str):
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self.arrays = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "case"}
            self.case = json.loads(str(arrays["case"])) if "case" in arrays.files else None

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): v for key, v in self.arrays.items() if key.startswith(prefix)}

    def inputs(self, side: str) -> list[torch.Tensor]:
        levels = range(len(self.case["sizes"]))
        return [self.arrays[f"input.{side}.{i}"].clone() for i in levels]

    def loss(self) -> fbkd_ops.FBKDLoss:
        """Our loss with the oracle's weights."""
        case = self.case
        loss = fbkd_ops.FBKDLoss(
            case["channels"],
            num_levels=len(case["sizes"]),
            preset="mmrazor",
            stride=case["strides"],
            inter_channels=[case["channels"] // r for r in case["reduction"]],
            mode=case["mode"],
            norm=case["norm"],
            conv_out_bias=case["norm"] == "none",
            spatial_temperature=case["temperature"],
            channel_temperature=case["temperature"],
            use_channel_mask=case["use_channel_mask"],
            **{f"{term}_weight": weight for term, weight in WEIGHTS.items()},
        ).double()
        levels = range(len(case["sizes"]))
        load_connectors(
            loss,
            [self.under(f"weight.student.{i}.") for i in levels],
            [self.under(f"weight.teacher.{i}.") for i in levels],
        )
        return loss


def our_name(name: str) -> str:
    """``student.1.adaptation_layers.bias`` as ``levels.1.feature_adaptation.bias``."""
    side, level, key = re.fullmatch(r"(student|teacher)\.(\d+)\.(.+)", name).groups()
    return f"levels.{level}.{_our_key(key, side)}"


def vanishes(key: str, case: dict) -> bool:
    """Biases that only add a constant to u, which BatchNorm removes, or the same to every j under a softmax."""
    constant = ("g", "phi") if case["mode"].endswith("gaussian") else ()
    if case["batch"] == 1 and case["mode"] == "dot_product":
        constant = ("theta",)
    return re.search(rf"non_local\.({'|'.join(constant) or 'none'})\.bias$", key) is not None


@both_backends
@pytest.mark.parametrize("name", FILES)
def test_terms_gradients_and_statistics(name, backend):
    oracle = OracleFile(name)
    loss = oracle.loss()
    students = [x.requires_grad_() for x in oracle.inputs("student")]
    teachers = [x.requires_grad_() for x in oracle.inputs("teacher")]
    with fbkd_ops.use_backend(backend):
        terms = loss(students, teachers)
        sum(terms.values()).backward()

    for term in TERMS:
        expected = WEIGHTS[term] * oracle.arrays[f"term.{term}"]
        torch.testing.assert_close(terms[f"loss_fbkd_{term}"], expected, **TOLERANCE, msg=lambda m: f"{term}: {m}")
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        torch.testing.assert_close(student.grad, oracle.arrays[f"grad.input.{index}"], **TOLERANCE)
        assert teacher.grad is None
    expected = {our_name(key): value for key, value in oracle.under("grad.weight.").items()}
    assert set(expected) == {key for key, _ in loss.named_parameters()}
    for key, parameter in loss.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], **TOLERANCE, msg=lambda m: f"{key}: {m}")
        if not vanishes(key, oracle.case):
            assert expected[key].abs().max() > 1e-6, f"{key}: the oracle's gradient tests nothing"
    buffers = {our_name(key): value for key, value in oracle.under("buffer.").items()}
    assert set(buffers) == {key for key, _ in loss.named_buffers()}
    for key, buffer in loss.named_buffers():
        torch.testing.assert_close(buffer, buffers[key], **TOLERANCE, msg=lambda m: f"{key}: {m}")


@both_backends
@pytest.mark.parametrize("name", FILES)
def test_losses_stay_equal_over_optimizer_steps(name, backend):
    oracle = OracleFile(name)
    loss = oracle.loss()
    students, teachers = oracle.inputs("student"), oracle.inputs("teacher")
    optimizer = torch.optim.SGD(loss.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    totals = []
    with fbkd_ops.use_backend(backend):
        loss(students, teachers)  # the oracle's file starts after one training pass
        for step in range(STEPS + 1):
            total = sum(loss(students, teachers).values())
            totals.append(total.detach())
            if step < STEPS:
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
        loss.eval()
        eval_total = sum(loss(students, teachers).values())
    torch.testing.assert_close(torch.stack(totals), oracle.arrays["trained.total"], **TOLERANCE)
    torch.testing.assert_close(eval_total.detach(), oracle.arrays["trained.eval_total"], **TOLERANCE)
    assert (torch.stack(totals).diff().abs() > 1e-3).all(), "the steps change nothing"


@both_backends
def test_pooled_gaussian_block_equals_mmcv(backend):
    oracle = OracleFile("pooled_gaussian_block")
    block = fbkd_ops.NonLocalBlock2d(6, 3, mode="gaussian", stride=2, conv_out_bias=False).double()
    names = {"g.0.conv": "g", "conv_out.conv": "out", "conv_out.bn": "norm"}

    def ours(key: str) -> str:
        layer, _, entry = key.rpartition(".")
        return f"{names[layer]}.{entry}"

    block.load_state_dict({ours(key): value for key, value in oracle.under("weight.").items()})
    x = oracle.arrays["input"].clone().requires_grad_()
    with fbkd_ops.use_backend(backend):
        z = block(x)
        (z * oracle.arrays["direction"]).sum().backward()
    torch.testing.assert_close(z.detach(), oracle.arrays["output"], **TOLERANCE)
    torch.testing.assert_close(x.grad, oracle.arrays["grad.input"], **TOLERANCE)
    for key, gradient in oracle.under("grad.weight.").items():
        torch.testing.assert_close(block.get_parameter(ours(key)).grad, gradient, **TOLERANCE)
    for key, buffer in oracle.under("buffer.").items():
        torch.testing.assert_close(block.get_buffer(ours(key)), buffer, **TOLERANCE)


@both_backends
@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_pkd(resize, backend):
    oracle, levels = OracleFile("pkd"), range(len(make_oracle.PKD_SIZES))
    students = [oracle.arrays[f"input.student.{i}"].requires_grad_() for i in levels]
    teachers = [oracle.arrays[f"input.teacher.{i}"] for i in levels]
    loss = fbkd_ops.PKDLoss(6, num_levels=len(levels), weight=make_oracle.PKD_WEIGHT, resize=resize)
    with fbkd_ops.use_backend(backend):
        term = loss(students, teachers)["loss_pkd"]
    torch.testing.assert_close(term.detach(), oracle.arrays[f"{resize}.loss"], **TOLERANCE)
    for i, gradient in zip(levels, torch.autograd.grad(term, students), strict=True):
        torch.testing.assert_close(gradient, oracle.arrays[f"{resize}.grad.{i}"], **TOLERANCE)


@both_backends
def test_cwd(backend):
    arrays, levels = OracleFile("cwd").arrays, range(len(make_oracle.CWD_SIZES))
    students = [arrays[f"student.{i}"].requires_grad_() for i in levels]
    constants = {"weight": make_oracle.CWD_WEIGHT, "temperature": make_oracle.CWD_TEMPERATURE}
    loss = fbkd_ops.CWDLoss(6, num_levels=len(levels), **constants)
    with fbkd_ops.use_backend(backend):
        term = loss(students, [arrays[f"teacher.{i}"] for i in levels])["loss_cwd"]
    torch.testing.assert_close(term.detach(), sum(arrays[f"loss.{i}"] for i in levels), **TOLERANCE)
    for i, gradient in zip(levels, torch.autograd.grad(term, students), strict=True):
        torch.testing.assert_close(gradient, arrays[f"grad.{i}"], **TOLERANCE)


@both_backends
def test_mgd(backend):
    oracle, levels = OracleFile("mgd"), range(len(make_oracle.MGD_WIDTHS))
    of_student, of_teacher = zip(*make_oracle.MGD_WIDTHS, strict=True)
    loss = fbkd_ops.MGDLoss(of_student, of_teacher, weight=make_oracle.MGD_WEIGHT).double()
    theirs = {"adaptations.{}": "align", "generations.{}.0": "generation.0", "generations.{}.2": "generation.2"}
    names = {
        f"{ours.format(i)}.{kind}": f"{i}.{{}}.{name}.{kind}"
        for ours, name in theirs.items()
        for i in levels
        for kind in ("weight", "bias")
    }
    parameters = dict(loss.named_parameters())
    for name, parameter in parameters.items():
        parameter.data = oracle.arrays[names[name].format("weight")]
    loss.masks = lambda maps: [oracle.arrays[f"{i}.mask"] for i in levels]
    students = [oracle.arrays[f"{i}.student"].requires_grad_() for i in levels]
    with fbkd_ops.use_backend(backend):
        term = loss(students, [oracle.arrays[f"{i}.teacher"] for i in levels])["loss_mgd"]
    torch.testing.assert_close(term.detach(), sum(oracle.arrays[f"{i}.loss"] for i in levels), **TOLERANCE)
    gradients = torch.autograd.grad(term, [*students, *parameters.values()])
    keys = [*(f"{i}.grad" for i in levels), *(names[name].format("grad") for name in parameters)]
    for key, gradient in zip(keys, gradients, strict=True):
        torch.testing.assert_close(gradient, oracle.arrays[key], **TOLERANCE)


FGD_NAMES = {"adaptations.{}": "align"}
for side in ("student", "teacher"):
    theirs = f"channel_add_conv_{side[0]}"
    FGD_NAMES[f"{side}_contexts.{{}}.weight"] = f"conv_mask_{side[0]}"
    for index, part in ((0, "reduce"), (1, "norm"), (3, "expand")):
        FGD_NAMES[f"{side}_contexts.{{}}.{part}"] = f"{theirs}.{index}"


@both_backends
def test_fgd(backend):
    oracle, levels, constants = OracleFile("fgd"), range(len(make_oracle.FGD_WIDTHS)), make_oracle.FGD_CONSTANTS
    of_student, of_teacher = zip(*make_oracle.FGD_WIDTHS, strict=True)
    weights = {f"{name}_weight": constants[name] for name in ("foreground", "background", "attention", "global")}
    loss = fbkd_ops.FGDLoss(of_student, of_teacher, temperature=constants["temperature"], **weights).double()
    names = {
        f"{ours.format(i)}.{kind}": f"{i}.{{}}.{name}.{kind}"
        for ours, name in FGD_NAMES.items()
        for i in levels
        for kind in ("weight", "bias")
    }
    parameters = dict(loss.named_parameters())
    for name, parameter in parameters.items():
        parameter.data = oracle.arrays[names[name].format("weight")]
    students = [oracle.arrays[f"{i}.student"].requires_grad_() for i in levels]
    boxes = [torch.tensor(each, dtype=torch.float64).reshape(-1, 4) for each in make_oracle.FGD_BOXES]
    with fbkd_ops.use_backend(backend):
        terms = loss(students, [oracle.arrays[f"{i}.teacher"] for i in levels], boxes, make_oracle.FGD_IMAGE_SIZE)
    total = sum(terms.values())
    torch.testing.assert_close(total.detach(), sum(oracle.arrays[f"{i}.loss"] for i in levels), **TOLERANCE)
    gradients = torch.autograd.grad(total, [*students, *parameters.values()])
    keys = [*(f"{i}.grad" for i in levels), *(names[name].format("grad") for name in parameters)]
    for key, gradient in zip(keys, gradients, strict=True):
        torch.testing.assert_close(gradient, oracle.arrays[key], **TOLERANCE)
