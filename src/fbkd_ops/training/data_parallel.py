"""Distillation in several processes: where the loss goes, and what they share."""

from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._validation import check_flag
from .distiller import Distiller

__all__ = ["data_parallel"]

Module = TypeVar("Module", bound=nn.Module)


def data_parallel(module: Module, *, sync_batch_norm: bool = False, **options: Any) -> Module | DistributedDataParallel:
    """Wrap ``module`` in ``DistributedDataParallel``, unless there is no process group or nothing to learn.

    Wrap the whole :class:`fbkd_ops.Distiller` where you call it yourself: student and loss are then one unit, and every
    parameter is used in every step, also before ``start_step``, so ``find_unused_parameters`` is not needed. Where a
    framework wraps the student itself, give the wrapped student to the distiller and wrap the loss alone:
    ``Distiller(wrapped_student, teacher, data_parallel(loss), ...)``. The teacher is never wrapped.

    Args:
        module: a distiller, a module that holds one, or a loss, on its device already; compiled or not.
        sync_batch_norm: whether the non-local blocks' BatchNorms use the statistics of all processes' batches. All
            other norms, the student's among them, stay as they are.
        **options: for ``DistributedDataParallel``.

    Returns:
        The wrapped module; its gradients are means over processes, as those of any module there. They are exactly those
        of one process with the mean of the losses of each part of the batch if the blocks' norms are synchronized,
        frozen or absent, and those of the joined batch with ``FBKDLoss(..., synchronize=True)`` besides.

    Raises:
        TypeError: something that is no module, a flag that is no bool.

    Example:
        >>> distiller = Distiller(student, teacher, FBKDLoss(256, num_levels=5), student_layers="backbone")
        >>> parallel = data_parallel(distiller, sync_batch_norm=True)
        >>> losses = parallel(images, targets)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a Distiller or a loss, got {type(module).__name__}")
    sync_batch_norm = check_flag(sync_batch_norm, "sync_batch_norm")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return module
    parameter = next(module.parameters(), None)
    if parameter is None:
        return module
    device = parameter.device
    parallel = DistributedDataParallel(module, device_ids=None if device.type == "cpu" else [device], **options)
    if sync_batch_norm:
        # Not before: on the CPU, where PyTorch's own SyncBatchNorm does not run, the wrapper would refuse it.
        for loss in _losses(module):
            nn.SyncBatchNorm.convert_sync_batchnorm(loss)
    return parallel


def _losses(module: nn.Module) -> list[nn.Module]:
    """Return the losses of the distillers in ``module``, whatever wraps these, or the loss that it is itself."""
    return [each.loss for each in module.modules() if isinstance(each, Distiller)] or [module]
