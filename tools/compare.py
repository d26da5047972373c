"""`rcmae compare`: RC-MAE, RC-MAE with a mask of the teacher's own, and MAE, over seeds, on one plot.

Each run is the ordinary `rcmae pretrain` in a process of its own, so that its memory is its own; given again, the
command goes on where it was stopped and draws what is finished.
"""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.config import read_yaml
from core.errors import ConfigError, Preempted, shown
from core.files import replace_file
from core.flags import stop_signal
from core.log import read_metrics
from core.plots import plot
from tools.commands import begin_command, failure

# What a recipe says of a teacher is taken back for MAE, which has none.
_NO_TEACHER = ["gamma=1", "momentum=0.996", "teacher.mask=same", "teacher.schedule=constant", "teacher.update=step"]
METHODS = {
    "rc_mae": ["method=rc_mae", "teacher.mask=same"],
    "rc_mae_own_mask": ["method=rc_mae", "teacher.mask=own"],
    "mae": ["method=mae", *_NO_TEACHER],
}
COLOURS = {"rc_mae": "tab:red", "rc_mae_own_mask": "tab:orange", "mae": "tab:blue"}
PROBES = {"probe/knn_top1_pct": "k-NN top-1, %", "probe/linear_top1_pct": "linear probe top-1, %"}
OWN_KEYS = ("method", "seed", "out", "teacher.mask")


@dataclass(frozen=True)
class Curve:
    """What one finished run logged: probes over images seen and over training time, and what it cost."""

    method: str
    seed: int
    images: list[int]
    minutes: list[float]  # of training; probes and pictures are not counted
    probes: dict[str, list[float]]
    images_per_s: float  # median over log intervals
    memory_gib: float


def compare(
    path: Path, overrides: Sequence[str], out: Path, seeds: Sequence[int], methods: Sequence[str], jobs: int
) -> None:
    """Train every method with every seed below `out`, `jobs` at a time, then draw and print the comparison.

    Raises: ConfigError; the error of a run that failed; Preempted after a signal.
    """
    given = {text.partition("=")[0] for text in overrides}
    for key in OWN_KEYS:
        if key in given:
            raise ConfigError(f"{key}: is set for each run by compare; leave it out, and see --methods, --seeds, --out")
    if not any(key in given for key in ("probe.data", "probe")):
        raise ConfigError("probe.data: compare needs labelled images; give probe.data=FOLDER or tar")
    runs = {_name(method, seed): (method, seed) for seed in seeds for method in methods}
    out.mkdir(parents=True, exist_ok=True)
    common = [str(path), *overrides]
    commands = {n: [*common, *METHODS[m], f"seed={seed}", f"out={out / n}"] for n, (m, seed) in runs.items()}
    codes = _train(commands, out, jobs)
    for name, code in codes.items():
        if code not in (0, Preempted.exit_code):
            raise failure(code, _log(out, name))
    if len(codes) < len(runs) or any(codes.values()):
        raise Preempted("stopped; finished steps are saved, the same command goes on")
    curves = [read_curve(out / name, *run) for name, run in runs.items()]
    _draw(curves, out / "comparison.png")
    _report(curves, out)


def _train(commands: dict[str, list[str]], out: Path, jobs: int) -> dict[str, int]:
    """Carry out the runs, so many at a time; the exit codes of those that were begun. A signal stops all."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    waiting, running, codes = list(commands), dict[str, subprocess.Popen](), dict[str, int]()
    with stop_signal() as stopped:
        while running or (waiting and not stopped):
            while waiting and len(running) < jobs and not stopped:
                name = waiting.pop(0)
                running[name] = begin_command(["pretrain", *commands[name]], _log(out, name), threads)
            if stopped and stopped[-1] != "passed on":
                stopped.append("passed on")
                for process in running.values():
                    process.terminate()
            time.sleep(0.1)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                codes[name] = running.pop(name).returncode
                print(f"{name}: {'done' if codes[name] == 0 else f'ended with code {codes[name]}'}", flush=True)
    return codes


def _name(method: str, seed: int) -> str:
    return f"{method}_seed{seed}"


def _log(out: Path, name: str) -> Path:
    return out / f"{name}.log"


def read_curve(run: Path, method: str, seed: int) -> Curve:
    """The curve of one run directory."""
    batch_size = int(read_yaml(run / "config.yaml")[0]["batch_size"])
    steps, seconds, rates, memory = [0], [0.0], [], []
    probed: list[dict[str, float]] = []
    for row in read_metrics(run / "metrics.jsonl"):
        if "speed/images_per_s" in row:
            rates.append(row["speed/images_per_s"])
            memory.append(row["speed/memory_gib"])
            seconds.append(seconds[-1] + (row["step"] - steps[-1]) * batch_size / rates[-1])
            steps.append(int(row["step"]))
        if all(name in row for name in PROBES):
            probed.append(row)
    at = [int(row["step"]) for row in probed]
    return Curve(
        method=method,
        seed=seed,
        images=[step * batch_size for step in at],
        minutes=[float(x) / 60 for x in np.interp(at, steps, seconds)],
        probes={name: [row[name] for row in probed] for name in PROBES},
        images_per_s=statistics.median(rates),
        memory_gib=max(memory),
    )


def _report(curves: Sequence[Curve], out: Path) -> None:
    methods = list(dict.fromkeys(curve.method for curve in curves))

    def mean(method: str, figure: str) -> float:
        return statistics.fmean(getattr(curve, figure) for curve in curves if curve.method == method)

    starts = [_spread([curve.probes[name][0] for curve in curves]) for name in PROBES]
    seeds = sorted({curve.seed for curve in curves})
    print(f"after {curves[0].images[-1]:,} images; seeds {', '.join(map(str, seeds))}: mean, and half the range")
    print(f"{'':16} {'k-NN, %':>12} {'linear, %':>12} {'images/s':>9} {'GiB':>6}  teacher's share of time, memory")
    print(f"{'at start':16} {starts[0]:>12} {starts[1]:>12}")
    for method in methods:
        chosen = [curve for curve in curves if curve.method == method]
        knn, linear = (_spread([curve.probes[name][-1] for curve in chosen]) for name in PROBES)
        share = ""
        if method != "mae" and "mae" in methods:
            time_share = 1 - mean(method, "images_per_s") / mean("mae", "images_per_s")
            memory_share = 1 - mean("mae", "memory_gib") / mean(method, "memory_gib")
            share = f"{100 * time_share:.0f} %, {100 * memory_share:.0f} %"
        speed, memory = mean(method, "images_per_s"), mean(method, "memory_gib")
        print(f"{method:16} {knn:>12} {linear:>12} {speed:9.0f} {memory:6.2f}  {share}")
    record: list[dict[str, Any]] = [vars(curve) for curve in curves]
    replace_file(out / "comparison.json", json.dumps(record, indent=1).encode())
    print(f"{shown(out / 'comparison.png')} and comparison.json hold all curves")


def _spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} +- {(max(values) - min(values)) / 2:.1f}"


def _draw(curves: Sequence[Curve], path: Path) -> None:
    seeds = ", ".join(str(seed) for seed in sorted({curve.seed for curve in curves}))
    with plot(path, (11, 8), f"Frozen features of the exported branch; seeds {seeds}") as figure:
        figure.set_layout_engine("constrained")
        panels = figure.subplots(len(PROBES), 2, sharey="row")
        for row, (name, title) in zip(panels, PROBES.items(), strict=True):
            row[0].set_ylabel(title)
            row[0].set_xlabel("images seen")
            row[1].set_xlabel("minutes of training")
            start = statistics.fmean(curve.probes[name][0] for curve in curves)
            for axes, along in zip(row, ("images", "minutes"), strict=True):
                named: set[str] = set()
                for curve in curves:
                    label = None if curve.method in named else curve.method.replace("_", " ")
                    named.add(curve.method)
                    style = {"color": COLOURS[curve.method], "marker": ".", "linewidth": 1.2}
                    axes.plot(getattr(curve, along), curve.probes[name], label=label, **style)
                axes.axhline(start, color="grey", linestyle="--", linewidth=1, label="random initialisation")
                axes.grid(alpha=0.3)
            row[0].legend(fontsize=8)
