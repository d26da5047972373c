"""Large-scale jitter of ViTDet, and the resize of its evaluation: pixels through PIL, outlines by the same geometry.

Equal to detectron2's to the last pixel (RandomFlip, ResizeScale, FixedSizeCrop without padding; ResizeShortestEdge).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import shapely
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from core.config import Config
from transfer.detection.coco import Annotation
from transfer.detection.rle import decode
from transfer.detection.targets import InstanceMask, Targets

MIN_SIDE_PX = 1e-5  # boxes of no more are dropped


class JitterConfig(Config):
    """Flip, scale and crop. Defaults: ViTDet's, spec detection 1.2."""

    min_scale: float = Field(0.1, gt=0)  # of the size at which the image just fits the square
    max_scale: float = Field(2.0, gt=0)
    flip_ratio: float = Field(0.5, ge=0, le=1)  # share of images mirrored

    def contradictions(self) -> Iterator[str]:
        """Scales that are no range."""
        if self.min_scale > self.max_scale:
            yield f"min_scale: {self.min_scale:g} is above max_scale, {self.max_scale:g}"


class Draws(NamedTuple):
    """Three numbers in [0, 1) that decide what becomes of an image, drawn in this order."""

    flip: float
    scale: float
    crop: float  # where the square lies, along both axes


@dataclass(frozen=True)
class Geometry:
    """What is done to an image, and to everything in it: flip, resize, crop, in this order.

    Attributes:
        source: (height, width) before.
        resized: (height, width) after the resize.
        offset: (y, x) of the crop in the resized image.
        side: of the square, in pixels; the crop is smaller where the image is.
    """

    source: tuple[int, int]
    flip: bool
    resized: tuple[int, int]
    offset: tuple[int, int]
    side: int

    @staticmethod
    def drawn(source: tuple[int, int], side: int, config: JitterConfig, draws: Draws) -> "Geometry":
        """Large-scale jitter of an image of (height, width) into a square of `side`. Spec detection 1.2."""
        scale = config.min_scale + (config.max_scale - config.min_scale) * draws.scale
        resized = jittered_size(source, side, scale)
        y, x = (round(max(length - side, 0) * draws.crop) for length in resized)
        return Geometry(source, draws.flip < config.flip_ratio, resized, (y, x), side)

    def pixels(self, pixels: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        """Pixels [H, W(, 3)] uint8 of the source, as [h, w(, 3)] with h, w <= side."""
        image = Image.fromarray(pixels[:, ::-1] if self.flip else pixels)
        if self.resized != self.source:
            image = image.resize(self.resized[::-1], resample)
        y, x = self.offset
        return np.asarray(image)[y : y + self.side, x : x + self.side]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Points [P, 2] xy of the source in the resized image, not cropped yet."""
        moved = np.stack([self.source[1] - points[:, 0], points[:, 1]], axis=1) if self.flip else points
        return moved * (self.resized[1] / self.source[1], self.resized[0] / self.source[0])

    def polygons(self, polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The parts of one instance, each [P, 2] xy, clipped to the square: perhaps none, perhaps more parts.

        The square keeps its side where the image is smaller, so a polygon may reach beyond the image as it did before.
        """
        y, x = self.offset
        window = shapely.box(x, y, x + self.side, y + self.side)
        clipped = (part for polygon in polygons for part in clip_polygon(self.points(polygon), window))
        return [part - (x, y) for part in clipped]


def jittered_size(size: tuple[int, int], side: int, scale: float) -> tuple[int, int]:
    """(height, width) of an image scaled to `scale` times the size at which it just fits a square of `side`.

    Rounded half to even, as NumPy does; at least one pixel, where detectron2 fails.
    """
    factor = min(side * scale / size[0], side * scale / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def eval_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) for evaluation: the short side to `side`, unless the long one then passes it. Spec 1.3."""
    scale = side / min(size)
    height, width = scale * size[0], scale * size[1]
    if max(height, width) > side:
        again = side / max(height, width)
        height, width = height * again, width * again
    return max(1, int(height + 0.5)), max(1, int(width + 0.5))


def resize_to_fit(image: Tensor, side: int) -> Tensor:
    """An image uint8 [3, H, W] resized for evaluation: [3, h, w] with h, w <= side."""
    source = (image.shape[1], image.shape[2])
    geometry = Geometry(source, False, eval_size(source, side), (0, 0), side)
    return _moved(image, geometry)


def jitter(
    image: Tensor, objects: Iterable[Annotation], side: int, config: JitterConfig, draws: Draws
) -> tuple[Tensor, Targets]:
    """Large-scale jitter of an image and of the objects in it. Spec detection 1.2.

    Boxes are made anew from what is seen of each object, so that the annotated ones do not matter; crowds and objects
    of which nothing is seen are left out.

    Args:
        image: uint8 [3, H, W].
        objects: in pixels of the image.
        side: of the square that the result fits into.
        draws: what to do, as drawn.
    Returns: uint8 [3, h, w] with h, w <= side; what it holds.
    """
    geometry = Geometry.drawn((image.shape[1], image.shape[2]), side, config, draws)
    boxes, labels, masks = [], [], []
    for each in objects:
        seen = None if each.crowd else _seen(each, geometry)
        if seen is not None:
            boxes.append(seen[0])
            labels.append(each.label)
            masks.append(seen[1])
    stacked = torch.from_numpy(np.stack(boxes)) if boxes else torch.zeros(0, 4)  # [G, 4]
    return _moved(image, geometry), Targets(stacked, torch.tensor(labels, dtype=torch.int64), tuple(masks))


def _moved(image: Tensor, geometry: Geometry) -> Tensor:
    pixels = geometry.pixels(image.permute(1, 2, 0).numpy(), Image.Resampling.BILINEAR)  # [h, w, 3]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # [3, h, w]


def _seen(each: Annotation, geometry: Geometry) -> tuple[np.ndarray, InstanceMask] | None:
    """Box float32 [4] xyxy and mask of what is seen of an object; None if it is nothing."""
    if each.rle is not None:
        return _seen_of_bitmap(geometry.pixels(decode(each.rle).astype(np.uint8), Image.Resampling.NEAREST))
    polygons = geometry.polygons(each.polygons)
    if not polygons:
        return None
    points = np.concatenate(polygons).astype(np.float32)  # [P, 2]
    box = np.concatenate([points.min(axis=0), points.max(axis=0)])
    if min(box[2] - box[0], box[3] - box[1]) <= MIN_SIDE_PX:
        return None
    return box, tuple(polygon.reshape(-1) for polygon in polygons)


def _seen_of_bitmap(bitmap: np.ndarray) -> tuple[np.ndarray, InstanceMask] | None:
    columns, rows = np.flatnonzero(bitmap.any(axis=0)), np.flatnonzero(bitmap.any(axis=1))
    if not len(columns):
        return None
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)
    return box, torch.from_numpy(bitmap.astype(bool))


def clip_polygon(points: np.ndarray, window: shapely.Polygon) -> list[np.ndarray]:
    """What of a polygon [P, 2] lies in a window: outer rings [p, 2] of the parts; holes, lines and points are left out.

    A buffer of no width repairs a polygon that crosses itself. One that cannot be repaired has no parts.
    """
    try:
        whole = shapely.Polygon(points).buffer(0.0)
        shape = whole.intersection(window) if whole.is_valid else shapely.Polygon()
    except shapely.errors.GEOSException:
        return []
    parts = shapely.get_parts(shape)
    rings = [part.exterior.coords for part in parts if isinstance(part, shapely.Polygon) and part.is_valid]
    return [np.asarray(ring)[:-1] for ring in rings if len(ring)]  # the last vertex repeats the first
