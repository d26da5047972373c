"""The weather corruptions: snow, frost, fog and brightness (spec section 2)."""

import torch
from torch import Tensor

from robustness.corruptions.case import Case, Draws, from_filtered, from_unit, unit
from robustness.corruptions.draws import Source
from robustness.corruptions.filters import motion, trim, zoom_centre
from robustness.corruptions.hsv import hsv_to_rgb, rgb_to_hsv
from robustness.corruptions.textures import FILES, FrostTextures, load_textures

SNOW = (  # mean and std of the noise, zoom, threshold, radius px and sigma px of the motion, weight of the image
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))  # weights of image and texture
FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))  # weight of the fog, decay of its amplitude per octave
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV


def brightness(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """A constant added to the value of HSV; in float64, where steps of whole levels round as the reference's."""
    hue, saturation, value = rgb_to_hsv(unit(images, torch.float64))
    value = (value + BRIGHTNESS[case.severity - 1]).clamp(0, 1)
    return from_unit(hsv_to_rgb(hue, saturation, value))


# ---- snow ---------------------------------------------------------------------------------------------------------


def draw_snow(source: Source, case: Case) -> Draws:
    """A standard normal value per pixel; the direction of the flakes, in degrees from -135 to -45."""
    return {"noise": source.normal(case.height, case.width), "degrees": 90 * source.uniform() - 135}


def snow(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """A whitened image under two layers of streaks, one the other turned by 180 degrees."""
    weight = SNOW[case.severity - 1][-1]
    layer = snow_layer(draws, case).to(torch.float32)  # [B, 1, H, W]
    x = unit(images)
    red, green, blue = x.unbind(1)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]  # [B, 1, H, W]
    whitened = weight * x + (1 - weight) * torch.maximum(x, 1.5 * grey + 0.5)
    return from_filtered(255 * (whitened + layer + layer.rot90(2, (-2, -1))))


def snow_layer(draws: Draws, case: Case) -> Tensor:
    """[B, 1, H, W] in 0..1, whole grey levels. In float64, so that every machine cuts the same flakes at the threshold.

    The original trims the layer and quantises it before the motion, by truncation; imagecorruptions does both after it.
    """
    mean, std, zoom, threshold, radius, sigma, _ = SNOW[case.severity - 1]
    layer = zoom_centre((mean + std * draws["noise"].double())[:, None], zoom)  # [B, 1, >= H, >= W]
    layer = torch.where(layer < threshold, 0, layer).clamp(0, 1) * 255
    degrees = draws["degrees"].tolist()
    if case.definition == "imagenet_c":
        layer = trim(layer, case.height, case.width, centred=True).floor()
        return (motion(layer, radius, sigma, degrees, stops_at_border=False) + 0.5).floor() / 255
    layer = motion(layer, radius, sigma, degrees, stops_at_border=True).round() / 255
    return trim(layer, case.height, case.width, centred=False)


# ---- frost --------------------------------------------------------------------------------------------------------


def draw_frost(source: Source, case: Case) -> Draws:
    """Which texture, and where its part starts: row and column."""
    index = source.integers(0, len(FILES))
    texture = _texture(int(index), case)
    top = source.integers(0, texture.shape[1] - case.height)
    left = source.integers(0, texture.shape[2] - case.width)
    return {"place": torch.stack([index, top, left])}  # [3]


def frost(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """The image under a part of a photograph of frost; in float64, where sums of whole levels are whole."""
    image_weight, frost_weight = FROST[case.severity - 1]
    parts = [
        _texture(index, case)[:, top : top + case.height, left : left + case.width]
        for index, top, left in draws["place"].tolist()
    ]
    texture = torch.stack(parts).to(images.device)  # [B, 3, H, W]
    y = image_weight * images.double() + frost_weight * texture.double()
    return y.clamp(0, 255).to(torch.uint8)


def _texture(index: int, case: Case) -> Tensor:
    textures: FrostTextures = case.textures or load_textures()
    return textures.covering(index, case.height, case.width, case.definition == "imagecorruptions")


# ---- fog ----------------------------------------------------------------------------------------------------------


def draw_fog(source: Source, case: Case) -> Draws:
    """One uniform value for every point of the height map but its corner, coarse to fine."""
    return {"uniform": source.uniform(fog_side(case) ** 2 - 1)}


def fog_side(case: Case) -> int:
    """Side of the height map: the next power of two of the longer side, in the original at least 256."""
    side = 1 << (max(case.height, case.width) - 1).bit_length()
    return max(256, side) if case.definition == "imagenet_c" else side


def fog(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """A fractal height map added, and all scaled back to the brightest value of the image."""
    weight, decay = FOG[case.severity - 1]
    heights = diamond_square(draws["uniform"], fog_side(case), decay)  # [B, n, n]
    layer = heights[:, None, : case.height, : case.width]  # [B, 1, H, W]
    x = unit(images, layer.dtype)
    brightest = x.amax((1, 2, 3), keepdim=True)
    # In place: the same sums in the same order, and no more memory to walk through.
    return from_unit(x.add_(weight * layer).mul_(brightest).div_(brightest + weight))


def diamond_square(uniform: Tensor, side: int, decay: float) -> Tensor:
    """Fractal height maps that repeat at their borders.

    Args:
        uniform: [B, side * side - 1] in [0, 1): per octave the centres of squares, then of two sets of diamonds.
        decay: the amplitude is divided by so much from octave to octave; it enters squared, as in the references.
    Returns: [B, side, side] in 0..1 of the type of the draws.
    """
    B, taken = len(uniform), 0
    heights = uniform.new_zeros(B, side, side)
    step, amplitude = side, 100.0

    def displaced(total: Tensor) -> Tensor:
        nonlocal taken
        count = total.shape[1] ** 2
        draws = uniform[:, taken : taken + count].view_as(total)
        taken += count
        return total / 4 + amplitude * (2 * amplitude * draws - amplitude)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]  # [B, side / step, side / step]
        below = corners + corners.roll(-1, 1)
        centres = displaced(below + below.roll(-1, 2))
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = displaced(centres + centres.roll(1, 1) + (corners + corners.roll(-1, 2)))
        heights[:, half::step, ::step] = displaced(centres + centres.roll(1, 2) + (corners + corners.roll(-1, 1)))
        step, amplitude = half, amplitude / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)
