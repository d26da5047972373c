"""`rcmae bench corruptions`: ms per photograph of 224 x 224, beside the imagecorruptions package in the same run."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from core.datasets import open_images
from core.errors import ConfigError, DataError, shown
from core.images import BadImage, decode
from core.machine import choose_device
from core.transforms import resize_center_crop
from robustness.corruptions.apply import BENCHMARK, NAMES, SEVERITIES, corrupt
from robustness.corruptions.case import DEFINITIONS, Definition
from tools.bench import say, seconds_of
from tools.bench_data import draw_photographs

SIDE_PX = 224
REFERENCE_PHOTOGRAPHS = 4  # of the batch that the reference is given per severity
STACK = (
    "numpy==2.4.6", "scipy==1.17.1", "scikit-image==0.26.0", "opencv-python-headless==5.0.0.93", "pillow==13.0.0",
)  # fmt: skip
PACKAGE = "imagecorruptions==1.1.2"

# Where the package cannot be run: ms per photograph, mean over severities, on one pinned core of another machine (spec
# robustness 2.4). A quotation; no ratio is made of it.
QUOTED_MS = {
    "gaussian_noise": 4.36, "shot_noise": 11.38, "impulse_noise": 3.70, "defocus_blur": 4.03, "glass_blur": 718.91,
    "motion_blur": 9.18, "zoom_blur": 100.76, "snow": 9.91, "frost": 7.92, "fog": 2.44, "brightness": 21.64,
    "contrast": 1.99, "elastic_transform": 15.65, "pixelate": 0.32, "jpeg_compression": 0.48, "speckle_noise": 3.34,
    "gaussian_blur": 3.66, "spatter": 4.91, "saturate": 21.31,
}  # fmt: skip


def bench_corruptions(
    data: str | None, work: Path, device_name: str, batch_size: int, definition: str, rounds: int, reference: bool
) -> None:
    """Time all 19 corruptions, draws included, in turn with the reference, each on one CPU thread, and print the times.

    Args:
        data: photographs; drawn where none are given.
        work: where they are drawn and the reference's environment is made.
        device_name: on a GPU draws are made there, and the sum leaves out jpeg_compression, which PIL does on the host.
    """
    known = next((one for one in DEFINITIONS if one == definition), None)
    if known is None:
        raise ConfigError(f"--definition {shown(definition)}: expected one of {', '.join(DEFINITIONS)}")
    device = choose_device(device_name)
    images = _photographs(data or str(draw_photographs(work / "corruption_photographs", batch_size)), batch_size, work)
    python = _reference_python(work) if reference else None
    ours: dict[str, list[float]] = {name: [] for name in NAMES}
    theirs: dict[str, list[float]] = {name: [] for name in NAMES if python}
    with one_thread(), _reference(python, images, work) as ask:
        on_device = images.to(device)
        for turn in range(-1, rounds):  # the first warms up tables, caches and the GPU
            for name in NAMES:
                found = statistics.mean(_ms(on_device, name, severity, known) for severity in SEVERITIES)
                if turn >= 0:
                    ours[name].append(found)
                    if ask is not None:
                        theirs[name].append(ask(name))
    _report(ours, theirs, device, batch_size, known)


def _ms(images: Tensor, name: str, severity: int, definition: Definition) -> float:
    """Milliseconds per image of one batch: of the GPU's clock, or of the CPU's time that the one thread used.

    What other processes of a shared machine take away does not count; the reference is measured alike.
    """
    draws_on = "device" if images.is_cuda else "cpu"

    def step() -> None:
        corrupt(images, name, severity, image_ids=range(len(images)), definition=definition, draws_on=draws_on)

    begun = time.process_time()
    wall_s = seconds_of(step, 1, images.device)
    return 1000 * (wall_s if images.is_cuda else time.process_time() - begun) / len(images)


def _photographs(data: str, count: int, work: Path) -> Tensor:
    """The first usable images of a set as uint8 [count, 3, 224, 224], over again where there are fewer."""
    source, images = open_images(data, work / "cache"), []
    for i in range(len(source)):
        try:
            images.append(resize_center_crop(decode(source.read(i)), (SIDE_PX, SIDE_PX), 0.875))
        except BadImage:
            continue
        if len(images) == count:
            break
    if not images:
        raise DataError(f"{shown(data)}: no image of it could be decoded")
    return torch.stack([images[i % len(images)] for i in range(count)])


@contextmanager
def one_thread() -> Iterator[None]:
    """What is measured is the work, not the machine's cores."""
    import cv2

    threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv_threads)


# ---- the reference ------------------------------------------------------------------------------------------------


def _reference_python(work: Path) -> Path | None:
    """The interpreter of an environment with the package and what it needs, made once; None where it cannot be."""
    folder = work / "reference"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        steps = ([sys.executable, "-m", "venv", str(folder)], [*pip, *STACK], [*pip, "--no-deps", PACKAGE])
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)  # noqa: S603  our own words
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                print(f"the reference cannot be installed, its published times are quoted: {shown(last)}")
                return None
        ready.touch()
    return python


@contextmanager
def _reference(python: Path | None, images: Tensor, work: Path) -> Iterator["Clock | None"]:
    """A process that times the reference, on request and by name; it sleeps in between."""
    if python is None:
        yield None
        return
    file = work / "reference_photographs.npy"
    np.save(file, images[:REFERENCE_PHOTOGRAPHS].permute(0, 2, 3, 1).numpy())  # [4, H, W, 3]
    command = [str(python), "-W", "ignore", str(Path(__file__).with_name("reference_corruptions.py")), str(file)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with subprocess.Popen(  # noqa: S603  our own words
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    ) as process:
        yield Clock(process)
        assert process.stdin is not None, "opened with a pipe"
        process.stdin.close()


class Clock:
    """Asks the reference process how long a corruption takes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, name: str) -> float:
        """Mean over the severities of ms per photograph."""
        assert self._process.stdin is not None and self._process.stdout is not None, "opened with pipes"
        print(name, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        while line and not line.startswith("["):  # the package prints remarks
            line = self._process.stdout.readline()
        if not line:
            raise DataError(f"the reference ended at {name}; its words are above")
        return statistics.mean(json.loads(line))


# ---- the report ---------------------------------------------------------------------------------------------------


def _report(
    ours: dict[str, list[float]], theirs: dict[str, list[float]], device: torch.device, batch_size: int,
    definition: Definition,
) -> None:  # fmt: skip
    summed = [name for name in BENCHMARK if device.type == "cpu" or name != "jpeg_compression"]
    table = Table("", "ms per image", "reference" if theirs else "reference, quoted", "times as fast")
    for name in NAMES:
        _add_row(table, name, ours[name], theirs.get(name), QUOTED_MS[name])
    sums = _round_sums(ours, summed)
    reference_sums = _round_sums(theirs, summed) if theirs else None
    quoted_sum_ms = sum(QUOTED_MS[name] for name in summed)
    _add_row(table, f"sum of {len(summed)}", sums, reference_sums, quoted_sum_ms)
    figures: dict[str, Any] = {
        "name": "corruptions",
        "sum_ms": statistics.median(sums),
        "reference_sum_ms": statistics.median(reference_sums) if reference_sums else None,
        "ratio": _ratio(reference_sums, sums) if reference_sums else None,
        "ms": _medians(ours),
        "reference_ms": _medians(theirs),
        "quoted_reference_sum_ms": quoted_sum_ms,
        "summed": len(summed),
        "definition": definition,
        "draws": "device" if device.type == "cuda" else "cpu",
        "batch_size": batch_size,
        "cpu_threads": 1,
    }
    title = f"{SIDE_PX} x {SIDE_PX} px, batch {batch_size}, {definition}, mean over five severities"
    say(title, table, figures, device)


def _add_row(table: Table, name: str, ours: list[float], theirs: list[float] | None, quoted: float) -> None:
    beside = statistics.median(theirs) if theirs else quoted
    ratio = f"{_ratio(theirs, ours):.1f}" if theirs else "-"
    table.add_row(name, f"{statistics.median(ours):.2f}", f"{beside:.2f}", ratio)


def _round_sums(times: dict[str, list[float]], names: Sequence[str]) -> list[float]:
    return [sum(values) for values in zip(*(times[name] for name in names), strict=True)]


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 3) for name, values in times.items()}
