"""The training program: one tiny run that several tests look at, its resumption after a kill, and wrong input."""

import errno
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEST_ALL

for module in ("torchvision", "pycocotools", "pydantic", "yaml", "rich", "tensorboard"):
    pytest.importorskip(module)

import yaml  # noqa: E402
from rich.console import Console  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torchvision.models import mobilenet_v3_small  # noqa: E402
from torchvision.models.detection import FasterRCNN, RetinaNet  # noqa: E402
from train_data import CLASSES, CONFIG, SIZE, write_config, write_set  # noqa: E402

from examples.demo.evaluation import CocoScore  # noqa: E402
from examples.train import checkpoints, cli, loop, models  # noqa: E402
from examples.train.config import ConfigError, as_values, load_config  # noqa: E402
from examples.train.data import TrainingLoader, TrainingSet, read_sets  # noqa: E402
from examples.train.log import CsvLog  # noqa: E402
from examples.train.processes import Processes  # noqa: E402
from examples.train.transforms import augmented, build_augmentation, drawn_from  # noqa: E402
from fbkd_ops import Distiller  # noqa: E402

HERE = Path(__file__).parent
CONFIGS = sorted((HERE.parent / "examples" / "train" / "configs").glob("*.yaml"))
ALONE = Processes(0, 1, torch.device("cpu"))
TERMS = {f"loss_fbkd_{term}" for term in ("feature", "channel", "spatial", "relation")}


def environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def in_one_thread(one_thread):
    """Sums of several threads may be added up in another order."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the tiny set and its configuration."""
    root = tmp_path_factory.mktemp("train")
    write_config(root / "config.yaml", write_set(root / "data"))
    return root


@pytest.fixture(scope="module")
def finished(place) -> Path:
    """The output of a teacher and a student distilled from it, undisturbed."""
    output = place / "undisturbed"
    arguments = [str(place / "config.yaml"), f"output={output}", "tasks=[teacher, distilled]", "device=cpu"]
    assert cli.main(arguments) == 0
    return output


def newest(folder: Path) -> dict:
    path, state, broken = checkpoints.Checkpoints(folder / "checkpoints", 2).load()
    assert path is not None and not broken
    return state


def flat(value, name="") -> dict[str, object]:
    """Every leaf of nested dicts and lists."""
    if isinstance(value, dict):
        return {k: leaf for key, part in value.items() for k, leaf in flat(part, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: leaf for key, part in enumerate(value) for k, leaf in flat(part, f"{name}/{key}").items()}
    return {name: value}


def assert_bit_equal(first: dict, second: dict) -> None:
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        is_equal = torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name]
        assert is_equal, name


# A run


def test_a_run_leaves_its_logs(finished):
    folder = finished / "distilled"
    steps = CsvLog(folder / "steps.csv").rows()
    assert [row["step"] for row in steps] == ["1", "2", "3", "4"]
    assert steps[0].keys() > TERMS and all(float(row["loss_fbkd_relation"]) > 0 for row in steps)
    total = sum(float(steps[0][name]) for name in steps[0] if name.startswith("loss_"))
    assert total == pytest.approx(float(steps[0]["loss"]), rel=1e-4)
    assert float(steps[0]["learning_rate"]) == pytest.approx(0.005 * 0.001)
    assert float(steps[-1]["learning_rate"]) == pytest.approx(0.0005), "the milestone after epoch 1"
    scores = CsvLog(folder / "scores.csv").rows()
    assert [row["epoch"] for row in scores] == ["1", "2"]
    assert {"AP", "AP50", "AP small", *(f"AP of {name}" for name in CLASSES)} <= scores[0].keys()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss_fbkd_relation")] == [1, 2, 3, 4]
    assert len(events.Scalars("score/AP")) == 2


def test_a_run_leaves_its_configuration(finished):
    saved = load_config(finished / "distilled" / "config.yaml")
    assert saved.training.batch_size == 4 and saved.distillation.gradient_share == 0.1
    assert as_values(saved) == newest(finished / "distilled")["config"]
    assert (finished / "distilled" / "classes.txt").read_text().split() == list(CLASSES)


def test_the_model_file_is_a_plain_state_dict_of_torchvisions_class(finished):
    state = torch.load(finished / "distilled" / "model.pth", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    config = load_config(finished / "distilled" / "config.yaml")
    trunk = mobilenet_v3_small(weights=None).features
    stages = {"1": "0", "3": "1", "8": "2", "12": "3"}
    fpn = models.BackboneWithFPN(trunk, stages, [16, 24, 48, 576], 8)
    anchors = models.AnchorGenerator(tuple((size,) for size in config.student.anchor_sizes), ((0.5, 1.0, 2.0),) * 5)
    detector = FasterRCNN(fpn, len(CLASSES) + 1, rpn_anchor_generator=anchors, min_size=SIZE, max_size=SIZE)
    detector.load_state_dict(state)
    ema = newest(finished / "distilled")["ema"]
    assert torch.equal(state["rpn.head.cls_logits.weight"], ema["module.rpn.head.cls_logits.weight"])
    module = newest(finished / "distilled")["module"]
    assert not torch.equal(state["rpn.head.cls_logits.weight"], module["student.rpn.head.cls_logits.weight"])


def test_a_killed_run_goes_on_bit_for_bit(place, finished, capsys):
    output = place / "killed"
    weights = f"teacher.weights={finished / 'teacher' / 'model.pth'}"
    arguments = [str(place / "config.yaml"), f"output={output}", "tasks=[distilled]", "device=cpu", weights]
    # Four batches are an epoch, two an update: the seventh is after the first update of the second epoch.
    done = subprocess.run(
        [sys.executable, HERE / "train_killed.py", "7", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -9, done.stderr
    assert [path.name for path in checkpoints.Checkpoints(output / "distilled/checkpoints", 2).files()] == [
        "epoch-00001.pth"
    ]
    assert len(CsvLog(output / "distilled/steps.csv").rows()) == 3
    assert cli.main(arguments) == 2, "not over the run that is there"
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "optimizer.momentum=0.5"]) == 2
    assert "optimizer.momentum: 0.9 -> 0.5: a resumed run keeps its optimizer" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == 0
    assert "1 of 2 epochs are done" in capsys.readouterr().out
    first, second = (newest(folder / "distilled") for folder in (finished, output))
    first.pop("config"), second.pop("config")
    assert_bit_equal(first, second)
    models_of = [torch.load(folder / "distilled/model.pth", weights_only=True) for folder in (finished, output)]
    assert_bit_equal(*models_of)
    logs = [CsvLog(folder / "distilled/steps.csv").rows() for folder in (finished, output)]
    assert logs[0] == logs[1], "each update once"


def test_pictures_without_labels_beside_each_batch(place, finished, tmp_path, capsys):
    """More epochs than one pass over them, a broken one among them, and a run that goes on after a break."""
    folder = tmp_path / "more" / "below"
    folder.mkdir(parents=True)
    for index in range(5):
        shutil.copy(place / "data" / "train" / f"{index:03}.png", folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    weights = f"teacher.weights={finished / 'teacher' / 'model.pth'}"
    common = [
        str(place / "config.yaml"),
        "tasks=[distilled]",
        "device=cpu",
        weights,
        f"data.unlabelled={folder.parent}",
    ]
    common += ["distillation.teacher_dtype=bfloat16", "distillation.teacher_every=2", "schedule.kind=constant"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main([*common, f"output={whole}"]) == 0
    printed = capsys.readouterr().out
    assert "unlabelled: 5 pictures" in printed and "a batch of 5 pictures without labels besides" in printed
    rows = CsvLog(whole / "distilled/steps.csv").rows()
    assert all(float(row["loss_fbkd_feature_unlabelled"]) > 0 for row in rows)
    assert "broken.png" in (whole / "findings-unlabelled.csv").read_text()
    assert cli.main([*common, f"output={broken}", "schedule.epochs=1", "schedule.milestones=[]"]) == 0
    assert cli.main([*common, f"output={broken}", "--resume"]) == 0
    first, second = (newest(each / "distilled") for each in (whole, broken))
    first.pop("config"), second.pop("config")
    assert_bit_equal(first, second)


def test_too_few_pictures_without_labels_are_named(place, finished, tmp_path, capsys):
    shutil.copy(place / "data" / "train" / "001.png", tmp_path)
    weights = f"teacher.weights={finished / 'teacher' / 'model.pth'}"
    arguments = [str(place / "config.yaml"), f"output={tmp_path / 'out'}", "tasks=[distilled]", weights]
    assert cli.main([*arguments, f"data.unlabelled={tmp_path}"]) == 2
    assert "expected at most the number of pictures in data.unlabelled (1)" in capsys.readouterr().err
    assert cli.main([*arguments, f"data.unlabelled={tmp_path / 'nowhere'}"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_broken_checkpoint_is_passed_over(tmp_path):
    kept = checkpoints.Checkpoints(tmp_path, keep=2)
    for epoch in (1, 2, 3):
        kept.save({"epoch": epoch})
    assert [path.name for path in kept.files()] == ["epoch-00003.pth", "epoch-00002.pth"]
    kept.files()[0].write_bytes(kept.files()[0].read_bytes()[:50])
    path, state, broken = kept.load()
    assert state == {"epoch": 2} and path.name == "epoch-00002.pth"
    assert len(broken) == 1 and "epoch-00003.pth" in broken[0]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    """The kernel itself refuses to write more than so many bytes to a file."""
    kept = checkpoints.Checkpoints(tmp_path, keep=1)
    kept.save({"epoch": 1, "weights": torch.zeros(10)})
    model = tmp_path / "model.pth"
    checkpoints.write_atomically(model, torch.ones(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(checkpoints.DiskError, match="epoch-00002.pth"):
            kept.save({"epoch": 2, "weights": torch.zeros(100_000)})
        with pytest.raises(checkpoints.DiskError, match="model.pth"):
            checkpoints.write_atomically(model, torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00001.pth", "model.pth"]
    assert torch.equal(torch.load(model), torch.ones(3))
    assert kept.load()[1]["epoch"] == 1


def test_a_run_on_a_full_disk_and_with_a_lost_picture_says_so(place, tmp_path, monkeypatch, capsys):
    """The picture is there when the set is read and gone when it is trained on; the disk is full in epoch 2."""
    root = write_set(tmp_path / "data")
    read = cli.read_sets
    monkeypatch.setattr(cli, "read_sets", lambda data: [read(data), (root / "train/003.png").unlink()][0])
    written = []

    def sync(number):
        written.append(number)
        if len(written) > 6:  # three files in the first epoch, with their folders
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", sync)
    arguments = [str(place / "config.yaml"), f"output={tmp_path}", f"data.root={root}", "tasks=[baseline]"]
    assert cli.main([*arguments, "device=cpu"]) == 1
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "the disk is full; the last good checkpoint is" in printed and "epoch-00001.pth" in printed
    assert printed.count("cannot use a training picture") == 1 and "1 pictures could not be used" in printed
    assert "003.png" in (tmp_path / "baseline" / "unreadable.txt").read_text()
    assert newest(tmp_path / "baseline")["epoch"] == 1


def test_a_loss_that_is_not_finite_stops_with_its_batch(place, finished, tmp_path, capsys):
    state = torch.load(finished / "distilled" / "model.pth", weights_only=True)
    state["rpn.head.cls_logits.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pth")
    arguments = [str(place / "config.yaml"), f"output={tmp_path}", "tasks=[baseline]", "device=cpu"]
    assert cli.main([*arguments, f"student.weights={tmp_path / 'nan.pth'}", "training.accumulate=1"]) == 1
    message = capsys.readouterr().err
    assert "loss_objectness is nan in step 1" in message and message.count("error:") == 1
    folder = tmp_path / "baseline" / "not-finite-step-1-process-0"
    batch = torch.load(folder / "batch.pth", weights_only=True)
    assert len(batch["files"]) == len(batch["images"]) == 4
    assert (folder / f"0-{Path(batch['files'][0]).name}").read_bytes() == Path(batch["files"][0]).read_bytes()


def test_a_term_of_pictures_without_labels_that_is_not_finite_stops_with_these(
    place, finished, tmp_path, capsys, monkeypatch
):
    terms_alone = Distiller._terms_alone

    def spoiled(*given):
        return {name: math.nan * term for name, term in terms_alone(*given).items()}

    monkeypatch.setattr(Distiller, "_terms_alone", spoiled)
    folder = tmp_path / "more"
    shutil.copytree(place / "data" / "train", folder)
    weights = f"teacher.weights={finished / 'teacher' / 'model.pth'}"
    arguments = [str(place / "config.yaml"), f"output={tmp_path / 'out'}", "tasks=[distilled]", "device=cpu", weights]
    assert cli.main([*arguments, f"data.unlabelled={folder}"]) == 1
    message = capsys.readouterr().err
    assert "loss_fbkd_feature_unlabelled is nan" in message and "loss_fbkd_feature is" not in message
    (saved,) = (tmp_path / "out" / "distilled").glob("not-finite-step-1-process-0/batch.pth")
    files = torch.load(saved, weights_only=True)["files"]
    assert files and all(Path(file).parent == folder for file in files)


def test_what_the_loss_refuses_is_one_line(place, finished, tmp_path, capsys):
    """A batch norm of one picture whose smallest map is one pixel."""
    arguments = [str(place / "config.yaml"), f"output={tmp_path}", "tasks=[distilled]", "device=cpu"]
    weights = f"teacher.weights={finished / 'teacher' / 'model.pth'}"
    assert cli.main([*arguments, weights, "training.accumulate=4"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: distilled, step 1: student_features['pool']") and message.count("\n") == 1


@pytest.mark.skipif(not TEST_ALL, reason="one of the tests of make test-all")
def test_two_processes_end_with_the_same_weights(place, finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    weights = f"teacher.weights={finished / 'teacher' / 'model.pth'}"
    arguments = [place / "config.yaml", f"output={tmp_path}", "tasks=[distilled]", weights, "training.batch_size=8"]
    done = subprocess.run(
        [*command, HERE / "train_worker.py", tmp_path, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert_bit_equal(first["weights"], second["weights"])
    assert len(first["files"]) == len(second["files"]) == 4 and not set(first["files"]) & set(second["files"])
    started = newest(finished / "distilled")["module"]
    assert any(not torch.equal(value, started[name]) for name, value in first["weights"].items())
    assert len(newest(tmp_path / "distilled")["random"]) == 2


# The configuration

FAULTS = {
    "training.batch_sise=4": "training.batch_sise: unknown key; did you mean 'batch_size'?",
    "training.batch_size=many": "training.batch_size: got 'many', expected a valid integer",
    "optimizer.learning_rate=-1": "optimizer.learning_rate: got -1, expected greater than 0",
    "student.backbone=vgg": "student.backbone: got 'vgg', expected 'resnet18'",
    "schedule.milestones=[5]": "schedule.milestones: got [5], expected epochs below schedule.epochs (2)",
    "training.accumulate=3": "training.accumulate: got 3, expected a divisor of training.batch_size (4)",
    "student.norm=frozen": "student.norm: got 'frozen' without weights",
    "teacher.detector=fcos": "teacher.detector: got 'fcos' for a student 'faster_rcnn'",
    "student.detector=fcos": "student.width: got 8, expected a multiple of 32",
    "distillation.stop_step=-1": "distillation.stop_step: got -1",
    "device=tpu": "device: got 'tpu'",
    "data.root=null": "data.root: got nothing",
    "seed": "got the argument 'seed', expected key=value",
}


@pytest.mark.parametrize("argument", FAULTS)
def test_a_wrong_key_or_value_is_named(argument, place):
    with pytest.raises(ConfigError) as error:
        load_config(place / "config.yaml", [argument])
    assert FAULTS[argument] in str(error.value)


REFUSED = {
    "distillation.loss={stride: 0}": "distillation.loss: level 0: stride",
    "distillation.loss={strides: 1}": "distillation.loss: unknown override 'strides'",
    "distillation.inherit=[nek]": "distillation.inherit: modules",
    "distillation.student_levels=[p9]": "got 'p9'",
    "student.arguments={box_speed: 1}": "student.arguments: got 'box_speed', expected of image_mean, ",
    "student.arguments={min_size: 1}": "student.arguments: got 'min_size'",
    "student.anchor_sizes=[8]": "student.anchor_sizes: got 1 sizes, expected 5",
    "student.weights=/nowhere.pth": "student.weights: got /nowhere.pth, expected an existing file",
    "training.batch_size=32": "expected at most the number of training pictures (8)",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_what_only_the_models_or_the_data_can_refuse_is_named(argument, place, finished, tmp_path, capsys):
    weights = f"teacher.weights={finished / 'teacher' / 'model.pth'}"
    arguments = [str(place / "config.yaml"), f"output={tmp_path}", "tasks=[distilled]", "device=cpu", weights]
    assert cli.main([*arguments, argument]) == 2
    assert REFUSED[argument] in capsys.readouterr().err


def test_another_number_of_classes_names_both(finished):
    config = load_config(finished / "teacher" / "config.yaml")
    three = models.build_detector(config.teacher, 3, SIZE, SIZE)
    with pytest.raises(ConfigError, match="is a detector of 2 classes, but the data has 3: a, b, c"):
        models.load_detector(three, finished / "teacher" / "model.pth", ["a", "b", "c"], "teacher.weights")
    retinanet = load_config(None, ["data.root=x", "student.detector=retinanet", "tasks=[baseline]"]).student
    two, five = (models.build_detector(retinanet, count, SIZE, SIZE) for count in (2, 5))
    torch.save(five.state_dict(), finished / "five.pth")
    with pytest.raises(ConfigError, match="is a detector of 5 classes, but the data has 2"):
        models.load_detector(two, finished / "five.pth", ["a", "b"], "student.weights")


def test_a_classifiers_weights_start_the_backbone(place, tmp_path):
    classifier = mobilenet_v3_small(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "trunk.pth")
    config = load_config(place / "config.yaml")
    detector = models.build_detector(config.student, 2, SIZE, SIZE)
    models.load_backbone(detector, tmp_path / "trunk.pth", "student.backbone_weights")
    assert torch.equal(detector.backbone.body["0"][0].weight, classifier.features[0][0].weight)
    frozen = models.ModelConfig(backbone="resnet18", norm="frozen", weights=Path("x"), trainable_layers=3)
    with pytest.raises(ConfigError, match="does not fit this backbone"):
        models.load_backbone(models.build_detector(frozen, 2, SIZE, SIZE), tmp_path / "trunk.pth", "x")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ready_configurations_build(path):
    """Without memory for their weights."""
    config = load_config(path, ["data.root=x"])
    with torch.device("meta"):
        student, teacher = (models.build_detector(each, 80, 800, 1333) for each in (config.student, config.teacher))
        first_stride = models.FIRST_STRIDES[config.student.detector]
        distiller, _ = models.build_distiller(student, teacher, config.distillation, first_stride)
    widths = {level.student_channels for level in distiller.loss.levels}
    assert len(distiller.loss.levels) == (4 if config.distillation.preset == "mmrazor" else 5) and widths == {256}
    sizes = [sum(each.numel() for each in model.parameters()) for model in (student, teacher)]
    assert sizes[0] < sizes[1]


def test_a_step_of_a_full_size_pair(place):
    """ResNet-50 from ResNet-101, on small pictures."""
    path = next(path for path in CONFIGS if "mmrazor" in path.stem)
    config = load_config(path, ["data.root=x"])
    arguments = {"rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 20}
    student, teacher = (
        models.build_detector(models.dataclasses.replace(each, arguments=arguments), 80, 64, 64)
        for each in (config.student, config.teacher)
    )
    distiller, _ = models.build_distiller(student, teacher, config.distillation, 4)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([7])}] * 2
    losses = distiller([torch.rand(3, 64, 64)] * 2, targets)
    assert losses.keys() > TERMS and all(map(torch.isfinite, losses.values()))


@pytest.mark.parametrize("name", ["PKDLoss", "CWDLoss", "MGDLoss", "FGDLoss", "ScoreWeightedLoss"])
def test_another_loss_by_its_type(place, name):
    path = next(path for path in CONFIGS if path.stem == "faster_rcnn_r50_from_r101")
    small = ["student.backbone=resnet18", "teacher.backbone=resnet34", "student.width=16", "teacher.width=24"]
    config = load_config(path, ["data.root=x", f"distillation.loss.type={name}", *small])
    student, teacher = (models.build_detector(each, 3, 64, 64) for each in (config.student, config.teacher))
    distiller, _ = models.build_distiller(student, teacher, config.distillation, 4)
    assert type(distiller.loss).__name__ == name and distiller.loss.widths[0] == (16, 24)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([2])}] * 2
    losses = distiller([torch.rand(3, 64, 64)] * 2, targets)
    assert losses.keys() > set(distiller.loss.term_names) and all(map(torch.isfinite, losses.values()))


@pytest.mark.parametrize(
    "changes, message",
    [
        (["distillation.loss.type=PKD"], "distillation.loss: type must be one of FBKDLoss, .*, got 'PKD'"),
        (["distillation.loss.type=PKDLoss", "distillation.size_free=true"], "size_free: .* the loss is PKDLoss"),
        (["distillation.loss.type=PKDLoss", "distillation.preset=paper"], "distillation.loss: preset must be one of"),
    ],
)
def test_a_loss_that_does_not_fit_is_named(place, changes, message):
    config = load_config(next(path for path in CONFIGS if "retinanet" in path.stem), ["data.root=x", *changes])
    student, teacher = (models.build_detector(each, 3, 64, 64) for each in (config.student, config.teacher))
    with pytest.raises(ConfigError, match=message):
        models.build_distiller(student, teacher, config.distillation, 8)


def test_the_seed_experiment_has_mmrazors_numbers():
    config = load_config(next(path for path in CONFIGS if "mmrazor" in path.stem), ["data.root=x"])
    assert (config.optimizer.learning_rate, config.training.batch_size) == (0.02, 16)
    factors = [loop.learning_rate_factor(step, config.schedule, 1000) for step in (0, 250, 500, 7999, 8000, 11000)]
    assert factors == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01])
    assert (config.schedule.epochs, config.data.min_size, config.data.max_size) == (12, 800, 1333)
    assert config.distillation.preset == "mmrazor" and config.distillation.student_levels == ["0", "1", "2", "3"]


def test_the_cosine_falls_from_one_to_nothing(place):
    schedule = load_config(place / "config.yaml", ["schedule.kind=cosine", "schedule.warmup_steps=0"]).schedule
    factors = [loop.learning_rate_factor(step, schedule, 50) for step in (0, 50, 100)]
    assert factors == pytest.approx([1, 0.5, 0])


# Pictures


def bright(image: torch.Tensor) -> list[int]:
    """The edges of what is bright in a picture ``(3, H, W)``."""
    rows, columns = np.nonzero((image.max(dim=0).values > 0.5).numpy())
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("extra", [["augmentation.scale=[0.7, 1.4]"], ["augmentation.min_sizes=[48, 80]"], []])
def test_boxes_follow_their_objects(extra, place):
    config = load_config(place / "config.yaml", ["augmentation.photometric=0", "data.max_size=96", *extra])
    transform = build_augmentation(config.augmentation, config.data)
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    boxes, labels = torch.tensor([[20.0, 10, 50, 30], [1000, 1000, 1010, 1010]]), torch.tensor([2, 1])
    seen = set()
    for index in range(12):
        with drawn_from(0, 0, index):
            picture, moved, kept = augmented(transform, image, boxes, labels)
        if len(moved):  # a crop may leave the object out
            padding = picture == torch.tensor([124, 116, 104]).view(3, 1, 1) / 255
            assert kept.tolist() == [2]
            assert np.abs(np.subtract(bright(picture * ~padding), moved[0].tolist())).max() <= 1.5
            seen.add(tuple(moved[0].tolist()))
        assert picture.dtype == torch.float32 and type(moved) is torch.Tensor
    assert len(seen) > 1


def test_a_sample_depends_on_seed_epoch_and_index_alone(place):
    def drawn(seed: int, epoch: int, before: int = 0):
        config = load_config(place / "config.yaml", [f"seed={seed}"])
        pictures = TrainingSet(sets.train, config)
        pictures.epoch = epoch
        torch.rand(before)
        return pictures[5][0]

    sets = read_sets(load_config(place / "config.yaml").data)
    state = torch.get_rng_state()
    first = drawn(0, 0)
    assert torch.equal(torch.get_rng_state(), state), "the training's own random numbers are untouched"
    assert torch.equal(first, drawn(0, 0, before=3))
    assert not torch.equal(first, drawn(0, 1)) and not torch.equal(first, drawn(1, 0))


def test_the_order_changes_with_the_epoch_alone(place):
    config = load_config(place / "config.yaml")
    pictures = TrainingSet(read_sets(config.data).train, config)

    def order(epoch: int) -> list[str]:
        loader = TrainingLoader(pictures, config, ALONE)
        return [file for batch in loader.epoch(epoch) for file in batch.files]

    assert order(1) == order(1) != order(0) and sorted(order(1)) == sorted(order(0))


def test_pictures_without_a_box_and_crowds(place):
    config = load_config(place / "config.yaml", ["data.background=false"])
    pictures = read_sets(config.data).train
    without = TrainingSet(pictures, config)
    assert (without.backgrounds, len(without)) == (1, 7)
    kept = TrainingSet(pictures, load_config(place / "config.yaml"))
    assert len(kept) == 8 and kept[0][1]["boxes"].shape == (0, 4)
    crowd = pictures.pictures[1]
    crowd.crowd[:] = True
    assert TrainingSet(pictures, config).backgrounds == 2 and kept[1][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
def test_a_picture_without_boxes_trains_as_background(detector, place):
    extra = [f"student.detector={detector}", "student.width=32", "tasks=[baseline]"]
    model = load_config(place / "config.yaml", extra).student
    arguments = model.arguments if detector == "faster_rcnn" else {}
    built = models.build_detector(models.dataclasses.replace(model, arguments=arguments), 2, SIZE, SIZE)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = built([torch.rand(3, SIZE, SIZE)] * 2, [empty] * 2)
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total) and total > 0
    assert isinstance(built, RetinaNet) == (detector == "retinanet")


# The score


def test_score_by_class_and_size_and_with_crowds():
    box = torch.tensor([[0.0, 0, 20, 20], [30, 30, 130, 130]])
    truth = [{"boxes": box, "labels": torch.tensor([1, 2])}]
    small = {"boxes": box[:1], "labels": torch.tensor([1]), "scores": torch.ones(1)}
    score = CocoScore(truth, [small], 3, by_size=True)
    assert score.class_ap[:2] == pytest.approx([1, 0]) and math.isnan(score.class_ap[2])
    assert (score.sizes["small"], score.sizes["large"]) == pytest.approx((1, 0)) and math.isnan(score.sizes["medium"])
    assert score.ap == pytest.approx(0.5)
    crowd = [{**truth[0], "iscrowd": torch.tensor([0, 1])}]
    assert CocoScore(crowd, [small], 3).ap == pytest.approx(1), "a crowd is not missed"


def test_a_picture_that_cannot_be_read_is_not_scored(place, tmp_path):
    config = load_config(place / "config.yaml", [f"data.root={write_set(tmp_path / 'data')}", f"output={tmp_path}"])
    sets = read_sets(config.data)
    (tmp_path / "data" / "val" / "001.png").write_bytes(b"no picture")
    (tmp_path / "data" / "val" / "002.png").write_bytes(b"no picture")
    training = loop.Training("teacher", config, sets, ALONE, Console(quiet=True))
    tmp_path.joinpath("teacher").mkdir()
    training._evaluate()
    assert len(training.log.unreadable) == 2
    assert CsvLog(tmp_path / "teacher" / "scores.csv").rows()[0]["unreadable"] == "2"


def test_a_resolved_configuration_is_complete(place, capsys):
    assert cli.main([str(place / "config.yaml"), "seed=3", "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed"] == 3 and printed["student"]["width"] == CONFIG["student"]["width"]
    assert printed["distillation"]["stop_step"] is None
