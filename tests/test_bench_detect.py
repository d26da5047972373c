"""The benchmark of the detector: that its plain twin is the same network, and what is printed."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from core.config import load_config
from core.errors import ConfigError
from tests.test_detection_model import tiny_detector, tiny_images
from tests.tiny import tiny_detection
from tools.bench_coco_eval import made_up_set
from tools.bench_detect import as_plain, made_up_batch
from tools.cli import app
from tools.verify.detection_reference import fixed_permutation
from transfer.detection.settings import DetectConfig


def overrides(**changes: object) -> list[str]:
    return tiny_detection(Path("none"), Path("none"), Path("none"), **changes)


@pytest.mark.parametrize("with_cascade", [False, True])
def test_the_plain_twin_has_the_same_losses_and_detections(with_cascade: bool) -> None:
    images, sizes, targets = tiny_images()
    model, plain = tiny_detector(with_cascade), as_plain(tiny_detector(with_cascade))
    for detector in (model, plain):  # a difference to relative positions of zero would go unseen
        generator = torch.Generator().manual_seed(1)
        for name, table in detector.named_parameters():
            if "rel_pos" in name:
                torch.nn.init.normal_(table, std=0.5, generator=generator)
    assert list(model.state_dict()) == list(plain.state_dict())
    expected = model.losses(images[:1], sizes[:1], targets[:1], fixed_permutation)
    found = plain.losses(images[:1], sizes[:1], targets[:1], fixed_permutation)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert plain.losses(images, sizes, targets, fixed_permutation).keys() == expected.keys()
    originals = [(64, 48), (40, 64)]
    pairs = zip(model.detect(images, sizes, originals), plain.detect(images, sizes, originals), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.boxes, theirs.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=1e-4)


def test_the_batch_has_objects_and_the_size_of_the_network() -> None:
    import numpy as np

    coco, _ = made_up_set(3, np.random.default_rng(0))
    config = load_config(DetectConfig, None, overrides(jitter__min_scale=1))
    batch = made_up_batch(coco, config, 3)
    assert batch.images.shape == (3, 3, 32, 32) and sum(len(target.labels) for target in batch.targets) > 3


def test_two_tables_with_a_json_line_each() -> None:
    sizes = [text for text in overrides(img_size=64, patch_size=16) if not text.startswith(("data=", "out=", "back"))]
    sizes = [text for text in sizes if not text.startswith("global_blocks")]
    arguments = ["bench", "detect", *sizes, "--model", "tiny", "--batch-sizes", "2", "--rounds", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines] == ["detect-train", "detect-inference"]
    for line in lines:
        assert line["images_per_s"] > 0 and line["baseline_images_per_s"] > 0 and line["ratio"] > 0
        assert line["seconds_per_image"] == pytest.approx(1 / line["images_per_s"], rel=1e-2)


def test_an_unknown_size_is_refused() -> None:
    result = CliRunner().invoke(app, ["bench", "detect", "--model", "giant"])
    assert isinstance(result.exception, ConfigError) and "--model giant: expected one of tiny" in str(result.exception)
