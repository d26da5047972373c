"""Hostile names through all of it: real runs on real files, and a report in which every name is text and nothing else.

Names hold markup, quotes, templates, formulas, escapes of terminals, line breaks, directions of writing, an emoji and
`../`, and are as long as a file name may be. They are those of data sets, images, classes, runs, models and the report.
"""

import ast
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image

from core.config import read_yaml
from core.errors import shown
from core.files import MAX_NAME_BYTES, beside, replace_dir, replace_file
from core.plots import plot
from tests.chromium import Browser, Page
from tests.harness import ForkServer
from tests.report_runs import assert_inert, parsed
from tests.segmentation_sets import write_pairs
from tests.test_report_browser import STICKS_OUT, WIDTHS
from tests.tiny import (
    draw_coco,
    draw_images,
    tiny_classification,
    tiny_detection,
    tiny_overrides,
    tiny_segmentation,
)

ODD = "<img src=x onerror=alert(1)>\"'&lt;{{7*7}}${x_{$ #%25: \x1b[31m\u202e\u2028\r\n\t\N{RAINBOW}[red]"
SCRIPT = "<script>alert(1)</script>\"'../../../etc/passwd\n\N{RAINBOW}"
SHOWN = "<script>alert(1)</script>\"'../../../etc/passwd\\n\N{RAINBOW}"  # as one printable line
COCO_CLASSES = (SCRIPT, "$\\frac{$ ../", "L" * 255, "\u202edlrow", " ")
MASK_CLASSES = (SCRIPT.partition("\n")[0], "$\\frac{$ \N{RAINBOW}\x1b[31m", "L" * 255, "' onmouseover=alert(1) x=\"")
STAGES = ("pretrain", "classify", "knn", "detect", "segment", "robust_c", "robust_d", "robust_s")
ROBUST = ("corruptions=[fog]", "severities=[1,5]", "loader.num_workers=0", "device=cpu")
# Rows of a table that have another number of fields than its head.
BROKEN_ROWS = """
[...document.querySelectorAll("tbody tr:not(.group)")].filter(
  row => row.cells.length !== row.closest("table").tHead.rows[0].cells.length).length
"""


def named(start: str, ending: str = "") -> str:
    """A name of as many bytes as a file name may have."""
    name = start + ODD
    return name + "w" * (MAX_NAME_BYTES - len(os.fsencode(name + ending))) + ending


@dataclass(frozen=True)
class Story:
    """Everything that was made, and what each command said."""

    root: Path
    said: dict[str, str]

    def out(self, stage: str) -> Path:
        return self.root / "runs" / named(stage)


@pytest.fixture(scope="module")
def story(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """All stages from pretraining to the report, each command as it is typed."""
    logs = tmp_path_factory.mktemp("hostile")
    root = logs / named("root") / ".." / named("root")
    made = Story(root, {})
    (logs / named("root")).mkdir()

    def run(name: str, *arguments: object) -> None:
        log = logs / f"{len(made.said)}.log"
        code = server.run([*map(str, arguments)], log, stage="cli")
        made.said[name] = log.read_bytes().decode()
        assert code == 0, made.said[name]

    images, coco, masks, classes = _image_folder(root), _coco(root), _masks(root), root / named("classes")
    classes.write_text("".join(f"{name}\n" for name in MASK_CLASSES))
    backbone, cache = made.out("pretrain") / "backbone", f"cache={root / named('cache')}"
    once = {"checkpoint__every_steps": 100, "loader__max_broken_share": 0.5}
    pretraining = tiny_overrides(images, made.out("pretrain"), vit__depth=2, log__tensorboard=True, **once)
    run("pretrain", "pretrain", *pretraining)
    next((images / named("odd")).glob("broken*")).unlink()
    run("export", "export", made.out("pretrain"), "--branch", "student", "--out", root / named("exported"))
    tuning = tiny_classification(images, made.out("classify"), backbone, log__curves=True, **once)
    run("classify", "classify", *tuning)
    nearest = tiny_classification(images, made.out("knn"), root / named("exported"), "knn")
    run("knn", "classify", *nearest)
    run("knn again", "classify", *nearest)
    run("detect", "detect", *tiny_detection(coco, made.out("detect"), backbone, **once))
    labels = {"classes": classes, "label_shift": 0, "batch_size": 3, **once}
    run("segment", "segment", *tiny_segmentation(masks, made.out("segment"), backbone, **labels))
    models = {
        "robust_c": (made.out("classify") / "classifier", images), "robust_d": (made.out("detect") / "detector", coco),
        "robust_s": (made.out("segment") / "segmentor", masks),
    }  # fmt: skip
    for name, (model, data) in models.items():
        run(name, "robust", f"model={model}", f"data={data}", f"out={made.out(name)}", cache, *ROBUST)
    looked_at = {"found": ("robust_d", coco / "val2017"), "labelled": ("robust_s", masks / "images" / "validation")}
    for name, (kind, folder) in looked_at.items():
        arguments = [models[kind][0], folder, "--out", root / named(name), "--cache", root / named("cache")]
        run(name, "predict", *arguments, *(["--min-score", 0] if kind == "robust_d" else []))
    run("corrupted", "corrupt", images / named("odd"), "--out", root / named("corrupted"), "--name", "fog")
    run("converted", "convert", models["robust_s"][0], root / named("converted", ".safetensors"))
    run("doctor coco", "doctor", f"data={coco}")
    run("doctor masks", "doctor", f"data={masks}", f"classes={classes}", f"out={root / named('looked')}")
    run("report", "report", root / "runs", "--out", root / named("report", ".html"))
    return made


def _image_folder(root: Path) -> Path:
    """Two classes, one image as long as a name may be and one that is broken."""
    images = draw_images(root / "data" / named("images"), count=48, side_px=40)
    for kind in ("even", "odd"):
        (images / kind).rename(images / named(kind))
    (images / named("odd") / "001.jpg").rename(images / named("odd") / named("one", ".jpg"))
    (images / named("odd") / named("broken", ".jpg")).write_bytes(b"no image")
    return images


def _coco(root: Path) -> Path:
    coco = draw_coco(root / named("world"))
    for split in ("train", "val"):
        path = coco / "annotations" / f"instances_{split}2017.json"
        tree = json.loads(path.read_text())
        for category, name in zip(tree["categories"], COCO_CLASSES, strict=False):
            category["name"] = name
        image = tree["images"][1]
        (coco / f"{split}2017" / image["file_name"]).rename(coco / f"{split}2017" / named("two", ".jpg"))
        image["file_name"] = named("two", ".jpg")
        path.write_text(json.dumps(tree))
    return coco


def _masks(root: Path) -> Path:
    masks = write_pairs(root / named("masks"), [(40, 60), (33, 47), (41, 90)])
    write_pairs(masks, [(40, 60), (40, 41)], split="validation")
    for folder in masks.glob("*/*"):
        (folder / "0.png").rename(folder / named("three", ".png"))
    return masks


def test_long_names_are_cut_in_their_middle() -> None:
    assert [shown("abcdefgh", most) for most in (8, 7, 6, 2)] == ["abcdefgh", "abc…fgh", "abc…gh", "a…"]
    assert shown("a\nb", 3) == "a…b" and shown("a\nb", 4) == "a\\nb"


@pytest.mark.parametrize("name", [named("x"), "x" * 250, "short"])
def test_files_and_folders_of_the_longest_names_are_written_whole(tmp_path: Path, name: str) -> None:
    for content in (b"old", b"new"):
        replace_file(tmp_path / name, content)
        replace_dir(tmp_path / f"{name[:-1]}d", {"file": content})
    assert (tmp_path / name).read_bytes() == (tmp_path / f"{name[:-1]}d" / "file").read_bytes() == b"new"
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name[:-1]}d"}
    other = beside(tmp_path / f"{name[:-1]}e", "tmp")
    assert other != beside(tmp_path / name, "tmp") and len(os.fsencode(other.name)) <= MAX_NAME_BYTES


def test_a_title_is_no_formula_and_fits(tmp_path: Path) -> None:
    with plot(tmp_path / named("x", ".png"), (3, 2), "$x_{$ " + "W" * 300, ("\n$",)) as figure:
        title = figure.get_suptitle()
        figure.add_subplot().set_title("$\\frac{$")
    first, second = title.splitlines()
    assert first.startswith("$x_{$ W") and 10 < len(first) < 40 and "…" in first and second == "\\n$"


def test_every_name_is_said_in_printable_lines(story: Story) -> None:
    for name, said in story.said.items():
        lines = said.replace("\t", "?").splitlines() if name != "found" else []  # a bar of progress moves the cursor
        assert all(line.isprintable() for line in lines), name
        assert "Traceback" not in said and "error:" not in said and "Warning" not in said, said
    assert f"replaced {_printable(named('odd'))}/{_printable(named('broken', '.jpg'))}: not an image" in _unwrapped(
        story.said["pretrain"]
    )
    name = ast.literal_eval(
        story.said["export"].partition("timm.create_model(")[2].partition(", pretrained")[0]
    )  # as it is pasted
    assert name == f"local-dir:{story.root / named('exported')}"
    assert timm.create_model(name, pretrained=True).embed_dim == 16
    assert max(map(len, story.said["segment"].splitlines())) < 4 * MAX_NAME_BYTES + 4000
    table = [line for line in story.said["segment"].splitlines() if line.startswith(("class ", "LLL"))]
    assert len(table) == 2 and all(len(line) < 80 for line in table)


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _unwrapped(said: str) -> str:
    return said.replace("\n", "")


def test_names_are_kept_as_they_are(story: Story) -> None:
    for stage in STAGES:
        config = read_yaml(story.out(stage) / "config.yaml")[0]
        assert config["out"] == str(story.out(stage)), stage
        assert config["data"].startswith(str(story.root)) and Path(config["data"]).is_dir(), stage
    results = {
        stage: json.loads((story.out(stage) / "results.json").read_text()) for stage in STAGES[1:] if stage != "knn"
    }
    assert set(results["classify"]["per_class_pct"]) == {named("even"), named("odd")}
    assert {f"box_ap/{name}" for name in COCO_CLASSES} <= set(results["detect"]["all_figures"])
    assert [row["name"] for row in results["segment"]["classes"]] == list(MASK_CLASSES)
    kept = json.loads((story.out("detect") / "detector" / "config.json").read_text())["rcmae"]["names"]
    assert kept[: len(COCO_CLASSES)] == list(COCO_CLASSES)
    assert json.loads((story.out("classify") / "classifier" / "config.json").read_text())["label_names"] == sorted(
        [named("even"), named("odd")]
    )


def test_nothing_is_written_elsewhere_or_left_behind(story: Story) -> None:
    top = {named("root"), *(f"{i}.log{end}" for i in range(len(story.said)) for end in ("", ".points"))}
    assert {path.name for path in story.root.resolve().parent.iterdir()} == top
    inside = {
        named(name) for name in ("world", "masks", "classes", "exported", "found", "labelled", "corrupted", "looked")
    }
    inside |= {"data", "runs", named("report", ".html"), named("converted", ".safetensors")}
    assert inside <= {path.name for path in story.root.iterdir()} <= inside | {named("cache"), "cache"}
    assert {path.name for path in (story.root / "runs").iterdir()} - {"cache"} == {named(stage) for stage in STAGES}
    unfinished = [path for path in story.root.rglob(".*") if path.name.startswith((".tmp-", ".del-"))]
    assert unfinished == []


def test_pictures_can_be_looked_at(story: Story) -> None:
    found = [path for path in story.root.rglob("*.[pj][np]g") if not path.is_relative_to(story.root / "data")]
    assert len(found) > 20
    for path in found:
        with Image.open(path) as image:
            image.load()
            assert image.width < 2000, path
    for stage, name in (("classify", "curves.png"), ("classify", "confusion.png"), ("robust_d", "heatmap.png")):
        assert (story.out(stage) / name).is_file()


def test_tensorboard_reads_the_run(story: Story) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(story.out("pretrain"))).Reload()
    assert "train/loss" in events.Tags()["scalars"] and "reconstructions" in events.Tags()["images"]


def test_the_report_is_inert_and_names_everything(story: Story) -> None:
    page = parsed((story.root / named("report", ".html")).read_bytes())
    assert_inert(page)
    assert page.text.count(_printable(named("pretrain"))) >= 1  # in full where the runs are listed
    heads = [row[0] for row in page.tables["The whole story"][1:]]
    assert len(heads) == len(set(heads)) == len(STAGES)
    for stage, head in zip(STAGES, heads, strict=True):
        name = _printable(named(stage))
        start, _, end = head.partition("…")
        assert len(head) == 64 and name.startswith(start) and name.endswith(end), head
    assert SHOWN in page.text and "\\u202edlrow" in page.text and f"{'L' * 40}…{'L' * 39} (255 characters)" in page.text
    assert "\x1b" not in page.text and "\u202e" not in page.text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_finds_nothing_but_text(story: Story, browser: Browser, width: int) -> None:
    url = (story.root.resolve() / named("report", ".html")).as_uri()
    page = Page(browser, url, width)
    try:
        seen: Any = page.seen()
        assert seen.console == [] and seen.dialogs == []
        assert [one for one in seen.requests if not one.startswith("data:image/webp")] == [url[:200]]
        assert page.evaluate("document.scripts.length") == 0
        handlers = (
            "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).filter(a => /^on/.test(a.name)).length"
        )
        assert page.evaluate(handlers) == 0
        assert page.evaluate(f"document.body.textContent.includes({json.dumps(SHOWN)})") is True
        assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
        assert page.evaluate(BROKEN_ROWS) == 0
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(STICKS_OUT) == []
    finally:
        page.close()
