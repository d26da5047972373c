"""Samples of a detector: large-scale jitter to the reference's last pixel, and real files of every kind."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from PIL import Image
from torch import Tensor

from core.distributed import Processes
from core.errors import DataError
from core.images import BadImage
from core.loader import EpochOrder, TrainingImages, eval_loader, image_loader, sample_rng
from tests.coco_sets import HEIGHT, WIDTH, annotation, image, read_set, small_set, with_
from tests.golden_files import require
from tools.verify.detection_data import areas, jittered, resizes
from tools.verify.golden import FOLDER
from transfer.detection.coco import Annotation, CocoSet
from transfer.detection.coco_file import coco_paths, read_coco
from transfer.detection.data import (
    Collate,
    DetectionBatch,
    PrepareDetection,
    detection_batch,
    evaluation_images,
    normalized,
    padded,
)
from transfer.detection.jitter import (
    Draws,
    JitterConfig,
    clip_polygon,
    eval_size,
    jitter,
    resize_to_fit,
)
from transfer.detection.rle import encode, rasterised

# ---- golden values --------------------------------------------------------------------------------------------------


def test_golden_jitter() -> None:
    require(jittered(FOLDER))


def test_golden_sizes_and_pixels_of_resizes() -> None:
    require(resizes(FOLDER))


# ---- jitter ---------------------------------------------------------------------------------------------------------

STILL = JitterConfig(min_scale=1, max_scale=1, flip_ratio=0)


def square(label: int, x0: float, y0: float, x1: float, y1: float) -> Annotation:
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=np.float64)
    return Annotation(label, np.zeros(4), 1.0, False, (corners,), None)


def as_bitmap(each: Annotation, height: int, width: int) -> Annotation:
    return Annotation(each.label, each.box, each.area, each.crowd, (), rasterised(each.polygons, height, width))


@pytest.mark.parametrize(
    "draws", [Draws(0.9, 0.5, 0.5), Draws(0.1, 0.9, 0.3), Draws(0.1, 0.2, 0.0), Draws(0.7, 0.99, 0.99)]
)
def test_run_lengths_move_as_polygons_do(draws: Draws) -> None:
    picture = torch.zeros(3, 90, 120, dtype=torch.uint8)
    objects = [square(1, 30, 20, 70, 60), square(2, 0, 0, 120, 90), square(3, 90, 5, 118, 85)]
    _, by_polygon = jitter(picture, objects, 100, JitterConfig(), draws)
    moved, by_bitmap = jitter(picture, [as_bitmap(each, 90, 120) for each in objects], 100, JitterConfig(), draws)
    assert torch.equal(by_polygon.labels, by_bitmap.labels)
    assert (by_polygon.boxes - by_bitmap.boxes).abs().max() <= 1  # of whole pixels, picked by the nearest
    for parts, bitmap in zip(by_polygon.masks, by_bitmap.masks, strict=True):
        assert isinstance(bitmap, Tensor) and bitmap.shape == moved.shape[1:] and bitmap.dtype == torch.bool
        assert bitmap.sum().item() == pytest.approx(areas(parts).sum().item(), rel=0.08)


def test_a_bitmap_that_does_not_move_stays_as_it_is() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 3:9, 5] = mask[0, 20, 7:30] = True
    each = Annotation(4, np.zeros(4), 1.0, False, (), encode(mask)[0])
    _, targets = jitter(torch.zeros(3, 40, 40, dtype=torch.uint8), [each], 40, STILL, Draws(0.5, 0.5, 0.5))
    assert torch.equal(targets.masks[0], mask[0])
    assert targets.boxes.tolist() == [[5, 3, 30, 21]]


def test_an_object_cut_in_two_has_two_parts_and_one_box() -> None:
    horseshoe = np.array([[10, -9], [90, -9], [90, 30], [70, 30], [70, -5], [30, -5], [30, 30], [10, 30.0]])
    each = Annotation(0, np.zeros(4), 1.0, False, (horseshoe,), None)
    _, targets = jitter(torch.zeros(3, 100, 100, dtype=torch.uint8), [each], 100, STILL, Draws(0.5, 0.5, 0.5))
    assert len(targets.masks[0]) == 2
    assert targets.boxes.tolist() == [[10, 0, 90, 30]]


def test_what_is_not_seen_is_left_out() -> None:
    whole, crowd = square(1, 5, 5, 20, 20), Annotation(2, np.zeros(4), 1.0, True, (np.ones((3, 2)),), None)
    edge, speck = (
        square(3, 100, 10, 130, 20),
        Annotation(4, np.zeros(4), 1.0, False, (np.array([[1, 1], [2, 2], [3, 3.0]]),), None),
    )
    nothing = Annotation(5, np.zeros(4), 1.0, False, (), encode(torch.zeros(1, 100, 100))[0])
    picture = torch.zeros(3, 100, 100, dtype=torch.uint8)
    _, targets = jitter(picture, [crowd, edge, speck, nothing, whole], 100, STILL, Draws(0.5, 0.5, 0.5))
    assert targets.labels.tolist() == [1]
    _, targets = jitter(picture, [crowd], 100, STILL, Draws(0.5, 0.5, 0.5))
    assert targets.boxes.shape == (0, 4) and targets.labels.dtype == torch.int64 and targets.masks == ()


def test_polygons_that_cross_themselves_touch_or_degenerate_have_finite_parts() -> None:
    window = shapely.box(0, 0, 50, 50)
    rng = np.random.default_rng(0)
    for count in (3, 4, 5, 8, 20):
        for _ in range(60):
            points = rng.integers(-20, 70, (count, 2)).astype(np.float64)
            for part in clip_polygon(points, window):
                assert len(part) >= 3 and np.isfinite(part).all() and part.min() >= 0 and part.max() <= 50
    assert clip_polygon(np.zeros((3, 2)), window) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 7), (640, 480), (2000, 3000)])
def test_any_size_and_any_draw_fits_the_square(size: tuple[int, int]) -> None:
    picture = torch.zeros(3, *size, dtype=torch.uint8)
    for draws in (Draws(0, 0, 0), Draws(0.999, 0.999, 0.999), Draws(0.3, 0.5, 0.7)):
        moved, _ = jitter(picture, [], 64, JitterConfig(), draws)
        assert min(moved.shape[1:]) >= 1 and max(moved.shape[1:]) <= 64
    fitted = resize_to_fit(picture, 64)
    assert max(fitted.shape[1:]) == 64 and fitted.is_contiguous()


def test_the_crop_takes_the_pixels_that_its_boxes_mean() -> None:
    picture = torch.zeros(3, 100, 100, dtype=torch.uint8)
    picture[:, 60:80, 30:50] = 200
    for flip in (0.1, 0.9):
        moved, targets = jitter(
            picture, [square(0, 30, 60, 50, 80)], 100, JitterConfig(min_scale=2), Draws(flip, 0, 0.6)
        )
        x0, y0, x1, y1 = targets.boxes[0].round().int().tolist()
        assert moved[:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].float().mean() > 190
        assert moved.float().sum() == pytest.approx(200 * 3 * (x1 - x0) * (y1 - y0), rel=0.05)


# ---- files ----------------------------------------------------------------------------------------------------------


def prepare(coco: CocoSet, side: int = 64) -> PrepareDetection:
    return PrepareDetection(coco, side, JitterConfig())


def feed(coco: CocoSet, num_workers: int = 0) -> list[DetectionBatch]:
    images = TrainingImages(coco.source(), 0, prepare(coco))
    loader = image_loader(images, EpochOrder(len(coco), 2, 2, 0, 0, 3), Collate(64), num_workers, 60)
    return [loaded.batch for loaded in loader]


def test_real_photographs_become_batches(shared: Path) -> None:
    coco = read_coco(coco_paths(shared / "data" / "coco128", "val"))
    for batch in feed(coco.subset(np.arange(6))):
        assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.uint8
        assert batch.sizes.dtype == torch.int64 and batch.valid.all()
        for i, targets in enumerate(batch.targets):
            h, w = batch.sizes[i].tolist()
            assert not batch.images[i, :, h:].any() and not batch.images[i, :, :, w:].any()
            assert len(targets.boxes) == len(targets.labels) == len(targets.masks)
            assert (targets.boxes[:, 2:] > targets.boxes[:, :2]).all()
            assert batch.original_sizes[i] == coco.size(batch.indices[i])
        moved = batch.to(torch.device("cpu"))
        assert torch.equal(moved.images, batch.images) and moved.indices == batch.indices


def test_a_sample_is_a_function_of_its_key_and_of_nothing_else(tmp_path: Path) -> None:
    coco = read_set(tmp_path, small_set(), draw=True)
    again = pickle.loads(pickle.dumps(coco))
    state = np.random.get_state()[1].tolist()
    here, there = feed(coco), feed(again, num_workers=2)
    assert np.random.get_state()[1].tolist() == state
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images) and one.indices == other.indices
        for mine, theirs in zip(one.targets, other.targets, strict=True):
            assert torch.equal(mine.boxes, theirs.boxes)


def test_draws_come_in_the_order_flip_scale_crop(tmp_path: Path) -> None:
    coco = read_set(tmp_path, small_set(), draw=True)
    picture = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = prepare(coco)(picture, sample_rng(1, 2, 3), 0)
    draws = Draws(*np.random.default_rng((1, 2, 3)).random(3))
    moved, targets = jitter(picture, coco.objects(0), 64, JitterConfig(), draws)
    assert torch.equal(sample.image, moved) and torch.equal(sample.targets.boxes, targets.boxes)


def save(folder: Path, name: str, pixels: np.ndarray, **options: object) -> None:
    Image.fromarray(pixels).save(folder / name, **options)


def test_grey_files_are_read_as_colour(tmp_path: Path) -> None:
    coco = read_set(tmp_path, small_set(), draw=True)
    save(coco.folder, "1.jpg", np.full((HEIGHT, WIDTH), 77, dtype=np.uint8))
    images = TrainingImages(coco.source(), 0, PrepareDetection(coco, 60, STILL))
    sample, broken = images[0, 0]
    assert sample.image.shape == (3, HEIGHT, WIDTH) and (sample.image == 77).all() and not broken


@pytest.mark.parametrize("rotated_json", [False, True])
def test_exif_rotation_is_applied_before_the_size_is_compared(tmp_path: Path, rotated_json: bool) -> None:
    size = {"height": WIDTH, "width": HEIGHT} if rotated_json else {}
    coco = read_set(tmp_path, with_(images=[image(1, **size), image(2)]))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    for name in ("1.jpg", "2.jpg"):
        save(coco.folder, name, np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8), exif=exif if name == "1.jpg" else b"")
    images = TrainingImages(coco.source(), 0, PrepareDetection(coco, 60, STILL))
    sample, broken = images[0, 0]
    if rotated_json:
        assert sample.image.shape[1:] == (60, 40) and not broken
    else:
        assert {note.name for note in broken} == {"1.jpg"}
        assert "has 40x60 px (turned by its EXIF orientation?), the annotations are for 60x40" in broken[0].reason


def test_missing_and_disagreeing_images_are_replaced_and_named(tmp_path: Path) -> None:
    tree = with_(images=[image(i) for i in range(1, 5)], annotations=[annotation(i, i) for i in range(1, 5)])
    coco = read_set(tmp_path, tree, draw=True)
    (coco.folder / "1.jpg").unlink()
    (coco.folder / "2.jpg").write_bytes(b"no image")
    save(coco.folder, "3.jpg", np.zeros((HEIGHT, WIDTH + 1, 3), dtype=np.uint8))
    images = TrainingImages(coco.source(), 0, prepare(coco))
    found = {note.name: note.reason for index in range(4) for note in images[0, index][1]}
    assert set(found) == {"1.jpg", "2.jpg", "3.jpg"}
    assert found["3.jpg"] == "has 61x40 px, the annotations are for 60x40"
    assert all(images[0, index][0].row == 3 for index in range(4))


def test_an_image_without_objects_left_is_still_a_sample(tmp_path: Path) -> None:
    coco = read_set(tmp_path, with_(annotations=[annotation(1, 1, iscrowd=1)]), draw=True)
    batch = feed(coco)[0]
    assert [len(targets.labels) for targets in batch.targets] == [0, 0]
    assert torch.isfinite(normalized(batch, torch.float32)).all()


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_gives_every_image_once_with_fillers_marked(tmp_path: Path) -> None:
    tree = with_(images=[image(i, height=20 + i) for i in range(5)], annotations=[])
    coco = read_set(tmp_path, tree, draw=True)
    seen = []
    for rank in range(2):
        images = evaluation_images(coco, 64)
        for raw in eval_loader(images, 2, 0, 60, Processes(rank, 2)):
            batch = detection_batch(raw, coco, 64)
            assert batch.images.shape == (2, 3, 64, 64)
            for i, index in enumerate(batch.indices):
                h, w = batch.sizes[i].tolist()
                assert (h, w) == eval_size(coco.size(index), 64) and batch.original_sizes[i] == coco.size(index)
                assert batch.images[i, :, h - 1, :w].any() and not batch.images[i, :, h:].any()
                if batch.valid[i]:
                    seen.append(index)
    assert sorted(seen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("change", ["gone", "size"])
def test_an_evaluation_counts_every_image_or_none(tmp_path: Path, change: str) -> None:
    coco = read_set(tmp_path, small_set(), draw=True)
    if change == "gone":
        (coco.folder / "2.jpg").unlink()
    else:
        save(coco.folder, "2.jpg", np.zeros((HEIGHT + 1, WIDTH, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"2\.jpg: .*an evaluation counts every image") as caught:
        list(eval_loader(evaluation_images(coco, 64), 2, 0, 60, Processes()))
    assert "\n" not in str(caught.value)


def test_the_networks_padding_is_zero_after_normalisation() -> None:
    picture = torch.full((3, 20, 30), 255, dtype=torch.uint8)
    nothing = jitter(picture, [], 40, STILL, Draws(0.5, 0.5, 0.5))[1]
    batch = DetectionBatch(
        images=torch.stack([padded(picture, 40)]),
        sizes=torch.tensor([[20, 30]]),
        valid=torch.tensor([True]),
        targets=(nothing,),
        original_sizes=((20, 30),),
        indices=(0,),
    )
    pixels = normalized(batch, torch.float32)
    expected = (255 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(pixels[0, :, 19, 29], expected)
    assert not pixels[:, :, 20:].any() and not pixels[:, :, :, 30:].any()


def test_an_image_larger_than_the_square_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit a square of 64"):
        padded(torch.zeros(3, 10, 65, dtype=torch.uint8), 64)


def test_scales_that_are_no_range_are_refused() -> None:
    with pytest.raises(ValueError, match="min_scale: 3 is above max_scale, 2"):
        JitterConfig(min_scale=3)


def test_a_size_that_disagrees_is_no_image(tmp_path: Path) -> None:
    coco = read_set(tmp_path, small_set())
    with pytest.raises(BadImage, match="has 60x41 px, the annotations are for 60x40"):
        prepare(coco)(torch.zeros(3, 41, 60, dtype=torch.uint8), sample_rng(0), 0)
