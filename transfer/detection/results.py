"""What a detection run leaves behind: pictures, the exported detector, figures and detections."""

import importlib.metadata
import json
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import config_hash
from core.engine import Progress, autocast
from core.errors import shown
from core.files import replace_file
from core.loader import EvalBatch
from core.log import draw_curves, read_metrics
from core.machine import git_commit
from core.start import Writer, concluded
from core.vit import ViT
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import result_entries
from transfer.detection.data import detection_batch, evaluation_images, normalized
from transfer.detection.detector import export_detector
from transfer.detection.detectron2_files import is_detectron2
from transfer.detection.draw import draw_detections, tiled
from transfer.detection.mask_rcnn import MaskRCNN, build_mask_rcnn
from transfer.detection.settings import DetectConfig, Setting
from transfer.detection.tasks import Evaluated
from transfer.detection.weights import from_detectron2

NUM_PICTURES, PICTURE_SCORE = 6, 0.3  # validation images drawn at each evaluation, from which score on
PICTURE_SIDE = 320  # pixels about; on smaller ones names would cover what they name

logger = logging.getLogger("rcmae")


@torch.no_grad()
def draw_validation(setting: Setting, model: MaskRCNN) -> np.ndarray:
    """Detections on the first validation images, at the size of the network or a multiple of it: uint8 [H, W, 3]."""
    coco, side = setting.val, setting.config.img_size
    zoom = max(1, round(PICTURE_SIDE / side))
    few = coco.subset(np.arange(min(NUM_PICTURES, len(coco))))
    images = evaluation_images(few, side)
    pictures: list[Tensor] = []
    for index in range(len(few)):
        image, _, _ = images[index]
        loaded = EvalBatch(image.unsqueeze(0), torch.tensor([index]), torch.tensor([True]))
        batch = detection_batch(loaded, few, side).to(setting.device)
        with autocast(setting.device, setting.config.eval_precision):
            sizes = [(zoom * int(height), zoom * int(width)) for height, width in batch.sizes.tolist()]
            (found,) = model.detect(normalized(batch, torch.float32), batch.sizes, sizes)
        height, width = sizes[0]
        image = image.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)  # [3, zoom * S, zoom * S]
        drawn = torch.full_like(image, 255)  # around it the square is paper
        drawn[:, :height, :width] = draw_detections(image[:, :height, :width], found, coco.names, PICTURE_SCORE)
        pictures.append(drawn)
    return tiled(pictures, columns=3)


def finish(
    setting: Setting, found: Evaluated | None, broken: dict[str, str], progress: Progress, writer: Writer | None
) -> dict[str, Any]:
    """Export, draw curves and summarise; the first process alone.

    Args:
        found: by the last evaluation.
    Returns: the content of summary.json.
    """
    assert writer is not None and found is not None, "the first process writes, after an evaluation"
    config, path = setting.config, writer.directory.path
    newest = writer.store.newest()
    assert newest is not None, "a finished run has a checkpoint"
    model = build_mask_rcnn(ViT(setting.vit.config), setting.detector)  # whole weights, however the run shards them
    weights = newest.tensors["detector"]
    model.load_state_dict(from_detectron2(weights)[0] if is_detectron2(weights) else weights)
    provenance = {"step": progress.step, "config": config_hash(config), "backbone": setting.digest}
    export_detector(
        path / "detector", model, setting.detector, setting.train.names, setting.train.category_ids, config.img_size,
        provenance | {"git_commit": git_commit()},
    )  # fmt: skip
    rows = read_metrics(path / "metrics.jsonl")
    if config.log.curves:
        draw_curves(rows, path / "curves.png", path.name)
    facts = {
        "digest": newest.digest,
        "backbone": setting.digest,
        "images": len(setting.train),
        "images_seen": progress.step * config.batch_size,
        "non_finite_steps": progress.skipped,
        "broken_images": broken,
        "dropped_annotations": setting.train.notes(),
        "flags": run_flags(config),
    }
    logger.info("done: %s holds the detector; rcmae predict uses it", shown(path / "detector"))
    return write_results(writer, config, setting.val, found, facts)


def write_results(
    writer: Writer | None, config: DetectConfig, coco: CocoSet, found: Evaluated, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write figures and detections, and say them; the first process alone. Returns the content of summary.json."""
    assert writer is not None, "only the first process writes"
    path = writer.directory.path
    overall = {name: value for name, value in found.figures.items() if "/" not in name}
    text = "  ".join(f"{name} {value:.4f}" for name, value in overall.items() if value is not None)
    logger.info("%s", text or "no figure is defined: the validation set has no ground truth")
    summary = {
        **concluded(config),
        "test_images": len(coco),
        "figures": overall,
        **facts,
    }
    replace_file(path / "detections.json", json.dumps(result_entries(found.rows, coco)).encode())
    replace_file(path / "results.json", json.dumps(summary | {"all_figures": found.figures}, indent=1).encode())
    writer.directory.write_summary(summary)
    return summary


def run_flags(config: DetectConfig) -> list[str]:
    """What a figure must be read with."""
    flags = [f"evaluated in {config.eval_precision}", f"precision {config.engine.precision}", f"device {config.device}"]
    if config.init == "random":
        flags.append("random initialisation: no pretrained weights")
    if config.framework != "native":
        flags.append(f"framework {config.framework} {importlib.metadata.version(config.framework)}")
    return flags
