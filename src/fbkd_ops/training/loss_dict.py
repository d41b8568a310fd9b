"""Several losses in one distiller, each with levels of its own."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._validation import Features, check_text
from .feature_tap import Branches, unwrapped
from .levels import Levels, checked_levels, matched
from .student_losses import checked_terms

__all__ = ["ByTeacher", "LossDict", "needs_of"]


class ByTeacher(dict):
    """What each of several teachers gave, by the name that its loss has too."""


class LossDict(nn.ModuleDict):
    """Losses by name, whose terms come in one dict.

    A term that two losses give gets the loss's name behind its own: ``loss_cwd_neck``, ``loss_cwd_head``.

    Args:
        losses: modules of two feature lists that return a dict of scalars.
        student_levels: which of the features each loss reads, by its name; None, or no entry: all.
        teacher_levels: the same for the teacher.
        resize: whether the teacher's maps get the sizes of the student's.
    """

    def __init__(self, losses: Mapping[str, nn.Module], student_levels: Any, teacher_levels: Any, resize: bool = False):
        super().__init__()
        self.resize = resize
        if not losses:
            raise ValueError("loss is empty, expected at least one loss")
        for name, loss in losses.items():
            check_text(name, "the name of a loss")
            if not name.isidentifier() or hasattr(self, name) or name in ("student_levels", "teacher_levels"):
                raise ValueError(
                    f"loss: the name {name!r} must be an identifier, and none of nn.ModuleDict's own names"
                )
            if not isinstance(loss, nn.Module):
                raise TypeError(f"loss[{name!r}] must be a torch.nn.Module, got {type(loss).__name__}")
            self[name] = loss
        self.student_levels = _levels_by_loss(student_levels, self, "student_levels")
        self.teacher_levels = _levels_by_loss(teacher_levels, self, "teacher_levels")

    @property
    def term_names(self) -> list[str]:
        """Names of the terms, as far as the losses tell theirs."""
        return list(_merged({name: dict.fromkeys(_term_names(name, loss)) for name, loss in self.items()}))

    @property
    def needs(self) -> list[str]:
        """What the losses need besides the features."""
        return list(dict.fromkeys(each for loss in self.values() for each in needs_of(loss)))

    def forward(
        self,
        student_features: Features | Branches,
        teacher_features: Features,
        factors: Tensor | None = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        """Return the terms of all losses.

        Args:
            student_features: of all losses, or :class:`Branches`: of each its own.
            teacher_features: of all losses, or :class:`ByTeacher`: of each its teacher's; what ``others`` has, too.
            factors: ``(losses,)``, what each loss's terms are multiplied with.
            **others: what ``needs`` names.
        """
        terms = {}
        for index, (name, loss) in enumerate(self.items()):
            features = student_features[index] if isinstance(student_features, Branches) else student_features
            students, teachers, needed = matched(
                features,
                _of_teacher(teacher_features, name),
                {each: _of_teacher(others[each], name) for each in needs_of(loss)},
                (self.student_levels[name], self.teacher_levels[name]),
                self.resize,
                f"[{name!r}]",
            )
            own = checked_terms(loss(students, teachers, **needed), f"loss[{name!r}]")
            terms[name] = own if factors is None else {key: factors[index] * term for key, term in own.items()}
        return _merged(terms)


def _of_teacher(value: Any, name: str) -> Any:
    return value[name] if isinstance(value, ByTeacher) else value


def needs_of(loss: nn.Module) -> tuple[str, ...]:
    """Return what a loss needs besides the features, by its attribute ``needs``."""
    return tuple(getattr(unwrapped(loss), "needs", ()))


def _term_names(name: str, loss: nn.Module) -> list[str]:
    return list(getattr(unwrapped(loss), "term_names", (f"loss_{name}",)))


def _merged(terms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return all losses' terms in one dict."""
    counts = Counter(key for own in terms.values() for key in own)
    merged: dict[str, Any] = {}
    for name, own in terms.items():
        for key, term in own.items():
            unique = key if counts[key] == 1 else f"{key}_{name}"
            if unique in merged:
                raise ValueError(f"loss: two terms are called {unique!r}; give one of the losses another name")
            merged[unique] = term
    return merged


def _levels_by_loss(levels: Any, losses: LossDict, name: str) -> dict[str, Levels]:
    """Return each loss's levels, of the same for all or of a dict by loss."""
    if not isinstance(levels, Mapping):
        return dict.fromkeys(losses, checked_levels(levels, name))
    unknown = [each for each in levels if each not in losses]
    if unknown:
        raise ValueError(f"{name} names the loss {unknown[0]!r}, but there are {', '.join(map(repr, losses))}")
    return {each: checked_levels(levels.get(each), f"{name}[{each!r}]") for each in losses}
