"""What a segmentation run leaves behind: pictures, figures, the segmentor directory."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import config_hash
from core.engine import Progress
from core.errors import shown
from core.files import replace_file
from core.log import draw_curves, read_metrics
from core.machine import git_commit
from core.start import Writer, concluded
from core.vit import ViT
from transfer.segmentation.augment import resize_label
from transfer.segmentation.classes import Classes
from transfer.segmentation.data import evaluation_images
from transfer.segmentation.directory import export_segmentor
from transfer.segmentation.draw import below, classes_in, contact_sheet, legend, overlay
from transfer.segmentation.linear_head import Network
from transfer.segmentation.miou import SegmentationScores, scores_of
from transfer.segmentation.mmseg_engine import recipe
from transfer.segmentation.settings import SegmentConfig, Setting, label_keys
from transfer.segmentation.tasks import EvalSizes, Labeller, SegmentationTask, figures_of, trained_part

NUM_PICTURES, PICTURE_SIDE_PX = 4, 400  # validation images drawn at each evaluation

logger = logging.getLogger("rcmae")


def draw_validation(setting: Setting, labeller: Labeller, model: Network) -> np.ndarray:
    """Photograph, prediction and truth of a few validation images, spread over the set: uint8 [H, W, 3]."""
    number, classes = len(setting.inputs.val), setting.inputs.classes
    chosen = np.unique(np.linspace(0, number - 1, min(NUM_PICTURES, number)).round().astype(int))
    images = evaluation_images(
        setting.inputs.val.subset(chosen), setting.inputs.table, EvalSizes(setting.config.augment.scale)
    )
    rows: list[Sequence[Tensor]] = []
    maps: list[Tensor] = []
    for index in range(len(chosen)):
        sample = images[index]
        (picture,) = sample.images  # [3, h, w]
        size = (picture.shape[1], picture.shape[2])
        predicted = labeller(model, [picture.unsqueeze(0)], size).cpu()  # [h, w]
        truth = torch.from_numpy(resize_label(sample.label.numpy(), size))
        rows.append([picture, *(overlay(picture, labels, classes.palette) for labels in (predicted, truth))])
        maps += [predicted, truth]
    sheet = contact_sheet(["photograph", "prediction", "truth"], rows, PICTURE_SIDE_PX)
    names = legend(classes, classes_in(maps, len(classes)), sheet.shape[2])
    return below([sheet, names]).permute(1, 2, 0).numpy()


def finish(
    setting: Setting, task: SegmentationTask, broken: dict[str, str], progress: Progress, writer: Writer | None
) -> dict[str, Any]:
    """Export, draw and summarise; the first process alone."""
    assert writer is not None and task.latest is not None, "the first process writes, after an evaluation"
    config, path = setting.config, writer.directory.path
    newest = writer.store.newest()
    assert newest is not None, "a finished run has a checkpoint"
    vit = ViT(setting.inputs.vit.config)
    if config.head == "linear":  # frozen, and so in no checkpoint
        vit.load_state_dict(setting.inputs.vit.state_dict())
    model = setting.network(vit)  # whole weights, however the run shards them
    trained_part(model).load_state_dict(newest.tensors["segmentor"])
    provenance = {"step": progress.step, "config": config_hash(config), "backbone": setting.inputs.digest}
    export_segmentor(
        path / "segmentor", model, setting.inputs.classes, label_keys(config), config.augment.scale, setting.inference,
        provenance | {"git_commit": git_commit()},
    )  # fmt: skip
    if config.log.curves:
        draw_curves(read_metrics(path / "metrics.jsonl"), path / "curves.png", path.name)
    facts = {
        "digest": newest.digest,
        "backbone": setting.inputs.digest,
        "images": len(setting.inputs.train),
        "images_seen": progress.step * config.batch_size,
        "non_finite_steps": progress.skipped,
        "broken_images": broken,
    }
    summary = write_results(writer, config, setting.inputs.classes, len(setting.inputs.val), task.latest, facts)
    logger.info("done: %s holds the segmentor; rcmae predict uses it", shown(path / "segmentor"))
    return summary


def write_results(
    writer: Writer | None,
    config: SegmentConfig,
    classes: Classes,
    num_images: int,
    confusion: Tensor,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write and log the figures of an evaluation; the first process alone.

    Args:
        confusion: [K, K] int64.
        facts: what else the summary says.
    Returns: the content of summary.json.
    """
    assert writer is not None, "only the first process writes"
    path, scores = writer.directory.path, scores_of(confusion)
    for line in scores.table(classes.names):
        logger.info("%s", line)
    figures = {name: _defined(value) for name, value in figures_of(scores).items()}
    told = "  ".join(f"{name} {value:.2f}" for name, value in figures.items() if value is not None)
    logger.info("%s", told or "no figure is defined: the validation images have no labelled pixel")
    summary = {
        **concluded(config),
        "test_images": num_images,
        "figures": figures,
        **facts,
        "flags": _flags(config),
    }
    replace_file(path / "confusion.json", json.dumps({"rows_are_labels": confusion.tolist()}).encode())
    table = summary | {"classes": _per_class(scores, classes)}
    replace_file(path / "results.json", json.dumps(table, indent=1).encode())
    writer.directory.write_summary(summary)
    return summary


def _per_class(scores: SegmentationScores, classes: Classes) -> list[dict[str, Any]]:
    rows = zip(classes.names, scores.iou.tolist(), scores.acc.tolist(), scores.pixels.tolist(), strict=True)
    return [
        {"name": name, "iou_pct": _defined(100 * iou), "acc_pct": _defined(100 * acc), "pixels": pixels}
        for name, iou, acc, pixels in rows
    ]


def _defined(value: float) -> float | None:
    return None if value != value else value


def _flags(config: SegmentConfig) -> list[str]:
    flags = [f"evaluated in {config.eval_precision}", f"precision {config.engine.precision}", f"device {config.device}"]
    if config.framework == "mmseg":
        flags.append(f"framework {recipe.versions()}")
    if config.init == "random":
        flags.append("random initialisation: no pretrained weights")
    if config.scales != (1.0,) or config.flip:
        mirrored = ", mirror images too" if config.flip else ""
        flags.append(f"evaluated at scales {', '.join(f'{scale:g}' for scale in config.scales)}{mirrored}")
    return flags
