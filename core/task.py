"""The contract between the loop and what it trains."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """Where in a run a micro-batch stands.

    Attributes:
        step: optimizer step, from 0.
        index: of the micro-batch in the global batch, whichever process it falls to.
        turn: how many micro-batches of this step came before on this process.
    """

    step: int
    index: int
    turn: int

    def generator(self, seed: int, device: torch.device) -> torch.Generator:
        """The source of a model's own noise (drop path): from (seed, step, index), never from the process."""
        key = np.random.SeedSequence((seed, self.step, self.index)).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(key[0] >> 1))

    def rng(self, seed: int) -> np.random.Generator:
        """The same for a few numbers that are drawn on the host (mixup's ratio)."""
        return np.random.default_rng((seed, self.step, self.index))


class Task(Protocol):
    """What is trained. The engine knows nothing else about it."""

    def losses(self, batch: Any, at: Place) -> dict[str, Tensor]:
        """Weighted losses of one micro-batch, each its mean, 0-dim; their sum is differentiated.

        Before the first step of several processes it is called once more than that with turn 0, so it changes nothing
        then.
        """

    def after_update(self, step: int, finite: Tensor) -> None:
        """Follow an optimizer update (EMA); where the 0-dim bool `finite` is False, change nothing."""

    def observe(self, step: int) -> dict[str, float]:
        """Figures of the step just done, for a row of their own in the log; none for most. Every process calls it."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures that need a pass over other data; called by every process, and the same on each."""

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Pictures worth keeping, name -> uint8 [H, W, 3]; called by every process, kept by the first."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer sees, by the names of a checkpoint."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Modules that a checkpoint holds, by file stem."""
