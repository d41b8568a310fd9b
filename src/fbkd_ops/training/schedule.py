"""When the terms of a distillation are added, and how their weight changes over the training."""

import math
import numbers
from typing import Any, Literal, NamedTuple, get_args

from .._validation import check_choice, is_int

__all__ = ["Decay", "Schedule", "check_count"]

Decay = Literal["cosine"]


class Schedule(NamedTuple):
    """A factor of the terms' weight for each training step.

    It is 0 before ``start_step``, grows linearly over ``warmup_steps``, stays 1 or decays, and is 0 from the end on.
    The end is ``stop_step``; with a ``decay`` and no ``stop_step`` it is ``total_steps``. With ``every`` it is that
    many times as large in every so many-th step from ``start_step`` on, and 0 in between.
    """

    start_step: int = 0
    stop_step: int | float | None = None  # a float in (0, 1): of total_steps
    warmup_steps: int = 0
    decay: Decay | None = None  # from the end of the warm-up to the end
    total_steps: int | None = None  # of the whole training
    every: int = 1  # the steps from one with terms to the next, in which they count as many times

    def is_constant(self) -> bool:
        """Return whether the factor is 1 in every step."""
        is_full = self.start_step == 0 and self.stop_step is None and self.warmup_steps <= 1
        return is_full and self.decay is None and self.every == 1

    def needs_length(self) -> bool:
        """Return whether ``total_steps`` is needed and not there."""
        return self.total_steps is None and (_is_fraction(self.stop_step) or self.is_open())

    def is_open(self) -> bool:
        """Return whether a decay goes on until the training ends."""
        return self.decay is not None and self.stop_step is None

    def checked(self) -> "Schedule":
        """Return it as it is.

        Raises:
            ValueError: a number out of its range, an end before the start, a decay without a step of its own.
        """
        check_count(self.start_step, "start_step")
        check_count(self.warmup_steps, "warmup_steps")
        if self.total_steps is not None and (not is_int(self.total_steps) or self.total_steps < 1):
            raise ValueError(f"total_steps must be None or an int >= 1, got {self.total_steps!r}")
        if not is_int(self.every) or self.every < 1:
            raise ValueError(f"teacher_every must be an int >= 1, got {self.every!r}")
        stop: Any = self.stop_step
        if not (stop is None or _is_fraction(stop) or (is_int(stop) and stop >= self.start_step)):
            raise ValueError(
                f"stop_step must be None, an int >= start_step ({self.start_step}), or a float between 0 and 1 that "
                f"is the part of total_steps, got {self.stop_step!r}"
            )
        if self.decay is not None:
            check_choice(self.decay, get_args(Decay), "decay")
        end = None if self.needs_length() else self.end()
        first = self.start_step if self.decay is None else self.start_step + self.warmup_steps + 1
        if end is not None and end < first:
            needed = "start_step" if self.decay is None else "start_step + warmup_steps + 1, to have a step to decay in"
            raise ValueError(
                f"the terms end at step {end} (stop_step={self.stop_step}, total_steps={self.total_steps}), expected "
                f"at least {first}: {needed}"
            )
        return self

    def end(self) -> int | None:
        """Return the first step without terms, None where there is none.

        Raises:
            ValueError: it depends on ``total_steps``, which is not given.
        """
        if self.needs_length():
            cause = "decay without a stop_step" if self.is_open() else f"stop_step={self.stop_step}"
            raise ValueError(
                f"{cause} needs the length of the training: give total_steps, the number of its training forwards "
                "(epochs times batches an epoch)"
            )
        if self.total_steps is not None and self.stop_step is not None and _is_fraction(self.stop_step):
            return round(self.stop_step * self.total_steps)
        return self.total_steps if self.is_open() else self.stop_step  # type: ignore[return-value]

    def factor(self, step: int) -> float:
        """Return the factor of a step, counted from 0, in [0, every]."""
        end = self.end()
        if step < self.start_step or (end is not None and step >= end) or (step - self.start_step) % self.every:
            return 0.0
        return self.every * self._course(step, end)

    def _course(self, step: int, end: int | None) -> float:
        """Return how far the weight has grown or decayed, in [0, 1]."""
        decayed = step - self.start_step - self.warmup_steps
        if self.decay is None or end is None or decayed < 0:
            return min(1.0, (step - self.start_step + 1) / max(self.warmup_steps, 1))
        return (1 + math.cos(math.pi * decayed / (end - self.start_step - self.warmup_steps))) / 2


def _is_fraction(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and 0 < float(value) < 1


def check_count(value: Any, name: str) -> None:
    """Refuse what is no int >= 0, with a ValueError."""
    if not is_int(value) or value < 0:
        raise ValueError(f"{name} must be an int >= 0, got {value!r}")
