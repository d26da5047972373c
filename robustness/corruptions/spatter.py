"""spatter, an extra corruption: drops of water (severity 1..3) or mud (4, 5) on the lens (spec section 2)."""

import numpy as np
import torch
from torch import Tensor

from robustness.corruptions.case import Case, Draws, from_unit, unit
from robustness.corruptions.draws import Source
from robustness.corruptions.filters import gaussian

SPATTER = (  # mean and std of the noise, sigma px, threshold, strength of water or sigma px of mud's edge
    (0.65, 0.3, 4, 0.69, 0.6),
    (0.65, 0.3, 3, 0.68, 0.6),
    (0.65, 0.3, 2, 0.68, 0.5),
    (0.65, 0.3, 1, 0.65, 1.5),
    (0.67, 0.4, 1, 0.65, 1.5),
)
WATER = (175, 238, 238)
MUD = (63, 42, 20)


def draw_spatter(source: Source, case: Case) -> Draws:
    """A standard normal value per pixel."""
    return {"noise": source.normal(case.height, case.width)}


def spatter(images: Tensor, draws: Draws, case: Case) -> Tensor:
    """Smoothed noise above a threshold is wet. In float64 up to there, so that every machine cuts it alike."""
    mean, std, sigma, threshold, strength = SPATTER[case.severity - 1]
    liquid = gaussian((mean + std * draws["noise"].double())[:, None], sigma)  # [B, 1, H, W]
    x = unit(images)
    if case.severity <= 3:
        liquid = torch.where(liquid < threshold, 0, liquid)
        layers = [_water(np.ascontiguousarray(one)) for one in (liquid * 255).to(torch.uint8)[:, 0].cpu().numpy()]
        water = torch.from_numpy(np.stack(layers))[:, None].to(images.device)  # [B, 1, H, W]
        return from_unit(x + strength * water * _colour(WATER, images))
    mud = gaussian((liquid > threshold).double(), strength)
    mud = torch.where(mud < 0.8, 0, mud).float()  # [B, 1, H, W]
    return from_unit(x * (1 - mud) + mud * _colour(MUD, images))


def _water(liquid: np.ndarray) -> np.ndarray:
    """How bright the water is, 0..1 float32, lit from its edges inwards; on the host, by OpenCV.

    Args:
        liquid: uint8 [H, W], 0 where dry.
    """
    import cv2

    edges = cv2.Canny(liquid, 50, 150)
    distance = cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5)
    distance = np.minimum(distance, 20)
    relief = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    relief = cv2.filter2D(relief, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    lit = liquid * cv2.blur(relief, (3, 3)).astype(np.float32)
    brightest = lit.max()
    return lit / brightest if brightest > 0 else lit  # all dry: the references divide by zero here


def _colour(levels: tuple[int, int, int], images: Tensor) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=images.device).view(3, 1, 1) / 255
