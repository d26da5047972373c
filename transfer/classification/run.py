"""`rcmae classify`: from a backbone and a labelled set to a classifier, or to the figures of k-NN."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from core.backbone_io import load_backbone, stored_normalization, weights_digest
from core.checkpoint import Checkpoint
from core.config import config_hash
from core.datasets import VAL_NAMES, ImageSource, labelled_by_file, labelled_pair, matched, open_images, pick_split
from core.distributed import Processes, joined
from core.engine import Progress, fit
from core.errors import ConfigError, DataError, shown
from core.features import FeatureExtractor
from core.files import FileSystem, replace_file
from core.knn import knn_classify, topk_accuracy_pct
from core.log import console_logging, draw_curves, read_metrics
from core.machine import choose_device, git_commit
from core.optim import LARS, adamw, layer_decay_groups, warmup_cosine
from core.plots import plot
from core.start import (
    Begun,
    Writer,
    agree_on_run,
    begin,
    choose_workers,
    claimed,
    concluded,
    data_facts,
    entered,
    image_feed,
    open_log,
    require_same_backbone,
    require_same_data,
    run_info,
)
from core.transforms import random_crop_box
from core.vit import ViT
from transfer.classification.augment import RandAugmentConfig, crop_box_without_rejection
from transfer.classification.data import PrepareLabelled, collate
from transfer.classification.evaluate import Evaluator, Outcomes, per_class_pct
from transfer.classification.model import Classifier, classifier_from, export_classifier, load_classifier
from transfer.classification.settings import (
    HARMLESS_KEYS,
    ClassifyConfig,
    Setting,
    checkpoint_bytes,
    header,
    settle,
)
from transfer.classification.tasks import FinetuneMethod, FinetuneTask, LinearProbeTask, ProbeHead

MAX_DRAWN_CLASSES = 50  # of the confusion picture
PATHS = ("backbone", "test_data", "test_labels")

logger = logging.getLogger("rcmae")

Trained = FinetuneTask | LinearProbeTask


def classify(config: ClassifyConfig, resume: str = "auto", fs: FileSystem | None = None) -> dict[str, Any]:
    """Train and evaluate one classifier, or evaluate k-NN; go on where an earlier run stopped.

    Args:
        resume: "auto" goes on from out=, "never" refuses an out= that holds a run, a path starts from that checkpoint.
        fs: file layer of the checkpoints; tests pass one that crashes.
    Returns: the content of summary.json.
    Raises: the errors of `core.errors`, each with the exit code of its kind.
    """
    with entered(
        config, resume, fs, harmless=HARMLESS_KEYS, paths=PATHS, opened=lambda processes: _open(config, processes),
        facts=lambda inputs: _facts(*inputs),
    ) as run:  # fmt: skip
        sets, backbone = run.inputs
        normalization = stored_normalization(config.backbone)
        setting = settle(config, backbone, run.facts["backbone"], sets, normalization, run.checkpoint, run.processes)
        begin(config, header(setting))
        if config.protocol == "knn":
            return _knn(setting, run.writer, run.processes)
        return _train(setting, run.checkpoint, run.writer, run.processes, run.console)


def dry_run(config: ClassifyConfig) -> list[str]:
    """The header of a run that is not started. Raises what the start would raise about backbone, data and batch."""
    with console_logging():
        sets, backbone = _open_sets(config), _open_backbone(config)
        normalization = stored_normalization(config.backbone)
        return header(settle(config, backbone, weights_digest(backbone), sets, normalization, None, Processes()))


def evaluate(config: ClassifyConfig) -> dict[str, Any]:
    """Evaluate a finished classifier, given as `backbone`, on the test images of `data`.

    Returns: the content of summary.json.
    """
    with joined(config.engine.timeout_s) as processes, console_logging(processes.is_main):
        agree_on_run(processes, config, "eval", PATHS)
        loaded = processes.together(lambda: load_classifier(config.backbone))
        source = processes.first_on_each_machine(lambda: _open_test_set(config, loaded.classes))
        digest = weights_digest(loaded.model)
        processes.agree({"data": data_facts(source), "backbone": digest})
        with claimed(config, HARMLESS_KEYS, processes, None) as writer:
            device = choose_device(config.device, processes.local_rank)
            workers = choose_workers(config.loader, device, processes)
            evaluator = Evaluator(
                source, loaded.img_size, loaded.model.config.in_chans, loaded.mean, loaded.std,
                config.crop_ratio or loaded.crop_ratio, device, config.engine.precision, workers,
                config.loader.timeout_s, processes,
            )  # fmt: skip
            logger.info("classifier %s, weights %s; %d images", shown(config.backbone), digest, len(source))
            outcomes = evaluator(loaded.model.to(device))
            facts = {"classifier": digest, "test_images": len(source), "flags": _flags(config, device, processes)}
            return processes.on_main(lambda: _write_outcomes(writer, config, outcomes, loaded.classes, facts))


def _open(config: ClassifyConfig, processes: Processes) -> tuple[tuple[ImageSource, ImageSource], ViT]:
    sets = processes.first_on_each_machine(lambda: _open_sets(config))
    return sets, processes.together(lambda: _open_backbone(config))


def _open_sets(config: ClassifyConfig) -> tuple[ImageSource, ImageSource]:
    return labelled_pair(config.data, config.cache.expanduser(), config.test_data, config.test_labels)


def _open_test_set(config: ClassifyConfig, classes: tuple[str, ...]) -> ImageSource:
    whole = open_images(config.test_data or config.data, config.cache.expanduser())
    test = pick_split(whole, VAL_NAMES)
    if test is None and config.test_data is None:
        raise DataError(
            f"{shown(config.data)}: no val/ in it, and it may hold what was trained on; give test_data=FOLDER to "
            "evaluate all images of a folder"
        )
    test = test or whole
    if config.test_labels is not None:
        return labelled_by_file(test, config.test_labels, classes)
    return matched(test, classes, "the classifier")


def _open_backbone(config: ClassifyConfig) -> ViT:
    vit, report = load_backbone(
        config.backbone, branch=config.branch, img_size=config.target_size(), num_heads=config.num_heads
    )
    for line in report.lines():
        logger.info("%s", line)
    if report.new and config.protocol != "finetune":
        raise ConfigError(
            f"{shown(config.backbone)}: has no final norm, as after fine-tuning with mean pooling; protocol="
            f"{config.protocol} needs one: give a pretrained backbone"
        )
    if config.init == "random":
        vit.init_weights(torch.Generator().manual_seed(config.seed))
    return vit


def _facts(sets: tuple[ImageSource, ImageSource], backbone: ViT) -> dict[str, Any]:
    train, test = (data_facts(source) for source in sets)
    return {"data": train, "test data": test, "backbone": weights_digest(backbone)}


def _evaluator(setting: Setting, processes: Processes) -> Evaluator:
    config = setting.config
    return Evaluator(
        setting.test, setting.vit.img_size, setting.vit.in_chans, setting.mean, setting.std, setting.crop_ratio,
        setting.device, config.engine.precision, setting.num_workers, config.loader.timeout_s, processes,
    )  # fmt: skip


# ---- what trains ----------------------------------------------------------------------------------------------------


def _train(
    setting: Setting, checkpoint: Checkpoint | None, writer: Writer | None, processes: Processes, console: Console
) -> dict[str, Any]:
    config, plan, trained = setting.config, setting.plan, setting.config.trained
    assert plan is not None and trained is not None, "k-NN trains nothing"
    info = run_info(config, setting.device, data_facts(setting.train)) | {"backbone": setting.digest}
    require_same_data(config.data, checkpoint, info["data"])
    require_same_backbone(config.backbone, checkpoint, setting.digest)
    state_bytes = checkpoint_bytes(config, setting.vit, len(setting.train.classes))
    processes.on_main(lambda: open_log(writer, config, checkpoint, state_bytes))
    task = build_task(setting, processes)
    run = Begun(config, plan, setting.device, processes, writer, console, info).fit_of(
        task,
        lambda: _optimizer(setting, task),
        lambda step: warmup_cosine(
            plan.epoch(step),
            lr=setting.lr,
            epochs=plan.epochs,
            warmup_epochs=trained.warmup_epochs,
            min_lr=config.finetune.optim.min_lr if config.protocol == "finetune" else config.linprobe.min_lr,
        ),
        config.finetune.optim.clip_grad if config.protocol == "finetune" else None,
    )
    feed = image_feed(
        setting.train, config, plan, _prepare(setting), collate, setting.vit.in_chans, setting.num_workers,
        checkpoint, processes,
    )  # fmt: skip
    progress = fit(task, feed, checkpoint, run)
    if task.latest is None:  # the run was finished before
        task.evaluate(progress.step)
    return processes.on_main(lambda: _finish(setting, task, feed.broken, progress, writer, processes))


def build_task(setting: Setting, processes: Processes) -> Trained:
    """The task of the protocol on the device, its head drawn from the seed."""
    config, num_classes = setting.config, len(setting.train.classes)
    generator = torch.Generator().manual_seed(config.seed)
    evaluator = _evaluator(setting, processes)
    if config.protocol == "linprobe":
        head = ProbeHead(setting.vit.embed_dim, num_classes, generator).to(setting.device)
        backbone = setting.backbone.to(setting.device)
        return LinearProbeTask(backbone, head, setting.mean, setting.std, evaluator, processes)
    finetune = config.finetune
    model = classifier_from(setting.backbone, num_classes, finetune.pool, generator).to(setting.device)
    method = FinetuneMethod(num_classes, finetune.drop_path, finetune.mix, config.seed, setting.mean, setting.std)
    return FinetuneTask(model, method, evaluator)


def _optimizer(setting: Setting, task: Trained) -> torch.optim.Optimizer:
    config = setting.config
    if config.protocol == "linprobe":
        parameters = [parameter for _, parameter in task.named_parameters()]
        return LARS(parameters, weight_decay=config.linprobe.weight_decay)
    finetune = config.finetune
    groups = layer_decay_groups(task.named_parameters(), setting.vit.depth, finetune.layer_decay, finetune.weight_decay)
    return adamw(groups, finetune.optim)


def _prepare(setting: Setting) -> PrepareLabelled:
    config = setting.config
    assert setting.train.labels is not None, "a labelled pair has labels"
    finetune = config.protocol == "finetune"
    return PrepareLabelled(
        img_size=setting.vit.img_size,
        labels=setting.train.labels,
        augment=config.augment,
        draw_box=random_crop_box if finetune else crop_box_without_rejection,
        rand_augment=config.finetune.rand_augment if finetune else RandAugmentConfig(num_ops=0),
        fill=tuple(round(255 * value) for value in setting.mean),
        erase_prob=config.finetune.reprob if finetune else 0.0,
    )


def _finish(
    setting: Setting,
    task: Trained,
    broken: dict[str, str],
    progress: Progress,
    writer: Writer | None,
    processes: Processes,
) -> dict[str, Any]:
    """Export, draw and summarise; the first process alone."""
    assert writer is not None and task.latest is not None, "the first process writes, after an evaluation"
    config, path = setting.config, writer.directory.path
    newest = writer.store.newest()
    assert newest is not None, "a finished run has a checkpoint"
    classes = setting.train.classes
    provenance = {"protocol": config.protocol, "step": progress.step, "config": config_hash(config)}
    export_classifier(
        path / "classifier", exported(setting, newest), classes,
        provenance | {"backbone": setting.digest, "git_commit": git_commit()},
        mean=setting.mean, std=setting.std, crop_ratio=setting.crop_ratio,
    )  # fmt: skip
    rows = read_metrics(path / "metrics.jsonl")
    if config.log.curves:
        draw_curves(rows, path / "curves.png", f"{path.name}: {config.protocol}")
    best = max((row["eval/top1_pct"] for row in rows if "eval/top1_pct" in row), default=0.0)
    facts = {
        "digest": newest.digest,
        "backbone": setting.digest,
        "images": len(setting.train),
        "test_images": len(setting.test),
        "images_seen": progress.step * config.batch_size,
        "best_top1_pct": best,
        "non_finite_steps": progress.skipped,
        "broken_images": broken,
        "flags": _flags(config, setting.device, processes),
    }
    logger.info("done: %s holds the classifier, results.json its accuracy by class", shown(path / "classifier"))
    return _write_outcomes(writer, config, task.latest, classes, facts)


def exported(setting: Setting, checkpoint: Checkpoint) -> Classifier:
    """The classifier of a checkpoint; a probe's normalisation becomes part of its linear layer."""
    num_classes = len(setting.train.classes)
    if setting.config.protocol == "finetune":
        model = Classifier(setting.vit, num_classes, setting.config.finetune.pool)
        model.load_state_dict(checkpoint.tensors["classifier"])
        return model
    head = ProbeHead(setting.vit.embed_dim, num_classes, torch.Generator())
    head.load_state_dict(checkpoint.tensors["head"])
    weight, bias = head.folded()
    model = Classifier(setting.vit, num_classes, "cls")
    model.load_state_dict({**setting.backbone.state_dict(), "head.weight": weight, "head.bias": bias})
    return model


def _write_outcomes(
    writer: Writer | None, config: ClassifyConfig, outcomes: Outcomes, classes: tuple[str, ...], facts: dict[str, Any]
) -> dict[str, Any]:
    assert writer is not None, "only the first process writes"
    path = writer.directory.path
    confusion = outcomes.confusion(len(classes))
    if len(classes) <= MAX_DRAWN_CLASSES:
        _draw_confusion(confusion, classes, path / "confusion.png", path.name)
    figures = outcomes.figures()
    logger.info("%s", "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    summary = {
        **concluded(config),
        "figures": figures,
        **facts,
    }
    by_class = {"per_class_pct": per_class_pct(confusion, classes)}
    replace_file(path / "results.json", json.dumps(summary | by_class, indent=1).encode())
    writer.directory.write_summary(summary)
    return summary


def _draw_confusion(confusion: np.ndarray, classes: tuple[str, ...], path: Path, title: str) -> None:
    """Shares of each true class by predicted class, with the percentages where they can be read."""
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.42 * len(classes)
    with plot(path, (side, side), title, ("predicted class, % of the true",)) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        names = [shown(name, 20) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if len(classes) <= 20:
            for row, column in np.ndindex(shares.shape):
                value = shares[row, column]
                if value >= 0.5:
                    colour = "white" if value > 50 else "black"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)


def _flags(config: ClassifyConfig, device: torch.device, processes: Processes) -> list[str]:
    flags = [f"precision {config.engine.precision}", f"device {device.type}"]
    if config.init == "random":
        flags.append("random initialisation: no pretrained weights")
    if processes.size > 1:
        flags.append(f"{processes.size} processes")
    return flags


# ---- k-NN -----------------------------------------------------------------------------------------------------------


def _knn(setting: Setting, writer: Writer | None, processes: Processes) -> dict[str, Any]:
    """Accuracy for every k on the class token and on the mean of the patch tokens. Spec classify section 4."""
    config = setting.config
    extract = FeatureExtractor(
        setting.mean, setting.std, setting.crop_ratio, setting.device, config.engine.precision, setting.num_workers,
        config.loader.timeout_s, processes,
    )  # fmt: skip
    encoder = setting.backbone.to(setting.device)
    features, labels = extract(encoder, setting.train, "concat")  # [N, 2 D]
    queries, truth = extract(encoder, setting.test, "concat")
    figures: dict[str, float] = {}
    dim = setting.vit.embed_dim
    neighbours = [k for k in config.knn.k if k <= len(labels)]
    if not neighbours:
        raise ConfigError(f"knn.k: {min(config.knn.k)} is more than the {len(labels)} training images; lower it")
    if len(neighbours) < len(config.knn.k):
        logger.warning("knn.k: only up to %d, there are %d training images", max(neighbours), len(labels))
    for name, part in (("cls", slice(0, dim)), ("mean", slice(dim, None))):
        for k in neighbours:
            scores = knn_classify(
                features[:, part], labels, queries[:, part], num_classes=len(setting.train.classes), k=k,
                temperature=config.knn.temperature,
            )  # fmt: skip
            for top in (1, 5):
                figures[f"knn/{name}_k{k}_top{top}_pct"] = topk_accuracy_pct(scores, truth, top)
            logger.info("%s, k = %d: top-1 %.2f %%", name, k, figures[f"knn/{name}_k{k}_top1_pct"])
    return processes.on_main(lambda: _write_knn(setting, figures, writer, processes))


def _write_knn(
    setting: Setting, figures: dict[str, float], writer: Writer | None, processes: Processes
) -> dict[str, Any]:
    assert writer is not None, "only the first process writes"
    config = setting.config
    summary = {
        **concluded(config),
        "backbone": setting.digest,
        "images": len(setting.train),
        "test_images": len(setting.test),
        "figures": figures,
        "flags": _flags(config, setting.device, processes),
    }
    writer.directory.write_summary(summary)
    return summary
