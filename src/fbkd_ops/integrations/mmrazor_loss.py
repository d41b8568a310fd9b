"""The FBKD loss for MMRazor's ``ConfigurableDistiller``, under the name ``FBKDOpsLoss``."""

import itertools
from collections.abc import Mapping
from typing import Any

from mmrazor.registry import MODELS
from torch import Tensor, nn

from .._validation import Features
from ..loss import FBKDLoss

__all__ = ["FBKDOpsLoss"]


@MODELS.register_module()
class FBKDOpsLoss(nn.Module):
    """All levels' connectors and losses of MMRazor's FBKD config in one entry of ``distill_losses``.

    The learned layers are in the loss, so that the config has no connectors, and one recorder a side: of the neck. Its
    name in the config must have "loss" in it, as any loss's in MMEngine.

    Args:
        **arguments: what :class:`fbkd_ops.FBKDLoss` takes; ``preset="mmrazor"`` by default, of four levels.

    Attributes:
        loss: the :class:`fbkd_ops.FBKDLoss`, into which
            :func:`fbkd_ops.weights.mmrazor.load_checkpoint` copies the connectors of an earlier run.

    Example:
        >>> custom_imports = dict(imports=["fbkd_ops.integrations.mmrazor_loss"])
        >>> neck = dict(neck=dict(type="ModuleOutputs", source="neck"))
        >>> distiller = dict(
        ...     type="ConfigurableDistiller",
        ...     student_recorders=neck,
        ...     teacher_recorders=neck,
        ...     distill_losses=dict(loss_fbkd=dict(type="FBKDOpsLoss", student_channels=256)),
        ...     loss_forward_mappings=dict(
        ...         loss_fbkd=dict(
        ...             student=dict(recorder="neck", from_student=True),
        ...             teacher=dict(recorder="neck", from_student=False),
        ...         )
        ...     ),
        ... )

    Equal to MMRazor 1.0.0's connectors and losses on the CPU; not yet measured on a GPU.
    """

    def __init__(self, **arguments: Any):
        super().__init__()
        self.loss = FBKDLoss(**{"preset": "mmrazor", **arguments})

    def forward(self, student: Features, teacher: Features) -> list[Tensor]:
        """Return the four terms, which MMEngine adds up; it takes no dict here.

        Args:
            student: maps ``(N, Cs, H, W)`` of the student's neck, finest first, in a list, tuple or dict; those beyond
                the loss's levels are left out.
            teacher: the same of the teacher's neck, ``(N, Ct, H, W)``.

        Raises:
            TypeError, ValueError: as for :class:`fbkd_ops.FBKDLoss`; fewer maps than levels.
        """
        levels = len(self.loss.levels)
        return list(self.loss(_first(student, levels), _first(teacher, levels)).values())


def _first(features: Features, count: int) -> Features:
    """Keep the first maps, in the same form; leave what is no list, tuple or dict for the loss to refuse."""
    if isinstance(features, Mapping):
        return dict(itertools.islice(features.items(), count))
    return features[:count] if isinstance(features, (list, tuple)) else features
