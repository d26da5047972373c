"""What is done with the regions that the RPN proposes: classes, better boxes, masks. Spec detection 4.

Letters: B images, R ROIs of all images, N detections, K classes, S side of a small mask.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from core.config import Config
from transfer.detection.box_head import BoxHead, box_losses
from transfer.detection.boxes import BoxCoder
from transfer.detection.inference import Selected, select
from transfer.detection.mask_head import MaskHead, mask_loss, of_class
from transfer.detection.masks import mask_targets
from transfer.detection.matching import Permutation
from transfer.detection.pooling import RoiPooler
from transfer.detection.rois import LabelledRois, image_of_each, sample_rois
from transfer.detection.rpn import Proposals
from transfer.detection.targets import PaddedTruth, Targets

BOX_POOLED_SIZE, MASK_POOLED_SIZE, MASK_SIZE = 7, 14, 28
FIRST_THRESHOLD = 0.5  # overlap from which on a proposal is an object
FIRST_CODER = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))


class ROIHeadsConfig(Config):
    """Numbers of the heads. Defaults: ViTDet."""

    num_box_convs: NonNegativeInt = 4
    box_fc_dim: PositiveInt = 1024
    num_mask_convs: NonNegativeInt = 4
    batch_size_per_image: PositiveInt = 512  # regions of an image that are trained on
    positive_fraction: float = Field(0.25, gt=0, le=1)  # at most so many of them hold an object
    score_threshold: float = Field(0.05, ge=0, lt=1)  # what a detection's score must exceed
    nms_threshold: float = Field(0.5, gt=0, le=1)  # overlap up to which detections of a class stand side by side
    detections_per_image: PositiveInt = 100


class ROIHeads(nn.Module, ABC):
    """What both kinds of box heads share: sampling, the mask head, the choice of detections."""

    def __init__(self, config: ROIHeadsConfig, num_classes: int, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.pool = RoiPooler(strides)
        self.mask = MaskHead(channels, config.num_mask_convs, num_classes)

    @abstractmethod
    def box_losses(
        self, features: Sequence[Tensor], rois: LabelledRois, truth: PaddedTruth, sizes: Tensor
    ) -> dict[str, Tensor]:
        """Losses of classes and boxes of the sampled regions."""

    @abstractmethod
    def predict(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Of regions [R, 4] of images [R]: boxes [R, K * 4] or [R, 4], and probabilities [R, K + 1]."""

    @abstractmethod
    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise all heads."""

    def losses(
        self,
        features: Sequence[Tensor],
        proposals: Sequence[Proposals],
        targets: Sequence[Targets],
        sizes: Tensor,
        permutation: Permutation,
    ) -> dict[str, Tensor]:
        """Losses of boxes and masks, 0-dim float32 each.

        Args:
            features: p2 ... p5 (p6 is ignored), each [B, C, h, w].
            sizes: [B, 2], (height, width) of the images without padding.
        """
        config, truth = self.config, PaddedTruth.of(targets)
        rois = sample_rois(
            [proposal.boxes for proposal in proposals],
            truth,
            threshold=FIRST_THRESHOLD,
            num_classes=self.num_classes,
            batch_size_per_image=config.batch_size_per_image,
            positive_fraction=config.positive_fraction,
            permutation=permutation,
        )
        objects = rois.objects
        # What polygons are drawn from is fetched before the heads start, and used while an accelerator computes them.
        instances, boxes = objects.instances.cpu(), objects.boxes.cpu()
        losses = self.box_losses(features, rois.all, truth, sizes)
        logits = self.mask(self.pool(features, objects.boxes, objects.image, MASK_POOLED_SIZE))  # [R, K, S, S]
        wanted = mask_targets(targets, rois.num_objects, instances, boxes, MASK_SIZE, logits.device)
        return {**losses, "loss_mask": mask_loss(logits, objects.labels, wanted)}

    @torch.no_grad()
    def detect(
        self, features: Sequence[Tensor], proposals: Sequence[Proposals], sizes: Tensor
    ) -> list[tuple[Selected, Tensor]]:
        """Detections of each image, in pixels of the network image, and their small masks, [N, S, S] probabilities."""
        config = self.config
        counts = [len(proposal.boxes) for proposal in proposals]
        boxes = torch.cat([proposal.boxes for proposal in proposals])  # [R, 4]
        boxes, probabilities = self.predict(features, boxes, image_of_each(counts, boxes.device), sizes)
        found = [
            select(
                *of_image,
                score_threshold=config.score_threshold,
                nms_threshold=config.nms_threshold,
                limit=config.detections_per_image,
            )
            for of_image in zip(boxes.split(counts), probabilities.split(counts), sizes, strict=True)
        ]
        counts = [len(selected.boxes) for selected in found]
        boxes, labels = torch.cat([s.boxes for s in found]), torch.cat([s.labels for s in found])  # [N, 4], [N]
        logits = self.mask(self.pool(features, boxes, image_of_each(counts, boxes.device), MASK_POOLED_SIZE))
        masks = of_class(logits, labels).sigmoid()  # [N, S, S]
        return list(zip(found, masks.split(counts), strict=True))


class StandardROIHeads(ROIHeads):
    """The heads of Mask R-CNN: one box head, with boxes of their own for each class."""

    def __init__(self, config: ROIHeadsConfig, num_classes: int, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__(config, num_classes, channels, strides)
        self.box = BoxHead(
            channels, BOX_POOLED_SIZE, config.num_box_convs, config.box_fc_dim, num_classes, class_agnostic=False
        )

    def box_losses(
        self, features: Sequence[Tensor], rois: LabelledRois, truth: PaddedTruth, sizes: Tensor
    ) -> dict[str, Tensor]:
        """loss_cls and loss_box_reg."""
        scores, deltas = self.box(self.pool(features, rois.boxes, rois.image, BOX_POOLED_SIZE))
        loss_cls, loss_box_reg = box_losses(scores, deltas, rois, FIRST_CODER)
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box_reg}

    def predict(self, features: Sequence[Tensor], boxes: Tensor, image: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [R, K * 4], not clipped, and probabilities [R, K + 1] of regions [R, 4] of images [R]."""
        scores, deltas = self.box(self.pool(features, boxes, image, BOX_POOLED_SIZE))
        return FIRST_CODER.decode(deltas, boxes), scores.softmax(dim=1)

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise box and mask head. Spec detection 4.3, 4.5."""
        self.box.init_weights(generator)
        self.mask.init_weights(generator)
