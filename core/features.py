"""Features of whole image sets by a frozen encoder, for probes and k-NN; in the order of the images, each once."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.datasets import ImageSource
from core.distributed import Processes
from core.engine import autocast
from core.loader import EvalImages, eval_loader, in_order
from core.transforms import EvalTransform, normalize
from core.vit import ViT

Feature = Literal["cls", "mean", "concat"]  # class token, mean of the patch tokens, both; after the final norm

BATCH_SIZE = 128


@dataclass(frozen=True)
class FeatureExtractor:
    """How images are read and normalised; call it with an encoder and images to get features."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float  # share of the resized image that the central crop keeps
    device: torch.device
    precision: str
    num_workers: int
    timeout_s: int
    processes: Processes

    @torch.no_grad()
    def __call__(self, encoder: ViT, source: ImageSource, feature: Feature) -> tuple[Tensor, Tensor]:
        """Features [N, D] (or [N, 2 D] for "concat") in float32 and labels [N] of all images, on the device.

        The published evaluation transform at the encoder's size. Every process gets all of them.
        """
        images = EvalImages(source, EvalTransform(encoder.config.img_size, self.crop_ratio), encoder.config.in_chans)
        features, labels, valid = [], [], []
        for batch in eval_loader(images, BATCH_SIZE, self.num_workers, self.timeout_s, self.processes):
            pixels = normalize(batch.images.to(self.device), self.mean, self.std, torch.float32)
            with autocast(self.device, self.precision):
                tokens = encoder.tokens(pixels)  # [B, 1 + L, D]
            features.append(pooled(tokens, feature))
            labels.append(batch.labels.to(self.device))
            valid.append(batch.valid.to(self.device))
        return in_order(features, valid, self.processes), in_order(labels, valid, self.processes)


def pooled(tokens: Tensor, feature: Feature) -> Tensor:
    """One float32 vector per image of tokens [B, 1 + L, D]: [B, D], or [B, 2 D] for "concat"."""
    parts = {"cls": lambda: tokens[:, 0].float(), "mean": lambda: tokens[:, 1:].float().mean(dim=1)}
    return torch.cat([part() for name, part in parts.items() if feature in (name, "concat")], dim=-1)
