"""Published robustness figures, each as its source gives it, and what keeps a sweep from standing beside them."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from core.errors import shown


class Published(NamedTuple):
    """A row of published figures, in percent; None where its source has none."""

    model: str
    val_top1: float | None
    mce: float | None
    imagenet_a: float | None
    imagenet_r: float | None
    imagenet_sketch: float | None
    source: str


# Fine-tuned on ImageNet-1k at 224 px; mCE on the released files. Read in the sources named, nothing from memory.
PUBLISHED = (
    Published("MAE ViT-B", 83.664, 51.7, 35.9, 48.3, 34.5, "facebookresearch/mae README, FINETUNE.md"),
    Published("MAE ViT-L", 85.952, 41.8, 57.1, 59.9, 45.3, "facebookresearch/mae README, FINETUNE.md"),
    Published("MAE ViT-H", 86.928, 33.8, 68.2, 64.4, 49.6, "facebookresearch/mae README, FINETUNE.md"),
    Published("RC-MAE ViT-S", 82.0, None, None, None, None, "RC-MAE README"),
    Published("RC-MAE ViT-B", 83.6, None, None, None, None, "RC-MAE README"),
    Published("RC-MAE ViT-L", 86.1, None, None, None, None, "RC-MAE README"),
    Published("DeiT-B (crop 0.9)", None, None, 27.17, 44.91, 32.39, "timm results csv"),
    Published("DeiT3-B (crop 0.9)", None, None, 38.92, 53.43, 40.38, "timm results csv"),
    Published("ResNet-50", 76.15, 76.7, None, None, None, "hendrycks/robustness README (clean error 23.85)"),
)
COLUMNS = {  # of that table: the set and the figure that each stands for
    "val_top1": ("imagenet_val", "top1_pct", "val top-1"),
    "mce": ("imagenet_c", "mce_pct", "mCE"),
    "imagenet_a": ("imagenet_a", "top1_pct", "A top-1"),
    "imagenet_r": ("imagenet_r", "top1_pct", "R top-1"),
    "imagenet_sketch": ("imagenet_sketch", "top1_pct", "Sketch top-1"),
}
SET_IMAGES = {  # of the whole sets
    "imagenet_val": 50000, "imagenet_c": 50000, "imagenet_a": 7500, "imagenet_r": 30000, "imagenet_sketch": 50889,
}  # fmt: skip


class PublishedDetector(NamedTuple):
    """A row of published figures of a detector on corrupted COCO, in per cent: clean AP, mPC and rPC."""

    model: str
    box: tuple[float, float, float]
    mask: tuple[float, float, float]
    source: str


# COCO val2017, 15 corruptions x 5 severities, by imagecorruptions on the decoded image.
PUBLISHED_COCO = (
    PublishedDetector(
        "Mask R-CNN R50-FPN 1x", (37.3, 18.7, 50.1), (34.2, 16.8, 49.1), "mmdetection docs, robustness_benchmarking.md"
    ),
    PublishedDetector("Mask R-CNN R50-DCN 1x", (41.1, 23.3, 56.7), (37.2, 20.7, 55.7), "the same"),
    PublishedDetector("HTC X101-64x4d-DCN", (50.6, 32.7, 64.7), (43.8, 28.1, 64.0), "the same"),
)
COCO_VAL_IMAGES = 5000


def unlike_published(set_name: str, flags: Mapping[str, Any]) -> Iterator[str]:
    """What is unlike the protocol of `PUBLISHED` in the flags of one of its sets; nothing where it is the same."""
    if flags.get("subset") is not False or flags.get("images") != SET_IMAGES[set_name]:
        yield f"{_plain(flags.get('images'))} images, published on {SET_IMAGES[set_name]:,}"
    if flags.get("img_size") != "224x224":
        yield f"images of {_plain(flags.get('img_size'))} px, published at 224"
    if flags.get("transform") == "official":
        yield "the sets' own transform, published with the model's"


def unlike_published_coco(flags: Mapping[str, Any]) -> Iterator[str]:
    """What is unlike the protocol of `PUBLISHED_COCO` in the flags of a sweep; classes and cells are not looked at."""
    if flags.get("subset") is not False or flags.get("images") != COCO_VAL_IMAGES:
        yield f"{_plain(flags.get('images'))} images, published on the {COCO_VAL_IMAGES:,} of COCO val2017"
    if flags.get("definition") != "imagecorruptions" or flags.get("jpeg_step") is not False:
        yield "corruptions of another definition than imagecorruptions without a JPEG step"
    if flags.get("corrupt") != "decoded":
        yield "not corrupted on the decoded image"


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else shown(str(value), 40)
