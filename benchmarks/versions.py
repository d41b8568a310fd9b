"""Which releases of the frameworks are installed beside the package.

    python -m benchmarks.versions

Run it after ``make test`` passed: it writes benchmarks/results/versions.json, which docs/versions.md shows.
"""

import importlib.metadata
import platform
from datetime import date

from benchmarks.environment import ROOT
from benchmarks.results import write_json

OUTPUT = ROOT / "benchmarks" / "results" / "versions.json"
PACKAGES = (
    "torchvision",
    "mmdet",
    "mmengine",
    "mmcv-lite",
    "mmrazor",
    "ultralytics",
    "transformers",
    "accelerate",
    "lightning",
    "timm",
)


def main() -> None:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    where = f"The environment in which the tests run, Python {platform.python_version()}, {date.today()}."
    write_json(OUTPUT, {"where": where, "packages": found})


if __name__ == "__main__":
    main()
