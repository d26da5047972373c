"""Which ground truth a box answers for, and which boxes a loss looks at. Letters: G ground truths, N boxes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -1

# n -> the numbers 0..n-1 (int64) in some order, on the device of the boxes
Permutation = Callable[[int], Tensor]


def random_permutation(generator: torch.Generator) -> Permutation:
    """Permutations drawn from one generator, on its device."""
    return lambda n: torch.randperm(n, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Matcher:
    """Gives every box its best ground truth and a label by how well it overlaps. Spec detection 3.4, 4.1.

    Attributes:
        thresholds: ascending; an overlap of at least thresholds[i] has at least labels[i + 1].
        labels: one more than thresholds, the first for the lowest overlaps (-1: ignored, 0: background, 1: object).
        allow_low_quality_matches: label 1 as well for all boxes with which a ground truth overlaps best, ties included;
            they keep the ground truth that is best for them.
    """

    thresholds: tuple[float, ...]
    labels: tuple[int, ...]
    allow_low_quality_matches: bool = False

    def __call__(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """Match by the overlaps iou [G, N].

        Returns: index [N] int64 of the best ground truth (the first of equals; 0 if there is none), and labels [N]
            int8 (the lowest if there is no ground truth).
        """
        num_boxes = iou.shape[1]
        if len(iou) == 0:
            index = torch.zeros(num_boxes, dtype=torch.int64, device=iou.device)
            return index, torch.full((num_boxes,), self.labels[0], dtype=torch.int8, device=iou.device)
        best, index = iou.max(dim=0)  # [N] each
        labels = torch.full_like(best, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds, self.labels[1:], strict=True):
            labels.masked_fill_(best >= threshold, label)
        if self.allow_low_quality_matches:
            best_of_truth = iou.amax(dim=1, keepdim=True)  # [G, 1]
            labels.masked_fill_((iou == best_of_truth).any(dim=0), 1)
        return index, labels


def sample(
    labels: Tensor, num_samples: int, positive_fraction: float, background: int, permutation: Permutation
) -> tuple[Tensor, Tensor]:
    """Draw boxes for a loss; where positives are few, more negatives take their places.

    Args:
        labels: [N] int, IGNORED, `background`, or anything else for a positive.
    Returns: indices of at most int(num_samples * positive_fraction) positives, and of negatives up to num_samples, both
        in the order drawn. Their numbers are read by the host.
    """
    positive = ((labels != IGNORED) & (labels != background)).nonzero()[:, 0]
    negative = (labels == background).nonzero()[:, 0]
    num_positive = min(int(num_samples * positive_fraction), len(positive))
    num_negative = min(num_samples - num_positive, len(negative))
    return (
        positive[permutation(len(positive))[:num_positive]],
        negative[permutation(len(negative))[:num_negative]],
    )
