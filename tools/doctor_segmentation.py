"""What is wrong with a set of images and labels, and what the label keys make of every value that occurs."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchvision.io import encode_png

from core.errors import DataError, shown
from core.files import replace_file
from core.images import MAX_PIXELS, BadImage
from core.loader import read_image
from tools.doctor_report import BAR, NO_START, REPLACED, DoctorConfig, Finding, Report, Weight, stored_size, watched
from transfer.segmentation.classes import Classes, open_classes, unnamed
from transfer.segmentation.data import read_stored
from transfer.segmentation.draw import below, classes_in, contact_sheet, legend, overlay
from transfer.segmentation.labels import NUM_VALUES, OUT_OF_RANGE, BadLabel, LabelTable, label_table, read_label
from transfer.segmentation.pairs import Matching, SegmentationSet, Split, matching, pair_folders

SPLITS: tuple[Split, ...] = ("train", "val")
MAX_ROWS = 256  # of the table of values; labels of 16 bits may hold thousands
NUM_OVERLAYS, OVERLAYS_IN_A_ROW, OVERLAY_PX = 6, 2, 420
RED = (255, 0, 0)
MUST_BE_WHOLE = "an evaluation counts every image: mend them, or remove image and label"
ENDS = "training and evaluation end at the first of them; give label_shift, label_map or ignore_index"
UNKNOWN = "no classes are given, so that training does not start"


@dataclass(frozen=True)
class Meaning:
    """What the keys say about stored values; both None where they say nothing about classes."""

    classes: Classes | None
    table: LabelTable | None


@dataclass
class Survey:
    """What all labels of a split hold.

    Attributes:
        pixels, labels: int64 [65536], how many pixels and how many labels have each stored value.
        sizes: how many images have each (height, width).
        whole: indices of the pairs without a fault.
        faults: places by kind of fault; each is replaced in training, and ends an evaluation.
        wrong: labels with a value out of range. ignored: labels of which nothing counts.
    """

    pixels: np.ndarray = field(default_factory=lambda: np.zeros(NUM_VALUES, dtype=np.int64))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(NUM_VALUES, dtype=np.int64))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    whole: list[int] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def examine_segmentation(config: DoctorConfig) -> list[Report]:
    """Both splits of a set of images and labels; with `out`, a picture of six of them."""
    meaning = _meaning(config)
    reports: list[Report] = []
    drawn = False
    for split in SPLITS:
        images, labels = {
            "train": (config.train_images, config.train_labels), "val": (config.val_images, config.val_labels)
        }[split]  # fmt: skip
        try:
            found = matching(pair_folders(config.data, split, images, labels))
        except DataError as error:
            reports.append(Report(split, findings=[Finding("refused", 1, str(error), NO_START)]))
            continue
        survey = _survey(found.pairs, meaning.table)
        reports.append(_report(found, survey, split, meaning, config))
        if config.out is not None and not drawn:
            drawn = _draw(config.out, found.pairs.subset(np.array(survey.whole, dtype=np.int64)), survey, meaning)
            if drawn:
                reports[-1].facts.append(("overlays", shown(config.out / "overlays.png")))
    return reports


def _meaning(config: DoctorConfig) -> Meaning:
    if config.classes is None and config.num_classes is None:
        return Meaning(None, None)
    classes = open_classes(config)
    return Meaning(classes, label_table(config, len(classes)))


# ---- looking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """One pair: its size, faults as (kind, place), and the values of its label that occur, with their pixels."""

    size: tuple[int, int] | None
    faults: tuple[tuple[str, str], ...]
    values: np.ndarray
    counts: np.ndarray


def _survey(pairs: SegmentationSet, table: LabelTable | None) -> Survey:
    """All labels are read, to their last pixel; of images the header."""
    survey = Survey()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding lets go of the interpreter
        looks = pool.map(lambda index: _look(pairs, index), range(len(pairs)))
        for index, look in enumerate(watched(looks, len(pairs), "reading labels")):
            for kind, place in look.faults:
                survey.faults.setdefault(kind, []).append(place)
            if not look.faults:
                survey.whole.append(index)
            if look.size:
                survey.sizes[look.size] += 1
            survey.pixels[look.values] += look.counts
            survey.labels[look.values] += 1
            if table is not None and len(look.values):
                _compare(pairs.labels.name(index), look, table, survey)
    return survey


def _look(pairs: SegmentationSet, index: int) -> _Look:
    faults = []
    size, nothing = None, np.zeros(0, dtype=np.int64)
    assert pairs.images.folder is not None, "pairs lie in folders"
    try:
        size = stored_size(pairs.images.folder / os.fsdecode(pairs.images.names[index]))
    except Exception:  # a broken header makes Pillow raise anything
        faults.append(("images that cannot be read", pairs.images.name(index)))
    name = pairs.labels.name(index)
    try:
        label = read_label(pairs.labels.read(index))
    except OSError:
        return _Look(size, (*faults, ("labels that cannot be read", name)), nothing, nothing)
    except BadLabel as error:
        return _Look(size, (*faults, (f"labels that cannot be used: {error}", name)), nothing, nothing)
    if size is not None and label.shape != size:
        both = f"{label.shape[1]}x{label.shape[0]}, not {size[1]}x{size[0]}"
        faults.append(("labels of another size than their image", f"{name} ({both})"))
    counts = np.bincount(label.ravel())
    values = counts.nonzero()[0]
    return _Look(size, tuple(faults), values, counts[values])


def _compare(name: str, look: _Look, table: LabelTable, survey: Survey) -> None:
    labels = table.table[look.values]
    wrong = look.values[labels == OUT_OF_RANGE]
    if len(wrong):
        survey.wrong.append(f"{name} ({', '.join(map(str, wrong[:3].tolist()))}{', ...' if len(wrong) > 3 else ''})")
    elif (labels == table.ignore_index).all():
        survey.ignored.append(name)


# ---- telling --------------------------------------------------------------------------------------------------------


def _report(found: Matching, survey: Survey, split: Split, meaning: Meaning, config: DoctorConfig) -> Report:
    pairs = found.pairs
    report = Report(f"{split}: {shown(pairs.images.origin)} with {shown(pairs.labels.origin)}")
    report.facts = [("pairs", str(len(pairs))), ("sizes", _sizes_text(survey.sizes)), *_pixel_facts(survey, meaning)]
    report.add("refused", "images without a label", NO_START, found.images_alone)
    report.add("refused", "images whose names differ in nothing but the ending", NO_START, found.images_twice)
    report.add("refused", "labels whose names differ in nothing but the ending", NO_START, found.labels_twice)
    report.add("note", "labels without an image", "left out", pairs.unused)
    too_many = sum(map(len, survey.faults.values())) > config.loader.max_broken_share * len(pairs)
    weight: Weight = "refused" if split == "val" or too_many else "dropped"
    for kind, places in sorted(survey.faults.items()):
        report.add(weight, kind, MUST_BE_WHOLE if split == "val" else REPLACED, places)
    report.add("refused", "labels with values out of range", ENDS, survey.wrong)
    report.add("note", "labels of which every pixel is ignored", "nothing is learned from them", survey.ignored)
    if meaning.classes is None:
        report.findings.append(Finding("refused", 1, UNKNOWN, _what_to_give(survey)))
    else:
        present = set(_labels_of(survey, meaning).tolist())
        missing = [shown(name) for index, name in enumerate(meaning.classes.names) if index not in present]
        consequence = "never learned" if split == "train" else "count for no mean where nothing is taken for them"
        report.add("note", "classes that never occur", consequence, missing)
        below_shift = survey.pixels[: config.label_shift]
        if below_shift.any():
            what = f"ignored: {_pct(int(below_shift.sum()), int(survey.pixels.sum()))} of the pixels"
            report.add("note", "stored values below label_shift", what, list(map(str, below_shift.nonzero()[0])))
    report.tables = [_table_of_values(survey, meaning)]
    return report


def _labels_of(survey: Survey, meaning: Meaning) -> np.ndarray:
    """What the stored values that occur become, int32 [values]."""
    assert meaning.table is not None, "asked for only where there are classes"
    return meaning.table.table[survey.pixels.nonzero()[0]]


def _sizes_text(sizes: Counter[tuple[int, int]]) -> str:
    if not sizes:
        return "none could be read"
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    smallest, largest = (f"{width}x{height}" for height, width in (ordered[0], ordered[-1]))
    (height, width), most = sizes.most_common(1)[0]
    if len(sizes) == 1:
        return f"all {width}x{height}"
    return f"{len(sizes)} different, {smallest} to {largest}; {width}x{height} {most} times"


def _pixel_facts(survey: Survey, meaning: Meaning) -> Iterator[tuple[str, str]]:
    total = int(survey.pixels.sum())
    if meaning.table is None or not total:
        return
    pixels, labels = survey.pixels[survey.pixels.nonzero()], _labels_of(survey, meaning)
    ignored, wrong = (int(pixels[labels == label].sum()) for label in (meaning.table.ignore_index, OUT_OF_RANGE))
    shares = [f"{_pct(total - ignored - wrong, total)} of a class", f"{_pct(ignored, total)} ignored"]
    yield "pixels", ", ".join([*shares, *([f"{_pct(wrong, total)} out of range"] if wrong else [])])


def _what_to_give(survey: Survey) -> str:
    values = survey.pixels.nonzero()[0].tolist()
    if not values:
        return "give classes=FILE, ade20k or camvid, or num_classes=N"
    last = [value for value in values if value != 255][-1:]
    number = f", here perhaps {last[0] + 1}, or {last[0]} with ignore_index={last[0]}" if last and last[0] else ""
    return f"give classes=FILE, ade20k or camvid, or num_classes=N{number}"


def _pct(part: int, total: int) -> str:
    return f"{100 * part / total:.2f} %"


def _table_of_values(survey: Survey, meaning: Meaning) -> Table:
    values, total = survey.pixels.nonzero()[0].tolist(), max(1, int(survey.pixels.sum()))
    most = max(1, int(survey.pixels.max()))
    table = Table("stored value", "becomes", "pixels", "labels", "", box=None)
    for value in values[:MAX_ROWS]:
        text, style = _becomes(value, meaning)
        pixels = int(survey.pixels[value])
        numbers = (Text(_pct(pixels, total), justify="right"), Text(str(survey.labels[value]), justify="right"))
        bar = Text("█" * round(BAR * pixels / most))
        table.add_row(Text(str(value), justify="right", style=style), Text(text, style=style), *numbers, bar)
    if len(values) > MAX_ROWS:
        table.add_row("...", f"{len(values) - MAX_ROWS} other values", "", "", "")
    return table


def _becomes(value: int, meaning: Meaning) -> tuple[str, str]:
    """What a stored value becomes, and the style to say it in."""
    if meaning.table is None or meaning.classes is None:
        return "?", ""
    label = int(meaning.table.table[value])
    if label == OUT_OF_RANGE:
        return "OUT OF RANGE", "bold red"
    if label == meaning.table.ignore_index:
        return "ignored", "dim"
    return f"{label} {shown(meaning.classes.names[label])}", ""


# ---- drawing --------------------------------------------------------------------------------------------------------


def _draw(folder: Path, pairs: SegmentationSet, survey: Survey, meaning: Meaning) -> bool:
    """Photographs with their labels, spread over the set; False where no pair can be drawn."""
    classes = _drawn_classes(survey, meaning)
    pictures: list[tuple[Tensor, Tensor]] = []
    maps: list[np.ndarray] = []
    for index in np.linspace(0, len(pairs) - 1, min(NUM_OVERLAYS, len(pairs))).round().astype(int).tolist():
        try:
            image = read_image(pairs.images, index, 3, MAX_PIXELS)
            stored = read_stored(pairs, index, (image.shape[1], image.shape[2]))
        except BadImage:  # broken behind its header
            continue
        maps.append(_drawn_labels(stored, meaning))
        pictures.append((image, overlay(image, maps[-1], classes.palette)))
    if not pictures:
        return False
    blank = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    cells = [picture for pair in pictures for picture in pair]
    columns = 2 * min(OVERLAYS_IN_A_ROW, len(pictures))
    cells += [blank] * (-len(cells) % columns)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    sheet = contact_sheet(("photograph", "labels") * (columns // 2), rows, OVERLAY_PX)
    named = legend(classes, classes_in(maps, len(classes)), sheet.shape[2])
    picture = below([sheet, named])
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "overlays.png", encode_png(picture.contiguous()).numpy().tobytes())
    return True


def _drawn_labels(stored: np.ndarray, meaning: Meaning) -> np.ndarray:
    """Indices of `_drawn_classes`, [H, W]; -1 for what is ignored."""
    if meaning.table is None or meaning.classes is None:
        return stored.astype(np.int64)
    labels = meaning.table.table[stored]
    wrong, ignored = labels == OUT_OF_RANGE, labels == meaning.table.ignore_index  # which may be the number of classes
    return np.where(wrong, len(meaning.classes), np.where(ignored, -1, labels))


def _drawn_classes(survey: Survey, meaning: Meaning) -> Classes:
    """The classes, and a last one for what is out of range; without any a class for every value."""
    if meaning.classes is not None:
        return Classes((*meaning.classes.names, "OUT OF RANGE"), (*meaning.classes.palette, RED))
    values = unnamed(int(survey.pixels.nonzero()[0].max(initial=0)) + 1)
    return Classes(tuple(f"value {value}" for value in range(len(values))), values.palette)
