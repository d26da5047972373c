"""Evaluation by mmsegmentation: its inference on its transforms, its IoUMetric, and the confusion matrix beside it.

Letters: K classes.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, SegTTAModel
from torch import Tensor

from core.engine import autocast
from core.vit import ViTConfig
from transfer.segmentation.classes import Classes
from transfer.segmentation.miou import confusion_matrix
from transfer.segmentation.mmseg_engine.data import evaluation_batches, evaluation_pipeline
from transfer.segmentation.tasks import SegmentationEvaluator

LOG = "rcmae"  # mmengine's, that says nothing below an error

logger = logging.getLogger("rcmae")


class ConfusionMetric(BaseMetric):
    """What this suite's figures are made of, as a metric of mmengine: integers, where IoUMetric sums float32."""

    results: list[Tensor]

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__(prefix="confusion")
        self._num_classes, self._ignore_index = num_classes, ignore_index

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count the pixels of some images."""
        for sample in data_samples:
            predicted, label = (sample[key]["data"][0] for key in ("pred_sem_seg", "gt_sem_seg"))  # [H, W] each
            counts = confusion_matrix(predicted, label.to(predicted.device), self._num_classes, self._ignore_index)
            self.results = [self.results[0] + counts] if self.results else [counts]

    def compute_metrics(self, results: list[Tensor]) -> dict[str, Tensor]:
        """The matrix of all images, [K, K] int64."""
        return {"matrix": results[0].cpu()}


@dataclass(frozen=True)
class MmsegEvaluator:
    """Images, what their labels mean, and how they are looked at; call it with the framework's network.

    Attributes:
        native: the same of this suite.
        vit: of the network; without relative position bias an image that a window does not fit into is refused.
    """

    native: SegmentationEvaluator
    classes: Classes
    vit: ViTConfig

    @torch.no_grad()
    def __call__(self, model: EncoderDecoder) -> Tensor:
        """The confusion matrix [K, K] int64 over all images; what IoUMetric makes of them is logged."""
        if not MMLogger.check_instance_created(LOG):  # the metrics talk to the latest
            MMLogger.get_instance(LOG, log_level="ERROR")
        pairs, table, labeller = self.native.pairs, self.native.table, self.native.labeller
        counted = ConfusionMetric(len(self.classes), table.ignore_index)
        evaluator = Evaluator([IoUMetric(ignore_index=table.ignore_index, prefix="iou"), counted])
        evaluator.dataset_meta = {"classes": self.classes.names, "palette": self.classes.palette}
        window = None if self.vit.rel_pos_bias else labeller.inference.crop
        pipeline = evaluation_pipeline(self.native.sizes, labeller.flip, window)
        model.eval()
        network = SegTTAModel(module=model) if len(self.native.sizes.ratios) > 1 or labeller.flip else model
        with autocast(labeller.device, labeller.precision), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on labels of several views, which lack an axis
            for batch in evaluation_batches(pairs, table, pipeline, self.native.num_workers, self.native.timeout_s):
                evaluator.process(data_samples=network.test_step(batch), data_batch=batch)
        figures = evaluator.evaluate(len(pairs))
        own = "  ".join(f"{name} {figures[f'iou/{name}']:.2f}" for name in ("mIoU", "mAcc", "aAcc"))
        logger.info("mmsegmentation's IoUMetric: %s", own)
        return figures["confusion/matrix"]
