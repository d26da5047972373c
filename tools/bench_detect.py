"""`rcmae bench detect`: training steps and inference of a detector beside a plain one, in turn, in one process.

The plain one is the same network with the same weights. Its attention is unfused, and makes the bias of all pairs of
relative positions; all that comes after the feature pyramid it does image by image.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from core.attention import Attention, Grid, relative_table
from core.compiling import compile_blocks, compiles
from core.config import load_config
from core.distributed import Processes
from core.engine import Plan, autocast, train_step
from core.errors import ConfigError, shown
from core.flags import FlagReader
from core.machine import choose_device
from core.optim import adamw
from core.vit import ViT
from pretrain.presets import ENCODERS, preset
from tools.bench import BASELINE, EAGER, SUITE, Row, bench_fit, contestants, nothing, race, say
from tools.bench_coco_eval import HEIGHT, NUM_CLASSES, WIDTH, made_up_set
from transfer.detection.coco import CocoSet
from transfer.detection.data import Collate, DetectionBatch, PrepareDetection, normalized
from transfer.detection.dense_vit import dense_vit
from transfer.detection.inference import Detections
from transfer.detection.mask_rcnn import MaskRCNN, build_mask_rcnn
from transfer.detection.matching import Permutation
from transfer.detection.settings import DetectConfig, parameter_groups
from transfer.detection.targets import Targets
from transfer.detection.tasks import CocoEvaluator, DetectionTask

LR = 1e-6  # of every benchmarked step: steady, and too small to change what is proposed
CANDIDATES = (
    1000  # detections before non-maximum suppression: what a trained detector has, of weights that know nothing
)


def bench_detect(path: Path | None, overrides: list[str], model: str, batch_sizes: Sequence[int], rounds: int) -> None:
    """Time training steps on images that are already on the device, and inference image by image; print both.

    Args:
        path, overrides: a detection configuration; data=, out= and backbone= are not needed.
        model: a published size of ViT, whose weights are drawn.
        batch_sizes: of training, tried one after the other.
    """
    if model not in ENCODERS:
        raise ConfigError(f"--model {shown(model)}: expected one of {', '.join(ENCODERS)}")
    given = {text.partition("=")[0] for text in overrides}
    patches = ["patch_size=16"] if model == "huge" else []
    needed = [text for text in ("data=none", "out=none", "backbone=none", *patches) if text.split("=")[0] not in given]
    config = load_config(DetectConfig, path, [*needed, *overrides])
    device = choose_device(config.device)
    coco, _ = made_up_set(max(batch_sizes), np.random.default_rng(0))
    rows: list[Row] = []
    for batch_size in batch_sizes:
        batch = made_up_batch(coco, config, batch_size).to(device)
        rows += _raced(_training(config, model, coco, batch, device), batch_size, device, rounds)
    title = f"ViT {model}, {'Cascade ' if config.detector.cascade else ''}Mask R-CNN, {config.img_size} px"
    _report("detect-train", f"{title}: training", rows, device)
    one = made_up_batch(coco, config, 1).to(device)
    rows = _raced(_inference(config, model, one, device), 1, device, rounds)
    _report("detect-inference", f"{title}: inference, masks pasted, {config.eval_precision}", rows, device)


def _raced(
    builders: dict[str, Callable[[], Callable[[], None]]], images: int, device: torch.device, rounds: int
) -> list[Row]:
    rows = list(contestants(builders, images, device))
    race(rows, device, rounds)
    for row in rows:
        row.step = nothing  # lets go of its network
    return rows


def made_up_batch(coco: CocoSet, config: DetectConfig, batch_size: int) -> DetectionBatch:
    """Noise with as many objects as COCO's images have, as the loader would hand it over."""
    rng = np.random.default_rng(0)
    prepare = PrepareDetection(coco, config.img_size, config.jitter)
    noise = [torch.from_numpy(rng.integers(0, 256, (3, HEIGHT, WIDTH), dtype=np.uint8)) for _ in range(batch_size)]
    return Collate(config.img_size)([prepare(image, rng, index) for index, image in enumerate(noise)])


# ---- the contestants ------------------------------------------------------------------------------------------------


def detector_of(config: DetectConfig, model: str, plain: bool) -> MaskRCNN:
    """A detector with weights drawn from the seed, the same for both kinds."""
    generator = torch.Generator().manual_seed(config.seed)
    vit = ViT(preset(model)[0])
    vit.init_weights(generator)
    detector_config = config.detector.model_copy(update={"num_classes": NUM_CLASSES})
    ours = build_mask_rcnn(dense_vit(vit, config), detector_config)
    ours.init_weights(generator)
    return as_plain(ours) if plain else ours


def as_plain(model: MaskRCNN) -> "PlainMaskRCNN":
    """The plain twin of a detector; it takes over its parts."""
    vit = model.backbone.vit
    for i, block in enumerate(vit.blocks):
        attention = PlainAttention(vit.config.embed_dim, vit.config.num_heads, vit.config.table_grid(i))
        attention.load_state_dict(block.attn.state_dict())  # type: ignore[union-attr]
        block.attn = attention
    return PlainMaskRCNN(model.backbone, model.rpn, model.roi)


def _training(
    config: DetectConfig, model: str, coco: CocoSet, batch: DetectionBatch, device: torch.device
) -> dict[str, Callable[[], Callable[[], None]]]:
    builders = {
        BASELINE: lambda: _step(config, detector_of(config, model, plain=True), coco, batch, device, False),
        EAGER: lambda: _step(config, detector_of(config, model, plain=False), coco, batch, device, False),
    }
    if compiles(config.engine.compile, device):
        builders[SUITE] = lambda: _step(config, detector_of(config, model, plain=False), coco, batch, device, True)
    return builders


def _step(
    config: DetectConfig, model: MaskRCNN, coco: CocoSet, batch: DetectionBatch, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """Whole optimizer steps, as `core.engine` makes them."""
    processes, images = Processes(), len(batch.images)
    evaluator = CocoEvaluator(coco, config.img_size, device, config.eval_precision, 1, 0, 60, processes)  # never asked
    task = DetectionTask(model.to(device), config.drop_path, config.seed, evaluator)
    if compiled:
        compile_blocks(task)
    optimizer = adamw(parameter_groups(config, model), config.optim)
    run = bench_fit(task, config, Plan(images, images, 1, 1), optimizer, LR, config.optim.clip_grad, device, processes)
    flags, steps = FlagReader(device), itertools.count()

    def step() -> None:
        number = next(steps)
        train_step(task, [batch], run, number, flags)
        flags.read(number - 2)

    return step


def _inference(
    config: DetectConfig, model: str, batch: DetectionBatch, device: torch.device
) -> dict[str, Callable[[], Callable[[], None]]]:
    def build(plain: bool) -> Callable[[], None]:
        detector = detector_of(config, model, plain).to(device)
        threshold = _threshold(detector, batch)
        detector.roi.config = detector.roi.config.model_copy(update={"score_threshold": threshold})

        def step() -> None:
            with autocast(device, config.eval_precision):
                found = detector.detect(normalized(batch, torch.float32), batch.sizes, batch.original_sizes)
            for each in found:
                _ = each.masks

        return step

    return {BASELINE: lambda: build(plain=True), EAGER: lambda: build(plain=False)}


@torch.no_grad()
def _threshold(model: MaskRCNN, batch: DetectionBatch) -> float:
    """The score that so many candidates exceed as a trained detector has."""
    features = model.backbone(normalized(batch, torch.float32))
    boxes = model.rpn.proposals(model.rpn(features), batch.sizes, training=False)[0].boxes
    image = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    scores = model.roi.predict(features, boxes, image, batch.sizes)[1][:, :-1].flatten()  # [R * K]
    return scores.topk(min(CANDIDATES, len(scores))).values[-1].item()


class PlainAttention(Attention):
    """Softmax of explicit logits; relative positions as a bias of all pairs, made in every call."""

    def forward(self, x: Tensor, num_queries: int | None = None, grid: Grid | None = None) -> Tensor:
        """[B, N, D] to the same; all tokens query."""
        q, k, v = self._heads(self.qkv(x), 3)  # each [B, heads, N, D / heads]
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # [B, heads, N, N]
        if self.has_rel_pos:
            assert grid is not None, "relative positions need a grid"
            placed = q.unflatten(2, grid)  # [B, heads, rows, columns, d]
            by_row, by_column = relative_table(self.rel_pos_h, grid[0]), relative_table(self.rel_pos_w, grid[1])
            to_rows = torch.einsum("bhijd,imd->bhijm", placed, by_row.to(q.dtype))
            to_columns = torch.einsum("bhijd,jnd->bhijn", placed, by_column.to(q.dtype))
            bias = to_rows.unsqueeze(-1) + to_columns.unsqueeze(-2)  # [B, heads, rows, columns, rows, columns]
            logits = logits + bias.flatten(4).flatten(2, 3)  # [B, heads, N, N]
        out = logits.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))  # [B, N, D]


class PlainMaskRCNN(MaskRCNN):
    """A detector that takes one image after the other from the pyramid on; its losses are the mean over the images."""

    def losses(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Sequence[Targets],
        permutation: Permutation,
        branch_scales: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As those of `MaskRCNN`, which normalises by the regions of the batch instead."""
        features = self.backbone(images, branch_scales)
        found = []
        for i, target in enumerate(targets):
            own = [feature[i : i + 1] for feature in features]
            output = self.rpn(own)
            losses = self.rpn.losses(output, [target], permutation)
            proposals = self.rpn.proposals(output, sizes[i : i + 1], training=True)
            found.append({**losses, **self.roi.losses(own, proposals, [target], sizes[i : i + 1], permutation)})
        return {name: torch.stack([losses[name] for losses in found]).mean() for name in found[0]}

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, original_sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """As that of `MaskRCNN`."""
        detections: list[Detections] = []
        for i, original in enumerate(original_sizes):
            detections += super().detect(images[i : i + 1], sizes[i : i + 1], [original])
        return detections


# ---- the report -----------------------------------------------------------------------------------------------------


def _report(name: str, title: str, rows: Sequence[Row], device: torch.device) -> None:
    table = Table("", "batch", "images/s", "s/image", "against baseline", "peak memory, GiB")
    for row in rows:
        beside = next((other for other in rows if (other.name, other.images) == (BASELINE, row.images)), None)
        ratio = f"{row.ratio_to(beside):.2f}" if beside else "-"
        rate, memory = row.images_per_s, f"{row.peak_bytes / 2**30:.2f}"
        table.add_row(row.name, str(row.images), f"{rate:.4g}", f"{1 / rate:.4g}", ratio, memory)
    ours, theirs = (
        max((row for row in rows if (row.name == BASELINE) == plain), key=lambda row: row.images_per_s, default=None)
        for plain in (False, True)
    )
    same = next((row for row in rows if ours and row.name == BASELINE and row.images == ours.images), None)
    figures = {
        "name": name,
        "ratio": ours.ratio_to(theirs) if ours and theirs else None,
        "images_per_s": ours.images_per_s if ours else None,
        "seconds_per_image": 1 / ours.images_per_s if ours else None,
        "batch_size": ours.images if ours else None,
        "baseline_images_per_s": theirs.images_per_s if theirs else None,
        "baseline_batch_size": theirs.images if theirs else None,
        "peak_memory_gib": ours.peak_bytes / 2**30 if ours else None,
        "peak_memory_ratio": ours.peak_bytes / same.peak_bytes if ours and same else None,
    }
    say(title, table, figures, device)
