"""Intersection over union and accuracy from a confusion matrix of integers. Spec segmentation section 8.

Letters: K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import shown

NAME_CHARACTERS = 40  # of a class in a table


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a set of images, each in 0..1.

    Attributes:
        iou: [K] float64, intersection over union; NaN for a class that neither labels nor predictions hold.
        acc: [K] float64, share of a class's pixels that were found; NaN for a class without any.
        pixels: [K] int64, labelled pixels of each class.
        miou, macc: means over the classes that are not NaN; aacc: share of all pixels that are right.
    """

    iou: Tensor
    acc: Tensor
    pixels: Tensor
    miou: float
    macc: float
    aacc: float

    def table(self, names: Sequence[str]) -> list[str]:
        """One line per class, in their order; a dash where a score is not defined."""
        told = [shown(name, NAME_CHARACTERS) for name in names]
        width = max(map(len, told))
        rows = zip(told, self.iou.tolist(), self.acc.tolist(), self.pixels.tolist(), strict=True)
        lines = [f"{'class':{width}}  {'IoU %':>6}  {'acc %':>6}  {'pixels':>12}"]
        return lines + [f"{name:{width}}  {_pct(iou)}  {_pct(acc)}  {pixels:12,}" for name, iou, acc, pixels in rows]


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """How many pixels of each class (row) were taken for which class (column).

    Matrices of images and of processes are summed, as the integers they are, whatever their number.

    Args:
        predictions, labels: of one shape and any integer type; predictions in 0..K-1, labels in 0..K-1 or
            `ignore_index`.
    Returns: [K, K] int64 on the device of the labels.
    Raises: ValueError for other shapes or a value outside; it is found on the way, at no further cost.
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"confusion_matrix: predictions {list(predictions.shape)}, labels {list(labels.shape)}")
    num_bins = 1 + num_classes**2  # the first for ignored pixels: to drop them would copy the others
    bins = torch.where(labels == ignore_index, 0, 1 + labels.long() * num_classes + predictions)
    counts = torch.bincount(bins.flatten(), minlength=num_bins)
    if len(counts) > num_bins:
        highest = int(labels[labels != ignore_index].max())
        raise ValueError(f"confusion_matrix: a label of {highest}, expected 0..{num_classes - 1} or {ignore_index}")
    return counts[1:].view(num_classes, num_classes)


def scores_of(confusion: Tensor) -> SegmentationScores:
    """IoU and accuracies of a confusion matrix [K, K]."""
    confusion = confusion.cpu()
    right, labelled, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)  # each [K]
    iou, acc = right.double() / (labelled + predicted - right), right.double() / labelled
    aacc = right.sum().double() / labelled.sum()
    return SegmentationScores(iou, acc, labelled, float(iou.nanmean()), float(acc.nanmean()), float(aacc))


def _pct(share: float) -> str:
    return f"{'-':>6}" if share != share else f"{100 * share:6.2f}"
