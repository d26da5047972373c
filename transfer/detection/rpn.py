"""The region proposal network: which anchors hold an object, and where exactly. Spec detection 3.

Letters: B images, A anchors of all levels, C channels, G ground truths, k anchors kept of a level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torchvision.ops import batched_nms

from core.config import Config
from core.errors import NumericError
from transfer.detection.anchors import AnchorGenerator
from transfer.detection.boxes import BoxCoder, clip, nonempty, pairwise_iou
from transfer.detection.matching import Matcher, Permutation, sample
from transfer.detection.targets import Targets

BOX_CODER = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
MATCHER = Matcher(thresholds=(0.3, 0.7), labels=(0, -1, 1), allow_low_quality_matches=True)
BACKGROUND = 0  # label of anchors that hold nothing


class RPNConfig(Config):
    """Numbers of the region proposal network. Defaults: ViTDet."""

    anchor_scale: PositiveFloat = 8.0  # side of a square anchor in cells of its level: 32 px where they have 4
    aspect_ratios: tuple[PositiveFloat, ...] = Field((0.5, 1.0, 2.0), min_length=1)  # height / width
    num_convs: PositiveInt = 2
    batch_size_per_image: PositiveInt = 256  # anchors of an image that the losses look at
    positive_fraction: float = Field(0.5, gt=0, le=1)  # at most so many of them hold an object
    pre_nms_topk_train: PositiveInt = 2000  # per level
    pre_nms_topk_test: PositiveInt = 1000
    post_nms_topk_train: PositiveInt = 1000  # per image
    post_nms_topk_test: PositiveInt = 1000
    nms_threshold: float = Field(0.7, gt=0, le=1)


@dataclass(frozen=True)
class Proposals:
    """Regions of one image that may hold an object, the likeliest first: boxes [R, 4], logits [R]. No gradient."""

    boxes: Tensor
    logits: Tensor


@dataclass(frozen=True)
class RPNOutput:
    """What the head says of every anchor, in float32: logits [B, A] and deltas [B, A, 4] of anchors [A, 4].

    Attributes:
        level_sizes: anchors of each level; they add up to A.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    level_sizes: list[int]


class RPNHead(nn.Module):
    """A few 3x3 convolutions, and two 1x1 ones for all anchors of a cell; one head for all levels."""

    def __init__(self, channels: int, num_anchors: int, num_convs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_convs))
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map [B, C, h, w] to logits [B, ratios, h, w] and deltas [B, ratios * 4, h, w] (coordinate fastest)."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.objectness(x), self.deltas(x)


class RPN(nn.Module):
    """Anchors, head, losses and proposals."""

    def __init__(self, config: RPNConfig, channels: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        sizes = tuple(config.anchor_scale * stride for stride in strides)
        self.anchors = AnchorGenerator(sizes, config.aspect_ratios, strides)
        self.head = RPNHead(channels, self.anchors.num_per_cell, config.num_convs)

    def forward(self, features: Sequence[Tensor]) -> RPNOutput:
        """Look at every anchor of p2 ... p6."""
        logits, deltas = [], []
        for feature in features:
            level_logits, level_deltas = self.head(feature)
            logits.append(level_logits.permute(0, 2, 3, 1).flatten(1))  # [B, h * w * ratios]
            level_deltas = level_deltas.unflatten(1, (-1, 4))  # [B, ratios, 4, h, w]
            deltas.append(level_deltas.permute(0, 3, 4, 1, 2).flatten(1, 3))  # [B, h * w * ratios, 4]
        anchors = self.anchors([(f.shape[-2], f.shape[-1]) for f in features], features[0].device)
        return RPNOutput(
            logits=torch.cat(logits, dim=1).float(),  # [B, A]
            deltas=torch.cat(deltas, dim=1).float(),  # [B, A, 4]
            anchors=torch.cat(anchors),  # [A, 4]
            level_sizes=[len(a) for a in anchors],
        )

    def losses(self, output: RPNOutput, targets: Sequence[Targets], permutation: Permutation) -> dict[str, Tensor]:
        """Objectness and place of the sampled anchors, summed, over the number of samples asked for in all images.

        The divisor is the same where an image has fewer anchors to sample. Spec detection 3.5.
        """
        num_anchors = len(output.anchors)
        positive, negative, wanted = [], [], []
        for i, target in enumerate(targets):
            index, labels = MATCHER(pairwise_iou(target.boxes, output.anchors))
            here, elsewhere = self.sample(labels, permutation)
            wanted.append(BOX_CODER.encode(output.anchors[here], target.boxes[index[here]]))
            positive.append(here + i * num_anchors)
            negative.append(elsewhere + i * num_anchors)
        objects, background = torch.cat(positive), torch.cat(negative)
        logits = output.logits.flatten()[torch.cat([objects, background])]
        labels = torch.cat([torch.ones_like(objects), torch.zeros_like(background)]).float()
        loss_cls = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        loss_loc = F.l1_loss(output.deltas.flatten(0, 1)[objects], torch.cat(wanted), reduction="sum")
        divisor = self.config.batch_size_per_image * len(targets)
        return {"loss_rpn_cls": loss_cls / divisor, "loss_rpn_loc": loss_loc / divisor}

    def sample(self, labels: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
        """Positive and negative anchors of an image for the losses, from the labels [A] that MATCHER gave."""
        config = self.config
        return sample(labels, config.batch_size_per_image, config.positive_fraction, BACKGROUND, permutation)

    @torch.no_grad()
    def proposals(self, output: RPNOutput, sizes: Tensor, training: bool) -> list[Proposals]:
        """The likeliest regions of each image. Spec detection 3.6.

        Sorted by raw logit: a sigmoid is 1 from about 18 on, and what it makes equal would change places.

        Args:
            sizes: [B, 2], (height, width) of the images without padding.
            training: which of the configured limits hold.
        Raises: NumericError in training if a candidate is not finite; else such candidates are dropped.
        """
        config = self.config
        pre_nms = config.pre_nms_topk_train if training else config.pre_nms_topk_test
        post_nms = config.post_nms_topk_train if training else config.post_nms_topk_test
        boxes, logits, levels = _top_of_each_level(output, pre_nms)
        finite = boxes.isfinite().all(dim=-1) & logits.isfinite()  # [B, n]
        if training and not finite.all():
            raise NumericError("region proposals are not finite; give a lower lr, or start from other weights")
        boxes = clip(boxes, sizes.unsqueeze(1))
        usable = finite & nonempty(boxes)
        proposals = []
        for image_boxes, image_logits, image_usable in zip(boxes, logits, usable, strict=True):
            rows = image_usable.nonzero()[:, 0]
            kept = batched_nms(image_boxes[rows], image_logits[rows], levels[rows], config.nms_threshold)
            best = rows[kept[:post_nms]]
            proposals.append(Proposals(image_boxes[best], image_logits[best]))
        return proposals

    def init_weights(self, generator: torch.Generator) -> None:
        """Normal weights of deviation 0.01, biases 0."""
        for module in self.head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01, generator=generator)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def _top_of_each_level(output: RPNOutput, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded boxes [B, n, 4] and logits [B, n] of the `limit` likeliest anchors of each level, and its number [n]."""
    boxes, logits, levels = [], [], []
    parts = (output.logits.split(output.level_sizes, 1), output.deltas.split(output.level_sizes, 1))
    for level, (level_logits, deltas, anchors) in enumerate(
        zip(*parts, output.anchors.split(output.level_sizes), strict=True)
    ):
        top, rows = level_logits.topk(min(limit, level_logits.shape[1]), dim=1)  # [B, k] each
        deltas = deltas.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4))  # [B, k, 4]
        boxes.append(BOX_CODER.decode(deltas, anchors[rows]))
        logits.append(top)
        levels.append(torch.full_like(rows[0], level))  # [k]
    return torch.cat(boxes, dim=1), torch.cat(logits, dim=1), torch.cat(levels)
