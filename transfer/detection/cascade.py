"""The heads of Cascade Mask R-CNN: three box heads, each with the boxes of the one before. Spec detection 4.6.

Letters: B images, R ROIs of all images, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfer.detection.box_head import BoxHead, box_losses
from transfer.detection.boxes import BoxCoder, clip, nonempty
from transfer.detection.roi_heads import BOX_POOLED_SIZE, FIRST_CODER, FIRST_THRESHOLD, ROIHeads, ROIHeadsConfig
from transfer.detection.rois import LabelledRois, match_rois
from transfer.detection.targets import PaddedTruth

THRESHOLDS = (FIRST_THRESHOLD, 0.6, 0.7)
CODERS = (FIRST_CODER, BoxCoder(weights=(20.0, 20.0, 10.0, 10.0)), BoxCoder(weights=(30.0, 30.0, 15.0, 15.0)))
NUM_STAGES = len(CODERS)


class CascadeROIHeads(ROIHeads):
    """Three box heads whose boxes do not depend on the class, asked for better and better overlaps."""

    def __init__(self, config: ROIHeadsConfig, num_classes: int, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__(config, num_classes, channels, strides)
        self.stages = nn.ModuleList(
            BoxHead(
                channels, BOX_POOLED_SIZE, config.num_box_convs, config.box_fc_dim, num_classes, class_agnostic=True
            )
            for _ in range(NUM_STAGES)
        )

    def box_losses(
        self, features: Sequence[Tensor], rois: LabelledRois, truth: PaddedTruth, sizes: Tensor
    ) -> dict[str, Tensor]:
        """loss_cls_stage0 ... 2 and loss_box_reg_stage0 ... 2, all of weight 1."""
        losses = {}
        for stage, (head, coder) in enumerate(zip(self.stages, CODERS, strict=True)):
            pooled = self.pool(features, rois.boxes, rois.image, BOX_POOLED_SIZE)
            # All stages together pull at the pyramid with the strength of one.
            scores, deltas = head(_ScaleGradient.apply(pooled, 1 / NUM_STAGES))
            losses[f"loss_cls_stage{stage}"], losses[f"loss_box_reg_stage{stage}"] = box_losses(
                scores, deltas, rois, coder
            )
            if stage + 1 < NUM_STAGES:
                boxes = coder.decode(deltas.detach(), rois.boxes)
                rois = relabel(boxes, rois.image, sizes, truth, THRESHOLDS[stage + 1], self.num_classes)
        return losses

    def predict(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [R, 4] of the last stage, not clipped, and the mean of the stages' probabilities [R, K + 1]."""
        probabilities = []
        for stage, (head, coder) in enumerate(zip(self.stages, CODERS, strict=True)):
            if stage:
                boxes = clip(boxes, sizes[image])
            scores, deltas = head(self.pool(features, boxes, image, BOX_POOLED_SIZE))
            probabilities.append(scores.softmax(dim=1))
            boxes = coder.decode(deltas, boxes)
        return boxes, torch.stack(probabilities).mean(dim=0)

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise the box heads and the mask head. Spec detection 4.3, 4.5."""
        for head in self.stages:
            head.init_weights(generator)  # type: ignore[operator]
        self.mask.init_weights(generator)


def relabel(
    boxes: Tensor, image: Tensor, sizes: Tensor, truth: PaddedTruth, threshold: float, num_classes: int
) -> LabelledRois:
    """Boxes [R, 4] of one stage, in images [R] of sizes [B, 2], as regions of the next one in training.

    They are clipped, those without area are dropped, and the rest is matched anew: none is sampled, and the ground
    truth does not come in once more.
    """
    boxes = clip(boxes, sizes[image])
    rows = nonempty(boxes).nonzero()[:, 0]
    return match_rois(boxes[rows], image[rows], truth, threshold, num_classes)


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
