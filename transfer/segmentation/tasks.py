"""Segmentation as a Task: cross entropy over the pixels of crops, mean IoU on whole images.

Letters: H W an image, K classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from core.distributed import Processes
from core.engine import autocast
from core.loader import Read, eval_loader
from core.parallel import whole
from core.task import Place
from core.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from core.vit import drop_path_scales
from transfer.segmentation.augment import fitted_size
from transfer.segmentation.batch_norm import RunningStatistics
from transfer.segmentation.data import (
    EvaluationBatch,
    SegmentationBatch,
    evaluation_images,
    normalized,
    one_image,
)
from transfer.segmentation.labels import LabelTable
from transfer.segmentation.linear_head import LinearSegmentor, Network
from transfer.segmentation.miou import SegmentationScores, confusion_matrix, scores_of
from transfer.segmentation.pairs import SegmentationSet
from transfer.segmentation.slide import InferenceConfig, Size, image_labels

EVAL_BATCH_SIZE = 1  # as published; images have sizes of their own


@dataclass(frozen=True)
class EvalSizes:
    """The sizes at which an image is looked at. Spec segmentation 6.3 and 6.4.

    Attributes:
        scale: (long, short) sides, in pixels, that an image is brought to fit into.
        ratios: what both are multiplied by, a view each.
        least_px: short side that a view has at least, where it has one.
    """

    scale: tuple[int, int]
    ratios: tuple[float, ...] = (1.0,)
    least_px: int | None = None

    def __call__(self, size: Size) -> tuple[Size, ...]:
        """(height, width) of an image to those of its views."""
        return tuple(self._view(size, ratio) for ratio in self.ratios)

    def _view(self, size: Size, ratio: float) -> Size:
        fitted = fitted_size(size, (int(self.scale[0] * ratio), int(self.scale[1] * ratio)))
        if self.least_px is None or min(fitted) >= self.least_px:
            return fitted
        return fitted_size(size, (self.least_px * max(size), self.least_px))  # the long side decides nothing


@dataclass(frozen=True)
class Labeller:
    """From the views of an image to its labels; call it with a network.

    Attributes:
        flip: whether mirror images are looked at as well.
        precision: fp32 or bf16, of the network.
    """

    inference: InferenceConfig
    device: torch.device
    precision: str
    flip: bool = False

    @torch.no_grad()
    def __call__(self, model: Network, views: Sequence[Tensor], size: Size) -> Tensor:
        """The class of every pixel of one image, [H, W] int64 on the device.

        Of several views the mean probability counts, of a single one the score.

        Args:
            model: in evaluation mode.
            views: the image at one or more sizes, uint8 [1, 3, h, w] each.
            size: (height, width) that labels are wanted at.
        """
        with autocast(self.device, self.precision):
            return image_labels(model, map(self._input, views), size, self.inference, self.flip)[0]

    def _input(self, view: Tensor) -> Tensor:
        return normalize(view.to(self.device, non_blocking=True), IMAGENET_MEAN, IMAGENET_STD, torch.float32)


@dataclass(frozen=True)
class SegmentationEvaluator:
    """Images, what their labels mean, and how they are read; call it with a network in evaluation mode.

    Attributes:
        read: what reads them; another one may do something to each before it is resized.
    """

    pairs: SegmentationSet
    table: LabelTable
    num_classes: int
    sizes: EvalSizes
    labeller: Labeller
    num_workers: int
    timeout_s: int
    processes: Processes
    read: Read = eval_loader

    def __call__(self, model: Network) -> Tensor:
        """The confusion matrix [K, K] int64 over all images, each counted once; every process gets it."""
        device, ignore_index = self.labeller.device, self.table.ignore_index
        confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=device)
        seen: list[int] = []
        for batch in self._batches():
            if not batch.valid.all():
                continue  # only there so that every process has as many
            labels = batch.labels[0].to(device, non_blocking=True)  # [H, W]
            predicted = self.labeller(model, batch.images, (labels.shape[0], labels.shape[1]))
            confusion += confusion_matrix(predicted, labels, self.num_classes, ignore_index)
            seen += batch.indices.tolist()
        everywhere = [index for part in self.processes.gather(seen) for index in part]
        assert sorted(everywhere) == list(range(len(self.pairs))), "every image is evaluated exactly once"
        return self.processes.stack(confusion).sum(dim=0).cpu()

    def _batches(self) -> Iterator[EvaluationBatch]:
        images = evaluation_images(self.pairs, self.table, self.sizes)
        yield from self.read(images, EVAL_BATCH_SIZE, self.num_workers, self.timeout_s, self.processes, one_image)


def trained_part(model: Network) -> nn.Module:
    """What of a network is trained, and so in a checkpoint: all of a segmentor; of a linear one its head."""
    return model.head if isinstance(model, LinearSegmentor) else model


def figures_of(scores: SegmentationScores) -> dict[str, float]:
    """The figures of a set, in per cent."""
    return {"miou_pct": 100 * scores.miou, "macc_pct": 100 * scores.macc, "aacc_pct": 100 * scores.aacc}


class SegmentationTask:
    """UperNet with its ViT, or a linear head on a frozen one; see `core.task.Task`.

    Batch norm uses the batch in `losses` alone; everywhere else the network is in evaluation mode. A frozen ViT always
    is.
    """

    def __init__(
        self,
        model: Network,
        drop_path: float,
        seed: int,
        evaluator: "Evaluate",
        processes: Processes,
        build: Callable[[], Network],
        draw: "Draw | None" = None,
    ) -> None:
        """`build` makes a network of the same sizes, whose weights do not matter."""
        self.model = model.eval()
        self.part = trained_part(model)
        self._drop_path = 0.0 if isinstance(model, LinearSegmentor) else drop_path
        self._seed, self._evaluator, self._processes = seed, evaluator, processes
        self._build, self._draw = build, draw
        self._statistics = RunningStatistics(self.part)
        self.latest: Tensor | None = None  # confusion matrix of the last evaluation

    def losses(self, batch: SegmentationBatch, at: Place) -> dict[str, Tensor]:
        """Cross entropy of the heads; dropout and drop path are drawn from the place in the run."""
        if at.turn == 0:
            self._statistics.begin()
        images = normalized(batch, torch.float32)
        generator = at.generator(self._seed, images.device)
        scales = None
        if self._drop_path:
            depth = self.model.backbone.config.depth
            scales = drop_path_scales(self._drop_path, depth, len(images), generator)
        self.part.train()
        try:
            return self.model.losses(images, batch.labels, generator, scales)
        finally:
            self.part.eval()

    def after_update(self, step: int, finite: Tensor) -> None:
        """Keep the running statistics of the step; not where `finite` is False."""
        self._statistics.settle(finite, self._processes)

    def observe(self, step: int) -> dict[str, float]:
        """Nothing is measured beside the losses."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """IoU and accuracies on the validation images."""
        self.latest = self._evaluator(self._whole())
        return {f"eval/{name}": value for name, value in figures_of(scores_of(self.latest)).items()}

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Labels of a few validation images."""
        if self._draw is None:
            return {}
        model = self._whole()
        return {"labels": self._draw(model)} if self._processes.is_main else {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained: all of a segmentor, or the linear head."""
        return self.part.named_parameters()

    def modules(self) -> Mapping[str, nn.Module]:
        """The segmentor, or the head; a frozen backbone is what its file says."""
        return {"segmentor": self.part}

    def _whole(self) -> Network:
        """The network with all its weights: images take different numbers of windows, and processes so many calls."""
        return whole(self.model, self._build)


Draw = Callable[[Network], np.ndarray]  # uint8 [H, W, 3]
Evaluate = Callable[[Network], Tensor]  # confusion matrix [K, K] int64; a `SegmentationEvaluator`
