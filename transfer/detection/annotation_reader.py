"""Annotations of a COCO file: what they refer to, then one by one kept in flat arrays, or dropped and counted."""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from core.errors import shown
from transfer.detection.coco import NUM_SHOWN, Annotations, Dropped, Id, id_of
from transfer.detection.rle import BadMask, Rle, rasterised, rle_of, runs_of

MAX_AREA_PX = 1e12  # more is as good as infinite
MIN_SIDE_PX = 1e-5  # thinner is nothing; the same bound as after the augmentation

NO_OUTLINE = "no segmentation"
NO_SHAPE = "segmentation is neither polygons nor run lengths"
FEW_POINTS = "polygons of fewer than three points, or with an odd number of values"
NO_NUMBERS = "coordinates that are no numbers"
NOT_FINITE = "coordinates that are NaN or infinite"
FAR_AWAY = "coordinates more than an image away from the image"
OUTSIDE = "wholly outside the image"
NO_AREA = "no width or no height"
BAD_RLE = "run lengths that are no mask of the image"
BAD_BOX = "bbox is not four numbers"
BAD_CROWD = "iscrowd is neither 0 nor 1"
NO_OBJECT = "not an object"


class _Broken(Exception):  # noqa: N818  it ends an annotation, not a run
    """Why an annotation is dropped."""


class Referred(NamedTuple):
    """An annotation whose image and category are known."""

    image: int  # index of its image
    label: int
    where: str  # its place in the file, for messages
    entry: dict[str, Any]


class ReadAnnotations(NamedTuple):
    """What became of all annotations; see `CocoSet` for what each is."""

    annotations: Annotations
    spans: np.ndarray
    had_objects: np.ndarray
    dropped: tuple[Dropped, ...]
    num_broken_parts: int


def refer(
    entries: Sequence[Any], rows: Mapping[Id | None, int], label_of: Mapping[Id | None, int]
) -> tuple[list[Referred], dict[str, list[str]]]:
    """Look up image and category of each annotation.

    Args:
        rows: index of each image by its id. label_of: label of each category by its id.
    Returns: the annotations by image, those of one image in the order of the file; places by broken rule, each of which
        makes the file unusable. What is no JSON object is passed over here, and counted by `keep`.
    """
    referred: list[Referred] = []
    broken: dict[str, list[str]] = {}
    ids: set[Id] = set()
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict):
            continue
        id_ = id_of(entry, "id")
        where = f"annotations[{place}]" if id_ is None else f"id {shown(str(id_))[:40]}"
        if id_ is not None:
            if id_ in ids:
                broken.setdefault("annotation ids that stand twice", []).append(where)
            ids.add(id_)
        image, label = rows.get(id_of(entry, "image_id")), label_of.get(id_of(entry, "category_id"))
        for key, index in (("image_id", image), ("category_id", label)):
            if index is None:
                other = id_of(entry, key)
                named = "none" if other is None else shown(str(other))[:40]
                broken.setdefault(f"annotations of an unknown {key}", []).append(f"{where} ({named})")
        if image is not None and label is not None:
            referred.append(Referred(image, label, where, entry))
    return sorted(referred, key=lambda each: each.image), broken


def keep(entries: Sequence[Any], referred: Sequence[Referred], sizes: Sequence[tuple[int, int]]) -> ReadAnnotations:
    """Check every annotation; keep what is whole, count by reason what is not.

    Args:
        entries: of the file. referred: those of `refer`, by image. sizes: (height, width) of each image.
    """
    table = _Table()
    places: dict[str, list[str]] = {}  # by reason
    no_objects = [f"annotations[{place}]" for place, entry in enumerate(entries) if not isinstance(entry, dict)]
    if no_objects:
        places[NO_OBJECT] = no_objects
    for each in referred:
        try:
            table.add(each, *sizes[each.image])
        except _Broken as broken:
            places.setdefault(str(broken), []).append(each.where)
    counts = np.bincount(np.array(table.images, dtype=np.int64), minlength=len(sizes))
    stops = np.cumsum(counts)
    had_objects = np.zeros(len(sizes), dtype=bool)
    had_objects[[each.image for each in referred]] = True
    reasons = sorted(places, key=lambda reason: -len(places[reason]))
    return ReadAnnotations(
        annotations=table.annotations(),
        spans=np.stack([stops - counts, stops], axis=1),
        had_objects=had_objects,
        dropped=tuple(Dropped(each, len(places[each]), tuple(places[each][:NUM_SHOWN])) for each in reasons),
        num_broken_parts=table.num_broken_parts,
    )


class _Table:
    """Kept annotations as flat arrays that grow."""

    def __init__(self) -> None:
        self.images, self.labels, self.crowd = array("q"), array("l"), array("b")
        self.xywh, self.areas, self.points = array("d"), array("d"), array("d")
        self.parts, self.ends = array("q", [0]), array("q", [0])
        self.rles: dict[int, Rle] = {}
        self.num_broken_parts = 0

    def add(self, each: Referred, height: int, width: int) -> None:
        """Keep one annotation of an image of height x width. Raises: _Broken."""
        entry = each.entry
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):  # true is 1
            raise _Broken(BAD_CROWD)
        box = _checked_box(entry.get("bbox"), height, width)
        outline = entry.get("segmentation")
        polygons: list[list[float]] = []
        rle = None
        if isinstance(outline, dict):
            rle = _checked_rle(outline, height, width)
            self.rles[len(self.images)] = rle
        else:
            polygons = _checked_polygons(outline, height, width)
            self.num_broken_parts += len(outline or ()) - len(polygons)
        self.images.append(each.image)
        self.labels.append(each.label)
        self.crowd.append(int(crowd))
        self.xywh.extend(box)
        self.areas.append(_area(entry.get("area"), polygons, rle, height, width))
        for polygon in polygons:
            self.points.extend(polygon)
            self.ends.append(len(self.points) // 2)
        self.parts.append(len(self.ends) - 1)

    def annotations(self) -> Annotations:
        """All that was kept."""
        return Annotations(
            labels=np.array(self.labels, dtype=np.int32),
            xywh=np.array(self.xywh).reshape(-1, 4),
            areas=np.array(self.areas),
            crowd=np.array(self.crowd, dtype=bool),
            parts=np.array(self.parts),
            ends=np.array(self.ends),
            points=np.array(self.points).reshape(-1, 2),
            rles=self.rles,
        )


def _checked_polygons(outline: Any, height: int, width: int) -> list[list[float]]:
    """The whole polygons of an annotation. Raises: _Broken if there are none, or they cover nothing."""
    if not outline:
        raise _Broken(NO_OUTLINE)
    if not isinstance(outline, list) or not all(isinstance(polygon, list) for polygon in outline):
        raise _Broken(NO_SHAPE)
    faults = [_polygon_fault(polygon, height, width) for polygon in outline]
    whole = [polygon for polygon, fault in zip(outline, faults, strict=True) if fault is None]
    if not whole:
        raise _Broken(faults[0])
    for axis, length in ((0, width), (1, height)):
        low = min(min(polygon[axis::2]) for polygon in whole)
        high = max(max(polygon[axis::2]) for polygon in whole)
        if low >= length or high <= 0:
            raise _Broken(OUTSIDE)
        if high - low <= MIN_SIDE_PX:
            raise _Broken(NO_AREA)
    return whole


def _checked_box(box: Any, height: int, width: int) -> list[float]:
    """COCO's xywh. Raises: _Broken."""
    if not isinstance(box, list) or len(box) != 4:
        raise _Broken(BAD_BOX)
    fault = _number_fault(box)
    if fault:
        raise _Broken(fault if fault == NOT_FINITE else BAD_BOX)
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0:
        raise _Broken(NO_AREA)
    if x < -width or y < -height or x + w > 2 * width or y + h > 2 * height:
        raise _Broken(FAR_AWAY)
    return [x, y, w, h]


def _checked_rle(outline: dict[str, Any], height: int, width: int) -> Rle:
    try:
        rle = rle_of(outline, height, width)
    except BadMask:
        raise _Broken(BAD_RLE) from None
    if not runs_of(rle)[1::2].any():
        raise _Broken(NO_AREA)
    return rle


def _polygon_fault(values: list[Any], height: int, width: int) -> str | None:
    if len(values) < 6 or len(values) % 2:
        return FEW_POINTS
    fault = _number_fault(values)
    if fault:
        return fault
    xs, ys = values[0::2], values[1::2]
    if min(xs) < -width or max(xs) > 2 * width or min(ys) < -height or max(ys) > 2 * height:
        return FAR_AWAY
    return None


def _number_fault(values: list[Any]) -> str | None:
    """What makes values no finite numbers: one sum in C, for there are tens of millions of them."""
    try:
        return None if math.isfinite(sum(values)) else NOT_FINITE
    except TypeError:
        return NO_NUMBERS
    except OverflowError:  # a whole number beyond any float
        return NOT_FINITE


def _area(area: Any, polygons: list[list[float]], rle: Rle | None, height: int, width: int) -> float:
    """The annotated area, or where there is none that of the mask."""
    if type(area) in {int, float} and 0 <= area < MAX_AREA_PX:
        return float(area)
    if rle is None:
        rle = rasterised([np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons], height, width)
    return float(runs_of(rle)[1::2].sum())
