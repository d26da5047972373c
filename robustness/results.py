"""From cells to the figures of a sweep: accuracies, mCE where it applies, means over groups and severities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core.errors import DataError
from robustness.corruptions.apply import BENCHMARK, SEVERITIES
from robustness.grid import CLEAN, NATURAL, Cell
from robustness.scores import (
    Grid,
    corruption_error,
    group_means,
    mce,
    relative_corruption_error,
    relative_mce,
    require_benchmark,
    require_imagenet_224,
    severity_means,
)
from robustness.subject import Subject

ALEXNET_SETS = ("imagenet_c", "imagenet_c_otf")  # where its errors are a yardstick
MASKED = ("imagenet_a", "imagenet_r")


@dataclass(frozen=True)
class SetResult:
    """What was found on one set.

    Attributes:
        figures: by name, of the whole set; for a grid its aggregates.
        unit: of the grid, error_pct or cosine.
        grid: values by corruption and severity; empty without one.
        flags: what the figures must be read with.
        refused: by name of a figure, why it is not given.
    """

    figures: dict[str, float]
    unit: str
    grid: Grid
    flags: Mapping[str, Any]
    refused: dict[str, str] = field(default_factory=dict)


def set_results(cells: Sequence[tuple[Cell, Mapping[str, Any]]], subject: Subject) -> dict[str, SetResult]:
    """Figures of every set from its cells and what was found for them.

    Raises: DataError where cells of one set count another number of images.
    """
    by_set: dict[str, list[tuple[Cell, Mapping[str, Any]]]] = {}
    for cell, found in cells:
        by_set.setdefault(cell.set, []).append((cell, found))
    clean = {cell.set: found["figures"] for cell, found in cells if cell.corruption == CLEAN}
    results = {}
    for name, members in by_set.items():
        _require_equal_counts(name, members)
        grid: dict[str, dict[int, float]] = {}
        unit = "cosine" if name == "representation" else "error_pct"
        for cell, found in members:
            if cell.corruption != CLEAN:
                grid.setdefault(cell.corruption, {})[cell.severity] = found["figures"][unit]
        result = SetResult(dict(clean.get(name, {})), unit, grid, _flags(members))
        if grid:
            _add_means(result)
        if name in ALEXNET_SETS:
            _add_alexnet(result, clean.get("imagenet_val"), subject)
        if name in NATURAL:
            _add_difference(result, name, clean.get("imagenet_val"))
        results[name] = result
    return results


def flat(results: Mapping[str, SetResult]) -> dict[str, float]:
    """All figures in one flat table: `set/figure`, and `set/corruption/severity/error_pct` of the grids."""
    figures = {f"{name}/{key}": value for name, result in results.items() for key, value in result.figures.items()}
    for name, result in results.items():
        for corruption, row in result.grid.items():
            figures |= {f"{name}/{corruption}/{s}/{result.unit}": value for s, value in row.items()}
    return figures


def _require_equal_counts(name: str, members: Sequence[tuple[Cell, Mapping[str, Any]]]) -> None:
    first, found = members[0]
    for cell, other in members:
        if other["images"] != found["images"]:
            raise DataError(
                f"{cell}: {other['images']} images, but {first} has {found['images']}; remove one of the two"
            )


def _flags(members: Sequence[tuple[Cell, Mapping[str, Any]]]) -> dict[str, Any]:
    """Flags of the grid's cells, or of the clean one where there is no grid; values that differ among them as lists."""
    corrupted = [found["flags"] for cell, found in members if cell.corruption != CLEAN]
    several = corrupted or [found["flags"] for _, found in members]
    values = {key: list(dict.fromkeys(flags[key] for flags in several)) for key in several[0]}
    return {key: found[0] if len(found) == 1 else found for key, found in values.items()}


def _add_means(result: SetResult) -> None:
    """Plain means: of each corruption, of whole groups, and of the benchmark; of less under another name."""
    figures, grid, unit = result.figures, result.grid, result.unit
    figures |= {f"{name}/{unit}": float(np.mean(list(row.values()))) for name, row in grid.items()}
    figures |= {f"{group}/{unit}": mean for group, mean in group_means(grid).items()}
    try:
        require_benchmark(grid)
    except ValueError as error:
        result.refused[f"mean_{unit}"] = str(error)
        figures[f"part_mean_{unit}"] = float(np.mean([value for row in grid.values() for value in row.values()]))
        return
    benchmark = {name: grid[name] for name in BENCHMARK}
    figures[f"mean_{unit}"] = float(np.mean([value for row in benchmark.values() for value in row.values()]))
    figures |= {f"severity_{s}/{unit}": value for s, value in severity_means(benchmark).items()}


def _add_alexnet(result: SetResult, clean: Mapping[str, float] | None, subject: Subject) -> None:
    """CE and relative CE of each whole corruption, mCE and relative mCE; or why not."""
    figures, classes, size = result.figures, subject.classes, subject.img_size
    errors = {name: {s: value / 100 for s, value in row.items()} for name, row in result.grid.items()}
    whole = {name: row for name, row in errors.items() if len(row) == len(SEVERITIES)}
    try:
        require_imagenet_224(classes, size)
        figures |= {f"{name}/ce_pct": 100 * corruption_error(name, row) for name, row in whole.items()}
        figures["mce_pct"] = mce(errors, classes=classes, img_size=size)
    except ValueError as error:
        result.refused["mce_pct"] = str(error)
        return
    if clean is None:
        result.refused["relative_mce_pct"] = "needs the clean error; give ImageNet's val/ as data="
        return
    clean_error = clean["error_pct"] / 100
    for name, row in whole.items():
        figures[f"{name}/relative_ce_pct"] = 100 * relative_corruption_error(name, row, clean_error)
    figures["relative_mce_pct"] = relative_mce(errors, clean_error, classes=classes, img_size=size)


def _add_difference(result: SetResult, name: str, val: Mapping[str, float] | None) -> None:
    """The clean accuracy on the same classes, and what is lost against it."""
    if val is None:
        result.refused["clean_top1_pct"] = "needs ImageNet's val/; give it as data="
        return
    clean = val.get(f"{name}_classes_top1_pct" if name in MASKED else "top1_pct")
    if clean is None:
        result.refused["clean_top1_pct"] = "the subset of ImageNet's val/ holds none of its classes"
        return
    result.figures["clean_top1_pct"] = clean
    result.figures["drop_pct"] = clean - result.figures["top1_pct"]
