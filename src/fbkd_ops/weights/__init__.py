"""Readers of other implementations' weights; none of them needs a framework.

``mmrazor`` reads MMRazor's connectors and the authors' detectors, ``non_local`` the blocks of mmcv, MMRazor and the
authors.
"""

from . import mmrazor, non_local

__all__ = ["mmrazor", "non_local"]
