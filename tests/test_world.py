"""The demo's world: its layouts hold what real loaders expect, and its three views of a scene agree."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.world import KINDS, draw_world

NUM_TRAIN, NUM_VAL = 80, 40
SPLITS = (("train2017", "training", NUM_TRAIN // 4), ("val2017", "validation", NUM_VAL // 4))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "world"
    draw_world(root, num_train=NUM_TRAIN, num_val=NUM_VAL)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read_coco(root: Path, split: str) -> dict:
    return json.loads((root / "coco" / "annotations" / f"instances_{split}.json").read_text())


def decode_rle(rle: dict) -> np.ndarray:
    values = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(values, rle["counts"]).reshape(rle["size"], order="F")


@pytest.mark.parametrize(("split", "per_kind"), [("train", NUM_TRAIN // 10), ("val", NUM_VAL // 10)])
def test_imagefolder_has_balanced_kinds(world: Path, split: str, per_kind: int) -> None:
    folders = sorted((world / "imagefolder" / split).iterdir())
    assert [folder.name for folder in folders] == sorted(KINDS)
    for folder in folders:
        files = sorted(folder.iterdir())
        assert [file.name for file in files] == [f"{i:04d}.png" for i in range(per_kind)]
        with Image.open(files[0]) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))


@pytest.mark.parametrize(("coco", "ade", "num_scenes"), SPLITS)
def test_scenes_are_complete_in_both_layouts(world: Path, coco: str, ade: str, num_scenes: int) -> None:
    truth = read_coco(world, coco)
    assert truth["categories"] == [{"id": i + 1, "name": kind} for i, kind in enumerate(KINDS)]
    assert (world / "ade20k" / "classes.txt").read_text().split() == list(KINDS)
    assert len(truth["images"]) == num_scenes
    assert {a["category_id"] for a in truth["annotations"]} == set(range(1, 11))
    assert len({a["id"] for a in truth["annotations"]}) == len(truth["annotations"])

    names = {image["file_name"] for image in truth["images"]}
    stems = {Path(name).stem for name in names}
    assert {file.name for file in (world / "coco" / coco).iterdir()} == names
    assert {file.name for file in (world / "ade20k/images" / ade).iterdir()} == names
    assert {file.name for file in (world / "ade20k/annotations" / ade).iterdir()} == {f"{stem}.png" for stem in stems}
    for image in truth["images"]:
        jpeg = world / "coco" / coco / image["file_name"]
        assert jpeg.read_bytes() == (world / "ade20k/images" / ade / image["file_name"]).read_bytes()
        with Image.open(jpeg) as opened:
            assert opened.size == (image["width"], image["height"])
        assert image["height"] == 128 and 128 <= image["width"] <= 160


@pytest.mark.parametrize(("coco", "ade", "num_scenes"), SPLITS)
def test_box_area_mask_and_label_agree(world: Path, coco: str, ade: str, num_scenes: int) -> None:
    truth = read_coco(world, coco)
    for image in truth["images"]:
        with Image.open(world / "ade20k/annotations" / ade / f"{Path(image['file_name']).stem}.png") as png:
            assert png.mode == "L"
            labels = np.asarray(png)
        from_masks = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in (a for a in truth["annotations"] if a["image_id"] == image["id"]):
            mask = decode_rle(annotation["segmentation"])
            assert not from_masks[mask].any(), "two instances claim one pixel"
            from_masks[mask] = annotation["category_id"]
            x, y, width, height = annotation["bbox"]
            inside = mask[y : y + height, x : x + width]
            assert annotation["area"] == mask.sum() == inside.sum() > 0
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any(), "box is loose"
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()), "shape is cut off"
        np.testing.assert_array_equal(from_masks, labels)


def test_the_same_objects_are_told_with_and_without_their_kinds(world: Path) -> None:
    kinds = read_coco(world, "val2017")
    shapes = json.loads((world / "coco/annotations/shapes_val2017.json").read_text())
    assert [category["name"] for category in shapes["categories"]] == ["shape"]
    assert shapes["images"] == kinds["images"]
    assert shapes["annotations"] == [annotation | {"category_id": 1} for annotation in kinds["annotations"]]


def test_a_shape_differs_from_its_ground(world: Path) -> None:
    """The drawn pixels are where the mask says: the ground just outside the mask looks unlike the inside."""
    truth = read_coco(world, "train2017")
    files = {image["id"]: image["file_name"] for image in truth["images"]}
    gaps = []
    for annotation in truth["annotations"]:
        with Image.open(world / "coco/train2017" / files[annotation["image_id"]]) as opened:
            pixels = np.asarray(opened, np.float32)
        mask = decode_rle(annotation["segmentation"])
        x, y, width, height = annotation["bbox"]
        box = np.zeros_like(mask)
        box[y : y + height, x : x + width] = True
        gaps.append(np.linalg.norm(pixels[mask].mean(axis=0) - pixels[box & ~mask].mean(axis=0)))
    assert min(gaps) > 15.0 and np.mean(gaps) > 60.0  # of 255


def test_some_training_scene_is_empty_even_in_the_smallest_world(tmp_path: Path) -> None:
    draw_world(tmp_path / "world", num_train=10, num_val=10, object_size_px=16, scene_size_px=32)
    truth = read_coco(tmp_path / "world", "train2017")
    annotated = {annotation["image_id"] for annotation in truth["annotations"]}
    assert len(truth["images"]) == 2 and len(annotated) == 1


def test_a_larger_world_begins_with_the_smaller_one(world: Path, tmp_path: Path) -> None:
    draw_world(tmp_path / "larger", num_train=NUM_TRAIN + 20, num_val=NUM_VAL)
    small, large = contents(world), contents(tmp_path / "larger")
    described = {"world.json", *(f"coco/annotations/{what}_train2017.json" for what in ("instances", "shapes"))}
    assert small.keys() < large.keys()
    assert {name for name in small if small[name] != large[name]} == described
    first = read_coco(world, "train2017")["annotations"]
    assert read_coco(tmp_path / "larger", "train2017")["annotations"][: len(first)] == first


def test_seeds_splits_and_numbers_draw_different_pictures(world: Path, tmp_path: Path) -> None:
    draw_world(tmp_path / "other", num_train=10, num_val=10, seed=1)
    drawn = [
        path.read_bytes()
        for root in (world, tmp_path / "other")
        for path in (*root.glob("imagefolder/*/*/*.png"), *root.glob("coco/*/*.jpg"))
    ]
    assert len(drawn) == 120 + 30 + 20 + 4
    assert len(set(drawn)) == len(drawn)


def test_rerun_changes_nothing(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    draw_world(world, num_train=NUM_TRAIN, num_val=NUM_VAL)
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before
    assert list(world.parent.iterdir()) == [world], "a partial folder was left behind"


def test_other_arguments_are_refused_naming_both(world: Path) -> None:
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 7"):
        draw_world(world, num_train=NUM_TRAIN, num_val=NUM_VAL, seed=7)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="no world"):
        draw_world(tmp_path, num_train=10, num_val=10)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("wrong", [{"num_train": 9}, {"num_val": 0}, {"seed": -1}, {"scene_size_px": 8}])
def test_out_of_range_arguments_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
        draw_world(tmp_path / "world", **({"num_train": 10, "num_val": 10} | wrong))


def test_a_failed_run_leaves_no_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("tools.world.shutil.copyfile", full_disk)
    with pytest.raises(OSError, match="no space left"):
        draw_world(tmp_path / "world", num_train=10, num_val=10)
    assert list(tmp_path.iterdir()) == []
