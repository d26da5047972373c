"""`rcmae robust`: a model over a grid of sets, corruptions and severities; a killed sweep goes on where it stopped.

Every cell is a file of its own, written whole by the process that found it. Several processes share the cells that are
left, each doing whole ones; the first reads all files at the end.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from core.config import config_hash
from core.distributed import Planned, Processes, joined
from core.errors import ConfigError, MachineError, Preempted, shown
from core.files import FileSystem, replace_file, require_space
from core.flags import stop_signal
from core.loader import worker_faults
from core.log import console_logging, duration
from core.machine import choose_device, code_digest, environment, git_commit
from core.run_directory import RunDirectory
from core.start import choose_workers
from core.watch import EVALUATING
from core.worker import earlier_faults, note_run
from robustness.cell_evaluator import CellEvaluator, Setting
from robustness.corruptions.apply import MIN_SIDE
from robustness.corruptions.textures import load_textures
from robustness.evaluation import Reading
from robustness.grid import CORRUPTED_HERE, Cell, CellStore, open_sets, plan_cells
from robustness.report import draw_heat_map, flag_text, markdown
from robustness.results import SetResult, flat, set_results
from robustness.settings import HARMLESS_KEYS, RobustConfig
from robustness.subject import load_subject

ROOM_BYTES = 32 * 2**20  # for cells, table and picture
# Keys that may differ between machines: where things lie. What they hold is compared.
PLACES = {"data", "labels", "cache", "paths", "model", "backbone", "frost_textures"}

logger = logging.getLogger("rcmae")


def robust(config: RobustConfig, fs: FileSystem | None = None) -> dict[str, Any]:
    """Evaluate every cell of the grid that is still to be done, and write results.json, results.md and heatmap.png.

    Args:
        fs: file layer of the cells; tests pass one that crashes.
    Returns: the content of results.json.
    Raises: the errors of `core.errors`, each with the exit code of its kind.
    """
    with joined(config.loader.timeout_s) as processes, console_logging(processes.is_main):
        facts = environment()
        processes.agree({"code": code_digest(), **{key: facts[key] for key in ("torch", "torchvision", "numpy")}})
        values = config.model_dump(mode="json", exclude=PLACES)
        processes.agree({f"configuration: {key}": value for key, value in values.items()})
        setting = processes.first_on_each_machine(lambda: settle(config, processes))
        processes.agree({"the cells": [cell.file_name for cell in setting.cells]})
        with _claimed(config, processes) as directory:
            store = CellStore(config.out / "cells", fs)
            processes.on_main(store.make)
            for line in header(setting, store, processes.size):
                logger.info("%s", line)
            sweep(setting, store, processes)
            return processes.on_main(lambda: _finish(setting, store, directory))


def dry_run(config: RobustConfig, num_processes: int = 1) -> list[str]:
    """The header of a sweep that is not started. Raises what the start would raise about model and data."""
    with console_logging():
        setting = settle(config, Planned(size=num_processes, local_size=num_processes))
        return header(setting, CellStore(config.out / "cells"), num_processes)


def settle(config: RobustConfig, processes: Processes) -> Setting:
    """Load the model, open the sets, lay out the grid. Raises: CheckpointError, ConfigError, DataError."""
    device = choose_device(config.device, processes.local_rank)
    subject = load_subject(config, device)
    made = set(config.benchmarks) & set(CORRUPTED_HERE)
    if made and "frost" in config.corruption_names():
        load_textures(config.frost_textures)  # missing ones are to be told now, not after hours
    if config.corrupts_input() and made - {"imagenet_c_otf"} and min(subject.img_size) < MIN_SIDE:
        raise ConfigError(f"corrupt=input: corruptions need {MIN_SIDE} px, the model takes {min(subject.img_size)}")
    sets = open_sets(config, subject)
    workers = choose_workers(config.loader, device, processes)
    reading = Reading(
        config.batch_size, workers, config.loader.timeout_s, config.loader.max_pixels, int(config.keep_gib * 2**30)
    )
    return Setting(config, subject, sets, plan_cells(config, subject, sets), device, reading, git_commit())


@contextmanager
def _claimed(config: RobustConfig, processes: Processes) -> Iterator[RunDirectory | None]:
    """Own `out=` while open, with robust.log in it; the directory on the first process, None on the others."""
    owned: list[tuple[RunDirectory, logging.Handler]] = []

    def claim() -> None:
        directory = RunDirectory(config.out, config, HARMLESS_KEYS)
        note_run(config.out)
        handler = logging.FileHandler(config.out / "robust.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        owned.append((directory, handler))
        require_space(config.out, ROOM_BYTES, "the results of a sweep")
        for fault in earlier_faults():
            logger.warning("started again: %s", fault)

    try:
        processes.on_main(claim)
        yield owned[0][0] if owned else None
    finally:
        for directory, handler in owned:
            logger.removeHandler(handler)
            handler.close()
            directory.close()


# --- the sweep ------------------------------------------------------------------------------------------------------


class _Stopped(Exception):  # noqa: N818  no error
    """A signal asked this process to stop."""


def sweep(setting: Setting, store: CellStore, processes: Processes) -> None:
    """Do the cells that are left, dealt out by index over the processes. Raises: Preempted after a signal to stop."""
    cells = setting.cells
    todo = processes.on_main(lambda: [i for i, cell in enumerate(cells) if store.read(cell) is None])
    mine = todo[processes.rank :: processes.size]
    begun = time.monotonic()
    with stop_signal() as stopped, worker_faults():

        def beat() -> None:
            processes.enter(EVALUATING)
            if stopped:
                raise _Stopped

        evaluator = CellEvaluator(setting, beat)
        try:
            for done, index in enumerate(mine, start=1):
                content = evaluator.evaluate(cells[index])
                store.write(cells[index], content)
                left_s = (time.monotonic() - begun) / done * (len(mine) - done)
                logger.info("%s", _progress(cells[index], content, done, len(mine), left_s))
        except _Stopped:
            pass
        received = processes.gather(stopped[:1])
    signals = [name for names in received for name in names]
    if signals:
        raise Preempted(f"stopped by {signals[0]}; every finished cell is kept, the same command goes on")


def _progress(cell: Cell, content: Mapping[str, Any], done: int, total: int, left_s: float) -> str:
    figures = content["figures"]
    name = next(key for key in ("cosine", "error_pct", "top1_pct") if key in figures)
    return (
        f"cell {done}/{total}  {cell}: {name} {figures[name]:.4g}  {content['seconds']:.1f} s  eta {duration(left_s)}"
    )


# --- before and after -----------------------------------------------------------------------------------------------


def header(setting: Setting, store: CellStore, num_processes: int) -> list[str]:
    """Everything that was decided, one line each."""
    config, subject = setting.config, setting.subject
    left = sum(store.read(cell) is None for cell in setting.cells)
    shared = f", shared by {num_processes} processes" if num_processes > 1 else ""
    height, width = subject.img_size
    lines = [
        f"model      {subject.name}: {f'{len(subject.classes)} classes' if subject.classes else 'a backbone'}, "
        f"{height}x{width} px, crop {subject.crop_ratio:g}, digest {subject.digest}"
    ]
    for name, opened in setting.sets.items():
        some = "" if len(opened.source) == opened.total else f", a SUBSET of {opened.total}"
        count = sum(cell.set == name for cell in setting.cells)
        where = shown(str(config.paths.imagenet_c) if name == "imagenet_c" else opened.source.origin)
        labels = opened.source.labels
        classes = "" if labels is None else f" of {len(set(labels.tolist()))} classes"
        lines.append(f"set        {name}: {where}, {len(opened.source)} images{classes}{some}; {count} cells")
    return [
        *lines,
        f"grid       {len(setting.cells)} cells, {len(setting.cells) - left} done, {left} to do{shared}",
        f"machine    {setting.device}, {torch.get_num_threads()} threads, precision {subject.precision}, "
        f"{setting.reading.num_workers} loader workers{' each' if shared else ''}, torch {torch.__version__}",
        f"out        {shown(config.out)}",
    ]


def _finish(setting: Setting, store: CellStore, directory: RunDirectory | None) -> dict[str, Any]:
    """Read all cells, and write what they say; the first process alone."""
    assert directory is not None, "only the first process writes"
    found = [(cell, store.read(cell)) for cell in setting.cells]
    cells = [(cell, content) for cell, content in found if content is not None]
    if len(cells) < len(found):
        missing = len(found) - len(cells)
        raise MachineError(f"{shown(directory.path)}: {missing} cells of other processes are not there; share out=")
    results = set_results(cells, setting.subject)
    content = _content(setting, results, [content for _, content in cells])
    _write(directory.path, setting, results, content)
    directory.write_summary({"status": "done", **{key: value for key, value in content.items() if key != "cells"}})
    logger.info("done: %s holds results.md, results.json and the cells", shown(directory.path))
    return content


def _content(setting: Setting, results: Mapping[str, SetResult], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    config, subject = setting.config, setting.subject
    return {
        "figures": flat(results),
        "refused": {f"{name}/{key}": why for name, result in results.items() for key, why in result.refused.items()},
        "flags": {name: dict(result.flags) for name, result in results.items()},
        "model": {"path": subject.name, "digest": subject.digest, "img_size": list(subject.img_size)},
        "config": config_hash(config),
        "seed": config.seed,
        "git_commit": setting.commit,
        "commits_of_cells": list(dict.fromkeys(cell["git_commit"] for cell in cells)),
        "cells": list(cells),
    }


def _write(folder: Path, setting: Setting, results: Mapping[str, SetResult], content: Mapping[str, Any]) -> None:
    subject, commits = setting.subject, content["commits_of_cells"]
    name = Path(subject.name).name
    facts = [
        f"model `{subject.name}`, digest {subject.digest}, {subject.img_size[0]}x{subject.img_size[1]} px, "
        f"crop {subject.crop_ratio:g}",
        f"configuration {content['config']}, seed {content['seed']}, commit {content['git_commit'] or 'unknown'}"
        + (f"; CELLS OF {len(commits)} COMMITS: {', '.join(map(str, commits))}" if len(commits) > 1 else ""),
    ]
    for title, result in results.items():
        logger.info("%s: %s", title, _headline(result))
    replace_file(folder / "results.md", markdown(name, facts, results).encode())
    replace_file(folder / "results.json", json.dumps(content, indent=1).encode())
    if any(result.grid for result in results.values()):
        draw_heat_map(folder / "heatmap.png", name, results)


def _headline(result: SetResult) -> str:
    keys = (
        "mce_pct", "mean_error_pct", "part_mean_error_pct", "mean_cosine", "part_mean_cosine", "top1_pct",
        "real_top1_pct", "rms_calibration_pct", "aurra_pct",
    )  # fmt: skip
    figures = [f"{key} {result.figures[key]:.4g}" for key in keys if key in result.figures]
    refused = [f"no {key}: {why}" for key, why in result.refused.items()]
    return f"{', '.join(figures)} ({flag_text(result.flags)})" + "".join(f"; {line}" for line in refused)
