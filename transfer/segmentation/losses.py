"""Cross entropy over pixels, as published and as usual. Spec segmentation section 5.

Letters: B batch, K classes, h w a map of scores, H W labels.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfer.segmentation.resizing import resize

Average = Literal["all_pixels", "valid_pixels"]


def _all_pixels(labels: Tensor, ignore_index: int) -> int:
    return labels.numel()


def _valid_pixels(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels != ignore_index).sum().clamp(min=1)


DIVISORS: dict[Average, Callable[[Tensor, int], Tensor | int]] = {
    "all_pixels": _all_pixels,
    "valid_pixels": _valid_pixels,
}


def pixel_cross_entropy(logits: Tensor, labels: Tensor, average: Average, ignore_index: int) -> Tensor:
    """Cross entropy of scores that are brought to the size of the labels, in float32.

    Args:
        logits: [B, K, h, w].
        labels: [B, H, W], any integer type; 0..K-1, or `ignore_index`, whose pixels count nothing.
        average: what the sum over pixels is divided by. all_pixels: their number, ignored ones included, as published.
            valid_pixels: the number of the others, as is usual; of this micro-batch, so that pixels of micro-batches
            weigh the same only where these have as many.
    Returns: 0-dim float32; zero, with a gradient of zero, where every pixel is ignored.
    Raises: ValueError if the numbers of images differ.
    """
    if len(logits) != len(labels):
        raise ValueError(f"pixel_cross_entropy: scores of {len(logits)} images, labels of {len(labels)}")
    return _SummedCrossEntropy.apply(logits, labels, ignore_index) / DIVISORS[average](labels, ignore_index)


class _SummedCrossEntropy(torch.autograd.Function):
    """The sum over all pixels, image by image, whose gradient is taken on the way.

    Scores at the size of the labels (H x W x K) are the largest maps of the whole network. So they exist for one image
    at a time, and what is kept for the backward pass is the gradient at the size of `logits`, a sixteenth of it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for image, label in zip(logits.split(1), labels.split(1), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                scores = image.detach().requires_grad_(ctx.needs_input_grad[0])
                summed = _summed(scores, label, ignore_index)
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(summed, scores)
            sums.append(summed.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))  # [B, K, h, w]
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad_output, None, None


def _summed(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    resized = resize(logits.float(), labels.shape[1:])  # [1, K, H, W]
    return F.cross_entropy(resized, labels.long(), ignore_index=ignore_index, reduction="sum")


@torch.no_grad()
def pixel_accuracy_pct(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Per cent of the valid pixels whose highest score is that of their label; 0 where there are none.

    Args: as those of `pixel_cross_entropy`.
    """
    predicted = resize(logits.float(), labels.shape[1:]).argmax(dim=1)  # [B, H, W]
    valid = labels != ignore_index
    return 100 * ((predicted == labels) & valid).sum() / valid.sum().clamp(min=1)
