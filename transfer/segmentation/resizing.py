"""Maps of another size, and what need not be computed at that size: resizing is linear, and so are convolutions.

Letters: B batch, C channels of a map, D channels of a result, h w a map's rows and columns, H W those wanted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CoarseLogits(NamedTuple):
    """Class scores of images, at the size at which a network has them.

    Attributes:
        values: [B, K, h, w] float32.
        size: (height, width) in pixels that they reach over; the images lie in its top left corner.
    """

    values: Tensor
    size: tuple[int, int]


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [B, C, h, w] of another (height, width): bilinear, outer edges aligned, as everywhere in this network."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_rows(matrix: Tensor, length: int) -> Tensor:
    """The rows of a matrix [h, n] resized as `resize` resizes those of a map: [H, n]."""
    if len(matrix) == length:
        return matrix
    return F.interpolate(matrix.T.unsqueeze(0), size=length, mode="linear", align_corners=False)[0].T


def conv3x3_of_resized(maps: Sequence[Tensor], weight: Tensor, size: Sequence[int]) -> Tensor:
    """What a 3x3 convolution makes of maps that are resized to one size and concatenated, without doing either.

    A convolution of a concatenation is the sum of convolutions of its parts. That of a resized map is the sum of nine
    1x1 convolutions, each shifted by one tap, and a 1x1 convolution may be done before the resize. So a map of half the
    size costs a quarter of the products. Equal to the convolution but for rounding.

    Args:
        maps: [B, C, h, w] each, of any sizes.
        weight: [D, sum of C, 3, 3], of a convolution with padding 1 and no bias.
        size: (H, W).
    Returns: [B, D, H, W].
    """
    total: Tensor | None = None
    for x, part in zip(maps, weight.split([x.shape[1] for x in maps], dim=1), strict=True):
        same = tuple(x.shape[2:]) == tuple(size)
        own = F.conv2d(x, part, padding=1) if same else _taps_then_resize(x, part, size)
        total = own if total is None else total.add_(own)
    assert total is not None, "there is a map at least"
    return total


def _taps_then_resize(x: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
    B, C, h, w = x.shape
    D, (H, W) = len(weight), size
    tall: Tensor | None = None  # rows as wanted; columns not yet, and apart by the tap's column
    for down, row in zip(_shifted_resizes(h, H, x.device), weight.unbind(2), strict=True):  # rows of the kernel
        taps = row.permute(2, 0, 1).reshape(3 * D, C, 1, 1)
        tapped = F.conv2d(x, taps).permute(0, 2, 3, 1).reshape(B, h, w * 3 * D)
        down = down.to(tapped.dtype).expand(B, -1, -1)  # [B, H, h]
        tall = torch.bmm(down, tapped) if tall is None else tall.baddbmm_(down, tapped)
    assert tall is not None, "a kernel has rows"
    right = _shifted_resizes(w, W, x.device).permute(1, 2, 0).reshape(W, w * 3).to(tall.dtype)
    wide = right @ tall.view(B * H, w * 3, D)  # [B * H, W, D]
    return wide.view(B, H, W, D).permute(0, 3, 1, 2)


def _shifted_resizes(old: int, new: int, device: torch.device) -> Tensor:
    """[3, new, old]: the weight of each old cell in the new cells i - 1, i, i + 1; none outside, as padding has it."""
    weights = resize_rows(torch.eye(old, device=device), new)  # [new, old]
    return F.pad(weights, (0, 0, 1, 1)).unfold(0, new, 1).transpose(1, 2)
