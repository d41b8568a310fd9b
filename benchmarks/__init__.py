"""Measurements: what the package's parts cost, against plain PyTorch and against what the machine can do."""
