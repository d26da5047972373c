"""Annotations of a COCO file, one by one: checked, kept in flat arrays, or dropped and counted by reason."""

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.errors import shown
from transfer.detection.coco import NUM_SHOWN, Annotations, Dropped, Id, id_of
from transfer.detection.rle import BadMask, Rle, rasterised, rle_of, runs_of

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


@dataclass
class AnnotationReader:
    """Takes annotations one by one, then gives the tables.

    Attributes:
        rows: index of each image by its id.
        label_of: label of each category by its id.
        sizes: (height, width) of each image.
        num_broken_parts: polygons left out of annotations that are kept for their other polygons.
    """

    rows: Mapping[Id, int]
    label_of: Mapping[Id, int]
    sizes: Sequence[tuple[int, int]]
    num_broken_parts: int = 0
    _images: array = field(default_factory=lambda: array("q"))  # index of the image of each kept annotation
    _labels: array = field(default_factory=lambda: array("l"))
    _boxes: array = field(default_factory=lambda: array("d"))
    _areas: array = field(default_factory=lambda: array("d"))
    _crowd: array = field(default_factory=lambda: array("b"))
    _parts: array = field(default_factory=lambda: array("q", [0]))
    _ends: array = field(default_factory=lambda: array("q", [0]))
    _points: array = field(default_factory=lambda: array("d"))
    _rles: dict[int, Rle] = field(default_factory=dict)
    _reasons: Counter[str] = field(default_factory=Counter)
    _first: dict[str, list[str]] = field(default_factory=dict)
    _had_objects: set[int] = field(default_factory=set)
    _ids: set[Id] = field(default_factory=set)
    _references: dict[str, list[str]] = field(default_factory=dict)

    def add(self, place: int, entry: Any) -> None:
        """Keep one annotation, or count why not."""
        id_ = id_of(entry, "id")
        where = f"annotations[{place}]" if id_ is None else f"id {shown(str(id_))[:40]}"
        try:
            if not isinstance(entry, dict):
                raise _Broken(NO_OBJECT)
            image, label = self._refer(entry, id_, where)
            if image is not None and label is not None:
                self._keep(entry, image, label)
        except _Broken as broken:
            self._count(str(broken), where)

    def _count(self, reason: str, where: str) -> None:
        self._reasons[reason] += 1
        if self._reasons[reason] <= NUM_SHOWN:
            self._first.setdefault(reason, []).append(where)

    def _refer(self, entry: dict[str, Any], id_: Id | None, where: str) -> tuple[int | None, int | None]:
        """Index of the image and label, None where there is no such image or category."""
        if id_ is not None:
            if id_ in self._ids:
                self._references.setdefault("annotation ids that stand twice", []).append(where)
            self._ids.add(id_)
        found = []
        for key, known in (("image_id", self.rows), ("category_id", self.label_of)):
            other = id_of(entry, key)
            index = None if other is None else known.get(other)
            if index is None:
                named = "none" if other is None else shown(str(other))[:40]
                self._references.setdefault(f"annotations of an unknown {key}", []).append(f"{where} ({named})")
            found.append(index)
        if found[0] is not None:
            self._had_objects.add(found[0])
        return found[0], found[1]

    def _keep(self, entry: dict[str, Any], image: int, label: int) -> None:
        height, width = self.sizes[image]
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):  # True and 1.0 are 1
            raise _Broken(BAD_CROWD)
        box = _checked_box(entry.get("bbox"), height, width)
        outline = entry.get("segmentation")
        if isinstance(outline, dict):
            polygons, rle = [], _checked_rle(outline, height, width)
        else:
            polygons, rle = self._checked_polygons(outline, height, width), None
        self._images.append(image)
        self._labels.append(label)
        self._boxes.extend(box)
        self._crowd.append(int(crowd))
        self._areas.append(_area(entry.get("area"), polygons, rle, height, width))
        for polygon in polygons:
            self._points.extend(polygon)
            self._ends.append(len(self._points) // 2)
        self._parts.append(len(self._ends) - 1)
        if rle is not None:
            self._rles[len(self._images) - 1] = rle

    def _checked_polygons(self, outline: Any, height: int, width: int) -> list[list[float]]:
        """The whole polygons of an annotation. Raises: _Broken if there are none, or they cover nothing."""
        if not outline:
            raise _Broken(NO_OUTLINE)
        if not isinstance(outline, list) or not all(isinstance(polygon, list) for polygon in outline):
            raise _Broken(NO_SHAPE)
        kept, last = [], ""
        for polygon in outline:
            fault = _polygon_fault(polygon, height, width)
            if fault is None:
                kept.append(polygon)
            else:
                last = fault
        if not kept:
            raise _Broken(last)
        sides = []
        for axis, length in ((0, width), (1, height)):
            low = min(min(polygon[axis::2]) for polygon in kept)
            high = max(max(polygon[axis::2]) for polygon in kept)
            if low >= length or high <= 0:
                raise _Broken(OUTSIDE)
            sides.append(high - low)
        if min(sides) <= MIN_SIDE_PX:
            raise _Broken(NO_AREA)
        self.num_broken_parts += len(outline) - len(kept)
        return kept

    def broken_references(self) -> dict[str, list[str]]:
        """Places by rule, where ids are unknown or stand twice: each makes the file unusable."""
        return self._references

    def dropped(self) -> tuple[Dropped, ...]:
        """What was left out, most frequent reason first."""
        return tuple(
            Dropped(reason, count, tuple(self._first[reason])) for reason, count in self._reasons.most_common()
        )

    def tables(self) -> tuple[Annotations, np.ndarray, np.ndarray]:
        """The kept annotations by image; first and after-last of each image [N, 2]; which images had any [N]."""
        images = np.array(self._images, dtype=np.int64)
        order = np.argsort(images, kind="stable")
        counts = np.bincount(images, minlength=len(self.sizes))
        stops = np.cumsum(counts)
        had_objects = np.zeros(len(self.sizes), dtype=bool)
        had_objects[list(self._had_objects)] = True
        return self._sorted(order), np.stack([stops - counts, stops], axis=1), had_objects

    def _sorted(self, order: np.ndarray) -> Annotations:
        first, ends = np.array(self._parts), np.array(self._ends)
        parts = _in_order(first, order)  # polygons in the new order
        rows = _in_order(ends, parts)  # points in the new order
        place = np.argsort(order)
        return Annotations(
            labels=np.array(self._labels, dtype=np.int32)[order],
            xywh=np.array(self._boxes).reshape(-1, 4)[order],
            areas=np.array(self._areas)[order],
            crowd=np.array(self._crowd, dtype=bool)[order],
            parts=_offsets(np.diff(first)[order]),
            ends=_offsets(np.diff(ends)[parts]),
            points=np.array(self._points).reshape(-1, 2)[rows],
            rles={int(place[old]): rle for old, rle in self._rles.items()},
        )


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _in_order(offsets: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Members offsets[g]:offsets[g+1] of the groups g in the given order, one after the other."""
    counts = np.diff(offsets)[order]
    begins = np.repeat(offsets[order] - _offsets(counts)[:-1], counts)
    return begins + np.arange(counts.sum())


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
    if isinstance(area, int | float) and not isinstance(area, bool) and 0 <= area < math.inf:
        return float(area)
    if rle is None:
        rle = rasterised([np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons], height, width)
    return float(runs_of(rle)[1::2].sum())
