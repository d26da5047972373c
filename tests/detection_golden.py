"""Reference results of the detector, and ground truth made from them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.vit import ViT
from tests.golden_files import Golden, part, read_golden
from transfer.detection.mask_rcnn import DetectorConfig, MaskRCNN, build_mask_rcnn
from transfer.detection.targets import Targets
from transfer.detection.weights import from_detectron2, sizes_of


def load_golden(shared: Path, name: str) -> tuple[Golden, dict[str, Any]]:
    """Tensors of a file (float16 as float32) and its metadata."""
    return read_golden(shared, f"detection_{name}")


def fixed_permutation(n: int) -> Tensor:
    """The permutation that the reference sampled with."""
    return torch.arange(n) * 1000003 % max(n, 1)


def polygons_of(golden: Golden, prefix: str, num_instances: int) -> list[list[np.ndarray]]:
    pieces = golden[f"{prefix}points"].split(golden[f"{prefix}counts"].tolist())
    owners = golden[f"{prefix}instance"].tolist()
    return [
        [p.flatten().numpy() for p, owner in zip(pieces, owners, strict=True) if owner == i]
        for i in range(num_instances)
    ]


def unpacked(packed: Tensor, height: int, width: int) -> Tensor:
    bits = np.unpackbits(packed.numpy(), axis=1)[:, : height * width]
    return torch.from_numpy(bits.reshape(-1, height, width)).bool()


def targets_of(golden: Golden, bitmaps: bool = False) -> list[Targets]:
    targets = []
    for i in range(2):
        boxes, labels = golden[f"input.image{i}.gt_boxes"], golden[f"input.image{i}.gt_classes"]
        masks: Any = polygons_of(golden, f"input.image{i}.polygon.", len(boxes))
        if bitmaps:
            masks = list(unpacked(golden[f"input.image{i}.gt_bitmaps_packed"], *golden[f"input.image{i}"].shape[1:]))
        targets.append(Targets(boxes, labels, masks))
    return targets


def no_targets() -> Targets:
    return Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [])


def batch_of(golden: Golden, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Normalised padded images [2, 3, S, S] and their sizes [2, 2]."""
    side = config["image"]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("pixel_mean", "pixel_std"))
    images = torch.zeros(2, 3, side, side)
    sizes = []
    for i in range(2):
        image = golden[f"input.image{i}"].float()
        images[i, :, : image.shape[1], : image.shape[2]] = (image - mean) / std
        sizes.append(image.shape[1:])
    return images, torch.tensor(sizes)


def detector_of(golden: Golden, config: dict[str, Any]) -> MaskRCNN:
    """The reference's detector, through the weight converter."""
    state, _ = from_detectron2(part(golden, "weight."))
    vit_config, found = sizes_of(state)
    rpn = {
        "batch_size_per_image": config["rpn_batch_size_per_image"],
        **{f"pre_nms_topk_{when}": n for when, n in zip(config["topk_order"], config["pre_nms_topk"], strict=True)},
        **{f"post_nms_topk_{when}": n for when, n in zip(config["topk_order"], config["post_nms_topk"], strict=True)},
    }
    roi = {
        "batch_size_per_image": config["roi_batch_size_per_image"],
        "positive_fraction": config["roi_positive_fraction"],
        "score_threshold": config["score_threshold"],
        "nms_threshold": config["nms"],
        "detections_per_image": config["detections_per_image"],
    }
    changed: dict[str, Any] = {"rpn": found.rpn.model_copy(update=rpn), "roi": found.roi.model_copy(update=roi)}
    model = build_mask_rcnn(ViT(vit_config), DetectorConfig(**{**dict(found), **changed}))
    model.load_state_dict(state)
    return model.eval()
