"""What a run says: metrics that survive a restart, names that cannot break a line, pictures and curves."""

import importlib.machinery
import importlib.util
import io
import json
import logging
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import shown
from core.log import LogConfig, ProgressBar, RunLog, console_logging, draw_curves, duration, read_metrics


def run_log(folder: Path) -> RunLog:
    return RunLog(folder, LogConfig(tensorboard=False))


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    log.open(0, "run", {})
    for step in (1, 2, 3, 4):
        log.metrics(step, {"train/loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # cut off by a crash
    log = run_log(tmp_path)
    log.open(2, "run", {})
    log.metrics(3, {"train/loss": 0.25})
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_a_run_that_died_before_its_first_checkpoint_logs_its_start_anew(tmp_path: Path) -> None:
    for _ in range(2):
        log = run_log(tmp_path)
        log.open(-1, "run", {})
        log.metrics(0, {"eval/loss": 1.0})
        log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_metrics_are_strict_json_even_when_not_finite(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    log.open(0, "run", {})
    log.metrics(1, {"train/loss": float("nan"), "train/norm": float("inf")})
    log.close()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "train/loss": None, "train/norm": None}


def test_foreign_names_are_one_printable_line() -> None:
    for name in ("a\nb", "\x1b[31mred", "\u202eevil", "ok\udcff.jpg", "tab\t"):
        text = shown(name)
        assert text.isprintable() and len(text.splitlines()) == 1
    assert shown("größe/ß 1.jpg") == "größe/ß 1.jpg"
    assert shown("a\nb") == "a\\nb"


def test_log_lines_are_not_read_as_markup(tmp_path: Path) -> None:
    with console_logging() as console:
        console.file = io.StringIO()
        logging.getLogger("rcmae").warning("%s", "[bold]x[/bold] [/] :smile:")
        assert "[bold]x[/bold] [/] :smile:" in console.file.getvalue()


def test_without_a_terminal_progress_is_lines() -> None:
    with console_logging() as console:
        console.file = io.StringIO()
        bar = ProgressBar(console, 100, 0)
        bar.advance(20)
        bar.show(20, "short", "loss 1", 3700.4)
        bar.stop()
        assert "step 20/100  eta 1:01:40  loss 1" in console.file.getvalue()
        assert "short" not in console.file.getvalue()
    assert duration(59.6) == "0:01:00"


def test_pictures_and_curves_are_real_images(tmp_path: Path) -> None:
    log = run_log(tmp_path)
    log.open(0, "run", {})
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = log.picture(7, "reconstructions", pixels)
    log.close()
    assert path.name == "reconstructions_0000007.png"
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    rows = [{"step": i, "epoch": i / 4, "train/loss": 1 / (i + 1), "speed/images_per_s": 5.0} for i in range(9)]
    rows.append({"step": 9, "probe/knn_top1_pct": 10.0, "train/loss": None})
    draw_curves(rows, tmp_path / "curves.png", "a run")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    assert not list(tmp_path.glob("*.tmp*"))


def test_wandb_without_its_package_is_told_before_the_run() -> None:
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(ValueError, match=r"wandb is not installed; pip install"):
            LogConfig(wandb_project="x")
    assert LogConfig().wandb_project is None


def test_wandb_is_given_an_id_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict] = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **arguments: given.append(arguments) or types.SimpleNamespace(finish=lambda: None)
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    names = ["photos_1.5-b", "a/b#?%:", "x" * 255, "y" * 255]
    for name in names:
        log = RunLog(tmp_path, LogConfig(tensorboard=False, wandb_project="p"))
        log.open(0, name, {})
        log.close()
    ids = [one["id"] for one in given]
    assert [one["name"] for one in given] == names and ids[0] == names[0] and len(set(ids)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", id_) for id_ in ids)
