"""One of the processes that tests/test_distributed.py starts with torchrun; each leaves what it saw in a file.

It is also imported by the test, which makes the same models in a single process.
"""

import sys

import torch
import torch.distributed as dist
from detectors import Detector
from helpers import randomise
from torch import nn

from fbkd_ops import Distiller, FBKDLoss, PKDLoss
from fbkd_ops.training.data_parallel import data_parallel

WORLD = 2
STEPS = 3
SHARE, HELD_STEPS = 0.2, 30
SIZES = (8, 10)  # each process pads its images to another size
TARGETS = torch.tensor(1.0, dtype=torch.float64)


def batch(rank: int, step: int, same_size: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    size = SIZES[0] if same_size else SIZES[rank]
    return torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)


def make(norm: str = "batch", synchronize: bool = False, normalize: str = "none", **schedule) -> Distiller:
    torch.manual_seed(0)
    student, teacher = Detector(4), Detector(6)
    student.dropout.p = 0.0
    loss = FBKDLoss(4, 6, num_levels=2, stride=2, norm=norm, normalize=normalize, synchronize=synchronize)
    return Distiller(student, teacher, randomise(loss), student_layers="backbone", **schedule).double()


CASES = {
    "frozen": dict(norm="frozen"),
    "no norm": dict(norm="none"),
    "schedule": dict(norm="frozen", start_step=1, stop_step=2),
    "mean": dict(norm="frozen", normalize="mean"),
    "joined": dict(norm="none", synchronize=True),
    "joined mean": dict(norm="none", synchronize=True, normalize="mean"),
    "joined batch norm": dict(synchronize=True),
    "unlabelled": dict(norm="frozen"),
}

APART = dict(norm="frozen", stop_step=2)


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    """Zeros where there is none."""
    named = {name.replace("module.", ""): parameter for name, parameter in module.named_parameters()}
    return {name: torch.zeros_like(x) if x.grad is None else x.grad.clone() for name, x in named.items()}


def without_labels(distiller: Distiller, wrapped: nn.Module, rank: int, step: int) -> dict[str, torch.Tensor]:
    with distiller.unlabelled():
        terms = wrapped(batch(rank, STEPS + step), TARGETS)
    return {f"{name}_unlabelled": term for name, term in terms.items()}


def run_case(name: str, rank: int, wrap, case: dict) -> list[dict]:
    plain = make(**case)
    distiller = wrap(plain)
    optimizer, seen = torch.optim.SGD(distiller.parameters(), lr=0.05), []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = distiller(batch(rank, step, case.get("synchronize", False)), TARGETS)
        if name == "unlabelled":
            losses |= without_labels(plain, distiller, rank, step)
        sum(losses.values()).backward()
        seen.append({"losses": {name: value.item() for name, value in losses.items()}, "grads": gradients(distiller)})
        optimizer.step()
    return seen


def whole(distiller: Distiller) -> nn.Module:
    return data_parallel(distiller, sync_batch_norm=True)


def apart(distiller: Distiller) -> nn.Module:
    """The student wrapped by somebody else; in the last step the loss is not used."""
    student, loss = nn.parallel.DistributedDataParallel(distiller.student), data_parallel(distiller.loss)
    return Distiller(student, distiller.teacher, loss, student_layers="backbone", stop_step=distiller.stop_step)


def sharded(distiller: Distiller) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (distiller.student.backbone, distiller.loss, distiller):
        fully_shard(part, mesh=mesh)
    return distiller


def run_sharded(rank: int) -> list[dict]:
    distiller = sharded(make(**CASES["schedule"]))
    optimizer, seen = torch.optim.SGD(distiller.parameters(), lr=0.05), []
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = distiller(batch(rank, step), TARGETS)
        sum(losses.values()).backward()
        grads = {name: parameter.grad.full_tensor() for name, parameter in distiller.named_parameters()}
        seen.append({"losses": {name: value.item() for name, value in losses.items()}, "grads": grads})
        optimizer.step()
    return seen


def make_shared(every: int) -> Distiller:
    return make(norm="frozen", gradient_share=SHARE, share_every=every)


def make_with_two_losses(every: int) -> Distiller:
    """Each has a share of its own."""
    one = make(norm="frozen")
    losses = {"fbkd": one.loss, "pkd": PKDLoss(4, 6, num_levels=2)}
    shares = {"fbkd": SHARE, "pkd": SHARE / 2}
    arguments = {"student_layers": "backbone", "gradient_share": shares, "share_every": every}
    return Distiller(one.student, one.teacher, losses, **arguments).double()


def run_share(rank: int, make, wrap, steps: int = 2 * STEPS, every: int = 2) -> list[dict[str, float]]:
    """The factor and the share after each step, which all processes have to agree on."""
    distiller = make(every)
    wrapped = wrap(distiller)
    # Slow: the own gradient of this detector, which learns one number, would vanish faster than a mean can follow.
    optimizer, seen = torch.optim.SGD(wrapped.parameters(), lr=1e-3), []
    for step in range(steps):
        optimizer.zero_grad()
        sum(wrapped(batch(rank, step), TARGETS).values()).backward()
        optimizer.step()
        seen.append({name: value.item() for name, value in distiller.weights().items()})
    return seen


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    seen = {name: run_case(name, rank, whole, case) for name, case in CASES.items()}
    seen["apart"] = run_case("apart", rank, apart, APART)
    seen["sharded"] = run_sharded(rank)
    seen["share"] = run_share(rank, make_shared, whole)
    for name, wrap in (("held share", whole), ("sharded share", sharded)):
        seen[name] = run_share(rank, make_shared, wrap, HELD_STEPS, 1)
        seen[f"{name}s of two losses"] = run_share(rank, make_with_two_losses, wrap, HELD_STEPS, 1)
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
