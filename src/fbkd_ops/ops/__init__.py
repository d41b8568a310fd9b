"""One file for each op: its schemas, its fakes and, where it has a gradient, its ``torch.autograd.Function``.

All run on the backend that they are told.
"""

from . import (
    adapted_masked_l2,
    attention_masks,
    attention_pool,
    cell_relation,
    channel_correlation,
    channel_divergence,
    masked_l2,
    non_local_statistics,
    relation_residual,
    spatial_l2,
)

__all__ = [
    "adapted_masked_l2",
    "attention_masks",
    "attention_pool",
    "cell_relation",
    "channel_correlation",
    "channel_divergence",
    "masked_l2",
    "non_local_statistics",
    "relation_residual",
    "spatial_l2",
]
