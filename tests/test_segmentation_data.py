"""Samples and batches of a segmentor: the reference's to the last pixel, and files of every kind."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from core.distributed import Processes
from core.errors import DataError
from core.images import BadImage
from core.loader import EpochOrder, Loaded, TrainingImages, eval_loader, image_loader, sample_rng, worker_faults
from core.transforms import normalized_images
from tests.golden_files import require
from tests.segmentation_sets import Size, blocks, palette_image, picture, read_pairs, save_pair
from tools.verify.golden import FOLDER
from tools.verify.segmentation_data import augmentation
from transfer.segmentation.augment import (
    AugmentConfig,
    augment,
    distorted,
    drawn_crop,
    fitted_size,
)
from transfer.segmentation.classes import open_classes
from transfer.segmentation.data import (
    Collate,
    EvaluationBatch,
    PrepareSegmentation,
    evaluation_images,
    normalized,
    one_image,
)
from transfer.segmentation.labels import LabelKeys, LabelTable, label_table
from transfer.segmentation.pairs import SegmentationSet, open_pairs

ADE = LabelKeys(classes="ade20k", label_shift=1)
FOUR = label_table(LabelKeys(num_classes=4), 4)


def draws(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


# ---- golden values --------------------------------------------------------------------------------------------------


def test_golden() -> None:
    require(augmentation(FOLDER))


# ---- augmentation ---------------------------------------------------------------------------------------------------

SIZES: list[Size] = [(1, 1), (1, 900), (700, 1), (3, 7), (33, 201), (64, 64), (65, 63), (20, 400), (333, 1000)]


@pytest.mark.parametrize("size", SIZES)
def test_images_of_any_size_become_crops_of_at_most_the_side(size: Size) -> None:
    image, label = picture(size), blocks(size, 4)
    for seed in range(6):
        moved, moved_label = augment(image, label, 64, 255, AugmentConfig(scale=(256, 64)), draws(seed))
        assert moved.shape == (*moved_label.shape, 3) and moved.dtype == np.uint8
        assert min(moved_label.shape) >= 1 and max(moved_label.shape) <= 64
        assert moved.flags.c_contiguous and moved_label.flags.c_contiguous


def test_the_long_side_bounds_images_of_aspect_above_four() -> None:
    assert fitted_size((400, 3000), (2048, 512)) == (273, 2048)
    assert fitted_size((400, 1600), (2048, 512)) == (512, 2048)
    assert fitted_size((1, 5000), (2048, 512)) == (1, 2048)
    assert fitted_size((5, 10), (5, 100)) == (3, 5) and fitted_size((10, 5), (5, 100)) == (5, 3)  # halves go up


@dataclass
class Recorded:
    """Draws that are always 1, or the upper end, and how they were asked for."""

    asked: list[tuple[float, ...]]

    def randint(self, *bounds: int) -> int:
        self.asked.append(bounds)
        return bounds[-1] - 1

    def uniform(self, *bounds: float) -> float:
        self.asked.append(bounds)
        return bounds[-1]


def test_colours_are_drawn_from_the_published_ranges() -> None:
    found = Recorded([])
    distorted(picture((4, 4)), found)  # type: ignore[arg-type]
    assert found.asked == [(2,), (-32, 32), (2,), (2,), (0.5, 1.5), (2,), (0.5, 1.5), (2,), (-18, 18)]


def test_image_and_label_move_together() -> None:
    label = blocks((50, 70), 13)
    image = np.repeat(label[..., None] * 20, 3, axis=2)
    config = AugmentConfig(scale=(70, 50), min_ratio=1, max_ratio=1, photometric=False)
    for seed in range(12):
        moved, moved_label = augment(image, label, 40, 255, config, draws(seed))
        assert moved_label.shape == (40, 40) and np.array_equal(moved[..., 0], moved_label * 20)
    still = AugmentConfig(scale=(70, 50), min_ratio=1, max_ratio=1, photometric=False, flip_ratio=0)
    mirrored = still.model_copy(update={"flip_ratio": 1.0})
    one, other = (augment(image, label, 40, 255, config, draws(3))[1] for config in (still, mirrored))
    assert np.array_equal(one, other[:, ::-1]) and not np.array_equal(one, other)


def test_a_class_may_have_its_share_of_a_crop_and_no_more() -> None:
    label = np.zeros((64, 64), dtype=np.uint8)
    label[:, 40:] = 1
    shares = {limit: [] for limit in (0.75, 1.0)}
    for limit, found in shares.items():
        for seed in range(40):
            place = drawn_crop(label, 32, 255, limit, draws(seed))
            counts = np.bincount(label[place].ravel(), minlength=2)
            found.append(counts.max() / counts.sum())
    assert max(shares[0.75]) < 0.75 and max(shares[1.0]) == 1


@pytest.mark.parametrize("ignore_index", [255, 3])
def test_ignored_pixels_count_for_no_share(ignore_index: int) -> None:
    label = np.full((40, 40), ignore_index, dtype=np.uint8)
    with np.errstate(all="raise"):
        assert drawn_crop(label, 16, ignore_index, 0.75, draws(0))[0].stop <= 40
    label[:, :12] = np.arange(40)[:, None] % 2  # both classes in every crop that reaches them
    starts = [drawn_crop(label, 16, ignore_index, 0.75, draws(seed))[1].start for seed in range(20)]
    assert max(starts) in {9, 10, 11}  # more than three quarters of such a crop are ignored


def test_labels_of_more_than_255_classes_are_resized_as_they_are() -> None:
    label = (np.arange(48 * 48, dtype=np.int32) * 29).reshape(48, 48) % 60_000
    _, moved = augment(picture((48, 48)), label, 96, 65535, AugmentConfig(scale=(96, 96), max_ratio=1), draws(1))
    assert moved.dtype == np.int32 and set(np.unique(moved)) <= set(np.unique(label)) and moved.max() > 50_000


def test_the_number_of_threads_changes_nothing() -> None:
    image, label, before = picture((700, 900)), blocks((700, 900), 9), cv2.getNumThreads()
    try:
        found = []
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            found.append(augment(image, label, 512, 255, AugmentConfig(), draws(2)))
        assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"min_ratio": 3.0}, "min_ratio: 3 is above max_ratio, 2"),
        ({"scale": (512, 2048)}, "long side and then the short"),
    ],
)
def test_ranges_that_are_none_are_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        AugmentConfig(**keys)


# ---- samples and batches --------------------------------------------------------------------------------------------


def prepare(pairs: SegmentationSet, table: LabelTable = FOUR, crop: int = 48) -> PrepareSegmentation:
    return PrepareSegmentation(pairs, table, crop, AugmentConfig(scale=(128, 32)))


def feed(pairs: SegmentationSet, num_workers: int = 0, table: LabelTable = FOUR) -> list[Loaded]:
    images = TrainingImages(pairs.images, 0, prepare(pairs, table))
    order = EpochOrder(len(pairs), 4, 2, 0, 0, 2)
    return list(image_loader(images, order, Collate(48, table.ignore_index), num_workers, 60))


def test_batches_are_padded_with_black_and_ignored_pixels(tmp_path: Path) -> None:
    pairs = read_pairs(tmp_path, [(40, 60), (33, 201), (20, 20), (61, 17)])
    for loaded in feed(pairs):
        batch = loaded.batch
        assert batch.images.shape == (2, 3, 48, 48) and batch.images.dtype == torch.uint8
        assert batch.labels.shape == (2, 48, 48) and batch.labels.dtype == torch.uint8
        assert batch.sizes.dtype == torch.int64 and batch.valid.all() and len(batch.indices) == 2
        for image, label, (h, w) in zip(batch.images, batch.labels, batch.sizes.tolist(), strict=True):
            assert not image[:, h:].any() and not image[:, :, w:].any()
            assert (label[h:] == 255).all() and (label[:, w:] == 255).all() and (label[:h, :w] < 4).all()
        assert torch.isfinite(normalized(batch, torch.float32)).all()
        assert torch.equal(batch.to(torch.device("cpu")).labels, batch.labels)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    pairs = read_pairs(tmp_path, [(40, 60), (33, 201), (20, 20), (61, 17), (48, 48)])
    again = pickle.loads(pickle.dumps(pairs))
    state = np.random.get_state()[1].tolist()
    here, there = feed(pairs), feed(again, num_workers=2)
    assert np.random.get_state()[1].tolist() == state and len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.batch.images, other.batch.images) and torch.equal(one.batch.labels, other.batch.labels)
        assert one.batch.indices == other.batch.indices
    images = TrainingImages(pairs.images, 0, prepare(pairs))
    assert len({images[epoch, 0][0].image.numpy().tobytes() for epoch in range(8)}) > 4


def test_draws_come_from_the_sample_s_own_generator(tmp_path: Path) -> None:
    pairs = read_pairs(tmp_path, [(40, 60)])
    image = torch.from_numpy(picture((40, 60))).permute(2, 0, 1)
    sample = prepare(pairs)(image, sample_rng(1, 2, 3), 0)
    seed = int(sample_rng(1, 2, 3).integers(2**32))
    pixels, label = augment(
        picture((40, 60)), blocks((40, 60), 4), 48, 255, AugmentConfig(scale=(128, 32)), draws(seed)
    )
    assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), pixels) and np.array_equal(sample.label.numpy(), label)


def test_ade20k_s_zero_becomes_ignored(tmp_path: Path) -> None:
    save_pair(tmp_path, "training", "ADE_train_1", np.full((50, 50), 0, dtype=np.uint8))
    save_pair(tmp_path, "training", "ADE_train_2", np.full((50, 50), 150, dtype=np.uint8))
    pairs, table = open_pairs(tmp_path, "train"), label_table(ADE, 150)
    images = TrainingImages(pairs.images, 0, prepare(pairs, table))
    assert [images[0, index][0].label.unique().tolist() for index in (0, 1)] == [[255], [149]]


def label_file(root: Path, number: int) -> Path:
    return root / "annotations" / "training" / f"{number}.png"


def break_label(root: Path, fault: str) -> None:
    """Damage the label of the first image, 40 x 60 px."""
    path = label_file(root, 0)
    if fault == "size":
        Image.fromarray(blocks((40, 61), 4)).save(path)
    elif fault == "turned":
        Image.fromarray(blocks((60, 40), 4)).save(path)
    elif fault == "rgb":
        Image.fromarray(picture((40, 60))).save(path)
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.unlink()


FAULTS = {
    "size": "label 0.png: has 61x40 px, its image 60x40",
    "turned": "label 0.png: has 40x60 px, its image 60x40 (turned by its EXIF orientation?)",
    "rgb": "label 0.png: RGB pixels; a label has one number per pixel, grey or palette",
    "truncated": "label 0.png: broken PNG: ",
    "missing": "label 0.png: cannot be read: No such file or directory",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_label_that_cannot_be_used_is_replaced_in_training_and_refused_in_evaluation(
    tmp_path: Path, fault: str
) -> None:
    pairs = read_pairs(tmp_path, [(40, 60)] * 4)
    break_label(tmp_path, fault)
    images = TrainingImages(pairs.images, 0, prepare(pairs))
    sample, broken = images[0, 0]
    assert sample.row != 0 and broken[0].name == "0.png" and broken[0].reason.startswith(FAULTS[fault])
    with pytest.raises(BadImage):
        prepare(pairs)(torch.zeros(3, 40, 60, dtype=torch.uint8), sample_rng(0), 0)
    with pytest.raises(DataError) as caught:
        evaluation_images(pairs, FOUR, AsStored())[0]
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/images/training: 0.png: {FAULTS[fault]}") and "\n" not in text
    assert text.endswith("; an evaluation counts every image, so mend it, or remove it and its label")


def test_labels_are_for_upright_images(tmp_path: Path) -> None:
    pairs = read_pairs(tmp_path, [(40, 60)] * 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.fromarray(picture((60, 40))).save(tmp_path / "images" / "training" / "0.png", exif=exif)
    sample, broken = TrainingImages(pairs.images, 0, prepare(pairs))[0, 0]
    assert sample.row == 0 and not broken
    assert evaluation_images(pairs, FOUR, AsStored())[0].label.shape == (40, 60)


@pytest.mark.parametrize("kind", ["16 bit", "palette", "1 bit"])
def test_label_files_of_other_kinds_are_right(tmp_path: Path, kind: str) -> None:
    values = blocks((40, 60), 2 if kind == "1 bit" else 4)
    stored = {
        "16 bit": Image.fromarray(values.astype(np.uint16)),
        "palette": palette_image(values),
        "1 bit": Image.fromarray(values.astype(bool)),
    }[kind]
    save_pair(tmp_path, "training", "0", stored)
    pairs = open_pairs(tmp_path, "train")
    assert np.array_equal(evaluation_images(pairs, FOUR, AsStored())[0].label.numpy(), values)
    image = torch.from_numpy(picture((40, 60))).permute(2, 0, 1)
    still = AugmentConfig(scale=(60, 40), min_ratio=1, max_ratio=1, flip_ratio=0, photometric=False)
    sample = PrepareSegmentation(pairs, FOUR, 60, still)(image, sample_rng(0), 0)
    assert np.array_equal(sample.label.numpy(), values) and sample.label.dtype == torch.uint8


def test_a_value_out_of_range_is_one_line_in_training_and_evaluation_with_and_without_workers(tmp_path: Path) -> None:
    pairs = read_pairs(tmp_path, [(40, 60)] * 4)
    values = blocks((40, 60), 4)
    values[:5, :7] = 200
    Image.fromarray(values).save(label_file(tmp_path, 2))
    table = label_table(LabelKeys(classes="ade20k"), 150)
    expected = (
        f"{tmp_path}/annotations/training: 2.png: value 200 in 35 pixels, which is no class; expected 0..149, or "
        "ignore_index=255; give label_shift, label_map or ignore_index; rcmae doctor shows all values"
    )
    for run in (
        lambda workers: feed(pairs, workers, table),
        lambda workers: evaluated(pairs, table, workers=workers),
    ):
        for workers in (0, 1):
            with pytest.raises(DataError) as caught, worker_faults():
                run(workers)
            assert str(caught.value) == expected


# ---- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AsStored:
    """Sizes to evaluate at: as stored, and half of it."""

    def __call__(self, size: Size) -> list[Size]:
        return [size, (max(1, size[0] // 2), max(1, size[1] // 2))]


def evaluated(
    pairs: SegmentationSet, table: LabelTable = FOUR, processes: Processes | None = None, workers: int = 0
) -> list[EvaluationBatch]:
    images = evaluation_images(pairs, table, AsStored())
    return list(eval_loader(images, 1, workers, 60, processes or Processes(), one_image))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_gives_every_image_once_at_its_sizes_with_its_label_as_stored(
    tmp_path: Path, workers: int
) -> None:
    sizes = [(40, 60), (1, 1), (33, 201), (7, 90), (61, 17)]
    pairs = read_pairs(tmp_path, sizes)
    seen = []
    for rank in range(2):
        for batch in evaluated(pairs, processes=Processes(rank, 2), workers=workers):
            (index,) = batch.indices.tolist()
            height, width = sizes[index]
            assert [image.shape for image in batch.images] == [
                (1, 3, height, width), (1, 3, max(1, height // 2), max(1, width // 2))
            ]  # fmt: skip
            assert batch.images[0].dtype == torch.uint8 and batch.images[0].is_contiguous()
            assert np.array_equal(batch.labels[0].numpy(), blocks(sizes[index], 4, index))
            moved = batch.to(torch.device("cpu"))
            assert torch.equal(moved.images[1], batch.images[1]) and moved.valid.tolist() == batch.valid.tolist()
            seen += [index] if batch.valid.item() else []
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_evaluation_images_are_resized_as_published(tmp_path: Path) -> None:
    pairs = read_pairs(tmp_path, [(40, 60)])
    whole, half = evaluation_images(pairs, FOUR, AsStored())[0].images
    pixels = picture((40, 60), 1)
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(half.permute(1, 2, 0).numpy(), cv2.resize(pixels, (30, 20), interpolation=cv2.INTER_LINEAR))


def test_a_broken_image_ends_an_evaluation(tmp_path: Path) -> None:
    pairs = read_pairs(tmp_path, [(40, 60)] * 2)
    (tmp_path / "images" / "training" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"images/training: 1\.png: not an image, or of an unknown format; an evalua"):
        evaluation_images(pairs, FOUR, AsStored())[1]


def test_content_of_any_rectangle_is_normalised_and_the_rest_is_zero() -> None:
    images = torch.full((2, 3, 5, 9), 100, dtype=torch.uint8)
    found = normalized_images(images, torch.tensor([[5, 9], [2, 7]]), torch.float32)
    assert (found[0] != 0).all() and (found[1, :, :2, :7] == found[0, :, :2, :7]).all()
    assert not found[1, :, 2:].any() and not found[1, :, :, 7:].any()


def test_real_street_scenes(shared: Path) -> None:
    root = shared / "data" / "camvid"
    keys = LabelKeys(classes="camvid", ignore_index=11)
    table = label_table(keys, len(open_classes(keys)))
    train, val = open_pairs(root, "train"), open_pairs(root, "val")
    assert (len(train), len(val)) == (367, 60) and train.notes() == val.notes() == []
    for loaded in feed(train.subset(np.arange(8)), table=table):
        assert loaded.batch.labels.max() <= 11 and not loaded.broken
    sample = evaluation_images(val, table, AsStored())[5]
    assert sample.label.shape == (360, 480) and set(sample.label.unique().tolist()) <= set(range(12))
