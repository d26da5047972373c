"""The chapter on pretraining: runs side by side, curves over images and over time, pictures, what the teacher does."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count as counter
from typing import Any

from tools.report.blocks import Block, Cell, Charts, Gallery, Notes, Row, Section, Table
from tools.report.comparison import Measure, figure, side_by_side
from tools.report.formats import count, four, gibibytes, number, percent, seconds, shown_by, text, three, whole
from tools.report.measured import (
    by_images,
    by_minutes,
    grouped,
    median_of,
    peak_memory,
    set_name,
    training_seconds,
    vit_text,
)
from tools.report.pictures import Album, sorted_out
from tools.report.plots import Points, Series, chart, curve, legend
from tools.report.reading import Json
from tools.report.runs import METHODS, Run, method_of

KNN, LINEAR = "probe/knn_top1_pct", "probe/linear_top1_pct"
PROBES = {KNN: "k-NN top-1, %", LINEAR: "linear probe top-1, %"}
COLOURS = {"rc_mae": 0, "mae": 1, "rc_mae_own_mask": 2}  # the first three of the page's eight; other strokes per seed
PER_STROKE = 8
_SIZES = ("model", "img_size", "vit", "decoder")
_PROBE = ("train_images", "test_images", "k", "temperature", "feature", "crop_ratio")
_MACHINE = ("gpu", "cpus", "threads", "instruction_set", "platform", "torch")
_DYNAMICS = {
    "gradient norms": (("reconstruction_grad_norm", "reconstruction"), ("consistency_grad_norm", "consistency")),
    "cosines; with the last update, below 0 takes it back": (
        ("cos_reconstruction_consistency", "reconstruction, consistency"),
        ("cos_reconstruction_previous", "reconstruction, last update"),
        ("cos_consistency_previous", "consistency, last update"),
    ),
    "distance of teacher and student": (("teacher_distance", "distance"),),
    "effective momentum of the teacher": (("effective_momentum", "momentum"),),
}


def pretraining(runs: Sequence[Run], comparisons: Sequence[Sequence[Json]], album: Album) -> Section | None:
    """Everything that pretraining runs tell; None without one.

    Args:
        comparisons: curves of `rcmae compare` whose runs are no longer there.
    """
    blocks: list[Block] = []
    for group in grouped(runs, _group):
        blocks += _about(group, album)
    for curves in comparisons:
        blocks += _stored_curves(curves)
    return Section("pretraining", "Pretraining", blocks) if blocks else None


def headline(run: Run) -> str:
    """A pretraining run in a few words."""
    told = []
    for name, title in ((KNN, "k-NN"), (LINEAR, "linear")):
        value, first = run.figures.get(name), _first(run, name)
        before = f" (at first {percent(first)} %)" if first is not None else ""
        if value is not None:
            told.append(f"{title} top-1 {percent(value)} %{before}")
    loss = run.figures.get("train/reconstruction")
    if not told and loss is not None:
        told.append(f"reconstruction loss {four(loss)}")
    return ", ".join(told)


def _group(run: Run) -> list[Any]:
    probe = [run.given(f"probe.{key}") for key in _PROBE]
    return [set_name(run), set_name(run, "probe.data"), probe, *(run.config.get(key) for key in _SIZES)]


def _about(runs: Sequence[Run], album: Album) -> list[Block]:
    first = runs[0]
    what = f"{set_name(first) or 'unknown images'}, {vit_text(first)}"
    measures = [
        Measure("images seen", lambda run: run.images_seen, count),
        figure("train/reconstruction", "reconstruction loss", four, False),
        figure("train/consistency", "consistency loss", four, None),
        Measure("k-NN top-1 at first, %", lambda run: _first(run, KNN), percent),
        figure(KNN, PROBES[KNN], percent, strong=True),
        Measure("linear probe top-1 at first, %", lambda run: _first(run, LINEAR), percent),
        figure(LINEAR, PROBES[LINEAR], percent, strong=True),
        Measure("images/s, median", median_of("speed/images_per_s"), three, True),
        Measure("peak memory, GiB", peak_memory, gibibytes, False),
        Measure("time of training", training_seconds, seconds, False),
    ]
    facts = {"method": lambda run: METHODS.get(method_of(run), text(run.config.get("method") or "unknown"))}
    notes = _probe_notes(runs)
    blocks: list[Block] = [side_by_side(f"Pretraining on {what}", runs, measures, _unlike, facts, notes)]
    blocks += _cost_of_teacher(runs)
    blocks += _curves(runs, what)
    blocks.append(_reconstructions(runs, album))
    blocks += _dynamics(runs)
    return blocks


def _first(run: Run, name: str) -> float | None:
    return next((row[name] for row in run.rows if row.get(name) is not None), None)


def _probe_notes(runs: Sequence[Run]) -> list[str]:
    if all(run.given("probe.data") for run in runs):
        train, test = (number(runs[0].given(f"probe.{key}")) for key in ("train_images", "test_images"))
        return [
            f"k-NN and linear probe: frozen features of the exported branch on {set_name(runs[0], 'probe.data')}, at "
            f"most {shown_by(count, train)} images to learn from and {shown_by(count, test)} to ask; a check on the "
            "way, no published figure is of this kind."
        ]
    missing = [run.name for run in runs if not run.given("probe.data")]
    return [f"No k-NN and no linear probe of {', '.join(missing)}: probe.data was not given."]


def _unlike(first: Run, other: Run) -> str:
    if first.fingerprint and other.fingerprint and first.fingerprint != other.fingerprint:
        return "trained on other images"
    if first.images_seen != other.images_seen:
        return f"{shown_by(count, other.images_seen)} images seen, not {shown_by(count, first.images_seen)}"
    return ""


# ---- what the teacher costs -----------------------------------------------------------------------------------------


def _cost_of_teacher(runs: Sequence[Run]) -> list[Block]:
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(method_of(run), []).append(run)
    if "mae" not in by_method or len(by_method) < 2:
        return []
    caption = "What the teacher costs"
    why_not = _unlike_machines(runs)
    if why_not:
        return [Notes(caption, [f"Not told: {why_not}, so that rates cannot be set against each other."])]
    plain = by_method["mae"]
    rows = []
    for method, own in by_method.items():
        rate, most = _mean(own, median_of("speed/images_per_s")), _mean(own, peak_memory)
        plain_rate, plain_most = _mean(plain, median_of("speed/images_per_s")), _mean(plain, peak_memory)
        time_share = 100 * (1 - rate / plain_rate) if rate and plain_rate and method != "mae" else None
        memory_share = 100 * (1 - plain_most / most) if most and plain_most and method != "mae" else None
        cells = [Cell(count(len(own))), Cell(shown_by(three, rate)), Cell(shown_by(gibibytes, most))]
        cells += [Cell(shown_by(whole, share)) for share in (time_share, memory_share)]
        rows.append(Row(METHODS.get(method, text(method)), cells))
    columns = ["runs", "images/s", "peak memory, GiB", "teacher's share of time, %", "of memory, %"]
    notes = [
        "Means over the runs of a method. Runs that shared a machine with other work were slower than they would be "
        "alone."
    ]
    return [Table(caption, columns, rows, notes, corner="method")]


def _unlike_machines(runs: Sequence[Run]) -> str:
    facts: dict[str, list[Any]] = {
        "the machine": [[run.env.get(key) for key in _MACHINE] for run in runs],
        "the batch": [run.batch_size for run in runs],
        "precision or compilation": [[run.given("engine.precision"), run.given("engine.compile")] for run in runs],
    }
    unlike = [name for name, values in facts.items() if any(value != values[0] for value in values)]
    return f"{' and '.join(unlike)} not the same in all runs" if unlike else ""


def _mean(runs: Sequence[Run], of: Callable[[Run], float | None]) -> float | None:
    values = [value for value in map(of, runs) if value is not None]
    return statistics.fmean(values) if values else None


# ---- curves ---------------------------------------------------------------------------------------------------------


def _styles(runs: Sequence[Run]) -> dict[str, int]:
    """A colour per method and a stroke per run of it; where there is one method alone, a colour per run."""
    methods = [method_of(run) for run in runs]
    if len(set(methods)) == 1:
        return {run.name: i for i, run in enumerate(runs)}
    strokes = {method: counter() for method in methods}
    colours = {method: COLOURS.get(method, len(COLOURS)) for method in methods}
    return {run.name: colours[m] + PER_STROKE * next(strokes[m]) for run, m in zip(runs, methods, strict=True)}


def _label(run: Run) -> str:
    return f"{run.name}: {METHODS.get(method_of(run), 'unknown method')}"


def _curves(runs: Sequence[Run], what: str) -> list[Block]:
    styles = _styles(runs)

    def series(name: str, x_of: Callable[[Run], Callable[[float], float]]) -> list[Series]:
        return [Series(_label(run), styles[run.name], curve(run.rows, name, x_of(run))) for run in runs]

    plots = [
        chart("reconstruction loss", "images seen", series("train/reconstruction", by_images)),
        chart("consistency loss", "images seen", series("train/consistency", by_images)),
    ]
    for name, title in PROBES.items():
        plots.append(chart(title, "images seen", series(name, by_images)))
        plots.append(chart(title, "minutes of training", series(name, by_minutes)))
    plots.append(chart("images/s", "images seen", series("speed/images_per_s", by_images), from_zero=True))
    found = [plot for plot in plots if plot is not None]
    if not found:
        return [Notes("Curves", ["No figure has been logged yet, so that there is nothing to draw."])]
    key = legend(series("step", by_images))
    notes = ["Minutes are those of training alone: evaluations, pictures and interruptions are not counted."]
    notes = notes if any(plot.x_label.startswith("minutes") for plot in found) else []
    return [Charts(f"Curves of pretraining on {what}", found, key, notes)]


def _stored_curves(curves: Sequence[Json]) -> list[Block]:
    plots = []
    strokes: dict[str, int] = {}
    styles = []
    for one in curves:
        method = str(one.get("method"))
        strokes[method] = strokes.get(method, -1) + 1
        styles.append(COLOURS.get(method, 3) + PER_STROKE * strokes[method])
    labels = [
        f"{METHODS.get(str(one.get('method')), text(one.get('method'), 40))}, seed {text(one.get('seed'), 12)}"
        for one in curves
    ]
    for name, title in PROBES.items():
        for along, x_label in (("images", "images seen"), ("minutes", "minutes of training")):
            series = [
                Series(label, style, _stored_points(one, along, name))
                for one, label, style in zip(curves, labels, styles, strict=True)
            ]
            plots.append(chart(title, x_label, series))
    found = [plot for plot in plots if plot is not None]
    caption = "Curves of a comparison whose runs are no longer there"
    if not found:
        return [Notes(caption, ["comparison.json holds no curve that can be drawn."])]
    key = legend([Series(label, style, ()) for label, style in zip(labels, styles, strict=True)])
    return [Charts(caption, found, key, ["From comparison.json, as rcmae compare left it."])]


def _stored_points(one: Mapping[str, Any], along: str, name: str) -> Points:
    probes = one.get("probes")
    xs, ys = one.get(along), probes.get(name) if isinstance(probes, dict) else None
    if not isinstance(xs, list) or not isinstance(ys, list):
        return []
    pairs = [(number(x), number(y)) for x, y in zip(xs, ys, strict=False)]
    return [(x, y) for x, y in pairs if x is not None]


# ---- pictures and the teacher ---------------------------------------------------------------------------------------


def _reconstructions(runs: Sequence[Run], album: Album) -> Gallery:
    found = []
    missing = []
    for run in runs:
        steps = run.pictures.get("reconstructions")
        if not steps:
            missing.append(f"{run.name}: pictures/ holds no reconstruction")
            continue
        step, path = steps[-1]
        made = "student and teacher make" if method_of(run) != "mae" else "the student makes"
        caption = f"{run.name}, step {step:,}: input, what the encoder sees, and what {made} of it"
        found.append(album.add(path, f"Reconstructions of {run.name} at step {step}", caption))
    pictures, words = sorted_out(found)
    return Gallery("Reconstructions", pictures, [*missing, *words])


def _dynamics(runs: Sequence[Run]) -> list[Block]:
    blocks: list[Block] = []
    missing = []
    for run in (run for run in runs if method_of(run) != "mae"):
        if any(key.startswith("dynamics/") for row in run.rows for key in row):
            blocks.append(_measured_dynamics(run))
        elif run.given("dynamics.every_steps"):
            missing.append(f"{run.name}: nothing has been measured yet")
        else:
            missing.append(f"{run.name}: not recorded; dynamics.every_steps=N records it")
    return [*blocks, Notes("What the teacher does", missing)] if missing else blocks


def _measured_dynamics(run: Run) -> Charts:
    plots = []
    for title, names in _DYNAMICS.items():
        series = [
            Series(label, i, curve(run.rows, f"dynamics/{name}", by_images(run)))
            for i, (name, label) in enumerate(names)
        ]
        plot = chart(
            title, "images seen", series, log=title == "gradient norms", zero_line=title.startswith("cosines"),
            least_range=0.01 if title.startswith("effective") else 0.0,
        )  # fmt: skip
        if plot is not None:
            plots.append(replace(plot, legend=legend(series)) if len(names) > 1 else plot)
    note = "Gradients of both losses as they are weighted in the total, over all weights of the student as one vector."
    return Charts(f"What the teacher does: {run.name}", plots, (), [note])
