"""Rows of `rcmae verify` as a table: drawn on a terminal, plain columns elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from tools.verify.measure import Measure

Verdict = Literal["passes", "fails", "not run"]
HEADER = (
    "component",
    "against",
    "numbers",
    "compared",
    "difference",
    "tolerance",
    "verdict",
    "closest to its tolerance",
)
WIDE = 150  # from which width, in characters, the last column fits a terminal
STYLES = {"passes": None, "fails": "bold red", "not run": "yellow"}


@dataclass(frozen=True)
class Row:
    """What became of a component.

    Attributes:
        component, against: its name; package and version, or whose numbers it is compared with.
        source: the package itself, or stored results.
        count: comparisons made.
        worst: the one that came closest to its tolerance, or went furthest beyond; None where none was made.
        fault: why the comparisons ended early, in a line.
        verdict: "not run" where something is not installed that need not be.
    """

    component: str
    against: str
    source: Literal["live", "stored"]
    count: int
    worst: Measure | None
    fault: str | None
    verdict: Verdict


def print_rows(rows: Sequence[Row]) -> None:
    """Print the rows, and a line for each that fails or was not run."""
    console = Console()
    lines = [cells(row) for row in rows]
    if console.is_terminal:
        shown = len(HEADER) if console.width >= WIDE else len(HEADER) - 1
        table = Table(*HEADER[:shown])
        for row, line in zip(rows, lines, strict=True):
            table.add_row(*line[:shown], style=STYLES[row.verdict])
        console.print(table)
    else:
        widths = [max(map(len, column)) for column in zip(HEADER, *lines, strict=True)]
        for line in (HEADER, *lines):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for row in rows:
        if row.fault:
            print(f"{row.component}: {row.verdict}: {row.fault}")
        elif row.worst and row.verdict == "fails":
            print(f"{row.component}: fails: {row.worst.what} is off by {row.worst.difference:.2g}")


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a row, in the order of the header."""
    difference, tolerance, what = ("-", "-", "")
    if row.worst:
        difference = f"{row.worst.difference:.1e}" if row.worst.difference else "0"
        tolerance = f"{row.worst.tolerance:.0e}" if row.worst.tolerance else "exact"
        what = row.worst.what
    return (row.component, row.against, row.source, str(row.count), difference, tolerance, row.verdict, what)


def as_json(row: Row) -> dict[str, Any]:
    """A row for a program; a difference that is not finite is null."""
    worst: dict[str, Any] = {}
    if row.worst:
        difference = row.worst.difference if math.isfinite(row.worst.difference) else None
        worst = {"of": row.worst.what, "difference": difference, "tolerance": row.worst.tolerance}
    keys: Sequence[str] = ("component", "against", "source", "count", "fault", "verdict")
    return {**{key: getattr(row, key) for key in keys}, "worst": worst or None}
