"""Average precision by detectron2: its inference, its post-processing, its COCOEvaluator."""

import contextlib
import io
import json
import logging
import math
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from torch import nn

from core.engine import autocast
from core.loader import worker_faults
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import IOU_TYPES, Figures, evaluate, ground_truth, read_results
from transfer.detection.detectron2_engine.data import eval_loader
from transfer.detection.tasks import Evaluated

NAMES = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}
THEIR_LOGS = ("detectron2", "fvcore", "torch.fx._symbolic_trace")
THEIR_WARNINGS = ("torch.meshgrid", "The given NumPy array is not writable")
RESULTS = "coco_instances_results.json"  # what its evaluator writes into the folder that it is given


def evaluate_model(
    model: nn.Module, coco: CocoSet, side: int, device: torch.device, precision: str, num_workers: int, folder: Path
) -> Evaluated:
    """Detections of a detectron2 model in all images of a set, and their figures.

    Average precisions are those of its evaluator, which tells no recall: recalls are this suite's, of the same rows.

    Args:
        folder: where a temporary folder may be made.
    """
    by_index = replace(coco, image_ids=tuple(range(len(coco))), category_ids=tuple(range(len(coco.names))))
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary, worker_faults():
        evaluator = _evaluator(coco, Path(temporary))
        with contextlib.redirect_stdout(io.StringIO()), autocast(device, precision):  # pycocotools prints tables
            found = inference_on_dataset(model, eval_loader(coco, side, num_workers), evaluator)
        rows = read_results(Path(temporary) / RESULTS, by_index)
    return Evaluated(rows, evaluate(coco, rows) | (_named(found, coco) if rows else {}))


def _evaluator(coco: CocoSet, folder: Path) -> COCOEvaluator:
    truth = folder / "truth.json"
    truth.write_text(json.dumps(ground_truth(coco, "mask"), default=bytes.decode))  # run lengths are bytes
    name = f"rcmae-{uuid.uuid4().hex}"
    labels = {label: label for label in range(len(coco.names))}
    MetadataCatalog.get(name).set(
        json_file=str(truth), thing_classes=list(coco.names), thing_dataset_id_to_contiguous_id=labels
    )
    try:
        return COCOEvaluator(name, tasks=tuple(IOU_TYPES.values()), distributed=False, output_dir=str(folder))
    finally:
        MetadataCatalog.remove(name)


def _named(found: Mapping[str, Mapping[str, float]], coco: CocoSet) -> Figures:
    """detectron2's per cents under the names of `transfer.detection.coco_eval`, as shares."""
    names = NAMES | {f"AP-{name}": f"ap/{name}" for name in coco.names}
    return {
        f"{kind}_{names[name]}": None if math.isnan(value) else value / 100
        for kind, iou_type in IOU_TYPES.items()
        for name, value in found[iou_type].items()
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, nothing is shown of detectron2's own log, which has a traceback for every error that is passed on.

    Nor of what torch says about how detectron2 calls it.
    """
    logs = [(log := logging.getLogger(name), log.propagate) for name in THEIR_LOGS]
    for log, _ in logs:
        log.propagate = False
        log.addHandler(_NOWHERE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for message in THEIR_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=UserWarning)
            yield
    finally:
        for log, propagate in logs:
            log.propagate = propagate
            log.removeHandler(_NOWHERE)


_NOWHERE = logging.NullHandler()
