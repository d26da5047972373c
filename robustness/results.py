"""From cells to the figures of a sweep: accuracies, mCE, mPC and degradation where they apply, means over groups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from core.errors import DataError
from robustness.corruptions.apply import BENCHMARK, SEVERITIES
from robustness.grid import CLEAN, NATURAL, Cell
from robustness.reference import Reference
from robustness.scores import (
    Grid,
    corruption_degradation,
    corruption_error,
    group_means,
    mce,
    mpc,
    relative_corruption_degradation,
    relative_corruption_error,
    relative_mce,
    require_benchmark,
    require_imagenet_224,
    rpc_pct,
    severity_means,
)
from robustness.subject import Tested

ALEXNET_SETS = ("imagenet_c", "imagenet_c_otf")  # where its errors are a yardstick
MASKED = ("imagenet_a", "imagenet_r")
MIOU = "miou_pct"
# Figures that say how good, with what the names of their mPC and rPC begin with, and the factor to per cent.
PERFORMANCE = {"box_ap": ("box_", 100.0), "mask_ap": ("mask_", 100.0), MIOU: ("", 1.0)}


@dataclass(frozen=True)
class SetResult:
    """What was found on one set.

    Attributes:
        figures: by name, of the whole set; for grids their aggregates.
        grids: by unit, such as error_pct or box_ap: values by corruption and severity; empty without any.
        flags: what the figures must be read with.
        refused: by name of a figure, why it is not given.
    """

    figures: dict[str, float]
    grids: Mapping[str, Grid]
    flags: Mapping[str, Any]
    refused: dict[str, str] = field(default_factory=dict)


def set_results(
    cells: Sequence[tuple[Cell, Mapping[str, Any]]], subject: Tested, reference: Reference | None = None
) -> dict[str, SetResult]:
    """Figures of every set from its cells and what was found for them.

    Args:
        reference: what a segmentor's degradation is relative to.
    Raises: DataError where cells of one set count another number of images.
    """
    by_set: dict[str, list[tuple[Cell, Mapping[str, Any]]]] = {}
    for cell, found in cells:
        by_set.setdefault(cell.set, []).append((cell, found))
    clean = {cell.set: found["figures"] for cell, found in cells if cell.corruption == CLEAN}
    results = {}
    for name, members in by_set.items():
        _require_equal_counts(name, members)
        corrupted = [(cell, found["figures"]) for cell, found in members if cell.corruption != CLEAN]
        units = subject.units(name) if corrupted else ()
        grids = {unit: _grid_of(corrupted, unit) for unit in units}
        result = SetResult(dict(clean.get(name, {})), grids, _flags(members))
        for unit, grid in grids.items():
            _add_means(result, unit, grid)
            if unit in PERFORMANCE:
                _add_performance(result, unit, grid)
            else:
                _add_mean(result, unit, grid)
        if reference is not None and MIOU in grids:
            _add_degradation(result, grids[MIOU], reference)
        if name in ALEXNET_SETS:
            _add_alexnet(result, grids["error_pct"], clean.get("imagenet_val"), subject)
        if name in NATURAL:
            _add_difference(result, name, clean.get("imagenet_val"))
        results[name] = result
    return results


def _grid_of(cells: Sequence[tuple[Cell, Mapping[str, float]]], unit: str) -> Grid:
    grid: dict[str, dict[int, float]] = {}
    for cell, figures in cells:
        grid.setdefault(cell.corruption, {})[cell.severity] = figures[unit]
    return grid


def flat(results: Mapping[str, SetResult]) -> dict[str, float]:
    """All figures in one flat table: `set/figure`, and `set/corruption/severity/error_pct` of the grids."""
    figures = {f"{name}/{key}": value for name, result in results.items() for key, value in result.figures.items()}
    for name, result in results.items():
        for unit, grid in result.grids.items():
            for corruption, row in grid.items():
                figures |= {f"{name}/{corruption}/{s}/{unit}": value for s, value in row.items()}
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


def _add_means(result: SetResult, unit: str, grid: Grid) -> None:
    """Plain means: of each corruption, of whole groups, and of severities over the whole benchmark."""
    figures = result.figures
    figures |= {f"{name}/{unit}": float(np.mean(list(row.values()))) for name, row in grid.items()}
    figures |= {f"{group}/{unit}": mean for group, mean in group_means(grid).items()}
    if _part_of_grid(grid) is None:
        benchmark = {name: grid[name] for name in BENCHMARK}
        figures |= {f"severity_{s}/{unit}": value for s, value in severity_means(benchmark).items()}


def _part_of_grid(grid: Grid) -> str | None:
    """Why a grid is not the whole benchmark; None if it is."""
    try:
        require_benchmark(grid)
    except ValueError as error:
        return str(error)
    return None


def _mean_of_cells(grid: Grid) -> float:
    return float(np.mean([value for row in grid.values() for value in row.values()]))


def _add_mean(result: SetResult, unit: str, grid: Grid) -> None:
    """The mean over the benchmark; over less of it under another name."""
    refusal = _part_of_grid(grid)
    if refusal is None:
        result.figures[f"mean_{unit}"] = _mean_of_cells({name: grid[name] for name in BENCHMARK})
    else:
        result.refused[f"mean_{unit}"] = refusal
        result.figures[f"part_mean_{unit}"] = _mean_of_cells(grid)


def _add_performance(result: SetResult, unit: str, grid: Grid) -> None:
    """mPC and rPC of the whole benchmark on all images, in per cent; of less a plain mean under another name."""
    figures, flags = result.figures, result.flags
    prefix, factor = PERFORMANCE[unit]
    clean = figures[unit]
    refusal = _part_of_grid(grid) or (_part_of_images(flags) if flags["subset"] else None)
    if refusal is not None:
        result.refused[f"{prefix}mpc_pct"] = refusal
        figures[f"part_mean_{unit}"] = _mean_of_cells(grid)
    else:
        figures[f"{prefix}mpc_pct"] = factor * mpc(grid)
    relative = f"{prefix}rpc_pct" if refusal is None else f"part_{prefix}relative_pct"
    if clean > 0:
        figures[relative] = 100 * _mean_of_cells(grid) / clean if refusal is not None else rpc_pct(grid, clean)
    else:
        result.refused[relative] = "is relative to the clean figure, which is 0"


def _part_of_images(flags: Mapping[str, Any]) -> str:
    return f"needs all {flags['of']} images, and {flags['images']} were evaluated"


def _add_degradation(result: SetResult, miou: Grid, reference: Reference) -> None:
    """CD and rCD of each corruption, and their means over the benchmark; of less of it under other names."""
    figures, clean, whole = result.figures, result.figures[MIOU] / 100, not result.flags["subset"]
    found: dict[str, dict[str, float]] = {"cd_pct": {}, "rcd_pct": {}}
    for name, row in miou.items():
        ours, theirs = ({severity: grid[name][severity] / 100 for severity in row} for grid in (miou, reference.grid))
        scores: dict[str, Callable[[], float]] = {
            "cd_pct": partial(corruption_degradation, ours, theirs),
            "rcd_pct": partial(relative_corruption_degradation, ours, clean, theirs, reference.clean / 100),
        }
        part = "" if whole and len(row) == len(SEVERITIES) else "part_"
        for key, score in scores.items():
            try:
                found[key][name] = figures[f"{name}/{part}{key}"] = 100 * score()
            except ValueError as error:
                result.refused[f"{name}/{part}{key}"] = str(error)
    refusal = _part_of_grid(miou) or (None if whole else _part_of_images(result.flags))
    for key, values in found.items():
        if refusal is not None:
            result.refused[f"mean_{key}"] = refusal
        elif not set(BENCHMARK) <= values.keys():
            result.refused[f"mean_{key}"] = "is not defined for each of the 15 corruptions"
        else:
            figures[f"mean_{key}"] = float(np.mean([values[name] for name in BENCHMARK]))
        if refusal is not None and values:
            figures[f"part_mean_{key}"] = float(np.mean(list(values.values())))


def _add_alexnet(result: SetResult, grid: Grid, clean: Mapping[str, float] | None, subject: Tested) -> None:
    """CE and relative CE of each whole corruption, mCE and relative mCE; or why not."""
    figures, classes, size = result.figures, subject.classes, subject.img_size
    errors = {name: {s: value / 100 for s, value in row.items()} for name, row in grid.items()}
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
