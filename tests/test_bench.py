"""Benchmarks: that they compare what they say they compare, and print what can be read by a program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from core.errors import ConfigError
from pretrain.settings import PretrainConfig
from tests.tiny import draw_images, interrupted, tiny_overrides
from tools import bench
from tools.bench import Row, random_batch, suite_run
from tools.cli import app
from tools.compare import read_curve

FIELDS = {"name", "ratio", "images_per_s", "baseline_images_per_s", "mfu", "peak_memory_gib", "device", "versions"}


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def sizes() -> list[str]:
    return [text for text in tiny_overrides(Path("x"), Path("x")) if not text.startswith(("data=", "out="))]


def test_pretrain_prints_a_table_and_one_json_line() -> None:
    result = CliRunner().invoke(app, ["bench", "pretrain", *sizes(), "--batch-sizes", "2,4", "--rounds", "2"])
    assert result.exit_code == 0, result.output
    figures = last_line(result.output)
    assert set(figures) >= FIELDS
    assert figures["name"] == "pretrain" and figures["mfu"] is None and figures["images_per_s"] > 0
    for row in ("baseline", "fused", "this suite"):
        assert row in result.output


def test_mfu_is_published_flops_over_the_measured_peak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_peak_tflops", lambda device: (790, 989))
    rows = [Row(bench.BASELINE, 256, lambda: None, 8 * 2**30, [1000.0, 1100.0, 1200.0])]
    rows += [Row(bench.SUITE, 256, lambda: None, 4 * 2**30, [5000.0, 5500.0, 6600.0])]
    config = PretrainConfig(data="none", out=Path("none"))
    bench._report_pretrain(config, torch.device("cpu"), rows, 78_020_000_000)
    figures = last_line(capsys.readouterr().out)
    assert figures["mfu"] == pytest.approx(5500 * 0.07802 / 790, abs=1e-4)
    assert figures["mfu_datasheet"] == pytest.approx(5500 * 0.07802 / 989, abs=1e-4)
    assert figures["ratio"] == 5.0  # the median of 5, 5 and 5.5
    assert figures["peak_memory_ratio"] == 0.5


def test_contestants_start_from_the_same_weights_and_train_alike() -> None:
    """After one step from the same student the first loss is the same; the masks are the only difference."""
    from core.config import load_config

    config = load_config(PretrainConfig, None, tiny_overrides(Path("none"), Path("none")))
    task, _ = suite_run(config, torch.device("cpu"), 4, compiled=False)
    again, _ = suite_run(config, torch.device("cpu"), 4, compiled=False)
    for a, b in zip(task.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(a, b)
    batch = random_batch(config, torch.device("cpu"), 4)
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.uint8


def test_mae_has_no_baseline() -> None:
    with pytest.raises(ConfigError, match="method=mae"):
        bench.bench_pretrain(None, ["method=mae"], [2], 1)


@pytest.mark.parametrize("sizes", ["0", "a", "4,", "-3"])
def test_batch_sizes_that_are_none(sizes: str) -> None:
    result = CliRunner().invoke(app, ["bench", "pretrain", f"--batch-sizes={sizes}"])
    assert isinstance(result.exception, ConfigError)
    assert "expected whole numbers from 1" in str(result.exception)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_and_feed(tmp_path: Path, workers: int) -> None:
    data = draw_images(tmp_path / "data")
    result = CliRunner().invoke(
        app, ["bench", "loader", str(data), "--img-size", "16", "--num-workers", str(workers), "--rounds", "1"]
    )
    assert result.exit_code == 0, result.output
    assert set(last_line(result.output)) >= FIELDS
    overrides = [f"data={data}", *sizes()]
    result = CliRunner().invoke(app, ["bench", "feed", *overrides, "--num-workers", str(workers), "--seconds", "1"])
    assert result.exit_code == 0, result.output
    figures = last_line(result.output)
    assert set(figures) >= FIELDS and 0 <= figures["data_wait_pct"] <= 100


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "data", count=4)
    result = CliRunner().invoke(app, ["bench", "loader", str(data)])
    assert isinstance(result.exception, ConfigError) and "at least 32 are needed" in str(result.exception)


def compare(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    recipe = tmp_path / "recipe.yaml"
    data = tmp_path / "data"
    recipe.write_text("out: unused\nmomentum: 0.9\n")
    overrides = [text for text in tiny_overrides(data, tmp_path / "x") if not text.startswith("out=")]
    overrides += [f"probe.data={data}", "probe.train_images=30", "probe.test_images=10"]
    command = [sys.executable, "-m", "tools.cli", "compare", str(recipe), *overrides, "--out", str(tmp_path / "out")]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False)


def test_compare_trains_draws_and_is_quick_the_second_time(tmp_path: Path) -> None:
    draw_images(tmp_path / "data")
    done = compare(tmp_path, "--seeds", "3", "--methods", "rc_mae,mae", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "at start" in done.stdout and "after 96 images; seeds 3" in done.stdout
    out = tmp_path / "out"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    curves = {curve["method"]: curve for curve in json.loads((out / "comparison.json").read_text())}
    assert curves["rc_mae"]["images"] == [0, 96] == curves["mae"]["images"]
    # Both start from the same student, so the probes before the first step agree.
    assert curves["rc_mae"]["probes"]["probe/knn_top1_pct"][0] == curves["mae"]["probes"]["probe/knn_top1_pct"][0]
    curve = read_curve(out / "mae_seed3", "mae", 3)
    assert curve.minutes[0] == 0 < curve.minutes[1]
    before = (out / "mae_seed3" / "summary.json").read_bytes()
    again = compare(tmp_path, "--seeds", "3", "--methods", "rc_mae,mae", "--jobs", "2")
    assert again.returncode == 0
    assert json.loads((out / "mae_seed3" / "summary.json").read_text())["digest"] == json.loads(before)["digest"]


def test_compare_names_the_run_that_failed_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    failed = compare(tmp_path, "--seeds", "0", "--methods", "mae")
    assert failed.returncode == 3, failed.stderr
    (line,) = failed.stderr.strip().splitlines()
    assert "mae_seed0.log: " in line and "no images" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs a recipe"),
        (["r.yaml", "seed=3"], "seed: is set for each run by compare"),
        (["r.yaml"], "give probe.data="),
        (["r.yaml", "--methods", "mea"], "--methods mea: expected any of rc_mae, rc_mae_own_mask, mae"),
        (["r.yaml", "--seeds", "x"], "--seeds x: expected whole numbers from 0"),
    ],
)
def test_compare_refuses_in_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert isinstance(result.exception, ConfigError) and said in str(result.exception)


def test_compare_stops_with_its_runs(tmp_path: Path) -> None:
    draw_images(tmp_path / "data")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("out: unused\n")
    overrides = [t for t in tiny_overrides(tmp_path / "data", tmp_path / "x", epochs=4000) if not t.startswith("out=")]
    command = [sys.executable, "-m", "tools.cli", "compare", str(recipe), *overrides, f"probe.data={tmp_path / 'data'}"]
    command += ["--out", str(tmp_path / "out"), "--seeds", "0", "--methods", "mae"]
    code, said = interrupted(command, tmp_path / "out" / "mae_seed0.log")
    assert code == 75
    assert "stopped; finished steps are saved" in said and "Traceback" not in said
