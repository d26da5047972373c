"""`rcmae pretrain`: from a configuration to a trained and exported backbone."""

import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from core.backbone_io import export_backbone
from core.checkpoint import Checkpoint, CheckpointConfig, CheckpointStore, read_checkpoint
from core.config import Config, config_hash
from core.datasets import TRAIN_NAMES, ImageSource, open_images, pick_split
from core.engine import EngineConfig, Fit, Plan, Progress, choose_accumulation, fit
from core.errors import ConfigError, DataError, shown
from core.files import FileSystem, require_space
from core.loader import EpochOrder, Feed, LoaderConfig, StreamedImages, TrainingImages, image_loader, stream_loader
from core.log import LogConfig, RunLog, draw_curves, read_metrics
from core.optim import OptimConfig, adamw, decay_groups, peak_lr, warmup_cosine
from core.run_directory import RunDirectory, environment, git_commit
from core.streams import ShardStream, expand_urls, is_stream
from core.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from core.vit import ViTConfig
from pretrain.cost import activation_bytes, checkpoint_bytes, fixed_bytes, num_parameters, step_flops
from pretrain.data import PrepareSample, collate
from pretrain.mae import DecoderConfig, MaskedAutoencoder, num_kept
from pretrain.presets import DECODERS, ENCODERS
from pretrain.probe import KNNProbe, ProbeConfig, open_probe_sets
from pretrain.rc_mae import Method, RCMAETask, TeacherConfig
from pretrain.reconstructions import Reconstructions, choose_images, fixed_noise

# May differ when a run goes on: where things lie and how they are shown, not what is computed.
HARMLESS_KEYS = (
    "data", "out", "cache", "device", "log", "checkpoint", "loader.num_workers", "loader.timeout_s",
    "loader.max_broken_share", "engine.evaluate_every_steps", "probe", "picture_images",
)  # fmt: skip

logger = logging.getLogger("rcmae")


class SizeOverrides(Config):
    """Sizes that differ from those of `model`; None keeps the preset's."""

    patch_size: PositiveInt | None = None
    in_chans: Literal[1, 3, None] = None  # 3 reads images as RGB, 1 as grey
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    mlp_ratio: float | None = Field(None, gt=0)


class DecoderOverrides(Config):
    """Decoder sizes that differ from those of `model`; None keeps the preset's."""

    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None


class PretrainConfig(Config):
    """Everything that `rcmae pretrain` reads. Flat keys keep MAE's names; `batch_size` is global."""

    data: str  # folder of images, tar, .tgz, shard pattern, or http(s) shard URLs
    out: Path
    cache: Path = Path("~/.cache/rcmae")
    method: Literal["rc_mae", "mae"] = "rc_mae"
    model: Literal["tiny", "small", "base", "large", "huge"] = "base"
    img_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224  # a side, or [height, width]
    batch_size: PositiveInt = 4096
    epochs: PositiveInt = 800
    warmup_epochs: NonNegativeFloat = 40
    blr: float = Field(1.5e-4, ge=0)
    weight_decay: NonNegativeFloat = 0.05
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    norm_pix_loss: bool = True
    gamma: NonNegativeFloat = 1.0
    momentum: float = Field(0.996, ge=0, le=1)
    seed: int = Field(0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    picture_images: PositiveInt = 8  # rows of the reconstruction picture
    vit: SizeOverrides = SizeOverrides()
    decoder: DecoderOverrides = DecoderOverrides()
    teacher: TeacherConfig = TeacherConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    loader: LoaderConfig = LoaderConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe: ProbeConfig = ProbeConfig()
    log: LogConfig = LogConfig()

    def contradictions(self) -> Iterator[str]:
        """Keys that cannot hold together."""
        changed = {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}
        if self.method == "mae":
            for key in sorted(changed & {"gamma", "momentum", "teacher"}):
                yield f"{key}: has no effect with method=mae, which has no teacher; remove one of the two"
        if self.warmup_epochs >= self.epochs:
            yield f"warmup_epochs={self.warmup_epochs:g}: must be below epochs={self.epochs}"
        if self.optim.lr is not None and "blr" in changed:
            yield "optim.lr and blr: both give the learning rate; remove one of the two"
        accumulation = self.engine.accumulation
        if accumulation and self.batch_size % accumulation:
            yield f"engine.accumulation={accumulation}: does not divide batch_size={self.batch_size}"
        if self.teacher.update == "micro_batch" and not accumulation:
            yield "teacher.update=micro_batch: needs engine.accumulation, which is part of the method then"
        if is_stream(self.data) and not self.loader.stream_images:
            yield "loader.stream_images: needed with shard URLs, whose images cannot be counted beforehand"
        for build in (self.vit_config, self.decoder_config):
            try:
                build()
            except ValueError as error:
                yield from (str(e["ctx"]["error"]) for e in error.errors() if "ctx" in e)  # type: ignore[attr-defined]
                return
        vit = self.vit_config()
        if not 0 < num_kept(vit.num_patches, self.mask_ratio) < vit.num_patches:
            yield f"mask_ratio={self.mask_ratio}: leaves no patch to see or none to predict of {vit.num_patches}"
        if not len(self.mean) == len(self.std) == vit.in_chans:
            yield f"mean and std: need {vit.in_chans} values each, as vit.in_chans says"

    def vit_config(self) -> ViTConfig:
        """Encoder sizes: the preset's, with overrides."""
        size = self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)
        return ViTConfig(img_size=size, **{**ENCODERS[self.model], **self.vit.model_dump(exclude_none=True)})

    def decoder_config(self) -> DecoderConfig:
        """Decoder sizes: the preset's, with overrides."""
        return DecoderConfig(**{**DECODERS[self.model], **self.decoder.model_dump(exclude_none=True)})


@dataclass(frozen=True)
class Setting:
    """What follows from configuration, data and machine before anything is built."""

    config: PretrainConfig
    vit: ViTConfig
    decoder: DecoderConfig
    device: torch.device
    source: ImageSource | None  # None for a stream
    num_images: int
    plan: Plan
    num_workers: int

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return peak_lr(self.config.blr, self.config.batch_size, self.config.optim.lr)


def pretrain(config: PretrainConfig, resume: str = "auto", fs: FileSystem | None = None) -> dict[str, Any]:
    """Train, export and summarise one run; go on where an earlier one stopped.

    Args:
        resume: "auto" goes on from out=, "never" refuses an out= that holds a run, a path starts from that checkpoint.
        fs: file layer of the checkpoints; tests pass one that crashes.
    Returns: the content of summary.json.
    Raises: the errors of `core.errors`, each with the exit code of its kind.
    """
    source = _open_source(config)
    directory = RunDirectory(config.out, config, HARMLESS_KEYS)
    log = RunLog(directory.path, config.log)
    try:
        store = CheckpointStore(directory.path / "checkpoints", config.checkpoint, fs)
        store.clean()
        checkpoint = _starting_point(store, resume, config.out)
        setting = settle(config, source, checkpoint)
        summary = _run(setting, checkpoint, store, directory, log)
        directory.write_summary(summary)
        return summary
    finally:
        log.close()
        directory.close()


def settle(config: PretrainConfig, source: ImageSource | None, checkpoint: Checkpoint | None) -> Setting:
    """Work out device, batches and workers. Raises: ConfigError where data and batch do not fit together."""
    device = choose_device(config.device)
    vit, decoder = config.vit_config(), config.decoder_config()
    num_images = len(source) if source is not None else (config.loader.stream_images or 0)
    if num_images < config.batch_size:
        raise ConfigError(f"batch_size={config.batch_size}: more than the {num_images} images of data; lower it")
    accumulation = config.engine.accumulation
    if accumulation is None and checkpoint is not None:
        accumulation = checkpoint.state["accumulation"]  # another would change the order of sums
    if accumulation is None:
        bf16 = device.type == "cuda" if config.engine.precision == "auto" else config.engine.precision == "bf16"
        accumulation = choose_accumulation(
            config.batch_size,
            activation_bytes(vit, decoder, config.mask_ratio, bf16),
            fixed_bytes(vit, decoder, config.method == "rc_mae"),
            available_bytes(device),
        )
    cores = os.cpu_count() or 1
    num_workers = config.loader.num_workers
    if num_workers is None:
        num_workers = max(1, cores // 2) if device.type == "cpu" else min(16, cores)
    plan = Plan(num_images, config.batch_size, accumulation, config.epochs)
    return Setting(config, vit, decoder, device, source, num_images, plan, num_workers)


def header(setting: Setting) -> list[str]:
    """Everything that was decided, one line each."""
    config, plan, vit, decoder = setting.config, setting.plan, setting.vit, setting.decoder
    with_teacher = config.method == "rc_mae"
    encoder_size, decoder_size = num_parameters(vit, decoder)
    left_out = setting.num_images - plan.steps_per_epoch * plan.batch_size
    teacher = f"gamma {config.gamma:g}, momentum {config.momentum:g} {config.teacher.schedule} per {config.teacher.update}"
    one = activation_bytes(vit, decoder, config.mask_ratio, setting.device.type == "cuda")
    memory = fixed_bytes(vit, decoder, with_teacher) + plan.micro_batch * one
    disk = (config.checkpoint.keep + 1) * checkpoint_bytes(vit, decoder, with_teacher)
    flops = step_flops(vit, decoder, config.mask_ratio, with_teacher)
    source = shown(setting.source.origin if setting.source else config.data)
    streamed = "" if setting.source else ", streamed: a restart goes on at the shard, not at the image"
    return [
        f"method     {'RC-MAE, ' + teacher if with_teacher else 'MAE'}, mask_ratio {config.mask_ratio:g}"
        f", norm_pix_loss {str(config.norm_pix_loss).lower()}",
        f"model      ViT {vit.embed_dim} x {vit.depth}, {vit.num_heads} heads, patch {vit.patch_size}, "
        f"{vit.img_size[0]}x{vit.img_size[1]} px; decoder {decoder.embed_dim} x {decoder.depth}; "
        f"{encoder_size / 1e6:.2f} + {decoder_size / 1e6:.2f} M parameters",
        f"data       {source}: {setting.num_images} images{streamed}; {setting.num_workers} loader workers",
        f"batch      effective {plan.batch_size} = {plan.micro_batch} per process x 1 process x {plan.accumulation} accumulated",
        f"schedule   {config.epochs} epochs x {plan.steps_per_epoch} steps = {plan.total_steps} steps, "
        f"{left_out} images left out per epoch; warm-up {config.warmup_epochs:g} epochs",
        f"optimizer  AdamW, lr {setting.lr:.4g} = blr {config.blr:g} x {plan.batch_size} / 256"
        if config.optim.lr is None
        else f"optimizer  AdamW, lr {setting.lr:.4g}",
        f"machine    {setting.device}, {torch.get_num_threads()} threads, precision {config.engine.precision}, "
        f"torch {torch.__version__}",
        f"cost       {flops / 1e9:.4g} GFLOP per image and step, {flops * plan.total_steps * plan.batch_size / 1e15:.4g} PFLOP in all; "
        f"about {memory / 2**30:.2f} GiB memory, {disk / 2**20:.0f} MiB disk for checkpoints",
        f"out        {shown(config.out)}",
    ]


def dry_run(config: PretrainConfig) -> list[str]:
    """The header of a run that is not started. Raises what the start would raise about data and batch."""
    return header(settle(config, _open_source(config), None))


def _open_source(config: PretrainConfig) -> ImageSource | None:
    if is_stream(config.data):
        expand_urls(config.data)
        return None
    whole = open_images(config.data, config.cache.expanduser())
    return pick_split(whole, TRAIN_NAMES) or whole


def _starting_point(store: CheckpointStore, resume: str, out: Path) -> Checkpoint | None:
    newest = store.newest()
    if resume == "auto":
        return newest
    if newest is not None:
        raise ConfigError(f"out={shown(out)}: holds a run at step {newest.step}; --resume {shown(resume)} needs another out=")
    return None if resume == "never" else read_checkpoint(Path(resume))


def _run(
    setting: Setting, checkpoint: Checkpoint | None, store: CheckpointStore, directory: RunDirectory, log: RunLog
) -> dict[str, Any]:
    config, plan = setting.config, setting.plan
    seed_everything(config.seed)
    for line in header(setting):
        logger.info("%s", line)
    state_bytes = checkpoint_bytes(setting.vit, setting.decoder, config.method == "rc_mae")
    require_space(directory.path, int(2.4 * state_bytes), "room for two checkpoints", None)
    _check_same_data(setting, checkpoint)
    log.open(checkpoint.step if checkpoint else 0, directory.path.name, config.model_dump(mode="json"))
    task = build_task(setting)
    run = Fit(
        plan=plan,
        config=config.engine,
        log_config=config.log,
        checkpoint_config=config.checkpoint,
        optimizer=adamw(decay_groups(task.named_parameters(), config.weight_decay), config.optim),
        lr_at=lambda step: warmup_cosine(
            plan.epoch(step), lr=setting.lr, epochs=plan.epochs, warmup_epochs=config.warmup_epochs, min_lr=config.optim.min_lr
        ),
        clip_grad=config.optim.clip_grad,
        device=setting.device,
        store=store,
        log=log,
        info=_info(setting),
    )
    feed = _build_feed(setting, checkpoint)
    progress = fit(task, feed, checkpoint, run)
    return _finish(setting, task, feed, progress, store, directory)


def build_task(setting: Setting) -> RCMAETask:
    """Networks, method, probe and pictures on the device, initialised from the seed."""
    config = setting.config
    generator = torch.Generator().manual_seed(config.seed)
    student = MaskedAutoencoder(setting.vit, setting.decoder)
    student.init_weights(generator)
    student.to(setting.device)
    teacher = None
    if config.method == "rc_mae":
        teacher = MaskedAutoencoder(setting.vit, setting.decoder).to(setting.device)
    method = Method(
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
        gamma=config.gamma,
        momentum=config.momentum,
        teacher=config.teacher,
        total_steps=setting.plan.total_steps,
        mean=config.mean,
        std=config.std,
    )
    return RCMAETask(student, teacher, method, _build_probe(setting), _build_pictures(setting))


def _build_probe(setting: Setting) -> KNNProbe | None:
    config = setting.config
    if config.probe.data is None:
        return None
    train, test = open_probe_sets(config.probe, config.cache.expanduser())
    logger.info("probe      %s: %d and %d images, %d classes", shown(config.probe.data), len(train), len(test), len(train.classes))
    return KNNProbe(
        config.probe, train, test, config.mean, config.std, setting.device, config.engine.precision,
        setting.num_workers, config.loader.timeout_s,
    )  # fmt: skip


def _build_pictures(setting: Setting) -> Reconstructions | None:
    config = setting.config
    if setting.source is None:
        return None
    images = choose_images(setting.source, config.picture_images, setting.vit.img_size, setting.vit.in_chans)
    noise = fixed_noise(config.seed, len(images), setting.vit.num_patches)
    return Reconstructions(images, noise, config.mask_ratio, config.norm_pix_loss, config.mean, config.std)


def _build_feed(setting: Setting, checkpoint: Checkpoint | None) -> Feed:
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
        streamed = StreamedImages(stream, config.seed, prepare, collate, plan.micro_batch, first, channels, most)
        loader = stream_loader(streamed, setting.num_workers, timeout)
    else:
        step = checkpoint.step if checkpoint else 0
        order = EpochOrder(setting.num_images, plan.batch_size, plan.micro_batch, config.seed, step, plan.total_steps)
        images = TrainingImages(setting.source, config.seed, prepare, channels, most)
        loader = image_loader(images, order, collate, setting.num_workers, timeout)
    max_broken = config.loader.max_broken_share * setting.num_images
    return Feed(loader, plan.accumulation, max_broken, dict(stored["broken"]), shards)


def _check_same_data(setting: Setting, checkpoint: Checkpoint | None) -> None:
    if checkpoint is None:
        return
    before, now = checkpoint.manifest["info"]["data"], _info(setting)["data"]
    if before != now:
        raise DataError(
            f"{shown(setting.config.data)}: {now['images']} images (list {now['fingerprint']}), but the run was started with "
            f"{before['images']} (list {before['fingerprint']}); bring the old data back, or start with another out="
        )


def _info(setting: Setting) -> dict[str, Any]:
    facts = environment()
    fingerprint = setting.source.fingerprint() if setting.source is not None else setting.config.data
    keys = ("torch", "torchvision", "numpy", "threads", "instruction_set", "gpu", "git_commit")
    return {
        **{key: facts[key] for key in keys},
        "device": setting.device.type,
        "config": config_hash(setting.config),
        "rng": global_rng_digest(),
        "data": {"images": setting.num_images, "fingerprint": fingerprint},
    }


def _finish(
    setting: Setting, task: RCMAETask, feed: Feed, progress: Progress, store: CheckpointStore, directory: RunDirectory
) -> dict[str, Any]:
    config = setting.config
    branch = "teacher" if task.teacher is not None else "student"
    provenance = {
        "branch": branch, "step": progress.step, "method": config.method, "config": config_hash(config),
        "git_commit": git_commit(),
    }  # fmt: skip
    export_backbone(directory.path / "backbone", task.exported, provenance, mean=config.mean, std=config.std)
    rows = read_metrics(directory.path / "metrics.jsonl")
    if config.log.curves:
        draw_curves(rows, directory.path / "curves.png", f"{directory.path.name}: {config.method}")
    newest = store.newest()
    assert newest is not None, "a finished run has a checkpoint"
    figures: dict[str, float] = {}
    for row in rows:
        figures |= {key: value for key, value in row.items() if value is not None}
    if feed.broken:
        logger.warning("%d broken images were replaced: %s", len(feed.broken), "; ".join(f"{n}: {r}" for n, r in feed.broken.items()))
    logger.info("done: %s holds the %s backbone, curves.png and pictures/ show the run", shown(directory.path / "backbone"), branch)
    return {
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


def _flags(setting: Setting) -> list[str]:
    config = setting.config
    flags = [f"precision {config.engine.precision}", f"device {setting.device.type}"]
    if config.probe.data is not None:
        flags.append(f"probe on at most {config.probe.train_images} + {config.probe.test_images} images")
    return flags


def choose_device(name: str) -> torch.device:
    """The device of a `device=` value. Raises: ConfigError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no usable GPU; give device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def available_bytes(device: torch.device) -> int:
    """Memory that may still be taken: free memory of the GPU, or available memory of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 * 2**30


def seed_everything(seed: int) -> None:
    """Seed the global generators, which nothing should draw from: `global_rng_digest` tells if something did."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def global_rng_digest() -> str:
    """A short digest of the global generators' states: compared on resume, as a tripwire."""
    import hashlib

    states = (random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tobytes(), torch.get_rng_state().numpy().tobytes())  # type: ignore[index, call-overload]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:12]
