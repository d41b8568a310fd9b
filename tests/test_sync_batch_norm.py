"""nn.SyncBatchNorm over two processes against BatchNorm over the pixels of both, in one process.

PyTorch's own forward of SyncBatchNorm needs GPUs; this one runs on the CPU with gloo. Both processes are started once,
run every check, and leave what they saw in a file each.
"""

import copy
import datetime
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import randomise
from torch import nn

from fbkd_ops import FBKDLoss, NonLocalBlock2d, functional, reference
from fbkd_ops.presets import MODES

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")

RANKS = range(2)
TOLERANCE = dict(rtol=1e-10, atol=1e-10)
UNEQUAL = ((2, 6, 5), (3, 4, 7))
EMPTY = ((2, 6, 5), (0, 4, 7))
ONE_EACH = ((1, 1, 1), (1, 1, 1))


@dataclass(frozen=True)
class Case:
    """A block, or an FBKDLoss of the relation term only, in two steps of training and one in eval mode."""

    name: str
    sizes: tuple = UNEQUAL  # (N, H, W) of each rank
    mode: str = "dot_product"
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True

    def norm(self, channels: int, kind: type) -> nn.Module:
        norm = kind(channels, momentum=self.momentum, affine=self.affine, track_running_stats=self.track)
        return randomise(norm.double(), seed=channels)

    def block(self, kind: type) -> NonLocalBlock2d:
        block = randomise(NonLocalBlock2d(4, 2, mode=self.mode, stride=2, conv_out_bias=False).double())
        block.norm = self.norm(4, kind)
        return block

    def loss(self, kind: type) -> FBKDLoss:
        off = dict(feature_weight=0, channel_weight=0, spatial_weight=0)
        loss = FBKDLoss(4, 6, num_levels=1, mode=self.mode, stride=2, relation_weight=1.0, conv_out_bias=False, **off)
        randomise(loss.double())
        for block in (loss.levels[0].student_non_local, loss.levels[0].teacher_non_local):
            block.norm = self.norm(block.in_channels, kind)
        return loss

    def maps(self, rank: int, channels: int, step: int = 0) -> torch.Tensor:
        n, height, width = self.sizes[rank]
        generator = torch.Generator().manual_seed(100 * channels + 10 * rank + step)
        # Ranks of different means, which a mean of both variances would miss.
        return torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64) * (rank + 1) + 3 * rank


CASES = [
    *(Case(mode, mode=mode) for mode in MODES),
    Case("empty on one rank", EMPTY),
    Case("empty on both", ((0, 2, 2), (0, 3, 3))),
    Case("one value each", ONE_EACH),
    Case("cumulative", momentum=None),
    Case("not affine", affine=False),
    Case("no running statistics", track=False),
]
LOSS_CASES = [Case("terms"), Case("terms, empty on one rank", EMPTY), Case("terms, one value each", ONE_EACH)]
STEPS = 2


def outcome(module: nn.Module, leaf: torch.Tensor, outputs: torch.Tensor) -> dict:
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return dict(
        output=outputs.detach(), grad=leaf.grad, grads=grads, buffers=copy.deepcopy(dict(module.named_buffers()))
    )


def run_block(case: Case, rank: int) -> list[dict]:
    block, seen = case.block(nn.SyncBatchNorm), []
    for step in range(STEPS):
        block.zero_grad()
        leaf = case.maps(rank, 4, step).requires_grad_()
        z = block(leaf)
        (z * z).sum().backward()
        seen.append(outcome(block, leaf, z))
    return seen


def run_loss(case: Case, rank: int) -> list[dict]:
    loss, seen = nn.SyncBatchNorm.convert_sync_batchnorm(case.loss(nn.BatchNorm2d)), []
    for step in range(STEPS):
        loss.zero_grad()
        leaf = case.maps(rank, 4, step).requires_grad_()
        term = loss([leaf], [case.maps(rank, 6, step)])["loss_fbkd_relation"]
        term.backward()
        seen.append(outcome(loss, leaf, term))
    return seen


def run_eval(rank: int) -> torch.Tensor | None:
    """On one rank alone, with that rank's own statistics: the other is not waited for."""
    case = Case("eval", track=False)
    return case.block(nn.SyncBatchNorm).eval()(case.maps(rank, 4)).detach() if rank == 0 else None


def run_groups(rank: int) -> torch.Tensor:
    """Each rank in a process group of its own."""
    groups = [dist.new_group([other]) for other in RANKS]
    block = nn.SyncBatchNorm.convert_sync_batchnorm(CASES[0].block(nn.BatchNorm2d), groups[rank])
    return block(CASES[0].maps(rank, 4)).detach()


def run_whole_group(rank: int) -> list[bool]:
    """Both ranks in a group that is not the default one: whether each call of both passes was for it."""
    whole = dist.new_group(list(RANKS))
    block = nn.SyncBatchNorm.convert_sync_batchnorm(CASES[0].block(nn.BatchNorm2d), whole)
    names = ("all_gather", "all_reduce")
    with ExitStack() as stack:
        spies = [stack.enter_context(mock.patch.object(dist, name, wraps=getattr(dist, name))) for name in names]
        block(CASES[0].maps(rank, 4)).sum().backward()
    return [spy.call_args.kwargs["group"] is whole for spy in spies]


def run_one_value(rank: int) -> tuple[str, int]:
    """One value over both ranks."""
    case = Case("one value", ((0, 1, 1), (1, 1, 1)))
    block = case.block(nn.SyncBatchNorm)
    try:
        block(case.maps(rank, 4))
    except ValueError as error:
        return str(error), int(block.norm.num_batches_tracked)
    return "", -1


def run_far_from_zero(rank: int) -> torch.Tensor:
    """float32 values of about 10 000 with a spread of about 1."""
    block = far_block(nn.SyncBatchNorm)
    return functional.non_local(CASES[0].maps(rank, 4).float(), block.weights(), stride=2, norm=block.norm).detach()


def far_block(kind: type) -> NonLocalBlock2d:
    block = randomise(NonLocalBlock2d(4, 2, stride=2))
    block.norm = randomise(kind(4))
    with torch.no_grad():
        block.out.bias.add_(1e4)
    return block


def run_training(rank: int) -> tuple[list[float], dict]:
    """The whole loss, trained as DistributedDataParallel does it: with the mean of the ranks' gradients."""
    torch.manual_seed(0)
    loss = nn.SyncBatchNorm.convert_sync_batchnorm(FBKDLoss(4, 6, num_levels=2, stride=2))
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    case, totals = CASES[0], []
    students, teachers = ([case.maps(rank, channels, step).float() for step in range(2)] for channels in (4, 6))
    for _ in range(5):
        optimizer.zero_grad()
        total = sum(loss(students, teachers).values())
        total.backward()
        for parameter in loss.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= len(RANKS)
        optimizer.step()
        totals.append(total.item())
    return totals, loss.state_dict()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", len(RANKS))
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(RANKS), timeout=timeout)
    seen = {case.name: run_block(case, rank) for case in CASES}
    seen |= {case.name: run_loss(case, rank) for case in LOSS_CASES}
    for check in (run_eval, run_groups, run_whole_group, run_one_value, run_far_from_zero, run_training):
        seen[check.__name__] = check(rank)
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=len(RANKS))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in RANKS]


def union(maps: list[torch.Tensor], block: NonLocalBlock2d) -> list[torch.Tensor]:
    """Every rank's z from the literal formula, with a BatchNorm2d over the pixels of all ranks."""
    u = [reference.non_local(x, block.weights(), mode=block.mode, stride=block.stride) - x for x in maps]
    pixels = torch.cat([part.transpose(0, 1).flatten(1) for part in u], dim=1)  # (C, values a channel)
    normalized = block.norm(pixels[None, :, :, None])[0, :, :, 0]
    parts = normalized.split([len(x) * x[0, 0].numel() if len(x) else 0 for x in maps], dim=1)
    return [
        x + part.reshape(x.shape[1], len(x), *x.shape[2:]).transpose(0, 1) for x, part in zip(maps, parts, strict=True)
    ]


def assert_same_outcome(module, leaves, outputs, ranks: list[dict]) -> None:
    """``ranks`` is what each rank saw of this step; parameters' gradients add up over ranks."""
    torch.testing.assert_close([rank["output"] for rank in ranks], [output.detach() for output in outputs], **TOLERANCE)
    torch.testing.assert_close([rank["grad"] for rank in ranks], [leaf.grad for leaf in leaves], **TOLERANCE)
    for name, parameter in module.named_parameters():
        total = sum(rank["grads"][name] for rank in ranks)
        torch.testing.assert_close(total, parameter.grad, **TOLERANCE, msg=lambda m: f"{name}: {m}")
    for rank in ranks:
        torch.testing.assert_close(rank["buffers"], dict(module.named_buffers()), **TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_block_normalises_with_all_processes_pixels(case, seen):
    block = case.block(nn.BatchNorm2d)
    for step in range(STEPS):
        block.zero_grad()
        leaves = [case.maps(rank, 4, step).requires_grad_() for rank in RANKS]
        outputs = union(leaves, block)
        sum((z * z).sum() for z in outputs).backward()
        assert_same_outcome(block, leaves, outputs, [rank[case.name][step] for rank in seen])


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
def test_a_converted_loss_normalises_with_all_processes_pixels(case, seen):
    loss = case.loss(nn.BatchNorm2d)
    level = loss.levels[0]
    for step in range(STEPS):
        loss.zero_grad()
        leaves = [case.maps(rank, 4, step).requires_grad_() for rank in RANKS]
        z_s = union(leaves, level.student_non_local)
        z_t = union([case.maps(rank, 6, step) for rank in RANKS], level.teacher_non_local)
        squares = [(t - level.relation_adaptation(s)).square().sum() for s, t in zip(z_s, z_t, strict=True)]
        terms = [total.sqrt() if total > 0 else total for total in squares]
        sum(terms).backward()
        assert_same_outcome(loss, leaves, terms, [rank[case.name][step] for rank in seen])


def test_eval_waits_for_nobody(seen):
    case = Case("eval", track=False)
    block = case.block(nn.BatchNorm2d).eval()
    torch.testing.assert_close(seen[0]["run_eval"], block(case.maps(0, 4)).detach(), **TOLERANCE)


@pytest.mark.parametrize("rank", RANKS)
def test_the_process_group_is_that_of_the_norm(rank, seen):
    case = CASES[0]
    expected = case.block(nn.BatchNorm2d)(case.maps(rank, 4)).detach()
    torch.testing.assert_close(seen[rank]["run_groups"], expected, **TOLERANCE)
    assert seen[rank]["run_whole_group"] == [True, True]


@pytest.mark.parametrize("rank", RANKS)
def test_one_value_over_all_processes_is_refused(rank, seen):
    message, updates = seen[rank]["run_one_value"]
    assert message.startswith("Expected more than 1 value per channel when training") and updates == 0


def test_variances_far_from_zero_keep_their_digits(seen):
    block = far_block(nn.BatchNorm2d).double()
    expected = union([CASES[0].maps(rank, 4) for rank in RANKS], block)
    for rank in RANKS:
        torch.testing.assert_close(seen[rank]["run_far_from_zero"].double(), expected[rank], rtol=0, atol=2e-3)


def test_a_converted_loss_trains(seen):
    totals, state = zip(*(rank["run_training"] for rank in seen), strict=True)
    over_ranks = [sum(step) for step in zip(*totals, strict=True)]
    assert over_ranks == sorted(over_ranks, reverse=True) and over_ranks[-1] < 0.99 * over_ranks[0]
    torch.testing.assert_close(*state, rtol=0, atol=0)
    assert state[0]["levels.1.teacher_non_local.norm.num_batches_tracked"] == 5
