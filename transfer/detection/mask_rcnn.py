"""The detector: ViT, simple feature pyramid, region proposals, heads. ViTDet (arXiv:2203.16527); spec detection 2 to 4.

Letters: B images, S side of the padded square that they lie in, D width of the ViT, K classes.
"""

from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from core.config import Config
from core.vit import ViT
from transfer.detection.cascade import CascadeROIHeads
from transfer.detection.inference import Detections, to_original
from transfer.detection.matching import Permutation
from transfer.detection.pyramid import SimpleFeaturePyramid, strides_of
from transfer.detection.roi_heads import ROIHeads, ROIHeadsConfig, StandardROIHeads
from transfer.detection.rpn import RPN, RPNConfig
from transfer.detection.targets import Targets


class DetectorConfig(Config):
    """Sizes and numbers of a detector. Defaults: ViTDet on COCO."""

    num_classes: PositiveInt = 80
    cascade: bool = False  # three box heads, one upon the other
    channels: PositiveInt = 256  # of the pyramid, and so of all heads
    rpn: RPNConfig = RPNConfig()
    roi: ROIHeadsConfig = ROIHeadsConfig()


class Backbone(nn.Module):
    """A ViT and the pyramid on its last map."""

    def __init__(self, vit: ViT, channels: int) -> None:
        super().__init__()
        self.vit = vit
        self.pyramid = SimpleFeaturePyramid(vit.config.embed_dim, channels)

    def forward(self, images: Tensor, branch_scales: Tensor | None = None) -> list[Tensor]:
        """Normalised images [B, 3, S, S] to p2 ... p6, each [B, C, h, w]; `branch_scales` as in `ViT.feature_maps`."""
        (last,) = self.vit.feature_maps(images, [len(self.vit.blocks) - 1], branch_scales)  # [B, D, S / P, S / P]
        return self.pyramid(last)


class MaskRCNN(nn.Module):
    """Mask R-CNN or Cascade Mask R-CNN on a plain ViT."""

    def __init__(self, backbone: Backbone, rpn: RPN, roi: ROIHeads) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi = backbone, rpn, roi

    def losses(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Sequence[Targets],
        permutation: Permutation,
        branch_scales: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All losses of a batch; their plain sum is what is trained on.

        Args:
            images: [B, 3, S, S] float, normalised, then padded with zeros on the right and below.
            sizes: [B, 2] int64, (height, width) of the images without padding, on the device of the images.
            targets: one per image, tensors on the device of the images.
            permutation: how anchors and regions are sampled; see `random_permutation`.
            branch_scales: of `core.vit.drop_path_scales`; None drops nothing.
        Returns: loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg, loss_mask; of a cascade loss_cls_stage{0,1,2} and
            loss_box_reg_stage{0,1,2} instead of the third and fourth. 0-dim float32 each.
        Raises: NumericError if a proposal is not finite.
        """
        features = self.backbone(images, branch_scales)
        output = self.rpn(features)
        losses = self.rpn.losses(output, targets, permutation)
        proposals = self.rpn.proposals(output, sizes, training=True)
        return {**losses, **self.roi.losses(features, proposals, targets, sizes, permutation)}

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, original_sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """What is in each image, in pixels of the original.

        Args:
            images: [B, 3, S, S] float, normalised, then padded with zeros on the right and below.
            sizes: [B, 2] int64, (height, width) of the images without padding, on the device of the images.
            original_sizes: (height, width) of each before it was resized.
        """
        features = self.backbone(images)
        proposals = self.rpn.proposals(self.rpn(features), sizes, training=False)
        found = self.roi.detect(features, proposals, sizes)
        network_sizes = [(height, width) for height, width in sizes.tolist()]
        return [
            to_original(selected, masks, network_size, original_size)
            for (selected, masks), network_size, original_size in zip(found, network_sizes, original_sizes, strict=True)
        ]

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise all but the ViT, which comes from a backbone."""
        self.backbone.pyramid.init_weights(generator)
        self.rpn.init_weights(generator)
        self.roi.init_weights(generator)


def build_mask_rcnn(vit: ViT, config: DetectorConfig) -> MaskRCNN:
    """A detector on a ViT, not yet initialised."""
    strides = strides_of(vit.config.patch_size)
    heads = CascadeROIHeads if config.cascade else StandardROIHeads
    return MaskRCNN(
        Backbone(vit, config.channels),
        RPN(config.rpn, config.channels, strides),
        heads(config.roi, config.num_classes, config.channels, strides),
    )
