"""MMRazor 1.0.0's FBKD, PKD, CWD and MGD losses: implementations that owe nothing to this package.

MMRazor does not import whole on a recent torch, so its files are loaded one by one under stub parents.
"""

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VERSION = "1.0.0"
PACKAGES = ("mmrazor", "mmcv-lite", "mmengine")
# Compiled packages that mmcv and mmengine import and that the files do not use.
UNUSED = ("cv2", "yaml")
INSTALL = f"pip install mmrazor=={VERSION} mmcv-lite==2.1.0"


class NotInstalledError(Exception):
    """An implementation of somebody else's is not there; the message says how to get it."""


def versions() -> dict[str, str]:
    """Versions of the packages that are needed, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class _StandIn(types.ModuleType):
    """A module that is not installed: each of its names is 0."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


class Modules(NamedTuple):
    """MMRazor's, of the losses and of FBKD's and MGD's connectors."""

    fbkd: ModuleType
    connectors: ModuleType
    mgd_connector: ModuleType
    pkd: ModuleType
    cwd: ModuleType
    mgd: ModuleType


def load(root: Path) -> Modules:
    """MMRazor's modules; ``root`` is the folder that has the package ``mmrazor`` in it."""
    for name in UNUSED:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = _StandIn(name)
    from mmengine.registry import Registry

    connectors = "mmrazor.models.architectures.connectors"
    parents = ("mmrazor", "mmrazor.models", "mmrazor.models.losses", "mmrazor.models.architectures", connectors)
    for name in (*parents, "mmrazor.registry"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["mmrazor.registry"].MODELS = Registry("models of FBKD")

    def load_file(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, root / f"{name.replace('.', '/')}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    load_file(f"{connectors}.base_connector")
    losses = "mmrazor.models.losses"
    return Modules(
        connectors=load_file(f"{connectors}.fbkd_connector"),
        mgd_connector=load_file(f"{connectors}.mgd_connector"),
        fbkd=load_file(f"{losses}.fbkd_loss"),
        pkd=load_file(f"{losses}.pkd_loss"),
        cwd=load_file(f"{losses}.cwd"),
        mgd=load_file(f"{losses}.mgd_loss"),
    )


@functools.cache
def installed() -> Modules:
    """The modules of the MMRazor that is installed.

    Raises:
        NotInstalledError: it is not, or another version is.
    """
    found = versions()
    if found.keys() != set(PACKAGES) or found["mmrazor"] != VERSION:
        raise NotInstalledError(f"not installed: {INSTALL}")
    return load(Path(importlib.metadata.distribution("mmrazor").locate_file("")))


def connector(module: ModuleType, side: str, channels: int, stride: int, reduction: int, **arguments: Any) -> nn.Module:
    """One level's connector of the ``"student"`` or the ``"teacher"``; ``stride`` is the total pooling factor."""
    make = module.FBKDStudentConnector if side == "student" else module.FBKDTeacherConnector
    # MMRazor's block pools by 2 before it pools by maxpool_stride.
    pools = dict(sub_sample=True, maxpool_stride=stride // 2) if stride > 1 else dict(sub_sample=False)
    return make(in_channels=channels, reduction=reduction, **pools, **arguments)


class Loss(nn.Module):
    """MMRazor's connectors and losses of every level.

    Args:
        channels: width of both sides at every level.
        strides: total pooling factors, one a level.
        reductions: widths over the non-local blocks' inner widths, one a level.
    """

    def __init__(self, channels: int, strides: Sequence[int], reductions: Sequence[int]):
        super().__init__()
        modules = installed()
        for side in ("student", "teacher"):
            made = [
                connector(modules.connectors, side, channels, *level) for level in zip(strides, reductions, strict=True)
            ]
            setattr(self, side, nn.ModuleList(made))
        self.losses = nn.ModuleList(modules.fbkd.FBKDLoss() for _ in strides)

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        levels = zip(self.losses, self.student, self.teacher, students, teachers, strict=True)
        return sum(loss(connect_s(s), connect_t(t)) for loss, connect_s, connect_t, s, t in levels)


class RelationTerm(nn.Module):
    """The relation term, unweighted, of a loss's only level."""

    def __init__(self, loss: Loss):
        super().__init__()
        (student,), (teacher,) = loss.student, loss.teacher
        self.student_non_local, self.teacher_non_local = student.student_non_local, teacher.teacher_non_local
        self.adaptation = student.non_local_adaptation

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        (student,), (teacher,) = students, teachers
        return torch.dist(self.teacher_non_local(teacher), self.adaptation(self.student_non_local(student)), p=2)
