"""Triton kernels, one module an op; imported at an op's first use."""
