"""A data set in COCO's format: images, categories and annotations, read once, checked, and held in flat arrays.

What cannot be trusted is told apart by what it would do. A file that is no JSON or no COCO, an id that is missing or
stands twice, an annotation of an unknown image or category: the data set is not what its author thinks, and it is
refused with every rule that is broken. A single annotation that is broken is dropped and counted, by reason. Nothing
else later looks at the JSON, and nothing that is kept can harm the C code that draws and compares masks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from core.datasets import ImageSource
from core.errors import DataError, shown
from transfer.detection.rle import Rle
from transfer.detection.strict_json import whole_number

NUM_SHOWN = 5  # places named of what is dropped or refused

Id = int | str  # of an image or a category; COCO has numbers, with holes


def id_of(entry: Any, key: str) -> Id | None:
    """The id under a key of a JSON object: a whole number (7 and 7.0 are one) or text; None for anything else."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, str) else whole_number(value)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of an image, in pixels of the image as stored.

    Attributes:
        label: 0..K-1, the rank of its category id.
        box: xyxy float64 [4], as annotated.
        area: in pixels, as annotated; where it is not, the area of the mask.
        crowd: a region of many objects, neither learned nor counted as missed.
        polygons: parts, each float64 [P, 2] xy, P >= 3; () where there is an `rle`.
        rle: the mask, where it is no polygon.
    """

    label: int
    box: np.ndarray
    area: float
    crowd: bool
    polygons: tuple[np.ndarray, ...]
    rle: Rle | None


@dataclass(frozen=True, slots=True)
class Dropped:
    """Annotations left out for one reason: how many, and where the first five of them are."""

    reason: str
    count: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count} dropped: {self.reason} ({', '.join(self.first)}{more})"


@dataclass(frozen=True)
class Annotations:
    """All kept annotations of a file, A of them, in the order of the images, and of the file within an image.

    Attributes:
        labels: int32 [A]. xywh: float64 [A, 4], boxes as annotated. areas: float64 [A]. crowd: bool [A].
        parts: int64 [A + 1]; polygons parts[a] to parts[a + 1] belong to annotation a.
        ends: int64 [polygons + 1]; rows ends[p] to ends[p + 1] of `points` belong to polygon p.
        points: float64 [*, 2] xy.
        rles: masks of the annotations that have no polygons, by index.
    """

    labels: np.ndarray
    xywh: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    parts: np.ndarray
    ends: np.ndarray
    points: np.ndarray
    rles: dict[int, Rle]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Annotation:
        polygons = tuple(
            self.points[self.ends[part] : self.ends[part + 1]]
            for part in range(self.parts[index], self.parts[index + 1])
        )
        return Annotation(
            label=int(self.labels[index]),
            box=self.xywh[index] + np.array([0, 0, *self.xywh[index, :2]]),
            area=float(self.areas[index]),
            crowd=bool(self.crowd[index]),
            polygons=polygons,
            rle=self.rles.get(index),
        )


@dataclass(frozen=True, repr=False)
class CocoSet:
    """Images in the order of their ids, with their annotations. Arrays, so that loader workers share their memory.

    Attributes:
        origin: the JSON file, for messages.
        folder: where the images lie.
        image_ids: [N], ascending. category_ids: [K], ascending; the rank of one is its label.
        names: [K] of the categories, each once.
        file_names: [N] bytes, relative to the folder.
        sizes: int32 [N, 2], (height, width) by the JSON.
        spans: int64 [N, 2], first annotation of each image and the one after its last.
        annotations: of the whole file.
        had_objects: bool [N], whether the file has annotations of an image, dropped ones included.
        dropped: what was left out, by reason, most frequent first.
        num_broken_parts: polygons left out of annotations that are kept for their other polygons.
    """

    origin: Path
    folder: Path
    image_ids: tuple[Id, ...]
    category_ids: tuple[Id, ...]
    names: tuple[str, ...]
    file_names: np.ndarray
    sizes: np.ndarray
    spans: np.ndarray
    annotations: Annotations
    had_objects: np.ndarray
    dropped: tuple[Dropped, ...] = ()
    num_broken_parts: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of one image, as the JSON has it."""
        return int(self.sizes[index, 0]), int(self.sizes[index, 1])

    def objects(self, index: int) -> Iterator[Annotation]:
        """Annotations of one image, crowds among them, in the order of the file."""
        return (self.annotations[row] for row in range(*self.spans[index].tolist()))

    def source(self) -> ImageSource:
        """The images for the loader; the label of each is its index here."""
        rows = np.arange(len(self), dtype=np.int64)
        return ImageSource(str(self.origin), self.file_names, rows, self.names, folder=self.folder)

    def subset(self, keep: np.ndarray) -> "CocoSet":
        """The images at these indices, in this order; annotations are not copied."""
        return replace(
            self,
            image_ids=tuple(self.image_ids[index] for index in keep.tolist()),
            file_names=self.file_names[keep],
            sizes=self.sizes[keep],
            spans=self.spans[keep],
            had_objects=self.had_objects[keep],
        )

    def num_learnable(self) -> np.ndarray:
        """How many annotations of each image are no crowds: int64 [N]."""
        before = np.concatenate([[0], np.cumsum(~self.annotations.crowd)])
        return before[self.spans[:, 1]] - before[self.spans[:, 0]]

    def notes(self) -> list[str]:
        """What was left out, one line per reason; nothing where all is well."""
        lines = [f"{shown(self.origin)}: {dropped}" for dropped in self.dropped]
        if self.num_broken_parts:
            lines.append(f"{shown(self.origin)}: {self.num_broken_parts} broken polygons left out of kept annotations")
        return lines


def training_set(coco: CocoSet, keep_background: bool = False) -> CocoSet:
    """The images to learn from: those with an annotation that is no crowd, as published (spec detection 1.1).

    Args:
        keep_background: keep images without any annotation in the file as well, as examples of background. One whose
            annotations are all crowds or broken is no such example.
    Raises: DataError if no image has an object to learn from.
    """
    learnable = coco.num_learnable() > 0
    if not learnable.any():
        why = _why_nothing(coco)
        raise DataError(f"{shown(coco.origin)}: no image has an object to learn from: {why}; see rcmae doctor")
    if keep_background:
        learnable |= ~coco.had_objects
    return coco.subset(np.flatnonzero(learnable))


def _why_nothing(coco: CocoSet) -> str:
    if not coco.had_objects.any():
        return "no annotations"
    kept = int((coco.spans[:, 1] - coco.spans[:, 0]).sum())
    reasons: Sequence[str] = [str(dropped) for dropped in coco.dropped]
    return "; ".join([*([f"all {kept} annotations are crowds"] if kept else []), *reasons])
