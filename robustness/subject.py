"""The model under test, as functions of uint8 images: a classifier directory, or any backbone."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core.backbone_io import load_backbone, stored_normalization, weights_digest
from core.engine import autocast, uses_bf16
from core.errors import CheckpointError, ConfigError, shown
from core.features import pooled
from core.transforms import normalize
from core.vit import ViT
from robustness.evaluation import Score
from robustness.settings import Kind, RobustConfig
from transfer.classification.model import load_classifier

BACKBONE_CROP_RATIO = 0.875  # of a backbone's images, as in the published evaluations


class Tested(Protocol):
    """What a sweep knows of the model under test, whatever its kind."""

    @property
    def kind(self) -> Kind:
        """Classifier, detector or segmentor."""

    @property
    def name(self) -> str:
        """Where it lies, printable."""

    @property
    def digest(self) -> str:
        """Identifies weights, classes and preparation, wherever the files lie."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of its scores."""

    @property
    def img_size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""

    @property
    def precision(self) -> str:
        """fp32, or bf16 autocast."""

    def units(self, name: str) -> tuple[str, ...]:
        """The figures of a cell of the set `name` that make grids."""

    def described(self) -> str:
        """What it is and how images come to it, in words."""


@dataclass(frozen=True)
class Subject:
    """A classifier or backbone, and how its images are prepared.

    Attributes:
        digest: identifies weights, classes and preparation, wherever the files lie.
        logits: scores of the classes; None for a backbone.
        features: what the head sees; of a backbone the pooled tokens.
        classes: names in the order of the logits.
        img_size: (height, width) of the input.
        crop_ratio: share of the resized image that its own evaluation transform keeps.
        precision: fp32, or bf16 autocast.
    """

    name: str
    digest: str
    logits: Score | None
    features: Score
    classes: tuple[str, ...]
    img_size: tuple[int, int]
    crop_ratio: float
    precision: str

    @property
    def kind(self) -> Kind:
        """As `Tested`."""
        return "classifier"

    def units(self, name: str) -> tuple[str, ...]:
        """As `Tested`."""
        return ("cosine",) if name == "representation" else ("error_pct",)

    def described(self) -> str:
        """As `Tested`."""
        what = f"{len(self.classes)} classes" if self.classes else "a backbone"
        return f"{what}, {self.img_size[0]}x{self.img_size[1]} px, crop {self.crop_ratio:g}"


def load_subject(config: RobustConfig, device: torch.device) -> Subject:
    """The classifier or backbone of a configuration, on the device. Raises: CheckpointError, ConfigError."""
    precision = "bf16" if uses_bf16(device, config.precision) else "fp32"
    if config.model is not None:
        return _classifier(config.model, device, precision)
    assert config.backbone is not None, "RobustConfig refuses neither"
    vit, _ = load_backbone(config.backbone, branch=config.branch, num_heads=config.num_heads)
    _require_rgb(vit, config.backbone)
    vit.to(device).eval()
    mean, std = stored_normalization(config.backbone)

    def features(images: Tensor) -> Tensor:
        with autocast(device, precision):
            tokens = vit.tokens(normalize(images, mean, std, torch.float32))  # [B, 1 + L, D]
        return pooled(tokens, config.feature)  # [B, D]

    size, ratio = vit.config.img_size, BACKBONE_CROP_RATIO
    digest = _digest(vit, [size, ratio, mean, std, config.feature])
    return Subject(shown(config.backbone), digest, None, features, (), size, ratio, precision)


def _classifier(path: Path, device: torch.device, precision: str) -> Subject:
    try:
        loaded = load_classifier(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; model= is a classifier, detector or segmentor directory") from None
    model = loaded.model.to(device).eval()
    _require_rgb(model, path)

    def features(images: Tensor) -> Tensor:
        with autocast(device, precision):
            return model.features(normalize(images, loaded.mean, loaded.std, torch.float32)).float()  # [B, D]

    def logits(images: Tensor) -> Tensor:
        with autocast(device, precision):
            return model(normalize(images, loaded.mean, loaded.std, torch.float32)).float()  # [B, K]

    facts = [loaded.img_size, loaded.crop_ratio, loaded.mean, loaded.std, model.pool, loaded.classes]
    return Subject(
        shown(path), _digest(model, facts), logits, features, loaded.classes, loaded.img_size, loaded.crop_ratio,
        precision,
    )  # fmt: skip


def _require_rgb(vit: ViT, path: Path) -> None:
    if vit.config.in_chans != 3:
        raise ConfigError(f"{shown(path)}: takes {vit.config.in_chans} channel; corruptions are defined on RGB images")


def _digest(vit: ViT, facts: list) -> str:
    return hashlib.sha256(f"{weights_digest(vit)} {json.dumps(facts)}".encode()).hexdigest()[:12]
