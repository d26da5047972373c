"""The benchmark of a detector's sweep: what is measured, and what is printed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.errors import ConfigError
from robustness.corruptions.apply import BENCHMARK
from tests.tiny import tiny_detection
from tools import bench_robust
from tools.cli import app


def bench(tmp_path: Path, *more: str) -> dict:
    sizes = tiny_detection(Path("none"), Path("none"), Path("none"), img_size=64, patch_size=16)
    sizes = [text for text in sizes if not text.startswith(("data=", "out=", "backbone=", "global_blocks"))]
    arguments = ["bench", "robust", *sizes, "--model", "tiny", "--work", str(tmp_path), *more]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output.strip().splitlines()[-1])


def test_the_share_of_corrupting_in_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_robust, "SEVERITIES", (1,))
    figures = bench(tmp_path)
    assert figures["name"] == "robust" and set(figures["ms"]) == set(BENCHMARK) and figures["cpu_threads"] == 1
    assert figures["corrupting_ms"] == pytest.approx(sum(figures["ms"].values()) / 15, rel=0.01)
    spent, rest = figures["corrupting_ms"], figures["rest_ms"]
    assert spent > 1 and rest > 1 and figures["share_pct"] == pytest.approx(100 * spent / (spent + rest), rel=0.01)


def test_a_size_that_is_none(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "robust", "--model", "enormous", "--work", str(tmp_path)])
    assert type(result.exception) is ConfigError and "--model enormous: expected one of" in str(result.exception)
