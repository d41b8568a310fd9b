"""One call that builds, tests, measures and profiles the package on a GPU: ``python -m scripts.gpu``."""
