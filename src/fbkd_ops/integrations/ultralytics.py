"""FBKD in Ultralytics' own trainers, for its YOLO models of boxes, masks, keypoints and oriented boxes."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.engine.model import Model
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.models.yolo.world import WorldTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import LOCAL_RANK, RANK
from ultralytics.utils.torch_utils import torch_distributed_zero_first

from .._validation import check_number, feature_levels
from .._warnings import TeacherWatch
from ..losses.feature_loss import FeatureLoss
from ..training.blank_images import blank_image_features, image_channels
from ..training.feature_tap import FeatureTap, Layers, unwrapped
from ..training.gradient_share import GradientShare, checked_settings
from ..training.pairing import check_apart
from ..training.placement import checked_placement
from ..training.pyramids import HEAD_INPUTS
from ..training.schedule import Decay, Schedule
from ..training.targets import boxes_of_call
from ..training.teacher_input import TeacherInput, checked_teacher_input
from ..training.teacher_scores import of_ultralytics
from ..training.teacher_side import TeacherSide
from ..training.teachers import Device, Dtype
from ..types import present
from ._arguments import loss_settings

__all__ = [
    "FBKDOBBTrainer",
    "FBKDPoseTrainer",
    "FBKDSegmentationTrainer",
    "FBKDTrainer",
    "FBKDWorldTrainer",
]

SHORT = {"feature": "feat", "channel": "chan", "spatial": "spat", "relation": "rel", "attention": "attn"}
WEIGHTS = "fbkd.pt"
STEP, SHARE = "schedule.step", "gradient_share."  # in that file, beside the loss's own names
ARGUMENTS, EPOCH = "arguments", "epoch"  # likewise the trainer's own, of those that are plain values
# Behind the optimizer's name in a checkpoint: Ultralytics' trainers say which optimizer it is that they do not know.
NOTE = " (this run is "

Teacher = str | Path | nn.Module


class Settings(NamedTuple):
    """The trainer's own arguments, as they were given."""

    teacher: Teacher | None = None
    loss: Mapping[str, Any] | None = None
    student_layers: Layers | None = None
    teacher_layers: Layers | None = None
    teacher_input: TeacherInput | None = None
    teacher_device: Device = None
    teacher_dtype: Dtype = None
    teacher_every: int = 1
    weight: float = 1.0
    gradient_share: float | None = None
    share_every: int = 10
    share_steps: int | None = None
    start_step: int = 0
    stop_step: int | float | None = None
    warmup_steps: int = 0
    decay: Decay | None = None
    total_steps: int | None = None

    def completed(self, known: Mapping[str, Any]) -> "Settings":
        """Return these settings, with what is known in the place of those that have their defaults."""
        changed = {name for name, value in self._asdict().items() if value != Settings._field_defaults[name]}
        return self._replace(**{name: value for name, value in known.items() if name not in changed})


class FBKDTrainer(DetectionTrainer):
    """Ultralytics' trainer with the terms of a loss between the maps that the heads of student and teacher are given.

    It trains what the student's task says: boxes, or with ``FBKDSegmentationTrainer``, ``FBKDPoseTrainer`` and
    ``FBKDOBBTrainer``, which it becomes by itself, masks, keypoints and oriented boxes. A YOLOWorld is trained by
    ``FBKDWorldTrainer``, which has to be named.

    The terms join the student's losses in each training batch, times the batch's size as those are, and stand beside
    them in the progress line and in ``results.csv`` (where ``val/`` columns of theirs, if the version has such, are 0).
    The learned layers of the loss are in the optimizer but, unlike the student's, not in Ultralytics' gradient
    clipping. They are saved as ``weights/fbkd.pt`` beside the checkpoints, which stay those of the student alone and
    load without this package. With them are saved the trainer's arguments, so that ``train(resume=True,
    trainer=FBKDTrainer)`` goes on with the same teacher and loss; what is given besides takes their place. An argument
    that was an object, such as a module, has to be given again. Ultralytics' recovery from a loss that is NaN reads the
    file too. A plain ``train(resume=True)`` says which trainer it needs, with Ultralytics 8.4.

    On several devices each process has a teacher and a loss of its own; the gradients of the loss are averaged as
    those of the student are.

    Under ``amp`` distances and sums are computed in float32. A gradient that overflows makes the trainer's
    ``GradScaler`` skip the step for the student and the loss alike.

    Args:
        teacher: a checkpoint (``"yolo11m.pt"``), a YAML, one of Ultralytics' models (``YOLO``, ``RTDETR``,
            ``YOLOWorld``, ...) or the module in it; any other module with ``teacher_layers``. It is frozen. Its head,
            of whatever class, is given as many maps as the student's, of the same sizes and of any widths. A teacher
            of colour images sees grey ones in three equal channels.
        loss: arguments of :class:`fbkd_ops.FBKDLoss`, or of another loss whose name is the ``type`` among them
            (``"PKDLoss"``); ``preset="one_stage"`` by default. The widths are read off a blank image.
        student_layers, teacher_layers: other maps than the heads' inputs, as of :class:`fbkd_ops.Distiller`:
            ``["model.16", "model.19"]``.
        teacher_input: makes what the teacher is given of the batch's images ``(N, C, H, W)`` in 0..1: one that wants
            normalised images, or a list of them.
        teacher_device, teacher_dtype, teacher_every: as of :class:`fbkd_ops.Distiller`.
        weight, gradient_share, share_every, share_steps: as of :class:`fbkd_ops.Distiller`.
        start_step, stop_step, warmup_steps, decay, total_steps: the same; a step is a training batch, and
            ``total_steps`` is by default that of all epochs. With a schedule or a share the columns ``weight`` (what
            the terms were multiplied with) and ``share`` stand behind those of the terms.
        *args, **arguments: what ``DetectionTrainer`` takes.

    Attributes:
        teacher: the teacher's model, once training started.
        fbkd: the loss, once training started.

    Raises:
        TypeError: no teacher, or one of another type, an exported one, one whose last module is no head; a student
            whose head is none of its task.
        ValueError: a task without a trainer, Ultralytics' own ``distill_model=`` besides, a teacher of other maps or
            of images with other channels, or one that shares parameters with the student.
        FileNotFoundError: a run to be resumed whose ``fbkd.pt`` is gone.

    Warns:
        UserWarning: a teacher from a YAML, which has no trained weights.
        UntrainedTeacherWarning: a model none of whose BatchNorms has seen an image.

    Example:
        >>> trainer = functools.partial(FBKDTrainer, teacher="yolo11m.pt")
        >>> YOLO("yolo11n.pt").train(trainer=trainer, data="coco8.yaml")

    Seen to train with Ultralytics 8.3.40 to 8.4.190; not yet measured on a GPU.
    """

    # Heads of other classes have losses, or inputs, that the trainer does not know.
    student_task: str = "detect"
    student_heads: tuple[str, ...] = ("Detect", "v10Detect")

    model: Any  # Ultralytics' own: a path, and the module in its place once training started
    teacher: nn.Module
    fbkd: FeatureLoss

    def __new__(cls, *args: Any, **arguments: Any) -> "FBKDTrainer":
        task = _overrides(args, arguments).get("task") or "detect"
        return super().__new__(TRAINERS.get(task, cls) if cls is FBKDTrainer else cls)

    def __init__(
        self,
        *args: Any,
        teacher: Teacher | None = None,
        loss: Mapping[str, Any] | None = None,
        student_layers: Layers | None = None,
        teacher_layers: Layers | None = None,
        teacher_input: TeacherInput | None = None,
        teacher_device: Device = None,
        teacher_dtype: Dtype = None,
        teacher_every: int = 1,
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
        overrides = _overrides(args, arguments)
        settings = Settings(
            teacher,
            loss,
            student_layers,
            teacher_layers,
            teacher_input,
            teacher_device,
            teacher_dtype,
            teacher_every,
            weight,
            gradient_share,
            share_every,
            share_steps,
            start_step,
            stop_step,
            warmup_steps,
            decay,
            total_steps,
        )
        self._settings = settings.completed(_remembered(overrides))
        self._check_settings()
        self._step: int | None = None  # of the schedule, counted in training batches; unknown before the training
        self._logged_weights: dict[str, Tensor] = {}
        self.share: GradientShare | None = None
        self._student_tap: FeatureTap | None = None
        self._listening = contextlib.ExitStack()
        self._criterion: Any = None
        _check_arguments(overrides, self.student_task)  # here, as Ultralytics loads data by the task
        super().__init__(*args, **arguments)
        _check_arguments(vars(self.args), self.student_task)

    def _check_settings(self) -> None:
        """Check the trainer's own arguments, and keep them as the training needs them."""
        given = self._settings
        if given.teacher is None:
            raise TypeError(
                "teacher is needed: functools.partial(FBKDTrainer, teacher=...); a resumed run knows its own where "
                "that was a name"
            )
        if not isinstance(given.teacher, (str, Path, nn.Module)):
            raise TypeError(
                f"teacher must be a checkpoint, a YAML, a YOLO or its model, got {type(given.teacher).__name__}"
            )
        if _is_yaml(given.teacher) and RANK in (-1, 0):
            warnings.warn(
                f"the teacher is built from {given.teacher}, without trained weights, so the student would learn from "
                "a random one: give a checkpoint, or a model that has its weights"
            )
        self._make_input = checked_teacher_input(given.teacher_input)
        self._placement = checked_placement(given.teacher_device, given.teacher_dtype)
        self.loss_settings = loss_settings(given.loss, preset="one_stage")
        self.weight = check_number(given.weight, "a finite number >= 0", lambda value: value >= 0, "weight")
        self.schedule = Schedule(
            given.start_step, given.stop_step, given.warmup_steps, given.decay, given.total_steps, given.teacher_every
        ).checked()
        self._share_settings = checked_settings(given.gradient_share, given.share_every, given.share_steps)

    def check_resume(self, overrides: Any) -> None:
        others = {name: value for name, value in (overrides or {}).items() if name != "optimizer"}
        super().check_resume(others)
        self.args.optimizer = str(self.args.optimizer).partition(NOTE)[0]
        asked = (overrides or {}).get("optimizer", self.args.optimizer)
        if self.resume and asked != self.args.optimizer:
            warnings.warn(f"optimizer={asked!r} is ignored: a resumed run goes on with {self.args.optimizer!r}")

    def get_model(self, cfg: Any = None, *args: Any, **arguments: Any) -> nn.Module:
        head = (cfg if isinstance(cfg, dict) else yaml_model_load(cfg))["head"][-1][2]
        if head not in self.student_heads:
            raise TypeError(f"student: the last module must be a {self.student_heads[0]} head, got {head}")
        return super().get_model(cfg, *args, **arguments)

    def setup_model(self) -> Any:
        checkpoint = super().setup_model()
        chosen = self._settings.student_layers, self._settings.teacher_layers
        self._layers = tuple(HEAD_INPUTS if layers is None else layers for layers in chosen)
        self._set_up_teacher()
        self._set_up_loss()
        if self.resume:
            self._load_loss(Path(self.args.model).with_name(WEIGHTS), checkpoint["epoch"])
        return checkpoint

    def _set_up_teacher(self) -> None:
        given: Any = self._settings.teacher
        with torch_distributed_zero_first(LOCAL_RANK):  # one process downloads it
            model = _model_of(given, any_module=self._settings.teacher_layers is not None)
        self.teacher = model.float().eval().requires_grad_(False).to(self.device)
        _send_to_all(self.teacher)  # each would draw another one of a YAML
        check_apart(unwrapped(self.model), unwrapped(self.teacher))
        if not _is_yaml(given):  # which is warned of already
            TeacherWatch().see(self.teacher, lambda: None)
        self._teacher_channels = 0 if self._make_input else _checked_channels(self.teacher, self.model)

    def _set_up_loss(self) -> None:
        kind, arguments = self.loss_settings
        widths = self._widths(same_sizes=arguments.get("resize") is None)
        self.fbkd = kind(**(widths | arguments)).to(self.device)
        _send_to_all(self.fbkd)
        # Its widths are read: the teacher may go to a place of its own.
        self._side = TeacherSide(
            unwrapped(self.model),
            self.teacher,
            self._layers[1],
            None,
            self._make_input,
            of_ultralytics if "scores" in self.fbkd.needs else None,
            self._placement,
        )
        if self._share_settings is not None:
            self.share = GradientShare(self._share_settings, 1, self.device)

    def _widths(self, same_sizes: bool) -> dict[str, list[int]]:
        """Channels of both sides' maps, as the loss's arguments."""
        remedy = "FBKDTrainer needs a detector that takes images alone"
        students = blank_image_features(self.model, self._layers[0], "student", remedy)
        teachers = blank_image_features(self.teacher, self._layers[1], "teacher", remedy, self._make_input)
        sides = {
            "student": list(feature_levels(students, "student").values()),
            "teacher": list(feature_levels(teachers, "teacher").values()),
        }
        sizes = [[tuple(feature.shape[2:]) for feature in features] for features in sides.values()]
        if same_sizes and sizes[0] != sizes[1]:
            who = f"{type(unwrapped(self.teacher)).__name__}'s layers"
            if self._settings.teacher_layers is None:
                whole: Any = unwrapped(self.teacher)
                who = f"head ({type(whole.model[-1]).__name__})"
            raise ValueError(
                f"the teacher's {who} must be given maps of the same sizes as the student's, {sizes[0]} for a blank "
                f"image, got {sizes[1]}; student_layers and teacher_layers choose other maps"
            )
        return {f"{name}_channels": [feature.shape[1] for feature in features] for name, features in sides.items()}

    def build_optimizer(self, model: nn.Module, *args: Any, **arguments: Any) -> torch.optim.Optimizer:
        """One for the student, under the names that Ultralytics knows its layers by, and the loss."""
        both = nn.Module()
        both.model, both.fbkd = unwrapped(model).model, self.fbkd
        return super().build_optimizer(both, *args, **arguments)

    def run_callbacks(self, event: str) -> None:
        if event == "on_train_start":
            self._first_step, self._first_schedule = self._step, self.schedule
            self._count_batches()
            if self.loss_names:  # else the trainer takes them from the first losses
                self.loss_names = (*self.loss_names, *self._own_columns())
        elif event == "on_train_epoch_start" and vars(self).get("_oom_retries"):
            self._count_batches()  # memory was out: the epoch begins again, with smaller batches
        elif event == "on_train_batch_start":
            self._listen()
        super().run_callbacks(event)

    def _count_batches(self) -> None:
        """Set the step and, where the schedule needs it, the length of the training."""
        batches = len(self.train_loader)
        self._step = self.start_epoch * batches if self._first_step is None else self._first_step
        self.schedule = self._first_schedule
        if self.schedule.needs_length():
            self.schedule = self.schedule._replace(total_steps=self.epochs * batches).checked()

    def train(self) -> Any:
        several = RANK == -1 and _several_devices(vars(self.args).get("device"))
        try:
            with _arguments_of_workers(self._settings) if several else contextlib.nullcontext():
                return super().train()
        finally:
            self._stop_listening()

    def optimizer_step(self) -> None:
        _average_gradients(self.fbkd)
        super().optimizer_step()

    def validate(self) -> Any:
        # Losses in a tensor are added up in one of the same shape, and a validator has those of the student.
        if isinstance(self.loss_items, Tensor):
            self.loss_items = self.loss_items[: -len(self._own_columns())]
        return super().validate()

    def save_model(self) -> Any:
        optimizer = self.args.optimizer
        name = type(self).__name__
        self.args.optimizer = f"{optimizer}{NOTE}{name}'s: resume it with trainer={name})"
        try:
            saved = super().save_model()
        finally:
            self.args.optimizer = optimizer
        if saved is False:  # of some versions: no checkpoint to stand beside
            return saved
        arguments = self._settings._asdict() | {"teacher": _plain_path(self._settings.teacher)}
        known = {name: value for name, value in arguments.items() if _is_plain_value(value)}
        torch.save(self._loss_state() | {ARGUMENTS: known, EPOCH: self.epoch}, self.wdir / WEIGHTS)
        return saved

    def _own_columns(self) -> list[str]:
        """Return what stands behind the student's losses in the log."""
        weights = [] if self._is_plain() else ["weight"] if self.share is None else ["weight", "share"]
        return [*map(_column, self.fbkd.term_names), *weights]

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
        self._logged_weights = {"weight": factor, "share": self.share.share / self.schedule.every}
        if weight == 0:
            return weight
        if self.share.is_due(step - self.schedule.start_step, self.schedule.every):
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
        self._student_tap = FeatureTap(self.model, self._layers[0], name="student")
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
        logged = {_column(name): term.detach() for name, term in terms.items()}
        return loss, _joined(items, logged | self._logged_weights)

    def _terms(self, student_features: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weighted terms; zeros, without a run of the teacher, in batches outside of the schedule."""
        weight = self._weight_now
        if isinstance(weight, float) and weight == 0:
            return {name: torch.zeros((), device=self.device) for name in self.fbkd.term_names}
        images = batch["img"] if self._make_input else batch["img"].expand(-1, self._teacher_channels, -1, -1)
        teacher_features, scores = self._side.run((images,), {}, self.device)
        others: dict[str, Any] = {} if scores is None else {"scores": scores}
        if "boxes" in self.fbkd.needs:
            others |= boxes_of_call((batch,), {})._asdict()
        terms = self.fbkd(student_features, teacher_features, **others)
        if isinstance(weight, float) and weight == 1:
            return terms
        return {name: weight * term for name, term in terms.items()}

    def _handle_nan_recovery(self, *args: Any) -> bool:
        has_recovered = super()._handle_nan_recovery(*args)
        if has_recovered:
            self._load_loss(self.wdir / WEIGHTS)
        return has_recovered

    def _load_loss(self, path: Path, epoch: int | None = None) -> None:
        """Load what stands beside a checkpoint, and refuse what is of another epoch than that."""
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: the loss's weights, which FBKDTrainer saved with the checkpoint"
            )
        state = torch.load(path, map_location=self.device, weights_only=True)
        state.pop(ARGUMENTS, None)
        own = state.pop(EPOCH, None)
        if epoch is not None and epoch >= 0 and own is not None and own != epoch:  # a finished run's is -1
            raise ValueError(
                f"{path} has the loss of epoch {own + 1}, but the checkpoint is of epoch {epoch + 1}: resume last.pt"
            )
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


def _column(name: str) -> str:
    """Return a term's name in the log: at most 11 letters, for the progress line, and "loss", by which it is drawn."""
    word = name.rsplit("_", 1)[-1] if name.startswith(("loss_fbkd", "loss_fgd")) else name.split("_")[1]
    return f"{SHORT.get(word, word)}_loss"


def _joined(items: Any, terms: dict[str, Tensor]) -> Any:
    """Return the student's logged losses, a dict or in earlier versions a tensor, with the terms behind them."""
    if isinstance(items, dict):
        return {**items, **terms}
    return torch.cat([items, torch.stack(list(terms.values())).to(items)])


def _check_arguments(arguments: Mapping[str, Any], task: str) -> None:
    """Refuse arguments of Ultralytics that this trainer cannot follow; not all of them need to be there."""
    given = arguments.get("task") or task
    if given != task:
        remedy = f"take {TRAINERS[given].__name__}" if given in TRAINERS else f"the tasks are {', '.join(TRAINERS)}"
        raise ValueError(f"{TRAINERS[task].__name__} trains the task {task}, got task={given!r}; {remedy}")
    if arguments.get("distill_model") is not None:
        raise ValueError(
            f"distill_model={arguments['distill_model']!r} is Ultralytics' own distillation and would train with a "
            "second teacher; leave it out, or train without FBKDTrainer"
        )


def _overrides(args: tuple[Any, ...], arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the overrides among what a trainer of Ultralytics is given."""
    return arguments.get("overrides", args[1] if len(args) > 1 else None) or {}


def _several_devices(device: Any) -> bool:
    return isinstance(device, (list, tuple)) and len(device) > 1 or isinstance(device, str) and "," in device


@contextlib.contextmanager
def _arguments_of_workers(settings: Settings) -> Iterator[None]:
    """Leave the trainer's arguments where the processes that Ultralytics starts find them."""
    if isinstance(settings.teacher, Model):
        settings = settings._replace(teacher=_model_of(settings.teacher))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arguments.pt"
        torch.save(settings._asdict(), path, pickle_module=_pickle())
        os.environ["FBKD_OPS_ULTRALYTICS_ARGUMENTS"] = str(path)
        try:
            yield
        finally:
            del os.environ["FBKD_OPS_ULTRALYTICS_ARGUMENTS"]


def _pickle() -> Any:
    """Return what Ultralytics pickles for its workers with: it takes what a script defines, too, along."""
    try:
        import cloudpickle
    except ImportError:
        import pickle

        return pickle
    return cloudpickle


def _remembered(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of the arguments that a worker's run or a resumed one was started with."""
    of_workers = os.environ.get("FBKD_OPS_ULTRALYTICS_ARGUMENTS")
    if of_workers is not None and RANK != -1:
        return torch.load(of_workers, map_location="cpu", weights_only=False)
    resumed = overrides.get("resume")
    path = Path(resumed).with_name(WEIGHTS) if isinstance(resumed, (str, Path)) else None
    if path is None or not path.exists():
        return {}
    return torch.load(path, map_location="cpu", weights_only=True).get(ARGUMENTS, {})


def _plain_path(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _is_plain_value(value: Any) -> bool:
    """Whether a file of weights may hold it."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(_is_plain_value, (*value, *value.values())))
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain_value, value))
    return value is None or type(value) in (str, int, float, bool, torch.dtype, torch.device)


def _is_parallel() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _send_to_all(module: nn.Module) -> None:
    """Give all processes the first one's weights: Ultralytics seeds each differently."""
    if _is_parallel():
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)


def _average_gradients(module: nn.Module) -> None:
    """Replace gradients by their means over all processes.

    Which of them there are depends on the schedule alone, which is the same in all processes.
    """
    grads = [each.grad for each in module.parameters() if each.grad is not None]
    if not (_is_parallel() and grads):
        return
    sums = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(sums)
    means = (sums / torch.distributed.get_world_size()).split([grad.numel() for grad in grads])
    for grad, mean in zip(grads, means, strict=True):
        grad.copy_(mean.view_as(grad))


def _model_of(teacher: Teacher, any_module: bool = False) -> nn.Module:
    """Return the module whose last layer is the head, or any module."""
    given = teacher
    if isinstance(teacher, (str, Path)):
        teacher = YOLO(teacher)
    model = teacher.model if isinstance(teacher, Model) else teacher
    if not isinstance(model, nn.Module):
        raise TypeError(f"teacher {given}: an exported model has no layers to listen to, give its .pt checkpoint")
    if not any_module and not isinstance(getattr(unwrapped(model), "model", None), nn.Sequential):
        raise TypeError(
            "teacher must be a model of Ultralytics with a head as its last layer, or any module with teacher_layers, "
            f"got {type(model).__name__}"
        )
    return model


def _checked_channels(teacher: nn.Module, student: nn.Module) -> int:
    """Return the channels of the teacher's images: those of the student's, or three where these are grey."""
    expected, channels = image_channels(student), image_channels(teacher)
    if channels != expected and (channels, expected) != (3, 1):
        raise ValueError(f"teacher must take images of {expected} channels, as the student does, got {channels}")
    return channels


class FBKDSegmentationTrainer(FBKDTrainer, SegmentationTrainer):
    """:class:`FBKDTrainer` of models that find masks."""

    student_task, student_heads = "segment", ("Segment", "Segment26")


class FBKDPoseTrainer(FBKDTrainer, PoseTrainer):  # type: ignore[misc]  # get_model takes anything and hands it on
    """:class:`FBKDTrainer` of models that find keypoints."""

    student_task, student_heads = "pose", ("Pose", "Pose26")


class FBKDOBBTrainer(FBKDTrainer, OBBTrainer):  # type: ignore[misc]  # get_model takes anything and hands it on
    """:class:`FBKDTrainer` of models that find oriented boxes."""

    student_task, student_heads = "obb", ("OBB", "OBB26")


class FBKDWorldTrainer(FBKDTrainer, WorldTrainer):  # type: ignore[misc]  # get_model takes anything and hands it on
    """:class:`FBKDTrainer` of a YOLOWorld, whose classes are words."""

    student_heads = ("WorldDetect",)


TRAINERS = {kind.student_task: kind for kind in (FBKDTrainer, FBKDSegmentationTrainer, FBKDPoseTrainer, FBKDOBBTrainer)}
