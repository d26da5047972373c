"""ImageNet-C, -A, -R, -Sketch, -V2, ImageNet's own validation set with ReaL labels, and any labelled set of a user's.

Classes are matched by name, never by their order in a folder: the label of an image is a column of the classifier. A
folder that is missing, too many or misspelt is an error of one line.
"""

import difflib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from core.datasets import VAL_NAMES, ImageSource, labelled_by_file, matched, open_images, pick_split
from core.errors import ConfigError, DataError, MachineError, shown
from robustness.corruptions.apply import GROUPS

RELEASED_PX = 224  # side of the files of ImageNet-C
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")

# --- class lists ----------------------------------------------------------------------------------------------------


def imagenet_synsets() -> tuple[str, ...]:
    """The 1000 wnids of ImageNet-1k, sorted: the order of every published classifier's columns."""
    return tuple(_class_info("imagenet_synsets.txt").split())


def subset_synsets(name: str) -> tuple[str, ...]:
    """The 200 wnids of imagenet_a or imagenet_r, sorted."""
    return tuple(_class_info(f"{name}_synsets.txt").split())


def real_labels() -> list[list[int]]:
    """ReaL labels of ImageNet's 50,000 validation images by image number, from 1: sorted-wnid indices, maybe none.

    Source: Beyer et al. 2020 (arXiv:2006.07159).
    """
    return json.loads(_class_info("imagenet_real_labels.json"))


def _class_info(name: str) -> str:
    """A class list that timm ships; its package is located, not imported, which would take seconds."""
    found = importlib.util.find_spec("timm")
    try:
        assert found is not None and found.submodule_search_locations, "timm is a dependency"
        return Path(found.submodule_search_locations[0], "data", "_info", name).read_text(encoding="utf-8")
    except OSError:
        raise MachineError(f"timm's class list {name} is missing; pip install 'timm>=1.0.20' again") from None


def columns_of(synsets: Iterable[str], classes: Sequence[str]) -> np.ndarray:
    """Columns of a classifier with these class names, in the order of `synsets`: int64 [K]."""
    place = {name: column for column, name in enumerate(classes)}
    return np.array([place[name] for name in synsets], dtype=np.int64)


def require_imagenet_classes(classes: Sequence[str], what: str) -> None:
    """Raise ConfigError unless the classifier's classes are ImageNet's 1000 wnids, in whatever order."""
    missing = sorted(set(imagenet_synsets()) - set(classes))
    if missing or len(classes) != 1000:
        has = f"{len(classes)} classes: {', '.join(map(shown, classes[:3]))}{', ...' if len(classes) > 3 else ''}"
        lacks = f", without {missing[0]}" if 0 < len(missing) < 1000 else ""
        raise ConfigError(f"{what}: needs a classifier of ImageNet's 1000 wnids; this one has {has}{lacks}")


# --- sets -----------------------------------------------------------------------------------------------------------

_CLASS_LISTS: Mapping[str, Callable[[], tuple[str, ...]]] = {
    "imagenet_val": imagenet_synsets,
    "imagenet_a": partial(subset_synsets, "imagenet_a"),
    "imagenet_r": partial(subset_synsets, "imagenet_r"),
    "imagenet_sketch": imagenet_synsets,
    "imagenet_v2": imagenet_synsets,
}


def open_imagenet_set(
    name: str, data: str, classes: Sequence[str], cache: Path, labels: Path | None = None
) -> ImageSource:
    """Open imagenet_val, imagenet_a, imagenet_r, imagenet_sketch or imagenet_v2, with columns of the classifier.

    Args:
        data: folder or tar; of one that holds train/ and val/, val/ counts.
        classes: class names of the classifier, in the order of its columns; wnids.
        labels: for a flat val/: a file with a line per image, `NAME WNID`.
    Raises: ConfigError for another classifier; DataError unless exactly the set's classes have images.
    """
    require_imagenet_classes(classes, name)
    source = _open_split(data, cache)
    if labels is not None:
        source = labelled_by_file(source, labels, imagenet_synsets())
    source = _require_class_folders(source)
    if name == "imagenet_v2":
        source = _named_by_number(source)
    elif all(folder.isdecimal() for folder in source.classes):
        raise DataError(
            f"{shown(data)}: class folders are numbers, as those of ImageNet-V2; {name} has wnids, as {classes[0]}; "
            "give it as paths.imagenet_v2"
        )
    return _placed(source, _CLASS_LISTS[name](), classes, name, whole=True)


def open_labelled(data: str, classes: Sequence[str], cache: Path, labels: Path | None = None) -> ImageSource:
    """Open any ImageFolder or tar of one whose class folders are called as some of the classifier's classes.

    Args: as `open_imagenet_set`. Raises: DataError for a folder that is no class of the classifier.
    """
    source = _open_split(data, cache)
    if labels is not None:
        source = labelled_by_file(source, labels, tuple(classes))
    return _placed(_require_class_folders(source), tuple(classes), classes, "the classifier", whole=False)


def open_unlabelled(data: str, cache: Path) -> ImageSource:
    """Open images of any layout; of a set that holds train/ and val/, val/ counts."""
    return replace(_open_split(data, cache), labels=None, classes=())


def released_folders(root: Path, corruptions: Sequence[str], severities: Sequence[int]) -> dict[tuple[str, int], Path]:
    """The folder of each corruption and severity in an ImageNet-C tree, with or without the level of groups.

    Raises: DataError naming the first that is missing, with what is there instead.
    """
    if not root.is_dir():
        raise DataError(f"{shown(root)}: no such folder; expected ImageNet-C, with noise/gaussian_noise/1/ and so on")
    found = {}
    for name in corruptions:
        group = next(group for group, names in GROUPS.items() if name in names)
        folder = next((path for path in (root / group / name, root / name) if path.is_dir()), None)
        if folder is None:
            raise DataError(f"{shown(root)}: no folder {group}/{name} or {name}{_instead(root, group, name)}")
        for severity in severities:
            found[name, severity] = folder / str(severity)
            if not found[name, severity].is_dir():
                there = ", ".join(sorted(shown(path.name) for path in folder.iterdir())[:6]) or "nothing"
                raise DataError(f"{shown(folder)}: no folder {severity} of that severity in it, but {there}")
    return found


def _instead(root: Path, group: str, name: str) -> str:
    if (root / f"{group}.tar").exists():
        return f"; unpack {group}.tar there"
    folders = [path.name for path in [*root.iterdir(), *root.glob("*/*")] if path.is_dir()]
    close = difflib.get_close_matches(name, folders, n=1)
    return f"; is it {shown(close[0])}?" if close else "; it comes in five tars, noise, blur, weather, digital, extra"


def open_released(folder: Path, classes: Sequence[str], cache: Path) -> ImageSource:
    """One corruption and severity of ImageNet-C, with columns of the classifier. Raises: as `open_imagenet_set`."""
    require_imagenet_classes(classes, "imagenet_c")
    source = _require_class_folders(open_images(str(folder), cache))
    return _placed(source, imagenet_synsets(), classes, "imagenet_c", whole=True)


def evenly(total: int, most: int | None) -> np.ndarray:
    """At most so many of `total` indices, spread evenly: int64 [N]."""
    if most is None or total <= most:
        return np.arange(total)
    return np.linspace(0, total - 1, most).round().astype(np.int64)


def real_targets(source: ImageSource, classes: Sequence[str]) -> np.ndarray:
    """Columns of the ReaL labels of each image: int64 [N, M], -1 where there are fewer (all -1: without a label).

    Raises: DataError for a file that is not named ILSVRC2012_val_NNNNNNNN, from 1 to 50,000.
    """
    columns, labels = columns_of(imagenet_synsets(), classes), real_labels()
    targets = np.full((len(source), max(map(len, labels))), -1, dtype=np.int64)
    for row in range(len(source)):
        number = image_number(source.name(row))
        if number is None or not 1 <= number <= len(labels):
            raise DataError(
                f"{shown(source.origin)}: {source.name(row)}: real: its labels go by the number in a file name, "
                "as in ILSVRC2012_val_00000001.JPEG"
            )
        found = labels[number - 1]
        targets[row, : len(found)] = columns[found]
    return targets


def image_number(name: str) -> int | None:
    """The number of an ImageNet validation image by its file name, from 1; None for other names."""
    match = _VAL_NAME.match(name.rpartition("/")[2])
    return int(match[1]) if match else None


# --- matching -------------------------------------------------------------------------------------------------------


def _open_split(data: str, cache: Path) -> ImageSource:
    whole = open_images(data, cache)
    return pick_split(whole, VAL_NAMES) or whole


def _require_class_folders(source: ImageSource) -> ImageSource:
    if source.labels is not None:
        return source
    origin, first = shown(source.origin), source.name(0)
    if all(image_number(source.name(index)) for index in range(min(len(source), 100))):
        raise DataError(
            f"{origin}: a flat val/, whose images lie in no class folders; give labels=val.txt with a line per image, "
            f"`{first.rpartition('/')[2]} WNID`, which is made of ImageNet's file on Kaggle by: tail -n +2 "
            "LOC_val_solution.csv | sed 's/,/.JPEG /' | cut -d' ' -f1,2 > val.txt"
        )
    raise DataError(f"{origin}: images lie beside class folders or at several depths; expected CLASS/*.jpg, no {first}")


def _named_by_number(source: ImageSource) -> ImageSource:
    """ImageNet-V2: folders are called 0 to 999, which as text sort 0, 1, 10, 100; each stands for that wnid."""
    if not any(folder.isdecimal() for folder in source.classes):
        return source  # repacked by wnid
    synsets, origin = imagenet_synsets(), shown(source.origin)
    wrong = [folder for folder in source.classes if not folder.isdecimal() or int(folder) >= len(synsets)]
    if wrong:
        raise DataError(f"{origin}: class folder {shown(wrong[0])}; those of ImageNet-V2 are called 0 to 999")
    names = tuple(synsets[int(folder)] for folder in source.classes)
    if len(set(names)) < len(names):
        raise DataError(f"{origin}: two class folders stand for the same number, as 1 and 01 do")
    return replace(source, classes=names)


def _placed(
    source: ImageSource, expected: tuple[str, ...], classes: Sequence[str], what: str, whole: bool
) -> ImageSource:
    """The source with columns of the classifier as labels, after every class of it was found by its name.

    Args:
        expected: the names that its class folders may have; whole: each of them must have images.
    """
    source = matched(source, expected, what)
    assert source.labels is not None, "matched() refuses a source without"
    missing = sorted(set(range(len(expected))) - set(source.labels.tolist()))
    if whole and missing:
        first = ", ".join(shown(expected[i]) for i in missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise DataError(
            f"{shown(source.origin)}: {len(expected) - len(missing)} of the {len(expected)} classes of {what} have "
            f"images; missing: {first}"
        )
    return replace(source, labels=columns_of(expected, classes)[source.labels], classes=tuple(classes))


# --- transforms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfficialTransform:
    """Resize of the shorter side to 256/224 of `size` and central crop, bilinear through PIL.

    What ImageNet-C was made with, and what the evaluation code of ImageNet-A and -R uses.
    """

    size: tuple[int, int]

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, h, w] to uint8 [3, *size]."""
        short, long = sorted(image.shape[-2:])
        if long > 16 * short:  # a strip would grow to gigabytes, of which only the middle is kept
            image = VF.center_crop(image, [min(side, 16 * short) for side in image.shape[-2:]])
        resize_px = round(max(self.size) * 256 / 224)
        resized = VF.resize(Image.fromarray(image.permute(1, 2, 0).numpy()), [resize_px], VF.InterpolationMode.BILINEAR)
        return VF.pil_to_tensor(VF.center_crop(resized, list(self.size)))


@dataclass(frozen=True)
class ReleasedTransform:
    """The central 224 px of a file of ImageNet-C, without a resize: the files are cropped already."""

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, h, w] to uint8 [3, 224, 224]. Raises: DataError for a smaller image."""
        height, width = image.shape[-2:]
        if min(height, width) < RELEASED_PX:
            raise DataError(f"imagenet_c: an image of {height}x{width} px; the released files have 224x224 px")
        return VF.center_crop(image, [RELEASED_PX, RELEASED_PX])


@dataclass(frozen=True)
class Decoded:
    """The image as it was decoded."""

    def __call__(self, image: Tensor) -> Tensor:
        """The same."""
        return image


def at_size(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image [3, h, w] of one aspect resized, bicubic through PIL, to a classifier's input: [3, *size]."""
    if image.shape[-2:] == size:
        return image
    pil = Image.fromarray(image.cpu().permute(1, 2, 0).numpy()).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pil)).permute(2, 0, 1)  # [3, *size]
