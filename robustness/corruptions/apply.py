"""Corrupt images: `corrupt` in one call, or `draw` and `apply` where the draws are to be kept or given."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robustness.corruptions import blur, digital, noise, spatter, weather
from robustness.corruptions.case import DEFINITIONS, Case, Definition, Draws
from robustness.corruptions.draws import Source, source_of
from robustness.corruptions.textures import FrostTextures

MIN_SIDE = 32  # px
PIXELS_AT_ONCE = 2**22  # on a GPU: 83 images of 224 x 224, about a gigabyte of float64 in flight


class Corruption(NamedTuple):
    """How the draws of one image are made, None where nothing is left to chance, and what becomes of images."""

    draw: Callable[[Source, Case], Draws] | None
    transform: Callable[[Tensor, Draws, Case], Tensor]


CORRUPTIONS: dict[str, Corruption] = {  # in the order of spec section 1.2; a name's place is part of its seeds
    "gaussian_noise": Corruption(noise.draw_normal_field, noise.gaussian_noise),
    "shot_noise": Corruption(noise.draw_uniform_field, noise.shot_noise),
    "impulse_noise": Corruption(noise.draw_impulses, noise.impulse_noise),
    "defocus_blur": Corruption(None, blur.defocus_blur),
    "glass_blur": Corruption(blur.draw_glass, blur.glass_blur),
    "motion_blur": Corruption(blur.draw_motion, blur.motion_blur),
    "zoom_blur": Corruption(None, blur.zoom_blur),
    "snow": Corruption(weather.draw_snow, weather.snow),
    "frost": Corruption(weather.draw_frost, weather.frost),
    "fog": Corruption(weather.draw_fog, weather.fog),
    "brightness": Corruption(None, weather.brightness),
    "contrast": Corruption(None, digital.contrast),
    "elastic_transform": Corruption(digital.draw_elastic, digital.elastic_transform),
    "pixelate": Corruption(None, digital.pixelate),
    "jpeg_compression": Corruption(None, digital.jpeg_compression),
    "speckle_noise": Corruption(noise.draw_normal_field, noise.speckle_noise),
    "gaussian_blur": Corruption(None, blur.gaussian_blur),
    "spatter": Corruption(spatter.draw_spatter, spatter.spatter),
    "saturate": Corruption(None, digital.saturate),
}
NAMES = tuple(CORRUPTIONS)
GROUPS: dict[str, tuple[str, ...]] = {
    "noise": NAMES[:3],
    "blur": NAMES[3:7],
    "weather": NAMES[7:11],
    "digital": NAMES[11:15],
    "extra": NAMES[15:],
}
BENCHMARK, EXTRA = NAMES[:15], NAMES[15:]
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    image_ids: Sequence[int],
    seed: int = 0,
    definition: Definition = "imagenet_c",
    draws_on: str = "cpu",
    textures: FrostTextures | None = None,
) -> Tensor:
    """Corrupt a batch; what becomes of an image depends on its own arguments alone, never on batch or order.

    Args:
        images: uint8 [B, 3, H, W] RGB, sides from 32 px, on any device.
        name: one of `NAMES`. severity: 1..5.
        image_ids: [B] whole numbers from 0; with `seed`, name and severity they make the draws of an image.
        definition: "imagenet_c", as the files of ImageNet-C were made, or "imagecorruptions", the one of detection
            benchmarks; they differ in motion_blur, snow, frost and elastic_transform, and where the size is not
            224 x 224 also in zoom_blur, fog and pixelate (spec section 2.1).
        draws_on: "cpu", the same draws everywhere, or "device", quicker on a GPU and other draws: say so in results.
        textures: of frost, `textures.load_textures(folder)`; by default those of the imagecorruptions package.
    Returns: the same shape, type and device. On the CPU the same bytes whatever the batch; a GPU with draws of the CPU
        is within one level of it. ImageNet-C's files have also been through `digital.jpeg_step`.
    Raises: ValueError with what, got and expected; DataError where frost has no textures.
    """
    case = _case(images, name, severity, definition, textures)
    if len(image_ids) != len(images):
        raise ValueError(f"image_ids: got {len(image_ids)} for {len(images)} images, expected one each")
    if draws_on not in ("cpu", "device"):
        raise ValueError(f"draws_on: got {draws_on!r}, expected cpu or device")
    generator_device = images.device if draws_on == "device" else None
    out = torch.empty_like(images)
    for part in _parts(images):
        drawn = _draw(name, case, image_ids[part], seed, generator_device)
        out[part] = CORRUPTIONS[name].transform(images[part], _moved(drawn, images.device), case)
    return out


def draw(
    name: str,
    severity: int,
    size: tuple[int, int],
    *,
    image_ids: Sequence[int],
    seed: int = 0,
    definition: Definition = "imagenet_c",
    textures: FrostTextures | None = None,
) -> Draws:
    """The draws that `corrupt` makes on the CPU for images of a size (height, width): tensors [B, ...] by name."""
    case = _case(torch.empty(0, 3, *size, dtype=torch.uint8), name, severity, definition, textures)
    return _draw(name, case, image_ids, seed, None)


def apply(
    images: Tensor,
    name: str,
    severity: int,
    *,
    draws: Draws,
    definition: Definition = "imagenet_c",
    textures: FrostTextures | None = None,
) -> Tensor:
    """The deterministic part: uint8 images [B, 3, H, W] with given draws, as `draw` returns them, to the same shape.

    Draws in float64 are computed with in float64. Raises: ValueError as `corrupt`.
    """
    case = _case(images, name, severity, definition, textures)
    wrong = next((key for key, drawn in draws.items() if len(drawn) != len(images)), None)
    if wrong is not None:
        raise ValueError(f"draws[{wrong!r}]: got {len(draws[wrong])} for {len(images)} images, expected one each")
    out = torch.empty_like(images)
    for part in _parts(images):
        given = {key: drawn[part] for key, drawn in draws.items()}
        out[part] = CORRUPTIONS[name].transform(images[part], _moved(given, images.device), case)
    return out


def _case(images: Tensor, name: str, severity: int, definition: Definition, textures: FrostTextures | None) -> Case:
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption: got {name!r}, expected one of {', '.join(NAMES)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: got {severity!r}, expected 1, 2, 3, 4 or 5")
    if definition not in DEFINITIONS:
        raise ValueError(f"definition: got {definition!r}, expected one of {', '.join(DEFINITIONS)}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected torch.uint8 [B, 3, H, W]")
    H, W = images.shape[-2:]
    if min(H, W) < MIN_SIDE:
        raise ValueError(f"images: got {H}x{W} px, expected sides of at least {MIN_SIDE} px")
    return Case(severity, definition, H, W, textures)


def _parts(images: Tensor) -> list[slice]:
    """On the CPU image by image: all in cache, little memory, and sums that cannot depend on the rest of the batch."""
    at_once = max(1, PIXELS_AT_ONCE // (images.shape[-2] * images.shape[-1])) if images.is_cuda else 1
    return [slice(start, start + at_once) for start in range(0, len(images), at_once)]


def _draw(name: str, case: Case, image_ids: Sequence[int], seed: int, device: torch.device | None) -> Draws:
    if min(seed, *image_ids, 0) < 0:
        raise ValueError(f"seed, image_ids: got {min(seed, *image_ids)}, expected whole numbers from 0")
    draw_one, number = CORRUPTIONS[name].draw, NAMES.index(name)
    if draw_one is None or not len(image_ids):
        return {}
    drawn = [draw_one(source_of(seed, int(i), number, case.severity, device), case) for i in image_ids]
    return {key: torch.stack([one[key] for one in drawn]) for key in drawn[0]}


def _moved(draws: Draws, device: torch.device) -> Draws:
    return {key: drawn.to(device) for key, drawn in draws.items()}
