"""The box head: from a region's features to its class and a better box, and its losses. Spec detection 4.3, 4.4.

Letters: R ROIs, C channels, S side of what is pooled, F width of the hidden layer, K classes; class K is background.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer.detection.boxes import BoxCoder
from transfer.detection.pyramid import LayerNorm2d
from transfer.detection.rois import LabelledRois


class ConvNorm(nn.Conv2d):
    """A 3x3 convolution without bias, its own LayerNorm2d `norm`, and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)
        self.norm = LayerNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, S, S] to the same shape."""
        return F.relu(self.norm(super().forward(x)))

    def init_weights(self, generator: torch.Generator) -> None:
        """Kaiming-normal for ReLU, by fan out."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu", generator=generator)


class BoxHead(nn.Module):
    """Convolutions, one hidden layer, and a linear layer each for the classes and for the boxes."""

    def __init__(
        self, channels: int, pooled_size: int, num_convs: int, fc_dim: int, num_classes: int, class_agnostic: bool
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(channels) for _ in range(num_convs))
        self.fc = nn.Linear(channels * pooled_size**2, fc_dim)
        self.cls = nn.Linear(fc_dim, num_classes + 1)
        self.reg = nn.Linear(fc_dim, 4 if class_agnostic else num_classes * 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [R, C, S, S] to class scores [R, K + 1] and box deltas [R, K * 4] or [R, 4], in float32."""
        hidden = self.hidden(pooled)
        return self.cls(hidden).float(), self.reg(hidden).float()

    def hidden(self, pooled: Tensor) -> Tensor:
        """What both predictions are made from, [R, F]."""
        for conv in self.convs:
            pooled = conv(pooled)
        return F.relu(self.fc(pooled.flatten(1)))  # [R, F], from the order channel, row, column

    def init_weights(self, generator: torch.Generator) -> None:
        """Hidden layer Kaiming-uniform with a = 1, predictions normal of deviation 0.01 and 0.001, biases 0."""
        for conv in self.convs:
            conv.init_weights(generator)  # type: ignore[operator]
        nn.init.kaiming_uniform_(self.fc.weight, a=1, generator=generator)
        nn.init.normal_(self.cls.weight, std=0.01, generator=generator)
        nn.init.normal_(self.reg.weight, std=0.001, generator=generator)
        for linear in (self.fc, self.cls, self.reg):
            nn.init.zeros_(linear.bias)


def box_losses(scores: Tensor, deltas: Tensor, rois: LabelledRois, coder: BoxCoder) -> tuple[Tensor, Tensor]:
    """Cross entropy of the class, and L1 distance of the deltas of objects, both over all R regions; 0-dim float32.

    Args:
        scores: [R, K + 1].
        deltas: [R, K * 4], of which those of the true class count, or [R, 4].
    Returns: both 0, with a graph, if there are no regions.
    """
    num_rois, background = len(rois.labels), scores.shape[1] - 1
    if num_rois == 0:
        return scores.sum() * 0.0, deltas.sum() * 0.0
    loss_cls = F.cross_entropy(scores.float(), rois.labels)
    is_object = (rois.labels != background).unsqueeze(1)  # [R, 1]
    # Regions without an object get their own box as truth and weight 0, so that the host need not look for the others.
    wanted = coder.encode(rois.boxes, torch.where(is_object, rois.truth_boxes, rois.boxes))  # [R, 4]
    deltas = deltas.float().unflatten(1, (-1, 4))  # [R, K or 1, 4]
    if deltas.shape[1] > 1:
        deltas = deltas[torch.arange(num_rois, device=deltas.device), rois.labels.clamp(max=background - 1)]
    loss_box_reg = ((deltas.view(-1, 4) - wanted).abs() * is_object).sum() / num_rois
    return loss_cls, loss_box_reg
