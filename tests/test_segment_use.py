"""Using a segmentor: `rcmae predict`, `--eval` with keys of its own, the command; and what a user can get wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from core.backbone_io import export_backbone
from core.config import load_config
from core.errors import CheckpointError, ConfigError, DataError
from core.vit import ViT, ViTConfig
from tests.harness import ForkServer
from tests.test_segment_run import HEADS, confusion, evaluate, evaluation, run, tiny
from tests.tiny import tiny_segmentation
from tools.cli import app
from tools.predict import predict
from tools.predict_segment import index_png
from transfer.segmentation.classes import unnamed
from transfer.segmentation.labels import read_label
from transfer.segmentation.run import dry_run, evaluate_segmentor
from transfer.segmentation.settings import InferenceKeys, SegmentConfig


def load(*overrides: str) -> SegmentConfig:
    return load_config(SegmentConfig, None, ["data=x", "out=y", "backbone=z", *overrides])


# ---- predict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_predict_labels_what_the_evaluation_labelled(
    segmented: dict[str, Path], ade: Path, tmp_path: Path, head: str, capfd: pytest.CaptureFixture[str]
) -> None:
    root, images, out = ade / "ADEChallengeData2016", tmp_path / "images", tmp_path / "found"
    shutil.copytree(root / "images" / "validation", images)
    (images / "broken\x1b[31m.jpg").write_bytes(b"\xff\xd8 no picture")
    predict(segmented[head] / "segmentor", images, out, None, "cpu", "fp32", tmp_path / "cache")
    described = json.loads((out / "classes.json").read_text())
    assert described["classes"][149] == {"index": 149, "name": "flag", "colour": "#5c00ff"}
    assert len(described["classes"]) == 150 and len(described["images"]) == 5
    found = np.zeros((150, 150), np.int64)
    for entry in described["images"]:
        label = np.asarray(Image.open(root / "annotations" / "validation" / f"{Path(entry['file_name']).stem}.png"))
        data = (out / entry["label"]).read_bytes()
        predicted = read_label(data)
        assert predicted.shape == label.shape == (entry["height"], entry["width"])
        np.add.at(found, (label[label > 0].astype(int) - 1, predicted[label > 0]), 1)
        with Image.open(out / entry["label"]) as image:
            assert image.mode == "P" and image.getpalette()[:6] == [0x78] * 3 + [0xB4, 0x78, 0x78]
        overlay = Image.open(out / entry["label"].replace("labels", "overlays").replace(".png", ".jpg"))
        assert overlay.height > entry["height"] and overlay.width >= entry["width"]  # the legend is below
    assert np.array_equal(found, confusion(segmented[head]))
    said = capfd.readouterr()
    assert "left out broken\\x1b[31m.jpg" in said.out + said.err and "\x1b[31m" not in said.out + said.err


def test_predict_on_what_it_cannot(segmented: dict[str, Path], ade: Path, tmp_path: Path) -> None:
    segmentor, cache = segmented["linear"] / "segmentor", tmp_path / "cache"
    photograph = next((ade / "ADEChallengeData2016" / "images" / "validation").iterdir())
    with pytest.raises(ConfigError, match="--min-score: a segmentor gives every pixel its likeliest class"):
        predict(segmentor, photograph, tmp_path / "one", 0.5, "cpu", "fp32", cache)
    with pytest.raises(CheckpointError, match="no detector directory, and no segmentor's"):
        predict(tmp_path, photograph, tmp_path / "one", None, "cpu", "fp32", cache)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(DataError, match="no image in it could be read"):
        predict(segmentor, tmp_path / "bad", tmp_path / "one", None, "cpu", "fp32", cache)
    assert not (tmp_path / "one").exists()


def test_index_pngs_of_many_classes_and_of_few() -> None:
    labels = torch.arange(6).view(2, 3) * 60
    assert read_label(index_png(labels, unnamed(301))).tolist() == labels.tolist()
    assert read_label(index_png(labels.clamp(max=2), unnamed(3))).tolist() == labels.clamp(max=2).tolist()
    assert read_label(index_png(labels.clamp(max=255), unnamed(256))).dtype == np.uint8


# ---- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_value_that_is_no_class(server: ForkServer, ade: Path, backbone: Path, tmp_path: Path, workers: int) -> None:
    data, out, log = tmp_path / "ade", tmp_path / "out", tmp_path / "log"
    shutil.copytree(ade / "ADEChallengeData2016", data)
    path = data / "annotations" / "training" / "ADE_tra_00000003.png"
    label = np.asarray(Image.open(path)).copy()
    label[5, 7:10] = 200
    Image.fromarray(label).save(path)
    overrides = tiny_segmentation(data, out, backbone, loader__num_workers=workers, log__every_steps=100)
    assert run(server, overrides, log) == 3
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: ") and "ADE_tra_00000003.png: value 200 in 3 pixels" in last
    assert all(text in last for text in ("label_shift", "label_map", "ignore_index"))
    assert "Traceback" not in log.read_text()
    assert [p for p in out.rglob(".*") if p.name != ".lock"] == [] and not (out / "segmentor").exists()
    Image.fromarray(np.asarray(Image.open(path)) % 151).save(path)  # mended, it goes on
    assert run(server, overrides, log) == 0, log.read_text()


def test_a_value_that_is_no_class_in_an_evaluation(
    server: ForkServer, segmented: dict[str, Path], ade: Path, tmp_path: Path
) -> None:
    data, log = tmp_path / "ade", tmp_path / "log"
    shutil.copytree(ade / "ADEChallengeData2016", data)
    path = data / "annotations" / "validation" / "ADE_val_00000003.png"
    label = np.full_like(np.asarray(Image.open(path)), 200)
    Image.fromarray(label).save(path)
    overrides = [
        o for o in evaluation(data, tmp_path / "out", segmented["linear"] / "segmentor") if "num_workers" not in o
    ]
    assert server.run([*overrides, "loader.num_workers=1"], log, stage="segment --eval") == 3
    (line,) = [line for line in log.read_text().splitlines() if "error" in line.lower() or "Trace" in line]
    assert f"ADE_val_00000003.png: value 200 in {label.size} pixels" in line
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("warmup_steps=9 steps=9", "warmup_steps=9: must be below steps=9"),
        (
            "segmentor.num_classes=3",
            "segmentor.num_classes: is that of the labels; give num_classes without segmentor.",
        ),
        ("segmentor.ignore_index=200", "segmentor.ignore_index: is that of the labels; give ignore_index without"),
        ("optim.lr=null", "optim.lr: segmentation has no rule that scales it; give the peak rate"),
        ("optim.min_lr=1e-6", "optim.min_lr: has no effect on a rate that ends at zero"),
        ("head=linear drop_path=0.2", "drop_path: has no effect with head=linear"),
        ("head=linear segmentor.channels=8", "segmentor.channels: has no effect with head=linear"),
        ("head=linear engine.parallel=fsdp2", "engine.parallel=fsdp2 and head=linear: one layer needs no sharding"),
        ("engine.accumulation=3", "engine.accumulation=3: does not divide batch_size=16"),
        ("label_map={1: 0} label_shift=1", "label_shift=1: has no effect beside label_map"),
        ("num_classes=300", "ignore_index=255: is one of the 300 classes"),
        ("scales=[]", "scales: "),
        ("augment.scal=3", "did you mean 'augment.scale'?"),
    ],
)
def test_contradictions(overrides: str, line: str) -> None:
    texts = overrides.replace(": ", ":~").split()
    with pytest.raises(ConfigError) as caught:
        load(*(text.replace(":~", ": ") for text in texts))
    assert line in str(caught.value)


def test_sizes_of_windows_follow_from_the_crop() -> None:
    assert [InferenceKeys().settled(side).stride for side in (512, 640, 240)] == [341, 426, 160]
    given = load("inference.crop=100", "inference.stride=50").inference.settled(512)
    assert (given.crop, given.stride) == (100, 50)
    with pytest.raises(ConfigError, match=r"inference.stride=200: beyond the windows of 128 px"):
        load("inference.stride=200").inference.settled(128)


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"batch_size": 15}, ConfigError, "batch_size=15: more than the 14 images of data"),
        ({"batch_size": 1}, ConfigError, "batch_size=1: leaves one image per process and micro-batch"),
        ({"engine__accumulation": 4}, ConfigError, "batch_size=4: leaves one image per process and micro-batch"),
        ({"img_size": 30}, ConfigError, "img_size=30: expected a multiple of the patches of .*, 4 px, from 8 on"),
        ({"img_size": 4}, ConfigError, "img_size=4: expected a multiple of the patches"),
        ({"segmentor__blocks": [0, 1, 2, 3]}, ConfigError, r"segmentor.blocks=\[0, 1, 2, 3\]: the backbone has 2"),
        ({"rel_pos_bias": True, "inference__mode": "whole"}, ConfigError, "inference.mode=whole: rel_pos_bias binds"),
        ({"rel_pos_bias": True, "inference__crop": 64}, ConfigError, "inference.crop=64: rel_pos_bias binds"),
        ({"inference__stride": 33}, ConfigError, "inference.stride=33: beyond the windows of 16 px"),
        ({"classes": "null"}, ConfigError, "classes: missing"),
        ({"num_classes": 19}, ConfigError, "num_classes=19: classes=ade20k has 150"),
        ({"train_images": "nowhere"}, DataError, "nowhere: no such folder"),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    ade: Path, backbone: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], line: str
) -> None:
    with pytest.raises(error, match=line) as caught:
        dry_run(tiny(ade, tmp_path / "out", backbone, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_backbones_that_do_not_fit(ade: Path, tmp_path: Path) -> None:
    grey = ViT(ViTConfig(img_size=(16, 16), patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2))
    export_backbone(tmp_path / "grey", grey, {})
    with pytest.raises(ConfigError, match="for images of 1 channels; segmentation reads RGB"):
        dry_run(tiny(ade, tmp_path / "out", tmp_path / "grey"))


def test_a_linear_head_may_see_one_image_at_a_time(ade: Path, backbone: Path, tmp_path: Path) -> None:
    lines = dry_run(tiny(ade, tmp_path / "out", backbone, "linear", engine__accumulation=4))
    assert any("1 per process x 1 process x 4 accumulated" in line for line in lines)
    assert any("linear head on the frozen backbone" in line for line in lines)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["num_classes=149"], "a segmentor of 150 classes, the keys say 149; leave"),
        (
            ["classes=camvid", "ignore_index=11"],
            "a segmentor of 150 classes, the keys say 11; class 0 is sky, not wall",
        ),
        (["num_classes=150", "inference.mode=whole"], None),
    ],
)
def test_an_evaluation_of_other_classes(
    segmented: dict[str, Path], ade: Path, tmp_path: Path, more: list[str], line: str | None
) -> None:
    if line is None:
        assert evaluate(ade, tmp_path / "out", segmented["linear"] / "segmentor", *more)["test_images"] == 5
        return
    with pytest.raises(DataError, match=line):
        evaluate(ade, tmp_path / "out", segmented["linear"] / "segmentor", *more)
    assert not (tmp_path / "out").exists()


def test_an_evaluation_may_say_what_labels_mean(segmented: dict[str, Path], ade: Path, tmp_path: Path) -> None:
    """Keys win over the directory, and config.yaml says what was done."""
    segmentor, data = segmented["linear"] / "segmentor", tmp_path / "ade"
    shutil.copytree(ade / "ADEChallengeData2016", data)
    for path in data.rglob("*.png"):
        Image.fromarray((np.asarray(Image.open(path)).astype(int) + 5).astype(np.uint8)).save(path)
    with pytest.raises(DataError, match="which is no class"):
        evaluate(data, tmp_path / "first", segmentor)
    for out, more in (
        ("shift", ["label_shift=6"]),
        ("map", [f"label_map={ {v + 6: v for v in range(150)} | {5: 255} }"]),
    ):
        evaluate(data, tmp_path / out, segmentor, *more)
        assert np.array_equal(confusion(tmp_path / out), confusion(segmented["linear"]))
    said = load_config(SegmentConfig, tmp_path / "shift" / "config.yaml")
    assert (said.label_shift, said.augment.scale, said.inference.crop, said.num_classes) == (6, (80, 20), 16, 150)
    again = evaluate_segmentor(said.model_copy(update={"out": tmp_path / "third"}))
    assert again["figures"] == json.loads((tmp_path / "shift" / "summary.json").read_text())["figures"]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_dry_run_of_the_command(ade: Path, backbone: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["segment", *tiny_segmentation(ade, tmp_path / "out", backbone), "--dry-run"])
    assert said.exit_code == 0 and "label_shift: 1" in said.output
    assert "14 images to learn from" in said.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["pretrain", "a=1", "--resume", "never"], ["pretrain", "a=1", "--resume=never"]),
        (["classify", "--eval", "a=1"], ["classify", "a=1", "--resume=auto", "--eval"]),
        (["detect", "a=1"], ["detect", "a=1", "--resume=auto"]),
        (["segment", "x.yaml", "a=1", "--eval"], ["segment", "x.yaml", "a=1", "--resume=auto", "--eval"]),
        (["robust", "a=1"], ["robust", "a=1"]),
    ],
)
def test_many_processes_are_given_the_same_command(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], command: list[str]
) -> None:
    started: list[tuple[int, list[str]]] = []

    def launch(plan: object, given: list[str]) -> int:
        started.append((plan.size, given))
        return 7

    monkeypatch.setattr("tools.cli_options.launch", launch)
    said = CliRunner().invoke(app, [*arguments, "--nproc", "3"], standalone_mode=False)
    assert said.return_value == 7 and started == [(3, command)]
