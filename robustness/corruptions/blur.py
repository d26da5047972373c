"""The blur corruptions: defocus, glass, motion, zoom and gaussian (spec section 2)."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustness.corruptions.case import HAIR, Case, Draws, from_filtered
from robustness.corruptions.draws import Source
from robustness.corruptions.filters import gaussian, motion, trim, zoom_centre

GAUSSIAN_SIGMA = (1, 2, 3, 4, 6)  # px
DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # radius px, sigma px of its soft edge
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))  # sigma px, reach px, passes
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # radius px, sigma px
ZOOMS = tuple(
    tuple(float(z) for z in np.arange(1, stop, step))  # floating steps: the first list holds 1.11
    for stop, step in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
)


def gaussian_blur(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Gaussian, the edge replicated."""
    return from_filtered(gaussian(images.float(), GAUSSIAN_SIGMA[case.severity - 1]))


# ---- defocus ------------------------------------------------------------------------------------------------------


def defocus_blur(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """A disk with a soft edge; mirrored borders. Through the Fourier transform: a disk of radius 10 has 317 cells."""
    kernel = disk(*DEFOCUS[case.severity - 1])
    radius = len(kernel) // 2
    x = F.pad(images.float(), (radius,) * 4, mode="reflect")  # [B, 3, H + 2 radius, W + 2 radius]
    size = (_smooth_size(x.shape[-2]), _smooth_size(x.shape[-1]))
    # The kernel is symmetric, so that correlation is convolution; wrapped around ends fall into the padding's reach.
    spectrum = torch.fft.rfft2(x, s=size) * _disk_spectrum(case.severity, size, images.device)
    y = torch.fft.irfft2(spectrum, s=size)
    y = y[..., 2 * radius : 2 * radius + case.height, 2 * radius : 2 * radius + case.width]  # [B, 3, H, W]
    # The references' float32 weights of severities 1 to 3 add up to a hair less than one, and every flat area loses a
    # level. It is always so, and part of the definition.
    return from_filtered(y - 2 * HAIR)


@lru_cache(maxsize=64)
def _disk_spectrum(severity: int, size: tuple[int, int], device: torch.device) -> Tensor:
    kernel = torch.from_numpy(disk(*DEFOCUS[severity - 1])).to(device)
    return torch.fft.rfft2(kernel, s=size)


def disk(radius: int, edge_sigma: float) -> np.ndarray:
    """A disk of float32 weights, blurred a little at its edge, on a grid of at least 17 x 17.

    The blur mirrors at the border of the grid, which a disk of radius 8 or 10 touches. Those two sum to 1.013 and 1.011
    and brighten the image, in the references and so here.
    """
    half = max(8, radius)
    grid = np.arange(-half, half + 1)
    weights = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(np.float32)
    weights /= weights.sum()
    reach = 1 if radius <= 8 else 2
    edge = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * edge_sigma**2))
    edge /= edge.sum()
    padded = np.pad(weights.astype(np.float64), reach, mode="reflect")
    rows = np.lib.stride_tricks.sliding_window_view(padded, len(edge), axis=0) @ edge
    return (np.lib.stride_tricks.sliding_window_view(rows, len(edge), axis=1) @ edge).astype(np.float32)


def _smooth_size(size: int) -> int:
    """The next length whose only prime factors are 2, 3 and 5: quick to transform."""
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


# ---- glass --------------------------------------------------------------------------------------------------------


def draw_glass(source: Source, case: Case) -> Draws:
    """Per pass and visited pixel, in the order of visits, where it looks: (column, row) offsets."""
    _, reach, passes = GLASS[case.severity - 1]
    shape = (passes, case.height - 2 * reach, case.width - 2 * reach, 2)
    return {"offsets": source.integers(-reach, reach, *shape)}


def glass_blur(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Blur, let every pixel take the value of a near one, blur."""
    sigma, reach, passes = GLASS[case.severity - 1]
    y = from_filtered(gaussian(images.float(), sigma))
    for i in range(passes):
        y = copy_from_neighbours(y, draws["offsets"][:, i], reach)
    return from_filtered(gaussian(y.float(), sigma))


def copy_from_neighbours(images: Tensor, offsets: Tensor, reach: int) -> Tensor:
    """One pass over the pixels from the bottom right, each in turn taking the value that a near one has by then.

    Taken all at once: a pixel whose source was visited before it takes what that one took, and so on; chains are
    followed by doubling. (The references mean to swap, but views alias, and it is a copy: spec section 2.)

    Args:
        images: [B, C, H, W] of any type.
        offsets: [B, H - 2 reach, W - 2 reach, 2] in [-reach, reach), (column, row), in the order of visits.
    """
    B, _, H, W = images.shape
    device, pixels = images.device, H * W
    ys = torch.arange(H - reach, reach, -1, device=device)[:, None]  # rows and columns reach + 1 .. size - reach
    xs = torch.arange(W - reach, reach, -1, device=device)
    source_y, source_x = ys + offsets[..., 1], xs + offsets[..., 0]  # each [B, h, w]
    here, there = (ys * W + xs).flatten(), (source_y * W + source_x).flatten(1)  # [hw], [B, hw]
    visited = (source_y > reach) & (source_y <= H - reach) & (source_x > reach) & (source_x <= W - reach)
    before = visited.flatten(1) & (there > here)

    # Numbers below `pixels` are pixels as they end, those from `pixels` on as they were: these point to themselves.
    points_to = torch.arange(2 * pixels, device=device).repeat(B, 1)
    points_to[:, :pixels] += pixels
    points_to[:, here] = torch.where(before, there, there + pixels)
    while bool((points_to[:, :pixels] < pixels).any()):
        points_to = points_to.gather(1, points_to)
    origin = (points_to[:, :pixels] - pixels)[:, None].expand(-1, images.shape[1], -1)  # [B, C, HW]
    return images.flatten(2).gather(2, origin).view(images.shape)


# ---- motion and zoom ----------------------------------------------------------------------------------------------


def draw_motion(source: Source, case: Case) -> Draws:
    """The direction, in degrees from -45 to 45."""
    return {"degrees": 90 * source.uniform() - 45}


def motion_blur(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Along a line, rounded as ImageMagick does or truncated as imagecorruptions does."""
    original = case.definition == "imagenet_c"
    radius, sigma = MOTION[case.severity - 1]
    y = motion(images.float(), radius, sigma, draws["degrees"].tolist(), stops_at_border=not original)
    return (y + 0.5).clamp(0, 255).to(torch.uint8) if original else from_filtered(y)


def zoom_blur(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """The mean of the image and its enlargements."""
    zooms = ZOOMS[case.severity - 1]
    x = images.float().contiguous(memory_format=torch.channels_last)  # interpolates a third faster
    total = x.clone()
    for factor in zooms:
        total += trim(zoom_centre(x, factor), case.height, case.width, centred=case.definition == "imagenet_c")
    return from_filtered(total / (len(zooms) + 1)).contiguous()
