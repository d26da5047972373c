"""`rcmae detect`: from a backbone and a COCO-format data set to a detector and its average precision."""

import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from core.backbone_io import load_backbone, weights_digest
from core.checkpoint import Checkpoint
from core.distributed import Processes, joined
from core.engine import fit
from core.files import FileSystem
from core.log import console_logging
from core.machine import choose_device
from core.optim import adamw
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
    require_alone,
    require_same_backbone,
    require_same_data,
    run_info,
)
from core.vit import ViT
from transfer.detection.coco import CocoSet, training_set
from transfer.detection.coco_eval import evaluate
from transfer.detection.coco_file import coco_paths, read_coco
from transfer.detection.data import Collate, PrepareDetection
from transfer.detection.dense_vit import dense_vit
from transfer.detection.detector import load_detector, require_categories
from transfer.detection.mask_rcnn import build_mask_rcnn
from transfer.detection.results import draw_validation, finish, run_flags, write_results
from transfer.detection.settings import (
    HARMLESS_KEYS,
    DetectConfig,
    Setting,
    header,
    parameter_groups,
    rate,
    settle,
)
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
        opened=lambda processes: _open_inputs(config, processes),
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
        require_alone(config.framework, processes)
        loaded = processes.together(lambda: load_detector(config.backbone))
        coco = processes.together(lambda: _open_set(config, "val"))
        require_categories(coco, loaded)
        processes.agree({"data": _facts(coco)})
        with claimed(config, HARMLESS_KEYS, processes, None) as writer:
            device = choose_device(config.device, processes.local_rank)
            workers = choose_workers(config.loader, device, processes)
            if config.framework == "detectron2":
                found = _detectron2_engine().evaluate_loaded(config, loaded, coco, device, workers)
            else:
                evaluator = CocoEvaluator(
                    coco, loaded.side, device, config.eval_precision, EVAL_BATCH_SIZE, workers,
                    config.loader.timeout_s, processes,
                )  # fmt: skip
                rows = evaluator(loaded.model.to(device))
                found = Evaluated(rows, evaluate(coco, rows))
            facts = {"flags": run_flags(config)}
            return processes.on_main(lambda: write_results(writer, config, coco, found, facts))


# ---- what is opened -------------------------------------------------------------------------------------------------


def _open_inputs(config: DetectConfig, processes: Processes) -> tuple[tuple[CocoSet, CocoSet], tuple[ViT, str]]:
    require_alone(config.framework, processes)
    return processes.together(lambda: (_open_sets(config), _open_backbone(config)))


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
    config = setting.config
    info = run_info(config, setting.device, _facts(setting.train)) | {"backbone": setting.digest}
    require_same_data(config.data, checkpoint, info["data"])
    require_same_backbone(config.backbone, checkpoint, setting.digest)
    task = build_task(setting, processes)
    state_bytes = 3 * 4 * sum(parameter.numel() for _, parameter in task.named_parameters())
    processes.on_main(lambda: open_log(writer, config, checkpoint, state_bytes))
    begun = Begun(config, setting.plan, setting.device, processes, writer, console, info)
    if config.framework == "detectron2":
        progress, found = _detectron2_engine().train(setting, task.model, checkpoint, begun)
        return finish(setting, found, {}, progress, writer)
    run = begun.fit_of(
        task, lambda: adamw(parameter_groups(config, task.model), config.optim), rate(config), config.optim.clip_grad
    )
    prepare = PrepareDetection(setting.train, config.img_size, config.jitter)
    feed = image_feed(
        setting.train.source(), config, setting.plan, prepare, Collate(config.img_size), 3, setting.num_workers,
        checkpoint, processes,
    )  # fmt: skip
    progress = fit(task, feed, checkpoint, run)
    if task.latest is None:  # the run was finished before
        task.evaluate(progress.step)
    return processes.on_main(lambda: finish(setting, task.latest, feed.broken, progress, writer))


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
        model.to(setting.device), config.drop_path, config.seed, evaluator,
        lambda model: draw_validation(setting, model),
    )  # fmt: skip


def _detectron2_engine() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # detectron2 calls what torch and timm give up
        from transfer.detection.detectron2_engine import run
    return run
