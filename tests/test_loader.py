"""Batches: the order resumes anywhere, workers change nothing, broken images are replaced, counted and never hidden."""

import gc
import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.datasets import ImageSource, open_images
from core.distributed import Processes
from core.errors import DataError, MachineError
from core.loader import (
    Broken,
    EpochOrder,
    EvalImages,
    Feed,
    Loaded,
    TrainingImages,
    eval_loader,
    image_loader,
    read_image,
    sample_rng,
    worker_faults,
)
from core.transforms import AugmentConfig
from pretrain.data import PrepareSample, PretrainBatch, collate

SIZE = (8, 8)
PREPARE = PrepareSample(SIZE, num_patches=4, augment=AugmentConfig(), own_teacher_mask=True)
TIMEOUT_S = 60


def make_images(root: Path, num_images: int, broken: tuple[int, ...] = ()) -> ImageSource:
    """Images 00.png, 01.png, ... whose every pixel holds the number of the file; the broken ones hold text."""
    root.mkdir()
    for number in range(num_images):
        path = root / f"{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        if number in broken:
            path.write_text("not a picture")
        else:
            Image.new("RGB", (12, 10), (number, number, number)).save(path)
    source = open_images(str(root), root / "cache")
    return source.subset(np.argsort([name.split(b"/")[1] for name in source.names]))


def numbers(batch: PretrainBatch) -> list[int]:
    """Which file each image of a batch came from."""
    return batch.images[:, 0, 0, 0].tolist()


@dataclass(frozen=True)
class AsTensor:
    """Prepares the decoded image alone, so that batches are plain tensors."""

    def __call__(self, image: Tensor, rng: np.random.Generator, index: int) -> Tensor:
        return image


def order(
    num_images: int, batch_size: int, micro_batch: int, *, seed: int = 0, first: int = 0, total: int = 6
) -> EpochOrder:
    return EpochOrder(num_images, batch_size, micro_batch, seed, first, total)


# --- the order ------------------------------------------------------------------------------------------------------


def test_an_epoch_sees_every_image_at_most_once_and_leaves_out_what_fills_no_batch() -> None:
    micro_batches = list(order(13, 4, 2, total=9))
    assert len(micro_batches) == 9 * 2
    for epoch in range(3):
        keys = [key for micro in micro_batches[epoch * 6 : epoch * 6 + 6] for key in micro]
        assert {e for e, _ in keys} == {epoch}
        assert len({index for _, index in keys}) == 12 and {index for _, index in keys} <= set(range(13))


def test_an_epoch_is_a_permutation_that_differs_from_epoch_to_epoch_and_seed_to_seed() -> None:
    def epochs(seed: int) -> list[list[int]]:
        flat = [index for micro in order(12, 4, 4, seed=seed, total=9) for _, index in micro]
        return [flat[start : start + 12] for start in (0, 12, 24)]

    seen = [tuple(epoch) for seed in range(3) for epoch in epochs(seed)]
    assert all(sorted(epoch) == list(range(12)) for epoch in seen)
    assert len(set(seen)) == 9
    assert epochs(1) == epochs(1)


def test_the_order_resumes_exactly_at_any_step() -> None:
    whole = list(order(13, 4, 2, total=9))
    for step in range(10):
        assert list(order(13, 4, 2, first=step, total=9)) == whole[step * 2 :]


def test_the_images_of_a_step_do_not_depend_on_the_accumulation() -> None:
    def steps(micro_batch: int) -> list[list[tuple[int, int]]]:
        flat = [key for micro in order(50, 12, micro_batch) for key in micro]
        return [flat[start : start + 12] for start in range(0, len(flat), 12)]

    whole = steps(12)
    assert len(whole) == 6
    for micro_batch in (1, 2, 3, 4, 6):
        assert steps(micro_batch) == whole
        assert {len(micro) for micro in order(50, 12, micro_batch)} == {micro_batch}


# --- one sample -----------------------------------------------------------------------------------------------------


def test_a_sample_is_drawn_from_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    images = TrainingImages(make_images(tmp_path / "set", 4), 7, PREPARE)
    sample, broken = images[(2, 3)]
    again = PREPARE(read_image(images.source, 3, 3, 10**6), sample_rng(7, 2, 3), 3)
    assert broken == ()
    assert torch.equal(sample.image, again.image) and np.array_equal(sample.noise, again.noise)
    others = images[(3, 3)], images[(2, 2)], TrainingImages(images.source, 8, PREPARE)[(2, 3)]
    assert not any(np.array_equal(sample.noise, other.noise) for other, _ in others)


def test_a_broken_image_is_replaced_by_the_same_one_each_time_and_reported(tmp_path: Path) -> None:
    source = make_images(tmp_path / "set", 20, broken=(3, 4, 5, 6))
    images = TrainingImages(source, 0, PREPARE)
    stand_ins = set()
    for epoch in range(12):
        sample, broken = images[(epoch, 4)]
        again, broken_again = images[(epoch, 4)]
        assert torch.equal(sample.image, again.image) and broken == broken_again
        assert broken[0] == Broken("0/04.png", "not an image, or of an unknown format")
        assert {note.name for note in broken} <= {"1/03.png", "0/04.png", "1/05.png", "0/06.png"}
        assert np.array_equal(sample.noise, PREPARE(torch.zeros(3, 10, 12).byte(), sample_rng(0, epoch, 4), 4).noise)
        stand_ins.add(int(sample.image[0, 0, 0]))
    assert len(stand_ins) > 3 and not stand_ins & {3, 4, 5, 6}


def test_other_samples_do_not_change_when_an_image_breaks(tmp_path: Path) -> None:
    whole = TrainingImages(make_images(tmp_path / "whole", 8), 0, PREPARE)
    damaged = TrainingImages(make_images(tmp_path / "damaged", 8, broken=(2,)), 0, PREPARE)
    for index in (0, 1, 3, 4, 5, 6, 7):
        assert torch.equal(whole[(0, index)][0].image, damaged[(0, index)][0].image)
        assert damaged[(0, index)][1] == ()


def test_a_vanished_file_is_named_and_replaced(tmp_path: Path) -> None:
    source = make_images(tmp_path / "set", 6)
    (tmp_path / "set" / "0" / "02.png").unlink()
    sample, broken = TrainingImages(source, 0, PREPARE)[(0, 2)]
    assert broken == (Broken("0/02.png", "cannot be read: No such file or directory"),)
    assert int(sample.image[0, 0, 0]) in {0, 1, 3, 4, 5}


def test_nothing_but_broken_images_is_an_error(tmp_path: Path) -> None:
    images = TrainingImages(make_images(tmp_path / "set", 3, broken=(0, 1, 2)), 0, PREPARE)
    with pytest.raises(DataError, match=r"^20 broken images in a row, the last ./0.\.png: not an image, [^\n]*$"):
        images[(0, 0)]


# --- workers --------------------------------------------------------------------------------------------------------


def loaded(source: ImageSource, num_workers: int, first: int = 0) -> list[Loaded]:
    images = TrainingImages(source, 5, PREPARE)
    return list(
        image_loader(images, order(len(source), 4, 2, seed=5, first=first, total=5), collate, num_workers, TIMEOUT_S)
    )


def require_equal(left: list[Loaded], right: list[Loaded]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.broken == b.broken
        for name in ("images", "sizes", "valid", "noise", "teacher_noise"):
            assert torch.equal(getattr(a.batch, name), getattr(b.batch, name)), name


def test_the_number_of_workers_and_a_restart_change_nothing(tmp_path: Path) -> None:
    source = make_images(tmp_path / "set", 10, broken=(1, 7))
    plain = loaded(source, 0)
    assert any(item.broken for item in plain)
    assert plain[0].batch.images.shape == (2, 3, *SIZE) and plain[0].batch.noise.shape == (2, 4)
    assert not torch.equal(plain[0].batch.noise, plain[0].batch.teacher_noise)
    for num_workers in (1, 2):
        require_equal(loaded(source, num_workers), plain)
    require_equal(loaded(source, 2, first=3), plain[6:])


def test_loading_draws_from_no_global_generator(tmp_path: Path) -> None:
    source = make_images(tmp_path / "set", 10)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    for num_workers in (0, 1):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        loaded(source, num_workers)
        assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@dataclass(frozen=True)
class SignalSelf:
    """Prepares an image in a process that gets every signal that a terminal or a scheduler sends to the whole group."""

    def __call__(self, image: Tensor, rng: np.random.Generator, index: int) -> Tensor:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        time.sleep(0.05)
        return image


def test_workers_leave_signals_to_the_main_process(tmp_path: Path) -> None:
    images = TrainingImages(make_images(tmp_path / "set", 4), 0, SignalSelf())
    (item,) = image_loader(images, order(4, 4, 4, total=1), torch.stack, 1, TIMEOUT_S)
    assert sorted(item.batch[:, 0, 0, 0].tolist()) == [0, 1, 2, 3]


# --- the feed -------------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of_log() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("rcmae")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def feed_of(source: ImageSource, *, max_broken: float, total: int = 10, num_workers: int = 0, **state: dict) -> Feed:
    images = TrainingImages(source, 0, PREPARE)
    loader = image_loader(images, order(len(source), 4, 2, total=total), collate, num_workers, TIMEOUT_S)
    return Feed(loader, 2, max_broken, **state)


def test_a_feed_gives_global_batches_in_order(tmp_path: Path) -> None:
    source = make_images(tmp_path / "set", 9)
    feed = feed_of(source, max_broken=0)
    expected = [[index for _, index in micro] for micro in order(9, 4, 2, total=10)]
    for step in range(10):
        batches = feed.take()
        assert [numbers(batch) for batch in batches] == expected[step * 2 : step * 2 + 2]
    assert feed.wait_s > 0 and feed.broken == {}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_broken_file_is_counted_and_logged_once(
    tmp_path: Path, warnings_of_log: list[str], num_workers: int
) -> None:
    source = make_images(tmp_path / "set", 8, broken=(2, 5))
    feed = feed_of(source, max_broken=2, num_workers=num_workers)  # five epochs
    for _ in range(10):
        assert all(set(numbers(batch)) <= {0, 1, 3, 4, 6, 7} for batch in feed.take())
    text = "not an image, or of an unknown format"
    assert feed.broken == {"0/02.png": text, "1/05.png": text}
    assert sorted(warnings_of_log) == [f"replaced 0/02.png: {text}", f"replaced 1/05.png: {text}"]


def test_broken_files_of_a_checkpoint_count_but_are_not_logged_again(
    tmp_path: Path, warnings_of_log: list[str]
) -> None:
    source = make_images(tmp_path / "set", 8, broken=(2,))
    feed = feed_of(source, max_broken=2, broken={"0/02.png": "as before", "gone.png": "as before"})
    for _ in range(2):
        feed.take()
    assert feed.broken == {"0/02.png": "as before", "gone.png": "as before"}
    assert warnings_of_log == []


def test_too_many_broken_files_end_the_run(tmp_path: Path) -> None:
    source = make_images(tmp_path / "set", 8, broken=(2, 5, 6))
    feed = feed_of(source, max_broken=2.5)
    with pytest.raises(
        DataError, match=r"^3 broken images, more than loader.max_broken_share allows \(2.5\); the last: "
    ) as caught:
        for _ in range(10):
            feed.take()
    assert "not an image" in str(caught.value) and "\n" not in str(caught.value)
    assert len(feed.broken) == 3


def test_a_feed_remembers_the_shard_of_each_worker() -> None:
    items = [Loaded(None, (), shard) for shard in (4, 5, 4, 7, 6, 7)]
    feed = Feed(items, 1, 0, shards=[4, 4])  # type: ignore[arg-type]
    seen = []
    for _ in items:
        feed.take()
        seen.append(list(feed.shards))
    assert seen == [[4, 4], [4, 5], [4, 5], [4, 7], [6, 7], [6, 7]]


# --- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corner:
    """An evaluation transform that keeps the first pixel."""

    def __call__(self, image: Tensor) -> Tensor:
        return image[:, :1, :1]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_images", "num_batches"), [(11, 3), (8, 2), (1, 1)])
def test_an_evaluation_counts_every_image_once(
    tmp_path: Path, num_workers: int, num_images: int, num_batches: int
) -> None:
    source = make_images(tmp_path / "set", num_images)
    batches = list(eval_loader(EvalImages(source, Corner()), 4, num_workers, TIMEOUT_S, Processes()))
    assert len(batches) == num_batches
    assert all(batch.images.shape == (4, 3, 1, 1) and batch.images.dtype == torch.uint8 for batch in batches)
    images, labels, valid = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert valid.tolist() == [True] * num_images + [False] * (num_batches * 4 - num_images)
    assert images[valid][:, 0, 0, 0].tolist() == list(range(num_images))
    assert labels[valid].tolist() == [number % 2 for number in range(num_images)]


def test_without_classes_every_label_is_minus_one(tmp_path: Path) -> None:
    source = make_images(tmp_path / "set", 1)
    Image.new("L", (3, 3), 9).save(tmp_path / "set" / "top.png")
    source = open_images(str(tmp_path / "set"), tmp_path / "cache")
    (batch,) = eval_loader(EvalImages(source, Corner(), channels=1), 2, 0, TIMEOUT_S, Processes())
    assert batch.labels.tolist() == [-1, -1]
    assert batch.images.flatten().tolist() == [0, 9]


def fault_of(loader: Iterable[Any]) -> str:
    """What reading a loader to its end says. The exception is not kept: it would keep the loader and its workers."""
    try:
        with worker_faults():
            list(loader)
    except (DataError, MachineError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the loader was read to its end")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("vanished", [False, True])
def test_an_evaluation_never_skips(tmp_path: Path, num_workers: int, vanished: bool) -> None:
    source = make_images(tmp_path / "set", 5, broken=() if vanished else (3,))
    if vanished:
        (tmp_path / "set" / "1" / "03.png").unlink()
    reason = "cannot be read: No such file or directory" if vanished else "not an image, or of an unknown format"
    expected = f"DataError: {tmp_path}/set: 1/03.png: {reason}; an evaluation counts every image, so mend or remove it"
    assert fault_of(eval_loader(EvalImages(source, Corner()), 2, num_workers, TIMEOUT_S, Processes())) == expected


# --- faults of workers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KillSelf:
    """A transform whose worker is killed, as by the kernel when memory runs out."""

    def __call__(self, image: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return image


@dataclass(frozen=True)
class Sleep:
    """A transform that hangs, as on storage that does not answer."""

    def __call__(self, image: Tensor) -> Tensor:
        time.sleep(30)
        return image


@pytest.mark.parametrize(
    ("transform", "timeout_s", "what"),
    [
        (KillSelf(), 60, "MachineError: a loader worker died"),
        (Sleep(), 1, "timed out after 1 s"),
        (Corner(), 60, "DataError"),
    ],
)
def test_a_worker_that_dies_or_hangs_or_fails_is_one_line_and_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transform: Callable[[Tensor], Tensor], timeout_s: int, what: str
) -> None:
    monkeypatch.setattr(
        torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2
    )  # torch's wait before it ends a worker
    source = make_images(tmp_path / "set", 4, broken=(2,))
    gc.disable()  # a worker must not live until a cycle of references happens to be found
    try:
        before = set(multiprocessing.active_children())
        text = fault_of(eval_loader(EvalImages(source, transform), 2, 1, timeout_s, Processes()))
        assert what in text and "\n" not in text
        assert not set(multiprocessing.active_children()) - before
    finally:
        gc.enable()


def test_other_errors_pass_as_they_are() -> None:
    for error in (RuntimeError("a fault of ours"), DataError("one line of ours"), KeyError("x")):
        with pytest.raises(type(error)) as caught, worker_faults():
            raise error
        assert str(caught.value) == str(error)


def test_an_error_in_a_worker_is_the_same_line_as_without_one(tmp_path: Path) -> None:
    images = TrainingImages(make_images(tmp_path / "set", 4, broken=(0, 1, 2, 3)), 0, AsTensor())
    loaders = (image_loader(images, order(4, 2, 2), torch.stack, num_workers, TIMEOUT_S) for num_workers in (0, 1))
    without, within = map(fault_of, loaders)
    assert without == within and "\n" not in without
