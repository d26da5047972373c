"""From class scores of a window to labels of an image: sliding windows, several scales, flips.

Spec segmentation sections 6.3 and 6.4. Letters: B images, H W an image, K classes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol

import torch
from pydantic import PositiveInt
from torch import Tensor

from core.config import Config
from transfer.segmentation.upernet import resize

Mode = Literal["slide", "whole"]
Size = tuple[int, int]  # height and width


class InferenceConfig(Config):
    """How the scores of an image come about. Defaults: ADE20K at 512 px."""

    mode: Mode = "slide"  # "whole": the image in one pass
    crop: PositiveInt = 512  # side of the windows, in pixels
    stride: PositiveInt = 341  # from one window to the next
    window_batch_size: PositiveInt = 8  # windows in one pass of the network

    def contradictions(self) -> Iterator[str]:
        """Numbers that cannot hold together."""
        if self.stride > self.crop:
            yield f"stride={self.stride}: beyond crop={self.crop}, so that pixels between windows would have no label"


class HasLogits(Protocol):
    """A network that scores every pixel."""

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to class scores [B, K, H, W] float32."""


def image_logits(model: HasLogits, images: Tensor, config: InferenceConfig) -> Tensor:
    """Class scores [B, K, H, W] float32 of normalised images [B, C, H, W] of one size."""
    return MODES[config.mode](model, images, config)


def labels_of(scores: Tensor, size: Size) -> Tensor:
    """The class of every pixel at another (height, width): [B, K, h, w] resized, then argmax, [B, H, W] int64."""
    return resize(scores, size).argmax(dim=1)


@torch.no_grad()
def slide_logits(model: HasLogits, images: Tensor, config: InferenceConfig) -> Tensor:
    """Scores of every pixel, each the mean over all windows that it lies in. Windows of all images share batches.

    Args:
        images: [B, C, H, W] float, normalised. A window is as large as the image where that is smaller than `crop`.
    Returns: [B, K, H, W] float32.
    """
    B, _, H, W = images.shape
    height, width = min(config.crop, H), min(config.crop, W)
    tops, lefts = window_starts(H, config.crop, config.stride), window_starts(W, config.crop, config.stride)
    places = [(i, top, left) for i in range(B) for top in tops for left in lefts]
    total: Tensor | None = None
    for first in range(0, len(places), config.window_batch_size):
        chunk = places[first : first + config.window_batch_size]
        windows = torch.stack([images[i, :, y : y + height, x : x + width] for i, y, x in chunk])
        scores = model.logits(windows)  # [windows, K, height, width]
        if total is None:
            total = scores.new_zeros(B, scores.shape[1], H, W)
        for (i, y, x), window in zip(chunk, scores, strict=True):
            total[i, :, y : y + height, x : x + width] += window
    assert total is not None, "an image has a window at least"
    rows, columns = _covered(H, tops, height), _covered(W, lefts, width)
    return total.div_(torch.outer(rows, columns).to(total.device))


def whole_logits(model: HasLogits, images: Tensor, config: InferenceConfig) -> Tensor:
    """Scores of every pixel from one pass over whole images."""
    return model.logits(images)


MODES: dict[Mode, Callable[[HasLogits, Tensor, InferenceConfig], Tensor]] = {
    "slide": slide_logits,
    "whole": whole_logits,
}


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along an axis of so many pixels; the last one is moved back until it lies inside."""
    num_windows = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(k * stride + crop, length) - crop, 0) for k in range(num_windows)]


def _covered(length: int, starts: list[int], side: int) -> Tensor:
    """How many windows cover each pixel along an axis, [length] float32."""
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + side] += 1
    return counts


def multi_scale_probabilities(
    model: HasLogits, scales: Iterable[Tensor], flip: bool, size: Size, config: InferenceConfig
) -> Tensor:
    """Mean probabilities over an image at several sizes and, with `flip`, over its mirror images as well.

    Args:
        scales: the same images [B, C, h, w], normalised, at each size; they are asked for one after the other.
        size: (height, width) that all are brought to.
    Returns: [B, K, height, width] float32.
    """

    def views() -> Iterator[tuple[Tensor, bool]]:
        for images in scales:
            yield image_logits(model, images, config), False
            if flip:
                yield image_logits(model, images.flip(-1), config), True

    return merged_probabilities(views(), size)


def merged_probabilities(views: Iterable[tuple[Tensor, bool]], size: Size) -> Tensor:
    """The mean of the softmaxes of several views.

    Args:
        views: class scores [B, K, h, w] of a view, and whether it was mirrored, which is undone first.
        size: (height, width) that the scores are resized to.
    Returns: [B, K, height, width] float32.
    """
    total: Tensor | None = None
    num_views = 0
    for scores, mirrored in views:
        probabilities = resize(scores.flip(-1) if mirrored else scores, size).float().softmax(dim=1)
        total = probabilities if total is None else total.add_(probabilities)
        num_views += 1
    if total is None:
        raise ValueError("merged_probabilities: no views; expected one at least")
    return total.div_(num_views)
