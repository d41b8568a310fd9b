"""The configuration: one tree of dataclasses, read from a YAML file and ``key=value`` arguments, checked once."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Task = Literal["teacher", "baseline", "distilled"]
Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v3_small", "mobilenet_v3_large"]

section = dataclass(config=ConfigDict(extra="forbid"), frozen=True, kw_only=True)


class ConfigError(Exception):
    """A configuration that cannot be used; each line of the message names a key, what came and what was expected."""


@section
class DataConfig:
    """Where the pictures are. Paths in ``train`` and ``val`` are below ``root``, as the format has them."""

    root: Path | None = None
    format: Literal["auto", "coco", "voc", "yolo"] = "auto"
    train: str = "train"  # names of the splits
    val: str = "val"
    train_images: Path | None = None  # a folder, where the format's own place is another
    train_annotations: Path | None = None
    val_images: Path | None = None
    val_annotations: Path | None = None
    unlabelled: Path | None = None  # a folder of pictures: a batch more in each step of `distilled`, of the terms alone
    classes: list[str] | None = None  # all that the training set has, by default
    background: bool = True  # whether pictures without a box are trained on, as background
    strict: bool = False  # stop at the first fault of the data
    min_size: Positive = 800  # of the shorter side; the longer one is at most max_size
    max_size: Positive = 1333
    workers: Count = 4  # processes that read pictures, for each training process


@section
class AugmentationConfig:
    """What is drawn anew for each picture in each epoch."""

    flip: Fraction = 0.5
    min_sizes: list[Positive] | None = None  # shorter sides to draw from; data.min_size by default
    scale: tuple[PositiveNumber, PositiveNumber] | None = None  # large-scale jitter: factors, then a crop of max_size
    photometric: Fraction = 0.0  # probability of each distortion of brightness, contrast, saturation and hue


@section
class ModelConfig:
    """One of torchvision's detectors."""

    detector: Literal["faster_rcnn", "retinanet", "fcos"] = "faster_rcnn"
    backbone: Backbone = "resnet50"
    weights: Path | None = None  # a state dict of this very detector
    backbone_weights: Path | None = None  # a state dict of torchvision's classifier of this name
    norm: Literal["batch", "frozen"] = "batch"  # of the backbone
    trainable_layers: Annotated[int, Field(ge=0, le=5)] = 5  # stages from the last one on; ResNets only
    width: Positive = 256  # channels of the pyramid
    anchor_sizes: list[Positive] | None = None  # one for each level; the detector's own by default
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # others of torchvision's class


@section
class DistillationConfig:
    """Arguments of the loss and, below ``loss``, of `Distiller`, by their own names."""

    preset: Literal["two_stage", "one_stage", "anchor_free", "mmrazor", "paper"] = "two_stage"
    # Overrides of the preset. ``type`` is the name of the loss: FBKDLoss, PKDLoss, CWDLoss, MGDLoss, FGDLoss, ...
    loss: dict[str, Any] = dataclasses.field(default_factory=dict)
    size_free: bool = False  # normalize="mean" with the weights of `size_free_weights`
    inherit: list[str] = dataclasses.field(default_factory=list)  # modules that start as the teacher's
    student_levels: list[str] | None = None  # keys of the pyramid; all by default
    teacher_levels: list[str] | None = None
    resize: bool = False
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None  # that of the student and autocast's, else
    teacher_device: str | None = None  # that of the student
    teacher_every: Positive = 1  # forwards from one with the teacher to the next; all without labels have it
    start_step: Count = 0  # steps are training forwards: with accumulation, several for each update
    stop_step: Count | None = None
    warmup_steps: Count = 0
    weight: Number = 1.0
    gradient_share: PositiveNumber | None = None
    share_every: Positive = 10
    share_steps: Positive | None = None


@section
class OptimizerConfig:
    """The optimizer, and what happens to gradients before it."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: PositiveNumber = 0.02
    momentum: Fraction = 0.9
    weight_decay: Number = 1e-4
    max_gradient_norm: PositiveNumber | None = None


@section
class ScheduleConfig:
    """The learning rate over the training."""

    epochs: Positive = 12
    kind: Literal["steps", "cosine", "constant"] = "steps"
    milestones: list[Positive] = dataclasses.field(default_factory=lambda: [8, 11])  # epochs after which it falls
    gamma: PositiveNumber = 0.1
    warmup_steps: Count = 500
    warmup_factor: Fraction = 0.001  # of the learning rate, at the first step


@section
class TrainingConfig:
    """How a step is made, and what is kept."""

    batch_size: Positive = 16  # pictures of an update, over all processes and accumulated batches
    accumulate: Positive = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    sync_batch_norm: bool = False
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    evaluate_every: Positive = 1  # epochs
    log_every: Positive = 10  # updates
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    deterministic: bool = False  # PyTorch's deterministic algorithms, for GPUs


@section
class Config:
    """Everything that a run depends on."""

    output: Path = Path("runs/train")
    tasks: Annotated[list[Task], Field(min_length=1)] = dataclasses.field(
        default_factory=lambda: ["teacher", "baseline", "distilled"]
    )
    seed: Count = 0
    device: str = "auto"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    student: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    teacher: ModelConfig = dataclasses.field(default_factory=lambda: ModelConfig(backbone="resnet101"))
    distillation: DistillationConfig = dataclasses.field(default_factory=DistillationConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)

    def teacher_weights(self) -> Path:
        """Return the file that the distilled student's teacher is loaded from."""
        trained = self.output / "teacher" / "model.pth"
        return trained if "teacher" in self.tasks else self.teacher.weights or trained


_CONFIG = TypeAdapter(Config)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file, with ``key=value`` arguments on top.

    Args:
        path: None for the defaults.
        overrides: as ``"data.root=/data/coco"``; a value is read as YAML.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, a value of another type or out of its range, values
            that do not go together.
    """
    values = _read_yaml(path) if path else {}
    for override in overrides:
        _apply_override(values, override)
    try:
        config = _CONFIG.validate_python(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None
    faults = list(_contradictions(config))
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def as_values(config: Config) -> dict[str, Any]:
    """Return the configuration as YAML and checkpoints hold it: dicts, lists, text and numbers."""
    return _CONFIG.dump_python(config, mode="json")


def as_yaml(config: Config) -> str:
    return yaml.safe_dump(as_values(config), sort_keys=False, allow_unicode=True)


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield ``key: earlier -> now`` for each value that differs between two results of `as_values`."""
    for name in dict.fromkeys([*earlier, *now]):
        before, after = earlier.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}: {before!r} -> {after!r}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got a {type(values).__name__}, expected keys such as 'data:'")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Put ``a.b=value`` into the nested dicts ``values``."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"got the argument {override!r}, expected key=value, as data.root=/data/coco")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: got {text!r}, which is no YAML: {' '.join(str(error).split())}") from None
    *sections, name = key.split(".")
    for part in sections:
        inner = values.setdefault(part, {})
        if inner is None:
            inner = values[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {part!r} is the value {inner!r} in the file, expected a section")
        values = inner
    values[name] = value


def _explain(fault: Any) -> str:
    """One line on a fault that pydantic has found."""
    location = [part for part in fault["loc"] if part != "function-after"]
    key = ".".join(map(str, location))
    if fault["type"] == "unexpected_keyword_argument":
        known = _keys_at(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{key}: unknown key; {hint}the keys here are {', '.join(known)}"
    expected = fault["msg"].removeprefix("Input should be ")
    return f"{key}: got {fault['input']!r}, expected {expected}"


def _keys_at(location: Sequence[Any]) -> list[str]:
    kind: Any = Config()
    for part in location:
        kind = getattr(kind, str(part))
    return [field.name for field in dataclasses.fields(kind)]


def _contradictions(config: Config) -> Iterator[str]:
    """Yield what no single value is wrong about."""
    data, schedule, training = config.data, config.schedule, config.training
    if data.root is None:
        yield "data.root: got nothing, expected the folder of the data, as data.root=/data/coco"
    if data.max_size < data.min_size:
        yield f"data.max_size: got {data.max_size}, expected at least data.min_size ({data.min_size})"
    if config.augmentation.scale and config.augmentation.min_sizes:
        yield "augmentation.scale: expected null beside augmentation.min_sizes, each sets the size of a picture"
    if config.augmentation.scale and config.augmentation.scale[0] > config.augmentation.scale[1]:
        yield f"augmentation.scale: got {list(config.augmentation.scale)}, expected the smaller factor first"
    if schedule.kind == "steps" and any(epoch >= schedule.epochs for epoch in schedule.milestones):
        yield (
            f"schedule.milestones: got {schedule.milestones}, expected epochs below schedule.epochs ({schedule.epochs})"
        )
    if training.batch_size % training.accumulate:
        yield (
            f"training.accumulate: got {training.accumulate}, expected a divisor of training.batch_size "
            f"({training.batch_size})"
        )
    distillation = config.distillation
    if distillation.stop_step is not None and distillation.stop_step < distillation.start_step:
        yield (
            f"distillation.stop_step: got {distillation.stop_step}, expected null or at least start_step "
            f"({distillation.start_step})"
        )
    yield from _device_faults(config.device)
    yield from _model_faults(config)


def _model_faults(config: Config) -> Iterator[str]:
    tasks = set(config.tasks)
    used = {"teacher": config.teacher} if "teacher" in tasks else {}
    if tasks & {"baseline", "distilled"}:
        used["student"] = config.student
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        if model.detector == "fcos" and model.width % 32:
            yield f"{name}.width: got {model.width}, expected a multiple of 32: FCOS's heads have norms of 32 groups"
    for name, model in used.items():
        if model.norm == "frozen" and not (model.weights or model.backbone_weights):
            yield (
                f"{name}.norm: got 'frozen' without weights, expected 'batch', or {name}.backbone_weights=PATH: fixed "
                "statistics of untrained layers say nothing"
            )
    if "distilled" not in tasks:
        return
    if "teacher" not in tasks and config.teacher.weights is None and not config.teacher_weights().exists():
        yield (
            "teacher.weights: got null, expected the trained teacher's model file; without it "
            f"{config.teacher_weights()} is taken, which does not exist: train it with tasks=[teacher]"
        )
    strides = {config.student.detector == "faster_rcnn", config.teacher.detector == "faster_rcnn"}
    if len(strides) > 1:
        yield (
            f"teacher.detector: got {config.teacher.detector!r} for a student {config.student.detector!r}, expected "
            "pyramids of the same strides: faster_rcnn on both sides (P2..P6), or retinanet and fcos (P3..P7)"
        )


def _device_faults(device: str) -> Iterator[str]:
    if device == "auto":
        return
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        yield f"device: got {device!r}, expected auto, cpu, cuda, cuda:1, ...: {str(error).splitlines()[0]}"


def missing_files(config: Config) -> list[str]:
    """Return a line for each file of weights that the configuration names and that is not there."""
    named = {
        f"{name}.{kind}": getattr(model, kind)
        for name, model in (("student", config.student), ("teacher", config.teacher))
        for kind in ("weights", "backbone_weights")
    }
    return [
        f"{key}: got {path}, expected an existing file" for key, path in named.items() if path and not path.is_file()
    ]
