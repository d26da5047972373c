"""`rcmae detect` and `rcmae predict` from end to end: export, kills, several processes, what a user can get wrong."""

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from core.config import load_config
from core.errors import CheckpointError, ConfigError, DataError
from core.vit import ViT, ViTConfig
from tests.harness import ForkServer, fresh, kill_after
from tests.test_resume import assert_whole
from tests.tiny import tiny_detection
from tools.predict import predict
from transfer.detection.coco_eval import read_results
from transfer.detection.coco_file import coco_paths, read_coco
from transfer.detection.dense_vit import dense_vit
from transfer.detection.detector import load_detector
from transfer.detection.run import dry_run, evaluate_detector
from transfer.detection.settings import DetectConfig


def run(server: ForkServer, overrides: list[str], log: Path, **options: object) -> int:
    return server.run(overrides, log, stage="detect", **options)


def load(*overrides: str) -> DetectConfig:
    return load_config(DetectConfig, None, ["data=x", "out=y", "backbone=z", *overrides])


def evaluate(data: Path, out: Path, detector: Path) -> dict:
    return evaluate_detector(load_config(DetectConfig, None, tiny_detection(data, out, detector)))


@pytest.fixture(scope="module")
def finished(server: ForkServer, coco: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    log = out.parent / "log"
    assert run(server, tiny_detection(coco, out, backbone), log) == 0, log.read_text()
    return out


# ---- training and evaluation ----------------------------------------------------------------------------------------


def test_what_is_trained_is_exported_and_evaluates_the_same(finished: Path, coco: Path, tmp_path: Path) -> None:
    found = json.loads((finished / "results.json").read_text())
    assert found["test_images"] == 5 and found["images"] == 15 and found["images_seen"] == 24
    assert {"box_ap", "box_ap50", "mask_ap", "mask_ap50"} <= found["figures"].keys()
    val = read_coco(coco_paths(coco, "val"))
    assert len(read_results(finished / "detections.json", val)) == 5 * 6  # as many as an image may have
    loaded = load_detector(finished / "detector")
    assert loaded.names[0] == "circle" and loaded.category_ids == tuple(range(1, 11)) and loaded.side == 32
    again = evaluate(coco, tmp_path / "again", finished / "detector")
    assert again["figures"] == found["figures"]
    theirs, ours = (json.loads((out / "detections.json").read_text()) for out in (finished, tmp_path / "again"))
    assert theirs == ours
    for step in (0, 6):
        assert Image.open(finished / "pictures" / f"detections_{step:07d}.png").size == (3 * 320, 2 * 320)


def test_a_cascade_trains_with_bitmaps_from_random_weights_without_windows(
    server: ForkServer, coco: Path, backbone: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    changes = {
        "init": "random", "detector__cascade": True, "steps": 3, "activation_checkpointing": True, "rel_pos": False,
        "window_size": "null", "global_blocks": "null", "keep_background": True, "eval_precision": "bf16",
    }  # fmt: skip
    assert run(server, tiny_detection(coco, out, backbone, **changes), log) == 0, log.read_text()
    text = log.read_text()
    assert "Cascade Mask R-CNN" in text and "global; weights" in text and "16 images to learn from" in text
    summary = json.loads((out / "summary.json").read_text())
    assert "random initialisation: no pretrained weights" in summary["flags"]
    assert "evaluated in bf16" in summary["flags"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert "train/loss_cls_stage2" in rows[1]


@pytest.mark.parametrize("cascade", [False, True])
def test_kills_and_crash_points(server: ForkServer, coco: Path, backbone: Path, tmp_path: Path, cascade: bool) -> None:
    reference, out, log = tmp_path / "reference", tmp_path / "out", tmp_path / "log"
    changes = {"detector__cascade": cascade, "batch_size": 2}
    begun = time.perf_counter()
    assert run(server, tiny_detection(coco, reference, backbone, **changes), log) == 0, log.read_text()
    whole, rng = time.perf_counter() - begun, random.Random(cascade)
    points = int(Path(f"{log}.points").read_text())
    overrides = tiny_detection(coco, out, backbone, **changes)
    kill_after(server, overrides, log, rng.uniform(0.3, 0.8) * whole, stage="detect")
    assert run(server, overrides, log) == 0, log.read_text()
    assert_whole(out, reference)
    point = rng.randrange(1, points)
    assert run(server, tiny_detection(coco, fresh(out), backbone, **changes), log, crash_at=point) == -9
    assert run(server, overrides, log) == 0, log.read_text()
    assert_whole(out, reference)
    assert "not bit-exact" not in log.read_text()


def test_two_processes_train_and_evaluate_as_one(
    server: ForkServer, coco: Path, backbone: Path, tmp_path: Path
) -> None:
    """Losses are normalised per micro-batch; five images cannot be shared evenly, and each counts once."""
    for name, size, mode in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp2", 2, "fsdp2")):
        log = tmp_path / f"{name}.log"
        changes = {"engine__accumulation": 2 // size, "engine__parallel": mode, "steps": 3}
        assert run(server, tiny_detection(coco, tmp_path / name, backbone, **changes), log, size=size) == 0, (
            log.read_text()
        )
    one, expected = tmp_path / "one", load_file(tmp_path / "one" / "detector" / "model.safetensors")
    for name in ("ddp", "fsdp2"):
        for key, tensor in load_file(tmp_path / name / "detector" / "model.safetensors").items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
        theirs, ours = (json.loads((out / "detections.json").read_text()) for out in (one, tmp_path / name))
        for key in ("image_id", "category_id"):
            assert [entry[key] for entry in ours] == [entry[key] for entry in theirs]
        assert [entry["score"] for entry in ours] == pytest.approx([entry["score"] for entry in theirs], abs=1e-4)
        figures, wanted = (json.loads((o / "summary.json").read_text())["figures"] for o in (tmp_path / name, one))
        assert figures == pytest.approx(wanted, abs=1e-6)


def test_two_processes_evaluate_a_detector_to_the_bit(
    server: ForkServer, finished: Path, coco: Path, tmp_path: Path
) -> None:
    overrides = tiny_detection(coco, tmp_path / "out", finished / "detector")
    assert server.run(overrides, tmp_path / "log", size=2, stage="detect --eval") == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "out" / "detections.json").read_bytes() == (finished / "detections.json").read_bytes()


def test_another_backbone_is_refused_on_resume(
    server: ForkServer, finished: Path, coco: Path, backbone: Path, tmp_path: Path
) -> None:
    out, other, log = tmp_path / "out", tmp_path / "other", tmp_path / "log"
    shutil.copytree(finished, out)
    shutil.copytree(backbone, other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "pos_embed": weights["pos_embed"] + 1}, other / "model.safetensors")
    assert run(server, tiny_detection(coco, out, other), log) == 3
    assert "but the run was started from" in log.read_text().splitlines()[-1]


# ---- predict --------------------------------------------------------------------------------------------------------


def test_predict_on_a_folder(finished: Path, coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "images", tmp_path / "found"
    images.mkdir()
    name = "a\x1b[31m\n photo.jpg"
    shutil.copy(next((coco / "val2017").iterdir()), images / name)
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(images / "grey.png")
    predict(finished / "detector", images, out, 0.0, "cpu", "fp32", tmp_path / "cache")
    found, described = (json.loads((out / f"{part}.json").read_text()) for part in ("detections", "images"))
    sizes = {entry["id"]: [entry["height"], entry["width"]] for entry in described["images"]}
    assert len(sizes) == 2 and found
    assert described["categories"][0] == {"id": 1, "name": "circle"}
    for entry in found:
        x, y, width, height = entry["bbox"]
        rows, columns = sizes[entry["image_id"]]
        assert 0 <= x < x + width <= columns + 1e-3 and 0 <= y < y + height <= rows + 1e-3
        assert 1 <= entry["category_id"] <= 10 and 0.05 < entry["score"] <= 1
        assert entry["segmentation"]["size"] == [rows, columns]
    pictures = sorted((out / "pictures").iterdir())
    assert len(pictures) == 2 and all("\x1b" not in path.name and "\n" not in path.name for path in pictures)
    for path in pictures:
        assert list(Image.open(path).size) == sizes[int(path.name[:6])][::-1]
    said = capfd.readouterr()
    assert "left out broken.jpg" in said.out + said.err and "\x1b[31m" not in said.out + said.err


def test_predictions_are_coco_results(finished: Path, coco: Path, tmp_path: Path) -> None:
    """Of the validation images they are what the evaluation found, and read back as results of a set with its JSON."""
    out = tmp_path / "found"
    predict(finished / "detector", coco / "val2017", out, 0.5, "cpu", "fp32", tmp_path / "cache")
    described = json.loads((out / "images.json").read_text())
    names = {entry["id"]: entry["file_name"] for entry in described["images"]}
    found = [
        (int(names[entry["image_id"]].split(".")[0]), entry["score"], entry["segmentation"])
        for entry in json.loads((out / "detections.json").read_text())
    ]
    evaluated = json.loads((finished / "detections.json").read_text())
    assert found == [(entry["image_id"], entry["score"], entry["segmentation"]) for entry in evaluated]
    as_set = tmp_path / "set.json"
    as_set.write_text(json.dumps({**described, "annotations": []}))
    val = read_coco(coco_paths(None, "val", as_set, coco / "val2017"))
    assert len(read_results(out / "detections.json", val)) == len(found)


def test_predict_on_a_photograph_and_what_it_refuses(finished: Path, coco: Path, tmp_path: Path) -> None:
    detector, photograph, cache = finished / "detector", next((coco / "val2017").iterdir()), tmp_path / "cache"
    predict(detector, photograph, tmp_path / "one", 0.5, "cpu", "fp32", cache)
    assert len(list((tmp_path / "one" / "pictures").iterdir())) == 1
    with pytest.raises(ConfigError, match="not empty; give another --out"):
        predict(detector, photograph, tmp_path / "one", 0.5, "cpu", "fp32", cache)
    (tmp_path / "notes.txt").write_text("no photograph")
    with pytest.raises(DataError, match=r"no image by its ending|no images"):
        predict(detector, tmp_path / "notes.txt", tmp_path / "two", 0.5, "cpu", "fp32", cache)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(DataError, match="no image in it could be read"):
        predict(detector, tmp_path / "bad", tmp_path / "three", 0.5, "cpu", "fp32", cache)
    with pytest.raises(CheckpointError, match="no detector directory"):
        predict(tmp_path, photograph, tmp_path / "four", 0.5, "cpu", "fp32", cache)
    assert not (tmp_path / "four").exists()


# ---- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [("warmup_steps=9 steps=9", "warmup_steps=9: must be below steps=9"),
     ("detector.num_classes=3", "detector.num_classes: is that of the annotations; leave it out"),
     ("optim.lr=null", "optim.lr: detection has no rule that scales it; give the peak rate"),
     ("optim.min_lr=1e-6", "optim.min_lr: has no effect on a rate that drops at milestones"),
     ("window_size=null global_blocks=[1]", "global_blocks: has no effect without window_size"),
     ("engine.accumulation=3", "engine.accumulation=3: does not divide batch_size=64"),
     ("detector.num_clases=3", "did you mean 'detector.num_classes'?")],
)  # fmt: skip
def test_contradictions(overrides: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line.replace("?", r"\?").replace("[", r"\[")):
        load(*overrides.split())


def test_the_published_drops() -> None:
    assert load().drops() == (163889, 177546)
    assert load("steps=138281").drops() == (122916, 133159)
    assert load("milestones=[5, 7]").drops() == (5, 7)


def test_data_that_do_not_fit(finished: Path, coco: Path, backbone: Path, tmp_path: Path) -> None:
    def prepared(**changes: object) -> DetectConfig:
        return load_config(DetectConfig, None, tiny_detection(coco, tmp_path / "out", backbone, **changes))

    assert any("15 images to learn from" in line for line in dry_run(prepared()))
    with pytest.raises(ConfigError, match="batch_size=16: more than the 15 images of data"):
        dry_run(prepared(batch_size=16))
    tree = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    tree["categories"][2]["name"] = "tri\x1bangle"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="other categories than in") as caught:
        dry_run(prepared(val_json=other))
    assert str(caught.value).isprintable()
    tree["categories"] = tree["categories"][1:]
    tree["annotations"] = []
    other.write_text(json.dumps(tree))
    overrides = tiny_detection(coco, tmp_path / "eval", finished / "detector", val_json=other)
    with pytest.raises(DataError, match="9 categories, the detector knows 10"):
        evaluate_detector(load_config(DetectConfig, None, overrides))
    with pytest.raises(CheckpointError, match="no detector directory"):
        evaluate(coco, tmp_path / "eval", tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"patch_size": 14}, "patches of 14 px, the feature pyramid needs a side that 4 divides"),
        ({"img_size": 30}, "img_size=30: not divisible by patches of 4 px"),
        ({"global_blocks": [2]}, r"global_blocks=\[2\]: the backbone has 2 blocks"),
    ],
)
def test_a_backbone_that_does_not_fit(
    coco: Path, backbone: Path, tmp_path: Path, changes: dict[str, object], line: str
) -> None:
    with pytest.raises(ConfigError, match=line):
        dry_run(load_config(DetectConfig, None, tiny_detection(coco, tmp_path / "out", backbone, **changes)))


def test_patches_of_another_side_are_resampled() -> None:
    plain = ViT(ViTConfig(img_size=(42, 42), patch_size=14, embed_dim=8, depth=4, num_heads=2))
    plain.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.constant_(plain.patch_embed.proj.weight, 0.5)
    dense = dense_vit(plain, load("patch_size=16", "img_size=64", "window_size=2"))
    assert dense.config.img_size == (32, 32) and dense.pos_embed.shape == (1, 1 + 4, 8)
    assert torch.equal(dense.pos_embed[:, 0], plain.pos_embed[:, 0])
    torch.testing.assert_close(dense.patch_embed.proj.weight, torch.full((8, 3, 16, 16), 0.5))
    assert torch.equal(dense.blocks[1].mlp.fc1.weight, plain.blocks[1].mlp.fc1.weight)
    assert dense.config.global_blocks == (0, 1, 2, 3) and dense.config.window_size == 2


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda ours: ours.pop("names"), "not a detector's description: 'names'"),
        (lambda ours: ours.update(kind="classifier"), "it describes a classifier"),
        (lambda ours: ours["vit"].update(depth=3), "Missing key"),
        (lambda ours: ours["detector"].update(num_classes=4), "size mismatch"),
    ],
)
def test_a_detector_that_is_none(finished: Path, tmp_path: Path, change: object, line: str) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(finished / "detector", folder)
    description = json.loads((folder / "config.json").read_text())
    change(description["rcmae"])
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=line) as caught:
        load_detector(folder)
    assert "\n" not in str(caught.value)


def test_a_broken_image_is_one_line_of_an_evaluation_with_workers(
    server: ForkServer, finished: Path, coco: Path, tmp_path: Path
) -> None:
    shutil.copytree(coco, tmp_path / "coco")
    first = sorted((tmp_path / "coco/val2017").iterdir())[0]
    first.write_bytes(first.read_bytes()[:40])
    overrides = [*tiny_detection(tmp_path / "coco", tmp_path / "out", finished / "detector"), "loader.num_workers=1"]
    assert server.run(overrides, tmp_path / "log", stage="detect --eval") == 3
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error:")]
    assert first.name in line and "an evaluation counts every image" in line
    assert "Traceback" not in (tmp_path / "log").read_text()
