"""Import paths of earlier releases, which documents, configurations and pickled losses name."""

import importlib
import sys

__all__ = ["register_earlier_paths"]

_PATHS = {
    "_batch_norm": "non_local.batch_norm",
    "balance": "training.balance",
    "checkpoints": "training.checkpoints",
    "distiller": "training.distiller",
    "distributed": "training.data_parallel",
    "feature_tap": "training.feature_tap",
    "integrations.mmrazor": "weights.mmrazor",
    "integrations.non_local": "weights.non_local",
    "non_local_block": "non_local.block",
    "student_attributes": "training.student_attributes",
}


def register_earlier_paths() -> None:
    """Make each earlier path the module that has its contents now."""
    for path, current in _PATHS.items():
        parent, _, name = f"{__package__}.{path}".rpartition(".")
        module = importlib.import_module(f"{__package__}.{current}")
        sys.modules[f"{parent}.{name}"] = module
        setattr(sys.modules[parent], name, module)
