"""The demo: its data, its command line, and one whole run of a few steps."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

for module in ("torchvision", "pycocotools", "sklearn", "matplotlib", "rich", "tensorboard", "yaml"):
    pytest.importorskip(module)

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from examples.datasets import Findings  # noqa: E402
from examples.demo import cli, digits, report  # noqa: E402
from examples.demo.attention import LEVELS_SHOWN, draw_attention, most_crowded  # noqa: E402
from examples.demo.data import DataError, Images  # noqa: E402
from examples.demo.detectors import STUDENT, TEACHER, build_detector  # noqa: E402
from examples.demo.digits import CLASSES, draw_scene, load_digit_scenes  # noqa: E402
from examples.demo.distillation import build_distiller, features  # noqa: E402
from examples.demo.evaluation import CocoScore, standard_error  # noqa: E402
from examples.demo.training import Budget, batches, train  # noqa: E402
from examples.demo.voc import load_voc  # noqa: E402

CPU = torch.device("cpu")
TERMS = {f"loss_fbkd_{term}" for term in ("feature", "channel", "spatial", "relation")}


# Digits


def test_scenes_repeat_and_differ_by_index_and_split():
    first, again = draw_scene("train", 3, 96), draw_scene("train", 3, 96)
    assert torch.equal(first.pixels(), again.pixels())
    assert np.array_equal(first.boxes, again.boxes) and first.labels == again.labels
    for split, index in (("train", 4), ("val", 3)):
        assert not torch.equal(first.pixels(), draw_scene(split, index, 96).pixels())


def test_a_scene_does_not_depend_on_how_many_there_are():
    few, many = load_digit_scenes(64, 2, 1), load_digit_scenes(64, 4, 1)
    assert all(torch.equal(a, b) for a, b in zip(few.train.pixels, many.train.pixels[:2], strict=True))


def test_splits_draw_from_different_digits(monkeypatch):
    train, val = set(digits.digit_sources("train")), set(digits.digit_sources("val"))
    assert not train & val
    assert len(train | val) == len(digits.handwritten()[0])
    pictures, values = digits.handwritten()
    used = {split: set() for split in ("train", "val")}
    for split, seen in used.items():
        for kind in ("add_digit", "add_fragment"):
            monkeypatch.setattr(
                digits.Scene, kind, lambda self, digit, *rest, seen=seen: seen.add(digit.tobytes()), raising=True
            )
        for index in range(60):
            draw_scene(split, index, 64)
    held_out = {pictures[index].tobytes() for index in val}
    assert len(used["val"]) > 50 and used["val"] <= held_out
    assert len(used["train"]) > 50 and not used["train"] & held_out


@pytest.mark.parametrize("index", range(8))
def test_boxes_hold_exactly_the_pixels_of_their_digit(index):
    """Paste one digit on a scene and look at which pixels it changed."""
    scene = digits.Scene.background(96, np.random.default_rng(index))
    before = scene.canvas.copy()
    pictures, values = digits.handwritten()
    scene.add_digit(pictures[index], int(values[index]) + 1)
    rows, columns = np.nonzero((scene.canvas != before).any(axis=-1))
    assert scene.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert scene.labels == [values[index] + 1]


def test_boxes_lie_inside_and_hardly_overlap():
    data = load_digit_scenes(96, 60, 10)
    counts = [len(boxes) for boxes in data.train.boxes]
    assert min(counts) >= 1 and 3 <= max(counts) <= 5
    boxes = torch.cat(data.train.boxes)
    assert boxes.min() >= 0 and boxes.max() <= 96
    assert ((boxes[:, 2:] - boxes[:, :2]) >= 4).all()
    labels = torch.cat(data.train.labels)
    assert set(labels.tolist()) == set(range(1, len(CLASSES) + 1))


# Pascal VOC

GOOD = ("cell", 11, 21, 40, 60)


def write_entry(root: Path, stem: str, objects: list[tuple], size: tuple[int, int] = (100, 80)) -> None:
    """One picture of ``size`` (width, height) and its annotation with ``(name, xmin, ymin, xmax, ymax)`` objects."""
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(root / "JPEGImages" / f"{stem}.jpg")
    items = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for name, x0, y0, x1, y1 in objects
    )
    (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{items}</annotation>")


def write_lists(root: Path, **stems: list[str]) -> None:
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in stems.items():
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")


@pytest.fixture
def voc(tmp_path):
    """Four pictures: good, with degenerate boxes beside a good one, at and over the border, and with none to use."""
    root = tmp_path / "voc"
    write_entry(root, "good", [GOOD, ("disc", 1, 1, 50, 50)])
    write_entry(root, "mixed", [("cell", 30, 30, 30, 60), GOOD, ("cell", 30, 60, 50, 60), ("cell", 50, 10, 40, 20)])
    write_entry(root, "border", [("cell", 1, 1, 100, 80), ("cell", -5, -4, 120, 90)])
    write_entry(root, "empty", [("cell", 200, 10, 300, 20), ("cell", 5, 5, 5, 5)])
    write_lists(root, train=["good", "mixed", "empty"], val=["border"])
    return root


def test_voc_counts_skips_and_clips(voc):
    data = load_voc(voc, 100, 10, 10)
    assert data.classes == ("cell", "disc")
    assert [len(boxes) for boxes in data.train.boxes] == [2, 1, 0]
    assert data.train.boxes[0].tolist() == [[10, 20, 40, 60], [0, 0, 50, 50]]
    assert [labels.tolist() for labels in data.train.labels] == [[1, 2], [1], []]
    assert data.val.boxes[0].tolist() == [[0, 0, 100, 80]] * 2
    assert "skipped: degenerate box (4), box outside (1); kept: no box (1), box clipped (1)" in data.summary
    assert "3 training and 1 validation images" in data.summary


def test_voc_scales_pictures_and_boxes_alike(voc):
    image, target = load_voc(voc, 50, 10, 10).train[0]
    assert image.shape == (3, 40, 50) and 0 <= image.min() <= image.max() <= 1
    assert target["boxes"].tolist() == [[5, 10, 20, 30], [0, 0, 25, 25]]


def test_voc_limits_each_split(voc):
    data = load_voc(voc, 50, 2, 1)
    assert (len(data.train), len(data.val)) == (2, 1)


def test_voc_without_lists_has_a_fixed_split(tmp_path):
    for number in range(10):
        write_entry(tmp_path, f"{number}", [GOOD], size=(60 + 4 * number, 60))
    first, again = load_voc(tmp_path, 64, 99, 99), load_voc(tmp_path, 64, 99, 99)
    shapes = [image.shape for image in first.train.pixels + first.val.pixels]
    assert (len(first.train), len(first.val)) == (8, 2)
    assert len(set(shapes)) == 10, "a picture is missing or in both splits"
    assert [image.shape for image in again.train.pixels + again.val.pixels] == shapes


def remove(path: str):
    return lambda root: (root / path).unlink()


def write(path: str, content: bytes):
    return lambda root: (root / path).write_bytes(content)


def truncate(root: Path) -> None:
    path = root / "JPEGImages" / "good.jpg"
    path.write_bytes(path.read_bytes()[:-200])


SKIPPED = {
    "no picture": (remove("JPEGImages/good.jpg"), "JPEGImages/good.jpg", "labels without a picture"),
    "no annotation": (remove("Annotations/good.xml"), "Annotations/good.xml", "picture without labels file"),
    "no picture at all": (write("JPEGImages/good.jpg", b"not a picture"), "JPEGImages/good.jpg", "unreadable picture"),
    "half a picture": (truncate, "JPEGImages/good.jpg", "truncated picture"),
    "half an annotation": (
        write("Annotations/good.xml", b"<annotation><object>"),
        "Annotations/good.xml",
        "broken XML",
    ),
    "odd encoding": (
        write("Annotations/good.xml", b'<?xml version="1.0" encoding="x"?><a/>'),
        "Annotations/good.xml",
        "broken XML",
    ),
    "no name": (
        write("Annotations/good.xml", b"<a><object><bndbox/></object></a>"),
        "object 1 has no name",
        "object without a name",
    ),
    "no box": (
        write("Annotations/good.xml", b"<a><object><name>n</name></object></a>"),
        "object 1 (n) has no bndbox",
        "object without a box",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_strict_stops_at_a_broken_file_in_one_line_that_names_it(voc, case, tmp_path, capsys):
    breaks, expected, kind = SKIPPED[case]
    for stem in ("mixed", "empty"):
        write_entry(voc, stem, [GOOD])
    breaks(voc)
    status = cli.main(["--data", str(voc), "--output", str(tmp_path / "out"), "--image-size", "64", "--strict"])
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert expected in message and kind in message and str(voc) in message


@pytest.mark.parametrize("case", SKIPPED)
def test_a_broken_file_is_counted_and_left_out(voc, case):
    breaks, _, kind = SKIPPED[case]
    breaks(voc)
    findings = Findings()
    data = load_voc(voc, 100, 10, 10, findings=findings)
    left_out = 0 if "object" in kind else 1  # a picture whose only object is unreadable stays as background
    assert [len(boxes) for boxes in data.train.boxes] == [0, 1, 0][left_out:]
    assert findings.counts()[kind] == 1 and f"{kind} (1)" in data.summary


FATAL = {
    "no list": (remove("ImageSets/Main/val.txt"), "ImageSets/Main/val.txt"),
    "empty list": (write("ImageSets/Main/val.txt", b"\n"), "no val images"),
    "list in another encoding": (write("ImageSets/Main/val.txt", b"\xff\xfe\x00"), "ImageSets/Main/val.txt"),
    "no usable box": (write("Annotations/border.xml", b"<a/>"), "no usable box in the val images"),
    "no picture left": (remove("JPEGImages/border.jpg"), "no usable picture of val"),
}


@pytest.mark.parametrize("case", FATAL)
def test_nothing_left_is_one_line_that_names_the_set(voc, case, tmp_path, capsys):
    breaks, expected = FATAL[case]
    breaks(voc)
    status = cli.main(["--data", str(voc), "--output", str(tmp_path / "out"), "--image-size", "64"])
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert expected in message and str(voc) in message
    assert "degenerate box" in (tmp_path / "out" / "findings.csv").read_text()


def test_run_prints_and_writes_the_findings(voc, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "train", lambda *arguments: 1 / 0)
    truncate(voc)
    with pytest.raises(ZeroDivisionError):
        cli.main(["--data", str(voc), "--output", str(tmp_path / "out"), "--image-size", "64"])
    assert "truncated picture (1)" in capsys.readouterr().out
    with (tmp_path / "out" / "findings.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "truncated picture"]
    assert [(row["effect"], row["file"]) for row in rows] == [("skipped", str(voc / "JPEGImages" / "good.jpg"))]


def test_missing_voc_folder_is_one_line(tmp_path, capsys):
    assert cli.main(["--data", str(tmp_path / "nowhere"), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no such folder: {tmp_path / 'nowhere'}\n"


def test_infinite_coordinates_are_degenerate(voc):
    write_entry(voc, "good", [("cell", "nan", 1, 5, 5), ("cell", 1, 1, "inf", 5), GOOD])
    findings = Findings()
    data = load_voc(voc, 100, 1, 1, findings=findings)
    assert (len(data.train.boxes[0]), findings.counts()["degenerate box"]) == (1, 2)


# Evaluation and report


def perfect(images: Images) -> list[dict[str, torch.Tensor]]:
    return [
        {"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))}
        for boxes, labels in zip(images.boxes, images.labels, strict=True)
    ]


def halved(images: Images) -> list[dict[str, torch.Tensor]]:
    """Right on every other image, silent on the rest."""
    found = perfect(images)
    return [{k: v if i % 2 else v[:0] for k, v in one.items()} for i, one in enumerate(found)]


def test_coco_score_of_known_predictions():
    images = load_digit_scenes(64, 1, 24).val
    assert CocoScore(images, perfect(images), 10).ap == pytest.approx(1)
    half = CocoScore(images, halved(images), 10)
    assert 0.2 < half.ap < 0.8
    shifted = [{**found, "boxes": found["boxes"] + torch.tensor([4.0, 0, 4, 0])} for found in perfect(images)]
    score = CocoScore(images, shifted, 10)
    assert score.ap50 > score.ap > score.ap75 - 0.05 and score.ap < 0.9
    wrong = [{**found, "labels": found["labels"] % 10 + 1} for found in perfect(images)]
    assert CocoScore(images, wrong, 10).ap < 0.1
    assert CocoScore(images, [{k: v[:0] for k, v in found.items()} for found in perfect(images)], 10).ap == 0


def test_resampling_follows_the_images_drawn():
    images = load_digit_scenes(64, 1, 12).val
    half = CocoScore(images, halved(images), 10)
    assert half.resampled_ap(np.arange(12)) == pytest.approx(half.ap)
    assert half.resampled_ap(np.ones(12, dtype=int)) == pytest.approx(1)
    assert half.resampled_ap(np.zeros(12, dtype=int)) == 0


def test_standard_error_of_a_mean():
    values = np.random.default_rng(5).normal(size=400)
    error = standard_error(lambda chosen: float(values[chosen].mean()), 400)
    assert error == pytest.approx(values.std() / math.sqrt(400), rel=0.25)


def test_verdict_says_what_the_numbers_say(monkeypatch):
    monkeypatch.setattr("examples.demo.evaluation.RESAMPLINGS", 20)
    images = load_digit_scenes(64, 1, 24).val
    good, poor = CocoScore(images, perfect(images), 10), CocoScore(images, halved(images), 10)
    lead, steps, time, seed = report.verdict(teacher=good, plain=poor, longer=good, distilled=good, images=24)
    assert lead.startswith("Teacher minus plain student: +0.") and "One seed is no evidence" in seed
    assert "as many steps: +0." in steps and "ahead" in steps and "no gain" not in steps
    assert "as much time: +0.000" in time and "no gain: within" in time
    _, steps, time, doubt, _ = report.verdict(teacher=good, plain=good, longer=poor, distilled=poor, images=24)
    assert "no gain: behind" in steps and "no gain: within" in time and "not clearly better" in doubt


@pytest.mark.parametrize("steps, expected", [(2, [(0, 1), (1, 2)]), (60, [(k, k + 10) for k in range(0, 60, 10)])])
def test_loss_windows_cover_every_step(steps, expected):
    assert [(span.start, span.stop) for span in report.windows(steps)] == expected


# Training


def test_same_seed_same_weights_and_order():
    one, two, other = (build_detector(STUDENT, 3, 64, seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    images = load_digit_scenes(64, 6, 1).train
    drawn = [
        [picture.sum().item() for pictures, _ in batches(images, Budget(5, 3, seed)) for picture in pictures]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 15 and sorted(drawn[0][:6]) == sorted(drawn[0][6:12]), "an epoch shows each picture once"


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Everything the demo does, in two steps a model: status, folder and what the models started from."""
    folder = tmp_path_factory.mktemp("run")
    built, built_detector = [], cli.build_detector
    patch = pytest.MonkeyPatch()

    def remember(*arguments):
        detector = built_detector(*arguments)
        built.append({name: value.clone() for name, value in detector.state_dict().items()})
        return detector

    built_distiller = cli.build_distiller

    def check_roles(student, teacher, *arguments):
        assert [model.backbone.out_channels for model in (student, teacher)] == [
            STUDENT.pyramid_width,
            TEACHER.pyramid_width,
        ]
        return built_distiller(student, teacher, *arguments)

    lines: list[str] = []

    class Recorder(cli.Console):
        def __init__(self, **options):
            super().__init__(width=120, record=True, **options)

        def print(self, *objects, **options):
            super().print(*objects, **options)
            lines.extend(self.export_text(clear=True).splitlines())

    patch.setattr(cli, "build_detector", remember)
    patch.setattr(cli, "build_distiller", check_roles)
    patch.setattr(cli, "Console", Recorder)
    arguments = [
        "--steps",
        "3",
        "--teacher-steps",
        "2",
        "--image-size",
        "64",
        "--train-images",
        "14",
        "--student-images",
        "12",
        "--val-images",
        "4",
        "--batch-size",
        "2",
    ]
    status = cli.main([*arguments, "--seed", "3", "--output", str(folder), "--device", "cpu"])
    patch.undo()
    return status, folder, built, "\n".join(lines)


def rows_of(folder: Path, model: str) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["model"] == model]


def test_run_prints_the_four_models_and_the_verdict(tiny_run):
    status, _, _, printed = tiny_run
    assert status == 0
    table = printed[printed.index("COCO average precision") :]
    for name in ("teacher", "plain student ", "plain student, same time", "distilled student"):
        assert any(name in line and line.count("0.") >= 3 for line in table.splitlines()), name
    assert "no gain" in printed and "One seed is no evidence" in printed
    for term in TERMS:
        assert term in printed


@pytest.mark.parametrize("seconds, expected", [(3.0, 6), (2.9, 6), (0.1, 1)])
def test_a_time_is_enough_for_steps(seconds, expected):
    assert cli.steps_in(seconds, report.History([{}] * 4, 2.0)) == expected


def test_the_table_says_on_how_many_pictures(tiny_run):
    table = tiny_run[3][tiny_run[3].index("COCO average precision") :]
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if line.count("│") > 4]
    pictures = {row[1]: row[3] for row in rows}
    assert pictures["teacher"] == "14"
    assert {pictures[name] for name in ("plain student", "plain student, same time", "distilled student")} == {"12"}


def test_students_without_a_box_to_train_on_are_an_error(tmp_path, monkeypatch, capsys):
    data = load_digit_scenes(64, 2, 1)
    data.train.boxes[0] = data.train.boxes[0][:0]
    monkeypatch.setattr(cli, "load_digit_scenes", lambda *_: data)
    assert cli.main(["--student-images", "1", "--output", str(tmp_path), "--device", "cpu"]) == 2
    assert "the first 1 pictures have no box" in capsys.readouterr().err


def test_run_logs_every_loss_of_every_step(tiny_run):
    _, folder, _, _ = tiny_run
    for model, steps in (("teacher", 2), ("plain", 3), ("distilled", 3)):
        rows = rows_of(folder, model)
        assert [row["step"] for row in rows] == [str(step) for step in range(1, steps + 1)]
        for row in rows:
            assert float(row["loss_classifier"]) > 0
            assert {bool(row[term]) for term in TERMS} == {model == "distilled"}


def test_run_writes_the_same_numbers_to_tensorboard(tiny_run):
    _, folder, _, _ = tiny_run
    events = EventAccumulator(str(folder / "tensorboard" / "distilled")).Reload()
    logged = [event.value for event in events.Scalars("loss/fbkd_relation")]
    assert logged == pytest.approx([float(row["loss_fbkd_relation"]) for row in rows_of(folder, "distilled")])
    assert len(events.Scalars("score/AP")) == 1


def test_a_second_run_replaces_the_first_in_tensorboard(tmp_path):
    images = load_digit_scenes(64, 1, 3).val
    score = CocoScore(images, perfect(images), 10)
    for losses in ([{"loss_a": 1.0}] * 3, [{"loss_a": 2.0}] * 2):
        report.write_tensorboard(tmp_path, [report.Run("plain", "plain student", 1, 3, report.History(losses), score)])
    events = EventAccumulator(str(tmp_path / "plain")).Reload()
    assert [event.value for event in events.Scalars("loss/a")] == [2, 2]


def test_run_draws_a_picture(tiny_run):
    _, folder, _, _ = tiny_run
    with Image.open(folder / "attention.png") as picture:
        assert picture.width > 800 and len(set(np.asarray(picture.convert("L")).ravel().tolist())) > 100


def test_students_start_from_the_same_weights_and_the_same_first_batch(tiny_run):
    _, folder, (teacher, *students), _ = tiny_run
    plain = students[0]
    assert len(students) == 3 and all(plain.keys() == each.keys() != teacher.keys() for each in students)
    assert all(torch.equal(plain[name], each[name]) for name in plain for each in students)
    first = {rows_of(folder, model)[0]["loss_classifier"] for model in ("plain", "longer", "distilled")}
    assert len(first) == 1


def test_plain_student_repeats_with_its_seed(tiny_run):
    """Trained alone, without a teacher before it, the student's losses are those of the run."""
    _, folder, _, _ = tiny_run
    student = build_detector(STUDENT, len(CLASSES), 64, 3)
    history = train(student, load_digit_scenes(64, 12, 4).train, Budget(3, 2, 3), CPU)
    for row, losses in zip(rows_of(folder, "plain"), history.losses, strict=True):
        assert {name: float(row[name]) for name in losses} == pytest.approx(losses, rel=1e-4)


def test_distilling_trains_the_student_and_leaves_the_teacher():
    images = load_digit_scenes(64, 8, 1)
    teacher, student = (build_detector(config, 10, 64, 0) for config in (TEACHER, STUDENT))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller = build_distiller(student, teacher, [images.train[0][0]], "one_stage", 0.7)
    assert distiller.share.settings.target == 0.7 and distiller.loss.levels[0].settings.normalize == "mean"
    start = {name: value.clone() for name, value in distiller.named_parameters()}
    train(distiller, images.train, Budget(2, 2, 0), CPU)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    moved = {name.split(".")[0] for name, value in distiller.named_parameters() if not torch.equal(start[name], value)}
    assert moved == {"student", "loss"}


def test_picture_shows_the_loss_own_maps_and_mask():
    """Against the definitions: means of absolute values, and the two softmaxes' average."""
    images = load_digit_scenes(64, 1, 3).val
    kinds = ((STUDENT, 1), (STUDENT, 0), (TEACHER, 0))
    plain, student, teacher = (build_detector(config, 10, 64, seed) for config, seed in kinds)
    image, target = images[most_crowded(images)]
    loss = build_distiller(student, teacher, [image], "two_stage", 1.0).loss
    figure = draw_attention({"plain": plain, "distilled": student, "teacher": teacher}, loss, images, CLASSES)
    panels = [axes for axes in figure.axes if axes.images]
    columns = ["image", "plain student", "distilled student", "teacher", "mask"]
    assert [axes.get_title() for axes in panels[:5]] == columns and len(panels) == LEVELS_SHOWN * len(columns)
    assert [text.get_text() for text in panels[0].texts] == [CLASSES[label - 1] for label in target["labels"]]
    for key in range(LEVELS_SHOWN):
        drawn = [torch.tensor(axes.images[1].get_array().filled()) for axes in panels[5 * key + 1 : 5 * key + 5]]
        assert panels[5 * key].get_ylabel() == f"level {key}, stride {4 * 2**key}"
        for values, detector in zip(drawn[:3], (plain, student, teacher), strict=True):
            torch.testing.assert_close(values, features(detector, [image])[str(key)][0].abs().mean(0))
        halves = [(values / 0.5).flatten().softmax(0).view_as(values) for values in drawn[1:3]]
        torch.testing.assert_close(drawn[3], sum(halves) * drawn[3].numel() / 2)


# Command line


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--steps", "0"], "--steps"),
        (["--teacher-steps", "-3"], "--teacher-steps"),
        (["--batch-size", "two"], "--batch-size"),
        (["--image-size", "63"], "--image-size"),
        (["--seed", "-1"], "--seed"),
        (["--share", "nan"], "--share"),
        (["--preset", "fastest"], "--preset"),
        (["--device", "abacus"], "--device"),
        (["--threads", "0"], "--threads"),
        (["--val-images", "1.5"], "--val-images"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse_arguments(arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and named in message


def test_output_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        cli.parse_arguments(["--output", str(tmp_path / "file")])
    assert stopped.value.code == 2 and "--output" in capsys.readouterr().err


def test_diverged_training_is_one_line(tmp_path, capsys, monkeypatch):
    def diverged(*arguments):
        raise cli.TrainingError("the loss is nan after 3 steps; try another --seed")

    monkeypatch.setattr(cli, "train", diverged)
    arguments = ["--steps", "1", "--image-size", "64", "--train-images", "1", "--val-images", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: the loss is nan after 3 steps; try another --seed\n"


def test_a_loss_that_is_not_finite_stops_the_training():
    class Broken(torch.nn.Linear):
        def forward(self, pictures, targets):
            return {"loss": self.weight.sum() * math.nan}

    with pytest.raises(cli.TrainingError, match="the loss is nan after 0 steps"):
        train(Broken(1, 1), load_digit_scenes(64, 2, 1).train, Budget(1, 2, 0), CPU)


def test_zero_boxes_can_be_trained_on():
    images = Images()
    images.add(torch.zeros(3, 64, 64, dtype=torch.uint8), [], [])
    history = train(build_detector(STUDENT, 2, 64, 0), images, Budget(1, 2, 0), CPU)
    assert all(math.isfinite(value) for value in history.losses[0].values())


def test_data_errors_are_raised_before_any_training(voc, monkeypatch):
    """A broken last validation file must not cost a training first."""
    write_lists(voc, train=["good"])
    (voc / "JPEGImages" / "border.jpg").unlink()
    with pytest.raises(DataError, match="border.jpg"):
        load_voc(voc, 64, 10, 10, findings=Findings(strict=True))
