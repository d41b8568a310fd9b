"""Entry point of ``python -m examples.train``."""

import os
import sys

# Threads that wait for each other spin by default, which costs other programs on the same cores their time. Read when
# PyTorch is loaded, so before the imports below.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# cuBLAS reads it when it starts; without it `deterministic: true` is refused on GPUs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from .cli import main  # noqa: E402

sys.exit(main())
