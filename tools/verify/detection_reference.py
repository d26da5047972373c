"""The reference's detectors, inputs and ground truth, made from its stored results."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.vit import ViT, ViTConfig
from tools.verify.golden import Golden, part, unpacked
from transfer.detection.mask_rcnn import DetectorConfig, MaskRCNN, build_mask_rcnn
from transfer.detection.pyramid import strides_of
from transfer.detection.targets import Targets
from transfer.detection.weights import from_detectron2, sizes_of

LEVELS = ("p2", "p3", "p4", "p5", "p6")
STRIDES = strides_of(16)
NUM_IMAGES = 2  # of every stored batch


def fixed_permutation(n: int) -> Tensor:
    """The permutation that the reference sampled with."""
    return torch.arange(n) * 1000003 % max(n, 1)


def polygons_of(golden: Golden, prefix: str, num_instances: int) -> list[list[np.ndarray]]:
    """Outlines of each instance, x0 y0 x1 y1 ..."""
    pieces = golden[f"{prefix}points"].split(golden[f"{prefix}counts"].tolist())
    owners = golden[f"{prefix}instance"].tolist()
    return [
        [p.flatten().numpy() for p, owner in zip(pieces, owners, strict=True) if owner == i]
        for i in range(num_instances)
    ]


def targets_of(golden: Golden, bitmaps: bool = False) -> list[Targets]:
    """Ground truth of both images, with outlines or with bitmaps."""
    targets = []
    for i in range(NUM_IMAGES):
        boxes, labels = golden[f"input.image{i}.gt_boxes"], golden[f"input.image{i}.gt_classes"]
        masks: Any = polygons_of(golden, f"input.image{i}.polygon.", len(boxes))
        if bitmaps:
            height, width = golden[f"input.image{i}"].shape[1:]
            masks = list(unpacked(golden[f"input.image{i}.gt_bitmaps_packed"], height, width))
        targets.append(Targets(boxes, labels, masks))
    return targets


def no_targets() -> Targets:
    """An image on which there is nothing."""
    return Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [])


def batch_of(golden: Golden, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Normalised padded images [2, 3, S, S] and their sizes [2, 2]."""
    side = config["image"]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("pixel_mean", "pixel_std"))
    images = torch.zeros(NUM_IMAGES, 3, side, side)
    sizes = []
    for i in range(NUM_IMAGES):
        image = golden[f"input.image{i}"].float()
        images[i, :, : image.shape[1], : image.shape[2]] = (image - mean) / std
        sizes.append(image.shape[1:])
    return images, torch.tensor(sizes)


def sizes_and_state(golden: Golden, config: dict[str, Any]) -> tuple[ViTConfig, DetectorConfig, Golden]:
    """Sizes and numbers of the reference's detector, and its weights under this suite's names."""
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
    return vit_config, DetectorConfig(**{**dict(found), **changed}), state


def loaded(vit: ViTConfig, sizes: DetectorConfig, state: Golden) -> MaskRCNN:
    """A detector with these weights; in evaluation mode."""
    model = build_mask_rcnn(ViT(vit), sizes)
    model.load_state_dict(state)
    return model.eval()


def detector_of(golden: Golden, config: dict[str, Any]) -> MaskRCNN:
    """The reference's detector, through the weight converter; in evaluation mode."""
    return loaded(*sizes_and_state(golden, config))


def load_part(module: nn.Module, weights: Golden, theirs: str, ours: str) -> None:
    """Give a part of a detector the reference's weights.

    Args:
        theirs: what its names have before them in a whole detectron2 model; ours: the same in `MaskRCNN`.
    """
    state, _ = from_detectron2({f"{theirs}{key}": value for key, value in weights.items()})
    module.load_state_dict(part(state, ours))
    module.eval()
