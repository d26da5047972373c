"""Large-scale jitter, resizes, parameter groups, schedules and COCO results of detectors, against detectron2."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import shapely
import torch
from PIL import Image
from torch import Tensor

from core.optim import warmup_multistep
from tools.verify.detection_reference import polygons_of
from tools.verify.golden import Golden, read_golden, read_json
from tools.verify.measure import Measure, close, exact
from transfer.detection.coco import Annotation
from transfer.detection.jitter import Draws, Geometry, JitterConfig, eval_size, jitter, jittered_size, resize_to_fit

JITTER_SEEDS = range(10)


def objects_of(golden: Golden) -> list[Annotation]:
    """The objects of the reference's picture."""
    crowd, label = golden["input.iscrowd"].tolist(), golden["input.category"].tolist()
    outlines = polygons_of(golden, "input.polygon.", len(label))
    return [
        Annotation(label[i], np.zeros(4), 1.0, bool(crowd[i]), tuple(p.reshape(-1, 2) for p in outlines[i]), None)
        for i in range(len(label))
    ]


def areas(parts: Iterable[np.ndarray]) -> Tensor:
    """Areas of outlines, ascending."""
    return torch.tensor(sorted(shapely.Polygon(part.reshape(-1, 2)).area for part in parts), dtype=torch.float64)


def jittered(folder: Path) -> Iterator[Measure]:
    """Pixels, boxes and outlines of a picture jittered ten times."""
    golden, _ = read_golden(folder, "detection_lsj")
    image, objects = golden["input.image"].permute(2, 0, 1), objects_of(golden)
    for seed in JITTER_SEEDS:
        draws = Draws(*golden[f"seed{seed}.draws"].tolist())
        moved, targets = jitter(image, objects, 80, JitterConfig(), draws)
        yield exact(f"pixels, seed {seed}", moved, golden[f"seed{seed}.image"])
        yield exact(f"classes, seed {seed}", targets.labels, golden[f"seed{seed}.classes"])
        yield close(f"boxes, seed {seed}", targets.boxes, golden[f"seed{seed}.boxes"], 1e-3)
        expected = polygons_of(golden, f"seed{seed}.polygon.", len(targets.labels))
        for i, parts in enumerate(targets.masks):
            yield close(f"areas of object {i}, seed {seed}", areas(parts), areas(expected[i]), 1e-3)


def resizes(folder: Path) -> Iterator[Measure]:
    """Sizes of the evaluation and of the jitter; pixels of two resizes."""
    table = read_json(folder, "detection_resize_table")
    for size, expected in table["test_resize"]["rows"]:
        yield exact(f"evaluation size of {size}", list(eval_size(size, 1024)), expected)
    for size, scale, expected in table["scale_jitter"]["rows"]:
        yield exact(f"size of {size} at {scale}", list(jittered_size(size, 1024, scale)), expected)
    source = torch.tensor(table["pixels"]["input"], dtype=torch.uint8).permute(2, 0, 1)
    for name in ("down", "up"):  # to a shortest edge that is no square's, so the size is the reference's
        expected = torch.tensor(table["pixels"][name]["output"], dtype=torch.uint8)
        geometry = Geometry((source.shape[1], source.shape[2]), False, (*expected.shape[:2],), (0, 0), 10**6)
        pixels = geometry.pixels(source.permute(1, 2, 0).numpy(), Image.Resampling.BILINEAR)
        yield exact(f"pixels, {name}", pixels, expected.numpy())
    down = table["pixels"]["down"]
    yield exact("shortest edge and largest side", down["short_edge"], down["max_size"])
    fitted = resize_to_fit(source, 24).permute(1, 2, 0)
    yield exact("pixels of the evaluation", fitted, torch.tensor(down["output"], dtype=torch.uint8))


def schedules(folder: Path) -> Iterator[Measure]:
    """Factor of the rate at every stored iteration of the published recipes."""
    recipes = read_json(folder, "detection_schedule")["recipes"]
    yield close("recipes", float(min(len(recipes), 2)), 2.0, 0)
    for name, recipe in recipes.items():
        share = recipe["iterations"] / 184375  # the warm-up was given as a share of the longest recipe
        for step, expected in recipe["multiplier"]:
            found = warmup_multistep(step, warmup_steps=250 * share, start=0.001, milestones=recipe["milestones"])
            yield close(f"{name}, iteration {step}", found, expected, 1e-9)
