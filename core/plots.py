"""Plots as PNG files, drawn without a display and never half-written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def plot(path: Path, size: tuple[float, float], title: str) -> Iterator[Any]:
    """Yield a matplotlib figure of (width, height) inches to draw into; at the end it is saved to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second of imports, only where one is drawn
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / size[1])  # a tenth of an inch, however tall: it hangs from there
    yield figure
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.rename(path)
