"""Entry point of ``python -m examples.demo``."""

import os
import sys

# Threads that wait for each other spin by default: with another program on two cores a step took 2.8 s, asleep 0.28 s.
# Read when PyTorch is loaded, so before the imports below.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .cli import main  # noqa: E402

sys.exit(main())
