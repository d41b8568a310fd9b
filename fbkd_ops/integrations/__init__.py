"""Bridges to other frameworks, one module a framework; each imports its framework, if it needs it at all, when it is
called."""

from . import mmrazor, non_local

__all__ = ["mmrazor", "non_local"]
