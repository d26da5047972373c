"""Figures and foreign text as a report prints them."""

import json
import math
from collections.abc import Callable
from typing import Any

from core.errors import shown
from core.log import duration
from tools.report.blocks import DASH

MAX_TEXT = 280  # characters of one foreign text


def text(value: Any, most: int = MAX_TEXT) -> str:
    """Foreign text as one printable line of a bearable length, cut in its middle; other values as JSON has them."""
    if value is None:
        return "unknown"
    line = shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    if not line.strip():
        return f'"{line}"'  # a name of nothing but spaces
    return line if len(line) <= most else f"{shown(line, most)} ({len(line):,} characters)"


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def percent(value: float) -> str:
    """Per cent with two digits."""
    return _minus(f"{value:.2f}")


def fraction(value: float) -> str:
    """A fraction as per cent."""
    return percent(100 * value)


def count(value: float) -> str:
    """A whole number with separators of thousands."""
    return f"{round(value):,}"


def whole(value: float) -> str:
    """Per cent without digits."""
    return _minus(f"{value:.0f}")


def four(value: float) -> str:
    """Four significant digits."""
    return _minus(f"{value:.4g}")


def three(value: float) -> str:
    """Three significant digits, thousands separated."""
    return count(value) if abs(value) >= 1000 else _minus(f"{value:.3g}")


def gibibytes(value: float) -> str:
    """GiB with two digits."""
    return f"{value:.2f}"


def seconds(value: float) -> str:
    """Seconds as h:mm:ss."""
    return duration(value)


def shown_by(format_: Callable[[float], str], value: float | None) -> str:
    """A figure, or a dash where it is not defined."""
    return DASH if value is None else format_(value)


def signed(show: Callable[[float], str], value: float, change: float) -> str:
    """A difference with its sign; of significant digits as many as the value has that it led to."""
    if show in {four, three}:
        decimals = len(show(value).partition(".")[2]) if "e" not in show(value) else None
        printed = show(abs(change)) if decimals is None else f"{abs(change):,.{decimals}f}"
    else:
        printed = show(abs(change))
    if not any(digit in printed for digit in "123456789"):
        return f"±{printed}"
    return ("−" if change < 0 else "+") + printed


def several(quantity: int, singular: str, plural: str = "") -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{quantity:,} {singular if quantity == 1 else plural or singular + 's'}"


def _minus(printed: str) -> str:
    return printed.replace("-", "−", 1) if printed.startswith("-") else printed
