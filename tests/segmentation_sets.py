"""Small segmentation sets, with every fault that they may have."""

from pathlib import Path

import numpy as np
from PIL import Image

from transfer.segmentation.pairs import SegmentationSet, open_pairs

Size = tuple[int, int]  # height, width


def picture(size: Size, seed: int = 0) -> np.ndarray:
    """Coloured noise, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def blocks(size: Size, values: int, seed: int = 0) -> np.ndarray:
    """Blocks of stored values 0 to values - 1, uint8 or uint16 [H, W]; all of them where there is room."""
    height, width = size
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    cells = rows[:, None] * 4 + columns  # 0 to 15
    return ((cells + seed) % values).astype(np.uint8 if values <= 256 else np.uint16)


def palette_image(values: np.ndarray) -> Image.Image:
    """Values as indices into a palette of other colours."""
    image = Image.fromarray(values, "P")
    image.putpalette([255 - index for index in range(256) for _ in range(3)])
    return image


def save_pair(root: Path, split: str, name: str, label: np.ndarray | Image.Image, size: Size | None = None) -> None:
    """An image with its label below a root; the image has the label's size unless another is given."""
    stored = label if isinstance(label, Image.Image) else Image.fromarray(label)
    paths = [root / "images" / split / f"{name}.png", root / "annotations" / split / f"{name}.png"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(size or (stored.height, stored.width), len(name))).save(paths[0])
    stored.save(paths[1])


def write_pairs(root: Path, sizes: list[Size], values: int = 4, split: str = "training") -> Path:
    """Pairs called 0, 1, ... of these sizes."""
    for number, size in enumerate(sizes):
        save_pair(root, split, str(number), blocks(size, values, number))
    return root


def whole_set(root: Path, values: int = 4) -> Path:
    """Three pairs to learn from and two to evaluate on."""
    write_pairs(root, [(40, 60), (33, 47), (21, 90)], values)
    return write_pairs(root, [(40, 60), (30, 31)], values, "validation")


def read_pairs(root: Path, sizes: list[Size], values: int = 4) -> SegmentationSet:
    return open_pairs(write_pairs(root, sizes, values), "train")
