"""One comparison as a number: how far a result is from the reference's, and how far it may be."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


class NotHere(Exception):  # noqa: N818  nothing failed
    """What a comparison needs is not installed, and need not be."""


@dataclass(frozen=True)
class Measure:
    """A comparison.

    Attributes:
        what: of what, in a few words.
        difference: the largest one; infinite where shapes or types differ, NaN where a result is not finite.
        tolerance: up to which it passes; 0 for what must be equal, where the difference counts what is not.
    """

    what: str
    difference: float
    tolerance: float

    @property
    def passes(self) -> bool:
        """Whether the difference is within the tolerance; NaN never is."""
        return self.difference <= self.tolerance

    @property
    def closeness(self) -> float:
        """The difference in tolerances: the larger, the worse."""
        if self.passes:
            return self.difference / self.tolerance if self.tolerance else 0.0
        return self.difference / self.tolerance if self.tolerance and self.difference < torch.inf else torch.inf


def close(what: str, found: Tensor | float, expected: Tensor | float, tolerance: float, nan: bool = False) -> Measure:
    """The largest absolute difference. `nan`: NaN equals NaN."""
    difference, _ = _differences(found, expected, nan)
    return Measure(what, _largest(difference), tolerance)


def relative(
    what: str, found: Tensor | float, expected: Tensor | float, tolerance: float, plus: float = 0.0
) -> Measure:
    """The largest difference relative to (size of what is expected + `plus`)."""
    difference, size = _differences(found, expected, False)
    shares = torch.where(difference == 0, 0, difference / (size + plus))
    return Measure(f"{what}, relative", _largest(shares), tolerance)


def gradient(what: str, found: Tensor | None, expected: Tensor) -> Measure:
    """Norm of the difference of a gradient, relative to the expected norm + 1e-6, as the golden files' page has it."""
    if found is None or found.shape != expected.shape:
        return Measure(what, torch.inf, 1e-2)
    difference = (found - expected).double().norm() / (expected.double().norm() + 1e-6)
    return Measure(f"{what}, relative", difference.item(), 1e-2)


def exact(what: str, found: Any, expected: Any) -> Measure:
    """How many elements differ; of what is no tensor, array or list, whether it does."""
    if isinstance(found, np.ndarray | Tensor) and type(found) is type(expected):
        same_kind = found.shape == expected.shape and found.dtype == expected.dtype
        different: Any = (found != expected) if same_kind else np.array(torch.inf)
        return Measure(what, float(different.sum()), 0.0)
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple) and len(found) == len(expected):
        return Measure(what, float(sum(a != b for a, b in zip(found, expected, strict=True))), 0.0)
    return Measure(what, float(found != expected), 0.0)


def same_names(what: str, found: Collection[str], expected: Collection[str]) -> Measure:
    """How many names only one of two collections has."""
    return Measure(what, float(len(set(found) ^ set(expected))), 0.0)


def _differences(found: Tensor | float, expected: Tensor | float, nan: bool) -> tuple[Tensor, Tensor]:
    """Absolute differences and sizes of what is expected, float64."""
    a, b = (x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (found, expected))
    if a.shape != b.shape or (isinstance(found, Tensor) and isinstance(expected, Tensor) and a.dtype != b.dtype):
        infinite = torch.tensor(torch.inf, dtype=torch.float64)
        return infinite, torch.ones_like(infinite)
    a, b = a.double(), b.double()
    equal = (a == b) | (nan & a.isnan() & b.isnan())
    return torch.where(equal, 0.0, (a - b).abs()), b.abs()


def _largest(difference: Tensor) -> float:
    return difference.max().item() if difference.numel() else 0.0  # max of NaN is NaN
