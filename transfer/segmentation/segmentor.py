"""The segmentor: four blocks of a plain ViT, neck, UperNet with an auxiliary head. Spec segmentation sections 1 to 5.

Letters: B images, H W an image, P patch side, D width of the ViT, K classes.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from core.config import Config
from core.vit import ViT, ViTConfig
from transfer.segmentation.losses import Average, pixel_cross_entropy
from transfer.segmentation.necks import NUM_LEVELS, Feature2Pyramid
from transfer.segmentation.resizing import CoarseLogits
from transfer.segmentation.upernet import FCNHead, UPerHead

AUX_LEVEL = 2  # of the neck's maps, the one with the stride of the patches


class LabelsConfig(Config):
    """What labels mean to a network and its loss."""

    num_classes: PositiveInt = 150
    ignore_index: NonNegativeInt = 255  # label of pixels that count nothing
    average: Average = "all_pixels"  # of the cross entropy, as published; "valid_pixels" is the usual one

    def contradictions(self) -> Iterator[str]:
        """Numbers that cannot hold together."""
        if self.ignore_index < self.num_classes:
            yield f"ignore_index={self.ignore_index}: is one of the {self.num_classes} classes"


class SegmentorConfig(LabelsConfig):
    """Sizes and numbers of a segmentor. Defaults: MAE's UperNet on ADE20K."""

    blocks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=NUM_LEVELS, max_length=NUM_LEVELS)] | None = None
    channels: PositiveInt | None = None  # of the decode head; None: as wide as the ViT, as published
    pool_scales: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 6)
    aux_channels: PositiveInt = 256
    aux_weight: float = Field(0.4, gt=0)  # of the auxiliary loss
    dropout_ratio: float = Field(0.1, ge=0, lt=1)  # of channels before the class scores, in both heads


def published_blocks(depth: int) -> tuple[int, ...]:
    """The blocks whose outputs the neck takes: those at a third, half, two thirds and the end of the depth.

    Of 12 blocks 3, 5, 7, 11 and of 24 blocks 7, 11, 15, 23, as published. Spec segmentation section 1.1.
    """
    return tuple(max(1, round(depth * share)) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1))


def segmentation_vit(plain: ViT, *, rel_pos_bias: bool, layer_scale: bool) -> ViT:
    """A pretrained ViT, already made for the crop, as a segmentor has it: without final norm.

    Args:
        rel_pos_bias, layer_scale: as the published MAE segmentor has them; they change nothing at first (tables of
            zeros, factors of one), and the first binds the ViT to its `img_size`.
    """
    changes = {"rel_pos_bias": rel_pos_bias, "layer_scale": layer_scale, "final_norm": False}
    vit = ViT(ViTConfig(**{**plain.config.model_dump(), **changes}))
    known = plain.state_dict()
    vit.load_state_dict({name: known.get(name, tensor) for name, tensor in vit.state_dict().items()})
    return vit


def padded(images: Tensor, vit: ViTConfig, min_patches: int) -> Tensor:
    """Images [B, C, H, W] with zeros (the mean, after normalisation) at the right and below, so that a ViT takes them.

    Args:
        min_patches: fewest rows and columns of patches that what follows the ViT can do with.
    Returns: [B, C, H', W'], both divisible by P; of the size that it is made for where a ViT has `rel_pos_bias`.
    Raises: ValueError for an image larger than that.
    """
    H, W = images.shape[2:]
    P = vit.patch_size
    height, width = (max(min_patches, -(-side // P)) * P for side in (H, W))
    if vit.rel_pos_bias:
        if height > vit.img_size[0] or width > vit.img_size[1]:
            made_for = "x".join(map(str, vit.img_size))
            raise ValueError(
                f"image of {H}x{W} px: relative position bias is made for {made_for}; slide a window of that size"
            )
        height, width = vit.img_size
    return images if (height, width) == (H, W) else F.pad(images, (0, width - W, 0, height - H))


class Segmentor(nn.Module):
    """UperNet on a plain ViT."""

    def __init__(self, backbone: ViT, config: SegmentorConfig) -> None:
        super().__init__()
        dim, depth = backbone.config.embed_dim, backbone.config.depth
        self.config = config
        self.blocks = config.blocks or published_blocks(depth)
        channels = config.channels or dim
        self.backbone = backbone
        self.neck = Feature2Pyramid(dim)
        self.decode_head = UPerHead(dim, channels, config.num_classes, config.pool_scales, config.dropout_ratio)
        self.auxiliary_head = FCNHead(dim, config.aux_channels, config.num_classes, config.dropout_ratio)

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        branch_scales: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of a batch; their plain sum is what is trained on.

        In training mode batch norm uses the batch, which must then be more than one image (of all processes, where it
        is synchronised), and follows it with its running statistics.

        Args:
            images: [B, C, H, W] float, normalised; H and W divisible by P, as `ViT.feature_maps` needs them.
            labels: [B, H, W], any integer type: 0..K-1 or `ignore_index`.
            generator: what dropout is drawn from; None drops nothing.
            branch_scales: of `core.vit.drop_path_scales`; None drops nothing.
        Returns: loss_decode, loss_aux, 0-dim float32 each.
        Raises: ValueError if images and labels differ in size.
        """
        require_same_size(images, labels)
        maps = self.features(images, branch_scales)
        average, ignore_index = self.config.average, self.config.ignore_index
        decode = pixel_cross_entropy(self.decode_head(maps, generator), labels, average, ignore_index)
        aux = pixel_cross_entropy(self.auxiliary_head(maps[AUX_LEVEL], generator), labels, average, ignore_index)
        return {"loss_decode": decode, "loss_aux": self.config.aux_weight * aux}

    @torch.no_grad()
    def logits(self, images: Tensor) -> CoarseLogits:
        """Class scores of images, a quarter of a patch apart, in evaluation mode.

        Args:
            images: [B, C, H, W] float, normalised, of any size; see `padded`.
        Raises: ValueError for images larger than relative position bias is made for.
        """
        assert not self.training, "in training mode batch norm would mix the images; call eval() first"
        whole = padded(images, self.backbone.config, min_patches=2)  # of which the neck's last map is a half
        scores = self.decode_head(self.features(whole))  # [B, K, H' / (P / 4), W' / (P / 4)]
        return CoarseLogits(scores.float(), (whole.shape[2], whole.shape[3]))

    def features(self, images: Tensor, branch_scales: Tensor | None = None) -> list[Tensor]:
        """What the heads see of normalised images [B, C, H, W]: four maps of `Feature2Pyramid`."""
        return self.neck(self.backbone.feature_maps(images, list(self.blocks), branch_scales))

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise all but the ViT, which comes from a backbone."""
        self.neck.init_weights(generator)
        self.decode_head.init_weights(generator)
        self.auxiliary_head.init_weights(generator)


def build_segmentor(backbone: ViT, config: SegmentorConfig) -> Segmentor:
    """A segmentor on a ViT of `segmentation_vit`, not yet initialised.

    Raises: ValueError for blocks that the ViT does not have, or a final norm, which would never have a gradient.
    """
    depth = backbone.config.depth
    if config.blocks and max(config.blocks) >= depth:
        raise ValueError(f"blocks={list(config.blocks)}: the backbone has {depth} blocks, 0 to {depth - 1}")
    if isinstance(backbone.norm, nn.LayerNorm):
        raise ValueError("the backbone has a final norm, which a segmentor has no use for; see segmentation_vit")
    return Segmentor(backbone, config)


def require_same_size(images: Tensor, labels: Tensor) -> None:
    """Raises: ValueError unless there is a label for every pixel of images [B, C, H, W]."""
    if (len(images), *images.shape[2:]) != tuple(labels.shape):
        found, wanted = list(labels.shape), [len(images), *images.shape[2:]]
        raise ValueError(f"losses: labels are {found}, expected {wanted} as the images have it")
