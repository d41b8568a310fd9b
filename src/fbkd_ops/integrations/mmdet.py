"""FBKD in MMDetection: a detector that has another one as its teacher."""

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor
from mmdet.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, PretrainedInit
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from ..training.blank_images import blank_image_features
from ..training.distiller import Distiller
from ..training.feature_tap import Layers
from ..training.levels import Levels, checked_levels, chosen_levels
from ._arguments import loss_settings

__all__ = ["FBKDDetector"]

Model = dict[str, Any] | nn.Module


@MODELS.register_module()
class FBKDDetector(Distiller, BaseModel):
    r"""A detector of MMDetection that learns from a frozen one, for MMEngine's ``Runner``.

    In ``mode="loss"`` the student's losses come with the terms between the features of both; in every other mode
    it is the student. Names that it lacks are the student's, so that hooks find there what they look for
    (``bbox_head``, ``set_epoch``). Checkpoints hold ``student.*`` and ``loss.*``, never the teacher, and a copy
    (``EMAHook`` makes one) shares the teacher. ``revise_keys=[(r"^student\.", "")]`` of MMEngine's ``load_checkpoint``
    gives a plain student; a plain detector's checkpoint in ``load_from`` goes into the student. Both see the images as
    the student's data preprocessor leaves them.

    Args:
        student: config of a detector, or a built one; a built one keeps the weights that it has.
        teacher: the same for the teacher.
        loss: arguments of :class:`fbkd_ops.FBKDLoss`, or of another loss whose name is the ``type`` among them
            (``"PKDLoss"``). Of ``student_channels`` and ``teacher_channels``, those that are not among them are read
            off the features of a blank image.
        teacher_ckpt: the teacher's checkpoint, a path or an address, every key of which must fit. A teacher from a
            config needs one, or an ``init_cfg`` of type ``"Pretrained"``.
        layers: where the features are in the student, and in the teacher where ``teacher_layers`` is not given; the
            neck's outputs by default.
        data_preprocessor: a config or a built one; the student's by default.
        **settings: further ones of :class:`fbkd_ops.Distiller`: ``teacher_layers``, ``teacher_entry``,
            ``teacher_input``, ``student_levels``, ``teacher_levels``, ``resize``, ``start_step``, ``stop_step``,
            ``warmup_steps``, ``decay``, ``weight``, ``gradient_share``, ``share_every``, ``share_steps``, ``boxes``,
            ``teacher_scores``, ``combine``, ``total_steps``, by default the runner's ``max_iters`` where a schedule
            needs it, and ``total``, None by default: MMEngine adds up every entry with "loss" in its name.

    Raises:
        RuntimeError: a ``teacher_ckpt`` that does not fit the teacher.
        TypeError, ValueError: as for :class:`fbkd_ops.Distiller` and the loss; a detector that takes
            no blank image, of whatever size, where the widths are not given.

    Warns:
        UserWarning: a teacher from a config for which no trained weights are named.

    Example:
        >>> custom_imports = dict(imports=["fbkd_ops.integrations.mmdet"])
        >>> model = dict(
        ...     type="mmdet.FBKDDetector",
        ...     student=student_config.model,
        ...     teacher=teacher_config.model,
        ...     teacher_ckpt="retinanet_r101.pth",
        ...     loss=dict(preset="one_stage"),
        ... )

    Seen to train with MMDetection 3.3.0 and MMEngine 0.10.7, in one process; not yet measured on a GPU. With torch 2.6
    or later that MMEngine reads its own checkpoints only under ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1``.
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        loss: dict[str, Any] | None = None,
        teacher_ckpt: str | os.PathLike[str] | None = None,
        layers: Layers = "neck",
        data_preprocessor: Model | None = None,
        **settings: Any,
    ):
        kind, arguments = loss_settings(loss)
        student_model, teacher_model = _built(student, "student"), _built(teacher, "teacher")
        if teacher_ckpt is not None:
            if not isinstance(teacher_ckpt, (str, os.PathLike)):
                raise TypeError(f"teacher_ckpt must be a path or an address, got {type(teacher_ckpt).__name__}")
            load_checkpoint(teacher_model, str(teacher_ckpt), map_location="cpu", strict=True)
            teacher_model._is_init = True
        elif not _has_weights(teacher_model):
            warnings.warn(
                "the teacher is built from a config without trained weights, so the student would learn from a random "
                "head: give teacher_ckpt=..., or a teacher that is built and has its weights"
            )
        teacher_model.requires_grad_(False)
        settings = {"total": None, "teacher_layers": None, "student_levels": None, "teacher_levels": None} | settings
        if settings["teacher_layers"] is None:
            settings["teacher_layers"] = layers
        if "student_channels" not in arguments:
            arguments["student_channels"] = _widths(student_model, layers, settings["student_levels"], "student")
        if "teacher_channels" not in arguments:
            arguments["teacher_channels"] = _widths(
                teacher_model, settings["teacher_layers"], settings["teacher_levels"], "teacher"
            )
        super().__init__(student_model, teacher_model, kind(**arguments), student_layers=layers, **settings)
        if data_preprocessor is not None:
            self.data_preprocessor = _built(data_preprocessor, "data_preprocessor")
        elif hasattr(student_model, "data_preprocessor"):
            self.data_preprocessor = student_model.data_preprocessor

    @classmethod
    def for_model(cls, *args: Any, **settings: Any) -> "FBKDDetector":
        """Refuse: the class itself finds the maps.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "FBKDDetector(student, teacher) finds the neck's maps and their widths by itself; fbkd_ops.Distiller."
            "for_model(student, teacher) pairs maps of equal strides"
        )

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = "tensor") -> Any:
        """Return the student's losses and the terms in ``mode="loss"``, in training; else the student's output.

        With a schedule or ``gradient_share`` the losses come with ``fbkd_weight``, which the terms were multiplied
        with, and ``fbkd_gradient_share``: MMEngine logs them, and adds up only what has "loss" in its name.

        Args:
            inputs: images ``(N, C, H, W)``, preprocessed.
            data_samples: their annotations.
            mode: ``"loss"``, ``"predict"`` or ``"tensor"``.
        """
        if mode != "loss":
            return self.student(inputs, data_samples, mode=mode)
        if not self.training or (self.share is None and self._schedule().is_constant()):
            return super().forward(inputs, data_samples, mode=mode)
        self._collect_share()  # before the weight is read: this is the one that the step has
        weights = self.weights()
        losses = super().forward(inputs, data_samples, mode=mode)
        return {**losses, **weights} if isinstance(losses, Mapping) else losses

    def step_weight(self) -> float:
        if self._schedule().needs_length():
            # RuntimeInfoHook, one of the runner's own hooks, leaves it there as a training begins.
            self.total_steps = MessageHub.get_current_instance().get_info("max_iters")
        return super().step_weight()

    def init_weights(self) -> None:
        """Make the weights of what has none yet, the teacher's too."""
        super().init_weights()
        teacher: Any = self.teacher
        if not getattr(teacher, "_is_init", True):
            teacher.init_weights()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FBKDDetector":
        """Copy all but the teacher, which the copy shares."""
        made = type(self).__new__(type(self))
        memo |= {id(self): made, id(self.teacher): self.teacher}
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name=LearningRateDecayOptimizerConstructor.__name__, force=True)
class StudentLearningRateDecay(LearningRateDecayOptimizerConstructor):
    """MMDetection's learning rates by layer, under its name, which know a layer by ``backbone.`` before its parameters.

    Of a :class:`FBKDDetector` they are the student's, and the loss's layers have the full rate. Otherwise every layer
    of ``student.backbone`` would be taken for a head's. Other models are treated as by MMDetection.
    """

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        if not isinstance(module, FBKDDetector):
            super().add_params(params, module, **kwargs)
            return
        super().add_params(params, module.student, **kwargs)
        learned = {f"loss.{name}": each for name, each in module.loss.named_parameters() if each.requires_grad}
        params.append(dict(params=list(learned.values()), param_names=list(learned)))


def _built(model: Any, name: str) -> Any:
    """Build a config; mark a built model as having its weights, which ``init_weights`` leaves alone then."""
    if isinstance(model, dict):
        return MODELS.build(model)
    is_built = isinstance(model, nn.Module)
    if not is_built:
        raise TypeError(
            f"{name} must be a config of a model (a dict, such as Config.fromfile(...).model) or a built one, "
            f"got {type(model).__name__}"
        )
    model._is_init = True
    return model


def _has_weights(model: nn.Module) -> bool:
    """Whether a detector was built before, or loads whole weights as it is initialised."""
    cfgs = getattr(model, "init_cfg", None) or []
    cfgs = [cfgs] if isinstance(cfgs, dict) else cfgs
    return getattr(model, "_is_init", False) or any(cfg["type"] in ("Pretrained", PretrainedInit) for cfg in cfgs)


def _widths(model: nn.Module, layers: Layers, levels: Levels, side: str) -> list[int]:
    """Channels of the features of a blank image."""
    remedy = f"give their widths: loss=dict({side}_channels=[...])"
    levels = checked_levels(levels, f"{side}_levels")
    features = blank_image_features(model, layers, "layers" if side == "student" else "teacher_layers", remedy)
    features = chosen_levels(features, levels, f"{side}_levels")
    return [feature.shape[1] for feature in (features.values() if isinstance(features, Mapping) else features)]
