"""Detection sets as people have them: Pascal VOC, COCO JSON and YOLO text labels.

A file that cannot be used is skipped, counted and named: see :class:`Findings`.

Example::

    findings = Findings()
    train = read_set("data", "train", findings=findings)
    val = read_set("data", "val", classes=train.classes, findings=findings)
    print(findings.summary())
    findings.write("findings.csv")
    image, target = train[0]
"""

from .coco import read_coco
from .errors import DataError, PictureError
from .layout import SPLIT_SEED, SPLITS, VAL_FRACTION
from .pictures import load_picture, open_picture
from .reading import FORMATS, read_set
from .records import DetectionSet, Finding, Findings, Picture, Target, Track
from .unlabelled import read_unlabelled
from .voc import read_voc
from .yolo import read_yolo

__all__ = [
    "FORMATS",
    "SPLITS",
    "SPLIT_SEED",
    "VAL_FRACTION",
    "DataError",
    "DetectionSet",
    "Finding",
    "Findings",
    "Picture",
    "PictureError",
    "Target",
    "Track",
    "load_picture",
    "open_picture",
    "read_coco",
    "read_set",
    "read_unlabelled",
    "read_voc",
    "read_yolo",
]
