"""Reads a COCO-format JSON into a `CocoSet`, and finds the two files of a data set."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from core.errors import DataError, shown
from transfer.detection.annotation_reader import keep, refer
from transfer.detection.coco import NUM_SHOWN, CocoSet, Id, id_of
from transfer.detection.strict_json import read_json, whole_number

EXPECTED = "a COCO-format JSON with images, annotations and categories"
SPLITS = ("train", "val")
LAYOUT = ("annotations/instances_{split}2017.json", "{split}2017")  # JSON and image folder below data=
MAX_PIXELS = 178_000_000  # of an image; Pillow has no more


@dataclass(frozen=True)
class CocoPaths:
    """Where one split lies: its JSON, and the folder that its file names are relative to."""

    json: Path
    images: Path


def coco_paths(data: Path | None, split: str, json: Path | None = None, images: Path | None = None) -> CocoPaths:
    """The JSON and the image folder of a split, by COCO's own layout below `data` or as given.

    Args:
        split: train or val.
        json, images: what the keys {split}_json and {split}_images say; each wins over the layout.
    Raises: DataError for what is missing, with the keys that would name it.
    """
    by_layout = [data / part.format(split=split) if data else None for part in LAYOUT]
    found_json, found_images = json or by_layout[0], images or by_layout[1]
    for key, path in ((f"{split}_json", found_json), (f"{split}_images", found_images)):
        if path is None:
            raise DataError(f"no {key}: give data=ROOT in COCO's layout ({layout_text()}), or {key}=PATH")
    assert found_json is not None and found_images is not None, "both were looked at"
    if not found_json.is_file():
        raise DataError(
            f"{shown(found_json)}: no such file; expected {layout_text()} below data=, or {split}_json=PATH"
        )
    if not found_images.is_dir():
        raise DataError(f"{shown(found_images)}: no such folder; expected the images there, or {split}_images=PATH")
    return CocoPaths(found_json, found_images)


def layout_text() -> str:
    """COCO's layout in words."""
    names = [part.format(split="{train,val}") for part in LAYOUT]
    return " and ".join(names)


def read_coco(paths: CocoPaths) -> CocoSet:
    """Read, check and index one file. Spec detection 1.1.

    Raises: DataError, one line where the file is no JSON or no COCO, or one line for each rule about ids, images and
        categories that is broken, with the first five places.
    """
    tree = read_json(paths.json, EXPECTED)
    _require_coco(paths.json, tree)
    faults = _Faults()
    label_of, category_ids, names = _read_categories(tree["categories"], faults)
    images = _read_images(tree["images"], faults)
    faults.refuse(paths.json)  # what refers to them would only repeat it
    rows: dict[Id | None, int] = {image.id: row for row, image in enumerate(images)}
    sizes = np.array([(image.height, image.width) for image in images], dtype=np.int32)
    referred, broken = refer(tree["annotations"], rows, label_of)
    for rule, places in broken.items():
        faults.add(rule, places)
    faults.refuse(paths.json)
    read = keep(tree["annotations"], referred, sizes.tolist())
    return CocoSet(
        origin=paths.json,
        folder=paths.images,
        image_ids=tuple(image.id for image in images),
        category_ids=category_ids,
        names=names,
        file_names=np.array([image.file_name for image in images], dtype=np.bytes_),
        sizes=sizes,
        spans=read.spans,
        annotations=read.annotations,
        had_objects=read.had_objects,
        dropped=read.dropped,
        num_broken_parts=read.num_broken_parts,
    )


@dataclass
class _Faults:
    """Rules about ids that the file breaks, with the places."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rule: str, places: Iterable[str]) -> None:
        self.found.setdefault(rule, []).extend(places)

    def refuse(self, path: Path) -> None:
        lines = []
        for rule, places in self.found.items():
            if places:
                more = ", ..." if len(places) > NUM_SHOWN else ""
                first = ", ".join(places[:NUM_SHOWN])
                lines.append(f"{shown(path)}: {len(places)} {rule}: {first}{more}")
        if lines:
            raise DataError("\n".join(lines))


def _require_coco(path: Path, tree: Any) -> None:
    if not isinstance(tree, dict):
        what = "a list" if isinstance(tree, list) else "a single value"
        hint = ""
        if isinstance(tree, list) and tree and isinstance(tree[0], dict) and "score" in tree[0]:
            hint = " (this one holds detections)"
        raise DataError(f"{shown(path)}: {what} at the top level{hint}; expected {EXPECTED}")
    missing = [key for key in ("images", "annotations", "categories") if key not in tree]
    if missing:
        raise DataError(f"{shown(path)}: no {' and no '.join(missing)}; expected {EXPECTED}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(tree[key], list):
            raise DataError(f"{shown(path)}: {key}: expected a list")
    for key in ("images", "categories"):
        if not tree[key]:
            raise DataError(f"{shown(path)}: {key}: an empty list; expected at least one")


def _read_categories(
    entries: list[Any], faults: _Faults
) -> tuple[dict[Id | None, int], tuple[Id, ...], tuple[str, ...]]:
    """Label by id, ids ascending, and names in that order."""
    named: dict[Id, str] = {}
    for place, entry in enumerate(entries):
        where = f"categories[{place}]"
        id_ = id_of(entry, "id")
        if id_ is None:
            faults.add("categories without an id (a whole number or text)", [where])
        elif id_ in named:
            faults.add("category ids that stand twice", [_shown_id(id_)])
        else:
            name = entry.get("name", id_)
            named[id_] = name if isinstance(name, str) and name else str(name)
    ids = tuple(sorted(named, key=_id_order))
    names = [named[id_] for id_ in ids]
    unique = [f"{name} ({id_})" if names.count(name) > 1 else name for name, id_ in zip(names, ids, strict=True)]
    return {id_: label for label, id_ in enumerate(ids)}, ids, tuple(unique)


@dataclass(frozen=True, slots=True)
class _Image:
    id: Id
    file_name: bytes
    height: int
    width: int


def _read_images(entries: list[Any], faults: _Faults) -> list[_Image]:
    """Images by id."""
    images: dict[Id, _Image] = {}
    for place, entry in enumerate(entries):
        where = f"images[{place}]"
        id_ = id_of(entry, "id")
        if id_ is None:
            faults.add("images without an id (a whole number or text)", [where])
            continue
        if id_ in images:
            faults.add("image ids that stand twice", [_shown_id(id_)])
        file_name = _file_name(entry.get("file_name"))
        if file_name is None:
            faults.add("images without a file_name below the image folder", [where])
        height, width = (whole_number(entry.get(key)) or 0 for key in ("height", "width"))
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            faults.add(f"images whose height and width are not at least 1 and at most {MAX_PIXELS} px", [where])
        images[id_] = _Image(id_, file_name or b"", height, width)
    return sorted(images.values(), key=lambda image: _id_order(image.id))


def _file_name(name: Any) -> bytes | None:
    """A relative path that stays below its folder, as bytes; None for anything else."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    try:
        return str(path).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None


def _id_order(id_: Id) -> tuple[bool, Id]:
    return isinstance(id_, str), id_


def _shown_id(id_: Id) -> str:
    return shown(str(id_))[:40]
