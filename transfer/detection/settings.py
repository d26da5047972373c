"""What a detection run is given, and what follows from it before anything is built."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import nn

from core import start
from core.checkpoint import Checkpoint
from core.cost import BF16_SHARE, encoder_parameters, held_values
from core.distributed import Processes
from core.engine import Plan, uses_bf16
from core.errors import ConfigError, DataError, shown
from core.machine import choose_device
from core.optim import OptimConfig, layer_decay_groups, warmup_multistep
from core.start import RunConfig, accumulation_of, batch_line, choose_workers, require_batch
from core.vit import ViT, ViTConfig
from transfer.detection.coco import CocoSet
from transfer.detection.jitter import JitterConfig
from transfer.detection.mask_rcnn import DetectorConfig, MaskRCNN

# Where the images lie may change when a run goes on; that they are the same is checked.
HARMLESS_KEYS = (*start.HARMLESS_KEYS, "backbone", "train_json", "train_images", "val_json", "val_images")
DecayRule = Literal["vitdet", "vitdet_huge", "clean"]
WARMUP_START = 0.001  # share of the peak rate at the first step
INSTALL_DETECTRON2 = "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2"


class DetectOptim(OptimConfig):
    """AdamW of the published detectors."""

    lr: float | None = Field(1e-4, gt=0)
    beta2: float = Field(0.999, ge=0, lt=1)


class DetectConfig(RunConfig):
    """Everything that `rcmae detect` reads. Defaults: ViTDet-B on COCO, spec detection 5.

    `data` is a root in COCO's layout; the four keys of files win over it.
    """

    backbone: Path  # backbone directory, or a file of MAE, RC-MAE, timm, Hugging Face; with --eval a detector directory
    init: Literal["backbone", "random"] = "backbone"  # random: the backbone's sizes, weights drawn from the seed
    branch: Literal["teacher", "student"] = "teacher"  # of an RC-MAE pretraining file
    framework: Literal["native", "detectron2"] = "native"  # whose model, data pipeline, optimizer, loop and evaluator
    num_heads: PositiveInt | None = None  # for files of sizes that are not published ones
    train_json: Path | None = None
    train_images: Path | None = None
    val_json: Path | None = None
    val_images: Path | None = None
    keep_background: bool = False  # learn from images without any annotation too; published: no
    img_size: PositiveInt = 1024  # side of the square that images are resized into
    batch_size: PositiveInt = 64
    steps: PositiveInt = 184375  # optimizer steps
    warmup_steps: NonNegativeFloat = 250
    milestones: tuple[PositiveInt, ...] | None = None  # steps at which the rate drops to a tenth; None: 8/9, 26/27
    weight_decay: NonNegativeFloat = 0.1
    layer_decay: float = Field(0.7, gt=0, le=1)
    decay_rule: DecayRule = "vitdet"  # what has weight decay; see `decays`
    drop_path: float = Field(0.1, ge=0, lt=1)
    window_size: PositiveInt | None = 14  # None: every block attends globally
    global_blocks: tuple[NonNegativeInt, ...] | None = None  # None: the last block of each quarter
    rel_pos: bool = True
    patch_size: PositiveInt | None = None  # resample the backbone's patches to this side; None: as they are
    activation_checkpointing: bool = False
    eval_precision: Literal["fp32", "bf16"] = "fp32"  # published: float32 without autocast
    detector: DetectorConfig = DetectorConfig()  # num_classes is that of the annotations
    jitter: JitterConfig = JitterConfig()
    optim: DetectOptim = DetectOptim()

    def contradictions(self) -> Iterator[str]:
        """Keys that cannot hold together."""
        yield from super().contradictions()
        if self.warmup_steps >= self.steps:
            yield f"warmup_steps={self.warmup_steps:g}: must be below steps={self.steps}"
        if "num_classes" in self.detector.model_fields_set and self.detector.num_classes != 80:
            yield "detector.num_classes: is that of the annotations; leave it out"
        if self.optim.lr is None:
            yield "optim.lr: detection has no rule that scales it; give the peak rate"
        if self.optim.min_lr:
            yield "optim.min_lr: has no effect on a rate that drops at milestones"
        if self.window_size is None and self.global_blocks:
            yield "global_blocks: has no effect without window_size"
        if self.framework == "detectron2":
            yield from self._not_in_detectron2()

    def _not_in_detectron2(self) -> Iterator[str]:
        """What this suite does and detectron2 does not, or what it lacks itself."""
        if importlib.util.find_spec("detectron2") is None:
            yield f"framework=detectron2: detectron2 is not installed; {INSTALL_DETECTRON2}"
        lacking = {
            "activation_checkpointing": (self.activation_checkpointing, "needs fairscale there, which is not kept up"),
            "keep_background": (self.keep_background, "its mapper fails on images without an annotation"),
            "optim.clip_grad": (self.optim.clip_grad is not None, "it clips each tensor by itself, not all together"),
            "decay_rule=clean": (self.decay_rule == "clean", "its parameter groups cannot say that"),
            "engine.compile=on": (self.engine.compile == "on", "its blocks are not compiled"),
            "engine.accumulation": (self.engine.accumulation not in (None, 1), "its trainer takes a batch at once"),
            "milestones": (min(self.drops()) <= self.warmup_steps, "its warm-up ends before the first of them"),
        }
        for key, (wanted, why) in lacking.items():
            if wanted:
                yield f"{key}: not with framework=detectron2: {why}"

    def drops(self) -> tuple[int, ...]:
        """The steps at which the rate drops to a tenth, as published where none are given."""
        if self.milestones is not None:
            return self.milestones
        return int(self.steps * 8 / 9 + 0.5), int(self.steps * 26 / 27)


def rate(config: DetectConfig) -> Callable[[int], float]:
    """The learning rate at an optimizer step."""
    peak, warmup, drops = peak_rate(config), config.warmup_steps, config.drops()
    return lambda step: peak * warmup_multistep(step, warmup_steps=warmup, start=WARMUP_START, milestones=drops)


def peak_rate(config: DetectConfig) -> float:
    """The learning rate between warm-up and first drop."""
    assert config.optim.lr is not None, "DetectConfig refuses none"
    return config.optim.lr


def parameter_groups(config: DetectConfig, model: MaskRCNN) -> list[dict]:
    """AdamW's groups: rates that fall from block to block towards the image, weight decay by `decay_rule`."""
    return layer_decay_groups(
        model.named_parameters(), model.backbone.vit.config.depth, config.layer_decay, config.weight_decay,
        prefix="backbone.vit.", decays=lambda name, parameter: decays(config.decay_rule, model, name, parameter),
    )  # fmt: skip


def decays(rule: DecayRule, model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a detector has weight decay.

    vitdet: all but the position table and the LayerNorms of the ViT, as ViTDet-B and -L were trained: biases, relative
        positions and the channel norms of pyramid and heads decay. vitdet_huge: all. clean: matrices and kernels alone.
    Source: detectron2's ViTDet configurations; spec detection 5.3.
    """
    if rule == "vitdet_huge":
        return True
    if rule == "clean":
        return parameter.ndim > 1 and "pos" not in name.rpartition(".")[2]
    owner = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(owner, nn.LayerNorm) and not name.endswith("vit.pos_embed")


@dataclass(frozen=True)
class Setting:
    """What follows from configuration, backbone, data and machine."""

    config: DetectConfig
    vit: ViT  # with windows and relative positions
    digest: str  # of the backbone's weights
    train: CocoSet
    val: CocoSet
    detector: DetectorConfig
    device: torch.device
    num_workers: int  # loader workers of each process
    plan: Plan


def settle(
    config: DetectConfig,
    vit: ViT,
    digest: str,
    sets: tuple[CocoSet, CocoSet],
    checkpoint: Checkpoint | None,
    processes: Processes,
) -> Setting:
    """Work out device, batches and workers.

    Raises: ConfigError where data, batch and processes do not fit together, DataError where the two sets do not.
    """
    device = choose_device(config.device, processes.local_rank)
    train, val = sets
    if train.names != val.names:
        odd = sorted(set(train.names) ^ set(val.names))[:3] or ["their ids differ"]
        raise DataError(
            f"{shown(val.origin)}: other categories than in {shown(train.origin)}: {', '.join(map(shown, odd))}"
        )
    require_batch(config, len(train))
    detector = config.detector.model_copy(update={"num_classes": len(train.names)})
    per_image, fixed = memory_bytes(config, vit.config, detector, device)
    accumulation = accumulation_of(config, checkpoint, device, processes, per_image, fixed)
    if config.framework == "detectron2" and accumulation > 1:
        raise ConfigError(
            f"batch_size={config.batch_size}: needs {accumulation} micro-batches here, and detectron2's trainer takes "
            "a batch at once; lower batch_size, or leave framework=detectron2 out"
        )
    plan = Plan(len(train), config.batch_size, accumulation, 1, processes.size, config.steps)
    workers = choose_workers(config.loader, device, processes)
    return Setting(config, vit, digest, train, val, detector, device, workers, plan)


def memory_bytes(
    config: DetectConfig, vit: ViTConfig, detector: DetectorConfig, device: torch.device
) -> tuple[int, int]:
    """About what one image takes between forward and backward, and what does not depend on the batch."""
    tokens = (config.img_size // vit.patch_size) ** 2
    share = BF16_SHARE if uses_bf16(device, config.engine.precision) else 1.0
    blocks = held_values(vit, tokens)
    if config.activation_checkpointing:
        blocks = blocks / vit.depth + vit.depth * tokens * vit.embed_dim
    # p2 has 16 times the tokens: a few maps of the pyramid and of the RPN; the heads' regions at 7 x 7 pixels.
    dense = 16 * tokens * (8 * detector.channels + vit.embed_dim)
    regions = detector.roi.batch_size_per_image * 49 * detector.channels * 3 * (detector.roi.num_box_convs + 2)
    heads = 4 * detector.channels**2 * 9 * 8 + 49 * detector.channels * detector.roi.box_fc_dim
    return int(4 * (share * blocks + dense + regions)), 4 * 4 * (encoder_parameters(vit) + heads)


def header(setting: Setting) -> list[str]:
    """Everything that was decided, one line each."""
    config, vit, plan = setting.config, setting.vit.config, setting.plan
    source = "random weights of the sizes of " if config.init == "random" else ""
    kind = "Cascade Mask R-CNN" if setting.detector.cascade else "Mask R-CNN"
    windows = f"windows of {vit.window_size}, global blocks {list(vit.global_blocks)}" if vit.window_size else "global"
    return [
        f"detector   {kind}, {setting.detector.channels} channels, {len(setting.train.names)} classes, "
        f"{config.img_size} px",
        f"backbone   {source}{shown(config.backbone)}: ViT {vit.embed_dim} x {vit.depth}, patch {vit.patch_size}, "
        f"{windows}; weights {setting.digest}",
        f"data       {shown(setting.train.origin)}: {len(setting.train)} images to learn from; "
        f"{shown(setting.val.origin)}: {len(setting.val)} to evaluate on; {setting.num_workers} loader workers",
        batch_line(plan, config),
        f"schedule   {plan.total_steps} steps ({plan.total_steps / plan.steps_per_epoch:.4g} epochs), warm-up "
        f"{config.warmup_steps:g}, drops at {', '.join(map(str, config.drops()))}",
        f"optimizer  AdamW, lr {config.optim.lr:g}, layer_decay {config.layer_decay:g}, weight_decay "
        f"{config.weight_decay:g} by the rule {config.decay_rule}, drop_path {config.drop_path:g}",
        *(
            [f"framework  {config.framework}: its model, data pipeline, optimizer, loop and evaluator"]
            if config.framework != "native"
            else []
        ),
        f"machine    {setting.device}, {torch.get_num_threads()} threads, precision {config.engine.precision}, "
        f"torch {torch.__version__}",
        f"out        {shown(config.out)}",
    ]
