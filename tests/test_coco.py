"""Reading COCO files: whole ones as the reference reads them, broken ones by rule, and nothing that can crash C code."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api

from core.errors import DataError
from tests.coco_sets import HEIGHT, TRIANGLE, WIDTH, annotation, image, read_set, small_set, with_, write_set
from transfer.detection import annotation_reader as reasons
from transfer.detection.coco import CocoSet, training_set
from transfer.detection.coco_file import CocoPaths, coco_paths, read_coco
from transfer.detection.rle import decode, rle_of, runs_of

HALF = [HEIGHT * 2, HEIGHT, HEIGHT * (WIDTH - 3)]  # column 2 is set


def fault(root: Path, tree: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_set(root, tree)
    return str(caught.value)


def require_harmless(coco: CocoSet) -> None:
    """Every mask that was kept is drawn by pycocotools as zeros and ones whose sum is its area."""
    for index in range(len(coco)):
        height, width = coco.size(index)
        for each in coco.objects(index):
            assert np.isfinite(each.box).all() and (each.box[2:] > each.box[:2]).all() and math.isfinite(each.area)
            if each.rle is None:
                parts = [polygon.reshape(-1).tolist() for polygon in each.polygons]
                coded = mask_api.merge(mask_api.frPyObjects(parts, height, width))
            else:
                coded = {"size": [height, width], "counts": each.rle.counts}
                assert (decode(each.rle) == mask_api.decode(coded)).all()
            mask = mask_api.decode(coded)
            assert mask.max() <= 1 and mask.sum() == mask_api.area(coded)


def test_golden_category_ids_become_labels(shared: Path, tmp_path: Path) -> None:
    golden = json.loads((shared / "golden" / "detection_coco_map.json").read_text())
    expected = {int(id_): label for id_, label in golden["category_id_to_class"].items()}
    categories = [{"id": id_, "name": golden["class_names"][label]} for id_, label in reversed(expected.items())]
    entry = annotation(1, category_id=90)
    coco = read_set(tmp_path, with_(categories=categories, annotations=[entry]))
    assert {id_: label for label, id_ in enumerate(coco.category_ids)} == expected
    assert list(coco.names) == golden["class_names"]
    assert [each.label for each in coco.objects(0)] == [79]


@pytest.mark.parametrize("which", ["loaded", "training"])
def test_golden_loading(shared: Path, tmp_path: Path, which: str) -> None:
    golden = json.loads((shared / "golden" / "detection_coco_map.json").read_text())["loading"]
    coco = read_set(tmp_path, golden["annotation_file"])
    assert coco.dropped[0].reason == reasons.FEW_POINTS and coco.dropped[0].count == 2
    assert coco.num_broken_parts == 2
    if which == "training":
        coco = training_set(coco)
    found = []
    for index, id_ in enumerate(coco.image_ids):
        height, width = coco.size(index)
        name = coco.file_names[index].decode()
        objects = []
        for each in coco.objects(index):
            outline = each.rle.as_coco() if each.rle else [polygon.reshape(-1).tolist() for polygon in each.polygons]
            objects.append(
                {
                    "iscrowd": int(each.crowd),
                    "bbox_xyxy": each.box.tolist(),
                    "category": each.label,
                    "segmentation": outline,
                }
            )
        found.append({"image_id": id_, "file_name": name, "height": height, "width": width, "annotations": objects})
    assert found == golden[which]


def test_coco128_is_whole(shared: Path) -> None:
    root = shared / "data" / "coco128"
    train, val = (read_coco(coco_paths(root, split)) for split in ("train", "val"))
    assert (len(train), len(val)) == (96, 32)
    assert len(train.annotations) + len(val.annotations) == 939
    assert int(train.annotations.crowd.sum() + val.annotations.crowd.sum()) == 10
    assert train.dropped == val.dropped == () and not train.notes()
    assert len(training_set(train)) == 94 and len(training_set(train, keep_background=True)) == 96
    assert train.names[:2] == ("person", "bicycle") and len(train.names) == 80
    require_harmless(train)


def test_annotations_follow_the_images(tmp_path: Path) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": HALF}
    far = [20.0, 20.0, 30.0, 20.0, 30.0, 30.5]
    entries = [
        annotation(1, 5, segmentation=[far, TRIANGLE]),
        annotation(2, 2, segmentation=rle),
        annotation(3, 5, segmentation=rle, iscrowd=1),
        annotation(4, 1, segmentation=[far]),
        annotation(5, 2, segmentation=[TRIANGLE], category_id=3),
    ]
    tree = with_(images=[image(id_) for id_ in (9, 5, 2, 1)], annotations=entries)
    coco = read_set(tmp_path, tree)
    assert coco.image_ids == (1, 2, 5, 9)
    assert coco.num_learnable().tolist() == [1, 2, 1, 0]

    def outlines(index: int) -> list:
        return [
            [p.reshape(-1).tolist() for p in each.polygons] or runs_of(each.rle).tolist()
            for each in coco.objects(index)
        ]

    assert [outlines(i) for i in range(4)] == [[[far]], [HALF, [TRIANGLE]], [[far, TRIANGLE], HALF], []]
    assert [each.label for each in coco.objects(1)] == [1, 0]
    part = coco.subset(np.array([2, 0]))
    assert part.image_ids == (5, 1) and len(list(part.objects(0))) == 2
    assert [part.source().name(i) for i in range(2)] == ["5.jpg", "1.jpg"]
    assert [each.crowd for each in part.objects(0)] == [False, True]


def test_ids_may_be_text_holes_and_floats(tmp_path: Path) -> None:
    tree = {
        "images": [image("b"), image("a"), image(10), image(-3)],
        "categories": [{"id": 40.0, "name": "x"}, {"id": 0}, {"id": "k", "name": "x"}],
        "annotations": [annotation(1, "a", "k"), annotation(2, -3.0, 40), annotation("one", 10, 0)],
    }
    coco = read_set(tmp_path, tree)
    assert coco.image_ids == (-3, 10, "a", "b")
    assert coco.category_ids == (0, 40, "k")
    assert coco.names == ("0", "x (40)", "x (k)")
    assert [[each.label for each in coco.objects(i)] for i in range(4)] == [[1], [0], [2], []]


def test_an_area_that_is_not_there_is_the_masks(tmp_path: Path) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": HALF}
    entries = [annotation(i, area=area) for i, area in enumerate([..., None, math.nan, -1, "9", 10**400, 12])]
    coco = read_set(tmp_path, with_(annotations=[*entries, annotation(9, area=..., segmentation=rle)]))
    drawn = mask_api.area(mask_api.frPyObjects([TRIANGLE], HEIGHT, WIDTH))[0]
    assert [each.area for each in coco.objects(0)] == [drawn] * 6 + [12, HEIGHT]


# --- D8: files that are no JSON, or no COCO -------------------------------------------------------------------------

WHOLE = json.dumps(small_set()).encode()
NUMBER = WHOLE.index(b'"id": 7') + 6
TWICE = WHOLE.replace(b'"id": 3, "image_id"', b'"id": 3, "area": 1, "image_id"')


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "an empty file"),
        (b" \n", "an empty file"),
        (WHOLE[:-1], f"byte {len(WHOLE) - 1}: the file ends in the middle"),
        (WHOLE[: len(WHOLE) // 2], "the file ends in the middle"),
        (WHOLE[: WHOLE.index(b"cat") + 2], "the file ends in the middle"),
        (WHOLE + b"}", f"byte {len(WHOLE)}: Extra data"),
        (WHOLE.replace(b":", b"=", 1), "byte 9: Expecting ':' delimiter"),
        (WHOLE.replace(b"cat", "ü".encode(), 1).replace(b'"dog"', b"dog"), "byte"),
        (b"\xef\xbb\xbf" + WHOLE, "byte 0: starts with a byte order mark"),
        (WHOLE.decode().encode("utf-16"), "byte 0: starts with a byte order mark"),
        (WHOLE.replace(b"cat", b"c\xe4t"), "not UTF-8 text"),
        (TWICE, "annotations[2]: the key 'area' stands twice"),
        (WHOLE[:-1] + b', "images": []}', "the top level: the key 'images' stands twice"),
        (b'{"images": ' + b"[" * 100_000, "byte 110: nested too deeply"),
        (b'{"info": ' + b'{"a":' * 100_000, "nested too deeply"),
        (WHOLE.replace(b'"id": 7', b'"id": ' + b"7" * 5000), f"byte {NUMBER}: a number of thousands of digits"),
        (WHOLE.replace(b'"height": 40', b'"height": NaN', 1), "images whose height and width are not at least 1"),
        (WHOLE.replace(b'"width": 60', b'"width": 1e999', 1), "1 images whose height and width are not at least 1"),
        (WHOLE.replace(b'"id": 7', b'"id": NaN'), "1 categories without an id (a whole number or text): categories[0]"),
        (WHOLE.replace(b'"image_id": 1', b'"image_id": Infinity', 1), "1 annotations of an unknown image_id: id 1 (none)"),
        (b"[]", "a list at the top level; expected a COCO-format JSON with images, annotations and categories"),
        (b'[{"image_id": 1, "score": 0.5}]', "a list at the top level (this one holds detections)"),
        (b"17", "a single value at the top level"),
        (b"null", "a single value at the top level"),
        (b"{}", "no images and no annotations and no categories"),
        (json.dumps({"images": [], "annotations": []}).encode(), "no categories"),
        (json.dumps(with_(annotations={})).encode(), "annotations: expected a list"),
        (json.dumps(with_(images=None)).encode(), "images: expected a list"),
        (json.dumps(with_(images=[], annotations=[])).encode(), "images: an empty list"),
        (json.dumps(with_(categories=[])).encode(), "categories: an empty list"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line_with_its_place(tmp_path: Path, data: bytes, told: str) -> None:
    text = fault(tmp_path, data)
    assert "\n" not in text and text.startswith(f"{tmp_path}/annotations/instances_train2017.json: ")
    assert told in text, text


def test_flipped_bytes_are_never_a_traceback(tmp_path: Path) -> None:
    tree = small_set()
    tree["annotations"][1]["segmentation"] = encode_half()
    whole = json.dumps(tree).encode()
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256) if rng.random() < 0.5 else ord(rng.choice(list('0123456789.,-[]{}":eN')))
        try:
            coco = read_set(tmp_path, bytes(data))
        except DataError:
            continue
        kept += 1
        require_harmless(coco)
    assert kept > 20


def encode_half() -> dict[str, Any]:
    return rle_of({"size": [HEIGHT, WIDTH], "counts": HALF}, HEIGHT, WIDTH).as_coco()


# --- D9 and D10: annotations that are dropped and counted -----------------------------------------------------------

NAN, INF = math.nan, math.inf
BROKEN = {
    "no polygons": ({"segmentation": []}, reasons.NO_OUTLINE),
    "no segmentation": ({"segmentation": ...}, reasons.NO_OUTLINE),
    "null": ({"segmentation": None}, reasons.NO_OUTLINE),
    "an empty polygon": ({"segmentation": [[]]}, reasons.FEW_POINTS),
    "two points": ({"segmentation": [[1.0, 2, 3, 4]]}, reasons.FEW_POINTS),
    "an odd count": ({"segmentation": [[1.0, 2, 3, 4, 5, 6, 7]]}, reasons.FEW_POINTS),
    "a flat polygon": ({"segmentation": TRIANGLE}, reasons.NO_SHAPE),
    "text": ({"segmentation": "abc"}, reasons.NO_SHAPE),
    "polygon as object": ({"segmentation": [{"x": 1}]}, reasons.NO_SHAPE),
    "points as pairs": ({"segmentation": [[[1, 2], [3, 4], [5, 9], [1, 1], [2, 2], [3, 3]]]}, reasons.NO_NUMBERS),
    "coordinates as text": ({"segmentation": [["1", "2", "3", "4", "5", "9"]]}, reasons.NO_NUMBERS),
    "null among them": ({"segmentation": [[1, 2, 3, None, 5, 9]]}, reasons.NO_NUMBERS),
    "NaN": ({"segmentation": [[1, 2, 3, NAN, 5, 9]]}, reasons.NOT_FINITE),
    "infinite": ({"segmentation": [[1, 2, INF, 4, 5, 9]]}, reasons.NOT_FINITE),
    "both infinities": ({"segmentation": [[1, 2, INF, -INF, 5, 9]]}, reasons.NOT_FINITE),
    "beyond floats": ({"segmentation": [[1, 2, 10**400, 4, 5.5, 9]]}, reasons.NOT_FINITE),
    "1e9": ({"segmentation": [[1, 2, 1e9, 4, 5, 9]]}, reasons.FAR_AWAY),
    "-1e9": ({"segmentation": [[1, 2, 3, -1e9, 5, 9]]}, reasons.FAR_AWAY),
    "1e300": ({"segmentation": [[1, 2, 3, 1e300, 5, 9]]}, reasons.FAR_AWAY),
    "two images away": ({"segmentation": [[1, 2, 2 * WIDTH + 1, 4, 5, 9]]}, reasons.FAR_AWAY),
    "right of the image": ({"segmentation": [[61, 2, 70, 4, 65, 9]]}, reasons.OUTSIDE),
    "above the image": ({"segmentation": [[1, -2, 3, -9, 5, -4]]}, reasons.OUTSIDE),
    "a line": ({"segmentation": [[1, 2, 1, 4, 1, 9]]}, reasons.NO_AREA),
    "a point": ({"segmentation": [[1, 2, 1, 2, 1, 2]]}, reasons.NO_AREA),
    "a box without width": ({"bbox": [5, 6, 0, 10]}, reasons.NO_AREA),
    "a box of negative height": ({"bbox": [5, 6, 10, -1]}, reasons.NO_AREA),
    "no box": ({"bbox": ...}, reasons.BAD_BOX),
    "a box of three": ({"bbox": [5, 6, 10]}, reasons.BAD_BOX),
    "a box of text": ({"bbox": ["5", 6, 10, 10]}, reasons.BAD_BOX),
    "a NaN box": ({"bbox": [5, NAN, 10, 10]}, reasons.NOT_FINITE),
    "a huge box": ({"bbox": [5, 6, 1e9, 10]}, reasons.FAR_AWAY),
    "crowd of 2": ({"iscrowd": 2}, reasons.BAD_CROWD),
    "crowd as text": ({"iscrowd": "0"}, reasons.BAD_CROWD),
    "crowd is null": ({"iscrowd": None}, reasons.BAD_CROWD),
}  # fmt: skip
SIZE = [HEIGHT, WIDTH]
GOOD = encode_half()["counts"]
BROKEN_RLE = {
    "short": {"size": SIZE, "counts": [80, 40]},
    "long": {"size": SIZE, "counts": [80, 40, 2280, 1]},
    "negative": {"size": SIZE, "counts": [80, -40, 2360]},
    "empty": {"size": SIZE, "counts": []},
    "floats": {"size": SIZE, "counts": [80.0, 40.0, 2280.0]},
    "text among them": {"size": SIZE, "counts": [80, "40", 2280]},
    "no counts": {"size": SIZE},
    "no size": {"counts": HALF},
    "size turned": {"size": SIZE[::-1], "counts": HALF},
    "huge size": {"size": [2**31 - 1, 2**31 - 1], "counts": HALF},
    "size of text": {"size": "40x60", "counts": HALF},
    "huge run": {"size": SIZE, "counts": [2**62, 2**62, 2**62]},
    "compressed, short": {"size": SIZE, "counts": GOOD[:-1]},
    "compressed, long": {"size": SIZE, "counts": GOOD + "1"},
    "compressed, empty": {"size": SIZE, "counts": ""},
    "compressed, of another size": {"size": [30, 80], "counts": GOOD},
    "compressed, endless run": {"size": SIZE, "counts": "o" * 1000},
    "compressed, garbage": {"size": SIZE, "counts": "\x00\x7f  ~~"},
    "compressed, not ASCII": {"size": SIZE, "counts": "äöü"},
    "compressed, surrogate": {"size": SIZE, "counts": "\ud800"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_annotation_is_dropped_and_counted(tmp_path: Path, name: str) -> None:
    changes, reason = BROKEN[name]
    tree = small_set()
    tree["annotations"] += [annotation(id_, 2, **changes) for id_ in range(10, 17)]
    coco = read_set(tmp_path, tree)
    (dropped,) = coco.dropped
    assert (dropped.reason, dropped.count) == (reason, 7)
    assert dropped.first == tuple(f"id {id_}" for id_ in range(10, 15))
    assert coco.notes() == [f"{coco.origin}: 7 dropped: {reason} (id 10, id 11, id 12, id 13, id 14, ...)"]
    assert len(coco.annotations) == 4
    require_harmless(coco)


@pytest.mark.parametrize("name", BROKEN_RLE)
def test_a_broken_mask_is_dropped_and_counted(tmp_path: Path, name: str) -> None:
    tree = small_set()
    good = annotation(5, segmentation={"size": SIZE, "counts": GOOD}, iscrowd=1)
    tree["annotations"] += [good, annotation(9, segmentation=BROKEN_RLE[name])]
    coco = read_set(tmp_path, tree)
    assert [(dropped.reason, dropped.count) for dropped in coco.dropped] == [(reasons.BAD_RLE, 1)]
    assert len(coco.annotations) == 5
    require_harmless(coco)


def test_a_mask_of_nothing_has_no_area(tmp_path: Path) -> None:
    coco = read_set(
        tmp_path, with_(annotations=[annotation(1, segmentation={"size": SIZE, "counts": [HEIGHT * WIDTH]})])
    )
    assert [(dropped.reason, dropped.count) for dropped in coco.dropped] == [(reasons.NO_AREA, 1)]


def test_a_broken_polygon_costs_only_itself(tmp_path: Path) -> None:
    outline = [[1.0, 2], TRIANGLE, [1, 2, 3, NAN, 5, 6], [1, 2, 1e9, 4, 5, 6]]
    crossing = [5.0, 5, 15, 15, 15, 5, 5, 15]
    partly = [50.0, 10, 70, 10, 70, 30]
    entries = [
        annotation(1, segmentation=outline),
        annotation(2, segmentation=[crossing]),
        annotation(3, segmentation=[partly]),
    ]
    coco = read_set(tmp_path, with_(annotations=entries))
    assert coco.dropped == () and coco.num_broken_parts == 3
    assert [[p.reshape(-1).tolist() for p in each.polygons] for each in coco.objects(0)] == [
        [TRIANGLE],
        [crossing],
        [partly],
    ]
    assert coco.notes() == [f"{coco.origin}: 3 broken polygons left out of kept annotations"]
    require_harmless(coco)


def test_many_reasons_are_told_apart(tmp_path: Path) -> None:
    entries = [annotation(i, **copy.deepcopy(changes)) for i, (changes, _) in enumerate(BROKEN.values())]
    coco = read_set(tmp_path, with_(annotations=[*entries, 17, "x", None, []]))
    counts = {dropped.reason: dropped.count for dropped in coco.dropped}
    expected = [reason for _, reason in BROKEN.values()] + [reasons.NO_OBJECT] * 4
    assert counts == {reason: expected.count(reason) for reason in expected}
    assert len(coco.annotations) == 0
    with pytest.raises(DataError, match="no image has an object to learn from") as caught:
        training_set(coco)
    assert "\n" not in str(caught.value)


# --- D11, D12, D15: ids, empty sets, names ---------------------------------------------------------------------------

REFERENCES = {
    "image ids": (with_(images=[image(1), image(2), image(2)]), "1 image ids that stand twice: 2"),
    "category ids": (with_(categories=[{"id": 7}, {"id": 3}, {"id": 7}]), "1 category ids that stand twice: 7"),
    "annotation ids": (with_(annotations=[annotation(1), annotation(1)]), "1 annotation ids that stand twice: id 1"),
    "unknown image": (with_(annotations=[annotation(8, 99)]), "1 annotations of an unknown image_id: id 8 (99)"),
    "image entry missing": (with_(images=[image(1)]), "2 annotations of an unknown image_id: id 3 (2), id 4 (2)"),
    "unknown category": (
        with_(annotations=[annotation(i, category_id=90 + i) for i in range(7)]),
        "7 annotations of an unknown category_id: id 0 (90), id 1 (91), id 2 (92), id 3 (93), id 4 (94), ...",
    ),
    "no image_id": (with_(annotations=[annotation(8, ...)]), "1 annotations of an unknown image_id: id 8 (none)"),
    "true is no id": (with_(annotations=[annotation(8, True)]), "1 annotations of an unknown image_id: id 8 (none)"),
    "text is no number": (with_(annotations=[annotation(8, "1")]), "1 annotations of an unknown image_id: id 8 (1)"),
    "an image without id": (with_(images=[image(1), image(2), {}, 7]), "2 images without an id"),
    "a category without id": (with_(categories=[{"name": "x"}, None]), "2 categories without an id"),
    "a width of 0": (with_(images=[image(1), image(2, width=0)]), "1 images whose height and width"),
    "a height of text": (with_(images=[image(1, height="40"), image(2)]), "1 images whose height and width"),
    "a height of half": (with_(images=[image(1, height=40.5), image(2)]), "1 images whose height and width"),
    "a huge size": (with_(images=[image(1, height=10**6, width=10**6), image(2)]), "1 images whose height and width"),
    "no file name": (with_(images=[image(1, file_name=...), image(2)]), "1 images without a file_name below the image"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_a_broken_reference_names_its_rule_and_the_first_places(tmp_path: Path, name: str) -> None:
    tree, told = REFERENCES[name]
    assert told in fault(tmp_path, tree)


def test_every_broken_rule_is_told(tmp_path: Path) -> None:
    tree = with_(annotations=[annotation(1, 99), annotation(1), annotation(2, category_id=5)])
    lines = fault(tmp_path, tree).splitlines()
    assert len(lines) == 3
    for word in ("image_id", "category_id", "stand twice"):
        assert sum(word in line for line in lines) == 1


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "", ".", "a\0b", "\ud800", 7, None, ["x"]]
)
def test_a_file_name_stays_below_the_image_folder(tmp_path: Path, name: Any) -> None:
    assert "1 images without a file_name below the image folder: images[0]" in fault(
        tmp_path, with_(images=[image(1, file_name=name), image(2)])
    )


def test_file_names_may_have_folders_and_any_letters(tmp_path: Path) -> None:
    coco = read_set(tmp_path, with_(images=[image(1, file_name="a/./ü b.jpg"), image(2)]))
    assert coco.file_names[0] == "a/ü b.jpg".encode()


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([], "no annotations"),
        ([annotation(1, iscrowd=1), annotation(2, iscrowd=1)], "all 2 annotations are crowds"),
        ([annotation(1, segmentation=[])], f"1 dropped: {reasons.NO_OUTLINE} (id 1)"),
        ([annotation(1, iscrowd=1), annotation(2, bbox=[])], "all 1 annotations are crowds; 1 dropped: bbox"),
    ],
)
def test_a_set_without_objects_is_refused(tmp_path: Path, entries: list, why: str) -> None:
    coco = read_set(tmp_path, with_(annotations=entries))
    assert len(coco) == 2  # it may still be evaluated
    with pytest.raises(DataError) as caught:
        training_set(coco)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_background_is_kept_on_request_and_only_if_it_is_background(tmp_path: Path) -> None:
    entries = [annotation(1), annotation(2, 2, iscrowd=1), annotation(3, 3, segmentation=[])]
    coco = read_set(tmp_path, with_(images=[image(i) for i in (1, 2, 3, 4)], annotations=entries))
    assert training_set(coco).image_ids == (1,)
    assert training_set(coco, keep_background=True).image_ids == (1, 4)


# --- where the files are ---------------------------------------------------------------------------------------------


def test_the_two_files_are_found_by_layout_or_as_given(tmp_path: Path) -> None:
    root = write_set(tmp_path / "a", small_set())
    own = CocoPaths(root / "annotations" / "instances_train2017.json", root / "train2017")
    assert coco_paths(root, "train") == own
    assert coco_paths(None, "train", own.json, own.images) == own
    other = write_set(tmp_path / "b", small_set(), "val")
    assert coco_paths(root, "val", other / "annotations" / "instances_val2017.json", other / "val2017").json.is_file()


@pytest.mark.parametrize(
    ("split", "arguments", "told"),
    [
        ("val", {}, "instances_val2017.json: no such file; expected annotations/instances_{train,val}2017.json and"),
        ("val", {"json": True}, "val2017: no such folder; expected the images there, or val_images=PATH"),
        ("train", {"data": None}, "no train_json: give data=ROOT in COCO's layout"),
        ("train", {"data": None, "json": True}, "no train_images: give data=ROOT in COCO's layout"),
    ],
)
def test_what_is_missing_is_told_with_its_key(tmp_path: Path, split: str, arguments: dict, told: str) -> None:
    root = write_set(tmp_path, small_set())
    own = root / "annotations" / "instances_train2017.json"
    with pytest.raises(DataError) as caught:
        coco_paths(arguments.get("data", root), split, own if "json" in arguments else None)
    assert told in str(caught.value) and "\n" not in str(caught.value)
