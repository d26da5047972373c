"""The chapters on detection and segmentation: tables by size and by class, curves, pictures, published rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tools.report.blocks import Block, Cell, Gallery, Notes, Row, Section, Table
from tools.report.comparison import (
    Measure,
    alike_to_first,
    by_class,
    by_name,
    class_names,
    class_rows,
    figure,
    other_evaluation,
    side_by_side,
)
from tools.report.formats import count, fraction, number, percent, seconds, text
from tools.report.measured import curves, data_name, grouped, set_name, training_seconds
from tools.report.pictures import Album, sorted_out
from tools.report.published import beside
from tools.report.reading import read_json
from tools.report.runs import Run

_AP = {
    "ap": "AP", "ap50": "AP at IoU 0.50", "ap75": "AP at IoU 0.75", "ap_small": "AP, small", "ap_medium": "AP, medium",
    "ap_large": "AP, large", "ar1": "AR, 1 per image", "ar10": "AR, 10 per image", "ar100": "AR, 100 per image",
    "ar_small": "AR, small", "ar_medium": "AR, medium", "ar_large": "AR, large",
}  # fmt: skip
MAX_CONFUSIONS = 8  # pairs of classes in a table


def detection(runs: Sequence[Run], album: Album) -> Section | None:
    """Everything that detection runs tell; None without one."""
    blocks = [block for group in grouped(runs, _group) for block in _detected(group, album)]
    lead = (
        "Average precision in per cent; small is below 32² px, large from 96² px on. A dash: no such object in the set."
    )
    return Section("detection", "Detection", blocks, lead) if blocks else None


def segmentation(runs: Sequence[Run], album: Album) -> Section | None:
    """Everything that segmentation runs tell; None without one."""
    blocks = [block for group in grouped(runs, _group) for block in _segmented(group, album)]
    return Section("segmentation", "Segmentation", blocks) if blocks else None


def headline(run: Run) -> str:
    """A run of dense prediction in a few words."""
    if run.kind == "segment":
        value = run.figures.get("miou_pct")
        return "" if value is None else f"mIoU {percent(value)} %"
    told = [(title, run.figures.get(name)) for title, name in (("box AP", "box_ap"), ("mask AP", "mask_ap"))]
    return ", ".join(f"{title} {fraction(value)}" for title, value in told if value is not None)


def _group(run: Run) -> list[Any]:
    keys = ("data", "train_json", "val_json", "val_images")
    return [*(set_name(run, key) for key in keys), run.config.get("classes"), run.config.get("num_classes")]


def _measures_of_training() -> list[Measure]:
    return [
        Measure("evaluation images", lambda run: run.eval_images, count),
        Measure("training images", lambda run: run.train_images, count),
        Measure("images seen", lambda run: run.images_seen, count),
        Measure("time of training", training_seconds, seconds, False),
    ]


_FACTS: dict[str, Callable[[Run], str]] = {
    "head": lambda run: run.stage,
    "start from": lambda run: "random weights" if run.config.get("init") == "random" else "the pretrained backbone",
}


def _detected(runs: Sequence[Run], album: Album) -> list[Block]:
    title = f"Detection on {data_name(runs[0]) or 'an unknown set'}"
    measures = [
        figure(f"{kind}_{name}", f"{kind} {label}", fraction, strong=name == "ap")
        for kind in ("box", "mask")
        for name, label in _AP.items()
    ]
    blocks: list[Block] = [side_by_side(title, runs, [*measures, *_measures_of_training()], other_evaluation, _FACTS)]
    alike, names = alike_to_first(runs, other_evaluation), [run.name for run in runs]
    for kind in ("box", "mask"):
        prefix = f"{kind}_ap/"
        values = [
            {
                name.removeprefix(prefix): value
                for name, value in by_name(run.results.get("all_figures")).items()
                if name.startswith(prefix)
            }
            for run in runs
        ]
        if all(len(one) <= 1 for one in values):
            continue  # of a single class it is the figure above
        table = by_class(f"{kind.capitalize()} AP by class, %: {title}", names, values, alike, fraction)
        if table:
            blocks.append(table)
    if not any(run.results for run in runs):
        blocks.append(Notes(f"AP by class: {title}", ["results.json is not there yet; it is written at the end."]))
    blocks.append(_gallery(runs, "detections", f"Detections on validation images: {title}", album))
    plotted = {"train/loss": "training loss", "eval/box_ap": "box AP", "eval/mask_ap": "mask AP"}
    blocks += curves(runs, title, plotted, {"eval/box_ap": 100, "eval/mask_ap": 100})
    blocks += beside(runs)
    return blocks


def _segmented(runs: Sequence[Run], album: Album) -> list[Block]:
    title = f"Segmentation on {set_name(runs[0]) or 'an unknown set'}"
    measures = [
        figure("miou_pct", "mIoU, %", percent, strong=True),
        figure("macc_pct", "mean accuracy of the classes, %", percent),
        figure("aacc_pct", "accuracy of all pixels, %", percent),
    ]
    blocks: list[Block] = [side_by_side(title, runs, [*measures, *_measures_of_training()], other_evaluation, _FACTS)]
    tables = [class_rows(run) for run in runs]
    values = [{str(row["name"]): number(row.get("iou_pct")) for row in rows} for rows in tables]
    pixels = {str(row["name"]): number(row.get("pixels")) for row in tables[0]}
    table = by_class(
        f"IoU by class, %: {title}", [run.name for run in runs], values, alike_to_first(runs, other_evaluation),
        extra={"labelled pixels": pixels} if pixels else None,
    )  # fmt: skip
    blocks.append(
        table
        or Notes(f"IoU by class: {title}", ["results.json holds no table by class yet; it is written at the end."])
    )
    blocks += _confused(runs, title)
    blocks.append(_gallery(runs, "labels", f"Validation images, predictions and truth: {title}", album))
    blocks += curves(
        runs,
        title,
        {"train/loss": "training loss", "eval/miou_pct": "mIoU, %", "eval/aacc_pct": "accuracy of all pixels, %"},
    )
    blocks += beside(runs)
    return blocks


def _confused(runs: Sequence[Run], title: str) -> list[Block]:
    """Of each run the pairs of classes that most pixels were mixed up of."""
    blocks: list[Block] = []
    missing = []
    for run in runs:
        content, fault = read_json(run.path / "confusion.json")
        names = [text(name, 80) for name in class_names(run)]
        pixels = _square(content.get("rows_are_labels"), len(names))  # [K, K], rows are the true classes
        if pixels is None:
            missing.append(f"{run.name}: confusion.json: {fault or 'no table of pixels, class by class'}")
            continue
        wrong = pixels * (1 - np.eye(len(names)))
        pairs = [divmod(int(place), len(names)) for place in np.argsort(-wrong, axis=None, kind="stable")]
        rows = [
            Row(
                names[true],
                [
                    Cell(names[taken], words=True),
                    Cell(fraction(wrong[true, taken] / pixels[true].sum())),
                    Cell(fraction(wrong[true, taken] / pixels.sum())),
                ],
            )
            for true, taken in pairs[:MAX_CONFUSIONS]
            if wrong[true, taken] > 0
        ]
        columns = ["taken for", "of its pixels, %", "of all pixels, %"]
        notes = ["By the number of pixels; confusion.json holds all."] if rows else ["No pixel is of another class."]
        blocks.append(Table(f"Most frequent confusions of {run.name}", columns, rows, notes, corner="true class"))
    return [*blocks, Notes(f"Confusions: {title}", missing)] if missing else blocks


def _square(stored: Any, size: int) -> np.ndarray | None:
    """A table of counts as [size, size]; None for anything else."""
    if not isinstance(stored, list) or len(stored) != size or size == 0:
        return None
    if not all(isinstance(row, list) and len(row) == size for row in stored):
        return None
    values = [[number(value) for value in row] for row in stored]
    if any(value is None or value < 0 for row in values for value in row):
        return None
    return np.array(values, dtype=float)


def _gallery(runs: Sequence[Run], name: str, title: str, album: Album) -> Gallery:
    """The last picture called `name` of each run."""
    found, missing = [], []
    for run in runs:
        if run.only_evaluated:
            continue  # draws none
        if name not in run.pictures:
            missing.append(f"{run.name}: pictures/ holds none yet")
            continue
        step, path = run.pictures[name][-1]
        found.append(album.add(path, f"{title}; {run.name} at step {step}", f"{run.name}, step {step:,}"))
    pictures, words = sorted_out(found)
    return Gallery(title, pictures, [*missing, *words])
