"""Anchors: boxes of fixed sizes and shapes around every cell of the pyramid's maps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorGenerator:
    """Anchors of the levels of a pyramid. Spec detection 3.1.

    Corners are not rounded, and a cell's anchors stand around its top left corner (offset 0), both as published.

    Attributes:
        sizes: side in pixels of the square anchor of each level.
        aspect_ratios: height / width, the same on all levels.
        strides: side in pixels of a cell of each level.
    """

    sizes: tuple[float, ...]
    aspect_ratios: tuple[float, ...]
    strides: tuple[int, ...]

    @property
    def num_per_cell(self) -> int:
        """Anchors around one cell."""
        return len(self.aspect_ratios)

    def cell_anchors(self, level: int) -> list[list[float]]:
        """The anchors around the origin, one per aspect ratio."""
        area = self.sizes[level] ** 2
        widths = [math.sqrt(area / ratio) for ratio in self.aspect_ratios]
        heights = [width * ratio for width, ratio in zip(widths, self.aspect_ratios, strict=True)]
        return [[-w / 2, -h / 2, w / 2, h / 2] for w, h in zip(widths, heights, strict=True)]

    def __call__(self, grids: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
        """Per level of (rows, columns) cells the anchors [rows * columns * ratios, 4], in the order y, x, ratio.

        They are made anew each time: a few kernels for 262,000 anchors, and nothing to keep.
        """
        return [self._level(level, grid, device) for level, grid in enumerate(grids)]

    def _level(self, level: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        rows, columns = (torch.arange(n, dtype=torch.float32, device=device) * self.strides[level] for n in grid)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        corners = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)  # [rows * columns, 1, 4]
        cell = torch.tensor(self.cell_anchors(level)).to(device, non_blocking=True)  # [ratios, 4]
        return (corners + cell).flatten(0, 1)  # [rows * columns * ratios, 4]
