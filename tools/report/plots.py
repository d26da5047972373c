"""Curves as inline SVG: geometry is made here, strokes and text take the colours of the page.

Letters of the geometry are units of the drawing, x to the right, y downwards.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from tools.report.blocks import Chart, Key, Line, Tick
from tools.report.formats import four, several, text

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 370, 10, 196  # of the area of the curves
POINTS_PER_CHART, MIN_POINTS = 1600, 60  # that are drawn: more cannot be seen, and cost bytes
DOTS_BELOW = 30  # points of a curve that each get a dot
STYLES = 24  # eight colours, each in three kinds of stroke
MAX_IN_ALT = 6

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Series:
    """A curve to draw: (x, y) in order of x, y None where it is not defined; `style` from 0 on."""

    label: str
    style: int
    points: Points

    @property
    def defined(self) -> list[tuple[float, float]]:
        """The points that have a value."""
        return [(x, y) for x, y in self.points if y is not None]


def chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    from_zero: bool = False,
    zero_line: bool = False,
    least_range: float = 0.0,
) -> Chart | None:
    """A plot of the curves that have points; None if none has.

    Args:
        log: logarithmic y, of positive values alone. from_zero: y begins at zero.
        zero_line: draw a line at zero. least_range: of y, so that rounding does not fill a plot.
    """
    if log:
        series = [
            Series(s.label, s.style, [(x, y if y is not None and y > 0 else None) for x, y in s.points]) for s in series
        ]
    series = [one for one in series if one.defined]
    if not series:
        return None
    most = max(MIN_POINTS, POINTS_PER_CHART // len(series))
    xs = [x for one in series for x, _ in one.defined]
    ys = [y for one in series for _, y in one.defined]
    across = _Linear(min(0.0, *xs), max(xs) if max(xs) > 0 else 1.0, LEFT, RIGHT)
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    upward: _Scale = (
        _Log(low, high, BOTTOM, TOP) if log else _Linear(*_padded(low, high, 0.06, least_range, from_zero), BOTTOM, TOP)
    )
    lines = [_line(one, across, upward, most) for one in series]
    zero = upward.at(0.0) if zero_line and not log and upward.holds(0.0) else None
    alt = _alt(title, x_label, series)
    return Chart(title, alt, x_label, across.ticks(5), upward.ticks(5), lines, zero)


def legend(series: Sequence[Series]) -> list[Key]:
    """One entry per label, in the order of first mention."""
    return [Key(style % STYLES, label) for label, style in {one.label: one.style for one in series}.items()]


def thinned(points: Points, most: int) -> list[tuple[float, float | None]]:
    """At most so many points: means over equal runs of neighbours, gaps kept where a whole run has no value."""
    if len(points) <= most:
        return list(points)
    found: list[tuple[float, float | None]] = []
    for part in np.array_split(np.arange(len(points)), most):
        values = [points[i] for i in part]
        defined = [(x, y) for x, y in values if y is not None]
        if defined:
            found.append((float(np.mean([x for x, _ in defined])), float(np.mean([y for _, y in defined]))))
        else:
            found.append((values[0][0], None))
    return found


# ---- scales ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    low: float
    high: float
    start: float  # where `low` is drawn
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, most: int) -> list[Tick]:
        found = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        inside = [float(value) for value in found if self.low - 1e-12 <= value <= self.high + 1e-12]
        step = inside[1] - inside[0] if len(inside) > 1 else abs(self.high - self.low)
        return [Tick(round(self.at(value), 1), _tick_text(value, step)) for value in inside]


class _Log:
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        low, high = math.log10(low), math.log10(high)
        middle, half = (low + high) / 2, max(0.15, 1.06 * (high - low) / 2)
        self._exponents = _Linear(middle - half, middle + half, start, end)

    def at(self, value: float) -> float:
        return self._exponents.at(math.log10(value))

    def holds(self, value: float) -> bool:
        return False

    def ticks(self, most: int) -> list[Tick]:
        low, high = self._exponents.low, self._exponents.high
        steps = (1, 2, 5) if high - low < 2.5 else (1,)
        decades = range(math.floor(low), math.ceil(high) + 1, max(1, round((high - low) / most)))
        values = [step * 10.0**decade for decade in decades for step in steps]
        inside = [value for value in values if low <= math.log10(value) <= high]
        return [Tick(round(self.at(value), 1), f"{value:g}") for value in inside]


_Scale = _Linear | _Log


def _padded(low: float, high: float, share: float, least: float, from_zero: bool = False) -> tuple[float, float]:
    """Limits that leave room, and that are apart even for a constant."""
    largest = max(abs(low), abs(high))
    if largest == least == 0:
        return 0.0, 1.0
    apart = high - low > 1e-6 * largest
    span = max(high - low if apart else 0.2 * largest, least, 1e-12)
    if high - low < span:
        middle = (low + high) / 2
        low, high = middle - span / 2, middle + span / 2
    return (0.0 if from_zero else low - share * span), high + share * span


def _tick_text(value: float, step: float) -> str:
    if value == 0 or abs(value) < step * 1e-6:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and step >= size / 1000:
            return f"{value / size:.4g}{letter}".replace("-", "−")
    if step < 1e-6:
        return f"{value:.3g}".replace("-", "−")
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:  # steps like 2.5
        decimals += 1
    return f"{value:.{decimals}f}".replace("-", "−")


# ---- curves ---------------------------------------------------------------------------------------------------------


def _line(one: Series, across: _Scale, upward: _Scale, most: int) -> Line:
    path, dots, pen_up = [], [], True
    for x, y in thinned(one.points, most):
        if y is None:
            pen_up = True
            continue
        at = (round(across.at(x), 1), round(upward.at(y), 1))
        path.append(f"{'M' if pen_up else 'L'}{at[0]:g} {at[1]:g}")
        dots.append(at)
        pen_up = False
    return Line("".join(path), dots if len(dots) < DOTS_BELOW else [], one.style % STYLES)


def _alt(title: str, x_label: str, series: Sequence[Series]) -> str:
    told = []
    for one in series[:MAX_IN_ALT]:
        values = [y for _, y in one.defined]
        change = f"{four(values[0])} to {four(values[-1])}" if len(values) > 1 else four(values[0])
        extremes = f", between {four(min(values))} and {four(max(values))}" if len(values) > 2 else ""
        told.append(f"{text(one.label, 80)} {change}{extremes}")
    more = len(series) - MAX_IN_ALT
    return f"{title} over {x_label}: {'; '.join(told)}" + (f"; {several(more, 'more curve')}" if more > 0 else "")


def curve(
    rows: Sequence[Mapping[str, float | None]], name: str, x_of: Callable[[float], float], factor: float = 1.0
) -> list[tuple[float, float | None]]:
    """The points of a figure of metrics.jsonl, times `factor`; `x_of` says where a step lies."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [(x_of(step), None if y is None else factor * y) for step, y in found if step is not None]
