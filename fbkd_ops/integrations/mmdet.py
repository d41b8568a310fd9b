"""FBKD in MMDetection: a detector that has another one as its teacher."""

import copy
from collections.abc import Mapping
from typing import Any, Optional, Union

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from ..distiller import Distiller, Levels, chosen_levels
from ..feature_tap import FeatureTap, Layers
from ..loss import FBKDLoss

__all__ = ["FBKDDetector"]

Model = Union[dict[str, Any], nn.Module]

BLANK_SIZE = 128  # pixels; enough for a P7


@MODELS.register_module()
class FBKDDetector(Distiller, BaseModel):
    """A detector of MMDetection that learns from a frozen one, for MMEngine's ``Runner``.

    In ``mode="loss"`` the student's losses come with four FBKD terms between the features of both; in every other mode
    it is the student. Checkpoints hold ``student.*`` and ``loss.*``, never the teacher, and a copy (``EMAHook`` makes
    one) shares the teacher. ``revise_keys=[(r"^student\\.", "")]`` of MMEngine's ``load_checkpoint`` gives a plain
    student. Both see the images as the student's data preprocessor leaves them.

    Args:
        student: config of a detector, or a built one; a built one keeps the weights that it has.
        teacher: the same for the teacher.
        loss: arguments of :class:`fbkd_ops.FBKDLoss`; the widths are read off the features of a blank image.
        teacher_ckpt: the teacher's checkpoint, a path or an address, every key of which must fit.
        layers: where the features are in the student, and in the teacher where ``teacher_layers`` is not given; the
            neck's outputs by default.
        data_preprocessor: the student's by default.
        **settings: further ones of :class:`fbkd_ops.Distiller`: ``teacher_layers``, ``teacher_entry``,
            ``student_levels``, ``teacher_levels``, ``resize``, ``start_step``, ``stop_step``, ``warmup_steps``.

    Raises:
        RuntimeError: a ``teacher_ckpt`` that does not fit the teacher.
        TypeError, ValueError: as for :class:`fbkd_ops.Distiller` and :class:`fbkd_ops.FBKDLoss`.

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
        loss: Optional[dict[str, Any]] = None,
        teacher_ckpt: Optional[str] = None,
        layers: Layers = "neck",
        data_preprocessor: Optional[Model] = None,
        **settings: Any,
    ):
        student, teacher = _built(student), _built(teacher)
        if teacher_ckpt is not None:
            load_checkpoint(teacher, teacher_ckpt, map_location="cpu", strict=True)
            teacher._is_init = True
        teacher.requires_grad_(False)
        teacher_layers = settings.pop("teacher_layers", layers)
        widths = (
            _widths(student, layers, settings.get("student_levels"), "layers"),
            _widths(teacher, teacher_layers, settings.get("teacher_levels"), "teacher_layers"),
        )
        loss = FBKDLoss(*widths, **(loss or {}))
        super().__init__(student, teacher, loss, student_layers=layers, teacher_layers=teacher_layers, **settings)
        self.data_preprocessor = _built(data_preprocessor) if data_preprocessor else student.data_preprocessor

    def forward(self, inputs: Tensor, data_samples: Optional[list] = None, mode: str = "tensor") -> Any:
        """The student's losses and the terms in ``mode="loss"``, in training; the student's output in any other mode.

        Args:
            inputs: images ``(N, 3, H, W)``, preprocessed.
            data_samples: their annotations.
            mode: ``"loss"``, ``"predict"`` or ``"tensor"``.
        """
        if mode != "loss":
            return self.student(inputs, data_samples, mode=mode)
        return super().forward(inputs, data_samples, mode=mode)

    def init_weights(self) -> None:
        """Make the weights of what has none yet, the teacher's too."""
        super().init_weights()
        if not self.teacher.is_init:
            self.teacher.init_weights()

    def __deepcopy__(self, memo: dict[int, Any]) -> "FBKDDetector":
        """The copy has the very same teacher."""
        made = type(self).__new__(type(self))
        memo |= {id(self): made, id(self.teacher): self.teacher}
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def _built(model: Model) -> nn.Module:
    """A built one is marked as having its weights, which ``init_weights`` leaves alone then."""
    if isinstance(model, dict):
        return MODELS.build(model)
    model._is_init = True
    return model


def _widths(model: nn.Module, layers: Layers, levels: Levels, name: str) -> list[int]:
    """Channels of the features of a blank image."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), FeatureTap(model, layers, name=name, stop_when_complete=True) as tap:
        model(torch.zeros(1, 3, BLANK_SIZE, BLANK_SIZE))
    model.train(was_training)
    features = chosen_levels(tap.features(), levels, f"{name}'s levels")
    features = features.values() if isinstance(features, Mapping) else features
    return [feature.shape[1] for feature in features]
