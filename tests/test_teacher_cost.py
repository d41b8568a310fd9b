"""The benchmark of cheaper teachers."""

import pytest
import torch
from op_cases import NO_CPU

pytest.importorskip("pandas")
pytest.importorskip("torchvision")

from benchmarks import results, small, teacher_cost


def test_the_result_has_every_way():
    rows = results.read(teacher_cost.RESULT).rows.set_index("way")
    assert list(rows.index) == ["no teacher", *teacher_cost.WAYS]
    assert rows["teacher_mb"]["bfloat16"] == rows["teacher_mb"]["float32"] / 2 > 0 == rows["teacher_mb"]["no teacher"]


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.setattr(teacher_cost, "STUDENT", 18)
    monkeypatch.setattr(teacher_cost, "TEACHER", 18)


@NO_CPU
def test_a_brief_run_writes_its_rows(tmp_path, monkeypatch, small_models):
    monkeypatch.setattr(teacher_cost, "SECONDS", 0.0)
    monkeypatch.setattr(small, "ROUNDS", 2)
    monkeypatch.setattr(teacher_cost, "STEPS", 1)
    ways = {"float32": {}, "every 4th step": {"teacher_every": 4}}
    monkeypatch.setattr(teacher_cost, "WAYS", ways)
    path, count = tmp_path / "cost.csv", torch.get_num_threads()
    try:
        teacher_cost.main(["--threads", "1", "--size", "64", "96", "--csv", str(path)])
    finally:
        torch.set_num_threads(count)
    rows = results.read(path).rows
    assert list(rows["way"]) == ["no teacher", *ways] and (rows["ms"] > 0).all() and set(rows["pixels"]) == {"64x96"}


def test_in_a_turn_of_steps_a_teacher_runs_as_often_as_it_says(small_models):
    case = teacher_cost.case_of((64, 96))
    for way, count in (("float32", 4), ("every 2nd step", 2), ("every 4th step", 1)):
        runs = []
        step, _ = teacher_cost.made(way, case)
        step.detector.teacher.backbone.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        teacher_cost.turn(step, case)()
        assert len(runs) == count
