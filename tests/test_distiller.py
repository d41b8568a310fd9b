"""The distiller, on a small detector: what it adds, when, what it leaves alone and what it refuses."""

import copy
import itertools
import pickle
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectors import TERMS, Detector, images, make_distiller
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fbkd_ops import Distiller, FBKDLoss, Layer
from fbkd_ops.training.distiller import _later_attributes

IMAGES = 10 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor(1.0)


def without_dropout(distiller):
    distiller.student.dropout.p = 0.0
    return distiller


def expected_terms(distiller, student_features, teacher_features):
    with torch.no_grad():
        return copy.deepcopy(distiller.loss)(student_features, teacher_features)


def assert_terms(losses, expected, scale=1.0):
    for name, term in expected.items():
        torch.testing.assert_close(losses[name].detach(), scale * term, rtol=1e-6, atol=0)


def test_adds_the_terms_to_the_students_own_losses():
    distiller = make_distiller()
    losses = distiller(IMAGES, targets=TARGETS)
    assert set(losses) == {"loss_box", "loss_cls"} | TERMS
    expected = expected_terms(distiller, distiller.student.backbone(IMAGES), distiller.teacher.backbone(IMAGES))
    assert_terms(losses, expected)
    assert_terms(distiller.terms(), expected)
    assert not any(term.requires_grad for term in distiller.terms().values())


def test_gradients_reach_student_and_loss_but_not_the_teacher():
    distiller = make_distiller()
    sum(distiller(IMAGES, TARGETS).values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_a_scalar_loss_stays_a_scalar():
    distiller = without_dropout(make_distiller("scalar"))
    total = distiller(IMAGES, TARGETS)
    torch.testing.assert_close(total, distiller.student(IMAGES, TARGETS) + sum(distiller.terms().values()))


def test_a_list_of_losses_stays_a_list():
    distiller = without_dropout(make_distiller("list"))
    losses = distiller(IMAGES, TARGETS)
    assert isinstance(losses, list) and len(losses) == 2 + len(TERMS)
    own = distiller.student(IMAGES, TARGETS)
    torch.testing.assert_close(torch.stack(losses), torch.stack([*own, *distiller.terms().values()]))


class Output(OrderedDict):
    """What Hugging Face's models return: a dict whose entries are attributes too."""

    loss = property(lambda self: self["loss"], lambda self, value: self.__setitem__("loss", value))


class WithLossAttribute(Detector):
    def forward(self, images, targets=None):
        return Output(loss=super().forward(images, targets), logits=images)


def test_an_output_with_a_loss_gets_the_sum():
    distiller = make_distiller()
    distiller = without_dropout(
        Distiller(WithLossAttribute(4, "scalar"), distiller.teacher, distiller.loss, student_layers="backbone")
    )
    output = distiller(IMAGES, TARGETS)
    own = distiller.student(IMAGES, TARGETS).loss
    torch.testing.assert_close(output.loss, own + sum(distiller.terms().values()))
    assert output["loss"] is output.loss and output["logits"] is IMAGES


def test_combine_takes_any_other_form():
    distiller = make_distiller("list", combine=lambda losses, terms: (losses[0] * 3, terms))
    tripled, terms = distiller(IMAGES, TARGETS)
    assert tripled.dim() == 0 and set(terms) == TERMS


def test_the_teacher_is_in_no_parameters_and_no_checkpoint():
    distiller = make_distiller()
    own = set(distiller.student.parameters()) | set(distiller.loss.parameters())
    assert set(distiller.parameters()) == own
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"student", "loss", "_extra_state"}
    assert list(distiller.student.state_dict()) == list(Detector(4).state_dict())


def test_the_checkpoint_has_tensors_only():
    """Hugging Face's safetensors and Detectron2's fvcore refuse anything else."""
    distiller, other = make_distiller(), make_distiller()
    distiller.step = 7
    state = distiller.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other.load_state_dict(state)
    assert other.step == 7 and isinstance(other.step, int)


def test_the_student_is_the_same_object():
    student = Detector(4)
    assert Distiller(student, Detector(4), FBKDLoss(4, num_levels=2), student_layers="backbone").student is student


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda module, inputs, output: calls.append(output))
    return calls


def test_the_teacher_stays_in_eval_and_stops_after_its_backbone():
    distiller = make_distiller()
    teacher = distiller.teacher
    teacher_calls, student_calls = count_calls(teacher.head), count_calls(distiller.student.head)
    for _ in range(2):
        distiller.train()
        assert not teacher.training and not teacher.dropout.training and distiller.student.training
        distiller(IMAGES, TARGETS)
    assert teacher_calls == [] and len(student_calls) == 2
    teacher(IMAGES)  # outside the distiller the teacher runs whole
    assert len(teacher_calls) == 1


def test_a_teacher_in_training_mode_is_put_back_with_one_warning():
    distiller = make_distiller()
    distiller.teacher.dropout.train()
    with pytest.warns(UserWarning, match="the teacher was in training mode") as caught:
        for _ in range(3):
            distiller(IMAGES, TARGETS)
            assert not distiller.teacher.dropout.training
            distiller.teacher.train()
    assert len([each for each in caught if "training mode" in str(each.message)]) == 1


def test_a_student_in_eval_mode_is_warned_of_once():
    """As Hugging Face's ``from_pretrained`` gives it; a detector has no losses then."""
    distiller = make_distiller()
    distiller.student.eval()
    with pytest.warns(UserWarning, match=r"the student is in eval mode .* distiller.train\(\)") as caught:
        for _ in range(2):
            with pytest.raises(TypeError, match="must return a dict or list of losses"):
                distiller(IMAGES, TARGETS)
    assert len([each for each in caught if "eval mode" in str(each.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(distiller.train()(IMAGES, TARGETS)) >= TERMS


def test_the_teacher_runs_without_gradient():
    distiller, modes = make_distiller(), []
    distiller.teacher.backbone.register_forward_pre_hook(lambda module, inputs: modes.append(torch.is_grad_enabled()))
    distiller(IMAGES, TARGETS)
    assert modes == [False]


def test_eval_mode_is_the_student():
    distiller = make_distiller().eval()
    torch.testing.assert_close(distiller(IMAGES), distiller.student(IMAGES))
    assert distiller.terms() == {} and distiller.step == 0


def test_moves_the_teacher_along():
    distiller = make_distiller().double()
    assert next(distiller.teacher.parameters()).dtype == torch.float64
    losses = distiller(IMAGES.double(), TARGETS.double())
    assert losses["loss_fbkd_relation"].dtype == torch.float64


@pytest.mark.parametrize(
    "layers,teacher_layers",
    [
        (["backbone.stem", "backbone.down"], "backbone"),
        ({"a": "backbone.stem", "b": "backbone.down"}, ["backbone.stem", "backbone.down"]),
        (Layer("backbone"), Layer("backbone", select=lambda maps: list(maps.values()))),
    ],
)
def test_other_layers_for_the_teacher(layers, teacher_layers):
    distiller = make_distiller(layers=layers, teacher_layers=teacher_layers)
    assert set(distiller(IMAGES, TARGETS)) >= TERMS


def test_the_teacher_starts_at_its_entry_with_what_the_students_was_given():
    class Scaling(Detector):
        """Changes its images at random, as a detector that resizes inside."""

        def forward(self, images, targets=None):
            return super().forward(images * torch.rand(()), targets)

    distiller = make_distiller()
    distiller = Distiller(Scaling(4), Scaling(6), distiller.loss, student_layers="backbone", teacher_entry="backbone")
    seen = count_calls(distiller.student.backbone)
    losses = distiller(IMAGES, TARGETS)
    given = []
    distiller.student.backbone.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    torch.manual_seed(3)
    losses = distiller(IMAGES, TARGETS)
    assert_terms(losses, expected_terms(distiller, seen[-1], distiller.teacher.backbone(given[0])))


def test_levels_are_chosen_by_key_and_by_index():
    """And come in the order in which they are named."""
    by_key = make_distiller(student_levels=["coarse", "fine"], teacher_levels=["coarse", "fine"])
    by_index = Distiller(
        by_key.student,
        by_key.teacher,
        by_key.loss,
        student_layers=["backbone.stem", "backbone.down"],
        teacher_layers="backbone",
        student_levels=[-1, 0],
        teacher_levels=["coarse", "fine"],
    )
    by_key.student.backbone.stem.register_forward_hook(lambda module, inputs, output: output.relu())
    sides = (model.backbone(IMAGES) for model in (by_key.student, by_key.teacher))
    expected = expected_terms(by_key, *([maps["coarse"], maps["fine"]] for maps in sides))
    assert_terms(by_key(IMAGES, TARGETS), expected)
    assert_terms(by_index(IMAGES, TARGETS), expected)


def test_other_numbers_of_levels():
    distiller = make_distiller(layers=["backbone.down"], teacher_layers="backbone", teacher_levels=["coarse"])
    distiller.loss = FBKDLoss(4, 6, num_levels=1)
    assert set(distiller(IMAGES, TARGETS)) >= TERMS
    distiller.teacher_levels = None
    with pytest.raises(ValueError, match="same number of levels, got 1 and 2"):
        distiller(IMAGES, TARGETS)


@pytest.mark.parametrize("layers", ["backbone", ["backbone.stem", "backbone.down"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resize_brings_the_teacher_to_the_students_size(layers, dtype):
    distiller = make_distiller(layers=layers, teacher_layers="backbone", resize=True)
    small = 10 * torch.randn(2, 3, 20, 14)
    distiller.teacher.to(dtype)
    distiller.teacher.backbone.register_forward_pre_hook(lambda module, inputs: small.to(dtype))
    losses = distiller(IMAGES, TARGETS)
    teacher_maps = distiller.teacher.backbone(small).values()
    fine = distiller.student.backbone.stem(IMAGES)
    student_maps = [fine.relu() if layers == "backbone" else fine, distiller.student.backbone.down(fine.relu())]
    resized = [
        F.interpolate(t.float(), size=s.shape[-2:], mode="bilinear", antialias=True)
        for s, t in zip(student_maps, teacher_maps, strict=True)
    ]
    assert_terms(losses, expected_terms(distiller, student_maps, resized))
    distiller.resize = False
    with pytest.raises(ValueError, match=r"must agree in N, H and W, got \(2, 4, 8, 8\) and \(2, 6, 20, 14\)"):
        distiller(IMAGES, TARGETS)


@pytest.mark.parametrize("wrong", [lambda maps: [each[0] for each in maps], lambda maps: maps[:1]])
def test_features_that_cannot_be_resized_are_named_by_the_loss(wrong):
    distiller = make_distiller(
        layers=["backbone.stem", "backbone.down"],
        teacher_layers=Layer("backbone", select=lambda maps: wrong(list(maps.values()))),
        resize=True,
    )
    with pytest.raises(ValueError, match="must have shape|same number of levels"):
        distiller(IMAGES, TARGETS)


@pytest.mark.parametrize(
    "schedule,weights",
    [
        (dict(start_step=2), [0, 0, 1, 1, 1, 1]),
        (dict(stop_step=2), [1, 1, 0, 0, 0, 0]),
        (dict(start_step=1, stop_step=5, warmup_steps=3), [0, 1 / 3, 2 / 3, 1, 1, 0]),
        (dict(warmup_steps=1), [1] * 6),
    ],
)
def test_the_terms_have_their_time(schedule, weights):
    distiller = without_dropout(make_distiller(**schedule))
    for parameter in distiller.parameters():
        parameter.requires_grad_(True)
    full = expected_terms(distiller, distiller.student.backbone(IMAGES), distiller.teacher.backbone(IMAGES))
    teacher_calls = count_calls(distiller.teacher.backbone)
    for step, weight in enumerate(weights):
        assert distiller.step == step
        assert distiller.step_weight() == pytest.approx(weight)
        losses = distiller(IMAGES, TARGETS)
        assert_terms(losses, full, weight)
        assert_terms(distiller.terms(), full, weight)
        distiller.zero_grad()
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in distiller.parameters())
        if weight == 0:
            assert not any(parameter.grad.any() for parameter in distiller.loss.parameters())
    assert len(teacher_calls) == sum(weight > 0 for weight in weights)


def test_the_step_can_be_set():
    distiller = make_distiller(start_step=5)
    distiller.step = 7
    assert distiller.step_weight() == 1
    with pytest.raises(ValueError, match="step must be an int >= 0, got -1"):
        distiller.step = -1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(start_step=-1), "start_step must be an int >= 0, got -1"),
        (dict(start_step=1.5), "start_step must be an int >= 0, got 1.5"),
        (dict(warmup_steps=True), "warmup_steps must be an int >= 0, got True"),
        (dict(start_step=5, stop_step=4), r"stop_step must be None, an int >= start_step \(5\), or .*, got 4"),
        (dict(teacher_entry="neck"), "teacher_entry: Detector has no module 'neck'"),
        (dict(teacher_layers="body"), "teacher_layers: Detector has no module 'body'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_distiller(**arguments)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(student_levels=["p3"]), r"student_levels names a level 'p3', but the features have \['fine', 'coarse'\]"),
        (dict(teacher_levels=[0]), r"teacher_levels names a level 0, but the features have \['fine', 'coarse'\]"),
        (
            dict(layers=["backbone.stem"], student_levels=[1]),
            "student_levels names a level 1, but the features have 1 l",
        ),
    ],
)
def test_levels_that_are_not_there_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_distiller(**arguments)(IMAGES, TARGETS)


def sgd(distiller):
    return torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)


def train(distiller, optimizer, batches):
    """The total loss of every step."""
    totals = []
    for batch in batches:
        optimizer.zero_grad()
        total = sum(distiller(batch, TARGETS).values())
        total.backward()
        optimizer.step()
        totals.append(total.item())
    return totals


def test_resumes_to_bit_equal_losses(tmp_path):
    """Everything that goes on is in the state dicts: weights, momentum, running statistics, the warm-up's step."""
    batches = [images() for _ in range(6)]
    distiller = without_dropout(make_distiller(warmup_steps=5))
    optimizer = sgd(distiller)
    train(distiller, optimizer, batches[:3])
    state = {"distiller": distiller.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pth")
    expected = train(distiller, optimizer, batches[3:])

    resumed = without_dropout(make_distiller(warmup_steps=5))
    resumed.teacher.load_state_dict(distiller.teacher.state_dict())
    optimizer = sgd(resumed)
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    resumed.load_state_dict(state["distiller"])
    optimizer.load_state_dict(state["optimizer"])
    assert resumed.step == 3
    assert train(resumed, optimizer, batches[3:]) == expected


def test_averaged_students():
    distiller = without_dropout(make_distiller())
    average, optimizer = AveragedModel(distiller.student, avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b), sgd(distiller)
    expected = {name: value.clone() for name, value in distiller.student.state_dict().items()}
    for step in range(3):
        train(distiller, optimizer, [IMAGES])
        average.update_parameters(distiller.student)
        for name, value in distiller.student.state_dict().items():
            expected[name] = value.clone() if step == 0 else 0.5 * expected[name] + 0.5 * value
    torch.testing.assert_close(dict(average.module.state_dict()), expected)
    assert average.eval()(IMAGES).shape == (2, 1, 4, 4)


def test_models_carry_no_hooks_outside_a_step():
    distiller = make_distiller(teacher_entry="backbone")
    distiller(IMAGES, TARGETS)
    distiller.teacher.backbone.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        distiller(IMAGES, TARGETS)
    for model in (distiller.student, distiller.teacher):
        assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in distiller.student.modules())


def fail(module, inputs):
    raise KeyError("the teacher breaks down")


def test_copies_and_pickles_are_whole_and_apart():
    distiller = without_dropout(make_distiller())
    expected = distiller(IMAGES, TARGETS)
    # The BatchNorm statistics moved, but in training they are not read.
    for other in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        losses = other(IMAGES, TARGETS)
        assert all(torch.equal(losses[name], expected[name]) for name in expected)
        assert other.student is not distiller.student and other.teacher is not distiller.teacher
        assert other.step == 2
    average = copy.deepcopy(distiller.student)
    assert set(average(IMAGES, TARGETS)) == {"loss_box", "loss_cls"}


def aged(distiller, names):
    """As an earlier release has it: without some attributes, and with those of its only teacher among its own."""
    for name in names:
        del distiller.__dict__[name]
    (side,) = distiller.__dict__.pop("_sides").values()
    distiller.__dict__ |= {"_teacher_tap": side.tap, "_teacher_entry": side.entry, "_entry_tap": side.entry_tap}
    return distiller


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda distiller: pickle.loads(pickle.dumps(distiller))])
def test_copies_and_pickles_of_earlier_releases_have_the_defaults_of_later_attributes(copied):
    later = _later_attributes()
    new = without_dropout(make_distiller())
    old = copied(aged(copy.deepcopy(new), later))
    assert {name: type(value) for name, value in later.items()} == {name: type(vars(old)[name]) for name in later}
    expected, losses = new(IMAGES, TARGETS), old(IMAGES, TARGETS)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert old.weight == 1 and old.weights().keys() == {"fbkd_weight"}


def test_a_share_is_no_later_attribute():
    """It is a submodule, which an attribute would hide."""
    assert copy.deepcopy(make_distiller(gradient_share=0.1)).share is not None


class Recording:
    """A compiler that counts the nodes of each graph that runs."""

    def __init__(self):
        self.runs = []

    def __call__(self, graph, example_inputs):
        nodes = sum(node.op.startswith("call") for node in graph.graph.nodes)

        def run(*inputs):
            self.runs.append(nodes)
            return graph.forward(*inputs)

        return run


def test_compiled_students_and_teachers_stay_in_one_graph():
    """Also the second step and those after an evaluation: the teacher's early end must not spoil the student's code."""
    torch._dynamo.reset()
    plain = without_dropout(make_distiller())
    student_graphs, teacher_graphs = Recording(), Recording()
    compiled = Distiller(
        torch.compile(copy.deepcopy(plain.student), backend=student_graphs),
        torch.compile(copy.deepcopy(plain.teacher), backend=teacher_graphs),
        copy.deepcopy(plain.loss),
        student_layers="backbone",
    )
    whole = []
    for _ in range(4):
        batch = torch.randn(2, 3, 8, 8)
        expected, losses = plain(batch, TARGETS), compiled(batch, TARGETS)
        assert all(torch.allclose(losses[name], expected[name], rtol=1e-5) for name in expected)
        compiled.eval()(batch)
        compiled.train()
        whole.append((tuple(student_graphs.runs), tuple(teacher_graphs.runs)))
        student_graphs.runs.clear(), teacher_graphs.runs.clear()
    (runs,) = set(whole)
    (training, evaluation), (teaching,) = runs
    assert min(training, evaluation, teaching) > 3  # the backbone alone has three nodes


def test_a_compiled_student_is_tapped_after_steps_without_terms():
    torch._dynamo.reset()
    distiller = make_distiller(start_step=2)
    student = torch.compile(distiller.student, backend="eager")
    distiller = Distiller(student, distiller.teacher, distiller.loss, student_layers="backbone", start_step=2)
    losses = [distiller(IMAGES, TARGETS) for _ in range(3)]
    assert losses[1]["loss_fbkd_feature"] == 0 and losses[2]["loss_fbkd_feature"] > 0


def test_activation_checkpointing_in_the_student():
    class Checkpointed(Detector):
        def forward(self, images, targets=None):
            return torch.utils.checkpoint.checkpoint(super().forward, images, targets, use_reentrant=False)

    plain = without_dropout(make_distiller())
    student = Checkpointed(4)
    student.load_state_dict(plain.student.state_dict())
    other = without_dropout(
        Distiller(student, copy.deepcopy(plain.teacher), copy.deepcopy(plain.loss), student_layers="backbone")
    )
    for distiller in (plain, other):
        sum(distiller(IMAGES, TARGETS).values()).backward()
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_student_features_without_gradient_are_warned_of():
    class Frozen(Detector):
        def forward(self, images, targets=None):
            with torch.no_grad():
                self.backbone(images)
            return {"loss": self.head.weight.sum()}

    distiller = Distiller(Frozen(4), Detector(4), FBKDLoss(4, num_levels=2), student_layers="backbone")
    with pytest.warns(UserWarning, match="student_features carry no gradient"):
        distiller(IMAGES, TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller(IMAGES, TARGETS)


class Twice(Detector):
    def forward(self, images, targets=None):
        self.backbone(images)
        return super().forward(images, targets)


class Never(Detector):
    def forward(self, images, targets=None):
        return {"loss": images.mean()}


class Pair(Detector):
    def forward(self, images, targets=None):
        self.backbone(images)
        return images.mean(), images


class Vectors(Detector):
    def forward(self, images, targets=None):
        self.backbone(images)
        return [images.mean(dim=(1, 2, 3))]


class Vector(Detector):
    def forward(self, images, targets=None):
        self.backbone(images)
        return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(
    "student,error,message",
    [
        (Twice(4), RuntimeError, "student_layers: module 'backbone' was called 2 times in one forward, expected once"),
        (Never(4), RuntimeError, "student_layers: module 'backbone' was called 0 times"),
        (Pair(4), TypeError, "must return a dict or list of losses, a scalar tensor, .* got tuple; .*combine="),
        (Vectors(4), TypeError, "must return a dict or list of losses, a scalar tensor, .* got list"),
        (Vector(4), TypeError, r"must return a dict or list of losses, a scalar tensor, .* got Tensor\(2,\)"),
    ],
)
def test_misuse_is_named(student, error, message):
    distiller = Distiller(student, Detector(4), FBKDLoss(4, num_levels=2), student_layers="backbone")
    with pytest.raises(error, match=message):
        distiller(IMAGES, TARGETS)


class Popping(Detector):
    def forward(self, batch):
        return super().forward(batch.pop("images"), batch["targets"])


def test_the_teacher_sees_what_the_student_took_out_of_its_batch():
    distiller = make_distiller()
    distiller = Distiller(Popping(4), Popping(6), distiller.loss, student_layers="backbone")
    batch = {"images": IMAGES, "targets": TARGETS}
    losses = distiller(batch)
    features = (model.backbone(IMAGES) for model in (distiller.student, distiller.teacher))
    assert_terms(losses, expected_terms(distiller, *features))


@pytest.mark.parametrize("nested", [False, True])
def test_images_that_the_student_changes_in_place_are_an_error(nested):
    class Normalizing(Detector):
        def forward(self, images, targets=None):
            return super().forward(images[0]["image"].sub_(0.5) if nested else images.sub_(0.5), targets)

    distiller = make_distiller()
    arguments = dict(student_layers="backbone")
    batch = [{"image": IMAGES.clone()}] if nested else IMAGES.clone()
    with pytest.raises(RuntimeError, match="the student changed its inputs in place"):
        Distiller(Normalizing(4), Normalizing(6), distiller.loss, **arguments)(batch, TARGETS)
    if not nested:
        with_entry = Distiller(Normalizing(4), Normalizing(6), distiller.loss, teacher_entry="backbone", **arguments)
        assert set(with_entry(batch, TARGETS)) >= TERMS


def test_steps_without_terms_keep_no_features():
    distiller = make_distiller(start_step=5, teacher_entry="backbone")
    distiller(IMAGES, TARGETS)
    (side,) = distiller._sides.values()
    assert distiller._student_tap._recorder.values == side.entry_tap._recorder.values == [None]


def test_student_and_teacher_cannot_be_replaced():
    distiller = make_distiller()
    for name in ("student", "teacher"):
        with pytest.raises(AttributeError, match=f"the {name} of a Distiller cannot be replaced"):
            setattr(distiller, name, Detector(4))
        setattr(distiller, name, getattr(distiller, name))
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"student", "loss", "_extra_state"}


@pytest.mark.parametrize(
    "position,name", [(0, "student must be a torch.nn.Module, got NoneType"), (1, "teacher must"), (2, "loss must be")]
)
def test_something_that_is_no_module_is_named(position, name):
    modules = [Detector(4), Detector(4), FBKDLoss(4, num_levels=2)]
    modules[position] = None
    with pytest.raises(TypeError, match=name):
        Distiller(*modules, student_layers="backbone")


@pytest.mark.parametrize("levels", [0, "fine"])
def test_levels_that_are_no_list_are_named(levels):
    with pytest.raises(TypeError, match=f"student_levels must be a list of indices or keys, got {levels!r}"):
        make_distiller(student_levels=levels)


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (dict(combine=3), TypeError, "combine must be a function or another callable, got int"),
        (dict(resize="no"), TypeError, "resize must be True or False, got 'no'"),
        (dict(resize=1), TypeError, "resize must be True or False, got 1"),
        (dict(student_levels=[0.0]), TypeError, r"student_levels must be a list of indices or keys, got 0\.0 in it"),
        (dict(teacher_levels=[True]), TypeError, "teacher_levels must be a list of indices or keys, got True in it"),
        (dict(teacher_levels=[[0]]), TypeError, r"teacher_levels must be a list of indices or keys, got \[0\] in it"),
        (dict(teacher_levels=b"ab"), TypeError, "teacher_levels must be a list of indices or keys, got b'ab'"),
        (dict(student_levels=[]), ValueError, "student_levels is empty, expected at least one index or key"),
        (dict(teacher_entry=3), TypeError, "teacher_entry must be a text, got int"),
        (dict(total=3), TypeError, "total must be the name of an entry, a list of names, or None, got int"),
        (dict(total=["loss", 3]), TypeError, "total must be a text, got int"),
    ],
)
def test_wrong_arguments_are_named_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        make_distiller(**arguments)


@pytest.mark.parametrize("levels", [(1, 0), np.array([1, 0]), range(1, -1, -1), torch.tensor([1, 0])])
def test_levels_are_a_list_of_any_kind(levels):
    paths = ["backbone.stem", "backbone.down"]
    distiller = make_distiller(layers=paths, student_levels=levels, teacher_levels=levels)
    maps = [[model.backbone.stem(IMAGES)] for model in (distiller.student, distiller.teacher)]
    for side, model in zip(maps, (distiller.student, distiller.teacher), strict=True):
        side.insert(0, model.backbone.down(side[0].relu()))
    assert distiller.student_levels == distiller.teacher_levels == [1, 0]
    assert_terms(distiller(IMAGES, TARGETS), expected_terms(distiller, *maps))


def test_a_flag_of_numpy_is_a_flag():
    assert make_distiller(resize=np.bool_(True)).resize is True


class Mimic(nn.Module):
    """A loss of somebody else's."""

    def __init__(self, form="dict"):
        super().__init__()
        self.weight, self.form = nn.Parameter(torch.ones(())), form

    def forward(self, students, teachers):
        loss = self.weight * students["fine"].mean()
        return {"loss_mimic": loss} if self.form == "dict" else loss


def test_another_loss_keeps_its_name_in_steps_without_it():
    distiller = Distiller(Detector(4), Detector(4), Mimic(), student_layers="backbone", stop_step=1)
    names = [set(distiller(IMAGES, TARGETS)) for _ in range(2)]
    assert names[0] == names[1] == {"loss_box", "loss_cls", "loss_mimic"}


def test_a_loss_that_returns_no_dict_is_named():
    distiller = Distiller(Detector(4), Detector(4), Mimic("scalar"), student_layers="backbone")
    with pytest.raises(TypeError, match="loss must return a dict of scalar tensors, got Tensor"):
        distiller(IMAGES, TARGETS)


def test_a_compiled_student_is_no_teacher_of_itself():
    model = Detector(4)
    with pytest.raises(ValueError, match="two modules"):
        Distiller(model, torch.compile(model, backend="eager"), FBKDLoss(4, num_levels=2), student_layers="backbone")


def test_a_report_counts_what_has_a_gradient():
    class WithAccuracy(Detector):
        def forward(self, images, targets=None):
            losses = super().forward(images, targets)
            return {**losses, "acc": torch.tensor(97.0), "levels": [losses["loss_box"], losses["loss_cls"]]}

    distiller = make_distiller()
    distiller = Distiller(WithAccuracy(4), distiller.teacher, distiller.loss, student_layers="backbone")
    report = distiller.balance_report(IMAGES, TARGETS)
    assert [row.name for row in report.own] == ["loss_box", "loss_cls", "levels"]
    assert report.own_total.value == pytest.approx(2 * (report.own[0].value + report.own[1].value), rel=1e-5)


def test_a_failed_step_leaves_no_stale_features():
    """The student fails after its backbone was seen."""
    distiller = make_distiller()
    with pytest.raises(TypeError):
        distiller(IMAGES, "no tensor")
    assert set(distiller(IMAGES, TARGETS)) >= TERMS


def test_a_name_that_is_taken_is_refused():
    class Taken(Detector):
        def forward(self, images, targets=None):
            return {**super().forward(images, targets), "loss_fbkd_feature": images.mean()}

    distiller = Distiller(Taken(4), Detector(4), FBKDLoss(4, num_levels=2), student_layers="backbone")
    with pytest.raises(ValueError, match="already have 'loss_fbkd_feature'"):
        distiller(IMAGES, TARGETS)


def test_student_and_teacher_must_differ():
    model = Detector(4)
    with pytest.raises(ValueError, match="two modules"):
        Distiller(model, model, FBKDLoss(4, num_levels=2), student_layers="backbone")


def gradient_norm(value, parameters):
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return sum(gradient.square().sum() for gradient in gradients if gradient is not None).sqrt().item()


@pytest.mark.parametrize("form", ["dict", "list", "scalar"])
def test_the_balance_report_compares_the_pulls(form):
    distiller = without_dropout(make_distiller(form, start_step=100))
    report = distiller.balance_report(IMAGES, TARGETS)
    trunk = list(distiller.student.backbone.parameters())
    own = distiller.student(IMAGES, TARGETS)
    own = {"dict": lambda: own, "list": lambda: {"loss 0": own[0], "loss 1": own[1]}, "scalar": lambda: {"loss": own}}[
        form
    ]()
    terms = copy.deepcopy(distiller.loss)(
        distiller.student.backbone(IMAGES),
        {key: value.detach() for key, value in distiller.teacher.backbone(IMAGES).items()},
    )
    for rows, losses in ((report.own, own), (report.distillation, terms)):
        assert [row.name for row in rows] == list(losses)
        for row, value in zip(rows, losses.values(), strict=True):
            assert row.value == pytest.approx(value.item(), rel=1e-5)
            assert row.gradient_norm == pytest.approx(gradient_norm(value, trunk), rel=1e-4)
    assert report.own_total.gradient_norm == pytest.approx(gradient_norm(sum(own.values()), trunk), rel=1e-4)
    total = gradient_norm(sum(terms.values()), trunk)
    assert report.ratio == pytest.approx(total / report.own_total.gradient_norm, rel=1e-4)
    table = str(report)
    assert all(row.name in table for row in itertools.chain(report.own, report.distillation))


def test_the_balance_report_leaves_everything_as_it_is():
    """A report in the middle changes nothing: not the losses after it, not the random numbers, no buffer."""

    class Normed(Detector):
        def __init__(self, *args):
            super().__init__(*args)
            self.backbone.down = nn.Sequential(self.backbone.down, nn.BatchNorm2d(4))

    loss = make_distiller().loss
    distillers = [
        Distiller(student, teacher, copy.deepcopy(loss), student_layers="backbone")
        for student, teacher in [(Normed(4), Detector(6))] * 2
    ]
    distillers[1] = copy.deepcopy(distillers[0])
    results = []
    for report, distiller in enumerate(distillers):
        torch.manual_seed(0)
        optimizer = sgd(distiller)
        totals = train(distiller, optimizer, [IMAGES])
        if report:
            distiller.balance_report(IMAGES, TARGETS)
        results.append(totals + train(distiller, optimizer, [IMAGES]) + [distiller.step])
    assert results[0] == results[1]
    for mine, theirs in zip(distillers[0].state_dict().values(), distillers[1].state_dict().values(), strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_a_report_in_eval_mode_is_of_training():
    distiller = without_dropout(make_distiller())
    expected = distiller.balance_report(IMAGES, TARGETS)
    distiller.student.dropout.p, distiller.student.backbone.stem.training = 0.5, False
    distiller.eval()
    torch.manual_seed(0)
    in_eval = distiller.balance_report(IMAGES, TARGETS)
    assert [row.name for row in in_eval.own] == [row.name for row in expected.own]
    assert in_eval.distillation == expected.distillation
    assert not any(module.training for module in distiller.modules())


def test_a_report_in_training_leaves_modules_in_eval_mode():
    distiller = make_distiller()
    distiller.student.dropout.eval()
    distiller.balance_report(IMAGES, TARGETS)
    assert distiller.student.training and not distiller.student.dropout.training
    first, second = (distiller.balance_report(IMAGES, TARGETS) for _ in range(2))
    assert first == second


def test_a_report_without_own_gradient_says_infinite():
    distiller = Distiller(Never(4), Detector(4), FBKDLoss(4, num_levels=2), student_layers=["backbone.stem"])
    distiller.student.forward = lambda images, targets: (distiller.student.backbone.stem(images), images.mean())[1]
    distiller.loss, distiller.teacher_levels = FBKDLoss(4, num_levels=1), None
    assert distiller.balance_report(IMAGES, TARGETS).ratio == float("inf")
