"""Detectors beside detectron2 itself, with the weights and inputs of the golden files.

Imported only where detectron2 can be. Where training draws samples, both sides are told to take all.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor

from tools.verify import detection_boxes
from tools.verify.detection_heads import MASK_SIDE, rois_of
from tools.verify.detection_model import Kind
from tools.verify.detection_reference import (
    LEVELS,
    STRIDES,
    batch_of,
    fixed_permutation,
    loaded,
    polygons_of,
    sizes_and_state,
    targets_of,
)
from tools.verify.golden import part, read_golden
from tools.verify.measure import Measure, close, exact, gradient, relative, same_names
from transfer.detection import boxes as our_boxes
from transfer.detection.box_head import box_losses
from transfer.detection.boxes import BoxCoder
from transfer.detection.cascade import NUM_STAGES
from transfer.detection.detectron2_engine.model import build_detectron2
from transfer.detection.masks import draw_polygons, pool_bitmaps
from transfer.detection.matching import sample
from transfer.detection.pooling import RoiPooler
from transfer.detection.roi_heads import FIRST_CODER
from transfer.detection.targets import Targets
from transfer.detection.weights import to_detectron2

EVERYTHING = 10**6  # samples per image: more than there are


class Twins:
    """The same detector here and in detectron2, and the golden file's images."""

    def __init__(self, folder: Path, name: str) -> None:
        self.golden, meta = read_golden(folder, f"detection_{name}")
        self.config = meta["config"]
        vit, sizes, state = sizes_and_state(self.golden, self.config)
        everything = {"batch_size_per_image": EVERYTHING}
        rpn, roi = sizes.rpn.model_copy(update=everything), sizes.roi.model_copy(update=everything)
        sizes = sizes.model_copy(update={"rpn": rpn, "roi": roi})
        self.ours = loaded(vit, sizes, state)
        self.theirs = build_detectron2(vit, sizes, self.config["image"], 0.0, state).eval()
        self.images, self.sizes = batch_of(self.golden, self.config)

    def features(self) -> dict[str, Tensor]:
        """The pyramid of the images as detectron2 has it."""
        return self.theirs.backbone(self.images)

    def image_list(self) -> ImageList:
        """The images as detectron2 has them."""
        return ImageList(self.images, [(height, width) for height, width in self.sizes.tolist()])

    def instances(self, targets: list[Targets]) -> list[Instances]:
        """Ground truth as detectron2 has it."""
        found = []
        for size, target in zip(self.sizes.tolist(), targets, strict=True):
            instances = Instances((size[0], size[1]))
            instances.gt_boxes, instances.gt_classes = Boxes(target.boxes), target.labels
            instances.gt_masks = PolygonMasks(target.masks)
            found.append(instances)
        return found


@torch.no_grad()
def windowed_vit(folder: Path) -> Iterator[Measure]:
    """Every block of a ViT with and without windows, on a square and on a rectangle."""
    twins = Twins(folder, "losses_mask_rcnn")
    vit, net = twins.ours.backbone.vit, twins.theirs.backbone.net
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in net.blocks]
    for height in (twins.config["image"], twins.config["image"] // 2):
        outputs.clear()
        images = twins.images[:, :, :height]
        last = net(images)["last_feat"]
        found = vit.feature_maps(images, list(range(len(vit.blocks))))
        for i, (ours, theirs) in enumerate(zip(found, outputs, strict=True)):
            yield close(f"block {i}, {height} rows", ours, theirs.permute(0, 3, 1, 2), 1e-4)
        yield close(f"last map, {height} rows", found[-1], last, 1e-4)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def pyramid(folder: Path) -> Iterator[Measure]:
    """Five maps from the ViT's last one."""
    twins = Twins(folder, "losses_mask_rcnn")
    maps = twins.ours.backbone.pyramid(twins.theirs.backbone.net(twins.images)["last_feat"])
    for level, found in zip(LEVELS, maps, strict=True):
        yield close(level, found, twins.features()[level], 1e-4)


@torch.no_grad()
def anchors(folder: Path) -> Iterator[Measure]:
    """Anchors of all levels."""
    twins = Twins(folder, "losses_mask_rcnn")
    features = list(twins.features().values())
    expected = twins.theirs.proposal_generator.anchor_generator(features)
    yield close("anchors", twins.ours.rpn(features).anchors, torch.cat([each.tensor for each in expected]), 1e-4)


def box_coder(folder: Path) -> Iterator[Measure]:
    """Boxes to deltas and back, for four sets of weights."""
    golden, _ = read_golden(folder, "detection_box_coder")
    source, target = golden["source"], golden["target"]
    for case in (f"case{i}" for i in range(4)):
        w = golden[f"{case}.weights"].tolist()
        ours, theirs = BoxCoder((w[0], w[1], w[2], w[3])), Box2BoxTransform((w[0], w[1], w[2], w[3]))
        deltas = golden[f"{case}.deltas"]
        yield relative(f"{case}, encoded", ours.encode(source, target), theirs.get_deltas(source, target), 1e-5, 1.0)
        yield relative(f"{case}, decoded", ours.decode(deltas, source), theirs.apply_deltas(deltas, source), 1e-5, 1.0)


def matching(folder: Path) -> Iterator[Measure]:
    """IoU, matches, and numbers of samples."""
    golden, _ = read_golden(folder, "detection_matcher")
    a, b = golden["pairs.a"], golden["pairs.b"]
    yield close("IoU", our_boxes.pairwise_iou(a, b), pairwise_iou(Boxes(a), Boxes(b)), 1e-6)
    iou = {case: golden[f"{case}.iou"] for case in ("hand", "random", "no_gt", "unreachable_gt")}
    iou["many"] = torch.rand(20, 500, generator=torch.Generator().manual_seed(0))
    for name, ours in detection_boxes.MATCHERS.items():
        theirs = Matcher(list(ours.thresholds), list(ours.labels), ours.allow_low_quality_matches)
        for case, matrix in iou.items():
            index, labels = ours(matrix)
            expected_index, expected_labels = theirs(matrix)
            yield exact(f"{case}, {name}: ground truth", index, expected_index)
            yield exact(f"{case}, {name}: labels", labels.long(), expected_labels.long())
    for positives, negatives, requested, percent, *_ in golden["sampler.counts"].tolist():
        labels = torch.cat([torch.ones(positives), torch.zeros(negatives), torch.full((5,), -1)]).long()
        with torch.random.fork_rng(devices=[]):
            expected = subsample_labels(labels, requested, percent / 100, 0)
        found = sample(labels, requested, percent / 100, 0, fixed_permutation)
        numbers = [len(rows) for rows in expected]
        yield exact(f"samples of {positives} + {negatives}", [len(rows) for rows in found], numbers)


@torch.no_grad()
def rpn(folder: Path) -> Iterator[Measure]:
    """Logits and deltas, losses of all labelled anchors, proposals of training and of a test."""
    twins = Twins(folder, "losses_mask_rcnn")
    ours, theirs = twins.ours.rpn, twins.theirs.proposal_generator
    features, targets = twins.features(), targets_of(twins.golden)
    expected = theirs.rpn_head(list(features.values()))
    for i, (level, feature) in enumerate(features.items()):
        for name, found, wanted in zip(("logits", "deltas"), ours.head(feature), expected, strict=True):
            yield close(f"{name} of {level}", found, wanted[i], 1e-4)
    output = ours(list(features.values()))
    for training in (True, False):
        instances = twins.instances(targets) if training else None
        with EventStorage(), torch.random.fork_rng(devices=[]):
            proposals, losses = theirs.train(training)(twins.image_list(), features, instances)
        for name, loss in ours.losses(output, targets, fixed_permutation).items() if training else ():
            yield close(name, loss, losses[name], 1e-5)
        for i, found in enumerate(ours.proposals(output, twins.sizes, training)):
            where = f"{'training' if training else 'test'}, image {i}"
            yield close(f"logits, {where}", found.logits, proposals[i].objectness_logits, 1e-4)
            yield close(f"proposals, {where}", found.boxes, proposals[i].proposal_boxes.tensor, 1e-2)


def pooling(folder: Path) -> Iterator[Measure]:
    """Features of regions that leave the picture, are thin or have no area."""
    golden, _ = read_golden(folder, "detection_pooler")
    heads = Twins(folder, "losses_mask_rcnn").theirs.roi_heads
    features = [golden[f"input.{level}"] for level in LEVELS[:4]]
    per_image = [golden["input.image0.boxes"], golden["input.image1.boxes"]]
    image = torch.tensor([0] * len(per_image[0]) + [1] * len(per_image[1]))
    for size, pooler in ((7, heads.box_pooler), (14, heads.mask_pooler)):
        found = RoiPooler(STRIDES)(features, torch.cat(per_image), image, size)
        yield close(f"{size} x {size}", found, pooler(features, [Boxes(boxes) for boxes in per_image]), 1e-4)


@torch.no_grad()
def roi_heads(folder: Path) -> Iterator[Measure]:
    """Box heads of both kinds of detector, their losses, mask head."""
    golden, _ = read_golden(folder, "detection_heads")
    pooled, given = golden["input.pooled7"], part(golden, "loss.input.")
    plain, cascade = Twins(folder, "losses_mask_rcnn"), Twins(folder, "losses_cascade")
    theirs, stages = plain.theirs.roi_heads, cascade.theirs.roi_heads
    ours = plain.ours.roi
    boxes = {"box head": (ours.get_submodule("box"), theirs.box_head, theirs.box_predictor)}
    for i in range(NUM_STAGES):
        stage = cascade.ours.roi.get_submodule(f"stages.{i}")
        boxes[f"stage {i}"] = (stage, stages.box_head[i], stages.box_predictor[i])
    for where, (head, box_head, predictor) in boxes.items():
        for name, found, expected in zip(("scores", "deltas"), head(pooled), predictor(box_head(pooled)), strict=True):
            yield close(f"{where}, {name}", found, expected, 1e-4)
    logits = ours.get_submodule("mask")(golden["input.pooled14"])
    yield close("mask logits", logits, theirs.mask_head.layers(golden["input.pooled14"]), 1e-4)
    instances = Instances((1000, 1000))
    instances.proposal_boxes, instances.gt_boxes = Boxes(given["proposals"]), Boxes(given["gt_boxes"])
    instances.gt_classes = given["gt_classes"]
    scores, deltas = given["scores"], given["box_predictor.deltas"]
    with EventStorage():
        losses = theirs.box_predictor.losses((scores, deltas), [instances])
    rois = rois_of(given["proposals"], given["gt_classes"], given["gt_boxes"])
    for name, loss in zip(("loss_cls", "loss_box_reg"), box_losses(scores, deltas, rois, FIRST_CODER), strict=True):
        yield close(name, loss, losses[name], 1e-5)


def mask_targets(folder: Path) -> Iterator[Measure]:
    """Targets of 28 x 28 from outlines and from bitmaps."""
    golden, _ = read_golden(folder, "detection_mask_targets")
    boxes, instances = golden["boxes"], golden["instance_of_box"]
    polygons = [polygons_of(golden, "polygon.", 4)[i] for i in instances.tolist()]
    drawn = torch.stack(
        [torch.from_numpy(draw_polygons(p, b.numpy(), MASK_SIDE)) for p, b in zip(polygons, boxes, strict=True)]
    )
    yield exact("of outlines", drawn, PolygonMasks(polygons).crop_and_resize(boxes, MASK_SIDE))
    expected = BitMasks(golden["bitmap"].bool()[instances]).crop_and_resize(boxes, MASK_SIDE)
    different = pool_bitmaps(golden["bitmap"], instances, boxes, MASK_SIDE) != expected
    yield close("of bitmaps, pixels on an edge", float(different.flatten(1).sum(dim=1).max()), 0.0, 4)


def losses(folder: Path, kind: Kind) -> Iterator[Measure]:
    """Losses of all anchors and of all regions, and the gradient of every weight."""
    twins = Twins(folder, f"losses_{kind}")
    targets = targets_of(twins.golden)
    found = twins.ours.losses(twins.images, twins.sizes, targets, fixed_permutation)
    batch = [
        {"image": twins.golden[f"input.image{i}"], "instances": instances}
        for i, instances in enumerate(twins.instances(targets))
    ]
    with EventStorage(), torch.random.fork_rng(devices=[]):
        expected = twins.theirs.train()(batch)
    yield same_names("names of losses", found, expected)
    for name, loss in found.items():
        yield close(name, loss, expected[name], 1e-4)
    for of_one in (found, expected):
        torch.stack(list(of_one.values())).sum().backward()
    gradients = {name: p.grad for name, p in twins.ours.named_parameters() if p.grad is not None}
    ours, _ = to_detectron2(gradients)
    for name, parameter in twins.theirs.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        yield gradient(f"gradient of {name}", ours.get(name), wanted)


@torch.no_grad()
def inference(folder: Path, kind: Kind) -> Iterator[Measure]:
    """Boxes, scores, classes and masks in the original image."""
    twins = Twins(folder, f"inference_{kind}")
    sizes = [(height, width) for height, width in twins.config["output_sizes"]]
    batch = [
        {"image": twins.golden[f"input.image{i}"], "height": height, "width": width}
        for i, (height, width) in enumerate(sizes)
    ]
    for i, (found, expected) in enumerate(
        zip(twins.ours.detect(twins.images, twins.sizes, sizes), twins.theirs(batch), strict=True)
    ):
        instances = expected["instances"]
        yield close(f"boxes, image {i}", found.boxes, instances.pred_boxes.tensor, 1e-2)
        yield close(f"scores, image {i}", found.scores, instances.scores, 5e-4)
        yield exact(f"classes, image {i}", found.labels, instances.pred_classes)
        same_size = found.masks.shape == instances.pred_masks.shape
        share = (found.masks != instances.pred_masks).float().mean().item() if same_size else torch.inf
        yield Measure(f"share of mask pixels, image {i}", share, 1e-3)
