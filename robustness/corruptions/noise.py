"""The noise corruptions: gaussian, shot, impulse and speckle. Arithmetic in the type of the draws (spec section 2)."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustness.corruptions.case import Case, Draws, from_unit, unit
from robustness.corruptions.draws import Source

GAUSSIAN_STD = (0.08, 0.12, 0.18, 0.26, 0.38)  # per severity, of the range 0..1
SPECKLE_STD = (0.15, 0.2, 0.35, 0.45, 0.6)  # of the pixel's own value
SHOT_PHOTONS = (60, 25, 12, 5, 3)  # mean count of a white pixel
IMPULSE_RATIO = (0.03, 0.06, 0.09, 0.17, 0.27)  # share of channel values set to 0 or 1

CELLS = 1024  # of the guide into the inverse Poisson distribution, per grey level


def draw_normal_field(source: Source, case: Case) -> Draws:
    """A standard normal value per channel value."""
    return {"noise": source.normal(3, case.height, case.width)}


def gaussian_noise(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """x + n, n normal."""
    noise = draws["noise"]
    return from_unit(unit(images, noise.dtype).add_(noise * GAUSSIAN_STD[case.severity - 1]))


def speckle_noise(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """x + x n, n normal."""
    noise = draws["noise"]
    x = unit(images, noise.dtype)
    return from_unit(x + x * (noise * SPECKLE_STD[case.severity - 1]))


def draw_impulses(source: Source, case: Case) -> Draws:
    """Which channel values are lost, and which of those turn white."""
    shape = (3, case.height, case.width)
    return {
        "flipped": source.uniform(*shape) <= IMPULSE_RATIO[case.severity - 1],
        "salt": source.uniform(*shape) <= 0.5,
    }


def impulse_noise(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Salt and pepper, on every channel by itself."""
    return torch.where(draws["flipped"], draws["salt"] * images.new_tensor(255), images)


def draw_uniform_field(source: Source, case: Case) -> Draws:
    """A uniform value per channel value."""
    return {"uniform": source.uniform(3, case.height, case.width)}


def shot_noise(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Poisson counts of mean x c, divided by c: the uniform draws through the inverse distribution."""
    photons = SHOT_PHOTONS[case.severity - 1]
    counts = poisson_counts(images, draws["uniform"], photons)
    level = (np.arange(photons + 1) / float(photons) * 255).astype(np.uint8)
    return torch.from_numpy(level).to(images.device).index_select(0, counts.flatten()).view(images.shape)


def poisson_counts(images: Tensor, uniform: Tensor, photons: int) -> Tensor:
    """The inverse Poisson distribution: the smallest count whose cumulative probability exceeds the uniform draw.

    Args:
        images: uint8, any shape; grey level g has mean g / 255 * photons.
        uniform: the same shape, in [0, 1).
    Returns: int32 counts up to `photons`; all larger ones, white like it, are given as `photons`.
    """
    table = poisson_table(photons, uniform.dtype, images.device)
    levels, u = images.flatten().int(), uniform.flatten()
    cells = levels * CELLS + (u * CELLS).int()
    counts = table.guide.index_select(0, cells)
    rows = levels * (photons + 1)
    behind = (table.cumulative.index_select(0, rows + counts) <= u).nonzero().squeeze(1)  # few: the guide is fine
    while len(behind):
        counts[behind] += 1
        reached = table.cumulative.index_select(0, rows[behind] + counts[behind]) > u[behind]
        behind = behind[~reached]
    return counts.view(images.shape)


class PoissonTable(NamedTuple):
    """Cumulative probabilities of 256 grey levels, and where to start looking in them."""

    cumulative: Tensor  # [256 * (photons + 1)] of count <= k, the last of each level infinite
    guide: Tensor  # [256 * CELLS] int32: the count at the lower end of a cell of uniform draws


@lru_cache(maxsize=16)
def poisson_table(photons: int, dtype: torch.dtype, device: torch.device) -> PoissonTable:
    """The table of one severity, made once per process."""
    counts = np.arange(photons)
    means = np.arange(256)[:, None] / 255 * photons
    ratios = np.concatenate([np.exp(-means), means / (counts[1:])], axis=1)  # [256, photons]
    cumulative = np.cumprod(ratios, axis=1).cumsum(axis=1)
    cumulative = np.append(cumulative, np.full((256, 1), np.inf), axis=1)  # [256, photons + 1]
    cumulative = torch.from_numpy(cumulative).to(dtype).numpy()  # the guide must see what the comparison will
    edges = np.arange(CELLS) / CELLS
    guide = np.stack([np.searchsorted(row, edges, side="right") for row in cumulative]).astype(np.int32)
    return PoissonTable(torch.from_numpy(cumulative).flatten().to(device), torch.from_numpy(guide).flatten().to(device))
