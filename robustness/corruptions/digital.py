"""The digital corruptions: contrast, elastic_transform, pixelate, jpeg_compression, saturate (spec section 2)."""

import io
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustness.corruptions.case import Case, Definition, Draws, from_filtered, from_unit, unit
from robustness.corruptions.draws import Source
from robustness.corruptions.filters import gaussian, sample
from robustness.corruptions.hsv import hsv_to_rgb, rgb_to_hsv

CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # of the difference to the mean of a channel
SATURATE = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))  # factor and term of the saturation of HSV
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # of the sides
JPEG_QUALITY = (25, 18, 15, 10, 7)
RELEASE_QUALITY = 85  # of the files of ImageNet-C
ELASTIC_ORIGINAL = (  # displacement factor, sigma px, jitter px of the affine map; the same for every size
    (244 * 2, 244 * 0.7, 244 * 0.1),
    (244 * 2, 244 * 0.08, 244 * 0.2),
    (244 * 0.05, 244 * 0.01, 244 * 0.02),
    (244 * 0.07, 244 * 0.01, 244 * 0.02),
    (244 * 0.12, 244 * 0.01, 244 * 0.02),
)
ELASTIC_FACTOR = (250 * 0.05, 250 * 0.065, 250 * 0.085, 250 * 0.1, 250 * 0.12)  # of imagecorruptions


def contrast(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Closer to the mean of each channel. The sum behind the mean is one of whole numbers, and exact."""
    pixels = case.height * case.width
    mean = images.sum((2, 3), keepdim=True).double() / 255 / pixels  # [B, 3, 1, 1]
    return from_unit((unit(images, torch.float64) - mean) * CONTRAST[case.severity - 1] + mean)


def saturate(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """The saturation of HSV scaled and raised; in float64, as brightness."""
    factor, term = SATURATE[case.severity - 1]
    hue, saturation, value = rgb_to_hsv(unit(images, torch.float64))
    return from_unit(hsv_to_rgb(hue, (saturation * factor + term).clamp(0, 1), value))


# ---- jpeg ---------------------------------------------------------------------------------------------------------


def jpeg_compression(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Coded and decoded by PIL, on the host."""
    return _through_jpeg(images, JPEG_QUALITY[case.severity - 1], optimize=False)


def jpeg_step(images: Tensor) -> Tensor:
    """What storing does to the files of ImageNet-C: JPEG of quality 85, 4:2:0, on uint8 [B, 3, H, W].

    It takes away a quarter of the noise of the noise corruptions, so that figures without it are not comparable (spec
    section 1). Coded by PIL on the host; returned on the images' device.
    """
    return _through_jpeg(images, RELEASE_QUALITY, optimize=True)


def _through_jpeg(images: Tensor, quality: int, optimize: bool) -> Tensor:
    decoded = []
    for planes in images.cpu().numpy():  # [3, H, W]; PIL interleaves them more quickly than a permutation would
        file = io.BytesIO()
        image = Image.merge("RGB", [Image.fromarray(plane) for plane in planes])
        image.save(file, "JPEG", quality=quality, optimize=optimize)
        with Image.open(file) as coded:
            decoded.append(np.stack([np.asarray(plane) for plane in coded.split()]))
    return torch.from_numpy(np.stack(decoded)).to(images.device)  # [B, 3, H, W]


# ---- pixelate -----------------------------------------------------------------------------------------------------


def pixelate(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Down by PIL's box filter, width before height and rounded after each; up by repetition."""
    ratio = PIXELATE[case.severity - 1]
    sides, device = (case.height, case.width), images.device
    height, width = (int(side * ratio) for side in sides)
    x = _box_means(images.float(), 3, _boxes(case.width, width, device))  # [B, 3, H, width]
    small = _box_means(x, 2, _boxes(case.height, height, device)).to(torch.uint8)  # [B, 3, height, width]
    origin = _repeated((height, width), sides, case.definition, device).expand(len(images), 3, -1)  # [B, 3, HW]
    return small.flatten(2).gather(2, origin).view(images.shape)


class Boxes(NamedTuple):
    """A line of pixels cut into boxes."""

    box_of: Tensor  # [size] int64: of each pixel; one past the last box where it is in none
    counts: Tensor  # [boxes] float32: pixels in each


def _box_means(x: Tensor, axis: int, boxes: Boxes) -> Tensor:
    """Whole levels [B, 3, H, W] to the rounded means of the boxes along an axis; sums of whole numbers are exact."""
    shape, last = list(x.shape), len(boxes.counts)
    shape[axis] = last + 1
    sums = x.new_zeros(shape).index_add_(axis, boxes.box_of, x).narrow(axis, 0, last)
    return (sums / boxes.counts.view([-1] + [1] * (3 - axis)) + 0.5).floor_()


@lru_cache(maxsize=64)
def _boxes(size: int, count: int, device: torch.device) -> Boxes:
    """A pixel belongs to the box that its centre lies in, the right end included.

    On which side a centre on the border of two boxes falls is a matter of rounding; so all is written as PIL writes it.
    """
    scale = size / count
    pixels, centres = np.arange(size)[:, None], (np.arange(count) + 0.5) * scale
    distance = (pixels - centres + 0.5) * (1 / scale)  # in boxes
    inside = (distance > -0.5) & (distance <= 0.5)  # [size, count]
    first, end = (centres - 0.5 * scale + 0.5).astype(int), (centres + 0.5 * scale + 0.5).astype(int)
    inside &= (pixels >= first) & (pixels < end)
    box_of = np.where(inside.any(axis=1), inside.argmax(axis=1), count)
    return Boxes(torch.from_numpy(box_of).to(device), torch.from_numpy(inside.sum(axis=0)).float().to(device))


@lru_cache(maxsize=64)
def _repeated(size: tuple[int, int], out: tuple[int, int], definition: Definition, device: torch.device) -> Tensor:
    """For every pixel of an enlarged image, the number of the pixel that it repeats: [out height * out width].

    The original enlarges by PIL's box filter and imagecorruptions by NEAREST, which adds up its steps; they part where
    a centre falls on the border of two pixels.
    """
    axes = []
    for n, to in zip(size, out, strict=True):
        step = n / to
        centres = (np.arange(to) + 0.5) * step
        if definition == "imagecorruptions":
            centres = np.add.accumulate(np.concatenate([[0.5 * step], np.full(to - 1, step)]))
        axes.append(centres.astype(np.int64))
    return torch.from_numpy(axes[0][:, None] * size[1] + axes[1]).flatten().to(device)


# ---- elastic transform --------------------------------------------------------------------------------------------


def draw_elastic(source: Source, case: Case) -> Draws:
    """Uniform values: a field for columns, one for rows; before them, in the original, shifts of three points."""
    if case.definition == "imagecorruptions":
        return {"fields": source.uniform(2, case.height, case.width)}
    return {"jitter": source.uniform(3, 2), "fields": source.uniform(2, case.height, case.width)}


def elastic_transform(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Two different corruptions: the original jitters the image by an affine map, imagecorruptions does not."""
    x = images.float()
    if case.definition == "imagenet_c":
        factor, sigma, jitter = ELASTIC_ORIGINAL[case.severity - 1]
        x = _affine(x, jitter * (2 * draws["jitter"] - 1))
        fields, sigmas = 2 * draws["fields"] - 1, (sigma, sigma)
    else:
        factor = ELASTIC_FACTOR[case.severity - 1]
        fields, sigmas = 0.005 * case.height * (2 * draws["fields"] - 1), (0.01 * case.height, 0.01 * case.width)
    shifts = factor * gaussian(fields, sigmas, truncate=3, border="reflect")  # [B, 2, H, W]
    shifts = shifts.float()
    rows = torch.arange(case.height, device=x.device)[:, None] + shifts[:, 1]
    columns = torch.arange(case.width, device=x.device) + shifts[:, 0]
    return from_filtered(sample(x, rows, columns, whole_sample=False))


def _affine(x: Tensor, shifts: Tensor) -> Tensor:
    """Warp x [B, 3, H, W] so that three points move by shifts [B, 3, 2] px, (x, y) each; mirrored at the border."""
    H, W = x.shape[-2:]
    centre, arm = torch.tensor([H // 2, W // 2]), min(H, W) // 3
    points = (centre + arm * torch.tensor([[1, 1], [1, -1], [-1, -1]])).float().to(x.device)  # [3, 2]
    moved = (points + shifts.float()).double()  # [B, 3, 2]
    ones = moved.new_ones(len(x), 3, 1)
    # For every output pixel, where it comes from: the map that takes the moved points to the points.
    back = torch.linalg.solve(torch.cat([moved, ones], dim=2), points.double().expand_as(moved))  # [B, 3, 2]
    ys, xs = (torch.arange(n, dtype=torch.float64, device=x.device) for n in (H, W))
    columns, rows = (
        back[:, 0, i, None, None] * xs + back[:, 1, i, None, None] * ys[:, None] + back[:, 2, i, None, None]
        for i in (0, 1)
    )  # each [B, H, W]
    return sample(x, rows.float(), columns.float(), whole_sample=True)
