"""From predictions to detections: which are kept, and where they lie in the original image. Spec detection 4.7, 4.8.

Letters: N detections, R ROIs, K classes, S side of a small mask, H W image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from transfer.detection.boxes import clip, nonempty, scale
from transfer.detection.masks import paste_masks


@dataclass(frozen=True)
class Detections:
    """What was found in one image, the surest first.

    Attributes:
        boxes: [N, 4] float32, in pixels of the original image.
        scores: [N] float32 in 0..1.
        labels: [N] int64 in 0..K-1.
        small_masks: [N, S, S] float32 in 0..1, each the probability of the object over its box.
        size: (H, W) of the original image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    small_masks: Tensor
    size: tuple[int, int]

    @property
    def masks(self) -> Tensor:
        """All masks over the original image, [N, H, W] bool, made at each call."""
        return self.paste(slice(None))

    def paste(self, rows: slice) -> Tensor:
        """Masks of some detections over the original image, [n, H, W] bool.

        A hundred of them over a photograph of 12 megapixels are more than a gigabyte, so large ones go in portions.
        """
        return paste_masks(self.small_masks[rows], self.boxes[rows], self.size)


@dataclass(frozen=True)
class Selected:
    """Detections of one image in pixels of the network image; `region` [N] is the row that each comes from."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    region: Tensor


def select(
    boxes: Tensor, probabilities: Tensor, size: Tensor, *, score_threshold: float, nms_threshold: float, limit: int
) -> Selected:
    """The detections among the regions of one image.

    Args:
        boxes: [R, K * 4], a box per class, or [R, 4].
        probabilities: [R, K + 1], the last of background.
        size: [2], (height, width) of the network image without padding.
        score_threshold: what a pair of region and class must exceed.
        nms_threshold: overlap with a surer one of the same class from which on (exclusive) a detection is dropped.
        limit: how many are kept.
    Returns: at most `limit` detections by descending score. `region` counts rows after those that hold a non-finite
        number were dropped.
    """
    finite = (boxes.isfinite().all(dim=1) & probabilities.isfinite().all(dim=1)).nonzero()[:, 0]
    boxes, scores = boxes[finite].float(), probabilities[finite, :-1].float()  # [R', K * 4 or 4], [R', K]
    boxes = clip(boxes.unflatten(1, (-1, 4)), size)  # [R', K or 1, 4]
    region, labels = (scores > score_threshold).nonzero().unbind(1)  # [n] each
    boxes = boxes[region, labels if boxes.shape[1] > 1 else 0]  # [n, 4]
    scores = scores[region, labels]  # [n]
    best = batched_nms(boxes, scores, labels, nms_threshold)[:limit]
    return Selected(boxes[best], scores[best], labels[best], region[best])


def to_original(
    found: Selected, small_masks: Tensor, network_size: tuple[int, int], original_size: tuple[int, int]
) -> Detections:
    """Detections of a resized image as detections of the original; boxes that have no area there are dropped.

    Args:
        small_masks: [N, S, S] in 0..1.
        network_size, original_size: (height, width) without padding.
    """
    boxes = clip(scale(found.boxes, network_size, original_size), torch.tensor(original_size).to(found.boxes.device))
    rows = nonempty(boxes).nonzero()[:, 0]
    return Detections(boxes[rows], found.scores[rows], found.labels[rows], small_masks[rows], original_size)
