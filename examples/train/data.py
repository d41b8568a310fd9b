"""The two sets of pictures as a training needs them: augmented for the steps, plain for the score."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.data.distributed import DistributedSampler

from examples.datasets import DataError, DetectionSet, Findings, read_set, read_unlabelled

from .config import Config, ConfigError, DataConfig
from .processes import Processes
from .transforms import augmented, build_augmentation, drawn_from


class Batch(NamedTuple):
    """Pictures of one forward pass; those that could not be read have been replaced by others."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    files: list[str]
    unreadable: list[str]  # one line for each file

    def to(self, device: torch.device) -> Batch:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        targets = [{name: move(value) for name, value in target.items()} for target in self.targets]
        return self._replace(images=[move(image) for image in self.images], targets=targets)


@dataclass
class Sets:
    """Both sets over the same classes, pictures without labels if wanted, and what was wrong with their files."""

    train: DetectionSet
    val: DetectionSet
    findings: dict[str, Findings]
    unlabelled: DetectionSet | None = None

    def by_name(self) -> dict[str, DetectionSet]:
        """Return the sets under the names that their findings have."""
        sets = {"train": self.train, "val": self.val, "unlabelled": self.unlabelled}
        return {name: each for name, each in sets.items() if each is not None}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


def read_sets(data: DataConfig) -> Sets:
    """Read both splits; the validation set has the classes of the training set.

    Raises:
        DataError: a folder or file that cannot be read; with ``strict``, the first fault.
    """
    findings = {name: Findings(strict=data.strict) for name in ("train", "val", "unlabelled")}
    train = _read_split(data, "train", data.classes, findings["train"])
    val = _read_split(data, "val", train.classes, findings["val"])
    unlabelled = None
    if data.unlabelled is not None:
        unlabelled = read_unlabelled(data.unlabelled, findings=findings["unlabelled"])
    return Sets(train, val, findings, unlabelled)


def _read_split(data: DataConfig, split: str, classes: Sequence[str] | None, findings: Findings) -> DetectionSet:
    return read_set(
        data.root,
        getattr(data, split),
        format=data.format,
        images=getattr(data, f"{split}_images"),
        annotations=getattr(data, f"{split}_annotations"),
        classes=classes,
        findings=findings,
    )


class TrainingSet(Dataset[Any]):
    """Augmented samples ``(image, target, file, unreadable)`` that depend on the seed, the epoch and the index alone.

    Crowd boxes are left out. A picture that cannot be read is replaced by the next one that can.

    Attributes:
        epoch: what is drawn for a sample depends on it; set before a loader's workers start.
        backgrounds: how many pictures have no box, or none but crowds.
    """

    def __init__(self, pictures: DetectionSet, config: Config):
        self.pictures, self.epoch = pictures, 0
        self.seed, self.max_size = config.seed, config.data.max_size
        self.augmentation = build_augmentation(config.augmentation, config.data)
        empty = [bool(each.crowd.all()) for each in pictures.pictures]
        self.backgrounds = sum(empty)
        keeps_all = config.data.background or not pictures.classes  # as those without labels
        self.indices = [index for index, is_empty in enumerate(empty) if keeps_all or not is_empty]
        if not self.indices:
            raise DataError("no picture of the training set has a box, and data.background is false")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor], str, list[str]]:
        unreadable: list[str] = []
        for offset in range(len(self)):
            index = self.indices[(position + offset) % len(self)]
            path = str(self.pictures.pictures[index].path)
            try:
                image, target = self.pictures[index]
                _check_sides(image, self.max_size)
            except (DataError, OSError) as error:
                unreadable.append(_one_line(path, error))
                continue
            with drawn_from(self.seed, self.epoch, index):
                kept = target["iscrowd"] == 0
                image, boxes, labels = augmented(
                    self.augmentation, image, target["boxes"][kept], target["labels"][kept]
                )
            return image, {"boxes": boxes, "labels": labels}, path, unreadable
        raise DataError(f"none of the {len(self)} training pictures can be read; the first: {unreadable[0]}")


class ValidationSet(Dataset[Any]):
    """Plain samples ``(image, target)``, an image of floats in 0..1; a line of text for what cannot be read."""

    def __init__(self, pictures: DetectionSet, config: Config):
        self.pictures, self.max_size = pictures, config.data.max_size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]] | str:
        try:
            image, target = self.pictures[index]
            _check_sides(image, self.max_size)
        except (DataError, OSError) as error:
            return _one_line(str(self.pictures.pictures[index].path), error)
        return image.float() / 255, target


def _check_sides(image: Tensor, max_size: int) -> None:
    """Refuse what would be no pixel high once its longer side is ``max_size``."""
    height, width = image.shape[-2:]
    if min(height, width) * max_size < max(height, width):
        raise DataError(f"{width}x{height} pixels are too thin for data.max_size={max_size}")


def _one_line(path: str, error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if Path(path).name in text else f"{path}: {text}"


def collate(samples: list[tuple[Tensor, dict[str, Tensor], str, list[str]]]) -> Batch:
    images, targets, files, unreadable = zip(*samples, strict=True)
    return Batch(list(images), list(targets), list(files), [line for lines in unreadable for line in lines])


class TrainingLoader:
    """The batches of an epoch, for one of the processes."""

    def __init__(self, pictures: TrainingSet, config: Config, processes: Processes):
        training = config.training
        per_update = processes.size * training.accumulate
        if training.batch_size % per_update:
            raise ConfigError(
                f"training.batch_size: got {training.batch_size}, expected a multiple of processes times "
                f"training.accumulate ({processes.size} * {training.accumulate})"
            )
        if len(pictures) < training.batch_size:
            which = "training pictures" if pictures.pictures.classes else "pictures in data.unlabelled"
            raise ConfigError(
                f"training.batch_size: got {training.batch_size}, expected at most the number of {which} "
                f"({len(pictures)})"
            )
        self.pictures, self.accumulate = pictures, training.accumulate
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            pictures, processes.size, processes.rank, shuffle=True, seed=config.seed, drop_last=True
        )
        self._loader = DataLoader(
            pictures,
            training.batch_size // per_update,
            sampler=self.sampler,
            num_workers=config.data.workers,
            collate_fn=collate,
            pin_memory=processes.device.type == "cuda",
            drop_last=True,
        )
        self.updates = len(self._loader) // training.accumulate

    def epoch(self, number: int) -> Iterator[Batch]:
        """Return an iterator over the batches of epoch ``number``: ``updates * accumulate`` of them."""
        return itertools.islice(self._pass(number), self.updates * self.accumulate)

    def endless(self, epoch: int, count: int) -> Iterator[Batch]:
        """Return ``count`` batches for an epoch of another set, from as many passes over this one as that takes."""
        passes = -(-count // len(self._loader))
        batches = itertools.chain.from_iterable(map(self._pass, itertools.count(epoch * passes)))
        return itertools.islice(batches, count)

    def _pass(self, number: int) -> Iterator[Batch]:
        self.pictures.epoch = number
        self.sampler.set_epoch(number)
        return iter(self._loader)


def validation_loader(pictures: ValidationSet, config: Config, processes: Processes) -> DataLoader[Any]:
    """Return lists of ``(index, sample)`` of every ``processes.size``-th picture, none twice."""
    indices = range(processes.rank, len(pictures), processes.size)
    per_forward = max(config.training.batch_size // (processes.size * config.training.accumulate), 1)
    return DataLoader(
        Subset(_Numbered(pictures), indices),
        per_forward,
        num_workers=config.data.workers,
        collate_fn=list,
    )


class _Numbered(Dataset[Any]):
    def __init__(self, pictures: ValidationSet):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.pictures[index]
