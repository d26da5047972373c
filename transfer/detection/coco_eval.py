"""COCO's average precision of boxes and masks. pycocotools is the authority; a faster library gives the same numbers.

Detections travel as rows: JSON-able, in pixels of the image as stored. Whoever makes a row checks it, so that nothing
reaches the C code of either library that could harm it.
"""

import contextlib
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pycocotools import mask as mask_api

from core.distributed import Processes
from core.errors import DataError, shown
from transfer.detection.coco import CocoSet, id_of
from transfer.detection.inference import Detections
from transfer.detection.rle import encode, first_bad, rasterised
from transfer.detection.strict_json import read_json

Engine = Literal["faster_coco_eval", "pycocotools"]
Figures = dict[str, float | None]
Entry = dict[str, Any]

IOU_TYPES = {"box": "bbox", "mask": "segm"}
AREAS = {"": 0, "_small": 1, "_medium": 2, "_large": 3}  # by area: all, below 32^2, below 96^2, from there
PORTION_PX = 2**26  # of masks held at once while they are encoded
LIMITS = (1, 10, 100)  # detections counted per image, the best first
EXPECTED = "COCO results: a list of {image_id, category_id, bbox, score, segmentation}"


class Row(NamedTuple):
    """One detection; as JSON, a list in this order."""

    image: int  # index in the set
    label: int
    score: float
    xywh: tuple[float, float, float, float]
    mask: str | None  # COCO's compressed run lengths


def detection_rows(index: int, found: Detections) -> list[Row]:
    """The detections of one image as rows.

    Args:
        index: of the image in its set.
    Raises: ValueError for numbers that are not finite.
    """
    corners = found.boxes.float().cpu()
    sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)  # [N, 4] xywh
    scores = found.scores.float().cpu()
    if not (torch.isfinite(sides).all() and torch.isfinite(scores).all()):
        raise ValueError(f"detection_rows: image {index}: boxes or scores that are not finite; drop them before")
    portion = max(1, PORTION_PX // math.prod(found.size))
    portions = (found.paste(slice(start, start + portion)) for start in range(0, len(sides), portion))
    masks = [rle.counts.decode("ascii") for masks in portions for rle in encode(masks)]
    table = zip(found.labels.tolist(), scores.tolist(), sides.tolist(), masks, strict=True)
    return [Row(index, label, score, (x, y, w, h), mask) for label, score, (x, y, w, h), mask in table]


def gather_rows(rows: Iterable[Row], seen: Iterable[int], coco: CocoSet, processes: Processes) -> list[Row]:
    """The rows of all processes, on every process, in the order of the images.

    Args:
        rows: of this process.
        seen: the images that this process evaluated, those without detections among them; fillers left out.
    """
    packed = zlib.compress(json.dumps([list(seen), [list(row) for row in rows]]).encode(), 1)
    longest = max(processes.gather(len(packed)))
    data = torch.frombuffer(bytearray(packed.ljust(longest, b"\0")), dtype=torch.uint8)
    everything: list[Row] = []
    counted: list[int] = []
    for part in processes.stack(data):  # [size, longest]
        images, theirs = json.loads(zlib.decompressobj().decompress(part.numpy().tobytes()))
        counted += images
        everything += [Row(image, label, score, tuple(xywh), mask) for image, label, score, xywh, mask in theirs]
    assert sorted(counted) == list(range(len(coco))), "every image is evaluated exactly once"
    return sorted(everything, key=lambda row: row.image)


def result_entries(rows: Iterable[Row], coco: CocoSet) -> list[Entry]:
    """Rows in COCO's result format, with the ids of the set."""
    entries = []
    for row in rows:
        entry: Entry = {
            "image_id": coco.image_ids[row.image],
            "category_id": coco.category_ids[row.label],
            "bbox": list(row.xywh),
            "score": row.score,
        }
        if row.mask is not None:
            entry["segmentation"] = {"size": list(coco.size(row.image)), "counts": row.mask}
        entries.append(entry)
    return entries


def read_results(path: Path, coco: CocoSet) -> list[Row]:
    """Rows of a file in COCO's result format.

    Raises: DataError for the first entry that is none: an unknown id, numbers that are not finite, a broken mask.
    """
    entries = read_json(path, EXPECTED)
    if not isinstance(entries, list):
        raise DataError(f"{shown(path)}: not a list at the top level; expected {EXPECTED}")
    images = {id_: index for index, id_ in enumerate(coco.image_ids)}
    labels = {id_: label for label, id_ in enumerate(coco.category_ids)}
    rows = []
    for place, entry in enumerate(entries):
        fault, row = _row_of(entry, images, labels, coco)
        if row is None:
            raise DataError(f"{shown(path)}: [{place}]: {fault}; expected {EXPECTED}")
        rows.append(row)
    masks = [(place, row) for place, row in enumerate(rows) if row.mask is not None]
    pixels = np.array([math.prod(coco.size(row.image)) for _, row in masks])
    bad = first_bad([(row.mask or "").encode() for _, row in masks], pixels)
    if bad is not None:
        raise DataError(f"{shown(path)}: [{masks[bad][0]}]: segmentation: counts do not add up to the image")
    return sorted(rows, key=lambda row: row.image)


def _row_of(entry: Any, images: Mapping[Any, int], labels: Mapping[Any, int], coco: CocoSet) -> tuple[str, Row | None]:
    """What is wrong with a result entry, or its row, whose mask is yet to be checked."""
    image, label = images.get(id_of(entry, "image_id")), labels.get(id_of(entry, "category_id"))
    if image is None or label is None:
        return f"unknown {'image_id' if image is None else 'category_id'}", None
    numbers = [entry.get("score"), *box] if isinstance(box := entry.get("bbox"), list) else []
    finite = all(type(number) in {int, float} and abs(number) < 1e9 for number in numbers)  # NaN is not below
    if len(numbers) != 5 or not finite or min(numbers[3:]) < 0:
        return "bbox and score are not five finite numbers with a width and height", None
    mask, size = None, list(coco.size(image))
    if (outline := entry.get("segmentation")) is not None:
        mask = outline.get("counts") if isinstance(outline, dict) and outline.get("size") == size else None
        if not isinstance(mask, str) or not mask.isascii():
            return f"segmentation is no compressed run lengths of size {size}", None
    score, x, y, w, h = map(float, numbers)
    return "", Row(image, label, score, (x, y, w, h), mask)


def evaluate(coco: CocoSet, rows: Sequence[Row], engine: Engine = "faster_coco_eval") -> Figures:
    """COCO's average precision and recall, of boxes, and of masks where all rows have one.

    Args:
        rows: made by this module; of any order.
        engine: what compares and counts; both give the same numbers.
    Returns: fractions by name, `box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`, `box_ap_medium`, `box_ap_large`,
        `box_ar1`, `box_ar10`, `box_ar100`, `box_ar_small` and so on, `box_ap/NAME` of each category, and the same of
        `mask_`. None: not defined, for there is no ground truth that would count.
    """
    rows = sorted(rows, key=lambda row: row.image)
    kinds = ["box"] if any(row.mask is None for row in rows) else ["box", "mask"]
    figures: Figures = {}
    for kind in kinds:
        truth, found = ground_truth(coco, kind), _found(coco, rows, kind)
        precision, recall = ENGINES[engine](truth, found, IOU_TYPES[kind])
        figures |= {f"{kind}_{name}": value for name, value in _figures(precision, recall, coco.names).items()}
    return figures


def ground_truth(coco: CocoSet, kind: str) -> Entry:
    """The set as a COCO data set that counts images and categories as `coco` does.

    Args:
        kind: box, or mask for entries that have a segmentation as well.
    """
    entries: list[Entry] = []
    for index in range(len(coco)):
        height, width = coco.size(index)
        for row in range(*coco.spans[index].tolist()):
            each = coco.annotations[row]
            entry = {
                "id": len(entries) + 1,  # 0 would stand for unmatched
                "image_id": index,
                "category_id": each.label,
                "iscrowd": int(each.crowd),
                "area": each.area,
                "bbox": coco.annotations.xywh[row].tolist(),
            }
            if kind == "mask":
                rle = each.rle or rasterised(each.polygons, height, width)
                entry["segmentation"] = {"size": [height, width], "counts": rle.counts}
            entries.append(entry)
    return {**_frame(coco), "annotations": entries}


def _found(coco: CocoSet, rows: Sequence[Row], kind: str) -> Entry:
    """Detections as a COCO data set. Areas are those of the boxes or of the masks themselves."""
    entries: list[Entry] = [
        {"id": i + 1, "image_id": row.image, "category_id": row.label, "iscrowd": 0, "score": row.score}
        for i, row in enumerate(rows)
    ]
    if kind == "box":
        for entry, row in zip(entries, rows, strict=True):
            entry |= {"bbox": list(row.xywh), "area": row.xywh[2] * row.xywh[3]}
    else:
        masks = [{"size": list(coco.size(row.image)), "counts": (row.mask or "").encode()} for row in rows]
        for entry, mask in zip(entries, masks, strict=True):
            entry |= {"segmentation": mask, "area": int(mask_api.area(mask)), "bbox": []}
    return {**_frame(coco), "annotations": entries}


def _frame(coco: CocoSet) -> Entry:
    sizes = coco.sizes.tolist()
    return {
        "info": {},
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(coco.names)],
    }


def _by_pycocotools(truth: Entry, found: Entry, iou_type: str) -> tuple[np.ndarray, np.ndarray]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress there, and nowhere else
        sides = []
        for dataset in (truth, found):
            side = COCO()
            side.dataset = dataset
            side.createIndex()
            sides.append(side)
        return _accumulated(COCOeval(*sides, iou_type))


def _by_faster_coco_eval(truth: Entry, found: Entry, iou_type: str) -> tuple[np.ndarray, np.ndarray]:
    from faster_coco_eval import COCO, COCOeval_faster

    return _accumulated(COCOeval_faster(COCO(truth), COCO(found), iou_type, separate_eval=True))


ENGINES: dict[Engine, Callable[[Entry, Entry, str], tuple[np.ndarray, np.ndarray]]] = {
    "faster_coco_eval": _by_faster_coco_eval,
    "pycocotools": _by_pycocotools,
}


def _accumulated(evaluation: Any) -> tuple[np.ndarray, np.ndarray]:
    """Precision [overlaps, recalls, K, areas, limits] and recall [overlaps, K, areas, limits]; -1 where undefined."""
    evaluation.params.maxDets = list(LIMITS)
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"])


def _figures(precision: np.ndarray, recall: np.ndarray, names: Sequence[str]) -> Figures:
    all_, last = AREAS[""], len(LIMITS) - 1
    figures: Figures = {f"ap{area}": _mean(precision[..., i, last]) for area, i in AREAS.items()}
    figures |= {"ap50": _mean(precision[0, ..., all_, last]), "ap75": _mean(precision[5, ..., all_, last])}
    figures |= {f"ar{limit}": _mean(recall[..., all_, i]) for i, limit in enumerate(LIMITS)}
    figures |= {f"ar{area}": _mean(recall[..., i, last]) for area, i in AREAS.items() if area}
    figures |= {f"ap/{name}": _mean(precision[:, :, label, all_, last]) for label, name in enumerate(names)}
    return figures


def _mean(values: np.ndarray) -> float | None:
    """Mean over what is defined; None if nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
