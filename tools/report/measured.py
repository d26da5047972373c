"""What follows from a run's log: rates, memory, time of training, and where a step lies; runs of one set together."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from tools.report.blocks import Block, Charts, Notes
from tools.report.formats import number, several, text
from tools.report.plots import Series, chart, curve, legend
from tools.report.runs import Run


def grouped(runs: Sequence[Run], key: Callable[[Run], Any]) -> list[list[Run]]:
    """Runs with the same key together, in the order of the first of each."""
    keys = [repr(key(run)) for run in runs]
    return [[run for run, own in zip(runs, keys, strict=True) if own == one] for one in dict.fromkeys(keys)]


def set_name(run: Run, key: str = "data") -> str:
    """The last part of a data path: the same set may lie elsewhere on another machine."""
    value = run.given(key)
    return text(PurePath(value).name or value, 80) if isinstance(value, str) else ""


def data_name(run: Run) -> str:
    """What a run is about: the file of annotations it is evaluated by, or its data path; the last part of either."""
    return set_name(run, "val_json") or set_name(run)


def vit_text(run: Run) -> str:
    """The size of a run's ViT in words."""
    size = run.model
    if not size:
        return f"ViT {text(run.config.get('model') or 'of unknown size', 40)}"
    width, depth, patch = (text(size.get(key), 12) for key in ("embed_dim", "depth", "patch_size"))
    return f"ViT {width} x {depth}, patch {patch}"


def threads_text(run: Run) -> str:
    """How many threads a run computed with, in words."""
    threads = number(run.env.get("threads"))
    return "unknown threads" if threads is None else several(int(threads), "thread")


def median_of(name: str) -> Callable[[Run], float | None]:
    """The median of a logged figure, as a measure."""

    def of(run: Run) -> float | None:
        values = [row[name] for row in run.rows if row.get(name) is not None]
        return statistics.median(values) if values else None

    return of


def peak_memory(run: Run) -> float | None:
    """GiB of the largest process, as logged."""
    values = [row["speed/memory_gib"] for row in run.rows if row.get("speed/memory_gib") is not None]
    return max(values, default=None)


def training_seconds(run: Run) -> float | None:
    """Time of training alone, from the logged rates: evaluations, pictures and interruptions are not counted."""
    steps, passed = clock(run)
    return passed[-1] if len(steps) > 1 else None


def clock(run: Run) -> tuple[list[float], list[float]]:
    """Optimizer steps, and the seconds of training until each."""
    steps, passed = [0.0], [0.0]
    for row in run.rows:
        rate = row.get("speed/images_per_s")
        if rate and rate > 0 and run.batch_size and row["step"] > steps[-1]:
            passed.append(passed[-1] + (row["step"] - steps[-1]) * run.batch_size / rate)
            steps.append(row["step"])
    return steps, passed


def by_images(run: Run) -> Callable[[float], float]:
    """Where a step lies among the images seen."""
    return lambda step: step * (run.batch_size or 1)


def by_minutes(run: Run) -> Callable[[float], float]:
    """Where a step lies in the minutes of training."""
    steps, passed = clock(run)
    return lambda step: float(np.interp(step, steps, passed)) / 60


def curves(
    runs: Sequence[Run], title: str, names: Mapping[str, str], factors: Mapping[str, float] | None = None
) -> list[Block]:
    """Plots of logged figures over images seen, a colour per run; in words where nothing was logged.

    Args:
        names: titles by the name of the figure. factors: from what is logged to what the title says.
    """
    plots = []
    for name, label in names.items():
        factor = (factors or {}).get(name, 1.0)
        points = [curve(run.rows, name, by_images(run), factor) for run in runs]
        series = [Series(run.name, i, own) for i, (run, own) in enumerate(zip(runs, points, strict=True))]
        plots.append(chart(label, "images seen", series))
    found = [plot for plot in plots if plot is not None]
    if found:
        return [Charts(f"Curves: {title}", found, legend([Series(run.name, i, ()) for i, run in enumerate(runs)]))]
    if all(run.only_evaluated for run in runs):
        return []
    return [Notes(f"Curves: {title}", ["No figure has been logged yet."])]
