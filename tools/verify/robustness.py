"""Corruptions for the draws of the references, against recorded results of imagecorruptions and of the original."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import DataError
from robustness.corruptions.apply import GROUPS as APPLY_GROUPS
from robustness.corruptions.apply import apply
from robustness.corruptions.textures import load_textures
from tools.reference_corruptions import load_package
from tools.verify.golden import read_json
from tools.verify.legacy_draws import legacy_draws
from tools.verify.measure import Measure, NotHere, close, exact

# Exact arithmetic in float64 (spec section 2.2): the very bytes. Of the others float32 may move a value over a level.
EXACT = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "frost", "fog", "brightness", "contrast",
    "pixelate", "saturate",
}  # fmt: skip
# Means and standard deviations are stable to 0.02 across library versions, but for the codec and OpenCV's edges.
TOLERANCE = {"jpeg_compression": 0.3, "spatter": 0.05}
# As in the table of corruptions, but that frost stands alone: its photographs are not this suite's.
GROUPS = {group: tuple(name for name in names if name != "frost") for group, names in APPLY_GROUPS.items()}
GROUPS["frost"] = ("frost",)


def golden_image() -> Tensor:
    """The picture of spec section 2.3, uint8 [3, 224, 224]."""
    h, w, c = np.indices((224, 224, 3))
    waves = 127.5 + 80 * np.sin(0.05 * h + 0.3 * c) + 40 * np.cos(0.11 * w * (1 + 0.1 * c))
    grain = 7 * (((7 * h + 13 * w + 29 * c) % 11) - 5) / 5
    pixels = np.clip(np.floor(waves + grain), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Rows of imagecorruptions 1.1.2 (and the original's frost and elastic_transform) after np.random.seed(0)."""
    return read_json(folder, "corruptions")


def row_measures(row: dict[str, Any]) -> Iterator[Measure]:
    """One corruption at one severity: digest, mean, deviation and two pixels."""
    name, severity, definition = row["name"], row["severity"], row["definition"]
    image, where = golden_image(), f"{name} {severity}, {definition}"
    draws = legacy_draws(name, severity, image, definition)
    pixels = apply(image[None], name, severity, draws=draws, definition=definition)[0].permute(1, 2, 0).numpy()
    if name in EXACT:
        yield exact(f"{where}, bytes", hashlib.sha1(pixels.tobytes()).hexdigest()[:10], row["sha1"])  # noqa: S324  no secret
    tolerance = TOLERANCE.get(name, 0.02)
    yield close(f"{where}, mean", float(pixels.mean()), row["mean"], tolerance)
    yield close(f"{where}, deviation", float(pixels.std()), row["std"], tolerance)
    if name not in TOLERANCE:
        for place, key in (((0, 0), "first"), ((111, 57), "middle")):
            found, expected = pixels[place].astype(np.float64), np.array(row[key], dtype=np.float64)
            yield close(f"{where}, a pixel", torch.from_numpy(found), torch.from_numpy(expected), 1)


def live_corruptions(folder: Path, names: Sequence[str]) -> Iterator[Measure]:
    """Some corruptions beside the imagecorruptions package itself, on the recorded picture at the recorded severities.

    The package is made to run on current NumPy, SciPy and skimage (tools/reference_corruptions.py).
    """
    corrupt, image = load_package(), golden_image()
    state = np.random.get_state()
    for row in recorded(folder):
        name, severity, definition = row["name"], row["severity"], row["definition"]
        if name not in names or definition != "imagecorruptions":
            continue
        if name == "impulse_noise":  # skimage draws it from a generator that nobody can seed
            yield from row_measures(row)
            continue
        np.random.seed(0)
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        expected = torch.from_numpy(np.ascontiguousarray(corrupt(pixels, severity=severity, corruption_name=name)))
        draws = legacy_draws(name, severity, image, definition)
        found = apply(image[None], name, severity, draws=draws, definition=definition)[0].permute(1, 2, 0)
        if name in EXACT:
            yield exact(f"{name} {severity}", found.contiguous(), expected)
        tolerance = TOLERANCE.get(name, 0.02)
        yield close(f"{name} {severity}, mean", found.double().mean(), expected.double().mean(), tolerance)
        yield close(f"{name} {severity}, deviation", found.double().std(), expected.double().std(), tolerance)
        further = (found.int() - expected.int()).abs() > 1
        yield exact(f"{name} {severity}, values further than a level", int(further.sum()), 0)
    np.random.set_state(state)


def corruptions(folder: Path, names: Sequence[str]) -> Iterator[Measure]:
    """All recorded rows of some corruptions. Raises: NotHere if frost's photographs are not installed."""
    if "frost" in names:
        try:
            load_textures()
        except DataError as error:
            raise NotHere(str(error)) from None
    digest = hashlib.sha1(golden_image().permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()[:12]  # noqa: S324
    yield exact("the picture", digest, "584b1b63d3bc")
    for row in recorded(folder):
        if row["name"] in names:
            yield from row_measures(row)
