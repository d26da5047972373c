"""From class scores of a window to labels of an image: sliding windows, several scales, flips.

Spec segmentation sections 6.3 and 6.4. Letters: B images, H W an image, h w its class scores, K classes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from pydantic import PositiveInt
from torch import Tensor

from core.config import Config
from transfer.segmentation.resizing import CoarseLogits, resize_rows

Mode = Literal["slide", "whole"]
Size = tuple[int, int]  # height and width

BLOCK_PX = {"cpu": 64, "cuda": 512}  # side of the blocks of pixels that are scored at once: a cache, or few launches


class WindowConfig(Config):
    """How the scores of an image come about, but for sizes in pixels."""

    mode: Mode = "slide"  # "whole": the image in one pass
    window_batch_size: PositiveInt = 8  # windows in one pass of the network


class InferenceConfig(WindowConfig):
    """How the scores of an image come about. Defaults: ADE20K at 512 px."""

    crop: PositiveInt = 512  # side of the windows, in pixels
    stride: PositiveInt = 341  # from one window to the next

    def contradictions(self) -> Iterator[str]:
        """Numbers that cannot hold together."""
        if self.stride > self.crop:
            yield f"stride={self.stride}: beyond crop={self.crop}, so that pixels between windows would have no label"


class HasLogits(Protocol):
    """A network that scores every pixel."""

    def logits(self, images: Tensor) -> CoarseLogits:
        """Class scores of images [B, C, H, W]."""


@dataclass(frozen=True)
class ImageScores:
    """Class scores of images, not yet at a size.

    To resize, to take the mean over windows and to cut padding off is linear along either axis, so that all of it is
    one matrix per axis. Scores of every pixel, H x W x K, are the largest maps of an evaluation: with the matrices they
    can be had for a block of pixels at a time, from the few scores that are near it.

    Attributes:
        values: [B, h, w, K] float32; those of several windows stand side by side.
        rows: [H, h], columns: [W, w], float32 on the host: how much of which score a row, or column, of pixels has.
    """

    values: Tensor
    rows: Tensor
    columns: Tensor

    def at(self, size: Size) -> "ImageScores":
        """The scores resized to another (height, width), as if they had been at the size of the images."""
        return replace(self, rows=resize_rows(self.rows, size[0]), columns=resize_rows(self.columns, size[1]))

    def mirrored(self) -> "ImageScores":
        """The scores of the mirror images."""
        return replace(self, columns=self.columns.flip(0))

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows and columns of a block of pixels, and their scores [B, rows, columns, K]; every pixel once."""
        device = self.values.device
        side = BLOCK_PX[device.type]
        across = list(_parts(self.columns, side, device))
        for rows, down, near in _parts(self.rows, side, device):
            band = self.values[:, near]  # [B, t, w, K]
            for columns, right, beside in across:
                with torch.autocast(device.type, enabled=False):
                    wide = right @ band[:, :, beside]  # [B, t, columns, K]
                    block = down @ wide.flatten(2)  # [B, rows, columns * K]
                yield rows, columns, block.unflatten(2, (len(right), -1))


def _parts(matrix: Tensor, side: int, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For so many rows at a time: which, their part of a matrix without columns of zeros, and which columns it has."""
    for first in range(0, len(matrix), side):
        part = matrix[first : first + side]
        touched = part.any(dim=0).nonzero().flatten()
        yield slice(first, first + len(part)), part[:, touched].to(device), touched.to(device)


@torch.no_grad()
def image_labels(
    model: HasLogits, views: Iterable[Tensor], size: Size, config: InferenceConfig, flip: bool = False
) -> Tensor:
    """The class of every pixel of images that are looked at once or several times.

    Args:
        views: the same images [B, C, h, w], normalised, at each of some sizes; they are asked for one after the other.
        size: (height, width) that labels are wanted at.
        flip: look at the mirror images as well.
    Returns: [B, height, width] int64, see `labels_of`.
    """
    scores: list[ImageScores] = []
    for images in views:
        scores.append(image_scores(model, images, config).at(size))
        if flip:
            scores.append(image_scores(model, images.flip(-1), config).mirrored().at(size))
    return labels_of(scores)


def labels_of(views: list[ImageScores]) -> Tensor:
    """The class of every pixel, [B, H, W] int64: by the highest score, or of several views by the mean probability.

    Args:
        views: at one size.
    Raises: ValueError if there are none.
    """
    if not views:
        raise ValueError("labels_of: no views; expected one at least")
    first = views[0]
    labels = torch.empty(
        len(first.values), len(first.rows), len(first.columns), dtype=torch.int64, device=first.values.device
    )
    for same_place in zip(*(view.blocks() for view in views), strict=True):
        rows, columns, scores = same_place[0]
        if len(views) > 1:
            scores = torch.stack([each.softmax(dim=3) for _, _, each in same_place]).sum(dim=0)
        labels[:, rows, columns] = scores.argmax(dim=3)
    return labels


@torch.no_grad()
def image_scores(model: HasLogits, images: Tensor, config: InferenceConfig) -> ImageScores:
    """Scores of every pixel, each the mean over all windows that it lies in. Windows of all images share batches.

    Args:
        images: [B, C, H, W] float, normalised. A window is as large as the image where that is smaller than `crop`.
    """
    B, _, H, W = images.shape
    crop, stride = (config.crop, config.stride) if config.mode == "slide" else (max(H, W), 1)
    height, width = min(crop, H), min(crop, W)
    tops, lefts = window_starts(H, crop, stride), window_starts(W, crop, stride)
    windows = [images[i, :, y : y + height, x : x + width] for i in range(B) for y in tops for x in lefts]
    at_once = config.window_batch_size
    coarse = [model.logits(torch.stack(windows[i : i + at_once])) for i in range(0, len(windows), at_once)]
    values = torch.cat([each.values for each in coarse]).unflatten(0, (B, len(tops), len(lefts)))
    span, (h, w) = coarse[0].size, values.shape[4:]
    values = values.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)  # [B, tops * h, lefts * w, K]
    return ImageScores(values, _placed(H, tops, height, h, span[0]), _placed(W, lefts, width, w, span[1]))


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along an axis of so many pixels; the last one is moved back until it lies inside."""
    num_windows = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(k * stride + crop, length) - crop, 0) for k in range(num_windows)]


def _placed(length: int, starts: list[int], side: int, num_scores: int, span: int) -> Tensor:
    """How the pixels of an axis follow from the scores of its windows: [length, windows * scores] float32.

    Args:
        starts, side: of the windows in pixels.
        num_scores, span: how many scores each has, and over how many pixels these reach.
    """
    window = resize_rows(torch.eye(num_scores), span)[:side]  # [side, scores]
    placed, covered = torch.zeros(length, len(starts), num_scores), torch.zeros(length, 1)
    for k, start in enumerate(starts):
        placed[start : start + side, k] = window
        covered[start : start + side] += 1
    return placed.flatten(1) / covered
