"""What a segmentation run is given, and what follows from it before anything is built."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from core import start
from core.checkpoint import Checkpoint
from core.cost import BF16_SHARE, encoder_parameters, held_values
from core.distributed import Processes
from core.engine import Plan, uses_bf16
from core.errors import ConfigError, shown
from core.machine import choose_device
from core.optim import OptimConfig, decay_groups, decays_but_biases, layer_decay_groups, warmup_poly
from core.start import RunConfig, accumulation_of, batch_line, choose_workers, require_alone, require_batch
from core.vit import ViT, ViTConfig
from transfer.segmentation.augment import AugmentConfig
from transfer.segmentation.classes import Classes
from transfer.segmentation.directory import Head
from transfer.segmentation.labels import LabelKeys, LabelTable
from transfer.segmentation.linear_head import LinearSegmentor, Network
from transfer.segmentation.pairs import SegmentationSet
from transfer.segmentation.segmentor import (
    LabelsConfig,
    Segmentor,
    SegmentorConfig,
    build_segmentor,
    published_blocks,
)
from transfer.segmentation.slide import InferenceConfig, WindowConfig

PATHS = ("backbone", "train_images", "train_labels", "val_images", "val_labels")
# Where the images lie may change when a run goes on; that they are the same is checked.
HARMLESS_KEYS = (*start.HARMLESS_KEYS, *PATHS)
INSTALL_MMSEG = "pip install --no-deps -r requirements-mmseg.lock"
ONLY_UPERNET = ("layer_decay", "drop_path", "rel_pos_bias", "layer_scale", "activation_checkpointing")


class SegmentOptim(OptimConfig):
    """AdamW of the published segmentors."""

    lr: float | None = Field(1e-4, gt=0)
    beta2: float = Field(0.999, ge=0, lt=1)


class InferenceKeys(WindowConfig):
    """How images are brought to labels, with sizes that follow from that of the training crops."""

    crop: PositiveInt | None = None  # side of the windows, in pixels; None: img_size
    stride: PositiveInt | None = None  # from one window to the next; None: two thirds of crop

    def settled(self, img_size: int) -> InferenceConfig:
        """With all sizes, for training crops of `img_size`. Raises: ConfigError for a stride beyond the crop."""
        crop = self.crop or img_size
        stride = self.stride or max(1, crop * 2 // 3)
        if stride > crop:
            raise ConfigError(f"inference.stride={stride}: beyond the windows of {crop} px; give it as inference.crop")
        return InferenceConfig(mode=self.mode, window_batch_size=self.window_batch_size, crop=crop, stride=stride)


class SegmentConfig(RunConfig, LabelKeys):
    """Everything that `rcmae segment` reads. Defaults: MAE's ViT-B with UperNet on ADE20K, spec segmentation 7.

    `data` is a root with images/ and annotations/; the four keys of folders win over it.
    """

    backbone: (
        Path  # backbone directory, or a file of MAE, RC-MAE, timm, Hugging Face; with --eval a segmentor directory
    )
    init: Literal["backbone", "random"] = "backbone"  # random: the backbone's sizes, weights drawn from the seed
    branch: Literal["teacher", "student"] = "teacher"  # of an RC-MAE pretraining file
    framework: Literal["native", "mmseg"] = "native"  # whose network, transforms, optimizer, loop and metric
    num_heads: PositiveInt | None = None  # for files of sizes that are not published ones
    train_images: Path | None = None
    train_labels: Path | None = None
    val_images: Path | None = None
    val_labels: Path | None = None
    head: Head = "upernet"  # linear: batch norm and a 1x1 convolution on the frozen backbone
    img_size: PositiveInt = 512  # side of the training crops
    batch_size: PositiveInt = 16
    steps: PositiveInt = 160000  # optimizer steps
    warmup_steps: NonNegativeInt = 1500
    weight_decay: NonNegativeFloat = 0.05
    layer_decay: float = Field(0.65, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    rel_pos_bias: bool = False  # as published; binds the network to windows of img_size
    layer_scale: bool = False  # as published
    activation_checkpointing: bool = False
    eval_precision: Literal["fp32", "bf16"] = "fp32"
    scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)  # of augment.scale, in evaluations
    flip: bool = False  # evaluate mirror images as well
    segmentor: SegmentorConfig = SegmentorConfig()  # num_classes and ignore_index are those of the labels
    augment: AugmentConfig = AugmentConfig()
    inference: InferenceKeys = InferenceKeys()
    optim: SegmentOptim = SegmentOptim()

    def contradictions(self) -> Iterator[str]:
        """Keys that cannot hold together."""
        yield from super().contradictions()
        if self.warmup_steps >= self.steps:
            yield f"warmup_steps={self.warmup_steps}: must be below steps={self.steps}"
        for key in sorted(self.segmentor.changed() & {"num_classes", "ignore_index"}):
            yield f"segmentor.{key}: is that of the labels; give {key} without segmentor."
        if self.optim.lr is None:
            yield "optim.lr: segmentation has no rule that scales it; give the peak rate"
        if self.optim.min_lr:
            yield "optim.min_lr: has no effect on a rate that ends at zero"
        if self.head == "linear":
            odd = [key for key in ONLY_UPERNET if key in self.changed()]
            odd += [f"segmentor.{key}" for key in sorted(self.segmentor.changed() - {"average"})]
            yield from (f"{key}: has no effect with head=linear, which trains no backbone" for key in odd)
            if self.engine.parallel == "fsdp2":
                yield "engine.parallel=fsdp2 and head=linear: one layer needs no sharding; use ddp"
        if self.framework == "mmseg":
            yield from self._not_in_mmseg()

    def _not_in_mmseg(self) -> Iterator[str]:
        """What this suite does and mmsegmentation does not, or that it is missing."""
        if any(importlib.util.find_spec(name) is None for name in ("mmseg", "mmengine", "mmcv")):
            yield f"framework=mmseg: mmsegmentation is not installed; {INSTALL_MMSEG}"
        lacking = {
            "head=linear": (self.head == "linear", "it has no such head"),
            "activation_checkpointing": (self.activation_checkpointing, "its MAE backbone has none"),
            "engine.compile=on": (self.engine.compile == "on", "its blocks are not compiled"),
            "num_classes=1": (self.num_classes == 1, "it takes the score of a single class for a threshold"),
            "warmup_steps=1": (self.warmup_steps == 1, "mmengine's LinearLR never ends a warm-up of one step"),
        }
        for key, (wanted, why) in lacking.items():
            if wanted:
                yield f"{key}: not with framework=mmseg: {why}"


def rate(config: SegmentConfig) -> Callable[[int], float]:
    """The learning rate at an optimizer step."""
    peak = config.optim.lr
    assert peak is not None, "SegmentConfig refuses none"
    return lambda step: peak * warmup_poly(step, total_steps=config.steps, warmup_steps=config.warmup_steps)


def parameter_groups(config: SegmentConfig, part: nn.Module) -> list[dict]:
    """AdamW's groups of what is trained: no weight decay for 1-D tensors and biases, and of UperNet rates that fall
    from block to block towards the image. Spec segmentation 7.1 and 7.2.

    Args:
        part: a whole `Segmentor`, or the head of a `LinearSegmentor`.
    """  # fmt: skip
    if not isinstance(part, Segmentor):
        return decay_groups(part.named_parameters(), config.weight_decay)
    depth = part.backbone.config.depth
    return layer_decay_groups(
        part.named_parameters(), depth, config.layer_decay, config.weight_decay, prefix="backbone.",
        decays=decays_but_biases,
    )  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What a run is made of, opened and known to fit together.

    Attributes:
        vit: made for the crops; digest: of the backbone's weights.
    """

    train: SegmentationSet
    val: SegmentationSet
    classes: Classes
    table: LabelTable
    vit: ViT
    digest: str


@dataclass(frozen=True)
class Setting:
    """What follows from configuration, inputs and machine."""

    config: SegmentConfig
    inputs: Inputs
    device: torch.device
    num_workers: int  # loader workers of each process
    plan: Plan

    @property
    def inference(self) -> InferenceConfig:
        """How images are brought to labels."""
        return self.config.inference.settled(self.config.img_size)

    def network(self, vit: ViT) -> Network:
        """The network on a ViT, with weights yet to be drawn or loaded."""
        return build_network(vit, head_sizes(self.config, len(self.inputs.classes)))


def head_sizes(config: SegmentConfig, num_classes: int) -> LabelsConfig:
    """Sizes of a head for so many classes: a `SegmentorConfig`, of the linear head what it has of one."""
    labels = {"num_classes": num_classes, "ignore_index": config.ignore_index}
    if config.head == "linear":
        return LabelsConfig(**labels, average=config.segmentor.average)
    return SegmentorConfig(**{**dict(config.segmentor), **labels})


def build_network(vit: ViT, sizes: LabelsConfig) -> Network:
    """UperNet for a `SegmentorConfig`, else the linear head.

    Raises: ConfigError for blocks that the ViT does not have.
    """
    if not isinstance(sizes, SegmentorConfig):
        return LinearSegmentor(vit, sizes)
    try:
        return build_segmentor(vit, sizes)
    except ValueError as error:
        raise ConfigError(f"segmentor.{error}") from None


def require_fitting(config: SegmentConfig, inputs: Inputs) -> None:
    """Raise ConfigError where images, windows or blocks do not fit together, before anything is claimed for a run."""
    require_batch(config, len(inputs.train))
    require_windows(inputs.vit.config, config.inference.settled(config.img_size))
    with torch.device("meta"):
        build_network(ViT(inputs.vit.config), head_sizes(config, len(inputs.classes)))


def settle(config: SegmentConfig, inputs: Inputs, checkpoint: Checkpoint | None, processes: Processes) -> Setting:
    """Work out device, batches and workers. Raises: ConfigError where batch and processes do not fit together."""
    require_alone(config.framework, processes)
    device = choose_device(config.device, processes.local_rank)
    per_image, fixed = memory_bytes(config, inputs.vit.config, len(inputs.classes), device)
    accumulation = accumulation_of(config, checkpoint, device, processes, per_image, fixed)
    plan = Plan(len(inputs.train), config.batch_size, accumulation, 1, processes.size, config.steps)
    if config.head == "upernet" and plan.micro_batch < 2 and not synchronised(device, processes):
        raise ConfigError(
            f"batch_size={config.batch_size}: leaves one image per process and micro-batch, and batch norm of the "
            "pyramid's 1x1 pooling needs two; give a larger batch_size, or a lower engine.accumulation"
        )
    return Setting(config, inputs, device, choose_workers(config.loader, device, processes), plan)


def require_windows(vit: ViTConfig, inference: InferenceConfig) -> None:
    """Raise ConfigError for windows that a network with relative position bias cannot take."""
    if vit.rel_pos_bias and inference.mode == "whole":
        raise ConfigError("inference.mode=whole: rel_pos_bias binds the network to windows; give inference.mode=slide")
    if vit.rel_pos_bias and inference.crop > min(vit.img_size):
        raise ConfigError(
            f"inference.crop={inference.crop}: rel_pos_bias binds the network to windows of {min(vit.img_size)} px; "
            "give no larger ones"
        )


def label_keys(config: SegmentConfig) -> LabelKeys:
    """What a configuration says of labels, alone."""
    return LabelKeys(**{key: getattr(config, key) for key in LabelKeys.model_fields})


def synchronised(device: torch.device, processes: Processes) -> bool:
    """Whether batch norm takes its statistics from all processes: PyTorch's can on GPUs alone."""
    return device.type == "cuda" and processes.size > 1


def memory_bytes(config: SegmentConfig, vit: ViTConfig, num_classes: int, device: torch.device) -> tuple[int, int]:
    """About what one image takes between forward and backward, and what does not depend on the batch."""
    tokens = (config.img_size // vit.patch_size) ** 2
    share = BF16_SHARE if uses_bf16(device, config.engine.precision) else 1.0
    blocks = held_values(vit, tokens)
    parameters = encoder_parameters(vit)
    if config.head == "linear":  # no graph: one block at a time
        return int(4 * (share * blocks / vit.depth + 3 * tokens * num_classes)), 4 * parameters
    if config.activation_checkpointing:
        blocks = blocks / vit.depth + vit.depth * tokens * vit.embed_dim
    dim, width = vit.embed_dim, config.segmentor.channels or vit.embed_dim
    # Neck and heads at a quarter of a patch have 16 times the tokens; counted, 0.75 of this is kept for the gradient.
    dense = 16 * tokens * (16 * width + 4 * dim + 3 * num_classes)
    heads = 9 * width * (dim + 11 * width) + 12 * dim**2 + 9 * dim * config.segmentor.aux_channels
    biases = 3 * vit.depth * vit.num_heads * (1 + tokens) ** 2 if vit.rel_pos_bias else 0  # shared by the images
    labels = 3 * num_classes * config.img_size**2  # scores at the size of the labels, of one image at a time
    return int(4 * share * (blocks + dense)), 4 * (4 * (parameters + heads) + biases + labels)


def header(setting: Setting) -> list[str]:
    """Everything that was decided, one line each."""
    config, inputs, plan, inference = setting.config, setting.inputs, setting.plan, setting.inference
    vit = inputs.vit.config
    source = "random weights of the sizes of " if config.init == "random" else ""
    variants = [text for key, text in (("rel_pos_bias", "relative position bias"), ("layer_scale", "layer scale"))
                if getattr(vit, key)]  # fmt: skip
    windows = (
        f"windows of {inference.crop} px every {inference.stride}" if inference.mode == "slide" else "whole images"
    )
    views = f", scales {', '.join(f'{scale:g}' for scale in config.scales)}" if len(config.scales) > 1 else ""
    return [
        f"segmentor  {_head_text(setting)}, {len(inputs.classes)} classes, crops of {config.img_size} px",
        f"backbone   {source}{shown(config.backbone)}: ViT {vit.embed_dim} x {vit.depth}, patch {vit.patch_size}, "
        f"{' and '.join(variants) or 'plain'}; weights {inputs.digest}",
        f"data       {shown(inputs.train.origin)}: {len(inputs.train)} images to learn from; "
        f"{shown(inputs.val.origin)}: {len(inputs.val)} to evaluate on; {setting.num_workers} loader workers",
        f"labels     {inputs.table.expected}; the cross entropy is a mean over {config.segmentor.average}",
        batch_line(plan, config),
        f"schedule   {plan.total_steps} steps ({plan.total_steps / plan.steps_per_epoch:.4g} epochs), warm-up "
        f"{config.warmup_steps}, then linear to zero",
        f"optimizer  AdamW, lr {config.optim.lr:g}, weight_decay {config.weight_decay:g}"
        + (f", layer_decay {config.layer_decay:g}, drop_path {config.drop_path:g}" if config.head == "upernet" else ""),
        f"evaluation {windows}, short side {config.augment.scale[1]}{views}{', mirrored too' if config.flip else ''}, "
        f"{config.eval_precision}",
        f"machine    {setting.device}, {torch.get_num_threads()} threads, precision {config.engine.precision}, "
        f"torch {torch.__version__}",
        f"out        {shown(config.out)}",
    ]  # fmt: skip


def _head_text(setting: Setting) -> str:
    if setting.config.head == "linear":
        return "linear head on the frozen backbone"
    vit, sizes = setting.inputs.vit.config, setting.config.segmentor
    blocks = list(sizes.blocks or published_blocks(vit.depth))
    return f"UperNet, {sizes.channels or vit.embed_dim} channels, blocks {blocks}"
