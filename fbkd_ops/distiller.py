"""A student, its teacher and the loss between their features, as one module."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .feature_tap import FeatureTap, Paths

__all__ = ["Distiller"]


class Distiller(nn.Module):
    """Adds the FBKD terms to the losses that a detector computes in training.

    The features are caught by module path. The teacher sees the same arguments as the student, in eval mode and
    without gradient, and only up to the last tapped module. It moves with ``.to()`` but is in no ``parameters()``,
    no ``state_dict()`` and never in training mode. In eval mode the distiller is the student.

    Both must make features of one size of the same arguments. A detector that resizes inside (all of torchvision's
    do, and in training to a random one of several ``min_size``) needs a single ``min_size``, the same on both sides.

    Args:
        student: a detector that returns a dict of losses, or one scalar loss, in training.
        teacher: a trained detector.
        loss: an :class:`fbkd_ops.FBKDLoss`, or any module of two feature lists that returns a dict of scalars.
        student_layers: a module path whose output is the features (tensor, list, tuple or dict), or a list of paths
            of modules that return one tensor each.
        teacher_layers: the same for the teacher; the student's by default.

    Raises:
        ValueError: a module path that does not exist.

    Example:
        >>> loss = FBKDLoss(256, num_levels=5)
        >>> distiller = Distiller(student, teacher, loss, student_layers="backbone")
        >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        >>> losses = distiller(images, targets)  # the student's dict, with four more entries
        >>> sum(losses.values()).backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: nn.Module,
        *,
        student_layers: Paths,
        teacher_layers: Optional[Paths] = None,
    ):
        super().__init__()
        if student is teacher:
            raise ValueError("student and teacher must be two modules, got the same object twice")
        self.student, self.loss = student, loss
        # In a tuple, so that nn.Module does not register the teacher.
        self._unregistered_teacher = (teacher.eval(),)
        self._student_tap = FeatureTap(student, student_layers, "student_layers")
        self._teacher_tap = FeatureTap(
            teacher,
            student_layers if teacher_layers is None else teacher_layers,
            "teacher_layers",
            stop_when_complete=True,
        )
        self._terms: dict[str, Tensor] = {}

    @property
    def teacher(self) -> nn.Module:
        return self._unregistered_teacher[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's losses with the FBKD terms added; in eval mode the student's output as it is.

        Args:
            *args, **kwargs: what the detectors take.

        Returns:
            In training: the student's dict of losses with the terms as further entries, or its scalar loss plus the
            sum of the terms.

        Raises:
            RuntimeError: a tapped module that was not called, or called more than once.
            TypeError: a student that returns neither a dict nor a scalar tensor in training.
            ValueError: features that do not fit the loss or each other, a term that the student has already.
        """
        if not self.training:
            return self.student(*args, **kwargs)
        losses, student_features = self._student_tap.run(*args, **kwargs)
        self.teacher.eval()
        with torch.no_grad():
            _, teacher_features = self._teacher_tap.run(*args, **kwargs)
        terms = self.loss(student_features, teacher_features)
        self._terms = {name: term.detach() for name, term in terms.items()}
        return _added(losses, terms)

    def terms(self) -> dict[str, Tensor]:
        """The FBKD terms of the last training step, detached, for logging; empty before the first."""
        return dict(self._terms)

    def train(self, mode: bool = True) -> "Distiller":
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn, recurse: bool = True) -> "Distiller":
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _added(losses: Any, terms: dict[str, Tensor]) -> Any:
    """The student's losses with ``terms`` added, in the form the losses came in."""
    if isinstance(losses, dict):
        taken = sorted(set(losses) & set(terms))
        if taken:
            raise ValueError(f"the student's losses already have {', '.join(map(repr, taken))}")
        return {**losses, **terms}
    if isinstance(losses, Tensor) and losses.dim() == 0:
        return losses + sum(terms.values())
    raise TypeError(
        "the student must return a dict of losses or a scalar tensor in training, "
        f"got {type(losses).__name__}{tuple(losses.shape) if isinstance(losses, Tensor) else ''}"
    )
