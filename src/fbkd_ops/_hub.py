"""What differs in a build of Hugging Face's kernel-builder, which build.toml at the root of the source tree describes.

Such a build is a copy of this package with one library, ``metadata.json``, and a module ``_ops`` that loads the
library. Its ops are in a namespace of that build alone, so that several builds serve one process.
"""

import importlib
import json
from pathlib import Path

__all__ = ["BACKEND", "NAMESPACE"]


def _backend() -> str:
    """Return what kernel-builder built for, ``"cpu"`` or ``"cuda"``; empty in every other copy of the package."""
    path = Path(__file__).with_name("metadata.json")
    return json.loads(path.read_text())["backend"]["type"] if path.exists() else ""


BACKEND = _backend()
NAMESPACE = importlib.import_module(f"{__package__}._ops").ops.name if BACKEND else "fbkd_ops"
