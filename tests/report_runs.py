"""Run directories made up for reports, and a page read back as a reader with html.parser would."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from robustness.corruptions.apply import BENCHMARK, SEVERITIES
from tools.report.page import build
from tools.report.published import SOURCES
from tools.report.runs import find_runs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENV = {
    "command": ["rcmae", "verb", "out=runs/x"], "started": "2026-01-02 03:04:05 +0000", "python": "3.11.7",
    "torch": "2.14.1", "cpus": 2, "threads": 1, "instruction_set": "AVX512", "gpu": None, "platform": "Linux",
    "git_commit": COMMIT,
}  # fmt: skip
SPEED = {"speed/images_per_s": 100.0, "speed/data_wait_pct": 1.5, "speed/memory_gib": 1.25}
VIT_B = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "img_size": [224, 224]}


def write(folder: Path, **files: Any) -> Path:
    """Files of a run directory: `config`, `env`, `summary`, `results`, `rows`, `exported`, `manifest`, `log`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(files.get("config", {}), allow_unicode=True))
    (folder / "env.json").write_text(json.dumps(files.get("env", ENV)))
    for name in ("summary", "results"):
        if name in files:
            (folder / f"{name}.json").write_text(json.dumps(files[name]))
    if "rows" in files:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in files["rows"]))
    if "exported" in files:
        (folder / files.get("export_name", "backbone")).mkdir(exist_ok=True)
        (folder / files.get("export_name", "backbone") / "config.json").write_text(json.dumps(files["exported"]))
    if "manifest" in files:
        (folder / "checkpoints" / "step_0000010").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "step_0000010" / "manifest.json").write_text(json.dumps(files["manifest"]))
    if "log" in files:
        (folder / "train.log").write_text(files["log"])
    return folder


def summary_of(figures: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "status": "done", "config": "abcdef012345", "seed": 0, "git_commit": COMMIT, "figures": dict(figures),
        "images": 50000, "images_seen": 1280, "non_finite_steps": 0, "broken_images": {},
        "flags": ["precision auto", "device cpu"],
    } | more  # fmt: skip


def picture(path: Path, width: int = 60, height: int = 40, noise: bool = False) -> None:
    """A PNG, of one colour or of noise that no encoder makes small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8) if noise else np.full((height, width, 3), 90, np.uint8)
    Image.fromarray(pixels).save(path)


def pretrained(
    folder: Path,
    method: str = "rc_mae",
    knn: Sequence[float] = (28.5, 30.0, 37.6),
    rate: float = 100.0,
    memory: float = 1.25,
    **changes: Any,
) -> Path:
    """A finished pretraining run of ten steps of 128 images, probed at steps 0, 5 and 10."""
    config = {
        "data": "/sets/cifar10.tgz", "out": str(folder), "method": method, "model": "tiny", "batch_size": 128, "seed": 0,
        "img_size": 32, "teacher": {"mask": "same"}, "dynamics": {"every_steps": 5},
        "probe": {"data": "/sets/cifar10.tgz", "train_images": 5000, "test_images": 1000, "k": 20},
        "engine": {"precision": "auto", "compile": "auto"},
    } | changes.pop("config", {})  # fmt: skip
    rows: list[dict[str, Any]] = []
    for step, value in zip((0, 5, 10), knn, strict=True):
        if step:
            row = {"step": step, "train/reconstruction": 1.0 / step, "train/loss": 1.5 / step}
            row |= {"speed/images_per_s": rate, "speed/data_wait_pct": 1.0, "speed/memory_gib": memory}
            if method != "mae":
                row |= {"train/consistency": 0.1, "dynamics/teacher_distance": 0.5 * step}
                row |= {"dynamics/reconstruction_grad_norm": 3.4, "dynamics/consistency_grad_norm": 3.6}
                row |= {"dynamics/cos_reconstruction_consistency": -0.9, "dynamics/effective_momentum": 0.99}
            rows.append(row)
        rows.append({"step": step, "probe/knn_top1_pct": value, "probe/linear_top1_pct": value + 10})
    final = {key: value for row in rows for key, value in row.items()}
    picture(folder / "pictures" / "reconstructions_0000010.png", 40, 80)
    return write(
        folder, config=config, rows=rows, exported={"rcmae": {"vit": {"embed_dim": 128, "depth": 6, "patch_size": 4}}},
        **{"summary": summary_of(final, flags=["precision auto", "device cpu", "probe on at most 5000 + 1000 images"])}
        | changes,
    )  # fmt: skip


def classified(
    folder: Path,
    top1: float = 60.4,
    per_class: Mapping[str, float] | None = None,
    protocol: str = "finetune",
    **changes: Any,
) -> Path:
    """A finished fine-tuning or probe, evaluated twice."""
    per_class = {"cat": 28.6, "dog": 49.4} if per_class is None else per_class
    config = {
        "data": "/sets/cifar10.tgz", "out": str(folder), "backbone": "/runs/pre/backbone", "protocol": protocol,
        "init": "backbone", "batch_size": 128, "seed": 0, "finetune": {"epochs": 100}, "linprobe": {"epochs": 90},
    } | changes.pop("config", {})  # fmt: skip
    rows = [{"step": 0, "eval/top1_pct": 10.0, "eval/loss": 2.3}, {"step": 10, "train/loss": 1.5, **SPEED}]
    rows.append({"step": 10, "eval/top1_pct": top1, "eval/top5_pct": 95.6, "eval/loss": 1.16})
    figures = {"eval/top1_pct": top1, "eval/top5_pct": 95.6, "eval/loss": 1.16}
    summary = summary_of(figures, test_images=5000, backbone="c30c4ee61701", **changes.pop("facts", {}))
    if not (folder / "confusion.png").exists():
        picture(folder / "confusion.png")
    return write(
        folder, config=config, export_name="classifier",
        **{
            "rows": rows,
            "summary": summary, "results": summary | {"per_class_pct": dict(per_class)},
            "exported": {"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1.0}, "rcmae": {"vit": VIT_B}},
        }
        | changes,
    )  # fmt: skip


def imagenet(folder: Path, **changes: Any) -> Path:
    """A fine-tuned ViT-B under the published protocol."""
    names = {f"n{i:08d}": 80.0 for i in range(1000)}
    facts = {"test_images": 50000, "images": 1281167}
    exported = {"pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.875}, "rcmae": {"vit": VIT_B}}
    summary = summary_of({"eval/top1_pct": 83.1}, **facts)
    standard = {"config": {}, "summary": summary, "exported": exported, "per_class": names}
    given = standard | changes
    return classified(
        folder, 83.1, given["per_class"], config=given["config"], summary=given["summary"], exported=given["exported"],
        results=given["summary"] | {"per_class_pct": given["per_class"]}, protocol=given.get("protocol", "finetune"),
    )  # fmt: skip


def detected(folder: Path, box: float = 0.39, names: Sequence[str] = ("person", "dog"), **changes: Any) -> Path:
    """A finished detector without large objects to find."""
    config = {
        "data": "/sets/coco", "out": str(folder), "backbone": "/runs/pre/backbone", "init": "backbone", "batch_size": 8,
        "seed": 0, "steps": 10, "img_size": 128, "detector": {"cascade": False, "num_classes": len(names)},
    } | changes.pop("config", {})  # fmt: skip
    figures = {"box_ap": box, "box_ap50": 0.8, "box_ap_small": 0.2, "box_ap_medium": 0.4, "box_ap_large": None}
    figures |= {"mask_ap": 0.5, "mask_ap_small": 0.3}
    summary = summary_of(figures, test_images=125, images=570) | changes.pop("facts", {})
    everything = figures | {f"{kind}_ap/{name}": box for kind in ("box", "mask") for name in names}
    rows = [{"step": 5, "train/loss": 2.0, **SPEED}, {"step": 10, "eval/box_ap": box, "eval/mask_ap": 0.5}]
    picture(folder / "pictures" / "detections_0000010.png")
    exported = {"rcmae": {"vit": VIT_B, "names": list(names)}}
    return write(
        folder, config=config, rows=rows, export_name="detector",
        **{"summary": summary, "results": summary | {"all_figures": everything}, "exported": exported} | changes,
    )  # fmt: skip


def segmented(folder: Path, miou: float = 40.25, names: Sequence[str] = ("road", "sky"), **changes: Any) -> Path:
    """A finished segmentor; its last class has no pixel."""
    config = {
        "data": "/sets/camvid", "out": str(folder), "backbone": "/runs/pre/backbone", "init": "backbone", "seed": 0,
        "batch_size": 16, "steps": 160000, "img_size": 512, "head": "upernet", "segmentor": {"channels": None},
        "scales": [1.0], "flip": False,
    } | changes.pop("config", {})  # fmt: skip
    figures = {"miou_pct": miou, "macc_pct": 50.0, "aacc_pct": 80.0}
    summary = summary_of(figures, test_images=60, images=367) | changes.pop("facts", {})
    table = [{"name": name, "iou_pct": miou, "acc_pct": 50.0, "pixels": 12345} for name in names]
    table[-1] |= {"iou_pct": None, "acc_pct": None, "pixels": 0}
    rows = [{"step": 10, "train/loss": 1.0, **SPEED}, {"step": 10, "eval/miou_pct": miou, "eval/aacc_pct": 80.0}]
    picture(folder / "pictures" / "labels_0000010.png")
    counts = [[100 if i == j else 10 * i + j for j in range(len(names))] for i in range(len(names))]
    (folder / "confusion.json").write_text(json.dumps({"rows_are_labels": counts}))
    return write(
        folder, config=config, rows=rows, export_name="segmentor",
        **{"summary": summary, "results": summary | {"classes": table}, "exported": {"rcmae": {"vit": VIT_B}}} | changes,
    )  # fmt: skip


SWEEP_FLAGS = {
    "images": 5000, "of": 5000, "subset": False, "masked": False, "definition": "imagecorruptions", "corrupt": "decoded",
    "jpeg_step": False, "draws": "cpu", "seed": 0, "img_size": "32x32", "transform": "model", "precision": "fp32",
    "device": "cpu",
}  # fmt: skip


def swept(
    folder: Path,
    values: Mapping[str, float] | None = None,
    *,
    name: str = "corruptions",
    clean: Mapping[str, float] | None = None,
    severities: Sequence[int] = SEVERITIES,
    flags: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A finished sweep; a value is that of severity 0, and each severity takes one step of a tenth of it away."""
    values, clean = values or {"error_pct": 50.0}, clean or {"error_pct": 40.0, "top1_pct": 60.0}
    config = {
        "model": "/runs/tuned/classifier", "data": "/sets/cifar10.tgz", "out": str(folder), "seed": 0,
        "benchmarks": ["corruptions"], "corruptions": "benchmark", "severities": list(severities),
    } | changes.pop("config", {})  # fmt: skip
    found: dict[str, Any] = {f"{name}/{key}": value for key, value in clean.items()}
    for place, corruption in enumerate(BENCHMARK):
        for severity in severities:
            for unit, value in values.items():
                sign = 1 if unit == "error_pct" else -1
                found[f"{name}/{corruption}/{severity}/{unit}"] = value * (1 + sign * (0.1 * severity + 0.01 * place))
    results = {
        "figures": found | dict(figures or {}), "refused": {}, "flags": {name: SWEEP_FLAGS | dict(flags or {})},
        "model": {"path": "/runs/tuned/classifier", "digest": "59f85a2a77fd"}, "config": "c946f45fa8b2", "seed": 0,
        "git_commit": COMMIT, "cells": [{"seconds": seconds, "images": 5000, "corrupting_s": 0.5} for seconds in (2.0, 3.0)],
    }  # fmt: skip
    return write(
        folder, config=config,
        **{"results": results, "summary": {"status": "done"} | {k: v for k, v in results.items() if k != "cells"}} | changes,
    )  # fmt: skip


# ---- reading a page ------------------------------------------------------------------------------------------------

VOID = {"meta", "link", "img", "br", "hr", "path", "circle", "input"}


@dataclass
class Page(HTMLParser):
    """What a page holds: elements with their attributes, tables by caption, notes, and all text but of style."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._taken: list[str] = []
        self._caption = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in {"caption", "td", "th", "li", "h2", "h3", "summary"}:
            self._taken = []
        if tag == "tr" and self._caption:
            self.tables[self._caption].append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> in {self._open}"
        self._open.pop()
        words = " ".join("".join(self._taken).split())
        if tag == "caption":
            self._caption = words
            assert words not in self.tables, words
            self.tables[words] = []
        elif tag in {"td", "th"} and self._caption:
            self.tables[self._caption][-1].append(words)
        elif tag == "table":
            self._caption = ""
        elif tag == "li":
            self.notes.append(words)
        elif tag in {"h2", "h3", "summary"}:
            self.headings.append(words)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"style", "script"}:
            return
        self._taken.append(data)
        self.text += data

    def row(self, caption: str, head: str) -> list[str]:
        """The fields of the row of a table that begins so."""
        found = [cells[1:] for cells in self.tables[caption][1:] if cells and cells[0] == head]
        assert len(found) == 1, f"{head}: {self.tables[caption]}"
        return found[0]

    def said(self, words: str) -> bool:
        """Whether a note holds these words."""
        return any(words in note for note in self.notes)


def parsed(html: bytes) -> Page:
    page = Page()
    page.feed(html.decode("utf-8"))
    page.close()
    assert page._open == [], f"left open: {page._open}"
    return page


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
