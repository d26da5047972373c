"""Where the randomness of a corruption comes from: a generator of each image's own, on the host or on the device.

A corruption asks its source in the order of the reference implementation. So a source over NumPy's legacy global
stream (tools/verify/legacy_draws.py) gives the reference's own draws, in float64; the arithmetic
follows the type of the draws.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Source(Protocol):
    """Random numbers of one image."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        ...

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        ...

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high)."""
        ...


class HostSource:
    """NumPy's stable streams, float32 and int32 on the CPU: the same numbers on every machine."""

    def __init__(self, seeds: np.random.SeedSequence) -> None:
        self._rng = np.random.default_rng(seeds)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.from_numpy(np.asarray(self._rng.standard_normal(shape, dtype=np.float32)))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.from_numpy(np.asarray(self._rng.random(shape, dtype=np.float32)))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high)."""
        return torch.from_numpy(np.asarray(self._rng.integers(low, high, shape, dtype=np.int32)))


class DeviceSource:
    """The device's own generator: nothing to copy, but other numbers than on the CPU."""

    def __init__(self, seeds: np.random.SeedSequence, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(
            int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1))
        )

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self._generator, device=self._generator.device)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(shape, generator=self._generator, device=self._generator.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in [low, high)."""
        return torch.randint(
            low, high, shape, generator=self._generator, device=self._generator.device, dtype=torch.int32
        )


def source_of(seed: int, image_id: int, number: int, severity: int, device: torch.device | None) -> Source:
    """The source of one image, for one corruption and severity; on the host where no device is named."""
    seeds = np.random.SeedSequence((seed, image_id, number, severity))
    return HostSource(seeds) if device is None else DeviceSource(seeds, device)
