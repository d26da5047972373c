"""Training augmentation of classifiers: RandAugment, random erasing, mixup and cutmix, drawn from what each is given.

Source: the published fine-tuning of MAE with timm 0.3.2's augmentations; spec classify sections 2.4, 2.5 and 3.
Pixel operations are Pillow's, as there; what is drawn comes from explicit generators instead of global ones.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field
from torch import Tensor

from core.config import Config
from core.transforms import AugmentConfig, Box

BICUBIC = Image.Resampling.BICUBIC


class RandAugmentConfig(Config):
    """RandAugment with increasing severity (timm's rand-m9-mstd0.5-inc1)."""

    num_ops: int = Field(2, ge=0)  # operations picked per image, each applied with probability 1/2; 0: none
    magnitude: float = Field(9.0, ge=0, le=10)
    magnitude_std: float = Field(0.5, ge=0)


class MixConfig(Config):
    """Mixup and cutmix of whole batches, and label smoothing."""

    mixup: float = Field(0.8, ge=0)  # alpha of Beta(alpha, alpha); 0: no mixup
    cutmix: float = Field(1.0, ge=0)
    prob: float = Field(1.0, ge=0, le=1)  # share of batches that are mixed
    switch_prob: float = Field(0.5, ge=0, le=1)  # share of the mixed ones that are cut, where both are on
    smoothing: float = Field(0.1, ge=0, lt=1)


# ---- RandAugment ----------------------------------------------------------------------------------------------------

Fill = tuple[int, ...]


def rand_augment(image: Tensor, config: RandAugmentConfig, fill: Fill, rng: np.random.Generator) -> Tensor:
    """Apply random operations to a uint8 image [C, H, W] (C = 1 or 3).

    Args:
        fill: value per channel of what comes into view, round(255 * mean).
    """
    if not config.num_ops:
        return image
    pixels = image.permute(1, 2, 0).numpy()  # [H, W, C]
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    names = list(OPERATIONS)
    for pick in rng.integers(len(names), size=config.num_ops):
        if rng.random() > 0.5:
            continue
        magnitude = float(np.clip(rng.normal(config.magnitude, config.magnitude_std), 0, 10))
        sign = 1 if rng.random() < 0.5 else -1
        picture = OPERATIONS[names[pick]](picture, magnitude, sign, fill)
    return torch.from_numpy(np.array(picture).reshape(*pixels.shape)).permute(2, 0, 1)  # [C, H, W]


def _affine(picture: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    colour = fill if len(fill) > 1 else fill[0]
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=colour)


def _rotate(picture: Image.Image, m: float, sign: int, fill: Fill) -> Image.Image:
    return picture.rotate(sign * 3 * m, BICUBIC, fillcolor=fill if len(fill) > 1 else fill[0])


def _posterize(picture: Image.Image, m: float, sign: int, fill: Fill) -> Image.Image:
    kept = 255 & ~(255 >> (4 - int(0.4 * m)))  # the highest bits; none of them at magnitude 10, which Pillow refuses
    return picture.point([value & kept for value in range(256)] * len(picture.getbands()))


def _solarize(picture: Image.Image, m: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(25.6 * m))


def _solarize_add(picture: Image.Image, m: float, sign: int, fill: Fill) -> Image.Image:
    table = [min(255, value + int(11 * m)) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> "Operation":
    return lambda picture, m, sign, fill: kind(picture).enhance(max(0.1, 1 + sign * 0.09 * m))


Operation = Callable[[Image.Image, float, int, Fill], Image.Image]  # picture, magnitude 0..10, sign, fill

OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda picture, m, sign, fill: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, m, sign, fill: ImageOps.equalize(picture),
    "Invert": lambda picture, m, sign, fill: ImageOps.invert(picture),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhanced(ImageEnhance.Color),
    "Contrast": _enhanced(ImageEnhance.Contrast),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "ShearX": lambda picture, m, sign, fill: _affine(picture, (1, sign * 0.03 * m, 0, 0, 1, 0), fill),
    "ShearY": lambda picture, m, sign, fill: _affine(picture, (1, 0, 0, sign * 0.03 * m, 1, 0), fill),
    "TranslateX": lambda p, m, sign, fill: _affine(p, (1, 0, sign * 0.045 * m * p.size[0], 0, 1, 0), fill),
    "TranslateY": lambda p, m, sign, fill: _affine(p, (1, 0, 0, 0, 1, sign * 0.045 * m * p.size[1]), fill),
}


# ---- crops and erasing ----------------------------------------------------------------------------------------------


def crop_box_without_rejection(image_size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator) -> Box:
    """The crop of the published linear probe: of random area and aspect, cut to the image. Spec classify section 3."""
    H, W = image_size
    log_ratio = math.log(config.max_ratio)
    area = H * W * rng.uniform(config.min_scale, 1.0)
    aspect = math.exp(rng.uniform(-log_ratio, log_ratio))  # width / height
    width, height = min(round(math.sqrt(area * aspect)), W), min(round(math.sqrt(area / aspect)), H)
    return int(rng.integers(H - height + 1)), int(rng.integers(W - width + 1)), height, width


def erase_box(size: tuple[int, int], prob: float, rng: np.random.Generator) -> Box:
    """The part of an image of (height, width) that is erased, with probability `prob`; of no area where none is."""
    if rng.random() > prob:
        return 0, 0, 0, 0
    H, W = size
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * H * W
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < H and width < W:
            return int(rng.integers(H - height + 1)), int(rng.integers(W - width + 1)), height, width
    return 0, 0, 0, 0


def erase(images: Tensor, boxes: Tensor, generator: torch.Generator) -> Tensor:
    """Fill boxes [B, 4] (top, left, height, width) of normalised images [B, C, H, W] with unit normal noise."""
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    top, left, height, width = boxes.unsqueeze(-1).unbind(1)  # each [B, 1]
    inside_rows = (rows >= top) & (rows < top + height)  # [B, H]
    inside_columns = (columns >= left) & (columns < left + width)  # [B, W]
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]  # [B, 1, H, W]
    noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
    return torch.where(inside, noise, images)


# ---- mixing ---------------------------------------------------------------------------------------------------------


def mix(
    images: Tensor, labels: Tensor, num_classes: int, config: MixConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of a batch with itself reversed; one draw for the whole batch.

    Args:
        images: [B, C, H, W] float; labels: [B] int64.
    Returns: images, and targets [B, K] float32 that sum to one.
    """
    ratio, box = _draw_mix(config, (images.shape[-2], images.shape[-1]), rng)
    if box is not None:
        top, bottom, left, right = box
        images = images.clone()
        images[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    elif ratio < 1:
        images = images * ratio + images.flip(0) * (1 - ratio)
    return images, mixed_targets(labels, num_classes, ratio, config.smoothing)


def _draw_mix(
    config: MixConfig, size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, tuple[int, int, int, int] | None]:
    """The weight of the unreversed images, and for cutmix the box (top, bottom, left, right) of the others."""
    kinds = [kind for kind, alpha in (("mixup", config.mixup), ("cutmix", config.cutmix)) if alpha > 0]
    if not kinds or rng.random() >= config.prob:
        return 1.0, None
    cut = rng.random() < config.switch_prob if len(kinds) == 2 else kinds == ["cutmix"]
    if not cut:
        return float(rng.beta(config.mixup, config.mixup)), None
    ratio = float(rng.beta(config.cutmix, config.cutmix))
    H, W = size
    height, width = (int(side * math.sqrt(1 - ratio)) for side in (H, W))
    row, column = int(rng.integers(H)), int(rng.integers(W))
    # Half the side either way, rounded down: an odd side loses one pixel, as in the published runs.
    top, bottom = (int(np.clip(row + step * (height // 2), 0, H)) for step in (-1, 1))
    left, right = (int(np.clip(column + step * (width // 2), 0, W)) for step in (-1, 1))
    return 1 - (bottom - top) * (right - left) / (H * W), (top, bottom, left, right)


def mixed_targets(labels: Tensor, num_classes: int, ratio: float, smoothing: float) -> Tensor:
    """Smoothed targets of labels [B], mixed with those of the reversed batch: [B, K] float32."""
    low = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), low, device=labels.device)
    targets.scatter_(1, labels.unsqueeze(1), 1 - smoothing + low)
    return targets * ratio + targets.flip(0) * (1 - ratio)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_k target_k log softmax(logits)_k, in float32; logits and targets [B, K]."""
    return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1).mean()
