"""A segmentation set: images and the label of each, matched by their names."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from core.datasets import ImageSource, open_folder
from core.errors import DataError, shown

Split = Literal["train", "val"]
KINDS = ("images", "annotations")  # folders of a root
FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("training", "train"), "val": ("validation", "val")}
LAYOUT = "images/{training,validation} and annotations/{training,validation}"
NUM_SHOWN = 5  # names told of many


@dataclass(frozen=True, repr=False)
class SegmentationSet:
    """Images with their labels, in the order of the images' names.

    Attributes:
        origin: the folder of the images, for messages.
        images, labels: [N] each; label i belongs to image i.
        unused: names of labels without an image.
    """

    origin: str
    images: ImageSource
    labels: ImageSource
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of all names in order: the same data, wherever it lies."""
        both = self.images.fingerprint() + self.labels.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()[:12]

    def subset(self, keep: np.ndarray) -> "SegmentationSet":
        """The pairs at these indices, in this order."""
        return replace(self, images=self.images.subset(keep), labels=self.labels.subset(keep))

    def notes(self) -> list[str]:
        """What was left out, a line each."""
        if not self.unused:
            return []
        return [f"{shown(self.labels.origin)}: {len(self.unused)} labels without an image: {_first(self.unused)}"]


@dataclass(frozen=True)
class PairFolders:
    """Where one split lies: its images, and their labels under the same names but for the ending."""

    images: Path
    labels: Path


@dataclass(frozen=True)
class Matching:
    """What of two folders belongs together.

    Attributes:
        pairs: images that have exactly one label, and are the only ones of their name.
        images_alone: names of images without a label.
        images_twice, labels_twice: names of files that differ in nothing but the ending.
    """

    pairs: SegmentationSet
    images_alone: tuple[str, ...]
    images_twice: tuple[str, ...]
    labels_twice: tuple[str, ...]


def open_pairs(
    root: Path | None, split: Split, images: Path | None = None, labels: Path | None = None
) -> SegmentationSet:
    """The pairs of a split: below a root (ADE20K's layout), or of two folders; the order is that of the names.

    Args:
        root: holds `images` and `annotations`, or a single folder that does.
        images, labels: what the keys {split}_images and {split}_labels say; each wins over the root.
    Raises: DataError for a folder that is missing or empty, an image without a label, or several of one name.
    """
    folders = pair_folders(root, split, images, labels)
    found = matching(folders)
    for what, names in (("images", found.images_twice), ("labels", found.labels_twice)):
        if names:
            where = folders.images if what == "images" else folders.labels
            raise DataError(
                f"{shown(where)}: {len(names)} {what} whose names differ in nothing but the ending: {_first(names)}; "
                "an image has one label, matched by name"
            )
    if found.images_alone:
        raise DataError(
            f"{shown(folders.images)}: {len(found.images_alone)} images without a label in {shown(folders.labels)}: "
            f"{_first(found.images_alone)}; give each a PNG of the same name, or take the image away"
        )
    return found.pairs


def pair_folders(
    root: Path | None, split: Split, images: Path | None = None, labels: Path | None = None
) -> PairFolders:
    """The folders of a split; arguments and errors as those of `open_pairs`."""
    base = root and (layout_base(root) or root)
    found = []
    for kind, key, own in zip(KINDS, (f"{split}_images", f"{split}_labels"), (images, labels), strict=True):
        if own is None and base is None:
            raise DataError(f"no {key}: give data=ROOT with {LAYOUT}, or {key}=PATH")
        choices = [own] if own is not None else [base / kind / name for name in FOLDERS[split] if base]
        present = [path for path in choices if path.is_dir()]
        if not present:
            raise DataError(f"{shown(choices[0])}: no such folder; expected {LAYOUT} below data=, or {key}=PATH")
        found.append(present[0])
    return PairFolders(*found)


def layout_base(root: Path) -> Path | None:
    """The folder with `images` and `annotations`: the root, or the only one in it that has them; None without one.

    Raises: DataError where several have.
    """
    if _has_layout(root):
        return root
    try:
        inside = sorted(path for path in root.iterdir() if not path.name.startswith(".") and _has_layout(path))
    except OSError:  # no folder, or one that cannot be listed
        return None
    if len(inside) > 1:
        names = ", ".join(shown(path.name) for path in inside[:NUM_SHOWN])
        raise DataError(f"{shown(root)}: holds several sets ({names}); give one of them as data=")
    return inside[0] if inside else None


def _has_layout(folder: Path) -> bool:
    return all((folder / kind).is_dir() for kind in KINDS)


def matching(folders: PairFolders) -> Matching:
    """Match images and labels by their relative paths without ending. Raises: DataError for an empty folder."""
    images, labels = open_folder(str(folders.images)), open_folder(str(folders.labels))
    for source, what in ((images, "images"), (labels, "labels")):
        if not len(source):
            raise DataError(f"{shown(source.origin)}: no {what} in it; expected photographs, and a PNG label for each")
    image_stems, label_stems = _stems(images), _stems(labels)
    twice = [{stem for stem, count in Counter(stems).items() if count > 1} for stems in (image_stems, label_stems)]
    row_of = {stem: row for row, stem in enumerate(label_stems) if stem not in twice[1]}
    kept = [(row, row_of[s]) for row, s in enumerate(image_stems) if s in row_of and s not in twice[0]]
    image_rows, label_rows = np.array(kept, dtype=np.int64).reshape(-1, 2).T
    unused = _names(labels, label_stems, set(label_stems) - set(image_stems))
    return Matching(
        pairs=SegmentationSet(images.origin, images.subset(image_rows), labels.subset(label_rows), unused),
        images_alone=_names(images, image_stems, set(image_stems) - set(label_stems)),
        images_twice=_names(images, image_stems, twice[0]),
        labels_twice=_names(labels, label_stems, twice[1]),
    )


def _stems(source: ImageSource) -> list[bytes]:
    return [os.path.splitext(name)[0] for name in source.names.tolist()]  # noqa: PTH122  relative names, bytes


def _names(source: ImageSource, stems: Sequence[bytes], wanted: set[bytes]) -> tuple[str, ...]:
    return tuple(source.name(row) for row, stem in enumerate(stems) if stem in wanted)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NUM_SHOWN]) + (", ..." if len(names) > NUM_SHOWN else "")
