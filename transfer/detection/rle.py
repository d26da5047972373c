"""Run-length encoded masks of COCO: checked before any C code sees them, made, and read.

A mask is a list of runs down its columns, of zeros first. COCO's compressed form writes each run as characters of six
bits, from the third on as the difference to the run two places before. pycocotools reads that form without looking:
short runs give it uninitialised memory as mask, a huge size crashes the process. So nothing reaches it unchecked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_api
from torch import Tensor

MAX_CHARACTERS = 7  # of one run; a run of 2**31 pixels needs no more
CHUNK = 1024  # masks checked at once: their characters stay in a processor's cache


class BadMask(ValueError):  # noqa: N818  the field's word
    """A segmentation that is no mask of its image; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Rle:
    """A binary mask, run-length encoded and checked.

    Attributes:
        height, width: of the mask, in pixels.
        counts: COCO's compressed runs.
    """

    height: int
    width: int
    counts: bytes

    def as_coco(self) -> dict[str, Any]:
        """The JSON form: size [height, width] and counts as text."""
        return {"size": [self.height, self.width], "counts": self.counts.decode("ascii")}


def rle_of(segmentation: dict[str, Any], height: int, width: int) -> Rle:
    """A COCO segmentation {size, counts}, compressed or not, as a mask of an image of height x width.

    Raises: BadMask where size is another, or the runs are none or do not add up to height x width.
    """
    if segmentation.get("size") != [height, width]:
        raise BadMask("size is not the image's")
    counts = segmentation.get("counts")
    if isinstance(counts, str | bytes):
        return compressed_rle(counts, height, width)
    if not isinstance(counts, list) or not all(type(run) is int for run in counts):
        raise BadMask("counts are neither text nor whole numbers")
    if min(counts, default=-1) < 0 or sum(counts) != height * width:
        raise BadMask("counts do not add up to the image")
    packed = mask_api.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return Rle(height, width, packed["counts"])


def compressed_rle(counts: str | bytes, height: int, width: int) -> Rle:
    """Compressed runs as a mask of height x width. Raises: BadMask."""
    data = counts.encode("utf-8", "replace") if isinstance(counts, str) else counts
    if first_bad([data], np.array([height * width])) is not None:
        raise BadMask("counts do not add up to the image")
    return Rle(height, width, data)


def first_bad(counts: Sequence[bytes], pixels: np.ndarray) -> int | None:
    """Index of the first of many compressed masks that are not whole: in one pass over all of them.

    Args:
        counts: compressed runs of N masks.
        pixels: [N] int64, height x width of each.
    """
    for start in range(0, len(counts), CHUNK):
        chunk = counts[start : start + CHUNK]
        totals = _totals(chunk)
        bad = np.flatnonzero(totals != pixels[start : start + CHUNK])
        if len(bad):
            return start + int(bad[0])
    return None


def _totals(counts: Sequence[bytes]) -> np.ndarray:
    """Sum of the runs of each mask: int64 [N], -1 for what is no list of runs."""
    lengths = np.array([len(text) for text in counts])
    bad = lengths == 0
    safe = b"".join(text or b"0" for text in counts)
    characters = np.frombuffer(safe, np.uint8).astype(np.int64) - 48  # [C]
    ends = np.cumsum(np.maximum(lengths, 1))
    owner = np.repeat(np.arange(len(counts)), np.maximum(lengths, 1))  # [C] mask of each character
    bad[owner[(characters < 0) | (characters > 63)]] = True
    bad |= (characters[ends - 1] & 0x20) != 0  # ends inside a run
    characters[bad[owner]] = 0  # a run of no pixels; what follows then holds for all
    runs, mask_of_run, too_long = _runs(characters, owner)
    bad[mask_of_run[(runs < 0) | too_long]] = True
    totals = np.zeros(len(counts), np.int64)
    np.add.at(totals, mask_of_run, runs)
    return np.where(bad, -1, totals)


def _runs(characters: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode characters [C] of whole masks: runs [R], the mask of each, and whether it has too many characters."""
    is_last = (characters & 0x20) == 0
    first = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])  # [R] where each run begins
    length = np.diff(np.append(first, len(characters)))
    place = np.arange(len(characters)) - np.repeat(first, length)  # [C] within its run
    too_long = length > MAX_CHARACTERS
    shift = 5 * np.minimum(place, MAX_CHARACTERS)
    values = np.add.reduceat((characters & 0x1F) << shift, first)  # [R]
    negative = (characters[is_last] & 0x10) != 0
    values -= np.where(negative, 1 << (5 * np.minimum(length, MAX_CHARACTERS)), 0)
    return _undo_differences(values, owner[first]), owner[first], too_long


def _undo_differences(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """From the third run of a mask on, add the run two places before. values, mask [R] to runs [R]."""
    starts = np.flatnonzero(np.diff(mask, prepend=-1))  # [N] first run of each mask
    sizes = np.diff(np.append(starts, len(values)))
    # All runs but the first, in two columns of a table, each mask from a row of its own: sums run down the columns.
    rows = sizes // 2
    first_row = np.cumsum(rows) - rows
    rank = np.arange(len(values)) - np.repeat(starts, sizes)  # [R] within its mask
    cell = 2 * np.repeat(first_row, sizes) + rank - 1
    later = rank > 0
    table = np.zeros(2 * int(rows.sum()), np.int64)
    table[cell[later]] = values[later]
    sums = np.concatenate([np.zeros((1, 2), np.int64), table.reshape(-1, 2).cumsum(axis=0)])  # [rows + 1, 2]
    sums = (sums[1:] - np.repeat(sums[first_row], rows, axis=0)).reshape(-1)
    runs = values.copy()
    runs[later] = sums[cell[later]]
    return runs


def runs_of(rle: Rle) -> np.ndarray:
    """Lengths of the runs, zeros first: int64 [R], adding up to height x width."""
    characters = np.frombuffer(rle.counts, np.uint8).astype(np.int64) - 48
    return _runs(characters, np.zeros(len(characters), np.int64))[0]


def decode(rle: Rle) -> np.ndarray:
    """The mask, bool [height, width]."""
    runs = runs_of(rle)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # [width * height]
    return flat.reshape(rle.width, rle.height).T  # [height, width]


def encode(masks: Tensor) -> list[Rle]:
    """Masks [N, H, W] of bool, run-length encoded.

    The runs are found where the masks lie, so that a GPU hands over a few thousand numbers instead of the pixels.
    """
    num_masks, height, width = masks.shape
    flat = masks.bool().transpose(1, 2).reshape(num_masks, height * width)  # [N, W * H], down the columns
    changes = torch.empty_like(flat)  # where a run begins; where a mask does, if with ones
    changes[:, :1] = flat[:, :1]
    torch.ne(flat[:, 1:], flat[:, :-1], out=changes[:, 1:])
    changes = changes.flatten()  # on a CPU, NumPy finds them five times as fast
    found = changes.nonzero().squeeze(1).cpu().numpy() if changes.is_cuda else np.flatnonzero(changes.numpy())
    owner, place = np.divmod(found, height * width)
    more = np.bincount(owner, minlength=num_masks)  # runs of each mask, less one
    last = np.cumsum(more)
    runs = np.insert(place, last, height * width) - np.insert(place, last - more, 0)  # [R]
    return [Rle(height, width, counts) for counts in _compressed(runs, more + 1)] if num_masks else []


def _compressed(runs: np.ndarray, num_runs: np.ndarray) -> list[bytes]:
    """Runs [R] of masks one after the other, of `num_runs` [N] each, in COCO's characters."""
    rank = np.arange(len(runs)) - np.repeat(np.cumsum(num_runs) - num_runs, num_runs)  # [R] within its mask
    rest = runs - np.where(rank > 2, np.roll(runs, 2), 0)
    characters = np.zeros((len(runs), MAX_CHARACTERS), np.uint8)
    unfinished = np.ones(len(runs), bool)
    for column in range(MAX_CHARACTERS):
        bits = rest & 0x1F
        rest >>= 5
        continued = rest != np.where(bits & 0x10, -1, 0)
        characters[:, column] = np.where(unfinished, (bits | (continued << 5)) + 48, 0)
        unfinished &= continued
    used = characters > 0
    ends = np.cumsum(used.sum(axis=1))[np.cumsum(num_runs) - 1].tolist()  # of each mask in the text
    text = characters[used].tobytes()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def rasterised(polygons: Sequence[np.ndarray], height: int, width: int) -> Rle:
    """The union of polygons, each [P, 2] xy with P >= 3, as COCO draws them.

    The polygons must be finite and near the image, as those of a `CocoSet` are.
    """
    parts = mask_api.frPyObjects([polygon.reshape(-1).tolist() for polygon in polygons], height, width)
    return Rle(height, width, mask_api.merge(parts)["counts"])
