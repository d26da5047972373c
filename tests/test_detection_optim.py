"""Rates and weight decay of the detection recipes, against detectron2's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import load_config
from core.optim import warmup_multistep
from core.vit import ViT, ViTConfig, drop_path_scales
from tests.detection_golden import load_golden, part
from transfer.detection.dense_vit import dense_vit
from transfer.detection.mask_rcnn import MaskRCNN, build_mask_rcnn
from transfer.detection.settings import DetectConfig, parameter_groups
from transfer.detection.weights import from_detectron2, sizes_of, to_detectron2

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "transfer"
LETTERS = {"B": ("base", (768, 12, 12, 16)), "L": ("large", (1024, 24, 16, 16)), "H": ("huge", (1280, 32, 16, 14))}


def recipe(size: str, kind: str = "vitdet") -> DetectConfig:
    return load_config(DetectConfig, RECIPES / f"detect_{kind}_{size}.yaml", ["data=x", "backbone=z"])


def golden_groups(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / "detection_param_groups.json").read_text())


def on_meta(vit_config: ViTConfig, config: DetectConfig) -> MaskRCNN:
    """The detector of a recipe, without memory for it."""
    with torch.device("meta"):
        return build_mask_rcnn(dense_vit(ViT(vit_config), config), config.detector)


def scales_and_decays(config: DetectConfig, model: MaskRCNN) -> dict[str, tuple[float, float]]:
    """Factor of the rate and weight decay of every parameter, by detectron2's name."""
    theirs = to_detectron2(dict(model.named_parameters()))[1].mapped
    names = {parameter: theirs[name] for name, parameter in model.named_parameters()}
    groups = parameter_groups(config, model)
    found = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names)
    return found


def test_the_published_schedules(shared: Path) -> None:
    recipes = json.loads((shared / "golden" / "detection_schedule.json").read_text())["recipes"]
    assert len(recipes) >= 2
    for recipe in recipes.values():
        share = recipe["iterations"] / 184375  # the warm-up was given as a share of the longest recipe
        for step, expected in recipe["multiplier"]:
            found = warmup_multistep(step, warmup_steps=250 * share, start=0.001, milestones=recipe["milestones"])
            assert found == pytest.approx(expected, abs=1e-9), step


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_recipes_have_a_published_schedule(shared: Path, size: str) -> None:
    recipes = json.loads((shared / "golden" / "detection_schedule.json").read_text())["recipes"]
    for config in (recipe(size), recipe(size, "cascade_vitdet")):
        published = next(each for each in recipes.values() if each["iterations"] == config.steps)
        assert list(config.drops()) == published["milestones"]
        assert config.warmup_steps == pytest.approx(250 * config.steps / 184375, abs=2e-3)
        assert config.optim.lr == published["base_lr"]


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade"])
@pytest.mark.parametrize(("letter", "rule"), [("B", "vitdet"), ("H", "vitdet_huge")])
def test_rates_and_weight_decay_of_a_small_detector(shared: Path, kind: str, letter: str, rule: str) -> None:
    golden = golden_groups(shared)[f"tiny_{kind}_{letter}_rule"]
    state, _ = from_detectron2(part(load_golden(shared, f"losses_{kind}")[0], "weight."))
    vit_config, detector = sizes_of(state)
    overrides = ["data=x", "out=y", "backbone=z", f"layer_decay={golden['layer_decay']}", f"decay_rule={rule}"]
    config = load_config(DetectConfig, None, overrides)
    with torch.device("meta"):
        model = build_mask_rcnn(ViT(vit_config), detector)
    found = scales_and_decays(config, model)
    assert found.keys() == golden["parameters"].keys()
    for name, expected in golden["parameters"].items():
        assert found[name] == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("letter", LETTERS)
def test_rates_and_weight_decay_of_the_published_detectors(shared: Path, letter: str) -> None:
    golden = golden_groups(shared)[f"full_{letter}"]
    size, (dim, depth, heads, patch_size) = LETTERS[letter]
    config = recipe(size)
    vit_config = ViTConfig(
        img_size=(224, 224), patch_size=patch_size, embed_dim=dim, depth=depth, num_heads=heads
    )  # fmt: skip
    model = on_meta(vit_config, config)
    assert sum(p.numel() for p in model.parameters()) == golden["parameters"]
    found = scales_and_decays(config, model)
    expected = {
        name: tuple(map(float, key.split()))
        for key, names in golden["lr_factor_and_weight_decay_to_names"].items()
        for name in names
    }
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair, rel=1e-9), name


@pytest.mark.parametrize("letter", LETTERS)
def test_drop_path_of_the_published_detectors(shared: Path, letter: str) -> None:
    rates, config = golden_groups(shared)[f"full_{letter}"]["drop_path"], recipe(LETTERS[letter][0])
    scales = drop_path_scales(config.drop_path, len(rates), 400, torch.Generator().manual_seed(0)).flatten(1)
    for block, rate in zip(scales, rates, strict=True):
        assert block.max().item() == pytest.approx(1 / (1 - rate), rel=1e-5)


def test_a_clean_rule_decays_matrices_and_kernels_alone() -> None:
    config = load_config(DetectConfig, None, ["data=x", "out=y", "backbone=z", "decay_rule=clean"])
    vit_config = ViTConfig(img_size=(224, 224), patch_size=16, embed_dim=64, depth=4, num_heads=2)
    model = on_meta(vit_config, config)
    decayed = {name for name, (_, decay) in scales_and_decays(config, model).items() if decay}
    assert "backbone.net.patch_embed.proj.weight" in decayed and "roi_heads.box_head.fc1.weight" in decayed
    assert not any(
        name.endswith((".bias", "pos_embed", "rel_pos_h", "norm.weight", "norm1.weight")) for name in decayed
    )
