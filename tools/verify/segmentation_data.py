"""Resize, crop, flip, colours, normalisation and schedules of segmentation, against mmsegmentation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.optim import warmup_poly
from tools.verify.golden import read_golden, read_json
from tools.verify.measure import Measure, close, exact
from transfer.segmentation.augment import (
    AugmentConfig,
    augment,
    distorted,
    drawn_crop,
    drawn_size,
    fitted_size,
    flips,
    resize_image,
    resize_label,
)
from transfer.segmentation.data import Collate, Sample, normalized

SEEDS = range(10)
IGNORED = 255


def swapped(image: np.ndarray) -> np.ndarray:
    """An image with its channels the other way round: the reference's are blue first."""
    return np.ascontiguousarray(image[..., ::-1])


def recipe(settings: dict[str, Any]) -> AugmentConfig:
    """The reference's ranges."""
    low, high = settings["resize"]["ratio_range"]
    scale = settings["resize"]["scale"]
    return AugmentConfig(scale=tuple(scale), min_ratio=low, max_ratio=high, flip_ratio=settings["flip"])


def augmentation(folder: Path) -> Iterator[Measure]:
    """Each step by itself and all in order, for ten seeds; normalisation, padding, sizes of the evaluation."""
    tensors, meta = read_golden(folder, "segmentation_augment")
    golden, settings = {name: tensor.numpy() for name, tensor in tensors.items()}, meta["config"]
    config, image, label = recipe(settings), swapped(golden["input.image"]), golden["input.label"]
    for seed in SEEDS:
        yield from _one_by_one(golden, settings, seed)
        draws = np.random.RandomState(seed)
        moved, moved_label = augment(image, label, settings["crop"], IGNORED, config, draws)
        yield exact(f"all, image, seed {seed}", swapped(moved), golden[f"seed{seed}.all.image"])
        yield exact(f"all, label, seed {seed}", moved_label, golden[f"seed{seed}.all.label"])
    batch = Collate(64, IGNORED)(
        [Sample(tensors["normalise.input"].flip(0), tensors["normalise.label"], 0)]
    )  # fmt: skip
    found = normalized(batch, torch.float32)[0][:, ::2, ::2].contiguous()
    yield close("normalised", found, tensors["normalise.output"], 1e-5)
    yield exact("padded label", batch.labels[0], tensors["normalise.output_label"])
    yield exact("size before padding", batch.sizes.tolist(), [[30, 44]])
    for width, height, new_width, new_height in golden["test_resize"].tolist():
        size = fitted_size((height, width), (2048, 512))
        yield exact(f"evaluation size of {width}x{height}", size, (new_height, new_width))


def _one_by_one(golden: dict[str, np.ndarray], settings: dict[str, Any], seed: int) -> Iterator[Measure]:
    def draws() -> np.random.RandomState:
        return np.random.RandomState(seed)

    config, only, where = recipe(settings), settings["crop_only"], f"seed {seed}"
    image, label, expected = swapped(golden["input.image"]), golden["input.label"], f"seed{seed}."
    height, width = label.shape
    size = drawn_size((height, width), config, draws())
    yield exact(f"size, {where}", size, tuple(golden[f"{expected}resize.size"].tolist()))
    if f"{expected}resize.image" in golden:
        yield exact(f"resized, {where}", swapped(resize_image(image, size)), golden[f"{expected}resize.image"])
        yield exact(f"resized label, {where}", resize_label(label, size), golden[f"{expected}resize.label"])
    skewed = golden[f"input.{only['label']}"]
    rows, columns = drawn_crop(skewed, only["size"], IGNORED, only["cat_max_ratio"], draws())
    yield exact(f"crop, {where}", [rows.start, columns.start], golden[f"{expected}crop.offset"].tolist())
    yield exact(f"flip, {where}", flips(config, draws()), bool(golden[f"{expected}flip"]))
    found = distorted(np.ascontiguousarray(image[:30, :44]), draws())
    yield exact(f"colours, {where}", swapped(found), golden[f"{expected}photometric.image"])


def schedules(folder: Path) -> Iterator[Measure]:
    """Rate, relative to that of the recipe, at every stored iteration of the three published ones."""
    recipes = read_json(folder, "segmentation_schedule")["recipes"]
    yield exact("recipes", len(recipes), 3)
    for name, each in recipes.items():
        for step, expected in each["lr"]:
            found = warmup_poly(step, total_steps=each["iterations"], warmup_steps=1500)
            yield close(f"{name}, iteration {step}", found, expected / each["base_lr"], 1e-7)
