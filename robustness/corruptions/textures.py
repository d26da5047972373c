"""The photographs of frost: from the files of the imagecorruptions package or a folder, scaled to cover an image."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import DataError, shown
from core.images import BadImage, decode

FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")  # the sixth is never drawn (spec 2)
INSTALL = "pip install --no-deps imagecorruptions==1.1.2"


@dataclass(frozen=True, eq=False)
class FrostTextures:
    """The five textures, uint8 RGB [3, H, W] each; compared and hashed by identity, so that scaled ones are kept."""

    images: Sequence[Tensor]

    def covering(self, index: int, height: int, width: int, always_rescale: bool) -> Tensor:
        """A texture larger than the image in both directions, from which a random part is cut.

        Args:
            index: which of the five.
            height, width: of the image, in pixels.
            always_rescale: enlarge by a tenth what covers the image already, as imagecorruptions does; otherwise such a
                texture is taken at its native resolution, as the original does.
        Returns: uint8 [3, Hf, Wf] with Hf > height and Wf > width.
        """
        native_height, native_width = self.images[index].shape[1:]
        if native_height > height and native_width > width and not always_rescale:
            return self.images[index]
        scale = 1.1 * max(1.0, height / native_height, width / native_width)
        return _rescaled(self, index, math.ceil(native_height * scale), math.ceil(native_width * scale))


@lru_cache(maxsize=32)  # images of one size share five of them
def _rescaled(textures: FrostTextures, index: int, height: int, width: int) -> Tensor:
    import cv2

    pixels = textures.images[index].permute(1, 2, 0).numpy()  # [Hf, Wf, 3]
    resized = np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    return torch.from_numpy(resized).permute(2, 0, 1).contiguous()  # [3, height, width]


@cache
def load_textures(folder: Path | None = None) -> FrostTextures:
    """Read frost1.png to frost5.jpg, once per process.

    Args:
        folder: where they are; by default those that the imagecorruptions package carries. The package is not imported
            for that: its import fails on current setuptools.
    Raises: DataError where one is missing or broken.
    """
    folder = folder or _packaged()
    images = []
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{shown(path)}: missing, and frost needs it; {INSTALL}, or give the folder of {FILES[0]}")
        try:
            images.append(decode(path.read_bytes()))
        except BadImage as reason:
            raise DataError(f"{shown(path)}: {reason}") from None
    return FrostTextures(tuple(images))


def _packaged() -> Path:
    found = importlib.util.find_spec("imagecorruptions")
    if found is None or not found.submodule_search_locations:
        raise DataError(f"frost needs the textures of the imagecorruptions package: {INSTALL}")
    return Path(found.submodule_search_locations[0]) / "frost"
