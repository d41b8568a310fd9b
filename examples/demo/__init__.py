"""A whole distillation on real pixels: ``python -m examples.demo`` (``--help`` lists the options)."""
