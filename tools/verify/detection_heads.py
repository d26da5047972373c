"""Heads, mask targets, choice of detections and pasted masks, against detectron2."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.verify.detection_reference import load_part, no_targets, polygons_of
from tools.verify.golden import Golden, part, read_golden, unpacked
from tools.verify.measure import Measure, close, exact
from transfer.detection.box_head import BoxHead, box_losses
from transfer.detection.cascade import CODERS, relabel
from transfer.detection.inference import Selected, select, to_original
from transfer.detection.mask_head import MaskHead
from transfer.detection.masks import draw_polygons, paste_masks, pool_bitmaps
from transfer.detection.roi_heads import FIRST_CODER
from transfer.detection.rois import LabelledRois
from transfer.detection.targets import PaddedTruth, Targets

NUM_CLASSES = 5
PREDICTORS = {"box_predictor": FIRST_CODER, "box_predictor_agnostic": CODERS[1]}
MASK_SIDE = 28


def box_head_of(weights: Golden, predictor: str) -> BoxHead:
    """The reference's box head with one of its two predictors."""
    theirs = {f"box_head.{key}": value for key, value in part(weights, "box_head.").items()}
    theirs |= {f"box_predictor.{key}": value for key, value in part(weights, f"{predictor}.").items()}
    head = BoxHead(32, 7, 4, 32, NUM_CLASSES, class_agnostic=predictor == "box_predictor_agnostic")
    load_part(head, theirs, "roi_heads.", "roi.box.")
    return head


def mask_head_of(weights: Golden) -> MaskHead:
    """The reference's mask head."""
    head = MaskHead(32, 4, NUM_CLASSES)
    load_part(head, part(weights, "mask_head."), "roi_heads.mask_head.", "roi.mask.")
    return head


def rois_of(boxes: Tensor, labels: Tensor, truth_boxes: Tensor) -> LabelledRois:
    """Regions of one image with their labels and ground-truth boxes."""
    zeros = torch.zeros(len(boxes), dtype=torch.int64)
    return LabelledRois(boxes, zeros, labels, zeros, truth_boxes)


@torch.no_grad()
def roi_heads(folder: Path) -> Iterator[Measure]:
    """Box head with both predictors, their losses, mask head."""
    golden, _ = read_golden(folder, "detection_heads")
    weights, given = part(golden, "weight."), part(golden, "loss.input.")
    for predictor, coder in PREDICTORS.items():
        head = box_head_of(weights, predictor)
        pooled = golden["input.pooled7"]
        yield close(f"{predictor}, hidden", head.hidden(pooled), golden["box_head.output"], 1e-4)
        scores, deltas = head(pooled)
        yield close(f"{predictor}, scores", scores, golden[f"{predictor}.scores"], 1e-4)
        yield close(f"{predictor}, deltas", deltas, golden[f"{predictor}.deltas"], 1e-4)
        for case in ("", "background_only."):
            labels = torch.full_like(given["gt_classes"], NUM_CLASSES) if case else given["gt_classes"]
            rois = rois_of(given["proposals"], labels, given["gt_boxes"])
            losses = box_losses(given["scores"], given[f"{predictor}.deltas"], rois, coder)
            for name, loss in zip(("loss_cls", "loss_box_reg"), losses, strict=True):
                yield close(f"{predictor}, {case}{name}", loss, golden[f"loss.{predictor}.{case}{name}"], 1e-5)
    logits = mask_head_of(weights)(golden["input.pooled14"])
    yield close("mask logits", logits, golden["mask_head.logits"], 1e-4)


def mask_targets(folder: Path) -> Iterator[Measure]:
    """Targets of 28 x 28 from outlines and from bitmaps."""
    golden, _ = read_golden(folder, "detection_mask_targets")
    polygons, instances = polygons_of(golden, "polygon.", 4), golden["instance_of_box"]
    pairs = zip(instances.tolist(), golden["boxes"], strict=True)
    drawn = [draw_polygons(polygons[i], box.numpy(), MASK_SIDE) for i, box in pairs]
    yield exact("of outlines", torch.from_numpy(np.stack(drawn)), golden["target.polygon"].bool())
    different = pool_bitmaps(golden["bitmap"], instances, golden["boxes"], MASK_SIDE) != golden["target.bitmap"].bool()
    decided = different & ~golden["target.bitmap_undecided"].bool()
    yield exact("of bitmaps", decided, torch.zeros_like(decided))
    yield close("of bitmaps, pixels on an edge", float(different.flatten(1).sum(dim=1).max()), 0.0, 4)


def relabelled(folder: Path) -> Iterator[Measure]:
    """Boxes that enter the later stages of a cascade."""
    golden, _ = read_golden(folder, "detection_losses_cascade")
    given = part(golden, "relabel.input.")
    boxes = torch.cat([given["image0.boxes"], given["image1.boxes"]])
    image = torch.tensor([0] * len(given["image0.boxes"]) + [1] * len(given["image1.boxes"]))
    masks = [[np.zeros(6)]] * 2
    truth = PaddedTruth.of([Targets(given["image0.gt_boxes"], given["image0.gt_classes"], masks), no_targets()])
    for stage, threshold in ((1, 0.6), (2, 0.7)):
        rois = relabel(boxes, image, given["image_sizes"], truth, threshold, NUM_CLASSES)
        for i in range(2):
            where, expected = f"stage {stage}, image {i}", part(golden, f"relabel.stage{stage}.image{i}.")
            found = rois[rois.image == i]
            yield close(f"{where}, boxes", found.boxes, expected["boxes"], 1e-2)
            yield exact(f"{where}, classes", found.labels, expected["classes"])
            yield close(f"{where}, ground truth", found.truth_boxes, expected["gt_boxes"], 1e-2)


def selection(folder: Path) -> Iterator[Measure]:
    """Threshold, suppression class by class, limit."""
    golden, _ = read_golden(folder, "detection_inference_mask_rcnn")
    given = part(golden, "select.input.")
    chosen = {"score_threshold": 0.05, "nms_threshold": 0.5}
    for kind, boxes in (("", given["boxes"]), ("agnostic.", given["boxes"][:, :4])):
        expected = part(golden, f"select.{kind}")
        found = select(boxes, given["probabilities"], given["image_size"], **chosen, limit=100)
        yield close(f"{kind}boxes", found.boxes, expected["boxes"], 1e-2)
        yield close(f"{kind}scores", found.scores, expected["scores"], 5e-4)
        yield exact(f"{kind}classes", found.labels, expected["classes"])
        yield exact(f"{kind}regions", found.region, expected["region"])
    everything = select(given["boxes"], given["probabilities"], given["image_size"], **chosen, limit=10**6)
    yield exact("number without a limit", len(everything.boxes), int(golden["select.without_limit"]))


def pasting(folder: Path) -> Iterator[Measure]:
    """Soft masks as bitmaps of an image, and detections brought to the original image."""
    golden, meta = read_golden(folder, "detection_paste")
    height, width = meta["config"]["output"]
    pasted = paste_masks(golden["input.masks"], golden["input.boxes"], (height, width))
    yield exact("masks", pasted, unpacked(golden["expected.masks_packed"], height, width))
    network_size, (height, width) = (tuple(golden[f"post.input.{key}_size"].tolist()) for key in ("network", "output"))
    boxes = golden["post.input.boxes"]
    number = torch.arange(len(boxes))
    found = Selected(boxes, number.float(), number, number)
    detections = to_original(found, golden["input.masks"][: len(boxes)], network_size, (height, width))
    yield exact("kept boxes", detections.labels, golden["post.kept"])
    yield close("boxes in the original image", detections.boxes, golden["post.boxes"], 0.0)
    masks = unpacked(golden["post.masks_packed"], height, width)
    yield exact("masks in the original image", detections.masks, masks)
