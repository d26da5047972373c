"""`rcmae report`: what stands on the page and beside what, for made-up runs and for real ones."""

import json
import shutil
from pathlib import Path

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
    classified,
    detected,
    parsed,
    pretrained,
    reported,
    segmented,
    summary_of,
    swept,
    write,
)
from tests.tiny import draw_images, tiny_classification, tiny_detection, tiny_overrides, tiny_segmentation
from tools.cli import app
from tools.report.page import build, write_report
from tools.report.plots import Series, chart, thinned
from tools.report.runs import find_runs, read_run
from tools.report.sweep_results import read_sweep

UNCOMMITTED = "the code had changes that were not committed"


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
        "top-1 error 68.50 % under corruption (clean 40.00 %), 52.50 % kept", "run tuned",
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
    assert page.row("Detection on coco", "box AP, large") == ["–"]
    assert not [row for row in page.tables["Detection on coco"] if row[0] == "box AR, large"]  # was never stored
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
    assert page.tables["Under corruption"][0][4:7] == ["kept, %", "mean CD, %", "cells"]
    boxes = [row for row in page.tables["Under corruption"] if row[0] == "boxes"]
    assert [row[1].partition(";")[0] for row in boxes] == ["box AP, %", "mask AP, %"]
    assert boxes[0][2:5] == ["40.00", f"{100 * mpc(grid):.2f}", f"{rpc_pct(grid, 0.4):.2f}"]
    assert boxes[0][5:7] == ["–", "75 cells"]
    assert page.row("Under corruption", "labels")[4] == "97.00"
    heat = page.tables["labels: mIoU, %, corruptions of the given set"]
    assert heat[0] == ["severity", "1", "2", "3", "4", "5", "mean", "CD, %"] and heat[1] == ["noise"]
    assert heat[2] == ["gaussian noise", "40.5", "36.0", "31.5", "27.0", "22.5", "31.5", "90.00"]
    assert heat[-1][0] == "mean of the 15"
    tones = [a["class"] for tag, a in page.elements if tag == "td" and " t" in (a["class"] or "")]
    assert len(tones) == 4 * 75 and {"figure t11", "figure t16"} <= set(tones)  # 55 % and 82 % error
    assert len([caption for caption in page.tables if caption.startswith(("answers:", "boxes:", "labels:"))]) == 4
    assert page.row("Sweeps", "answers") == ["2", "5,000", "0:00:05", "2,000", "20.00", "CPU, 1 thread"]
    assert page.row("The whole story", "boxes")[2].startswith(
        "box AP 25.20 % under corruption (clean 40.00 %), 63.00 % kept"
    )


def test_a_mean_over_a_part_of_the_grid_says_so(tmp_path: Path) -> None:
    page = reported(swept(tmp_path / "part", severities=(3,)))
    (row,) = page.tables["Under corruption"][1:]
    assert row[5] == "15 cells, NOT THE WHOLE BENCHMARK"
    assert page.row("The whole story", "part")[5] == "not the whole benchmark"
    drawn = swept(tmp_path / "drawn", flags={"subset": True, "images": 12, "of": 60, "sample": 12, "sample_seed": 7})
    page = reported(drawn)
    assert page.row("The whole story", "drawn")[5] == "a development SAMPLE of the images"
    sample = "a development SAMPLE of 12 of 60 images drawn by seed 7"
    assert sample in page.row("Flags and warnings", "drawn")[0] and sample in page.row("Under corruption", "drawn")[5]
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
    assert page.said("run: its cells are of 2 commits: aaaaaaaaaaaa, bbbbbbbbbbbb")
    assert page.row("Where each run comes from", "run")[3] == "segmentor of 11 classes"


def test_kept_of_errors_is_that_of_accuracies(tmp_path: Path) -> None:
    one = read_sweep(read_run(swept(tmp_path / "run"))).sets[0]
    mean = sum(50 * (1 + 0.1 * s + 0.01 * i) for i in range(15) for s in SEVERITIES) / 75
    assert one.mean == pytest.approx(mean) and one.kept == pytest.approx(100 * (100 - mean) / 60)


# ---- side by side ---------------------------------------------------------------------------------------------------


def test_the_most_frequent_confusions_of_a_segmentor(tmp_path: Path) -> None:
    run = segmented(tmp_path / "run", names=("road", "sky", "<b>"))
    counts = [[60, 40, 0], [5, 95, 0], [30, 0, 0]]
    (run / "confusion.json").write_text(json.dumps({"rows_are_labels": counts}))
    table = reported(run).tables["Most frequent confusions of run"]
    assert table == [
        ["true class", "taken for", "of its pixels, %", "of all pixels, %"],
        ["road", "sky", "40.00", "17.39"], ["<b>", "road", "100.00", "13.04"], ["sky", "road", "5.00", "2.17"],
    ]  # fmt: skip
    for damaged in (counts[:2], [[1, 2], *counts[1:]], [[1, 2, -3], *counts[1:]], [["x", 2, 3], *counts[1:]], "x"):
        (run / "confusion.json").write_text(json.dumps({"rows_are_labels": damaged}))
        assert reported(run).said("run: confusion.json: no table of pixels, class by class")
    (run / "confusion.json").write_text("{")
    assert reported(run).said("run: confusion.json: no JSON from line 1")
    (run / "confusion.json").write_text(json.dumps({"rows_are_labels": [[1, 0, 0], [0, 1, 0], [0, 0, 0]]}))
    page = reported(run)
    assert page.said("No pixel is of another class.") and len(page.tables["Most frequent confusions of run"]) == 1


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


def test_ticks_of_what_is_nothing_or_next_to_nothing_can_be_read() -> None:
    for values, ticks in (((0.0, 0.0), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]), ((0.0, 1e-10), ["0", "2.5e−11"])):
        drawn = chart("t", "x", [Series("a", 0, list(enumerate(values)))])
        assert drawn is not None and [tick.text for tick in drawn.y_ticks][: len(ticks)] == ticks
        assert all(len(tick.text) < 8 for tick in drawn.y_ticks)


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
    assert table["robust"][3].startswith("top-1 error ") and "mIoU " in table["robust_labels"][3]
    assert table["robust_boxes"][3].startswith("box AP ") and "mask AP " in table["robust_boxes"][3]
    assert table["robust_labels"][4] == "run segment" and table["robust_boxes"][4] == "run detect"
    assert [row[5] for row in table.values()] == ["done"] * 7
    assert {row[2] for row in page.tables["Flags and warnings"][1:]} <= {"–", UNCOMMITTED}
    assert len([a for tag, a in page.elements if tag == "img"]) == 4
    for start in ("Top-1 by class, %", "IoU by class, %", "Box AP by class, %", "Mask AP by class, %"):
        assert any(caption.startswith(start) for caption in page.tables), start
