"""The study beside Ultralytics' own distillation: its arms differ in what they are called by, and in nothing else."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("ultralytics is not installed", allow_module_level=True)

from benchmarks.study import yolo
from benchmarks.study.jobs import TEACHER

TINY = "pictures=8 teacher_pictures=8 val_pictures=4 epochs=2 teacher_epochs=1 batch_size=4 teacher_batch_size=4"


@pytest.fixture(scope="module", autouse=True)
def teachers(tmp_path_factory):
    """A folder of their own, and one thread as before after the trainings."""
    from process_state import kept

    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setattr(yolo, "TEACHERS", tmp_path_factory.mktemp("teachers"))
    with kept():
        yield
    patch.undo()
    torch.set_num_threads(threads)


class Seen(yolo.Watch):
    """With what a training begins, and its first images."""

    begun: list = []

    def callbacks(self):
        return super().callbacks() | {"on_train_start": self._note}

    def _note(self, trainer):
        student = getattr(trainer.model, "student_model", trainer.model)
        found = [{name: value.clone() for name, value in student.state_dict().items()}, dict(vars(trainer.args))]

        def keep(module, inputs):
            found.append(inputs[0].clone())
            handle.remove()

        handle = student.model[0].register_forward_pre_hook(keep)
        self.begun.append(found)
        self._start(trainer)


def test_arms_begin_alike_and_see_the_same_images(monkeypatch):
    monkeypatch.setattr(yolo, "Watch", Seen)
    teacher, *students = yolo.jobs_of(yolo.ARMS, range(3, 4), TINY)
    yolo.run(teacher)
    Seen.begun.clear()
    lines = {job.arm: yolo.run(job) for job in students}
    assert list(lines) == list(yolo.ARMS) and {line["teacher"] for line in lines.values()} != {""}
    (weights, arguments, images), *others = Seen.begun
    assert len(others) == len(yolo.ARMS) - 1
    for other, own, first in others:
        for name, value in weights.items():
            assert torch.equal(other[name], value), name
        assert torch.equal(first, images)
        different = {name for name in arguments if own.get(name) != arguments[name]}
        assert different <= {"epochs", "distill_model", "project", "data", "save_dir", "name"}
    assert lines["time_matched"]["steps"] == 2 * round(2 * yolo.BUDGET.time_factor)
    assert lines["FBKDLoss:0.5"]["share_p50"] != "" == lines["built_in"]["share_p50"]


def test_arms_by_name():
    assert yolo.arm("MGDLoss:0.25") == "MGDLoss:0.25"
    for word in ("MGDLoss", "MGDLoss:", "NoLoss:1", TEACHER):
        with pytest.raises(Exception, match="expected of baseline"):
            yolo.arm(word)
