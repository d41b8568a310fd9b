"""Committed results: what they measured, and whether the kernels have changed since."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import environment


def facts_of(path: Path) -> dict:
    return json.loads(path.read_text()).get("environment", {})


FOLDER = environment.ROOT / "benchmarks" / "results"
RESULTS = [path for path in sorted(FOLDER.glob("**/*.json")) if facts_of(path)]


def test_committed_results_are_named_by_their_machine():
    done = subprocess.run(["git", "ls-files", "."], cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    names = done.stdout.split()
    assert names and {Path(name).suffix for name in names} == {".csv", ".json"}
    assert all(name.replace(".csv", ".json") in names for name in names)  # rows have their facts beside them
    for path in RESULTS:
        gpu = facts_of(path).get("gpu")
        if gpu:
            assert path.parent.name.startswith("-".join(gpu.lower().split()[:2]))
        else:
            assert path.parent == FOLDER and path.name.startswith("cpu-")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(environment.ROOT)))
def test_a_result_names_what_it_measured(path):
    facts = facts_of(path)
    assert facts["revision"] and facts["modified"] is False
    device = "cuda" if "gpu" in facts else "cpu"
    if facts["sources"] != environment.sources(device):
        pytest.xfail(f"older than the {device} kernels: measured at {facts['revision']}, measure again")


@pytest.mark.parametrize(
    "told, expected",
    [(None, (None, None)), ("abc1234", ("abc1234", False)), ("abc1234-dirty", ("abc1234", True))],
)
def test_a_copy_without_git_is_told_its_revision(tmp_path, monkeypatch, told, expected):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("FBKD_OPS_REVISION", raising=False)
    if told:
        monkeypatch.setenv("FBKD_OPS_REVISION", told)
    assert (environment.revision(), environment.modified()) == expected


def test_a_checkout_tells_a_copy_what_it_knows():
    if environment.revision() is None:
        pytest.skip("no git checkout")
    command = [sys.executable, "-m", "benchmarks.environment"]
    printed = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert printed == environment.revision() + ("-dirty" if environment.modified() else "")


def test_the_digest_changes_with_the_kernels(tmp_path, monkeypatch):
    for folder in ("csrc/cpu", "csrc/cuda", "src/fbkd_ops/kernels"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "op.cpp").write_text("1")
    (tmp_path / "csrc" / "op.h").write_text("1")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    before = {device: environment.sources(device) for device in environment.KERNELS}
    changes = [("csrc/cpu/op.cpp", {"cpu"}), ("src/fbkd_ops/kernels/op.cpp", {"cuda"}), ("csrc/op.h", {"cpu", "cuda"})]
    for name, devices in changes:
        (tmp_path / name).write_text("2")
        after = {device: environment.sources(device) for device in environment.KERNELS}
        assert {device for device in after if after[device] != before[device]} == devices
        before = after
