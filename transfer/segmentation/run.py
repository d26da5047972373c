"""`rcmae segment`: from a backbone and images with label PNGs to a segmentor and its mean IoU."""

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import nn

from core.backbone_io import load_backbone, weights_digest
from core.checkpoint import Checkpoint
from core.distributed import Processes, joined
from core.engine import fit
from core.errors import ConfigError, DataError, shown
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
from core.vit import ViT, ViTConfig, resize_pos_embed
from transfer.segmentation.classes import Classes, open_classes
from transfer.segmentation.data import Collate, PrepareSegmentation
from transfer.segmentation.directory import LoadedSegmentor, load_segmentor
from transfer.segmentation.labels import LabelKeys, label_table
from transfer.segmentation.mmseg_engine import recipe
from transfer.segmentation.pairs import SegmentationSet, Split, open_pairs
from transfer.segmentation.results import draw_validation, finish, write_results
from transfer.segmentation.segmentor import segmentation_vit
from transfer.segmentation.settings import (
    HARMLESS_KEYS,
    PATHS,
    InferenceKeys,
    Inputs,
    SegmentConfig,
    Setting,
    head_sizes,
    header,
    parameter_groups,
    rate,
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
)

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
        begin(config, _header(setting))
        return _train(setting, run.checkpoint, run.writer, run.processes, run.console)


def dry_run(config: SegmentConfig) -> list[str]:
    """The header of a run that is not started. Raises what the start would raise about backbone, data and batch."""
    with console_logging():
        return _header(settle(config, open_inputs(config), None, Processes()))


def _header(setting: Setting) -> list[str]:
    if setting.config.framework == "native":
        return header(setting)
    config = setting.config
    views = len(config.scales) > 1 or config.flip
    return header(setting) + recipe.notes(setting.plan, config.engine.precision, setting.device, views)


def evaluate_segmentor(given: SegmentConfig) -> dict[str, Any]:
    """Evaluate a finished segmentor, given as `backbone`, on the validation images.

    What labels mean, how large images are and how windows lie is as the directory says, but where keys say otherwise.

    Returns: the content of summary.json.
    """
    with joined(given.engine.timeout_s) as processes, console_logging(processes.is_main):
        agree_on_run(processes, given, "eval", PATHS)
        require_alone(given.framework, processes)
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
            if config.framework == "mmseg":
                confusion = _mmseg_engine().evaluate_mmseg(evaluator, loaded)
            else:
                confusion = evaluator(loaded.model.to(device).eval())
            return processes.on_main(
                lambda: write_results(writer, config, loaded.classes, len(pairs), confusion, {"segmentor": digest})
            )


# ---- what is opened -------------------------------------------------------------------------------------------------


def open_inputs(config: SegmentConfig) -> Inputs:
    """Labels, images and backbone. Raises: ConfigError, DataError or CheckpointError for what cannot be used."""
    classes = open_classes(config)
    table = label_table(config, len(classes))
    train, val = _open_set(config, "train"), _open_set(config, "val")
    inputs = Inputs(train, val, classes, table, *_open_backbone(config))
    require_fitting(config, inputs)
    if config.framework == "mmseg":
        sizes = head_sizes(config, len(classes))
        recipe.require_possible(inputs.vit.config, sizes, config.inference.settled(config.img_size))
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
    inference = settled.inference.settled(config.img_size)
    require_windows(loaded.model.backbone.config, inference)
    if config.framework == "mmseg":
        recipe.require_possible(loaded.model.backbone.config, loaded.model.config, inference)
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
    begun = Begun(config, plan, setting.device, processes, writer, console, info)
    if config.framework == "mmseg":
        evaluator = _evaluator_of(setting, processes)
        progress, broken = _mmseg_engine().fit_mmseg(task, evaluator, setting, checkpoint, begun)
        return finish(setting, task, broken, progress, writer)
    run = begun.fit_of(
        task, lambda: adamw(parameter_groups(config, task.part), config.optim), rate(config), config.optim.clip_grad
    )
    prepare = PrepareSegmentation(setting.inputs.train, setting.inputs.table, config.img_size, config.augment)
    feed = image_feed(
        setting.inputs.train.images, config, plan, prepare, Collate(config.img_size, config.ignore_index), 3,
        setting.num_workers, checkpoint, processes,
    )  # fmt: skip
    progress = fit(task, feed, checkpoint, run)
    if task.latest is None:  # the run was finished before
        task.evaluate(progress.step)
    return processes.on_main(lambda: finish(setting, task, feed.broken, progress, writer))


def _mmseg_engine() -> ModuleType:
    from transfer.segmentation.mmseg_engine.operators import stand_in

    stand_in()
    from transfer.segmentation.mmseg_engine import run

    return run


def build_task(setting: Setting, processes: Processes) -> SegmentationTask:
    """Network and evaluator on the device, all but the ViT drawn from the seed."""
    config = setting.config
    model = setting.network(setting.inputs.vit)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    if synchronised(setting.device, processes):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    labeller = Labeller(setting.inference, setting.device, config.eval_precision)
    return SegmentationTask(
        model.to(setting.device), config.drop_path, config.seed, _evaluator_of(setting, processes), processes,
        build=lambda: setting.network(ViT(setting.inputs.vit.config)),
        draw=lambda model: draw_validation(setting, labeller, model),
    )  # fmt: skip


def _evaluator_of(setting: Setting, processes: Processes) -> SegmentationEvaluator:
    inputs = setting.inputs
    return _evaluator(
        setting.config, inputs.val, len(inputs.classes), inputs.vit.config, setting.inference, setting.device, processes
    )


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
