"""The sweep of another segmentor, beside which degradation under corruption is measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import DataError, shown
from robustness.grid import CLEAN, Cell
from robustness.scores import Grid
from transfer.detection.strict_json import read_json

EXPECTED = "results.json of another `rcmae robust` sweep of a segmentor"
UNIT = "miou_pct"
OWN = {"model", "data", "precision"}  # facts of a cell that a reference may have otherwise, or that are compared apart


@dataclass(frozen=True)
class Reference:
    """What was found for another model under the same protocol.

    Attributes:
        path: printable. digest: of its model.
        clean: its clean mIoU; grid: its mIoU by corruption and severity; per cent.
    """

    path: str
    digest: str
    clean: float
    grid: Grid


def read_reference(path: Path, cells: Sequence[Cell]) -> Reference:
    """Read the results of another sweep.

    Args:
        cells: of this sweep; the reference has each of them, of the same images and labels, corrupted alike.
    Raises: DataError for a file that is none, a cell that it lacks, or one of another protocol.
    """
    content = read_json(path, EXPECTED)
    found = {(cell["corruption"], cell["severity"]): cell for cell in _cells(path, content)}
    grid: dict[str, dict[int, float]] = {}
    clean = 0.0
    for cell in cells:
        theirs = found.get((cell.corruption, cell.severity))
        if theirs is None:
            raise DataError(f"{shown(path)}: has no cell {cell}; sweep the reference over the same grid first")
        for what, ours, other in _differences(cell, theirs):
            raise DataError(
                f"{shown(path)}: {cell}: another {what} than here: {shown(str(other))}, not {shown(str(ours))}"
            )
        value = theirs["figures"][UNIT]
        if cell.corruption == CLEAN:
            clean = value
        else:
            grid.setdefault(cell.corruption, {})[cell.severity] = value
    return Reference(shown(path), str(content.get("model", {}).get("digest")), clean, grid)


def _cells(path: Path, content: Any) -> list[Mapping[str, Any]]:
    """The cells of a results.json, every one with all that is looked at."""
    cells = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(cells, list) or not cells or not all(isinstance(cell, dict) for cell in cells):
        raise DataError(f"{shown(path)}: no cells in it; expected {EXPECTED}")
    for place, cell in enumerate(cells):
        figures, flags = cell.get("figures"), cell.get("flags")
        if not isinstance(figures, dict) or not isinstance(flags, dict):
            raise DataError(f"{shown(path)}: cells[{place}]: no figures or flags in it; expected {EXPECTED}")
        value = figures.get(UNIT)
        known = isinstance(value, (int, float)) and 0 <= value <= 100
        if not known or not isinstance(cell.get("severity"), int) or not isinstance(cell.get("corruption"), str):
            raise DataError(f"{shown(path)}: cells[{place}]: no {UNIT} of 0..100 in it; expected {EXPECTED}")
    return cells


def _differences(cell: Cell, theirs: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    if theirs.get("data") != cell.facts["data"]:
        yield "set of images, labels or classes", cell.facts["data"], theirs.get("data")
    for key in dict.fromkeys([*cell.facts, *(key for key in ("sample", "sample_seed") if key in theirs["flags"])]):
        if key not in OWN and theirs["flags"].get(key) != cell.facts.get(key):
            yield key.replace("_", " "), cell.facts.get(key), theirs["flags"].get(key)
