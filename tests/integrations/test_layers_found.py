"""Layers that are found by themselves: each known family, and what is refused."""

import copy

import pytest
import torch
from detectors import Detector
from torch import nn

import fbkd_ops
from fbkd_ops import Distiller, TokenMaps
from fbkd_ops.training.pyramids import find_pyramid, levels_by_stride

torchvision = pytest.importorskip("torchvision")
from torchvision.models import detection  # noqa: E402

NONE = dict(weights=None, weights_backbone=None)


@pytest.mark.parametrize(
    "make, levels, channels, strides",
    [
        ("fasterrcnn_resnet50_fpn", ["0", "1", "2", "3", "pool"], [256] * 5, [4, 8, 16, 32, 64]),
        ("fasterrcnn_mobilenet_v3_large_fpn", ["0", "1", "pool"], [256] * 3, [32, 32, 64]),
        ("retinanet_resnet50_fpn", ["0", "1", "2", "p6", "p7"], [256] * 5, [8, 16, 32, 64, 128]),
        ("fcos_resnet50_fpn", ["0", "1", "2", "p6", "p7"], [256] * 5, [8, 16, 32, 64, 128]),
        ("ssdlite320_mobilenet_v3_large", list("012345"), [672, 480, 512, 256, 256, 128], [16, 32, 64, 128, 128, 128]),
    ],
)
def test_torchvision(make, levels, channels, strides):
    model = getattr(detection, make)(**NONE)
    found = find_pyramid(model, "student")
    assert (found.layers, found.entry, found.levels) == ("backbone", "backbone", levels)
    assert (found.channels, found.strides) == (channels, strides) and model.training
    assert str(found).startswith(
        f"torchvision detector, at 'backbone': '0': {channels[0]} channels, stride {strides[0]}"
    )


HUGGING_FACE = {
    "rt_detr": ([32] * 3, [8, 16, 32]),
    "rt_detr_v2": ([32] * 3, [8, 16, 32]),
    "d_fine": ([32] * 3, [8, 16, 32]),
    "deformable_detr": ([32] * 4, [8, 16, 32, 64]),
    "detr": ([32], [32]),
    "rf_detr": ([32], [14]),
    "segformer": ([32, 64, 96, 128], [4, 8, 16, 32]),
    "mask2former": ([32] * 3, [32, 16, 8]),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face(family):
    pytest.importorskip("transformers")
    from hf_models import FAMILIES

    found = find_pyramid(FAMILIES[family](32), "student")
    assert (found.channels, found.strides) == HUGGING_FACE[family] and found.entry is None
    assert "Hugging Face" in str(found)


@pytest.mark.parametrize("start_level, strides", [(0, [4, 8, 16, 32, 64]), (1, [8, 16, 32, 64, 128])])
def test_mmdetection(start_level, strides):
    pytest.importorskip("mmdet")
    from openmmlab import import_mmcv_ops, retinanet

    import_mmcv_ops()
    from mmdet.registry import MODELS
    from process_state import kept

    with kept():
        found = find_pyramid(MODELS.build(retinanet(18, start_level=start_level)), "student")
    assert (found.layers, found.channels, found.strides) == ("neck", [16] * 5, strides)
    assert str(found).startswith("MMDetection detector, at 'neck': 0: 16 channels")


def test_ultralytics():
    pytest.importorskip("ultralytics")
    from ultralytics.nn.tasks import DetectionModel

    found = find_pyramid(DetectionModel("yolo11n.yaml", verbose=False), "student")
    assert (found.channels, found.strides, found.entry) == ([64, 128, 256], [8, 16, 32], None)
    assert "at the inputs of 'model.-1'" in str(found)


class OfTimm(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return self.backbone(images)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    "name, strides", [("resnet18", [4, 8, 16, 32]), ("swin_tiny_patch4_window7_224", [4, 8, 16, 32])]
)
def test_timm(name, strides, is_whole):
    timm = pytest.importorskip("timm")
    small = dict(img_size=128, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)) if "swin" in name else {}
    backbone = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1), **small)
    found = find_pyramid(backbone if is_whole else OfTimm(backbone), "student")
    assert found.strides == [4, 8, 16, 32] and found.channels == backbone.feature_info.channels()


def test_maps_of_equal_strides_are_compared(capsys):
    retinanet = detection.retinanet_resnet50_fpn(**NONE)
    faster_rcnn = detection.fasterrcnn_resnet50_fpn(**NONE)
    distiller = Distiller.for_model(retinanet, faster_rcnn, preset="two_stage", weight=0.5)
    assert distiller.student_levels == ["0", "1", "2", "p6"] and distiller.teacher_levels == ["1", "2", "3", "pool"]
    assert distiller.share.settings.target == 0.5 and distiller.weight == 0.5
    printed = capsys.readouterr().out
    assert "'p6' with 'pool'" in printed and "gradient_share=0.5" in printed
    assert levels_by_stride(find_pyramid(retinanet, ""), find_pyramid(faster_rcnn, "")) == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
    ]


def test_equal_strides_are_compared_in_their_order():
    mobile = find_pyramid(detection.fasterrcnn_mobilenet_v3_large_fpn(**NONE), "student")
    assert levels_by_stride(mobile, mobile) == [(0, 0), (1, 1), (2, 2)]


def test_tokens_are_compared_with_every_map():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1)
    student = detection.retinanet_resnet50_fpn(**NONE, min_size=64, max_size=96)
    several = Distiller.for_model(student, TokenMaps(vit, ["blocks.0", "norm"]), "PKDLoss")
    assert several.student_levels == ["0", "1", "2", "p6", "p7"] and several.teacher_levels == [1] * 5
    distiller = Distiller.for_model(student, TokenMaps(vit, "norm"), "PKDLoss")
    images, target = (
        [torch.rand(3, 64, 64)] * 2,
        {"boxes": torch.tensor([[3.0, 4, 30, 40]]), "labels": torch.tensor([1])},
    )
    losses = distiller(images, [target] * 2)
    assert "loss_pkd" in losses and fbkd_ops.sum_losses(losses).isfinite()


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (lambda: Detector(4), lambda: Detector(4), "student: Detector is of no model family that is known; at its top"),
        (
            lambda: detection.retinanet_resnet50_fpn(**NONE),
            nn.ReLU,
            "teacher: ReLU is of no model family .* no modules",
        ),
        (
            lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**NONE),
            lambda: of_strides([4, 8]),
            r"no stride in common: \[32, 32, 64\] and \[4, 8\]",
        ),
        (lambda: of_strides([4]), lambda: detection.retinanet_resnet50_fpn(**NONE), "no stride in common"),
        (lambda: of_strides([8]), lambda: detection.retinanet_resnet50_fpn(**NONE), "prepares its images by itself"),
    ],
)
def test_what_cannot_be_told_is_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        Distiller.for_model(student(), teacher())


@pytest.mark.parametrize("is_vit", [True, False])
def test_a_teacher_of_images_alone_gets_them_from_where_the_student_has_them(is_vit):
    """Of a student that is called with more than images."""
    timm = pytest.importorskip("timm")
    if is_vit:
        teacher = TokenMaps(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1), "norm")
    else:
        teacher = timm.create_model("resnet10t", features_only=True, out_indices=(-3, -2, -1))
    student = OfTimm(timm.create_model("resnet10t", features_only=True, out_indices=(-3, -2, -1)))
    student.forward = lambda images, targets=0.0: {"loss": (student.backbone(images)[-1] - targets).square().mean()}
    distiller = Distiller.for_model(student, teacher, "PKDLoss").train()
    losses = distiller(torch.rand(2, 3, 64, 64), 1.0)
    losses["loss"].backward()
    assert float(distiller.terms()["loss_pkd"]) > 0


def test_a_vit_teaches_a_detector_of_hugging_face():
    timm, _ = pytest.importorskip("timm"), pytest.importorskip("scipy")
    pytest.importorskip("transformers")
    from hf_models import FAMILIES, collate, samples

    vit = TokenMaps(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1), "norm")
    distiller = Distiller.for_model(FAMILIES["rt_detr"](32), vit, "PKDLoss").train()
    distiller(**collate(samples("rt_detr", 2))).loss.backward()
    assert float(distiller.terms()["loss_pkd"]) > 0
    with pytest.raises(ValueError, match="no module that is called so is known of the student"):
        Distiller.for_model(FAMILIES["detr"](32), vit)


@pytest.mark.parametrize("name", ["student_layers", "teacher_levels"])
def test_layers_are_all_found_or_all_given(name):
    models = [detection.retinanet_resnet50_fpn(**NONE) for _ in range(2)]
    with pytest.raises(TypeError, match=f"for_model finds {name} by itself"):
        Distiller.for_model(*models, **{name: ["0"]})


def test_a_wrapper_of_a_known_model_is_named():
    wrapper = nn.Module()
    wrapper.model = detection.retinanet_resnet50_fpn(**NONE)
    with pytest.raises(ValueError, match="its .model is a torchvision detector: give that"):
        find_pyramid(wrapper, "student")


def test_weights_are_those_of_each_levels_stride():
    mobile = detection.fasterrcnn_mobilenet_v3_large_fpn(**NONE)
    distiller = Distiller.for_model(mobile, copy.deepcopy(mobile), preset="two_stage")
    weights = [level.settings.spatial_weight for level in distiller.loss.levels]
    expected = fbkd_ops.size_free_weights("two_stage", 3, strides=[32, 32, 64])["spatial_weight"]
    assert weights == expected and weights[0] == weights[1]


def test_a_stride_is_that_of_the_patches():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", dynamic_img_size=True, depth=1)
    assert find_pyramid(TokenMaps(vit, "norm"), "teacher").strides == [14]
    assert find_pyramid(TokenMaps(vit, "norm", stride=16), "teacher").strides == [16]


def test_a_look_alike_is_refused():
    """A MaskFormer has one map where a Mask2Former has several."""
    transformers = pytest.importorskip("transformers")
    from hf_models import TRUNK

    config = transformers.MaskFormerConfig(
        backbone_config=transformers.ResNetConfig(**TRUNK, out_features=["stage1", "stage2", "stage3", "stage4"]),
        decoder_config=transformers.DetrConfig(d_model=32, decoder_layers=1, decoder_attention_heads=2),
        fpn_feature_size=32,
        mask_feature_size=32,
    )
    with pytest.raises(ValueError, match="MaskFormerForInstanceSegmentation is of no model family that is known"):
        find_pyramid(transformers.MaskFormerForInstanceSegmentation(config), "student")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(loss="PKDLoss", preset="one_stage"), "preset is FBKDLoss's, and the loss is PKDLoss"),
        (dict(loss=fbkd_ops.PKDLoss(4, num_levels=1)), "for_model makes the loss itself: give its name, 'PKDLoss'"),
    ],
)
def test_a_loss_is_given_by_its_name(arguments, message):
    models = [detection.retinanet_resnet50_fpn(**NONE) for _ in range(2)]
    with pytest.raises(TypeError, match=message):
        Distiller.for_model(*models, **arguments)


def test_several_teachers_are_refused():
    models = [detection.retinanet_resnet50_fpn(**NONE) for _ in range(2)]
    with pytest.raises(TypeError, match="teacher must be a torch.nn.Module, got dict: for several teachers"):
        Distiller.for_model(models[0], {"one": models[1]})


def test_the_loss_is_where_the_student_is():
    with torch.device("meta"):
        models = [detection.retinanet_resnet50_fpn(**NONE) for _ in range(2)]
    distiller = Distiller.for_model(*models)
    assert {parameter.device.type for parameter in distiller.loss.parameters()} == {"meta"}


def test_models_stay_as_they_are():
    model = detection.retinanet_resnet50_fpn(**NONE).train()
    model.backbone.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    find_pyramid(model, "student")
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class OfStrides(nn.Module):
    """A backbone of timm's kind."""

    class feature_info:  # noqa: N801
        channels = ()

    def __init__(self, strides):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3, 4, stride, stride) for stride in strides)

    def forward(self, images):
        return [stage(images) for stage in self.stages]


def of_strides(strides):
    return OfStrides(strides)
