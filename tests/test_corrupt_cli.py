"""`rcmae corrupt` and `rcmae bench corruptions`: what they write, and one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from core.errors import ConfigError, DataError, MachineError, RcmaeError
from robustness.corruptions.apply import BENCHMARK, NAMES, corrupt
from tests.test_corruptions import frost_files, noise_images  # noqa: F401  a fixture
from tools import bench_corruptions
from tools import corrupt as corrupt_tool
from tools.cli import app


def save(path: Path, height: int = 40, width: int = 48) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise_images(1, height, width)[0].permute(1, 2, 0).contiguous().numpy()).save(path)
    return path


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["corrupt", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_a_folder_becomes_pngs_of_the_same_names(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("a.png", "b/c d.png", "b/e.bmp", "b/e.png"):
        save(data / name)
    save(data / "small.png", 31, 40)
    (data / "broken.jpg").write_bytes(b"nothing")
    said = run(data, "--out", tmp_path / "out", "--name", "frost", "--severity", "4", "--seed", "2")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"a.png", "b/c d.png", "b/e.bmp.png", "b/e.png.png"}
    assert "left out: small.png: 31x40 px" in said and "left out: broken.jpg: not an image" in said
    assert said.splitlines()[-1].endswith("4 of 6, frost, severity 4, imagenet_c")
    image_id = corrupt_tool.id_of("b/c d.png")
    expected = corrupt(pixels(data / "b/c d.png")[None], "frost", 4, image_ids=[image_id], seed=2)[0]
    assert torch.equal(pixels(tmp_path / "out" / "b/c d.png"), expected)


def test_a_picture_alone_is_the_picture_in_its_folder(tmp_path: Path) -> None:
    picture = save(tmp_path / "data" / "one.png")
    save(tmp_path / "data" / "two.png")
    for source, out in ((picture, "alone"), (tmp_path / "data", "all")):
        run(source, "--out", tmp_path / out, "--name", "fog", "--definition", "imagecorruptions")
    assert torch.equal(pixels(tmp_path / "alone" / "one.png"), pixels(tmp_path / "all" / "one.png"))


def test_the_jpeg_step_comes_after(tmp_path: Path) -> None:
    picture = save(tmp_path / "one.png")
    run(picture, "--out", tmp_path / "raw", "--name", "contrast")
    run(picture, "--out", tmp_path / "stored", "--name", "contrast", "--jpeg-step")
    from robustness.corruptions.digital import jpeg_step

    assert torch.equal(
        jpeg_step(pixels(tmp_path / "raw" / "one.png")[None])[0], pixels(tmp_path / "stored" / "one.png")
    )


def test_names_from_tars_stay_inside_the_folder(tmp_path: Path) -> None:
    targets = corrupt_tool._targets(["../../x.png", "/etc/y.jpg", "a/../b/z.png"], tmp_path)
    assert all(target.resolve().is_relative_to(tmp_path.resolve()) for target in targets.values())


def test_the_contact_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrupt_tool, "TILE_PX", 32)
    said = run(save(tmp_path / "one.png"), "--out", tmp_path / "out")
    assert "19 corruptions at 5 severities" in said
    width, height = Image.open(tmp_path / "out" / corrupt_tool.SHEET).size
    assert width > 5 * 32 and height > 19 * 32


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["PICTURE", "--name", "fogg"], ConfigError, "--name fogg: expected one of gaussian_noise"),
        (["PICTURE", "--name", "fog", "--severity", "6"], ConfigError, "--severity 6: expected 1, 2, 3, 4 or 5"),
        (["PICTURE", "--definition", "x"], ConfigError, "--definition x: expected one of imagenet_c"),
        (["PICTURE", "--seed", "-1"], ConfigError, "--seed -1: expected a whole number from 0"),
        (["FOLDER"], ConfigError, "a folder needs --name"),
        (["FOLDER/none.png"], DataError, "none.png: no such picture or folder"),
        (["FOLDER/broken.png"], DataError, "broken.png: not an image"),
        (["FOLDER/broken.png", "--name", "fog"], DataError, "no picture in it could be used"),
        (["PICTURE", "--name", "frost", "--textures", "FOLDER"], DataError, "frost1.png: missing, and frost needs it"),
        (["PICTURE", "--name", "fog", "--out", "FOLDER"], MachineError, "exists already; give another --out"),
    ],
)
def test_one_line_for_what_is_wrong(tmp_path: Path, arguments: list[str], kind: type[RcmaeError], message: str) -> None:
    picture = save(tmp_path / "data" / "one.png")
    (tmp_path / "data" / "broken.png").write_bytes(b"nothing")
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    given = [text.replace("PICTURE", str(picture)).replace("FOLDER", str(tmp_path / "data")) for text in arguments]
    result = CliRunner().invoke(app, ["corrupt", *given])
    assert type(result.exception) is kind, result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)


# --- the benchmark --------------------------------------------------------------------------------------------------


def bench(tmp_path: Path, *arguments: str) -> dict:
    command = ["bench", "corruptions", "--batch-size", "2", "--rounds", "1", "--work", str(tmp_path), *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output.strip().splitlines()[-1])


def test_without_the_reference_its_times_are_a_quotation(tmp_path: Path) -> None:
    figures = bench(tmp_path, "--no-reference")
    assert figures["name"] == "corruptions" and set(figures["ms"]) == set(NAMES)
    assert figures["ratio"] is None and figures["reference_sum_ms"] is None and figures["reference_ms"] == {}
    assert figures["quoted_reference_sum_ms"] == pytest.approx(912.7, abs=0.1)
    assert figures["sum_ms"] == pytest.approx(sum(figures["ms"][name] for name in BENCHMARK), rel=0.01)
    assert {"device", "versions", "draws", "definition", "batch_size"} <= set(figures)


def test_beside_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that answers like it: the real one needs an environment of its own."""
    script = "import sys\nfor line in sys.stdin:\n    print('a remark')\n    print([500.0] * 5, flush=True)\n"
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{script}"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(bench_corruptions, "_reference_python", lambda work: stand_in)
    figures = bench(tmp_path)
    assert figures["reference_sum_ms"] == 15 * 500 and figures["reference_ms"]["fog"] == 500
    assert figures["ratio"] == pytest.approx(7500 / figures["sum_ms"], rel=0.01)


def test_where_it_cannot_be_installed_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="first\nERROR: no network\n")
    monkeypatch.setattr(bench_corruptions.subprocess, "run", lambda *args, **options: failed)
    assert bench_corruptions._reference_python(tmp_path) is None
    assert capsys.readouterr().out == (
        "the reference cannot be installed, its published times are quoted: ERROR: no network\n"
    )
