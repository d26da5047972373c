"""Evaluates one cell of the grid and says what its figures mean; also how a classifier or backbone is asked."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.config import config_hash
from core.errors import DataError
from core.transforms import EvalTransform
from robustness.corruptions.apply import MIN_SIDE, corrupt
from robustness.corruptions.digital import jpeg_step
from robustness.corruptions.textures import load_textures
from robustness.evaluation import (
    Corrupt,
    Images,
    Pass,
    Reading,
    Transform,
    accuracy_figures,
    class_answers,
    cosine_figures,
    masked_figures,
    pct,
    real_figures,
)
from robustness.grid import CLEAN, CORRUPTED_HERE, Cell, OpenSet, open_released_cell
from robustness.imagenet_sets import (
    RELEASED_PX,
    Decoded,
    OfficialTransform,
    ReleasedTransform,
    at_size,
    columns_of,
    subset_synsets,
)
from robustness.reference import Reference
from robustness.results import MASKED
from robustness.settings import RobustConfig
from robustness.subject import Subject, Tested

Beat = Callable[[], None]  # called before each batch, to note that this process is alive; may raise to end a cell


class Found(NamedTuple):
    """What an evaluation of a cell found: its figures, the images that they are of, and what else is kept of it."""

    figures: dict[str, float]
    opened: OpenSet
    more: Mapping[str, Any] = {}


Examine = Callable[[Cell], Found]  # a model on the images of a cell


@dataclass(frozen=True)
class Setting:
    """What follows from configuration, model, data and machine.

    Attributes:
        begin: makes what evaluates cells one after the other.
        reference: of a segmentor, the sweep that its degradation is relative to.
    """

    config: RobustConfig
    subject: Tested
    sets: Mapping[str, OpenSet]
    cells: Sequence[Cell]
    device: torch.device
    reading: Reading
    commit: str | None
    begin: Callable[[Beat], Examine]
    reference: Reference | None = None


class CellEvaluator:
    """Evaluates cells one after the other."""

    def __init__(self, setting: Setting, beat: Beat) -> None:
        self._setting, self._examine = setting, setting.begin(beat)

    def evaluate(self, cell: Cell) -> dict[str, Any]:
        """All that is kept of a cell: figures, and what they must be read with."""
        setting, config, begun = self._setting, self._setting.config, time.monotonic()
        figures, opened, more = self._examine(cell)
        images = len(opened.source)
        flags = {key: value for key, value in cell.facts.items() if key not in {"model", "data"}} | {
            "images": images,
            "of": opened.total,
            "subset": images < opened.total,
            "masked": cell.set in MASKED,
            "img_size": "{}x{}".format(*setting.subject.img_size),
            "device": setting.device.type,
        }
        return {
            "set": cell.set,
            "corruption": cell.corruption,
            "severity": cell.severity,
            "figures": figures,
            "images": images,
            "flags": flags,
            "model": setting.subject.digest,
            "data": opened.digest,
            "config": config_hash(config),
            "seed": config.seed,
            "git_commit": setting.commit,
            "seconds": time.monotonic() - begun,
            **more,
        }


# --- classifiers and backbones --------------------------------------------------------------------------------------


class ClassifierCells:
    """An `Examine`: a classifier or backbone; images and clean features that several cells share are kept."""

    def __init__(
        self,
        config: RobustConfig,
        subject: Subject,
        sets: Mapping[str, OpenSet],
        device: torch.device,
        reading: Reading,
        beat: Beat,
    ) -> None:
        self._config, self._subject, self._sets = config, subject, sets
        self._device, self._reading, self._beat = device, reading, beat
        self._images: dict[str, Images] = {}
        self._clean_features: np.ndarray | None = None

    def __call__(self, cell: Cell) -> Found:
        """The figures of one cell."""
        opened = self._sets[cell.set]
        if cell.set == "imagenet_c":
            opened = open_released_cell(cell, opened, self._config, self._subject)
        kinds = {"representation": self._cosine, "imagenet_val": self._val, **dict.fromkeys(MASKED, self._masked)}
        return Found(kinds.get(cell.set, self._accuracy)(cell, opened), opened)

    def _accuracy(self, cell: Cell, opened: OpenSet) -> dict[str, float]:
        return accuracy_figures(self._answers(cell, opened, ()), _labels(opened))

    def _masked(self, cell: Cell, opened: OpenSet) -> dict[str, float]:
        rows = self._answers(cell, opened, (cell.set,))
        return masked_figures(rows, _labels(opened), cell.set)

    def _val(self, cell: Cell, opened: OpenSet) -> dict[str, float]:
        """All that one pass over ImageNet's validation set tells: also on the classes of -A and -R, and by ReaL."""
        rows, labels = self._answers(cell, opened, MASKED), _labels(opened)
        figures = accuracy_figures(rows, labels)
        for name in MASKED:
            among = np.isin(labels, _columns(name, self._subject))
            if among.any():  # a small subset may hold none
                figures[f"{name}_classes_top1_pct"] = pct(rows[f"{name}/prediction"][among] == labels[among])
                figures[f"{name}_classes_unmasked_top1_pct"] = pct(rows["top5"][among, 0] == labels[among])
        return figures | ({} if opened.targets is None else real_figures(rows, opened.targets))

    def _cosine(self, cell: Cell, opened: OpenSet) -> dict[str, float]:
        if self._clean_features is None:
            self._clean_features = self._features(Cell(cell.set, CLEAN, 0, {}), opened)
        return cosine_figures(self._clean_features, self._features(cell, opened))

    def _features(self, cell: Cell, opened: OpenSet) -> np.ndarray:
        features = self._subject.features
        return self._pass(cell, opened)(lambda images: {"features": features(images)})["features"]

    def _answers(self, cell: Cell, opened: OpenSet, masks: Sequence[str]) -> dict[str, np.ndarray]:
        subject = self._subject
        assert subject.logits is not None, "RobustConfig has a classifier for whatever needs answers"
        return self._pass(cell, opened)(class_answers(subject.logits, {m: _columns(m, subject) for m in masks}))

    def _pass(self, cell: Cell, opened: OpenSet) -> Pass:
        transform, fit = preparation(cell.set, self._config, self._subject)
        images = self._images.get(cell.set)
        if images is None and cell.set in CORRUPTED_HERE:
            images = self._images[cell.set] = Images(opened.source, opened.ids, transform, self._reading)
        elif images is None:  # read once; each cell of ImageNet-C has files of its own
            images = Images(opened.source, opened.ids, transform, replace(self._reading, keep_bytes=0))
        return Pass(images, self._device, corruption_of(cell, self._config.frost_textures), fit, self._beat)


def preparation(name: str, config: RobustConfig, subject: Subject) -> tuple[Transform, Transform]:
    """What is done to the images of a set before they are corrupted, and what brings them to the model's input."""
    own = EvalTransform(subject.img_size, subject.crop_ratio)
    resize = partial(at_size, size=subject.img_size)
    if name == "imagenet_c":
        return ReleasedTransform(), resize
    if name == "imagenet_c_otf":
        return OfficialTransform((RELEASED_PX, RELEASED_PX)), resize
    if name not in CORRUPTED_HERE:  # -A, -R, -Sketch, -V2 and the clean validation set
        return (OfficialTransform(subject.img_size) if config.transform == "official" else own), resize
    if config.corrupts_input():
        return own, resize

    def fit(image: Tensor) -> Tensor:
        as_it_is = image.shape[-2:] == subject.img_size and subject.crop_ratio == 1
        return image if as_it_is else own(image.cpu())

    return Decoded(), fit


def corruption_of(cell: Cell, frost_textures: Path | None) -> Corrupt | None:
    """The corruption of a cell as a function of images and their ids; None where the images are taken as they are."""
    if cell.corruption == CLEAN or cell.set not in CORRUPTED_HERE:
        return None
    facts = cell.facts
    textures = load_textures(frost_textures) if cell.corruption == "frost" else None

    def apply(images: Tensor, ids: Sequence[int]) -> Tensor:
        if min(images.shape[-2:]) < MIN_SIDE:
            size = "{}x{}".format(*images.shape[-2:])
            raise DataError(f"{cell}: image number {ids[0]} has {size} px; corruptions need sides of {MIN_SIDE} px")
        corrupted = corrupt(
            images, cell.corruption, cell.severity, image_ids=ids, seed=facts["seed"], definition=facts["definition"],
            draws_on=facts["draws"], textures=textures,
        )  # fmt: skip
        return jpeg_step(corrupted) if facts["jpeg_step"] else corrupted

    return apply


def _labels(opened: OpenSet) -> np.ndarray:
    assert opened.source.labels is not None, "sets with answers were opened with labels"
    return opened.source.labels


def _columns(name: str, subject: Subject) -> np.ndarray:
    return columns_of(subset_synsets(name), subject.classes)
