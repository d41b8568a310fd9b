"""What the tests of the OpenMMLab bridges need: packages without their compiled or outdated parts, tiny configs."""

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

MMRAZOR_FOLDERS = (
    "models",
    "models.algorithms",
    "models.algorithms.distill",
    "models.algorithms.distill.configurable",
    "models.architectures",
    "models.distillers",
    "models.task_modules",
    "models.utils",
)


class Operators(ModuleType):
    """mmcv's compiled operators, none of which can be called."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args, **kwargs):
            raise NotImplementedError(f"mmcv._ext.{name}: mmcv-lite has no compiled operators")

        return refuse


def import_mmcv_ops() -> None:
    """With mmcv-lite too, which has the Python half of ``mmcv.ops`` only."""
    if importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = Operators("mmcv._ext")
        importlib.import_module("mmcv.ops")
        del sys.modules["mmcv._ext"]  # MMEngine takes it for the sign of a full mmcv


@contextlib.contextmanager
def mmrazor_for_distillation():
    """MMRazor 1.0.0's distillation in its ``MODELS``, while other modules of its names are out of the way.

    Its packages import quantization, whose names left torch, and with it everything; so the packages are folders
    here, from which only what is asked for is imported.
    """
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if is_of_mmrazor(name)}
    try:
        root = Path(importlib.import_module("mmrazor").__file__).parent
        for folder in MMRAZOR_FOLDERS:
            package = ModuleType(f"mmrazor.{folder}")
            package.__path__ = [str(root / folder.replace(".", "/"))]
            sys.modules[package.__name__] = package
        # The registries call it to import every package.
        importlib.import_module("mmrazor.utils").register_all_modules = lambda *args: None
        lift("utils", "misc", "add_prefix")
        lift("task_modules", "recorder", "RecorderManager")
        lift("task_modules", "delivery", "DistillDeliveryManager")
        for name in ("losses", "architectures.connectors", "distillers.configurable_distiller"):
            importlib.import_module(f"mmrazor.models.{name}")
        importlib.import_module("mmrazor.models.algorithms.distill.configurable.single_teacher_distill")
        yield importlib.import_module("mmrazor.registry").MODELS
    finally:
        for name in list(sys.modules):
            if is_of_mmrazor(name):
                del sys.modules[name]
        sys.modules.update(aside)


def is_of_mmrazor(name: str) -> bool:
    return name.partition(".")[0] == "mmrazor" or name == "fbkd_ops.integrations.mmrazor_loss"


def lift(package: str, module: str, name: str) -> None:
    """What the package's own ``__init__`` would have done with one name."""
    found = getattr(importlib.import_module(f"mmrazor.models.{package}.{module}"), name)
    setattr(sys.modules[f"mmrazor.models.{package}"], name, found)


def retinanet(depth: int, width: int = 16, start_level: int = 1) -> dict:
    """A config of three classes with five levels of ``width`` channels."""
    anchors = dict(octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[2**i for i in range(3, 8)])
    return dict(
        type="RetinaNet",
        _scope_="mmdet",
        data_preprocessor=dict(type="DetDataPreprocessor", mean=[127.0] * 3, std=[64.0] * 3, pad_size_divisor=32),
        backbone=dict(type="ResNet", depth=depth, out_indices=(0, 1, 2, 3)),
        neck=dict(
            type="FPN",
            in_channels=[64, 128, 256, 512],
            out_channels=width,
            start_level=start_level,
            add_extra_convs="on_input" if start_level == 1 else False,
            num_outs=5,
        ),
        bbox_head=dict(
            type="RetinaHead",
            num_classes=3,
            in_channels=width,
            stacked_convs=1,
            feat_channels=16,
            anchor_generator=dict(type="AnchorGenerator", **anchors),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
            loss_cls=dict(type="FocalLoss", use_sigmoid=True),
            loss_bbox=dict(type="L1Loss"),
        ),
        train_cfg=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
            sampler=dict(type="PseudoSampler"),
            allowed_border=-1,
            pos_weight=-1,
        ),
        test_cfg=dict(score_thr=0.05, max_per_img=10),
    )


def register_samples() -> None:
    from mmdet.registry import DATASETS

    if "Samples" not in DATASETS:
        DATASETS.register_module(module=Samples)


class Samples(torch.utils.data.Dataset):
    """Two annotated boxes on noise, with what hooks look for on a dataset."""

    metainfo = dict(classes=("round", "square", "long"))

    def __init__(self, count: int = 4, size: int = 64):
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def update_skip_type_keys(self, keys) -> None:
        self.skipped = keys

    def __getitem__(self, index: int) -> dict:
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        shape = (self.size, self.size)
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator)
        annotation = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
        boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [24.0, 20.0, 60.0, 56.0]])
        annotation.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2]))
        return dict(inputs=image, data_samples=annotation)


def training(folder: Path, epochs: int = 2, size: int = 64, **more) -> dict:
    """The rest of a config of a tiny run: two steps an epoch."""
    return dict(
        work_dir=str(folder),
        experiment_name=f"{folder.name}_{epochs}_{len(more)}",
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=dict(type="mmdet.Samples", size=size),
            sampler=dict(type="DefaultSampler", shuffle=True),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
        randomness=dict(seed=0),
        log_level="ERROR",
        **more,
    )


def batch(model, size: int = 64) -> dict:
    """Two images as the model's own preprocessor leaves them."""
    images = [Samples(size=size)[index] for index in range(2)]
    return model.data_preprocessor({key: [image[key] for image in images] for key in images[0]}, True)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def unchanged(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Of the trained kernels and matrices, those that are as before (a step of a norm's 1 may be too small)."""
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.dim() > 1]
    return [name for name in trained if torch.equal(module.get_parameter(name), before[name])]
