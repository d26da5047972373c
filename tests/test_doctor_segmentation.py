"""`rcmae doctor` on images and labels: what it says of a real set and of broken ones, and what it draws."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from core.errors import ConfigError, DataError
from core.loader import TrainingImages
from tests.segmentation_sets import blocks, palette_image, picture, save_pair, whole_set
from tools.cli import app
from tools.doctor import DoctorConfig, doctor
from transfer.segmentation.augment import AugmentConfig
from transfer.segmentation.classes import open_classes
from transfer.segmentation.data import PrepareSegmentation
from transfer.segmentation.labels import label_table
from transfer.segmentation.pairs import open_pairs


def examined(root: Path | None, **settings: Any) -> tuple[int, str]:
    text = io.StringIO()
    code = doctor(DoctorConfig(data=root, **settings), Console(file=text, width=600))
    return code, text.getvalue()


def lines_of(text: str, word: str) -> list[str]:
    """The rows that hold a word, their cells joined by single spaces."""
    return [" ".join(line.replace("│", " ").replace("█", "").split()) for line in text.splitlines() if word in line]


def test_street_scenes_can_be_trained_on_and_are_drawn(shared: Path, tmp_path: Path) -> None:
    code, text = examined(
        shared / "data" / "camvid", classes="camvid", ignore_index=11, out=tmp_path / "new" / "folder"
    )
    assert code == 0 and text.splitlines()[-1] == "this data set can be trained on"
    assert "pairs: 367" in text and "pairs: 60" in text and text.count("nothing to complain about") == 2
    assert "pixels: 96.05 % of a class, 3.95 % ignored" in text
    assert lines_of(text, "3 road") == ["3 3 road 31.66 % 367", "3 3 road 26.90 % 60"]
    assert lines_of(text, " ignored ")[0] == "11 ignored 3.95 % 367"
    with Image.open(tmp_path / "new" / "folder" / "overlays.png") as drawn:
        assert drawn.width > 1200 and drawn.height > 900
        assert (255, 0, 0) not in {colour for _, colour in drawn.getcolors(drawn.width * drawn.height)}


def test_a_wrong_shift_is_seen(shared: Path) -> None:
    _, text = examined(shared / "data" / "camvid", classes="camvid", label_shift=1)
    assert lines_of(text, "2 pole")[0] == "3 2 pole 31.66 % 367"
    assert lines_of(text, "stored values below label_shift")[0] == (
        "1 stored values below label_shift ignored: 16.85 % of the pixels 0"
    )


def test_values_without_a_meaning_are_refused_and_drawn_in_red(tmp_path: Path) -> None:
    root = whole_set(tmp_path / "set")
    label = blocks((40, 60), 4)
    label[:10, :60] = 200
    save_pair(root, "training", "0", label)
    code, text = examined(root, num_classes=4, out=tmp_path / "out")
    assert code == 3 and text.splitlines()[-1] == "training would refuse this data set; see the rows in red"
    assert lines_of(text, "values out of range") == [
        "1 labels with values out of range training and evaluation end at the first of them; give label_shift, "
        "label_map or ignore_index 0.png (200)"
    ]
    assert lines_of(text, "OUT OF RANGE")[0].startswith("200 OUT OF RANGE ")
    assert "out of range" in lines_of(text, "pixels: ")[0] and "out of range" not in lines_of(text, "pixels: ")[1]
    with Image.open(tmp_path / "out" / "overlays.png") as drawn:
        assert (255, 0, 0) in {colour for _, colour in drawn.getcolors(drawn.width * drawn.height)}  # in the legend


@pytest.mark.parametrize("shift", [0, 1])
def test_ade20k_with_and_without_its_shift(tmp_path: Path, shift: int) -> None:
    root = tmp_path / "ADEChallengeData2016"
    for split, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        save_pair(root, split, name, np.arange(151, dtype=np.uint8).repeat(4).reshape(4, 151))
    code, text = examined(tmp_path, classes="ade20k", label_shift=shift)
    assert (code, "OUT OF RANGE" in text) == ((0, False) if shift else (3, True))
    if shift:
        assert lines_of(text, "149 flag")[0] == "150 149 flag 0.66 % 1" and "classes that never occur" not in text


def test_without_classes_the_values_are_shown_and_what_to_give(tmp_path: Path) -> None:
    code, text = examined(whole_set(tmp_path / "set"), out=tmp_path / "out")
    assert code == 3
    assert lines_of(text, "no classes are given")[0] == (
        "1 no classes are given, so that training does not start give classes=FILE, ade20k or camvid, or num_classes=N, "
        "here perhaps 4, or 3 with ignore_index=3"
    )
    assert [line.split()[:2] for line in lines_of(text, " ? ")] == [[str(v), "?"] for v in (0, 1, 2, 3)] * 2
    assert (tmp_path / "out" / "overlays.png").is_file()


def test_every_kind_of_fault_is_told_with_what_happens(tmp_path: Path) -> None:
    root = whole_set(tmp_path)
    for number in range(3, 9):
        save_pair(root, "training", str(number), blocks((20, 20), 4, number))
    images, labels = root / "images" / "training", root / "annotations" / "training"
    (images / "0.png").write_bytes(b"no image")
    Image.fromarray(picture((33, 47))).save(labels / "1.png")
    Image.fromarray(blocks((21, 91), 4)).save(labels / "2.png")
    (labels / "3.png").write_bytes((labels / "3.png").read_bytes()[:-30])
    Image.fromarray(np.full((20, 20), 255, dtype=np.uint8)).save(labels / "4.png")
    palette_image(blocks((20, 20), 4)).save(labels / "5.png")
    Image.fromarray(blocks((20, 20), 4).astype(np.uint16)).save(labels / "6.png")
    (images / "8.png").unlink()
    code, text = examined(root, num_classes=6, loader={"max_broken_share": 0.5})
    assert code == 0
    for word, expected in {
        "images that cannot be read": "0.png",
        "labels of another size than their image": "2.png (91x21, not 90x21)",
        "labels that cannot be used: RGB pixels": "1.png",
        "labels that cannot be used: broken PNG": "3.png",
    }.items():
        (line,) = lines_of(text, word)
        assert "each is replaced by another image" in line and line.startswith("1 ") and line.endswith(expected)
    assert lines_of(text, "labels without an image") == ["1 labels without an image left out 8.png"]
    assert lines_of(text, "every pixel is ignored") == [
        "1 labels of which every pixel is ignored nothing is learned from them 4.png"
    ]
    assert lines_of(text, "never occur")[0] == "2 classes that never occur never learned class 4, class 5"
    assert "sizes: 3 different, 20x20 to 90x21; 20x20 5 times" in text
    code, text = examined(root, num_classes=6)  # 4 of 8 are more than 1 %
    assert code == 3

    pairs = open_pairs(root, "train")  # training does what doctor says
    table = label_table(DoctorConfig(num_classes=6), 6)
    found = TrainingImages(pairs.images, 0, PrepareSegmentation(pairs, table, 32, AugmentConfig(scale=(64, 16))))
    replaced = {note.name for index in range(len(pairs)) for note in found[0, index][1]}
    assert replaced == {"0.png", "1.png", "2.png", "3.png"}


@pytest.mark.parametrize("fault", ["image", "label", "size", "rgb"])
def test_a_single_fault_of_the_validation_set_is_refused(tmp_path: Path, fault: str) -> None:
    root = whole_set(tmp_path)
    path = root / ("images" if fault == "image" else "annotations") / "validation" / "1.png"
    if fault in {"image", "label"}:
        path.write_bytes(b"nothing")
    else:
        Image.fromarray(picture((30, 31)) if fault == "rgb" else blocks((31, 30), 4)).save(path)
    code, text = examined(root, num_classes=4, loader={"max_broken_share": 0.9})
    assert code == 3 and "an evaluation counts every image" in text


@pytest.mark.parametrize("fault", ["label missing", "two images", "two labels", "no split"])
def test_what_training_refuses_doctor_refuses_and_still_looks_at_the_rest(tmp_path: Path, fault: str) -> None:
    root = whole_set(tmp_path)
    if fault == "label missing":
        (root / "annotations" / "training" / "1.png").unlink()
        told = "1 images without a label training does not start 1.png"
    elif fault == "no split":
        (root / "images" / "validation").rename(root / "images" / "other")
        told = "images/validation: no such folder"
    else:
        kind, folder = ("images", "images") if fault == "two images" else ("labels", "annotations")
        Image.fromarray(blocks((33, 47), 4)).save(root / folder / "training" / "1.bmp")
        told = f"2 {kind} whose names differ in nothing but the ending training does not start 1.bmp, 1.png"
    code, text = examined(root, num_classes=4)
    assert code == 3 and any(told in line for line in lines_of(text, told.split()[-1]) + text.splitlines())
    assert lines_of(text, "pairs: ") == (["pairs: 3"] if fault == "no split" else ["pairs: 2", "pairs: 2"])
    if fault != "no split":
        with pytest.raises(DataError):
            open_pairs(root, "train")


def test_folders_of_ones_own_and_the_command(tmp_path: Path) -> None:
    root = whole_set(tmp_path / "set")
    (tmp_path / "classes.txt").write_text("one #112233\ntwo\nthree\nfour\n")
    keys = {"training": "train", "validation": "val"}
    own = [f"{keys[s]}_{k}={root / f / s}" for s in keys for k, f in (("images", "images"), ("labels", "annotations"))]
    for given in ([f"data={root}"], own):
        run = CliRunner().invoke(app, ["doctor", *given, f"classes={tmp_path / 'classes.txt'}"], standalone_mode=False)
        assert run.exception is None and run.return_value == 0 and "0 one" in run.output
    run = CliRunner().invoke(
        app, ["doctor", *own, "num_classes=2", "label_map={0: 1, 1: 0, 2: 255, 3: 255}"], standalone_mode=False
    )
    assert run.return_value == 0 and "0 class 0" in run.output
    code, text = examined(
        None, train_images=root / "images" / "training", train_labels=root / "annotations" / "training"
    )
    assert code == 3 and "no val_images: give data=ROOT" in text


def test_refusals(tmp_path: Path, shared: Path) -> None:
    root = whole_set(tmp_path)
    with pytest.raises(ConfigError, match="classes=camvid has 11"):
        examined(root, classes="camvid", num_classes=4)
    with pytest.raises(ConfigError, match="label_map: 3: 9 is no class"):
        examined(root, num_classes=4, label_map={3: 9})
    with pytest.raises(ConfigError, match=r"^label_shift: has no effect on a set in COCO's format; leave it out$"):
        examined(shared / "data" / "coco128", label_shift=1)
    with pytest.raises(ValueError, match="a set has a JSON of COCO's format or labels of pixels"):
        DoctorConfig(train_json=root, train_labels=root)
    with pytest.raises(
        DataError, match=r"no layout that doctor knows; expected annotations/.*; or images/.training,val"
    ):
        examined(tmp_path / "images")
    assert len(open_classes(DoctorConfig(num_classes=4))) == 4
