"""Feature taps: what they catch, where they look, what they refuse, and what copies of them do."""

import copy
import gc
import pickle

import pytest
import torch
from detectors import Detector, images
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from fbkd_ops import FeatureTap, Layer
from fbkd_ops.training.feature_tap import _Recorder


class Counting(Detector):
    """Counts how often its head's input was made."""

    calls = 0

    def forward(self, images, targets=None):
        features = self.backbone(images)
        self.calls += 1
        return self.head(features["coarse"])


def caught(model, layers, **arguments):
    """What a tap hands out of one forward, and the model's output."""
    tap = FeatureTap(model, layers, **arguments)
    output = model(images())
    return tap.features(), output


def test_the_output_of_one_layer_as_it_is():
    model = Counting()
    features, _ = caught(model, "backbone")
    assert list(features) == ["fine", "coarse"]
    assert features["fine"].requires_grad and features["coarse"].shape == (2, 4, 4, 4)


def test_a_tensor_becomes_a_list():
    (feature,), _ = caught(Counting(), "backbone.down")
    assert feature.shape == (2, 4, 4, 4)


def test_several_layers_keep_their_order_and_names():
    model = Counting()
    listed, _ = caught(model, ["backbone.down", "backbone.stem"])
    assert [feature.shape[-1] for feature in listed] == [4, 8]
    named, _ = caught(model, {"p3": "backbone.down", "p2": Layer("backbone.stem")})
    assert [(name, feature.shape[-1]) for name, feature in named.items()] == [("p3", 4), ("p2", 8)]


def test_inputs_are_what_the_module_was_given():
    model = Counting()
    (given,), output = caught(model, Layer("head", inputs=True))
    assert torch.equal(model.head(given), output)


class ByName(nn.Module):
    """Calls its head with several arguments, or with one by name, and lets it change the list it was given."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.head = Head()
        self.arguments = (args, kwargs)

    def forward(self):
        args, kwargs = self.arguments
        return self.head(*args, **kwargs)


class Head(nn.Module):
    def forward(self, *args, maps=None):
        for given in (*args, maps):
            if isinstance(given, list):
                given.clear()


A, B = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)


@pytest.mark.parametrize("args,kwargs", [(([A, B],), {}), ((A, B), {}), ((), {"maps": A})])
def test_inputs_however_they_are_given(args, kwargs):
    model = ByName(*args, **kwargs)
    tap = FeatureTap(model, Layer("head", inputs=True))
    model()
    features = tap.features()
    features = list(features.values()) if isinstance(features, dict) else list(features)
    inputs = [A] if kwargs else [A, B]
    assert all(feature is expected for feature, expected in zip(features, inputs, strict=True))


def test_a_function_takes_the_models_output():
    model = Counting()
    (feature,), output = caught(model, lambda output: [output])
    assert feature is output
    tensor, output = caught(model, lambda output: output)
    assert tensor[0] is output


def test_select_makes_the_features():
    model = Counting()
    features, _ = caught(model, Layer("backbone", select=lambda maps: [maps["fine"].permute(0, 2, 3, 1)]))
    assert features[0].shape == (2, 8, 8, 4)


@pytest.mark.parametrize("path,index", [("-1", 2), ("-3", 0), ("1", 1)])
def test_numbers_count_from_the_end(path, index):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1))
    (feature,), _ = caught(model, path)
    assert feature.shape[1] == 4 + index


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
)
@pytest.mark.parametrize("layers", ["backbone", lambda output: output])
def test_looks_through_wrappers(wrap, layers):
    model = wrap(Detector().eval())
    model.eval()
    tap = FeatureTap(model, layers)
    output = model(images())
    features = tap.features()
    assert features[0] is output if callable(layers) else list(features) == ["fine", "coarse"]


def test_a_compiled_part_is_caught():
    model = Counting()
    model.backbone = torch.compile(model.backbone, backend="eager")
    assert list(caught(model, "backbone")[0]) == ["fine", "coarse"]
    torch.compiler.reset()
    assert caught(model, "backbone.down")[0][0].shape == (2, 4, 4, 4)


def test_a_graph_compiled_before_the_tap_is_an_error_that_says_so():
    model = torch.compile(Detector().eval(), backend="eager")
    model.eval()(images())
    with pytest.raises(RuntimeError, match="a graph compiled before the tap was there does not have it"):
        caught(model, "backbone")


def test_every_forward_begins_anew():
    model = Counting()
    tap = FeatureTap(model, "backbone")
    for _ in range(3):
        model(images())
    last = images()
    model(last)
    assert torch.equal(tap.features()["fine"], model.backbone.stem(last).relu())
    with pytest.raises(RuntimeError, match="layers: module 'backbone' was called 0 times in one forward"):
        tap.features()


def test_two_calls_in_one_forward_are_an_error():
    class Twice(Detector):
        def forward(self, images, targets=None):
            self.backbone(images)
            return self.backbone(images)

    model = Twice()
    tap = FeatureTap(model, "backbone", name="student_layers")
    model(images())
    with pytest.raises(RuntimeError, match="student_layers: module 'backbone' was called 2 times in one forward"):
        tap.features()


def test_a_part_called_by_itself_counts():
    """Some frameworks train through another method than forward."""
    model = Counting()
    tap = FeatureTap(model, "backbone")
    model.backbone(images())
    assert list(tap.features()) == ["fine", "coarse"]
    model.backbone(images())
    model.backbone(images())
    with pytest.raises(RuntimeError, match="called 2 times"):
        tap.features()
    model.backbone(images())
    tap.clear()
    model.backbone(images())
    assert tap.features()


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


class InPlace(nn.Module):
    """An in-place activation behind its layers, and a list whose second map it adds to."""

    def __init__(self):
        super().__init__()
        self.first, self.pair, self.act = nn.Conv2d(3, 4, 1), Pairing(), nn.ReLU(inplace=True)

    def forward(self, images):
        x, y = self.pair(self.first(images))
        y += 1
        return self.act(x)


class Pairing(nn.Module):
    def forward(self, x):
        return [x * 2, x * 3]


def test_a_parent_that_calls_its_child_module_is_no_wrapper():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Counting()

        def forward(self, images):
            return [self.module(images) * 2]

    model = Parent()
    assert list(caught(model, "module.backbone")[0]) == ["fine", "coarse"]
    features, output = caught(model, lambda output: output)
    assert features[0] is output[0]


def test_replicas_are_refused():
    """DataParallel on several devices runs copies of the model that share its hooks."""
    model = Counting()
    with FeatureTap(model, "backbone"), pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model._replicate_for_data_parallel()(images())


def test_an_error_forgets_what_was_caught():
    model = Counting()
    model.head.register_forward_pre_hook(lambda module, inputs: [][0])
    with pytest.raises(IndexError), FeatureTap(model, "backbone") as tap:
        model(images())
    assert tap._recorder.values == [None]


@pytest.mark.parametrize("layer", ["first", "pair", Layer("act", inputs=True)])
def test_what_is_changed_in_place_later_is_an_error(layer):
    """The student's features would be others than the teacher's, whose forward ends at the tap."""
    model = InPlace()
    if layer == "first":
        model.pair.register_forward_pre_hook(lambda module, inputs: (inputs[0].relu_(),))
    with pytest.raises(RuntimeError, match="was changed in place after that"):
        caught(model, layer)
    assert caught(model, "act")[0]
    with torch.inference_mode():
        assert caught(Counting(), "backbone")[0]


def test_close_takes_the_hooks_away_and_keeps_what_was_caught():
    model = Counting()
    with FeatureTap(model, ["backbone.stem", Layer("head", inputs=True)]) as tap:
        assert len(hooks_of(model)) == 3
        model(images())
    assert hooks_of(model) == []
    assert len(tap.features()) == 2
    model(images())
    with pytest.raises(RuntimeError, match="called 0 times"):
        tap.features()
    tap.open()
    tap.open()
    assert len(hooks_of(model)) == 3
    model(images())
    assert len(tap.features()) == 2


def test_close_after_an_error():
    model = Counting()
    with pytest.raises(TypeError), FeatureTap(model, "backbone"):
        model("no images")
    assert hooks_of(model) == []


def test_a_complete_tap_ends_the_forward():
    model = Counting()
    with FeatureTap(model, ["backbone.stem", "backbone.down"], stop_when_complete=True) as tap:
        model(images())
        raise AssertionError("the forward went on")
    assert model.calls == 0 and len(tap.features()) == 2
    model(images())
    assert model.calls == 1


def test_only_the_own_end_is_kept():
    inner, outer = Counting(), Counting()
    with FeatureTap(outer, "backbone", stop_when_complete=True):
        closed = FeatureTap(inner, "backbone", stop_when_complete=True)
        with pytest.raises(Exception, match="ended the forward; run the model inside the tap's with block"):
            inner(images())
        closed.close()


def test_copies_and_pickles_have_taps_of_their_own():
    model = Counting()
    tap = FeatureTap(model, "backbone")
    model(images())  # what was caught is no leaf, and is not copied
    for other in (copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
        assert other.model is not model
        with pytest.raises(RuntimeError, match="called 0 times"):
            other.features()
        batch = images()
        other.model(batch)
        assert torch.equal(other.features()["fine"], other.model.backbone.stem(batch).relu())
        other.close()
        assert hooks_of(other.model) == []
    assert tap.features()


def test_a_copy_of_the_model_alone_has_no_tap():
    model = Counting()
    tap = FeatureTap(model, "backbone")
    model(images())
    for average in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        batch = images()
        output = average(batch)
        assert torch.equal(tap.features()["fine"], tap.model.backbone.stem(batch).relu()) is False
        assert output.shape == (2, 1, 4, 4)
        model(batch)
    gc.collect()
    others = [each for each in gc.get_objects() if type(each) is _Recorder and each is not tap._recorder]
    assert not any(value is not None for recorder in others for value in recorder.values)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_not_caught(reentrant):
    class Checkpointed(Detector):
        def forward(self, images, targets=None):
            return checkpoint(self.inside, images, use_reentrant=reentrant)

        def inside(self, images):
            return self.head(self.backbone(images)["coarse"])

    model = Checkpointed()
    tap = FeatureTap(model, "backbone")
    model(images().requires_grad_()).sum().backward()
    features = tap.features()
    assert features["fine"].requires_grad is not reentrant
    model(images().requires_grad_()).sum().backward()
    tap.features()
    with pytest.raises(RuntimeError, match="called 0 times"):
        tap.features()


@pytest.mark.parametrize(
    "path,message",
    [
        ("neck", r"layers: Detector has no module 'neck'; at the top there are 'backbone', 'head', 'dropout'"),
        ("backbone.body", r"no module 'backbone.body'; inside 'backbone' there are 'stem', 'down'"),
        ("head.0.conv", r"no module 'head.0.conv'; inside 'head' there are no modules"),
        ("backbone.-1", r"no module 'backbone.-1'"),
        ([], r"layers is empty, expected at least one module path"),
        ({}, r"layers is empty"),
        (["head", "head"], r"layers names a module path twice: \['head', 'head'\]"),
    ],
)
def test_a_missing_layer_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        FeatureTap(nn.DataParallel(Detector()), path)


@pytest.mark.parametrize("layers", [None, 5, [5], {"p3": None}, [["head"]], nn.Conv2d(1, 1, 1)])
def test_layers_of_another_type_are_named(layers):
    with pytest.raises(TypeError, match="layers must be a module path, a Layer, a list or dict of these, or a functi"):
        FeatureTap(Detector(), layers)


def test_a_model_that_is_no_module_is_named():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        FeatureTap({}, "backbone")


def test_features_of_another_type_are_named():
    with pytest.raises(TypeError, match="'backbone' must give one tensor where several layers are given, got dict"):
        caught(Counting(), ["backbone", "backbone.down"])
    with pytest.raises(TypeError, match="the features must be a tensor, list, tuple or dict, got int; Layer"):
        caught(Counting(), lambda output: 5)
