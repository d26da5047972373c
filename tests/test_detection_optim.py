"""Rates and weight decay of the detection recipes, against detectron2's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import load_config
from core.vit import ViT, ViTConfig, drop_path_scales
from tests.golden_files import require
from tools.verify.detection_data import schedules
from tools.verify.golden import FOLDER, read_json
from tools.verify.parameter_groups import by_text, compared, detector_groups, detector_groups_of
from transfer.detection.dense_vit import dense_vit
from transfer.detection.mask_rcnn import MaskRCNN, build_mask_rcnn
from transfer.detection.settings import DetectConfig

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "transfer"
LETTERS = {"B": ("base", (768, 12, 12, 16)), "L": ("large", (1024, 24, 16, 16)), "H": ("huge", (1280, 32, 16, 14))}


def recipe(size: str, kind: str = "vitdet") -> DetectConfig:
    return load_config(DetectConfig, RECIPES / f"detect_{kind}_{size}.yaml", ["data=x", "backbone=z"])


def golden_groups() -> dict[str, Any]:
    return read_json(FOLDER, "detection_param_groups")


def on_meta(vit_config: ViTConfig, config: DetectConfig) -> MaskRCNN:
    """The detector of a recipe, without memory for it."""
    with torch.device("meta"):
        return build_mask_rcnn(dense_vit(ViT(vit_config), config), config.detector)


def test_the_published_schedules() -> None:
    require(schedules(FOLDER))


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_recipes_have_a_published_schedule(size: str) -> None:
    recipes = read_json(FOLDER, "detection_schedule")["recipes"]
    for config in (recipe(size), recipe(size, "cascade_vitdet")):
        published = next(each for each in recipes.values() if each["iterations"] == config.steps)
        assert list(config.drops()) == published["milestones"]
        assert config.warmup_steps == pytest.approx(250 * config.steps / 184375, abs=2e-3)
        assert config.optim.lr == published["base_lr"]


def test_rates_and_weight_decay_of_small_detectors() -> None:
    require(detector_groups(FOLDER))


@pytest.mark.parametrize("letter", LETTERS)
def test_rates_and_weight_decay_of_the_published_detectors(letter: str) -> None:
    golden = golden_groups()[f"full_{letter}"]
    size, (dim, depth, heads, patch_size) = LETTERS[letter]
    config = recipe(size)
    vit_config = ViTConfig(
        img_size=(224, 224), patch_size=patch_size, embed_dim=dim, depth=depth, num_heads=heads
    )  # fmt: skip
    model = on_meta(vit_config, config)
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]
    expected = by_text(golden["lr_factor_and_weight_decay_to_names"])
    require(compared(letter, detector_groups_of(config, model), expected))


@pytest.mark.parametrize("letter", LETTERS)
def test_drop_path_of_the_published_detectors(letter: str) -> None:
    rates, config = golden_groups()[f"full_{letter}"]["drop_path"], recipe(LETTERS[letter][0])
    scales = drop_path_scales(config.drop_path, len(rates), 400, torch.Generator().manual_seed(0)).flatten(1)
    for block, rate in zip(scales, rates, strict=True):
        assert block.max().item() == pytest.approx(1 / (1 - rate), rel=1e-5)


def test_a_clean_rule_decays_matrices_and_kernels_alone() -> None:
    config = load_config(DetectConfig, None, ["data=x", "out=y", "backbone=z", "decay_rule=clean"])
    vit_config = ViTConfig(img_size=(224, 224), patch_size=16, embed_dim=64, depth=4, num_heads=2)
    model = on_meta(vit_config, config)
    decayed = {name for name, (_, decay) in detector_groups_of(config, model).items() if decay}
    assert "backbone.net.patch_embed.proj.weight" in decayed and "roi_heads.box_head.fc1.weight" in decayed
    assert not any(
        name.endswith((".bias", "pos_embed", "rel_pos_h", "norm.weight", "norm1.weight")) for name in decayed
    )
