"""What is warned of once, and what is refused at a loss's first call.

An ``FBKDLoss`` and a ``Distiller`` warn of features, terms and parameters with which nothing is learned. A loss refuses
layers that it could not use as they are.

None of it waits for a GPU, but for looks at the teacher and the sizes in a distiller's first step, and none of it is
part of a compiled graph. Copies and pickles of a watch start anew.
"""

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ._numerics import is_fake
from ._validation import check_layer, check_same_device

__all__ = [
    "BackwardWatch",
    "FiniteWatch",
    "GradientWatch",
    "LayerWatch",
    "ShareWatch",
    "SizeWatch",
    "TeacherImagesWarning",
    "TeacherWatch",
    "UntrainedTeacherWarning",
    "UpdateWatch",
    "can_watch",
]


class TeacherImagesWarning(UserWarning):
    """The teacher is given images that are normalised otherwise than those with which it was trained."""


class UntrainedTeacherWarning(UserWarning):
    """The teacher's BatchNorms have seen no image, so it was never trained, or its weights were not loaded."""


def can_watch(tensor: Tensor) -> bool:
    """Whether Python can look at values: not while a graph is compiled or captured, nor where there are none."""
    if torch.compiler.is_compiling() or is_fake(tensor):
        return False
    if tensor.device.type != "cuda":
        return True
    with torch.cuda.device(tensor.device):
        return not torch.cuda.is_current_stream_capturing()


class _Watch:
    def __reduce__(self):
        return type(self), ()


class GradientWatch(_Watch):
    """Warns of features that carry a gradient on the wrong side."""

    def __init__(self) -> None:
        self._warned_of_student = self._warned_of_teacher = False

    def see(self, students: list[Tensor], teachers: list[Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        if not self._warned_of_student and not any(student.requires_grad for student in students):
            self._warned_of_student = True
            warnings.warn(
                "student_features carry no gradient, so the student learns nothing from them: were they computed under "
                "torch.no_grad(), inside a reentrant checkpoint, by a frozen student, or detached? (said once)"
            )
        if not self._warned_of_teacher and any(teacher.requires_grad for teacher in teachers):
            self._warned_of_teacher = True
            warnings.warn(
                "teacher_features carry a gradient, which the loss does not use but whose graph takes memory: run the "
                "teacher under torch.no_grad() and in eval mode (said once)"
            )


class _Arrival:
    """Brings a GPU's values to Python some calls later, so that nothing waits for them."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event, Any] | None = None

    def exchange(self, values: Tensor, note: Any) -> tuple[Tensor, Any] | None:
        """Send values on their way if none are. Return earlier ones, with their note, once they are on the CPU."""
        arrived = None
        if self._pending is not None:
            earlier, event, earlier_note = self._pending
            if not event.query():
                return None
            arrived = earlier, earlier_note
        arriving = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        arriving.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        self._pending = (arriving, event, note)
        return arrived


class FiniteWatch(_Watch):
    """Warns of levels whose terms are NaN or infinite: on the CPU at once, on a GPU at one of the next calls."""

    def __init__(self) -> None:
        self._warned, self._arrival = False, _Arrival()

    def see(self, terms: Tensor, names: list[tuple[int, str]], students: list[Tensor], teachers: list[Tensor]) -> None:
        """Look at ``terms (K,)`` of the levels and kinds ``names``."""
        if self._warned:
            return
        terms = terms.detach()
        if terms.device.type == "cpu":
            self._report(terms, names, students, teachers)
        elif terms.device.type == "cuda":
            arrived = self._arrival.exchange(terms, names)
            if arrived is not None:
                self._report(*arrived, [], [])

    def _report(
        self, terms: Tensor, names: list[tuple[int, str]], students: list[Tensor], teachers: list[Tensor]
    ) -> None:
        """Warn of values that are not finite. Numbers of Python tell it of the few terms without an op of PyTorch."""
        broken: dict[int, list[str]] = {}
        for (level, term), value in zip(names, terms.tolist(), strict=True):
            if not math.isfinite(value):
                broken.setdefault(level, []).append(term)
        if not broken:
            return
        self._warned = True
        levels = "; ".join(
            f"level {level}: {', '.join(terms)}{_origin(level, students, teachers)}"
            for level, terms in sorted(broken.items())
        )
        warnings.warn(f"terms of the loss are not finite: {levels} (said once)")


def _origin(level: int, students: list[Tensor], teachers: list[Tensor]) -> str:
    """Which side's features are to blame for a level, where they are at hand."""
    sides = {"student": students, "teacher": teachers}
    broken = [name for name, features in sides.items() if features and not features[level].isfinite().all()]
    return f" (the {' and the '.join(broken)} features are not)" if broken else ""


class LayerWatch(_Watch):
    """Refuses, once, layers inside a loss that it could not use as they are."""

    def __init__(self) -> None:
        self._passed = False

    def see(self, loss: nn.Module) -> None:
        """Look at every layer at the first call, and whenever a graph is compiled, where it costs no step anything.

        Raises:
            RuntimeError: a layer with hooks.
            ValueError: parameters or buffers on different devices.
        """
        if not torch.compiler.is_compiling():
            if self._passed:
                return
            _check_devices(loss)
        for name, layer in loss.named_modules():
            if layer is not loss and "parametrizations" not in name:
                check_layer(layer, f"the loss's {name}")
        if not torch.compiler.is_compiling():
            self._passed = True


def _check_devices(loss: nn.Module) -> None:
    tensors = [*loss.named_parameters(), *loss.named_buffers()]
    for name, tensor in tensors[1:]:
        check_same_device(tensor, tensors[0][1], f"the loss's {name}", f"its {tensors[0][0]}")


class UpdateWatch(_Watch):
    """Warns of parameters that stay as they are while gradients reach them: no optimizer has them.

    Version counters tell it for free. Fused optimizers do not move them: where a value moved without its counter there
    is such a one, and a parameter that stayed may have had a gradient of 0.
    """

    PASSES = 10

    def __init__(self) -> None:
        self._passes = 0
        self._first: dict[str, tuple[int, Tensor]] = {}

    def see(self, module: nn.Module, terms: dict[str, Tensor]) -> None:
        """Count the backward pass of ``terms``, and compare the parameters of ``module`` then."""
        if self._passes > self.PASSES:
            return
        used = next((term for term in terms.values() if term.requires_grad), None)
        if used is not None:
            used.register_hook(lambda _: self._count(module))

    def _count(self, module: nn.Module) -> None:
        weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        if self._passes == 0:
            self._first = {name: (weight._version, weight.detach().clone()) for name, weight in weights.items()}
        self._passes += 1
        self._first = {
            name: first for name, first in self._first.items() if name in weights and weights[name]._version == first[0]
        }
        if not self._first:
            self._passes = self.PASSES + 1
        elif self._passes > self.PASSES:
            if all(torch.equal(weights[name], value) for name, (_, value) in self._first.items()):
                self._warn(list(self._first))
            self._first = {}

    def _warn(self, still: list[str]) -> None:
        warnings.warn(
            f"{len(still)} parameters of the loss, {still[0]!r} among them, received gradients in {self.PASSES} "
            "backward passes and never changed: give loss.parameters() (or distiller.parameters()) to the optimizer. "
            "If gradients are accumulated over more passes than that, nothing is wrong (said once)"
        )


class ShareWatch(_Watch):
    """Warns of gradients that tell no share, ten times in a row."""

    FAILURES = 10

    def __init__(self):
        self._warned, self._arrival = False, _Arrival()

    def see(self, failed: Tensor) -> None:
        """Look at how many measurements in a row could not be used."""
        if self._warned or not can_watch(failed):
            return
        if failed.device.type == "cpu":
            self._report(failed)
        elif failed.device.type == "cuda":
            arrived = self._arrival.exchange(failed, None)
            if arrived is not None:
                self._report(arrived[0])

    def _report(self, failed: Tensor) -> None:
        if int(failed) < self.FAILURES:
            return
        self._warned = True
        warnings.warn(
            f"gradient_share: in {self.FAILURES} measurements in a row the gradient of the detector's own losses at "
            "the tapped maps, or of the terms, was 0 or not finite, so the terms keep their factor. Are the losses "
            "differentiated, do the tapped modules feed them, and are both finite? (said once)"
        )


class SizeWatch(_Watch):
    """Warns at the first step of terms that are far larger than the detector's own losses."""

    RATIO = 30

    def __init__(self):
        self.looked = False

    def see(self, own: dict[str, Tensor], terms: dict[str, Tensor]) -> None:
        """Compare the sums, which waits for a GPU once."""
        if not own or not terms or not can_watch(next(iter(terms.values()))):
            return
        self.looked = True
        mine, theirs = (sum(abs(float(loss.detach())) for loss in losses.values()) for losses in (own, terms))
        if theirs > self.RATIO * mine > 0:
            warnings.warn(
                f"the terms of the distillation are {theirs / mine:.3g} times as large as the detector's own losses, "
                "with which few trainings go well: a preset's weights are for two images of 800 x 1344 pixels and 256 "
                "channels. distiller.balance_report(...) says how hard they pull; Distiller(..., gradient_share=0.1) "
                "weighs them by that, weight= by a number (said once)"
            )


class TeacherWatch(_Watch):
    """Warns at the first training step of a teacher from which nothing can be learned. Later steps cost nothing."""

    def __init__(self):
        self.looked = False

    def see(self, teacher: nn.Module, find_difference: Callable[[], str | None]) -> None:
        """Look once, outside of compiled graphs. A GPU is waited for once where the teacher is trained.

        Args:
            teacher: whose BatchNorms are looked at.
            find_difference: returns how the images that the teacher is given and those that it was trained with
                differ, in words; None where they do not.
        """
        if torch.compiler.is_compiling():
            return
        norms: list[Any] = [
            each for each in teacher.modules() if isinstance(each, _BatchNorm) and _has_statistics(each)
        ]
        if norms and not can_watch(norms[0].running_mean):
            return
        self.looked = True
        if norms and all(map(_is_untouched, norms)):
            self._warn_of_weights(norms)
        difference = find_difference()
        if difference is not None:
            warnings.warn(
                f"the teacher is given images {difference}, so its features are not those that it learned: "
                "Distiller(..., teacher_input=Renormalize(student=(mean, std), teacher=(mean, std))), or a function of "
                "your own, makes its images; warnings.filterwarnings('ignore', "
                "category=fbkd_ops.TeacherImagesWarning) if the images are right as they are (said once)",
                TeacherImagesWarning,
            )

    def _warn_of_weights(self, norms: list[Any]) -> None:
        are_new = all(_has_first_weights(norm) for norm in norms)
        support = ", and their weights are ones and zeros, as in a new model" if are_new else ""
        warnings.warn(
            f"the teacher was never trained: its {len(norms)} BatchNorms have seen no image (running_mean is 0, "
            f"running_var 1){support}, so the student would learn from random features. Load the teacher's weights "
            "before the distiller is made: teacher.load_state_dict(torch.load(...)), and look at what it returns with "
            "strict=False; warnings.filterwarnings('ignore', category=fbkd_ops.UntrainedTeacherWarning) if that is "
            "meant (said once)",
            UntrainedTeacherWarning,
        )


def _has_statistics(norm: Any) -> bool:
    return norm.running_mean is not None and not is_lazy(norm.running_mean)


def _is_untouched(norm: Any) -> bool:
    """Whether the running statistics are those of a new BatchNorm. Frozen ones of a trained model have others."""
    seen = norm.num_batches_tracked
    is_first = (norm.running_mean == 0).all() & (norm.running_var == 1).all()
    return bool(is_first if seen is None else is_first & (seen == 0).to(is_first.device))


def _has_first_weights(norm: Any) -> bool:
    """Whether weights and biases are such as models are initialised with; the last norms of residual blocks have 0."""
    if norm.weight is None:
        return True
    return bool(((norm.weight == 0) | (norm.weight == 1)).all() & (norm.bias == 0).all())


class BackwardWatch(_Watch):
    """Warns of terms that no backward pass reaches: they are in nothing that is differentiated.

    A hook on each forward's terms lives as long as their graph. Graphs that are alive may be differentiated later (a
    sum of losses over many batches); the last one is alive while the caller keeps its losses.
    """

    FORWARDS = 10

    def __init__(self) -> None:
        self._warned = False
        self._hooks: list[weakref.ref[Callable[[Tensor], None]]] = []  # of the forwards since the last backward pass

    def see(self, terms: dict[str, Tensor]) -> None:
        """Count the forward of ``terms`` and, at their backward pass, begin anew."""
        if self._warned or torch.compiler.is_compiling():
            return
        used = [term for term in terms.values() if term.grad_fn is not None]
        if not used or not can_watch(used[0]):
            return
        alive = sum(hook() is not None for hook in self._hooks)
        if len(self._hooks) >= self.FORWARDS and alive <= 1:
            self._warn()
            return

        def reached(gradient: Tensor) -> None:
            self._hooks.clear()

        self._hooks.append(weakref.ref(reached))
        for term in used:
            term.register_hook(reached)

    def _warn(self) -> None:
        self._warned = True
        warnings.warn(
            f"the terms of the distillation were in no backward pass in {self.FORWARDS} training forwards, so nothing "
            "is distilled: differentiate all that the distiller returns. Where its total is in one entry, "
            "Distiller(..., total='its name') adds the terms to it (said once)"
        )
