"""`rcmae bench segment`: training steps and sliding windows of a segmentor beside a plain one, in turn, in one process.

The plain one (`tools/plain_segmentor.py`) is the same network with the same weights; that both say the same is checked
before anything is timed.
"""

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from core.compiling import compiles
from core.config import load_config
from core.distributed import Processes
from core.engine import autocast
from core.errors import ConfigError, shown
from core.machine import choose_device
from core.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from core.vit import ViT, ViTConfig
from pretrain.presets import ENCODERS, preset
from tools.bench import BASELINE, EAGER, SUITE, Row, bench_steps, raced, report_rows, seconds_of
from tools.plain_segmentor import as_plain, plain_confusion, plain_labels
from transfer.segmentation.classes import open_classes
from transfer.segmentation.data import SegmentationBatch, normalized
from transfer.segmentation.linear_head import Network
from transfer.segmentation.miou import confusion_matrix
from transfer.segmentation.segmentor import Segmentor, segmentation_vit
from transfer.segmentation.settings import SegmentConfig, build_network, head_sizes, parameter_groups, require_windows
from transfer.segmentation.slide import InferenceConfig, Size
from transfer.segmentation.tasks import Labeller, SegmentationTask

LR = 1e-6  # of every benchmarked step: steady, and too small to change what the network says
NUM_IMAGES = 2000  # of ADE20K's validation, whose time is worked out
TIMES_COUNTED = 20  # confusion matrices that are timed
SAME_LABELS, SAME_LOSS = 0.99, 1e-2  # share of pixels, and relative: TF32 on a GPU rounds to a thousandth
SCORES_STD = 0.1  # of the weights of class scores: those of a first step are all but equal, and would hide a difference
SQUARE_PX = 32  # side of what there is to see in a picture


@dataclass(frozen=True)
class Bench:
    """What is timed.

    Attributes:
        model: a published size of ViT, whose weights are drawn.
        image: uint8 [1, 3, H, W] and label: uint8 [H, W], on the device.
    """

    config: SegmentConfig
    model: str
    num_classes: int
    inference: InferenceConfig
    device: torch.device
    image: Tensor
    label: Tensor

    @property
    def size(self) -> Size:
        """(height, width) of the image."""
        return self.label.shape[0], self.label.shape[1]


def bench_segment(
    path: Path | None,
    overrides: list[str],
    model: str | None,
    batch_sizes: Sequence[int] | None,
    image: str,
    rounds: int,
) -> None:
    """Time training steps on images that are already on the device, and sliding windows over one image; print both.

    Args:
        path, overrides: a segmentation configuration; data=, out= and backbone= are not needed.
        model: a published size of ViT; None: base on a GPU, tiny on a CPU.
        batch_sizes: of training, tried one after the other; None: 16 on a GPU, 2 on a CPU.
        image: WIDTHxHEIGHT, in pixels.
    """
    bench = settled(path, overrides, model, image)
    batch_sizes = batch_sizes or [16 if bench.device.type == "cuda" else 2]
    require_same(bench)
    title = f"ViT {bench.model}, UperNet, {bench.num_classes} classes"
    rows = [
        row
        for size in batch_sizes
        for row in raced(_training(bench, made_up_batch(bench, size).to(bench.device)), size, bench.device, rounds)
    ]
    report_rows("segment-train", f"{title}: training at {bench.config.img_size} px", rows, bench.device)
    rows = raced(_inference(bench), 1, bench.device, rounds)
    windows = f"windows of {bench.inference.crop} px every {bench.inference.stride}"
    title = f"{title}: {image} px, {windows}, {bench.config.eval_precision}, confusion matrix included"
    report_rows("segment-inference", title, rows, bench.device, _confusion(bench, rows))


def settled(path: Path | None, overrides: list[str], model: str | None, image: str) -> Bench:
    """What is asked for, with a picture to do it on. Raises: ConfigError."""
    given = {text.partition("=")[0] for text in overrides}
    needed = ["data=none", "out=none", "backbone=none"]
    if path is None and not given & {"classes", "num_classes"}:
        needed.append("classes=ade20k")
    config = load_config(SegmentConfig, path, [*(t for t in needed if t.partition("=")[0] not in given), *overrides])
    if config.head != "upernet":
        raise ConfigError(f"head={config.head}: what is timed is UperNet; give head=upernet")
    if config.inference.mode != "slide":
        raise ConfigError(
            f"inference.mode={config.inference.mode}: what is timed is windows; give inference.mode=slide"
        )
    device = choose_device(config.device)
    model = model or ("base" if device.type == "cuda" else "tiny")
    if model not in ENCODERS:
        raise ConfigError(f"--model {shown(model)}: expected one of {', '.join(ENCODERS)}")
    patch = preset(model)[0].patch_size
    if config.img_size % patch:
        raise ConfigError(f"img_size={config.img_size}: expected a multiple of the patches, {patch} px")
    size = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", image)
    if size is None:
        raise ConfigError(f"--image {shown(image)}: expected WIDTHxHEIGHT in pixels, as in 683x512")
    width, height = int(size[1]), int(size[2])
    num_classes, inference = len(open_classes(config)), config.inference.settled(config.img_size)
    pixels, labels = _pictures(1, height, width, num_classes, config.ignore_index)
    bench = Bench(config, model, num_classes, inference, device, pixels.to(device), labels[0].to(device))
    require_windows(segmentor_of(bench).backbone.config, inference)
    return bench


def made_up_batch(bench: Bench, batch_size: int) -> SegmentationBatch:
    """Pictures, as the loader would hand them over."""
    side = bench.config.img_size
    images, labels = _pictures(batch_size, side, side, bench.num_classes, bench.config.ignore_index)
    return SegmentationBatch(
        images, labels, torch.full((batch_size, 2), side), torch.ones(batch_size, dtype=torch.bool), (0,) * batch_size
    )


def _pictures(count: int, height: int, width: int, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Coloured squares under noise, uint8 [count, 3, H, W], and labels [count, H, W], of which a tenth is ignored."""
    rng = np.random.default_rng(0)
    squares = rng.integers(0, 256, (count, 3, -(-height // SQUARE_PX), -(-width // SQUARE_PX)))
    images = squares.repeat(SQUARE_PX, axis=2).repeat(SQUARE_PX, axis=3)[:, :, :height, :width]
    images = (images + rng.integers(-32, 33, images.shape)).clip(0, 255).astype(np.uint8)
    labels = rng.integers(0, num_classes, (count, height, width))
    labels[:, : height // 10] = ignore_index
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.uint8 if ignore_index <= 255 else np.int32))


# ---- the contestants ------------------------------------------------------------------------------------------------


def segmentor_of(bench: Bench, plain: bool = False) -> Segmentor:
    """A segmentor with weights drawn from the seed, the same for both kinds, in evaluation mode."""
    config, generator = bench.config, torch.Generator().manual_seed(bench.config.seed)
    sizes = preset(bench.model)[0].model_dump() | {"img_size": (config.img_size, config.img_size)}
    vit = ViT(ViTConfig(**sizes))
    vit.init_weights(generator)
    vit = segmentation_vit(vit, rel_pos_bias=config.rel_pos_bias, layer_scale=config.layer_scale)
    vit.checkpointing = config.activation_checkpointing
    ours = build_network(vit, head_sizes(config, bench.num_classes))
    assert isinstance(ours, Segmentor), "settled refuses another head"
    ours.init_weights(generator)
    for head in (ours.decode_head, ours.auxiliary_head):
        nn.init.normal_(head.conv_seg.weight, std=SCORES_STD, generator=generator)
    return (as_plain(ours) if plain else ours).eval()


def require_same(bench: Bench) -> None:
    """Raise unless both kinds have the same losses of a batch and the same labels of the image, in float32."""
    batch = made_up_batch(bench, 1).to(bench.device)
    ours, plain = (segmentor_of(bench, kind).to(bench.device) for kind in (False, True))
    with torch.no_grad():
        images = normalized(batch, torch.float32)
        losses = [torch.stack([*model.losses(images, batch.labels).values()]) for model in (ours, plain)]
    torch.testing.assert_close(losses[0], losses[1], rtol=SAME_LOSS, atol=0, msg=lambda text: f"other losses: {text}")
    found, expected = (
        _labeller(bench, "fp32")(ours, [bench.image], bench.size),
        _plain_labels(bench, plain, "fp32"),
    )
    share = (found == expected).float().mean().item()
    if share < SAME_LABELS:
        raise AssertionError(f"the plain segmentor has other labels: the same in {share:.4f} of the pixels")


def _labeller(bench: Bench, precision: str) -> Labeller:
    return Labeller(bench.inference, bench.device, precision)


def _plain_labels(bench: Bench, model: Segmentor, precision: str) -> Tensor:
    with autocast(bench.device, precision):
        pixels = normalize(bench.image, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
        return plain_labels(model, pixels, bench.size, bench.inference)


def _training(bench: Bench, batch: SegmentationBatch) -> dict[str, Callable[[], Callable[[], None]]]:
    builders = {
        BASELINE: lambda: _step(bench, segmentor_of(bench, plain=True), batch, compiled=False),
        EAGER: lambda: _step(bench, segmentor_of(bench), batch, compiled=False),
    }
    if compiles(bench.config.engine.compile, bench.device):
        builders[SUITE] = lambda: _step(bench, segmentor_of(bench), batch, compiled=True)
    return builders


def _step(bench: Bench, model: Segmentor, batch: SegmentationBatch, compiled: bool) -> Callable[[], None]:
    config, device = bench.config, bench.device
    model = model.to(device)
    task = SegmentationTask(model, config.drop_path, config.seed, _never, Processes(), build=lambda: model)
    return bench_steps(task, config, parameter_groups(config, model), config.optim, LR, batch, device, compiled)


def _never(model: Network) -> NoReturn:
    raise AssertionError("a benchmark of training steps evaluates nothing")


def _inference(bench: Bench) -> dict[str, Callable[[], Callable[[], None]]]:
    """An image to its labels and into a confusion matrix, as an evaluation does it for each."""

    def build(plain: bool) -> Callable[[], None]:
        model, count = segmentor_of(bench, plain).to(bench.device), _counter(bench, plain)
        labeller = _labeller(bench, bench.config.eval_precision)

        def step() -> None:
            if plain:
                count(_plain_labels(bench, model, bench.config.eval_precision))
            else:
                count(labeller(model, [bench.image], bench.size))

        return step

    return {BASELINE: lambda: build(plain=True), EAGER: lambda: build(plain=False)}


def _counter(bench: Bench, plain: bool) -> Callable[[Tensor], None]:
    """Adds the labels of the image, [H, W], to a confusion matrix."""
    number, ignored = bench.num_classes, bench.config.ignore_index
    on_host, on_device = np.zeros((number, number)), torch.zeros(number, number, dtype=torch.int64, device=bench.device)

    def count(found: Tensor) -> None:
        if plain:
            np.add(on_host, plain_confusion(found, bench.label, number, ignored), out=on_host)
        else:
            on_device.add_(confusion_matrix(found, bench.label, number, ignored))

    return count


def _confusion(bench: Bench, rows: Sequence[Row]) -> dict[str, Any]:
    """What confusion matrices take of an evaluation, timed by themselves; `rows` are whole images."""
    found = torch.where(bench.label == bench.config.ignore_index, 0, bench.label).long()
    seconds = {}
    for kind in (BASELINE, EAGER):
        counting = partial(_counter(bench, plain=kind == BASELINE), found)
        seconds[kind] = statistics.median(seconds_of(counting, 1, bench.device) for _ in range(TIMES_COUNTED))
    shares = {row.name: 100 * seconds[row.name] * row.images_per_s for row in rows}
    return {
        "confusion_ms_per_image": 1000 * seconds[EAGER],
        "confusion_share_pct": shares.get(EAGER),
        "baseline_confusion_share_pct": shares.get(BASELINE),
        "images": NUM_IMAGES,
        "confusion_s": NUM_IMAGES * seconds[EAGER],
        "evaluation_s": next((NUM_IMAGES / row.images_per_s for row in rows if row.name == EAGER), None),
    }
