"""What is trained: the whole classifier (fine-tuning), or a linear layer on a frozen backbone (linear probe)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.distributed import Processes
from core.task import Place
from core.transforms import normalize
from core.vit import ViT, drop_path_scales
from transfer.classification.augment import MixConfig, erase, mix, soft_cross_entropy
from transfer.classification.data import LabelledBatch
from transfer.classification.evaluate import Outcomes
from transfer.classification.model import PROBE_HEAD_STD, Classifier

Evaluate = Callable[[Callable[[Tensor], Tensor]], Outcomes]
PROBE_NORM_EPS, PROBE_NORM_MOMENTUM = 1e-6, 0.1


@dataclass(frozen=True)
class FinetuneMethod:
    """The numbers of fine-tuning that the task needs."""

    num_classes: int
    drop_path: float
    mix: MixConfig
    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class FinetuneTask:
    """All weights of a classifier under mixed, smoothed targets; see `core.task.Task`. Spec classify section 2."""

    def __init__(self, model: Classifier, method: FinetuneMethod, evaluate: Evaluate) -> None:
        self.model, self.method, self._evaluate = model, method, evaluate
        self.latest: Outcomes | None = None  # of the last evaluation

    def losses(self, batch: LabelledBatch, at: Place) -> dict[str, Tensor]:
        """Cross entropy with the mixed targets. Erasing, mixing and drop path are drawn from the place in the run."""
        method = self.method
        images = normalize(batch.images, method.mean, method.std, torch.float32)
        generator = at.generator(method.seed, images.device)
        images = erase(images, batch.erased, generator)
        images, targets = mix(images, batch.labels, method.num_classes, method.mix, at.rng(method.seed))
        scales = None
        if method.drop_path:
            scales = drop_path_scales(method.drop_path, self.model.config.depth, len(images), generator)
        return {"cross_entropy": soft_cross_entropy(self.model(images, scales), targets)}

    def after_update(self, step: int, finite: Tensor) -> None:
        """Nothing follows the weights."""

    def observe(self, step: int) -> dict[str, float]:
        """Nothing is measured beside the losses."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy on the test images."""
        self.latest = self._evaluate(self.model)
        return self.latest.figures()

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """No picture during the training."""
        return {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of the classifier's parameters."""
        return self.model.named_parameters()

    def modules(self) -> Mapping[str, nn.Module]:
        """The classifier."""
        return {"classifier": self.model}


class ProbeHead(nn.Sequential):
    """Batch normalisation without weights, then one linear layer; the published probe's names `0.*` and `1.*`."""

    def __init__(self, dim: int, num_classes: int, generator: torch.Generator) -> None:
        norm = nn.BatchNorm1d(dim, affine=False, eps=PROBE_NORM_EPS, momentum=PROBE_NORM_MOMENTUM)
        super().__init__(norm, nn.Linear(dim, num_classes))
        nn.init.normal_(self.linear.weight, std=PROBE_HEAD_STD, generator=generator)
        nn.init.zeros_(self.linear.bias)
        self.eval()  # called, it uses the running statistics; in training the task normalises by the batch itself

    @property
    def linear(self) -> nn.Linear:
        """The layer that is trained."""
        return cast(nn.Linear, self[1])

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance [D], the buffers themselves."""
        return cast(Tensor, self[0].running_mean), cast(Tensor, self[0].running_var)

    @torch.no_grad()
    def follow(self, seen: tuple[Tensor, Tensor], finite: Tensor) -> None:
        """Move the running statistics towards the mean and variance of a step; not where `finite` is False."""
        for running, new in zip(self.running, seen, strict=True):
            running.copy_(torch.where(finite, running.lerp(new, PROBE_NORM_MOMENTUM), running))
        cast(Tensor, self[0].num_batches_tracked).add_(finite)

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight [K, D] and bias [K] of one linear layer that does what both do in evaluation."""
        mean, variance = self.running
        weight = self.linear.weight * (variance + PROBE_NORM_EPS).rsqrt()
        return weight, self.linear.bias - weight @ mean


class LinearProbeTask:
    """A linear classifier on frozen features; see `core.task.Task`. Spec classify section 3.

    Each micro-batch is normalised by its own mean and variance, as every GPU of the published runs does. The running
    statistics follow the mean over all micro-batches of a step (there: those of one GPU), so that they do not depend on
    how these were shared out.
    """

    def __init__(
        self,
        backbone: ViT,
        head: ProbeHead,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        evaluate: Evaluate,
        processes: Processes,
    ) -> None:
        self.backbone, self.head = backbone.requires_grad_(False), head
        self._mean, self._std, self._evaluate, self._processes = mean, std, evaluate, processes
        self.latest: Outcomes | None = None  # of the last evaluation
        self._seen: list[Tensor] = []  # [2, D] mean and variance of each micro-batch of this step

    def losses(self, batch: LabelledBatch, at: Place) -> dict[str, Tensor]:
        """Cross entropy with the labels."""
        images = normalize(batch.images, self._mean, self._std, torch.float32)
        features = self._features(images).float()  # [B, D]
        if at.turn == 0:
            self._seen = []
        self._seen.append(torch.stack([features.mean(dim=0), features.var(dim=0)]))
        normed = F.batch_norm(features, None, None, training=True, eps=PROBE_NORM_EPS)
        return {"cross_entropy": F.cross_entropy(self.head.linear(normed).float(), batch.labels)}

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return self.backbone.tokens(images)[:, 0]  # [B, D], the class token

    @torch.no_grad()
    def after_update(self, step: int, finite: Tensor) -> None:
        """Move the running statistics towards those of the step; not at all where `finite` is False."""
        mean, variance = self._processes.mean_(torch.stack(self._seen).mean(dim=0)).unbind(0)
        self.head.follow((mean, variance), finite)

    def observe(self, step: int) -> dict[str, float]:
        """Nothing is measured beside the losses."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy on the test images."""
        self.latest = self._evaluate(lambda images: self.head(self._features(images).float()))
        return self.latest.figures()

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """No picture during the training."""
        return {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The linear layer's parameters; the backbone is frozen."""
        return self.head.named_parameters()

    def modules(self) -> Mapping[str, nn.Module]:
        """The head; the backbone is what its file says."""
        return {"head": self.head}
