"""`rcmae bench coco-eval`: the same made-up detections evaluated by this suite and by pycocotools alone."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from tools.bench import say
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import ENGINES, Engine, Figures, Row, evaluate
from transfer.detection.coco_file import CocoPaths, read_coco
from transfer.detection.rle import rasterised

HEIGHT, WIDTH, NUM_CLASSES = 480, 640, 80  # most images of COCO
OBJECTS_PER_IMAGE = 7
CROWD_SHARE, FOUND_SHARE, WRONG_CLASS_SHARE = 0.01, 0.4, 0.1
OURS: Engine = "faster_coco_eval"
REFERENCE: Engine = "pycocotools"


def bench_coco_eval(num_images: int, per_image: int, rounds: int) -> None:
    """Time boxes and masks of `num_images` x `per_image` detections, in turn, and print both times and the largest
    difference between any two figures.
    """
    rng = np.random.default_rng(0)
    coco, boxes = made_up_set(num_images, rng)
    rows = made_up_rows(coco, boxes, per_image, rng)
    seconds: dict[Engine, list[float]] = {OURS: [], REFERENCE: []}
    figures: dict[Engine, Figures] = {}
    for _ in range(rounds):
        for engine in ENGINES:
            start = time.perf_counter()
            figures[engine] = evaluate(coco, rows, engine)
            seconds[engine].append(time.perf_counter() - start)
    difference = max(abs(_number(value) - _number(figures[REFERENCE][name])) for name, value in figures[OURS].items())
    ratio = statistics.median(b / a for a, b in zip(seconds[OURS], seconds[REFERENCE], strict=True))
    table = Table("", "seconds", "times as fast", "box AP", "mask AP")
    for engine, times in seconds.items():
        fast = f"{ratio:.2f}" if engine == OURS else ""
        figure = [f"{_number(figures[engine][name]):.6f}" for name in ("box_ap", "mask_ap")]
        table.add_row(engine, f"{statistics.median(times):.2f}", fast, *figure)
    line: dict[str, Any] = {
        "name": "coco-eval",
        "ratio": ratio,
        "seconds": statistics.median(seconds[OURS]),
        "reference_seconds": statistics.median(seconds[REFERENCE]),
        "largest_difference": difference,
        "images": num_images,
        "detections": len(rows),
    }
    title = f"{num_images} images, {len(rows)} detections, boxes and masks; largest difference {difference:.1e}"
    say(title, table, line, torch.device("cpu"))


def _number(figure: float | None) -> float:
    """A figure as COCO's own report has it: -1 where it is not defined."""
    return -1.0 if figure is None else figure


def made_up_set(num_images: int, rng: np.random.Generator) -> tuple[CocoSet, list[np.ndarray]]:
    """Images of ellipses, and the boxes [G, 4] xyxy of each image."""
    tree, boxes = made_up_tree(num_images, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made_up.json"
        path.write_text(json.dumps(tree))
        return read_coco(CocoPaths(path, Path(folder))), boxes


def made_up_tree(num_images: int, rng: np.random.Generator) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The same as COCO's JSON."""
    annotations: list[dict[str, Any]] = []
    boxes = []
    for index in range(num_images):
        own = random_boxes(rng, rng.poisson(OBJECTS_PER_IMAGE))
        boxes.append(own)
        for x0, y0, x1, y1 in own.tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": int(rng.integers(NUM_CLASSES)),
                    "iscrowd": int(rng.random() < CROWD_SHARE),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0) * np.pi / 4,
                    "segmentation": [ellipse(np.array([x0, y0, x1, y1])).reshape(-1).tolist()],
                }
            )
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(num_images)]
    categories = [{"id": i} for i in range(NUM_CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}, boxes


def made_up_rows(coco: CocoSet, boxes: list[np.ndarray], per_image: int, rng: np.random.Generator) -> list[Row]:
    """Detections near the objects, some of a wrong class, and anywhere."""
    rows = []
    for index, own in enumerate(boxes):
        labels = coco.annotations.labels[slice(*coco.spans[index])]
        for guess in random_boxes(rng, per_image):
            box, label = guess, int(rng.integers(NUM_CLASSES))
            if len(own) and rng.random() < FOUND_SHARE:
                which = rng.integers(len(own))
                sides = own[which, 2:] - own[which, :2]
                box = own[which] + rng.normal(0, 0.08, 4) * np.tile(sides, 2)
                label = label if rng.random() < WRONG_CLASS_SHARE else int(labels[which])
            low, high = np.minimum(box[:2], box[2:] - 1), np.maximum(box[2:], box[:2] + 1)
            x0, y0, x1, y1 = np.clip(np.concatenate([low, high]), 0, [WIDTH, HEIGHT, WIDTH, HEIGHT]).tolist()
            mask = rasterised([ellipse(np.array([x0, y0, x1, y1]))], HEIGHT, WIDTH).counts.decode()
            rows.append(Row(index, label, float(rng.random()), (x0, y0, x1 - x0, y1 - y0), mask))
    return rows


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Boxes [count, 4] xyxy inside the image, their sides spread evenly over the scales from 8 to 400 px."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def ellipse(box: np.ndarray) -> np.ndarray:
    """Sixteen points [16, 2] of the ellipse in a box."""
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    centre, radius = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
