"""A linear probe of dense features: batch norm and a 1x1 convolution on what a frozen ViT says of each patch.

Letters: B images, H W an image, D width of the ViT, h w rows and columns of patches, K classes.
"""

import torch
from torch import Tensor, nn

from core.vit import ViT
from transfer.segmentation.losses import pixel_cross_entropy
from transfer.segmentation.resizing import CoarseLogits
from transfer.segmentation.segmentor import LabelsConfig, Segmentor, padded, require_same_size
from transfer.segmentation.upernet import init_conv_seg


class LinearHead(nn.Module):
    """Batch norm without weights, which the convolution would make superfluous, and class scores."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, affine=False)
        self.conv_seg = nn.Conv2d(dim, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, h, w] to class scores [B, K, h, w]."""
        return self.conv_seg(self.bn(x))

    def init_weights(self, generator: torch.Generator) -> None:
        """Scores near zero at first."""
        init_conv_seg(self.conv_seg, generator)


class LinearSegmentor(nn.Module):
    """A frozen ViT and a linear head: the quick measure of what dense features hold. Used as `Segmentor` is."""

    def __init__(self, backbone: ViT, config: LabelsConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone.requires_grad_(False)
        self.head = LinearHead(backbone.config.embed_dim, config.num_classes)

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        branch_scales: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch, as of `Segmentor.losses`; nothing is dropped, so both noises are left alone.

        Returns: loss_decode, 0-dim float32.
        """
        require_same_size(images, labels)
        scores = self.head(self.features(images))  # [B, K, h, w]
        return {"loss_decode": pixel_cross_entropy(scores, labels, self.config.average, self.config.ignore_index)}

    @torch.no_grad()
    def logits(self, images: Tensor) -> CoarseLogits:
        """Class scores of images [B, C, H, W] of any size, one per patch, in evaluation mode.

        Raises: ValueError for images larger than relative position bias is made for.
        """
        assert not self.training, "in training mode batch norm would mix the images; call eval() first"
        whole = padded(images, self.backbone.config, min_patches=1)
        return CoarseLogits(self.head(self.features(whole)).float(), (whole.shape[2], whole.shape[3]))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Patch tokens after the last block and the final norm, where there is one: [B, D, h, w]."""
        (last,) = self.backbone.feature_maps(images, [self.backbone.config.depth - 1])  # [B, D, h, w]
        return self.backbone.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise the head; the ViT comes from a backbone."""
        self.head.init_weights(generator)


Network = Segmentor | LinearSegmentor
