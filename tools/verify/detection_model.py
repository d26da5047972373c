"""Whole detectors, Mask R-CNN and Cascade: losses, gradients, regions and detections, against detectron2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tools.verify.detection_reference import batch_of, detector_of, fixed_permutation, no_targets, targets_of
from tools.verify.golden import Golden, part, read_golden, unpacked
from tools.verify.measure import Measure, close, exact, gradient, relative, same_names
from transfer.detection.boxes import pairwise_iou
from transfer.detection.masks import mask_targets
from transfer.detection.roi_heads import FIRST_THRESHOLD
from transfer.detection.rois import LabelledRois, SampledRois, sample_rois
from transfer.detection.rpn import MATCHER, Proposals
from transfer.detection.targets import PaddedTruth, Targets
from transfer.detection.weights import to_detectron2

Kind = Literal["mask_rcnn", "cascade"]


class Reference:
    """The reference's detector on its images, with all that it found on the way."""

    def __init__(self, folder: Path, name: str) -> None:
        self.golden, self.meta = read_golden(folder, f"detection_{name}")
        self.config = self.meta["config"]
        self.model = detector_of(self.golden, self.config)
        self.images, self.sizes = batch_of(self.golden, self.config)

    def losses(self, targets: list[Targets]) -> dict[str, Tensor]:
        """Losses of both images, sampled by the reference's permutation."""
        return self.model.losses(self.images, self.sizes, targets, fixed_permutation)

    @torch.no_grad()
    def proposals(self) -> list[Proposals]:
        """Proposals of both images in training."""
        output = self.model.rpn(self.model.backbone(self.images))
        return self.model.rpn.proposals(output, self.sizes, training=True)

    def sampled(self, targets: list[Targets]) -> tuple[list[Tensor], SampledRois]:
        """Candidates of each image (proposals, then ground truth), and the regions drawn from them."""
        proposals = [found.boxes for found in self.proposals()]
        rois = sample_rois(
            proposals,
            PaddedTruth.of(targets),
            threshold=FIRST_THRESHOLD,
            num_classes=self.config["classes"],
            batch_size_per_image=self.config["roi_batch_size_per_image"],
            positive_fraction=self.config["roi_positive_fraction"],
            permutation=fixed_permutation,
        )
        return [torch.cat([boxes, target.boxes]) for boxes, target in zip(proposals, targets, strict=True)], rois


def of_image(rois: LabelledRois, i: int) -> LabelledRois:
    """The regions of one image of the batch."""
    return rois[rois.image == i]


def losses(folder: Path, kind: Kind) -> Iterator[Measure]:
    """Losses, gradients, sampled anchors and regions, mask targets; images without ground truth, bitmaps."""
    reference = Reference(folder, f"losses_{kind}")
    golden, targets = reference.golden, targets_of(reference.golden)
    yield from _losses_and_gradients(reference, targets)
    with torch.no_grad():
        loss = reference.losses(targets_of(golden, bitmaps=True))["loss_mask"]
        yield close("loss_mask of bitmaps", loss, golden["expected.bitmap.loss_mask"], 1e-3)
        for case, first in (("second_image_without_gt", targets[0]), ("no_gt", no_targets())):
            given = [first, no_targets()]
            yield from _loss_values(reference.losses(given), golden, f"{case}.")
            candidates, rois = reference.sampled(given)
            for i in range(2):
                boxes = candidates[i][_chosen(golden, f"{case}.image{i}.")]
                yield exact(f"{case}, regions of image {i}", of_image(rois.all, i).boxes, boxes)
    yield from _samples(reference, targets)


def _loss_values(found: dict[str, Tensor], golden: Golden, prefix: str) -> Iterator[Measure]:
    expected = {k: v for k, v in part(golden, prefix).items() if k.startswith("loss_")}
    yield same_names(f"{prefix}names of losses", found, expected)
    for name, loss in found.items():
        yield close(f"{prefix}{name}", loss, expected[name], 1e-4)


def _losses_and_gradients(reference: Reference, targets: list[Targets]) -> Iterator[Measure]:
    golden, model = reference.golden, reference.model
    found = reference.losses(targets)
    yield from _loss_values(found, golden, "expected.")
    torch.stack(list(found.values())).sum().backward()
    gradients = {name: torch.zeros(0) if p.grad is None else p.grad for name, p in model.named_parameters()}
    theirs, _ = to_detectron2(gradients)
    for name, norm in zip(reference.meta["gradient_names"], golden["expected.grad_norm"].tolist(), strict=True):
        yield relative(f"gradient norm of {name}", theirs[name].double().norm(), norm, 1e-2, plus=1e-6)
    for name, expected in part(golden, "expected.grad.").items():
        yield gradient(f"gradient of {name}", theirs[name], expected)


def _chosen(golden: Golden, prefix: str) -> Tensor:
    return torch.cat([golden[f"{prefix}roi_sampled_foreground"], golden[f"{prefix}roi_sampled_background"]])


def _samples(reference: Reference, targets: list[Targets]) -> Iterator[Measure]:
    golden, rpn = reference.golden, reference.model.rpn
    candidates, rois = reference.sampled(targets)
    with torch.no_grad():
        anchors = rpn(reference.model.backbone(reference.images)).anchors
    for i, proposals in enumerate(reference.proposals()):
        expected, found = part(golden, f"expected.image{i}."), of_image(rois.all, i)
        yield close(f"logits of proposals of image {i}", proposals.logits, expected["logits"], 1e-4)
        yield close(f"proposals of image {i}", proposals.boxes, expected["proposals"], 1e-2)
        yield exact(f"regions of image {i}", found.boxes, candidates[i][_chosen(golden, f"expected.image{i}.")])
        yield exact(f"classes of regions of image {i}", found.labels, expected["roi_classes"])
        yield close(f"boxes of regions of image {i}", found.boxes, expected["roi_boxes"], 1e-2)
        num_objects = len(expected["roi_sampled_foreground"])
        yield exact(f"number of objects of image {i}", rois.num_objects[i], num_objects)
        positive, negative = rpn.sample(MATCHER(pairwise_iou(targets[i].boxes, anchors))[1], fixed_permutation)
        yield exact(f"positive anchors of image {i}", positive, expected["rpn_sampled_positive"])
        yield exact(f"negative anchors of image {i}", negative, expected["rpn_sampled_negative"])
    objects = rois.objects
    drawn = mask_targets(targets, rois.num_objects, objects.instances, objects.boxes, 28, torch.device("cpu"))
    yield exact("mask targets", drawn, golden["expected.mask_targets"].bool())


@torch.no_grad()
def inference(folder: Path, kind: Kind) -> Iterator[Measure]:
    """Maps of the pyramid, proposals, and detections with masks, in the network's image and in the original one."""
    reference = Reference(folder, f"inference_{kind}")
    model, golden = reference.model, reference.golden
    features = model.backbone(reference.images)
    stored = ("p2_every_eighth", 8), ("p3_every_fourth", 4), ("p4_every_second", 2), ("p5", 1), ("p6", 1)
    for level, (name, step) in zip(features, stored, strict=True):
        yield close(name[:2], level[:, :, ::step, ::step].contiguous(), golden[f"expected.{name}"], 1e-3)
    proposals = model.rpn.proposals(model.rpn(features), reference.sizes, training=False)
    in_network = model.roi.detect(features, proposals, reference.sizes)
    original_sizes = [(height, width) for height, width in reference.config["output_sizes"]]
    for i, found in enumerate(model.detect(reference.images, reference.sizes, original_sizes)):
        expected = part(golden, f"expected.image{i}.")
        selected, masks = in_network[i]
        yield close(f"proposals of image {i}", proposals[i].boxes, expected["proposals"], 1e-2)
        yield close(f"boxes in the network, image {i}", selected.boxes, expected["network_boxes"], 1e-2)
        yield close(f"soft masks, image {i}", masks, expected["mask_prob"], 2e-3)
        yield close(f"boxes, image {i}", found.boxes, expected["boxes"], 1e-2)
        yield close(f"scores, image {i}", found.scores, expected["scores"], 5e-4)
        yield exact(f"classes, image {i}", found.labels, expected["classes"])
        pasted = unpacked(expected["masks_packed"], *original_sizes[i])
        same_size = found.masks.shape == pasted.shape
        share = (found.masks != pasted).float().mean().item() if same_size else torch.inf
        yield Measure(f"share of mask pixels, image {i}", share, 1e-3)
