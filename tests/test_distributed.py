"""Two torchrun processes with a part of the batch each, against one process that has both parts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_worker import APART, CASES, SHARE, STEPS, TARGETS, WORLD, batch, gradients, make, without_labels
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbkd_ops import FBKDLoss
from fbkd_ops.training.data_parallel import data_parallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")

HERE = Path(__file__).parent
TOLERANCE = dict(rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, HERE / "distributed_worker.py", folder],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_same(expected: dict, ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(rank[name], gradient, **TOLERANCE, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", ["frozen", "no norm", "schedule", "mean", "apart", "sharded", "unlabelled"])
def test_gradients_are_those_of_the_mean_of_both_parts_losses(name, seen):
    """Without find_unused_parameters, of which DistributedDataParallel complains in the second step."""
    distiller = make(**(CASES | {"apart": APART, "sharded": CASES["schedule"]})[name])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(WORLD):
            distiller.step = step
            losses = distiller(batch(rank, step), TARGETS)
            if name == "unlabelled":
                losses |= without_labels(distiller, distiller, rank, step)
            assert seen[rank][name][step]["losses"] == pytest.approx({k: v.item() for k, v in losses.items()}, 1e-10)
            (sum(losses.values()) / WORLD).backward()
        assert_same(gradients(distiller), [rank[name][step]["grads"] for rank in seen])
        optimizer.step()


@pytest.mark.parametrize("name", ["joined", "joined mean", "joined batch norm"])
def test_synchronized_sums_are_those_of_the_joined_batch(name, seen):
    distiller = make(**CASES[name])
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [batch(rank, step, same_size=True) for rank in range(WORLD)]
        losses = distiller(torch.cat(parts), TARGETS)
        for rank in seen:
            for term in FBKDLoss.term_names:
                assert rank[name][step]["losses"][term] == pytest.approx(losses[term].item(), 1e-10)
        # The detector's own losses are means over a part; theirs is another mean than that of the joined batch.
        own = sum(sum(distiller.student(part, TARGETS).values()) for part in parts) / WORLD
        (own + sum(losses[term] for term in FBKDLoss.term_names)).backward()
        assert_same(gradients(distiller), [rank[name][step]["grads"] for rank in seen])
        optimizer.step()


def test_the_two_losses_differ(seen):
    """A root of the sum over both parts is no mean of the roots."""
    apart, joined = (seen[0][name][0]["losses"]["loss_fbkd_feature"] for name in ("no norm", "joined"))
    assert abs(apart - joined) > 0.1 * joined


def test_without_processes_everything_stays_as_it_is():
    distiller = make(synchronize=True)
    assert data_parallel(distiller, sync_batch_norm=True) is distiller
    losses = distiller(batch(0, 0), TARGETS)
    expected = make(synchronize=False)(batch(0, 0), TARGETS)
    torch.testing.assert_close(losses, expected, **TOLERANCE)


def test_a_loss_without_parameters_stays_as_it_is():
    loss = torch.nn.Identity()
    assert data_parallel(loss) is loss


def test_something_that_is_no_module_is_named():
    with pytest.raises(TypeError, match="module must be a Distiller or a loss, got dict"):
        data_parallel({})


@pytest.fixture
def single_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Holder(nn.Module):
    """A module around a distiller, as Lightning's are."""

    def __init__(self, distiller):
        super().__init__()
        self.distiller, self.norm = distiller, nn.BatchNorm2d(3)


def synchronized(module):
    return data_parallel(module, sync_batch_norm=True)


def compiled(module):
    return torch.compile(module, backend="eager")


def with_compiled_loss(distiller):
    distiller.loss = compiled(distiller.loss)
    return synchronized(distiller)


def compiled_in_place(distiller):
    distiller.compile(backend="eager")
    return synchronized(distiller)


@pytest.mark.parametrize(
    "wrap",
    [
        synchronized,
        lambda distiller: synchronized(compiled(distiller)),
        lambda distiller: compiled(synchronized(distiller)),
        lambda distiller: synchronized(data_parallel(distiller)),
        lambda distiller: synchronized(Holder(distiller)),
        lambda distiller: synchronized(compiled(distiller.loss)),
        with_compiled_loss,
        compiled_in_place,
    ],
    ids=["plain", "compiled before", "compiled after", "twice", "held", "compiled loss", "loss compiled", "in place"],
)
def test_only_the_norms_of_the_loss_are_synchronized(wrap, single_process):
    distiller = make()
    distiller.student.norm = nn.BatchNorm2d(4)
    whole = wrap(distiller)
    norms = {name: module for name, module in whole.named_modules() if isinstance(module, _BatchNorm)}
    assert norms
    for name, module in norms.items():
        assert isinstance(module, nn.SyncBatchNorm) == ("_non_local." in name), name


def test_all_processes_have_the_same_share(seen):
    """Of parts of a batch whose own shares differ."""
    first, second = (rank["share"] for rank in seen)
    assert first == second
    assert first[-1]["fbkd_gradient_share"] > 0 and first[-1]["fbkd_weight"] != first[0]["fbkd_weight"]
    alone = []
    for rank in range(WORLD):
        distiller = make(norm="frozen", gradient_share=SHARE, share_every=2)
        for step in (0, 1):
            sum(distiller(batch(rank, step), TARGETS).values()).backward()
        alone.append(distiller.weights()["fbkd_gradient_share"].item())
    assert min(alone) < first[1]["fbkd_gradient_share"] < max(alone)


TWO = {"fbkd_gradient_share_fbkd": SHARE, "fbkd_gradient_share_pkd": SHARE / 2}


@pytest.mark.parametrize("losses, targets", [("", {"fbkd_gradient_share": SHARE}), ("s of two losses", TWO)])
@pytest.mark.parametrize("name", ["held share", "sharded share"])
def test_the_share_is_held_by_all_processes(name, losses, targets, seen):
    """Under DistributedDataParallel and FSDP2: of both processes' gradients together."""
    first, second = (rank[name + losses] for rank in seen)
    assert first == second
    for entry, target in targets.items():
        shares = torch.tensor([step[entry] for step in first[len(first) // 2 :]])
        assert shares.median() == pytest.approx(target, rel=0.2)
        assert ((shares > target / 2) & (shares < 2 * target)).float().mean() >= 0.8


def test_sharding_changes_no_share(seen):
    """But for roundings: the gradients that are measured are the same."""
    plain, sharded = ([step["fbkd_weight"] for step in seen[0][name]] for name in ("held share", "sharded share"))
    assert plain[:5] == pytest.approx(sharded[:5], rel=1e-5)
