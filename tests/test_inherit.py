"""Parts of a teacher in a student: what is copied, what is left and why."""

import copy

import pytest
import torch
from torch import nn

from fbkd_ops import inherit


class Model(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2):
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Conv2d(3 if i == 0 else width, width, 3) for i in range(depth)))
        self.neck = nn.Sequential(nn.Conv2d(width, 16, 1), nn.BatchNorm2d(16))
        self.head = nn.Conv2d(16, 4, 1)


def trained(**arguments) -> Model:
    model = Model(**arguments)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = torch.randn(tensor.shape).to(tensor.dtype) + 3
    return model


def test_modules_are_copied_with_their_buffers_and_the_rest_stays():
    student, teacher = Model(), trained()
    before, trained_state = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    found = inherit(student, teacher, ["neck", "head"])
    names = [name for name in before if name.startswith(("neck", "head"))]
    assert sorted(found.copied) == sorted(names) and not found.left
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, trained_state[name] if name in names else before[name])


def test_what_differs_is_left_and_told():
    student, teacher = Model(width=8), trained(width=12, depth=3)
    found = inherit(student, teacher, "")
    assert found.left["neck.0.weight"] == "shape (16, 8, 1, 1), the teacher's is (16, 12, 1, 1)"
    assert "neck.0.bias" in found.copied and "head.weight" in found.copied
    assert "left neck.0.weight: shape" in str(found) and str(found).startswith(f"inherited {len(found.copied)} tensors")
    deeper = inherit(Model(depth=3), trained(depth=2), "")
    assert deeper.left["backbone.2.weight"] == "the teacher has none of this name"


def test_gradients_dtypes_and_wrappers():
    student, teacher = Model().double(), torch.optim.swa_utils.AveragedModel(trained())
    inherit(student, teacher, "neck")
    assert student.neck[0].weight.dtype == torch.float64 and student.neck[0].weight.requires_grad
    torch.testing.assert_close(student.neck[0].weight.float(), teacher.module.neck[0].weight)
    student.neck[0].weight.data.zero_()
    assert teacher.module.neck[0].weight.any()  # a copy, not the same memory


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((None, Model(), "neck"), TypeError, "student must be"),
        ((Model(), "teacher", "neck"), TypeError, "teacher must be"),
        ((Model(), Model(), []), ValueError, "modules is empty"),
        ((Model(), Model(), [3]), TypeError, "modules must be"),
        ((Model(), Model(), 3), TypeError, "modules must be"),
        ((Model(), Model(), "nek"), ValueError, "modules: Model has no module 'nek'"),
        ((Model(width=4), Model(width=6), "backbone"), ValueError, "nothing of the teacher's 'backbone' fits"),
    ],
)
def test_bad_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        inherit(*arguments)


def test_names_are_those_of_the_state_dict():
    """Of a path that counts from the end too; what no checkpoint has stays as it is."""
    student, teacher = Model(), trained()
    for model in (student, teacher):
        model.register_buffer("anchors", torch.ones(1) * len(list(model.parameters())), persistent=False)
    teacher.anchors.zero_()
    found = inherit(student, teacher, "backbone.-1")
    assert found.copied == ["backbone.1.weight", "backbone.1.bias"]
    assert set(inherit(student, teacher, "").copied) == set(student.state_dict()) and student.anchors.all()
