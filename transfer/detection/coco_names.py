"""What classes are called: COCO's eighty, and those of any COCO-format JSON."""

from pathlib import Path
from typing import NamedTuple

from core.errors import DataError, shown
from transfer.detection.coco import Id, id_of
from transfer.detection.strict_json import read_json

EXPECTED = "a COCO-format JSON with categories, each with an id of its own and a name"
COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of 1 to 90: categories that were never annotated


class Categories(NamedTuple):
    """Names and ids in the order of the labels, and where they are from."""

    names: tuple[str, ...]
    ids: tuple[Id, ...]
    origin: str


COCO = Categories(COCO_NAMES, tuple(id_ for id_ in range(1, 91) if id_ not in UNUSED_IDS), "COCO")


def read_categories(path: Path) -> Categories:
    """The categories of a COCO-format JSON, by id as the labels are; whatever else it holds. Raises: DataError."""
    tree = read_json(path, EXPECTED)
    entries = tree.get("categories") if isinstance(tree, dict) else None
    entries = entries if isinstance(entries, list) else []
    named = {id_: entry["name"] for entry in entries if (id_ := id_of(entry, "id")) is not None and "name" in entry}
    if not named or len(named) != len(entries):
        raise DataError(f"{shown(path)}: categories are missing, or some without a name or an id; expected {EXPECTED}")
    ids = tuple(sorted(named, key=lambda id_: (isinstance(id_, str), id_)))
    return Categories(tuple(str(named[id_]) for id_ in ids), ids, shown(path))
