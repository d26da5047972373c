"""`rcmae classify` from end to end: protocols, kills, several processes, and what a user can get wrong."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.config import load_config
from core.errors import ConfigError, DataError
from tests.harness import ForkServer, fresh, kill_after
from tests.test_datasets import make_folder
from tests.test_resume import assert_whole
from tests.tiny import draw_images, tiny_classification
from transfer.classification.model import load_classifier
from transfer.classification.run import classify, dry_run, evaluate
from transfer.classification.settings import ClassifyConfig

TRAINED = ("finetune", "linprobe")


def run(server: ForkServer, overrides: list[str], log: Path, **options: object) -> int:
    return server.run(overrides, log, stage="classify", **options)


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def load(*overrides: str) -> ClassifyConfig:
    return load_config(ClassifyConfig, None, ["data=x", "out=y", "backbone=z", *overrides])


@pytest.mark.parametrize("protocol", TRAINED)
def test_what_is_trained_is_exported_and_evaluates_the_same(
    server: ForkServer, data: Path, backbone: Path, tmp_path: Path, protocol: str
) -> None:
    out, log, split = tmp_path / "out", tmp_path / "log", tmp_path / "split"
    shutil.copytree(data, split / "train")
    draw_images(split / "val", 10)
    assert run(server, tiny_classification(split, out, backbone, protocol), log) == 0, log.read_text()
    found = json.loads((out / "results.json").read_text())
    assert found["figures"].keys() == {"eval/top1_pct", "eval/top5_pct", "eval/loss"}
    assert found["per_class_pct"].keys() == {"even", "odd"} and found["test_images"] == 10
    assert (out / "confusion.png").stat().st_size > 1000
    assert load_classifier(out / "classifier").classes == ("even", "odd")
    again = tiny_classification(split, tmp_path / "again", out / "classifier")
    figures = evaluate(load_config(ClassifyConfig, None, again))["figures"]
    assert figures == pytest.approx(found["figures"], rel=1e-5)
    with pytest.raises(DataError, match=r"no val/ in it.*give test_data=FOLDER"):
        evaluate(load_config(ClassifyConfig, None, tiny_classification(data, tmp_path / "all", out / "classifier")))


def test_knn_gives_every_k_on_both_features(data: Path, backbone: Path, tmp_path: Path) -> None:
    overrides = tiny_classification(data, tmp_path / "out", backbone, "knn", knn__k="[1, 5, 100]")
    figures = classify(load_config(ClassifyConfig, None, overrides))["figures"]
    assert figures.keys() == {
        f"knn/{feature}_k{k}_top{top}_pct" for feature in ("cls", "mean") for k in (1, 5) for top in (1, 5)
    }  # 100 neighbours are more than there are images


@pytest.mark.parametrize("protocol", TRAINED)
def test_kills_and_crash_points(server: ForkServer, data: Path, backbone: Path, tmp_path: Path, protocol: str) -> None:
    epochs = {f"{protocol}__epochs": 30, "checkpoint__every_steps": 5}
    reference, out, log = tmp_path / "reference", tmp_path / "out", tmp_path / "log"
    begun = time.perf_counter()
    assert run(server, tiny_classification(data, reference, backbone, protocol, **epochs), log) == 0, log.read_text()
    whole, rng = time.perf_counter() - begun, random.Random(0)
    points = int(Path(f"{log}.points").read_text())  # of the writer, in a run that nothing disturbs
    overrides = tiny_classification(data, out, backbone, protocol, **epochs)
    for _ in range(4):
        kill_after(server, overrides, log, rng.uniform(0.1, 0.4) * whole, stage="classify")
    assert run(server, overrides, log) == 0, log.read_text()
    assert_whole(out, reference)
    for point in rng.sample(range(1, points), 4):
        assert (
            run(server, tiny_classification(data, fresh(out), backbone, protocol, **epochs), log, crash_at=point) == -9
        )
        assert run(server, overrides, log) == 0, log.read_text()
        assert_whole(out, reference)


@pytest.mark.parametrize("protocol", TRAINED)
def test_two_processes_train_and_evaluate_as_one(
    server: ForkServer, data: Path, backbone: Path, tmp_path: Path, protocol: str
) -> None:
    for size in (1, 2):
        out, log = tmp_path / str(size), tmp_path / f"log{size}"
        overrides = tiny_classification(data, out, backbone, protocol, engine__accumulation=2 // size)
        assert run(server, overrides, log, size=size) == 0, log.read_text()
    found = [summary(tmp_path / str(size)) for size in (1, 2)]
    assert found[1]["figures"] == pytest.approx(found[0]["figures"], rel=1e-5)
    one, two = (load_file(tmp_path / str(size) / "classifier" / "model.safetensors") for size in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_knn_of_two_processes_is_that_of_one(server: ForkServer, data: Path, backbone: Path, tmp_path: Path) -> None:
    for size in (1, 2):
        log = tmp_path / f"log{size}"
        overrides = tiny_classification(data, tmp_path / str(size), backbone, "knn", knn__k="[3]")
        assert run(server, overrides, log, size=size) == 0, log.read_text()
    assert summary(tmp_path / "1")["figures"] == summary(tmp_path / "2")["figures"]


def test_random_initialisation_is_said_and_differs(data: Path, backbone: Path, tmp_path: Path) -> None:
    overrides = tiny_classification(data, tmp_path / "out", backbone, "knn", knn__k="[3]", init="random", seed=1)
    found = classify(load_config(ClassifyConfig, None, overrides))
    assert "random initialisation: no pretrained weights" in found["flags"]
    other = classify(
        load_config(ClassifyConfig, None, tiny_classification(data, tmp_path / "b", backbone, "knn", knn__k="[3]"))
    )
    assert found["backbone"] != other["backbone"]


def test_another_backbone_is_refused_on_resume(server: ForkServer, data: Path, backbone: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert run(server, tiny_classification(data, out, backbone), log) == 0
    other = tmp_path / "other"
    config = load_config(ClassifyConfig, None, tiny_classification(data, out, backbone))
    from core.backbone_io import export_backbone, load_backbone

    vit, _ = load_backbone(config.backbone)
    with torch.no_grad():
        vit.cls_token += 1
    export_backbone(other, vit, {})
    assert run(server, tiny_classification(data, out, other), log) == 3
    assert "but the run was started from" in log.read_text().splitlines()[-1]


# ---- what a user can get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [("linprobe.epochs=3", "linprobe: has no effect with protocol=finetune"),
     ("finetune.warmup_epochs=100", "finetune.warmup_epochs=100: must be below finetune.epochs=100"),
     ("mean=[0.5]", "mean and std: give both or none"),
     ("finetune.mix.mixupp=1", "did you mean 'finetune.mix.mixup'?")],
)  # fmt: skip
def test_contradictions(override: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line.replace("?", r"\?")):
        load(override)


def test_sets_without_labels_are_answered_with_the_fix(backbone: Path, tmp_path: Path) -> None:
    flat = make_folder(tmp_path / "flat", ["train/a/1.jpg", "train/b/2.jpg", "val/x_1.jpg", "val/x_2.jpg"])
    overrides = tiny_classification(flat, tmp_path / "out", backbone, batch_size=2)
    with pytest.raises(DataError, match=r"no class folders|without class folders; give test_labels=FILE"):
        dry_run(load_config(ClassifyConfig, None, overrides))


def test_a_label_file(backbone: Path, tmp_path: Path) -> None:
    flat = make_folder(tmp_path / "flat", ["train/a/1.jpg", "train/b/2.jpg", "val/x_1.jpg", "val/x_2.jpg"])
    labels = tmp_path / "labels.txt"
    overrides = tiny_classification(flat, tmp_path / "out", backbone, batch_size=2, test_labels=labels)
    for text, line in (
        ("x_1.jpg b\nx_2.jpg 0\n", None),
        ("x_1.jpg b\n", "no line for val/x_2.jpg"),
        ("x_1.jpg c\nx_2.jpg a\n", "expected `NAME CLASS` with one of the 2 classes"),
        ("490\n361\n", "the development kit of ImageNet counts classes in an order of its own"),
    ):
        labels.write_text(text)
        if line is None:
            assert any("2 to test on" in row for row in dry_run(load_config(ClassifyConfig, None, overrides)))
        else:
            with pytest.raises(DataError, match=line):
                dry_run(load_config(ClassifyConfig, None, overrides))


def test_a_class_that_the_classifier_does_not_know(
    server: ForkServer, data: Path, backbone: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert run(server, tiny_classification(data, out, backbone), log) == 0, log.read_text()
    other = draw_images(tmp_path / "other", 6)
    (other / "odd").rename(other / "odds")
    config = load_config(
        ClassifyConfig, None, tiny_classification(data, tmp_path / "eval", out / "classifier", test_data=other)
    )
    with pytest.raises(DataError, match="odds first, are no classes of the classifier; did you mean odd"):
        evaluate(config)
