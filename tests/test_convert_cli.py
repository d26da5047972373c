"""`rcmae convert`: the report, the refusals with their exit codes, and that nothing is left behind or overwritten."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from core.backbone_io import load_backbone
from core.transforms import IMAGENET_MEAN
from core.vit import ViTConfig
from pretrain.mae import DecoderConfig, MaskedAutoencoder
from tools.cli import app, guarded

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3)
NUM_ENCODER, NUM_DECODER = 6 + 2 * 12, 8 + 12


def model(seed: int = 0) -> MaskedAutoencoder:
    mae = MaskedAutoencoder(CONFIG, DecoderConfig(embed_dim=16, depth=1, num_heads=2))
    mae.init_weights(torch.Generator().manual_seed(seed))
    return mae.requires_grad_(False)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An RC-MAE pretraining file; the teacher is model(0), the student model(1)."""
    folder = tmp_path / "in"
    folder.mkdir()
    student = {f"module.{key}": tensor for key, tensor in model(1).state_dict().items()}
    content = {"teacher": model(0).state_dict(), "student": student, "args": argparse.Namespace(lr=1)}
    torch.save(content, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def convert(*arguments: object) -> int:
    """Exit code of `rcmae convert`, in this process."""
    return guarded(lambda: app(args=["convert", *map(str, arguments)], standalone_mode=False))


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr; stdout is empty."""
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), (out, err)
    return lines[0]


def test_convert_writes_a_backbone_and_says_what_became_of_every_tensor(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "backbone"
    assert convert(checkpoint, out, "--num-heads", 3) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "" and lines[0] == "layout   RC-MAE pretraining (teacher)"
    assert lines[1] == f"loaded   {NUM_ENCODER} tensors"
    assert lines[2].startswith(f"ignored  {NUM_DECODER}: mask_token, decoder_pos_embed, ")
    assert lines[3:] == [f"written  {out}"]

    images = torch.randn(1, 3, 32, 32)
    vit, report = load_backbone(out)
    assert torch.equal(vit.tokens(images), model(0).tokens(images)) and vit.config == CONFIG
    assert (report.layout, report.resized, report.new, report.ignored) == ("rcmae backbone", (), (), ())
    timm_model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    torch.testing.assert_close(timm_model.forward_features(images), vit.tokens(images), atol=1e-5, rtol=0)
    description = json.loads((out / "config.json").read_bytes())
    assert description["rcmae"]["converted_from"] == "checkpoint.pth"
    assert description["rcmae"]["layout"] == "RC-MAE pretraining (teacher)"
    assert tuple(description["pretrained_cfg"]["mean"]) == IMAGENET_MEAN
    assert sorted(path.name for path in out.parent.iterdir()) == ["backbone"]


def test_convert_takes_the_branch_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    assert convert(checkpoint, tmp_path / "s", "--branch", "student", "--num-heads", 3) == 0
    stored = load_file(tmp_path / "s" / "model.safetensors")
    assert torch.equal(stored["cls_token"], model(1).cls_token) and len(stored) == NUM_ENCODER


def test_convert_of_a_backbone_gives_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert convert(checkpoint, first, "--num-heads", 3) == 0
    assert convert(first, second) == 0  # its own description tells the heads
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]


def test_existing_out_is_refused_and_left_untouched(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file, empty = tmp_path / "folder", tmp_path / "file", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    (folder / "mine.txt").write_text("kept")
    file.write_text("kept as well")
    for out in (folder, file, empty):
        for source in (checkpoint, tmp_path / "absent.pth"):  # told before anything is read
            assert convert(source, out, "--num-heads", 3) == 6
            assert f"{out}: exists already" in only_error(capsys)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"] and not list(empty.iterdir())
    assert (folder / "mine.txt").read_text() == "kept" and file.read_text() == "kept as well"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder", "in"]


def test_refusals_end_with_one_line_their_code_and_no_output(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = model().state_dict()
    faults = {
        "text.pth": b"no weights at all",
        "empty.pth": b"",
        "cut.pth": checkpoint.read_bytes()[:5000],
        "zeros.safetensors": bytes(100),
    }
    for name, data in faults.items():
        (tmp_path / "in" / name).write_bytes(data)
    states = {
        "missing": {key: tensor for key, tensor in state.items() if key != "blocks.1.norm1.bias"},
        "unknown": {**state, "reg_token": torch.ones(1)},
        "shape": {**state, "norm.bias": torch.ones(23)},
        "not_finite": {**state, "norm.bias": torch.full((24,), float("nan"))},
    }
    for name, content in states.items():
        save_file(content, tmp_path / "in" / f"{name}.safetensors")
    expected = dict.fromkeys([*faults, "absent.pth"], (4, ""))
    expected |= {
        "missing.safetensors": (4, "blocks.1.norm1.bias"),
        "unknown.safetensors": (4, "reg_token"),
        "shape.safetensors": (4, "norm.bias has shape [23], expected [24]"),
        "not_finite.safetensors": (5, "norm.bias holds non-finite values"),
    }
    for name, (code, text) in expected.items():
        source = tmp_path / "in" / name
        assert convert(source, tmp_path / "out", "--num-heads", 3) == code, name
        line = only_error(capsys)
        assert line.startswith(f"error: {source}") and text in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # no output, nothing temporary


def test_arguments_that_cannot_be_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert(checkpoint, out) == 4
    assert "width 24 do not tell the number of heads" in only_error(capsys)
    assert convert(checkpoint, out, "--num-heads", 5) == 4
    assert "embed_dim=24 is not divisible by num_heads=5" in only_error(capsys)
    assert convert(checkpoint, out, "--num-heads", "many") == 2
    assert "command line" in only_error(capsys)
    assert convert(checkpoint, out, "--branch", "best\n", "--num-heads", 3) == 2
    assert r"--branch best\n: expected teacher or student" in only_error(capsys)
    assert convert(checkpoint) == 2
    assert "command line" in only_error(capsys)
    assert not out.exists()


def test_an_unwritable_place_is_a_fault_of_the_machine(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert convert(checkpoint, tmp_path / "file" / "out", "--num-heads", 3) == 6
    assert str(tmp_path / "file") in only_error(capsys)


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def test_the_command_refuses_a_pickle_that_runs_code(tmp_path: Path) -> None:  # a process of its own: 4 s
    canary, source = tmp_path / "canary", tmp_path / "evil.pth"
    content = {"model": model().state_dict(), "args": Evil(f"touch {canary}")}
    torch.save(content, source)
    pickle.loads(pickle.dumps(content["args"]))
    canary.unlink()  # it works
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "convert", str(source), str(tmp_path / "out"), "--num-heads", "3"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 4 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == done.stderr.splitlines()
    assert len(done.stderr.splitlines()) == 1 and "system" in done.stderr and str(source) in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]
