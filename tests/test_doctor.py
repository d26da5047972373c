"""`rcmae doctor`: what it says of a real set and of broken ones, and that training does what it says."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from core.errors import ConfigError, DataError
from tests.coco_sets import TRIANGLE, annotation, image, small_set, with_, write_set
from tools.cli import app
from tools.doctor import DoctorConfig, doctor


def examined(root: Path, **settings: Any) -> tuple[int, str]:
    text = io.StringIO()
    code = doctor(DoctorConfig(data=root, **settings), Console(file=text, width=600))
    return code, text.getvalue()


def line_of(text: str, word: str) -> str:
    """The row that holds a word, its cells joined by single spaces."""
    (line,) = [line for line in text.splitlines() if word in line]
    return " ".join(line.replace("│", " ").split())


def whole_set(root: Path) -> Path:
    for split in ("train", "val"):
        write_set(root, small_set(), split, draw=True)
    return root


def test_coco128_can_be_trained_on(shared: Path) -> None:
    code, text = examined(shared / "data" / "coco128")
    assert code == 0 and text.splitlines()[-1] == "this data set can be trained on"
    assert "objects: 710, 6 of them crowds" in text and "objects: 229, 4 of them crowds" in text
    assert line_of(text, "images without annotations") == (
        "2 images without annotations not learned from, unless keep_background=true 250, 508"
    )
    assert "person             192  ██████████████████████████████" in text
    assert "512 and more px" in text


def test_a_whole_set_has_nothing_to_complain_about(tmp_path: Path) -> None:
    code, text = examined(whole_set(tmp_path))
    assert code == 0 and text.count("nothing to complain about") == 2


def test_every_kind_of_fault_is_told_with_what_happens(tmp_path: Path) -> None:
    root = whole_set(tmp_path)
    tree = {
        "images": [*(image(i) for i in range(1, 9)), image(9, file_name="8.jpg")],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "d[red]og"}],
        "annotations": [
            annotation(1, 1),
            annotation(2, 2, segmentation=[[1, 2, 3, 4]]),
            annotation(3, 3, iscrowd=1),
            annotation(4, 1, bbox=[50, 6, 20, 10]),
            annotation(5, 1, segmentation=[TRIANGLE, [1, 2, math.nan, 3, 4, 5]]),
            annotation(6, 1, segmentation={"size": [40, 60], "counts": [1]}),
        ],
    }
    write_set(root, tree, draw=True)
    (root / "train2017" / "1.jpg").unlink()
    (root / "train2017" / "2.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros((39, 60, 3), dtype=np.uint8)).save(root / "train2017" / "3.jpg")
    write_set(root, with_(categories=[{"id": 7, "name": "cat"}, {"id": 3, "name": "d[red]og"}]), "val", draw=True)
    code, text = examined(root, loader={"max_broken_share": 0.5})
    assert code == 0
    assert line_of(text, "missing on disk").startswith(
        "1 images missing on disk each is replaced by another image; more"
    )
    assert line_of(text, "cannot be read").endswith("2.jpg")
    assert line_of(text, "of another size").endswith("3.jpg (60x39, not 60x40)")
    assert line_of(text, "several images").endswith("each is used 8.jpg")
    assert line_of(text, "fewer than three points").endswith("these annotations are left out id 2")
    assert line_of(text, "run lengths").endswith("these annotations are left out id 6")
    assert line_of(text, "broken polygons").startswith("1 broken polygons of annotations that have others")
    assert line_of(text, "leave their image").endswith("made anew from the outlines image 1")
    assert line_of(text, "without annotations").startswith("6 images without annotations not learned from, unless")
    assert line_of(text, "are all broken") == "1 images whose annotations are all broken not learned from 2"
    assert line_of(text, "crowds alone") == "1 images of crowds alone not learned from 3"
    assert line_of(text, "classes without objects").endswith("never learned d[red]og")
    code, text = examined(root)
    assert code == 3 and "training would refuse this data set" in text


@pytest.mark.parametrize("fault", ["missing", "size", "unreadable"])
def test_an_evaluation_set_must_be_whole(tmp_path: Path, fault: str) -> None:
    path = whole_set(tmp_path) / "val2017" / "1.jpg"
    if fault == "missing":
        path.unlink()
    elif fault == "size":
        Image.fromarray(np.zeros((60, 40, 3), dtype=np.uint8)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:20])
    code, text = examined(tmp_path)
    assert code == 3 and "an evaluation counts every image" in text


def test_exif_rotation_counts_for_the_size(tmp_path: Path) -> None:
    path = whole_set(tmp_path) / "train2017" / "1.jpg"
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(np.zeros((60, 40, 3), dtype=np.uint8)).save(path, exif=exif)
    assert examined(tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (b"{", "the file ends in the middle"),
        (with_(annotations=[annotation(1), annotation(1, 9)]), "1 annotations of an unknown image_id: id 1 (9)"),
        (with_(annotations=[annotation(1), annotation(1)]), "1 annotation ids that stand twice: id 1"),
        (with_(annotations=[annotation(1, category_id=8)]), "1 annotations of an unknown category_id: id 1 (8)"),
        (with_(annotations=[annotation(1, iscrowd=1)]), "no image has an object to learn from: all 1 annotations are"),
        (with_(annotations=[]), "no image has an object to learn from: no annotations"),
    ],
)
def test_what_training_refuses_doctor_refuses(tmp_path: Path, tree: Any, told: str) -> None:
    root = whole_set(tmp_path)
    if isinstance(tree, bytes):
        write_set(root, tree)
    else:
        write_set(root, tree, draw=True)
    code, text = examined(root)
    assert code == 3 and told in text and "training does not start" in text


def test_train_and_val_need_the_same_classes(tmp_path: Path) -> None:
    root = whole_set(tmp_path)
    write_set(root, with_(categories=[{"id": 7, "name": "cat"}, {"id": 3, "name": "elk"}]), "val", draw=True)
    code, text = examined(root)
    assert code == 3
    assert line_of(text, "only one of train and val") == (
        "2 classes that only one of train and val has training does not start dog, elk"
    )


def test_a_missing_split_is_a_fault_of_the_set(tmp_path: Path) -> None:
    root = write_set(tmp_path, small_set(), draw=True)
    code, text = examined(root)
    assert code == 3 and "instances_val2017.json: no such file" in text


def test_the_command_and_its_refusals(tmp_path: Path) -> None:
    root = whole_set(tmp_path / "set")
    run = CliRunner().invoke(app, ["doctor", f"data={root}"], standalone_mode=False)
    assert run.exception is None and run.return_value == 0 and "can be trained on" in run.output
    own = [f"{split}_{kind}" for split in ("train", "val") for kind in ("json", "images")]
    paths = [
        root / f"annotations/instances_{key[:-5]}2017.json" if "json" in key else root / f"{key[:-7]}2017"
        for key in own
    ]
    run = CliRunner().invoke(
        app, ["doctor", *(f"{k}={p}" for k, p in zip(own, paths, strict=True))], standalone_mode=False
    )
    assert run.return_value == 0
    with pytest.raises(ConfigError, match="needs a data set"):
        doctor(DoctorConfig(label_shift=1))
    with pytest.raises(DataError, match="no layout that doctor knows; expected annotations/"):
        doctor(DoctorConfig(data=tmp_path))
