"""RGB to hue, saturation and value and back, operation by operation as skimage does it: in float64 the same bits."""

import torch
from torch import Tensor


def rgb_to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rgb [B, 3, H, W] in 0..1 to hue in [0, 1), saturation, value, each [B, H, W]; the hue of grey is 0."""
    red, green, blue = rgb.unbind(1)
    value = rgb.amax(1)
    spread = value - rgb.amin(1)
    grey = spread == 0
    saturation = torch.where(grey, 0, spread / value)
    sextant = torch.where(red == value, (green - blue) / spread, 0)
    sextant = torch.where(green == value, 2 + (blue - red) / spread, sextant)
    sextant = torch.where(blue == value, 4 + (red - green) / spread, sextant)  # the last of equal ones counts
    hue = torch.where(grey, 0, (sextant / 6).remainder(1))
    return hue, saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """hue in [0, 1], saturation, value, each [B, H, W], to rgb [B, 3, H, W]."""
    whole = (6 * hue).floor()
    part = 6 * hue - whole
    low = value * (1 - saturation)
    falling = value * (1 - part * saturation)
    rising = value * (1 - (1 - part) * saturation)
    choices = torch.stack([value, falling, low, rising], dim=1)  # [B, 4, H, W]
    # Which of the four each of red, green and blue is, for the six sextants of the hue.
    table = torch.tensor([[0, 1, 2, 2, 3, 0], [3, 0, 0, 1, 2, 2], [2, 2, 3, 0, 0, 1]], device=hue.device)
    sextant = whole.long() % 6
    return torch.cat([choices.gather(1, row[sextant][:, None]) for row in table], dim=1)  # [B, 3, H, W]
