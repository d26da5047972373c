"""Detection as a Task: all losses of Mask R-CNN on jittered images, COCO's average precision on whole ones."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core.distributed import Processes
from core.engine import autocast
from core.loader import Read, eval_loader
from core.task import Place
from core.vit import drop_path_scales
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import Figures, Row, detection_rows, evaluate, gather_rows
from transfer.detection.data import DetectionBatch, detection_batch, evaluation_images, normalized
from transfer.detection.mask_rcnn import MaskRCNN
from transfer.detection.matching import random_permutation

EVAL_BATCH_SIZE = 1  # as published


@dataclass(frozen=True)
class CocoEvaluator:
    """Images and how they are read; call it with a detector.

    Attributes:
        read: what reads them; another one may do something to each before it is resized.
    """

    coco: CocoSet
    side: int
    device: torch.device
    precision: str
    batch_size: int
    num_workers: int
    timeout_s: int
    processes: Processes
    read: Read = eval_loader

    def __call__(self, model: MaskRCNN) -> list[Row]:
        """Detections in all images, each evaluated once; every process gets all of them."""
        images = evaluation_images(self.coco, self.side)
        rows: list[Row] = []
        seen: list[int] = []
        for loaded in self.read(images, self.batch_size, self.num_workers, self.timeout_s, self.processes, None):
            batch = detection_batch(loaded, self.coco, self.side).to(self.device)
            with autocast(self.device, self.precision):
                found = model.detect(normalized(batch, torch.float32), batch.sizes, batch.original_sizes)
            for index, valid, detections in zip(batch.indices, loaded.valid.tolist(), found, strict=True):
                if valid:
                    seen.append(index)
                    rows += detection_rows(index, detections)
        return gather_rows(rows, seen, self.coco, self.processes)


def average_precisions(figures: Figures) -> dict[str, float]:
    """Of all figures of an evaluation those over all categories, of precision, where they are defined."""
    found = {name: value for name, value in figures.items() if re.fullmatch(r"\w+_ap\w*", name)}
    return {name: value for name, value in found.items() if value is not None}


class Evaluated(NamedTuple):
    """The detections of an evaluation, and all its figures."""

    rows: list[Row]
    figures: Figures


class DetectionTask:
    """A detector under all its losses; see `core.task.Task`."""

    def __init__(
        self, model: MaskRCNN, drop_path: float, seed: int, evaluator: CocoEvaluator, draw: "Draw | None" = None
    ) -> None:
        self.model, self._drop_path, self._seed, self._evaluator, self._draw = model, drop_path, seed, evaluator, draw
        self.latest: Evaluated | None = None

    def losses(self, batch: DetectionBatch, at: Place) -> dict[str, Tensor]:
        """Losses of proposals, boxes and masks; anchors, regions and drop path are drawn from the place in the run."""
        images = normalized(batch, torch.float32)
        generator = at.generator(self._seed, images.device)
        scales = None
        if self._drop_path:
            depth = self.model.backbone.vit.config.depth
            scales = drop_path_scales(self._drop_path, depth, len(images), generator)
        return self.model.losses(images, batch.sizes, batch.targets, random_permutation(generator), scales)

    def after_update(self, step: int, finite: Tensor) -> None:
        """Nothing follows the weights."""

    def observe(self, step: int) -> dict[str, float]:
        """Nothing is measured beside the losses."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """COCO's average precision on the validation images."""
        rows = self._evaluator(self.model)
        self.latest = Evaluated(rows, evaluate(self._evaluator.coco, rows))
        return {f"eval/{name}": value for name, value in average_precisions(self.latest.figures).items()}

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Detections on a few validation images."""
        return {"detections": self._draw(self.model)} if self._draw else {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of the detector's parameters."""
        return self.model.named_parameters()

    def modules(self) -> Mapping[str, nn.Module]:
        """The detector."""
        return {"detector": self.model}


Draw = Callable[[MaskRCNN], np.ndarray]  # uint8 [H, W, 3]
