"""From a finished run to backbones and pictures: `rcmae export`, the probe, warm starts from a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from core.checkpoint import read_checkpoint
from core.config import load_config
from core.errors import CheckpointError, ConfigError
from pretrain.mae import MaskedAutoencoder
from pretrain.reconstructions import Reconstructions, contact_sheet, fixed_noise
from pretrain.run import pretrain
from pretrain.settings import PretrainConfig
from tests.tiny import draw_images, tiny_overrides
from tools.export import export_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    root = tmp_path_factory.mktemp("run")
    pretrain(load_config(PretrainConfig, None, tiny_overrides(draw_images(root / "data"), root / "out")))
    return root / "out"


@pytest.mark.parametrize("branch", ["teacher", "student"])
def test_exports_hold_the_branch_asked_for(run: Path, branch: str) -> None:
    target = export_run(run, branch)
    model = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    wanted = read_checkpoint(run / "checkpoints" / "step_0000006").tensors
    assert model.state_dict().keys() <= wanted[branch].keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[branch][name]), name
    other = wanted["student" if branch == "teacher" else "teacher"]["blocks.0.attn.qkv.weight"]
    assert not torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], other)
    provenance = json.loads((target / "config.json").read_text())["rcmae"]
    assert (provenance["branch"], provenance["step"], provenance["method"]) == (branch, 6, "rc_mae")


def test_the_run_exports_its_teacher_by_itself(run: Path) -> None:
    first, second = (p / "model.safetensors" for p in (run / "backbone", export_run(run, "teacher")))
    assert first.read_bytes() == second.read_bytes()


def test_one_checkpoint_can_be_exported(run: Path, tmp_path: Path) -> None:
    target = export_run(run / "checkpoints" / "step_0000004", "student", tmp_path / "early")
    assert json.loads((target / "config.json").read_text())["rcmae"]["step"] == 4


def test_what_cannot_be_exported_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected teacher or student"):
        export_run(run, "professor")
    with pytest.raises(CheckpointError, match="no checkpoints in it"):
        export_run(tmp_path, "teacher")


def test_a_run_can_start_from_a_checkpoint_of_another(run: Path, tmp_path: Path) -> None:
    data = run.parent / "data"
    config = load_config(PretrainConfig, None, tiny_overrides(data, tmp_path / "again"))
    summary = pretrain(config, resume=str(run / "checkpoints" / "step_0000004"))
    assert summary["digest"] == json.loads((run / "summary.json").read_text())["digest"]
    with pytest.raises(ConfigError, match="holds a run at step 6"):
        pretrain(config, resume="never")


def test_a_run_cannot_start_from_the_last_step_of_another(run: Path, tmp_path: Path) -> None:
    config = load_config(PretrainConfig, None, tiny_overrides(run.parent / "data", tmp_path / "again"))
    with pytest.raises(ConfigError, match="the checkpoint is of step 6, and this run ends at step 6; give more epochs"):
        pretrain(config, resume=str(run / "checkpoints" / "step_0000006"))


def test_reconstructions_show_what_was_given_and_true_patches_when_predicted_right(run: Path) -> None:
    config = load_config(PretrainConfig, run / "config.yaml")
    model = MaskedAutoencoder(config.vit_config(), config.decoder_config())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    draw = Reconstructions(images, fixed_noise(0, 2, 16), 0.75, True, config.mean, config.std)
    sheet = draw(model, model)
    cell = 128 + 6
    assert sheet.shape == (22 + 2 * cell + 6 + 22, 4 * cell + 6, 3) and sheet.dtype == np.uint8
    shown = sheet[22 : 22 + 128 : 8, 6 : 6 + 128 : 8]
    assert np.array_equal(shown, images[0].permute(1, 2, 0).numpy())
    masked = sheet[22 : 22 + 128 : 8, 6 + cell : 6 + cell + 128 : 8]
    grey = (masked == 128).all(-1)
    assert grey.sum() >= 12 * 16 and np.array_equal(masked[~grey], shown[~grey])
    # A perfect prediction of the normalised target comes back as the picture itself.
    from core.transforms import normalize
    from core.vit import gather_patches, patchify
    from pretrain.mae import random_masking, reconstruction_target

    patches = patchify(normalize(images, config.mean, config.std, torch.float32), 4)
    _, hidden = random_masking(draw.noise, 0.75)
    perfect = draw._to_pixels(reconstruction_target(gather_patches(patches, hidden), True), patches, hidden)
    torch.testing.assert_close(perfect, gather_patches(patchify(images / 255, 4), hidden), atol=1e-5, rtol=0)


def test_small_pictures_are_enlarged_and_grey_ones_drawn() -> None:
    sheet = contact_sheet(["a"], torch.rand(1, 1, 1, 8, 8), "")
    assert sheet.shape == (22 + 134 + 6, 134 + 6, 3)
