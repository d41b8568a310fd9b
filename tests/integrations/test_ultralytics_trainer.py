"""FBKDTrainer beyond detection in one process: tasks, several processes, resumption, other teachers, the command."""

import copy
import functools
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# Its import patches other packages, so it waits for the fixture that puts them back.
if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("ultralytics is not installed", allow_module_level=True)

from yolo_data import own_settings, write_set

HERE = Path(__file__).parent
SETTINGS = dict(imgsz=64, batch=4, nbs=4, epochs=2, warmup_epochs=0, optimizer="SGD", device="cpu", workers=0)
SETTINGS |= dict(plots=False, verbose=False, name="run")


@pytest.fixture(scope="module", autouse=True)
def framework(tmp_path_factory):
    with own_settings(tmp_path_factory.mktemp("settings")):
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The YAML of each task's set, made at its first use."""

    @functools.cache
    def of(task):
        return write_set(tmp_path_factory.mktemp("sets") / task, task)

    return of


def train(student, teacher, data, folder, callbacks=None, own=None, **settings):
    """A finished run's trainer."""
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    model = YOLO(student)
    for event, callback in (callbacks or {}).items():
        model.add_callback(event, callback)
    trainer = functools.partial(FBKDTrainer, teacher=teacher, **(own or {}))
    model.train(trainer=trainer, data=data, project=str(folder), **SETTINGS | settings)
    return model.trainer


def columns(trainer):
    header, *rows = (trainer.save_dir / "results.csv").read_text().splitlines()
    names = header.replace(" ", "").split(",")
    return [dict(zip(names, map(float, row.split(",")), strict=True)) for row in rows]


@pytest.mark.parametrize("family, teacher", [("yolo11n", "yolo11s"), ("yolo26n", "yolo26s")])
@pytest.mark.parametrize("task, suffix", [("segment", "seg"), ("pose", "pose"), ("obb", "obb"), ("detect", "")])
def test_every_task(sets, tmp_path, task, suffix, family, teacher):
    """Two epochs of a small model; the trainer is that of the task, and logs its losses and the terms."""
    ending = f"-{suffix}.yaml" if suffix else ".yaml"
    try:
        trainer = train(family + ending, teacher + ending, sets(task), tmp_path, own=dict(loss=dict(type="PKDLoss")))
    except FileNotFoundError:
        pytest.skip("this version has no such model")
    assert trainer.student_task == task and type(trainer).__name__.startswith("FBKD")
    rows = columns(trainer)
    assert len(rows) == 2 and all(row["train/pkd_loss"] > 0 and row.get("val/pkd_loss", 0) == 0 for row in rows)
    assert all(row["train/box_loss"] > 0 and row["val/box_loss"] > 0 for row in rows)


def test_a_world_model_needs_its_own_trainer(sets, tmp_path, monkeypatch):
    """Its text is embedded by a model that has to be downloaded; here each class has a vector."""
    from ultralytics import YOLOWorld

    from fbkd_ops.integrations.ultralytics import FBKDWorldTrainer

    def embedded(self, texts, batch, cache_dir):
        return {text: torch.eye(512)[index] for index, text in enumerate(sorted(texts))}

    def set_classes(self, names, *args, **arguments):
        self.txt_feats, self.model[-1].nc = torch.eye(512)[: len(names)][None], len(names)

    from ultralytics.nn.tasks import WorldModel

    monkeypatch.setattr(FBKDWorldTrainer, "generate_text_embeddings", embedded)
    monkeypatch.setattr(WorldModel, "set_classes", set_classes)
    model = YOLOWorld("yolov8s-world.yaml")
    trainer = functools.partial(FBKDWorldTrainer, teacher="yolov8m.yaml", loss=dict(type="PKDLoss"))
    model.train(trainer=trainer, data=sets("detect"), project=str(tmp_path), **SETTINGS | dict(epochs=1))
    assert columns(model.trainer)[0]["train/pkd_loss"] > 0


class Interruption(Exception):
    pass


def interrupt(trainer):
    raise Interruption


def interrupted(sets, folder, **own) -> Path:
    """The last checkpoint of a run that ended after its first epoch of three."""
    with pytest.raises(Interruption):
        train("yolo11n.yaml", "yolo11s.yaml", sets("detect"), folder, dict(on_fit_epoch_end=interrupt), own, epochs=3)
    return folder / "run" / "weights" / "last.pt"


def test_a_resumed_run_knows_its_teacher_and_its_loss(sets, tmp_path):
    from ultralytics import YOLO

    from fbkd_ops import PKDLoss
    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    last = interrupted(sets, tmp_path, loss=dict(type="PKDLoss", eps=1e-4), gradient_share=0.3, share_every=2)
    model = YOLO(last)
    model.train(resume=True, trainer=FBKDTrainer)
    trainer = model.trainer
    assert isinstance(trainer.fbkd, PKDLoss) and trainer.fbkd.eps == 1e-4 and trainer.share.settings.target == 0.3
    assert trainer.teacher.yaml["scale"] == "s"
    assert trainer.epoch == 2 and trainer.args.optimizer == "SGD"
    assert [row["epoch"] for row in columns(trainer)] == [1, 2, 3]


def is_old() -> bool:
    """Whether Ultralytics is of 2025 or older."""
    from ultralytics.cfg import CFG_BOOL_KEYS

    return "multi_scale" in CFG_BOOL_KEYS


def test_a_plain_resumption_says_what_it_needs(sets, tmp_path):
    from ultralytics import YOLO

    if is_old():
        pytest.skip("this version does not name the optimizer that it does not know")
    last = interrupted(sets, tmp_path)
    with pytest.raises(NotImplementedError, match="this run is FBKDTrainer's: resume it with trainer=FBKDTrainer"):
        YOLO(last).train(resume=True)


def test_a_teacher_that_is_an_object_has_to_be_given_again(sets, tmp_path):
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    teacher = YOLO("yolo11s.yaml")
    with pytest.raises(Interruption):
        train(
            "yolo11n.yaml",
            teacher,
            sets("detect"),
            tmp_path,
            dict(on_fit_epoch_end=interrupt),
            dict(weight=3),
            epochs=2,
        )
    last = tmp_path / "run" / "weights" / "last.pt"
    with pytest.raises(TypeError, match="teacher is needed: .* a resumed run knows its own where that was a name"):
        YOLO(last).train(resume=True, trainer=FBKDTrainer)
    model = YOLO(last)
    model.train(resume=True, trainer=functools.partial(FBKDTrainer, teacher=teacher))
    assert model.trainer.epoch == 1 and model.trainer.weight == 3


def test_arguments_of_a_resumption_take_the_place_of_the_remembered_ones(sets, tmp_path):
    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    last = interrupted(sets, tmp_path, weight=3.0, start_step=2)
    overrides = dict(resume=str(last), task="detect")
    trainer = FBKDTrainer(overrides=overrides, weight=0.5)
    assert trainer.weight == 0.5 and trainer.schedule.start_step == 2
    with pytest.warns(UserWarning, match="optimizer='Adam' is ignored: a resumed run goes on with 'SGD'"):
        trainer = FBKDTrainer(overrides=overrides | dict(optimizer="Adam"))
    assert trainer.args.optimizer == "SGD"


def test_a_loss_of_another_epoch_is_refused(sets, tmp_path):
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    last = interrupted(sets, tmp_path)
    path = last.with_name("fbkd.pt")
    torch.save(torch.load(path, weights_only=True) | {"epoch": 4}, path)
    with pytest.raises(ValueError, match="has the loss of epoch 5, but the checkpoint is of epoch 1: resume last.pt"):
        YOLO(last).train(resume=True, trainer=FBKDTrainer)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def two_processes(folder, data, **arguments) -> list[dict]:
    """What both processes of a step noted."""
    shared = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    command = [sys.executable, str(HERE / "yolo_worker.py"), str(folder), data, repr(arguments)]
    running = [
        subprocess.Popen(
            command,
            env=shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    texts = [each.communicate(timeout=300)[0] for each in running]
    for each, text in zip(running, texts, strict=True):
        assert each.returncode == 0, text[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


class Step:
    """The trainer's models of a step, in one process and with the detector's norms in eval mode."""

    def __init__(self, noted):
        from ultralytics import YOLO

        from fbkd_ops import FBKDLoss

        self.student, self.teacher = (YOLO(name).model for name in ("yolo11n.yaml", "yolo11s.yaml"))
        self.student = type(self.student)("yolo11n.yaml", nc=2, verbose=False)
        self.student.load_state_dict(noted["model"])
        self.teacher.load_state_dict(noted["teacher"])
        self.student.args = noted["args"]
        self.student.train()
        for module in self.student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        self.student.model[-1].dfl.requires_grad_(False)
        self.teacher.eval()
        self.loss_of = lambda synchronize: FBKDLoss(
            [64, 128, 256], [128, 256, 512], preset="one_stage", norm="none", synchronize=synchronize
        )
        self.fbkd = self.loss_of(False)
        self.fbkd.load_state_dict(noted["fbkd"])

    def grads(self, batch, own=True):
        """Of the student's losses, if ``own``, and of the terms, times the batch's size, as the trainer sums them."""
        from yolo_worker import grads_of

        from fbkd_ops.integrations.ultralytics import HEAD_INPUTS
        from fbkd_ops.training.feature_tap import FeatureTap

        for module in (self.student, self.fbkd):
            module.zero_grad()
        taps = [FeatureTap(model, HEAD_INPUTS) for model in (self.student, self.teacher)]
        loss, _ = self.student.loss(batch)
        with torch.no_grad():
            self.teacher(batch["img"])
        terms = self.fbkd(*(tap.features() for tap in taps))
        for tap in taps:
            tap.close()
        (loss.sum() * own + len(batch["img"]) * sum(terms.values())).backward()
        return {"student": grads_of(self.student), "fbkd": grads_of(self.fbkd)}


def assert_alike(ours, expected):
    """Of both modules, each parameter's up to the rounding of sums in another order."""
    for side in expected:
        assert set(ours[side]) == set(expected[side]) and len(ours[side]) > 10
        size = max(grad.norm() for grad in expected[side].values())
        for name, grad in expected[side].items():
            error = (ours[side][name] - grad).norm()
            assert error <= 1e-2 * grad.norm() + 1e-7 * size, (side, name, error, grad.norm())


def joined(halves):
    """Both halves of a batch as one."""
    (first, second), count = halves, len(halves[0]["img"])
    batch = {key: torch.cat([first[key], second[key]]) for key in ("img", "cls", "bboxes")}
    return batch | {"batch_idx": torch.cat([first["batch_idx"], second["batch_idx"] + count])}


def test_gradients_of_two_processes_are_those_of_both_halves(sets, tmp_path):
    """Their sum: Ultralytics multiplies its own losses by the number of processes, whose gradients are averaged."""
    noted = two_processes(tmp_path, sets("detect"), loss=dict(norm="none"))
    for module in ("model", "fbkd"):  # all start alike, though each process has its own seed
        assert all(torch.equal(value, noted[1][module][name]) for name, value in noted[0][module].items())
    batches = [each["batch"] for each in noted]
    assert batches[0]["img"].shape == batches[1]["img"].shape and not torch.equal(batches[0]["img"], batches[1]["img"])
    assert_alike(noted[0]["grads"], noted[1]["grads"])
    step = Step(noted[0])
    halves = [copy.deepcopy(step.grads(batch)) for batch in batches]
    expected = {
        side: {name: grad + halves[1][side][name] for name, grad in halves[0][side].items()} for side in halves[0]
    }
    assert_alike(noted[0]["grads"], expected)


def test_synchronized_terms_of_two_processes_are_those_of_the_joined_batch(sets, tmp_path):
    """Without the detector's own losses, which depend on how the batch is cut."""
    none = dict(box=0.0, cls=0.0, dfl=0.0)
    noted = two_processes(tmp_path, sets("detect"), loss=dict(norm="none", synchronize=True), overrides=none)
    step = Step(noted[0])
    expected = step.grads(joined([each["batch"] for each in noted]), own=False)
    ours = noted[0]["grads"]
    for side in expected:
        expected[side] = {name: grad for name, grad in expected[side].items() if grad.any()}
        assert not any(grad.any() for name, grad in ours[side].items() if name not in expected[side])
        ours[side] = {name: ours[side][name] for name in expected[side]}
    assert_alike(ours, expected)


SCRIPT = """
import os, subprocess, sys
from types import SimpleNamespace
import torch
from torch import nn
from ultralytics.models.yolo.detect import DetectionTrainer
from fbkd_ops.integrations import ultralytics

class Backbone(nn.Module):  # only this script knows it
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

WORKER = '''
from fbkd_ops.integrations import ultralytics
settings = ultralytics._remembered({})
print("worker", type(settings["teacher"]).__name__, settings["teacher_input"](3), settings["loss"]["type"])
'''

def start(self, *args, **options):
    self.args = SimpleNamespace(device="0,1", task="detect")

def work(self):
    environment = os.environ | dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    done = subprocess.run([sys.executable, "-c", WORKER], env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)

DetectionTrainer.__init__, DetectionTrainer.train = start, work
settings = dict(teacher_layers=["layer"], teacher_input=lambda x: x + 1, loss={"type": "CWDLoss"})
ultralytics.FBKDTrainer(teacher=Backbone(), **settings).train()
assert "FBKD_OPS_ULTRALYTICS_ARGUMENTS" not in os.environ
"""


def test_workers_get_the_trainers_arguments(tmp_path):
    """Ultralytics starts them with the trainer's class and its own arguments; the rest lies in a file."""
    pytest.importorskip("cloudpickle")  # Ultralytics installs it before it starts workers
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert "worker Backbone 4 CWDLoss" in done.stdout, done.stdout + done.stderr


class Backbone(nn.Module):
    """A teacher of another family, which wants normalised images."""

    def __init__(self):
        super().__init__()
        widths = (3, 8, 12, 16, 20, 24)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.stages = nn.ModuleList(nn.Conv2d(first, second, 3, 2, 1) for first, second in pairs)

    def forward(self, images):
        assert images.min() < 0
        for stage in self.stages:
            images = stage(images)
        return images


def normalised(images):
    return (images - 0.5) / 0.25


def test_a_teacher_of_another_family(sets, tmp_path):
    """Layers of both sides by name, and what the teacher makes of the images."""
    own = dict(
        student_layers=["model.4", "model.6"],
        teacher_layers=["stages.2", "stages.3"],
        teacher_input=normalised,
        loss=dict(type="PKDLoss"),
    )
    trainer = train("yolo11n.yaml", Backbone(), sets("detect"), tmp_path, own=own, epochs=1)
    assert trainer.fbkd.widths == [(128, 16), (128, 20)] and columns(trainer)[0]["train/pkd_loss"] > 0


class Runs:
    """In which batches a teacher ran, and in which dtypes."""

    def __init__(self):
        self.batch, self.batches, self.dtypes = 0, [], set()

    def start(self, trainer):
        trainer.teacher.model[0].conv.register_forward_hook(self.note)

    def note(self, module, inputs, output):
        self.batches.append(self.batch)
        self.dtypes.add(output.dtype)

    def next(self, trainer):
        self.batch += 1


@pytest.mark.parametrize("loss", ["PKDLoss", "ScoreWeightedLoss"])
def test_a_cheaper_teacher(sets, tmp_path, loss):
    runs = Runs()
    callbacks = dict(on_train_start=runs.start, on_train_batch_end=runs.next)
    own = dict(loss=dict(type=loss), teacher_dtype="bfloat16", teacher_device="cpu", teacher_every=2)
    settings = dict(callbacks=callbacks, own=own | dict(gradient_share=0.5, share_every=2), epochs=4)
    trainer = train("yolo11n.yaml", "yolo11s.yaml", sets("detect"), tmp_path, **settings)
    assert runs.batch > 4 and runs.batches == list(range(0, runs.batch, 2)) and runs.dtypes == {torch.bfloat16}
    trainer.share.collect()
    assert int(trainer.share.measured) == len(range(0, runs.batch, 4))
    # The log has the share of a mean step.
    assert float(trainer._logged_weights["share"]) == pytest.approx(float(trainer.share.share) / 2)


def test_a_resumed_run_knows_where_its_teacher_runs(sets, tmp_path):
    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    place = dict(teacher_dtype=torch.bfloat16, teacher_device=torch.device("cpu"))
    last = interrupted(sets, tmp_path, **place, teacher_every=2)
    trainer = FBKDTrainer(overrides=dict(resume=str(last), task="detect"))
    assert trainer._placement == (torch.device("cpu"), torch.bfloat16) and trainer.schedule.every == 2


@pytest.mark.parametrize(
    "own, message",
    [
        (dict(teacher_dtype="int8"), "teacher_dtype must be a dtype of floats"),
        (dict(teacher_dtype="bf16"), "or its name, got 'bf16'"),
        (dict(teacher_device="gpu"), "teacher_device must be a device"),
        (dict(teacher_every=0), "teacher_every must be an int >= 1"),
    ],
)
def test_a_place_that_is_none_is_refused(own, message):
    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    with pytest.raises((TypeError, ValueError), match=message):
        FBKDTrainer(overrides=dict(model="yolo11n.yaml"), teacher=nn.Identity(), **own)


@pytest.mark.parametrize("family", ["torchvision", "timm"])
def test_a_backbone_teaches(sets, tmp_path, family):
    if family == "torchvision":
        teacher, layers = pytest.importorskip("torchvision").models.resnet18(), ["layer2", "layer3", "layer4"]
    else:
        timm = pytest.importorskip("timm")
        teacher, layers = timm.create_model("resnet18", pretrained=False), ["layer2", "layer3", "layer4"]
    own = dict(teacher_layers=layers, teacher_input=normalised, loss=dict(type="PKDLoss"))
    trainer = train("yolo11n.yaml", teacher, sets("detect"), tmp_path, own=own, epochs=1)
    assert [width for _, width in trainer.fbkd.widths] == [128, 256, 512]
    assert columns(trainer)[0]["train/pkd_loss"] > 0


@pytest.mark.parametrize("name", ["FGDLoss", "ScoreWeightedLoss"])
@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_losses_that_need_more_than_features_in_every_task(sets, tmp_path, task, name):
    suffix = {"segment": "seg"}.get(task, task)
    pair = f"yolo11n-{suffix}.yaml", f"yolo11s-{suffix}.yaml"
    trainer = train(*pair, sets(task), tmp_path, own=dict(loss=dict(type=name)), epochs=1)
    assert all(columns(trainer)[0][f"train/{name}"] > 0 for name in trainer.loss_names[-len(trainer.fbkd.term_names) :])


def test_layers_of_other_sizes_are_refused(sets, tmp_path):
    own = dict(teacher_layers=["stages.1", "stages.2", "stages.3"], teacher_input=normalised)
    with pytest.raises(ValueError, match="teacher's Backbone's layers must be given maps of the same sizes"):
        train("yolo11n.yaml", Backbone(), sets("detect"), tmp_path, own=own, epochs=1)


def test_another_number_of_levels(sets, tmp_path):
    """A student of four levels and a teacher of three: the three that both have."""
    own = dict(student_layers=["model.19", "model.22", "model.25"], loss=dict(type="PKDLoss"))
    trainer = train("yolov8n-p2.yaml", "yolov8s.yaml", sets("detect"), tmp_path, own=own, epochs=1)
    assert len(trainer.fbkd.widths) == 3 and columns(trainer)[0]["train/pkd_loss"] > 0


def good_enough(trainer):
    """No epoch will be better; early stopping does not count while none has found anything."""
    trainer.stopper.best_fitness = trainer.best_fitness = 1.0


@pytest.mark.parametrize(
    "settings, epochs",
    [(dict(multi_scale=0.5), 2), (dict(patience=2, epochs=6), 2), (dict(compile=True, epochs=1), 1)],
    ids=str,
)
def test_ultralytics_own_options(sets, tmp_path, settings, epochs):
    if is_old() and "patience" not in settings:
        pytest.skip("this version has other options")
    callbacks = dict(on_train_start=good_enough) if "patience" in settings else {}
    trainer = train("yolo11n.yaml", "yolo11s.yaml", sets("detect"), tmp_path, callbacks, **settings)
    rows = columns(trainer)
    assert len(rows) == epochs and all(row["train/feat_loss"] > 0 for row in rows)
    assert trainer.ema.updates > 0


EXPORT = """
import sys
sys.modules["fbkd_ops"] = None
import torch
from ultralytics import YOLO
path = YOLO(sys.argv[1]).export(format=sys.argv[2], imgsz=64, **({"simplify": False} if sys.argv[2] == "onnx" else {}))
if sys.argv[2] == "onnx":
    import onnx
    onnx.checker.check_model(path)
    sizes = [size.dim_value for size in onnx.load(path).graph.output[0].type.tensor_type.shape.dim]
else:
    sizes = torch.jit.load(path)(torch.rand(1, 3, 64, 64)).shape
print("exported", tuple(sizes))
"""


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_the_best_checkpoint_is_exported_without_this_package(sets, tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnx")
    trainer = train("yolo11n.yaml", "yolo11s.yaml", sets("detect"), tmp_path, epochs=1)
    command = [sys.executable, "-c", EXPORT, str(trainer.best), kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "exported (1, 6, 84)" in done.stdout, done.stdout + done.stderr


def test_the_command(sets, tmp_path):
    """In a process of its own, and resumed."""
    words = f"model=yolo11n.yaml teacher=yolo11s.yaml data={sets('detect')} epochs=2 imgsz=64 batch=4 device=cpu"
    words += f" project={tmp_path} name=run plots=False workers=0 loss=PKDLoss loss.eps=1e-5 gradient_share=0.3"
    command = [sys.executable, "-m", "fbkd_ops.yolo"]
    done = subprocess.run([*command, *words.split()], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    header, *rows = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert len(rows) == 2 and "train/pkd_loss" in header and "train/share" in header
    kept = torch.load(tmp_path / "run" / "weights" / "fbkd.pt", weights_only=True)["arguments"]
    assert kept["loss"] == {"type": "PKDLoss", "eps": 1e-5} and kept["gradient_share"] == 0.3
    done = subprocess.run(
        [*command, f"resume={tmp_path}/run/weights/last.pt"], capture_output=True, text=True, cwd=tmp_path
    )
    assert "is finished, nothing to resume" in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        ("data=x.yaml", "model is needed, e.g. model=yolo11n.pt"),
        ("model=yolo11n.yaml", "teacher is needed, e.g. teacher=yolo11m.pt"),
        ("train", "'train' must be key=value"),
    ],
)
def test_a_command_that_lacks_something(words, message):
    from fbkd_ops.yolo import main

    with pytest.raises(SystemExit, match=message):
        main(words.split())


def test_the_command_explains_itself(capsys):
    from fbkd_ops.yolo import main

    main(["--help"])
    assert "python -m fbkd_ops.yolo model=yolo11n.pt teacher=yolo11m.pt" in capsys.readouterr().out
