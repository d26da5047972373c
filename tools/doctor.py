"""Looks at a data set before anything is trained on it: what is wrong, and what training will do with each fault."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from core.config import Config
from core.errors import ConfigError, DataError, shown
from core.images import FORMATS
from core.loader import LoaderConfig
from transfer.detection.coco import NUM_SHOWN, CocoSet, training_set
from transfer.detection.coco_file import LAYOUT, SPLITS, coco_paths, layout_text, read_coco

ORIENTATION, TURNED = 0x0112, range(5, 9)  # EXIF tag, and its values that swap width and height
SIDES_PX = (0, 8, 16, 32, 64, 128, 256, 512)  # lower bounds of the histogram of box sizes
NUM_CLASSES_SHOWN = 20
BAR = 30  # characters of the longest bar
NO_START = "training does not start"
REPLACED = "each is replaced by another image; more than loader.max_broken_share of them end the run"
MUST_BE_WHOLE = "an evaluation counts every image: mend them, or remove them from the JSON"

Weight = Literal["note", "dropped", "refused"]
STYLES: dict[Weight, str] = {"note": "", "dropped": "yellow", "refused": "bold red"}


class DoctorConfig(Config):
    """What `rcmae doctor` is given."""

    data: Path | None = None
    train_json: Path | None = None
    train_images: Path | None = None
    val_json: Path | None = None
    val_images: Path | None = None
    loader: LoaderConfig = LoaderConfig()


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        what: the rule, and what breaks it.
        consequence: what training or evaluation does.
    """

    weight: Weight
    count: int
    what: str
    consequence: str
    first: tuple[str, ...] = ()


@dataclass
class Report:
    """What was found in one split."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether training would end with an error."""
        return any(finding.weight == "refused" for finding in self.findings)

    def add(self, weight: Weight, what: str, consequence: str, places: Sequence[str]) -> None:
        """Add a finding where there are places for it."""
        if places:
            self.findings.append(Finding(weight, len(places), what, consequence, tuple(places[:NUM_SHOWN])))


def doctor(config: DoctorConfig, console: Console | None = None) -> int:
    """Examine a data set, print what was found, and say whether it can be trained on.

    Returns: 0 if it can, 3 if it cannot. Raises: ConfigError or DataError where there is nothing to examine.
    """
    console = console or Console()
    reports = EXAMINERS[_layout_of(config)](config)
    for report in reports:
        _print(console, report)
    refused = any(report.refused for report in reports)
    verdict = (
        "training would refuse this data set; see the rows in red" if refused else "this data set can be trained on"
    )
    console.print(Text(verdict, style="bold red" if refused else "bold green"))
    return DataError.exit_code if refused else 0


def _layout_of(config: DoctorConfig) -> str:
    if config.train_json or config.val_json:
        return "coco"
    if config.data is None:
        raise ConfigError("doctor: needs a data set, as in rcmae doctor data=ROOT")
    if any((config.data / LAYOUT[0].format(split=split)).is_file() for split in SPLITS):
        return "coco"
    raise DataError(f"{shown(config.data)}: no layout that doctor knows; expected {layout_text()}, or train_json=PATH")


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


EXAMINERS: dict[str, Callable[[DoctorConfig], list[Report]]] = {"coco": examine_coco}


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
    for index in track(range(len(coco)), "looking at image headers", transient=True, console=Console(stderr=True)):
        path, name = coco.folder / coco.file_names[index].decode("utf-8", "surrogateescape"), source.name(index)
        if not path.is_file():
            yield "images missing on disk", name
            continue
        try:
            found = _stored_size(path)
        except Exception:  # a broken header makes Pillow raise anything
            yield "images that cannot be read", name
            continue
        expected = coco.size(index)
        if found != expected:
            yield (
                "images of another size than the JSON says",
                f"{name} ({found[1]}x{found[0]}, not {expected[1]}x{expected[0]})",
            )


def _stored_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image, upright."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        turned = image.getexif().get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


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
    table = _histogram("class", [(shown(coco.names[label]), int(objects[label])) for label in first])
    if len(rest):
        table.add_row(f"{len(rest)} others", Text(str(objects[rest].sum()), justify="right"))
    return table


def _histogram_of_sizes(coco: CocoSet) -> Table:
    side = np.sqrt(coco.annotations.xywh[:, 2] * coco.annotations.xywh[:, 3])
    counts = np.bincount(np.searchsorted(SIDES_PX, side, side="right") - 1, minlength=len(SIDES_PX))
    upper = [f" to {bound}" for bound in SIDES_PX[1:]] + [" and more"]
    rows = [(f"{low}{up} px", int(n)) for low, up, n in zip(SIDES_PX, upper, counts, strict=True)]
    return _histogram("side of the box", rows)


def _histogram(title: str, rows: Sequence[tuple[str, int]]) -> Table:
    table = Table(title, "objects", "", box=None)
    most = max(1, *(count for _, count in rows))
    for name, count in rows:
        table.add_row(Text(name), Text(str(count), justify="right"), Text("█" * round(BAR * count / most)))
    return table


def _print(console: Console, report: Report) -> None:
    console.print(Text(report.title, style="bold"))
    for name, value in report.facts:
        console.print(Text(f"  {name}: {value}"))
    if report.findings:
        table = Table("found", "", "what happens", "first of them")
        for finding in report.findings:
            style = STYLES[finding.weight]
            more = ", ..." if finding.count > len(finding.first) > 0 else ""
            cells = (str(finding.count), finding.what, finding.consequence, ", ".join(finding.first) + more)
            table.add_row(*(Text(cell, style=style) for cell in cells))
        console.print(table)
    elif report.facts:
        console.print(Text("  nothing to complain about"))
    for each in report.tables:
        console.print(each)
