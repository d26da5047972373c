"""COCO's average precision: a toy set against detectron2's evaluator, made-up detections against pycocotools."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.bench_coco_eval import made_up_rows, made_up_tree
from tools.verify.golden import read_json
from tools.verify.measure import Measure, close, exact
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import ENGINES, Row, detection_rows, evaluate, result_entries
from transfer.detection.coco_file import CocoPaths, read_coco
from transfer.detection.inference import Detections
from transfer.detection.rle import Rle, decode

STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
         "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")  # fmt: skip
KINDS = {"box": "bbox", "mask": "segm"}
NUM_IMAGES, PER_IMAGE = 12, 20  # made up


@dataclass(frozen=True)
class Drawn(Detections):
    """Detections whose masks are what they are, not what a small one says."""

    bitmaps: Tensor

    def paste(self, rows: slice) -> Tensor:
        """The masks of some rows."""
        return self.bitmaps[rows]


def detections_of(masks: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    """Detections with masks [N, H, W] of the image's size."""
    return Drawn(boxes, scores, labels, torch.zeros(len(boxes), 1, 1), (masks.shape[1], masks.shape[2]), masks)


def golden_rows(golden: dict[str, Any], coco: CocoSet) -> list[Row]:
    """The detections of the toy set."""
    rows: list[Row] = []
    for each in golden["detections"]:
        index = coco.image_ids.index(each["image_id"])
        masks = [decode(Rle(m["size"][0], m["size"][1], m["counts"].encode())) for m in each["masks"]]
        boxes, scores, labels = (torch.tensor(each[key]) for key in ("boxes", "scores", "classes"))
        rows += detection_rows(index, detections_of(torch.from_numpy(np.stack(masks)), boxes, scores, labels))
    return rows


def stats_of(figures: dict[str, float | None], kind: str) -> list[float]:
    """Figures in the order of COCO's stats, where -1 stands for not defined."""
    values = [figures[f"{kind}_{name}"] for name in STATS]
    return [-1.0 if value is None else value for value in values]


def plain_stats(truth: Path, entries: list[dict[str, Any]], iou_type: str) -> list[float]:
    """What a script with nothing but pycocotools says."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(truth))
        rows = [{key: value for key, value in e.items() if iou_type == "bbox" or key != "bbox"} for e in entries]
        evaluation = COCOeval(gt, gt.loadRes(rows), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def toy_results(folder: Path) -> Iterator[Measure]:
    """Result entries and figures of a toy set with crowds, as detectron2's evaluator gives them."""
    golden = read_json(folder, "detection_coco_map")["evaluation"]
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "toy.json"
        path.write_text(json.dumps(golden["ground_truth"]))
        coco = read_coco(CocoPaths(path, Path(work)))
        rows = golden_rows(golden, coco)
        yield exact("result entries", result_entries(rows, coco), golden["results"])
        for engine in ENGINES:
            figures = evaluate(coco, rows, engine)
            for kind, name in KINDS.items():
                found, expected = stats_of(figures, kind), golden["stats"][name]
                yield close(f"{name} by {engine}", _float64(found), _float64(expected), 1e-6)


def against_pycocotools() -> Iterator[Measure]:
    """Figures of made-up detections on made-up images, by both engines, beside plain pycocotools."""
    rng = np.random.default_rng(0)
    tree, boxes = made_up_tree(NUM_IMAGES, rng)
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "made_up.json"
        path.write_text(json.dumps(tree))
        coco = read_coco(CocoPaths(path, Path(work)))
        rows = made_up_rows(coco, boxes, PER_IMAGE, rng)
        entries = result_entries(rows, coco)
        expected = {name: _float64(plain_stats(path, entries, name)) for name in KINDS.values()}
    for engine in ENGINES:
        figures = evaluate(coco, rows, engine)
        for kind, name in KINDS.items():
            yield close(f"{name} by {engine}", _float64(stats_of(figures, kind)), expected[name], 1e-12)


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
