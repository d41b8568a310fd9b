"""Random calls of the package (tests/fuzz): a few of them, and faults that the comparison has to find."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fuzz import __main__ as fuzz
from fuzz import check, data, problems, rounding, worker
from helpers import TEST_ALL
from op_cases import INTERPRETER, NO_CPU, NO_TRITON
from random_cases import assert_random_cases_are_right

from fbkd_ops import functional

ROOT = Path(__file__).resolve().parents[1]
MAP = {"dtype": "float32", "layout": "contiguous", "values": "normal"}
PLAIN = {"target": "cpu", "seed": 1, "threads": 1, "wanted": -1, "autocast": None}
POOLS = PLAIN | {"op": "attention_pools", "sizes": [[2, 5, 5, 3, 7]], "maps": [MAP]}
MASK = {"values": "uniform", "dtype": "float32"}
SIDES = {"size": [2, 5, 5, 3, 7], "student": MAP, "teacher": MAP}
MASKED = PLAIN | SIDES | {"op": "masked_l2_loss", "spatial_mask": MASK, "channel_mask": MASK, "strided_masks": False}
PARAMETERS = {"parameters": {"dtype": "float32", "values": "normal", "strided": False}}
ADAPTED = MASKED | PARAMETERS | {"op": "adapted_masked_l2_loss"}


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    """The literal formula of small maps is fastest so."""


@pytest.mark.parametrize(
    "target", [pytest.param("cpu", marks=NO_CPU), pytest.param("triton", marks=[NO_TRITON, INTERPRETER])]
)
def test_random_cases(target):
    """Those of the CUDA kernels are in test_cuda_kernels.py: one process compiles their source once for both files."""
    assert_random_cases_are_right(target)


@NO_CPU
@pytest.mark.parametrize("case", [POOLS, MASKED, ADAPTED], ids=lambda case: case["op"])
def test_plain_cases_are_right(case):
    assert check.mismatch_of(case) is None


def scaled_loss(loss):
    return lambda *arguments: loss(*arguments) * (1 + 3e-5)


def without_masks(loss):
    return lambda student, teacher, spatial_mask=None, channel_mask=None: loss(student, teacher, spatial_mask)


def without_nan(loss):
    return lambda *arguments: loss(*arguments).nan_to_num(0.0)


def another_dtype(loss):
    return lambda *arguments: loss(*arguments).double()


def raising(loss):
    def changed(*arguments):
        raise IndexError("out of range")

    return changed


@NO_CPU
@pytest.mark.parametrize(
    "change, found",
    [
        (scaled_loss, "loss: error"),
        (without_masks, "loss: error"),
        (without_nan, "values that are not finite in plain PyTorch are finite"),
        (another_dtype, "loss: .* torch.float64, expected .* torch.float32"),
        (raising, "the package raises IndexError: out of range"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_losses_are_found(monkeypatch, change, found):
    case = MASKED | ({"spoiled": ["student", "nan"]} if change is without_nan else {})
    change_the_package(monkeypatch, "masked_l2_loss", change)
    assert re.search(found, check.mismatch_of(case) or "")


def change_the_package(monkeypatch, name, change):
    """Another function on the CPU's kernels; the literal formula stays."""
    right, run = getattr(functional, name), check._run_package

    def run_changed(case):
        with monkeypatch.context() as context:
            context.setattr(functional, name, change(right))
            return run(case)

    monkeypatch.setattr(check, "_run_package", run_changed)


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is changed at one element."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[3] *= 1.001
        return grad


@NO_CPU
@pytest.mark.parametrize("values", ["normal", "huge_pixel"])
def test_a_wrong_gradient_of_one_element_is_found(monkeypatch, values):
    """Beside a pixel of 1e4, too, which the root mean square of the whole gradient would hide it behind."""
    change_the_package(
        monkeypatch, "masked_l2_loss", lambda loss: lambda student, *others: loss(WrongGradient.apply(student), *others)
    )
    found = check.mismatch_of(MASKED | {"student": dict(MAP, values=values)})
    assert found is not None and found.startswith("gradient of student: error")


@NO_CPU
def test_a_gradient_of_the_teacher_is_found(monkeypatch):
    def reaching(loss):
        return lambda student, teacher, *masks: loss(student, teacher, *masks) + 0 * teacher.sum()

    change_the_package(monkeypatch, "masked_l2_loss", reaching)
    assert check.mismatch_of(MASKED) == "a gradient reaches teacher"


@pytest.mark.parametrize("size", [1.0, 1e-170])
def test_numbers_whose_squares_are_zero_are_judged_like_others(size):
    truth = size * torch.randn(4, 5, dtype=torch.float64)
    samples, own = [truth * (1 + 1e-10), truth * (1 - 1e-10)], torch.zeros_like(truth)
    assert check._excess(truth * (1 + 1e-9), truth, truth, samples, own, 0.0) is None
    assert check._excess(truth * (1 + 1e-8), truth, truth, samples, own, 0.0) is not None


def test_rounding_leaves_an_exact_zero():
    x = torch.randn(3, 4, dtype=torch.float64)
    with rounding.RandomRounding(1e-3, 0, rounding.Trace()):
        assert not (x - x).any()


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_rounding_is_that_of_the_terms_where_they_cancel(offset):
    """A sum of products whose terms are a million times as large as it: so is its rounding error."""
    a, b = torch.tensor([[1.0, offset, offset]]).double(), torch.tensor([[1.0], [1.0], [-1.0]]).double()
    with rounding.RandomRounding(1e-7, 0, rounding.Trace()):
        errors = torch.stack([(a @ b - 1).abs() for _ in range(50)])
    assert 1e-8 * max(1.0, offset) < errors.mean() < 1e-6 * max(1.0, offset)


def test_winners_are_replayed():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    trace, gradients = rounding.Trace(), []
    for eps in (0.0, 1e-7):
        with rounding.RandomRounding(eps, 0, trace, keeps_winners=True):
            pooled = torch.nn.functional.max_pool2d(x + 1, 2)
            gradients.append(torch.autograd.grad(pooled.sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_a_case_draws_the_same_numbers_each_time(layout):
    case = ADAPTED | {"student": dict(MAP, layout=layout)}
    first, second = (problems.problem_of(case) for _ in range(2))
    torch.manual_seed(5)
    for name, x in (first.students | first.constants).items():
        other = (second.students | second.constants)[name]
        assert torch.equal(x, other) and x.stride() == other.stride()
    assert first.students["student"].shape == (2, 5, 3, 7)


def test_a_batch_depends_on_its_number_and_the_seed_alone(monkeypatch):
    tried = []
    monkeypatch.setattr(check, "mismatch_of", lambda case: None)
    for first in (0, 2):
        list(worker.batches("cpu", seed=3, first=first, cases=1 if first else 25, before=tried.append, size=8))
    batches = {}
    for case in tried:
        batches.setdefault(case["op"], []).append(case)
    last = batches["attention_masks"]
    assert len(last) % 2 == 0 and last[: len(last) // 2] == last[len(last) // 2 :]


def test_a_failing_case_is_made_smaller(monkeypatch):
    monkeypatch.setattr(check, "mismatch_of", lambda case: "too wide" if case["size"][1] > 3 else None)
    (report,) = worker.batches("cpu", seed=0, first=3, cases=1, size=30)
    assert report["failure"]["case"]["size"] == [2, 4, 4, 1, 1] and report["failure"]["found"] == "too wide"


def test_a_crash_is_a_failure_of_the_case_that_it_was_at(monkeypatch, capsys):
    def crashing(target, seed, cases, current):
        Path(current).write_text(json.dumps(POOLS))
        raise fuzz.BrokenProcessPool

    monkeypatch.setattr(fuzz, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(fuzz, "find_failures", crashing)
    assert fuzz.fuzz_target("cpu", 1, 20) is None
    assert fuzz.reproduction(POOLS) in capsys.readouterr().out


@NO_CPU
@pytest.mark.skipif(not TEST_ALL, reason="one of the tests of make test-all")
def test_the_command_runs_and_replays_a_case():
    environment = os.environ | {"PYTHONPATH": "tests"}
    command = [sys.executable, "-m", "fuzz", "--targets", "cpu", "--cases", "60", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith("seed 1\n") and done.stdout.endswith("0 failed\n"), done.stdout + done.stderr
    done = subprocess.run(fuzz.reproduction(MASKED), cwd=ROOT, shell=True, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
