"""Cases in which one size at a time moves away from a base: images, their side, channels, levels."""

from dataclasses import replace

from benchmarks.inputs import FINEST_STRIDE, Case, Suite

SUITES = ("relation", "fbkd_loss")
BASE = {"N": 1, "image": 512, "C": 256}
DIMENSIONS = {
    "N": (1, 2, 4, 8, 16, 32),
    "image": (256, 512, 1024, 2048),
    "C": (64, 128, 256, 512, 1024),
    "levels": (1, 2, 3, 4, 5, 6),
}


def cases(suite: Suite, dimension: str, **facts) -> list[Case]:
    """Those of one of DIMENSIONS; ``facts`` are the other fields of a case. A suite of one level has no ``levels``."""
    if dimension == "levels":
        base = _case(suite, BASE, facts)
        return [_with_levels(base, count) for count in DIMENSIONS["levels"]] if len(base.strides) > 1 else []
    return [_case(suite, BASE | {dimension: size}, facts) for size in DIMENSIONS[dimension]]


def _case(suite: Suite, sizes: dict[str, int], facts: dict) -> Case:
    side = sizes["image"] // FINEST_STRIDE
    shape = (sizes["N"], sizes["C"], side, side)
    return Case(shape, strides=suite.strides(shape), **facts)


def _with_levels(case: Case, count: int) -> Case:
    """The pooling factor of what the suite has no level for is that of its last one."""
    return replace(case, strides=(case.strides + case.strides[-1:] * count)[:count])
