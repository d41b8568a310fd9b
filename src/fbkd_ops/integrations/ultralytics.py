"""FBKD in Ultralytics' own trainer, for its YOLO detectors."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.engine.model import Model
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import RANK

from .._validation import check_number
from .._warnings import TeacherWatch
from ..losses.feature_loss import FeatureLoss
from ..training.feature_tap import FeatureTap, Layer, unwrapped
from ..training.gradient_share import GradientShare, checked_settings
from ..training.pairing import check_apart
from ..training.schedule import Decay, Schedule
from ..training.targets import boxes_of_call
from ..training.teacher_scores import of_ultralytics, scores_of
from ..types import present
from ._arguments import loss_settings
from ._blank_images import blank_image_features, image_channels

__all__ = ["FBKDTrainer"]

WEIGHTS = "fbkd.pt"
STEP, SHARE = "schedule.step", "gradient_share."  # in that file, beside the loss's own names
STUDENT_HEADS = ("Detect", "v10Detect")  # others have losses, or inputs, that a DetectionTrainer does not know

Teacher = str | Path | nn.Module


def _maps(inputs: Any) -> Any:
    """Return the maps among a head's inputs: open-vocabulary heads are given text besides or, YOLOE's, behind them."""
    if isinstance(inputs, Tensor):
        return inputs
    maps = inputs[0] if isinstance(inputs[0], (list, tuple)) else inputs
    return [each for each in maps if each.dim() == 4]


HEAD_INPUTS = Layer("model.-1", inputs=True, select=_maps)


class FBKDTrainer(DetectionTrainer):
    """Ultralytics' trainer of detectors with the FBKD terms between the maps that the two heads are given.

    The terms join the student's losses in each training batch, times the batch's size as those are, and stand beside
    them in the progress line and in ``results.csv`` (where ``val/`` columns of theirs, if the version has such, are 0).
    The learned layers of the loss are in the optimizer but, unlike the student's, not in Ultralytics' gradient
    clipping. They are saved as ``weights/fbkd.pt`` beside the checkpoints, which stay those of the student alone and
    load without this package, with the step and the measured share where there is a schedule or a share; a resumed run
    reads them, as does Ultralytics' recovery from a loss that is NaN.

    Under ``amp`` distances and sums are computed in float32. A gradient that overflows makes the trainer's
    ``GradScaler`` skip the step for the student and the loss alike.

    Args:
        teacher: a checkpoint (``"yolo11m.pt"``), a YAML, one of Ultralytics' models (``YOLO``, ``RTDETR``,
            ``YOLOWorld``, ...) or the module in it. It is frozen. Its head, of whatever class, is given as many maps
            as the student's, of the same sizes and of any widths. A teacher of colour images sees grey ones in three
            equal channels.
        loss: arguments of :class:`fbkd_ops.FBKDLoss`, or of another loss whose name is the ``type`` among them
            (``"PKDLoss"``); ``preset="one_stage"`` by default. The widths are read off a blank image.
        weight, gradient_share, share_every, share_steps: as of :class:`fbkd_ops.Distiller`.
        start_step, stop_step, warmup_steps, decay, total_steps: the same; a step is a training batch, and
            ``total_steps`` is by default that of all epochs. With a schedule or a share the columns ``weight`` (what
            the terms were multiplied with) and ``share`` stand behind those of the terms.
        *args, **arguments: what ``DetectionTrainer`` takes.

    Attributes:
        teacher: the teacher's model, once training started.
        fbkd: the loss, once training started.

    Raises:
        NotImplementedError: several devices; the trainer's worker processes would know of no teacher.
        TypeError: a teacher of another type, an exported one, one whose last module is no head; a student whose head is
            no ``Detect``.
        ValueError: another task than detection, Ultralytics' own ``distill_model=`` besides, a teacher of other maps
            or of images with other channels, or one that shares parameters with the student.
        FileNotFoundError: a run to be resumed whose ``fbkd.pt`` is gone.

    Warns:
        UserWarning: a teacher from a YAML, which has no trained weights.
        UntrainedTeacherWarning: a model none of whose BatchNorms has seen an image.

    Example:
        >>> trainer = functools.partial(FBKDTrainer, teacher="yolo11m.pt")
        >>> YOLO("yolo11n.pt").train(trainer=trainer, data="coco8.yaml")

    Seen to train with Ultralytics 8.3.40 to 8.4.190; not yet measured on a GPU.
    """

    model: Any  # Ultralytics' own: a path, and the module in its place once training started
    teacher: nn.Module
    fbkd: FeatureLoss

    def __init__(
        self,
        *args: Any,
        teacher: Teacher,
        loss: dict[str, Any] | None = None,
        weight: float = 1.0,
        gradient_share: float | None = None,
        share_every: int = 10,
        share_steps: int | None = None,
        start_step: int = 0,
        stop_step: int | float | None = None,
        warmup_steps: int = 0,
        decay: Decay | None = None,
        total_steps: int | None = None,
        **arguments: Any,
    ):
        if not isinstance(teacher, (str, Path, nn.Module)):
            raise TypeError(f"teacher must be a checkpoint, a YAML, a YOLO or its model, got {type(teacher).__name__}")
        if _is_yaml(teacher):
            warnings.warn(
                f"the teacher is built from {teacher}, without trained weights, so the student would learn from a "
                "random one: give a checkpoint, or a model that has its weights"
            )
        self._given_teacher, self.loss_settings = teacher, loss_settings(loss, preset="one_stage")
        self.weight = check_number(weight, "a finite number >= 0", lambda value: value >= 0, "weight")
        self.schedule = Schedule(start_step, stop_step, warmup_steps, decay, total_steps).checked()
        self._share_settings = checked_settings(gradient_share, share_every, share_steps)
        self.share: GradientShare | None = None
        self._step: int | None = None  # of the schedule, counted in training batches; unknown before the training
        self._logged_weights: dict[str, Tensor] = {}
        self._student_tap: FeatureTap | None = None
        self._listening = contextlib.ExitStack()
        self._criterion: Any = None
        overrides = arguments.get("overrides", args[1] if len(args) > 1 else None)
        _check_arguments(overrides or {})  # here, as Ultralytics refuses several devices and loads data by the task
        super().__init__(*args, **arguments)
        _check_arguments(vars(self.args))

    def get_model(self, cfg: Any = None, *args: Any, **arguments: Any) -> nn.Module:
        head = (cfg if isinstance(cfg, dict) else yaml_model_load(cfg))["head"][-1][2]
        if head not in STUDENT_HEADS:
            raise TypeError(f"student: the last module must be a Detect head, got {head}")
        return super().get_model(cfg, *args, **arguments)

    def setup_model(self) -> Any:
        checkpoint = super().setup_model()
        self.teacher = _model_of(self._given_teacher).float().eval().requires_grad_(False).to(self.device)
        check_apart(unwrapped(self.model), unwrapped(self.teacher))
        if not _is_yaml(self._given_teacher):  # which is warned of already
            TeacherWatch().see(self.teacher, lambda: None)
        self._teacher_channels = _checked_channels(self.teacher, self.model)
        widths = _widths(self.model, self.teacher)
        kind, given = self.loss_settings
        self.fbkd = kind(**(widths | given)).to(self.device)
        if self._share_settings is not None:
            self.share = GradientShare(self._share_settings, 1, self.device)
        if self.resume:
            self._load_loss(Path(self.args.model).with_name(WEIGHTS))
        self._teacher_tap = FeatureTap(self.teacher, HEAD_INPUTS, name="teacher", stop_when_complete=True)
        self._teacher_tap.close()
        return checkpoint

    def build_optimizer(self, model: nn.Module, *args: Any, **arguments: Any) -> torch.optim.Optimizer:
        """One for the student, under the names that Ultralytics knows its layers by, and the loss."""
        both = nn.Module()
        both.model, both.fbkd = unwrapped(model).model, self.fbkd
        return super().build_optimizer(both, *args, **arguments)

    def run_callbacks(self, event: str) -> None:
        if event == "on_train_start":
            batches = len(self.train_loader)
            if self._step is None:
                self._step = self.start_epoch * batches
            if self.schedule.needs_length():
                self.schedule = self.schedule._replace(total_steps=self.epochs * batches).checked()
            if self.loss_names:  # else the trainer takes them from the first losses
                self.loss_names = (*self.loss_names, *self._own_columns())
        elif event == "on_train_batch_start":
            self._listen()
        super().run_callbacks(event)

    def train(self) -> Any:
        try:
            return super().train()
        finally:
            self._stop_listening()

    def validate(self) -> Any:
        # Losses in a tensor are added up in one of the same shape, and a validator has those of the student.
        if isinstance(self.loss_items, Tensor):
            self.loss_items = self.loss_items[: -len(self._own_columns())]
        return super().validate()

    def save_model(self) -> Any:
        saved = super().save_model()
        torch.save(self._loss_state(), self.wdir / WEIGHTS)
        return saved

    def _own_columns(self) -> list[str]:
        """Return what stands behind the student's losses in the log."""
        weights = [] if self._is_plain() else ["weight"] if self.share is None else ["weight", "share"]
        return [*map(_short, self.fbkd.term_names), *weights]

    def _is_plain(self) -> bool:
        """Whether the terms have one weight throughout."""
        return self._share_settings is None and self.schedule.is_constant()

    def _loss_state(self) -> dict[str, Tensor]:
        """Return the loss's weights and, where the terms' weight changes, what it depends on."""
        state = self.fbkd.state_dict()
        if not self._is_plain():
            state[STEP] = torch.tensor(self._step)
        if self.share is not None:
            state |= self.share.state_dict(prefix=SHARE)
        return state

    def _step_weight(self, step: int) -> Tensor | float:
        """Return what the terms of a batch are multiplied with, and let the share be measured where that is due."""
        weight = self.weight * self.schedule.factor(step)
        if self.share is None:
            self._logged_weights = {} if self._is_plain() else {"weight": torch.tensor(weight, device=self.device)}
            return weight
        if self.share.is_waiting():
            self.share.collect()
        factor = self.share.factor(weight)
        self._logged_weights = {"weight": factor, "share": self.share.share.clone()}
        if weight == 0:
            return weight
        if self.share.is_due(step - self.schedule.start_step):
            self.share.begin(factor)
            self._listening.enter_context(present(self._student_tap).split(self.share.split))
        return factor

    def _listen(self) -> None:
        """Until the batch's losses; models are copied and saved in between batches, without hooks and as they were."""
        if self._student_tap is not None:  # the last batch did not come to its losses
            self._stop_listening()
        model: Any = unwrapped(self.model)
        self._criterion = getattr(model, "criterion", None) or model.init_criterion()
        model.criterion = self._losses
        self._student_tap = FeatureTap(self.model, HEAD_INPUTS, name="student")
        self._weight_now = self._step_weight(present(self._step))

    def _stop_listening(self) -> None:
        if self._student_tap is not None:
            self._listening.close()
            self._student_tap.close()
            model: Any = unwrapped(self.model)
            model.criterion = self._criterion
            self._student_tap = None

    def _losses(self, predictions: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """Return one training batch's loss, the student's own with the terms, and all of them for the log."""
        student_features = present(self._student_tap).features()
        self._stop_listening()
        loss, items = self._criterion(predictions, batch)
        self._step = present(self._step) + 1
        terms = self._terms(student_features, batch)
        loss = loss.sum() + len(batch["img"]) * sum(terms.values())
        logged = {_short(name): term.detach() for name, term in terms.items()}
        return loss, _joined(items, logged | self._logged_weights)

    def _terms(self, student_features: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weighted terms; zeros, without a run of the teacher, in batches outside of the schedule."""
        weight = self._weight_now
        if isinstance(weight, float) and weight == 0:
            return {name: torch.zeros((), device=self.device) for name in self.fbkd.term_names}
        with torch.no_grad(), self._teacher_tap:
            self.teacher(batch["img"].expand(-1, self._teacher_channels, -1, -1))
        teacher_features, others = self._teacher_tap.features(), dict[str, Any]()
        if "boxes" in self.fbkd.needs:
            others |= boxes_of_call((batch,), {})._asdict()
        if "scores" in self.fbkd.needs:
            others["scores"] = scores_of(of_ultralytics, self.teacher, teacher_features)
        terms = self.fbkd(student_features, teacher_features, **others)
        if isinstance(weight, float) and weight == 1:
            return terms
        return {name: weight * term for name, term in terms.items()}

    def _handle_nan_recovery(self, *args: Any) -> bool:
        has_recovered = super()._handle_nan_recovery(*args)
        if has_recovered:
            self._load_loss(self.wdir / WEIGHTS)
        return has_recovered

    def _load_loss(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the loss's weights, which FBKDTrainer saved with the checkpoint"
            )
        state = torch.load(path, map_location=self.device, weights_only=True)
        share = {name.removeprefix(SHARE): state.pop(name) for name in list(state) if name.startswith(SHARE)}
        step = state.pop(STEP, None)
        if step is not None:
            self._step = int(step)
        if self.share is not None and share:
            self.share.load_state_dict(share)
        self.fbkd.load_state_dict(state)


def _is_yaml(teacher: Teacher) -> bool:
    """Whether a teacher is built anew, without weights."""
    return isinstance(teacher, (str, Path)) and Path(teacher).suffix in (".yaml", ".yml")


def _short(name: str) -> str:
    """Return a term's name in the progress line, whose columns are narrow."""
    return name.removeprefix("loss_").removeprefix("fbkd_")


def _joined(items: Any, terms: dict[str, Tensor]) -> Any:
    """Return the student's logged losses, a dict or in earlier versions a tensor, with the terms behind them."""
    if isinstance(items, dict):
        return {**items, **terms}
    return torch.cat([items, torch.stack(list(terms.values())).to(items)])


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse arguments of Ultralytics that this trainer cannot follow; not all of them need to be there."""
    device, task = arguments.get("device"), arguments.get("task") or "detect"
    several = isinstance(device, (list, tuple)) and len(device) > 1 or isinstance(device, str) and "," in device
    if several or RANK != -1:
        raise NotImplementedError(f"FBKDTrainer trains on one device, got device={device!r}, RANK={RANK}")
    if task != "detect":
        raise ValueError(f"FBKDTrainer trains detectors, got a student of task={task!r}")
    if arguments.get("distill_model") is not None:
        raise ValueError(
            f"distill_model={arguments['distill_model']!r} is Ultralytics' own distillation and would train with a "
            "second teacher; leave it out, or train without FBKDTrainer"
        )


def _model_of(teacher: Teacher) -> nn.Module:
    """Return the module whose last layer is the head."""
    given = teacher
    if isinstance(teacher, (str, Path)):
        teacher = YOLO(teacher)
    model = teacher.model if isinstance(teacher, Model) else teacher
    if not isinstance(model, nn.Module):
        raise TypeError(f"teacher {given}: an exported model has no layers to listen to, give its .pt checkpoint")
    if not isinstance(getattr(unwrapped(model), "model", None), nn.Sequential):
        raise TypeError(
            f"teacher must be a model of Ultralytics with a head as its last layer, got {type(model).__name__}"
        )
    return model


def _checked_channels(teacher: nn.Module, student: nn.Module) -> int:
    """Return the channels of the teacher's images: those of the student's, or three where these are grey."""
    expected, channels = image_channels(student), image_channels(teacher)
    if channels != expected and (channels, expected) != (3, 1):
        raise ValueError(f"teacher must take images of {expected} channels, as the student does, got {channels}")
    return channels


def _widths(student: nn.Module, teacher: nn.Module) -> dict[str, list[int]]:
    """Channels of the maps that each side's head is given, as the loss's arguments."""
    remedy = "FBKDTrainer needs a detector that takes images alone"
    sides = {
        name: blank_image_features(model, HEAD_INPUTS, name, remedy)
        for name, model in (("student", student), ("teacher", teacher))
    }
    sizes = [[tuple(feature.shape[2:]) for feature in features] for features in sides.values()]
    if sizes[0] != sizes[1]:
        whole: Any = unwrapped(teacher)
        raise ValueError(
            f"the teacher's head ({type(whole.model[-1]).__name__}) must be given maps of the same sizes "
            f"as the student's, {sizes[0]} for a blank image, got {sizes[1]}"
        )
    return {f"{name}_channels": [feature.shape[1] for feature in features] for name, features in sides.items()}
