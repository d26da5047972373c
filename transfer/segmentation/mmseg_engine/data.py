"""Images and labels of a `SegmentationSet` through mmsegmentation's transforms.

By design they are read by this suite and not by mmsegmentation's datasets: the pairs, what stored labels mean, and what
becomes of a broken file are then the same, whatever the keys say. From the resize on every transform is the
framework's. These draw from NumPy's global generator, which is seeded for each sample: a sample depends on (seed,
epoch, index) alone, and is the crop that this suite would have cut. Letters: H W an image.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmcv.transforms import RandomResize, TestTimeAug
from mmengine.dataset import Compose, InfiniteSampler, pseudo_collate
from mmseg.datasets.transforms import PackSegInputs, PhotoMetricDistortion, RandomCrop, RandomFlip, Resize
from torch import Tensor

from core.datasets import ImageSource
from core.distributed import Processes
from core.errors import DataError, shown
from core.loader import Feed, TrainingImages, eval_loader, image_loader
from transfer.segmentation.augment import AugmentConfig
from transfer.segmentation.data import EvaluationSample, SegmentationEvalImages, read_classes_of
from transfer.segmentation.labels import LabelTable
from transfer.segmentation.pairs import SegmentationSet
from transfer.segmentation.settings import Setting
from transfer.segmentation.tasks import EVAL_BATCH_SIZE, EvalSizes


def training_pipeline(config: AugmentConfig, crop: int, ignore_index: int) -> Compose:
    """The framework's transforms of training images, without its loading ones."""
    ratios = (config.min_ratio, config.max_ratio)
    steps = [
        RandomResize(scale=config.scale, ratio_range=ratios, resize_type=Resize, keep_ratio=True),
        RandomCrop(crop_size=(crop, crop), cat_max_ratio=config.cat_max_ratio, ignore_index=ignore_index),
        RandomFlip(prob=config.flip_ratio),
        *([PhotoMetricDistortion()] if config.photometric else []),
        PackSegInputs(),
    ]
    return Compose(steps)


def evaluation_pipeline(sizes: EvalSizes, flip: bool, window: int | None) -> Compose:
    """The framework's transforms of validation images; labels keep their size.

    Args:
        flip: whether mirror images are looked at as well.
        window: side of the windows, where smaller images cannot be padded.
    """
    check = [Windows(window)] if window else []
    resizes = [_resize(sizes, ratio) for ratio in sizes.ratios]
    if len(resizes) == 1 and not flip:
        return Compose([*resizes, *check, PackSegInputs()])
    flips = [RandomFlip(prob=0.0), *([RandomFlip(prob=1.0)] if flip else [])]
    return Compose([TestTimeAug([resizes, *([check] if check else []), flips, [PackSegInputs()]])])


def _resize(sizes: EvalSizes, ratio: float) -> Resize:
    scale = (int(sizes.scale[0] * ratio), int(sizes.scale[1] * ratio))
    if sizes.least_px is None:
        return Resize(scale=scale, keep_ratio=True)
    return ResizeToLeast(scale=scale, least_px=sizes.least_px)


class ResizeToLeast(Resize):
    """Resize that keeps the ratio, and leaves a short side no smaller than `least_px`.

    mmsegmentation's multi-scale configuration says that its own cannot.
    """

    def __init__(self, scale: tuple[int, int], least_px: int) -> None:
        super().__init__(scale=scale)
        self._sizes = EvalSizes(scale, least_px=least_px)

    def transform(self, results: dict) -> dict:
        """As `Resize.transform`."""
        ((height, width),) = self._sizes(results["img"].shape[:2])
        return Resize(scale=(width, height)).transform(results)


@dataclass(frozen=True)
class Windows:
    """Refuses images that a window does not fit into: a plain ViT's positions would have to be resized for them."""

    side: int

    def __call__(self, results: dict) -> dict:
        """The same. Raises: DataError."""
        height, width = results["img"].shape[:2]
        if min(height, width) < self.side:
            raise DataError(
                f"{shown(results['img_path'])}: evaluated at {width}x{height} px, and of a plain ViT mmsegmentation "
                f"takes windows of {self.side} px alone; give a larger augment.scale, or leave framework=mmseg out"
            )
        return results


def as_results(image: Tensor, label: np.ndarray, name: str, resize_label: bool) -> dict[str, Any]:
    """What the framework's loading transforms give: BGR uint8 [H, W, 3] and a label [H, W].

    Args:
        image: uint8 [3, H, W] RGB.
        resize_label: whether the label follows what is done to the image.
    """
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])  # [H, W, 3] BGR
    size = pixels.shape[:2]
    found = {"img": pixels, "img_path": name, "img_shape": size, "ori_shape": size}
    return found | {"gt_seg_map": label, "seg_fields": ["gt_seg_map"] if resize_label else []}


@dataclass(frozen=True)
class PrepareForMmseg:
    """Augment one image of a set and its label. Runs in a loader worker; a named class so that it can receive it."""

    pairs: SegmentationSet
    table: LabelTable
    pipeline: Compose

    def __call__(self, image: Tensor, rng: np.random.Generator, index: int) -> dict[str, Any]:
        """uint8 [3, H, W] to packed inputs. Raises: as `transfer.segmentation.data.PrepareSegmentation`."""
        label = read_classes_of(self.pairs, self.table, index, (image.shape[1], image.shape[2]))
        np.random.seed(int(rng.integers(2**32)))
        return self.pipeline(as_results(image, label, self.pairs.images.name(index), resize_label=True))


@dataclass(frozen=True)
class InfiniteOrder:
    """Micro-batches of mmengine's InfiniteSampler as (epoch, index), from one of them on."""

    num_images: int
    micro_batch: int
    seed: int
    first: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield [(epoch, index), ...] of each micro-batch, without end."""
        indices = enumerate(InfiniteSampler(range(self.num_images), shuffle=True, seed=self.seed))
        rest = itertools.islice(indices, self.first * self.micro_batch, None)
        while True:
            yield [(place // self.num_images, index) for place, index in itertools.islice(rest, self.micro_batch)]


def training_feed(setting: Setting, first: int, broken: dict[str, str]) -> Feed:
    """Packed micro-batches, one at a time, from number `first` on; `broken` are the broken images met before."""
    config, inputs, plan = setting.config, setting.inputs, setting.plan
    pipeline = training_pipeline(config.augment, config.img_size, config.ignore_index)
    prepare = PrepareForMmseg(inputs.train, inputs.table, pipeline)
    images = TrainingImages(inputs.train.images, config.seed, prepare, 3, config.loader.max_pixels)
    order = InfiniteOrder(len(inputs.train), plan.micro_batch, config.seed, first)
    loader = image_loader(images, order, pseudo_collate, setting.num_workers, config.loader.timeout_s)  # type: ignore[arg-type]  # it is only iterated
    return Feed(loader, 1, config.loader.max_broken_share * len(inputs.train), broken)


@dataclass(frozen=True)
class PackEvaluation:
    """One sample of an evaluation as the framework's packed inputs. Runs in a loader worker."""

    source: ImageSource
    pipeline: Compose

    def __call__(self, samples: Sequence[EvaluationSample]) -> dict[str, Any]:
        """A batch of one."""
        (sample,) = samples
        (image,) = sample.images
        results = as_results(image, sample.label.numpy(), self.source.name(sample.row), resize_label=False)
        return pseudo_collate([self.pipeline(results)])


def as_read(image: Tensor) -> tuple[Tensor]:
    """An image as it was read: the framework resizes it."""
    return (image,)


def evaluation_batches(
    pairs: SegmentationSet, table: LabelTable, pipeline: Compose, num_workers: int, timeout_s: int
) -> Iterator[dict[str, Any]]:
    """Every image of a set once, in order, packed. Raises: DataError naming a broken image or label."""
    images = SegmentationEvalImages(source=pairs.images, transform=as_read, pairs=pairs, table=table)
    pack = PackEvaluation(pairs.images, pipeline)
    return eval_loader(images, EVAL_BATCH_SIZE, num_workers, timeout_s, Processes(), pack)
