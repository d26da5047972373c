"""Reports of what is missing, damaged, hostile or too much: always a page, always inert, always small enough."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from robustness.corruptions.apply import BENCHMARK, SEVERITIES
from tests.report_runs import (
    COMMIT,
    SPEED,
    classified,
    detected,
    parsed,
    picture,
    pretrained,
    reported,
    segmented,
    summary_of,
    swept,
)
from tools.report.page import MAX_BYTES, build
from tools.report.runs import find_runs, read_run
from tools.report.sweep_results import read_sweep

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
    assert page.row("Fine-tuning on cifar10.tgz", "top-1, %") == ["–"]
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
    assert row[2:6] == ["40.00", "55.00", "75.00", "2 cells, NOT THE WHOLE BENCHMARK"]
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
    assert heads[:4] == [names[0], '"><b>', "line\\nbreak", "\N{RAINBOW}"]
    assert heads[4] == f"{'y' * 32}…{'y' * 31}" and page.text.count("y" * 255) == 1


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


def test_what_a_page_cannot_hold_of_a_sweep_is_told(tmp_path: Path) -> None:
    figures = {f"set{i:02d}/{BENCHMARK[0]}/1/error_pct": 50.0 for i in range(12)}
    figures |= {f"set00/own{j:02d}/1/error_pct": 50.0 for j in range(36)}
    figures |= {f"set01/{BENCHMARK[0]}/1/unit{k}": 50.0 for k in range(4)}
    run = swept(tmp_path / "sweep", name="set00", figures=figures)
    results = json.loads((run / "results.json").read_text())
    results["refused"] = {f"set00/f{i}": "why" for i in range(30)}
    (run / "results.json").write_text(json.dumps(results))
    page = reported(run)
    assert page.said("sweep: 2 sets LEFT OUT, a page holds 10: set10, set11")
    assert page.said("sweep: set00: 21 corruptions LEFT OUT, a page holds 30: own15, own16, own17, own18, own19, ...")
    assert page.said("sweep: set01: 2 units LEFT OUT, a page holds 3: unit2, unit3") and page.said("6 more figures.")
    assert read_sweep(read_run(swept(tmp_path / "usual"))).notes == []
