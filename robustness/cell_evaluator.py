"""Evaluates one cell of the grid: reads its images, corrupts them, asks the model, and says what the figures mean."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

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
from robustness.results import MASKED
from robustness.settings import RobustConfig
from robustness.subject import Subject


@dataclass(frozen=True)
class Setting:
    """What follows from configuration, model, data and machine."""

    config: RobustConfig
    subject: Subject
    sets: Mapping[str, OpenSet]
    cells: Sequence[Cell]
    device: torch.device
    reading: Reading
    commit: str | None


class CellEvaluator:
    """Evaluates cells one after the other; images and clean features that several cells share are kept."""

    def __init__(self, setting: Setting, beat: Callable[[], None]) -> None:
        self._setting, self._beat = setting, beat
        self._images: dict[str, Images] = {}
        self._clean_features: np.ndarray | None = None

    def evaluate(self, cell: Cell) -> dict[str, Any]:
        """All that is kept of a cell: figures, and what they must be read with."""
        setting, config, begun = self._setting, self._setting.config, time.monotonic()
        opened = setting.sets[cell.set]
        if cell.set == "imagenet_c":
            opened = open_released_cell(cell, opened, config, setting.subject)
        figures = self._figures(cell, opened)
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
        }

    def _figures(self, cell: Cell, opened: OpenSet) -> dict[str, float]:
        kinds = {"representation": self._cosine, "imagenet_val": self._val, **dict.fromkeys(MASKED, self._masked)}
        return kinds.get(cell.set, self._accuracy)(cell, opened)

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
            among = np.isin(labels, _columns(name, self._setting.subject))
            if among.any():  # a small subset may hold none
                figures[f"{name}_classes_top1_pct"] = pct(rows[f"{name}/prediction"][among] == labels[among])
                figures[f"{name}_classes_unmasked_top1_pct"] = pct(rows["top5"][among, 0] == labels[among])
        return figures | ({} if opened.targets is None else real_figures(rows, opened.targets))

    def _cosine(self, cell: Cell, opened: OpenSet) -> dict[str, float]:
        if self._clean_features is None:
            self._clean_features = self._features(Cell(cell.set, CLEAN, 0, {}), opened)
        return cosine_figures(self._clean_features, self._features(cell, opened))

    def _features(self, cell: Cell, opened: OpenSet) -> np.ndarray:
        features = self._setting.subject.features
        return self._pass(cell, opened)(lambda images: {"features": features(images)})["features"]

    def _answers(self, cell: Cell, opened: OpenSet, masks: Sequence[str]) -> dict[str, np.ndarray]:
        subject = self._setting.subject
        assert subject.logits is not None, "RobustConfig has a classifier for whatever needs answers"
        return self._pass(cell, opened)(class_answers(subject.logits, {m: _columns(m, subject) for m in masks}))

    def _pass(self, cell: Cell, opened: OpenSet) -> Pass:
        setting = self._setting
        transform, fit = preparation(cell.set, setting.config, setting.subject)
        images = self._images.get(cell.set)
        if images is None and cell.set in CORRUPTED_HERE:
            images = self._images[cell.set] = Images(opened.source, opened.ids, transform, setting.reading)
        elif images is None:  # read once; each cell of ImageNet-C has files of its own
            images = Images(opened.source, opened.ids, transform, replace(setting.reading, keep_bytes=0))
        return Pass(images, setting.device, corruption_of(cell, setting.config), fit, self._beat)


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


def corruption_of(cell: Cell, config: RobustConfig) -> Corrupt | None:
    """The corruption of a cell as a function of images and their ids; None where the images are taken as they are."""
    if cell.corruption == CLEAN or cell.set not in CORRUPTED_HERE:
        return None
    facts = cell.facts
    textures = load_textures(config.frost_textures) if cell.corruption == "frost" else None

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
