"""COCO's figures: golden ones, pycocotools' own on real annotations, and both engines on whatever can occur."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import transfer.detection.coco_eval
from core.distributed import Processes
from core.errors import DataError
from tests.coco_sets import HEIGHT, WIDTH, annotation, image, read_set, small_set, with_
from tests.golden_files import require
from tools.cli import app
from tools.verify.coco import KINDS, against_pycocotools, detections_of, plain_stats, stats_of, toy_results
from tools.verify.golden import FOLDER
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import (
    ENGINES,
    Engine,
    Row,
    detection_rows,
    evaluate,
    gather_rows,
    read_results,
    result_entries,
)
from transfer.detection.coco_file import CocoPaths, coco_paths, read_coco
from transfer.detection.inference import Detections
from transfer.detection.rle import Rle, decode, encode, rasterised

# ---- golden values --------------------------------------------------------------------------------------------------


def test_golden_results_and_figures() -> None:
    require(toy_results(FOLDER))


def test_made_up_detections_score_as_plain_pycocotools_says() -> None:
    require(against_pycocotools())


# ---- real annotations -----------------------------------------------------------------------------------------------


def made_up(coco: CocoSet, seed: int, per_image: int = 12) -> list[Row]:
    """Detections near the truth, on crowds, of wrong classes, doubled, and anywhere; scores with ties."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for index in range(len(coco)):
        height, width = coco.size(index)
        objects = list(coco.objects(index))
        boxes, labels = [], []
        for _ in range(rng.integers(0, per_image + 1)):
            if objects and rng.random() < 0.7:
                each = objects[rng.integers(len(objects))]
                side = each.box[2:] - each.box[:2]
                box = each.box + rng.normal(0, rng.choice([0, 0.05, 0.2]), 4) * np.tile(side, 2)
                label = each.label if rng.random() < 0.85 else rng.integers(len(coco.names))
            else:
                box = np.sort(rng.uniform(0, 1, (2, 2)), axis=0).reshape(-1) * [width, height, width, height]
                label = rng.integers(len(coco.names))
            low, high = np.minimum(box[:2], box[2:] - 2), np.maximum(box[2:], box[:2] + 2)
            boxes.append(np.clip(np.concatenate([low, high]), 0, [width, height, width, height]).tolist())
            labels.append(int(label))
        scores = torch.from_numpy(rng.integers(1, 40, len(boxes)) / 40)
        masks = [decode(rasterised([ellipse(box)], height, width)) for box in boxes]
        stacked = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.bool)
        tensors = (torch.tensor(boxes).reshape(-1, 4), scores, torch.tensor(labels))
        rows += detection_rows(index, detections_of(stacked, *tensors))
    return rows


def ellipse(box: list[float]) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    x0, y0, x1, y1 = box
    return np.stack([(x0 + x1 + (x1 - x0) * np.cos(angle)) / 2, (y0 + y1 + (y1 - y0) * np.sin(angle)) / 2], axis=1)


@pytest.fixture(scope="module")
def coco128(shared: Path) -> CocoSet:
    return read_coco(coco_paths(shared / "data" / "coco128", "val"))


@pytest.fixture(scope="module")
def rows128(coco128: CocoSet) -> list[Row]:
    return made_up(coco128, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_coco128_gives_what_plain_pycocotools_gives(coco128: CocoSet, rows128: list[Row], engine: Engine) -> None:
    figures = evaluate(coco128, rows128, engine)
    entries = result_entries(rows128, coco128)
    for kind, iou_type in KINDS.items():
        expected = plain_stats(coco128.origin, entries, iou_type)
        assert 0.05 < expected[0] < 0.9
        assert stats_of(figures, kind) == pytest.approx(expected, abs=1e-12, rel=0)
    assert figures["box_ap/person"] is not None and None in figures.values()  # categories that the split has none of


def test_perfect_detections_score_one(coco128: CocoSet) -> None:
    rows = []
    for index in range(len(coco128)):
        objects = [each for each in coco128.objects(index) if not each.crowd]
        size = coco128.size(index)
        masks = [decode(each.rle or rasterised(each.polygons, *size)) for each in objects]
        stacked = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *size, dtype=torch.bool)
        boxes = torch.from_numpy(np.array([each.box for each in objects]).reshape(-1, 4))
        labels = torch.tensor([each.label for each in objects], dtype=torch.int64)
        rows += detection_rows(index, detections_of(stacked, boxes, torch.ones(len(objects)), labels))
    figures = evaluate(coco128, rows)
    assert {value for name, value in figures.items() if "_ap" in name} == {1.0, None}


# ---- both engines on whatever can occur -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_engines_agree_on_crowds_ties_and_empty_images(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    entries = []
    for i in range(40):
        x, y = rng.uniform(0, 30), rng.uniform(0, 20)
        w, h = rng.uniform(2, 30), rng.uniform(2, 20)
        outline: Any = [ellipse([x, y, x + w, y + h]).reshape(-1).tolist()]
        if rng.random() < 0.3:
            outline = rasterised([ellipse([x, y, x + w, y + h])], HEIGHT, WIDTH).as_coco()
        changes = {"bbox": [x, y, w, h], "segmentation": outline, "area": w * h * rng.choice([0.8, 20, 200])}
        crowd = int(rng.random() < 0.2)
        entries.append(annotation(i, int(rng.integers(1, 7)), int(rng.choice([3, 7])), iscrowd=crowd, **changes))
    categories = [{"id": id_} for id_ in (3, 7, 9)]
    coco = read_set(tmp_path, with_(images=[image(i) for i in range(1, 9)], categories=categories, annotations=entries))
    rows = made_up(coco, seed, per_image=30)
    fast, exact = evaluate(coco, rows), evaluate(coco, rows, "pycocotools")
    assert fast.keys() == exact.keys()
    for name, value in exact.items():
        assert (fast[name] is None) == (value is None), name
        assert value is None or abs(fast[name] - value) <= 1e-12, name
    assert fast["box_ap/9"] is None
    assert evaluate(coco, sorted(rows, key=lambda row: -row.image)) == fast  # order matters within an image alone


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("which", ["no truth", "only crowds", "nothing found", "nothing at all"])
def test_what_is_not_defined_is_none_and_what_is_missed_is_zero(tmp_path: Path, which: str, engine: Engine) -> None:
    crowds = [annotation(1, iscrowd=1)]
    entries = {"no truth": [], "only crowds": crowds, "nothing found": [annotation(1)], "nothing at all": []}[which]
    coco = read_set(tmp_path, with_(annotations=entries))
    rows = [] if which.startswith("nothing") else made_up(coco, 1)
    figures = evaluate(coco, rows, engine)
    expected = 0.0 if which == "nothing found" else None
    for kind in KINDS:
        assert figures[f"{kind}_ap"] == figures[f"{kind}_ap50"] == figures[f"{kind}_ar100"] == expected
        assert figures[f"{kind}_ap/cat"] == expected and figures[f"{kind}_ap/dog"] is None
    assert json.loads(json.dumps(figures)) == figures


def test_boxes_alone_are_evaluated_without_masks(tmp_path: Path) -> None:
    coco = read_set(tmp_path, small_set())
    figures = evaluate(coco, [Row(0, 1, 0.9, (5, 6, 10, 10), None)])
    assert figures["box_ap/cat"] is not None and not any(name.startswith("mask") for name in figures)


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["box", "score"])
def test_numbers_that_are_not_finite_never_become_rows(bad: str) -> None:
    boxes, scores = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5])
    {"box": boxes, "score": scores}[bad].fill_(float("nan"))
    with pytest.raises(ValueError, match="image 3: boxes or scores that are not finite"):
        detection_rows(3, detections_of(torch.zeros(1, 5, 5, dtype=torch.bool), boxes, scores, torch.tensor([0])))


def test_masks_of_rows_are_those_of_the_detections_in_portions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    corners = torch.rand(7, 2, 2, generator=random) * torch.tensor([60.0, 40.0])
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 1], dim=1)
    scores, labels, small = torch.rand(7, generator=random), torch.arange(7), torch.rand(7, 28, 28, generator=random)
    detections = Detections(boxes, scores, labels, small, (41, 61))
    rows = detection_rows(2, detections)
    for row, mask in zip(rows, detections.masks, strict=True):
        assert (decode(Rle(41, 61, row.mask.encode())) == mask.numpy()).all()
    assert [row.label for row in rows] == list(range(7)) and rows[0].image == 2
    assert torch.tensor(rows[3].xywh[2:]).tolist() == (boxes[3, 2:] - boxes[3, :2]).tolist()
    monkeypatch.setattr(transfer.detection.coco_eval, "PORTION_PX", 3 * 41 * 61)
    assert detection_rows(2, detections) == rows


def test_results_survive_their_file(tmp_path: Path, coco128: CocoSet, rows128: list[Row]) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result_entries(rows128, coco128)))
    assert read_results(path, coco128) == rows128


GOOD = encode(torch.ones(1, HEIGHT, WIDTH))[0].as_coco()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_id": 9}, "[1]: unknown image_id"),
        ({"category_id": 8}, "[1]: unknown category_id"),
        ({"bbox": [1, 2, 3]}, "[1]: bbox and score are not"),
        ({"bbox": [1, 2, -3, 4]}, "[1]: bbox and score are not"),
        ({"bbox": [1, 2, float("nan"), 4]}, "[1]: bbox and score are not"),
        ({"bbox": [1, 2, 1e10, 4]}, "[1]: bbox and score are not"),
        ({"score": float("inf")}, "[1]: bbox and score are not"),
        ({"score": "0.5"}, "[1]: bbox and score are not"),
        ({"score": None}, "[1]: bbox and score are not"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, "[1]: segmentation is no compressed run lengths of size [40, 60]"),
        ({"segmentation": {**GOOD, "size": [60, 40]}}, "[1]: segmentation is no compressed run lengths"),
        ({"segmentation": {**GOOD, "size": [2**31, 1]}}, "[1]: segmentation is no compressed run lengths"),
        ({"segmentation": {**GOOD, "counts": "00"}}, "[1]: segmentation: counts do not add up to the image"),
        ({"segmentation": {**GOOD, "counts": [0, 2400]}}, "[1]: segmentation is no compressed run lengths"),
    ],
)
def test_broken_results_are_refused_with_their_place(tmp_path: Path, changes: dict, told: str) -> None:
    coco = read_set(tmp_path, small_set())
    entry = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5, "segmentation": GOOD}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([entry, {**entry, **changes}]))
    with pytest.raises(DataError) as caught:
        read_results(path, coco)
    assert told in str(caught.value) and "\n" not in str(caught.value)


# ---- many processes -------------------------------------------------------------------------------------------------


class Threads(Processes):
    """Two processes as two threads: what one gives, both have."""

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Any]) -> None:
        super().__init__(rank, 2)
        self.meeting, self.table = meeting, table

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.meeting.wait(10)
        values = list(self.table)
        self.meeting.wait(10)
        return values

    def stack(self, rows: Tensor) -> Tensor:
        return torch.stack(self.gather(rows))


def on_two(function: Callable[[Processes], Any]) -> list[Any]:
    meeting, table, results = threading.Barrier(2), [None, None], [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = function(Threads(rank, meeting, table))
        except AssertionError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_every_image_counts_once_whoever_saw_it(coco128: CocoSet, rows128: list[Row]) -> None:
    def part(processes: Processes) -> list[Row]:
        seen = range(processes.rank, len(coco128), 2)
        return gather_rows([row for row in rows128 if row.image in seen], seen, coco128, processes)

    assert on_two(part) == [rows128, rows128]
    assert gather_rows(rows128, range(len(coco128)), coco128, Processes()) == rows128


@pytest.mark.parametrize("images", [range(31), [*range(32), 5]])
def test_an_image_left_out_or_counted_twice_is_noticed(coco128: CocoSet, images: Any) -> None:
    results = on_two(lambda processes: gather_rows([], images if processes.rank else [], coco128, processes))
    assert all("every image is evaluated exactly once" in str(result) for result in results)


def test_evaluation_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    golden = small_set()
    coco = read_coco(CocoPaths(read_set(tmp_path, golden).origin, tmp_path))
    for engine in ENGINES:
        evaluate(coco, made_up(coco, 0), engine)
    assert capfd.readouterr() == ("", "")


def test_the_benchmark_compares_equal_figures() -> None:
    run = CliRunner().invoke(app, ["bench", "coco-eval", "--images", "12", "--detections", "20", "--rounds", "2"])
    assert run.exit_code == 0, run.output
    figures = json.loads(run.output.strip().splitlines()[-1])
    assert figures["name"] == "coco-eval" and figures["detections"] == 240
    assert figures["largest_difference"] <= 1e-12 and figures["ratio"] > 0
