"""One training loop, the same for the teacher, the plain student and the distilled student."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from .data import Images, Target, Track

LEARNING_RATE = 2e-3
WARM_UP = 0.15
WEIGHT_DECAY = 1e-2
MAX_GRADIENT_NORM = 10.0


class TrainingError(Exception):
    """A training that cannot go on; the message is one line."""


@dataclass(frozen=True)
class Budget:
    """How long to train, and the seed of everything that is drawn on the way."""

    steps: int
    batch_size: int
    seed: int


@dataclass
class History:
    """Each loss of each step, by name, and the seconds the whole training took."""

    losses: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def batches(images: Images, budget: Budget) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """`budget.steps` batches in an order that depends on the seed alone; epochs follow each other without a break."""
    order = RandomSampler(
        images,
        num_samples=budget.steps * budget.batch_size,
        generator=torch.Generator().manual_seed(budget.seed),
    )
    loader = DataLoader(
        images, budget.batch_size, sampler=order, collate_fn=lambda batch: tuple(zip(*batch, strict=True))
    )
    return ((list(pictures), list(targets)) for pictures, targets in loader)


def train(model: nn.Module, images: Images, budget: Budget, device: torch.device, track: Track = iter) -> History:
    """Train `model`, a detector or a distiller: anything that returns a dict of losses.

    Args:
        model: already on `device`; every parameter of it is trained.
        track: wraps the loop over batches, for a progress bar.

    Raises:
        TrainingError: the sum of the losses is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=budget.steps + 1, pct_start=WARM_UP
    )
    history, start = History(), time.perf_counter()
    torch.manual_seed(budget.seed)
    model.train()
    for pictures, targets in track(batches(images, budget)):
        losses = model(
            [picture.to(device) for picture in pictures],
            [{name: value.to(device) for name, value in target.items()} for target in targets],
        )
        total = sum(losses.values())
        if not torch.isfinite(total):
            raise TrainingError(f"the loss is {total.item()} after {len(history.losses)} steps; try another --seed")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        history.losses.append({name: value.item() for name, value in losses.items()})
    history.seconds = time.perf_counter() - start
    return history
