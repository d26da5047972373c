"""What a classification run is given, and what follows from it before anything is built."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from core import start
from core.checkpoint import Checkpoint
from core.config import Config
from core.cost import BF16_SHARE, encoder_flops, encoder_parameters, held_values, patch_embed_flops
from core.datasets import ImageSource
from core.distributed import Processes
from core.engine import Plan, uses_bf16
from core.errors import shown
from core.machine import choose_device
from core.optim import OptimConfig, peak_lr
from core.start import RunConfig, accumulation_of, batch_line, choose_workers, require_batch
from core.transforms import AugmentConfig
from core.vit import ViT, ViTConfig
from transfer.classification.augment import MixConfig, RandAugmentConfig

# The paths of the backbone and of the test set may change when a run goes on; that they hold the same is checked.
HARMLESS_KEYS = (*start.HARMLESS_KEYS, "backbone", "test_data", "test_labels")


class ClassifyAugment(AugmentConfig):
    """Random resized crop and flip of both trained protocols."""

    min_scale: float = Field(0.08, gt=0, le=1)


class FinetuneOptim(OptimConfig):
    """AdamW of the published fine-tuning."""

    min_lr: float = Field(1e-6, ge=0)  # scaled by layer like the rate itself
    beta2: float = Field(0.999, ge=0, lt=1)


class FinetuneConfig(Config):
    """All weights are trained. Defaults: MAE's ViT-B but for drop_path and layer_decay, which go by size."""

    epochs: PositiveInt = 100
    warmup_epochs: NonNegativeFloat = 5
    blr: float = Field(5e-4, ge=0)
    weight_decay: NonNegativeFloat = 0.05
    layer_decay: float = Field(0.75, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    pool: Literal["mean", "cls"] = "mean"
    reprob: float = Field(0.25, ge=0, le=1)  # share of images of which a part is erased
    rand_augment: RandAugmentConfig = RandAugmentConfig()
    mix: MixConfig = MixConfig()
    optim: FinetuneOptim = FinetuneOptim()


class LinprobeConfig(Config):
    """A linear layer on the frozen class token, trained with LARS. Defaults: MAE's ViT-B."""

    epochs: PositiveInt = 90
    warmup_epochs: NonNegativeFloat = 10
    blr: float = Field(0.1, ge=0)
    lr: float | None = Field(None, ge=0)  # absolute peak rate; None: blr * batch_size / 256
    min_lr: float = Field(0.0, ge=0)
    weight_decay: NonNegativeFloat = 0.0


class KnnConfig(Config):
    """Weighted k-NN of the test images among the training images."""

    k: tuple[PositiveInt, ...] = (10, 20, 100, 200)
    temperature: float = Field(0.07, gt=0)


class ClassifyConfig(RunConfig):
    """Everything that `rcmae classify` reads: common keys, and a group for each protocol.

    `data` is an ImageFolder or tar with train/ and val/, or one ImageFolder of which every fifth image is tested on.
    """

    backbone: Path  # backbone directory, or a file of MAE, RC-MAE, timm, Hugging Face
    protocol: Literal["finetune", "linprobe", "knn"] = "finetune"
    init: Literal["backbone", "random"] = "backbone"  # random: the backbone's sizes, weights drawn from the seed
    branch: Literal["teacher", "student"] = "teacher"  # of an RC-MAE pretraining file
    num_heads: PositiveInt | None = None  # for files of sizes that are not published ones
    test_data: str | None = None  # images to test on that do not lie below data
    test_labels: Path | None = None  # lines `NAME CLASS`, where these lie flat
    img_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None  # None: the backbone's
    crop_ratio: float | None = Field(None, gt=0, le=1)  # of the evaluation; None: 0.875, above 224 px all
    mean: tuple[float, ...] | None = None  # None: those of the backbone directory, else ImageNet's
    std: tuple[float, ...] | None = None
    batch_size: PositiveInt = 1024
    augment: ClassifyAugment = ClassifyAugment()
    finetune: FinetuneConfig = FinetuneConfig()
    linprobe: LinprobeConfig = LinprobeConfig()
    knn: KnnConfig = KnnConfig()

    def contradictions(self) -> Iterator[str]:
        """Keys that cannot hold together."""
        yield from super().contradictions()
        changed = self.changed()
        for group in sorted(changed & {"finetune", "linprobe", "knn"} - {self.protocol}):
            yield f"{group}: has no effect with protocol={self.protocol}; remove one of the two"
        if self.protocol == "knn" and "augment" in changed:
            yield "augment: has no effect with protocol=knn, which trains nothing"
        trained = self.trained
        if trained is not None and trained.warmup_epochs >= trained.epochs:
            where = self.protocol
            yield f"{where}.warmup_epochs={trained.warmup_epochs:g}: must be below {where}.epochs={trained.epochs}"
        if (self.mean is None) != (self.std is None):
            yield "mean and std: give both or none"
        if self.engine.parallel == "fsdp2" and self.protocol == "linprobe":
            yield "engine.parallel=fsdp2 and protocol=linprobe: one linear layer needs no sharding; use ddp"

    @property
    def trained(self) -> FinetuneConfig | LinprobeConfig | None:
        """The group of the protocol, where it trains."""
        return {"finetune": self.finetune, "linprobe": self.linprobe}.get(self.protocol)  # type: ignore[return-value]

    def target_size(self) -> tuple[int, int] | None:
        """(height, width) of the input, where it is given."""
        if self.img_size is None or isinstance(self.img_size, tuple):
            return self.img_size
        return self.img_size, self.img_size


@dataclass(frozen=True)
class Setting:
    """What follows from configuration, backbone, data and machine."""

    config: ClassifyConfig
    backbone: ViT
    digest: str  # of the backbone's weights
    train: ImageSource
    test: ImageSource
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float
    device: torch.device
    num_workers: int  # loader workers of each process
    plan: Plan | None  # None where nothing is trained

    @property
    def vit(self) -> ViTConfig:
        """Sizes of the backbone."""
        return self.backbone.config

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        config = self.config
        if config.protocol == "linprobe":
            return peak_lr(config.linprobe.blr, config.batch_size, config.linprobe.lr)
        return peak_lr(config.finetune.blr, config.batch_size, config.finetune.optim.lr)


def settle(
    config: ClassifyConfig,
    backbone: ViT,
    digest: str,
    sets: tuple[ImageSource, ImageSource],
    normalization: tuple[tuple[float, ...], tuple[float, ...]],
    checkpoint: Checkpoint | None,
    processes: Processes,
) -> Setting:
    """Work out device, batches and workers. Raises: ConfigError where data, batch and processes do not fit together."""
    device = choose_device(config.device, processes.local_rank)
    train, test = sets
    plan = None
    if config.trained is not None:
        require_batch(config, len(train))
        per_image, fixed = memory_bytes(config, backbone.config, device)
        accumulation = accumulation_of(config, checkpoint, device, processes, per_image, fixed)
        plan = Plan(len(train), config.batch_size, accumulation, config.trained.epochs, processes.size)
    mean, std = (config.mean, config.std) if config.mean and config.std else normalization
    ratio = config.crop_ratio or (0.875 if max(backbone.config.img_size) <= 224 else 1.0)
    workers = choose_workers(config.loader, device, processes)
    return Setting(config, backbone, digest, train, test, mean, std, ratio, device, workers, plan)


def memory_bytes(config: ClassifyConfig, vit: ViTConfig, device: torch.device) -> tuple[int, int]:
    """About what one image takes between forward and backward, and what does not depend on the batch."""
    parameters = encoder_parameters(vit)
    share = BF16_SHARE if uses_bf16(device, config.engine.precision) else 1.0
    values = held_values(vit, vit.num_patches + 1)
    if config.protocol == "linprobe":  # no graph: one block at a time
        return int(4 * share * values / vit.depth), 4 * parameters
    return int(4 * share * values), 4 * 4 * parameters


def checkpoint_bytes(config: ClassifyConfig, vit: ViTConfig, num_classes: int) -> int:
    """Disk space of one checkpoint: what is trained, and its moments."""
    head = (vit.embed_dim + 1) * num_classes
    if config.protocol == "linprobe":
        return 4 * (2 * head + 2 * vit.embed_dim)
    return 3 * 4 * (encoder_parameters(vit) + vit.num_patches * vit.embed_dim + head)


def step_flops(config: ClassifyConfig, vit: ViTConfig, num_classes: int) -> int:
    """FLOPs per image of one training step, or of the features of one image for k-NN."""
    forward = encoder_flops(vit, vit.num_patches) + patch_embed_flops(vit)
    head = 2 * vit.embed_dim * num_classes
    if config.protocol == "finetune":
        return 3 * (forward + head) - patch_embed_flops(vit)
    return forward + (3 * head if config.protocol == "linprobe" else 0)


def header(setting: Setting) -> list[str]:
    """Everything that was decided, one line each."""
    config, vit, plan = setting.config, setting.vit, setting.plan
    classes = len(setting.train.classes)
    source = "random weights of the sizes of " if config.init == "random" else ""
    flops = step_flops(config, vit, classes)
    lines = [
        f"protocol   {config.protocol}",
        f"backbone   {source}{shown(config.backbone)}: ViT {vit.embed_dim} x {vit.depth}, {vit.num_heads} heads, patch "
        f"{vit.patch_size}, {vit.img_size[0]}x{vit.img_size[1]} px; weights {setting.digest}",
        f"data       {shown(setting.train.origin)}: {len(setting.train)} images; {shown(setting.test.origin)}: "
        f"{len(setting.test)} to test on; {classes} classes; {setting.num_workers} loader workers",
    ]
    if plan is not None and config.trained is not None:
        left_out = plan.num_images - plan.steps_per_epoch * plan.batch_size
        how = {"finetune": "AdamW, layer_decay " + f"{config.finetune.layer_decay:g}", "linprobe": "LARS"}
        lines += [
            batch_line(plan, config),
            f"schedule   {plan.epochs} epochs x {plan.steps_per_epoch} steps = {plan.total_steps} steps, {left_out} "
            f"images left out per epoch; warm-up {config.trained.warmup_epochs:g} epochs",
            f"optimizer  {how[config.protocol]}, lr {setting.lr:.4g}",
            f"cost       {flops / 1e9:.4g} GFLOP per image and step, "
            f"{flops * plan.total_steps * plan.batch_size / 1e15:.4g} PFLOP in all",
        ]
    return [
        *lines,
        f"evaluation shorter side / {setting.crop_ratio:g}, central crop, resized with PIL",
        f"machine    {setting.device}, {torch.get_num_threads()} threads, precision {config.engine.precision}, "
        f"torch {torch.__version__}",
        f"out        {shown(config.out)}",
    ]
