"""`rcmae robust`: a model over a grid of sets, corruptions and severities; a killed sweep goes on where it stopped.

Every cell is a file of its own, written whole by the process that found it. Several processes share the cells that are
left, each doing whole ones; the first reads all files at the end.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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
from core.machine import choose_device, git_commit
from core.model_directory import kind_of
from core.run_directory import RunDirectory
from core.start import agree_on_code, choose_workers
from core.watch import EVALUATING
from core.worker import earlier_faults, note_run
from robustness.cell_evaluator import Beat, CellEvaluator, ClassifierCells, Examine, Setting
from robustness.corruptions.apply import MIN_SIDE
from robustness.corruptions.textures import load_textures
from robustness.dense import Dense, DenseCells
from robustness.dense_models import open_detector, open_segmentor
from robustness.evaluation import Reading
from robustness.grid import CORRUPTED_HERE, Cell, CellStore, OpenSet, open_sets, plan_cells
from robustness.reference import read_reference
from robustness.report import draw_heat_map, flag_text, markdown
from robustness.results import SetResult, flat, set_results
from robustness.settings import HARMLESS_KEYS, Kind, RobustConfig
from robustness.subject import Subject, Tested, load_subject
from transfer.detection.detector import KIND as DETECTOR
from transfer.segmentation.directory import KIND as SEGMENTOR

ROOM_BYTES = 32 * 2**20  # for cells, table and picture
# Keys that may differ between machines: where things lie. What they hold is compared.
PLACES = {
    "data", "labels", "val_json", "val_images", "val_labels", "reference", "cache", "paths", "model", "backbone",
    "frost_textures",
}  # fmt: skip
# By what a model directory says that it is; what says nothing is a classifier, or no model.
OPENERS: dict[str, tuple[Kind, Callable[[RobustConfig, torch.device, Reading], Dense]]] = {
    DETECTOR: ("detector", open_detector),
    SEGMENTOR: ("segmentor", open_segmentor),
}

logger = logging.getLogger("rcmae")


def robust(config: RobustConfig, fs: FileSystem | None = None) -> dict[str, Any]:
    """Evaluate every cell of the grid that is still to be done, and write results.json, results.md and heatmap.png.

    Args:
        fs: file layer of the cells; tests pass one that crashes.
    Returns: the content of results.json.
    Raises: the errors of `core.errors`, each with the exit code of its kind.
    """
    with joined(config.loader.timeout_s) as processes, console_logging(processes.is_main):
        agree_on_code(processes)
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
    stated = None if config.model is None else kind_of(config.model)
    opener = OPENERS.get(stated or "")
    workers = choose_workers(config.loader, device, processes)
    reading = Reading(
        config.batch_size, workers, config.loader.timeout_s, config.loader.max_pixels, int(config.keep_gib * 2**30)
    )
    if opener is None:
        subject: Tested = (classifier := load_subject(config, device))
        _require_own_keys(config, subject.kind)
        _require_corruptible(config, classifier)
        sets: Mapping[str, OpenSet] = open_sets(config, classifier)
        begin: Callable[[Beat], Examine] = partial(ClassifierCells, config, classifier, sets, device, reading)
    else:
        kind, open_dense = opener
        _require_own_keys(config, kind)
        _require_textures(config)
        dense = open_dense(config, device, reading)
        subject, sets = dense.model, {"corruptions": dense.images}
        begin = partial(DenseCells, dense, config, device, reading)
    cells = plan_cells(config, subject, sets)
    reference = None if config.reference is None else read_reference(config.reference, cells)
    return Setting(config, subject, sets, cells, device, reading, git_commit(), begin, reference)


def _require_own_keys(config: RobustConfig, kind: Kind) -> None:
    if faults := list(config.foreign_to(kind)):
        raise ConfigError("\n".join(faults))


def _require_corruptible(config: RobustConfig, subject: Subject) -> None:
    """Raise what would only be met after hours."""
    made = set(config.benchmarks) & set(CORRUPTED_HERE)
    if made:
        _require_textures(config)
    if config.corrupts_input() and made - {"imagenet_c_otf"} and min(subject.img_size) < MIN_SIDE:
        raise ConfigError(f"corrupt=input: corruptions need {MIN_SIDE} px, the model takes {min(subject.img_size)}")


def _require_textures(config: RobustConfig) -> None:
    if "frost" in config.corruption_names():
        load_textures(config.frost_textures)


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
    names = [key for key in ("cosine", "error_pct", "box_ap", "mask_ap", "miou_pct") if key in figures]
    told = " ".join(f"{name} {figures[name]:.4g}" for name in names or ["top1_pct"])
    return f"cell {done}/{total}  {cell}: {told}  {content['seconds']:.1f} s  eta {duration(left_s)}"


# --- before and after -----------------------------------------------------------------------------------------------


def header(setting: Setting, store: CellStore, num_processes: int) -> list[str]:
    """Everything that was decided, one line each."""
    config, subject = setting.config, setting.subject
    left = sum(store.read(cell) is None for cell in setting.cells)
    shared = f", shared by {num_processes} processes" if num_processes > 1 else ""
    lines = [f"model      {subject.name}: {subject.described()}, digest {subject.digest}"]
    if setting.reference is not None:
        lines.append(f"reference  {setting.reference.path}: model {setting.reference.digest}")
    for name, opened in setting.sets.items():
        what = "a SUBSET" if config.sample is None else f"a development SAMPLE by seed {config.seed}"
        some = "" if len(opened.source) == opened.total else f", {what} of {opened.total}"
        count = sum(cell.set == name for cell in setting.cells)
        where = shown(str(config.paths.imagenet_c) if name == "imagenet_c" else opened.source.origin)
        labels = opened.source.labels if subject.kind == "classifier" else None  # else they are no classes
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
    results = set_results(cells, setting.subject, setting.reference)
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
        "model": {
            "path": subject.name,
            "digest": subject.digest,
            "img_size": list(subject.img_size),
            "kind": subject.kind,
            "described": subject.described(),
        },
        "reference": None
        if setting.reference is None
        else {
            "path": setting.reference.path,
            "digest": setting.reference.digest,
        },
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
        f"model `{subject.name}`, digest {subject.digest}, {subject.described()}",
        f"configuration {content['config']}, seed {content['seed']}, commit {content['git_commit'] or 'unknown'}"
        + (f"; CELLS OF {len(commits)} COMMITS: {', '.join(map(str, commits))}" if len(commits) > 1 else ""),
    ]
    if setting.reference is not None:
        facts.append(f"reference `{setting.reference.path}`, model {setting.reference.digest}")
    for title, result in results.items():
        logger.info("%s: %s", title, _headline(result))
    replace_file(folder / "results.md", markdown(name, facts, results, subject.classes).encode())
    replace_file(folder / "results.json", json.dumps(content, indent=1).encode())
    if any(result.grids for result in results.values()):
        draw_heat_map(folder / "heatmap.png", name, results)


def _headline(result: SetResult) -> str:
    keys = (
        "mce_pct", "mean_error_pct", "part_mean_error_pct", "mean_cosine", "part_mean_cosine", "top1_pct",
        "real_top1_pct", "rms_calibration_pct", "aurra_pct", "box_ap", "box_mpc_pct", "box_rpc_pct", "part_mean_box_ap",
        "mask_ap", "mask_mpc_pct", "mask_rpc_pct", "part_mean_mask_ap", "miou_pct", "mpc_pct", "rpc_pct",
        "part_mean_miou_pct", "mean_cd_pct", "mean_rcd_pct", "part_mean_cd_pct", "part_mean_rcd_pct",
    )  # fmt: skip
    figures = [f"{key} {result.figures[key]:.4g}" for key in keys if key in result.figures]
    refused = [f"no {key}: {why}" for key, why in result.refused.items()]
    return f"{', '.join(figures)} ({flag_text(result.flags)})" + "".join(f"; {line}" for line in refused)
