"""Masks: small targets around regions, and small predictions back in the picture.

Letters: G ground truths, N detections, R ROIs, S side of a small mask (28), H W image.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import roi_align

from transfer.detection.targets import InstanceMask, Polygons, Targets

MIN_SIDE_PX = 0.1  # thinner regions are drawn as if they were so thick
PASTE_POSITIONS = 2**25  # looked up at once on an accelerator: a quarter of a gigabyte


def mask_targets(
    targets: Sequence[Targets], counts: Sequence[int], instances: Tensor, boxes: Tensor, size: int, device: torch.device
) -> Tensor:
    """What the mask head should say of the regions of a batch. Spec detection 4.5.

    Polygons are drawn on the host by pycocotools, as the published recipe does, and take numbers that lie there;
    bitmaps are pooled where they are. The two differ in a few pixels along the border.

    Args:
        counts: regions of each image; they add up to R, and the regions lie image by image.
        instances: [R] int64 on the host, the instance of its image that each region answers for.
        boxes: [R, 4] float32 on the host, the regions, not the boxes of the instances.
        device: where the result shall be.
    Returns: [R, S, S] bool.
    """
    drawn = [torch.zeros(0, size, size, dtype=torch.bool, device=device)]
    parts = zip(targets, instances.split(list(counts)), boxes.split(list(counts)), strict=True)
    for target, image_instances, image_boxes in parts:
        wanted, index = image_instances.unique(return_inverse=True)  # [instances that any region answers for], [R]
        bitmaps = [mask for mask in (target.masks[i] for i in wanted.tolist()) if isinstance(mask, Tensor)]
        if bitmaps and len(bitmaps) == len(wanted):
            drawn.append(pool_bitmaps(torch.stack(bitmaps), index, image_boxes, size).to(device))
        else:
            masks = [target.masks[i] for i in image_instances.tolist()]
            drawn.append(_draw(masks, image_boxes, size).to(device, non_blocking=True))
    return torch.cat(drawn)


def _draw(masks: Sequence[InstanceMask], boxes: Tensor, size: int) -> Tensor:
    """Masks, one for each of boxes [R, 4], of both kinds: [R, S, S] bool."""
    rows = [
        pool_bitmaps(mask.cpu()[None], torch.zeros(1, dtype=torch.int64), box[None], size)[0]
        if isinstance(mask, Tensor)
        else torch.from_numpy(draw_polygons(mask, box.numpy(), size))
        for mask, box in zip(masks, boxes, strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, size, size, dtype=torch.bool)


def draw_polygons(polygons: Polygons, box: np.ndarray, size: int) -> np.ndarray:
    """Polygons as they look from a box [4] float32, drawn by pycocotools on [S, S] pixels: bool.

    Sizes and ratios are float32, coordinates float64: what the published code amounts to, down to the last pixel.
    """
    x0, y0, x1, y1 = box
    ratios = [size / max(side, MIN_SIDE_PX) for side in (x1 - x0, y1 - y0)]
    scaled = [((polygon.reshape(-1, 2) - (x0, y0)) * ratios).ravel() for polygon in polygons]
    if not scaled:
        return np.zeros((size, size), dtype=bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, size, size))).astype(bool)


def pool_bitmaps(bitmaps: Tensor, instances: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Bitmaps [G, H, W] of one image as they look from boxes [R, 4]: [R, S, S] bool where half or more is covered.

    Args:
        instances: [R] int64, the bitmap that each box looks at.
    """
    rois = torch.cat([instances.unsqueeze(1).to(boxes.dtype), boxes], dim=1).to(bitmaps.device)  # [R, 5]
    pooled = roi_align(bitmaps.unsqueeze(1).float(), rois, size, 1.0, sampling_ratio=0, aligned=True)  # [R, 1, S, S]
    return pooled.squeeze(1) >= 0.5


def paste_masks(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], num_at_once: int | None = None) -> Tensor:
    """Small masks drawn at their places in an image: bool [N, H, W], True where the probability is one half or more.

    Each pixel centre is looked up in the mask bilinearly, zero outside (spec detection 4.8). Only pixels that the boxes
    of a chunk can reach are: a CPU goes mask by mask, for it is short of speed, an accelerator many masks at once.

    Args:
        probabilities: [N, S, S] in 0..1.
        boxes: [N, 4] in pixels of the image, each of positive width and height.
        size: (H, W) of the image.
        num_at_once: masks of a chunk; None: one on a CPU, what fits on an accelerator.
    """
    H, W = size
    if num_at_once is None:
        num_at_once = 1 if boxes.device.type == "cpu" else max(1, PASTE_POSITIONS // (H * W))
    pasted = torch.zeros(len(boxes), H, W, dtype=torch.bool, device=boxes.device)
    corners = boxes.tolist()
    for start in range(0, len(boxes), num_at_once):
        chunk = slice(start, start + num_at_once)
        x0, y0, x1, y1 = zip(*corners[chunk], strict=True)
        left, top = max(math.floor(min(x0)) - 1, 0), max(math.floor(min(y0)) - 1, 0)
        right, bottom = min(math.ceil(max(x1)) + 1, W), min(math.ceil(max(y1)) + 1, H)
        window = (slice(top, bottom), slice(left, right))
        pasted[chunk][:, *window] = _sample(probabilities[chunk], boxes[chunk], window) >= 0.5
    return pasted


def _sample(probabilities: Tensor, boxes: Tensor, window: tuple[slice, slice]) -> Tensor:
    """Masks [n, S, S] looked up at the pixel centres of a window (rows, columns) of the image: [n, rows, columns]."""
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(1)  # each [n, 1]
    y, x = (torch.arange(part.start, part.stop, device=boxes.device, dtype=torch.float32) + 0.5 for part in window)
    grid_y, grid_x = (y - y0) / (y1 - y0) * 2 - 1, (x - x0) / (x1 - x0) * 2 - 1  # [n, rows], [n, columns]
    shape = (len(boxes), grid_y.shape[1], grid_x.shape[1])
    grid = torch.stack([grid_x[:, None, :].expand(shape), grid_y[:, :, None].expand(shape)], dim=-1)  # [n, r, c, 2]
    return F.grid_sample(probabilities.float().unsqueeze(1), grid, align_corners=False).squeeze(1)
