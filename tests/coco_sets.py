"""Small COCO data sets, drawn and made up, whole and broken."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from transfer.detection.coco import CocoSet
from transfer.detection.coco_file import coco_paths, read_coco

Tree = dict[str, Any]
WIDTH, HEIGHT = 60, 40
TRIANGLE = [5.0, 6.0, 15.0, 6.0, 5.0, 16.0]


def annotation(id_: int, image_id: Any = 1, category_id: Any = 7, **changes: Any) -> Tree:
    """A triangle; a change to `...` leaves a key out."""
    entry = {
        "id": id_, "image_id": image_id, "category_id": category_id, "iscrowd": 0, "bbox": [5.0, 6.0, 10.0, 10.0],
        "area": 50.0, "segmentation": [TRIANGLE], **changes,
    }  # fmt: skip
    return {key: value for key, value in entry.items() if value is not ...}


def image(id_: Any, **changes: Any) -> Tree:
    entry = {"id": id_, "file_name": f"{id_}.jpg", "height": HEIGHT, "width": WIDTH, **changes}
    return {key: value for key, value in entry.items() if value is not ...}


def small_set() -> Tree:
    """Two images with two annotations each."""
    return {
        "images": [image(1), image(2)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [annotation(1), annotation(2, category_id=3), annotation(3, 2), annotation(4, 2)],
    }


def with_(**changes: Any) -> Tree:
    """The small set with other top-level values."""
    return {**copy.deepcopy(small_set()), **changes}


def write_set(root: Path, tree: Any, split: str = "train", draw: bool = False) -> Path:
    """A data set in COCO's layout; `tree` may be its bytes."""
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tree if isinstance(tree, bytes) else json.dumps(tree).encode())
    folder = root / f"{split}2017"
    folder.mkdir(exist_ok=True)
    if draw:
        rng = np.random.default_rng(0)
        for entry in tree["images"]:
            pixels = rng.integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / entry["file_name"], quality=95)
    return root


def read_set(root: Path, tree: Any, draw: bool = False) -> CocoSet:
    return read_coco(coco_paths(write_set(root, tree, draw=draw), "train"))
