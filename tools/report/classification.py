"""The chapter on classification: fine-tuning, linear probes and k-NN, each protocol on its own."""

import re
from collections.abc import Sequence
from typing import Any

from tools.report.blocks import Block, Cell, Gallery, Notes, Row, Section, Table
from tools.report.comparison import (
    Measure,
    alike_to_first,
    by_class,
    by_name,
    compared,
    figure,
    other_evaluation,
    read_with,
    side_by_side,
    warning_notes,
)
from tools.report.formats import count, four, percent, seconds, several, shown_by
from tools.report.measured import curves, grouped, set_name, training_seconds
from tools.report.pictures import Album, sorted_out
from tools.report.published import beside
from tools.report.runs import Run

PROTOCOLS = {"finetune": "Fine-tuning", "linprobe": "Linear probe", "knn": "k-NN"}
MAX_KNN_ROWS = 60
_KNN = re.compile(r"knn/(cls|mean)_k(\d{1,9})_top([15])_pct")
_FEATURES = {"cls": "class token", "mean": "mean of the patch tokens"}


def classification(runs: Sequence[Run], album: Album) -> Section | None:
    """Everything that classification runs tell; None without one."""
    blocks: list[Block] = []
    for group in grouped(runs, _group):
        knn = group[0].config.get("protocol") == "knn"
        blocks += _knn(group) if knn else _trained(group, album)
    return Section("classification", "Classification", blocks) if blocks else None


def headline(run: Run) -> str:
    """A classification run in a few words."""
    if run.config.get("protocol") == "knn":
        found = [
            (value, name) for name, value in run.figures.items() if name.endswith("_top1_pct") and value is not None
        ]
        if not found:
            return ""
        value, name = max(found)
        match = _KNN.fullmatch(name)
        return f"top-1 {percent(value)} %" + (f" (k = {match[2]}, {_FEATURES[match[1]]})" if match else "")
    told = [(title, run.figures.get(name)) for title, name in (("top-1", "top1_pct"), ("top-5", "top5_pct"))]
    return ", ".join(f"{title} {percent(value)} %" for title, value in told if value is not None)


def _group(run: Run) -> list[Any]:
    return [run.config.get("protocol"), set_name(run), set_name(run, "test_data")]


def _title(run: Run) -> str:
    return f"{PROTOCOLS.get(str(run.config.get('protocol')), 'Classification')} on {set_name(run) or 'an unknown set'}"


def _trained(runs: Sequence[Run], album: Album) -> list[Block]:
    title = _title(runs[0])
    measures = [
        figure("top1_pct", "top-1, %", percent, strong=True),
        figure("top5_pct", "top-5, %", percent),
        figure("loss", "loss", four, False),
        Measure("best top-1 on the way, %", _best, percent, None),
        Measure("evaluation images", lambda run: run.eval_images, count),
        Measure("training images", lambda run: run.train_images, count),
        Measure("images seen", lambda run: run.images_seen, count),
        Measure("time of training", training_seconds, seconds, False),
    ]
    blocks: list[Block] = [side_by_side(title, runs, measures, other_evaluation, {"start from": _start})]
    per_class = [by_name(run.results.get("per_class_pct")) for run in runs]
    table = by_class(
        f"Top-1 by class, %: {title}", [run.name for run in runs], per_class, alike_to_first(runs, other_evaluation)
    )
    blocks.append(table or Notes(f"Top-1 by class: {title}", ["results.json holds no table by class yet."]))
    blocks.append(_confusion(runs, title, album))
    blocks += curves(
        runs, title, {"train/loss": "training loss", "eval/top1_pct": "top-1, %", "eval/loss": "evaluation loss"}
    )
    blocks += beside(runs)
    return blocks


def _start(run: Run) -> str:
    return "random weights" if run.config.get("init") == "random" else "the pretrained backbone"


def _best(run: Run) -> float | None:
    values = [row["eval/top1_pct"] for row in run.rows if row.get("eval/top1_pct") is not None]
    return max(values, default=None)


def _confusion(runs: Sequence[Run], title: str, album: Album) -> Gallery:
    found = []
    for run in runs:
        path = run.path / "confusion.png"
        if path.is_file():
            caption = f"{run.name}: predicted class by true class, % of the true one"
            found.append(album.add(path, f"Confusion matrix of {run.name}", caption))
        elif run.done:
            found.append(f"{run.name}: no confusion.png; it is drawn for up to 50 classes")
        else:
            found.append(f"{run.name}: no confusion.png yet; it is drawn at the end")
    pictures, words = sorted_out(found)
    return Gallery(f"Confusion: {title}", pictures, words)


def _knn(runs: Sequence[Run]) -> list[Block]:
    title = _title(runs[0])
    alike = alike_to_first(runs, other_evaluation)
    keys = {match.groups(): name for run in runs for name in run.figures if (match := _KNN.fullmatch(name))}
    rows = []
    for (feature, k, top), name in sorted(keys.items(), key=lambda entry: (entry[0][2], entry[0][0], int(entry[0][1]))):
        cells = compared([run.figures.get(name) for run in runs], percent, True, alike)
        rows.append(Row(f"k = {int(k):,}, {_FEATURES[feature]}", cells, group=f"top-{top}, %"))
    notes = warning_notes(runs)
    if len(rows) > MAX_KNN_ROWS:
        notes.append(f"{several(len(rows) - MAX_KNN_ROWS, 'more row')} left out; summary.json holds all.")
    rows = rows[:MAX_KNN_ROWS]
    evaluated = [Cell(shown_by(count, run.eval_images)) for run in runs]
    rows.append(Row("evaluation images", evaluated, group="protocol"))
    rows.append(Row("start from", [Cell(_start(run), words=True) for run in runs], group="protocol"))
    rows.append(Row("read with", [Cell(read_with(run), words=True) for run in runs], group="protocol"))
    table = Table(title, [run.name for run in runs], rows, notes, corner="k and feature")
    return [table, *beside(runs)]
