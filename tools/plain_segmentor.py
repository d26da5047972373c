"""The plain twin of a segmentor, written as is usually done: baseline of its benchmark.

Attention is unfused. The heads resize and concatenate maps before they convolve them. The loss has scores of every
pixel of the whole batch. An evaluation takes one window at a time, adds up scores of every pixel, and counts in floats
on the host, as mmsegmentation and its forebears do.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.plain_attention import make_attention_plain
from transfer.segmentation.resizing import resize
from transfer.segmentation.segmentor import AUX_LEVEL, Segmentor
from transfer.segmentation.slide import HasLogits, InferenceConfig, Size, window_starts
from transfer.segmentation.upernet import ConvModule


class PlainConvModule(ConvModule):
    """Convolution, batch norm, ReLU, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, D, h, w]."""
        return F.relu(self.bn(self.conv(x)))

    def of_resized(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """As that of `ConvModule`, on the maps as they are asked for."""
        return self(torch.cat([resize(x, size) for x in maps], dim=1))


class PlainSegmentor(Segmentor):
    """A segmentor with the losses of the whole batch at once."""

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        branch_scales: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As those of `Segmentor`."""
        maps = self.features(images, branch_scales)
        decode = self._cross_entropy(self.decode_head(maps, generator), labels)
        aux = self._cross_entropy(self.auxiliary_head(maps[AUX_LEVEL], generator), labels)
        return {"loss_decode": decode, "loss_aux": self.config.aux_weight * aux}

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        resized, ignored = resize(logits, labels.shape[1:]), self.config.ignore_index  # [B, K, H, W]
        summed = F.cross_entropy(resized, labels.long(), ignore_index=ignored, reduction="sum")
        count = labels.numel() if self.config.average == "all_pixels" else (labels != ignored).sum().clamp(min=1)
        return summed / count


def as_plain(model: Segmentor) -> PlainSegmentor:
    """The plain twin of a segmentor, with a copy of its weights."""
    plain = PlainSegmentor(copy.deepcopy(model.backbone), model.config)
    make_attention_plain(plain.backbone)
    for parent in list(plain.modules()):
        for name, module in parent.named_children():
            if isinstance(module, ConvModule):
                conv = module.conv
                setattr(parent, name, PlainConvModule(conv.in_channels, conv.out_channels, conv.kernel_size[0]))
    plain.load_state_dict(model.state_dict())
    return plain


@torch.no_grad()
def plain_labels(model: HasLogits, image: Tensor, size: Size, config: InferenceConfig) -> Tensor:
    """The class of every pixel of a normalised image [1, C, H, W] at a size, [height, width] int64: windows in turn."""
    H, W = image.shape[2:]
    tops, lefts = window_starts(H, config.crop, config.stride), window_starts(W, config.crop, config.stride)
    total, count = None, image.new_zeros(1, 1, H, W)
    for top in tops:
        for left in lefts:
            window = image[:, :, top : top + config.crop, left : left + config.crop]
            height, width = window.shape[2:]
            values, span = model.logits(window)
            scores = resize(values, span)[:, :, :height, :width]  # [1, K, height, width]
            if total is None:
                total = scores.new_zeros(1, scores.shape[1], H, W)
            total[:, :, top : top + height, left : left + width] += scores
            count[:, :, top : top + height, left : left + width] += 1
    assert total is not None, "an image has a window at least"
    return resize(total / count, size).argmax(dim=1)[0]


def plain_confusion(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> np.ndarray:
    """How many pixels of each class (row) were taken for which, [K, K] float64 on the host."""
    predicted, truth = predictions.cpu().numpy(), labels.cpu().numpy()
    known = truth != ignore_index
    bins = num_classes * truth[known].astype(int) + predicted[known]
    return np.bincount(bins, minlength=num_classes**2).reshape(num_classes, num_classes).astype(float)
