"""A teacher in another dtype, on another device, in some steps only, several teachers, and images without labels."""

import copy
from collections import UserDict

import pytest
import torch
from test_gradient_share import TEACHER_WIDTH, WIDTH, Detector, batch, make, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fbkd_ops
from fbkd_ops import CWDLoss, Distiller, FBKDLoss, FGDLoss, PKDLoss, ScoreWeightedLoss
from fbkd_ops.training import placement
from fbkd_ops.training.placement import Placement

TERMS = list(FBKDLoss.term_names)


class Calls:
    """Notes what a module is given and what it returns."""

    def __init__(self, module: nn.Module):
        self.inputs, self.outputs = [], []
        module.register_forward_hook(self.add, with_kwargs=True)

    def add(self, module, args, kwargs, output):
        self.inputs.append((args, kwargs))
        self.outputs.append(output)


# A dtype of its own.


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("is_name", [True, False])
def test_a_teacher_of_another_dtype(name, is_name):
    dtype = getattr(torch, name)
    plain, other = make(None), make(None, teacher_dtype=name if is_name else dtype)
    calls = Calls(other.teacher.backbone.stage1)
    expected, found = plain(batch(0)), other(batch(0))
    assert {parameter.dtype for parameter in other.teacher.parameters()} == {dtype} == {calls.outputs[0].dtype}
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    _, students, teachers = other.run(batch(0))
    assert students["fine"].dtype == torch.float32 and teachers["fine"].dtype == dtype
    for name in TERMS:
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=1e-4, check_dtype=False)
    fbkd_ops.sum_losses(found).backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_a_dtype_of_its_own_stays_whatever_the_distiller_becomes():
    distiller = make(None, teacher_dtype=torch.bfloat16)
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller.half().double()
    after = distiller.teacher.state_dict()
    assert {value.dtype for value in distiller.student.state_dict().values()} == {torch.float64}
    assert all(torch.equal(before[name], after[name]) for name in before)  # not by way of float16
    assert make(None).double().teacher.backbone.output1.weight.dtype == torch.float64


def test_the_students_autocast_does_not_reach_a_teacher_of_its_own_dtype():
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        distiller = make(None, teacher_dtype=dtype)
        calls = Calls(distiller.teacher.backbone.stage1[0])
        with torch.autocast("cpu", torch.bfloat16):
            distiller(batch(0))
        assert calls.outputs[0].dtype == expected


# A device of its own. This machine has one: tensors of "meta" have a device and no numbers.


@pytest.fixture
def numbers_from_meta(monkeypatch):
    """What comes back from the device without numbers has some."""
    moved = placement._on

    def on(leaf, device):
        is_lost = isinstance(leaf, torch.Tensor) and leaf.is_meta and device.type == "cpu"
        return torch.ones(leaf.shape, dtype=leaf.dtype) if is_lost else moved(leaf, device)

    monkeypatch.setattr(placement, "_on", on)


def test_a_teacher_on_another_device_gets_its_images_there(numbers_from_meta):
    distiller = make(None, teacher_device="meta")
    calls = Calls(distiller.teacher.backbone.stage1)
    terms = distiller(batch(0))
    ((images,), _), *_ = calls.inputs
    assert images.is_meta and calls.outputs[0].is_meta
    assert {terms[name].device.type for name in TERMS} == {"cpu"}
    distiller.to("cpu")
    assert {parameter.device.type for parameter in distiller.teacher.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in distiller.parameters()} == {"cpu"}


def test_the_distiller_can_go_where_the_teacher_does_not():
    distiller = make(None, teacher_device="cpu").to("meta")
    assert distiller.teacher.backbone.output1.weight.device.type == "cpu"
    assert distiller.student.backbone.output1.weight.is_meta


class Sample:
    """Annotations as MMDetection and Detectron2 have them."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def to(self, device):
        return Sample(device)


def test_everything_in_a_call_is_moved():
    x = torch.ones(2)
    call = (
        [x, {"image": x, "instances": Sample()}],
        {"inputs": UserDict(pixel_values=x), "mode": "loss", "none": None},
    )
    (first, entry), kwargs = Placement(torch.device("meta")).moved(call)
    assert first.is_meta and entry["image"].is_meta and kwargs["inputs"]["pixel_values"].is_meta
    assert entry["instances"].device.type == "meta" and kwargs["mode"] == "loss" and kwargs["none"] is None
    assert not x.is_meta and call[1]["inputs"]["pixel_values"] is x
    floats, counts = Placement(dtype=torch.float16).converted((x, torch.ones(2, dtype=torch.int64)))
    assert floats.dtype == torch.float16 and counts.dtype == torch.int64
    assert Placement().moved(call) is call and Placement().converted(call) is call


def test_a_module_that_makes_the_images_goes_with_the_teacher(numbers_from_meta):
    change = nn.Conv2d(3, 3, 1)
    distiller = make(None, teacher_device="meta", teacher_dtype=torch.bfloat16, teacher_input=change)
    calls = Calls(change)
    distiller(batch(0))
    assert change.weight.is_meta and calls.outputs[0].dtype == torch.float32  # the images' precision is the student's


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("student, teacher", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_teacher_on_a_gpu_or_beside_one(student, teacher):
    expected = make(None)(batch(0))
    distiller = make(None, teacher_device=teacher).to(student)
    for _ in range(3):  # numbers that are read before they came would differ
        found = distiller(batch(0).to(student))
        for name in TERMS:
            torch.testing.assert_close(found[name].cpu(), expected[name], rtol=1e-3, atol=1e-5)


def test_a_teacher_of_its_own_dtype_is_moved_and_laid_out_as_the_student():
    distiller = make(None, teacher_dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = distiller.teacher.backbone.stage1[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.dtype == torch.bfloat16
    assert all(parameter.is_shared() for parameter in distiller.share_memory().teacher.parameters())
    with torch.device("meta"):
        empty = make(None, teacher_dtype=torch.bfloat16)
    empty.to_empty(device="cpu")
    assert {(each.device.type, each.dtype) for each in empty.teacher.parameters()} == {("cpu", torch.bfloat16)}


def test_shares_are_measured_by_training_steps():
    """``share_steps`` counts all steps, ``share_every`` those with terms."""
    distiller = make(0.5, teacher_every=4, share_every=2, share_steps=9)
    measured = []
    for step in range(25):
        before = int(distiller.share.measured)
        fbkd_ops.sum_losses(distiller(batch(step))).backward()
        distiller.weights()
        if int(distiller.share.measured) > before:
            measured.append(step - 1)  # whose backward pass this step's forward has read
    assert measured == [0, 8]


def test_the_step_of_the_teacher_is_checked_when_it_is_set():
    distiller = make(None)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="teacher_every must be an int >= 1"):
            distiller.teacher_every = wrong
    distiller.teacher_every = 3
    assert distiller.teacher_every == 3


def distil_from(teacher, **settings):
    loss = PKDLoss([WIDTH], [WIDTH])
    settings = dict(student_layers="backbone", student_levels=["fine"], teacher_layers="") | settings
    return Distiller(Detector(WIDTH), teacher, loss, **settings)


class Stages(nn.ModuleDict):
    """As the feature extractors of timm and torchvision are."""

    def forward(self, images):
        return {"stage": self["stage"](images)}


def test_a_dict_of_modules_with_a_forward_is_one_teacher():
    teacher = Stages({"stage": nn.Conv2d(3, WIDTH, 3, 2, 1)})
    assert float(distil_from(teacher)(batch(0))["loss_pkd"].detach()) > 0


@pytest.mark.parametrize("settings", [{}, {"teacher_dtype": torch.bfloat16, "teacher_every": 2}])
def test_a_compiled_teacher(settings):
    plain, compiled = make(None, **settings), make(None, **settings)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled.teacher.backbone.compile(backend=counted)
    for step in range(2):
        expected, found = plain(batch(step)), compiled(batch(step))
        for name in TERMS:
            torch.testing.assert_close(found[name], expected[name])
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"teacher_device": "cudo"}, ValueError, "teacher_device must be a device such as 'cuda:1', got 'cudo'"),
        ({"teacher_dtype": torch.int64}, TypeError, "teacher_dtype must be a dtype of floats"),
        ({"teacher_dtype": "bf16"}, TypeError, "such as torch.bfloat16, or its name, got 'bf16'"),
        ({"teacher_every": 0}, ValueError, "teacher_every must be an int >= 1, got 0"),
        ({"teacher_every": 2.0}, ValueError, "teacher_every must be an int >= 1"),
        ({"teacher_entry": ("backbone", 3)}, TypeError, "teacher_entry"),
        ({"teacher_entry": ("backbone", "neck")}, ValueError, "teacher_entry: Detector has no module 'neck'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make(None, **arguments)


# In some steps only.


def test_between_its_steps_the_teacher_does_not_run_and_in_them_its_terms_count_more():
    plain, every = make(None), make(None, teacher_every=3, start_step=1)
    plain.step = 1
    calls = Calls(every.teacher.backbone.stage1)
    expected = plain(batch(0))
    terms = [every(batch(0)) for _ in range(8)]
    assert len(calls.inputs) == 3  # steps 1, 4 and 7
    for step, found in enumerate(terms):
        for name in TERMS:
            factor = 3 if step % 3 == 1 else 0
            torch.testing.assert_close(found[name], factor * expected[name])
    fbkd_ops.sum_losses(terms[0]).backward()
    assert all(parameter.grad is not None for parameter in every.loss.parameters())


def test_the_mean_weight_of_a_schedule_stays():
    every, plain = make(None, teacher_every=4, stop_step=40), make(None, stop_step=40)
    weights = {each: [] for each in (every, plain)}
    for step in range(60):
        for each, found in weights.items():
            each.step = step
            found.append(each.step_weight())
    assert sum(weights[every]) == sum(weights[plain]) == 40


def test_a_share_is_measured_in_the_teachers_steps_and_is_that_of_a_mean_step():
    distiller = make(0.3, teacher_every=4, share_every=2)
    shares = train(distiller, 400)
    assert int(distiller.share.measured) == 50  # every second one of the 100 with terms
    assert 0.24 < sorted(shares[300:])[50] < 0.36
    assert float(distiller.share.share) == pytest.approx(4 * shares[-1])


# Several.


def several(**arguments):
    torch.manual_seed(0)
    teachers = {"wide": Detector(TEACHER_WIDTH), "same": Detector(WIDTH)}
    losses = {"wide": PKDLoss(WIDTH, TEACHER_WIDTH, num_levels=2), "same": CWDLoss(WIDTH, num_levels=1)}
    settings = {"student_layers": "backbone", "student_levels": {"same": ["coarse"]}}
    settings |= {"teacher_levels": {"same": ["coarse"]}}
    return Distiller(Detector(WIDTH), teachers, losses, **settings | arguments)


def test_each_of_several_teachers_has_its_loss():
    distiller = several()
    found = distiller(batch(0))
    assert list(found) == ["loss_box", "loss_pkd", "loss_cwd"]
    students = distiller.student.backbone(batch(0))
    for name, levels in (("wide", ["fine", "coarse"]), ("same", ["coarse"])):
        teachers = distiller.teacher[name].backbone(batch(0))
        expected = distiller.loss[name](*([side[level] for level in levels] for side in (students, teachers)))
        for term, value in expected.items():
            torch.testing.assert_close(found[term], value)
    assert not any(module.training for module in distiller.teacher.modules())
    assert all(name.startswith(("student.", "loss.", "_extra")) for name in distiller.state_dict())


def test_each_of_several_teachers_has_its_own_settings():
    layers = ["backbone.output1", "backbone.output2"]
    distiller = several(
        teacher_layers={"wide": "backbone", "same": layers},
        teacher_levels={"same": [1]},
        teacher_dtype={"wide": torch.bfloat16},
        teacher_entry={"same": "backbone"},
        teacher_input={"wide": lambda images: 2 * images},
    )
    calls = {name: Calls(teacher.backbone.stage1) for name, teacher in distiller.teacher.items()}
    distiller(batch(0))
    images = {name: each.inputs[0][0][0] for name, each in calls.items()}
    torch.testing.assert_close(images["wide"], (2 * batch(0)).bfloat16())
    torch.testing.assert_close(images["same"], batch(0))
    assert distiller.teacher_input.keys() == {"wide", "same"} and distiller.teacher_input["same"] is None
    distiller.double()
    dtypes = {name: next(teacher.parameters()).dtype for name, teacher in distiller.teacher.items()}
    assert dtypes == {"wide": torch.bfloat16, "same": torch.float64}


def test_each_of_several_teachers_has_its_share():
    distiller = several(gradient_share={"wide": 0.4, "same": 0.1}, share_every=2)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01)
    for step in range(200):
        optimizer.zero_grad()
        fbkd_ops.sum_losses(distiller(batch(step))).backward()
        optimizer.step()
    found = distiller.weights()
    assert 0.2 < found["fbkd_gradient_share_wide"] < 0.8 and 0.05 < found["fbkd_gradient_share_same"] < 0.2


def test_the_scores_of_one_of_several_teachers():
    def scores(teacher, features):
        return {name: x.sigmoid().amax(1) for name, x in features.items()}

    losses = {"wide": ScoreWeightedLoss(WIDTH, TEACHER_WIDTH, num_levels=2), "same": CWDLoss(WIDTH, num_levels=2)}
    teachers = {"wide": Detector(TEACHER_WIDTH), "same": Detector(WIDTH)}
    module = Distiller(
        Detector(WIDTH), teachers, losses, student_layers="backbone", teacher_scores={"wide": scores}, resize=True
    )
    found = module(batch(0))
    features = teachers["wide"].backbone(batch(0))
    expected = losses["wide"](module.student.backbone(batch(0)), features, scores=scores(None, features))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_several_teachers_are_copied_and_resumed():
    distiller = several(gradient_share=0.3)
    expected = distiller(batch(0))
    for other in (copy.deepcopy(distiller), several(gradient_share=0.3)):
        other.load_state_dict(distiller.state_dict())
        assert other.teacher["wide"] is not distiller.teacher["wide"]
        found = other(batch(0))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "loss, arguments, message",
    [
        (CWDLoss(WIDTH, num_levels=2), {}, "a loss for each teacher .'wide', 'same'., got one loss"),
        ({"wide": CWDLoss(WIDTH, num_levels=2)}, {}, "got losses called 'wide'"),
        (None, {"teacher_dtype": {"wide": None, "big": None}}, "teacher_dtype names the teacher 'big', but there are"),
        (None, {"teacher_dtype": {"big": torch.bfloat16}}, "teacher_dtype names the teacher 'big', but there are"),
        (
            None,
            {"student_layers": {"wide": "backbone.output1", "same": "backbone.output2"}},
            "student_layers is for all teachers",
        ),
        (None, {"teacher_layers": {"wides": "backbone"}}, "teacher_layers names the teacher 'wides'.*mean 'wide'"),
    ],
)
def test_several_teachers_that_do_not_fit_are_refused(loss, arguments, message):
    teachers = {"wide": Detector(TEACHER_WIDTH), "same": Detector(WIDTH)}
    losses = loss or {name: CWDLoss(WIDTH, num_levels=2) for name in teachers}
    with pytest.raises(ValueError, match=message):
        Distiller(Detector(WIDTH), teachers, losses, **{"student_layers": "backbone"} | arguments)
    with pytest.raises(TypeError, match=r"teacher\['same'\] must be a torch.nn.Module, got str"):
        Distiller(
            Detector(WIDTH), {"wide": teachers["wide"], "same": "vit"}, dict.fromkeys(teachers), student_layers=""
        )


# Where it starts.


class Whole(nn.Module):
    """A teacher that is called with a batch of images, as a backbone is."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, TEACHER_WIDTH, 4, 4)

    def forward(self, images):
        return [self.net(images)]


def test_a_whole_teacher_gets_what_a_module_of_the_student_is_given():
    torch.manual_seed(0)
    loss = FBKDLoss([WIDTH], [TEACHER_WIDTH], stride=1)
    teacher = Whole()
    distiller = Distiller(
        Detector(WIDTH), teacher, loss, student_layers="backbone", student_levels=["coarse"],
        teacher_layers="", teacher_entry=("backbone", ""),
    )  # fmt: skip
    calls = Calls(teacher)
    distiller(batch(0), targets=None)
    assert [len(args) for args, kwargs in calls.inputs] == [1] and torch.equal(calls.inputs[0][0][0], batch(0))


def test_an_average_of_the_student_as_its_teacher():
    torch.manual_seed(0)
    student = Detector(WIDTH)
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    distiller = Distiller(student, teacher, FBKDLoss([WIDTH] * 2, stride=2), student_layers="backbone")
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        fbkd_ops.sum_losses(distiller(batch(step))).backward()
        optimizer.step()
        teacher.update_parameters(student)
    assert float(distiller.terms()["loss_fbkd_feature"]) > 0
    weights = [model.backbone.output1.weight for model in (student, teacher.module)]
    assert not torch.equal(*weights) and not teacher.module.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


# Images without labels.


class NeedsTargets(Detector):
    def forward(self, images, targets=None):
        maps = self.backbone(images)
        return {"loss_box": self.head(list(maps.values())) + targets["none of them is here"]}


def test_one_teacher_under_two_names_has_one_place():
    teacher, losses = Detector(TEACHER_WIDTH), {"a": None, "b": None}
    losses = {name: PKDLoss([WIDTH] * 2, [TEACHER_WIDTH] * 2) for name in losses}
    settings = dict(student_layers="backbone")
    Distiller(Detector(WIDTH), {"a": teacher, "b": teacher}, losses, teacher_dtype="bfloat16", **settings)
    with pytest.raises(ValueError, match="are one module, so they have one teacher_device and one teacher_dtype"):
        Distiller(Detector(WIDTH), {"a": teacher, "b": teacher}, losses, teacher_dtype={"a": "bfloat16"}, **settings)


@pytest.mark.parametrize("name", ["a.b", "keys"])
def test_names_that_a_dict_of_modules_cannot_have(name):
    losses, teachers = {name: PKDLoss([WIDTH] * 2, [TEACHER_WIDTH] * 2)}, {name: Detector(TEACHER_WIDTH)}
    with pytest.raises(ValueError, match=f"loss: the name '{name}' must be an identifier"):
        Distiller(Detector(WIDTH), teachers, losses, student_layers="backbone")


def test_without_labels_the_student_runs_as_far_as_the_teachers_entry():
    """Which may lie behind its last tapped module."""
    distiller = distil_from(
        nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1)),
        student_layers=["backbone.stage1"],
        student_levels=None,
        teacher_entry=("backbone.lateral1", ""),
        teacher_layers=["0"],
    )
    with distiller.unlabelled():
        terms = distiller(batch(0))
    assert float(terms["loss_pkd"].detach()) > 0


def test_terms_without_labels_have_the_weight_of_the_step_beside_them():
    distiller = make(None, warmup_steps=4, stop_step=6)
    for _ in range(8):
        labelled = float(distiller(batch(0))["loss_fbkd_feature"].detach())
        with distiller.unlabelled():
            assert float(distiller(batch(0))["loss_fbkd_feature"].detach()) == pytest.approx(labelled)


def test_terms_without_labels_have_a_graph_before_they_begin():
    """Also where the loss has no parameters."""
    distiller = distil_from(nn.Conv2d(3, WIDTH, 3, 2, 1), teacher_layers=lambda output: [output], start_step=5)
    with distiller.unlabelled():
        fbkd_ops.sum_losses(distiller(batch(0))).backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in distiller.parameters())


def test_a_loss_that_needs_boxes_takes_no_images_without_any_for_background():
    loss, settings = FGDLoss([WIDTH] * 2, [TEACHER_WIDTH] * 2), dict(student_layers="backbone")
    found = [torch.zeros(0, 4), torch.tensor([[1.0, 1, 9, 9]])]

    def boxes(images, targets=None):
        return [found[0], found[index]], images.shape[2:]

    distiller = Distiller(Detector(WIDTH), Detector(TEACHER_WIDTH), loss, boxes=boxes, **settings)
    index = 0
    distiller(batch(0))
    index = 1
    with distiller.unlabelled():
        assert "loss_fgd_focal" in distiller(batch(0))
        index = 0
        with pytest.raises(ValueError, match="unlabelled: the loss needs boxes"):
            distiller(batch(0))


def test_without_labels_there_are_the_terms_alone():
    torch.manual_seed(0)
    loss = FBKDLoss([WIDTH] * 2, [TEACHER_WIDTH] * 2, stride=2)
    distiller = Distiller(NeedsTargets(WIDTH), Detector(TEACHER_WIDTH), loss, student_layers="backbone", weight=0.5)
    with distiller.unlabelled():
        found = distiller(batch(0))
    _, students, teachers = make(None).run(batch(0))
    assert list(found) == TERMS and distiller.step == 0 and distiller.terms() == {}
    expected = copy.deepcopy(loss)(distiller.student.backbone(batch(0)), distiller.teacher.backbone(batch(0)))
    for name in TERMS:
        torch.testing.assert_close(found[name], 0.5 * expected[name])
    fbkd_ops.sum_losses(found).backward()
    heads = list(distiller.student.head.parameters())
    assert all(parameter.grad is None for parameter in heads)
    assert all(parameter.grad is not None for parameter in distiller.student.backbone.parameters())
    with pytest.raises(TypeError, match="subscriptable"):
        distiller(batch(0))  # outside of the block the whole student runs


def test_labelled_and_unlabelled_steps_side_by_side():
    distiller = make(0.3, share_every=1, teacher_every=2, stop_step=6)
    seen = []
    for step in range(8):
        losses = distiller(batch(step))
        with distiller.unlabelled():
            more = distiller(batch(100 + step))
        (fbkd_ops.sum_losses(losses) + fbkd_ops.sum_losses(more)).backward()
        seen.append(float(more["loss_fbkd_feature"].detach()))
    assert distiller.step == 8 and all(value > 0 for value in seen[:6]) and seen[6:] == [0.0] * 2
    assert 0 < int(distiller.share.measured) <= 3  # in the teacher's steps with labels


def test_a_step_without_labels_takes_the_detectors_own_losses_along_in_no_way():
    """A share measured beside unlabelled images is that of the labelled ones alone."""
    plain, mixed = make(0.3, share_every=1), make(0.3, share_every=1)
    for each in (plain, mixed):
        losses = each(batch(0))
        if each is mixed:
            with each.unlabelled():
                each(batch(1))
        fbkd_ops.sum_losses(losses).backward()
        each(batch(2))
    torch.testing.assert_close(plain.share.share, mixed.share.share)
