"""Writes the oracle files that tests/test_oracle.py compares with, from MMRazor 1.0.0's and FGD's own classes.

Needs MMRazor 1.0.0 and mmcv-lite 2.1.0; the tests need neither:

    pip install mmrazor==1.0.0 mmcv-lite==2.1.0
    cd tests && python -m oracle.make_oracle [--mmrazor CHECKOUT] [--fgd CHECKOUT]

benchmarks/mmrazor.py loads MMRazor's files. Everything is float64; weights, BatchNorm buffers and features are random,
because at MMRazor's own zero initialisation most parameters have exactly zero gradient.
"""

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from helpers import randomise
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.resolve().parents[1]))

from benchmarks import mmrazor  # noqa: E402

TERMS = ("feature", "channel", "spatial", "relation")
WEIGHTS = {"feature": 0.7, "channel": 1.3, "spatial": 1.1, "relation": 0.9}
STEPS = 3
LEARNING_RATE, MOMENTUM = 0.02, 0.9


@dataclass
class Case:
    """One oracle file. ``sizes`` and ``strides`` (total pooling factors) have one entry a level."""

    name: str
    batch: int
    channels: int
    sizes: list[tuple[int, int]]
    strides: list[int]
    reduction: list[int]
    mode: str = "dot_product"
    norm: str = "batch"
    temperature: float = 0.5
    use_channel_mask: bool = False
    padded: bool = False  # zero the features' last rows and columns: ties in the pools
    seed: int = 0


CASES = [
    Case("mmrazor_four_levels", 2, 8, [(33, 20), (17, 12), (9, 7), (5, 4)], [16, 8, 4, 4], [4, 4, 2, 2], seed=1),
    Case("mmrazor_odd_sizes", 3, 5, [(19, 17), (13, 9), (7, 11), (4, 5)], [16, 8, 4, 4], [4, 4, 2, 2], seed=2),
    Case("mmrazor_padded", 2, 4, [(22, 37), (16, 16)], [16, 8], [4, 4], padded=True, seed=3),
    Case("one_image", 1, 6, [(11, 13), (5, 3)], [2, 1], [2, 2], seed=4),
    Case("channel_mask", 2, 5, [(9, 8), (6, 7)], [2, 2], [1, 5], temperature=0.1, use_channel_mask=True, seed=5),
    Case("no_norm", 2, 6, [(10, 9), (7, 5)], [4, 1], [2, 3], norm="none", seed=6),
    Case("embedded_gaussian", 2, 6, [(9, 7), (8, 6)], [2, 1], [2, 2], mode="embedded_gaussian", seed=7),
    Case("gaussian", 2, 5, [(7, 6), (4, 5)], [1, 1], [2, 1], mode="gaussian", seed=8),
    Case("concatenation", 2, 6, [(9, 7), (8, 6)], [2, 1], [2, 3], mode="concatenation", seed=9),
]


def connector(kind: str, case: Case, level: int, module):
    made = mmrazor.connector(
        module,
        kind,
        case.channels,
        case.strides[level],
        case.reduction[level],
        mode=case.mode,
        norm_cfg=dict(type="BN") if case.norm == "batch" else None,
        spatial_T=case.temperature,
        channel_T=case.temperature,
    ).double()
    if case.mode == "concatenation":
        # mmcv divides the ReLU's output in place, which its backward refuses: hand it a copy.
        block = made.student_non_local if kind == "student" else made.teacher_non_local
        block.concat_project.register_forward_hook(lambda module, inputs, output: output.clone())
    return made


def features(case: Case, generator: torch.Generator) -> list[torch.Tensor]:
    maps = []
    for height, width in case.sizes:
        x = torch.randn(case.batch, case.channels, height, width, generator=generator, dtype=torch.float64)
        if case.padded:
            x[:, :, -height // 3 :] = 0
            x[:, :, :, -width // 3 :] = 0
        maps.append(x)
    return maps


def terms_of(case: Case, loss_module, s_input, t_input) -> dict[str, torch.Tensor]:
    """Each term of one level, through MMRazor's loss with all other weights 0."""
    names = {
        "feature": "mask_l2_weight",
        "channel": "channel_weight",
        "spatial": "spatial_weight",
        "relation": "nonloacl_weight",
    }
    terms = {}
    for term in TERMS:
        weights = {argument: float(name == term) for name, argument in names.items()}
        terms[term] = loss_module.FBKDLoss(**weights)(s_input, t_input)
    if case.use_channel_mask:
        # MMRazor computes the channel mask but leaves it out of its own loss.
        terms["feature"] = loss_module.mask_l2_loss(
            t_input[4],
            s_input[5],
            ((t_input[0] + s_input[0]) / 2).detach(),
            ((t_input[1] + s_input[1]) / 2).detach(),
        )
    return terms


class Oracle(nn.Module):
    """MMRazor's connectors of every level, and the sum of each term over levels."""

    def __init__(self, case: Case, loss_module, connector_module):
        super().__init__()
        self.case, self.loss_module = case, loss_module
        levels = range(len(case.sizes))
        self.student = nn.ModuleList(connector("student", case, i, connector_module) for i in levels)
        self.teacher = nn.ModuleList(connector("teacher", case, i, connector_module) for i in levels)

    def forward(self, students, teachers) -> dict[str, torch.Tensor]:
        totals = dict.fromkeys(TERMS, 0.0)
        for s_connector, t_connector, s, t in zip(self.student, self.teacher, students, teachers, strict=True):
            for term, value in terms_of(self.case, self.loss_module, s_connector(s), t_connector(t)).items():
                totals[term] = totals[term] + value
        return totals


def total_of(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(WEIGHTS[term] * value for term, value in terms.items())


def record(case: Case, loss_module, connector_module) -> dict[str, np.ndarray]:
    """Everything one oracle file holds."""
    generator = torch.Generator().manual_seed(case.seed)
    oracle = Oracle(case, loss_module, connector_module)
    randomise(oracle, case.seed)
    students = [x.requires_grad_() for x in features(case, generator)]
    teachers = features(case, generator)
    out = {f"weight.{name}": value.clone() for name, value in oracle.state_dict().items()}
    out |= {f"input.student.{i}": x.detach().clone() for i, x in enumerate(students)}
    out |= {f"input.teacher.{i}": x for i, x in enumerate(teachers)}

    terms = oracle(students, teachers)
    total_of(terms).backward()
    out |= {f"term.{name}": value.detach() for name, value in terms.items()}
    out |= {f"grad.input.{i}": x.grad for i, x in enumerate(students)}
    out |= {f"grad.weight.{name}": parameter.grad for name, parameter in oracle.named_parameters()}
    out |= {f"buffer.{name}": value.clone() for name, value in oracle.named_buffers()}
    out["trained.total"], out["trained.eval_total"] = trajectory(oracle, students, teachers)
    return {name: np.asarray(value.detach()) for name, value in out.items()}


def trajectory(oracle: Oracle, students, teachers) -> tuple[torch.Tensor, torch.Tensor]:
    """Training losses before each of three further optimizer steps and after them, and the eval loss then."""
    optimizer = torch.optim.SGD(oracle.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    students = [x.detach() for x in students]
    totals = []
    for step in range(STEPS + 1):
        total = total_of(oracle(students, teachers))
        totals.append(total.detach())
        if step < STEPS:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    oracle.eval()
    return torch.stack(totals), total_of(oracle(students, teachers))


def record_pooled_gaussian() -> dict[str, np.ndarray]:
    """mmcv's own block: MMRazor's pooled gaussian mode raises."""
    from mmcv.cnn import NonLocal2d

    generator = torch.Generator().manual_seed(10)
    block = NonLocal2d(6, reduction=2, mode="gaussian", sub_sample=True, norm_cfg=dict(type="BN")).double()
    randomise(block, seed=10)
    x = torch.randn(2, 6, 9, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    out = {f"weight.{name}": value.clone() for name, value in block.state_dict().items()}
    z = block(x)
    (z * direction).sum().backward()
    out |= {"input": x.detach(), "direction": direction, "output": z.detach(), "grad.input": x.grad}
    out |= {f"grad.weight.{name}": parameter.grad for name, parameter in block.named_parameters()}
    out |= {f"buffer.{name}": value.clone() for name, value in block.named_buffers()}
    return {name: np.asarray(value.detach()) for name, value in out.items()}


PKD_WEIGHT, PKD_SIZES = 6.0, [((13, 9), (13, 9)), ((7, 6), (7, 6)), ((8, 10), (4, 5))]  # of student and teacher


def record_pkd(module) -> dict[str, np.ndarray]:
    """MMRazor's PKD loss of three levels; the last one's student or teacher is resized."""
    generator, out = torch.Generator().manual_seed(11), {}
    students, teachers = [], []
    for sizes in PKD_SIZES:
        student, noise = (torch.randn(3, 6, *size, generator=generator, dtype=torch.float64) for size in sizes)
        students.append(student.requires_grad_())
        teachers.append(noise + 4 if sizes[0] != sizes[1] else noise + 2 * student.detach())
    out |= {f"input.student.{i}": x.detach().clone() for i, x in enumerate(students)}
    out |= {f"input.teacher.{i}": x for i, x in enumerate(teachers)}
    for side in ("student", "teacher"):
        loss = module.PKDLoss(loss_weight=PKD_WEIGHT, resize_stu=side == "student")
        total = loss(tuple(students), tuple(teachers))
        out[f"{side}.loss"] = total.detach()
        gradients = torch.autograd.grad(total, students)
        out |= {f"{side}.grad.{i}": gradient for i, gradient in enumerate(gradients)}
    return {name: np.asarray(value) for name, value in out.items()}


CWD_WEIGHT, CWD_TEMPERATURE, CWD_SIZES = 5.0, 0.7, [(13, 9), (7, 6)]


def record_cwd(module) -> dict[str, np.ndarray]:
    """MMRazor's CWD loss of two levels."""
    generator, out = torch.Generator().manual_seed(12), {}
    for i, size in enumerate(CWD_SIZES):
        student, noise = (torch.randn(3, 6, *size, generator=generator, dtype=torch.float64) for _ in range(2))
        teacher = 2 * student + noise + 4
        loss = module.ChannelWiseDivergence(tau=CWD_TEMPERATURE, loss_weight=CWD_WEIGHT)
        term = loss(student.requires_grad_(), teacher)
        (gradient,) = torch.autograd.grad(term, student)
        found = {"student": student.detach(), "teacher": teacher, "loss": term.detach(), "grad": gradient}
        out |= {f"{name}.{i}": value for name, value in found.items()}
    return {name: np.asarray(value) for name, value in out.items()}


MGD_WEIGHT, MGD_RATIO, MGD_WIDTHS, MGD_SIZES = 0.3, 0.4, [(6, 6), (4, 6)], [(13, 9), (7, 6)]


def record_mgd(module, connectors) -> dict[str, np.ndarray]:
    """MMRazor's MGD loss of two levels, the second one's student with fewer channels, and the masks that it drew."""
    generator, out = torch.Generator().manual_seed(13), {}
    for i, (widths, size) in enumerate(zip(MGD_WIDTHS, MGD_SIZES, strict=True)):
        torch.manual_seed(i)
        connector = connectors.MGDConnector(*widths, lambda_mgd=MGD_RATIO).double()
        student, teacher = (torch.randn(3, width, *size, generator=generator, dtype=torch.float64) for width in widths)
        numbers = torch.rand(3, 1, *size, generator=generator)
        with mock.patch.object(torch, "rand", lambda shape, numbers=numbers: numbers):
            generated = connector.forward_train(student.requires_grad_())
        term = module.MGDLoss(alpha_mgd=MGD_WEIGHT)(generated, teacher)
        weights = dict(connector.named_parameters())
        gradient, *gradients = torch.autograd.grad(term, [student, *weights.values()])
        found = {"student": student, "teacher": teacher, "loss": term, "grad": gradient}
        found |= {"mask": numbers <= 1 - MGD_RATIO}
        found |= {f"weight.{name}": value for name, value in weights.items()}
        found |= {f"grad.{name}": value for name, value in zip(weights, gradients, strict=True)}
        out |= {f"{i}.{name}": value.detach() for name, value in found.items()}
    return {name: np.asarray(value) for name, value in out.items()}


FGD_CONSTANTS = {"foreground": 0.7, "background": 0.3, "attention": 0.2, "global": 0.1, "temperature": 0.4}
FGD_WIDTHS, FGD_SIZES, FGD_IMAGE_SIZE = [(6, 6), (4, 6)], [(20, 26), (5, 7)], (80, 104)
FGD_BOXES = [  # x1, y1, x2, y2; overlapping ones, one thinner than a cell, none, and one that leaves no pixel outside
    [[3, 5, 40, 30], [30, 20, 90, 79.5], [10, 60, 10.5, 79], [64, 0, 104, 16]],
    [],
    [[0, 0, 104, 80], [50, 40, 60, 50]],
]


def load_fgd(checkout: Path) -> ModuleType:
    """FGD's own file (github.com/yzd-v/FGD), whose imports are of an mmcv before 2."""
    parents = {name: ModuleType(name) for name in ("fgd", "fgd.losses", "fgd.builder", "mmcv", "mmcv.cnn")}
    parents["fgd.builder"].DISTILL_LOSSES = mock.Mock(register_module=lambda: lambda kind: kind)
    parents["mmcv.cnn"].constant_init = parents["mmcv.cnn"].kaiming_init = lambda *_, **__: None
    path = checkout / "mmdet" / "distillation" / "losses" / "fgd.py"
    spec = importlib.util.spec_from_file_location("fgd.losses.fgd", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, parents):
        spec.loader.exec_module(module)
    return module


def record_fgd(module) -> dict[str, np.ndarray]:
    """FGD's loss of two levels, the second one's student with fewer channels."""
    generator, out = torch.Generator().manual_seed(14), {}
    boxes = [torch.tensor(each, dtype=torch.float64).reshape(-1, 4) for each in FGD_BOXES]
    names = {"alpha_fgd": "foreground", "beta_fgd": "background", "gamma_fgd": "attention", "lambda_fgd": "global"}
    constants = {theirs: FGD_CONSTANTS[ours] for theirs, ours in names.items()} | {"temp": FGD_CONSTANTS["temperature"]}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of the boxes' areas
    for i, (widths, size) in enumerate(zip(FGD_WIDTHS, FGD_SIZES, strict=True)):
        loss = randomise(module.FeatureLoss(*widths, "loss", **constants), seed=i)
        student, noise = (torch.randn(3, width, *size, generator=generator) for width in widths)
        teacher = noise + 0.5
        metas = [{"img_shape": (*FGD_IMAGE_SIZE, 3)}] * 3
        term = loss(student.requires_grad_(), teacher, boxes, metas)
        weights = dict(loss.named_parameters())
        gradient, *gradients = torch.autograd.grad(term, [student, *weights.values()])
        found = {"student": student, "teacher": teacher, "loss": term, "grad": gradient}
        found |= {f"weight.{name}": value for name, value in weights.items()}
        found |= {f"grad.{name}": value for name, value in zip(weights, gradients, strict=True)}
        out |= {f"{i}.{name}": value.detach() for name, value in found.items()}
    torch.set_default_dtype(before)
    return {name: np.asarray(value) for name, value in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mmrazor", type=Path, help="checkout of MMRazor 1.0.0; the installed one by default")
    parser.add_argument("--fgd", type=Path, help="checkout of the authors' FGD; without it that file stays")
    arguments = parser.parse_args()
    checkout = arguments.mmrazor
    modules = mmrazor.load(checkout) if checkout else mmrazor.installed()
    for case in CASES:
        arrays = record(case, modules.fbkd, modules.connectors)
        arrays["case"] = np.asarray(json.dumps(asdict(case)))
        np.savez_compressed(HERE / f"{case.name}.npz", **arrays)
    np.savez_compressed(HERE / "pooled_gaussian_block.npz", **record_pooled_gaussian())
    np.savez_compressed(HERE / "pkd.npz", **record_pkd(modules.pkd))
    np.savez_compressed(HERE / "cwd.npz", **record_cwd(modules.cwd))
    if arguments.fgd:
        np.savez_compressed(HERE / "fgd.npz", **record_fgd(load_fgd(arguments.fgd)))
    np.savez_compressed(HERE / "mgd.npz", **record_mgd(modules.mgd, modules.mgd_connector))


if __name__ == "__main__":
    main()
