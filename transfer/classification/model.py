"""The classifier: the plain ViT with a pooled feature and one linear layer, under timm's parameter names.

A classifier directory is a backbone directory with a head:

    NAME/model.safetensors    timm's names: the ViT, fc_norm or norm, head
    NAME/config.json          timm's hub layout, plus "rcmae": sizes, pooling, class names, where the weights come from

`timm.create_model("local-dir:NAME", pretrained=True)` loads it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.backbone_io import WEIGHTS, fill, read_weights, timm_architecture
from core.errors import shown
from core.files import FileSystem
from core.model_directory import read_description, write_model
from core.vit import LAYER_NORM_EPS, ViT, ViTConfig

Pool = Literal["mean", "cls"]
FINETUNE_HEAD_STD, PROBE_HEAD_STD = 2e-5, 0.01


class Classifier(ViT):
    """A ViT with a class score per image.

    pool = "mean": the mean of the patch tokens (the class token takes part in attention alone), then a LayerNorm of its
    own, `fc_norm`, in place of the encoder's `norm`. pool = "cls": the class token after `norm`. Spec classify 1.
    """

    def __init__(self, config: ViTConfig, num_classes: int, pool: Pool) -> None:
        super().__init__(config)
        self.pool = pool
        if pool == "mean":
            self.norm = nn.Identity()  # timm leaves it out in the same way
            self.fc_norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.embed_dim, num_classes)

    def forward(self, images: Tensor, branch_scales: Tensor | None = None) -> Tensor:
        """Scores [B, K] of normalised images [B, C, H, W]; `branch_scales` as in `ViT.tokens`."""
        return self.head(self.features(images, branch_scales))

    def features(self, images: Tensor, branch_scales: Tensor | None = None) -> Tensor:
        """What the head sees of normalised images [B, C, H, W]: [B, D]."""
        tokens = self.tokens(images, branch_scales=branch_scales)  # [B, 1 + L, D]
        return tokens[:, 0] if self.pool == "cls" else self.fc_norm(tokens[:, 1:].mean(dim=1))  # [B, D]


def classifier_from(backbone: ViT, num_classes: int, pool: Pool, generator: torch.Generator) -> Classifier:
    """A classifier with the weights of a backbone and a fresh head.

    The head is drawn from a plain normal distribution: the truncated one of timm now and then maps a draw to its limit
    of -2, a hundred thousand deviations away (spec classify section 1.1). The position table becomes trainable.
    """
    model = Classifier(backbone.config, num_classes, pool)
    own = model.state_dict()
    model.load_state_dict({**own, **{key: t for key, t in backbone.state_dict().items() if key in own}})
    nn.init.normal_(model.head.weight, std=FINETUNE_HEAD_STD, generator=generator)
    nn.init.zeros_(model.head.bias)
    return model


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier as it was stored, with all that it takes to use it.

    Attributes:
        classes: names in the order of the scores.
        mean, std: per channel, the normalisation that it expects.
        crop_ratio: share of the resized image that its evaluation transform keeps.
        provenance: where the weights come from.
    """

    model: Classifier
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    provenance: dict[str, Any]

    @property
    def img_size(self) -> tuple[int, int]:
        """(height, width) of its input, in pixels."""
        return self.model.config.img_size


def export_classifier(
    folder: Path,
    model: Classifier,
    classes: Sequence[str],
    provenance: Mapping[str, Any],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop_ratio: float,
    fs: FileSystem | None = None,
) -> None:
    """Write a classifier directory, whole or not at all."""
    config = model.config
    architecture, arguments = timm_architecture(config)
    if model.pool == "mean":
        arguments["global_pool"] = "avg"
    if len(classes) != 1000:
        arguments["num_classes"] = len(classes)
    description = {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": config.embed_dim,
        "global_pool": "avg" if model.pool == "mean" else "token",
        "label_names": list(classes),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "input_size": [config.in_chans, *config.img_size],
            "fixed_input_size": True,
            "num_classes": len(classes),
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "crop_pct": crop_ratio,
        },
        "rcmae": {"vit": config.model_dump(mode="json"), "pool": model.pool, **provenance},
    }
    write_model(folder, model, description, fs)


def load_classifier(folder: Path) -> LoadedClassifier:
    """Load a classifier directory strictly.

    Raises: CheckpointError where something is missing, unknown, or of another shape; NumericError for weights that are
        not finite.
    """
    loaded = read_description(folder, "classifier", "classify", _described)
    fill(loaded.model, read_weights(folder / WEIGHTS), shown(folder))
    return loaded


def _described(description: dict[str, Any]) -> LoadedClassifier:
    """A classifier as its description says, with weights yet to be loaded."""
    classes = tuple(str(label) for label in description["label_names"])
    ours, stored = description["rcmae"], description["pretrained_cfg"]
    config = ViTConfig.model_validate_json(json.dumps(ours["vit"]))
    pool: Pool = {"mean": "mean", "cls": "cls"}[ours["pool"]]  # type: ignore[assignment]
    mean, std = (tuple(float(value) for value in stored[key]) for key in ("mean", "std"))
    provenance = {key: value for key, value in ours.items() if key not in {"vit", "pool"}}
    model = Classifier(config, len(classes), pool)
    return LoadedClassifier(model, classes, mean, std, float(stored["crop_pct"]), provenance)
