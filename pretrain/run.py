"""`rcmae pretrain`: from a configuration to a trained and exported backbone."""

import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from core.backbone_io import export_backbone
from core.checkpoint import Checkpoint
from core.config import config_hash
from core.datasets import TRAIN_NAMES, ImageSource, open_images, pick_split
from core.distributed import Planned, Processes
from core.engine import Progress, fit
from core.errors import shown
from core.features import FeatureExtractor
from core.files import FileSystem
from core.loader import Feed, StreamedImages, stream_loader
from core.log import console_logging, draw_curves, read_metrics
from core.machine import git_commit
from core.optim import adamw, decay_groups, warmup_cosine
from core.start import (
    Begun,
    Writer,
    begin,
    data_facts,
    entered,
    image_feed,
    open_log,
    require_same_data,
    run_info,
)
from core.streams import ShardStream, expand_urls, is_stream
from pretrain.cost import checkpoint_bytes
from pretrain.data import PrepareSample, collate
from pretrain.dynamics import Dynamics, draw_dynamics
from pretrain.mae import MaskedAutoencoder
from pretrain.probe import Probe, open_probe_sets
from pretrain.rc_mae import Method, RCMAETask
from pretrain.reconstructions import Reconstructions, choose_images, fixed_noise
from pretrain.settings import HARMLESS_KEYS, PretrainConfig, Setting, header, settle

logger = logging.getLogger("rcmae")


def pretrain(config: PretrainConfig, resume: str = "auto", fs: FileSystem | None = None) -> dict[str, Any]:
    """Train, export and summarise one run; go on where an earlier one stopped.

    Args:
        resume: "auto" goes on from out=, "never" refuses an out= that holds a run, a path starts from that checkpoint.
        fs: file layer of the checkpoints; tests pass one that crashes.
    Returns: the content of summary.json.
    Raises: the errors of `core.errors`, each with the exit code of its kind.
    """
    with entered(
        config, resume, fs, harmless=HARMLESS_KEYS,
        opened=lambda processes: processes.first_on_each_machine(lambda: _open_source(config)),
        facts=lambda source: {"data": _data_facts(config, source)},
    ) as run:  # fmt: skip
        setting = settle(config, run.inputs, run.checkpoint, run.processes)
        return _run(setting, run.checkpoint, run.writer, run.processes, run.console)


def dry_run(config: PretrainConfig, num_processes: int = 1, local_size: int = 1) -> list[str]:
    """The header of a run that is not started. Raises what the start would raise about data and batch."""
    with console_logging():
        return header(settle(config, _open_source(config), None, Planned(size=num_processes, local_size=local_size)))


def _open_source(config: PretrainConfig) -> ImageSource | None:
    if is_stream(config.data):
        expand_urls(config.data)
        return None
    whole = open_images(config.data, config.cache.expanduser())
    return pick_split(whole, TRAIN_NAMES) or whole


def _data_facts(config: PretrainConfig, source: ImageSource | None) -> dict[str, Any]:
    if source is None:
        return {"images": config.loader.stream_images, "fingerprint": config.data}
    return data_facts(source)


def _run(
    setting: Setting, checkpoint: Checkpoint | None, writer: Writer | None, processes: Processes, console: Console
) -> dict[str, Any]:
    config, plan = setting.config, setting.plan
    begin(config, header(setting))
    info = run_info(config, setting.device, _data_facts(config, setting.source))
    require_same_data(config.data, checkpoint, info["data"])
    state_bytes = checkpoint_bytes(setting.vit, setting.decoder, config.method == "rc_mae")
    processes.on_main(lambda: open_log(writer, config, checkpoint, state_bytes))
    task = build_task(setting, processes)
    run = Begun(config, plan, setting.device, processes, writer, console, info).fit_of(
        task,
        lambda: adamw(decay_groups(task.named_parameters(), config.weight_decay), config.optim),
        lambda step: warmup_cosine(
            plan.epoch(step),
            lr=setting.lr,
            epochs=plan.epochs,
            warmup_epochs=config.warmup_epochs,
            min_lr=config.optim.min_lr,
        ),
        config.optim.clip_grad,
    )
    feed = _build_feed(setting, checkpoint, processes)
    progress = fit(task, feed, checkpoint, run)
    return processes.on_main(lambda: _finish(setting, feed, progress, writer))


def build_task(setting: Setting, processes: Processes) -> RCMAETask:
    """Networks, method, probe and pictures on the device, initialised from the seed."""
    config = setting.config
    generator = torch.Generator().manual_seed(config.seed)
    student = MaskedAutoencoder(setting.vit, setting.decoder)
    student.init_weights(generator)
    student.to(setting.device)
    teacher = None
    if config.method == "rc_mae":
        teacher = MaskedAutoencoder(setting.vit, setting.decoder).to(setting.device)
    every = config.dynamics.every_steps
    return RCMAETask(
        student,
        teacher,
        _method(config, setting.plan.total_steps),
        _build_probe(setting, processes),
        _build_pictures(setting),
        Dynamics(every, student, teacher, processes) if every else None,
    )


def _method(config: PretrainConfig, total_steps: int) -> Method:
    return Method(
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
        gamma=config.gamma,
        momentum=config.momentum,
        teacher=config.teacher,
        total_steps=total_steps,
        mean=config.mean,
        std=config.std,
    )


def _build_probe(setting: Setting, processes: Processes) -> Probe | None:
    config = setting.config
    if config.probe.data is None:
        return None
    train, test = processes.first_on_each_machine(lambda: open_probe_sets(config.probe, config.cache.expanduser()))
    logger.info(
        "probe      %s: %d and %d images, %d classes",
        shown(config.probe.data),
        len(train),
        len(test),
        len(train.classes),
    )
    features_of = FeatureExtractor(
        config.mean, config.std, config.probe.crop_ratio, setting.device, config.engine.precision,
        setting.num_workers, config.loader.timeout_s, processes,
    )  # fmt: skip
    return Probe(config.probe, train, test, features_of)


def _build_pictures(setting: Setting) -> Reconstructions | None:
    config = setting.config
    if setting.source is None:
        return None
    images = choose_images(setting.source, config.picture_images, setting.vit.img_size, setting.vit.in_chans)
    noise = fixed_noise(config.seed, len(images), setting.vit.num_patches)
    return Reconstructions(images, noise, config.mask_ratio, config.norm_pix_loss, config.mean, config.std)


def _build_feed(setting: Setting, checkpoint: Checkpoint | None, processes: Processes) -> Feed:
    config, plan = setting.config, setting.plan
    own_mask = config.method == "rc_mae" and config.teacher.mask == "own"
    prepare = PrepareSample(setting.vit.img_size, setting.vit.num_patches, config.augment, own_mask)
    channels, most = setting.vit.in_chans, config.loader.max_pixels
    if setting.source is not None:
        return image_feed(
            setting.source, config, plan, prepare, collate, channels, setting.num_workers, checkpoint, processes
        )
    stored = checkpoint.state["feed"] if checkpoint else {"broken": {}, "shards": []}
    first = min(stored["shards"], default=0)
    streamed = StreamedImages(
        ShardStream(expand_urls(config.data), config.seed), config.seed, prepare, collate, plan.micro_batch, first,
        channels, most, processes.rank, processes.size,
    )  # fmt: skip
    loader = stream_loader(streamed, setting.num_workers, config.loader.timeout_s)
    max_broken = config.loader.max_broken_share * setting.num_images
    shards = [first] * max(1, setting.num_workers)
    return Feed(loader, plan.accumulation, max_broken, dict(stored["broken"]), shards)


def _finish(setting: Setting, feed: Feed, progress: Progress, writer: Writer | None) -> dict[str, Any]:
    """Export, draw and summarise; the first process alone."""
    assert writer is not None, "only the first process writes"
    config, directory = setting.config, writer.directory
    branch = "teacher" if config.method == "rc_mae" else "student"
    newest = writer.store.newest()
    assert newest is not None, "a finished run has a checkpoint"
    model = MaskedAutoencoder(setting.vit, setting.decoder)
    model.load_state_dict(newest.tensors[branch])
    export_branch(directory.path / "backbone", model, config, branch, progress.step)
    rows = read_metrics(directory.path / "metrics.jsonl")
    if config.log.curves:
        draw_curves(rows, directory.path / "curves.png", f"{directory.path.name}: {config.method}")
    if config.dynamics.every_steps:
        draw_dynamics(rows, directory.path / "dynamics.png", f"{directory.path.name}: {config.method}")
    figures: dict[str, float] = {}
    for row in rows:
        figures |= {key: value for key, value in row.items() if value is not None}
    if feed.broken:
        logger.warning(
            "%d broken images were replaced: %s",
            len(feed.broken),
            "; ".join(f"{n}: {r}" for n, r in feed.broken.items()),
        )
    logger.info(
        "done: %s holds the %s backbone, curves.png and pictures/ show the run",
        shown(directory.path / "backbone"),
        branch,
    )
    summary = {
        "status": "done",
        "digest": newest.digest,
        "config": config_hash(config),
        "seed": config.seed,
        "git_commit": git_commit(),
        "images": setting.num_images,
        "images_seen": progress.step * config.batch_size,
        "non_finite_steps": progress.skipped,
        "broken_images": feed.broken,
        "figures": figures,
        "flags": _flags(setting),
    }
    directory.write_summary(summary)
    return summary


def export_branch(folder: Path, model: MaskedAutoencoder, config: PretrainConfig, branch: str, step: int) -> None:
    """Write the backbone of one branch of a run, with where it comes from."""
    provenance = {"branch": branch, "step": step, "method": config.method, "config": config_hash(config)}
    commit = {"git_commit": git_commit()}
    export_backbone(folder, model, provenance | commit, mean=config.mean, std=config.std)


def _flags(setting: Setting) -> list[str]:
    config = setting.config
    flags = [f"precision {config.engine.precision}", f"device {setting.device.type}"]
    if setting.plan.num_processes > 1:
        flags.append(f"{setting.plan.num_processes} processes, {config.engine.parallel}")
    if config.probe.data is not None:
        flags.append(f"probe on at most {config.probe.train_images} + {config.probe.test_images} images")
    return flags
