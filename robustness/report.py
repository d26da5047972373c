"""The results of a sweep for people: a Markdown table with published figures beside, and a heat map."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.plots import plot
from robustness.corruptions.apply import GROUPS, NAMES, SEVERITIES
from robustness.published import COLUMNS, PUBLISHED, PUBLISHED_COCO, unlike_published, unlike_published_coco
from robustness.results import MASKED, PERFORMANCE, SetResult
from robustness.scores import Grid
from transfer.detection.coco_names import COCO_NAMES

TITLES = {
    "imagenet_val": "ImageNet validation",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_v2": "ImageNet-V2",
    "imagenet_c": "ImageNet-C, released files",
    "imagenet_c_otf": "ImageNet-C, made on the fly",
    "corruptions": "corruptions of the given set",
    "representation": "representation under corruption",
}


class Unit(NamedTuple):
    """What the numbers of a grid are, and how they are printed."""

    what: str  # head of a column
    digits: int
    factor: float  # from what is stored to what is printed
    high_is_good: bool
    caption: str  # of a heat map

    @property
    def name(self) -> str:
        """Without the unit."""
        return self.what.removesuffix(" %")

    def show(self, value: float | None) -> str:
        """A value as it is printed; a dash for none."""
        return "-" if value is None else f"{self.factor * value:.{self.digits}f}"


UNITS = {
    "error_pct": Unit("error %", 2, 1, False, "top-1 error, %"),
    "cosine": Unit("cosine", 4, 1, True, "cosine to the clean features"),
    "box_ap": Unit("box AP %", 2, 100, True, "box AP, %"),
    "mask_ap": Unit("mask AP %", 2, 100, True, "mask AP, %"),
    "miou_pct": Unit("mIoU %", 2, 1, True, "mIoU, %"),
}
PER_CENT = Unit("%", 2, 1, True, "%")

# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(title: str, facts: Sequence[str], results: Mapping[str, SetResult], classes: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        facts: lines on model, machine and provenance, for the top.
        classes: of the model.
    """
    lines = [f"# Robustness of {title}", "", *(f"- {fact}" for fact in facts), ""]
    natural = {name: result for name, result in results.items() if not result.grids}
    if natural:
        lines += [*_natural(natural), ""]
    for name, result in results.items():
        if result.grids:
            lines += [*_grid(name, result), ""]
    lines += [*_published(title, results), *_published_coco(title, results, classes)]
    return "\n".join(lines).rstrip() + "\n"


def _natural(results: Mapping[str, SetResult]) -> Iterator[str]:
    yield "## Whole sets"
    yield ""
    yield from _table(
        ["set", "images", "top-1 %", "unmasked %", "top-5 %", "clean, same classes %", "drop", "flags"],
        [
            [
                TITLES[name], str(result.flags["images"]), _of(result, "top1_pct"),
                _of(result, "unmasked_top1_pct"), _of(result, "top5_pct"), _of(result, "clean_top1_pct"),
                _of(result, "drop_pct"), flag_text(result.flags),
            ]
            for name, result in results.items()
        ],
    )  # fmt: skip
    val = results.get("imagenet_val")
    if val and "real_top1_pct" in val.figures:
        counted = round(val.figures["real_images"])
        yield ""
        yield f"ReaL top-1 {val.figures['real_top1_pct']:.2f} % over the {counted} validation images with ReaL labels."
    masked = {name: results[name] for name in MASKED if name in results}
    if masked:
        yield ""
        yield "Masked: the logits of the set's 200 classes alone; confidence is a softmax over these. The official RMS"
        yield "calibration error leaves the most confident bin out of its sum; the corrected one does not."
        yield ""
        yield from _table(
            ["set", "RMS calibration %, official", "corrected", "MAD %, official", "corrected", "AURRA %", "soft F1 %"],
            [
                [TITLES[name], *(_of(result, key) for key in _CALIBRATION)]
                for name, result in masked.items()
            ],
        )  # fmt: skip
    yield from _refusals(results)


_CALIBRATION = (
    "rms_calibration_official_pct", "rms_calibration_pct", "mad_calibration_official_pct", "mad_calibration_pct",
    "aurra_pct", "soft_f1_pct",
)  # fmt: skip


def _grid(name: str, result: SetResult) -> Iterator[str]:
    """Headline figures, each with its formula, then for every unit a row per corruption, then means."""
    figures = result.figures
    yield f"## {TITLES[name][0].upper()}{TITLES[name][1:]} (`{name}`)"
    yield ""
    yield f"{result.flags['images']} images; {flag_text(result.flags)}."
    yield ""
    for key, text in _HEADLINES.items():
        if key in figures:
            yield f"- {text}: **{_unit_in(key).show(figures[key])}**"
    yield from _refusals({name: result})
    severities = {f"severity_{s}": f"severity {s}" for s in SEVERITIES}
    kinds = {"group": {group: group for group in GROUPS}, "severity, over the 15": severities}
    for unit, grid in result.grids.items():
        yield ""
        yield from _grid_table(result, unit, grid)
        for by, labels in kinds.items():
            found = {label: figures.get(f"{key}/{unit}") for key, label in labels.items()}
            means = [f"{label} {UNITS[unit].show(value)}" for label, value in found.items() if value is not None]
            if means:
                yield ""
                yield f"Mean {UNITS[unit].what} by {by}: {', '.join(means)}."


def _grid_table(result: SetResult, unit: str, grid: Grid) -> Iterator[str]:
    figures, show = result.figures, UNITS[unit].show
    severities = sorted({severity for row in grid.values() for severity in row})
    columns = {title: key for title, key in _COLUMNS.items() if any(f"{c}/{key}" in figures for c in grid)}
    rows = []
    for group, names in GROUPS.items():
        for corruption in (c for c in names if c in grid):
            values = [show(grid[corruption].get(s)) for s in severities] + [show(figures[f"{corruption}/{unit}"])]
            values += [PER_CENT.show(figures.get(f"{corruption}/{key}")) for key in columns.values()]
            rows.append([corruption, group, *values])
    titles = [f"{UNITS[unit].what}, severity {s}" for s in severities]
    yield from _table(["corruption", "group", *titles, "mean", *columns], rows)


_COLUMNS = {  # of figures that each corruption has of its own
    "CE %": "ce_pct",
    "relative CE %": "relative_ce_pct",
    "CD %": "cd_pct",
    "rCD %": "rcd_pct",
    "CD % of these cells": "part_cd_pct",
    "rCD % of these cells": "part_rcd_pct",
}
_HEADLINES = {
    "mce_pct": "mCE %, normalised by AlexNet: mean over 15 corruptions of sum of errors / sum of AlexNet's errors",
    "relative_mce_pct": "relative mCE %, the same with the clean errors taken off",
    "mean_error_pct": "mean error %, not normalised: plain mean over 15 corruptions x 5 severities; this is not mCE",
    "part_mean_error_pct": "mean error % over the part of the grid below, not normalised",
    "error_pct": "clean error %",
    "mean_cosine": "mean cosine between features of clean and corrupted images over 15 corruptions x 5 severities",
    "part_mean_cosine": "mean cosine between features of clean and corrupted images over the part of the grid below",
    **{
        key: text
        for unit, (prefix, _) in PERFORMANCE.items()
        for key, text in (
            (f"{prefix}mpc_pct", f"mPC %: mean {UNITS[unit].name} over 15 corruptions x 5 severities"),
            (f"{prefix}rpc_pct", f"rPC %: that mPC / clean {UNITS[unit].name}"),
            (f"part_mean_{unit}", f"mean {UNITS[unit].what} over these cells; this is not mPC"),
            (f"part_{prefix}relative_pct", f"that mean / clean {UNITS[unit].name}, in per cent; this is not rPC"),
            (unit, f"clean {UNITS[unit].what}"),
        )
    },
    "mean_cd_pct": "mean CD %: over 15 corruptions, sum over severities of 1 - mIoU, / that of the reference",
    "mean_rcd_pct": "mean rCD %: the same of what each loses against its own clean mIoU",
    "part_mean_cd_pct": "mean CD % over these cells: of each corruption sum of 1 - mIoU / that of the reference",
    "part_mean_rcd_pct": "mean rCD % over these cells, the same of what each loses against its own clean mIoU",
}


def _unit_in(key: str) -> Unit:
    """How a figure of this name is printed."""
    return next((unit for name, unit in UNITS.items() if key.endswith(name)), PER_CENT)


def _refusals(results: Mapping[str, SetResult]) -> Iterator[str]:
    lines = [f"- {name}/{key}: not given, {why}" for name, r in results.items() for key, why in r.refused.items()]
    if lines:
        yield from ("", *lines)


def _published(title: str, results: Mapping[str, SetResult]) -> Iterator[str]:
    """Published rows beside the same figures here; only of whole sets under the published protocol."""
    own = {}
    for column, (name, key, _) in COLUMNS.items():
        result = results.get(name)
        if result is not None and key in result.figures and not any(unlike_published(name, result.flags)):
            own[column] = result.figures[key]
    if not own:
        return
    rows = [row for row in PUBLISHED if any(getattr(row, column) is not None for column in own)]
    yield "## Beside published figures"
    yield ""
    yield "Whole sets at 224 px, each model under its own evaluation transform, mCE on the released files; a column"
    yield "stands here only where this sweep has that figure so. Its own -A and -R are masked to their 200 classes."
    yield ""
    yield from _table(
        ["model", *(f"{COLUMNS[column][2]} %" for column in own), "source"],
        [
            [f"**{title}**", *(f"**{value:.2f}**" for value in own.values()), "this sweep"],
            *([row.model, *(_as_quoted(getattr(row, column)) for column in own), row.source] for row in rows),
        ],
    )


def _published_coco(title: str, results: Mapping[str, SetResult], classes: Sequence[str]) -> Iterator[str]:
    """Published detectors beside this one: of COCO's categories, on as many images as val2017 has, the whole grid."""
    result = results.get("corruptions")
    if result is None or not {"box_mpc_pct", "box_rpc_pct", "mask_mpc_pct", "mask_rpc_pct"} <= result.figures.keys():
        return
    if any(unlike_published_coco(result.flags)) or tuple(classes) != COCO_NAMES:
        return
    yield "## Beside published figures"
    yield ""
    yield "COCO val2017, for which 5,000 images of COCO's 80 categories are taken; 15 corruptions x 5 severities by"
    yield "imagecorruptions on the decoded image. Other backbones than a ViT; none is published of one."
    yield ""
    own = []
    for kind in ("box", "mask"):
        own += [UNITS[f"{kind}_ap"].show(result.figures[f"{kind}_ap"])]
        own += [PER_CENT.show(result.figures[f"{kind}_{key}_pct"]) for key in ("mpc", "rpc")]
    yield from _table(
        ["model", *(f"{kind} {what} %" for kind in ("box", "mask") for what in ("AP", "mPC", "rPC")), "source"],
        [
            [f"**{title}**", *(f"**{value}**" for value in own), "this sweep"],
            *([row.model, *map(_as_quoted, (*row.box, *row.mask)), row.source] for row in PUBLISHED_COCO),
        ],
    )


def flag_text(flags: Mapping[str, Any]) -> str:
    """Flags as a sentence: what a figure must be read with."""
    parts = []
    if "sample" in flags:
        parts.append(sample_text(flags))
    elif flags["subset"]:
        parts.append(f"a SUBSET of {flags['of']} images")
    if flags.get("masked"):
        parts.append("masked to the set's classes")
    if "definition" in flags:
        order = {"input": ", after the transform", "decoded": ", on the decoded image"}.get(
            flags.get("corrupt", ""), ""
        )
        parts.append(f"{flags['definition']}{order}")
        parts.append("with JPEG step" if flags["jpeg_step"] else "no JPEG step")
    if "draws" in flags:
        parts.append(f"draws {flags['draws']}, seed {flags['seed']}")
    return ", ".join([*parts, f"transform {flags['transform']}", f"{flags['precision']} on {flags['device']}"])


def sample_text(flags: Mapping[str, Any]) -> str:
    """What a sample is, in words."""
    return f"a development SAMPLE of {flags['images']} of {flags['of']} images drawn by seed {flags['sample_seed']}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _of(result: SetResult, key: str) -> str:
    return PER_CENT.show(result.figures.get(key))


def _as_quoted(value: float | None) -> str:
    return "-" if value is None else str(value)  # with the digits of its source


# --- heat map -------------------------------------------------------------------------------------------------------


def draw_heat_map(path: Path, title: str, results: Mapping[str, SetResult]) -> None:
    """Every grid as a panel: corruptions down, severities across, the number in each field."""
    grids = [(name, unit) for name, result in results.items() for unit in result.grids]
    height = 1.6 + 0.3 * max(len(results[name].grids[unit]) for name, unit in grids)
    samples = dict.fromkeys(sample_text(results[name].flags) for name, _ in grids if "sample" in results[name].flags)
    with plot(path, (5.4 * len(grids), height), title, tuple(samples)) as figure:
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        for axes, (name, unit) in zip(panels, grids, strict=True):
            _panel(axes, name, results[name], unit)
        top = 0.85 + 0.2 * len(samples)
        figure.subplots_adjust(
            left=1.6 / (5.4 * len(grids)), right=0.98, top=1 - top / height, bottom=0.45 / height, wspace=0.5
        )


def _panel(axes: Any, name: str, result: SetResult, unit: str) -> None:
    grid, what = result.grids[unit], UNITS[unit]
    names = [corruption for corruption in NAMES if corruption in grid]
    severities = sorted({severity for row in grid.values() for severity in row})
    values = what.factor * np.array([[grid[c].get(s, np.nan) for s in severities] for c in names])
    # Dark is bad: a high error, an AP or IoU far from the clean one, or features far from the clean ones.
    low, high = _limits(result, unit, values)
    axes.imshow(values, cmap="cividis" if what.high_is_good else "cividis_r", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        share = (value - low) / (high - low)
        dark = share < 0.5 if what.high_is_good else share > 0.5
        text = "" if np.isnan(value) else f"{value:.{what.digits - 1}f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(severities)), [str(s) for s in severities], fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("severity", fontsize=8)
    axes.set_title(f"{TITLES[name]}\n{what.caption}{_over(result, unit)}", fontsize=8)
    for edge in np.cumsum([sum(c in names for c in group) for group in GROUPS.values()]):
        if 0 < edge < len(names):
            axes.axhline(edge - 0.5, color="white", linewidth=1.5)


def _limits(result: SetResult, unit: str, values: np.ndarray) -> tuple[float, float]:
    if unit == "error_pct":
        return 0.0, 100.0
    if unit == "cosine":
        return min(0.0, float(np.nanmin(values))), 1.0
    return 0.0, max(UNITS[unit].factor * result.figures[unit], float(np.nanmax(values)), 1e-6)


def _over(result: SetResult, unit: str) -> str:
    """The headline of a panel: the mean, of a performance beside the clean figure."""
    figures, show = result.figures, UNITS[unit].show
    if unit not in PERFORMANCE:
        mean = figures.get(f"mean_{unit}")
        return "" if mean is None else f"; mean over 15 x 5: {show(mean)}"
    prefix, _ = PERFORMANCE[unit]
    whole = figures.get(f"{prefix}mpc_pct")
    under = f"mPC {whole:.2f}" if whole is not None else f"mean of these cells {show(figures.get(f'part_mean_{unit}'))}"
    return f"; clean {show(figures[unit])}, {under}"
