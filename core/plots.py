"""Plots as PNG files, drawn without a display and never half-written."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.errors import shown
from core.files import replace_file

TITLE_PT, LINE_INCHES = 11, 0.2  # of the title and the notes below it


@contextmanager
def plot(path: Path, size: tuple[float, float], title: str, notes: Sequence[str] = ()) -> Iterator[Any]:
    """Yield a matplotlib figure of (width, height) inches to draw into; at the end it is saved to `path`.

    Args:
        title: may hold foreign text; of one that is wider than the plot the middle is left out.
        notes: further lines below the title.
    """
    from matplotlib import rc_context  # a second of imports, only where one is drawn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size)
    canvas = FigureCanvasAgg(figure)
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():  # names hold dollars, and no formulas
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        lines = [_fitting(line, canvas.get_renderer(), 0.95 * size[0] * figure.dpi) for line in (title, *notes)]
        # A tenth of an inch from the top, however tall: it hangs from there.
        figure.suptitle("\n".join(lines), fontsize=TITLE_PT, y=1 - 0.1 / size[1])
        yield figure
        layout = figure.get_layout_engine()
        if isinstance(layout, ConstrainedLayoutEngine):  # it does not know of a title with a place of its own
            layout.set(rect=(0, 0, 1, 1 - (0.15 + LINE_INCHES * len(lines)) / size[1]))
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=110)
    replace_file(path, data.getvalue())


def _fitting(line: str, renderer: Any, width_px: float) -> str:
    from matplotlib.font_manager import FontProperties

    font, most = FontProperties(size=TITLE_PT), len(shown(line))
    while renderer.get_text_width_height_descent(shown(line, most), font, False)[0] > width_px:
        most = int(0.95 * most)
    return shown(line, most)
