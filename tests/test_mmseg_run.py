"""`rcmae segment framework=mmseg`: runs from end to end, kills, faults, and what is refused."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from core.config import load_config
from core.distributed import Processes
from core.errors import ConfigError, DataError
from core.vit import ViTConfig
from tests.harness import CrashingFileSystem
from tests.mmseg_recipes import (
    PLAIN,
    PUBLISHED,
    config_of,
    evaluated,
    four_blocks,
    on_mmseg,
    overrides,
)
from tests.test_resume import assert_whole
from tests.tiny import tiny_segmentation
from tools.cli import app, guarded
from transfer.segmentation.mmseg_engine import recipe
from transfer.segmentation.run import dry_run, open_inputs, segment
from transfer.segmentation.segmentor import LabelsConfig, SegmentorConfig
from transfer.segmentation.settings import SegmentConfig, rate, settle
from transfer.segmentation.slide import InferenceConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mmseg", "mmengine", "mmcv")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of four blocks."""
    return four_blocks(tmp_path_factory.mktemp("four") / "backbone")


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_killed(config: SegmentConfig, crash_at: int) -> None:
    """Run in a child that dies at a point of the checkpoint writer."""
    child = os.fork()
    if child == 0:
        try:
            segment(config, fs=CrashingFileSystem(crash_at))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_from_end_to_end_killed_and_resumed(
    mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path, accumulation: int
) -> None:
    """The same bits as a run that was never stopped, dropout and drop path included; evaluated by both with the same
    figures."""  # fmt: skip
    network = PUBLISHED if accumulation == 1 else PLAIN
    changes = {**network, "engine__accumulation": accumulation, "engine__evaluate_every_steps": 3}
    reference, out = tmp_path / "reference", tmp_path / "out"
    arguments = overrides(ade, reference, four, framework="mmseg", **changes)
    assert guarded(lambda: app(args=["segment", *arguments], standalone_mode=False)) == 0
    config = on_mmseg(ade, out, four, **changes, loader__num_workers=accumulation - 1)
    run_killed(config, crash_at=30)  # while the second checkpoint is written
    assert not (out / "summary.json").exists()
    for _ in range(2):  # and once it is done, the same figures once more
        summary = segment(config)
        assert_whole(out, reference)
    log = (out / "train.log").read_text()
    assert re.search(r"resumed from step [24] of 6", log) and "not bit-exact" not in log
    assert {path.name for path in out.iterdir()} == {
        ".lock", "checkpoints", "config.yaml", "confusion.json", "env.json", "metrics.jsonl", "pictures",
        "results.json", "segmentor", "summary.json", "train.log",
    }  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    expected = rate(config)
    for row in trained:
        assert row["train/loss"] == pytest.approx(row["train/loss_decode"] + row["train/loss_aux"], rel=1e-6)
        assert row["train/lr"] == pytest.approx(expected(row["step"] - 1)) and row["train/grad_norm"] > 0
    assert [row["step"] for row in rows if "eval/miou_pct" in row] == [0, 3, 6]
    for name in ("native", "mmseg"):
        again, _ = evaluated(ade, tmp_path / name, out / "segmentor", f"framework={name}")
        assert again["figures"] == pytest.approx(summary["figures"], abs=0.01)


def test_both_engines_begin_equal(mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path) -> None:
    """The evaluation before the first step, and the loss of the first; without noise, on all images at once."""
    changes = {
        **PUBLISHED, "batch_size": 14, "steps": 1, "warmup_steps": 0, "drop_path": 0, "segmentor__dropout_ratio": 0,
    }  # fmt: skip
    rows = {}
    for name in ("native", "mmseg"):
        segment(config_of(ade, tmp_path / name, four, framework=name, **changes))
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    before, trained, after = rows["native"]
    for name, value in trained.items():
        if name.startswith("train/"):  # of the same crops, in another order
            assert rows["mmseg"][1][name] == pytest.approx(value, rel=1e-4), name
    assert rows["mmseg"][0] == pytest.approx(before, abs=0.01) and rows["mmseg"][2] == pytest.approx(after, abs=0.5)


def test_a_signal_saves_and_ends_with_75(mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = overrides(ade, out, four, framework="mmseg", steps=2000, checkpoint__every_steps=1000, **PUBLISHED)
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.cli", "segment", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and '"train/loss"' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped by SIGTERM" in error.splitlines()[-1], error
    assert len(list((out / "checkpoints").glob("step_*"))) == 1


def test_weights_that_are_not_finite_are_never_saved(
    mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = overrides(ade, tmp_path / "out", four, framework="mmseg", optim__lr=1e30, warmup_steps=0, **PUBLISHED)
    assert guarded(lambda: app(args=["segment", *arguments], standalone_mode=False)) == 5
    assert "non-finite" in capsys.readouterr().err and not list((tmp_path / "out" / "checkpoints").iterdir())


def test_broken_images_are_replaced_and_named(mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for path in (ade / "ADEChallengeData2016").rglob("*.*"):
        copy = data / path.relative_to(ade / "ADEChallengeData2016")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (data / "images" / "training" / "ADE_tra_00000003.jpg").write_bytes(b"no picture")
    summary = segment(on_mmseg(data, tmp_path / "out", four, loader__max_broken_share=0.2, **PUBLISHED))
    assert list(summary["broken_images"]) == ["ADE_tra_00000003.jpg"]
    (data / "annotations" / "validation" / "ADE_val_00000001.png").write_bytes(b"no label")
    with pytest.raises(DataError, match="ADE_val_00000001"):
        segment(on_mmseg(data, tmp_path / "out2", four, **PUBLISHED))


# ---- refusals --------------------------------------------------------------------------------------------------------


def fault(monkeypatch: pytest.MonkeyPatch, data: Path, backbone: Path, *absent: str, **changes: object) -> list[str]:
    """The lines of a configuration that is refused, with mmsegmentation installed but for some packages."""
    found = importlib.util.find_spec

    def spec(name: str, package: str | None = None) -> object:
        return (None if name in absent else sys) if name in PACKAGES else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", spec)
    with pytest.raises(ConfigError) as caught:
        on_mmseg(data, data / "out", backbone, **changes)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("absent", PACKAGES)
def test_without_the_packages_one_line_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: str
) -> None:
    (line,) = fault(monkeypatch, tmp_path, tmp_path, absent)
    assert line.endswith("mmsegmentation is not installed; pip install --no-deps -r requirements-mmseg.lock")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"engine__compile": "on"}, "engine.compile=on"),
        ({"classes": "null", "num_classes": 1}, "num_classes=1"),
        ({"warmup_steps": 1}, "warmup_steps=1"),
    ],
)
def test_what_mmsegmentation_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict, key: str
) -> None:
    (line,) = fault(monkeypatch, tmp_path, tmp_path, **changes)
    assert f"{key}: not with framework=mmseg: " in line


def test_a_linear_head_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: sys)
    with pytest.raises(ConfigError, match="head=linear: not with framework=mmseg"):
        load_config(
            SegmentConfig, None, [*tiny_segmentation(tmp_path, tmp_path, tmp_path, "linear"), "framework=mmseg"]
        )


VIT = ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=16, depth=4, num_heads=2)
SIZES, WINDOWS = SegmentorConfig(blocks=(0, 1, 2, 3)), InferenceConfig(crop=16, stride=10)


@pytest.mark.parametrize(
    ("vit", "sizes", "inference", "expected"),
    [
        ({}, SegmentorConfig(blocks=(0, 0, 1, 2)), WINDOWS, "segmentor.blocks=[0, 0, 1, 2]"),
        ({}, SegmentorConfig(blocks=(0, 2, 1, 3)), WINDOWS, "segmentor.blocks=[0, 2, 1, 3]"),
        ({"depth": 2}, SegmentorConfig(), WINDOWS, "segmentor.blocks=[0, 0, 0, 1]"),
        ({}, SegmentorConfig(blocks=(0, 1, 2, 3), num_classes=1), WINDOWS, "num_classes=1"),
        ({"mlp_ratio": 2.5}, SIZES, WINDOWS, "whole mlp_ratio"),
        ({"class_token": False}, SIZES, WINDOWS, "class token"),
        ({}, SIZES, InferenceConfig(mode="whole"), "inference.mode=whole"),
        ({}, SIZES, InferenceConfig(crop=32, stride=10), "inference.crop=32"),
        ({}, LabelsConfig(), WINDOWS, "linear head"),
    ],
)
def test_networks_and_windows_that_it_does_not_have(
    vit: dict, sizes: LabelsConfig, inference: InferenceConfig, expected: str
) -> None:
    recipe.require_possible(VIT, SIZES, WINDOWS)
    with pytest.raises(ConfigError) as caught:
        recipe.require_possible(ViTConfig(**{**VIT.model_dump(), **vit}), sizes, inference)
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_an_image_smaller_than_the_windows_of_a_plain_vit(
    mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path
) -> None:
    """It is evaluated before the first step, so the run ends there."""
    with pytest.raises(DataError, match=r"ADE_val_00000004\.jpg: evaluated at 60x14 px.*windows of 16") as caught:
        segment(on_mmseg(ade, tmp_path / "out", four, augment__scale=[60, 20]))
    assert "\n" not in str(caught.value)


def test_one_process_and_fp32_on_a_cpu(mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path) -> None:
    config = on_mmseg(ade, tmp_path / "out", four, **PUBLISHED)
    with pytest.raises(ConfigError, match="framework=mmseg: runs on one process here; leave --nproc out"):
        settle(config, open_inputs(config), None, Processes(rank=0, size=2, local_rank=0, local_size=2))
    with pytest.raises(ConfigError, match=r"engine\.precision=bf16: mmengine has mixed precision on a GPU only"):
        segment(on_mmseg(ade, tmp_path / "out2", four, engine__precision="bf16", **PUBLISHED))


def test_the_header_says_what_is_otherwise_than_published(
    mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path
) -> None:
    changes = {**PUBLISHED, "engine__accumulation": 2, "scales": [1, 1.5]}
    lines = dry_run(on_mmseg(ade, tmp_path / "out", four, **changes))
    plain = dry_run(config_of(ade, tmp_path / "out", four, **changes))
    assert lines[: len(plain)] == plain
    assert lines[len(plain)].startswith("framework  mmsegmentation 1.2.2, mmengine 0.10.7, mmcv-lite 2.1.0")
    for word, line in zip(("fp16", "micro-batch", "multi-scale"), lines[len(plain) + 1 :], strict=True):
        assert word in line


def test_a_native_run_imports_none_of_it() -> None:
    code = "import sys, tools.cli, transfer.segmentation.run, robustness.run; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "transfer.segmentation.mmseg_engine.recipe" in loaded.stdout and loaded.stderr == ""
    assert not [name for name in PACKAGES if f"'{name}'" in loaded.stdout]
