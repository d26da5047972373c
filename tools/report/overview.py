"""The chapters about all runs at once: the story in ten lines, speed and memory."""

from collections.abc import Sequence
from typing import Any

from tools.report import classification, dense, pretraining, sweeps
from tools.report.blocks import DASH, Block, Cell, Notes, Row, Section, Table
from tools.report.formats import count, gibibytes, number, percent, seconds, several, shown_by, text, three
from tools.report.measured import data_name, median_of, peak_memory, threads_text, training_seconds
from tools.report.provenance import starts_from
from tools.report.runs import ORDER, STAGES, Inputs, Run, in_order, inside

STORY_LINES = 10
_HEADLINES = {
    "pretrain": pretraining.headline, "classify": classification.headline, "detect": dense.headline,
    "segment": dense.headline, "robust": sweeps.headline,
}  # fmt: skip


def story(inputs: Inputs) -> Section:
    """The whole story in ten lines."""
    runs = in_order(inputs.runs)
    rows = []
    for run in runs[:STORY_LINES]:
        cells = [run.stage, data_name(run) or DASH, headline(run), starts_from(run, runs), run.state, _care(run)]
        rows.append(Row(run.name, [Cell(one, words=True) for one in cells]))
    notes = list(inputs.notes)
    if len(runs) > STORY_LINES:
        more = ", ".join(run.name for run in runs[STORY_LINES:])
        notes.append(f"{several(len(runs) - STORY_LINES, 'more run')} below: {text(more, 600)}")
    columns = ["stage", "data", "result", "starts from", "state", "read with"]
    blocks: list[Block] = [Table("The whole story", columns, rows, notes, corner="run", cards=True)]
    return Section("story", "In ten lines", blocks, _counted(runs))


def _counted(runs: Sequence[Run]) -> str:
    stages = [(STAGES[kind], sum(run.kind == kind for run in runs)) for kind in ORDER]
    told = ", ".join(f"{amount} of {stage}" for stage, amount in stages if amount)
    unfinished = sum(not run.done for run in runs)
    warned = sum(bool(run.warnings) for run in runs)
    state = f"{several(unfinished, 'is', 'are')} not finished." if unfinished else "All are finished."
    care = f"{several(warned, 'has', 'have')} something to be read with care, told where the figures are."
    return f"{several(len(runs), 'run')}: {told}. {state}" + (f" {care}" if warned else "")


def headline(run: Run) -> str:
    """The result of a run of any stage in a few words."""
    told = _HEADLINES[run.kind](run) if run.kind in _HEADLINES else ""
    if not told:
        return "no figure yet" if not run.done else "no figure"
    return told if run.done else f"so far: {told}"


def _care(run: Run) -> str:
    notable = [flag for flag in run.flags if not flag.startswith(("precision", "device", "evaluated in", "probe on"))]
    notable += sweeps.cautions(run) if run.kind == "robust" else []
    return "; ".join([*notable, *([several(len(run.warnings), "warning")] if run.warnings else [])]) or DASH


# ---- speed and memory -----------------------------------------------------------------------------------------------


def throughput(runs: Sequence[Run]) -> Section:
    """Images per second, waiting, memory and time of every run that logs them."""
    ordered = in_order(runs)
    rows = []
    for run in (run for run in ordered if run.rows and not run.only_evaluated):
        figures = [
            shown_by(count, run.batch_size),
            shown_by(three, median_of("speed/images_per_s")(run)),
            shown_by(percent, median_of("speed/data_wait_pct")(run)),
            shown_by(gibibytes, peak_memory(run)),
            shown_by(count, run.images_seen),
            shown_by(seconds, training_seconds(run)),
        ]
        rows.append(Row(run.name, [Cell(run.stage, words=True), *map(Cell, figures), Cell(_hardware(run), words=True)]))
    columns = [
        "stage", "batch", "images/s, median", "waiting for data, %", "peak memory, GiB", "images seen",
        "time of training", "on",
    ]  # fmt: skip
    notes = [
        "Rates are of all processes together, memory of the largest one. No published row stands here: none is of this "
        "machine."
    ]
    blocks: list[Block] = [Notes("Training", ["No run has logged a rate yet."])]
    if rows:
        blocks = [Table("Training", columns, rows, notes, corner="run", cards=True)]
    swept = [row for run in ordered if run.kind == "robust" for row in _swept(run)]
    if swept:
        columns = ["cells", "images per cell", "time of all cells", "images/s", "corrupting, % of the time", "on"]
        note = "Time is the sum over the cells; several processes share it. A cell reads, corrupts and evaluates."
        blocks.append(Table("Sweeps", columns, swept, [note], corner="run", cards=True))
    return Section("throughput", "Throughput and memory", blocks)


def _swept(run: Run) -> list[Row]:
    stored = run.results.get("cells")
    cells: Sequence[Any] = stored if isinstance(stored, list) else run.cells
    known = [(number(cell.get("seconds")), number(cell.get("images"))) for cell in cells if isinstance(cell, dict)]
    timed = [(passed, images) for passed, images in known if passed and images]
    if not timed:
        return []
    passed, images = sum(one for one, _ in timed), sum(one for _, one in timed)
    each = sorted({round(one) for _, one in timed})
    spent = [number(cell.get("corrupting_s")) for cell in cells if isinstance(cell, dict)]
    spent_text = DASH if None in spent else percent(100 * sum(one or 0.0 for one in spent) / passed)
    span = count(each[0]) if len(each) == 1 else f"{each[0]:,} to {each[-1]:,}"
    figures = [count(len(timed)), span, seconds(passed), three(images / passed), spent_text]
    return [Row(run.name, [*map(Cell, figures), Cell(_hardware(run), words=True)])]


def _hardware(run: Run) -> str:
    gpu = run.env.get("gpu")
    device = inside(run.manifest, "info", "device") or next(
        (flag.removeprefix("device ") for flag in run.flags if flag.startswith("device ")), None
    )
    if gpu and device != "cpu":
        return text(gpu, 60)
    return f"CPU, {threads_text(run)}" if run.env else DASH
