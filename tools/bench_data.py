"""`rcmae bench loader`, `feed` and `gpu`: images from disk, alone and before a training step."""

import io
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from core.compiling import compiles
from core.datasets import ImageSource, open_images
from core.engine import train_step
from core.errors import ConfigError, shown
from core.flags import FlagReader
from core.loader import EpochOrder, Feed, TrainingImages, image_loader
from core.machine import choose_device
from core.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from pretrain.data import PrepareSample, collate
from tools.bench import (
    BASELINE,
    SUITE,
    Row,
    bench_pretrain,
    nothing,
    read_config,
    say,
    seconds_of,
    suite_run,
    synchronize,
)
from tools.bench_detect import bench_detect
from tools.bench_segment import bench_segment


class _Endless(Sampler[int]):
    """Indices in shuffled order, again and again."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(0)
        while True:
            yield from rng.permutation(self._count).tolist()


class _PILImages(Dataset):
    """What is usually done: PIL decodes, torchvision's PIL transforms crop, flip and normalise."""

    def __init__(self, source: ImageSource, img_size: int) -> None:
        self._source = source
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(img_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __getitem__(self, index: int) -> Tensor:
        return self._transform(Image.open(io.BytesIO(self._source.read(index))).convert("RGB"))


def bench_loader(data: str, img_size: int, num_workers: int, rounds: int, cache: Path) -> None:
    """Time how fast batches of 32 random crops come out of the loader, beside PIL with torchvision's transforms."""
    source, batch = open_images(data, cache), 32
    if len(source) < batch:
        raise ConfigError(f"{shown(data)}: {len(source)} images, at least {batch} are needed")
    prepare = PrepareSample((img_size, img_size), 196, AugmentConfig(), own_teacher_mask=False)
    plain = DataLoader(_PILImages(source, img_size), batch, sampler=_Endless(len(source)), num_workers=num_workers)
    rows = [Row(BASELINE, batch, nothing), Row(SUITE, batch, nothing)]
    for _ in range(rounds):
        for row, loader in zip(rows, (plain, training_loader(source, prepare, 3, batch, num_workers)), strict=True):
            stream = iter(loader)
            for _ in range(2 * max(1, num_workers)):  # until it is the workers that set the pace
                next(stream)
            begun, taken = time.perf_counter(), 0
            while taken < 4 * max(1, num_workers) or time.perf_counter() - begun < 2:
                next(stream)
                taken += 1
            row.rates.append(taken * batch / (time.perf_counter() - begun))
            del stream  # and its workers: each runs alone
    baseline, ours = rows
    table = Table("", "images/s", "against baseline")
    for row in rows:
        table.add_row(row.name, f"{row.images_per_s:.4g}", f"{row.ratio_to(baseline):.2f}")
    figures = {
        "name": "loader",
        "num_workers": num_workers,
        "ratio": ours.ratio_to(baseline),
        "images_per_s": ours.images_per_s,
        "baseline_images_per_s": baseline.images_per_s,
    }
    title = f"{shown(data)}: {len(source)} images, random crops of {img_size} px, {num_workers} workers"
    say(title, table, figures, torch.device("cpu"))


def training_loader(
    source: ImageSource, prepare: PrepareSample, channels: int, batch_size: int, num_workers: int
) -> DataLoader:
    """The loader of a pretraining run, without end."""
    order = EpochOrder(len(source), batch_size, batch_size, seed=0, first_step=0, total_steps=10**9)
    return image_loader(TrainingImages(source, 0, prepare, channels), order, collate, num_workers, timeout_s=300)


def bench_feed(path: Path | None, overrides: list[str], num_workers: int, seconds: float) -> None:
    """Time training steps fed from disk beside the same steps on a batch in place: what waiting for data costs."""
    config, device = read_config(path, overrides)
    source = open_images(config.data, config.cache.expanduser())
    if len(source) < config.batch_size:
        raise ConfigError(f"batch_size={config.batch_size}: more than the {len(source)} images of data; lower it")
    task, run = suite_run(config, device, config.batch_size, compiles(config.engine.compile, device))
    vit = config.vit_config()
    prepare = PrepareSample(vit.img_size, vit.num_patches, config.augment, own_teacher_mask=False)
    loader = training_loader(source, prepare, vit.in_chans, config.batch_size, num_workers)
    feed = Feed(loader, 1, max_broken=0)
    flags, steps = FlagReader(device), itertools.count()
    held = feed.take()

    def step(batches: list[Any]) -> None:
        number = next(steps)
        train_step(task, batches, run, number, flags)
        flags.read(number - 2)

    for _ in range(3):
        step(held)
    in_place, fed = (Row(name, config.batch_size, nothing) for name in ("batch in place", "fed from disk"))
    times = max(1, round(seconds / 2 / seconds_of(lambda: step(held), 1, device)))
    in_place.rates.append(times * config.batch_size / seconds_of(lambda: step(held), times, device))
    for _ in range(4):  # what was made ahead of time
        step(feed.take())
    synchronize(device)
    feed.wait_s = 0.0
    took = seconds_of(lambda: step(feed.take()), times, device)
    fed.rates.append(times * config.batch_size / took)
    table = Table("", "images/s", "waiting for data")
    table.add_row(in_place.name, f"{in_place.images_per_s:.4g}", "-")
    table.add_row(fed.name, f"{fed.images_per_s:.4g}", f"{100 * feed.wait_s / took:.1f} %")
    figures = {
        "name": "feed",
        "num_workers": num_workers,
        "batch_size": config.batch_size,
        "ratio": fed.ratio_to(in_place),
        "images_per_s": fed.images_per_s,
        "baseline_images_per_s": in_place.images_per_s,
        "data_wait_pct": 100 * feed.wait_s / took,
    }
    say(f"{shown(config.data)}: {len(source)} images, {num_workers} workers, {times} steps", table, figures, device)


def draw_photographs(folder: Path, count: int = 2048, size: tuple[int, int] = (500, 375)) -> Path:
    """JPEGs with the size and weight of ImageNet's, for machines that hold no photographs."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = pixels + rng.integers(-24, 25, (size[1], size[0], 1), dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=88)
    return folder


def bench_gpu(data: str | None, work: Path, only: Sequence[str]) -> None:
    """The GPU rows of docs/benchmarks.md in one call, or `only` some of `GPU_ROWS`. Raises: ConfigError."""
    unknown = [name for name in only if name not in GPU_ROWS]
    if unknown:
        raise ConfigError(f"--only {shown(unknown[0])}: expected any of {', '.join(GPU_ROWS)}")
    choose_device("cuda")
    for name in only or GPU_ROWS:
        GPU_ROWS[name](data, work)


def _gpu_pretrain(data: str | None, work: Path) -> None:
    bench_pretrain(None, ["model=base"], (256, 512), rounds=2)
    bench_pretrain(None, ["model=large"], (256,), rounds=2)


def _gpu_images(data: str | None, work: Path) -> None:
    photographs = data or str(draw_photographs(work / "photographs"))
    bench_loader(photographs, 224, 16, rounds=3, cache=work / "cache")
    feeding = [f"data={photographs}", f"cache={work / 'cache'}", "model=base", "batch_size=512"]
    bench_feed(None, feeding, num_workers=16, seconds=40)


def _gpu_detect(data: str | None, work: Path) -> None:
    bench_detect(None, ["eval_precision=bf16"], "base", (1, 4), rounds=2)


def _gpu_segment(data: str | None, work: Path) -> None:
    bench_segment(None, ["eval_precision=bf16"], "base", (16,), "683x512", rounds=3)


GPU_ROWS: dict[str, Callable[[str | None, Path], None]] = {
    "pretrain": _gpu_pretrain,
    "images": _gpu_images,
    "detect": _gpu_detect,
    "segment": _gpu_segment,
}
