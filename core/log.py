"""What a run says: console and train.log, metrics.jsonl, TensorBoard, W&B, the progress bar, learning curves."""

import hashlib
import importlib.util
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from core.config import Config
from core.files import replace_file
from core.plots import plot

logger = logging.getLogger("rcmae")

_PANEL_ORDER = ("train", "probe", "eval", "speed")  # areas of metric names, in the order in which curves are drawn


class LogConfig(Config):
    """What is logged and where."""

    every_steps: int = Field(20, gt=0)  # optimizer steps between lines; losses are read from the device only then
    tensorboard: bool = True
    curves: bool = True  # draw curves.png at the end
    wandb_project: str | None = None  # needs the extra rcmae[wandb]

    def contradictions(self) -> Iterator[str]:
        """A project to log to, and nothing to log with."""
        if self.wandb_project and importlib.util.find_spec("wandb") is None:
            yield "log.wandb_project: wandb is not installed; pip install -e .[wandb], or leave the key out"


class RunLog:
    """Log files of one run directory; a resumed run drops what was logged beyond the step that it resumes from."""

    def __init__(self, folder: Path, config: LogConfig) -> None:
        self._folder = folder
        self._config = config
        self._file = logging.FileHandler(folder / "train.log", encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(self._file)
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._metrics: Any = None

    def open(self, step: int, run_name: str, config: Mapping[str, Any]) -> None:
        """Open the metric files for a run that goes on from `step`; -1 for one that starts, with its step 0 to come."""
        path = self._folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            replace_file(path, "".join(f"{line}\n" for line in lines).encode())
        self._metrics = path.open("a", encoding="utf-8")
        if self._config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports, only where it is wanted

            self._tensorboard = SummaryWriter(str(self._folder), purge_step=step + 1)
        if self._config.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=self._config.wandb_project,
                name=run_name,
                id=_wandb_id(run_name),
                resume="allow",
                config=dict(config),
            )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record figures of one step everywhere."""
        row = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._tensorboard:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> Path:
        """Save a picture, uint8 [H, W, 3], as pictures/NAME_STEP.png and show it in TensorBoard; return its path."""
        from torchvision.io import encode_png

        path = self._folder / "pictures" / f"{name}_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        replace_file(path, encode_png(torch.from_numpy(pixels).permute(2, 0, 1).contiguous()).numpy().tobytes())
        if self._tensorboard:
            self._tensorboard.add_image(name, pixels, step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Flush and close everything."""
        for writer in (self._metrics, self._tensorboard):
            if writer:
                writer.close()
        if self._wandb:
            self._wandb.finish()
        logger.removeHandler(self._file)
        self._file.close()


@contextmanager
def console_logging(speaks: bool = True) -> Iterator[Console]:
    """While open, what the program says goes to the terminal; yields the console, for a progress bar to share.

    With `speaks` False nothing is shown: another process of the run says it.
    """
    console = Console(emoji=False, quiet=not speaks)  # file names are shown as they are
    handler = _ConsoleHandler(console)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield console
    finally:
        logger.removeHandler(handler)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "beside_bar", False):
            return  # the progress bar shows it
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(record.getMessage(), style=style, markup=False, highlight=False, soft_wrap=True)


class ProgressBar:
    """A bar with ETA on a terminal; elsewhere, and always in train.log, one line per log interval."""

    def __init__(self, console: Console, total_steps: int, step: int) -> None:
        self._live = console.is_terminal and not console.quiet
        self._total = total_steps
        figures = TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        self._bar = Progress(
            BarColumn(bar_width=16),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("eta", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            figures,
            console=console,
            expand=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("step", total=total_steps, completed=step, figures="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, short: str, figures: str, eta_s: float) -> None:
        """Show the latest figures: `short` beside the bar, all of them in the line."""
        self._bar.update(self._task, completed=step, figures=short)
        line = f"step {step}/{self._total}  eta {duration(eta_s)}  {figures}"
        logger.info("%s", line, extra={"beside_bar": self._live})

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _wandb_id(run_name: str) -> str:
    """The name of a run, or a digest of it where W&B would not take it: it refuses some signs and long ones."""
    if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", run_name):
        return run_name
    return hashlib.sha256(os.fsencode(run_name)).hexdigest()[:32]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) < math.inf]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash


def draw_curves(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw every figure of metrics.jsonl over the step, one panel per figure, into a PNG."""
    areas = {name: name.partition("/")[0] for row in rows for name in row}
    found = [name for name, area in areas.items() if area in _PANEL_ORDER]  # others have a picture of their own
    names = sorted(found, key=lambda name: _PANEL_ORDER.index(areas[name]))  # stable within an area
    columns = min(3, max(1, len(names)))
    lines = -(-len(names) // columns) or 1
    height = 0.5 + 2.7 * lines
    with plot(path, (4.6 * columns, height), title) as figure:
        for i, name in enumerate(names):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axes = figure.add_subplot(lines, columns, i + 1)
            axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 30 else None)
            if name.startswith("speed/"):
                axes.set_ylim(0, 1.1 * max(value for _, value in points) + 1e-9)
            axes.set_title(name, fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            if i >= len(names) - columns:
                axes.set_xlabel("optimizer step", fontsize=8)
        # By hand: matplotlib's own layout takes longer than a short run.
        figure.subplots_adjust(
            left=0.05, right=0.98, top=1 - 0.7 / height, bottom=0.15 / lines, hspace=0.35, wspace=0.2
        )
