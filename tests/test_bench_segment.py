"""The benchmark of the segmentor: that its plain twin is the same network, and what is printed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from core.errors import ConfigError
from tests.test_segmentation_inference import noise, tiny_segmentor
from tools import bench_data, bench_segment
from tools.bench_segment import Bench, made_up_batch, require_same, segmentor_of, settled
from tools.cli import app
from tools.plain_segmentor import as_plain, plain_confusion, plain_labels
from transfer.segmentation.miou import confusion_matrix
from transfer.segmentation.segmentor import Segmentor
from transfer.segmentation.slide import InferenceConfig, image_labels

WINDOWS = InferenceConfig(crop=32, stride=20)
KEYS = ["img_size=32", "inference.stride=20", "num_classes=5", "segmentor.channels=8", "segmentor.aux_channels=4",
        "device=cpu"]  # fmt: skip


def trained(**changes: bool) -> Segmentor:
    """A network whose tables and statistics are not those of the first step, of which a difference could go unseen."""
    model, generator = tiny_segmentor(**changes), torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "bias_table" in name or "gamma" in name or "conv_seg" in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2, generator=generator)
    return model


def squares(height: int, width: int) -> Tensor:
    """An image [1, 3, H, W] with something to see in it."""
    return (
        2
        * noise(1, 3, height, width)[:, :, ::9, ::9]
        .repeat_interleave(9, 2)
        .repeat_interleave(9, 3)[..., :height, :width]
    )


def tiny() -> Bench:
    return settled(None, KEYS, "tiny", "47x40")


@pytest.mark.parametrize("changes", [{}, {"rel_pos_bias": True, "layer_scale": True}])
@pytest.mark.parametrize("training", [False, True])
def test_the_plain_twin_has_the_same_losses(changes: dict[str, bool], training: bool) -> None:
    model = trained(**changes)
    plain = as_plain(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(a is b for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    labels = torch.randint(0, 5, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    labels[:, :5] = 255
    gradients = []
    for each in (model.train(training), plain.train(training)):
        losses = each.losses(noise(2, 3, 32, 32), labels)
        sum(losses.values()).backward()
        gradients.append(({name: p.grad for name, p in each.named_parameters()}, losses, dict(each.named_buffers())))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("size", [(45, 90), (20, 50)])
def test_the_plain_twin_has_the_same_labels(size: tuple[int, int]) -> None:
    model, images = trained(), squares(*size)
    with torch.no_grad():  # no class above the others
        model.decode_head.conv_seg.bias -= model.logits(images).values.mean(dim=(0, 2, 3))
    for wanted in (size, (33, 71)):
        ours = image_labels(model, [images], wanted, WINDOWS)[0]
        assert ours.flatten().bincount().topk(2).values.min() > 0.05 * ours.numel()
        assert torch.equal(plain_labels(as_plain(model).eval(), images, wanted, WINDOWS), ours)


def test_both_count_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    found, labels = (torch.randint(0, 5, (9, 7), generator=generator) for _ in range(2))
    labels[:2] = 255
    expected = confusion_matrix(found, labels, 5, 255).numpy()
    counted = plain_confusion(found, labels, 5, 255)
    assert counted.dtype == float and (counted == expected).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("decode_head.fpn_bottleneck.conv.weight", "other losses"),
        ("auxiliary_head.conv_seg.bias", "other losses"),
        ("labels", "other labels"),
    ],
)
def test_twins_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    bench = tiny()
    require_same(bench)

    def another(bench: Bench, plain: bool = False) -> Segmentor:
        model = segmentor_of(bench, plain)
        if plain and name != "labels":
            with torch.no_grad():
                model.get_parameter(name)[0] += 1
        return model

    def moved(*arguments: Any) -> Tensor:
        return plain_labels(*arguments).roll(1, dims=1)

    monkeypatch.setattr(bench_segment, "segmentor_of", another)
    if name == "labels":
        monkeypatch.setattr(bench_segment, "plain_labels", moved)
    with pytest.raises(AssertionError, match=said):
        require_same(bench)


def test_the_batch_has_labels_to_count_and_to_ignore() -> None:
    batch = made_up_batch(tiny(), 3)
    assert batch.images.shape == (3, 3, 32, 32) and batch.labels.shape == (3, 32, 32)
    assert sorted(batch.labels.unique().tolist()) == [0, 1, 2, 3, 4, 255]


def test_two_tables_with_a_json_line_each() -> None:
    arguments = ["bench", "segment", *KEYS, "--batch-sizes", "2", "--image", "47x40", "--rounds", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines] == ["segment-train", "segment-inference"]
    for line in lines:
        assert line["images_per_s"] > 0 and line["baseline_images_per_s"] > 0 and line["ratio"] > 0
        assert line["peak_memory_gib"] is not None and line["peak_memory_ratio"] is not None
    train, inference = lines
    assert train["batch_size"] == 2 and "ViT tiny, UperNet, 5 classes" in result.output
    assert 0 < inference["confusion_share_pct"] < 100 and inference["images"] == 2000
    assert inference["evaluation_s"] == pytest.approx(2000 * inference["seconds_per_image"], rel=1e-2)
    share = inference["confusion_s"] / inference["evaluation_s"]
    assert inference["confusion_share_pct"] == pytest.approx(100 * share, rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "giant"], "--model giant: expected one of tiny"),
        (["--image", "683"], "--image 683: expected WIDTHxHEIGHT in pixels, as in 683x512"),
        (["--batch-sizes", "1"], "--batch-sizes 1: expected whole numbers from 2"),
        (["img_size=40"], "img_size=40: expected a multiple of the patches, 16 px"),
        (["head=linear"], "head=linear: what is timed is UperNet"),
        (["inference.mode=whole"], "inference.mode=whole: what is timed is windows"),
        (["rel_pos_bias=true", "inference.crop=600"], "inference.crop=600: rel_pos_bias binds"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "segment", "device=cpu", *arguments])
    assert isinstance(result.exception, ConfigError) and said in str(result.exception)


def test_rows_of_a_gpu_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str | None, Path]] = []
    assert list(bench_data.GPU_ROWS) == ["pretrain", "images", "detect", "segment"]
    for name in bench_data.GPU_ROWS:
        monkeypatch.setitem(bench_data.GPU_ROWS, name, lambda data, work, name=name: done.append((name, data, work)))
    monkeypatch.setattr(bench_data, "choose_device", lambda name: torch.device("cpu"))
    assert CliRunner().invoke(app, ["bench", "gpu", "my", "--work", "w", "--only", "segment,images"]).exit_code == 0
    assert done == [("segment", "my", Path("w")), ("images", "my", Path("w"))]
    assert CliRunner().invoke(app, ["bench", "gpu"]).exit_code == 0
    assert [name for name, _, _ in done[2:]] == ["pretrain", "images", "detect", "segment"]
    result = CliRunner().invoke(app, ["bench", "gpu", "--only", "knn"])
    assert isinstance(result.exception, ConfigError) and "--only knn: expected any of pretrain" in str(result.exception)
