"""Runs small enough to be run many times: a few drawn images and a ViT of a few thousand parameters."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image


def draw_images(folder: Path, count: int = 48, side_px: int = 20) -> Path:
    """JPEG images of coloured noise in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("even" if i % 2 == 0 else "odd") / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = rng.integers(0, 256, 3)
        pixels = np.clip(colour + rng.normal(0, 40, (side_px, side_px, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=95)
    return folder


def tiny_overrides(data: Path, out: Path, **changes: object) -> list[str]:
    """Overrides of a run of six steps on 48 images, three checkpoints."""
    values: dict[str, object] = {
        "data": data, "out": out, "cache": out.parent / "cache", "model": "tiny", "img_size": 16, "batch_size": 16,
        "epochs": 2, "warmup_epochs": 0.5, "blr": 0.1, "momentum": 0.9, "vit.patch_size": 4, "vit.embed_dim": 16,
        "vit.depth": 1, "vit.num_heads": 2, "decoder.embed_dim": 8, "decoder.depth": 1, "decoder.num_heads": 2,
        "checkpoint.every_steps": 2, "log.every_steps": 1, "log.tensorboard": False, "log.curves": False,
        "loader.num_workers": 0, "picture_images": 1, "device": "cpu",
    }  # fmt: skip
    return _as_overrides(values, changes)


def tiny_backbone(folder: Path) -> Path:
    """A backbone directory with random weights."""
    import torch

    from core.backbone_io import export_backbone
    from core.vit import ViT, ViTConfig

    vit = ViT(ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2))
    vit.init_weights(torch.Generator().manual_seed(0))
    export_backbone(folder, vit, {"step": 0})
    return folder


def tiny_classification(
    data: Path, out: Path, backbone: Path, protocol: str = "finetune", **changes: object
) -> list[str]:
    """Overrides of a classification of four steps on 48 images, 38 of which are trained on."""
    values: dict[str, object] = {
        "data": data, "out": out, "cache": out.parent / "cache", "backbone": backbone, "protocol": protocol,
        "batch_size": 16, "checkpoint.every_steps": 1, "log.every_steps": 1, "log.tensorboard": False,
        "log.curves": False, "loader.num_workers": 0, "device": "cpu",
    }  # fmt: skip
    if protocol != "knn":
        values |= {f"{protocol}.epochs": 2, f"{protocol}.warmup_epochs": 0.5, f"{protocol}.blr": 0.05}
    return _as_overrides(values, changes)


def draw_coco(root: Path) -> Path:
    """Sixteen drawn scenes to learn from, one of them empty, and five to evaluate on, in COCO's layout."""
    from tools.world import draw_world

    draw_world(root, num_train=64, num_val=20, object_size_px=16, scene_size_px=32)
    return root / "coco"


def tiny_detection(data: Path, out: Path, backbone: Path, **changes: object) -> list[str]:
    """Overrides of a detection run of six steps on the fifteen images of `draw_coco` that hold anything."""
    values: dict[str, object] = {
        "data": data, "out": out, "cache": out.parent / "cache", "backbone": backbone, "img_size": 32, "batch_size": 4,
        "steps": 6, "warmup_steps": 2, "window_size": 3, "global_blocks": [1], "optim.lr": 1e-3,
        "detector.channels": 8, "detector.rpn.num_convs": 1, "detector.rpn.batch_size_per_image": 32,
        "detector.rpn.post_nms_topk_train": 40, "detector.rpn.post_nms_topk_test": 20, "detector.roi.num_box_convs": 1,
        "detector.roi.box_fc_dim": 16, "detector.roi.num_mask_convs": 1, "detector.roi.batch_size_per_image": 16,
        "detector.roi.detections_per_image": 6, "checkpoint.every_steps": 2, "log.every_steps": 1,
        "log.tensorboard": False, "log.curves": False, "loader.num_workers": 0, "device": "cpu",
    }  # fmt: skip
    return _as_overrides(values, changes)


def draw_ade(root: Path) -> Path:
    """A tree like ADE20K's: 14 images to learn from, 5 to evaluate on, labels 0 (other) to 150; its folder's parent.

    Each image is of two classes, in colours of their own, and of pixels without one. Some are smaller than a crop of
    16 px, of odd sizes, or more than four times as long as high.
    """
    rng = np.random.default_rng(3)
    sizes = [(40, 44), (33, 57), (12, 14), (71, 35), (30, 130), (48, 40), (37, 41)]  # (height, width)
    colours = rng.integers(0, 256, (151, 3))
    for split, count in (("training", 14), ("validation", 5)):
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            label = np.full((height, width), 1 + 7 * i, np.uint8)
            label[height // 3 :, : width // 2] = 150 - 5 * i
            label[:4, :6] = 0
            pixels = np.clip(colours[label] + rng.normal(0, 10, (height, width, 3)), 0, 255).astype(np.uint8)
            for kind, array, ending in (("images", pixels, "jpg"), ("annotations", label, "png")):
                folder = root / "ADEChallengeData2016" / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"ADE_{split[:3]}_{i:08d}.{ending}")
    return root


def tiny_segmentation(data: Path, out: Path, backbone: Path, head: str = "upernet", **changes: object) -> list[str]:
    """Overrides of a segmentation run of six steps on `draw_ade`, of crops of 16 px."""
    values: dict[str, object] = {
        "data": data, "out": out, "cache": out.parent / "cache", "backbone": backbone, "head": head, "img_size": 16,
        "classes": "ade20k", "label_shift": 1, "batch_size": 4, "steps": 6, "warmup_steps": 2, "optim.lr": 1e-3,
        "augment.scale": [80, 20], "checkpoint.every_steps": 2, "log.every_steps": 1, "log.tensorboard": False,
        "log.curves": False, "loader.num_workers": 0, "device": "cpu",
    }  # fmt: skip
    if head == "upernet":
        values |= {"segmentor.channels": 8, "segmentor.aux_channels": 4, "segmentor.blocks": [0, 0, 1, 1]}
    return _as_overrides(values, changes)


def _as_overrides(values: dict[str, object], changes: dict[str, object]) -> list[str]:
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def interrupted(command: list[str], log: Path) -> tuple[int, str]:
    """Begin a command, press Ctrl-C when `log` tells of a saved step; its exit code, and what it said on stderr."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (log.exists() and "saved step" in log.read_text()):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    return process.returncode, said
