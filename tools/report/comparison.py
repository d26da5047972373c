"""Runs of one kind column by column, with differences to the first where both are figures of the same thing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.report.blocks import Cell, Row, Table
from tools.report.formats import count, number, percent, shown_by, signed, text
from tools.report.runs import Run

MAX_CLASSES = 60  # that a table by class lists in full
EXTREME_CLASSES = 15  # of more, the lowest and the highest


@dataclass(frozen=True)
class Measure:
    """A line of a comparison: what it is called, where it comes from, how it is printed, and which way is better."""

    title: str
    of: Callable[[Run], float | None]
    show: Callable[[float], str]
    higher_is_better: bool | None = None  # None: neither, and then no difference is told
    strong: bool = False
    key: str = ""  # of a stored figure: where it is stored but not defined, it is told with a dash


def figure(
    name: str, title: str, show: Callable[[float], str], higher_is_better: bool | None = True, strong: bool = False
) -> Measure:
    """A measure that is one of a run's figures."""
    return Measure(title, lambda run: run.figures.get(name), show, higher_is_better, strong, name)


def side_by_side(
    caption: str,
    runs: Sequence[Run],
    measures: Sequence[Measure],
    unlike: Callable[[Run, Run], str],
    facts: Mapping[str, Callable[[Run], str]] | None = None,
    notes: Sequence[str] = (),
) -> Table:
    """A column per run and a row per measure that any of them has, be it as not defined.

    Args:
        unlike: why a run's figures cannot be set against those of the first one; "" where they can.
        facts: further rows, in words.
    """
    reasons = [""] + [_unlike(runs[0], run, unlike) for run in runs[1:]]
    rows = [Row(title, [Cell(of(run), words=True) for run in runs]) for title, of in (facts or {}).items()]
    for measure in measures:
        values = [measure.of(run) for run in runs]
        if any(value is not None for value in values) or any(measure.key in run.figures for run in runs):
            cells = compared(values, measure.show, measure.higher_is_better, [not reason for reason in reasons])
            rows.append(Row(measure.title, cells, strong=measure.strong))
    rows.append(Row("read with", [Cell(read_with(run), words=True) for run in runs]))
    return Table(caption, [run.name for run in runs], rows, [*notes, *_reasons(runs, reasons), *warning_notes(runs)])


def compared(
    values: Sequence[float | None],
    show: Callable[[float], str],
    higher_is_better: bool | None,
    alike: Sequence[bool],
) -> list[Cell]:
    """Fields of one row: values, and from the second on their difference to the first where they are `alike`."""
    cells = []
    for i, (value, same) in enumerate(zip(values, alike, strict=True)):
        first = values[0]
        if i == 0 or value is None or first is None or higher_is_better is None or not same:
            cells.append(Cell(shown_by(show, value)))
            continue
        delta = signed(show, value, value - first)
        better = None if delta.startswith("±") else (value > first) == higher_is_better
        cells.append(Cell(show(value), delta, better))
    return cells


def by_class(
    caption: str,
    names: Sequence[str],
    values: Sequence[Mapping[str, float | None]],
    alike: Sequence[bool],
    show: Callable[[float], str] = percent,
    extra: Mapping[str, Mapping[str, float | None]] | None = None,
) -> Table | None:
    """A row per class: a column per run, and further columns of counts. None where no run has classes.

    Args:
        values: of each run, by the name of the class.
        extra: by title, counts by the name of the class.
    """
    classes = list(dict.fromkeys(name for one in values for name in one))
    if not classes:
        return None
    notes, chosen, extra = [], classes, extra or {}
    if len(classes) > MAX_CLASSES:
        first = next(i for i, one in enumerate(values) if one)
        known = {name: value for name, value in values[first].items() if value is not None}
        ranked = sorted(known, key=known.__getitem__)
        chosen = [*ranked[:EXTREME_CLASSES], *ranked[max(EXTREME_CLASSES, len(ranked) - EXTREME_CLASSES) :]]
        notes.append(
            f"{len(classes):,} classes, of which the {EXTREME_CLASSES} lowest and the {EXTREME_CLASSES} highest of "
            f"{names[first]} are shown; results.json holds all"
        )
    rows = []
    for name in chosen:
        cells = compared([one.get(name) for one in values], show, True, alike)
        cells += [Cell(shown_by(count, counts.get(name))) for counts in extra.values()]
        rows.append(Row(text(name, 80), cells))
    return Table(caption, [*names, *extra], rows, notes, corner="class")


def alike_to_first(runs: Sequence[Run], unlike: Callable[[Run, Run], str]) -> list[bool]:
    """For each run, whether its figures can be set against those of the first."""
    return [True] + [not _unlike(runs[0], run, unlike) for run in runs[1:]]


def other_evaluation(first: Run, other: Run) -> str:
    """Why two runs were not evaluated on the same images, as far as their directories tell; "" if they were."""
    counts = first.eval_images, other.eval_images
    if None not in counts and counts[0] != counts[1]:
        return f"evaluated on {counts[1]:,.0f} images, not {counts[0]:,.0f}"
    classes = class_names(first), class_names(other)
    if classes[0] and classes[1] and classes[0] != classes[1]:
        return f"{len(classes[1]):,} classes that are not the {len(classes[0]):,} of the first"
    return ""


def class_names(run: Run) -> tuple[str, ...]:
    """Names of a run's classes in their order; empty where it does not tell. Foreign text."""
    described = run.exported.get("rcmae")
    described = described if isinstance(described, dict) else {}
    stored: Any = {
        "classify": run.results.get("per_class_pct") or run.exported.get("label_names"),
        "detect": described.get("names") or _detected_names(run),
        "segment": [one.get("name") for one in class_rows(run)] or described.get("names"),
    }.get(run.kind)
    return tuple(str(name) for name in stored) if isinstance(stored, (dict, list)) else ()


def _detected_names(run: Run) -> list[str]:
    prefix, figures = "box_ap/", by_name(run.results.get("all_figures"))
    return [name.removeprefix(prefix) for name in figures if name.startswith(prefix)]


def class_rows(run: Run) -> list[Mapping[str, Any]]:
    """The table by class of a segmentor."""
    stored = run.results.get("classes")
    return [one for one in stored if isinstance(one, dict) and "name" in one] if isinstance(stored, list) else []


def by_name(stored: Any) -> dict[str, float | None]:
    """Figures by name, of whatever a JSON file held there."""
    return {str(name): number(value) for name, value in stored.items()} if isinstance(stored, dict) else {}


def read_with(run: Run) -> str:
    """The flags of a run as one line."""
    return "; ".join([*([] if run.done else ["UNFINISHED"]), *run.flags]) or "no flag"


def warning_notes(runs: Sequence[Run]) -> list[str]:
    """What is missing or odd about runs, each line under the name of its run."""
    return [f"{run.name}: {line}" for run in runs for line in run.warnings]


def _unlike(first: Run, other: Run, unlike: Callable[[Run, Run], str]) -> str:
    if not (first.done and other.done):
        return "not both are finished"
    return unlike(first, other)


def _reasons(runs: Sequence[Run], reasons: Sequence[str]) -> list[str]:
    return [
        f"{run.name}: no differences to {runs[0].name}: {reason}"
        for run, reason in zip(runs, reasons, strict=True)
        if reason
    ]
