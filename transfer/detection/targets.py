"""What an image holds: its ground truth, alone and padded to a batch. Letters: B images, G ground truths, R ROIs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Polygons = Sequence[np.ndarray]  # the parts of one instance, each float64 [2n] of x0, y0, x1, y1, ...
InstanceMask = Polygons | Tensor  # parts, or a bitmap [H, W] of bool or uint8


@dataclass(frozen=True)
class Targets:
    """The ground truth of one image, in pixels of the resized network image.

    Attributes:
        boxes: [G, 4] float32, each of positive width and height.
        labels: [G] int64 in 0..K-1.
        masks: one per box, polygons or bitmap, of one kind or mixed; polygons stay on the host.
    """

    boxes: Tensor
    labels: Tensor
    masks: Sequence[InstanceMask]

    def to(self, device: torch.device) -> "Targets":
        """The same with its tensors on a device."""
        masks = [mask.to(device, non_blocking=True) if isinstance(mask, Tensor) else mask for mask in self.masks]
        boxes, labels = (tensor.to(device, non_blocking=True) for tensor in (self.boxes, self.labels))
        return Targets(boxes, labels, masks)


@dataclass(frozen=True)
class PaddedTruth:
    """The ground truth of a batch without its masks.

    Attributes:
        boxes: [B, G, 4] float32.
        labels: [B, G] int64.
        valid: [B, G] bool, False for padding.
        counts: of each image, known to the host.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    counts: list[int]

    @staticmethod
    def of(targets: Sequence[Targets]) -> "PaddedTruth":
        """Pad to the largest number of ground truths, without reading anything from the device."""
        boxes = pad_sequence([t.boxes.float() for t in targets], batch_first=True)  # [B, G, 4]
        labels = pad_sequence([t.labels for t in targets], batch_first=True)  # [B, G]
        counts = [len(t.labels) for t in targets]
        on_device = torch.tensor(counts).to(boxes.device, non_blocking=True)  # [B]
        valid = torch.arange(boxes.shape[1], device=boxes.device) < on_device.unsqueeze(1)  # [B, G]
        return PaddedTruth(boxes, labels, valid, counts)
