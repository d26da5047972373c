"""`rcmae robust` on detectors and segmentors: figures by hand, kills, several processes, samples, what is refused.

The networks know nothing. What they find in the clean images is what is annotated there, so that clean figures are high
and corruptions have something to take away.
"""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.config import load_config
from core.distributed import Processes
from core.errors import CheckpointError, ConfigError, DataError, RcmaeError
from core.loader import eval_loader
from core.plots import plot
from core.vit import ViT, ViTConfig
from robustness.corruptions.apply import corrupt
from robustness.dense import AT_ONCE, CorruptingReader
from robustness.run import dry_run, robust
from robustness.settings import RobustConfig
from tests.harness import ForkServer
from tests.test_robust import stamps, table
from transfer.detection.coco_file import coco_paths, read_coco
from transfer.detection.data import FitToSquare, evaluation_images
from transfer.detection.detector import export_detector, load_detector
from transfer.detection.mask_rcnn import DetectorConfig, build_mask_rcnn
from transfer.detection.roi_heads import ROIHeadsConfig
from transfer.detection.rpn import RPNConfig
from transfer.detection.run import evaluate_detector
from transfer.detection.settings import DetectConfig
from transfer.detection.tasks import CocoEvaluator
from transfer.segmentation import data as segmentation_data
from transfer.segmentation.classes import unnamed
from transfer.segmentation.directory import export_segmentor
from transfer.segmentation.labels import LabelKeys, label_table
from transfer.segmentation.linear_head import LinearSegmentor
from transfer.segmentation.pairs import open_pairs
from transfer.segmentation.run import evaluate_segmentor
from transfer.segmentation.segmentor import LabelsConfig
from transfer.segmentation.settings import SegmentConfig
from transfer.segmentation.slide import InferenceConfig
from transfer.segmentation.tasks import EvalSizes, Labeller

CPU = torch.device("cpu")
SIZES = [(40, 48), (56, 44), (40, 48), (64, 64), (33, 70)]  # (height, width)
CLASSES = 4
KINDS = ("detector", "segmentor")
GRID = {"corruptions": "[fog, gaussian_noise, frost]", "severities": "[1, 5]"}


# --- models and sets that fit them ----------------------------------------------------------------------------------


def photograph(size: tuple[int, int], seed: int) -> np.ndarray:
    """Patches of colours with some noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-size[0] // 8), -(-size[1] // 8), 3))
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)[: size[0], : size[1]]
    return np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)


def tiny_vit(seed: int, **sizes: object) -> ViT:
    vit = ViT(ViTConfig(img_size=(32, 32), patch_size=4, embed_dim=16, depth=2, num_heads=2, **sizes))
    vit.init_weights(torch.Generator().manual_seed(seed))
    return vit


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DetectorConfig(
        num_classes=3, channels=8,
        rpn=RPNConfig(num_convs=1, pre_nms_topk_test=40, post_nms_topk_test=20),
        roi=ROIHeadsConfig(num_box_convs=1, box_fc_dim=16, num_mask_convs=1, detections_per_image=6),
    )  # fmt: skip
    model = build_mask_rcnn(tiny_vit(0, class_token=False), config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # so that what is found hangs on the image
        for parameter in model.parameters():
            parameter.mul_(3)
    folder = tmp_path_factory.mktemp("dense") / "detector"
    export_detector(folder, model, config, ("cat", "dog", "hen"), (3, 5, 9), 32, {"step": 0})
    return folder


@pytest.fixture(scope="module")
def coco_set(detector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs in which what the detector finds is annotated."""
    root = tmp_path_factory.mktemp("dense") / "coco"
    images = [
        {"id": 11 + i, "file_name": f"{i}.png", "height": height, "width": width}
        for i, (height, width) in enumerate(SIZES)
    ]
    categories = [{"id": id_, "name": name} for id_, name in zip((3, 5, 9), ("cat", "dog", "hen"), strict=True)]
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for i, size in enumerate(SIZES):
        Image.fromarray(photograph(size, i)).save(root / "val2017" / f"{i}.png")
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))
    coco, loaded = read_coco(coco_paths(root, "val")), load_detector(detector)
    rows = CocoEvaluator(coco, 32, CPU, "fp32", 1, 0, 60, Processes())(loaded.model)
    assert len(rows) > len(SIZES)
    annotations = [
        {
            "id": i + 1, "image_id": 11 + row.image, "category_id": (3, 5, 9)[row.label], "iscrowd": 0,
            "bbox": list(row.xywh), "area": row.xywh[2] * row.xywh[3],
            "segmentation": {"size": list(coco.size(row.image)), "counts": row.mask},
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return root


def make_segmentor(folder: Path, seed: int) -> LinearSegmentor:
    model = LinearSegmentor(tiny_vit(seed), LabelsConfig(num_classes=CLASSES)).eval()
    model.init_weights(torch.Generator().manual_seed(seed))
    labels = LabelKeys(num_classes=CLASSES, label_shift=1)
    windows = InferenceConfig(crop=32, stride=20)
    export_segmentor(folder, model, unnamed(CLASSES), labels, (80, 36), windows, {"step": 0})
    return model


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "segmentor"
    make_segmentor(folder, 1)
    return folder


@pytest.fixture(scope="module")
def other_segmentor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "other"
    make_segmentor(folder, 2)
    return folder


@pytest.fixture(scope="module")
def pairs_set(segmentor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs whose labels are what the segmentor says of them, but for a strip of another class."""
    root = tmp_path_factory.mktemp("dense") / "pairs"
    from transfer.segmentation.directory import load_segmentor

    labeller = Labeller(InferenceConfig(crop=32, stride=20), CPU, "fp32")
    resize = segmentation_data.Resized(EvalSizes((80, 36)))
    model = load_segmentor(segmentor).model
    for i, size in enumerate(SIZES):
        pixels = photograph(size, i)
        views = [view.unsqueeze(0) for view in resize(torch.from_numpy(pixels).permute(2, 0, 1))]
        label = labeller(model, views, size).numpy().astype(np.uint8)
        label[:6] = (label[:6] + i) % CLASSES
        for kind, array in (("images", pixels), ("annotations", label + 1)):
            (root / kind / "validation").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / "validation" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def subjects(detector: Path, coco_set: Path, segmentor: Path, pairs_set: Path) -> dict[str, tuple[Path, Path]]:
    """Model and data by kind."""
    return {"detector": (detector, coco_set), "segmentor": (segmentor, pairs_set)}


def overrides(subject: tuple[Path, Path], out: Path, **changes: object) -> list[str]:
    model, root = subject
    values = {"model": model, "data": root, "out": out, "device": "cpu", "loader.num_workers": 0, **GRID, **changes}
    return [f"{key.replace('__', '.')}={value}" for key, value in values.items() if value is not None]


def swept(subject: tuple[Path, Path], out: Path, **changes: object) -> dict:
    return robust(load_config(RobustConfig, None, overrides(subject, out, **changes)))


UNITS = {"detector": ("box_ap", "mask_ap"), "segmentor": ("miou_pct",)}


# --- what a model sees ----------------------------------------------------------------------------------------------


def corrupted(image: Tensor, id_: int, name: str = "motion_blur", severity: int = 5) -> Tensor:
    return corrupt(image[None], name, severity, image_ids=[id_], definition="imagecorruptions")[0]


def decoded(root: Path, folder: str, i: int) -> Tensor:
    return torch.from_numpy(np.array(Image.open(root / folder / f"{i}.png"))).permute(2, 0, 1).contiguous()


def reader(device: torch.device = CPU) -> CorruptingReader:
    def apply(images: Tensor, ids: list[int]) -> Tensor:
        return corrupt(images, "motion_blur", 5, image_ids=ids, definition="imagecorruptions")

    return CorruptingReader(apply, np.array([7, 0, 3, 9, 4]), device, 10**6, lambda: None)


@pytest.mark.parametrize("at_once", [1, AT_ONCE])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_detector_sees_images_that_were_corrupted_before_they_were_resized(
    coco_set: Path, at_once: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco, fit, read = read_coco(coco_paths(coco_set, "val")), FitToSquare(32), reader()
    if at_once > 1:  # as on a GPU, several of one size together
        monkeypatch.setattr("robustness.dense.AT_ONCE", at_once)
        read._device = type("Cuda", (), {"type": "cuda"})()  # type: ignore[assignment]
        monkeypatch.setattr("robustness.dense.corrupted", lambda a, b, c, d: _as_on_cpu(a, b, c))
    batches = list(read(evaluation_images(coco, 32), 1, workers, 60, Processes()))
    assert [batch.labels.tolist() for batch in batches] == [[i] for i in range(5)]
    for i, batch in enumerate(batches):
        image = decoded(coco_set, "val2017", i)
        expected = fit(corrupted(image, (7, 0, 3, 9, 4)[i]))
        assert torch.equal(batch.images[0], expected) and batch.valid.all()
        resized = fit(image)
        height, width = (min(32, round(side * 32 / max(image.shape[1:]))) for side in image.shape[1:])
        if min(height, width) >= 32:
            assert not torch.equal(expected, corrupted(resized, (7, 0, 3, 9, 4)[i]))
    assert read.corrupting_s > 0


def _as_on_cpu(images: list[Tensor], ids: list[int], apply: Callable) -> list[Tensor]:
    from robustness.evaluation import corrupted as by_size

    return by_size(images, ids, apply, CPU)


def test_a_segmentor_sees_images_that_were_corrupted_before_they_were_resized(pairs_set: Path) -> None:
    pairs, sizes = open_pairs(pairs_set, "val"), EvalSizes((80, 36))
    table_ = label_table(LabelKeys(num_classes=CLASSES, label_shift=1), CLASSES)
    images = segmentation_data.evaluation_images(pairs, table_, sizes)
    batches = list(reader()(images, 1, 0, 60, Processes(), segmentation_data.one_image))
    plain = list(eval_loader(images, 1, 0, 60, Processes(), segmentation_data.one_image))
    for i, (batch, clean) in enumerate(zip(batches, plain, strict=True)):
        image, id_ = decoded(pairs_set, "images/validation", i), (7, 0, 3, 9, 4)[i]
        (expected,) = segmentation_data.Resized(sizes)(corrupted(image, id_))
        assert torch.equal(batch.images[0][0], expected)
        assert not torch.equal(expected, corrupted(clean.images[0][0], id_))  # the other order gives other pixels
        assert torch.equal(batch.labels, clean.labels) and batch.indices.tolist() == [i]


# --- from end to end ------------------------------------------------------------------------------------------------


def evaluated(kind: str, subject: tuple[Path, Path], out: Path) -> dict[str, float]:
    """The figures of `rcmae detect --eval` or `rcmae segment --eval`."""
    model, root = subject
    given = [f"data={root}", f"out={out}", f"backbone={model}", "device=cpu", "loader.num_workers=0"]
    if kind == "detector":
        figures = evaluate_detector(load_config(DetectConfig, None, given))["figures"]
        return {name: value for name, value in figures.items() if "_ap" in name and value is not None}
    return evaluate_segmentor(load_config(SegmentConfig, None, given))["figures"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_cell_is_the_evaluation_of_the_model(kind: str, subjects: dict, tmp_path: Path) -> None:
    found = swept(subjects[kind], tmp_path / "out", loader__num_workers=1)
    (clean,) = [cell for cell in found["cells"] if cell["corruption"] == "clean"]
    assert clean["figures"] == evaluated(kind, subjects[kind], tmp_path / "eval")
    unit = UNITS[kind][0]
    assert found["figures"][f"corruptions/{unit}"] == clean["figures"][unit] > (0.9 if kind == "detector" else 50)
    assert len(found["cells"]) == 7 and found["model"]["kind"] == kind
    for cell in found["cells"]:
        assert cell["flags"]["definition" if cell["severity"] else "precision"] in {"imagecorruptions", "fp32"}
        assert (cell["corrupting_s"] > 0) == (cell["severity"] > 0)
        if cell["severity"]:
            assert cell["figures"][unit] < clean["figures"][unit]
            assert (
                found["figures"][f"corruptions/{cell['corruption']}/{cell['severity']}/{unit}"] == cell["figures"][unit]
            )
            assert (cell["flags"]["corrupt"], cell["flags"]["jpeg_step"]) == ("decoded", False)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "this is not mPC" in text and "| frost | weather |" in text
    assert Image.open(tmp_path / "out" / "heatmap.png").size[0] > 400 * len(UNITS[kind])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["figures"] == found["figures"]


@pytest.fixture(scope="module")
def unbroken(server: ForkServer, subjects: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Tables of whole sweeps, by kind."""
    found = {}
    for kind, subject in subjects.items():
        out = tmp_path_factory.mktemp("unbroken") / "out"
        log = out.parent / "log"
        assert server.run(overrides(subject, out), log, stage="robust") == 0, log.read_text()
        found[kind] = table(out)
    return found


@pytest.mark.parametrize(("kind", "crash_at"), [("detector", 9), ("detector", 27), ("segmentor", 21)])
def test_a_killed_sweep_goes_on_and_does_no_cell_twice(
    server: ForkServer, subjects: dict, unbroken: dict, tmp_path: Path, kind: str, crash_at: int
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    given = overrides(subjects[kind], out)
    assert server.run(given, log, crash_at, stage="robust") == -signal.SIGKILL
    kept = stamps(out)
    assert len(kept) == (crash_at + 1) // 6 and not (out / "results.json").exists()
    assert server.run(given, log, stage="robust") == 0, log.read_text()
    assert f"7 cells, {len(kept)} done, {7 - len(kept)} to do" in log.read_text()
    assert kept.items() <= stamps(out).items() and len(stamps(out)) == 7
    assert table(out) == unbroken[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_same_table(
    server: ForkServer, subjects: dict, unbroken: dict, tmp_path: Path, kind: str
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert server.run(overrides(subjects[kind], out), log, size=2, stage="robust") == 0, log.read_text()
    assert "shared by 2 processes" in log.read_text() and log.read_text().count("\ncell ") == 4
    assert table(out) == unbroken[kind]


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_marked_everywhere(
    kind: str, subjects: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []

    def told(path: Path, size: tuple[float, float], title: str, notes: Sequence[str]) -> Any:
        titles.append(" ".join([title, *notes]))
        return plot(path, size, title, notes)

    monkeypatch.setattr("robustness.report.plot", told)
    whole = swept(subjects[kind], tmp_path / "whole")
    some = swept(subjects[kind], tmp_path / "some", sample=3, seed=1)
    words = "a development SAMPLE of 3 of 5 images drawn by seed 1"
    assert "SAMPLE" not in titles[0] and words in titles[1]
    flags = some["flags"]["corruptions"]
    assert (flags["sample"], flags["sample_seed"], flags["images"], flags["of"], flags["subset"]) == (3, 1, 3, 5, True)
    assert all(cell["flags"]["sample"] == 3 for cell in some["cells"]) and "sample" not in whole["flags"]["corruptions"]
    assert words in (tmp_path / "some" / "results.md").read_text()
    log = (tmp_path / "some" / "robust.log").read_text()
    assert "3 images, a development SAMPLE by seed 1 of 5; 7 cells" in log and f"({words}" in log
    assert "sample" in json.loads((tmp_path / "some" / "summary.json").read_text())["flags"]["corruptions"]
    assert "needs all 15 corruptions" in some["refused"][f"corruptions/{'box_' if kind == 'detector' else ''}mpc_pct"]
    assert not stamps(tmp_path / "some").keys() & stamps(tmp_path / "whole").keys()
    with pytest.raises(ConfigError, match="holds a run with another sample: 3 -> 4"):
        swept(subjects[kind], tmp_path / "some", sample=4, seed=1)


def test_the_seed_draws_the_sample_and_its_images_are_corrupted_as_in_the_whole(subjects: dict, tmp_path: Path) -> None:
    model, root = subjects["segmentor"]
    names = {}
    for seed in (0, 1, 2, 3):
        config = load_config(RobustConfig, None, overrides((model, root), tmp_path / "x", sample=2, seed=seed))
        from robustness.run import settle

        opened = settle(config, Processes()).sets["corruptions"]
        names[seed] = [opened.source.name(i) for i in range(2)]
        assert [f"{id_}.png" for id_ in opened.ids] == names[seed]  # the draws go by the place in the whole set
    assert len({tuple(found) for found in names.values()}) > 1
    # mIoU of the images alone: each confusion matrix is a function of the image, whatever else is in the sample.
    one = swept((model, root), tmp_path / "a", sample=1, seed=3)
    again = swept((model, root), tmp_path / "b", sample=1, seed=3)
    assert one["figures"] == again["figures"]


def test_a_sample_as_large_as_the_set_is_none(subjects: dict, tmp_path: Path) -> None:
    config = load_config(RobustConfig, None, overrides(subjects["detector"], tmp_path / "out", sample=5))
    lines = dry_run(config)
    assert any("5 images; 7 cells" in line for line in lines) and not any("SAMPLE" in line for line in lines)


# --- a reference ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beside(other_segmentor: Path, pairs_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """results.json of another segmentor on the same images."""
    out = tmp_path_factory.mktemp("beside") / "out"
    swept((other_segmentor, pairs_set), out)
    return out / "results.json"


def test_degradation_beside_a_reference(subjects: dict, beside: Path, tmp_path: Path) -> None:
    found = swept(subjects["segmentor"], tmp_path / "out", reference=beside)
    ours, theirs = found["figures"], json.loads(beside.read_text())["figures"]
    lost = [sum(100 - figures[f"corruptions/fog/{s}/miou_pct"] for s in (1, 5)) for figures in (ours, theirs)]
    assert ours["corruptions/fog/part_cd_pct"] == pytest.approx(100 * lost[0] / lost[1])
    more = [
        sum(figures["corruptions/miou_pct"] - figures[f"corruptions/frost/{s}/miou_pct"] for s in (1, 5))
        for figures in (ours, theirs)
    ]
    if more[1] > 0:
        assert ours["corruptions/frost/part_rcd_pct"] == pytest.approx(100 * more[0] / more[1])
    assert found["reference"]["digest"] == json.loads(beside.read_text())["model"]["digest"]
    assert "part_mean_cd_pct" in (tmp_path / "out" / "robust.log").read_text()
    # It may come later: no cell is done again.
    before = stamps(tmp_path / "out")
    swept(subjects["segmentor"], tmp_path / "out")
    assert stamps(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"severities": "[1, 3]"}, "has no cell corruptions gaussian_noise 3; sweep the reference over the same grid"),
        ({"seed": 1}, "corruptions gaussian_noise 1: another seed than here: 0, not 1"),
        ({"draws": "device"}, "another draws than here: cpu, not device"),
        ({"sample": 2}, "corruptions clean: another set of images, labels or classes than here"),
    ],
)
def test_a_reference_of_another_protocol(
    subjects: dict, beside: Path, tmp_path: Path, changes: dict, line: str
) -> None:
    with pytest.raises(DataError) as caught:
        swept(subjects["segmentor"], tmp_path / "out", reference=beside, **changes)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "the file ends in the middle"),
        ("[]", "no cells in it; expected results.json of another"),
        ('{"cells": [{"figures": {"box_ap": 0.4}, "flags": {}, "corruption": "clean", "severity": 0}]}', "no miou_pct"),
        ('{"cells": [{"figures": 3}]}', "cells[0]: no figures or flags"),
    ],
)
def test_what_is_no_reference(subjects: dict, tmp_path: Path, content: str, line: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        swept(subjects["segmentor"], tmp_path / "out", reference=path)
    assert line in str(caught.value) and "\n" not in str(caught.value)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("detector", {"data": None}, "corruptions: needs data="),
        ("detector", {"data": "/absent"}, "/absent/annotations/instances_val2017.json: no such file"),
        ("segmentor", {"data": "/absent"}, "/absent"),
        ("detector", {"reference": "x"}, "reference: has no effect on a detector; it is about segmentors"),
        ("detector", {"val_labels": "x"}, "val_labels: has no effect on a detector; it is about segmentors"),
        ("segmentor", {"val_json": "x"}, "val_json: has no effect on a segmentor; it is about detectors"),
        ("detector", {"batch_size": 4}, "batch_size: has no effect on a detector; it is about classifiers"),
        ("segmentor", {"jpeg_step": "true"}, "jpeg_step: has no effect on a segmentor"),
        ("detector", {"benchmarks": "[representation]"}, "benchmarks: a detector has one, corruptions"),
        ("segmentor", {"definition": "imagenet_c"}, "definition, corrupt: those of a segmentor are imagecorruptions"),
        ("detector", {"corrupt": "input"}, "definition, corrupt: those of a detector are"),
        ("detector", {"sample": 2, "num_images": 2}, "sample and num_images: give one of them"),
        ("detector", {"model": "/absent"}, "/absent: no classifier directory"),
    ],
)
def test_wrong_input_is_one_line(subjects: dict, tmp_path: Path, kind: str, changes: dict, line: str) -> None:
    with pytest.raises(RcmaeError) as caught:
        swept(subjects[kind], tmp_path / "out", **changes)
    assert line in str(caught.value) and "\n" not in str(caught.value).strip(), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_backbone_given_as_model(backbone: Path, coco_set: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model= is a classifier, detector or segmentor directory") as caught:
        swept((backbone, coco_set), tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.fixture
def changed_set(coco_set: Path, tmp_path: Path) -> Iterator[Callable[[Callable[[dict], None]], Path]]:
    """Makes a copy of the JSON with something changed."""

    def make(change: Callable[[dict], None]) -> Path:
        tree = json.loads((coco_set / "annotations" / "instances_val2017.json").read_text())
        change(tree)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(tree))
        return path

    yield make


def test_other_categories_nothing_to_find_and_small_images(
    detector: Path, coco_set: Path, tmp_path: Path, changed_set: Callable
) -> None:
    def refused(change: Callable[[dict], None]) -> str:
        with pytest.raises(DataError) as caught:
            swept((detector, coco_set), tmp_path / "out", data=None, val_json=changed_set(change),
                  val_images=coco_set / "val2017")  # fmt: skip
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        return str(caught.value)

    assert "4 categories, the detector knows 3" in refused(
        lambda tree: tree["categories"].append({"id": 1, "name": "x"})
    )
    assert "no object in these 5 images" in refused(lambda tree: tree["annotations"].clear())
    assert "2.png has 31x40 px; corruptions need sides of 32 px" in refused(
        lambda tree: (tree["images"][2].update(width=31), tree["annotations"].clear())
    )


def test_a_small_image_of_a_segmentation_set_is_named(segmentor: Path, pairs_set: Path, tmp_path: Path) -> None:
    root = tmp_path / "pairs"
    for kind in ("images", "annotations"):
        (root / kind / "validation").mkdir(parents=True)
        for i in range(2):
            picture = Image.open(pairs_set / kind / "validation" / f"{i}.png")
            (picture if i == 0 else picture.crop((0, 0, 30, 40))).save(root / kind / "validation" / f"{i}.png")
    with pytest.raises(DataError, match=r"1\.png has 30x40 px; corruptions need sides of 32 px"):
        swept((segmentor, root), tmp_path / "out")


def test_other_annotations_are_other_cells(
    detector: Path, coco_set: Path, tmp_path: Path, changed_set: Callable
) -> None:
    given = {"data": None, "val_images": coco_set / "val2017", "corruptions": "[fog]"}
    changes: list[Callable[[dict], object]] = [
        lambda tree: None,
        lambda tree: tree["annotations"].pop(),
        lambda tree: tree["annotations"][0].update(bbox=[1, 1, 30, 30]),
    ]
    for i, change in enumerate(changes):
        swept((detector, coco_set), tmp_path / "out", val_json=changed_set(change), **given)
        assert len(stamps(tmp_path / "out")) == 3 * (i + 1)
