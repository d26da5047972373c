"""The probes of a pretraining run, k-NN and linear: what its frozen features are worth on a small labelled set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from core.config import Config
from core.datasets import ImageSource, labelled_pair
from core.distributed import Processes
from core.engine import autocast
from core.knn import knn_classify, topk_accuracy_pct
from core.linear_probe import linear_classify
from core.loader import EvalImages, eval_loader, in_order
from core.transforms import normalize, resize_center_crop
from core.vit import ViT


class ProbeConfig(Config):
    """The labelled set of the probe, and how it is used."""

    data: str | None = None  # labelled ImageFolder or tar; None: no probe
    train_images: PositiveInt = 10000  # at most so many, evenly spread over the set; fewer than it holds is a subset
    test_images: PositiveInt = 2000
    k: PositiveInt = 20
    temperature: float = Field(0.07, gt=0)
    feature: Literal["cls", "mean"] = "mean"  # class token, or mean of the patch tokens, after the final norm
    crop_ratio: float = Field(0.875, gt=0, le=1)  # share of the resized image that the central crop keeps


@dataclass(frozen=True)
class EvalTransform:
    """Published evaluation transform at a size; a named class so that loader workers can receive it."""

    size: tuple[int, int]
    crop_ratio: float

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [C, h, w] to uint8 [C, *size]."""
        return resize_center_crop(image, self.size, self.crop_ratio)


@dataclass(frozen=True)
class Probe:
    """Call it with an encoder to get its figures."""

    config: ProbeConfig
    train: ImageSource
    test: ImageSource
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    precision: str
    num_workers: int
    timeout_s: int
    processes: Processes

    def __call__(self, encoder: ViT) -> dict[str, float]:
        """Top-1 and top-5 percent of k-NN, and top-1 of a linear classifier, on the encoder's features."""
        features, labels = self._features(encoder, self.train)
        queries, truth = self._features(encoder, self.test)
        classes = len(self.train.classes)
        scores = knn_classify(
            features, labels, queries, num_classes=classes, k=self.config.k, temperature=self.config.temperature
        )
        linear = linear_classify(features, labels, queries, num_classes=classes)
        return {f"probe/knn_top{k}_pct": topk_accuracy_pct(scores, truth, k) for k in (1, 5)} | {
            "probe/linear_top1_pct": topk_accuracy_pct(linear, truth, 1)
        }

    @torch.no_grad()
    def _features(self, encoder: ViT, source: ImageSource) -> tuple[Tensor, Tensor]:
        transform = EvalTransform(encoder.config.img_size, self.config.crop_ratio)
        images = EvalImages(source, transform, encoder.config.in_chans)
        features, labels, valid = [], [], []
        for batch in eval_loader(images, 128, self.num_workers, self.timeout_s, self.processes):
            pixels = normalize(batch.images.to(self.device), self.mean, self.std, torch.float32)
            with autocast(self.device, self.precision):
                tokens = encoder.tokens(pixels)  # [B, 1 + L, D]
            feature = tokens[:, 0] if self.config.feature == "cls" else tokens[:, 1:].float().mean(dim=1)  # [B, D]
            features.append(feature.float())
            labels.append(batch.labels.to(self.device))
            valid.append(batch.valid.to(self.device))
        return in_order(features, valid, self.processes), in_order(labels, valid, self.processes)


def open_probe_sets(config: ProbeConfig, cache: Path) -> tuple[ImageSource, ImageSource]:
    """The labelled pair of the probe, thinned evenly to the configured numbers. Raises: DataError."""
    assert config.data is not None, "a probe needs data"
    train, test = labelled_pair(config.data, cache)
    return _thinned(train, config.train_images), _thinned(test, config.test_images)


def _thinned(source: ImageSource, most: int) -> ImageSource:
    if len(source) <= most:
        return source
    return source.subset(np.linspace(0, len(source) - 1, most).round().astype(np.int64))
