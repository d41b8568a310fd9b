"""Fails where an sdist lacks what the project's own pages name, or a wheel has what it should not.

Run: python -m scripts.wheel_contents FILE...
"""

import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = "src/fbkd_ops/*.so", "src/fbkd_ops/_build_report.json"


def named_files():
    """Files of this tree that README.md and the Makefile name."""
    text = "".join((ROOT / page).read_text() for page in ("README.md", "Makefile"))
    words = set(re.findall(r"[\w.-]+(?:/[\w.-]+)+|[\w-]+\.\w+", text))
    return {word for word in words if (ROOT / word).is_file() and not any(Path(word).match(made) for made in TREE)}


def problems_of_sdist(path):
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = sorted(name for name in named_files() if name not in names)
    built = sorted(name for name in names if name.endswith((".so", ".pyc")))
    return [f"{path.name} lacks {name}" for name in missing] + [f"{path.name} has {name}" for name in built]


def problems_of_wheel(path):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    strange = [name for name in names if not re.match(r"fbkd_ops(/|-[\w.]+\.dist-info/)", name)]
    libraries = sorted(Path(name).name for name in names if name.endswith(".so"))
    problems = [f"{path.name} has {name}" for name in strange]
    if "-cp310-abi3-" not in path.name:
        problems.append(f"{path.name} is not for every Python")
    if "_C.abi3.so" not in libraries or not all(re.fullmatch(r"_(C|cuda\d+)\.abi3\.so", name) for name in libraries):
        problems.append(f"{path.name} has the libraries {libraries}")
    if os.environ.get("FBKD_OPS_CUDA") != "0" and not any(name.startswith("_cuda") for name in libraries):
        problems.append(f"{path.name} has no CUDA part (with FBKD_OPS_CUDA=0 it needs none)")
    return problems


def main(paths):
    problems = []
    for path in map(Path, paths):
        problems += (problems_of_wheel if path.suffix == ".whl" else problems_of_sdist)(path)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(paths)} files have what they should")


if __name__ == "__main__":
    main(sys.argv[1:])
