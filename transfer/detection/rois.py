"""Regions of a batch, one below the other, and the ground truth that each answers for.

Letters: B images, G ground truths (padded), R ROIs of all images, K classes; class K is the background.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer.detection.boxes import pairwise_iou
from transfer.detection.matching import Matcher, Permutation, sample
from transfer.detection.targets import PaddedTruth


@dataclass(frozen=True)
class LabelledRois:
    """Regions and what they should be called.

    Attributes:
        boxes: [R, 4] float32, in pixels of the network images.
        image: [R] int64, the image that each lies in.
        labels: [R] int64 in 0..K, K for background.
        instances: [R] int64, the best ground truth of its image, whatever the label; 0 if there is none.
        truth_boxes: [R, 4], its box; zeros if there is none.
    """

    boxes: Tensor
    image: Tensor
    labels: Tensor
    instances: Tensor
    truth_boxes: Tensor

    def __getitem__(self, rows: Tensor) -> "LabelledRois":
        """The rows that an index or a bool mask [R] picks."""
        return LabelledRois(
            self.boxes[rows], self.image[rows], self.labels[rows], self.instances[rows], self.truth_boxes[rows]
        )


@dataclass(frozen=True)
class SampledRois:
    """Regions to train on: all of them, image by image, objects before background; and those with an object alone.

    Attributes:
        num_objects: of each image, known to the host.
    """

    all: LabelledRois
    objects: LabelledRois
    num_objects: list[int]


def match_rois(boxes: Tensor, image: Tensor, truth: PaddedTruth, threshold: float, num_classes: int) -> LabelledRois:
    """Give every region [R, 4] of its image [R] its best ground truth, if that overlaps by `threshold` or more.

    All images at once: no region can match the padding, with which it overlaps by -1. Spec detection 4.1, 4.6.
    """
    if truth.boxes.shape[1] == 0:
        nothing = torch.zeros_like(image)
        return LabelledRois(boxes, image, torch.full_like(image, num_classes), nothing, torch.zeros_like(boxes))
    iou = pairwise_iou(truth.boxes[image], boxes.unsqueeze(1)).squeeze(2)  # [R, G]
    iou = iou.masked_fill(~truth.valid[image], -1.0)
    instances, is_object = Matcher(thresholds=(threshold,), labels=(0, 1))(iou.T)  # [R] each
    labels = torch.where(is_object == 1, truth.labels[image, instances], num_classes)
    return LabelledRois(boxes, image, labels, instances, truth.boxes[image, instances])


def sample_rois(
    proposals: Sequence[Tensor],
    truth: PaddedTruth,
    *,
    threshold: float,
    num_classes: int,
    batch_size_per_image: int,
    positive_fraction: float,
    permutation: Permutation,
) -> SampledRois:
    """Proposals [n, 4] of each image and its ground truth, matched and drawn from. Spec detection 4.1."""
    candidates = [
        torch.cat([boxes, truth_boxes[:count]])
        for boxes, truth_boxes, count in zip(proposals, truth.boxes, truth.counts, strict=True)
    ]
    counts = [len(boxes) for boxes in candidates]
    image = image_of_each(counts, truth.boxes.device)
    rois = match_rois(torch.cat(candidates), image, truth, threshold, num_classes)
    rows, object_rows, start = [], [], 0
    for labels in rois.labels.split(counts):
        objects, background = sample(labels, batch_size_per_image, positive_fraction, num_classes, permutation)
        object_rows.append(objects + start)
        rows += [object_rows[-1], background + start]
        start += len(labels)
    return SampledRois(rois[torch.cat(rows)], rois[torch.cat(object_rows)], [len(part) for part in object_rows])


def image_of_each(counts: Sequence[int], device: torch.device) -> Tensor:
    """0 counts[0] times, 1 counts[1] times, and so on: int64 [sum of counts], made on the host."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device, non_blocking=True)
