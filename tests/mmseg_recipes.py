"""Recipes small enough for both engines, and what is compared of them."""

import json
from pathlib import Path

import numpy as np
import torch

from core.backbone_io import export_backbone
from core.config import load_config
from core.distributed import Processes
from core.vit import ViT, ViTConfig
from tests.tiny import tiny_segmentation
from tools.cli import app, guarded
from transfer.segmentation.data import SegmentationBatch
from transfer.segmentation.directory import export_segmentor
from transfer.segmentation.run import build_task, open_inputs
from transfer.segmentation.settings import SegmentConfig, Setting, label_keys, settle
from transfer.segmentation.tasks import SegmentationTask

PUBLISHED = {"rel_pos_bias": True, "layer_scale": True, "augment__scale": [60, 20]}  # one is, and is padded
PLAIN = {"rel_pos_bias": False, "layer_scale": False, "augment__scale": [120, 20]}  # no image is smaller than a window


def four_blocks(folder: Path) -> Path:
    """A backbone of four blocks, which both engines can take one each of."""
    vit = ViT(ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=16, depth=4, num_heads=2))
    vit.init_weights(torch.Generator().manual_seed(0))
    export_backbone(folder, vit, {"step": 0})
    return folder


def overrides(data: Path, out: Path, backbone: Path, **changes: object) -> list[str]:
    return tiny_segmentation(data, out, backbone, **{"segmentor__blocks": [0, 1, 2, 3], **changes})


def config_of(data: Path, out: Path, backbone: Path, **changes: object) -> SegmentConfig:
    return load_config(SegmentConfig, None, overrides(data, out, backbone, **changes))


def on_mmseg(data: Path, out: Path, backbone: Path, **changes: object) -> SegmentConfig:
    return config_of(data, out, backbone, framework="mmseg", **changes)


def both(config: SegmentConfig) -> tuple[Setting, SegmentationTask, torch.nn.Module]:
    """The native task of a recipe, with weights that are something, and the framework's network with the same."""
    from transfer.segmentation.mmseg_engine.model import mmseg_segmentor

    setting = settle(config, open_inputs(config), None, Processes())
    task = build_task(setting, Processes())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in task.model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2, generator=generator)
            elif "conv_seg.weight" in name or "table" in name or "running_mean" in name:
                tensor.normal_(std=0.3, generator=generator)
    return setting, task, mmseg_segmentor(task.model, setting.inference)


def fixed_batch(setting: Setting) -> SegmentationBatch:
    """Four crops with ignored pixels, two of them smaller than the crop."""
    side, rng = setting.config.img_size, np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 150, (4, side, side)))
    labels[:, :3] = 255
    sizes = torch.tensor([[side, side], [side, side], [side - 4, side], [side - 1, side - 3]])
    images = torch.from_numpy(rng.integers(0, 256, (4, 3, side, side), dtype=np.uint8))
    for image, label, (height, width) in zip(images, labels, sizes.tolist(), strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
        label[height:], label[:, width:] = 255, 255
    return SegmentationBatch(images, labels, sizes, torch.ones(4, dtype=torch.bool), (0, 1, 2, 3))


def packed(batch: SegmentationBatch) -> dict[str, list]:
    """The same for the framework, before its own normalisation and padding."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    inputs, samples = [], []
    for image, label, (height, width) in zip(batch.images, batch.labels, batch.sizes.tolist(), strict=True):
        inputs.append(image[[2, 1, 0], :height, :width])  # BGR
        content = label[None, :height, :width].long()
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=content)))
    return {"inputs": inputs, "data_samples": samples}


def exported(config: SegmentConfig, folder: Path) -> Path:
    """A segmentor directory with weights that predict many classes."""
    setting, task, _ = both(config)
    scale, keys = config.augment.scale, label_keys(config)
    export_segmentor(folder, task.model, setting.inputs.classes, keys, scale, setting.inference, {})
    return folder


def evaluated(data: Path, out: Path, segmentor: Path, *more: str) -> tuple[dict, np.ndarray]:
    """Summary and confusion matrix of `rcmae segment --eval`."""
    given = [f"data={data}", f"out={out}", f"backbone={segmentor}", "device=cpu", "loader.num_workers=0", *more]
    assert guarded(lambda: app(args=["segment", *given, "--eval"], standalone_mode=False)) == 0
    matrix = json.loads((out / "confusion.json").read_text())["rows_are_labels"]
    return json.loads((out / "summary.json").read_text()), np.array(matrix)
