"""FBKDDetector under MMEngine's Runner."""

import copy
import importlib.util
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from detectors import TERMS
from helpers import randomise
from openmmlab import batch, import_mmcv_ops, register_samples, retinanet, snapshot, training, unchanged
from process_state import kept

from fbkd_ops import Distiller

for module in ("mmdet", "mmengine", "mmcv"):
    pytest.importorskip(module)

LOSS = dict(preset="one_stage")


@pytest.fixture(scope="module", autouse=True)
def framework():
    import_mmcv_ops()
    import mmdet.models
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    register_samples()
    with kept():
        yield mmdet.models


@pytest.fixture(autouse=True)
def whole_checkpoints(monkeypatch):
    """MMEngine 0.10.7 loads what it saved with the default of torch before 2.6."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def build(config: dict):
    from mmdet.registry import MODELS

    return MODELS.build(config)


def detector(**settings):
    from fbkd_ops.integrations.mmdet import FBKDDetector

    arguments = dict(student=retinanet(18), teacher=retinanet(34, 24), loss=LOSS) | settings
    return FBKDDetector(**arguments).train()


@pytest.fixture(scope="module")
def teacher_ckpt(framework, tmp_path_factory):
    teacher = randomise(build(retinanet(34, 24)))
    path = str(tmp_path_factory.mktemp("teacher") / "teacher.pth")
    torch.save(dict(state_dict=teacher.state_dict()), path)
    return path


def runner(folder, teacher_ckpt, student=None, **more):
    from mmengine.runner import Runner

    import fbkd_ops.integrations.mmdet  # noqa: F401

    student, teacher = student or retinanet(18), retinanet(34, 24)
    model = dict(type="FBKDDetector", student=student, teacher=teacher, teacher_ckpt=teacher_ckpt, loss=LOSS)
    return Runner(model=model, default_scope="mmdet", **training(folder, **more))


def test_losses_are_the_students_and_the_terms_of_the_necks_outputs():
    model = detector()
    randomise(model.loss)
    data = batch(model)
    own = model.student(**data, mode="loss")
    losses = model(**data, mode="loss")
    assert set(losses) == set(own) | TERMS
    with torch.no_grad():
        features = model.student.extract_feat(data["inputs"]), model.teacher.extract_feat(data["inputs"])
        terms = model.loss(*features)
    assert [feature.shape[1] for feature in (features[0][0], features[1][0])] == [16, 24]
    for name, term in terms.items():
        assert term > 0
        torch.testing.assert_close(losses[name], term)
    for name, values in own.items():
        torch.testing.assert_close(losses[name], values)
    total, _ = model.parse_losses(losses)
    torch.testing.assert_close(total, model.parse_losses(own)[0] + sum(terms.values()))
    total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("name", ["PKDLoss", "CWDLoss", "MGDLoss", "FGDLoss", "ScoreWeightedLoss"])
def test_other_losses_by_their_type(name):
    model = detector(loss=dict(type=name))
    data = batch(model)
    losses = model(**data, mode="loss")
    own = model.student(**data, mode="loss")
    assert type(model.loss).__name__ == name and set(losses) == set(own) | set(model.loss.term_names)
    with torch.no_grad():
        features = model.student.extract_feat(data["inputs"]), model.teacher.extract_feat(data["inputs"])
        others = {}
        if name == "FGDLoss":
            boxes = [each.gt_instances.bboxes for each in data["data_samples"]]
            boxes = [each.tensor if hasattr(each, "tensor") else each for each in boxes]
            others = {"boxes": boxes, "image_size": data["inputs"].shape[2:]}
        elif name == "ScoreWeightedLoss":
            logits, _ = model.teacher.bbox_head(features[1])
            others = {"scores": [each.sigmoid().amax(dim=1) for each in logits]}
        terms = model.loss.eval()(*features, **others)
    for each, term in terms.items():
        torch.testing.assert_close(losses[each], term)
    total, _ = model.parse_losses(losses)
    total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_layers_are_found():
    """By a plain Distiller: FBKDDetector itself has the neck's maps."""
    distiller = Distiller.for_model(build(retinanet(18)), build(retinanet(34, 24)), share_every=1).train()
    assert distiller.student_levels == distiller.teacher_levels == [0, 1, 2, 3, 4]
    for _ in range(2):
        losses = distiller(**batch(distiller.student), mode="loss")
        distiller.student.parse_losses(losses)[0].backward()
    assert set(losses) == {"loss_cls", "loss_bbox"} | TERMS and float(distiller.share.share) > 0
    with pytest.raises(TypeError, match="finds the neck's maps and their widths by itself"):
        type(detector()).for_model(distiller.student, distiller.teacher)


def faster_rcnn(depth, width):
    """MMDetection's own config, at a smaller size."""
    from mmengine.hub import get_config

    config = get_config("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py").model
    config.backbone.update(depth=depth, init_cfg=None, frozen_stages=-1, norm_eval=False)
    config.neck.update(in_channels=[64, 128, 256, 512], out_channels=width)
    config.rpn_head.update(in_channels=width, feat_channels=width)
    config.roi_head.bbox_roi_extractor.update(out_channels=width)
    config.roi_head.bbox_head.update(in_channels=width, fc_out_channels=32, num_classes=3)
    return config


@pytest.mark.skipif(importlib.util.find_spec("mmcv._ext") is None, reason="mmcv-lite has no operators")
def test_a_detector_that_calls_mmcvs_operators():
    model = detector(student=faster_rcnn(18, 16), teacher=faster_rcnn(34, 24), loss=dict(preset="two_stage"))
    data = batch(model)
    losses = model(**data, mode="loss")
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "acc"} | TERMS
    model.parse_losses(losses)[0].backward()
    assert all(parameter.grad is not None for parameter in model.loss.parameters())
    assert len(model.eval()(**data, mode="predict")) == 2


def test_a_loss_of_no_known_type_is_refused():
    with pytest.raises(ValueError, match="loss: type must be one of FBKDLoss, .*, got 'PKD'"):
        detector(loss=dict(type="PKD"))


def test_the_example_trains(tmp_path, teacher_ckpt):
    from mmengine.config import Config
    from mmengine.runner import load_checkpoint

    from examples.frameworks.mmdetection import train

    student = Config(dict(model=retinanet(18), default_scope="mmdet"))
    student.merge_from_dict(training(tmp_path))
    trained = train(student, Config(dict(model=retinanet(34, 24))), teacher_ckpt)
    model = trained.model
    saved = torch.load(teacher_ckpt, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in model.teacher.state_dict().items())
    assert {f"train/{name}" for name in TERMS} < set(trained.message_hub.log_scalars)
    checkpoint = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    assert {key.partition(".")[0] for key in checkpoint["state_dict"]} == {"student", "loss", "_extra_state"}
    plain = build(retinanet(18))
    load_checkpoint(plain, str(tmp_path / "epoch_2.pth"), revise_keys=[(r"^student\.", "")], logger="silent")
    assert all(torch.equal(value, model.student.state_dict()[key]) for key, value in plain.state_dict().items())


def test_a_run_changes_the_student_and_the_loss_only(tmp_path, teacher_ckpt):
    run = runner(tmp_path, teacher_ckpt)
    model = run.model
    run._init_model_weights()
    randomise(model.loss)
    before = {name: snapshot(part) for name, part in model.named_children() if name in ("student", "loss")}
    teacher = copy.deepcopy(model.teacher.state_dict())
    run.train()
    assert model.step == 4
    assert not unchanged(model.student, before["student"])
    # A BatchNorm makes 1 and -1 of the single pixels of two images: what comes before it there learns from rounding.
    assert all(re.match(r"levels\.[34]\.\w+_non_local\.", name) for name in unchanged(model.loss, before["loss"]))
    assert all(torch.equal(value, teacher[key]) for key, value in model.teacher.state_dict().items())
    assert not any(module.training for module in model.teacher.modules())


def test_a_run_is_resumed(tmp_path, teacher_ckpt):
    first = runner(tmp_path, teacher_ckpt)
    first.train()
    second = runner(tmp_path, teacher_ckpt, epochs=3, resume=True)
    second.load_or_resume()
    assert all(torch.equal(v, first.model.state_dict()[k]) for k, v in second.model.state_dict().items())
    assert second.model.step == 4
    second.train()
    assert second.epoch == 3 and second.model.step == 6


@pytest.mark.parametrize("begin_epoch", [0, 1])
def test_the_averaged_copy_of_emahook_shares_the_teacher(tmp_path, teacher_ckpt, begin_epoch):
    run = runner(tmp_path, teacher_ckpt, custom_hooks=[dict(type="EMAHook", begin_epoch=begin_epoch)])
    run.train()
    (averaged,) = [hook.ema_model.module for hook in run.hooks if type(hook).__name__ == "EMAHook"]
    assert averaged.teacher is run.model.teacher
    assert averaged.student is not run.model.student
    checkpoint = torch.load(tmp_path / "epoch_2.pth", weights_only=False)
    key = "loss.levels.0.feature_adaptation.weight"
    assert torch.equal(checkpoint["state_dict"][key], averaged.state_dict()[key])
    assert not torch.equal(checkpoint["state_dict"][key], run.model.state_dict()[key])
    averaged.train()
    assert set(averaged(**batch(averaged), mode="loss")) > TERMS  # its own student is the one that is listened to


def test_other_modes_are_the_students():
    model = detector()
    data = batch(model)
    for is_training in (True, False):
        model.train(is_training)
        torch.testing.assert_close(model(**data), model.student(**data))
    assert set(model(**data, mode="loss")) == set(model.student(**data, mode="loss"))


def test_settings_of_the_distiller_pass_through():
    model = detector(layers="backbone", student_levels=[1, 2], teacher_levels=[1, 2], start_step=1)
    assert [level.student_channels for level in model.loss.levels] == [128, 256]
    randomise(model.loss)
    data = batch(model)
    first, second = (model(**data, mode="loss") for _ in range(2))
    assert all(first[name] == 0 and second[name] > 0 for name in TERMS)


def test_initialisation_leaves_weights_that_came_from_elsewhere(teacher_ckpt):
    model = detector(student=build(retinanet(18)), teacher_ckpt=teacher_ckpt)
    kept = copy.deepcopy(model.student.state_dict()), torch.load(teacher_ckpt, weights_only=True)["state_dict"]
    model.init_weights()
    for part, before in zip((model.student, model.teacher), kept, strict=True):
        assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items())
    fresh = detector()
    before = copy.deepcopy(fresh.teacher.state_dict())
    fresh.init_weights()
    assert not torch.equal(before["neck.lateral_convs.0.conv.weight"], fresh.teacher.neck.lateral_convs[0].conv.weight)


def test_a_teachers_checkpoint_must_fit(tmp_path, teacher_ckpt):
    state = torch.load(teacher_ckpt, weights_only=True)["state_dict"]
    del state["bbox_head.retina_cls.bias"]
    torch.save(dict(state_dict=state), tmp_path / "part.pth")
    with pytest.raises(RuntimeError, match="missing keys in source state_dict: bbox_head.retina_cls.bias"):
        detector(teacher_ckpt=str(tmp_path / "part.pth"))


@pytest.fixture
def epoch_aware(framework):
    """A detector that is told the epoch, as MMDetection's TOOD is."""
    from mmdet.registry import MODELS

    class EpochAware(framework.RetinaNet):
        def set_epoch(self, epoch):
            self.epoch = epoch

    MODELS.register_module(module=EpochAware)
    yield retinanet(18) | dict(type="EpochAware")
    MODELS.module_dict.pop("EpochAware")


HOOKS = [
    dict(type="SetEpochInfoHook"),
    dict(type="YOLOXModeSwitchHook", num_last_epochs=1),
    dict(type="NumClassCheckHook"),
    dict(type="CheckInvalidLossHook", interval=1),
    dict(type="SyncNormHook"),
    dict(type="SyncBuffersHook"),
    dict(type="EmptyCacheHook"),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", update_buffers=True),
]


def test_hooks_and_options_of_the_runner_reach_the_student(tmp_path, teacher_ckpt, epoch_aware):
    options = dict(activation_checkpointing=["backbone.layer1"], efficient_conv_bn_eval=["backbone"])
    run = runner(tmp_path, teacher_ckpt, epoch_aware, custom_hooks=HOOKS, cfg=options)
    run.train()
    student = run.model.student
    assert student.epoch == 1
    assert student.bbox_head.use_l1
    assert "forward" in vars(student.backbone.layer1)  # wrapped by the checkpointing
    assert not {"epoch", "bbox_head"} & set(vars(run.model))
    (averaged,) = [hook.ema_model.module for hook in run.hooks if type(hook).__name__ == "EMAHook"]
    assert averaged.bbox_head is averaged.student.bbox_head is not student.bbox_head


class ConvNeXt(torch.nn.Module):
    """What the learning rates by layer know of the backbone of this name."""

    def __init__(self):
        super().__init__()
        self.downsample_layers = torch.nn.ModuleList([torch.nn.Conv2d(3, 64, 3, stride=4, padding=1)])
        self.stages = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Conv2d(64, 512, 3, stride=8, padding=1)])])

    def forward(self, images):
        x = self.downsample_layers[0](images)
        return [x, x[:, :1].expand(-1, 128, -1, -1), x[:, :1].expand(-1, 256, -1, -1), self.stages[0][0](x)]


def test_learning_rates_by_layer_are_the_students(framework):
    from mmengine.optim import build_optim_wrapper

    student = build(retinanet(18))
    student.backbone = ConvNeXt()
    model = detector(student=student)
    decay = dict(decay_rate=0.5, decay_type="layer_wise", num_layers=6)
    config = dict(
        optimizer=dict(type="SGD", lr=0.1), constructor="LearningRateDecayOptimizerConstructor", paramwise_cfg=decay
    )
    rates, expected = (
        {
            id(parameter): group["lr"]
            for group in build_optim_wrapper(each, copy.deepcopy(config)).optimizer.param_groups
            for parameter in group["params"]
        }
        for each in (model, student)
    )
    assert len(set(expected.values())) == 3
    assert expected == {id(each): rates[id(each)] for each in student.parameters() if each.requires_grad}
    assert all(rates[id(each)] == 0.1 for each in model.loss.parameters())


def test_a_loss_entry_is_no_total_for_mmengine():
    """It adds up every entry with "loss" in its name."""
    model = detector()
    data = batch(model)
    model.student.forward = lambda inputs, samples, mode: {"loss": model.student.extract_feat(inputs)[0].mean()}
    assert set(model(**data, mode="loss")) == {"loss", *TERMS}


def test_names_of_the_student():
    model = detector()
    student = model.student
    assert model.bbox_head is student.bbox_head
    assert model.with_neck and not model.with_mask
    assert model.extract_feat.__self__ is student
    assert model.loss is not student.loss and model.data_preprocessor is student.data_preprocessor
    assert not hasattr(model, "set_epoch")
    student.note = 1
    model.note, model.own = 2, 3
    assert student.note == 2 and not hasattr(student, "own") and "note" not in vars(model)
    del model.note
    assert not hasattr(student, "note")
    with pytest.raises(AttributeError, match="'FBKDDetector' object has no attribute 'nothing', nor has its student"):
        model.nothing
    copied = pickle.loads(pickle.dumps(model))
    assert copied.bbox_head is copied.student.bbox_head is not student.bbox_head


def test_names_that_stay_the_detectors_are_documented():
    text = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    names = {name for name in dir(detector()) if not name.startswith("_")} - set(dir(torch.nn.Module()))
    assert {name for name in names if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("with_average", [False, True])
def test_a_plain_detectors_checkpoint_lands_in_the_student(tmp_path, teacher_ckpt, with_average):
    plain = randomise(build(retinanet(18)), seed=1).state_dict()
    torch.save(dict(state_dict=plain), tmp_path / "plain.pth")
    hooks = [dict(type="EMAHook")] if with_average else []
    run = runner(tmp_path, teacher_ckpt, load_from=str(tmp_path / "plain.pth"), custom_hooks=hooks)
    models = [run.model]
    if with_average:
        run.call_hook("before_run")
        models += [hook.ema_model.module for hook in run.hooks if type(hook).__name__ == "EMAHook"]
        assert len(models) == 2
    run.load_or_resume()
    for model in models:
        assert all(torch.equal(value, plain[key]) for key, value in model.student.state_dict().items())


def test_a_foreign_checkpoint_is_refused(tmp_path, teacher_ckpt):
    torch.save(dict(state_dict={"encoder.weight": torch.zeros(1)}), tmp_path / "foreign.pth")
    run = runner(tmp_path, teacher_ckpt, load_from=str(tmp_path / "foreign.pth"))
    with pytest.raises(RuntimeError, match="neither a FBKDDetector's, .* nor its student's"):
        run.load_or_resume()


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(loss=torch.nn.Identity()), "loss must be a dict of a loss's arguments, got Identity"),
        (dict(student="retinanet.py"), r"student must be a config of a model \(a dict, .* or a built one, got str"),
        (dict(teacher=[]), r"teacher must be a config of a model \(a dict, .* or a built one, got list"),
        (dict(teacher_ckpt={}), "teacher_ckpt must be a path or an address, got dict"),
        (dict(data_preprocessor=0), r"data_preprocessor must be a config of a model \(a dict, .*, got int"),
    ],
)
def test_arguments_of_other_types_are_named(settings, message):
    with pytest.raises(TypeError, match=message):
        detector(**settings)


def test_a_path_to_the_teachers_checkpoint(teacher_ckpt):
    saved = torch.load(teacher_ckpt, weights_only=True)["state_dict"]
    loaded = detector(teacher_ckpt=Path(teacher_ckpt)).teacher.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.items())


@pytest.fixture
def checkpoint_of_teacher(teacher_ckpt):
    return dict(type="Pretrained", checkpoint=teacher_ckpt)


def test_a_teacher_without_trained_weights_is_warned_of(teacher_ckpt, checkpoint_of_teacher):
    with pytest.warns(UserWarning, match="without trained weights, .* give teacher_ckpt=..., or a teacher"):
        detector()
    pretrained = retinanet(34, 24) | dict(init_cfg=checkpoint_of_teacher)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the teacher")
        detector(teacher_ckpt=teacher_ckpt)
        detector(teacher=build(retinanet(34, 24)))
        detector(teacher=pretrained)
        detector(teacher=retinanet(34, 24) | dict(init_cfg=[checkpoint_of_teacher]))


def test_a_teacher_of_another_class_than_mmengines(teacher_ckpt):
    """It has no `is_init` of its own."""
    teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=8, padding=1), torch.nn.Identity())
    before = teacher[0].weight.clone()
    model = detector(teacher=teacher, teacher_layers=["0"], student_levels=[0])
    model.init_weights()
    assert torch.equal(teacher[0].weight, before)


def test_a_student_without_a_preprocessor():
    """MMEngine's own moves the images, and nothing else."""
    from mmengine.model import BaseDataPreprocessor

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = torch.nn.Conv2d(3, 4, 3, stride=8, padding=1)

        def forward(self, inputs, samples=None, mode="tensor"):
            return {"loss_mean": self.neck(inputs).mean()}

    model = detector(student=Student(), teacher=Student())
    assert type(model.data_preprocessor) is BaseDataPreprocessor
    assert set(model(torch.randn(2, 3, 64, 64), mode="loss")) == {"loss_mean", *TERMS}


def test_features_in_the_output_of_a_model_without_hooks():
    from fbkd_ops.training.blank_images import blank_image_features

    traced = torch.jit.trace(torch.nn.Conv2d(3, 8, 3, stride=8, padding=1), torch.zeros(1, 3, 64, 64))
    (feature,) = blank_image_features(traced, lambda output: [output], "teacher_layers", "")
    assert feature.shape[1] == 8


def with_channels(channels: int, depth: int = 18) -> dict:
    config = retinanet(depth)
    config["backbone"]["in_channels"] = channels
    config["data_preprocessor"] = dict(type="DetDataPreprocessor", pad_size_divisor=32)
    return config


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels):
    model = detector(student=with_channels(channels), teacher=with_channels(channels))
    assert [level.student_channels for level in model.loss.levels] == [16] * 5
    images = torch.randn(2, channels, 64, 64)
    samples = batch(detector())["data_samples"]
    assert set(model(images, samples, mode="loss")) > TERMS


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_stem_that_makes_four_channels_of_one(channels):
    from mmdet.models.backbones.csp_darknet import Focus

    from fbkd_ops.training.blank_images import blank_image_features

    (feature,) = blank_image_features(Focus(channels, 8), "conv", "layers", "")
    assert feature.shape[1] == 8


def with_ssd_neck(depth: int) -> dict:
    """A detector with the levels of SSD300, the last of which is there from 300 pixels on."""
    neck = dict(type="SSDNeck", level_strides=(2, 2, 1, 1), level_paddings=(1, 1, 0, 0))
    config = retinanet(depth)
    config["backbone"]["out_indices"] = (1, 2)
    config["neck"] = neck | dict(in_channels=(128, 256), out_channels=(128, 256, 64, 32, 32, 32))
    return config


def test_a_size_that_the_model_accepts():
    model = detector(student=with_ssd_neck(18), teacher=with_ssd_neck(34))
    assert [level.student_channels for level in model.loss.levels] == [128, 256, 64, 32, 32, 32]


class FixedSize(torch.nn.Module):
    """A backbone that takes no other images than of one size."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.stem = size, torch.nn.Conv2d(3, 8, 3, stride=8, padding=1)

    def forward(self, images):
        if images.shape[-1] != self.size:
            raise AssertionError(f"images must have {self.size} pixels")
        return [self.stem(images)]


def test_widths_that_cannot_be_read_are_given():
    student, teacher = (build(retinanet(18)) for _ in range(2))
    student.backbone, student.neck = FixedSize(100), torch.nn.Identity()
    message = (
        "layers: RetinaNet takes no blank image of 3, 1 channels and 128 to 1024 pixels, .*"
        r"AssertionError: images must have 100 pixels\); give their widths: loss=dict\(student_channels=\[...\]\)"
    )
    settings = dict(student=student, teacher=teacher, teacher_layers="backbone.conv1")
    with pytest.raises(ValueError, match=message):
        detector(**settings)
    model = detector(**settings, loss=LOSS | dict(student_channels=[8]))
    assert [(level.student_channels, level.teacher_channels) for level in model.loss.levels] == [(8, 64)]


@pytest.mark.parametrize(
    "settings,error,message",
    [
        (dict(student_levels=3), TypeError, "student_levels must be a list of indices or keys, got 3"),
        (dict(teacher_levels=[0.0]), TypeError, "teacher_levels must be a list of indices or keys, got 0.0 in it"),
        (dict(student_levels=[7]), ValueError, "student_levels names a level 7, but the features have 5 levels"),
        (dict(teacher_layers="roi_head"), ValueError, "teacher_layers: RetinaNet has no module 'roi_head'"),
    ],
)
def test_levels_and_layers_are_checked(settings, error, message):
    with pytest.raises(error, match=message):
        detector(**settings)


def test_modes_and_statistics_stay_as_they_are():
    from fbkd_ops.training.blank_images import blank_image_features

    student = build(retinanet(18)).train()
    student.backbone.layer1.eval()
    modes = {name: module.training for name, module in student.named_modules()}
    before = copy.deepcopy(student.state_dict())
    blank_image_features(student, "neck", "layers", "")
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


@pytest.fixture
def recorded(framework):
    """The length that a runner would leave for its model."""
    from mmengine.logging import MessageHub

    hub = MessageHub.get_current_instance()
    before = hub.get_info("max_iters")
    hub.update_info("max_iters", 4)
    yield hub
    hub.update_info("max_iters", before)


def test_a_schedule_takes_the_runners_length_and_the_weights_are_logged(tmp_path, teacher_ckpt):
    from mmengine.runner import Runner

    student, teacher = retinanet(18), retinanet(34, 24)
    model = dict(type="FBKDDetector", student=student, teacher=teacher, teacher_ckpt=teacher_ckpt, loss=LOSS)
    model |= dict(decay="cosine", stop_step=0.75, gradient_share=0.2, share_every=1)
    run = Runner(model=model, default_scope="mmdet", **training(tmp_path))
    run.train()
    assert (run.model.total_steps, run.model.step) == (4, 4)
    logged = {
        name: run.message_hub.get_scalar(f"train/{name}").data[0]
        for name in ("fbkd_weight", "fbkd_gradient_share", "loss_fbkd_feature")
    }
    weights, shares, features = logged.values()
    assert weights[0] == pytest.approx(1e-3) and shares[0] == 0 and min(shares[1:]) > 0
    assert weights[1] == pytest.approx(0.75 * 0.2 * 1e-3 / shares[1], rel=1e-3)
    assert weights[3] == features[3] == 0 < features[0]


def test_the_weights_are_in_no_loss(recorded):
    model = detector(decay="cosine", weight=0.5)
    losses = model(**batch(model), mode="loss")
    assert model.total_steps == 4 and losses["fbkd_weight"] == 0.5
    total, log = model.parse_losses(losses)
    torch.testing.assert_close(total, model.parse_losses({k: v for k, v in losses.items() if k != "fbkd_weight"})[0])
    assert log["fbkd_weight"] == 0.5


def test_images_of_another_preprocessor_are_warned_of():
    from fbkd_ops import Renormalize, TeacherImagesWarning

    other = retinanet(34, 24)
    other["data_preprocessor"] = other["data_preprocessor"] | dict(mean=[0.0] * 3, std=[255.0] * 3)
    model = detector(teacher=build(other))
    with pytest.warns(TeacherImagesWarning, match=r"mean \(127, .*trained with mean \(0, .*teacher_input="):
        model(**batch(model), mode="loss")
    pairs = dict(student=([127.0] * 3, [64.0] * 3), teacher=([0.0] * 3, [255.0] * 3))
    silent = [
        detector(teacher=build(other), data_preprocessor=other["data_preprocessor"]),
        detector(teacher=build(other), teacher_input=pairs),
    ]
    assert isinstance(silent[1].teacher_input, Renormalize)
    for each in silent:
        with warnings.catch_warnings():
            warnings.simplefilter("error", TeacherImagesWarning)
            each(**batch(each), mode="loss")
