"""`rcmae detect`: from a backbone and a COCO-format data set to a detector and its average precision."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from core.backbone_io import load_backbone, weights_digest
from core.checkpoint import Checkpoint
from core.config import config_hash
from core.distributed import Processes, joined
from core.engine import Progress, autocast, fit
from core.errors import shown
from core.files import FileSystem, replace_file
from core.loader import EvalBatch
from core.log import console_logging, draw_curves, read_metrics
from core.machine import choose_device, git_commit
from core.optim import adamw, warmup_multistep
from core.start import (
    Begun,
    Writer,
    agree_on_run,
    begin,
    choose_workers,
    claimed,
    entered,
    image_feed,
    open_log,
    require_same_backbone,
    require_same_data,
    run_info,
)
from core.vit import ViT
from transfer.detection.coco import CocoSet, training_set
from transfer.detection.coco_eval import evaluate, result_entries
from transfer.detection.coco_file import coco_paths, read_coco
from transfer.detection.data import Collate, PrepareDetection, detection_batch, evaluation_images, normalized
from transfer.detection.dense_vit import dense_vit
from transfer.detection.detector import export_detector, load_detector, require_categories
from transfer.detection.draw import draw_detections, tiled
from transfer.detection.mask_rcnn import MaskRCNN, build_mask_rcnn
from transfer.detection.settings import HARMLESS_KEYS, DetectConfig, Setting, header, parameter_groups, settle
from transfer.detection.tasks import EVAL_BATCH_SIZE, CocoEvaluator, DetectionTask, Evaluated

PATHS = ("backbone", "train_json", "train_images", "val_json", "val_images")
NUM_PICTURES, PICTURE_SCORE = 6, 0.3  # validation images drawn at each evaluation, from which score on
PICTURE_SIDE = 320  # pixels about; on smaller ones names would cover what they name

logger = logging.getLogger("rcmae")


def detect(config: DetectConfig, resume: str = "auto", fs: FileSystem | None = None) -> dict[str, Any]:
    """Train and evaluate one detector; go on where an earlier run stopped.

    Args:
        resume: "auto" goes on from out=, "never" refuses an out= that holds a run, a path starts from that checkpoint.
        fs: file layer of the checkpoints; tests pass one that crashes.
    Returns: the content of summary.json.
    Raises: the errors of `core.errors`, each with the exit code of its kind.
    """
    with entered(
        config, resume, fs, harmless=HARMLESS_KEYS, paths=PATHS,
        opened=lambda processes: processes.together(lambda: (_open_sets(config), _open_backbone(config))),
        facts=lambda inputs: _all_facts(*inputs),
    ) as run:  # fmt: skip
        sets, (vit, digest) = run.inputs
        setting = settle(config, vit, digest, sets, run.checkpoint, run.processes)
        begin(config, header(setting))
        return _train(setting, run.checkpoint, run.writer, run.processes, run.console)


def dry_run(config: DetectConfig) -> list[str]:
    """The header of a run that is not started. Raises what the start would raise about backbone, data and batch."""
    with console_logging():
        sets, (vit, digest) = _open_sets(config), _open_backbone(config)
        return header(settle(config, vit, digest, sets, None, Processes()))


def evaluate_detector(config: DetectConfig) -> dict[str, Any]:
    """Evaluate a finished detector, given as `backbone`, on the validation images.

    Returns: the content of summary.json.
    """
    with joined(config.engine.timeout_s) as processes, console_logging(processes.is_main):
        agree_on_run(processes, config, "eval", PATHS)
        loaded = processes.together(lambda: load_detector(config.backbone))
        coco = processes.together(lambda: _open_set(config, "val"))
        require_categories(coco, loaded)
        processes.agree({"data": _facts(coco)})
        with claimed(config, HARMLESS_KEYS, processes, None) as writer:
            device = choose_device(config.device, processes.local_rank)
            workers = choose_workers(config.loader, device, processes)
            evaluator = CocoEvaluator(
                coco, loaded.side, device, config.eval_precision, EVAL_BATCH_SIZE, workers, config.loader.timeout_s,
                processes,
            )  # fmt: skip
            rows = evaluator(loaded.model.to(device))
            facts = {"flags": _flags(config)}
            return processes.on_main(
                lambda: _write_results(writer, config, coco, Evaluated(rows, evaluate(coco, rows)), facts)
            )


# ---- what is opened -------------------------------------------------------------------------------------------------


def _open_sets(config: DetectConfig) -> tuple[CocoSet, CocoSet]:
    return training_set(_open_set(config, "train"), config.keep_background), _open_set(config, "val")


def _open_set(config: DetectConfig, split: str) -> CocoSet:
    own = {"train": (config.train_json, config.train_images), "val": (config.val_json, config.val_images)}[split]
    coco = read_coco(coco_paths(Path(config.data), split, *own))
    for line in coco.notes():
        logger.warning("%s", line)
    return coco


def _all_facts(sets: tuple[CocoSet, CocoSet], backbone: tuple[ViT, str]) -> dict[str, Any]:
    return {"data": _facts(sets[0]), "validation data": _facts(sets[1]), "backbone": backbone[1]}


def _facts(coco: CocoSet) -> dict[str, Any]:
    return {"images": len(coco), "fingerprint": coco.source().fingerprint(), "objects": len(coco.annotations)}


def _open_backbone(config: DetectConfig) -> tuple[ViT, str]:
    plain, report = load_backbone(config.backbone, branch=config.branch, num_heads=config.num_heads)
    for line in report.lines():
        logger.info("%s", line)
    if config.init == "random":
        plain.init_weights(torch.Generator().manual_seed(config.seed))
    return dense_vit(plain, config), weights_digest(plain)


# ---- training -------------------------------------------------------------------------------------------------------


def _train(
    setting: Setting, checkpoint: Checkpoint | None, writer: Writer | None, processes: Processes, console: Console
) -> dict[str, Any]:
    config, plan = setting.config, setting.plan
    info = run_info(config, setting.device, _facts(setting.train)) | {"backbone": setting.digest}
    require_same_data(config.data, checkpoint, info["data"])
    require_same_backbone(config.backbone, checkpoint, setting.digest)
    task = build_task(setting, processes)
    state_bytes = 3 * 4 * sum(parameter.numel() for _, parameter in task.named_parameters())
    processes.on_main(lambda: open_log(writer, config, checkpoint, state_bytes))
    run = Begun(config, plan, setting.device, processes, writer, console, info).fit_of(
        task,
        lambda: adamw(parameter_groups(config, task.model), config.optim),
        _rate(config),
        config.optim.clip_grad,
    )
    prepare = PrepareDetection(setting.train, config.img_size, config.jitter)
    feed = image_feed(
        setting.train.source(), config, plan, prepare, Collate(config.img_size), 3, setting.num_workers, checkpoint,
        processes,
    )  # fmt: skip
    progress = fit(task, feed, checkpoint, run)
    if task.latest is None:  # the run was finished before
        task.evaluate(progress.step)
    return processes.on_main(lambda: _finish(setting, task, feed.broken, progress, writer))


def _rate(config: DetectConfig) -> Callable[[int], float]:
    peak, drops = config.optim.lr, config.drops()
    assert peak is not None, "DetectConfig refuses none"
    return lambda step: peak * warmup_multistep(step, warmup_steps=config.warmup_steps, start=0.001, milestones=drops)


def build_task(setting: Setting, processes: Processes) -> DetectionTask:
    """Detector and evaluator on the device, all but the ViT drawn from the seed."""
    config = setting.config
    model = build_mask_rcnn(setting.vit, setting.detector)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    evaluator = CocoEvaluator(
        setting.val, config.img_size, setting.device, config.eval_precision, EVAL_BATCH_SIZE, setting.num_workers,
        config.loader.timeout_s, processes,
    )  # fmt: skip
    return DetectionTask(
        model.to(setting.device), config.drop_path, config.seed, evaluator, lambda model: _draw(setting, model)
    )


@torch.no_grad()
def _draw(setting: Setting, model: MaskRCNN) -> np.ndarray:
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
        drawn = image.clone()
        drawn[:, :height, :width] = draw_detections(image[:, :height, :width], found, coco.names, PICTURE_SCORE)
        pictures.append(drawn)
    return tiled(pictures, columns=3)


def _finish(
    setting: Setting, task: DetectionTask, broken: dict[str, str], progress: Progress, writer: Writer | None
) -> dict[str, Any]:
    """Export, draw and summarise; the first process alone."""
    assert writer is not None and task.latest is not None, "the first process writes, after an evaluation"
    config, path = setting.config, writer.directory.path
    newest = writer.store.newest()
    assert newest is not None, "a finished run has a checkpoint"
    model = build_mask_rcnn(ViT(setting.vit.config), setting.detector)  # whole weights, however the run shards them
    model.load_state_dict(newest.tensors["detector"])
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
        "flags": _flags(config),
    }
    logger.info("done: %s holds the detector; rcmae predict uses it", shown(path / "detector"))
    return _write_results(writer, config, setting.val, task.latest, facts)


def _write_results(
    writer: Writer | None, config: DetectConfig, coco: CocoSet, found: Evaluated, facts: dict[str, Any]
) -> dict[str, Any]:
    assert writer is not None, "only the first process writes"
    path = writer.directory.path
    overall = {name: value for name, value in found.figures.items() if "/" not in name}
    text = "  ".join(f"{name} {value:.4f}" for name, value in overall.items() if value is not None)
    logger.info("%s", text or "no figure is defined: the validation set has no ground truth")
    summary = {
        "status": "done",
        "config": config_hash(config),
        "seed": config.seed,
        "git_commit": git_commit(),
        "test_images": len(coco),
        "figures": overall,
        **facts,
    }
    replace_file(path / "detections.json", json.dumps(result_entries(found.rows, coco)).encode())
    replace_file(path / "results.json", json.dumps(summary | {"all_figures": found.figures}, indent=1).encode())
    writer.directory.write_summary(summary)
    return summary


def _flags(config: DetectConfig) -> list[str]:
    flags = [f"evaluated in {config.eval_precision}", f"precision {config.engine.precision}", f"device {config.device}"]
    if config.init == "random":
        flags.append("random initialisation: no pretrained weights")
    return flags
