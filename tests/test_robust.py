"""`rcmae robust` from end to end: known accuracies on fabricated sets, kills, several processes, what is refused.

The fake classifier reads its answer from the colour of an image, so that a tree of plain colours has a known accuracy.
"""

import io
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.backbone_io import export_backbone
from core.config import load_config
from core.errors import CheckpointError, ConfigError, DataError, MachineError
from core.transforms import EvalTransform
from core.vit import ViT, ViTConfig
from robustness.corruptions.apply import BENCHMARK, NAMES, SEVERITIES, corrupt
from robustness.corruptions.digital import jpeg_step
from robustness.evaluation import Images, Reading
from robustness.grid import Cell
from robustness.imagenet_sets import Decoded, columns_of, imagenet_synsets, real_labels, subset_synsets
from robustness.published import PUBLISHED
from robustness.report import draw_heat_map, markdown
from robustness.results import set_results
from robustness.run import dry_run, robust
from robustness.scores import ALEXNET_CLEAN_ERROR, ALEXNET_ERRORS
from robustness.settings import RobustConfig
from robustness.subject import Subject, load_subject
from tests.harness import ForkServer, kill
from tests.tiny import draw_images
from transfer.classification.model import Classifier, export_classifier

CLASSES = imagenet_synsets()
ROOT = Path(__file__).resolve().parent.parent


# --- a fake classifier ----------------------------------------------------------------------------------------------


def colour_of(answer: int) -> tuple[int, ...]:
    """A colour that says a number below 1000, and survives resampling and JPEG."""
    return tuple(14 + 25 * (answer // 10**place % 10) for place in range(3))


def read_answers(images: Tensor) -> Tensor:
    digits = ((images.double().mean(dim=(2, 3)) - 14) / 25).round().clamp(0, 9)  # [B, 3]
    return (digits * torch.tensor([1, 10, 100])).sum(dim=1)  # [B]


def answering(classes: tuple[str, ...], size: tuple[int, int] = (16, 16)) -> Subject:
    """The logit of class k (by sorted name) is -|k - answer|: among fewer columns the nearest one is said."""
    place = torch.tensor([sorted(classes).index(name) for name in classes]).double()

    def logits(images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, *size)
        return -(place - read_answers(images)[:, None]).abs().float()

    return Subject("fake", "0" * 12, logits, lambda images: images.flatten(1).float(), classes, size, 1.0, "fp32")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Subject], None]:
    return lambda subject: monkeypatch.setattr("robustness.run.load_subject", lambda config, device: subject)


def png(answer: int, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour_of(answer)).save(buffer, "PNG")
    return buffer.getvalue()


def make_set(
    root: Path, answers: Mapping[str, Iterable[int]], side: int = 8, name: Callable[[int], str] = "{}.JPEG".format
) -> Path:
    """Images in class folders; each says one answer."""
    count = 0
    for folder, said in answers.items():
        (root / folder).mkdir(parents=True)
        for answer in said:
            (root / folder / name(count)).write_bytes(png(answer, side))
            count += 1
    return root


def val_name(i: int) -> str:
    return f"ILSVRC2012_val_{i + 1:08d}.JPEG"


def load(*overrides: str, **changes: object) -> RobustConfig:
    values = {"model": "m", "out": "o", "device": "cpu", "loader.num_workers": 0, **changes}
    given = [f"{key.replace('__', '.')}={value}" for key, value in values.items() if value is not None]
    return load_config(RobustConfig, None, [*given, *overrides])


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's validation set with one image per class; every fifth class is taken for the one after it."""
    answers = {wnid: [i if i % 5 else (i + 1) % 1000] for i, wnid in enumerate(CLASSES)}
    return make_set(tmp_path_factory.mktemp("sets") / "val", answers, name=val_name)


# --- known accuracies -----------------------------------------------------------------------------------------------


def test_val_tells_everything_in_one_pass(tmp_path: Path, val: Path, use: Callable) -> None:
    use(answering(CLASSES))
    found = robust(load(data=val, out=tmp_path / "out", benchmarks="[real]"))
    figures, flags = found["figures"], found["flags"]["imagenet_val"]
    assert figures["imagenet_val/top1_pct"] == pytest.approx(80) and figures["imagenet_val/top5_pct"] == 100
    assert figures["imagenet_val/error_pct"] == pytest.approx(20)
    said = [i if i % 5 else (i + 1) % 1000 for i in range(1000)]
    real = [said[i] in labels for i, labels in enumerate(real_labels()[:1000]) if labels]
    assert figures["imagenet_val/real_top1_pct"] == pytest.approx(100 * np.mean(real))
    assert figures["imagenet_val/real_images"] == len(real) < 1000
    for name in ("imagenet_a", "imagenet_r"):
        columns = columns_of(subset_synsets(name), CLASSES)
        nearest = [int(columns[np.abs(columns - said[c]).argmin()]) for c in columns]
        assert figures[f"imagenet_val/{name}_classes_top1_pct"] == pytest.approx(100 * np.mean(nearest == columns))
        expected = 100 * np.mean([said[c] == c for c in columns])
        assert figures[f"imagenet_val/{name}_classes_unmasked_top1_pct"] == pytest.approx(expected)
    assert len(found["cells"]) == 1
    assert (flags["images"], flags["of"], flags["subset"], flags["masked"]) == (1000, 1000, False, False)
    assert flags["transform"] == "model" and flags["precision"] == "fp32" and flags["device"] == "cpu"


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_masked_and_unmasked_accuracy_of_the_200_classes(tmp_path: Path, val: Path, use: Callable, name: str) -> None:
    use(answering(CLASSES[::-1]))  # columns in another order
    wnids, columns = subset_synsets(name), columns_of(subset_synsets(name), CLASSES)
    outside = next(i for i in range(columns[0], 1000) if i not in columns)
    # Right; right only among the 200 (said: the neighbour that is not among them); wrong either way.
    answers = {wnid: [c, c, columns[k - 100]] for k, (wnid, c) in enumerate(zip(wnids, columns, strict=True))}
    answers[wnids[0]] = [columns[0], min(outside, 999), columns[100]]
    nearest = columns[np.abs(columns - outside).argmin()]
    make_set(tmp_path / "set", {wnid: [int(a) for a in said] for wnid, said in answers.items()})
    paths = {f"paths__{name}": tmp_path / "set"}
    found = robust(load(data=val, out=tmp_path / "out", benchmarks=f"[{name}]", **paths))
    figures = found["figures"]
    assert figures[f"{name}/top1_pct"] == pytest.approx(100 * (399 + (nearest == columns[0])) / 600)
    assert figures[f"{name}/unmasked_top1_pct"] == pytest.approx(100 * 399 / 600)
    clean = figures[f"imagenet_val/{name}_classes_top1_pct"]
    assert figures[f"{name}/clean_top1_pct"] == clean
    assert figures[f"{name}/drop_pct"] == pytest.approx(clean - figures[f"{name}/top1_pct"])
    for key in ("rms_calibration_official_pct", "rms_calibration_pct", "aurra_pct", "soft_f1_pct"):
        assert 0 < figures[f"{name}/{key}"] < 100
    assert found["flags"][name]["masked"] is True and found["flags"]["imagenet_val"]["masked"] is False


def test_confidence_is_that_of_a_softmax_over_the_200_columns(tmp_path: Path, use: Callable) -> None:
    use(answering(CLASSES))
    wnids, columns = subset_synsets("imagenet_a"), columns_of(subset_synsets("imagenet_a"), CLASSES)
    make_set(tmp_path / "set", {wnid: [int(c)] for wnid, c in zip(wnids, columns, strict=True)})
    found = robust(load(out=tmp_path / "out", benchmarks="[imagenet_a]", paths__imagenet_a=tmp_path / "set"))
    logits = -np.abs(columns[None] - columns[:, None]).astype(float)
    confidence = np.exp(logits).max(axis=1) / np.exp(logits).sum(axis=1)
    order = np.argsort(confidence)
    gaps = [1 - confidence[order[:100]].mean(), 1 - confidence[order[100:]].mean()]  # all are right
    figures = found["figures"]
    assert figures["imagenet_a/rms_calibration_pct"] == pytest.approx(100 * math.hypot(*gaps) / 2**0.5, rel=1e-5)
    assert figures["imagenet_a/rms_calibration_official_pct"] == pytest.approx(100 * gaps[0] / 2**0.5, rel=1e-5)
    assert found["refused"]["imagenet_a/clean_top1_pct"] == "needs ImageNet's val/; give it as data="


def test_sketch_and_v2(tmp_path: Path, val: Path, use: Callable) -> None:
    use(answering(CLASSES))
    make_set(tmp_path / "sketch", {wnid: [i] if i % 4 else [(i + 500) % 1000] for i, wnid in enumerate(CLASSES)})
    make_set(tmp_path / "v2", {str(i): [i] if i % 10 else [(i + 3) % 1000] for i in range(1000)})
    where = {"paths__imagenet_sketch": tmp_path / "sketch", "paths__imagenet_v2": tmp_path / "v2"}
    found = robust(load(data=val, out=tmp_path / "out", benchmarks="[imagenet_sketch, imagenet_v2]", **where))
    figures = found["figures"]
    assert figures["imagenet_sketch/top1_pct"] == figures["imagenet_sketch/top5_pct"] == pytest.approx(75)
    assert figures["imagenet_v2/top1_pct"] == pytest.approx(90)
    assert figures["imagenet_v2/drop_pct"] == pytest.approx(-10) and figures["imagenet_sketch/drop_pct"] == 5
    assert [cell["set"] for cell in found["cells"]] == ["imagenet_val", "imagenet_sketch", "imagenet_v2"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet-C in which 1 of 4 classes is taken for another at severities 1 and 2, and 2 of 4 from 3 on."""
    root = tmp_path_factory.mktemp("released")
    for many in (1, 2):
        answers = {wnid: [i if i % 4 >= many else (i + 7) % 1000] for i, wnid in enumerate(CLASSES)}
        make_set(root / f"of_4_{many}", answers, side=224, name=val_name)
    for name in ("snow", "frost", "fog"):
        (root / "c" / name).mkdir(parents=True)
        for severity in SEVERITIES:
            (root / "c" / name / str(severity)).symlink_to(root / f"of_4_{1 if severity < 3 else 2}")
    return root / "c"


def test_imagenet_c_of_released_files(tmp_path: Path, val: Path, released: Path, use: Callable) -> None:
    use(answering(CLASSES, (224, 224)))
    out = tmp_path / "out"
    config = load(
        data=val,
        out=out,
        benchmarks="[imagenet_c]",
        paths__imagenet_c=released,
        corruptions="[fog, snow]",
        num_images=9,
    )
    figures = robust(config)["figures"]
    places = np.linspace(0, 999, 9).round().astype(int)
    errors = [100 * float(np.mean(places % 4 < many)) for many in (1, 1, 2, 2, 2)]
    assert [figures[f"imagenet_c/fog/{s}/error_pct"] for s in SEVERITIES] == pytest.approx(errors)
    assert figures["imagenet_c/fog/error_pct"] == pytest.approx(np.mean(errors))
    assert figures["imagenet_c/fog/ce_pct"] == pytest.approx(np.sum(errors) / sum(ALEXNET_ERRORS["fog"]))
    found = json.loads((out / "results.json").read_text())
    assert "imagenet_c/mce_pct" not in figures and "imagenet_c/mean_error_pct" not in figures
    assert "missing gaussian_noise 1" in found["refused"]["imagenet_c/mce_pct"]
    assert found["flags"]["imagenet_c"]["subset"] is True and found["flags"]["imagenet_c"]["of"] == 1000
    # One more, in the same directory: what is there already is not done again.
    before = stamps(out)
    figures = robust(config.model_copy(update={"corruptions": ("fog", "snow", "frost")}))["figures"]
    assert len(before) == 11 and len(stamps(out)) == 16 and before.items() <= stamps(out).items()
    assert figures["imagenet_c/frost/ce_pct"] == pytest.approx(np.sum(errors) / sum(ALEXNET_ERRORS["frost"]))
    clean = 100 * float(np.mean(places % 5 == 0))
    assert figures["imagenet_val/error_pct"] == pytest.approx(clean)
    assert "SUBSET of 1000" in (out / "results.md").read_text()


def test_a_cell_with_other_files_than_the_first(tmp_path: Path, val: Path, released: Path, use: Callable) -> None:
    use(answering(CLASSES, (224, 224)))
    (tmp_path / "c/fog").mkdir(parents=True)
    (tmp_path / "c/fog/1").symlink_to(released / "fog/1")
    answers = {wnid: [i] for i, wnid in enumerate(CLASSES)}
    make_set(tmp_path / "c/fog/2", answers, name=lambda i: f"other_{i}.JPEG")
    overrides = {"benchmarks": "[imagenet_c]", "paths__imagenet_c": tmp_path / "c", "corruptions": "[fog]"}
    with pytest.raises(DataError, match=r"fog/2: its 1000 images are not called as the 1000 of .*fog/1"):
        robust(load(out=tmp_path / "out", severities="[1, 2]", num_images=4, **overrides))


def test_imagenet_c_on_the_fly_is_another_set(tmp_path: Path, val: Path, use: Callable) -> None:
    use(answering(CLASSES, (224, 224)))
    overrides = {"benchmarks": "[imagenet_c_otf]", "corruptions": "[contrast, jpeg_compression]", "num_images": 6}
    found = robust(load(data=val, out=tmp_path / "out", severities="[1]", **overrides))
    flags = found["flags"]["imagenet_c_otf"]
    assert flags["jpeg_step"] is True and flags["definition"] == "imagenet_c" and flags["corrupt"] == "input"
    assert flags["transform"] == "official" and flags["draws"] == "cpu" and flags["seed"] == 0
    assert "imagenet_c_otf/jpeg_compression/1/error_pct" in found["figures"]
    assert not any(key.startswith("imagenet_c/") for key in found["figures"])
    assert {cell["set"] for cell in found["cells"]} == {"imagenet_val", "imagenet_c_otf"}
    assert "MAE ViT-B" not in (tmp_path / "out" / "results.md").read_text()


# --- corruptions of a user's set ------------------------------------------------------------------------------------


class Recorder:
    """A model that keeps what it was shown."""

    def __init__(self, classes: tuple[str, ...], size: tuple[int, int] = (32, 32)) -> None:
        self.seen: list[Tensor] = []
        self.subject = Subject(
            "fake", "0" * 12, self._logits, lambda x: x.flatten(1).float(), classes, size, 1.0, "fp32"
        )

    def _logits(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return torch.zeros(len(images), len(self.subject.classes))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 noisy images of 32 px in two classes."""
    return draw_images(tmp_path_factory.mktemp("photos"), 13, side_px=32)


def seen(photos: Path, out: Path, use: Callable, **changes: object) -> Tensor:
    recorder = Recorder(("even", "odd"))
    use(recorder.subject)
    grid = {"corruptions": "[gaussian_noise]", "severities": "[3]", **changes}
    robust(load(data=photos, out=out, **grid))
    return torch.cat(recorder.seen)


def test_what_a_model_sees_does_not_depend_on_batch_or_memory(photos: Path, tmp_path: Path, use: Callable) -> None:
    first = seen(photos, tmp_path / "a", use)
    assert len(first) == 26 and not torch.equal(first[:13], first[13:])  # clean, then corrupted
    for i, changes in enumerate(({"batch_size": 1}, {"batch_size": 5}, {"keep_gib": 0}, {"loader__num_workers": 1})):
        assert torch.equal(seen(photos, tmp_path / str(i), use, **changes), first)
    assert not torch.equal(seen(photos, tmp_path / "s", use, seed=1), first)


def test_a_subset_sees_the_same_images_corrupted_alike(photos: Path, tmp_path: Path, use: Callable) -> None:
    whole, some = seen(photos, tmp_path / "a", use), seen(photos, tmp_path / "b", use, num_images=4)
    assert torch.equal(some[4:], whole[13:][[0, 4, 8, 12]])


def test_a_sample_sees_the_same_images_corrupted_alike(photos: Path, tmp_path: Path, use: Callable) -> None:
    whole, some = seen(photos, tmp_path / "a", use), seen(photos, tmp_path / "b", use, sample=4)
    places = [next(i for i in range(13) if torch.equal(whole[i], image)) for image in some[:4]]
    assert places == sorted(set(places)) != [0, 4, 8, 12]  # drawn, not spread
    assert torch.equal(some[4:], whole[13:][places])
    found = json.loads((tmp_path / "b" / "results.json").read_text())["flags"]["corruptions"]
    assert (found["sample"], found["sample_seed"], found["subset"], found["of"]) == (4, 0, True, 13)
    assert "a development SAMPLE of 4 of 13 images drawn by seed 0" in (tmp_path / "b" / "results.md").read_text()


def test_the_jpeg_step_and_the_order_are_settings(photos: Path, tmp_path: Path, use: Callable) -> None:
    raw, stored = seen(photos, tmp_path / "a", use), seen(photos, tmp_path / "b", use, jpeg_step="true")
    assert torch.equal(stored[13:], jpeg_step(raw[13:]))
    assert torch.equal(seen(photos, tmp_path / "c", use, corrupt="input"), raw)  # of images that fit already
    flags = [json.loads((tmp_path / x / "results.json").read_text())["flags"]["corruptions"] for x in "abc"]
    assert [f["jpeg_step"] for f in flags] == [False, True, False]
    assert [f["corrupt"] for f in flags] == ["decoded", "decoded", "input"]


@pytest.mark.parametrize(("definition", "order"), [("imagecorruptions", "decoded"), ("imagenet_c", "input")])
def test_images_of_many_sizes(tmp_path: Path, use: Callable, definition: str, order: str) -> None:
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 33), (33, 40), (40, 33), (64, 64)]):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    recorder = Recorder(("b", "a"))
    use(recorder.subject)
    grid = {"corruptions": "[motion_blur]", "severities": "[1]", "batch_size": 3}
    found = robust(load(data=tmp_path / "data", out=tmp_path / "out", definition=definition, **grid))
    assert [len(images) for images in recorder.seen] == [3, 1, 3, 1]
    assert found["flags"]["corruptions"]["corrupt"] == order
    assert found["figures"]["corruptions/motion_blur/1/error_pct"] == 50  # says column 0, which is b
    own = EvalTransform((32, 32), 1.0)
    for i, path in enumerate(sorted((tmp_path / "data").rglob("*.png"))):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)

        def blurred(image: Tensor, i: int = i) -> Tensor:
            return corrupt(image[None], "motion_blur", 1, image_ids=[i], definition=definition)[0]

        expected = blurred(own(image)) if order == "input" else own(blurred(image))
        assert torch.equal(torch.cat(recorder.seen)[4 + i], expected)


def test_a_whole_grid_of_a_users_set(photos: Path, tmp_path: Path, use: Callable) -> None:
    use(answering(("even", "odd"), (32, 32)))
    out = tmp_path / "out"
    recipe = ROOT / "configs/robustness/cifar10_corruptions.yaml"
    config = load_config(
        RobustConfig, recipe, ["model=m", f"data={photos}", f"out={out}", "device=cpu", "loader.num_workers=0"]
    )
    found = robust(config)
    assert len(found["cells"]) == 96 and {cell["corruption"] for cell in found["cells"]} == {"clean", *NAMES}
    assert not any("ce_pct" in key for key in found["figures"])  # AlexNet's errors have no meaning here
    means = [found["figures"][f"corruptions/{name}/error_pct"] for name in BENCHMARK]
    assert found["figures"]["corruptions/mean_error_pct"] == pytest.approx(np.mean(means))
    for cell in found["cells"]:
        assert {"config", "seed", "git_commit", "images", "flags"} <= cell.keys()
    assert Image.open(out / "heatmap.png").size[0] > 400
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "done" and summary["figures"] == found["figures"]
    text = (out / "results.md").read_text()
    assert text.count("\n| ") == 20 and "mCE**" not in text and "saturate | extra" in text


# --- representation -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit() -> ViT:
    model = ViT(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=16, depth=1, num_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory, vit: ViT) -> Path:
    folder = tmp_path_factory.mktemp("robust") / "backbone"
    export_backbone(folder, vit, {"step": 0})
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, vit: ViT) -> Path:
    folder = tmp_path_factory.mktemp("robust") / "classifier"
    model = Classifier(vit.config, 2, "mean")
    model.init_weights(torch.Generator().manual_seed(1))
    export_classifier(folder, model, ("even", "odd"), {}, mean=(0.5,) * 3, std=(0.25,) * 3, crop_ratio=1.0)
    return folder


def test_cosines_of_clean_and_corrupted_features(photos: Path, tmp_path: Path, use: Callable) -> None:
    recorder = Recorder(())
    use(recorder.subject)
    grid = {"benchmarks": "[representation]", "corruptions": "[contrast, fog]", "severities": "[1, 5]"}
    found = robust(load(model=None, backbone="b", data=photos, out=tmp_path / "out", **grid))
    cells = {(cell["corruption"], cell["severity"]): cell["figures"]["cosine"] for cell in found["cells"]}
    assert set(cells) == {(c, s) for c in ("contrast", "fog") for s in (1, 5)}
    assert 0.5 < cells["fog", 5] < cells["fog", 1] < 1
    assert found["figures"]["representation/fog/cosine"] == pytest.approx((cells["fog", 1] + cells["fog", 5]) / 2)
    assert "missing gaussian_noise 1" in found["refused"]["representation/mean_cosine"]
    assert found["figures"]["representation/part_mean_cosine"] == pytest.approx(np.mean(list(cells.values())))


def test_a_backbone_needs_no_labels(photos: Path, backbone: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.rglob("*.jpg"):
        (flat / path.name).write_bytes(path.read_bytes())
    grid = {"benchmarks": "[representation]", "corruptions": "[contrast]"}
    figures = robust(load(model=None, backbone=backbone, data=flat, out=tmp_path / "out", **grid))["figures"]
    assert 0 < figures["representation/contrast/5/cosine"] < figures["representation/contrast/1/cosine"] <= 1


def test_subjects_of_other_weights_or_preparation_have_other_digests(backbone: Path, classifier: Path) -> None:
    cpu = torch.device("cpu")
    features = {"benchmarks": "[representation]", "data": "d"}
    digests = {
        load_subject(load(model=None, backbone=backbone, **features), cpu).digest,
        load_subject(load(model=None, backbone=backbone, feature="cls", **features), cpu).digest,
        load_subject(load(model=classifier, data="d"), cpu).digest,
    }
    assert len(digests) == 3
    assert load_subject(load(model=classifier, data="d"), cpu).digest in digests


# --- resuming -------------------------------------------------------------------------------------------------------


def sweep(photos: Path, classifier: Path, out: Path, **changes: object) -> list[str]:
    values = {
        "model": classifier, "data": photos, "out": out, "cache": out.parent / "cache", "device": "cpu",
        "loader.num_workers": 0, "corruptions": "[fog, gaussian_noise, frost]", "severities": "[1, 5]", **changes,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def table(out: Path) -> dict:
    content = json.loads((out / "results.json").read_text())
    timed = {"seconds", "corrupting_s"}
    cells = [{key: value for key, value in cell.items() if key not in timed} for cell in content["cells"]]
    return {**content, "cells": [{**cell, "config": ""} for cell in cells], "config": ""}


@pytest.fixture(scope="module")
def unbroken(server: ForkServer, photos: Path, classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    log = out.parent / "log"
    assert server.run(sweep(photos, classifier, out), log, stage="robust") == 0, log.read_text()
    assert len(list((out / "cells").iterdir())) == 7
    return table(out)


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in (out / "cells").glob("[!.]*")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@pytest.mark.parametrize("crash_at", [1, 3, 4, 6, 21, 42])
def test_a_killed_sweep_goes_on_and_does_no_cell_twice(
    server: ForkServer, photos: Path, classifier: Path, tmp_path: Path, unbroken: dict, crash_at: int
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    overrides = sweep(photos, classifier, out)
    assert server.run(overrides, log, crash_at, stage="robust") == -signal.SIGKILL
    kept = stamps(out)
    assert len(kept) == (crash_at + 1) // 6 and not (out / "results.json").exists()
    assert server.run(overrides, log, stage="robust") == 0, log.read_text()
    assert f"7 cells, {len(kept)} done, {7 - len(kept)} to do" in log.read_text()
    assert kept.items() <= stamps(out).items() and len(stamps(out)) == 7
    assert not list((out / "cells").glob(".tmp-*"))
    assert table(out) == unbroken
    finished = stamps(out)
    assert server.run(overrides, log, stage="robust") == 0  # once more: nothing is left to do
    assert stamps(out) == finished and table(out) == unbroken


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_give_the_same_table(
    server: ForkServer, photos: Path, classifier: Path, tmp_path: Path, unbroken: dict, size: int
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert server.run(sweep(photos, classifier, out), log, size=size, stage="robust") == 0, log.read_text()
    assert f"shared by {size} processes" in log.read_text()
    assert log.read_text().count("\ncell ") == -(-7 // size)  # the first speaks of its own
    assert table(out) == unbroken


def test_one_of_two_processes_is_killed_and_the_rest_is_done_by_one(
    server: ForkServer, photos: Path, classifier: Path, tmp_path: Path, unbroken: dict
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    overrides = sweep(photos, classifier, out)
    run = server.start(overrides, log, crash_at=8, size=2, stage="robust")  # each dies in its second cell
    assert set(server.wait_all(run)) == {-signal.SIGKILL}
    kept = stamps(out)
    assert 1 <= len(kept) <= 3
    assert server.run(overrides, log, stage="robust") == 0, log.read_text()
    assert kept.items() <= stamps(out).items() and table(out) == unbroken


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_stops_a_sweep_with_code_75(
    server: ForkServer, photos: Path, classifier: Path, tmp_path: Path, size: int
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    overrides = sweep(photos, classifier, out, corruptions="all", batch_size=1)
    run = server.start(overrides, log, size=size, stage="robust")
    deadline = time.monotonic() + 20
    while len(list(out.glob("cells/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    for pid in run.pids:
        os.kill(pid, signal.SIGTERM)
    assert server.wait_all(run) == [75] * size, log.read_text()
    assert log.read_text().count("stopped by SIGTERM; every finished cell is kept") == 1
    kept = stamps(out)
    assert 2 <= len(kept) < 39
    assert server.run(overrides, log, stage="robust") == 0
    assert kept.items() <= stamps(out).items() and len(stamps(out)) == 39


def test_cells_of_another_model_or_protocol_are_not_taken(
    photos: Path, classifier: Path, tmp_path: Path, use: Callable
) -> None:
    use(answering(("even", "odd"), (32, 32)))
    overrides = [text for text in sweep(photos, classifier, tmp_path / "out") if not text.startswith("seed")]
    robust(load_config(RobustConfig, None, overrides))
    first = stamps(tmp_path / "out")
    other = Recorder(("even", "odd")).subject
    use(Subject(**{**vars(other), "digest": "1" * 12}))
    found = robust(load_config(RobustConfig, None, overrides))
    assert first.items() <= stamps(tmp_path / "out").items() and len(stamps(tmp_path / "out")) == 14
    assert {cell["model"] for cell in found["cells"]} == {"1" * 12}
    with pytest.raises(ConfigError, match="holds a run with another seed: 0 -> 1"):
        robust(load_config(RobustConfig, None, [*overrides, "seed=1"]))


def test_a_damaged_cell_is_done_again(photos: Path, classifier: Path, tmp_path: Path, use: Callable) -> None:
    use(answering(("even", "odd"), (32, 32)))
    config = load_config(RobustConfig, None, sweep(photos, classifier, tmp_path / "out"))
    figures = robust(config)["figures"]
    for path, content in zip((tmp_path / "out/cells").iterdir(), (b"", b"[]", b'{"figures": 1', b"\xff"), strict=False):
        path.write_bytes(content)
    assert robust(config)["figures"] == figures


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model=null", "data=x"], "model and backbone: give one of them"),
        (["backbone=b", "data=x", "benchmarks=[representation]"], "model and backbone: give one of them"),
        (["model=null", "backbone=b", "data=x"], "backbone: answers nothing; it needs benchmarks=[representation]"),
        ([], "corruptions: needs data="),
        (["benchmarks=[real]"], "real: needs data="),
        (["benchmarks=[imagenet_a]"], "imagenet_a: needs paths.imagenet_a="),
        (["benchmarks=[imagenet_c]"], "imagenet_c: needs paths.imagenet_c="),
        (["benchmarks=[]"], "benchmarks: give one or more"),
        (["benchmarks=[imagenet_d]"], "benchmarks: expected 'imagenet_c', 'imagenet_c_otf'"),
        (["data=x", "corruptions=[gausian_noise]"], "corruptions: gausian_noise is none; did you mean gaussian_noise?"),
        (["data=x", "corruptions=[fog, fog]"], "corruptions: one is given twice"),
        (["data=x", "severities=[0]"], "severities: expected"),
        (["data=x", "severities=[6]"], "severities: expected"),
        (["data=x", "benchmarks=[real]", "jpeg_step=true"], "jpeg_step: has no effect but on benchmarks corruptions"),
        (["data=x", "benchmarks=[imagenet_c_otf]", "definition=imagenet_c"], "definition: has no effect but on"),
        (["data=x", "feature=cls"], "feature: has no effect on a classifier"),
        (["data=x", "transform=official"], "transform: has no effect but on ImageNet's sets"),
        (["data=x", "loader.stream_images=5"], "loader.stream_images: has no effect"),
        (["data=x", "severity=3"], "severity: unknown key; did you mean 'severities'?"),
        (["data=x", "paths.imagenet_s=y"], "paths.imagenet_s: unknown key"),
    ],
)
def test_contradictions_are_one_line_each(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert any(line in text for text in str(caught.value).splitlines()), str(caught.value)


def test_a_classifier_of_other_classes_has_no_imagenet_benchmarks(val: Path, tmp_path: Path, use: Callable) -> None:
    use(answering(("even", "odd")))
    with pytest.raises(ConfigError, match="imagenet_val: needs a classifier of ImageNet's 1000 wnids; this one has 2"):
        robust(load(data=val, out=tmp_path / "out", benchmarks="[real]"))


def test_what_is_no_classifier(tmp_path: Path, photos: Path, backbone: Path) -> None:
    for path in (tmp_path / "absent", backbone):
        with pytest.raises(CheckpointError, match=r"^\S+: "):
            robust(load(model=path, data=photos, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_images_below_32_px(tmp_path: Path, data: Path, use: Callable) -> None:
    use(answering(("even", "odd"), (16, 16)))
    with pytest.raises(DataError, match="corruptions gaussian_noise 1: image number 0 has 20x20 px; corruptions need"):
        robust(load(data=data, out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="corrupt=input: corruptions need 32 px, the model takes 16"):
        robust(load(data=data, out=tmp_path / "out", corrupt="input"))


def test_a_broken_image_is_named(tmp_path: Path, use: Callable) -> None:
    use(answering(("even", "odd"), (32, 32)))
    photos = draw_images(tmp_path / "data", 6, side_px=32)
    (photos / "odd" / "003.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"odd/003\.jpg: not an image.*an evaluation counts every image"):
        robust(load(data=photos, out=tmp_path / "out"))


def test_frost_without_textures_is_told_before_anything_is_done(photos: Path, tmp_path: Path, use: Callable) -> None:
    use(answering(("even", "odd"), (32, 32)))
    (tmp_path / "empty").mkdir()
    overrides = {"data": photos, "out": tmp_path / "out", "frost_textures": tmp_path / "empty"}
    with pytest.raises(DataError, match=r"frost needs it; pip install --no-deps imagecorruptions"):
        robust(load(**overrides))
    assert not (tmp_path / "out").exists()
    robust(load(corruptions="[fog]", **overrides))


def test_a_directory_in_use(tmp_path: Path, photos: Path, classifier: Path, server: ForkServer) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = server.start(sweep(photos, classifier, out, corruptions="all", batch_size=1), log, stage="robust")
    deadline = time.monotonic() + 20
    while not (out / "cells").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    with pytest.raises(MachineError, match="in use by pid"):
        robust(load_config(RobustConfig, None, sweep(photos, classifier, out)))
    kill(run.pids[0])
    server.wait_all(run)


def test_dry_run_says_what_is_left(tmp_path: Path, photos: Path, use: Callable) -> None:
    use(answering(("even", "odd"), (32, 32)))
    config = load(data=photos, out=tmp_path / "out", corruptions="[fog]", num_images=5)
    lines = dry_run(config, 2)
    assert not (tmp_path / "out").exists()
    assert any("5 images of 2 classes, a SUBSET of 13; 6 cells" in line for line in lines)
    assert any("6 cells, 0 done, 6 to do, shared by 2 processes" in line for line in lines)
    robust(config)
    assert any("6 cells, 6 done, 0 to do" in line for line in dry_run(config))


# --- results --------------------------------------------------------------------------------------------------------


def cells_of(name: str, grid: Mapping[str, Iterable[float]], **flags: object) -> list[tuple[Cell, dict]]:
    flags = {"subset": False, "img_size": "224x224", "transform": "released", "precision": "fp32", "device": "cpu",
             "of": 50000, "images": 50000, **flags}  # fmt: skip
    return [
        (Cell(name, c, s, {}), {"figures": {"error_pct": 100 * error}, "images": 50000, "flags": flags})
        for c, row in grid.items()
        for s, error in zip(SEVERITIES, row, strict=True)
    ]


def test_published_rows_stand_only_beside_the_same_protocol() -> None:
    imagenet = answering(CLASSES, (224, 224))
    released = set_results(
        cells_of("imagenet_c", ALEXNET_ERRORS, definition="released files", jpeg_step=True), imagenet
    )
    assert released["imagenet_c"].figures["mce_pct"] == pytest.approx(100)
    text = markdown("alexnet", [], released)
    assert "| MAE ViT-B | 51.7 |" in text and "**100.00**" in text and "RC-MAE ViT-B" not in text  # no mCE published
    assert all(row.source.split()[0] in text for row in PUBLISHED if row.mce is not None)
    for name, flags in (
        ("imagenet_c_otf", {}),
        ("imagenet_c", {"subset": True}),
        ("imagenet_c", {"img_size": "448x448"}),
    ):
        cells = cells_of(name, ALEXNET_ERRORS, definition="x", jpeg_step=True, **flags)
        assert "MAE ViT-B" not in markdown("alexnet", [], set_results(cells, imagenet))
    val = Cell("imagenet_val", "clean", 0, {}), {
        "figures": {"top1_pct": 83.1, "error_pct": 16.9}, "images": 50000,
        "flags": {"subset": False, "img_size": "224x224", "transform": "model", "precision": "fp32", "device": "cpu",
                  "of": 50000, "images": 50000},
    }  # fmt: skip
    text = markdown("mine", [], set_results([val], imagenet))
    assert "| RC-MAE ViT-B | 83.6 | RC-MAE README |" in text and "| **mine** | **83.10** | this sweep |" in text


def test_mce_and_relative_mce_of_a_whole_grid() -> None:
    grid = {name: [0.1 * s for s in SEVERITIES] for name in BENCHMARK}
    cells = cells_of("imagenet_c", grid, definition="released files", jpeg_step=True)
    clean = [(Cell("imagenet_val", "clean", 0, {}), {**cells[0][1], "figures": {"top1_pct": 84.0, "error_pct": 16.0}})]
    found = set_results([*clean, *cells], answering(CLASSES, (224, 224)))["imagenet_c"].figures
    assert found["mce_pct"] == pytest.approx(100 * np.mean([1.5 / sum(ALEXNET_ERRORS[name]) for name in BENCHMARK]))
    added = [(1.5 - 0.8) / (sum(ALEXNET_ERRORS[name]) - 5 * ALEXNET_CLEAN_ERROR) for name in BENCHMARK]
    assert found["relative_mce_pct"] == pytest.approx(100 * np.mean(added))
    assert found["fog/relative_ce_pct"] == pytest.approx(100 * added[BENCHMARK.index("fog")])
    assert [found[f"{key}/error_pct"] for key in ("blur", "severity_3", "fog")] == pytest.approx([30, 30, 30])
    assert found["mean_error_pct"] == pytest.approx(30)


def test_mce_is_refused_at_other_sizes() -> None:
    cells = cells_of("imagenet_c", ALEXNET_ERRORS, definition="released files", jpeg_step=True)
    found = set_results(cells, answering(CLASSES, (448, 448)))["imagenet_c"]
    assert "mce_pct" not in found.figures and "takes 448x448" in found.refused["mce_pct"]
    assert found.figures["mean_error_pct"] == pytest.approx(78.8993, abs=1e-3)
    assert "not given, AlexNet's errors are those at 224 x 224 px" in markdown("x", [], {"imagenet_c": found})


def test_cells_that_count_other_images_are_not_averaged() -> None:
    cells = cells_of("imagenet_c", {"fog": [0.1] * 5})
    cells[3][1]["images"] = 49999
    with pytest.raises(DataError, match="imagenet_c fog 4: 49999 images, but imagenet_c fog 1 has 50000"):
        set_results(cells, answering(CLASSES, (224, 224)))


def test_heat_map_of_part_of_a_grid(tmp_path: Path) -> None:
    results = set_results(cells_of("imagenet_c", {"fog": [0.1] * 5, "saturate": [0.5] * 5}), answering(CLASSES))
    draw_heat_map(tmp_path / "map.png", "x", results)
    assert Image.open(tmp_path / "map.png").size[1] > 200


def test_images_are_decoded_once_where_they_fit(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.datasets import open_images

    source = open_images(str(photos), Path("unused"))
    for keep_bytes, reads in ((13 * 3 * 32 * 32, 13), (13 * 3 * 32 * 32 - 1, 26)):
        count = []
        monkeypatch.setattr(type(source), "read", _counted(type(source).read, count))
        images = Images(source, np.arange(13), Decoded(), Reading(5, 0, 60, 10**6, keep_bytes))
        first, second = list(images.batches()), list(images.batches())
        monkeypatch.undo()
        assert len(count) == reads and [ids for _, ids in first] == [ids for _, ids in second]
        assert all(
            torch.equal(a, b) for (x, _), (y, _) in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
        )


def _counted(function: Callable, count: list) -> Callable:
    def counting(*args: object) -> object:
        count.append(args)
        return function(*args)

    return counting
