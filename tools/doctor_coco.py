"""What is wrong with a data set in COCO's format."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from rich.table import Table
from rich.text import Text

from core.errors import DataError, shown
from tools.doctor_report import (
    NO_START,
    REPLACED,
    DoctorConfig,
    Finding,
    Report,
    Weight,
    histogram,
    stored_size,
    watched,
)
from transfer.detection.coco import CocoSet, training_set
from transfer.detection.coco_file import SPLITS, coco_paths, read_coco

SIDES_PX = (0, 8, 16, 32, 64, 128, 256, 512)  # lower bounds of the histogram of box sizes
NUM_CLASSES_SHOWN = 20
MUST_BE_WHOLE = "an evaluation counts every image: mend them, or remove them from the JSON"


def examine_coco(config: DoctorConfig) -> list[Report]:
    """Both splits of a set in COCO's format."""
    reports, sets = [], []
    for split in SPLITS:
        own = {"train": (config.train_json, config.train_images), "val": (config.val_json, config.val_images)}[split]
        try:
            coco = read_coco(coco_paths(config.data, split, *own))
        except DataError as error:
            lines = str(error).splitlines()
            reports.append(Report(split, findings=[Finding("refused", 1, line, NO_START) for line in lines]))
        else:
            reports.append(_examine(coco, split, config.loader.max_broken_share))
            sets.append(coco)
    if len(sets) == 2:
        odd = set(sets[0].names) ^ set(sets[1].names)
        reports[1].add("refused", "classes that only one of train and val has", NO_START, sorted(map(shown, odd)))
    return reports


def _examine(coco: CocoSet, split: str, max_broken_share: float) -> Report:
    kept = coco.annotations
    report = Report(f"{split}: {shown(coco.origin)}")
    report.facts = [
        ("images", str(len(coco))),
        ("objects", f"{len(kept)}, {int(kept.crowd.sum())} of them crowds"),
        ("classes", f"{len(coco.names)}, {len(np.unique(kept.labels))} of them in use"),
    ]
    _examine_images(coco, split, max_broken_share, report)
    _examine_objects(coco, split, report)
    report.tables = [_histogram_of_classes(coco), _histogram_of_sizes(coco)]
    return report


def _examine_images(coco: CocoSet, split: str, max_broken_share: float, report: Report) -> None:
    faults: dict[str, list[str]] = {}
    for fault, place in _image_faults(coco):
        faults.setdefault(fault, []).append(place)
    too_many = sum(map(len, faults.values())) > max_broken_share * len(coco)
    weight: Weight = "refused" if split == "val" or too_many else "dropped"
    for fault, places in faults.items():
        report.add(weight, fault, MUST_BE_WHOLE if split == "val" else REPLACED, places)
    twice = [name for name, count in Counter(coco.file_names.tolist()).items() if count > 1]
    report.add("note", "files that are several images of the JSON", "each is used", [shown(n.decode()) for n in twice])


def _image_faults(coco: CocoSet) -> Iterator[tuple[str, str]]:
    """Images that are missing, unreadable or of another size. Reads headers only."""
    source = coco.source()
    for index in watched(range(len(coco)), len(coco), "looking at image headers"):
        path, name = coco.folder / coco.file_names[index].decode("utf-8", "surrogateescape"), source.name(index)
        if not path.is_file():
            yield "images missing on disk", name
            continue
        try:
            found = stored_size(path)
        except Exception:  # a broken header makes Pillow raise anything
            yield "images that cannot be read", name
            continue
        expected = coco.size(index)
        if found != expected:
            yield (
                "images of another size than the JSON says",
                f"{name} ({found[1]}x{found[0]}, not {expected[1]}x{expected[0]})",
            )


def _examine_objects(coco: CocoSet, split: str, report: Report) -> None:
    for dropped in coco.dropped:
        report.findings.append(
            Finding("dropped", dropped.count, dropped.reason, "these annotations are left out", dropped.first)
        )
    if coco.num_broken_parts:
        what = "broken polygons of annotations that have others"
        report.findings.append(Finding("dropped", coco.num_broken_parts, what, "the polygons are left out"))
    leaving = "made anew from the outlines" if split == "train" else "evaluated as annotated"
    report.add("note", "boxes that leave their image", leaving, list(_leaving(coco)))
    names = [shown(str(id_)) for id_ in coco.image_ids]
    empty, learnable = coco.spans[:, 0] == coco.spans[:, 1], coco.num_learnable() > 0
    for what, which in (
        ("images without annotations", ~coco.had_objects),
        ("images whose annotations are all broken", coco.had_objects & empty),
        ("images of crowds alone", ~empty & ~learnable),
    ):
        kept = ", unless keep_background=true" if what == "images without annotations" else ""
        consequence = f"not learned from{kept}" if split == "train" else "evaluated"
        report.add("note", what, consequence, [names[index] for index in np.flatnonzero(which)])
    missing = sorted(set(range(len(coco.names))) - set(coco.annotations.labels.tolist()))
    consequence = "never learned" if split == "train" else "have no average precision"
    report.add("note", "classes without objects", consequence, [shown(coco.names[label]) for label in missing])
    if split == "train":
        try:
            training_set(coco)
        except DataError as error:
            report.findings.append(Finding("refused", 1, str(error), NO_START))


def _leaving(coco: CocoSet) -> Iterator[str]:
    """Images of which a box reaches more than a pixel beyond the border."""
    for index in range(len(coco)):
        height, width = coco.size(index)
        x, y, w, h = coco.annotations.xywh[slice(*coco.spans[index])].T
        outside = (x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1)
        yield from [f"image {shown(str(coco.image_ids[index]))}"] * int(outside.sum())


def _histogram_of_classes(coco: CocoSet) -> Table:
    objects = np.bincount(coco.annotations.labels, minlength=len(coco.names))
    order = np.argsort(-objects, kind="stable")
    first, rest = order[:NUM_CLASSES_SHOWN], order[NUM_CLASSES_SHOWN:]
    table = histogram("class", [(shown(coco.names[label]), int(objects[label])) for label in first])
    if len(rest):
        table.add_row(f"{len(rest)} others", Text(str(objects[rest].sum()), justify="right"))
    return table


def _histogram_of_sizes(coco: CocoSet) -> Table:
    side = np.sqrt(coco.annotations.xywh[:, 2] * coco.annotations.xywh[:, 3])
    counts = np.bincount(np.searchsorted(SIDES_PX, side, side="right") - 1, minlength=len(SIDES_PX))
    upper = [f" to {bound}" for bound in SIDES_PX[1:]] + [" and more"]
    rows = [(f"{low}{up} px", int(n)) for low, up, n in zip(SIDES_PX, upper, counts, strict=True)]
    return histogram("side of the box", rows)
