"""The training of one task: updates, epochs, checkpoints, and how it goes on after an interruption."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fbkd_ops import Distiller, distributed

from .checkpoints import Checkpoints, DiskError, random_states, restore_random_states, write_atomically
from .config import Config, ConfigError, ScheduleConfig, as_values, as_yaml, differences
from .data import Batch, Sets, TrainingLoader, TrainingSet, ValidationSet, validation_loader
from .evaluation import evaluate
from .log import RunLog
from .models import build_task_model
from .processes import Processes

WITHOUT_LABELS = "_unlabelled"  # ends the names of terms of such pictures
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Keys whose change leaves a resumed run as it was.
HARMLESS = ("output:", "tasks:", "data.root:", "data.workers:", "training.keep_checkpoints:", "training.log_every:")

# What the optimizer's checkpoint brings back, whatever the configuration says.
FIXED = tuple(f"optimizer.{name}:" for name in ("name", "learning_rate", "momentum", "weight_decay"))


class TrainingError(Exception):
    """A training that cannot go on."""


@dataclass
class Result:
    """What is left of a task: its folder, and how many files could not be written."""

    folder: Path
    failures: int


def learning_rate_factor(update: int, schedule: ScheduleConfig, updates: int) -> float:
    """Return what the learning rate is multiplied with at an update, counted from 0, of ``updates`` an epoch."""
    warm = 1.0
    if update < schedule.warmup_steps:
        warm = schedule.warmup_factor + (1 - schedule.warmup_factor) * update / schedule.warmup_steps
    if schedule.kind == "cosine":
        return warm * (1 + math.cos(math.pi * update / (schedule.epochs * updates))) / 2
    if schedule.kind == "steps":
        return warm * schedule.gamma ** sum(update >= epoch * updates for epoch in schedule.milestones)
    return warm


def seed_everything(*numbers: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_task(
    task: str, config: Config, sets: Sets, processes: Processes, console: Console, resume: bool = False
) -> Result:
    """Train one of ``config.tasks`` in its folder of ``config.output``, to the end.

    Args:
        resume: go on from the newest checkpoint; from the beginning where there is none.

    Raises:
        ConfigError: weights that do not fit, or a folder with another run in it.
        TrainingError: a loss that is not finite.
    """
    training = Training(task, config, sets, processes, console)
    try:
        training.begin(resume)
        while training.epoch < config.schedule.epochs:
            training.run_epoch()
        training.report_end()
    finally:
        training.log.close()
    return Result(training.folder, training.log.failures)


class Training:
    """Everything that changes while a task is trained."""

    def __init__(self, task: str, config: Config, sets: Sets, processes: Processes, console: Console):
        self.task, self.config, self.classes, self.processes = task, config, sets.classes, processes
        self.folder = config.output / task
        self.log = RunLog(self.folder, console, processes.is_main)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.training.keep_checkpoints)
        seed_everything(config.seed)
        self.module, self.detector, self.remarks = build_task_model(task, config, sets.classes)
        self._prepare_model()
        self.loader = TrainingLoader(TrainingSet(sets.train, config), config, processes)
        self.unlabelled: TrainingLoader | None = None
        if sets.unlabelled is not None and isinstance(self.module, Distiller):
            self.unlabelled = TrainingLoader(TrainingSet(sets.unlabelled, config), config, processes)
        self.validation = validation_loader(ValidationSet(sets.val, config), config, processes)
        self.optimizer = _build_optimizer(self.module, config)
        self.schedule = LambdaLR(
            self.optimizer, lambda update: learning_rate_factor(update, config.schedule, self.loader.updates)
        )
        is_half = config.training.precision == "float16"
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=is_half)
        self.epoch, self.update, self.best = 0, 0, -1.0

    def _prepare_model(self) -> None:
        training, device = self.config.training, self.processes.device
        torch.use_deterministic_algorithms(training.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not training.deterministic
        is_parallel = self.processes.size > 1
        if training.sync_batch_norm and is_parallel:
            if device.type != "cuda":
                raise ConfigError("training.sync_batch_norm: got true on CPUs, expected false: PyTorch's needs GPUs")
            nn.SyncBatchNorm.convert_sync_batchnorm(self.detector)
        self.module.to(device)
        self.ema: AveragedModel | None = None
        if training.ema_decay is not None:
            average = get_ema_multi_avg_fn(training.ema_decay)
            self.ema = AveragedModel(self.detector, multi_avg_fn=average, use_buffers=True)
        is_distilled = isinstance(self.module, Distiller)
        # `sync_batch_norm` is about the blocks of the loss; the detector's norms have been converted above.
        self.parallel = distributed.data_parallel(
            self.module, sync_batch_norm=training.sync_batch_norm and is_distilled
        )

    @property
    def scored(self) -> nn.Module:
        """The detector that is evaluated and saved."""
        return self.ema.module if self.ema is not None else self.detector

    # The beginning

    def begin(self, resume: bool) -> None:
        """Make the run's folder, and take over the newest checkpoint where ``resume`` asks for it."""
        path, state, broken = self.checkpoints.load() if resume else (None, {}, [])
        if not resume and self.checkpoints.files():
            raise ConfigError(
                f"{self.folder} has the checkpoints of a run: go on with --resume, or choose another output=FOLDER"
            )
        seed_everything(self.config.seed, self.processes.rank)
        for line in broken:
            self.log.say(f"warning: {line}; taking the one before")
        if path is not None:
            self._restore(path, state)
        self._write_config()
        self.log.begin(self.epoch, self.update)
        loader, pictures = self.loader, self.loader.pictures
        parameters = sum(each.numel() for each in self.detector.parameters() if each.requires_grad)
        left_out = 0 if self.config.data.background else pictures.backgrounds
        used = loader.updates * self.config.training.batch_size
        self.log.say(
            f"{self.task}: {parameters:,} parameters; {len(pictures)} training pictures, of which an epoch draws "
            f"{used} in {loader.updates} updates; {pictures.backgrounds - left_out} pictures without a box are "
            f"background, {left_out} are left out"
        )
        if self.unlabelled is not None:
            self.log.say(f"each step has a batch of {len(self.unlabelled.pictures)} pictures without labels besides")
        for remark in self.remarks if path is None else ():
            self.log.say(remark)
        if resume:
            start = f"from {path}" if path is not None else "from the beginning: there is no checkpoint"
            self.log.say(f"resumed {start}, {self.epoch} of {self.config.schedule.epochs} epochs are done")

    def _write_config(self) -> None:
        if not self.processes.is_main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(as_yaml(self.config), encoding="utf-8")
            (self.folder / "classes.txt").write_text("".join(f"{name}\n" for name in self.classes), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output: cannot write to {self.folder}: {error.strerror}") from None

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        if state["classes"] != list(self.classes):
            raise ConfigError(
                f"{path} is a run on {len(state['classes'])} classes ({', '.join(state['classes'][:5])}, ...), but the "
                f"data has {len(self.classes)} ({', '.join(self.classes[:5])}, ...)"
            )
        for line in differences(state["config"], as_values(self.config)):
            if line.startswith(FIXED):
                raise ConfigError(f"{line}: a resumed run keeps its optimizer; start anew in another output=FOLDER")
            if not line.startswith(HARMLESS):
                self.log.say(f"warning: other than in the run so far: {line}")
        try:
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} does not fit this configuration: {' '.join(str(error).split())[:500]}") from None
        self.epoch, self.update, self.best = state["epoch"], state["update"], state["best"]
        self.log.unreadable.update(state["unreadable"])
        if len(state["random"]) == self.processes.size:
            restore_random_states(state["random"][self.processes.rank], self.processes.device)
        else:
            seed_everything(self.config.seed, self.processes.rank, self.epoch)
            self.log.say(
                f"warning: the run had {len(state['random'])} processes and has {self.processes.size} now: it goes on, "
                "with other random numbers"
            )

    # An epoch

    def run_epoch(self) -> None:
        """Train an epoch, then evaluate and save."""
        start, updates = time.perf_counter(), self.loader.updates
        number, last = self.epoch + 1, self.config.schedule.epochs
        self.module.train()
        batches = self._batches()
        with self.log.progress(f"{self.task} {number}/{last}", updates) as advance:
            for _ in range(updates):
                loss = self._run_update(batches, number)
                advance(f"loss {loss:.3f}")
        self.epoch = number
        seconds = time.perf_counter() - start
        text = f"{self.task} epoch {number}/{last}: loss {loss:.4f}, {seconds:.0f} s"
        if number % self.config.training.evaluate_every == 0 or number == last:
            text += self._evaluate()
        self.log.say(text)
        self._save()

    def _batches(self) -> Iterator[tuple[Batch, Batch | None]]:
        """Return the epoch's batches, each with one without labels where there are such pictures."""
        batches = self.loader.epoch(self.epoch)
        if self.unlabelled is None:
            return ((batch, None) for batch in batches)
        count = self.loader.updates * self.config.training.accumulate
        return zip(batches, self.unlabelled.endless(self.epoch, count), strict=True)

    def _run_update(self, batches: Iterator[tuple[Batch, Batch | None]], epoch: int) -> float:
        """Make one step of the optimizer, of ``accumulate`` batches; return the loss."""
        settings, accumulate = self.config, self.config.training.accumulate
        sums: dict[str, float] = {}
        for index in range(accumulate):
            batch, other = next(batches)
            for each in (batch, other):
                self.log.report_unreadable(each.unreadable if each is not None else [], "training")
            is_last = index == accumulate - 1
            for name, value in self._run_batch(batch, other, is_last).items():
                sums[name] = sums.get(name, 0.0) + value / accumulate
        self.scaler.unscale_(self.optimizer)
        norm = self._clip_gradients()
        rate = self.schedule.get_last_lr()[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.detector)
        self.update += 1
        total = sum(sums.values())
        if self.update % settings.training.log_every == 0 or self.update % self.loader.updates == 0:
            row: dict[str, Any] = {"epoch": epoch, "step": self.update, "learning_rate": rate, "loss": total, **sums}
            if settings.optimizer.max_gradient_norm is not None:
                row["gradient_norm"] = norm
            if isinstance(self.module, Distiller):
                row |= {name: value.item() for name, value in self.module.weights().items()}
            self.log.step(row)
        return total

    def _run_batch(self, batch: Batch, other: Batch | None, is_last: bool) -> dict[str, float]:
        """Add the gradients of a batch, and of one without labels; return its losses, means over all processes."""
        training, device = self.config.training, self.processes.device
        moved = [each.to(device) for each in (batch, other) if each is not None]
        waits = contextlib.nullcontext()
        if not is_last and self.parallel is not self.module:
            waits = self.parallel.no_sync()
        with waits:
            precision = PRECISIONS[training.precision]
            with torch.autocast(device.type, precision, enabled=training.precision != "float32"):
                losses = self._forward(*moved)
                total = sum(losses.values())
            own = torch.stack([loss.detach().float() for loss in losses.values()])
            values = dict(zip(losses, self.processes.mean(own.clone()).tolist(), strict=True))
            self._check_losses(values, own.tolist(), batch, other)
            self.scaler.scale(total / training.accumulate).backward()
        return values

    def _forward(self, batch: Batch, other: Batch | None = None) -> dict[str, torch.Tensor]:
        try:
            losses = self.parallel(batch.images, batch.targets)
            if other is None:
                return losses
            with self.module.unlabelled():
                terms = self.parallel(other.images, other.targets)
            return losses | {f"{name}{WITHOUT_LABELS}": term for name, term in terms.items()}
        except ValueError as error:  # maps that differ in size, a norm of a single value, ...
            raise TrainingError(f"{self.task}, step {self.update + 1}: {error}") from error

    def _check_losses(self, values: Mapping[str, float], own: list[float], batch: Batch, other: Batch | None) -> None:
        """Stop where a term is not finite on any process; each whose own is not leaves its batch in the folder."""
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            return
        if other is not None and all(name.endswith(WITHOUT_LABELS) for name in wrong):
            batch = other
        place = ""
        if not all(map(math.isfinite, own)):
            folder = self.folder / f"not-finite-step-{self.update + 1}-process-{self.processes.rank}"
            place = save_batch(folder, batch, dict(zip(values, own, strict=True)))
        places = [each for each in self.processes.gather(place) if each]
        raise TrainingError(
            f"{self.task}: {', '.join(f'{name} is {values[name]}' for name in wrong)} in step {self.update + 1} (epoch "
            f"{self.epoch + 1}); {'; '.join(places)}. A smaller optimizer.learning_rate, a longer "
            "schedule.warmup_steps or optimizer.max_gradient_norm may help; --resume goes on from the last epoch"
        )

    def _clip_gradients(self) -> float:
        most = self.config.optimizer.max_gradient_norm
        if most is None:
            return 0.0
        return nn.utils.clip_grad_norm_(self.module.parameters(), most).item()

    # Its end

    def _evaluate(self) -> str:
        found = evaluate(
            self.scored,
            self.validation,
            len(self.classes),
            self.processes,
            lambda batches: self.log.track(f"{self.task} validation", batches),
        )
        if found is None:
            return ""
        self.log.report_unreadable(found.unreadable, "validation")
        row = found.row(self.classes)
        self.log.score({"epoch": self.epoch, "step": self.update, "unreadable": len(found.unreadable), **row})
        if found.score.ap > self.best:
            self.best = found.score.ap
            self._write_model("best.pth")
        return f", AP {found.score.ap:.4f}, AP50 {found.score.ap50:.4f}"

    def _save(self) -> None:
        """Write the epoch's checkpoint and the model file; where that fails the earlier ones stay, and it is said."""
        states = self.processes.gather(random_states(self.processes.device))
        if not self.processes.is_main:
            return
        try:
            self.checkpoints.save(self._state(states))
        except DiskError as error:
            kept = self.checkpoints.files()
            last = f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"
            self.log.fail(DiskError(f"{error}; {last}"))
        self._write_model("model.pth")

    def _state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "update": self.update,
            "best": self.best,
            "classes": list(self.classes),
            "config": as_values(self.config),
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "random": states,
            "unreadable": dict(self.log.unreadable),
        }

    def _write_model(self, name: str) -> None:
        """Write the plain state dict of the detector, which torchvision alone can load."""
        try:
            write_atomically(self.folder / name, {key: value.cpu() for key, value in self.scored.state_dict().items()})
        except DiskError as error:
            self.log.fail(error)

    def report_end(self) -> None:
        """Say what was left out on the way, and wait until every process is done."""
        log = self.log
        if log.unreadable:
            log.say(f"{self.task}: {len(log.unreadable)} pictures could not be used: {self.folder / 'unreadable.txt'}")
        if log.failures:
            log.say(f"{self.task}: {log.failures} times a file could not be written, see the warnings above")
        self.processes.wait()


def save_batch(folder: Path, batch: Batch, losses: Mapping[str, float]) -> str:
    """Copy a batch's picture files and what the detector was given into ``folder``; say where they are."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(batch.files):
            shutil.copy(file, folder / f"{number}-{Path(file).name}")
        tensors = {"images": batch.images, "targets": batch.targets, "files": batch.files}
        write_atomically(folder / "batch.pth", tensors)
        (folder / "losses.json").write_text(json.dumps({"losses": dict(losses), "files": batch.files}, indent=1))
    except (OSError, DiskError) as error:
        return f"the batch could not be saved ({error}), its files are {', '.join(batch.files)}"
    return f"the batch is in {folder}"


def _build_optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    settings = config.optimizer
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    shared = dict(lr=settings.learning_rate, weight_decay=settings.weight_decay)
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, **shared)
    return torch.optim.SGD(parameters, momentum=settings.momentum, **shared)
