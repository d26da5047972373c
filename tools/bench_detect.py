"""`rcmae bench detect`: training steps and inference of a detector beside a plain one, in turn, in one process.

The plain one is the same network with the same weights. Its attention is unfused, and makes the bias of all pairs of
relative positions; all that comes after the feature pyramid it does image by image.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.compiling import compiles
from core.config import load_config
from core.distributed import Processes
from core.engine import autocast
from core.errors import ConfigError, shown
from core.machine import choose_device
from core.vit import ViT
from pretrain.presets import ENCODERS, preset
from tools.bench import BASELINE, EAGER, SUITE, Row, bench_steps, raced, report_rows
from tools.bench_coco_eval import HEIGHT, NUM_CLASSES, WIDTH, made_up_set
from tools.plain_attention import make_attention_plain
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
        rows += raced(_training(config, model, coco, batch, device), batch_size, device, rounds)
    title = f"ViT {model}, {'Cascade ' if config.detector.cascade else ''}Mask R-CNN, {config.img_size} px"
    report_rows("detect-train", f"{title}: training", rows, device)
    one = made_up_batch(coco, config, 1).to(device)
    rows = raced(_inference(config, model, one, device), 1, device, rounds)
    report_rows("detect-inference", f"{title}: inference, masks pasted, {config.eval_precision}", rows, device)


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
    make_attention_plain(model.backbone.vit)
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
    # The evaluator is never asked.
    evaluator = CocoEvaluator(coco, config.img_size, device, config.eval_precision, 1, 0, 60, Processes())
    task = DetectionTask(model.to(device), config.drop_path, config.seed, evaluator)
    return bench_steps(task, config, parameter_groups(config, model), config.optim, LR, batch, device, compiled)


def _inference(
    config: DetectConfig, model: str, batch: DetectionBatch, device: torch.device
) -> dict[str, Callable[[], Callable[[], None]]]:
    def build(plain: bool) -> Callable[[], None]:
        detector = detector_of(config, model, plain).to(device)
        threshold = candidate_threshold(detector, batch)
        detector.roi.config = detector.roi.config.model_copy(update={"score_threshold": threshold})

        def step() -> None:
            with autocast(device, config.eval_precision):
                found = detector.detect(normalized(batch, torch.float32), batch.sizes, batch.original_sizes)
            for each in found:
                _ = each.masks

        return step

    return {BASELINE: lambda: build(plain=True), EAGER: lambda: build(plain=False)}


@torch.no_grad()
def candidate_threshold(model: MaskRCNN, batch: DetectionBatch) -> float:
    """The score that so many candidates exceed as a trained detector has."""
    features = model.backbone(normalized(batch, torch.float32))
    boxes = model.rpn.proposals(model.rpn(features), batch.sizes, training=False)[0].boxes
    image = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    scores = model.roi.predict(features, boxes, image, batch.sizes)[1][:, :-1].flatten()  # [R * K]
    return scores.topk(min(CANDIDATES, len(scores))).values[-1].item()


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
