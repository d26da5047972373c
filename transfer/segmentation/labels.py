"""What the numbers in label files mean: which stored value is which class, which counts nothing, which is wrong.

Nothing is guessed: `ignore_index`, `label_shift` and `label_map` say it, and a value that they leave without a meaning
is an error before it reaches a device. Letters: H W an image, K classes.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL.PngImagePlugin import PngImageFile
from pydantic import Field, NonNegativeInt, PositiveInt

from core.config import Config
from core.errors import ConfigError, shown
from core.images import BadImage

NUM_VALUES = 2**16  # that a label file can hold
MAX_PIXELS = 178_000_000  # of a label; `loader.max_pixels` has no more
OUT_OF_RANGE = -1  # in a `LabelTable`, and nowhere else

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"  # what such files begin with
_GREY, _PALETTE = 0, 3  # PNG's colour types of one number per pixel
_COLOURS = {2: "RGB", 4: "grey with alpha", 6: "RGBA"}


class LabelKeys(Config):
    """What a user says about labels; keys of everything that reads a segmentation set."""

    classes: str | None = None  # ade20k, camvid, or a file of names and colours; see `classes.py`
    num_classes: PositiveInt | None = None  # where no classes are named
    ignore_index: NonNegativeInt = Field(255, lt=NUM_VALUES)  # stored value of pixels that count nothing
    label_shift: NonNegativeInt = Field(0, lt=NUM_VALUES)  # subtracted from stored values; below it nothing counts
    label_map: dict[NonNegativeInt, NonNegativeInt] | None = None  # stored value -> class or ignore_index

    def contradictions(self) -> Iterator[str]:
        """Keys that cannot hold together."""
        yield from super().contradictions()
        if self.label_map is not None and self.label_shift:
            yield f"label_shift={self.label_shift}: has no effect beside label_map; write the shifted classes there"
        if self.label_map is not None and not self.label_map:
            yield "label_map: is empty; list stored values, as in label_map={3: 0, 7: 1}, or leave it out"
        if beyond := [value for value in self.label_map or () if value >= NUM_VALUES]:
            yield f"label_map: {str(beyond[0])[:20]}: label files hold values of 0..{NUM_VALUES - 1}"
        if self.num_classes is not None:
            yield from ignore_faults(self, self.num_classes)


def ignore_faults(keys: LabelKeys, num_classes: int) -> Iterator[str]:
    """A line where `ignore_index` is a class, or the stored value of one."""
    index, shift = keys.ignore_index, keys.label_shift
    another = f"; give another, such as {255 if num_classes + shift <= 255 else NUM_VALUES - 1}"
    if index < num_classes:
        yield f"ignore_index={index}: is one of the {num_classes} classes{another}"
    elif index < num_classes + shift and keys.label_map is None:
        yield f"ignore_index={index}: is with label_shift={shift} the stored value of class {index - shift}{another}"


class OutOfRange(Exception):  # noqa: N818  what it is
    """A stored value has no meaning: the most frequent such value, and how many pixels have it."""

    def __init__(self, value: int, count: int) -> None:
        super().__init__(f"value {value} in {count} pixels")
        self.value, self.count = value, count


class BadLabel(BadImage):
    """These bytes are no usable label; the message is the reason, without the name."""


@dataclass(frozen=True, eq=False)
class LabelTable:
    """From stored values to what the network learns from. Made by `label_table`.

    Attributes:
        table: int32 [65536], by stored value: a class 0..K-1, `ignore_index`, or `OUT_OF_RANGE`.
        ignore_index: what pixels that count nothing become.
        expected: the stored values that have a meaning, in words.
    """

    table: np.ndarray
    ignore_index: int
    expected: str

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """Stored values [H, W], unsigned, as classes or `ignore_index`: uint8; int32 where that is above 255.

        Raises: OutOfRange.
        """
        labels = self.table[stored]  # [H, W]
        if labels.min() == OUT_OF_RANGE:
            values, counts = np.unique(stored[labels == OUT_OF_RANGE], return_counts=True)
            raise OutOfRange(int(values[counts.argmax()]), int(counts.max()))
        return labels.astype(np.uint8 if self.ignore_index <= 255 else np.int32)


def label_table(keys: LabelKeys, num_classes: int) -> LabelTable:
    """What the keys make of every value that a label file can hold.

    `ignore_index` stays itself, unless `label_map` gives it a class; without a map, what lies below `label_shift` is
    ignored too. "reduce_zero_label" of other suites is label_shift=1 with ignore_index=255.

    Raises: ConfigError for an `ignore_index` that is a class, or a `label_map` to what is no class.
    """
    for fault in ignore_faults(keys, num_classes):
        raise ConfigError(fault)
    table = np.full(NUM_VALUES, OUT_OF_RANGE, dtype=np.int32)
    if keys.label_map is None:
        shift = keys.label_shift
        top = min(shift + num_classes, NUM_VALUES)
        table[:shift] = keys.ignore_index
        table[shift:top] = np.arange(top - shift)
        table[keys.ignore_index] = keys.ignore_index
        expected = f"{shift}..{top - 1}" + (f" (shifted by {shift})" if shift else "")
    else:
        table[keys.ignore_index] = keys.ignore_index
        for value, label in keys.label_map.items():
            if label >= num_classes and label != keys.ignore_index:
                raise ConfigError(
                    f"label_map: {value}: {label} is no class (0..{num_classes - 1}), nor ignore_index="
                    f"{keys.ignore_index}"
                )
            table[value] = label
        expected = "those of label_map"
    return LabelTable(table, keys.ignore_index, f"{expected}, or ignore_index={keys.ignore_index}")


def read_label(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """Stored values of an encoded label, uint8 or uint16 [H, W].

    A PNG of one number per pixel: grey of 1 to 16 bits, or with a palette, of which the indices count and not the
    colours. Grey of fewer than 8 bits is not spread over 0..255, as it is for pictures.

    Args:
        size: (height, width) that it must have; found from the header.
    Raises: BadLabel with the reason.
    """
    bits, colour, found = _header(data)
    if colour not in {_GREY, _PALETTE}:
        raise BadLabel(f"{_COLOURS.get(colour, 'unknown')} pixels; a label has one number per pixel, grey or palette")
    if size is not None and found != size:
        turned = " (turned by its EXIF orientation?)" if found == size[::-1] else ""
        raise BadLabel(f"has {found[1]}x{found[0]} px, its image {size[1]}x{size[0]}{turned}")
    if found[0] * found[1] > MAX_PIXELS:
        raise BadLabel(f"{found[1]}x{found[0]} px is over the limit of {MAX_PIXELS / 1e6:g} megapixels")
    try:
        with PngImageFile(io.BytesIO(data)) as image:
            values = np.asarray(image)  # [H, W]
    except MemoryError:
        raise
    except Exception as error:  # garbage makes decoders raise anything
        raise BadLabel(f"broken PNG: {shown(' '.join(str(error).split()))[:100] or type(error).__name__}") from None
    if colour == _GREY and 1 < bits < 8:
        values = values // (255 // (2**bits - 1))  # Pillow has spread them
    return values.astype(np.uint16 if bits == 16 else np.uint8, copy=False)


def _header(data: bytes) -> tuple[int, int, tuple[int, int]]:
    """Bits per value, colour type and (height, width) of a PNG."""
    if not data.startswith(_PNG):
        what = "a JPEG file, which does not keep values" if data.startswith(_JPEG) else "no PNG file"
        raise BadLabel(f"{what if data else 'an empty file'}; a label is a PNG")
    if len(data) < 26 or data[12:16] != b"IHDR":
        raise BadLabel("broken PNG: no header")
    width, height, bits, colour = struct.unpack(">IIBB", data[16:26])
    return bits, colour, (height, width)
