"""What every corruption is told besides images and draws, and the two ways from pixels to numbers and back."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustness.corruptions.textures import FrostTextures

Definition = Literal["imagenet_c", "imagecorruptions"]
DEFINITIONS: tuple[Definition, ...] = ("imagenet_c", "imagecorruptions")

Draws = dict[str, Tensor]  # all that is random about a corruption; [B, ...] each, of one image without the B

HAIR = 2.0**-10  # of a grey level: more than float32 sums of weights fall short of one, less than anyone sees


@dataclass(frozen=True)
class Case:
    """One corruption at one severity for images of one size."""

    severity: int  # 1..5
    definition: Definition  # where the two references differ, spec section 2.1
    height: int
    width: int
    textures: FrostTextures | None = None  # frost's; nothing else looks at it


def unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images as numbers in 0..1, of the given float type."""
    return images.to(dtype) / 255


def from_unit(x: Tensor) -> Tensor:
    """0..1 to uint8 by clipping and truncation, as the references do (spec section 2)."""
    return (x.clamp(0, 1) * 255).to(torch.uint8)


def from_filtered(levels: Tensor) -> Tensor:
    """0..255 out of a filter to uint8 by truncation, except that what is a hair below a level counts as that level.

    Weights that add up to one give sums of 254.99999 on a white background, and truncation would turn all of it into
    254; in the references, too, it hangs on the last bit of a sum whether flat areas lose a level.
    """
    return (levels + HAIR).clamp(0, 255).to(torch.uint8)
