"""The mask head: one small mask per region and class. Spec detection 4.5.

Letters: R ROIs, C channels, S side of a mask (twice that of the pooled features), K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer.detection.box_head import ConvNorm


class MaskHead(nn.Module):
    """Convolutions, a transposed one that doubles the side, and a 1x1 convolution with a channel per class."""

    def __init__(self, channels: int, num_convs: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(channels) for _ in range(num_convs))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, num_classes, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features [R, C, S / 2, S / 2] to logits [R, K, S, S]."""
        for conv in self.convs:
            pooled = conv(pooled)
        return self.predictor(F.relu(self.upsample(pooled)))  # [R, K, S, S]

    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming-normal by fan out for all but the predictor, which is normal of deviation 0.001; biases 0.

        The fan out of the transposed convolution is that of its (in, out, k, k) weight, in * 4, as published.
        """
        for conv in self.convs:
            conv.init_weights(generator)  # type: ignore[operator]
        nn.init.kaiming_normal_(self.upsample.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        nn.init.normal_(self.predictor.weight, std=0.001, generator=generator)
        nn.init.zeros_(self.upsample.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.predictor.bias)  # type: ignore[arg-type]


def of_class(logits: Tensor, labels: Tensor) -> Tensor:
    """The channels [R, S, S] of logits [R, K, S, S] that belong to labels [R], in float32."""
    return logits[torch.arange(len(labels), device=logits.device), labels].float()


def mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Mean binary cross entropy over the pixels of the true class' channel, 0-dim float32.

    Args:
        logits: [R, K, S, S] of regions with an object.
        labels: [R] int64 in 0..K-1.
        wanted: [R, S, S] bool.
    Returns: 0, with a graph, if there is no region.
    """
    if len(labels) == 0:
        return logits.float().sum() * 0.0
    return F.binary_cross_entropy_with_logits(of_class(logits, labels), wanted.float())
