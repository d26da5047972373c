"""Random resize, crop with a limit on the commonest class, flip and photometric distortion, through OpenCV.

Equal to mmsegmentation's to the last pixel for one NumPy seed (RandomResize, RandomCrop, RandomFlip,
PhotoMetricDistortion), but that images are RGB here. Spec segmentation 6.2 and 6.3. Letters: H W an image.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from pydantic import Field, PositiveInt

from core.config import Config

CROP_TRIES = 10
MAX_BRIGHTNESS = 32  # added or taken away, of 255
CONTRAST, SATURATION = (0.5, 1.5), (0.5, 1.5)  # factors
MAX_HUE = 18  # of OpenCV's 180

Size = tuple[int, int]  # height, width


class AugmentConfig(Config):
    """What is done to training images. Defaults: ADE20K as published, spec segmentation 6.2."""

    scale: tuple[PositiveInt, PositiveInt] = (2048, 512)  # long and short side that images are resized to fit
    min_ratio: float = Field(0.5, gt=0)  # of that scale
    max_ratio: float = Field(2.0, gt=0)
    cat_max_ratio: float = Field(0.75, gt=0, le=1)  # of a crop, the share that one class may have; 1.0: any
    flip_ratio: float = Field(0.5, ge=0, le=1)  # share of images mirrored
    photometric: bool = True

    def contradictions(self) -> Iterator[str]:
        """Ranges that are none."""
        if self.min_ratio > self.max_ratio:
            yield f"min_ratio: {self.min_ratio:g} is above max_ratio, {self.max_ratio:g}"
        if self.scale[0] < self.scale[1]:
            yield f"scale: [{self.scale[0]}, {self.scale[1]}] is the long side and then the short one"


def augment(
    image: np.ndarray,
    label: np.ndarray,
    crop: int,
    ignore_index: int,
    config: AugmentConfig,
    draws: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """One training sample.

    Args:
        image: uint8 [H, W, 3] RGB. label: uint8 or int32 [H, W].
        crop: side of the crop, in pixels.
        draws: the kind of generator that the reference draws from, in the same order.
    Returns: image and label, of `crop` x `crop` px, or less along an axis where the resized image is smaller.
    """
    size = drawn_size(label.shape, config, draws)
    image, label = resize_image(image, size), resize_label(label, size)
    place = drawn_crop(label, crop, ignore_index, config.cat_max_ratio, draws)
    image, label = image[place], label[place]
    if flips(config, draws):
        image, label = image[:, ::-1], label[:, ::-1]
    image, label = np.ascontiguousarray(image), np.ascontiguousarray(label)
    return (distorted(image, draws) if config.photometric else image), label


def fitted_size(size: Size, scale: tuple[int, int]) -> Size:
    """(height, width) of an image resized to fit `scale`, (long side, short side), keeping its ratio.

    The short side has its scale's, unless the long side would then pass its own. At least one pixel.
    """
    factor = min(scale[0] / max(size), scale[1] / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """An image uint8 [H, W, 3] at another (height, width): bilinear, not antialiased, as published."""
    return _resized(image, size, cv2.INTER_LINEAR)


def resize_label(label: np.ndarray, size: Size) -> np.ndarray:
    """A label [H, W] at another (height, width), each pixel a copy of the nearest."""
    return _resized(label, size, cv2.INTER_NEAREST)


def _resized(values: np.ndarray, size: Size, interpolation: int) -> np.ndarray:
    same = values.shape[:2] == size
    return values if same else np.asarray(cv2.resize(values, size[::-1], interpolation=interpolation))


def without_threads() -> None:
    """Switch OpenCV's own threads off in this process and in workers forked from it.

    Loader workers are many already; and a fork of a process that has used OpenCV's threads may crash when it says so
    itself. Results do not depend on it.
    """
    cv2.setNumThreads(1)


# ---- what is drawn --------------------------------------------------------------------------------------------------


def drawn_size(size: Size, config: AugmentConfig, draws: np.random.RandomState) -> Size:
    """(height, width) that an image of `size` is resized to."""
    ratio = draws.random_sample() * (config.max_ratio - config.min_ratio) + config.min_ratio
    return fitted_size(size, (max(1, int(config.scale[0] * ratio)), max(1, int(config.scale[1] * ratio))))


def drawn_crop(
    label: np.ndarray, crop: int, ignore_index: int, cat_max_ratio: float, draws: np.random.RandomState
) -> tuple[slice, slice]:
    """Rows and columns of a crop in which no class has more than its share of the labelled pixels.

    After ten crops that have one the last drawn is taken as it is.
    """
    place = _any_crop(label.shape, crop, draws)
    if cat_max_ratio < 1:
        for _ in range(CROP_TRIES):
            counts = np.bincount(label[place].ravel())
            counts[ignore_index : ignore_index + 1] = 0
            if counts.any() and counts.max() / counts.sum() < cat_max_ratio:
                break
            place = _any_crop(label.shape, crop, draws)
    return place


def _any_crop(size: Size, crop: int, draws: np.random.RandomState) -> tuple[slice, slice]:
    top, left = (int(draws.randint(0, max(side - crop, 0) + 1)) for side in size)
    return slice(top, top + crop), slice(left, left + crop)


def flips(config: AugmentConfig, draws: np.random.RandomState) -> bool:
    """Whether an image is mirrored."""
    return draws.random_sample() < config.flip_ratio


# ---- colours --------------------------------------------------------------------------------------------------------


def distorted(image: np.ndarray, draws: np.random.RandomState) -> np.ndarray:
    """Brightness, contrast, saturation and hue of an image uint8 [H, W, 3] RGB, each changed in half of the cases.

    Every change goes back to whole numbers of 0..255 before the next. Contrast comes before or after saturation and
    hue, with equal chances.
    """
    if draws.randint(2):
        image = _scaled(image, 1, draws.uniform(-MAX_BRIGHTNESS, MAX_BRIGHTNESS))
    contrast_first = draws.randint(2) == 1
    if contrast_first and draws.randint(2):
        image = _scaled(image, draws.uniform(*CONTRAST), 0)
    if draws.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _scaled(hsv[..., 1], draws.uniform(*SATURATION), 0)
        image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    if draws.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hue = (np.arange(256) + draws.randint(-MAX_HUE, MAX_HUE)) % 180
        hsv[..., 0] = _looked_up(hsv[..., 0], hue.astype(np.uint8))
        image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    if not contrast_first and draws.randint(2):
        image = _scaled(image, draws.uniform(*CONTRAST), 0)
    return image


def _scaled(values: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """uint8 values times a factor plus a shift, cut to 0..255 and then to whole numbers; through a table, bit-equal."""
    table = np.clip(np.arange(256, dtype=np.float32) * factor + shift, 0, 255).astype(np.uint8)
    return _looked_up(values, table)


def _looked_up(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.LUT(np.ascontiguousarray(values), table))
