"""`rcmae segment`: from a backbone and images with label PNGs to a segmentor and its mean IoU."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from core.backbone_io import load_backbone, weights_digest
from core.checkpoint import Checkpoint
from core.config import config_hash
from core.distributed import Processes, joined
from core.engine import Progress, fit
from core.errors import ConfigError, DataError, shown
from core.files import FileSystem, replace_file
from core.log import console_logging, draw_curves, read_metrics
from core.machine import choose_device, git_commit
from core.optim import adamw, warmup_poly
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
from core.vit import ViT, ViTConfig, resize_pos_embed
from transfer.segmentation.augment import resize_label
from transfer.segmentation.classes import Classes, open_classes
from transfer.segmentation.data import Collate, PrepareSegmentation, evaluation_images
from transfer.segmentation.directory import LoadedSegmentor, export_segmentor, load_segmentor
from transfer.segmentation.draw import below, classes_in, contact_sheet, legend, overlay
from transfer.segmentation.labels import LabelKeys, label_table
from transfer.segmentation.linear_head import Network
from transfer.segmentation.miou import SegmentationScores, scores_of
from transfer.segmentation.pairs import SegmentationSet, Split, open_pairs
from transfer.segmentation.segmentor import segmentation_vit
from transfer.segmentation.settings import (
    HARMLESS_KEYS,
    PATHS,
    InferenceKeys,
    Inputs,
    SegmentConfig,
    Setting,
    header,
    label_keys,
    parameter_groups,
    require_fitting,
    require_windows,
    settle,
    synchronised,
)
from transfer.segmentation.slide import InferenceConfig
from transfer.segmentation.tasks import (
    EvalSizes,
    Labeller,
    SegmentationEvaluator,
    SegmentationTask,
    figures_of,
    trained_part,
)

NUM_PICTURES, PICTURE_SIDE_PX = 4, 400  # validation images drawn at each evaluation

logger = logging.getLogger("rcmae")


def segment(config: SegmentConfig, resume: str = "auto", fs: FileSystem | None = None) -> dict[str, Any]:
    """Train and evaluate one segmentor; go on where an earlier run stopped.

    Args:
        resume: "auto" goes on from out=, "never" refuses an out= that holds a run, a path starts from that checkpoint.
        fs: file layer of the checkpoints; tests pass one that crashes.
    Returns: the content of summary.json.
    Raises: the errors of `core.errors`, each with the exit code of its kind.
    """
    with entered(
        config, resume, fs, harmless=HARMLESS_KEYS, paths=PATHS,
        opened=lambda processes: processes.together(lambda: open_inputs(config)), facts=_all_facts,
    ) as run:  # fmt: skip
        setting = settle(config, run.inputs, run.checkpoint, run.processes)
        begin(config, header(setting))
        return _train(setting, run.checkpoint, run.writer, run.processes, run.console)


def dry_run(config: SegmentConfig) -> list[str]:
    """The header of a run that is not started. Raises what the start would raise about backbone, data and batch."""
    with console_logging():
        return header(settle(config, open_inputs(config), None, Processes()))


def evaluate_segmentor(given: SegmentConfig) -> dict[str, Any]:
    """Evaluate a finished segmentor, given as `backbone`, on the validation images.

    What labels mean, how large images are and how windows lie is as the directory says, but where keys say otherwise.

    Returns: the content of summary.json.
    """
    with joined(given.engine.timeout_s) as processes, console_logging(processes.is_main):
        agree_on_run(processes, given, "eval", PATHS)
        loaded = processes.together(lambda: load_segmentor(given.backbone))
        config = processes.together(lambda: as_trained(given, loaded))
        pairs = processes.together(lambda: _open_set(config, "val"))
        digest = weights_digest(loaded.model)
        processes.agree({"data": _facts(pairs), "segmentor": digest})
        with claimed(config, HARMLESS_KEYS, processes, None) as writer:
            device = choose_device(config.device, processes.local_rank)
            inference, vit = config.inference.settled(config.img_size), loaded.model.backbone.config
            evaluator = _evaluator(config, pairs, len(loaded.classes), vit, inference, device, processes)
            logger.info("segmentor %s, weights %s; %d images", shown(config.backbone), digest, len(pairs))
            confusion = evaluator(loaded.model.to(device).eval())
            return processes.on_main(
                lambda: _write_results(writer, config, loaded.classes, len(pairs), confusion, {"segmentor": digest})
            )


# ---- what is opened -------------------------------------------------------------------------------------------------


def open_inputs(config: SegmentConfig) -> Inputs:
    """Labels, images and backbone. Raises: ConfigError, DataError or CheckpointError for what cannot be used."""
    classes = open_classes(config)
    table = label_table(config, len(classes))
    train, val = _open_set(config, "train"), _open_set(config, "val")
    inputs = Inputs(train, val, classes, table, *_open_backbone(config))
    require_fitting(config, inputs)
    return inputs


def _open_set(config: SegmentConfig, split: Split) -> SegmentationSet:
    own = {"train": (config.train_images, config.train_labels), "val": (config.val_images, config.val_labels)}[split]
    pairs = open_pairs(Path(config.data), split, *own)
    for line in pairs.notes():
        logger.warning("%s", line)
    return pairs


def _all_facts(inputs: Inputs) -> dict[str, Any]:
    return {"data": _facts(inputs.train), "validation data": _facts(inputs.val), "backbone": inputs.digest}


def _facts(pairs: SegmentationSet) -> dict[str, Any]:
    return {"images": len(pairs), "fingerprint": pairs.fingerprint()}


def _open_backbone(config: SegmentConfig) -> tuple[ViT, str]:
    """The ViT as the network has it, with its position table at the size of the crops; and what identifies it."""
    plain, report = load_backbone(config.backbone, branch=config.branch, num_heads=config.num_heads)
    for line in report.lines():
        logger.info("%s", line)
    digest, sizes, name = weights_digest(plain), plain.config, shown(config.backbone)
    least = sizes.patch_size * (2 if config.head == "upernet" else 1)  # of which the neck's last map is a half
    if config.img_size % sizes.patch_size or config.img_size < least:
        raise ConfigError(
            f"img_size={config.img_size}: expected a multiple of the patches of {name}, {sizes.patch_size} px, from "
            f"{least} on"
        )
    if sizes.in_chans != 3:
        raise ConfigError(f"{name}: a backbone for images of {sizes.in_chans} channels; segmentation reads RGB")
    if report.new and config.head == "linear":
        raise ConfigError(
            f"{name}: has no final norm, as after fine-tuning with mean pooling; head=linear needs one: give a "
            "pretrained backbone"
        )
    vit = ViT(ViTConfig(**{**sizes.model_dump(), "img_size": (config.img_size, config.img_size)}))
    positions = resize_pos_embed(plain.pos_embed.detach(), sizes.grid, vit.config.grid)
    if config.init == "random":
        vit.init_weights(torch.Generator().manual_seed(config.seed))
    else:
        vit.load_state_dict({**plain.state_dict(), "pos_embed": positions})
    if config.head == "upernet":
        vit = segmentation_vit(vit, rel_pos_bias=config.rel_pos_bias, layer_scale=config.layer_scale)
        vit.checkpointing = config.activation_checkpointing
    return vit, digest


def as_trained(config: SegmentConfig, loaded: LoadedSegmentor) -> SegmentConfig:
    """The configuration of an evaluation: what it does not say is as the segmentor was trained.

    Raises: ConfigError for windows that the network cannot take; DataError for other classes than the segmentor's.
    """
    _require_classes(config, loaded.classes)
    labels = loaded.labels.model_dump(include={"ignore_index", "label_shift", "label_map"})
    said = {key: getattr(config, key) for key in labels if key in config.model_fields_set}
    if said.get("label_map") is not None:
        labels["label_shift"] = 0
    if said.get("label_shift"):
        labels["label_map"] = None
    labels |= {key: value for key, value in said.items() if value is not None}
    label_table(LabelKeys(**labels), len(loaded.classes))
    windows = {key: getattr(config.inference, key) for key in config.inference.model_fields_set}
    windows = loaded.inference.model_dump() | {key: value for key, value in windows.items() if value is not None}
    scale = config.augment.scale if "scale" in config.augment.model_fields_set else loaded.scale
    settled = config.model_copy(
        update={
            **labels,
            "num_classes": len(loaded.classes),
            "augment": config.augment.model_copy(update={"scale": scale}),
            "inference": InferenceKeys(**windows),
        }
    )
    require_windows(loaded.model.backbone.config, settled.inference.settled(config.img_size))
    return settled


def _require_classes(config: SegmentConfig, known: Classes) -> None:
    if config.classes is None and config.num_classes is None:
        return
    number, names = config.num_classes or len(known), known.names
    if config.classes is not None:
        given = open_classes(config).names
        number, names = len(given), given
    odd = next((i for i, (ours, theirs) in enumerate(zip(names, known.names, strict=False)) if ours != theirs), None)
    if number != len(known) or odd is not None:
        detail = f"; class {odd} is {shown(names[odd])}, not {shown(known.names[odd])}" if odd is not None else ""
        raise DataError(
            f"{shown(config.backbone)}: a segmentor of {len(known)} classes, the keys say {number}{detail}; leave "
            "classes and num_classes out, or give a segmentor of these"
        )


# ---- training -------------------------------------------------------------------------------------------------------


def _train(
    setting: Setting, checkpoint: Checkpoint | None, writer: Writer | None, processes: Processes, console: Console
) -> dict[str, Any]:
    config, plan = setting.config, setting.plan
    info = run_info(config, setting.device, _facts(setting.inputs.train)) | {"backbone": setting.inputs.digest}
    require_same_data(config.data, checkpoint, info["data"])
    require_same_backbone(config.backbone, checkpoint, setting.inputs.digest)
    task = build_task(setting, processes)
    state_bytes = 3 * 4 * sum(parameter.numel() for _, parameter in task.named_parameters())
    processes.on_main(lambda: open_log(writer, config, checkpoint, state_bytes))
    run = Begun(config, plan, setting.device, processes, writer, console, info).fit_of(
        task,
        lambda: adamw(parameter_groups(config, task.part), config.optim),
        _rate(config),
        config.optim.clip_grad,
    )
    prepare = PrepareSegmentation(setting.inputs.train, setting.inputs.table, config.img_size, config.augment)
    feed = image_feed(
        setting.inputs.train.images, config, plan, prepare, Collate(config.img_size, config.ignore_index), 3,
        setting.num_workers, checkpoint, processes,
    )  # fmt: skip
    progress = fit(task, feed, checkpoint, run)
    if task.latest is None:  # the run was finished before
        task.evaluate(progress.step)
    return processes.on_main(lambda: _finish(setting, task, feed.broken, progress, writer))


def _rate(config: SegmentConfig) -> Callable[[int], float]:
    peak = config.optim.lr
    assert peak is not None, "SegmentConfig refuses none"
    return lambda step: peak * warmup_poly(step, total_steps=config.steps, warmup_steps=config.warmup_steps)


def build_task(setting: Setting, processes: Processes) -> SegmentationTask:
    """Network and evaluator on the device, all but the ViT drawn from the seed."""
    config = setting.config
    model = setting.network(setting.inputs.vit)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    if synchronised(setting.device, processes):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    evaluator = _evaluator(
        config,
        setting.inputs.val,
        len(setting.inputs.classes),
        setting.inputs.vit.config,
        setting.inference,
        setting.device,
        processes,
    )
    labeller = Labeller(setting.inference, setting.device, config.eval_precision)
    return SegmentationTask(
        model.to(setting.device), config.drop_path, config.seed, evaluator, processes,
        build=lambda: setting.network(ViT(setting.inputs.vit.config)),
        draw=lambda model: _draw(setting, labeller, model),
    )  # fmt: skip


def _evaluator(
    config: SegmentConfig,
    pairs: SegmentationSet,
    num_classes: int,
    vit: ViTConfig,
    inference: InferenceConfig,
    device: torch.device,
    processes: Processes,
) -> SegmentationEvaluator:
    # A network that is bound to its windows would pad small views up to them: as published, they are enlarged instead.
    least_px = inference.crop if vit.rel_pos_bias and len(config.scales) > 1 else None
    return SegmentationEvaluator(
        pairs,
        label_table(config, num_classes),
        num_classes,
        EvalSizes(config.augment.scale, config.scales, least_px),
        Labeller(inference, device, config.eval_precision, config.flip),
        choose_workers(config.loader, device, processes),
        config.loader.timeout_s,
        processes,
    )


def _draw(setting: Setting, labeller: Labeller, model: Network) -> np.ndarray:
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


# ---- what is left behind --------------------------------------------------------------------------------------------


def _finish(
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
    summary = _write_results(writer, config, setting.inputs.classes, len(setting.inputs.val), task.latest, facts)
    logger.info("done: %s holds the segmentor; rcmae predict uses it", shown(path / "segmentor"))
    return summary


def _write_results(
    writer: Writer | None,
    config: SegmentConfig,
    classes: Classes,
    num_images: int,
    confusion: Tensor,
    facts: dict[str, Any],
) -> dict[str, Any]:
    assert writer is not None, "only the first process writes"
    path, scores = writer.directory.path, scores_of(confusion)
    for line in scores.table(classes.names):
        logger.info("%s", line)
    figures = {name: _defined(value) for name, value in figures_of(scores).items()}
    told = "  ".join(f"{name} {value:.2f}" for name, value in figures.items() if value is not None)
    logger.info("%s", told or "no figure is defined: the validation images have no labelled pixel")
    summary = {
        "status": "done",
        "config": config_hash(config),
        "seed": config.seed,
        "git_commit": git_commit(),
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
    if config.init == "random":
        flags.append("random initialisation: no pretrained weights")
    if config.scales != (1.0,) or config.flip:
        mirrored = ", mirror images too" if config.flip else ""
        flags.append(f"evaluated at scales {', '.join(f'{scale:g}' for scale in config.scales)}{mirrored}")
    return flags
