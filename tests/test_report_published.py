"""Published rows stand beside a figure only where the protocol is theirs, and else it is said why none does."""

from pathlib import Path
from typing import Any

import pytest

from tests.report_runs import (
    Page,
    detected,
    imagenet,
    reported,
    segmented,
    summary_of,
    swept,
)
from transfer.detection.coco_names import COCO_NAMES
from transfer.segmentation.classes import open_classes
from transfer.segmentation.labels import LabelKeys

# ---- published rows -------------------------------------------------------------------------------------------------


def published(page: Page, name: str) -> list[list[str]] | None:
    return page.tables.get(f"Published rows beside {name}")


def test_published_rows_of_fine_tuning(tmp_path: Path) -> None:
    page = reported(imagenet(tmp_path / "run"))
    table = published(page, "run")
    assert table is not None and table[:2] == [["", "top-1, %", "source"], ["run", "83.10", "this run"]]
    assert ["MAE ViT-B, released model", "83.664", "MAE README, FINETUNE.md"] in table
    assert ["RC-MAE ViT-B", "83.6", "RC-MAE README"] in table
    assert not [row for row in table if "ViT-L" in row[0]]  # of another size and schedule
    assert "https://github.com/facebookresearch/mae" in [a.get("href") for tag, a in page.elements if tag == "a"]


IMAGENET = {"test_images": 50000, "images": 1281167}
CROP = {"input_size": [3, 224, 224], "crop_pct": 0.875}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"summary": summary_of({"eval/top1_pct": 83.1}, **IMAGENET | {"test_images": 49999})}, "evaluated on 49,999 images"),
        ({"summary": summary_of({"eval/top1_pct": 83.1}, **IMAGENET | {"images": 1281166})}, "trained on 1,281,166 images"),
        ({"summary": {"status": "killed"}}, "the run is not finished"),
        ({"per_class": {f"n{i:08d}": 80.0 for i in range(999)}}, "999 classes, not ImageNet-1k's thousand"),
        ({"per_class": {f"class {i}": 80.0 for i in range(1000)}}, "1,000 classes, not ImageNet-1k's thousand"),
        ({"exported": {"pretrained_cfg": CROP | {"crop_pct": 1.0}}}, "crop 1, published 0.875"),
        ({"exported": {"pretrained_cfg": CROP | {"input_size": [3, 384, 384]}}}, "input 384 x 384 px, published 224 px"),
        ({"exported": {}}, "input of unknown size"),
        ({"config": {"init": "random"}}, "it began from random weights"),
        ({"config": {"finetune": {"epochs": 99}}}, "none is of a ViT of this size and schedule"),
        ({"exported": {"pretrained_cfg": CROP, "rcmae": {"vit": {"embed_dim": 128, "depth": 6}}}}, "none is of a ViT of this size"),
        ({"config": {"protocol": "knn"}, "protocol": "knn"}, "no row of MAE or RC-MAE is published for k-NN"),
    ],
)  # fmt: skip
def test_no_published_row_beside_another_protocol(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    page = reported(imagenet(tmp_path / "run", **change))
    assert published(page, "run") is None and page.said(reason), page.notes


def test_published_rows_of_the_probe(tmp_path: Path) -> None:
    page = reported(imagenet(tmp_path / "run", config={"protocol": "linprobe"}))
    table = published(page, "run")
    assert table is not None and [row[:2] for row in table[2:]] == [
        ["MAE ViT-B", "67.8"], ["MAE ViT-B, run again by RC-MAE's authors", "67.3"],
        ["RC-MAE ViT-B, same mask", "68.4"], ["RC-MAE ViT-B, different masks", "68.7"],
    ]  # fmt: skip


VITDET = {"img_size": 1024, "batch_size": 64, "steps": 184375}


@pytest.mark.parametrize(("cascade", "quoted"), [(False, ["51.6", "45.9"]), (True, ["54.0", "46.7"])])
def test_published_rows_of_detection(tmp_path: Path, cascade: bool, quoted: list[str]) -> None:
    config = VITDET | {"detector": {"cascade": cascade}}
    page = reported(
        detected(tmp_path / "run", 0.51, COCO_NAMES, config=config, facts={"test_images": 5000, "images": 117266})
    )
    table = published(page, "run")
    assert table is not None and table[1] == ["run", "51.00", "50.00", "this run"]
    assert [row[1:3] for row in table[2:]] == [quoted]
    assert not any("RC-MAE" in row[0] or "51.0" in row for row in table)  # its figures are of another recipe


@pytest.mark.parametrize(
    ("config", "facts", "names", "reason"),
    [
        ({"img_size": 1000}, {}, COCO_NAMES, "images of 1,000 px, published 1,024"),
        ({"steps": 46094}, {}, COCO_NAMES, "none is of a ViT of this size and schedule"),  # 25 epochs
        ({}, {"test_images": 500}, COCO_NAMES, "evaluated on 500 images, published 5,000"),
        ({}, {"images": 100}, COCO_NAMES, "trained on 100 images"),
        ({}, {}, COCO_NAMES[1:], "79 classes, not COCO's eighty"),
    ],
)
def test_no_published_row_beside_another_detection(
    tmp_path: Path, config: dict[str, Any], facts: dict[str, Any], names: tuple[str, ...], reason: str
) -> None:
    facts = {"test_images": 5000, "images": 118287} | facts
    page = reported(detected(tmp_path / "run", 0.5, names, config=VITDET | config, facts=facts))
    assert published(page, "run") is None and page.said(reason), page.notes


@pytest.mark.parametrize(
    ("config", "quoted"),
    [({}, "48.13"), ({"scales": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], "flip": True}, "48.7")],
)
def test_published_rows_of_segmentation(tmp_path: Path, config: dict[str, Any], quoted: str) -> None:
    names = open_classes(LabelKeys(classes="ade20k")).names
    facts = {"test_images": 2000, "images": 20210}
    page = reported(segmented(tmp_path / "run", 47.0, names, config=config, facts=facts))
    table = published(page, "run")
    assert table is not None and [row[1] for row in table[1:]] == ["47.00", quoted]


@pytest.mark.parametrize(
    ("config", "facts", "reason"),
    [
        ({"steps": 80000}, {}, "steps 80,000, published 160,000"),
        ({"head": "linear"}, {}, "head linear, published upernet"),
        ({"scales": [1.0, 1.5]}, {}, "other scales than one"),
        ({"flip": True}, {}, "other scales than one"),
        ({}, {"test_images": 100}, "evaluated on 100 images, published 2,000"),
    ],
)
def test_no_published_row_beside_another_segmentation(
    tmp_path: Path, config: dict[str, Any], facts: dict[str, Any], reason: str
) -> None:
    names = open_classes(LabelKeys(classes="ade20k")).names
    facts = {"test_images": 2000, "images": 20210} | facts
    page = reported(segmented(tmp_path / "run", 47.0, names, config=config, facts=facts))
    assert published(page, "run") is None and page.said(reason), page.notes


C_FLAGS = {"images": 50000, "of": 50000, "img_size": "224x224", "definition": "released files", "jpeg_step": True}


def imagenet_c(folder: Path, name: str = "imagenet_c", **flags: Any) -> Path:
    return swept(
        folder, name=name, flags=C_FLAGS | flags, figures={f"{name}/mce_pct": 52.5, "imagenet_val/error_pct": 17.0}
    )


def test_published_rows_of_imagenet_c(tmp_path: Path) -> None:
    table = published(reported(imagenet_c(tmp_path / "run")), "run")
    assert table is not None and table[:2] == [["", "mCE, %", "source"], ["run", "52.50", "this sweep"]]
    assert ["MAE ViT-B", "51.7", "facebookresearch/mae README, FINETUNE.md"] in table
    assert ["ResNet-50", "76.7", "hendrycks/robustness README (clean error 23.85)"] in table
    assert not [row for row in table if row[0].startswith("RC-MAE")]  # none was read


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("imagenet_c_otf", {}, "it holds none of the sets"),
        ("imagenet_c", {"images": 5000}, "mCE: 5,000 images, published on 50,000"),
        ("imagenet_c", {"subset": True}, "published on 50,000"),
        ("imagenet_c", {"img_size": "192x192"}, "images of 192x192 px, published at 224"),
        ("imagenet_c", {"transform": "official"}, "the sets' own transform"),
    ],
)
def test_no_published_row_beside_another_imagenet_c(
    tmp_path: Path, name: str, flags: dict[str, Any], reason: str
) -> None:
    page = reported(imagenet_c(tmp_path / "run", name, **flags))
    assert published(page, "run") is None and page.said(reason), page.notes


def test_published_mpc_only_beside_a_known_coco_detector(tmp_path: Path) -> None:
    dense = {"box_ap": 0.4}
    model, whole = {"model": str(tmp_path / "boxes" / "detector")}, {"images": 5000, "of": 5000}
    run = swept(tmp_path / "run", dense, clean=dense, config=model, flags=whole)
    assert reported(run).said("that the detector is one of COCO's eighty classes is not known")
    detected(tmp_path / "boxes", names=COCO_NAMES)
    table = published(reported(run, tmp_path / "boxes"), "run, box AP, %")
    assert table is not None and table[2][:4] == ["Mask R-CNN R50-FPN 1x", "37.3", "18.7", "50.1"]
    other = swept(tmp_path / "other", dense, clean=dense, flags={"images": 500, "subset": True})
    assert reported(other).said("500 images, published on the 5,000 of COCO val2017")
