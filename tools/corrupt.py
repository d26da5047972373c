"""`rcmae corrupt`: corrupted copies of a picture or a folder, or the contact sheet of all corruptions of a picture."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.datasets import open_images
from core.errors import ConfigError, DataError, MachineError, shown
from core.files import replace_file
from core.images import BadImage, decode
from core.plots import plot
from core.transforms import resize_center_crop
from robustness.corruptions.apply import GROUPS, MIN_SIDE, NAMES, SEVERITIES, corrupt
from robustness.corruptions.case import DEFINITIONS
from robustness.corruptions.digital import jpeg_step
from robustness.corruptions.textures import load_textures

SHEET = "contact_sheet.png"
TILE_PX = 224  # side of a picture of the sheet: ImageNet-C's own
DPI = 110  # of core.plots


@dataclass(frozen=True)
class Recipe:
    """How pictures are corrupted. Raises: ConfigError for severities, definitions and seeds that are none."""

    severity: int = 3  # of copies; the contact sheet has all five
    definition: str = "imagenet_c"
    seed: int = 0
    textures: Path | None = None  # folder of frost's; None: those of the imagecorruptions package
    jpeg: bool = False  # the JPEG step of ImageNet-C's files afterwards

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ConfigError(f"--severity {self.severity}: expected 1, 2, 3, 4 or 5")
        if self.definition not in DEFINITIONS:
            raise ConfigError(f"--definition {shown(self.definition)}: expected one of {', '.join(DEFINITIONS)}")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: expected a whole number from 0")

    def corrupted(self, image: Tensor, name: str, severity: int, image_id: int) -> Tensor:
        """One corrupted image, uint8 [3, H, W] like the given one."""
        result = corrupt(
            image[None],
            name,
            severity,
            image_ids=[image_id],
            seed=self.seed,
            definition=next(known for known in DEFINITIONS if known == self.definition),
            textures=load_textures(self.textures) if name == "frost" else None,
        )
        return (jpeg_step(result) if self.jpeg else result)[0]


def corrupt_pictures(source: Path, out: Path, name: str | None, recipe: Recipe) -> str:
    """Write corrupted copies of a picture or folder; without a name the contact sheet of a picture.

    Returns: a line about what was done.
    Raises: ConfigError for an unknown name; DataError for pictures or textures that are missing, broken or too small.
    """
    if name is not None and name not in NAMES:
        raise ConfigError(f"--name {shown(name)}: expected one of {', '.join(NAMES)}")
    if not source.exists():
        raise DataError(f"{shown(source)}: no such picture or folder")
    if name in (None, "frost"):
        load_textures(recipe.textures)  # a missing one is told before the work begins
    if name is not None:
        return write_copies(source, out, name, recipe)
    if source.is_dir():
        raise ConfigError(f"{shown(source)}: a folder needs --name; the contact sheet is of one picture")
    return draw_sheet(source, out, recipe)


# ---- copies -------------------------------------------------------------------------------------------------------


def write_copies(source: Path, out: Path, name: str, recipe: Recipe) -> str:
    """Corrupt a picture, or all that a folder holds, into PNGs of the same names; nothing is overwritten."""
    pictures = dict(_pictures(source))
    targets = _targets(list(pictures), out)
    for target in targets.values():
        _refuse_existing(target)
    written = 0
    for picture, read in pictures.items():
        try:
            image = _usable(read())
        except BadImage as reason:
            print(f"left out: {shown(picture)}: {reason}")
            continue
        corrupted = recipe.corrupted(image, name, recipe.severity, id_of(picture))  # [3, H, W]
        file = io.BytesIO()
        Image.fromarray(corrupted.permute(1, 2, 0).numpy()).save(file, "PNG")
        targets[picture].parent.mkdir(parents=True, exist_ok=True)
        replace_file(targets[picture], file.getvalue())
        written += 1
    if not written:
        raise DataError(f"{shown(source)}: no picture in it could be used")
    return f"{shown(out)}: {written} of {len(pictures)}, {name}, severity {recipe.severity}, {recipe.definition}"


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise MachineError(f"{shown(target)}: exists already; give another --out")


def id_of(picture: str) -> int:
    """The image id of a file: from its name in its folder, so that its neighbours do not matter."""
    return int.from_bytes(hashlib.sha256(os.fsencode(picture)).digest()[:8], "big")


def _pictures(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names relative to the folder, and how to read each."""
    if not source.is_dir():
        yield source.name, source.read_bytes
        return
    images = open_images(str(source), Path("~/.cache/rcmae").expanduser())
    for i, name in enumerate(images.names):
        yield os.fsdecode(name), partial(images.read, i)


def _targets(pictures: list[str], out: Path) -> dict[str, Path]:
    """Where each goes: its name with .png for its ending, or behind it where two would be the same; never outside."""
    inside = {name: Path(*(part for part in PurePosixPath(name).parts if part not in ("/", ".."))) for name in pictures}
    times = Counter(path.with_suffix(".png") for path in inside.values())
    return {
        name: out / (path.with_suffix(".png") if times[path.with_suffix(".png")] == 1 else f"{path}.png")
        for name, path in inside.items()
    }


def _usable(data: bytes) -> Tensor:
    image = decode(data)
    if min(image.shape[1:]) < MIN_SIDE:
        raise BadImage(f"{image.shape[1]}x{image.shape[2]} px; corruptions need sides of {MIN_SIDE} px")
    return image


# ---- the contact sheet --------------------------------------------------------------------------------------------


def draw_sheet(picture: Path, out: Path, recipe: Recipe) -> str:
    """All corruptions of a picture's central crop, a row each, severity growing to the right."""
    target = out / SHEET
    _refuse_existing(target)
    try:
        image = resize_center_crop(_usable(picture.read_bytes()), (TILE_PX, TILE_PX), 0.875)
    except BadImage as reason:
        raise DataError(f"{shown(picture)}: {reason}") from None
    rows = [
        torch.cat([recipe.corrupted(image, name, severity, id_of(picture.name)) for severity in SEVERITIES], dim=2)
        for name in NAMES
    ]  # each [3, TILE, 5 TILE]
    sheet = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()  # [19 TILE, 5 TILE, 3]
    out.mkdir(parents=True, exist_ok=True)
    _save_sheet(target, sheet, f"{shown(picture.name)}, {recipe.definition}, seed {recipe.seed}")
    return f"{shown(target)}: {len(NAMES)} corruptions at {len(SEVERITIES)} severities"


def _save_sheet(target: Path, sheet: np.ndarray, title: str) -> None:
    left, top, edge = 190, 80, 20  # px around the pictures
    height, width = sheet.shape[0] + top + edge, sheet.shape[1] + left + edge
    with plot(target, (width / DPI, height / DPI), title) as figure:
        place = (left / width, edge / height, sheet.shape[1] / width, sheet.shape[0] / height)
        axes = figure.add_axes(place, frame_on=False)
        axes.imshow(sheet, interpolation="nearest", aspect="auto")
        group_of = {name: group for group, names in GROUPS.items() for name in names}
        middles = [TILE_PX * (i + 0.5) for i in range(len(NAMES))]
        axes.set_yticks(middles, [f"{group_of[name]}\n{name}" for name in NAMES])
        axes.set_xticks(middles[: len(SEVERITIES)], [f"severity {severity}" for severity in SEVERITIES])
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
