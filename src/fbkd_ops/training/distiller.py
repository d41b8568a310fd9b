"""A student, its teacher and the loss between their features, as one module."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._validation import (
    Features,
    as_list,
    check_callable,
    check_flag,
    check_number,
    check_text,
)
from .._warnings import BackwardWatch, SizeWatch
from ..presets import PresetName
from .balance import BalanceReport, balance_report, is_sharded
from .checkpoints import drop_shared_names, fit_names
from .feature_tap import (
    Branches,
    FeatureTap,
    Layers,
    OutputTap,
    kept_arguments,
    unwrapped,
    versions,
)
from .gradient_share import GradientShare, ShareSettings, checked_settings
from .levels import Levels, checked_levels, matched
from .loss_dict import ByTeacher, LossDict, needs_of
from .pairing import check_apart, check_exported_mode, put_teacher_into_eval_mode, training_modules
from .proposals import proposal
from .schedule import Decay, Schedule, check_count
from .student_attributes import StudentAttributes
from .student_losses import TOTALS, Total, add_terms, checked_terms, own_losses
from .targets import BoxSource
from .teacher_input import TeacherInput
from .teacher_scores import ScoreFunction
from .teacher_side import Entry, TeacherSide, tapped
from .teachers import ONLY, Device, Dtype, named_teachers, teacher_sides

__all__ = ["Distiller"]


class Distiller(StudentAttributes, nn.Module):
    """Adds the FBKD terms to the losses that a detector computes in training.

    The features are caught by module path. The teacher sees the same arguments as the student, in eval mode and
    without gradient, and only up to the last tapped module. It moves with ``.to()`` but is in no ``parameters()``,
    no ``state_dict()`` and never in training mode. In eval mode the distiller is the student. Names that it lacks are
    the student's (:class:`fbkd_ops.training.student_attributes.StudentAttributes`): hooks find what they look for.

    Args:
        student: a detector that returns its losses in training: a dict or list of them, one scalar, or an object or
            dict whose ``loss`` is one (Hugging Face).
        teacher: a trained detector. Or several in a dict with a name for each: each has a loss of the same name, and
            every argument below that begins with ``teacher_`` (but for ``teacher_every``) may be a dict with what is
            for each.
        loss: an :class:`fbkd_ops.FBKDLoss`, or any module of two feature lists that returns a dict of scalars. Or
            several in a dict with a name for each: their terms come together, and a term that two of them give gets
            the loss's name behind its own.
        student_layers: where the features are: a module path or :class:`fbkd_ops.Layer` that gives a tensor, list,
            tuple or dict, several that give one tensor each, in a list or dict, or a function of the model's output.
        teacher_layers: the same for the teacher; the student's by default.
        teacher_entry: path of a module, in both, at which the teacher starts: its module is called with what the
            student's was given. With ``"backbone"`` a torchvision teacher sees the student's images as they were
            resized (at random) and padded. A pair has the student's path and the teacher's: ``("backbone", "")`` calls
            the whole teacher with what the student's backbone was given.
        teacher_input: makes the teacher's images of the student's, where the teacher was trained with others: a
            function, :class:`fbkd_ops.Renormalize`, or a dict of the latter's arguments. It gets the first argument
            that the teacher (with ``teacher_entry``: its module) would be given, by position or by its name, and
            returns the one that it is given instead; it runs without gradient and leaves what it gets as it is.
        teacher_device: where the teacher runs and stays, wherever the distiller is moved. What it is given is brought
            there, and its features to the student's device, without waiting for either where these are GPUs.
        teacher_dtype: a dtype of floats, or its name (``"bfloat16"``), in which the teacher runs and stays, and which
            its images and features have; the student's autocast does not reach it. The loss computes as it does for
            mixed dtypes.
        teacher_every: runs the teacher, and adds the terms, in every k-th step only, counted from ``start_step``. There
            the terms count k times, so that they pull as hard over all steps; between them they are 0.
        student_levels: which of the features to use, by index or key, and in what order; all by default. Of several
            losses a dict may have each one's.
        teacher_levels: the same for the teacher, to be matched with the student's by position.
        resize: whether the teacher's maps are resized (bilinear) to the student's where their sizes differ, which is
            an error otherwise.
        start_step, stop_step: the training steps, counted from 0, from which on and before which the terms are added.
            Outside of them the teacher does not run and the terms are 0. A ``stop_step`` between 0 and 1 is a part of
            ``total_steps``, rounded to a step.
        warmup_steps: how many steps, from ``start_step`` on, the terms' weight takes to grow linearly to ``weight``.
        decay: ``"cosine"``: after the warm-up the weight falls along half a cosine, from ``weight`` in its first step
            to 0 in step ``stop_step``, or ``total_steps`` where there is no ``stop_step``. None: it stays.
        total_steps: how many training forwards the training has; needed for a ``decay`` without a ``stop_step``, and
            for a ``stop_step`` that is a part of it. It can be set until the first training step.
        weight: what all terms are multiplied with, >= 0. It is an attribute that can be set at any time.
        gradient_share: instead of guessing ``weight``: the share of the detector's own gradient that the terms together
            send into the tapped maps, > 0: the ratio of the L2 norms over all tapped maps that the loss reads. It is
            measured in the training's own backward passes, and sets a factor beside ``weight`` that starts at 1e-3.
            With ``teacher_every`` it is the share of a mean step. The
            own gradient of a map also has what the terms send down from maps that are made of it (backbone stages, the
            neck of a YOLO). Of several losses a dict has each one's share, and each has a factor of its own.
        share_every: how many steps with terms there are from one measurement to the next.
        share_steps: the training steps, counted from ``start_step``, after which the factor stays as it is; by default
            it follows the share throughout.
        boxes: for a loss that needs the objects' boxes (:class:`fbkd_ops.FGDLoss`) where they are not in the detector's
            arguments as torchvision, MMDetection, Ultralytics or Hugging Face give them: a function of the arguments
            that returns the boxes of each image, ``(K, 4)`` with x1, y1, x2, y2 in pixels of the batch, and the batch's
            height and width.
        teacher_scores: for a loss that needs the teacher's confidence (:class:`fbkd_ops.ScoreWeightedLoss`) where its
            head is none of torchvision's, MMDetection's or Ultralytics': a function of the teacher and its tapped
            features that returns one map ``(N, H, W)`` of numbers between 0 and 1 per level.
        total: the entry of a dict, or attribute of an object, that is the sum of all losses; the terms are added to it
            and are no entries of their own. By default ``"loss"`` or, without that, ``"total_loss"``, where it is a
            scalar with a gradient; None: there is none, and every entry is a loss.
        combine: makes what a training step returns of the student's output and the dict of terms, where the student
            returns its losses in another form.

    Attributes:
        student: the very module that came in.
        step: how many training forwards there were; it is kept in ``state_dict()``, and can be set.
        accepts_loss_kwargs: False, so that Hugging Face's ``Trainer`` divides the whole loss by the number of
            accumulated batches.

    Raises:
        TypeError, ValueError: a module path that does not exist, an argument of another type or out of its range, a
            student and a teacher that share parameters or buffers, or that resize their images to different sizes by
            themselves without a ``teacher_entry``.

    Example:
        >>> loss = FBKDLoss(256, num_levels=5)
        >>> distiller = Distiller(student, teacher, loss, student_layers="backbone", teacher_entry="backbone")
        >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        >>> losses = distiller(images, targets)  # the student's dict, with four more entries
        >>> fbkd_ops.sum_losses(losses).backward()
    """

    # With True, Trainer passes `num_items_in_batch` and leaves the division to the model. The number of accumulated
    # batches, by which the terms would have to be divided, is not among what it passes.
    accepts_loss_kwargs = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Mapping[str, nn.Module],
        loss: nn.Module | Mapping[str, nn.Module],
        *,
        student_layers: Layers,
        teacher_layers: Layers | Mapping[str, Layers] | None = None,
        teacher_entry: Entry | Mapping[str, Entry] = None,
        teacher_input: TeacherInput | Mapping[str, TeacherInput | None] | None = None,
        teacher_device: Device | Mapping[str, Device] = None,
        teacher_dtype: Dtype | Mapping[str, Dtype] = None,
        teacher_every: int = 1,
        student_levels: Levels | Mapping[str, Levels] = None,
        teacher_levels: Levels | Mapping[str, Levels] = None,
        resize: bool = False,
        start_step: int = 0,
        stop_step: int | float | None = None,
        warmup_steps: int = 0,
        decay: Decay | None = None,
        total_steps: int | None = None,
        weight: float = 1.0,
        gradient_share: float | Mapping[str, float] | None = None,
        share_every: int = 10,
        share_steps: int | None = None,
        boxes: Callable[..., Any] | None = None,
        teacher_scores: ScoreFunction | Mapping[str, ScoreFunction | None] | None = None,
        total: Total = TOTALS,
        combine: Callable[[Any, dict[str, Tensor]], Any] | None = None,
    ):
        super().__init__()
        teachers = named_teachers(teacher, loss)
        losses: tuple[str, ...] = ()
        if isinstance(loss, (Mapping, nn.ModuleDict)):
            losses, loss = tuple(loss), LossDict(dict(loss.items()), student_levels, teacher_levels, resize)
            student_levels = teacher_levels = None  # each loss chooses
        teacher = teachers[ONLY] if ONLY in teachers else nn.ModuleDict(teachers)
        _check_modules(student, teacher, loss)
        check_apart(student, teacher)
        check_exported_mode(teacher)
        Schedule(start_step, stop_step, warmup_steps, decay, total_steps, teacher_every).checked()
        if combine is not None:
            check_callable(combine, "combine")
        # The student's place in parameters(). It comes last itself: names that are assigned after it may be its own.
        self.register_module("student", None)
        self.loss = loss
        self._student_tap = tapped(student, student_layers, "student_layers")
        # In a tuple, so that nn.Module does not register the teacher.
        self._unregistered_teacher = (teacher,)
        self._sides = teacher_sides(
            student,
            teachers,
            loss,
            student_layers,
            teacher_layers=teacher_layers,
            teacher_entry=teacher_entry,
            teacher_input=teacher_input,
            teacher_device=teacher_device,
            teacher_dtype=teacher_dtype,
            teacher_scores=teacher_scores,
        )
        self._box_source = _box_source(loss, student, boxes)
        self.student_levels = checked_levels(student_levels, "student_levels")
        self.teacher_levels = checked_levels(teacher_levels, "teacher_levels")
        self.resize = check_flag(resize, "resize")
        self.start_step, self.stop_step, self.warmup_steps = start_step, stop_step, warmup_steps
        self.decay, self._total_steps, self._teacher_every = decay, total_steps, teacher_every
        self.weight = weight
        device = next((parameter.device for parameter in student.parameters()), None)
        settings = checked_settings(gradient_share, share_every, share_steps, losses)
        self.share = None if settings is None else _gradient_share(settings, self._student_tap, device)
        self.total, self.combine = _checked_total(total), combine
        self._step, self._is_unlabelled = 0, False
        self._warned_of_training = self._warned_of_eval = False
        self._backward_watch, self._size_watch = BackwardWatch(), SizeWatch()
        self._terms: dict[str, Tensor] = {}
        self.register_state_dict_post_hook(drop_shared_names)
        self.register_load_state_dict_pre_hook(fit_names)
        self.student = student
        for module in put_teacher_into_eval_mode(student, teacher):
            module.training = True

    @classmethod
    def for_model(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        loss: str = "FBKDLoss",
        *,
        preset: PresetName | None = None,
        **settings: Any,
    ) -> "Distiller":
        """Return a distiller whose layers are found by themselves, and print what was chosen.

        Known are torchvision's, Detectron2's, MMDetection's and Ultralytics' detectors (the module in a ``YOLO``), of
        Hugging Face RT-DETR, D-FINE, RF-DETR, Deformable DETR, DETR, SegFormer and Mask2Former, models with a timm
        backbone, and :class:`fbkd_ops.TokenMaps` as a teacher. Maps of equal strides are compared. The weights are the
        recipe of the study: ``gradient_share=0.5``, and an FBKDLoss with ``size_free_weights``.

        Args:
            student, teacher: as of the class.
            loss: the name of a loss; its widths are read off a blank image.
            preset: of an FBKDLoss, ``"one_stage"`` by default.
            **settings: arguments of the class, in place of what would be chosen.

        Raises:
            TypeError: a student or teacher that is no module (several teachers need their layers by hand), a loss that
                is no name, a preset of another loss than FBKDLoss, layers or levels among the settings.
            ValueError: a model of no known family, one that takes no blank image, or no stride in common.

        Example:
            >>> make = torchvision.models.detection.retinanet_resnet50_fpn
            >>> student, teacher = (make(weights=None, weights_backbone=None) for _ in range(2))
            >>> distiller = Distiller.for_model(student, teacher)  # doctest: +NORMALIZE_WHITESPACE
            student: torchvision detector, at 'backbone': '0': 256 channels, stride 8, '1': 256 channels, stride 16,
                     '2': 256 channels, stride 32, 'p6': 256 channels, stride 64, 'p7': 256 channels, stride 128
            ...
        """
        return cls(student, teacher, **proposal(student, teacher, loss, preset, settings))

    @property
    def teacher(self) -> nn.Module:
        """The teacher; several are in a ``ModuleDict``."""
        return self._unregistered_teacher[0]

    @property
    def teacher_input(self) -> Callable[[Any], Any] | dict[str, Callable[[Any], Any] | None] | None:
        """What makes the teacher's images, of several teachers by name."""
        inputs = {name: side.teacher_input for name, side in self._sides.items()}
        return inputs.get(ONLY, inputs)

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        check_count(step, "step")
        self._step = int(step)

    @property
    def weight(self) -> float:
        """What all terms are multiplied with, whatever the step."""
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._weight = check_number(weight, "a finite number >= 0", lambda value: value >= 0, "weight")

    @property
    def total_steps(self) -> int | None:
        """How many training forwards the training has, None where that is not known."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, total_steps: int | None) -> None:
        self._schedule()._replace(total_steps=total_steps).checked()
        self._total_steps = total_steps

    @property
    def teacher_every(self) -> int:
        """How many steps there are from one with the teacher to the next."""
        return self._teacher_every

    @teacher_every.setter
    def teacher_every(self, teacher_every: int) -> None:
        self._schedule()._replace(every=teacher_every).checked()
        self._teacher_every = teacher_every

    def _schedule(self) -> Schedule:
        return Schedule(
            self.start_step, self.stop_step, self.warmup_steps, self.decay, self._total_steps, self._teacher_every
        )

    def step_weight(self) -> float:
        """Return ``weight`` times the schedule of the next training step; 0 where no terms are added.

        Raises:
            ValueError: a schedule that depends on ``total_steps``, which was not given.
        """
        return self._weight * self._schedule().factor(self._step)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's losses with the FBKD terms added; in eval mode the student's output as it is.

        Args:
            *args, **kwargs: what the detectors take.

        Returns:
            In training: the student's dict or list of losses with the terms as further entries, its scalar loss plus
            the sum of the terms, its output with that sum added to ``total`` (or in its place, where that is None: the
            images have no labels), or what ``combine`` makes of it.

        Raises:
            RuntimeError: a tapped module that was not called, or called more than once.
            TypeError: a student that returns no loss, or its losses in another form, in training.
            ValueError: features that do not fit the loss or each other, a term that the student has already.

        Warns:
            UserWarning: once each, if somebody put the teacher into training mode or left the student in eval mode, or
                if no backward pass of the terms came in ten training forwards.
            UntrainedTeacherWarning: at the first training step, if no BatchNorm of the teacher has seen an image.
            TeacherImagesWarning: at the first training step, if the teacher is given images that are normalised
                otherwise than its own settings say.
        """
        if not self.training:
            return self.student(*args, **kwargs)
        self._check_student_mode()
        self._look_at_teachers()
        if self._is_unlabelled:
            return self._terms_alone(args, kwargs)
        weight = self.step_weight()
        self._collect_share()
        if weight == 0:
            output, terms = self._run_student(args, kwargs), self._idle_terms()
            self._forget()
        elif self.share is None:
            output, terms = self._weighted_terms(weight, args, kwargs)
            if self.combine is None and not self._size_watch.looked:
                self._size_watch.see(own_losses(output, self.total), terms)
        else:
            output, terms = self._shared_terms(self.share, weight, args, kwargs)
        self._step += 1
        self._terms = {name: term.detach() for name, term in terms.items()}
        self._backward_watch.see(terms)
        if self.combine is not None:
            return self.combine(output, terms)
        return add_terms(output, terms, self.total, self._student_learns())

    @contextlib.contextmanager
    def unlabelled(self) -> Iterator[None]:
        """Inside the block, let training forwards return the terms alone, for images without labels.

        The student runs up to its last tapped module, so its own losses are not computed (at student_layers by the
        model's output, and in a compiled student, it runs through). What the detector asks of targets before that it
        has to be given: a torchvision detector takes empty ones. Such a forward is no training step: ``step`` stays,
        ``terms()`` are those of the last step with labels, and no gradient share is measured, for there is no own
        gradient to compare with. The terms have the weight of the last step with labels (before the first: of that),
        and the teacher runs whatever ``teacher_every`` says.

        Example:
            >>> distiller = Distiller(student, teacher, FBKDLoss(256, num_levels=5), student_layers="backbone")
            >>> with distiller.unlabelled():
            ...     terms = distiller(images, targets)
            >>> sorted(terms)[-1]
            'loss_fbkd_spatial'
        """
        before, self._is_unlabelled = self._is_unlabelled, True
        try:
            yield
        finally:
            self._is_unlabelled = before

    def _terms_alone(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weighted terms of images without labels."""
        self._collect_share()
        # The labelled step beside them is counted already.
        weight = self._weight * self._schedule()._replace(every=1).factor(max(self._step - 1, 0))
        if weight == 0:
            return {name: zero + self._zero_of_student() for name, zero in self._idle_terms().items()}
        with self._student_tap.ending([side.entry_tap for side in self._sides.values() if side.entry_tap is not None]):
            return self._weighted_terms(weight if self.share is None else self.share.factor(weight), args, kwargs)[1]

    def _zero_of_student(self) -> Tensor | float:
        """Return a zero with which terms alone have a graph, where the loss has no parameters."""
        learned = (parameter for parameter in self.student.parameters() if parameter.requires_grad)
        return next((0 * _local(parameter).sum() for parameter in learned), 0.0)

    def _look_at_teachers(self) -> None:
        """Warn once of teachers that were never trained, or are given other images."""
        for side in self._sides.values():
            if not side.watch.looked:
                # A framework's wrapper may have a preprocessor in place of the student's.
                side.look(self.student, getattr(self, "data_preprocessor", None))

    def _forget(self) -> None:
        """Forget what was caught in a step without terms."""
        self._student_tap.clear()
        for side in self._sides.values():
            side.clear()
        if self._box_source is not None:
            self._box_source.clear()

    def _collect_share(self) -> None:
        """Take in what the last backward pass has measured, once."""
        if self.share is not None and self.share.is_waiting():
            self.share.collect()

    def _weighted_terms(self, weight: float | Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, dict]:
        """Return the student's output, and the terms times ``weight``, or times each loss's own of ``(losses,)``."""
        output, students, teachers, others = self.run_for_loss(args, kwargs)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            return output, self.loss(students, teachers, factors=weight, **others)
        terms = checked_terms(self.loss(students, teachers, **others))
        if isinstance(weight, float) and weight == 1:
            return output, terms
        return output, {name: weight * term for name, term in terms.items()}

    def _shared_terms(
        self, share: GradientShare, weight: float, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any, dict]:
        """Return the same with the factor that ``share`` has found, and measure it in this step where that is due."""
        factor = share.factor(weight)
        if not share.is_due(self._step - self.start_step, self.teacher_every):
            return self._weighted_terms(factor, args, kwargs)
        share.begin(factor)
        tap = cast(FeatureTap, self._student_tap)  # _gradient_share refuses the other kind
        with tap.split(share.split, share.branches if share.settings.shape() else None):
            return self._weighted_terms(factor, args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Features]:
        """Return the student's output, and the features of the student and the teacher as they go into the loss.

        Args:
            *args, **kwargs: what the detectors take.

        Raises:
            RuntimeError, TypeError, ValueError: as for the call.
        """
        return self.run_for_loss(args, kwargs)[:3]

    def run_for_loss(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Features | Branches, Features, dict]:
        """Return the student's output and what the loss is called with: both features, and what else it needs, by name.

        In a step that measures the shares of several losses the student's features are :class:`Branches`, one for each.

        Raises:
            RuntimeError, TypeError, ValueError: as for the call.
        """
        given = kept_arguments(args, kwargs)
        before = versions(given)
        output = self._run_student(args, kwargs)
        student_features = self._student_tap.features_of(output)
        if any(side.entry_tap is None for side in self._sides.values()) and versions(given) != before:
            raise RuntimeError(
                "the student changed its inputs in place, so the teacher would not see the same: give a teacher_entry "
                "after that change, or make the student work on copies"
            )
        teacher_features, scores = self._run_teachers(given, _device_of(student_features))
        others: dict[str, Any] = {} if scores is None else {"scores": scores}
        if not isinstance(unwrapped(self.loss), LossDict):  # whose losses choose, each its own
            levels = self.student_levels, self.teacher_levels
            student_features, teacher_features, others = matched(
                student_features, teacher_features, others, levels, self.resize
            )
        if self._box_source is not None:
            others |= self._boxes(args, kwargs)
        return output, student_features, teacher_features, others

    def _boxes(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the objects' boxes, with the size of the images that they are of."""
        found = cast(BoxSource, self._box_source).of_call(args, kwargs)
        if self._is_unlabelled and not any(map(len, found.boxes)):
            raise ValueError(
                "unlabelled: the loss needs boxes, and would take images without any for background: give boxes as "
                "their targets, such as the teacher's own detections, or take another loss for these images"
            )
        return found._asdict()

    def _run_student(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Also in steps without terms under the taps: a graph compiled without them would not have them later."""
        with contextlib.ExitStack() as listening:
            listening.enter_context(self._student_tap)
            for side in self._sides.values():
                listening.enter_context(side.listening())
            if self._box_source is not None:
                listening.enter_context(self._box_source.listening())
            return self.student(*args, **kwargs)

    def _run_teachers(self, given: tuple[tuple, dict[str, Any]], device: torch.device) -> tuple[Any, Any]:
        """Return the teacher's features on a device, and its scores of them or None; of several teachers by name."""
        shared = self._teacher_in_eval_mode()
        try:
            found = {name: side.run(*side.arguments(given), device) for name, side in self._sides.items()}
        finally:
            for each in shared:  # the student's backward pass may call them again
                each.training = True
        if ONLY in found:
            return found[ONLY]
        features = ByTeacher({name: own for name, (own, _) in found.items()})
        scores = ByTeacher({name: own for name, (_, own) in found.items() if own is not None})
        return features, scores or None

    def _teacher_in_eval_mode(self) -> list[nn.Module]:
        """Put the teacher into eval mode; return the modules that the student has in training mode too."""
        training = training_modules(self.teacher)
        if not training:
            return []
        shared = put_teacher_into_eval_mode(self.student, self.teacher)
        if len(shared) < len(training) and not self._warned_of_training:
            self._warned_of_training = True
            warnings.warn(
                "the teacher was in training mode, in which its BatchNorm statistics would change and its dropout be "
                "active; the distiller put it back into eval mode (said once)"
            )
        return shared

    def _check_student_mode(self) -> None:
        if self.student.training or self._warned_of_eval:
            return
        self._warned_of_eval = True
        warnings.warn(
            "the student is in eval mode while the distiller is in training mode, so it may return no losses, and its "
            "BatchNorm and dropout are as in evaluation; distiller.train() puts both into training mode (said once)"
        )

    def _student_learns(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.student.parameters())

    def _idle_terms(self) -> dict[str, Tensor]:
        """Zeros that the loss's parameters are part of, so that data parallelism sees all of them in every step."""
        names: Sequence[str]
        names = list(self._terms) or getattr(unwrapped(self.loss), "term_names", ("loss_distillation",))
        used = [_local(parameter).sum() for parameter in self.loss.parameters() if parameter.requires_grad]
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        zero = 0 * sum(used, torch.zeros((), device=device))
        return {name: zero for name in names}

    def __setattr__(self, name: str, value: Any) -> None:
        is_taken = name == "teacher" or (name == "student" and self._modules.get("student") is not None)
        if is_taken and value is not getattr(self, name, None):
            raise AttributeError(
                f"the {name} of a Distiller cannot be replaced, its taps are on it: make a new Distiller"
            )
        if not is_taken:
            super().__setattr__(name, value)

    def terms(self) -> dict[str, Tensor]:
        """Return the last training step's terms as they were added, detached, for logging; empty before the first."""
        return dict(self._terms)

    def weights(self) -> dict[str, Tensor]:
        """Return what the next step's terms are multiplied with, and the share last measured, for logging.

        Returns:
            ``fbkd_weight``, and with ``gradient_share`` also ``fbkd_gradient_share`` (0 before the first measurement):
            scalars on the student's device, which nothing waits for; without a share on the CPU. Where several losses
            have a share each, each has its entries: ``fbkd_weight_pkd``.
        """
        weight = self.step_weight()
        if self.share is None:
            return {"fbkd_weight": torch.tensor(weight, device="cpu")}
        found = {"fbkd_weight": self.share.factor(weight), "fbkd_gradient_share": self.share.share / self.teacher_every}
        if not self.share.settings.shape():
            return found
        losses = cast(LossDict, unwrapped(self.loss))
        return {
            f"{name}_{loss}": value
            for name, values in found.items()
            for loss, value in zip(losses, values.unbind(), strict=True)
        }

    def balance_report(self, *args: Any, **kwargs: Any) -> BalanceReport:
        """How the terms compare to the detector's own losses on a batch: their sizes, and how hard they pull.

        Args:
            *args, **kwargs: what the detectors take in training.

        Returns:
            A :class:`BalanceReport`; print it for a table. Parameters, their gradients, buffers, random state and
            ``step`` stay as they are. Terms count in full, whatever ``start_step`` and ``warmup_steps`` say. With
            several processes all of them have to call it.

        Example:
            >>> distiller = Distiller(student, teacher, FBKDLoss(256, num_levels=5), student_layers="backbone")
            >>> report = distiller.balance_report(images, targets)
            >>> [row.name for row in report.own]
            ['loss_box']
        """
        return balance_report(self, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give an object that an earlier release pickled the attributes that were added since."""
        present = {*state, *state["_modules"]}
        if "_sides" not in present:
            state = state | {"_sides": {ONLY: TeacherSide.of_earlier_state(state)}}
        added = {name: value for name, value in _later_attributes().items() if name not in present}
        super().__setstate__(state | added)

    def get_extra_state(self) -> Tensor:
        """Return the step, as a tensor: safetensors and fvcore (Detectron2) take nothing else into a checkpoint."""
        return torch.tensor(self._step, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distiller":
        for side in self._sides.values():
            side.move(fn)
        return super()._apply(fn, recurse)


def _later_attributes() -> dict[str, Any]:
    """Return the attributes that pickles of the first release lack, each with the value that changes nothing."""
    return {
        "total": TOTALS,
        "_weight": 1.0,
        "decay": None,
        "_total_steps": None,
        "share": None,
        "_teacher_every": 1,
        "_is_unlabelled": False,
        "_box_source": None,
        "_backward_watch": BackwardWatch(),
        "_size_watch": SizeWatch(),
    }


def _box_source(loss: nn.Module, student: nn.Module, boxes: Any) -> BoxSource | None:
    """Return where a loss that needs boxes gets them from."""
    if "boxes" in needs_of(loss):
        return BoxSource(student, boxes)
    if boxes is not None:
        raise ValueError("boxes is for a loss that needs them, such as FGDLoss, and this one does not")
    return None


def _gradient_share(settings: ShareSettings, tap: FeatureTap | OutputTap, device: torch.device | None) -> GradientShare:
    """Return what measures the share at the tapped layers."""
    if isinstance(tap, OutputTap):
        raise ValueError(
            "gradient_share needs student_layers by module path: at the student's output its own losses are computed "
            "already, and their gradient cannot be measured there"
        )
    return GradientShare(settings, tap.count(), device)


def _local(parameter: Tensor) -> Tensor:
    """Return this process' part of a parameter that FSDP2 has sharded."""
    return parameter.to_local() if is_sharded(parameter) else parameter


def _check_modules(student: Any, teacher: Any, loss: Any) -> None:
    for name, module in (("student", student), ("loss", loss)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if unwrapped(student) is unwrapped(teacher):
        raise ValueError("student and teacher must be two modules, got the same object twice")


def _checked_total(total: Any) -> Total:
    if total is None or isinstance(total, str):
        return total
    names = as_list(total, "the name of an entry, a list of names, or None", "total")
    for name in names:
        check_text(name, "total")
    return tuple(names)


def _device_of(features: Any) -> torch.device:
    """Return where a student's features are."""
    if isinstance(features, Tensor):
        return features.device
    return _device_of(next(iter(features.values() if isinstance(features, Mapping) else features)))
