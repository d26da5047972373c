"""The results of a sweep for people: a Markdown table with published figures beside, and a heat map."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.plots import plot
from robustness.corruptions.apply import GROUPS, NAMES, SEVERITIES
from robustness.results import MASKED, SetResult

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


class Published(NamedTuple):
    """A row of published figures, in percent; None where its source has none."""

    model: str
    val_top1: float | None
    mce: float | None
    imagenet_a: float | None
    imagenet_r: float | None
    imagenet_sketch: float | None
    source: str


# Fine-tuned on ImageNet-1k at 224 px; mCE on the released files. Read in the sources named, nothing from memory.
PUBLISHED = (
    Published("MAE ViT-B", 83.664, 51.7, 35.9, 48.3, 34.5, "facebookresearch/mae README, FINETUNE.md"),
    Published("MAE ViT-L", 85.952, 41.8, 57.1, 59.9, 45.3, "facebookresearch/mae README, FINETUNE.md"),
    Published("MAE ViT-H", 86.928, 33.8, 68.2, 64.4, 49.6, "facebookresearch/mae README, FINETUNE.md"),
    Published("RC-MAE ViT-S", 82.0, None, None, None, None, "RC-MAE README"),
    Published("RC-MAE ViT-B", 83.6, None, None, None, None, "RC-MAE README"),
    Published("RC-MAE ViT-L", 86.1, None, None, None, None, "RC-MAE README"),
    Published("DeiT-B (crop 0.9)", None, None, 27.17, 44.91, 32.39, "timm results csv"),
    Published("DeiT3-B (crop 0.9)", None, None, 38.92, 53.43, 40.38, "timm results csv"),
    Published("ResNet-50", 76.15, 76.7, None, None, None, "hendrycks/robustness README (clean error 23.85)"),
)
COLUMNS = {  # of that table: the set and the figure that each stands for
    "val_top1": ("imagenet_val", "top1_pct", "val top-1"),
    "mce": ("imagenet_c", "mce_pct", "mCE"),
    "imagenet_a": ("imagenet_a", "top1_pct", "A top-1"),
    "imagenet_r": ("imagenet_r", "top1_pct", "R top-1"),
    "imagenet_sketch": ("imagenet_sketch", "top1_pct", "Sketch top-1"),
}

# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(title: str, facts: Sequence[str], results: Mapping[str, SetResult]) -> str:
    """The whole page. Args: facts: lines on model, machine and provenance, for the top."""
    lines = [f"# Robustness of {title}", "", *(f"- {fact}" for fact in facts), ""]
    natural = {name: result for name, result in results.items() if not result.grid}
    if natural:
        lines += [*_natural(natural), ""]
    for name, result in results.items():
        if result.grid:
            lines += [*_grid(name, result), ""]
    lines += _published(title, results)
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
    """Headline figures, each with its formula, then a row per corruption, then means."""
    figures, cosine = result.figures, result.unit == "cosine"
    yield f"## {TITLES[name][0].upper()}{TITLES[name][1:]} (`{name}`)"
    yield ""
    yield f"{result.flags['images']} images; {flag_text(result.flags)}."
    yield ""
    for key, text in _HEADLINES.items():
        if key in figures:
            yield f"- {text}: **{_number(figures[key], cosine)}**"
    yield from _refusals({name: result})
    yield ""
    yield from _grid_table(result)
    severities = {f"severity_{s}": f"severity {s}" for s in SEVERITIES}
    kinds = {"group": {group: group for group in GROUPS}, "severity, over the 15": severities}
    for by, labels in kinds.items():
        found = {label: figures.get(f"{key}/{result.unit}") for key, label in labels.items()}
        means = [f"{label} {_number(value, cosine)}" for label, value in found.items() if value is not None]
        if means:
            yield ""
            yield f"Mean {_WHAT[result.unit]} by {by}: {', '.join(means)}."


_WHAT = {"cosine": "cosine", "error_pct": "error %"}


def _grid_table(result: SetResult) -> Iterator[str]:
    figures, cosine = result.figures, result.unit == "cosine"
    severities = sorted({severity for row in result.grid.values() for severity in row})
    columns = {"CE %": "ce_pct", "relative CE %": "relative_ce_pct"}
    columns = {title: key for title, key in columns.items() if any(f"{c}/{key}" in figures for c in result.grid)}
    rows = []
    for group, names in GROUPS.items():
        for corruption in (c for c in names if c in result.grid):
            values = [result.grid[corruption].get(s) for s in severities]
            values += [figures.get(f"{corruption}/{key}") for key in (result.unit, *columns.values())]
            rows.append([corruption, group, *(_number(value, cosine) for value in values)])
    titles = [f"{_WHAT[result.unit]}, severity {s}" for s in severities]
    yield from _table(["corruption", "group", *titles, "mean", *columns], rows)


_HEADLINES = {
    "mce_pct": "mCE %, normalised by AlexNet: mean over 15 corruptions of sum of errors / sum of AlexNet's errors",
    "relative_mce_pct": "relative mCE %, the same with the clean errors taken off",
    "mean_error_pct": "mean error %, not normalised: plain mean over 15 corruptions x 5 severities; this is not mCE",
    "part_mean_error_pct": "mean error % over the part of the grid below, not normalised",
    "error_pct": "clean error %",
    "mean_cosine": "mean cosine between features of clean and corrupted images over 15 corruptions x 5 severities",
    "part_mean_cosine": "mean cosine between features of clean and corrupted images over the part of the grid below",
}


def _refusals(results: Mapping[str, SetResult]) -> Iterator[str]:
    lines = [f"- {name}/{key}: not given, {why}" for name, r in results.items() for key, why in r.refused.items()]
    if lines:
        yield from ("", *lines)


def _published(title: str, results: Mapping[str, SetResult]) -> Iterator[str]:
    """Published rows beside the same figures here; only of whole sets under the published protocol."""
    own = {}
    for column, (name, key, _) in COLUMNS.items():
        result = results.get(name)
        if result is not None and key in result.figures and _as_published(result.flags):
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


def _as_published(flags: Mapping[str, Any]) -> bool:
    return not flags["subset"] and flags["img_size"] == "224x224" and flags["transform"] != "official"


def flag_text(flags: Mapping[str, Any]) -> str:
    """Flags as a sentence: what a figure must be read with."""
    parts = []
    if flags["subset"]:
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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _of(result: SetResult, key: str) -> str:
    return _number(result.figures.get(key), False)


def _number(value: float | None, cosine: bool) -> str:
    return "-" if value is None else f"{value:.{4 if cosine else 2}f}"


def _as_quoted(value: float | None) -> str:
    return "-" if value is None else str(value)  # with the digits of its source


# --- heat map -------------------------------------------------------------------------------------------------------


def draw_heat_map(path: Path, title: str, results: Mapping[str, SetResult]) -> None:
    """Every grid as a panel: corruptions down, severities across, the number in each field."""
    grids = {name: result for name, result in results.items() if result.grid}
    height = 1.6 + 0.3 * max(len(result.grid) for result in grids.values())
    with plot(path, (5.4 * len(grids), height), title) as figure:
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        for axes, (name, result) in zip(panels, grids.items(), strict=True):
            _panel(axes, name, result)
        figure.subplots_adjust(
            left=1.6 / (5.4 * len(grids)), right=0.98, top=1 - 0.85 / height, bottom=0.45 / height, wspace=0.5
        )


def _panel(axes: Any, name: str, result: SetResult) -> None:
    names = [corruption for corruption in NAMES if corruption in result.grid]
    severities = sorted({severity for row in result.grid.values() for severity in row})
    values = np.array([[result.grid[c].get(s, np.nan) for s in severities] for c in names])
    cosine = result.unit == "cosine"
    # Dark is bad: a high error, or features far from the clean ones.
    low, high = (min(0.0, float(np.nanmin(values))), 1.0) if cosine else (0.0, 100.0)
    axes.imshow(values, cmap="cividis" if cosine else "cividis_r", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = (value - low) / (high - low) < 0.5 if cosine else (value - low) / (high - low) > 0.5
        text = "" if np.isnan(value) else f"{value:.{3 if cosine else 1}f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(severities)), [str(s) for s in severities], fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("severity", fontsize=8)
    what = "cosine to the clean features" if cosine else "top-1 error, %"
    mean = result.figures.get(f"mean_{result.unit}")
    over = "" if mean is None else f"; mean over 15 x 5: {_number(mean, cosine)}"
    axes.set_title(f"{TITLES[name]}\n{what}{over}", fontsize=8)
    for edge in np.cumsum([sum(c in names for c in group) for group in GROUPS.values()]):
        if 0 < edge < len(names):
            axes.axhline(edge - 0.5, color="white", linewidth=1.5)
