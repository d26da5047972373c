"""The probes of a pretraining run, k-NN and linear: what its frozen features are worth on a small labelled set."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field, PositiveInt

from core.config import Config
from core.datasets import ImageSource, labelled_pair
from core.features import Feature, FeatureExtractor
from core.knn import knn_classify, topk_accuracy_pct
from core.linear_probe import linear_classify
from core.vit import ViT


class ProbeConfig(Config):
    """The labelled set of the probe, and how it is used."""

    data: str | None = None  # labelled ImageFolder or tar; None: no probe
    train_images: PositiveInt = 10000  # at most so many, evenly spread over the set; fewer than it holds is a subset
    test_images: PositiveInt = 2000
    k: PositiveInt = 20
    temperature: float = Field(0.07, gt=0)
    feature: Feature = "mean"  # class token, or mean of the patch tokens, after the final norm
    crop_ratio: float = Field(0.875, gt=0, le=1)  # share of the resized image that the central crop keeps


@dataclass(frozen=True)
class Probe:
    """Call it with an encoder to get its figures."""

    config: ProbeConfig
    train: ImageSource
    test: ImageSource
    features_of: FeatureExtractor

    def __call__(self, encoder: ViT) -> dict[str, float]:
        """Top-1 and top-5 percent of k-NN, and top-1 of a linear classifier, on the encoder's features."""
        features, labels = self.features_of(encoder, self.train, self.config.feature)
        queries, truth = self.features_of(encoder, self.test, self.config.feature)
        classes = len(self.train.classes)
        scores = knn_classify(
            features, labels, queries, num_classes=classes, k=self.config.k, temperature=self.config.temperature
        )
        linear = linear_classify(features, labels, queries, num_classes=classes)
        return {f"probe/knn_top{k}_pct": topk_accuracy_pct(scores, truth, k) for k in (1, 5)} | {
            "probe/linear_top1_pct": topk_accuracy_pct(linear, truth, 1)
        }


def open_probe_sets(config: ProbeConfig, cache: Path) -> tuple[ImageSource, ImageSource]:
    """The labelled pair of the probe, thinned evenly to the configured numbers. Raises: DataError."""
    assert config.data is not None, "a probe needs data"
    train, test = labelled_pair(config.data, cache)
    return _thinned(train, config.train_images), _thinned(test, config.test_images)


def _thinned(source: ImageSource, most: int) -> ImageSource:
    if len(source) <= most:
        return source
    return source.subset(np.linspace(0, len(source) - 1, most).round().astype(np.int64))
