"""The readers of detection sets, on sets with every oddity that people's files have."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

for module in ("torchvision", "pycocotools", "yaml"):
    pytest.importorskip(module)

from examples.datasets import (  # noqa: E402
    DataError,
    Findings,
    PictureError,
    open_picture,
    read_coco,
    read_set,
    read_voc,
    read_yolo,
)
from examples.datasets.pictures import Frame, PictureIndex, read_frame  # noqa: E402

SIZE = (40, 30)  # width, height
COLOURS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def save(path: Path, picture: Image.Image | None = None, **options) -> Path:
    """A picture of SIZE in the format that the ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or Image.fromarray(COLOURS)).save(path, **options)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rotated(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, exif=exif)


def content(found) -> dict[str, list]:
    """Boxes with labels of each picture by its file's name; crowds have a minus."""
    return {
        picture.path.name: [
            (*box, -label if crowd else label)
            for box, label, crowd in zip(
                picture.boxes.tolist(), picture.labels.tolist(), picture.crowd.tolist(), strict=True
            )
        ]
        for picture in found.pictures
    }


def names(findings: Findings) -> dict[str, list[str]]:
    return {kind: [Path(file).name for file in findings.files(kind)] for kind in findings.counts()}


# Pictures


def grey(values: np.ndarray, mode: str | None = None) -> Image.Image:
    return Image.fromarray(values).convert(mode) if mode else Image.fromarray(values)


def test_sixteen_bits_are_scaled_and_not_white(tmp_path):
    values = np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        save(tmp_path / name, Image.fromarray(values))
        expected = torch.from_numpy(np.round(values / 257).astype(np.uint8)).expand(3, -1, -1)
        assert torch.equal(open_picture(tmp_path / name), expected)


def test_alpha_shows_black(tmp_path):
    alpha = np.zeros((30, 40), dtype=np.uint8)
    alpha[:, 20:], alpha[:, 10:20] = 255, 128
    opacity = torch.from_numpy(alpha) / 255
    colours = torch.from_numpy(COLOURS).permute(2, 0, 1)
    picture = Image.fromarray(COLOURS)
    picture.putalpha(Image.fromarray(alpha))
    read = open_picture(save(tmp_path / "rgba.png", picture))
    assert (read - colours * opacity).abs().max() <= 1 and not read[:, :, :10].any()
    read = open_picture(save(tmp_path / "la.png", picture.convert("LA")))
    assert (read - torch.from_numpy(np.array(picture.convert("L"))) * opacity).abs().max() <= 1


def test_palettes_with_and_without_transparency(tmp_path):
    picture = Image.new("P", SIZE, 1)
    picture.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
    picture.paste(2, (0, 0, 20, 30))
    read = open_picture(save(tmp_path / "plain.png", picture))
    assert read[:, 0, 0].tolist() == [7, 8, 9] and read[:, 0, 39].tolist() == [200, 100, 50]
    for transparency in (2, bytes([255, 255, 0])):
        read = open_picture(save(tmp_path / "clear.png", picture, transparency=transparency))
        assert not read[:, :, :20].any() and read[:, 0, 39].tolist() == [200, 100, 50]


def test_one_bit_cmyk_and_first_frames(tmp_path):
    bits = Image.new("1", SIZE, 0)
    bits.paste(1, (5, 0, 40, 30))
    assert open_picture(save(tmp_path / "bits.png", bits))[:, 3, 4:6].tolist() == [[0, 255]] * 3
    cmyk = Image.new("CMYK", SIZE, (0, 255, 255, 0))
    red = open_picture(save(tmp_path / "print.jpg", cmyk)).float().mean((1, 2))
    assert red[0] > 250 and red[1:].max() < 5
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue", "lime")]
    for name in ("a.gif", "a.webp"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], lossless=True)
        assert open_picture(path)[:, 5, 5].tolist() == [255, 0, 0], name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_exif_rotation_turns_picture_and_box_alike(tmp_path, orientation, ending):
    """A white box on black, against Pillow's rotation of the stored pixels."""
    black = Image.new("RGB", SIZE)
    black.paste((255, 255, 255), (3, 5, 13, 25))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if ending == "webp" else {}
    path = save(tmp_path / f"a.{ending}", black, exif=exif, **options)
    read = open_picture(path)
    assert read_frame(path, decode=False) == read_frame(path, decode=True) == Frame(SIZE, orientation)
    black.getexif()[0x0112] = orientation
    assert torch.equal(read, torch.from_numpy(np.array(ImageOps.exif_transpose(black))).permute(2, 0, 1))
    rows, columns = torch.nonzero(read[0])[:, 0], torch.nonzero(read[0])[:, 1]
    shown = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert Frame(SIZE, orientation).upright((3, 5, 13, 25)) == tuple(map(int, shown))


def test_pictures_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"not a picture")
    for name in ("half.jpg", "half.png", "half.webp", "half.gif", "half.bmp"):
        truncate(save(tmp_path / name))
    truncate(save(tmp_path / "header.jpg", Image.new("RGB", SIZE)))
    save(tmp_path / "float.tif", Image.fromarray(np.ones((4, 4), dtype=np.float32)))
    kinds = {}
    for path in tmp_path.iterdir():
        with pytest.raises(PictureError) as raised:
            open_picture(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
        kinds[path.name] = raised.value.kind
    assert kinds.pop("empty.jpg") == "empty picture file"
    assert {kinds.pop("text.jpg"), kinds.pop("float.tif")} == {"unreadable picture"}
    assert len(kinds) == 6 and set(kinds.values()) == {"truncated picture"}


def test_index_finds_names_by_folders_endings_and_case(tmp_path):
    for name in ("a/1.JPeG", "b/1.jpg", "b/1.png", "b/x.y.png", "b/é.bmp", ".c/1.png", "b/._1.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    index = PictureIndex(tmp_path)
    assert len(index.files) == 5
    for wanted, expected in {
        "a/1": "a/1.JPeG",
        "set/b/1.jpg": "b/1.jpg",
        "C:\\set\\b\\1.jpg": "b/1.jpg",
        "1.jpeg": "a/1.JPeG",
        "b/1": "b/1.jpg",
        "b/1.PNG": "b/1.png",
        "X.Y.jpg": "b/x.y.png",
        "x.y": "b/x.y.png",
        "e\u0301.bmp": "b/é.bmp",
    }.items():
        assert index.find(wanted) == [tmp_path / expected], wanted
    assert index.find("c/1.jpg") == index.find("x") == []


# Pascal VOC


def voc_object(name: str, *edges: object, difficult: int = 0) -> str:
    corners = "".join(
        f"<{key}>{edge}</{key}>" for key, edge in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def write_xml(root: Path, stem: str, *objects: str, filename: str = "", size: tuple[int, int] | None = SIZE) -> None:
    root.mkdir(parents=True, exist_ok=True)
    recorded = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    name = f"<filename>{filename}</filename>" if filename else ""
    (root / f"{stem}.xml").write_text(f"<annotation>{name}{recorded}{''.join(objects)}</annotation>")


CELL = voc_object("cell", 2, 3, 12, 13)  # (1, 2, 12, 13)
CELL_BOX = (1.0, 2.0, 12.0, 13.0, 1)


def odd_voc(root: Path) -> Path:
    """Every oddity in one VOC set; returns the folder above it."""
    root = root / "VOCdevkit" / "VOC2007"
    xml, pictures = root / "annots", root / "images"
    for name in ("a.JPeG", "b 1.bmp", "c.d.webp", "e.tif", "f.png", "other name.png", "img 1.jpg", "img.jpg"):
        save(pictures / name)
        write_xml(xml, Path(name).stem, CELL)
    (xml / "other name.xml").unlink()
    write_xml(xml, "g", CELL, filename="C:\\data\\other name.jpg")
    for number, size in ((6, SIZE), (8, SIZE[::-1]), (3, SIZE)):
        rotated(pictures / f"turned {number}.jpg", number)
        write_xml(xml, f"turned {number}", CELL, size=size)
    save(pictures / "boxes.png")
    write_xml(
        xml,
        "boxes",
        voc_object("disc", 1, 1, 40, 30, difficult=1),
        voc_object("cell", 0, 0, 60, 20),
        voc_object("cell", 50, 1, 60, 20),
        voc_object("cell", 9, 9, 9, 20),
        voc_object("cell", 1, 1, "inf", 5),
        voc_object("cell", "", 1, 5, 5),
        "<object><bndbox/></object>",
        voc_object("stranger", 1, 1, 5, 5),
    )
    save(pictures / "empty.png")
    write_xml(xml, "empty", size=(80, 60))
    truncate(save(pictures / "half.png"))
    (pictures / "zero.png").write_bytes(b"")
    save(pictures / "broken.png")
    for stem in ("half", "zero", "no picture"):
        write_xml(xml, stem, CELL)
    (xml / "broken.xml").write_text("<annotation><object>")
    save(pictures / "no xml.png")
    (xml / "._a.xml").write_bytes(b"\0\5\x16\7")
    lines = [
        *("a", "b 1.bmp", "c.d", "e.TIF", "images/f.png", "other name", "img 1", "img.jpg", "turned 6", "turned 8"),
        *("turned 3", "boxes", "empty", "half", "zero", "no picture", "broken", "no xml", "nothing", "a"),
    ]
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\ufeff" + "\r\n".join([*lines, ""]), encoding="utf-8")
    (lists / "valid.txt").write_text("a\n")
    return root.parent.parent


def test_voc_with_every_oddity(tmp_path):
    findings = Findings()
    found = read_voc(odd_voc(tmp_path), "train", classes=["cell", "disc"], findings=findings)
    assert content(found) == {
        **dict.fromkeys(("a.JPeG", "b 1.bmp", "c.d.webp", "e.tif", "f.png", "other name.png"), [CELL_BOX]),
        **dict.fromkeys(("img 1.jpg", "img.jpg", "turned 8.jpg", "turned 3.jpg"), [CELL_BOX]),
        "turned 6.jpg": [(17.0, 1.0, 28.0, 12.0, 1)],
        "boxes.png": [(0.0, 0.0, 40.0, 30.0, -2), (0.0, 0.0, 40.0, 20.0, 1)],
        "empty.png": [],
    }
    assert list(content(found))[:3] == ["a.JPeG", "b 1.bmp", "c.d.webp"], "the list's order"
    assert names(findings) == {
        "listed twice": ["train.txt"],
        "labels without a picture": ["no picture.xml"],
        "broken XML": ["broken.xml"],
        "picture without labels file": ["no xml.png"],
        "listed name without files": ["nothing.xml"],
        "object without a box": ["boxes.xml"],
        "object without a name": ["boxes.xml"],
        "box rotated with its picture": ["turned 6.jpg"],
        "rotation that no recorded size explains": ["turned 3.jpg"],
        "box clipped": ["boxes.xml"],
        "box outside": ["boxes.xml"],
        "degenerate box": ["boxes.xml"],
        "unknown label": ["boxes.xml"],
        "other size recorded": ["empty.xml"],
        "no box": ["empty.png"],
        "truncated picture": ["half.png"],
        "empty picture file": ["zero.png"],
    }
    assert findings.counts()["degenerate box"] == 2 and sum(findings.counts().values()) == 18
    val = read_set(tmp_path, "val", findings=findings)
    assert (val.classes, content(val), val.format) == (("cell", "disc", "stranger"), {"a.JPeG": [CELL_BOX]}, "voc")


def test_items_are_what_torchvision_takes(tmp_path):
    found = read_voc(odd_voc(tmp_path), "train", classes=["cell", "disc"], findings=Findings())
    index = list(content(found)).index("boxes.png")
    image, target = found[index]
    assert torch.equal(image, torch.from_numpy(COLOURS).permute(2, 0, 1))
    assert {name: value.tolist() for name, value in target.items()} == {
        "boxes": [[0, 0, 40, 30], [0, 0, 40, 20]],
        "labels": [2, 1],
        "image_id": index,
        "area": [1200, 800],
        "iscrowd": [1, 0],
    }
    assert found[list(content(found)).index("empty.png")][1]["boxes"].shape == (0, 4)
    assert found[list(content(found)).index("turned 6.jpg")][0].shape == (3, 40, 30)


def test_voc_class_lists_are_not_names_with_numbers(tmp_path):
    for name in ("img", "img 1", "x"):
        save(tmp_path / "JPEGImages" / f"{name}.png")
        write_xml(tmp_path / "Annotations", name, CELL)
    (tmp_path / "ImageSets").mkdir()
    lists = {
        "img  1\nx -1\n": ["img.png", "x.png"],
        "img 1\nx  0\n": ["img 1.png", "x.png"],
        "img 1\nimg\n": ["img 1.png", "img.png"],
    }
    for text, expected in lists.items():
        (tmp_path / "ImageSets" / "train.txt").write_text(text)
        assert list(content(read_voc(tmp_path, "train", findings=Findings()))) == expected, text


def test_a_missing_name_with_a_number_is_no_other_picture(tmp_path):
    save(tmp_path / "JPEGImages" / "img.png")
    write_xml(tmp_path / "Annotations", "img", CELL)
    (tmp_path / "train.txt").write_text("img 1\nimg\n")
    findings = Findings()
    assert list(content(read_voc(tmp_path, "train", findings=findings))) == ["img.png"]
    assert names(findings) == {"listed name without files": ["img 1.xml"]}


def test_voc_folders_by_option_and_a_fixed_split(tmp_path):
    for number in range(11):
        save(tmp_path / "photo" / f"{number}.png")
        write_xml(tmp_path / "marks", f"{number}", CELL)
    save(tmp_path / "photo" / "more.png")
    findings = Findings()
    options = {"annotations": "marks", "images": tmp_path / "photo", "findings": findings}
    parts = [list(content(read_set(tmp_path, split, **options))) for split in ("train", "val")]
    assert list(map(len, parts)) == [8, 3] and len({*parts[0], *parts[1]}) == 11
    assert parts[0] != sorted(parts[0])
    assert findings.counts() == {"picture without labels file": 1}, "once, though both splits report it"
    assert list(content(read_set(tmp_path, "train", limit=3, **options))) == parts[0][:3]
    with pytest.raises(DataError, match="no list of the split 'test'"):
        read_set(tmp_path, "test", **options)


def test_xml_beside_pictures_in_folders_of_splits(tmp_path):
    for split, name in (("train", "a"), ("valid", "b")):
        save(tmp_path / split / f"{name}.jpg")
        write_xml(tmp_path / split, name, CELL)
    parts = {split: content(read_set(tmp_path, split, findings=Findings())) for split in ("train", "val")}
    assert parts == {"train": {"a.jpg": [CELL_BOX]}, "val": {"b.jpg": [CELL_BOX]}}


def test_filename_decides_between_endings_and_a_foreign_one_is_noted(tmp_path):
    for name in ("a.jpg", "a.png", "b.jpg", "c.jpg"):
        save(tmp_path / "JPEGImages" / name)
    write_xml(tmp_path / "Annotations", "a", CELL, filename="a.png")
    write_xml(tmp_path / "Annotations", "b", CELL, filename="c.jpg")
    (tmp_path / "train.txt").write_text("a\nb\n")
    findings = Findings()
    assert list(content(read_voc(tmp_path, "train", findings=findings))) == ["a.png", "b.jpg"]
    assert names(findings) == {"filename of another picture": ["b.xml"]}


def test_two_voc_years_have_to_be_chosen(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        write_xml(tmp_path / year / "Annotations", "a", CELL)
    with pytest.raises(DataError, match=r"choose one: .*VOC2007, .*VOC2012"):
        read_voc(tmp_path, "train", findings=Findings())


# COCO


def coco_box(image: int, category: object, *box: object, **more: object) -> dict:
    return {"image_id": image, "category_id": category, "bbox": list(box), **more}


def odd_coco(root: Path) -> tuple[Path, Path]:
    """Every oddity in one COCO set: its folder of pictures and its JSON file."""
    images = root / "pictures"
    files = ["sub/a.JPeG", "b 1.bmp", "c.d.webp", "boxes.png", "empty.png", "half.png", "zero.png", "gone.png"]
    for name in files[:-1]:
        save(images / name)
    truncate(images / "half.png")
    (images / "zero.png").write_bytes(b"")
    rotated(images / "turned.jpg", 6)
    save(images / "unlisted.png")
    save(images / "of val.png")
    records = [{"id": 7 * n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(files, start=1)]
    records += [{"id": 3, "file_name": "turned.jpg", "width": 40, "height": 30}, {"id": 4}]
    annotations = [coco_box(7 * n, 9, 1, 2, 11, 11, id=n) for n in (1, 2, 3, 6, 7, 8)]
    annotations += [
        coco_box(3, 9, 1, 2, 11, 11),
        coco_box(28, 2, 0, 0, 40, 30, iscrowd=1),
        coco_box(28, 9, -4, 0, 64, 20),
        coco_box(28, 9, 50, 1, 10, 10),
        coco_box(28, 9, 9, 9, 0, 10),
        coco_box(28, 9, 9, 9, float("nan"), 10),
        coco_box(28, 9, 9, 9),
        coco_box(28, 5, 1, 1, 5, 5),
        coco_box(28, None, 1, 1, 5, 5),
        coco_box(99, 9, 1, 1, 5, 5),
    ]
    categories = [{"id": 9, "name": "cell"}, {"id": 2, "name": "disc"}, {"id": 4, "name": "never"}]
    path = root / "annotations" / "instances_train2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}))
    val = {"images": [{"id": 1, "file_name": "of val.png"}], "annotations": [], "categories": []}
    (path.parent / "instances_val2017.json").write_text(json.dumps(val))
    (path.parent / "captions_train2017.json").write_text("{}")
    return images, path


def test_coco_with_every_oddity(tmp_path, capsys):
    findings = Findings()
    found = read_coco(*odd_coco(tmp_path), findings=findings)
    cell = (1.0, 2.0, 12.0, 13.0, 3)
    assert found.classes == ("disc", "never", "cell")
    assert content(found) == {
        **dict.fromkeys(("a.JPeG", "b 1.bmp", "c.d.webp"), [cell]),
        "boxes.png": [(0.0, 0.0, 40.0, 30.0, -1), (0.0, 0.0, 40.0, 20.0, 3)],
        "empty.png": [],
        "turned.jpg": [(17.0, 1.0, 28.0, 12.0, 3)],
    }
    assert findings.counts() == {
        "unreadable image": 1,
        "unreadable annotation": 1,
        "annotation of no image": 1,
        "object without a box": 1,
        "labels without a picture": 1,
        "picture without labels file": 1,
        "box clipped": 1,
        "box outside": 1,
        "degenerate box": 2,
        "unknown label": 1,
        "no box": 1,
        "truncated picture": 1,
        "empty picture file": 1,
        "box rotated with its picture": 1,
    }
    assert names(findings)["picture without labels file"] == ["unlisted.png"]
    assert capsys.readouterr().out == ""
    again = read_set(tmp_path, "train", classes=["cell"], images="pictures", findings=Findings())
    assert content(again)["boxes.png"] == [(0.0, 0.0, 40.0, 20.0, 1)] and again.format == "coco"


def test_one_coco_file_is_split_and_folders_of_splits_are_found(tmp_path):
    records = [{"id": n, "file_name": f"images/{n}.png"} for n in range(5)]
    for record in records:
        save(tmp_path / record["file_name"])
    boxes = [coco_box(n, 1, 1, 1, 4, 4) for n in range(5)]
    names_of = [{"id": 1, "name": "cell"}, {"id": 2, "name": "cell"}]
    (tmp_path / "all.json").write_text(json.dumps({"images": records, "annotations": boxes, "categories": names_of}))
    train, val = (read_set(tmp_path, split, findings=Findings()) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (4, 1, ("cell (1)", "cell (2)"))
    assert not set(content(train)) & set(content(val))
    own = tmp_path / "valid" / "_annotations.coco.json"
    save(own.parent / "0.png")
    own.write_text(json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [], "categories": []}))
    (picture,) = read_set(tmp_path, "val", findings=Findings()).pictures
    assert picture.path == own.parent / "0.png"


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}'])
def test_broken_coco_json_is_one_line_that_names_it(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(DataError, match=r"^cannot read [^\n]*train.json: [^\n]*$"):
        read_set(tmp_path, "train", findings=Findings())


# YOLO

YOLO_CELL = "1 0.1625 0.25 0.275 0.3666666667\n"  # (1, 2, 12, 13) of 40 × 30


def odd_yolo(root: Path) -> Path:
    """Every oddity in one YOLO set."""
    images, labels = root / "images" / "train", root / "labels" / "train"
    labels.mkdir(parents=True)
    for name in ("a.JPeG", "b 1.bmp", "c.d.webp", "boxes.png", "empty.png", "half.png", "zero.png", "no label.png"):
        save(images / name)
        (labels / name).with_suffix(".txt").write_text(YOLO_CELL)
    truncate(images / "half.png")
    (images / "zero.png").write_bytes(b"")
    rotated(images / "turned.jpg", 6)
    (labels / "turned.txt").write_text("1 0.5 0.5 1 1\n")
    (labels / "no label.txt").rename(labels / "no picture.txt")
    (labels / "empty.txt").write_text("\n")
    (labels / "latin.txt").write_bytes(b"0 \xff")
    save(images / "latin.png")
    lines = [
        "0 0.5 0.5 1 1",
        "0 0.5 0.5 1.2 1",
        "0 1.5 0.5 0.2 0.2",
        "0 0.5 0.5 0 0.2",
        "0 nan 0.5 0.2 0.2",
        "0 20 15 10 10",
        "0.5 0.5 0.5 1 1",
        "cell 0.5 0.5 1 1",
        "0 0.5 0.5 1",
        "0 0.25 0.5 0.75 0.5 0.5 1.0 0.3",
        "7 0.5 0.5 1 1",
        "1 0.25 0.5 0.75 0.5 0.5 1.0",
    ]
    (labels / "boxes.txt").write_text("\n".join(lines))
    (labels / "classes.txt").write_text("disc\ncell\n")
    return root


def test_yolo_with_every_oddity(tmp_path):
    findings = Findings()
    found = read_yolo(odd_yolo(tmp_path), "train", findings=findings)
    read = content(found)
    for name in ("a.JPeG", "b 1.bmp", "c.d.webp"):
        assert read.pop(name) == [pytest.approx((1, 2, 12, 13, 2), abs=1e-5)], name
    assert read == {
        "boxes.png": [(0, 0, 40, 30, 1), (0, 0, 40, 30, 1), (10, 15, 30, 30, 2)],
        "empty.png": [],
        "turned.jpg": [(0, 0, 30, 40, 2)],
    }
    assert found.classes == ("disc", "cell") and found.format == "yolo"
    assert findings.counts() == {
        "labels without a picture": 1,
        "picture without labels file": 1,
        "unreadable labels file": 1,
        "unreadable line": 5,
        "box clipped": 1,
        "box outside": 1,
        "degenerate box": 2,
        "unknown label": 1,
        "no box": 1,
        "truncated picture": 1,
        "empty picture file": 1,
        "rotation that no recorded size explains": 1,
    }
    assert names(findings)["labels without a picture"] == ["no picture.txt"]
    assert names(findings)["picture without labels file"] == ["no label.png"]


@pytest.mark.parametrize("listed", ["[disc, cell]", "{0: disc, 1: cell}", "{'1': cell, '0': disc}"])
@pytest.mark.parametrize("train", ["images/train", "../images/train", "[images/train]", "train.txt"])
def test_yolo_data_yaml(tmp_path, listed, train):
    save(tmp_path / "images" / "train" / "a 1.jpg")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a 1.txt").write_text(YOLO_CELL)
    (tmp_path / "train.txt").write_text("/elsewhere/images/train/a 1.jpg\n./images/train/gone.jpg\n")
    (tmp_path / "data.yaml").write_text(f"path: /nowhere\ntrain: {train}\nnames: {listed}\n")
    findings = Findings()
    for root in (tmp_path, tmp_path / "data.yaml"):
        found = read_set(root, "train", findings=findings)
        assert found.classes == ("disc", "cell") and content(found)["a 1.jpg"][0][4] == 2
    assert findings.counts() == ({"listed name without files": 1} if train == "train.txt" else {})
    with pytest.raises(DataError, match="names"):
        (tmp_path / "data.yaml").write_text("train: images\nnames: {x: cell}\n")
        read_set(tmp_path, "train", findings=findings)


def test_yolo_without_names_and_splits(tmp_path):
    for number in range(5):
        save(tmp_path / "images" / f"{number}.jpg")
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{number}.txt").write_text(YOLO_CELL)
    train, val = (read_set(tmp_path, split, findings=Findings()) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (4, 1, ("class 0", "class 1"))
    assert not set(content(train)) & set(content(val))
    with pytest.raises(DataError, match="is read as YOLO"):
        read_set(tmp_path, "train", images="images", findings=Findings())


def test_a_split_that_is_missing_is_not_made_of_another(tmp_path):
    odd_yolo(tmp_path / "yolo")
    images, path = odd_coco(tmp_path / "coco")
    (path.parent / "instances_val2017.json").unlink()
    for folder in ("yolo", "coco"):
        with pytest.raises(DataError, match=f"(?s)val.*{folder}"):
            read_set(tmp_path / folder, "val", findings=Findings())


# Findings


def test_strict_stops_at_the_first_loss_and_not_at_oddities(tmp_path):
    save(tmp_path / "JPEGImages" / "a.png")
    write_xml(tmp_path / "Annotations", "a", voc_object("cell", 1, 1, 90, 90))
    (tmp_path / "train.txt").write_text("a\n")
    findings = Findings(strict=True)
    assert content(read_voc(tmp_path, "train", findings=findings)) == {"a.png": [(0, 0, 40, 30, 1)]}
    assert findings.summary() == "kept: box clipped (1)"
    truncate(tmp_path / "JPEGImages" / "a.png")
    with pytest.raises(DataError, match=r"^[^\n]*a\.png: truncated picture: [^\n]*$"):
        read_voc(tmp_path, "train", findings=Findings(strict=True))
    with pytest.raises(DataError, match=r"no usable picture of train in .*truncated picture \(1\)"):
        read_voc(tmp_path, "train", findings=Findings())
    assert len(read_voc(tmp_path, "train", findings=Findings(strict=True), check=False)) == 1


def test_findings_are_written_with_their_files(tmp_path):
    findings = Findings()
    assert findings.summary() == "nothing is wrong with the files"
    for file in ("a, b.jpg", "\udcff.jpg", "a, b.jpg"):
        findings.skip("truncated picture", file, "short")
    findings.note("no box", "c.jpg")
    findings.write(tmp_path / "findings.csv")
    with (tmp_path / "findings.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["effect", "kind", "file", "detail"],
        ["skipped", "truncated picture", "a, b.jpg", "short"],
        ["skipped", "truncated picture", "\udcff.jpg", "short"],
        ["kept", "no box", "c.jpg", ""],
    ]
    assert findings.summary() == "skipped: truncated picture (2); kept: no box (1)"


def test_a_folder_without_a_set_says_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no detection set in .*VOC.*COCO.*YOLO"):
        read_set(tmp_path, "train", findings=Findings())
    with pytest.raises(DataError, match="no such folder"):
        read_set(tmp_path / "nowhere", "train", findings=Findings())
    with pytest.raises(ValueError, match="format should be"):
        read_set(tmp_path, "train", format="csv", findings=Findings())
