"""`rcmae bench robust`: what corrupting costs in the sweep of a detector, beside all else that is done to an image.

All else (reading, decoding, resizing, the network, masks, average precision) does not depend on the corruption, so it
is timed on clean images; corruptions are timed on the same images, each at every severity.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from core.config import load_config
from core.distributed import Processes
from core.errors import ConfigError, shown
from core.images import decode
from core.machine import choose_device
from pretrain.presets import ENCODERS
from robustness.cell_evaluator import corruption_of
from robustness.corruptions.apply import BENCHMARK, SEVERITIES
from robustness.evaluation import corrupted
from robustness.grid import Cell
from tools.bench import say, synchronize
from tools.bench_coco_eval import HEIGHT, WIDTH, made_up_set
from tools.bench_corruptions import one_thread
from tools.bench_data import draw_photographs
from tools.bench_detect import candidate_threshold, detector_of, made_up_batch
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import evaluate
from transfer.detection.settings import DetectConfig
from transfer.detection.tasks import EVAL_BATCH_SIZE, CocoEvaluator

FACTS = {"seed": 0, "definition": "imagecorruptions", "jpeg_step": False}  # of cells, beside where the draws are made


def bench_robust(path: Path | None, overrides: list[str], model: str, num_images: int, rounds: int, work: Path) -> None:
    """Time the 75 cells of a detector per image, and print the share that corrupting has in them.

    On a CPU one thread is used, and its own time counts: what other processes of the machine take away does not.

    Args:
        path, overrides: a detection configuration; data=, out= and backbone= are not needed.
        model: a published size of ViT, whose weights are drawn; as many candidates reach its heads as of a trained one.
        num_images: drawn photographs of 640 x 480 px.
        work: where they are drawn.
    """
    if model not in ENCODERS:
        raise ConfigError(f"--model {shown(model)}: expected one of {', '.join(ENCODERS)}")
    given = {text.partition("=")[0] for text in overrides}
    needed = [text for text in ("data=none", "out=none", "backbone=none") if text.partition("=")[0] not in given]
    config = load_config(DetectConfig, path, [*needed, *overrides])
    device = choose_device(config.device)
    coco = _drawn_set(num_images, work / "robust_photographs")
    with one_thread():
        rest = _rest(config, model, coco, device)
        images = [decode(coco.source().read(index)).to(device) for index in range(num_images)]
        cells = {name: [_corrupting(images, name, severity, device) for severity in SEVERITIES] for name in BENCHMARK}
        rest_ms: list[float] = []
        spent: dict[str, list[float]] = {name: [] for name in BENCHMARK}
        for turn in range(-1, rounds):  # the first warms up tables, caches and the GPU
            found = {name: statistics.mean(_ms(step, num_images, device) for step in cells[name]) for name in BENCHMARK}
            rest_found = _ms(rest, num_images, device)
            if turn >= 0:
                rest_ms.append(rest_found)
                for name, value in found.items():
                    spent[name].append(value)
    title = (
        f"ViT {model}, {config.img_size} px, {config.eval_precision}; {num_images} photographs of {WIDTH} x {HEIGHT}"
    )
    _report(title, spent, rest_ms, {"model": model, "img_size": config.img_size, "images": num_images}, device)


def _drawn_set(num_images: int, folder: Path) -> CocoSet:
    """Made-up objects on drawn photographs."""
    draw_photographs(folder, num_images, (WIDTH, HEIGHT))
    coco, _ = made_up_set(num_images, np.random.default_rng(0))
    names = np.array([f"{index:05d}.jpg".encode() for index in range(num_images)])
    return dataclasses.replace(coco, folder=folder, file_names=names)


def _rest(config: DetectConfig, model: str, coco: CocoSet, device: torch.device) -> Callable[[], None]:
    """All that is done in a clean cell."""
    detector = detector_of(config, model, plain=False).to(device).eval()
    threshold = candidate_threshold(detector, made_up_batch(coco, config, 1).to(device))
    detector.roi.config = detector.roi.config.model_copy(update={"score_threshold": threshold})
    evaluator = CocoEvaluator(
        coco, config.img_size, device, config.eval_precision, EVAL_BATCH_SIZE, 0, config.loader.timeout_s, Processes()
    )
    return lambda: _ignore(evaluate(coco, evaluator(detector)))


def _corrupting(images: Sequence[torch.Tensor], name: str, severity: int, device: torch.device) -> Callable[[], None]:
    """The same images corrupted as a sweep does it, back on the host, where they are resized."""
    facts = {**FACTS, "draws": "device" if device.type == "cuda" else "cpu"}
    apply = corruption_of(Cell("corruptions", name, severity, facts), None)
    assert apply is not None, "no clean cell"
    ids = list(range(len(images)))
    return lambda: _ignore([image.cpu() for image in corrupted(images, ids, apply, device)])


def _ignore(_: object) -> None:
    """Only its making counts."""


def _ms(step: Callable[[], None], images: int, device: torch.device) -> float:
    """Milliseconds per image: of the clock beside a GPU, else of this process's own time."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    synchronize(device)
    begun = clock()
    step()
    synchronize(device)
    return 1000 * (clock() - begun) / images


def _report(
    title: str, spent: Mapping[str, Sequence[float]], rest_ms: Sequence[float], facts: Mapping[str, object],
    device: torch.device,
) -> None:  # fmt: skip
    table = Table("", "ms per image", "share of its cells, %")
    shares = {
        name: statistics.median(100 * value / (value + rest) for value, rest in zip(values, rest_ms, strict=True))
        for name, values in spent.items()
    }
    means = [statistics.mean(values) for values in zip(*spent.values(), strict=True)]  # of a round
    share = statistics.median(100 * mean / (mean + rest) for mean, rest in zip(means, rest_ms, strict=True))
    for name, values in spent.items():
        table.add_row(name, f"{statistics.median(values):.1f}", f"{shares[name]:.1f}")
    table.add_row("corrupting, mean of 15", f"{statistics.median(means):.1f}", f"{share:.2f}")
    table.add_row("all else", f"{statistics.median(rest_ms):.1f}", f"{100 - share:.2f}")
    figures = {
        "name": "robust",
        "share_pct": share,
        "corrupting_ms": statistics.median(means),
        "rest_ms": statistics.median(rest_ms),
        "ms": {name: round(statistics.median(values), 3) for name, values in spent.items()},
        **facts,
        "cpu_threads": 1,
        "draws": "device" if device.type == "cuda" else "cpu",
    }
    say(f"{title}; mean over five severities", table, json.loads(json.dumps(figures)), device)
