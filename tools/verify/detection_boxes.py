"""Boxes, anchors, matching, sampling and pooling of regions, against detectron2."""

from collections.abc import Iterator
from pathlib import Path

import torch

from tools.verify.detection_reference import LEVELS, STRIDES, fixed_permutation
from tools.verify.golden import read_golden
from tools.verify.measure import Measure, close, exact, relative
from transfer.detection.anchors import AnchorGenerator
from transfer.detection.boxes import BoxCoder, pairwise_iou
from transfer.detection.matching import Matcher, sample
from transfer.detection.pooling import RoiPooler
from transfer.detection.rpn import MATCHER

ANCHORS = AnchorGenerator((32, 64, 128, 256, 512), (0.5, 1, 2), STRIDES)
MATCHERS = {"rpn": MATCHER, "roi": Matcher((0.5,), (0, 1)), "cascade1": Matcher((0.6,), (0, 1)),
            "cascade2": Matcher((0.7,), (0, 1))}  # fmt: skip
CPU = torch.device("cpu")


def anchors(folder: Path) -> Iterator[Measure]:
    """Anchors of two small grids, of a cell, and of all levels of a square of 1024 px."""
    golden, _ = read_golden(folder, "detection_anchors")
    for case in ("square", "rectangle"):
        grids = [(rows, columns) for rows, columns in (golden[f"{case}.grid.{level}"].tolist() for level in LEVELS)]
        for level, found in zip(LEVELS, ANCHORS(grids, CPU), strict=True):
            yield close(f"{case}, {level}", found, golden[f"{case}.{level}"], 1e-4)
    full = ANCHORS([(1024 // stride, 1024 // stride) for stride in STRIDES], CPU)
    for i, level in enumerate(LEVELS):
        yield close(f"cell of {level}", torch.tensor(ANCHORS.cell_anchors(i)), golden[f"cell.{level}"], 1e-4)
        yield exact(f"number on {level}", len(full[i]), int(golden["full.count"][i]))
        yield close(f"first of {level}", full[i][:4], golden["full.first"][i], 1e-4)
        yield close(f"last of {level}", full[i][-4:], golden["full.last"][i], 1e-4)
        yield relative(f"sums of {level}", full[i].double().sum(dim=0), golden["full.sum"][i], 1e-6)


def box_coder(folder: Path) -> Iterator[Measure]:
    """Boxes to deltas and back, for four sets of weights."""
    golden, _ = read_golden(folder, "detection_box_coder")
    source, target = golden["source"], golden["target"]
    for case in (f"case{i}" for i in range(4)):
        w = golden[f"{case}.weights"].tolist()
        coder = BoxCoder((w[0], w[1], w[2], w[3]))
        encoded = coder.encode(source, target)
        found = {
            "encoded": encoded,
            "roundtrip": coder.decode(encoded, source),
            "decoded": coder.decode(golden[f"{case}.deltas"], source),
        }
        for name, boxes in found.items():
            yield relative(f"{case}, {name}", boxes, golden[f"{case}.{name}"], 1e-5, plus=1.0)


def matching(folder: Path) -> Iterator[Measure]:
    """IoU, matches of anchors and of regions, and numbers of samples."""
    golden, _ = read_golden(folder, "detection_matcher")
    yield close("IoU", pairwise_iou(golden["pairs.a"], golden["pairs.b"]), golden["pairs.iou"], 1e-6)
    for matrix in ("hand", "random", "no_gt", "unreachable_gt"):
        for name, matcher in MATCHERS.items():
            index, labels = matcher(golden[f"{matrix}.iou"])
            yield exact(f"{matrix}, {name}: ground truth", index, golden[f"{matrix}.{name}.index"])
            yield exact(f"{matrix}, {name}: labels", labels.long(), golden[f"{matrix}.{name}.label"])
    for positives, negatives, requested, percent, *expected in golden["sampler.counts"].tolist():
        labels = torch.cat([torch.ones(positives), torch.zeros(negatives), torch.full((5,), -1)]).long()
        chosen = sample(labels, requested, percent / 100, 0, fixed_permutation)
        yield exact(f"samples of {positives} + {negatives}", [len(rows) for rows in chosen], expected)
        right = (labels[chosen[0]] == 1).all() and (labels[chosen[1]] == 0).all()
        yield exact(f"labels of the samples of {positives} + {negatives}", bool(right), True)


def pooling(folder: Path) -> Iterator[Measure]:
    """Levels of regions, and their features."""
    golden, _ = read_golden(folder, "detection_pooler")
    pool = RoiPooler(STRIDES)
    yield exact("levels", pool.assign_levels(golden["levels.boxes"]), golden["levels.level"])
    yield exact("random levels", pool.assign_levels(golden["levels.random_boxes"]), golden["levels.random_level"])
    features = [golden[f"input.{level}"] for level in LEVELS[:4]]
    per_image = [golden["input.image0.boxes"], golden["input.image1.boxes"]]
    boxes = torch.cat(per_image)
    image = torch.tensor([0] * len(per_image[0]) + [1] * len(per_image[1]))
    for size in (7, 14):
        yield close(f"{size} x {size}", pool(features, boxes, image, size), golden[f"pooled{size}"], 1e-4)
        alone = pool(features, per_image[1][:2], torch.ones(2, dtype=torch.int64), size)
        yield close(f"{size} x {size} of one image", alone, golden[f"pooled{size}.second_image_only"], 1e-4)
