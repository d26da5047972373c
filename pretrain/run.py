"""`rcmae pretrain`: from a configuration to a trained and exported backbone."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from core.backbone_io import export_backbone
from core.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from core.compiling import compile_blocks, compiles
from core.config import config_hash
from core.datasets import TRAIN_NAMES, ImageSource, open_images, pick_split
from core.distributed import Planned, Processes, joined
from core.engine import Fit, Progress, fit
from core.errors import ConfigError, DataError, shown
from core.files import FileSystem, require_space
from core.loader import EpochOrder, Feed, StreamedImages, TrainingImages, image_loader, stream_loader
from core.log import RunLog, console_logging, draw_curves, read_metrics
from core.machine import code_digest, environment, git_commit, keep_freed_memory, seed_everything
from core.optim import adamw, decay_groups, warmup_cosine
from core.parallel import Parallel
from core.run_directory import RunDirectory
from core.streams import ShardStream, expand_urls, is_stream
from core.worker import earlier_faults, note_run
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
    with joined(config.engine.timeout_s) as processes, console_logging(processes.is_main) as console:
        facts = environment()
        processes.agree({"code": code_digest(), **{key: facts[key] for key in ("torch", "torchvision", "numpy")}})
        # Where the data lie may differ between machines, what they are may not.
        values = config.model_dump(mode="json", exclude={"data", "cache"})
        processes.agree({"--resume": resume, **{f"configuration: {key}": value for key, value in values.items()}})
        source = processes.first_on_each_machine(lambda: _open_source(config))
        processes.agree({"data": _data_facts(config, source)})
        with _writer(config, processes, fs) as writer:
            checkpoint = _starting_point(writer, resume, config.out, processes)
            setting = settle(config, source, checkpoint, processes)
            return _run(setting, checkpoint, writer, processes, console)


@dataclass(frozen=True)
class Writer:
    """What only the first process has: the run directory, its checkpoints and its log."""

    directory: RunDirectory
    store: CheckpointStore
    log: RunLog


@contextmanager
def _writer(config: PretrainConfig, processes: Processes, fs: FileSystem | None) -> Iterator[Writer | None]:
    writer: list[Writer] = []  # filled on the first process

    def claim() -> None:
        directory = RunDirectory(config.out, config, HARMLESS_KEYS)
        note_run(config.out)
        store = CheckpointStore(directory.path / "checkpoints", config.checkpoint, fs)
        writer.append(Writer(directory, store, RunLog(directory.path, config.log)))
        store.clean()

    try:
        processes.on_main(claim)
        yield writer[0] if writer else None
    finally:
        if writer:
            writer[0].log.close()
            writer[0].directory.close()


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
    return {"images": len(source), "fingerprint": source.fingerprint()}


def _starting_point(writer: Writer | None, resume: str, out: Path, processes: Processes) -> Checkpoint | None:
    """The checkpoint to go on from, chosen and read by the first process and told to the others."""
    found: list[Checkpoint | None] = [None]

    def find() -> dict[str, Any] | None:
        assert writer is not None, "only the first process reads"
        found[0] = _find(writer.store, resume, out)
        if found[0] is None:
            return None
        checkpoint = found[0]
        return {"step": checkpoint.step, "state": checkpoint.state, "digest": checkpoint.digest} | {
            "manifest": checkpoint.manifest
        }

    told = processes.on_main(find)
    if told is None or processes.size == 1:
        return found[0]
    return Checkpoint(tensors=processes.spread(found[0].tensors if found[0] else None), **told)


def _find(store: CheckpointStore, resume: str, out: Path) -> Checkpoint | None:
    newest = store.newest()
    if resume == "auto":
        return newest
    if newest is not None:
        raise ConfigError(
            f"out={shown(out)}: holds a run at step {newest.step}; --resume {shown(resume)} needs another out="
        )
    return None if resume == "never" else read_checkpoint(Path(resume))


def _run(
    setting: Setting, checkpoint: Checkpoint | None, writer: Writer | None, processes: Processes, console: Console
) -> dict[str, Any]:
    config, plan = setting.config, setting.plan
    seed_everything(config.seed)
    keep_freed_memory()
    for line in header(setting):
        logger.info("%s", line)
    info = _info(setting)
    _check_same_data(config.data, checkpoint, info["data"])
    processes.on_main(lambda: _open_log(setting, checkpoint, writer))
    task = build_task(setting, processes)
    compiled = compiles(config.engine.compile, setting.device)
    if compiled:
        compile_blocks(task)
        info["compiled"] = True
    parallel = Parallel(task, config.engine.parallel, processes)
    run = Fit(
        plan=plan,
        config=config.engine,
        log_config=config.log,
        checkpoint_config=config.checkpoint,
        optimizer=adamw(decay_groups(task.named_parameters(), config.weight_decay), config.optim),
        lr_at=lambda step: warmup_cosine(
            plan.epoch(step),
            lr=setting.lr,
            epochs=plan.epochs,
            warmup_epochs=config.warmup_epochs,
            min_lr=config.optim.min_lr,
        ),
        clip_grad=config.optim.clip_grad,
        device=setting.device,
        processes=processes,
        parallel=parallel,
        store=writer.store if writer else None,
        log=writer.log if writer else None,
        console=console,
        info=info,
    )
    feed = _build_feed(setting, checkpoint, processes)
    progress = fit(task, feed, checkpoint, run)
    return processes.on_main(lambda: _finish(setting, feed, progress, writer))


def _open_log(setting: Setting, checkpoint: Checkpoint | None, writer: Writer | None) -> None:
    assert writer is not None, "only the first process logs"
    for fault in earlier_faults():
        logger.warning("started again: %s", fault)
    state_bytes = checkpoint_bytes(setting.vit, setting.decoder, setting.config.method == "rc_mae")
    path = writer.directory.path
    require_space(path, int(2.4 * state_bytes), "room for two checkpoints", None)
    writer.log.open(checkpoint.step if checkpoint else 0, path.name, setting.config.model_dump(mode="json"))


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
    return Probe(
        config.probe, train, test, config.mean, config.std, setting.device, config.engine.precision,
        setting.num_workers, config.loader.timeout_s, processes,
    )  # fmt: skip


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
    stored = checkpoint.state["feed"] if checkpoint else {"broken": {}, "shards": []}
    timeout, channels, most = config.loader.timeout_s, setting.vit.in_chans, config.loader.max_pixels
    shards: list[int] = []
    if setting.source is None:
        stream = ShardStream(expand_urls(config.data), config.seed)
        first = min(stored["shards"], default=0)
        shards = [first] * max(1, setting.num_workers)
        streamed = StreamedImages(
            stream, config.seed, prepare, collate, plan.micro_batch, first, channels, most, processes.rank,
            processes.size,
        )  # fmt: skip
        loader = stream_loader(streamed, setting.num_workers, timeout)
    else:
        step = checkpoint.step if checkpoint else 0
        order = EpochOrder(
            setting.num_images, plan.batch_size, plan.micro_batch, config.seed, step, plan.total_steps, processes.rank,
            processes.size,
        )  # fmt: skip
        images = TrainingImages(setting.source, config.seed, prepare, channels, most)
        loader = image_loader(images, order, collate, setting.num_workers, timeout)
    max_broken = config.loader.max_broken_share * setting.num_images
    return Feed(loader, plan.accumulation, max_broken, dict(stored["broken"]), shards)


def _check_same_data(data: str, checkpoint: Checkpoint | None, now: dict[str, Any]) -> None:
    if checkpoint is None:
        return
    before = checkpoint.manifest["info"]["data"]
    if before != now:
        raise DataError(
            f"{shown(data)}: {now['images']} images (list {now['fingerprint']}), but the run was "
            f"started with {before['images']} (list {before['fingerprint']}); bring those back, or give another out="
        )


def _info(setting: Setting) -> dict[str, Any]:
    facts = environment()
    keys = ("torch", "torchvision", "numpy", "threads", "instruction_set", "gpu", "git_commit")
    return {
        **{key: facts[key] for key in keys},
        "device": setting.device.type,
        "config": config_hash(setting.config),
        "data": _data_facts(setting.config, setting.source),
    }


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
