"""The draws of the reference implementations: NumPy's legacy stream, float64, pixels in their order (H, W, 3)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustness.corruptions.apply import CORRUPTIONS
from robustness.corruptions.case import Case, Definition, Draws
from robustness.corruptions.noise import SHOT_PHOTONS
from robustness.corruptions.textures import FrostTextures


class LegacySource:
    """A `draws.Source` over RandomState, or over a Generator where the reference uses one (impulse_noise)."""

    def __init__(self, rng: np.random.RandomState | np.random.Generator) -> None:
        self.rng = rng

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return self._in_order(shape, self.rng.standard_normal)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return self._in_order(shape, self.rng.random)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high)."""
        assert isinstance(self.rng, np.random.RandomState), "where a Generator is used no whole numbers are drawn"
        return torch.as_tensor(np.asarray(self.rng.randint(low, high, size=shape)))

    def _in_order(self, shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], Any]) -> Tensor:
        if len(shape) == 3 and shape[0] == 3:  # [3, H, W] here, drawn as (H, W, 3) there
            return torch.as_tensor(draw((*shape[1:], 3))).permute(2, 0, 1)
        return torch.as_tensor(draw(shape))


def legacy_draws(
    name: str,
    severity: int,
    image: Tensor,
    definition: Definition,
    seed: int = 0,
    textures: FrostTextures | None = None,
) -> Draws:
    """What the reference draws for one image [3, H, W] after np.random.seed(seed), as a batch of one."""
    case = Case(severity, definition, image.shape[1], image.shape[2], textures)
    rng = np.random.RandomState(seed)
    draw_one = CORRUPTIONS[name].draw
    if draw_one is None:
        return {}
    if name == "shot_noise":
        draws = {"uniform": uniforms_of_poisson(rng, image, SHOT_PHOTONS[severity - 1])}
    elif name == "impulse_noise":  # current skimage knows no other generator
        draws = draw_one(LegacySource(np.random.default_rng(seed)), case)
    else:
        draws = draw_one(LegacySource(rng), case)
    return {key: drawn[None] for key, drawn in draws.items()}


def uniforms_of_poisson(rng: np.random.RandomState, image: Tensor, photons: int) -> Tensor:
    """Uniform draws from which the inverse distribution makes the counts that RandomState.poisson draws."""
    pixels = image.permute(1, 2, 0).numpy()
    counts = rng.poisson(pixels / 255.0 * photons)
    means, k = np.arange(256)[:, None] / 255.0 * photons, np.arange(counts.max() + 1)
    log_factorial = np.cumsum(np.log(np.maximum(k, 1)))
    pmf = np.exp(k * np.log(np.maximum(means, 1e-300)) - means - log_factorial)
    upto = np.cumsum(pmf, axis=1)
    middle = np.concatenate([upto[:, :1] / 2, (upto[:, 1:] + upto[:, :-1]) / 2], axis=1)
    return torch.from_numpy(middle[pixels, counts]).permute(2, 0, 1)
