"""The losses in what a student returns in training: which they are, and the same with the FBKD terms added."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .._validation import did_you_mean

__all__ = ["TOTALS", "Total", "add_terms", "checked_terms", "is_scalar", "own_losses", "sum_losses"]

Total = str | Sequence[str] | None

# Entries that hold the sum of all losses where a student has one: Hugging Face's name, then YOLOX's.
TOTALS = ("loss", "total_loss")


def add_terms(output: Any, terms: dict[str, Tensor], total: Total, learns: bool = True) -> Any:
    """Return what the student returned with ``terms`` added, in the form it came in.

    Losses are told from other entries of a dict by their gradient; where the student does not learn (under ``no_grad``,
    or frozen) and none has one, by their dtype.

    Their sum is added to a scalar, and to the first entry or attribute of ``total`` that is one; where that is None,
    the sum takes its place. Without such an entry the terms are further entries of a dict or list of losses.

    Raises:
        TypeError: an output without a loss, or in another form.
        ValueError: an output without the entry that ``total`` names, a term that it has already.
    """
    _check_total(output, total)
    name = _total_name(output, total, learns)
    if name is not None:
        return _with_entry(output, name, _entry(output, name) + sum(terms.values()))
    name = _empty_name(output, total)
    if name is not None:
        return _with_entry(output, name, sum(terms.values()))
    if isinstance(output, Mapping) and _loss_names(output, learns):
        _check_losses(output, terms)
        return {**output, **terms}
    if isinstance(output, list) and output and all(map(is_scalar, output)):
        return [*output, *terms.values()]
    if is_scalar(output):
        return output + sum(terms.values())
    raise TypeError(
        "the student returned no loss: it must return a dict or list of losses, a scalar tensor, or an object whose "
        f"loss is one, in training, got {_description(output)}; Distiller(..., combine=...) adds the terms to anything "
        "else, and combine=lambda output, terms: terms returns the terms alone"
    )


def own_losses(output: Any, total: Total) -> dict[str, Tensor]:
    """Return the student's losses by name. What has no gradient (an accuracy) is none."""
    name = _total_name(output, total, learns=True)
    if name is not None:
        entries = {name: _entry(output, name)}
    elif _empty_name(output, total) is not None:
        entries = {}
    elif isinstance(output, Mapping):
        entries = {name: output[name] for name in _loss_names(output, learns=True)}
    elif isinstance(output, (list, tuple)):
        entries = {f"loss {index}": value for index, value in enumerate(output)}
    else:
        entries = {"loss": output}
    losses = {name: _sum(value) for name, value in entries.items() if isinstance(value, (Tensor, list, tuple))}
    return {name: loss for name, loss in losses.items() if loss.requires_grad}


def sum_losses(losses: Mapping[str, Tensor] | Iterable[Tensor] | Tensor) -> Tensor:
    """Return the sum of what a training step returned: bit for bit ``sum(losses.values())``, but always a tensor.

    Python's ``sum`` of an empty dict is the number 0, so that type checkers refuse ``sum(losses.values()).backward()``.

    Args:
        losses: scalars in a dict or a list, every one of which is a loss; or one scalar, which is returned as it is.

    Raises:
        ValueError: a dict or list without a loss.
        TypeError: a loss that is no scalar tensor.

    Example:
        >>> losses = {"loss_box": torch.tensor(1.0), "loss_fbkd_feature": torch.tensor(0.5)}
        >>> sum_losses(losses)
        tensor(1.5000)
    """
    if is_scalar(losses):
        return losses
    if not isinstance(losses, Iterable) or isinstance(losses, (Tensor, str)):
        raise TypeError(f"losses must be a dict or list of scalar tensors, or one of them, got {_description(losses)}")
    entries = dict(losses) if isinstance(losses, Mapping) else dict(enumerate(losses))
    if not entries:
        raise ValueError("losses is empty, expected at least one loss")
    for name, loss in entries.items():
        if not is_scalar(loss):
            raise TypeError(f"losses[{name!r}] must be a scalar tensor, got {_description(loss)}")
    first, *others = entries.values()
    return sum(others, first)


def is_scalar(value: Any) -> TypeGuard[Tensor]:
    """Return whether the value is a tensor without dimensions."""
    return isinstance(value, Tensor) and value.dim() == 0


def _names(total: Total) -> Sequence[str]:
    return (total,) if isinstance(total, str) else total or ()


def _total_name(output: Any, total: Total, learns: bool) -> str | None:
    """Return the entry that the terms are added to. Scalars under these names may also be for the log alone."""
    for name in _names(total):
        value = _entry(output, name) if _has_entry(output, name) else None
        is_chosen = isinstance(total, str) or not _is_plain_dict(output)
        if is_scalar(value) and (is_chosen or _has_gradient(value, learns)):
            return name
    return None


def _empty_name(output: Any, total: Total) -> str | None:
    """Return the entry that would hold the total and is None: the images have no labels."""
    for name in _names(total):
        if _has_entry(output, name) and _entry(output, name) is None:
            return name
    return None


def _has_entry(output: Any, name: str) -> bool:
    """Whether an output has an entry, or an attribute. A ModelOutput has its entries of None as attributes only."""
    if isinstance(output, tuple):
        return name in getattr(output, "_fields", ())
    if not isinstance(output, Mapping):
        return hasattr(output, name)
    return name in output or (not _is_plain_dict(output) and name in getattr(output, "__dict__", ()))


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _with_entry(output: Any, name: str, value: Tensor | int) -> Any:
    if _is_plain_dict(output) or (isinstance(output, Mapping) and not isinstance(output, MutableMapping)):
        return {**output, name: value}
    if isinstance(output, MutableMapping):
        is_new = name not in output
        output[name] = value
        if is_new and isinstance(output, OrderedDict):
            output.move_to_end(name, last=False)  # a ModelOutput's first entry is its loss
        return output
    is_tuple = isinstance(output, tuple)  # a named one: it has the entry
    if _is_frozen(output):
        return dataclasses.replace(output, **{name: value})
    if is_tuple:
        return output._replace(**{name: value})
    setattr(output, name, value)
    return output


def _is_frozen(output: Any) -> bool:
    parameters = getattr(output, "__dataclass_params__", None)
    return dataclasses.is_dataclass(output) and parameters is not None and parameters.frozen


def _is_plain_dict(output: Any) -> bool:
    return type(output) in (dict, OrderedDict)


def _loss_names(output: Mapping, learns: bool) -> list[str]:
    """Return the losses: scalars with a gradient, and lists of tensors with one (MMDetection's, per level)."""
    return [name for name, value in output.items() if _is_loss(value, learns)]


def _is_loss(value: Any, learns: bool) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(part, Tensor) and _has_gradient(part, learns) for part in value)
    return isinstance(value, Tensor) and value.numel() == 1 and _has_gradient(value, learns)


def _has_gradient(value: Tensor, learns: bool) -> bool:
    return value.requires_grad or (not learns and value.is_floating_point())


def _check_total(output: Any, total: Total) -> None:
    if not isinstance(total, str):
        return
    if isinstance(output, (Tensor, list)) or not _has_entry(output, total):
        names = output if isinstance(output, Mapping) else getattr(output, "__dict__", ())
        raise ValueError(
            f"total names {total!r}, which is not in what the student returned: {_description(output)}"
            f"{did_you_mean(total, names)}"
        )
    value = _entry(output, total)
    if value is not None and not is_scalar(value):
        raise TypeError(f"total names {total!r}, which must be a scalar tensor or None, got {_description(value)}")


def _check_losses(losses: Mapping, terms: dict[str, Tensor]) -> None:
    taken = sorted(set(losses) & set(terms))
    if taken:
        raise ValueError(f"the student's losses already have {', '.join(map(repr, taken))}")
    for name, value in losses.items():
        if isinstance(value, Tensor) and value.numel() != 1 and value.requires_grad:
            raise TypeError(
                f"{name!r} among the student's losses is no loss but {_description(value)} with a gradient: name the "
                "entry that is differentiated with Distiller(..., total=...), or make what a step returns with "
                "Distiller(..., combine=...)"
            )


def _description(value: Any) -> str:
    """Return an error's name for an output: ``Tensor(2, 5)``, ``dict with 'logits' Tensor(2, 5, 8, 8)``."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind}{tuple(value.shape)}"
    if isinstance(value, Mapping):
        entries = [
            f"{name!r} {_description(part) if isinstance(part, Tensor) else type(part).__name__}"
            for name, part in value.items()
        ]
        return f"{kind} with {', '.join(entries)}" if entries else f"empty {kind}"
    return kind


def _sum(value: Any) -> Tensor:
    """MMDetection has lists of losses, one per level."""
    return sum(
        (part.sum() for part in (value if isinstance(value, (list, tuple)) else [value])), torch.zeros((), device="cpu")
    )


def checked_terms(terms: Any, name: str = "loss") -> dict[str, Tensor]:
    """Return what a loss has returned, a dict of scalars; errors call the loss ``name``."""
    if not isinstance(terms, Mapping) or not all(map(is_scalar, terms.values())):
        raise TypeError(f"{name} must return a dict of scalar tensors, got {type(terms).__name__}")
    return dict(terms)
