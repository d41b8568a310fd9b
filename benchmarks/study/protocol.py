"""What is trained: data sets with their budgets, arms that differ in one switch, and seeds. docs/study.md says why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fbkd_ops.presets import TERMS


@dataclass(frozen=True)
class Setting:
    """A data set, a pair of detectors and a budget.

    Attributes:
        detector: a key of :data:`benchmarks.study.detectors.DETECTORS`.
        image_size: pixels of the longer side.
        pictures: the number of those that students are trained on.
        teacher_pictures: the same of the teacher, the student's among them.
        val_pictures: the number of those that are scored.
        batch_size: pictures a step.
        steps: of the student.
        teacher_steps: of the teacher.
        time_factor: how many steps a plain student does in the time of one distilled step; measured alone.
        preset: of the FBKD loss.
        inheritable: modules of equal shapes in student and teacher.
    """

    detector: str
    image_size: int
    pictures: int
    teacher_pictures: int
    val_pictures: int
    batch_size: int
    steps: int
    teacher_steps: int
    time_factor: float
    preset: str
    inheritable: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """How a student is trained: every switch that an arm can turn.

    Attributes:
        length: of the training, in the setting's steps; ``"matched"`` for the steps that a plain student does in the
            time of a distilled one.
        pull: how hard the terms pull: None for a plain student, ``"preset"`` for the preset's weights as they are, a
            number for that ``gradient_share``.
        proportions: of the terms' weights: ``"preset"`` for the preset's, ``"size_free"`` for those that weigh
            each term on small pictures as the preset does on large ones.
        loss: the name of the loss; proportions and terms are FBKD's.
        terms: the terms whose weights are not 0.
        feature_norm: of the FBKD loss.
        inherits: whether the setting's inheritable modules start as copies of the teacher's.
        stop: the fraction of the steps after which the terms stop; None for none.
        calibration: the fraction of the steps after which the factor of the share stays as it is; None for none.
    """

    length: int | str = 1
    pull: str | float | None = None
    proportions: str = "preset"
    loss: str = "fbkd"
    terms: tuple[str, ...] = TERMS
    feature_norm: str = "none"
    inherits: bool = False
    stop: float | None = None
    calibration: float | None = None


DIGITS = Setting(
    detector="faster_rcnn",
    image_size=64,
    pictures=200,
    teacher_pictures=2000,
    val_pictures=500,
    batch_size=4,
    steps=4000,
    teacher_steps=4000,
    time_factor=1.54,
    preset="two_stage",
    inheritable=("backbone.fpn", "rpn", "roi_heads"),
)
BLOOD_CELLS = dataclasses.replace(
    DIGITS,
    image_size=160,
    pictures=205,
    teacher_pictures=205,
    val_pictures=87,
    steps=2000,
    teacher_steps=2000,
    time_factor=1.74,
)
# Another detector, trained for a short time: does the share keep to its target there, too?
RETINANET = dataclasses.replace(
    DIGITS,
    detector="retinanet",
    preset="one_stage",
    teacher_pictures=500,
    val_pictures=100,
    steps=1000,
    teacher_steps=500,
    inheritable=(),
)
SETTINGS = {"digits": DIGITS, "bccd": BLOOD_CELLS, "retinanet": RETINANET}

SHARE = 0.5
OTHER_LOSSES = ("pkd", "cwd", "mgd", "fgd")

# Each arm is another one with a single switch turned.
ARMS: dict[str, tuple[str | None, dict]] = {
    "baseline": (None, {}),
    "time_matched": ("baseline", {"length": "matched"}),
    "doubled": ("baseline", {"length": 2}),
    "preset": ("baseline", {"pull": "preset"}),
    "share": ("baseline", {"pull": SHARE}),
    "size_free": ("share", {"proportions": "size_free"}),
    "feature": ("size_free", {"terms": ("feature",)}),
    "masks": ("size_free", {"terms": ("channel", "spatial")}),
    "relation": ("size_free", {"terms": ("relation",)}),
    "weak": ("size_free", {"pull": 0.1}),
    "norm": ("size_free", {"feature_norm": "channel"}),
    "stop": ("size_free", {"stop": 0.9}),
    "calibrated": ("size_free", {"calibration": 0.1}),
    "inherit": ("baseline", {"inherits": True}),
    "inherit_size_free": ("size_free", {"inherits": True}),
    **{loss: ("size_free", {"loss": loss}) for loss in OTHER_LOSSES},
    **{f"{loss}_preset": ("preset", {"loss": loss}) for loss in OTHER_LOSSES},
}
# Arms whose step costs the same as another one's.
COSTS_LIKE = {
    "time_matched": "baseline",
    "doubled": "baseline",
    "inherit": "baseline",
    "share": "size_free",
    "weak": "size_free",
    "stop": "size_free",
    "calibrated": "size_free",
    "inherit_size_free": "size_free",
    **{f"{loss}_preset": loss for loss in OTHER_LOSSES},
}
RECIPE = "size_free"  # the default that the study confirms
BASELINES = ("baseline", "time_matched", "doubled")
LOOKED_INTO = ("weak", "norm", "inherit", "inherit_size_free", "pkd")  # where the recipe brought nothing
HEADLINE = (*BASELINES, RECIPE, "inherit", "inherit_size_free")


class Study(NamedTuple):
    """A part of the study that is run by its name."""

    setting: str
    arms: tuple[str, ...]
    seeds: range
    changes: str = ""  # of the setting, "name=number ..."


# Each seed serves one purpose: those of the pilot, by which the recipe was chosen, are below 100 and 1000.
STUDIES = {
    "quick": Study(
        "digits",
        ("baseline", "inherit_size_free"),
        range(2000, 2002),
        "steps=500 teacher_pictures=1000 teacher_steps=1500 val_pictures=200",
    ),
    "digits": Study("digits", tuple(ARMS), range(100, 108)),
    "retinanet": Study("retinanet", (RECIPE,), range(3000, 3002)),
    "retinanet_96": Study("retinanet", (RECIPE,), range(3000, 3002), "image_size=96"),
    "bccd": Study("bccd", (*BASELINES, "preset", RECIPE, *LOOKED_INTO), range(100, 106)),
    "bccd_few": Study("bccd", ("baseline", "time_matched", RECIPE), range(4000, 4006), "pictures=60"),
}


def recipe(arm: str) -> Recipe:
    """Return an arm with all its switches."""
    base, changes = ARMS[arm]
    return dataclasses.replace(recipe(base) if base else Recipe(), **changes)


def steps(setting: Setting, arm: str) -> int:
    """Return the number of training steps of an arm."""
    length = recipe(arm).length
    return round(setting.steps * (setting.time_factor if length == "matched" else length))


Numbers = TypeVar("Numbers")  # a dataclass of numbers


def changed(setting: Numbers, changes: str) -> Numbers:
    """Return a setting with ``"name=number ..."`` in place of its own numbers.

    Raises:
        ValueError: a name that no number of a setting has.
    """
    own = {name: value for name, value in vars(setting).items() if isinstance(value, int | float)}
    pairs = dict(change.partition("=")[::2] for change in changes.split())
    unknown = pairs.keys() - own.keys()
    if unknown:
        raise ValueError(f"changes: no number of a setting is called {', '.join(unknown)}; there are {', '.join(own)}")
    return dataclasses.replace(setting, **{name: type(own[name])(value) for name, value in pairs.items()})
