"""What label files say, what classes are called, and which label belongs to which image."""

import io
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.config import dump_config, load_config
from core.errors import ConfigError, DataError
from tests.segmentation_sets import blocks, palette_image, picture, save_pair, write_pairs
from transfer.segmentation.classes import Classes, open_classes, unnamed
from transfer.segmentation.labels import BadLabel, LabelKeys, LabelTable, OutOfRange, label_table, read_label
from transfer.segmentation.pairs import SegmentationSet, open_pairs

ADE = LabelKeys(classes="ade20k", label_shift=1)


# ---- golden values --------------------------------------------------------------------------------------------------


def test_golden_label_map_names_and_palette_of_ade20k(shared: Path) -> None:
    expected = json.loads((shared / "golden" / "segmentation_label_map.json").read_text())
    stored = np.arange(256, dtype=np.uint8)[None]
    whole = label_table(LabelKeys(label_shift=1), 254)
    assert whole(stored)[0].tolist() == expected["stored_to_trained"]
    found = label_table(ADE, 150).table[:256].tolist()
    assert found == [label if label < 150 or label == 255 else -1 for label in expected["stored_to_trained"]]
    classes = open_classes(ADE)
    assert list(classes.names) == expected["classes"] and [list(rgb) for rgb in classes.palette] == expected["palette"]


# ---- what stored values mean ----------------------------------------------------------------------------------------


def table_of(num_classes: int, **keys: Any) -> LabelTable:
    return label_table(LabelKeys(**keys), num_classes)


def test_ignore_index_stays_itself_and_values_below_the_shift_become_it() -> None:
    stored = np.array([[0, 1, 2, 11]], dtype=np.uint8)
    assert table_of(11, ignore_index=11)(stored).tolist() == [[0, 1, 2, 11]]
    assert table_of(10, ignore_index=11, label_shift=1)(stored).tolist() == [[11, 0, 1, 11]]
    assert table_of(9, ignore_index=11, label_shift=2)(stored).tolist() == [[11, 11, 0, 11]]
    assert table_of(2, label_shift=1, ignore_index=3).table[:5].tolist() == [3, 0, 1, 3, -1]
    for shift, value in ((1, 10), (3, 8)):
        told = f"^ignore_index=11: is with label_shift={shift} the stored value of class {value}; give another, such as"
        with pytest.raises(ConfigError, match=told):
            table_of(11, ignore_index=11, label_shift=shift)


def test_a_map_gives_every_value_its_class() -> None:
    table = table_of(2, label_map={7: 0, 200: 1, 9: 255, 300: 1})
    assert table(np.array([[7, 200, 9, 255, 300]], dtype=np.uint16)).tolist() == [[0, 1, 255, 255, 1]]
    assert table_of(2, label_map={0: 0, 255: 1})(np.array([[0, 255]], dtype=np.uint8)).tolist() == [[0, 1]]
    with pytest.raises(OutOfRange):
        table(np.array([[0]], dtype=np.uint8))


def test_the_most_frequent_value_out_of_range_is_told_with_its_pixels() -> None:
    stored = np.array([[3, 200, 200, 151], [255, 0, 150, 149]], dtype=np.uint8)
    with pytest.raises(OutOfRange, match=r"^value 200 in 2 pixels$") as caught:
        table_of(150)(stored)
    assert (caught.value.value, caught.value.count) == (200, 2)


def test_many_classes_need_another_ignore_index_and_more_bits() -> None:
    table = table_of(300, ignore_index=65535)
    labels = table(np.array([[0, 299, 65535]], dtype=np.uint16))
    assert labels.dtype == np.int32 and labels.tolist() == [[0, 299, 65535]]
    with pytest.raises(ConfigError, match="ignore_index=255: is one of the 300 classes; give another, such as 65535"):
        table_of(300)
    assert table_of(4)(np.zeros((1, 1), dtype=np.uint16)).dtype == np.uint8


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["label_map={1: 0}", "label_shift=1"], "label_shift=1: has no effect beside label_map"),
        (["label_map={}"], "label_map: is empty"),
        (["label_map={70000: 0}"], "label_map: 70000: label files hold values of 0..65535"),
        (["label_map={a: 0}"], "label_map.a: expected a valid integer"),
        (["label_map={1: -1}"], "label_map.1: expected greater than or equal to 0"),
        (["label_map=3"], "label_map: expected"),
        (["num_classes=11", "ignore_index=10"], "ignore_index=10: is one of the 11 classes; give another, such as 255"),
        (["ignore_index=65536"], "ignore_index: expected less than 65536"),
    ],
)
def test_keys_that_cannot_hold_are_refused(overrides: list[str], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(LabelKeys, None, overrides)
    assert fault in str(caught.value) and "\n" not in str(caught.value)


def test_a_map_to_what_is_no_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^label_map: 7: 2 is no class \(0\.\.1\), nor ignore_index=255$"):
        table_of(2, label_map={3: 0, 7: 2})


def test_a_map_is_read_from_yaml_and_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("num_classes: 2\nlabel_map:\n  11: 255\n  3: 1\n")
    assert load_config(LabelKeys, path).label_map == {11: 255, 3: 1}
    assert load_config(LabelKeys, path, ["label_map={4: 0}"]).label_map == {4: 0}
    assert load_config(LabelKeys, path, ["label_map.3=0"]).label_map == {11: 255, 3: 0}
    config = load_config(LabelKeys, None, ["label_map={11: 255, 0: 1}"])
    assert config.label_map == {11: 255, 0: 1}
    path.write_text(dump_config(config))
    assert load_config(LabelKeys, path) == config


# ---- label files ----------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def small_png(bits: int, rows: list[bytes]) -> bytes:
    """A grey PNG of fewer than 8 bits, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    width = len(rows[0]) * 8 // bits
    header = width.to_bytes(4, "big") + len(rows).to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_stored_values_are_read_as_they_are() -> None:
    values = blocks((5, 7), 16) * 15
    assert np.array_equal(read_label(encoded(Image.fromarray(values))), values)
    assert read_label(encoded(palette_image(values))).tolist() == values.tolist()
    few = (values // 15).clip(0, 3).astype(np.uint8)
    assert read_label(encoded(palette_image(few), bits=2)).tolist() == few.tolist()
    wide = values.astype(np.uint16) * 250
    found = read_label(encoded(Image.fromarray(wide)))
    assert found.dtype == np.uint16 and np.array_equal(found, wide)
    bits = read_label(encoded(Image.fromarray(values > 100)))
    assert bits.dtype == np.uint8 and np.array_equal(bits, values > 100)
    assert read_label(small_png(2, [bytes([0b00011011])])).tolist() == [[0, 1, 2, 3]]
    assert read_label(small_png(4, [bytes([0x0F, 0x71])])).tolist() == [[0, 15, 7, 1]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(Image.new("RGB", (4, 3))), "RGB pixels; a label has one number per pixel, grey or palette"),
        (encoded(Image.new("RGBA", (4, 3))), "RGBA pixels; a label has one number per pixel, grey or palette"),
        (encoded(Image.new("LA", (4, 3))), "grey with alpha pixels; a label has one number per pixel, grey or palette"),
        (encoded(Image.new("L", (4, 3)), "JPEG"), "a JPEG file, which does not keep values; a label is a PNG"),
        (encoded(Image.new("L", (4, 3)), "BMP"), "no PNG file; a label is a PNG"),
        (b"", "an empty file; a label is a PNG"),
        (encoded(Image.new("L", (4, 3)))[:20], "broken PNG: no header"),
        (encoded(Image.fromarray(picture((40, 40))[..., 0]))[:-400], "broken PNG: image file is truncated"),
        (encoded(Image.fromarray(picture((40, 40))[..., 0])).replace(b"IDAT", b"IDAX"), "broken PNG: "),
    ],
)
def test_what_is_no_label_is_told_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadLabel) as caught:
        read_label(data)
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)


def test_the_size_is_compared_before_anything_is_decoded() -> None:
    data = encoded(Image.new("L", (40, 30)))
    assert read_label(data, (30, 40)).shape == (30, 40)
    with pytest.raises(BadLabel, match=r"^has 40x30 px, its image 41x30$"):
        read_label(data[:40], (30, 41))
    with pytest.raises(BadLabel, match=r"^has 40x30 px, its image 30x40 \(turned by its EXIF orientation\?\)$"):
        read_label(data, (40, 30))
    bomb = data[:16] + (100_000).to_bytes(4, "big") * 2 + data[24:]
    with pytest.raises(BadLabel, match="100000x100000 px is over the limit of 178 megapixels"):
        read_label(bomb)


# ---- classes --------------------------------------------------------------------------------------------------------


def test_camvid_is_built_in_too() -> None:
    classes = open_classes(LabelKeys(classes="camvid", ignore_index=11))
    assert classes.names[:4] == ("sky", "building", "pole", "road") and len(classes) == 11
    assert classes.palette[3] == (0x80, 0x40, 0x80) and len(set(classes.palette)) == 11


def test_names_and_colours_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeff# my classes\n\n  road surface #804080 \nsky\n#ffffff is a note\ncafé #0000FF\n", "utf-8")
    classes = open_classes(LabelKeys(classes=str(path), num_classes=3))
    assert classes.names == ("road surface", "sky", "café")
    assert classes.palette == ((128, 64, 128), unnamed(2).palette[1], (0, 0, 255))


def test_classes_without_names_have_colours_of_their_own() -> None:
    classes = open_classes(LabelKeys(num_classes=255))
    assert isinstance(classes, Classes) and classes.names[:2] == ("class 0", "class 1")
    assert len(set(classes.palette)) == 255 and (0, 0, 0) not in classes.palette


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("road\nsky #12\n", "classes.txt:2: sky #12: expected `name` or `name #rrggbb`"),
        ("road\n\n#808080\n #808080\nroad", "classes.txt:5: road stands twice"),
        ("# nothing\n", "classes.txt: no classes in it"),
        ("a\x1bb\na\x1bb #1\n", "classes.txt:2: a\\x1bb #1: expected"),
        (b"\xff\xfe", "classes.txt: not UTF-8 text; expected a text file with a class per line"),
        (b"x\n" * 600_000, "classes.txt: larger than 1000000 bytes"),
    ],
)
def test_a_file_that_is_no_list_of_classes_is_one_line(tmp_path: Path, text: str | bytes, fault: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        open_classes(LabelKeys(classes=str(path)))
    assert fault in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({}, "^classes: missing; give classes=FILE with a class per line, classes=ade20k or camvid, or num_classes=N$"),
        ({"classes": "ade20K"}, "^classes: ade20K: no such file; expected ade20k, camvid, or a file with a class"),
        ({"classes": "ade20k", "num_classes": 151}, "^num_classes=151: classes=ade20k has 150; leave num_classes out$"),
        ({"classes": "camvid", "ignore_index": 10}, "^ignore_index=10: is one of the 11 classes"),
    ],
)
def test_keys_that_do_not_say_the_classes_are_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        open_classes(LabelKeys(**keys))


# ---- pairs ----------------------------------------------------------------------------------------------------------


def names(pairs: SegmentationSet) -> list[tuple[str, str]]:
    return [(pairs.images.name(index), pairs.labels.name(index)) for index in range(len(pairs))]


def test_images_and_labels_are_matched_by_name_in_the_order_of_the_images(tmp_path: Path) -> None:
    for name in ("b", "a/c", "a.b", "a"):
        save_pair(tmp_path, "training", name, blocks((8, 8), 4))
    folder = tmp_path / "images" / "training"
    Image.open(folder / "b.png").save(folder / "b.jpeg")
    (folder / "b.png").unlink()
    pairs = open_pairs(tmp_path, "train")
    assert names(pairs) == [("a.b.png", "a.b.png"), ("a.png", "a.png"), ("a/c.png", "a/c.png"), ("b.jpeg", "b.png")]
    assert pairs.notes() == []
    assert names(pairs.subset(np.array([3, 1]))) == [names(pairs)[3], names(pairs)[1]]
    moved = shutil.copytree(tmp_path, tmp_path.parent / "moved")
    assert open_pairs(moved, "train").fingerprint() == pairs.fingerprint()
    (moved / "annotations" / "training" / "a.png").rename(moved / "annotations" / "training" / "a.PNG")
    assert open_pairs(moved, "train").fingerprint() != pairs.fingerprint()


@pytest.mark.parametrize("folders", [("training", "validation"), ("train", "val")])
def test_a_root_or_its_parent_or_folders_of_ones_own(tmp_path: Path, folders: tuple[str, str]) -> None:
    root = tmp_path / "download" / "ADEChallengeData2016"
    write_pairs(root, [(8, 8)] * 3, split=folders[0])
    write_pairs(root, [(8, 8)] * 2, split=folders[1])
    (tmp_path / "download" / "release_test").mkdir()
    (root / "sceneCategories.txt").write_text("x")
    for given in (root, root.parent):
        assert (len(open_pairs(given, "train")), len(open_pairs(given, "val"))) == (3, 2)
    own = (root / "images" / folders[1], root / "annotations" / folders[1])
    assert names(open_pairs(None, "train", *own)) == names(open_pairs(root, "val"))
    assert names(open_pairs(root, "train", *own)) == names(open_pairs(root, "val"))
    shutil.copytree(root, root.parent / "other")
    with pytest.raises(DataError, match=r"download: holds several sets \(ADEChallengeData2016, other\); give one"):
        open_pairs(root.parent, "train")


def test_the_order_is_that_of_the_names_whatever_the_file_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    root = write_pairs(tmp_path, [(8, 8)] * 12)
    (root / "images" / "training" / "deep").mkdir()
    (root / "annotations" / "training" / "deep").mkdir()
    save_pair(root, "training", "deep/1", blocks((8, 8), 4))
    expected = names(open_pairs(root, "train"))
    walk = os.walk

    def reversed_walk(*args: Any, **options: Any) -> Any:
        for folder, subfolders, files in walk(*args, **options):
            subfolders.sort(reverse=True)
            yield folder, subfolders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert names(open_pairs(root, "train")) == expected
    assert [image for image, _ in expected] == sorted(image for image, _ in expected)


def test_an_image_without_its_label_is_refused_with_the_first_five(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, [(8, 8)] * 9)
    for number in range(1, 8):
        (root / "annotations" / "training" / f"{number}.png").unlink()
    with pytest.raises(DataError) as caught:
        open_pairs(root, "train")
    text = str(caught.value)
    assert "7 images without a label in" in text and "1.png, 2.png, 3.png, 4.png, 5.png, ...; give each a PNG" in text
    assert "\n" not in text


def test_a_label_without_its_image_is_a_note(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, [(8, 8)] * 3)
    (root / "images" / "training" / "1.png").unlink()
    pairs = open_pairs(root, "train")
    assert [image for image, _ in names(pairs)] == ["0.png", "2.png"]
    assert pairs.notes() == [f"{root}/annotations/training: 1 labels without an image: 1.png"]


@pytest.mark.parametrize(("kind", "what"), [("images", "images"), ("annotations", "labels")])
def test_two_of_one_name_are_refused(tmp_path: Path, kind: str, what: str) -> None:
    root = write_pairs(tmp_path, [(8, 8)] * 3)
    Image.new("L", (8, 8)).save(root / kind / "training" / "1.bmp")
    with pytest.raises(DataError, match=f"training: 2 {what} whose names differ in nothing but the ending: 1.bmp, 1.p"):
        open_pairs(root, "train")


def test_what_is_missing_is_named_with_the_keys_that_would_give_it(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, [(8, 8)])
    with pytest.raises(DataError, match=r"^no train_images: give data=ROOT with images/{training,validation} and "):
        open_pairs(None, "train")
    with pytest.raises(DataError, match=r"images/validation: no such folder; expected .* below data=, or val_images="):
        open_pairs(root, "val")
    with pytest.raises(DataError, match=r"^no val_labels: give data=ROOT"):
        open_pairs(None, "val", root / "images" / "training")
    (root / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no labels in it"):
        open_pairs(root, "train", labels=root / "empty")
