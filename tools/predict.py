"""`rcmae predict`: a detector or a segmentor on any folder of photographs. Here is what both kinds share."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from rich.progress import track
from torch import Tensor

from core.datasets import ImageSource, open_images
from core.errors import CheckpointError, ConfigError, DataError, shown
from core.images import MAX_PIXELS, BadImage
from core.loader import read_image
from core.log import console_logging
from core.machine import choose_device
from core.model_directory import kind_of
from tools.predict_detect import DetectorPredictions
from tools.predict_segment import SegmentorPredictions
from transfer.detection.detector import KIND as DETECTOR
from transfer.segmentation.directory import KIND as SEGMENTOR

MIN_SCORE = 0.5  # from which on detections are drawn, where nothing else is said

logger = logging.getLogger("rcmae")


class Predictions(Protocol):
    """A model at work on photographs, one after the other."""

    def add(self, stem: str, index: int, name: str, image: Tensor) -> None:
        """Look at a photograph uint8 [3, H, W] and write what was found, in files that are called `stem`."""

    def finish(self) -> str:
        """Write what is about all of them; returns a line that sums up."""


def predict(
    model: Path, images: Path, out: Path, min_score: float | None, device_name: str, precision: str, cache: Path
) -> None:
    """Use a model on every image of a folder, tar or single file, and write into `out`.

    What is written depends on the kind of model, which its directory says. A broken image is left out, by name.

    Args:
        min_score: from which on detections are drawn; a segmentor has none.
    Raises: ConfigError where `out` holds something; CheckpointError, DataError.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{shown(out)}: not empty; give another --out")
    with console_logging():
        predictions = _opener(model, min_score)(model, out, choose_device(device_name), precision)
        source = _open(images, cache)
        num_read = 0
        for index in track(range(len(source)), "looking"):
            name = source.name(index)
            try:
                image = read_image(source, index, 3, MAX_PIXELS)
            except BadImage as error:
                logger.warning("left out %s: %s", name, error)
                continue
            predictions.add(f"{index:06d}_{_safe(name)}", index, name, image)
            num_read += 1
        if not num_read:
            raise DataError(f"{shown(images)}: no image in it could be read")
        logger.info("%d images, %s", num_read, predictions.finish())


def _opener(model: Path, min_score: float | None) -> Callable[[Path, Path, torch.device, str], Predictions]:
    """What makes `Predictions` of a directory, by its kind."""
    kind = kind_of(model)
    if kind == DETECTOR:
        return partial(DetectorPredictions, min_score=MIN_SCORE if min_score is None else min_score)
    if kind == SEGMENTOR:
        if min_score is not None:
            raise ConfigError("--min-score: a segmentor gives every pixel its likeliest class; leave it out")
        return SegmentorPredictions
    raise CheckpointError(
        f"{shown(model)}: no detector directory, and no segmentor's; expected what rcmae detect or segment writes"
    )


def _open(images: Path, cache: Path) -> ImageSource:
    if not images.is_file() or images.suffix.lower() in {".tar", ".tgz", ".gz"}:
        return open_images(str(images), cache)
    whole = open_images(str(images.parent), cache)
    names = [whole.names[index].decode("utf-8", "surrogateescape") for index in range(len(whole))]
    chosen = [index for index, name in enumerate(names) if name == images.name]
    if not chosen:
        raise DataError(f"{shown(images)}: no image by its ending; expected a photograph or a folder of them")
    return whole.subset(torch.tensor(chosen).numpy())


def _safe(name: str) -> str:
    """A file name of a name that may hold folders and anything else."""
    stem = Path(name).stem
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:80]
