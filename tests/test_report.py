"""`rcmae report`: what stands on the page, beside what, and what is said where something is missing or hostile."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.config import load_config
from core.errors import ConfigError
from robustness.corruptions.apply import BENCHMARK, SEVERITIES
from robustness.run import robust
from robustness.scores import mpc, rpc_pct
from robustness.settings import RobustConfig
from tests.harness import ForkServer
from tests.report_runs import (
    COMMIT,
    SPEED,
    Page,
    classified,
    detected,
    imagenet,
    parsed,
    picture,
    pretrained,
    segmented,
    summary_of,
    swept,
    write,
)
from tests.tiny import draw_images, tiny_classification, tiny_detection, tiny_overrides, tiny_segmentation
from tools.cli import app
from tools.report.page import MAX_BYTES, build, write_report
from tools.report.plots import Series, chart, thinned
from tools.report.published import SOURCES
from tools.report.runs import find_runs, read_run
from tools.report.sweep_results import read_sweep
from transfer.detection.coco_names import COCO_NAMES
from transfer.segmentation.classes import open_classes
from transfer.segmentation.labels import LabelKeys

UNCOMMITTED = "the code had changes that were not committed"


def reported(*runs: Path) -> Page:
    """The page of these runs, read back; what no page may hold is looked for in every one."""
    page = parsed(build(find_runs(runs, 24)))
    assert_inert(page)
    for word in ("None", "nan", "inf", "Traceback", "{'", "<", "&lt;"):
        assert word not in page.text.split(), word
    return page


def assert_inert(page: Page) -> None:
    """No script, no handler, nothing that is fetched: only data URIs, links within the page, and documented sources."""
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form", "use", "image", "foreignobject"}, tag
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style" and name != "srcset", (tag, name)
            if name in {"src", "href", "xlink:href", "action", "data", "poster"}:
                local = (value or "").startswith(("data:image/webp;base64,", "#")) or (tag, value) == ("link", "data:,")
                assert local or (tag == "a" and value in SOURCES.values()), (tag, name, value)
    policy = [a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


# ---- content --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every stage, each made from the one before."""
    folder = tmp_path_factory.mktemp("chain")
    pretrained(folder / "pretrain")
    start = {"backbone": str(folder / "pretrain" / "backbone")}
    classified(folder / "tuned", config=start)
    detected(folder / "boxes", config=start)
    segmented(folder / "labels", config=start)
    swept(folder / "corruptions", config={"model": str(folder / "tuned" / "classifier")})
    return folder


def test_a_chain_is_told_from_the_first_image_to_the_last_figure(chain: Path) -> None:
    page = reported(chain)
    assert page.headings[:2] == ["In ten lines", "What was made of what"]
    story = page.tables["The whole story"]
    assert [row[0] for row in story[1:]] == ["pretrain", "tuned", "boxes", "labels", "corruptions"]
    told = page.row("The whole story", "pretrain")
    assert told[:2] == ["RC-MAE", "cifar10.tgz"]
    assert told[2] == "k-NN top-1 37.60 % (at first 28.50 %), linear top-1 47.60 % (at first 38.50 %)"
    told = page.row("The whole story", "tuned")
    assert told == ["fine-tuning", "cifar10.tgz", "top-1 60.40 %, top-5 95.60 %", "run pretrain", "done", "–"]
    assert page.row("The whole story", "boxes")[2] == "box AP 39.00, mask AP 50.00"
    assert page.row("The whole story", "labels")[2] == "mIoU 40.25 %"
    assert page.row("The whole story", "corruptions")[2:4] == [
        "top-1 error, % 68.50 under corruption (clean 40.00), 52.50 % kept", "run tuned",
    ]  # fmt: skip
    origin = page.row("Where each run comes from", "tuned")
    assert origin[1] == "sets/cifar10.tgz; 50,000 images to learn from, 5,000 to evaluate on"
    assert origin[2] == "run pretrain, weights c30c4ee61701"
    assert origin[4] == f"commit {COMMIT[:12]}, configuration abcdef012345, seed 0"
    assert origin[5].startswith("no GPU, 2 CPUs (AVX512), 1 thread; torch 2.14.1")
    assert page.row("Flags and warnings", "pretrain")[0].endswith("probe on at most 5000 + 1000 images")


def test_pretraining(chain: Path) -> None:
    page = reported(chain / "pretrain")
    caption = "Pretraining on cifar10.tgz, ViT 128 x 6, patch 4"
    assert page.row(caption, "method") == ["RC-MAE"]
    assert page.row(caption, "images seen") == ["1,280"]
    assert page.row(caption, "k-NN top-1, %") == ["37.60"]
    assert page.row(caption, "reconstruction loss") == ["0.1"]
    assert page.row(caption, "images/s, median") == ["100"]
    assert page.row(caption, "peak memory, GiB") == ["1.25"]
    assert page.row(caption, "time of training") == ["0:00:13"]  # 1,280 images at 100 per second
    labels = [a["aria-label"] for tag, a in page.elements if tag == "svg" and a.get("aria-label")]
    for words in (
        "k-NN top-1, % over images seen: pretrain: RC-MAE 28.5 to 37.6",
        "k-NN top-1, % over minutes of training",
        "linear probe top-1, % over images seen",
        "gradient norms over images seen: reconstruction 3.4 to 3.4",
        "effective momentum of the teacher over images seen: momentum 0.99 to 0.99",
    ):
        assert any(label.startswith(words) for label in labels), words
    pictures = [a for tag, a in page.elements if tag == "img"]
    assert [a["alt"] for a in pictures] == ["Reconstructions of pretrain at step 10"]
    assert (pictures[0]["width"], pictures[0]["height"]) == ("40", "80")


def test_classification_and_its_knn(chain: Path, tmp_path: Path) -> None:
    figures = {"knn/cls_k10_top1_pct": 42.1, "knn/mean_k20_top1_pct": 44.58, "knn/mean_k20_top5_pct": 86.8}
    config = {"data": "/sets/cifar10.tgz", "protocol": "knn", "backbone": "/b", "batch_size": 128, "seed": 0}
    summary = {key: value for key, value in summary_of(figures).items() if key != "images_seen"}
    write(tmp_path / "knn", config=config, summary=summary)
    page = reported(chain / "tuned", tmp_path / "knn")
    assert page.row("Fine-tuning on cifar10.tgz", "top-1, %") == ["60.40"]
    assert page.row("Top-1 by class, %: Fine-tuning on cifar10.tgz", "cat") == ["28.60"]
    assert page.row("k-NN on cifar10.tgz", "k = 10, class token") == ["42.10"]
    both = [row for row in page.tables["k-NN on cifar10.tgz"] if row[0] == "k = 20, mean of the patch tokens"]
    assert [row[1] for row in both] == ["44.58", "86.80"]
    assert page.row("The whole story", "knn")[2] == "top-1 44.58 % (k = 20, mean of the patch tokens)"
    assert page.row("Flags and warnings", "knn")[1] == "–"  # it has no metrics.jsonl and no results.json by nature


def test_detection_and_segmentation(chain: Path) -> None:
    page = reported(chain / "boxes", chain / "labels")
    assert page.row("Detection on coco", "box AP") == ["39.00"]
    assert page.row("Detection on coco", "box AP, small") == ["20.00"]
    assert not [row for row in page.tables["Detection on coco"] if row[0] == "box AP, large"]  # undefined in all
    assert page.row("Box AP by class, %: Detection on coco", "dog") == ["39.00"]
    table = page.tables["IoU by class, %: Segmentation on camvid"]
    assert table == [["class", "labels", "labelled pixels"], ["road", "40.25", "12,345"], ["sky", "–", "0"]]
    assert page.row("Segmentation on camvid", "mIoU, %") == ["40.25"]
    assert [a["alt"].partition(";")[0] for tag, a in page.elements if tag == "img"] == [
        "Detections on validation images: Detection on coco",
        "Validation images, predictions and truth: Segmentation on camvid",
    ]


def test_many_classes_are_told_by_their_extremes(tmp_path: Path) -> None:
    names = {f"class {i}": float(i) for i in range(100)}
    page = reported(classified(tmp_path / "run", per_class=names))
    table = page.tables["Top-1 by class, %: Fine-tuning on cifar10.tgz"]
    assert [row[0] for row in table[1:]] == [f"class {i}" for i in (*range(15), *range(85, 100))]
    assert page.said("100 classes, of which the 15 lowest and the 15 highest of run are shown")
    begun = classified(tmp_path / "begun", per_class={}, results={})
    page = reported(begun, tmp_path / "run")
    assert len(page.tables["Top-1 by class, %: Fine-tuning on cifar10.tgz"]) == 31


def test_robustness_of_every_task_side_by_side(tmp_path: Path) -> None:
    swept(tmp_path / "answers")
    dense = {"box_ap": 0.4, "mask_ap": 0.3}
    swept(tmp_path / "boxes", dense, clean=dense | {"box_ap50": 0.7})
    cd = {f"corruptions/{name}/cd_pct": 90.0 + i for i, name in enumerate(BENCHMARK)} | {
        "corruptions/mean_cd_pct": 97.0
    }
    swept(tmp_path / "labels", {"miou_pct": 45.0}, clean={"miou_pct": 45.0}, figures=cd)
    page = reported(tmp_path)
    grid = {c: {s: 0.4 * (1 - 0.1 * s - 0.01 * i) for s in SEVERITIES} for i, c in enumerate(BENCHMARK)}
    assert page.tables["Under corruption"][0][5:8] == ["kept, %", "mean CD, %", "cells"]
    boxes = [row for row in page.tables["Under corruption"] if row[0] == "boxes"]
    assert [row[2] for row in boxes] == ["box AP, %", "mask AP, %"]
    assert boxes[0][3:6] == ["40.00", f"{100 * mpc(grid):.2f}", f"{rpc_pct(grid, 0.4):.2f}"]
    assert boxes[0][6:8] == ["–", "75 cells"]
    assert page.row("Under corruption", "labels")[5] == "97.00"
    heat = page.tables["labels: mIoU, %, corruptions of the given set"]
    assert heat[0] == ["severity", "1", "2", "3", "4", "5", "mean", "CD, %"] and heat[1] == ["noise"]
    assert heat[2] == ["gaussian noise", "40.5", "36.0", "31.5", "27.0", "22.5", "31.5", "90.00"]
    assert heat[-1][0] == "mean of the 15"
    tones = [a["class"] for tag, a in page.elements if tag == "td" and " t" in (a["class"] or "")]
    assert len(tones) == 4 * 75 and {"figure t11", "figure t16"} <= set(tones)  # 55 % and 82 % error
    assert len([caption for caption in page.tables if caption.startswith(("answers:", "boxes:", "labels:"))]) == 4
    assert page.row("Sweeps", "answers") == ["2", "5,000", "0:00:05", "2,000", "20.00", "CPU, 1 thread"]
    assert page.row("The whole story", "boxes")[2].startswith(
        "box AP, % 25.20 under corruption (clean 40.00), 63.00 % kept"
    )


def test_a_mean_over_a_part_of_the_grid_says_so(tmp_path: Path) -> None:
    page = reported(swept(tmp_path / "part", severities=(3,)))
    (row,) = page.tables["Under corruption"][1:]
    assert row[6] == "15 cells, NOT THE WHOLE BENCHMARK"
    assert page.row("The whole story", "part")[5] == "not the whole benchmark"
    drawn = swept(tmp_path / "drawn", flags={"subset": True, "images": 12, "of": 60, "sample": 12, "sample_seed": 7})
    page = reported(drawn)
    assert page.row("The whole story", "drawn")[5] == "a development SAMPLE of the images"
    sample = "a development SAMPLE of 12 of 60 images drawn by seed 7"
    assert sample in page.row("Flags and warnings", "drawn")[0] and sample in page.row("Under corruption", "drawn")[6]
    page = reported(swept(tmp_path / "few", flags={"subset": True, "images": 100}))
    assert page.row("The whole story", "few")[5] == "a SUBSET of the images"
    assert page.row("Flags and warnings", "few")[0].startswith(
        "corruptions of the given set: a SUBSET: 100 of 5000 images, imagecorruptions, on the decoded image, no JPEG step"
    )


def test_a_mean_over_a_part_is_over_all_its_cells_as_the_sweep_has_it(tmp_path: Path) -> None:
    one_more = {"corruptions/saturate/3/error_pct": 1.0}
    one = read_sweep(read_run(swept(tmp_path / "part", severities=(3,), figures=one_more))).sets[0]
    assert one.mean == pytest.approx((sum(50 * (1.3 + 0.01 * i) for i in range(15)) + 1.0) / 16)
    more = {f"corruptions/saturate/{s}/error_pct": 1.0 for s in SEVERITIES}
    sets = [read_sweep(read_run(swept(tmp_path / f"{len(f)}", figures=f))).sets[0] for f in (more, {})]
    assert len(sets[0].grid) == 16 and sets[0].mean == pytest.approx(sets[1].mean)


def test_what_a_sweep_says_of_its_reference_and_its_commits(tmp_path: Path) -> None:
    run = swept(tmp_path / "run", {"miou_pct": 45.0}, clean={"miou_pct": 45.0})
    results = json.loads((run / "results.json").read_text())
    results |= {
        "reference": {"path": "/runs/other/results.json", "digest": "abc"},
        "commits_of_cells": ["a" * 40, "b" * 40],
    }
    results["model"]["described"] = "segmentor of 11 classes"
    (run / "results.json").write_text(json.dumps(results))
    page = reported(run)
    assert page.said("run: degradation (CD, rCD) is relative to /runs/other/results.json, model abc")
    assert page.said("run: its cells are of 2 commits: aaaaaaaaaaa…")
    assert page.row("Where each run comes from", "run")[3] == "segmentor of 11 classes"


def test_kept_of_errors_is_that_of_accuracies(tmp_path: Path) -> None:
    one = read_sweep(read_run(swept(tmp_path / "run"))).sets[0]
    mean = sum(50 * (1 + 0.1 * s + 0.01 * i) for i in range(15) for s in SEVERITIES) / 75
    assert one.mean == pytest.approx(mean) and one.kept == pytest.approx(100 * (100 - mean) / 60)


# ---- side by side ---------------------------------------------------------------------------------------------------


def test_two_methods_on_one_plot_and_what_the_teacher_costs(tmp_path: Path) -> None:
    pretrained(tmp_path / "mae", "mae", knn=(28.5, 30.0, 37.0), rate=160.0, memory=1.0)
    pretrained(tmp_path / "rc_mae", "rc_mae", knn=(28.5, 29.0, 38.5), rate=120.0, memory=1.25)
    page = reported(tmp_path)
    caption = "Pretraining on cifar10.tgz, ViT 128 x 6, patch 4"
    assert page.tables[caption][0] == ["", "mae", "rc_mae"]
    assert page.row(caption, "k-NN top-1, %") == ["37.00", "38.50 +1.50"]
    assert page.row(caption, "images/s, median") == ["160", "120 −40"]
    assert page.row(caption, "peak memory, GiB") == ["1.00", "1.25 +0.25"]
    assert page.row(caption, "reconstruction loss") == ["0.1", "0.1 ±0.0"]
    assert page.row(caption, "images seen") == ["1,280", "1,280"]
    assert page.row("What the teacher costs", "RC-MAE") == ["1", "120", "1.25", "25", "20"]
    assert page.row("What the teacher costs", "MAE") == ["1", "160", "1.00", "–", "–"]
    (label,) = [
        a["aria-label"] for tag, a in page.elements
        if tag == "svg" and str(a.get("aria-label")).startswith("k-NN top-1, % over images")
    ]  # fmt: skip
    assert "mae: MAE 28.5 to 37" in label and "rc_mae: RC-MAE 28.5 to 38.5" in label
    better = [a["class"] for tag, a in page.elements if tag == "span" and "delta" in (a.get("class") or "")]
    assert better.count("delta better") == 2 and better.count("delta worse") == 3  # k-NN, linear; rate, memory, time


def test_the_cost_of_the_teacher_is_not_told_across_machines(tmp_path: Path) -> None:
    pretrained(tmp_path / "mae", "mae")
    env = json.loads((tmp_path / "mae" / "env.json").read_text()) | {"gpu": "a GPU"}
    pretrained(tmp_path / "rc_mae", env=env)
    page = reported(tmp_path)
    assert page.said("Not told: the machine not the same in all runs")


def test_differences_by_class_and_only_between_figures_of_the_same_images(tmp_path: Path) -> None:
    first = classified(tmp_path / "first", 60.0, {"cat": 20.0, "dog": 40.0})
    second = classified(tmp_path / "second", 62.5, {"cat": 19.0, "dog": 45.0})
    fewer = classified(tmp_path / "fewer", 70.0, summary=summary_of({"eval/top1_pct": 70.0}, test_images=100))
    page = reported(first, second, fewer)
    assert page.row("Fine-tuning on cifar10.tgz", "top-1, %") == ["60.00", "62.50 +2.50", "70.00"]
    assert page.row("Top-1 by class, %: Fine-tuning on cifar10.tgz", "dog")[:2] == ["40.00", "45.00 +5.00"]
    assert page.said("fewer: no differences to first: evaluated on 100 images, not 5,000")
    assert page.said("Nothing but where their files lie.")


def test_runs_of_other_sets_have_tables_of_their_own(tmp_path: Path) -> None:
    classified(tmp_path / "one")
    classified(tmp_path / "two", config={"data": "/sets/flowers", "batch_size": 64})
    page = reported(tmp_path)
    assert page.tables["Fine-tuning on cifar10.tgz"][0] == ["", "one"]
    assert page.tables["Fine-tuning on flowers"][0] == ["", "two"]
    assert page.row("What differs between the runs of classification", "batch_size") == ["128", "64"]


def test_sweeps_side_by_side(tmp_path: Path) -> None:
    swept(tmp_path / "a", {"error_pct": 50.0})
    swept(tmp_path / "b", {"error_pct": 48.0}, clean={"error_pct": 35.0})
    swept(tmp_path / "c", flags={"definition": "imagenet_c"})
    page = reported(tmp_path)
    caption = "top-1 error, % side by side, corruptions of the given set: mean over the severities"
    assert page.row(caption, "clean") == ["40.00", "35.00 −5.00", "40.00"]
    assert page.row(caption, "gaussian noise") == ["65.00", "62.40 −2.60", "65.00"]
    assert page.said("c: no differences to a: another definition: imagenet_c, not imagecorruptions")


def test_a_comparison_whose_runs_are_gone_is_drawn_from_its_json(tmp_path: Path) -> None:
    probes = {"probe/knn_top1_pct": [28.5, 37.6], "probe/linear_top1_pct": [38.0, None]}
    curve = {"method": "rc_mae", "seed": 3, "images": [0, 99840], "minutes": [0, 14.7], "probes": probes}
    (tmp_path / "comparison.json").write_text(json.dumps([curve, "rubbish", {"method": "mae"}]))
    page = reported(tmp_path)
    labels = [str(a.get("aria-label")) for tag, a in page.elements if tag == "svg"]
    assert any(label.startswith("k-NN top-1, % over images seen: RC-MAE, seed 3 28.5 to 37.6") for label in labels)


def test_names_tell_runs_apart_and_none_stands_twice(tmp_path: Path) -> None:
    one, two = classified(tmp_path / "a" / "run"), classified(tmp_path / "b" / "run")
    (tmp_path / "link").symlink_to(one)
    inputs = find_runs([one, two, one, tmp_path / "link", tmp_path / "a"], 24)
    assert [run.name for run in inputs.runs] == ["a/run", "b/run"]


def test_more_runs_than_a_page_holds_are_named(tmp_path: Path) -> None:
    for i in range(5):
        classified(tmp_path / f"run{i}")
    page = parsed(build(find_runs([tmp_path], 3)))
    assert [row[0] for row in page.tables["The whole story"][1:]] == ["run0", "run1", "run2"]
    assert page.said("2 runs left out, more than a report of 3 holds: run3, run4")


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


# ---- missing and damaged --------------------------------------------------------------------------------------------


def every_stage(folder: Path) -> list[Path]:
    return [
        pretrained(folder / "pretrain"), classified(folder / "tuned"), detected(folder / "boxes"),
        segmented(folder / "labels"), swept(folder / "corruptions"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "summary.json", "results.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [None, b"", b'{"step": 1, "figu', b"\xff\xfe\x00", b"[1, 2]", b"{}", b"null"])
def test_a_missing_or_damaged_file_is_said_in_words(tmp_path: Path, name: str, content: bytes | None) -> None:
    for run in every_stage(tmp_path):
        path = run / name
        if not path.exists():
            continue
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
    page = reported(tmp_path)
    warned = [row for row in page.tables["Flags and warnings"][1:] if name in row[2] or "unfinished" in row[2]]
    runs = [row[0] for row in page.tables["Flags and warnings"][1:]]
    assert sorted(runs) == ["boxes", "corruptions", "labels", "pretrain", "tuned"]
    if content not in {b"{}", b"null"} or name == "summary.json":
        assert len(warned) >= (3 if name == "results.json" else 4), page.tables["Flags and warnings"]


def test_an_unfinished_run_shows_what_there_is(tmp_path: Path) -> None:
    run = classified(
        tmp_path / "run", log="2026-01-01 10:00:00,000 INFO x\n2026-01-01 10:01:30,000 INFO step 10/40  eta\n"
    )
    for name in ("summary.json", "results.json", "confusion.png"):
        (run / name).unlink()
    page = reported(run)
    told = page.row("The whole story", "run")
    assert told[2:5] == ["so far: top-1 60.40 %, top-5 95.60 %", "pre/backbone", "unfinished: step 10 of 40"]
    assert page.row("Fine-tuning on cifar10.tgz", "top-1, %") == ["60.40"]
    assert page.row("Fine-tuning on cifar10.tgz", "read with") == ["UNFINISHED"]
    assert page.said("results.json holds no table by class yet")
    assert page.said("run: no confusion.png yet; it is drawn at the end")
    assert "0:01:30 on the clock" in page.row("Where each run comes from", "run")[6]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    for run in every_stage(tmp_path):
        for entry in run.iterdir():
            if entry.name != "config.yaml":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    page = reported(tmp_path)
    assert [row[3] for row in page.tables["The whole story"][1:]] == ["no figure yet"] * 5
    assert page.said("No figure has been logged yet, so that there is nothing to draw.")
    assert page.said("boxes: pictures/ holds none yet")


def test_nan_and_what_is_no_number_are_undefined_and_named(tmp_path: Path) -> None:
    run = classified(tmp_path / "run")
    figures = {"eval/top1_pct": float("nan"), "eval/top5_pct": "95.6", "eval/loss": 10**400}
    (run / "summary.json").write_text(json.dumps(summary_of(figures)))
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": NaN, "eval/top1_pct": Infinity}\n{"step": 2, "train/loss": 1e999}\n'
    )
    page = reported(run)
    assert "top-1, %" not in [row[0] for row in page.tables["Fine-tuning on cifar10.tgz"]]
    assert page.said("not a finite number, and shown as undefined: eval/top1_pct, eval/top5_pct, eval/loss")


def test_lines_of_metrics_that_are_none_are_counted(tmp_path: Path) -> None:
    run = classified(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "train/loss": 1.4, "speed/images_p')
    page = reported(run)
    assert page.said("metrics.jsonl: 1 line is no row and was left out (line 4)")
    assert page.row("The whole story", "run")[4] == "done"


def test_non_finite_steps_broken_images_and_uncommitted_code(tmp_path: Path) -> None:
    facts = {"non_finite_steps": 2, "broken_images": {"a.jpg": "empty file"}}
    run = classified(tmp_path / "run", facts=facts, env={"git_commit": COMMIT + "+"})
    summary = json.loads((run / "summary.json").read_text()) | {"git_commit": COMMIT + "+"}
    (run / "summary.json").write_text(json.dumps(summary))
    page = reported(run)
    assert page.said("run: 2 steps had a loss or gradient that was not finite")
    assert page.said("run: 1 broken image replaced by others: a.jpg: empty file")
    assert page.said("the code had changes that were not committed")
    assert f"commit {COMMIT[:12]} with changes" in page.row("Where each run comes from", "run")[4]


def test_any_damage_leaves_a_page(tmp_path: Path) -> None:
    """Files cut anywhere, bytes flipped, values of other types: never an error, always every run on the page."""
    rng = random.Random(0)
    clean = tmp_path / "clean"
    every_stage(clean)
    for turn in range(25):
        folder = tmp_path / f"turn{turn}"
        shutil.copytree(clean, folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and rng.random() < 0.6):
            data = bytearray(path.read_bytes())
            if rng.random() < 0.4:
                data = data[: rng.randrange(len(data) + 1)]
            elif rng.random() < 0.5 and path.suffix == ".json":
                data = bytearray(json.dumps(other_types(json.loads(data), rng)).encode())
            else:
                for _ in range(5):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
        page = reported(folder)
        assert len(page.tables["Flags and warnings"]) == 6, turn


def other_types(tree: Any, rng: random.Random) -> Any:
    """The same tree with some of its values replaced by what nobody expects there."""
    if rng.random() < 0.15:
        return rng.choice([None, True, [], {}, "text", -1e308, 10**400, [[1]], {"a": [None]}, 0, "\u202e\x00"])
    if isinstance(tree, dict):
        return {key: other_types(value, rng) for key, value in tree.items()}
    return [other_types(value, rng) for value in tree] if isinstance(tree, list) else tree


def test_an_unfinished_sweep_is_read_from_its_cells(tmp_path: Path) -> None:
    run = swept(tmp_path / "run")
    for name in ("results.json", "summary.json"):
        (run / name).unlink()
    (run / "cells").mkdir()
    for i, (corruption, severity, error) in enumerate([("clean", 0, 40.0), ("fog", 1, 50.0), ("fog", 2, 60.0)]):
        cell = {"set": "corruptions", "corruption": corruption, "severity": severity, "images": 5000, "seed": 0}
        cell |= {"model": "m", "data": "d", "figures": {"error_pct": error, "top1_pct": 100 - error}}
        cell |= {"flags": {"images": 5000, "of": 5000, "subset": False, "definition": "imagecorruptions"}}
        (run / "cells" / f"{i}.json").write_text(json.dumps(cell | {"seconds": 1.0}))
        cell["flags"]["definition"] = "imagenet_c"
    (run / "cells" / "broken.json").write_text("{")
    (run / "cells" / "other.json").write_text(json.dumps(cell | {"model": "another", "figures": {"error_pct": 1.0}}))
    page = reported(run)
    (row,) = page.tables["Under corruption"][1:]
    assert row[3:7] == ["40.00", "55.00", "75.00", "2 cells, NOT THE WHOLE BENCHMARK"]
    assert page.said("cells of several protocols lie in one folder: the 3 of the largest are shown")
    assert page.said("cells/: 1 file of cells/ could not be read")
    assert page.row("The whole story", "run")[4] == "unfinished: 4 cells so far"


# ---- hostile names --------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "../../etc/passwd",
    "x" * 255, "\N{PILE OF POO}\N{RAINBOW}", "line\nbreak", "</style><script>alert(1)</script>", "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe", "javascript:alert(1)", "&lt;b&gt;", "\x1b[31mred", "a\ud800b",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_stays_inert(tmp_path: Path, name: str) -> None:
    folder = tmp_path / (name.replace("/", "\N{FRACTION SLASH}").encode("utf-8", "replace").decode()[:60] or "x")
    config = {"data": f"/sets/{name}", "seed": name, "probe": {"data": name, "train_images": name}}
    if "\ud800" in name:
        config = {}
    pretrained(folder / "p", config=config)
    classified(
        folder / "c", per_class={name: 10.0, "other": 20.0}, config=config, facts={"broken_images": {name: name}}
    )
    detected(folder / "d", names=[name, "other"], facts={"dropped_annotations": [name], "flags": [name]})
    segmented(folder / "s", names=[name, "other"], config=config)
    swept(folder / "r", name=name.replace("/", ":"), flags={"definition": name, name: name})
    (folder / "p" / "env.json").write_text(json.dumps({"command": [name], "gpu": name, "torch": name, "started": name}))
    page = reported(folder)
    assert "49" not in page.tables["The whole story"][1]
    shown = page.tables[
        "IoU by class, %: " + next(c for c in page.tables if c.startswith("IoU")).removeprefix("IoU by class, %: ")
    ]
    assert shown[1][0] and "\n" not in shown[1][0] and "\u202e" not in page.text and "\x1b" not in page.text
    if name.isprintable() and len(name) < 80 and "\ud800" not in name:
        assert shown[1][0] == " ".join(name.split())  # as it is, and nothing but text


def test_a_hostile_name_of_a_run(tmp_path: Path) -> None:
    names = [
        "<script>alert(1)<\N{DIVISION SLASH}script>",
        '"><b>',
        "line\nbreak",
        "\N{RAINBOW}",
        "y" * 255,
        "..hidden<i>",
    ]
    for name in names:
        classified(tmp_path / name)
    page = reported(tmp_path / names[0], *[tmp_path / name for name in names[1:]])
    heads = [row[0] for row in page.tables["The whole story"][1:]]
    assert heads[:4] == [names[0], '"><b>', "line\\nbreak", "\N{RAINBOW}"] and heads[4].startswith("y" * 200)


# ---- size -----------------------------------------------------------------------------------------------------------


def test_pictures_give_way_until_the_page_is_small_enough(tmp_path: Path) -> None:
    for i in range(4):
        run = detected(tmp_path / f"run{i}")
        picture(run / "pictures" / "detections_0000010.png", 500, 400, noise=True)
    whole = build(find_runs([tmp_path], 24))
    assert len(whole) <= MAX_BYTES and whole.count(b"data:image/webp") == 4
    smaller = build(find_runs([tmp_path], 24), max_bytes=len(whole) - 1)
    assert smaller.count(b"data:image/webp") == 4 and len(smaller) < len(whole)
    bare = build(find_runs([tmp_path], 24), max_bytes=200_000)
    page = parsed(bare)
    assert len(bare) <= 200_000 and b"data:image/webp" not in bare
    assert "4 pictures left out, so that the page stays below 5 MB." in page.text
    assert page.said("detections_0000010.png: left out") and page.row("Detection on coco", "box AP")[0] == "39.00"


def test_the_worst_page_is_below_the_limit(tmp_path: Path) -> None:
    """As many runs as a page takes, long curves, a thousand classes, pictures of noise."""
    classes = {f"class number {i} with a rather long name": float(i % 97) for i in range(1000)}
    rows = [{"step": i, "train/loss": 1 / (i + 1), "eval/top1_pct": i % 90, **SPEED} for i in range(1000)]
    for i in range(24):
        run = classified(tmp_path / f"{i:02d}-{'z' * 200}", per_class=classes, rows=rows)
        if i == 0:
            picture(run / "confusion.png", 700, 700, noise=True)
        elif i < 9:
            shutil.copy(tmp_path / f"00-{'z' * 200}" / "confusion.png", run / "confusion.png")
    page = build(find_runs([tmp_path], 24))
    assert len(page) <= MAX_BYTES
    parsed(page)


def test_a_sweep_of_a_thousand_invented_sets_and_corruptions_is_below_the_limit(tmp_path: Path) -> None:
    figures = {f"set{i}/corruption{j}/{s}/error_pct": 50.0 for i in range(30) for j in range(60) for s in SEVERITIES}
    for i in range(6):  # a quarter of the runs that a page takes, for a quarter of the limit
        swept(tmp_path / f"{i:02d}-{'z' * 200}", figures=figures)
    page = build(find_runs([tmp_path], 24), max_bytes=MAX_BYTES // 4)
    assert len(parsed(page).tables) > 60


# ---- plots ----------------------------------------------------------------------------------------------------------


def test_a_chart_keeps_gaps_and_names_what_it_shows() -> None:
    drawn = chart("loss", "step", [Series("run", 0, [(0, 1.0), (1, None), (2, 3.0), (3, 2.0)])])
    assert drawn is not None
    assert drawn.lines[0].path.count("M") == 2 and len(drawn.lines[0].dots) == 3
    assert drawn.alt == "loss over step: run 1 to 2, between 1 and 3"
    assert [tick.text for tick in drawn.y_ticks] == ["1.0", "1.5", "2.0", "2.5", "3.0"]
    ats = [tick.at for tick in drawn.y_ticks]
    assert ats == sorted(ats, reverse=True) and min(ats) >= 10 and max(ats) <= 196
    assert chart("loss", "step", [Series("run", 0, [(0, None)])]) is None


def test_a_logarithmic_chart_leaves_out_what_has_no_logarithm() -> None:
    drawn = chart("norm", "step", [Series("run", 0, [(0, 0.0), (1, 0.1), (2, 10.0), (3, -1.0)])], log=True)
    assert drawn is not None and [tick.text for tick in drawn.y_ticks] == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    assert len(drawn.lines[0].dots) == 2


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e300, -5.0, 99.999])
def test_a_constant_has_limits_of_its_own(value: float) -> None:
    drawn = chart("x", "step", [Series("run", 0, [(0, value), (1, value)])])
    assert drawn is not None and "nan" not in drawn.lines[0].path and drawn.y_ticks


def test_thousands_of_points_become_means_of_neighbours() -> None:
    points = thinned([(i, float(i % 2)) for i in range(10_000)], 100)
    assert len(points) == 100 and all(y == 0.5 for _, y in points)
    assert thinned([(i, None) for i in range(1000)], 10) == [(i * 100, None) for i in range(10)]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_one_file(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "page.html"
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*")}
    done = CliRunner().invoke(app, ["report", str(chain), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "5 runs" in done.output and [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert {path: path.stat().st_mtime_ns for path in chain.rglob("*")} == before  # only read
    assert out.read_bytes().startswith(b"<!DOCTYPE html>") and out.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    ("runs", "out", "line"),
    [
        (["nowhere"], "r.html", "nowhere: no such folder; give run directories"),
        (["empty"], "r.html", "empty: holds no run; give run directories, or a folder directly above some"),
        (["file"], "r.html", "file: no such folder; give run directories"),
        (["run"], "report.pdf", "report.pdf: expected a name that ends in .html"),
        (["run"], "folder.html", "folder.html: is a folder; give the name of a file"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_line(tmp_path: Path, runs: list[str], out: str, line: str) -> None:
    classified(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError) as refused:
        write_report([tmp_path / name for name in runs], tmp_path / out)
    assert str(refused.value).endswith(line) and "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    run = classified(tmp_path / "run")
    for name in ("summary.json", "metrics.jsonl", "confusion.png"):
        (run / name).unlink()
        (run / name).mkdir()
    page = reported(run)
    assert page.said("run: summary.json: Is a directory") and page.said("run: metrics.jsonl: Is a directory")


# ---- what the stages really write -----------------------------------------------------------------------------------


def test_real_runs_of_every_stage(tmp_path: Path, coco: Path, ade: Path, backbone: Path, server: ForkServer) -> None:
    """So that a stage which writes something else is noticed here."""
    log, runs, data = tmp_path / "log", tmp_path / "runs", draw_images(tmp_path / "data", side_px=40)
    scenes = Path(shutil.copytree(ade, tmp_path / "scenes"))
    for path in [path for i in (2, 4) for path in scenes.glob(f"*/*/validation/*{i}.*")]:
        path.unlink()  # too small to be corrupted
    stages = {
        "pretrain": tiny_overrides(data, runs / "pretrain", probe__data=data, engine__evaluate_every_steps=3),
        "classify": tiny_classification(data, runs / "classify", backbone),
        "detect": tiny_detection(coco, runs / "detect", backbone),
        "segment": tiny_segmentation(ade, runs / "segment", backbone, "linear"),
    }
    for stage, overrides in stages.items():
        assert server.run(overrides, log, stage=stage) == 0, log.read_text()
    tested = {
        "robust": ("classify/classifier", data), "robust_boxes": ("detect/detector", coco),
        "robust_labels": ("segment/segmentor", scenes),
    }  # fmt: skip
    for name, (model, images) in tested.items():
        given = [f"model={runs / model}", f"data={images}", f"out={runs / name}", "corruptions=[fog, contrast]"]
        robust(load_config(RobustConfig, None, [*given, "severities=[1, 5]", "device=cpu", "loader.num_workers=0"]))
    page = reported(runs)
    table = {row[0]: row for row in page.tables["The whole story"][1:]}
    assert table["pretrain"][3].startswith("k-NN top-1 ") and table["classify"][3].startswith("top-1 ")
    assert table["detect"][3].startswith("box AP ") and table["segment"][3].startswith("mIoU ")
    assert table["robust"][3].startswith("top-1 error, % ") and "mIoU, %" in table["robust_labels"][3]
    assert table["robust_boxes"][3].startswith("box AP, % ") and "mask AP, %" in table["robust_boxes"][3]
    assert table["robust_labels"][4] == "run segment" and table["robust_boxes"][4] == "run detect"
    assert [row[5] for row in table.values()] == ["done"] * 7
    assert {row[2] for row in page.tables["Flags and warnings"][1:]} <= {"–", UNCOMMITTED}
    assert len([a for tag, a in page.elements if tag == "img"]) == 4
    for start in ("Top-1 by class, %", "IoU by class, %", "Box AP by class, %", "Mask AP by class, %"):
        assert any(caption.startswith(start) for caption in page.tables), start
