"""Linear filters shared by several corruptions: separable ones as banded matrix products, lines, zooms, resampling.

Borders are part of a matrix or of one padding, never a special case of a loop.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32  # outputs per block of a banded product; larger blocks multiply more zeros, smaller ones call more often

Border = Literal["nearest", "reflect"]  # edge replicated; mirrored with the edge pixel repeated (SciPy's names)


class Block(NamedTuple):
    """Some columns of a banded matrix, without the rows that are zero in all of them."""

    low: int  # first and one past the last input that counts
    high: int
    weights: Tensor  # [high - low, columns]


Band = tuple[Block, ...]  # the columns of the matrix in their order


def gaussian(
    x: Tensor, sigma: float | tuple[float, float], truncate: float = 4.0, border: Border = "nearest"
) -> Tensor:
    """Gaussian blur of each channel, as skimage's.

    Args:
        x: [B, C, H, W] float.
        sigma: in pixels; a pair is (vertical, horizontal).
        truncate: the kernel ends after so many sigma, rounded to whole pixels.
    Returns: the same shape and type.
    """
    vertical, horizontal = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    H, W = x.shape[-2:]
    # On a GPU, products of float32 matrices may be told globally to round to TF32; float64 has no such switch.
    work = torch.float64 if x.is_cuda else x.dtype
    y = x.to(work)
    y = along_height(y, gaussian_band(H, vertical, truncate, border, work, x.device))
    y = along_width(y, gaussian_band(W, horizontal, truncate, border, work, x.device))
    return y.to(x.dtype)


def along_width(x: Tensor, band: Band) -> Tensor:
    """Multiply every row of x [B, C, H, W] with a banded matrix [W, W']: [B, C, H, W']."""
    rows = x.reshape(-1, x.shape[-1])  # [BCH, W]
    out = torch.cat([rows[:, low:high] @ weights for low, high, weights in band], dim=1)  # [BCH, W']
    return out.view(*x.shape[:-1], -1)


def along_height(x: Tensor, band: Band) -> Tensor:
    """Multiply every column of x [B, C, H, W] with a banded matrix [H, H']: [B, C, H', W]."""
    return torch.cat([weights.T @ x[..., low:high, :] for low, high, weights in band], dim=-2)


def banded(matrix: np.ndarray, dtype: torch.dtype, device: torch.device) -> Band:
    """Cut a matrix [inputs, outputs] that is zero far from its diagonal into tiles without those zeros."""
    blocks = []
    for start in range(0, matrix.shape[1], TILE):
        tile = matrix[:, start : start + TILE]
        used = np.flatnonzero(tile.any(axis=1))
        low, high = int(used[0]), int(used[-1]) + 1
        blocks.append(Block(low, high, torch.from_numpy(tile[low:high]).to(device, dtype)))
    return tuple(blocks)


@lru_cache(maxsize=256)
def gaussian_band(
    size: int, sigma: float, truncate: float, border: Border, dtype: torch.dtype, device: torch.device
) -> Band:
    """Gaussian smoothing of a line of `size` pixels as a banded matrix, its border included."""
    radius = int(truncate * sigma + 0.5)
    taps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 / sigma**2 * taps**2)
    weights /= weights.sum()
    inputs = taps[:, None] + np.arange(size)  # [taps, size]
    if border == "nearest":
        inputs = inputs.clip(0, size - 1)
    else:
        inputs %= 2 * size
        inputs = np.minimum(inputs, 2 * size - 1 - inputs)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (inputs, np.arange(size)), weights[:, None])
    return banded(matrix, dtype, device)


# ---- lines --------------------------------------------------------------------------------------------------------


def line_taps(radius: int, sigma: float, degrees: float) -> list[tuple[int, int, float]]:
    """(row offset, column offset, weight) of motion blur: one half of a gaussian along a line, offsets whole pixels.

    Source: ImageMagick's MotionBlurImage as measured in spec section 2.
    """
    width = 2 * radius + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    dy, dx = width * np.sin(np.deg2rad(degrees)), width * np.cos(np.deg2rad(degrees))
    length = math.hypot(dy, dx)  # written as the reference writes it: offsets are rounded, and ties must fall alike
    offsets = [(math.ceil(i * dy / length - 0.5), math.ceil(i * dx / length - 0.5)) for i in range(width)]
    return [(y, x, float(weight)) for (y, x), weight in zip(offsets, weights, strict=True)]


def motion(x: Tensor, radius: int, sigma: float, degrees: Sequence[float], stops_at_border: bool) -> Tensor:
    """Motion blur, each image along a line of its own, with the edge replicated.

    Args:
        x: [B, C, H, W] float.
        degrees: [B] directions of the lines.
        stops_at_border: leave out taps as far away as the image is large, as imagecorruptions does; small images get
            darker by that.
    Returns: [B, C, H, W], not clipped.
    """
    H, W = x.shape[-2:]
    out = torch.zeros_like(x)
    for b, angle in enumerate(degrees):
        taps = line_taps(radius, sigma, angle)
        if stops_at_border:
            taps = [tap for tap in taps if abs(tap[0]) < H and abs(tap[1]) < W]
        top, left = max(0, -min(t[0] for t in taps)), max(0, -min(t[1] for t in taps))
        bottom, right = max(0, max(t[0] for t in taps)), max(0, max(t[1] for t in taps))
        padded = F.pad(x[b : b + 1], (left, right, top, bottom), mode="replicate")[0]
        for dy, dx, weight in taps:
            out[b].add_(padded[:, top + dy : top + dy + H, left + dx : left + dx + W], alpha=weight)
    return out


# ---- zooms --------------------------------------------------------------------------------------------------------


def zoom_centre(x: Tensor, factor: float) -> Tensor:
    """The central part of x [B, C, H, W], enlarged to about H x W: never smaller, at most by some pixels larger.

    Source: clipped_zoom of the references, which is scipy.ndimage.zoom with order 1: corners keep their place.
    """
    sides = []
    for size in x.shape[-2:]:
        part = math.ceil(size / factor)
        sides.append((part, (size - part) // 2, round(part * factor)))
    (height, top, out_height), (width, left, out_width) = sides
    crop = x[..., top : top + height, left : left + width]
    return F.interpolate(crop, (out_height, out_width), mode="bilinear", align_corners=True)


def trim(x: Tensor, height: int, width: int, centred: bool) -> Tensor:
    """Cut [B, C, H', W'] to [B, C, height, width], from the middle or from the top left corner."""
    top, left = ((x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2) if centred else (0, 0)
    return x[..., top : top + height, left : left + width]


# ---- sampling -----------------------------------------------------------------------------------------------------


def sample(x: Tensor, rows: Tensor, columns: Tensor, whole_sample: bool) -> Tensor:
    """Bilinear values of x [B, C, H, W] at rows, columns [B, H', W'] in pixels, mirrored at the border.

    Args:
        whole_sample: mirror about the middle of the edge pixels (OpenCV's REFLECT_101) or about the edge of the image.
    Returns: [B, C, H', W'].
    """
    H, W = x.shape[-2:]
    if whole_sample:
        grid = torch.stack([columns * 2 / (W - 1) - 1, rows * 2 / (H - 1) - 1], dim=-1)  # [B, H', W', 2]
    else:
        grid = torch.stack([(columns * 2 + 1) / W - 1, (rows * 2 + 1) / H - 1], dim=-1)  # [B, H', W', 2]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=whole_sample)
