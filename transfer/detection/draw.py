"""Pictures of detections: boxes, masks, names and scores on the photograph."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from core.errors import shown
from transfer.detection.inference import Detections

NAME_CHARACTERS = 40
MASKS_AT_ONCE = 8  # a hundred masks of a large photograph are gigabytes
COLOURS = (
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40), (128, 0, 0), (128, 128, 0), (0, 0, 128),
)  # fmt: skip


def draw_detections(image: Tensor, found: Detections, names: Sequence[str], min_score: float) -> Tensor:
    """A photograph uint8 [3, H, W] with what was found in it from a score on, the surest on top: the same shape.

    Colours go by class.
    """
    rows = (found.scores >= min_score).nonzero()[:, 0].flip(0)  # the least sure first
    boxes, labels = found.boxes.cpu(), found.labels.tolist()
    picture = image.cpu()
    for start in range(0, len(rows), MASKS_AT_ONCE):
        chosen = rows[start : start + MASKS_AT_ONCE]
        shapes = torch.cat([found.paste(slice(row, row + 1)) for row in chosen.tolist()]).cpu()  # [n, H, W]
        colours = [COLOURS[labels[row] % len(COLOURS)] for row in chosen.tolist()]
        picture = draw_segmentation_masks(picture, shapes, alpha=0.45, colors=colours)
    if len(rows):
        texts = [f"{shown(names[labels[row]], NAME_CHARACTERS)} {found.scores[row]:.2f}" for row in rows.tolist()]
        colours = [COLOURS[labels[row] % len(COLOURS)] for row in rows.tolist()]
        width = max(1, max(image.shape[1:]) // 400)
        inks = ["black" if sum(colour) > 380 else "white" for colour in colours]  # of 765
        picture = draw_bounding_boxes(
            picture, boxes[rows.cpu()], texts, colours, width=width, label_colors=inks, fill_labels=True
        )
    return picture


def tiled(pictures: Sequence[Tensor], columns: int) -> np.ndarray:
    """Pictures uint8 [3, S, S] of one size as a table: uint8 [H, W, 3]."""
    blank = torch.full_like(pictures[0], 255)
    padded = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [torch.cat(padded[start : start + columns], dim=2) for start in range(0, len(padded), columns)]
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
