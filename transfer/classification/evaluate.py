"""Accuracy of a classifier over a whole labelled set: every image once, on any number of processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.datasets import ImageSource
from core.distributed import Processes
from core.engine import autocast
from core.loader import EvalImages, eval_loader, in_order
from core.transforms import EvalTransform, normalize

BATCH_SIZE = 128


@dataclass(frozen=True)
class Outcomes:
    """What a classifier made of every image of a set, in the order of the images.

    Attributes:
        labels, predictions: int64 [N].
        ranks: int64 [N], how many classes were scored above the true one; ties go to the lower index. 0: correct.
        losses: float32 [N], cross entropy.
    """

    labels: Tensor
    predictions: Tensor
    ranks: Tensor
    losses: Tensor

    def figures(self) -> dict[str, float]:
        """Top-1 and top-5 percent, and the mean loss over all images."""
        found = {f"eval/top{k}_pct": (self.ranks < k).double().mean().item() * 100 for k in (1, 5)}
        return {**found, "eval/loss": self.losses.double().mean().item()}

    def confusion(self, num_classes: int) -> np.ndarray:
        """Counts [K, K] int64: row is the true class, column the predicted one."""
        pairs = self.labels * num_classes + self.predictions
        return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).cpu().numpy()


@dataclass(frozen=True)
class Evaluator:
    """Images and how they are read; call it with what scores them."""

    source: ImageSource
    img_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    device: torch.device
    precision: str
    num_workers: int
    timeout_s: int
    processes: Processes

    @torch.no_grad()
    def __call__(self, score: Callable[[Tensor], Tensor]) -> Outcomes:
        """Outcomes of `score`: normalised images [B, C, H, W] -> scores [B, K]. Every process gets all of them."""
        images = EvalImages(self.source, EvalTransform(self.img_size, self.crop_ratio), self.channels)
        rows: dict[str, list[Tensor]] = {"labels": [], "predictions": [], "ranks": [], "losses": []}
        valid = []
        for batch in eval_loader(images, BATCH_SIZE, self.num_workers, self.timeout_s, self.processes):
            pixels = normalize(batch.images.to(self.device), self.mean, self.std, torch.float32)
            with autocast(self.device, self.precision):
                scores = score(pixels).float()  # [B, K]
            labels = batch.labels.to(self.device)
            rows["labels"].append(labels)
            rows["predictions"].append(ranked_first(scores))
            rows["ranks"].append(ranks(scores, labels))
            rows["losses"].append(F.cross_entropy(scores, labels, reduction="none"))
            valid.append(batch.valid.to(self.device))
        return Outcomes(**{name: in_order(values, valid, self.processes) for name, values in rows.items()})


def ranked_first(scores: Tensor) -> Tensor:
    """The class of the highest score, the lowest index of equal ones: [B, K] to [B]."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, 0]


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes of scores [B, K] come before the true one, equal scores by index: int64 [B]."""
    own = scores.gather(1, labels.unsqueeze(1))  # [B, 1]
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels.unsqueeze(1)  # [B, K]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)


def per_class_pct(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, float | None]:
    """Accuracy in percent by class name; None for a class without images."""
    totals = confusion.sum(axis=1)
    return {
        name: 100 * float(confusion[i, i]) / float(totals[i]) if totals[i] else None for i, name in enumerate(classes)
    }
