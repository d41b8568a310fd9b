"""FBKDTrainer in Ultralytics' own training loop."""

import copy
import functools
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEST_ALL

# Its import patches other packages, so it waits for the fixture that puts them back.
if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("ultralytics is not installed", allow_module_level=True)

from yolo_data import own_settings, write_set

TERMS = ("feat_loss", "chan_loss", "spat_loss", "rel_loss")
SETTINGS = dict(
    imgsz=64,
    batch=4,
    nbs=4,
    epochs=2,
    warmup_epochs=0,
    optimizer="SGD",
    device="cpu",
    workers=0,
    plots=False,
    verbose=False,
)
PAIRS = {"yolov8n.yaml": "yolov8m.yaml", "yolo11n.yaml": "yolo11m.yaml"}


@pytest.fixture(scope="module", autouse=True)
def framework(tmp_path_factory):
    with own_settings(tmp_path_factory.mktemp("settings")):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_set(tmp_path_factory.mktemp("data"))


class Observer:
    """Recomputes the terms of every batch from what hooks of its own saw before the heads."""

    def __init__(self):
        self.seen, self.expected, self.logged, self.totals = {}, [], [], []

    def callbacks(self) -> dict:
        return dict(on_train_start=self.start, on_train_batch_start=self.before, on_train_batch_end=self.after)

    def start(self, trainer):
        self.student, self.teacher = ({k: v.clone() for k, v in m.state_dict().items()} for m in models(trainer))
        for side, model in zip(("student", "teacher"), models(trainer), strict=True):
            model.model[-1].register_forward_pre_hook(functools.partial(self.keep, side))
        with torch.no_grad():
            for level in trainer.fbkd.levels:  # at the zero initialisation the blocks behind it do not learn
                for block in (level.student_non_local, level.teacher_non_local):
                    block.norm.weight.fill_(1.0)
        self.loss = {k: v.clone() for k, v in trainer.fbkd.state_dict().items()}

    def keep(self, side, head, args):
        self.seen[side] = [feature.detach() for feature in args[0]]

    def before(self, trainer):
        self.copy = copy.deepcopy(trainer.fbkd)

    def after(self, trainer):
        with torch.no_grad():
            terms = self.copy(self.seen["student"], self.seen["teacher"])
        self.expected.append([float(term) for term in terms.values()])
        items = logged_losses(trainer)
        self.logged.append([float(items[name]) for name in TERMS])
        self.totals.append(
            (float(trainer.loss.detach()), sum(map(float, items.values())), len(self.seen["student"][0]))
        )


def logged_losses(trainer) -> dict:
    """By name; earlier versions have them in a tensor."""
    items = trainer.loss_items
    return items if isinstance(items, dict) else dict(zip(trainer.loss_names, items, strict=True))


def models(trainer) -> tuple:
    return trainer.model, trainer.teacher


def train(student, data, folder, callbacks=None, **settings):
    """As the example does, with callbacks."""
    from examples.frameworks import ultralytics_yolo

    class Watched(ultralytics_yolo.YOLO):
        def __init__(self, *args):
            super().__init__(*args)
            for event, callback in (callbacks or {}).items():
                self.add_callback(event, callback)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ultralytics_yolo, "YOLO", Watched)
        arguments = dict(
            SETTINGS, data=data, student=student, teacher=PAIRS.get(student), project=str(folder), name="run"
        )
        return ultralytics_yolo.train(**arguments | settings).trainer


@pytest.fixture(scope="module", params=list(PAIRS) if TEST_ALL else list(PAIRS)[-1:])
def run(request, data, tmp_path_factory):
    """A finished training run and what was seen of it."""
    torch.manual_seed(0)
    observer = Observer()
    trainer = train(request.param, data, tmp_path_factory.mktemp("runs"), observer.callbacks())
    return trainer, observer


def test_the_terms_are_those_of_the_heads_inputs(run):
    trainer, observer = run
    assert len(observer.logged) == 4
    np.testing.assert_allclose(observer.logged, observer.expected, rtol=1e-5)
    assert np.min(observer.logged) > 0
    widths = [[feature.shape[1] for feature in observer.seen[side]] for side in ("student", "teacher")]
    assert widths[0] != widths[1]
    levels = trainer.fbkd.levels
    assert widths == [[level.student_channels for level in levels], [level.teacher_channels for level in levels]]


def test_the_terms_weigh_as_the_students_losses(run):
    for total, items, batch in run[1].totals:
        assert total == pytest.approx(batch * items, rel=1e-4)


def test_student_and_loss_change_and_the_teacher_does_not(run):
    trainer, observer = run
    teacher = trainer.teacher.state_dict()
    assert all(torch.equal(value, teacher[key]) for key, value in observer.teacher.items())
    assert all(p.grad is None for p in trainer.teacher.parameters())
    for before, module in ((observer.student, trainer.model), (observer.loss, trainer.fbkd)):
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        same = [name for name, parameter in trained if torch.equal(parameter, before[name])]
        assert len(same) < 0.1 * len(trained), same


def test_the_log_has_the_terms(run):
    trainer, _ = run
    assert tuple(trainer.loss_names)[-4:] == TERMS
    header = (trainer.save_dir / "results.csv").read_text().splitlines()[0]
    assert all(f"train/{name}" in header for name in TERMS)
    assert trainer.progress_string().split()[-6:-2] == list(TERMS)


LOAD = """
import sys, zipfile
sys.modules["fbkd_ops"] = None
import torch
from ultralytics import YOLO
for path in sys.argv[1:]:
    git = torch.load(path, weights_only=False).get("git", {})
    with zipfile.ZipFile(path) as archive:
        (pickle,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        content = archive.read(pickle)
    for text in filter(None, git.values()):  # of the checkout that ultralytics runs in: its path, origin, last commit
        content = content.replace(str(text).encode(), b"")
    content = content.replace(b"(this run is FBKDTrainer's: resume it with trainer=FBKDTrainer)", b"")
    assert b"fbkd" not in content.lower()
    model = YOLO(path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    model.predict(torch.zeros(1, 3, 64, 64), verbose=False)
    print("loaded")
"""


def loads_without_the_package(*paths) -> bool:
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(paths[0]).parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.count("loaded") == len(paths)


class Interruption(Exception):
    pass


def interrupt(trainer):
    if trainer.epoch == 1:
        raise Interruption


def resume(last, callbacks):
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    model = YOLO(last)
    for event, callback in callbacks.items():
        model.add_callback(event, callback)
    model.train(resume=True, trainer=functools.partial(FBKDTrainer, teacher=PAIRS["yolo11n.yaml"]))
    return model.trainer


def has_hooks(model) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_run_is_resumed_and_its_checkpoints_are_plain(data, tmp_path):
    kept, seen = {}, {}

    def keep(trainer):
        kept.update({key: value.clone() for key, value in trainer.fbkd.state_dict().items()})
        assert not has_hooks(trainer.model)
        interrupt(trainer)

    def look(trainer):
        seen["equal"] = all(torch.equal(kept[key], value) for key, value in trainer.fbkd.state_dict().items())
        state = trainer.optimizer.state[trainer.fbkd.levels[0].feature_adaptation.weight]
        seen["momentum"] = float(state["momentum_buffer"].abs().sum())
        seen["epoch"] = trainer.start_epoch

    with pytest.raises(Interruption):
        train("yolo11n.yaml", data, tmp_path, dict(on_fit_epoch_end=keep), epochs=3)
    weights = tmp_path / "run" / "weights"
    assert loads_without_the_package(weights / "last.pt", weights / "best.pt")
    (weights / "fbkd.pt").rename(weights / "elsewhere.pt")
    with pytest.raises(FileNotFoundError, match="fbkd.pt is missing: the loss's weights"):
        resume(weights / "last.pt", {})
    (weights / "elsewhere.pt").rename(weights / "fbkd.pt")
    trainer = resume(weights / "last.pt", dict(on_train_start=look))
    assert seen["equal"] and seen["momentum"] > 0 and seen["epoch"] == 2
    assert trainer.epoch == 2
    assert not all(torch.equal(kept[key], value) for key, value in trainer.fbkd.state_dict().items())
    assert loads_without_the_package(weights / "last.pt", weights / "best.pt")


def test_a_loss_that_is_nan_takes_the_loss_back_too(data, tmp_path):
    from ultralytics.models.yolo.detect import DetectionTrainer

    if not hasattr(DetectionTrainer, "_handle_nan_recovery"):
        pytest.skip("this version has no recovery")
    spoilt = []

    def spoil(trainer):
        if trainer.epoch == 1 and not spoilt:
            spoilt.append(trainer.validate)
            trainer.loss, trainer.validate = torch.tensor(float("nan")), functools.partial(without_fitness, trainer)
            with torch.no_grad():
                trainer.fbkd.levels[0].feature_adaptation.weight.fill_(float("nan"))

    def without_fitness(trainer):  # some versions recover only if this is NaN too
        trainer.validate = spoilt[0]
        return trainer.validate()[0], float("nan")

    trainer = train("yolov8n.yaml", data, tmp_path, dict(on_train_epoch_end=spoil))
    assert spoilt
    assert all(value.isfinite().all() for value in trainer.fbkd.state_dict().values())
    assert loads_without_the_package(trainer.last)


def test_a_batch_without_losses_leaves_the_model_as_it_was(data, tmp_path):
    """An error between a batch's start and its losses, as when memory is out."""
    caught = []

    def fail(trainer):
        caught.append(trainer.model)
        raise Interruption

    with pytest.raises(Interruption):
        train("yolov8n.yaml", data, tmp_path, dict(on_train_batch_start=fail))
    (model,) = caught
    assert not has_hooks(model)
    assert type(model.criterion).__module__.startswith("ultralytics.")


def test_an_end_to_end_head_keeps_its_own_criterion(data, tmp_path):
    """YOLO26's criterion is updated after each epoch."""
    PAIRS["yolo26n.yaml"] = "yolo11s.yaml"
    try:
        trainer = train("yolo26n.yaml", data, tmp_path, epochs=1)
    except FileNotFoundError:
        pytest.skip("this version has no YOLO26")
    assert type(trainer.model.criterion).__module__.startswith("ultralytics.")
    assert tuple(trainer.loss_names)[-4:] == TERMS


def test_other_teachers_are_refused(data, tmp_path):
    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    with pytest.raises(TypeError, match="teacher must be a checkpoint, a YAML, a YOLO or its model, got int"):
        FBKDTrainer(teacher=3)
    with pytest.raises(TypeError, match="loss must be a dict of a loss's arguments, got list"):
        FBKDTrainer(teacher="yolov8n.pt", loss=[])
    (tmp_path / "teacher.onnx").write_text("")
    for teacher, message in (
        (torch.nn.Linear(2, 2), "with a head as its last layer, or any module with teacher_layers, got Linear"),
        (str(tmp_path / "teacher.onnx"), "teacher .*teacher.onnx: an exported model has no layers to listen to"),
    ):
        with pytest.raises(TypeError, match=message):
            train("yolov8n.yaml", data, tmp_path, teacher=teacher)
    for teacher, head in (("yolo11n-cls.yaml", "Classify"), ("yolov8n-p2.yaml", "Detect")):
        with pytest.raises(ValueError, match=rf"teacher's head \({head}\) must be given maps of the same sizes"):
            train("yolov8n.yaml", data, tmp_path, teacher=teacher)


def test_the_student_is_no_teacher_of_its_own(data, tmp_path):
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    model = YOLO("yolov8n.yaml").model
    overrides = dict(SETTINGS, data=data, model="yolov8n.yaml", project=str(tmp_path))
    trainer = FBKDTrainer(teacher=model, overrides=overrides)
    trainer.model = model
    with pytest.raises(ValueError, match="student and teacher share the module"):
        trainer.train()


def test_a_task_without_a_trainer_is_refused(data, tmp_path):
    message = "FBKDTrainer trains the task detect, got task='classify'; the tasks are detect, segment, pose, obb"
    with pytest.raises(ValueError, match=message):
        train("yolov8n-cls.yaml", data, tmp_path, teacher="yolov8n.yaml")


@pytest.mark.parametrize("student,head", [("yolov8n-seg", "Segment"), ("yolov8s-world", "WorldDetect")])
def test_students_with_other_heads_are_refused(data, tmp_path, student, head):
    """Also where their task says detection."""
    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    overrides = dict(SETTINGS, data=data, model=f"{student}.yaml", project=str(tmp_path), task="detect")
    trainer = FBKDTrainer(teacher="yolov8n.yaml", overrides=overrides)
    with pytest.raises(TypeError, match=f"student: the last module must be a Detect head, got {head}"):
        trainer.train()


def test_distillation_of_ultralytics_own_is_refused_besides(data, tmp_path):
    from ultralytics.cfg import DEFAULT_CFG_DICT

    if "distill_model" not in DEFAULT_CFG_DICT:
        pytest.skip("this version has no distillation")
    with pytest.raises(ValueError, match="distill_model='yolo11m.pt' is Ultralytics' own distillation .* leave it out"):
        train("yolo11n.yaml", data, tmp_path, distill_model="yolo11m.pt")


def test_a_teacher_without_trained_weights_is_warned_of(tmp_path):
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    overrides = dict(data="none", task="classify")  # ends the construction
    warning = "built from yolov8n.yaml, without trained weights, .* give a checkpoint"
    with pytest.warns(UserWarning, match=warning), pytest.raises(ValueError, match="trains the task"):
        FBKDTrainer(teacher="yolov8n.yaml", overrides=overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for teacher in ("yolov8n.pt", YOLO("yolov8n.yaml")):
            with pytest.raises(ValueError, match="trains the task"):
                FBKDTrainer(teacher=teacher, overrides=overrides)


def tiny(folder, head: str, arguments: list, name: str = "tiny") -> str:
    """The YAML of a model of a few layers, with maps of 8, 16 and 24 channels at the usual strides."""
    widths = ((8, 2), (8, 2), (8, 2), (16, 2), (24, 2))
    model = dict(
        nc=80,  # as many classes as YOLOWorld's text
        depth_multiple=1.0,
        width_multiple=1.0,
        backbone=[[-1, 1, "Conv", [width, 3, stride]] for width, stride in widths],
        head=[[[2, 3, 4], 1, head, arguments]],
    )
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(model))
    return str(path)


TEACHERS = {
    "RTDETR": ("RTDETRDecoder", ["nc", 16, 20, 2, 2, 1]),
    "YOLOWorld": ("WorldDetect", ["nc", 512, False]),
    "YOLOE": ("YOLOEDetect", ["nc", 512, True]),
    "YOLO": ("Detect", ["nc"]),
}


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("kind", list(TEACHERS))
def test_models_of_every_class_teach(data, tmp_path, kind, as_module):
    import ultralytics

    if not hasattr(ultralytics, kind):
        pytest.skip(f"this version has no {kind}")
    teacher = getattr(ultralytics, kind)(tiny(tmp_path, *TEACHERS[kind]))
    seen = []

    def keep(trainer):
        seen.append([float(logged_losses(trainer)[name]) for name in TERMS])

    def listen(trainer):
        assert type(trainer.teacher.model[-1]).__name__ == TEACHERS[kind][0]
        assert [level.teacher_channels for level in trainer.fbkd.levels] == [8, 16, 24]

    callbacks = dict(on_train_start=listen, on_train_batch_end=keep)
    teacher = teacher.model if as_module else teacher
    train(tiny(tmp_path, "Detect", ["nc"], "student"), data, tmp_path, callbacks, teacher=teacher, epochs=1)
    assert np.isfinite(seen).all() and np.max(seen) > 0


@pytest.fixture(scope="module")
def grey_data(data, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("grey") / "grey.yaml"
    path.write_text(Path(data).read_text() + "channels: 1\n")
    return str(path)


def test_a_teacher_of_colour_images_sees_grey_ones_in_three_channels(grey_data, tmp_path):
    from ultralytics import YOLO

    teacher, images = YOLO(tiny(tmp_path, "Detect", ["nc"])), []
    student = tiny(tmp_path, "Detect", ["nc"], "student")

    def listen(trainer):
        trainer.teacher.register_forward_pre_hook(lambda module, args: images.append(args[0]))

    trainer = train(student, grey_data, tmp_path, dict(on_train_start=listen), teacher=teacher, epochs=1)
    if next(trainer.model.parameters()).shape[1] == 3:
        pytest.skip("this version has no grey images")
    assert images and all(each.shape[1] == 3 for each in images)
    assert all(torch.equal(each[:, :1].expand_as(each), each) and each.max() > 0 for each in images)


def test_a_teacher_of_images_with_other_channels_is_refused(data, grey_data, tmp_path):
    from ultralytics.nn.tasks import DetectionModel

    teacher = DetectionModel("yolov8n.yaml", ch=4, verbose=False)
    for images in (data, grey_data):
        with pytest.raises(ValueError, match="teacher must take images of [13] channels, as the student does, got 4"):
            train("yolov8n.yaml", images, tmp_path, teacher=teacher)


def test_the_measured_gradient_share_is_the_exact_one():
    """Of YOLO11, whose head is given maps that its neck makes of one another."""
    from torch import nn
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    from fbkd_ops import Distiller, FBKDLoss, Layer

    class Detector(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.yolo = DetectionModel(config, nc=2, verbose=False)
            self.yolo.args = get_cfg()

        def forward(self, batch):
            return {"loss": self.yolo(batch)[0].sum()}

    torch.manual_seed(0)
    loss = FBKDLoss([64, 128, 256], [64, 128, 256], num_levels=3)
    student, teacher = Detector("yolo11n.yaml"), Detector("yolo11n.yaml")
    distiller = Distiller(
        student, teacher, loss, student_layers=Layer("yolo.model.-1", inputs=True), gradient_share=0.2, share_every=1
    )
    batch = {
        "img": torch.rand(2, 3, 64, 64),
        "cls": torch.tensor([[0.0], [1.0]]),
        "bboxes": torch.tensor([[0.4, 0.4, 0.3, 0.3], [0.6, 0.5, 0.4, 0.2]]),
        "batch_idx": torch.tensor([0.0, 1.0]),
    }
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)
    for _ in range(3):
        expected = exact_share(copy.deepcopy(distiller), batch)
        optimizer.zero_grad()
        sum(distiller(batch).values()).backward()
        optimizer.step()
        distiller.share.collect()
        assert float(distiller.share.share) == pytest.approx(expected, rel=0.2)


def exact_share(distiller, batch) -> float:
    """From two backward passes to the maps on both branches behind the neck."""
    branches = {}

    def views(index, value):
        (maps,), keywords = value
        branches["loss"], branches["head"] = ([x.view_as(x) for x in maps] for _ in range(2))
        return ((branches["loss"],), keywords), ((branches["head"],), keywords)

    with distiller._student_tap.split(views):
        output, students, teachers = distiller.run(batch)
    terms = float(distiller.share.factor(1.0)) * sum(distiller.loss(students, teachers).values())
    pulls = [
        torch.stack([g.square().sum() for g in torch.autograd.grad(value, maps, retain_graph=True)]).sum().sqrt()
        for value, maps in ((terms, branches["loss"]), (output["loss"], branches["head"]))
    ]
    return float(pulls[0] / pulls[1])


WEIGHTED = dict(gradient_share=0.2, share_every=1, decay="cosine", stop_step=0.75)


class Weights:
    """What a run logs of each batch, and how often the teacher ran."""

    def __init__(self):
        self.rows, self.totals, self.teacher_calls = [], [], 0

    def callbacks(self, **others) -> dict:
        return dict(on_train_start=self.start, on_train_batch_end=self.after, **others)

    def start(self, trainer):
        self.first_step = trainer._step
        trainer.teacher.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.teacher_calls += 1

    def after(self, trainer):
        row = {name: float(value) for name, value in logged_losses(trainer).items()}
        self.rows.append(row)
        own = sum(value for name, value in row.items() if name not in ("weight", "share"))
        self.totals.append((float(trainer.loss.detach()), own))


def weighted_run(folder, data, callbacks, epochs=2, **settings):
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    model = YOLO(tiny(folder, "Detect", ["nc"], "student"))
    for event, callback in callbacks.items():
        model.add_callback(event, callback)
    trainer = functools.partial(FBKDTrainer, teacher=YOLO(tiny(folder, "Detect", ["nc"])).model, **settings)
    arguments = SETTINGS | dict(epochs=epochs, batch=3, nbs=3, project=str(folder), name="run", exist_ok=True)
    model.train(trainer=trainer, data=data, **arguments)
    return model.trainer


@pytest.fixture(scope="module")
def weighted(data, tmp_path_factory):
    """Two epochs of two batches."""
    torch.manual_seed(0)
    seen = Weights()
    return weighted_run(tmp_path_factory.mktemp("weighted"), data, seen.callbacks(), **WEIGHTED), seen


def test_the_schedule_ends_with_the_trainers_length(weighted):
    trainer, seen = weighted
    assert (trainer.schedule.total_steps, trainer.schedule.end(), trainer._step) == (4, 3, 4)
    assert seen.teacher_calls == 3
    assert all(seen.rows[-1][name] == 0 for name in (*TERMS, "weight"))
    assert all(row[name] > 0 for row in seen.rows[:3] for name in TERMS[:1])
    for total, own in seen.totals:
        assert total == pytest.approx(3 * own, rel=1e-4)


def test_the_log_has_the_weight_and_the_share(weighted):
    trainer, seen = weighted
    assert tuple(trainer.loss_names)[-6:] == (*TERMS, "weight", "share")
    header = (trainer.save_dir / "results.csv").read_text().splitlines()[0]
    assert "train/weight" in header and "train/share" in header
    weights, shares = ([row[name] for row in seen.rows] for name in ("weight", "share"))
    assert weights[0] == pytest.approx(1e-3) and shares[0] == 0 and min(shares[1:]) > 0
    # What the first measurement says: the share of a factor of 1e-3, and a cosine of a third of the way.
    assert weights[1] == pytest.approx(0.75 * 0.2 * 1e-3 / shares[1], rel=1e-4)
    assert int(trainer.share.measured) == 3  # the last batch takes in what the third measured


def test_a_schedule_is_resumed(data, tmp_path):
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    kept, seen = {}, Weights()

    def stop(trainer):
        kept.update(trainer.share.state_dict())
        if trainer.epoch == 0:
            raise Interruption

    with pytest.raises(Interruption):
        weighted_run(tmp_path, data, dict(on_fit_epoch_end=stop), **WEIGHTED)
    path = tmp_path / "run" / "weights" / "fbkd.pt"
    saved = torch.load(path, weights_only=True)
    assert int(saved["schedule.step"]) == 2
    torch.save(saved | {"schedule.step": torch.tensor(1)}, path)  # another one than the epoch tells
    model = YOLO(tmp_path / "run" / "weights" / "last.pt")

    def start(trainer):
        seen.start(trainer)
        assert all(torch.equal(value, kept[name]) for name, value in trainer.share.state_dict().items())

    for event, callback in (seen.callbacks() | dict(on_train_start=start)).items():
        model.add_callback(event, callback)
    teacher = YOLO(tiny(tmp_path, "Detect", ["nc"])).model
    model.train(resume=True, trainer=functools.partial(FBKDTrainer, teacher=teacher, **WEIGHTED))
    assert seen.first_step == 1 and model.trainer._step == 3 and model.trainer.schedule.total_steps == 4


def test_a_new_model_as_a_teacher_is_warned_of(data, tmp_path):
    from fbkd_ops import UntrainedTeacherWarning

    class Reached(Exception):
        pass

    def stop(trainer):
        raise Reached

    with pytest.warns(UntrainedTeacherWarning, match=r"its \d+ BatchNorms have seen no image"), pytest.raises(Reached):
        weighted_run(tmp_path, data, dict(on_train_start=stop))


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(weight=-1), "weight must be a finite number >= 0, got -1"),
        (dict(gradient_share=0), "gradient_share must be a finite number > 0, got 0"),
        (dict(stop_step=1.5), "stop_step must be None, an int >= start_step"),
        (dict(decay="step"), "decay must be one of 'cosine', got 'step'"),
    ],
)
def test_a_weight_that_cannot_be_is_named(settings, message):
    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    with pytest.raises(ValueError, match=message):
        FBKDTrainer(teacher="yolov8n.pt", overrides=dict(data="none"), **settings)


class Terms:
    """Recomputes the terms of another loss than FBKD's in every batch."""

    def __init__(self):
        self.seen, self.expected, self.logged = {}, [], []

    def callbacks(self) -> dict:
        return dict(on_train_start=self.start, on_train_batch_start=self.before, on_train_batch_end=self.after)

    def start(self, trainer):
        for side, model in zip(("student", "teacher"), models(trainer), strict=True):
            model.model[-1].register_forward_pre_hook(functools.partial(self.keep, side))
        preprocess = trainer.preprocess_batch

        def preprocessed(batch):
            self.given = preprocess(batch)
            return self.given

        trainer.preprocess_batch = preprocessed

    def keep(self, side, head, args):
        self.seen[side] = [feature.detach() for feature in args[0]]

    def before(self, trainer):
        self.copy = copy.deepcopy(trainer.fbkd)

    def after(self, trainer):
        from fbkd_ops.training.targets import boxes_of_call

        others = boxes_of_call((self.given,), {})._asdict() if type(self.copy).__name__ == "FGDLoss" else {}
        with torch.no_grad():
            if type(self.copy).__name__ == "ScoreWeightedLoss":
                _, output = trainer.teacher(self.given["img"])  # what the head makes before boxes are decoded
                cells = output["scores"].sigmoid().amax(dim=1)  # (N, cells of all levels)
                sizes = [x.shape[2:] for x in self.seen["teacher"]]
                parts = cells.split([height * width for height, width in sizes], dim=1)
                others = {"scores": [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]}
            terms = self.copy(self.seen["student"], self.seen["teacher"], **others)
        items = logged_losses(trainer)
        self.expected.append([float(term) for term in terms.values()])
        self.logged.append([float(items[name]) for name in list(items)[-len(terms) :]])


@pytest.mark.parametrize("name", ["PKDLoss", "CWDLoss", "MGDLoss", "FGDLoss", "ScoreWeightedLoss"])
def test_other_losses_by_their_type(name, data, tmp_path):
    observer = Terms()
    weighted_run(tmp_path, data, observer.callbacks(), epochs=1, loss=dict(type=name))
    assert len(observer.logged) > 0 and np.isfinite(observer.logged).all()
    np.testing.assert_allclose(observer.logged, observer.expected, rtol=1e-4)
