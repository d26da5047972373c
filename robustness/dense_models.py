"""A detector or a segmentor as what `rcmae robust` tests: opened, with its images, ready to be evaluated."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from core.backbone_io import CONFIG, weights_digest
from core.distributed import Processes
from core.errors import DataError, shown
from core.loader import Read
from robustness.corruptions.apply import MIN_SIDE
from robustness.dense import Dense, DenseModel, DenseSet, published_precision, too_small
from robustness.evaluation import Reading
from robustness.grid import chosen
from robustness.settings import RobustConfig
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import evaluate as evaluate_rows
from transfer.detection.coco_file import coco_paths, read_coco
from transfer.detection.detector import load_detector, require_categories
from transfer.detection.tasks import EVAL_BATCH_SIZE, CocoEvaluator, average_precisions
from transfer.segmentation.directory import LoadedSegmentor, load_segmentor
from transfer.segmentation.labels import LabelTable, label_table
from transfer.segmentation.miou import scores_of
from transfer.segmentation.pairs import open_pairs
from transfer.segmentation.tasks import EvalSizes, Labeller, SegmentationEvaluator, figures_of

logger = logging.getLogger("rcmae")


def open_detector(config: RobustConfig, device: torch.device, reading: Reading) -> Dense:
    """A detector directory and the images of `val`, evaluated as `rcmae detect --eval` does.

    Raises: CheckpointError; DataError for other categories, images that are too small, or nothing to find in them.
    """
    assert config.model is not None, "its kind was read from it"
    loaded = load_detector(config.model)
    whole = read_coco(coco_paths(_root(config), "val", config.val_json, config.val_images))
    _tell(whole.notes())
    require_categories(whole, loaded)
    ids = chosen(len(whole), config)
    coco = whole.subset(ids)
    _require_usable(coco)
    precision = published_precision(config)
    model = loaded.model.to(device).eval()

    def evaluate(read: Read) -> dict[str, float]:
        evaluator = CocoEvaluator(
            coco, loaded.side, device, precision, EVAL_BATCH_SIZE, reading.num_workers, reading.timeout_s, Processes(),
            read,
        )  # fmt: skip
        return average_precisions(evaluate_rows(coco, evaluator(model)))

    tested = DenseModel(
        "detector", shown(config.model), _digest(config.model, model), loaded.names, (loaded.side, loaded.side),
        precision, ("box_ap", "mask_ap"), f"detector of {len(loaded.names)} classes, {loaded.side} px",
    )  # fmt: skip
    return Dense(tested, DenseSet(coco.source(), ids, len(whole), identity=_annotations_digest(coco)), evaluate)


def _require_usable(coco: CocoSet) -> None:
    """Raise DataError where it would only be met after the clean cell, which may take an hour."""
    for index in (coco.sizes.min(axis=1) < MIN_SIDE).nonzero()[0][:1].tolist():
        raise too_small(str(coco.origin), coco.source().name(index), *coco.size(index))
    if not coco.num_learnable().any():
        raise DataError(f"{shown(coco.origin)}: no object in these {len(coco)} images; AP is not defined without one")


def _annotations_digest(coco: CocoSet) -> str:
    """Identifies images, sizes, categories and annotations. It covers the whole file, of which they may be a part."""
    kept = coco.annotations
    digest = hashlib.sha256(json.dumps([coco.source().fingerprint(), coco.category_ids, coco.names]).encode())
    arrays = (kept.labels, kept.xywh, kept.areas, kept.crowd, kept.parts, kept.ends, kept.points)
    for array in (coco.sizes, coco.spans, *arrays):
        digest.update(array.tobytes())
    for row, rle in sorted(kept.rles.items()):
        digest.update(f"{row} ".encode() + rle.counts)
    return digest.hexdigest()[:12]


def open_segmentor(config: RobustConfig, device: torch.device, reading: Reading) -> Dense:
    """A segmentor directory and the images of the validation folder, evaluated as `rcmae segment --eval` does.

    What stored labels mean, how large images are and how windows lie is as the directory says; one scale, not mirrored.
    Raises: CheckpointError, DataError.
    """
    assert config.model is not None, "its kind was read from it"
    loaded = load_segmentor(config.model)
    whole = open_pairs(_root(config), "val", config.val_images, config.val_labels)
    _tell(whole.notes())
    ids = chosen(len(whole), config)
    pairs, table = whole.subset(ids), label_table(loaded.labels, len(loaded.classes))
    precision = published_precision(config)
    model = loaded.model.to(device).eval()
    labeller = Labeller(loaded.inference, device, precision)

    def evaluate(read: Read) -> dict[str, float]:
        evaluator = SegmentationEvaluator(
            pairs, table, len(loaded.classes), EvalSizes(loaded.scale), labeller, reading.num_workers,
            reading.timeout_s, Processes(), read,
        )  # fmt: skip
        figures = figures_of(scores_of(evaluator(model)))
        if any(value != value for value in figures.values()):
            raise DataError(f"{shown(pairs.labels.origin)}: no labelled pixel in it; mIoU is not defined without one")
        return figures

    tested = DenseModel(
        "segmentor", shown(config.model), _digest(config.model, model), loaded.classes.names,
        (loaded.inference.crop, loaded.inference.crop), precision, ("miou_pct",), _described(loaded),
    )  # fmt: skip
    identity = _labels_digest(pairs.fingerprint(), table, loaded.classes.names)
    return Dense(tested, DenseSet(pairs.images, ids, len(whole), identity=identity), evaluate)


def _described(loaded: LoadedSegmentor) -> str:
    long, short = loaded.scale
    windows, crop = loaded.inference, f"{loaded.inference.crop}x{loaded.inference.crop}"
    how = f"windows of {crop} px every {windows.stride}" if windows.mode == "slide" else "whole images"
    return f"segmentor of {len(loaded.classes)} classes, images to fit {long}x{short} px, {how}"


def _labels_digest(fingerprint: str, table: LabelTable, names: tuple[str, ...]) -> str:
    """Identifies images and labels by their names, and what stored values mean."""
    digest = hashlib.sha256(json.dumps([fingerprint, table.ignore_index, names]).encode())
    digest.update(table.table.tobytes())
    return digest.hexdigest()[:12]


# --- common ---------------------------------------------------------------------------------------------------------


def _root(config: RobustConfig) -> Path | None:
    return None if config.data is None else Path(config.data)


def _tell(notes: list[str]) -> None:
    for line in notes:
        logger.warning("%s", line)


def _digest(folder: Path, model: Any) -> str:
    """Identifies weights and description."""
    return hashlib.sha256(weights_digest(model).encode() + (folder / CONFIG).read_bytes()).hexdigest()[:12]
