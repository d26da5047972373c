"""The chapter on robustness: all sweeps beside each other, heat maps, tables, published rows."""

from collections.abc import Callable, Sequence

import numpy as np

from robustness.corruptions.apply import BENCHMARK, GROUPS
from robustness.report import TITLES, UNITS
from tools.report import published
from tools.report.blocks import Block, Cell, Maps, Notes, Row, Section, Table
from tools.report.comparison import compared, warning_notes
from tools.report.formats import count, percent, several, shown_by, text
from tools.report.runs import Run, maker_of
from tools.report.sweep_results import Sweep, SweptSet, read_sweep, unit_of

TONES = 20
NATURAL_COLUMNS = {  # of sets without a grid
    "top1_pct": "top-1, %", "unmasked_top1_pct": "unmasked, %", "top5_pct": "top-5, %",
    "real_top1_pct": "ReaL top-1, %", "clean_top1_pct": "clean, same classes, %", "drop_pct": "drop",
    "rms_calibration_pct": "RMS calibration, %", "aurra_pct": "AURRA, %",
}  # fmt: skip
HEADLINES = {  # of sets with a grid, beside clean, mean and what is kept
    "mce_pct": "mCE, % of AlexNet's", "relative_mce_pct": "relative mCE, %",
    "mean_cd_pct": "mean CD, %", "mean_rcd_pct": "mean rCD, %",
    "part_mean_cd_pct": "mean CD of these cells, %", "part_mean_rcd_pct": "mean rCD of these cells, %",
}  # fmt: skip
EACH = {  # further columns of a table by corruption, of errors and of mIoU
    "error_pct": {"ce_pct": "CE, %", "relative_ce_pct": "relative CE, %"},
    "miou_pct": {"cd_pct": "CD, %", "rcd_pct": "rCD, %", "part_cd_pct": "CD, %", "part_rcd_pct": "rCD, %"},
}
MAX_REFUSED = 24
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def robustness(runs: Sequence[Run], others: Sequence[Run]) -> Section | None:
    """Everything that sweeps found; None without one. Args: others: runs that may have made the models under test."""
    if not runs:
        return None
    sweeps = [read_sweep(run) for run in runs]
    blocks: list[Block] = [_overview(sweeps)]
    grids = [(sweep, one) for sweep in sweeps for one in sweep.sets if one.grid]
    if grids:
        blocks.append(Maps([_map(sweep, one) for sweep, one in grids], _map_notes(grids)))
    blocks += _compared(grids)
    blocks += _natural(sweeps)
    refused = [
        f"{sweep.run.name}: {_title(one.name)}: {text(key)} is not given: {text(why)}"
        for sweep in sweeps
        for one in sweep.sets
        for key, why in one.refused.items()
    ]
    if refused:
        told = list(dict.fromkeys(refused))
        more = [f"{several(len(told) - MAX_REFUSED, 'more figure')}."] if len(told) > MAX_REFUSED else []
        blocks.append(Notes("Figures that are not given", [*told[:MAX_REFUSED], *more]))
    blocks += _published(sweeps, others)
    lead = (
        "Every figure is of the model as it was, without training on corrupted images. The mean of AP or mIoU over the "
        "whole benchmark on all images is mPC, and what is kept of the clean figure is rPC; of errors, what is kept is "
        "that of the accuracy."
    )
    return Section("robustness", "Robustness", blocks, lead)


def headline(run: Run) -> str:
    """A sweep in a few words."""
    found = []
    for one in read_sweep(run).sets:
        if one.mean is not None:
            title, _, unit = unit_of(one.unit).caption.partition(", ")  # top-1 error, %
            mean, clean_figure = (f"{_value(one, value)} {unit}".rstrip() for value in (one.mean, one.clean))
            clean = f" (clean {clean_figure})" if one.clean is not None else ""
            mce = one.figures.get("mce_pct")
            mce_text = f", mCE {mce:.1f} %" if mce is not None else ""
            kept = f", {percent(one.kept)} % kept" if one.kept is not None else ""
            found.append(f"{title} {mean} under corruption{clean}{kept}{mce_text}")
        elif one.figures.get("top1_pct") is not None:
            found.append(f"{_title(one.name)} top-1 {percent(one.figures['top1_pct'] or 0)} %")
    return "; ".join(found[:4])


def cautions(run: Run) -> list[str]:
    """What the figures of a sweep must be read with before anything else."""
    sets = read_sweep(run).sets
    found = ["a SUBSET of the images"] if any(one.flags.get("subset") is True for one in sets) else []
    if any("sample" in one.flags for one in sets):
        found = ["a development SAMPLE of the images"]
    return found + (["not the whole benchmark"] if any(one.grid and not one.whole_benchmark for one in sets) else [])


def flag_lines(run: Run) -> list[str]:
    """The flags of every set of a sweep, a line each."""
    return list(dict.fromkeys(f"{_title(one.name)}: {_flags(one)}" for one in read_sweep(run).sets if one.flags))


def _overview(sweeps: Sequence[Sweep]) -> Table:
    titles = {
        key: title
        for key, title in HEADLINES.items()
        if any(one.figures.get(key) is not None for s in sweeps for one in s.sets if one.grid)
    }
    rows = []
    for sweep in sweeps:
        for one in (one for one in sweep.sets if one.grid):
            cells = [Cell(f"{unit_of(one.unit).caption}; {_title(one.name)}", words=True)]
            cells += [Cell(_value(one, value)) for value in (one.clean, one.mean)]
            cells.append(Cell(shown_by(percent, one.kept)))
            cells += [Cell(shown_by(percent, one.figures.get(key))) for key in titles]
            cells += [Cell(_extent(one), words=True), Cell(_flags(one), words=True)]
            rows.append(Row(sweep.run.name, cells))
    other = [
        f"{sweep.run.name}: {_title(one.name)}: {line}"
        for sweep in sweeps
        for one in sweep.sets
        if one.grid
        for line in _other_figures(one)
    ]
    notes = [*other, *(f"{sweep.run.name}: {line}" for sweep in sweeps for line in sweep.notes)]
    notes += warning_notes([sweep.run for sweep in sweeps])
    columns = ["figure", "clean", "corrupted", "kept, %", *titles.values(), "cells", "read with"]
    return Table("Under corruption", columns, rows, notes, corner="sweep", cards=True)


def _other_figures(one: SweptSet) -> list[str]:
    """Whole-set figures of a unit that this page does not know: they are told as they are called."""
    if one.unit in UNITS:
        return []
    return [f"{text(key, 80)} {value:.4g}" for key, value in one.figures.items() if value is not None][:12]


def _extent(one: SweptSet) -> str:
    return f"{several(one.cells, 'cell')}" + ("" if one.whole_benchmark else ", NOT THE WHOLE BENCHMARK")


# ---- heat maps ------------------------------------------------------------------------------------------------------


def _map(sweep: Sweep, one: SweptSet) -> Table:
    """Corruptions down, severities across, each field coloured by how much of the clean performance is left."""
    severities = sorted({severity for row in one.grid.values() for severity in row})
    further = {key: title for key, title in EACH.get(one.unit, {}).items() if key in one.each}
    low, high = _limits(one)
    rows = []
    for name, row in one.grid.items():
        values = [row.get(severity) for severity in severities]
        tones = [None if value is None else _tone(one, value, low, high) for value in values]
        cells = [Cell(_value(one, value, 1), tone=tone) for value, tone in zip(values, tones, strict=True)]
        cells.append(Cell(_value(one, _mean(values), 1)))
        cells += [Cell(shown_by(percent, one.each[key].get(name))) for key in further]
        rows.append(Row(_spoken(name), cells, group=GROUP_OF.get(name, "others")))
    benchmark = {name: row for name, row in one.grid.items() if name in BENCHMARK}
    if benchmark:
        means = [_mean([row.get(severity) for row in benchmark.values()]) for severity in severities]
        means.append(_mean([value for row in benchmark.values() for value in row.values()]))
        cells = [*(Cell(_value(one, value, 1)) for value in means), *(Cell("") for _ in further)]
        rows.append(Row(f"mean of the {len(benchmark)}", cells, strong=True))
    caption = f"{sweep.run.name}: {unit_of(one.unit).caption}, {_title(one.name)}"
    return Table(caption, [*map(str, severities), "mean", *further.values()], rows, [], corner="severity")


def _limits(one: SweptSet) -> tuple[float, float]:
    values = [value for row in one.grid.values() for value in row.values()]
    if one.unit == "error_pct":
        return 0.0, 100.0
    if one.unit == "cosine":
        return min(0.0, *values), 1.0
    return 0.0, max([*values, one.clean or 0.0, 1e-9])


def _tone(one: SweptSet, value: float, low: float, high: float) -> int:
    """0 for what is good to 20 for what is bad."""
    good = (value - low) / (high - low)
    bad = good if not unit_of(one.unit).high_is_good else 1 - good
    return round(TONES * min(1.0, max(0.0, bad)))


def _map_notes(grids: Sequence[tuple[Sweep, SweptSet]]) -> list[str]:
    units = {one.unit for _, one in grids}
    notes = ["Light is good, dark is bad."]
    if "error_pct" in units:
        notes.append("Errors are coloured from 0 to 100 %.")
    if units - {"error_pct", "cosine"}:
        notes.append("AP and mIoU are coloured from the clean figure down to nothing.")
    if "cosine" in units:
        notes.append("Cosines are coloured from 1 down to 0, or to the lowest below it.")
    return notes


# ---- side by side ---------------------------------------------------------------------------------------------------


def _compared(grids: Sequence[tuple[Sweep, SweptSet]]) -> list[Block]:
    """Sweeps of one set and unit column by column, with differences where their protocol is the same."""
    blocks: list[Block] = []
    for key in dict.fromkeys((one.name, one.unit) for _, one in grids):
        group = [(sweep, one) for sweep, one in grids if (one.name, one.unit) == key]
        if len(group) < 2:
            continue
        first = group[0][1]
        reasons = [""] + [_unlike(first, one) for _, one in group[1:]]
        alike, better = [not reason for reason in reasons], unit_of(key[1]).high_is_good
        rows = []
        show = _shower(first)
        for title, of in (("clean", lambda one: one.clean), ("mean under corruption", lambda one: one.mean)):
            rows.append(Row(title, compared([of(one) for _, one in group], show, better, alike), strong=True))
        rows.append(Row("kept, %", compared([one.kept for _, one in group], percent, True, alike), strong=True))
        for name in dict.fromkeys(name for _, one in group for name in one.grid):
            means = [_mean(list(one.grid.get(name, {}).values())) for _, one in group]
            cells = compared(means, show, better, alike)
            rows.append(Row(_spoken(name), cells, group=GROUP_OF.get(name, "others")))
        notes = [
            f"{sweep.run.name}: no differences to {group[0][0].run.name}: {why}"
            for (sweep, _), why in zip(group, reasons, strict=True)
            if why
        ]
        caption = f"{unit_of(key[1]).caption} side by side, {_title(key[0])}: mean over the severities"
        blocks.append(Table(caption, [sweep.run.name for sweep, _ in group], rows, notes, corner="corruption"))
    return blocks


def _unlike(first: SweptSet, other: SweptSet) -> str:
    """Why figures of two sweeps are not of the same thing."""
    cells = [{(name, severity) for name, row in one.grid.items() for severity in row} for one in (first, other)]
    if cells[0] != cells[1]:
        return "other corruptions or severities"
    keys = ("images", "of", "definition", "corrupt", "jpeg_step", "transform", "seed", "draws")
    odd = [key for key in keys if first.flags.get(key) != other.flags.get(key)]
    if not odd:
        return ""
    values = [text(one.flags.get(odd[0]), 40) for one in (other, first)]
    return f"another {odd[0].replace('_', ' ')}: {values[0]}, not {values[1]}"


# ---- sets as they are -----------------------------------------------------------------------------------------------


def _natural(sweeps: Sequence[Sweep]) -> list[Block]:
    found = [(sweep, one) for sweep in sweeps for one in sweep.sets if not one.grid and one.figures]
    if not found:
        return []
    columns = {
        key: title
        for key, title in NATURAL_COLUMNS.items()
        if any(one.figures.get(key) is not None for _, one in found)
    }
    rows = []
    for sweep, one in found:
        cells = [Cell(_title(one.name), words=True), Cell(shown_by(count, _images(one)))]
        cells += [Cell(shown_by(percent, one.figures.get(key))) for key in columns]
        rows.append(Row(sweep.run.name, [*cells, Cell(_flags(one), words=True)]))
    titles = ["set", "images", *columns.values(), "read with"]
    return [Table("Sets without corruption", titles, rows, corner="sweep", cards=True)]


def _published(sweeps: Sequence[Sweep], others: Sequence[Run]) -> list[Block]:
    verdicts: list[Table | str] = []
    for sweep in sweeps:
        name, maker = sweep.run.name, maker_of(sweep.run, others)
        if {one.unit for one in sweep.sets} & {"error_pct", ""}:
            verdicts.append(published.beside_sweep(name, sweep.by_name()))
        for one in sweep.sets:
            if one.unit in {"box_ap", "mask_ap"}:
                verdicts.append(published.beside_corrupted_coco(f"{name}, {unit_of(one.unit).caption}", one, maker))
            elif one.unit == "miou_pct":
                verdicts.append(f"{name}: no mIoU of a ViT with UperNet under these corruptions is published.")
    return published.told(verdicts)


# ---- words ----------------------------------------------------------------------------------------------------------


def _spoken(corruption: str) -> str:
    return text(corruption, 40).replace("_", " ")


def _title(name: str) -> str:
    return TITLES.get(name, text(name, 80))


def _value(one: SweptSet, value: float | None, digits: int = 2) -> str:
    return shown_by(_shower(one, digits), value)


def _shower(one: SweptSet, digits: int = 2) -> Callable[[float], str]:
    if one.unit == "cosine":
        return lambda value: f"{value:.{digits + 1}f}"
    return percent if digits == 2 else lambda value: f"{value:.{digits}f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _images(one: SweptSet) -> float | None:
    images = one.flags.get("images")
    return float(images) if isinstance(images, (int, float)) else None


def _flags(one: SweptSet) -> str:
    """The flags of a set in words; those that a page does not know by their names."""
    flags = dict(one.flags)
    told: list[str] = []
    images, total = flags.pop("images", None), flags.pop("of", None)
    sampled, subset = flags.pop("sample", None), flags.pop("subset", False)
    if sampled is not None:
        drawn = f"drawn by seed {text(flags.pop('sample_seed', None), 24)}"
        told.append(f"a development SAMPLE of {text(images, 40)} of {text(total, 40)} images {drawn}")
    elif subset:
        told.append(f"a SUBSET: {text(images, 40)} of {text(total, 40)} images")
    elif images is not None:
        told.append(f"{text(images, 40)} images")
    if flags.pop("masked", False):
        told.append("masked to the set's classes")
    order = {"input": "after the transform", "decoded": "on the decoded image"}.get(str(flags.pop("corrupt", "")), "")
    told += [text(flags.pop("definition"), 60)] if "definition" in flags else []
    told += [order] if order else []
    if "jpeg_step" in flags:
        told.append("with JPEG step" if flags.pop("jpeg_step") else "no JPEG step")
    told += [f"{text(key, 40).replace('_', ' ')} {text(value, 80)}" for key, value in list(flags.items())[:12]]
    return ", ".join(told)
