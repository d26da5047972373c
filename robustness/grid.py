"""The grid of a sweep: which sets there are, one cell per set, corruption and severity, and a small file for each.

A cell's file name ends in a digest of all that its figures depend on: model, images, transform, definition, draws. So
figures of other models, images or protocols are never taken for it, whatever lies in the folder.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.datasets import ImageSource
from core.errors import DataError, shown
from core.files import FileSystem, replace_file
from core.loader import sample_rng
from robustness.imagenet_sets import (
    evenly,
    open_imagenet_set,
    open_labelled,
    open_released,
    open_unlabelled,
    real_targets,
    released_folders,
    require_imagenet_classes,
)
from robustness.settings import RobustConfig
from robustness.subject import Subject, Tested

CLEAN = "clean"  # name of the corruption of a clean cell, at severity 0
CORRUPTED_HERE = ("imagenet_c_otf", "corruptions", "representation")  # on the fly; imagenet_c comes corrupted
NATURAL = ("imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_v2")
FORMAT = 1  # of the cells; another one where their figures come to mean something else

logger = logging.getLogger("rcmae")


@dataclass(frozen=True)
class OpenSet:
    """A set of images, opened and thinned.

    Attributes:
        source: the images to evaluate; labels are columns of the classifier.
        ids: int64 [N], the place of each in the whole set.
        total: images in the whole set.
        folders: of ImageNet-C alone, by corruption and severity; `source` is the first of them.
        targets: of ImageNet's validation set, its ReaL columns [N, M] where the file names tell the image numbers.
    """

    source: ImageSource
    ids: np.ndarray
    total: int
    folders: Mapping[tuple[str, int], Path] = field(default_factory=dict)
    targets: np.ndarray | None = None

    @property
    def digest(self) -> str:
        """Identifies the images and their labels, wherever they lie."""
        labels = b"" if self.source.labels is None else self.source.labels.tobytes()
        return f"{self.source.fingerprint()}-{hashlib.sha256(labels).hexdigest()[:6]}"


@dataclass(frozen=True)
class Cell:
    """One set under one corruption at one severity, and all that its figures depend on."""

    set: str
    corruption: str
    severity: int
    facts: Mapping[str, Any]

    @property
    def file_name(self) -> str:
        """Of its figures, in the folder of cells."""
        digest = hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.set}-{self.corruption}-{self.severity}-{digest}.json"

    def __str__(self) -> str:
        return f"{self.set} {self.corruption}" + (f" {self.severity}" if self.severity else "")


# --- sets -----------------------------------------------------------------------------------------------------------


def open_sets(config: RobustConfig, subject: Subject) -> dict[str, OpenSet]:
    """Every set that the benchmarks need, by name. Raises: DataError, ConfigError; each names what is wrong."""
    cache, classes, wanted = config.cache.expanduser(), subject.classes, config.benchmarks
    sets: dict[str, OpenSet] = {}
    if config.data is not None and any(name.startswith("imagenet") or name == "real" for name in wanted):
        val = _thinned(open_imagenet_set("imagenet_val", config.data, classes, cache, config.labels), config)
        sets["imagenet_val"] = _with_real(val, classes, needed="real" in wanted)
        if "imagenet_c_otf" in wanted:
            sets["imagenet_c_otf"] = sets["imagenet_val"]
    if "imagenet_c" in wanted:
        sets["imagenet_c"] = _open_imagenet_c(config, subject)
    for name, path in config.paths.natural().items():
        if name in wanted and path is not None:
            sets[name] = _thinned(open_imagenet_set(name, path, classes, cache), config)
    if "corruptions" in wanted:
        assert config.data is not None, "RobustConfig asks for it"
        sets["corruptions"] = _thinned(open_labelled(config.data, classes, cache, config.labels), config)
    if "representation" in wanted:
        assert config.data is not None, "RobustConfig asks for it"
        sets["representation"] = _thinned(open_unlabelled(config.data, cache), config)
    return sets


def _thinned(source: ImageSource, config: RobustConfig) -> OpenSet:
    ids = chosen(len(source), config)
    return OpenSet(source.subset(ids), ids, len(source))


def chosen(total: int, config: RobustConfig) -> np.ndarray:
    """The images of a set that a sweep is about, in order: all, some evenly spread, or a sample; int64 [N]."""
    if config.sample is None or config.sample >= total:
        return evenly(total, config.num_images)
    drawn = sample_rng(config.seed, total).choice(total, config.sample, replace=False)
    return np.sort(drawn).astype(np.int64)


def _with_real(val: OpenSet, classes: tuple[str, ...], needed: bool) -> OpenSet:
    try:
        targets = real_targets(val.source, classes)
    except DataError:
        if needed:
            raise
        return val
    return OpenSet(val.source, val.ids, val.total, targets=targets)


def _open_imagenet_c(config: RobustConfig, subject: Subject) -> OpenSet:
    assert config.paths.imagenet_c is not None, "RobustConfig asks for it"
    require_imagenet_classes(subject.classes, "imagenet_c")
    folders = released_folders(config.paths.imagenet_c, config.corruption_names(), config.severities)
    first = _thinned(open_released(next(iter(folders.values())), subject.classes, config.cache.expanduser()), config)
    return OpenSet(first.source, first.ids, first.total, folders)


def open_released_cell(cell: Cell, first: OpenSet, config: RobustConfig, subject: Subject) -> OpenSet:
    """The images of one cell of ImageNet-C. Raises: DataError unless they are called as those of the first one."""
    folder = first.folders[cell.corruption, cell.severity]
    own = _thinned(open_released(folder, subject.classes, config.cache.expanduser()), config)
    if own.digest != first.digest:
        other = next(iter(first.folders.values()))
        raise DataError(
            f"{shown(folder)}: its {own.total} images are not called as the {first.total} of {shown(other)}; one of "
            "the two is not whole"
        )
    return own


# --- cells ----------------------------------------------------------------------------------------------------------


def plan_cells(config: RobustConfig, subject: Tested, sets: Mapping[str, OpenSet]) -> list[Cell]:
    """All cells, clean ones first, then each set's grid."""
    cells = []
    for name, opened in sets.items():
        facts: dict[str, Any] = {"model": subject.digest, "data": opened.digest, "precision": subject.precision}
        if config.sample is not None and config.sample < opened.total:
            facts |= {"sample": config.sample, "sample_seed": config.seed}
        if name in {"imagenet_val", "corruptions", *NATURAL}:
            transform = "model" if name == "corruptions" else config.transform
            cells.append(Cell(name, CLEAN, 0, {**facts, "transform": transform}))
        if name in GRID_FACTS:
            facts |= GRID_FACTS[name](config)
            cells += [Cell(name, c, s, facts) for c in config.corruption_names() for s in config.severities]
    return sorted(cells, key=lambda cell: cell.severity > 0)  # stable


def _own_facts(config: RobustConfig) -> dict[str, Any]:
    order = "input" if config.corrupts_input() else "decoded"
    facts = {"definition": config.definition, "corrupt": order, "jpeg_step": config.jpeg_step}
    return {"transform": "model", **facts, "draws": config.draws, "seed": config.seed}


GRID_FACTS = {
    "imagenet_c": lambda config: {"transform": "released", "definition": "released files", "jpeg_step": True},
    "imagenet_c_otf": lambda config: {
        "transform": "official", "definition": "imagenet_c", "corrupt": "input", "jpeg_step": True,
        "draws": config.draws, "seed": config.seed,
    },
    "corruptions": _own_facts,
    "representation": _own_facts,
}  # fmt: skip


class CellStore:
    """The folder of cells: a cell is written whole or not at all, and never again."""

    def __init__(self, folder: Path, fs: FileSystem | None = None) -> None:
        self._folder, self._fs = folder, fs

    def make(self) -> None:
        """Create the folder, and remove what a killed process left unfinished; for the owner of the directory alone."""
        self._folder.mkdir(exist_ok=True)
        for path in self._folder.glob(".tmp-*"):
            path.unlink()

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What was found for a cell; None if it is still to be done."""
        path = self._folder / cell.file_name
        try:
            content = json.loads(path.read_bytes())
            return content if {"figures", "flags", "images"} <= content.keys() else None
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError):
            logger.warning("%s: not a cell; it is done again", shown(path))
            return None

    def write(self, cell: Cell, content: Mapping[str, Any]) -> None:
        """Keep what was found for a cell."""
        replace_file(self._folder / cell.file_name, json.dumps(content, indent=1).encode(), self._fs)
