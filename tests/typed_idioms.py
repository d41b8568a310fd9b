# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportUnknownMemberType=false
"""How the package is called, for type checkers: `make lint` runs mypy --strict on it, pyright reads its first line.

Each `type: ignore` is a mistake that a checker has to find: one that finds nothing there says that it is unused.
"""

from collections.abc import Iterable

import numpy
import torch
from torch import Tensor, nn

from fbkd_ops import (
    PRESETS,
    Distiller,
    FBKDLoss,
    FeatureTap,
    LevelSettings,
    NonLocalBlock2d,
    functional,
    inherit,
    size_free_weights,
    sum_losses,
    use_backend,
)

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def train_as_in_the_readme(student: nn.Module, teacher: nn.Module, device: str, loader: Iterable[Batch]) -> None:
    teacher.load_state_dict(torch.load("teacher.pth"))  # any detector, already trained
    loss = FBKDLoss(256, num_levels=5, preset="two_stage").to(device)  # 256 channels, P2..P6
    distiller = Distiller(student, teacher, loss, student_layers="backbone", teacher_entry="backbone")
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)  # student and loss, not the teacher

    for images, targets in loader:
        losses = distiller(images, targets)  # the student's own dict, with four loss_fbkd_* terms more
        optimizer.zero_grad()
        sum_losses(losses).backward()
        optimizer.step()

    torch.save(distiller.student.state_dict(), "student.pth")  # none of the distiller's keys


def call_the_loss(student: list[Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = FBKDLoss([64, 128, 256], [192, 384, 576], memory_efficient=True)
    terms = loss(student, teacher)
    terms["loss_fbkd_feature"].item()
    sum_losses(terms).backward()
    sum_losses(list(terms.values())).backward()
    sum(terms.values()).backward()  # type: ignore[union-attr]
    return FBKDLoss.from_features(student, teacher, preset="one_stage", stride=1)(tuple(student), teacher)


def choose_settings() -> list[FBKDLoss]:
    losses = [FBKDLoss(256, num_levels=4, preset=preset) for preset in PRESETS]
    losses.append(FBKDLoss(256, num_levels=4, stride=1, relation_weight=[0, 1e-4, 1e-4, 1e-4]))
    losses.append(FBKDLoss(256, num_levels=2, stride=range(1, 3), mask_rule=("average", "joint"), inter_channels=64))
    losses.append(FBKDLoss(256, num_levels=2, feature_weight=numpy.ones(2), channel_weight=torch.ones(2)))
    losses.append(FBKDLoss(256, num_levels=5, normalize="mean", **size_free_weights("two_stage", num_levels=5)))
    return losses


def misspell(student: list[Tensor], teacher: list[Tensor]) -> None:
    FBKDLoss(256, preset="two_stages")  # type: ignore[arg-type]
    FBKDLoss(256, strides=1)  # type: ignore[call-arg]
    FBKDLoss(256, stride="1")  # type: ignore[arg-type]
    FBKDLoss(256, mask_rule="mean")  # type: ignore[arg-type]
    FBKDLoss(256, num_levels=2, mask_rule=["mean", "joint"])  # type: ignore[list-item]
    FBKDLoss.from_features(student, teacher, presets="paper")  # type: ignore[call-arg]
    size_free_weights("two_stages", num_levels=5)  # type: ignore[arg-type]
    use_backend("gpu")  # type: ignore[arg-type]
    NonLocalBlock2d(256, mode="dot")  # type: ignore[arg-type]
    functional.attention_mask(student[0], teacher[0], temperature=1.0, mask_rule="mean")  # type: ignore[arg-type]
    sum_losses(1)  # type: ignore[arg-type]


def distil(student: nn.Module, teacher: nn.Module, loss: FBKDLoss, images: Tensor) -> Tensor:
    with use_backend("reference"):
        pool = functional.attention_pool(images)
    with FeatureTap(student, ["layer3", "layer4"]) as tap:
        student(images)
    print(inherit(student, teacher, ["neck"]).copied, tap.features(), loss.levels[0].settings.stride)
    distiller = Distiller(student, teacher, loss, student_layers="neck", gradient_share=0.5, decay="cosine")
    Distiller(student, teacher, loss, student_layers="neck", decay="linear")  # type: ignore[arg-type]
    distiller.weight = 0.5
    print(distiller.balance_report(images), distiller.terms()["loss_fbkd_feature"], distiller.weights())
    settings: LevelSettings = loss.levels[0].settings
    return pool.spatial_attention * settings.feature_weight
