"""What of a recipe mmsegmentation cannot do, and what it does here otherwise than it is published with."""

import importlib.metadata
from collections.abc import Iterator

import torch

from core.engine import Plan, uses_bf16
from core.errors import ConfigError
from core.vit import ViTConfig
from transfer.segmentation.segmentor import LabelsConfig, SegmentorConfig, published_blocks
from transfer.segmentation.slide import InferenceConfig

PACKAGES = ("mmsegmentation", "mmengine", "mmcv-lite")


def require_possible(vit: ViTConfig, sizes: LabelsConfig, inference: InferenceConfig) -> None:
    """Raise ConfigError for a network or windows that mmsegmentation's UperNet does not have, a line per fault.

    Args:
        vit, sizes: of the network that is trained or evaluated.
    """
    if found := [f"{line} (framework=mmseg)" for line in _faults(vit, sizes, inference)]:
        raise ConfigError("\n".join(found))


def _faults(vit: ViTConfig, sizes: LabelsConfig, inference: InferenceConfig) -> Iterator[str]:
    if not isinstance(sizes, SegmentorConfig):
        yield "backbone: a linear head, which mmsegmentation does not have; give a segmentor with UperNet"
        return
    blocks = list(sizes.blocks or published_blocks(vit.depth))
    if blocks != sorted(set(blocks)):
        yield f"segmentor.blocks={blocks}: mmsegmentation takes each block once and in order; give such ones"
    if sizes.num_classes == 1:
        yield "num_classes=1: mmsegmentation takes the score of a single class for a threshold; name a second one"
    if not vit.class_token or not vit.mlp_ratio.is_integer():
        yield "backbone: mmsegmentation's MAE has a class token and a whole mlp_ratio; leave framework out"
    if inference.mode == "whole":
        yield "inference.mode=whole: mmsegmentation's MAE takes windows of one size alone; give inference.mode=slide"
    elif (inference.crop, inference.crop) != vit.img_size:
        yield (
            f"inference.crop={inference.crop}: mmsegmentation's MAE takes windows of {vit.img_size[0]} px alone; leave "
            "it out"
        )


def versions() -> str:
    """The packages that do the work, with their versions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def notes(plan: Plan, precision: str, device: torch.device, views: bool) -> list[str]:
    """Lines for the header of a run: what does the work, and what is otherwise than it is published.

    Args:
        precision: of training, as `core.engine.uses_bf16` takes it.
        views: whether images are evaluated at several scales or mirrored.
    """
    used = "bf16" if uses_bf16(device, precision) else "fp32"
    lines = [
        f"framework  {versions()}; images and labels are read by this suite",
        f"           its MAE recipe is called amp and trains in fp32, for nothing reads its fp16 key: here {used}",
    ]
    if plan.accumulation > 1:
        lines.append("           its schedules step with every micro-batch: here with every optimizer step")
    if views:
        lines.append("           its multi-scale recipe tests at one scale, not mirrored: here as the keys say")
    return lines
