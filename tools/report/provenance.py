"""The chapters on where runs come from: code, data, weights, machine and time; flags and warnings; configurations."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from core.errors import shown
from tools.report.blocks import DASH, Block, Cell, Notes, Row, Section, Table, Unfolded
from tools.report.formats import count, seconds, several, text
from tools.report.measured import threads_text, training_seconds, vit_text
from tools.report.runs import MAX_NAME, ORDER, STAGES, Run, in_order, inside, maker_of
from tools.report.sweeps import flag_lines

MAX_DIFFERENCES = 60  # keys of a table of configurations
MAX_CONFIG_CHARS = 12_000
_PLACES = ("out", "cache")  # keys that say where something lies, and nothing about what is computed


def provenance(runs: Sequence[Run]) -> Section:
    """What was made of what, with which code, where, when and for how long."""
    ordered = in_order(runs)
    rows = [Row(run.name, [Cell(one, words=True) for one in _origin(run, ordered)]) for run in ordered]
    columns = ["stage", "data", "starts from", "model", "code", "machine", "time"]
    notes = [
        "On the clock: from the first line of the log to the last, interruptions included. Of training: from the "
        "logged rates, without evaluations.",
    ]
    if any(len(shown(run.path.name)) > MAX_NAME for run in ordered):
        notes.append("Long names are cut in their middle; each configuration at the end begins with the whole folder.")
    blocks: list[Block] = [Table("Where each run comes from", columns, rows, notes, corner="run", cards=True)]
    said = []
    for run in ordered:
        flags = flag_lines(run) if run.kind == "robust" else run.flags
        said.append(Row(run.name, [Cell("; ".join(lines) or DASH, words=True) for lines in (flags, run.warnings)]))
    columns = ["its own flags", "missing, damaged or odd"]
    blocks.append(Table("Flags and warnings", columns, said, corner="run", cards=True))
    return Section("provenance", "What was made of what", blocks)


def _origin(run: Run, runs: Sequence[Run]) -> list[str]:
    digest = run.summary.get("backbone") or inside(run.results, "model", "digest")
    weights = f", weights {text(digest, 24)}" if isinstance(digest, str) and run.config.get("init") != "random" else ""
    return [
        run.stage,
        _data(run),
        starts_from(run, runs) + weights,
        _model(run),
        _code(run),
        _machine(run),
        _time(run),
    ]


def starts_from(run: Run, runs: Sequence[Run]) -> str:
    """The run that made the weights, where it is in the report; else their path."""
    if run.kind == "pretrain":
        return DASH
    if run.config.get("init") == "random":
        return "random weights"
    maker = maker_of(run, runs)
    return f"run {maker.name}" if maker is not None else (_short(run.source) if run.source else DASH)


def _data(run: Run) -> str:
    """The end of the path, and how many images; of detection the files of annotations."""
    keys = [
        key for key in ("data", "train_json", "train_labels", "val_json", "val_labels", "test_data") if run.given(key)
    ]
    where = ", ".join(_short(run.given(key)) for key in keys) or DASH
    told = []
    if run.train_images is not None and run.kind != "robust":
        told.append(f"{count(run.train_images)} images to learn from")
    if run.eval_images is not None:
        told.append(f"{count(run.eval_images)} to evaluate on")
    if run.fingerprint is not None:
        told.append(f"list {text(run.fingerprint, 24)}")
    return where + (f"; {', '.join(told)}" if told else "")


def _short(path: Any) -> str:
    """The last two parts of a path; the configuration below holds all of it."""
    parts = PurePath(str(path)).parts
    return text("/".join(parts[-2:]) or str(path), 160)


def _model(run: Run) -> str:
    size, described = run.model, inside(run.results, "model", "described")
    if isinstance(described, str):
        return text(described, 160)
    if not size:
        return text(run.config["model"], 40) if run.kind == "pretrain" and run.config.get("model") else DASH
    sides = size.get("img_size")
    px = " x ".join(text(side, 12) for side in sides) + " px" if isinstance(sides, list) else "unknown size"
    return f"{vit_text(run)}, {text(size.get('num_heads'), 12)} heads, {px}"


def _code(run: Run) -> str:
    commit = run.summary.get("git_commit") or run.results.get("git_commit") or run.env.get("git_commit")
    config = run.summary.get("config") or run.results.get("config") or inside(run.manifest, "info", "config")
    told = ["commit unknown"]
    if isinstance(commit, str):
        told = [f"commit {text(commit.rstrip('+'), 60)[:12]}" + (" with changes" if commit.endswith("+") else "")]
    told.append(f"configuration {text(config, 40) if config else 'unknown'}")
    return ", ".join([*told, f"seed {text(run.config['seed'], 24)}" if "seed" in run.config else "seed unknown"])


def _time(run: Run) -> str:
    told = [f"began {text(run.env['started'], 40)}"] if run.env.get("started") else []
    if run.log.wall_s is not None:
        told.append(f"{seconds(run.log.wall_s)} on the clock")
    trained = training_seconds(run)
    return ", ".join([*told, f"{seconds(trained)} of training"] if trained is not None else told) or DASH


def _machine(run: Run) -> str:
    env = run.env
    if not env:
        return DASH
    facts = {key: text(env.get(key, "?"), 40) for key in ("cpus", "instruction_set", "torch", "python")}
    gpu = f"GPU {text(env['gpu'], 60)}" if env.get("gpu") else "no GPU"
    return (
        f"{gpu}, {facts['cpus']} CPUs ({facts['instruction_set']}), {threads_text(run)}; torch "
        f"{facts['torch']}, Python {facts['python']}"
    )


# ---- configurations -------------------------------------------------------------------------------------------------


def configurations(runs: Sequence[Run], whole: bool) -> Section:
    """What differs between the configurations of a stage, and each in full. Args: whole: print them in full."""
    ordered = in_order(runs)
    blocks: list[Block] = []
    for kind in ORDER:
        group = [run for run in ordered if run.kind == kind and run.config]
        if len(group) > 1:
            blocks.append(_differences(group, STAGES[kind]))
    for run in ordered:
        command = run.env.get("command")
        said = " ".join(text(part, 400) for part in command[:60]) if isinstance(command, list) else "unknown"
        lines = list(_lines(run.config)) if whole else ["left out for the size of the page; config.yaml holds it"]
        if not run.config:
            lines = [f"config.yaml: {run.faults.get('config.yaml', 'empty')}"]
        body = "\n".join(lines)
        if len(body) > MAX_CONFIG_CHARS:
            body = f"{body[:MAX_CONFIG_CHARS]}\n... {len(body):,} characters in all; config.yaml holds the rest"
        whole_text = f"{text(str(run.path), 4000)}\n{text(said, 4000)}\n\n{body}"
        blocks.append(Unfolded(f"{run.name}: folder, command and configuration", whole_text))
    return Section("configurations", "Configurations", blocks)


def _differences(runs: Sequence[Run], stage: str) -> Table | Notes:
    flat = [dict(_flat(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key.partition(".")[0] not in _PLACES]
    unlike = [key for key in keys if len({one.get(key, DASH) for one in flat}) > 1]
    caption = f"What differs between the runs of {stage}"
    if not unlike:
        return Notes(caption, ["Nothing but where their files lie."])
    rows = [
        Row(text(key, 80), [Cell(one.get(key, DASH), words=True) for one in flat]) for key in unlike[:MAX_DIFFERENCES]
    ]
    notes = [f"{several(len(unlike) - MAX_DIFFERENCES, 'more key')} differ."] if len(unlike) > MAX_DIFFERENCES else []
    return Table(caption, [run.name for run in runs], rows, notes, corner="key")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", text("none" if value is None else value, 160)))
    return found


def _lines(tree: Mapping[str, Any]) -> list[str]:
    return [f"{text(key, 120)}: {value}" for key, value in _flat(tree)]
