"""Crops, flips and normalisation: random ones on uint8 tensors in the loader's workers, published ones through PIL."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from core.config import Config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
DrawBox = Callable[[tuple[int, int], "AugmentConfig", np.random.Generator], Box]  # of an image of (height, width)


class AugmentConfig(Config):
    """Random resized crop and horizontal flip. Defaults: MAE and RC-MAE, spec section 5.4."""

    min_scale: float = Field(0.2, gt=0, le=1)  # smallest share of the image's area that a crop takes
    max_ratio: float = Field(4 / 3, ge=1)  # largest aspect ratio of a crop; the smallest is its inverse
    flip_ratio: float = Field(0.5, ge=0, le=1)  # share of images mirrored


def random_crop_flip(
    image: Tensor,
    size: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
    draw_box: DrawBox | None = None,
) -> Tensor:
    """Random resized crop (bicubic, antialiased) and flip of a uint8 image [C, H, W] to [C, *size], drawn from rng.

    Args:
        draw_box: which part is cut out; None: `random_crop_box`.
    """
    top, left, height, width = (draw_box or random_crop_box)((image.shape[-2], image.shape[-1]), config, rng)
    crop = image[:, top : top + height, left : left + width]
    crop = VF.resize(crop, list(size), interpolation=VF.InterpolationMode.BICUBIC, antialias=True)  # [C, *size]
    return crop.flip(-1) if rng.random() < config.flip_ratio else crop


def random_crop_box(image_size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator) -> Box:
    """A crop of random area and aspect inside an image of (height, width); after ten misses the central crop.

    The algorithm of torchvision's RandomResizedCrop, drawn from an explicit generator (spec section 5.4).
    """
    H, W = image_size
    log_ratio = math.log(config.max_ratio)
    for _ in range(10):
        area = H * W * rng.uniform(config.min_scale, 1.0)
        ratio = math.exp(rng.uniform(-log_ratio, log_ratio))  # width / height
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= W and 0 < height <= H:
            return int(rng.integers(H - height + 1)), int(rng.integers(W - width + 1)), height, width
    height = min(H, round(W * config.max_ratio))  # the whole image, its aspect clamped to the allowed range
    width = min(W, round(H * config.max_ratio))
    return (H - height) // 2, (W - width) // 2, height, width


def resize_center_crop(image: Tensor, size: tuple[int, int], crop_ratio: float) -> Tensor:
    """Evaluation transform of a uint8 image [C, H, W]: resize the shorter side with PIL, crop the centre to `size`.

    The image is scaled so that `size` covers `crop_ratio` of it (224 of 256 at 0.875), bicubic, as published.
    """
    H, W = image.shape[-2:]
    if max(H, W) > 16 * min(H, W):  # a strip would grow to gigabytes, of which only the middle is kept
        image = VF.center_crop(image, [min(H, 16 * W), min(W, 16 * H)])
        H, W = image.shape[-2:]
    scale = max(int(size[0] / crop_ratio) / H, int(size[1] / crop_ratio) / W)
    target = max(size[1], int(W * scale + 1e-6)), max(size[0], int(H * scale + 1e-6))  # PIL: (width, height)
    pixels = image.permute(1, 2, 0).numpy()  # [H, W, C]
    resized = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    if target != (W, H):
        resized = resized.resize(target, Image.Resampling.BICUBIC)
    left, top = round((target[0] - size[1]) / 2), round((target[1] - size[0]) / 2)
    crop = np.array(resized.crop((left, top, left + size[1], top + size[0])))
    return torch.from_numpy(crop.reshape(*size, -1)).permute(2, 0, 1)  # [C, *size]


@dataclass(frozen=True)
class EvalTransform:
    """`resize_center_crop` at a size; a named class so that loader workers can receive it."""

    size: tuple[int, int]
    crop_ratio: float

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [C, h, w] to uint8 [C, *size]."""
        return resize_center_crop(image, self.size, self.crop_ratio)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 images [B, C, H, W] to (image / 255 - mean) / std in `dtype`, on the images' device."""
    # Filled on the device: a tensor copied there from the host's ordinary memory would wait for all that is queued.
    shift, scale = (
        torch.stack([torch.full((1, 1), value, dtype=dtype, device=images.device) for value in values])
        for values in (mean, std)
    )  # each [C, 1, 1]
    return (images.to(dtype) / 255 - shift) / scale


def normalized_images(images: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """A network's input: ImageNet's mean and deviation, then zeros around the content.

    Args:
        images: uint8 [B, 3, H, W].
        sizes: int64 [B, 2], (height, width) of the content, which begins top left.
    Returns: [B, 3, H, W] in `dtype`.
    """
    images = normalize(images, IMAGENET_MEAN, IMAGENET_STD, dtype)
    rows, columns = (
        torch.arange(side, device=images.device) < sizes[:, axis, None] for axis, side in enumerate(images.shape[2:])
    )  # [B, H], [B, W]
    return images * (rows[:, None, :, None] & columns[:, None, None, :])
