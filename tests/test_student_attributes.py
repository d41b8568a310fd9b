"""Names that a wrapper lacks: read, written and deleted on its student, and which names are not."""

import copy
import functools
import pickle
import re
from pathlib import Path

import pytest
import torch
from detectors import Detector, images, make_distiller
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fbkd_ops import Distiller, FBKDLoss
from fbkd_ops.training.student_attributes import StudentAttributes


class Student(nn.Module):
    """With everything that a framework may look for."""

    has_mask = True

    def __init__(self):
        super().__init__()
        self.backbone, self.bbox_head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)
        self.register_buffer("anchors", torch.zeros(2))
        self.epoch, self.scale, self.step = 0, 5.0, "the student's"
        self.mode = "own"

    def forward(self, x):
        return self.bbox_head(self.backbone(x))

    def loss(self):
        return "the student's"

    def set_epoch(self, epoch):
        self.epoch = epoch
        return self

    @property
    def threshold(self):
        raise AttributeError("call fit() first")

    @functools.cached_property
    def classes(self):
        raise AttributeError("no data set was seen")

    @property
    def rate(self):
        return self._rate

    @rate.setter
    def rate(self, value):
        self._rate = value

    @rate.deleter
    def rate(self):
        del self._rate


class Wrapper(StudentAttributes, nn.Module):
    def __init__(self, student):
        super().__init__()
        self.scale = 2.0
        self.register_module("student", None)
        self.head = nn.Linear(1, 1)
        self.student = student

    def forward(self, x):
        return self.scale * self.student(x) + self.anchors.sum() + self.epoch

    def loss(self):
        return "the wrapper's"

    @property
    def size(self):
        raise AttributeError("the wrapper has no size yet")


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def around(student, wrapping):
    return {
        "plain": lambda: student,
        "compile": lambda: torch.compile(student, backend="eager"),
        "average": lambda: AveragedModel(student),
        "average of compiled": lambda: AveragedModel(torch.compile(student, backend="eager")),
    }[wrapping]()


WRAPPINGS = ["plain", "compile", "average", "average of compiled"]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_reads_what_only_the_student_has(wrapping):
    wrapper = Wrapper(around(Student(), wrapping))
    assert type(wrapper.bbox_head) is nn.Conv2d and wrapper.epoch == 0 and wrapper.has_mask
    assert torch.equal(wrapper.anchors, torch.zeros(2))
    student = wrapper.set_epoch(3)
    assert type(student) is Student and student.epoch == wrapper.epoch == 3 and "epoch" not in vars(wrapper)
    assert hasattr(wrapper, "set_epoch") and not hasattr(wrapper, "get_epoch")
    assert getattr(wrapper, "get_epoch", 7) == 7


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_writes_and_deletes_what_only_the_student_has(wrapping):
    wrapper = Wrapper(around(Student(), wrapping))
    student, head, anchors = wrapper.set_epoch(0), nn.Conv2d(4, 2, 1), torch.ones(2)
    wrapper.epoch, wrapper.bbox_head, wrapper.anchors, wrapper.rate, wrapper.has_mask = 5, head, anchors, 0.1, False
    assert student.epoch == 5 and student.bbox_head is head and student.anchors is anchors and student._rate == 0.1
    assert not student.has_mask and Student.has_mask
    assert "anchors" in dict(student.named_buffers()) and list(wrapper._modules) == ["student", "head"]
    assert {"epoch", "anchors", "rate", "has_mask"}.isdisjoint(vars(wrapper))
    del wrapper.epoch, wrapper.bbox_head, wrapper.anchors, wrapper.rate
    assert not any(hasattr(each, name) for each in (student, wrapper) for name in ("epoch", "bbox_head", "anchors"))
    assert not hasattr(student, "_rate")


def test_a_data_parallel_student_is_looked_through(one_process):
    wrapper = Wrapper(DistributedDataParallel(torch.compile(Student(), backend="eager")))
    wrapper.epoch = 8
    assert type(wrapper.set_epoch(9)) is Student and wrapper.epoch == 9 and "epoch" not in vars(wrapper.student)


def test_names_that_both_have_are_the_wrappers():
    wrapper = Wrapper(Student())
    student = wrapper.student
    assert wrapper.loss() == "the wrapper's" and wrapper.scale == 2.0
    wrapper.scale = 3.0
    assert wrapper.scale == 3.0 and student.scale == 5.0
    del wrapper.scale
    assert wrapper.scale == 5.0  # the wrapper lacks it now


def test_names_that_neither_has_are_the_wrappers():
    wrapper = Wrapper(Student())
    wrapper.note, wrapper.extra = "new", nn.Linear(1, 1)
    assert wrapper.note == "new" and not hasattr(wrapper.student, "note") and not hasattr(wrapper.student, "extra")
    del wrapper.note, wrapper.extra
    with pytest.raises(AttributeError, match=r"'Wrapper' object has no attribute 'note', nor has its student"):
        wrapper.note
    with pytest.raises(AttributeError, match="note"):
        del wrapper.note


@pytest.mark.parametrize("name", ["__len__", "__secret", "_hf_hook", "_orig_mod", "_is_replica"])
def test_names_of_python_and_pytorch_stay_apart(name):
    wrapper = Wrapper(Student())
    vars(wrapper.student)[name] = "the student's"
    assert not hasattr(wrapper, name)
    setattr(wrapper, name, "the wrapper's")
    assert vars(wrapper)[name] == "the wrapper's" and vars(wrapper.student)[name] == "the student's"
    delattr(wrapper, name)
    assert name not in vars(wrapper) and vars(wrapper.student)[name] == "the student's"


def test_no_name_of_a_module_is_passed_on():
    class Strange(Student):
        """Its own forms of what every module has."""

        def state_dict(self, *args, **kwargs):
            raise AssertionError

        parameters = register_forward_hook = train = state_dict

    wrapper = Wrapper(Strange())
    assert all(getattr(wrapper, name).__self__ is wrapper for name in ("state_dict", "parameters", "train"))
    calls = []
    handle = wrapper.register_forward_hook(lambda *_: calls.append(1))
    wrapper(images())
    handle.remove()
    assert calls == [1] and not wrapper.student._forward_hooks
    wrapper.training = False
    assert wrapper.student.training
    mutable = {name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))}
    assert all(getattr(wrapper, name) is vars(wrapper)[name] for name in mutable)


@pytest.mark.parametrize("name,message", [("threshold", "call fit"), ("classes", "no data set"), ("size", "no size")])
def test_a_property_keeps_its_own_message(name, message):
    wrapper = Wrapper(Student())
    with pytest.raises(AttributeError, match=message):
        getattr(wrapper, name)
    assert not hasattr(wrapper, name)


def test_a_property_without_a_setter_is_not_hidden_by_the_wrapper():
    wrapper = Wrapper(Student())
    with pytest.raises(AttributeError):
        wrapper.threshold = 1.0
    assert "threshold" not in vars(wrapper)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_pickles_ask_their_own_student(make):
    wrapper = Wrapper(Student())
    wrapper.set_epoch(4)
    other = make(wrapper)
    assert other.epoch == 4 and other.student is not wrapper.student
    other.epoch = 9
    assert other.student.epoch == 9 and wrapper.epoch == 4
    assert list(other.state_dict()) == list(wrapper.state_dict())


def test_an_empty_wrapper_is_asked_in_vain():
    wrapper = Wrapper.__new__(Wrapper)
    assert not hasattr(wrapper, "epoch") and not hasattr(wrapper, "student")
    nn.Module.__init__(wrapper)
    assert not hasattr(wrapper, "epoch") and not hasattr(wrapper, "student")


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_compiled_wrappers_are_one_graph(wrapping):
    torch._dynamo.reset()
    wrapper, x = Wrapper(around(Student(), wrapping)), images()
    compiled = torch.compile(wrapper, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wrapper(x))
    wrapper.epoch = 2
    torch.testing.assert_close(compiled(x), wrapper(x))
    assert compiled.bbox_head is wrapper.bbox_head


def test_a_student_further_inside():
    class Holder(StudentAttributes, nn.Module):
        student_path = "distiller.student"

        def __init__(self, distiller):
            super().__init__()
            self.lr, self.distiller = 0.1, distiller

    holder = Holder(Wrapper(Student()))
    holder.epoch = 6
    assert holder.distiller.student.epoch == 6 and not hasattr(holder, "head") and holder.lr == 0.1


def test_the_distiller_passes_names_on():
    distiller = make_distiller()
    assert distiller.backbone is distiller.student.backbone and distiller.form == "dict"
    distiller.form = "list"
    assert distiller.student.form == "list" and isinstance(distiller(images(), torch.tensor(1.0)), list)
    with pytest.raises(AttributeError, match="'Distiller' object has no attribute 'bbox_head', nor has its student"):
        distiller.bbox_head


class Crowded(Detector):
    """A student with a name of its own for everything that a distiller has."""

    def __init__(self, *args):
        super().__init__(*args)
        for name in own_names():
            setattr(self, name, "the student's")


def own_names():
    distiller = make_distiller()
    public = {name for name in dir(Distiller) if not name.startswith("_")} | vars(distiller).keys() | {"loss"}
    return sorted(public - set(dir(nn.Module())) | {"_step", "_terms"})


def test_the_distillers_own_names_are_never_the_students():
    student = Crowded(4)
    distiller = Distiller(student, Detector(4), FBKDLoss(4, num_levels=2), student_layers="backbone", start_step=1)
    assert all(getattr(student, name) == "the student's" for name in own_names())
    assert all(not isinstance(getattr(distiller, name), str) for name in own_names() if name != "student_path")
    for _ in range(2):
        distiller(images(), torch.tensor(1.0))
    assert distiller.step == 2 and student.step == "the student's" and list(distiller._modules) == ["student", "loss"]


def test_the_documentation_names_what_stays_the_distillers():
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    names = re.search(r"These names stay the distiller's(.*?);", page, re.DOTALL).group(1)
    public = {name for name in own_names() if not name.startswith("_")}
    assert set(re.findall(r"`(\w+)`", names)) == public | {"student"}
