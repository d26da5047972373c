"""What a pretraining run is given, and what follows from it before anything is built: device, batches, cost, header."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from core import start
from core.checkpoint import Checkpoint
from core.config import Config
from core.datasets import ImageSource
from core.distributed import Processes
from core.engine import Plan, uses_bf16
from core.errors import shown
from core.machine import choose_device
from core.optim import OptimConfig, peak_lr
from core.start import (
    PROGRAM_BYTES,
    RunConfig,
    accumulation_of,
    batch_line,
    choose_workers,
    require_batch,
)
from core.streams import is_stream
from core.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from core.vit import ViTConfig
from pretrain.cost import activation_bytes, checkpoint_bytes, fixed_bytes, num_parameters, step_flops
from pretrain.dynamics import DynamicsConfig
from pretrain.mae import DecoderConfig, num_kept
from pretrain.presets import DECODERS, ENCODERS
from pretrain.probe import ProbeConfig
from pretrain.rc_mae import TeacherConfig

# May differ when a run goes on: where things lie and how they are shown, not what is computed.
HARMLESS_KEYS = (*start.HARMLESS_KEYS, "probe", "dynamics", "picture_images")


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


class PretrainConfig(RunConfig):
    """Everything that `rcmae pretrain` reads; `data` may also be a shard pattern or http(s) shard URLs."""

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
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    picture_images: PositiveInt = 8  # rows of the reconstruction picture
    vit: SizeOverrides = SizeOverrides()
    decoder: DecoderOverrides = DecoderOverrides()
    teacher: TeacherConfig = TeacherConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    probe: ProbeConfig = ProbeConfig()
    dynamics: DynamicsConfig = DynamicsConfig()

    def contradictions(self) -> Iterator[str]:
        """Keys that cannot hold together."""
        changed = self.changed()
        if self.method == "mae":
            for key in sorted(changed & {"gamma", "momentum", "teacher"}):
                yield f"{key}: has no effect with method=mae, which has no teacher; remove one of the two"
        if self.warmup_epochs >= self.epochs:
            yield f"warmup_epochs={self.warmup_epochs:g}: must be below epochs={self.epochs}"
        if self.optim.lr is not None and "blr" in changed:
            yield "optim.lr and blr: both give the learning rate; remove one of the two"
        yield from super().contradictions()
        if self.teacher.update == "micro_batch" and not self.engine.accumulation:
            yield "teacher.update=micro_batch: needs engine.accumulation, which is part of the method then"
        if self.dynamics.every_steps and self.engine.parallel == "fsdp2":
            yield "dynamics.every_steps and engine.parallel=fsdp2: it compares whole gradients; use engine.parallel=ddp"
        if is_stream(self.data) and not self.loader.stream_images:
            yield "loader.stream_images: needed with shard URLs, whose images cannot be counted beforehand"
        faults: list[str] = []
        for build in (self.vit_config, self.decoder_config):
            try:
                build()
            except ValueError as error:
                faults += [str(e["ctx"]["error"]) for e in error.errors() if "ctx" in e]  # type: ignore[attr-defined]
        if faults:
            yield from faults
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
    num_workers: int  # loader workers of each process

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return peak_lr(self.config.blr, self.config.batch_size, self.config.optim.lr)


def settle(
    config: PretrainConfig,
    source: ImageSource | None,
    checkpoint: Checkpoint | None,
    processes: Processes,
) -> Setting:
    """Work out device, batches and workers. Raises: ConfigError where data, batch and processes do not fit together."""
    device = choose_device(config.device, processes.local_rank)
    vit, decoder = config.vit_config(), config.decoder_config()
    num_images = len(source) if source is not None else (config.loader.stream_images or 0)
    require_batch(config, num_images)
    accumulation = accumulation_of(
        config, checkpoint, device, processes,
        activation_bytes(vit, decoder, config.mask_ratio, uses_bf16(device, config.engine.precision)),
        fixed_bytes(vit, decoder, config.method == "rc_mae"),
    )  # fmt: skip
    plan = Plan(num_images, config.batch_size, accumulation, config.epochs, processes.size)
    return Setting(
        config, vit, decoder, device, source, num_images, plan, choose_workers(config.loader, device, processes)
    )


def header(setting: Setting) -> list[str]:
    """Everything that was decided, one line each."""
    config, plan, vit, decoder = setting.config, setting.plan, setting.vit, setting.decoder
    with_teacher = config.method == "rc_mae"
    encoder_size, decoder_size = num_parameters(vit, decoder)
    left_out = setting.num_images - plan.steps_per_epoch * plan.batch_size
    teacher = (
        f"gamma {config.gamma:g}, momentum {config.momentum:g} {config.teacher.schedule} per {config.teacher.update}"
    )
    bf16 = uses_bf16(setting.device, config.engine.precision)
    one = activation_bytes(vit, decoder, config.mask_ratio, bf16)
    memory = PROGRAM_BYTES + fixed_bytes(vit, decoder, with_teacher) + plan.micro_batch * one
    disk = (config.checkpoint.keep + 1) * checkpoint_bytes(vit, decoder, with_teacher)
    flops = step_flops(vit, decoder, config.mask_ratio, with_teacher)
    source = shown(setting.source.origin if setting.source else config.data)
    each = " per process" if plan.num_processes > 1 else ""
    streamed = "" if setting.source else ", streamed: a restart goes on at the shard, not at the image"
    return [
        f"method     {'RC-MAE, ' + teacher if with_teacher else 'MAE'}, mask_ratio {config.mask_ratio:g}"
        f", norm_pix_loss {str(config.norm_pix_loss).lower()}",
        f"model      ViT {vit.embed_dim} x {vit.depth}, {vit.num_heads} heads, patch {vit.patch_size}, "
        f"{vit.img_size[0]}x{vit.img_size[1]} px; decoder {decoder.embed_dim} x {decoder.depth}; "
        f"{encoder_size / 1e6:.2f} + {decoder_size / 1e6:.2f} M parameters",
        f"data       {source}: {setting.num_images} images{streamed}; {setting.num_workers} loader workers{each}",
        batch_line(plan, config),
        f"schedule   {config.epochs} epochs x {plan.steps_per_epoch} steps = {plan.total_steps} steps, "
        f"{left_out} images left out per epoch; warm-up {config.warmup_epochs:g} epochs",
        f"optimizer  AdamW, lr {setting.lr:.4g} = blr {config.blr:g} x {plan.batch_size} / 256"
        if config.optim.lr is None
        else f"optimizer  AdamW, lr {setting.lr:.4g}",
        f"machine    {setting.device}, {torch.get_num_threads()} threads, precision {config.engine.precision}, "
        f"torch {torch.__version__}",
        f"cost       {flops / 1e9:.4g} GFLOP per image and step, "
        f"{flops * plan.total_steps * plan.batch_size / 1e15:.4g} PFLOP in all; "
        f"about {memory / 2**30:.2f} GiB memory{each}, {disk / 2**20:.0f} MiB disk for checkpoints",
        f"out        {shown(config.out)}",
    ]
