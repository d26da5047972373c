"""Geometry of boxes: corners (x0, y0, x1, y1) in continuous pixels, width x1 - x0, float32.

Letters: N M boxes, K classes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # a regressed box grows at most so much; it may shrink to nothing


@dataclass(frozen=True)
class BoxCoder:
    """Boxes as differences to other boxes: centre in units of the size, size as a logarithm. Spec detection 3.3.

    Attributes:
        weights: what dx, dy, dw, dh are multiplied by.
    """

    weights: tuple[float, float, float, float]

    def encode(self, sources: Tensor, targets: Tensor) -> Tensor:
        """Deltas [..., 4] that lead from sources to targets, both [..., 4] of positive width and height."""
        wx, wy, ww, wh = self.weights
        cx, cy, w, h = _centre_form(sources.float())
        target_cx, target_cy, target_w, target_h = _centre_form(targets.float())
        deltas = (
            wx * (target_cx - cx) / w,
            wy * (target_cy - cy) / h,
            ww * torch.log(target_w / w),
            wh * torch.log(target_h / h),
        )
        return torch.stack(deltas, dim=-1)  # [..., 4]

    def decode(self, deltas: Tensor, sources: Tensor) -> Tensor:
        """Boxes [..., K * 4] that deltas [..., K * 4] lead to from sources [..., 4], K of them each, in float32."""
        wx, wy, ww, wh = self.weights
        cx, cy, w, h = (part.unsqueeze(-1) for part in _centre_form(sources.float()))  # each [..., 1]
        dx, dy, dw, dh = deltas.float().unflatten(-1, (-1, 4)).unbind(-1)  # each [..., K]
        centre_x, centre_y = dx / wx * w + cx, dy / wy * h + cy
        half_w = 0.5 * torch.exp((dw / ww).clamp(max=MAX_LOG_SCALE)) * w
        half_h = 0.5 * torch.exp((dh / wh).clamp(max=MAX_LOG_SCALE)) * h
        corners = (centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h)
        return torch.stack(corners, dim=-1).flatten(-2)  # [..., K * 4]


def _centre_form(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, y0, x1, y1 = boxes.unbind(-1)
    w, h = x1 - x0, y1 - y0
    return x0 + 0.5 * w, y0 + 0.5 * h, w, h


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [..., 4] moved into images of sizes [..., 2] (height, width); sizes broadcast against the boxes' rows."""
    limits = sizes.flip(-1).to(boxes.dtype)  # [..., 2], (width, height)
    return boxes.clamp(min=0).minimum(torch.cat([limits, limits], dim=-1))


def nonempty(boxes: Tensor) -> Tensor:
    """Which boxes [..., 4] have positive width and height: bool [...]."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def scale(boxes: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] of an image of old_size (height, width), where they lie when it is resized to new_size."""
    y, x = new_size[0] / old_size[0], new_size[1] / old_size[1]
    return torch.stack([boxes[:, 0] * x, boxes[:, 1] * y, boxes[:, 2] * x, boxes[:, 3] * y], dim=-1)  # [N, 4]


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of a [..., N, 4] with every box of b [..., M, 4]: [..., N, M] in 0..1.

    0 where the intersection is 0, boxes without area included.
    """
    ax0, ay0, ax1, ay1 = a.float().unsqueeze(-2).unbind(-1)  # each [..., N, 1]
    bx0, by0, bx1, by1 = b.float().unsqueeze(-3).unbind(-1)  # each [..., 1, M]
    width = (torch.minimum(ax1, bx1) - torch.maximum(ax0, bx0)).clamp_(min=0)  # [..., N, M]
    height = (torch.minimum(ay1, by1) - torch.maximum(ay0, by0)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - intersection
    return torch.where(intersection > 0, intersection / union, 0.0)
