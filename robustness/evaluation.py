"""One pass of a model over the images of a set, corrupted or not: what it answers, and the figures of that."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.datasets import ImageSource
from core.distributed import Processes
from core.loader import EvalImages, eval_loader
from robustness.imagenet_sets import Decoded
from robustness.scores import aurra, mad_calibration_error, rms_calibration_error, soft_f1

Score = Callable[[Tensor], Tensor]  # uint8 [B, 3, H, W] at the model's input -> float32 [B, K] or [B, D]
Corrupt = Callable[[Tensor, Sequence[int]], Tensor]  # uint8 [B, 3, h, w], an id per image -> the same shape
Transform = Callable[[Tensor], Tensor]  # uint8 [3, h, w] -> uint8 [3, *]


@dataclass(frozen=True)
class Reading:
    """How images are read."""

    batch_size: int
    num_workers: int
    timeout_s: int
    max_pixels: int
    keep_bytes: int  # decoded images of a set stay in memory where they take no more


@dataclass
class Images:
    """The images of a set, read as often as asked for; decoded once where they fit into memory.

    Attributes:
        ids: [N] place of each image in the whole set: what its draws depend on.
        transform: what is done to each in the loader's workers; `Decoded` leaves images of many sizes.
    """

    source: ImageSource
    ids: np.ndarray
    transform: Transform
    reading: Reading
    _kept: list[Tensor] | None = field(default=None, init=False)

    def batches(self) -> Iterator[tuple[list[Tensor], list[int]]]:
        """Yield uint8 images [3, h, w] and their ids, `batch_size` at a time, in order.

        Raises: DataError naming a broken image.
        """
        start = 0
        for images in self._from_memory() if self._kept is not None else self._from_disk():
            yield images, self.ids[start : start + len(images)].tolist()
            start += len(images)

    def _from_memory(self) -> Iterator[list[Tensor]]:
        assert self._kept is not None, "asked by batches() alone"
        for start in range(0, len(self._kept), self.reading.batch_size):
            yield self._kept[start : start + self.reading.batch_size]

    def _from_disk(self) -> Iterator[list[Tensor]]:
        kept: list[Tensor] | None = []
        size_bytes = 0
        for images in self._decoded():
            size_bytes += sum(image.nbytes for image in images)
            if kept is not None and size_bytes <= self.reading.keep_bytes:
                kept += [image.clone() for image in images]  # out of the workers' shared memory, a file each
            else:
                kept = None
            yield images
        self._kept = kept

    def _decoded(self) -> Iterator[list[Tensor]]:
        reading = self.reading
        # Images of several sizes cannot be stacked by the loader: one at a time.
        per_batch = 1 if isinstance(self.transform, Decoded) else min(reading.batch_size, len(self.source))
        images = EvalImages(self.source, self.transform, max_pixels=reading.max_pixels)
        ready: list[Tensor] = []
        for batch in eval_loader(images, per_batch, reading.num_workers, reading.timeout_s, Processes()):
            ready += batch.images[batch.valid].unbind()
            if len(ready) >= reading.batch_size:
                yield ready
                ready = []
        if ready:
            yield ready


@dataclass(frozen=True)
class Pass:
    """What happens to the images of a set on their way to the model.

    Attributes:
        corrupt: None for clean images.
        fit: brings each image to the model's input afterwards; may return it as it is.
        beat: called before each batch, to note that this process is alive; may raise to end the pass.
    """

    images: Images
    device: torch.device
    corrupt: Corrupt | None
    fit: Transform
    beat: Callable[[], None]

    @torch.no_grad()
    def __call__(self, answer: Callable[[Tensor], Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
        """Rows of `answer`, a function of model inputs uint8 [B, 3, H, W], by name: each [N, *], in order."""
        rows: dict[str, list[Tensor]] = {}
        for images, ids in self.images.batches():
            self.beat()
            for name, values in answer(self._inputs(images, ids)).items():
                rows.setdefault(name, []).append(values)
        return {name: torch.cat(values).cpu().numpy() for name, values in rows.items()}

    def _inputs(self, images: list[Tensor], ids: list[int]) -> Tensor:
        if self.corrupt is not None:
            images = corrupted(images, ids, self.corrupt, self.device)
        return torch.stack([self.fit(image) for image in images]).to(self.device)  # [B, 3, H, W]


def corrupted(images: Sequence[Tensor], ids: Sequence[int], corrupt: Corrupt, device: torch.device) -> list[Tensor]:
    """Images uint8 [3, h, w] corrupted on the device, those of one size together; what comes out is as long and there.

    Args:
        ids: one per image, what its draws depend on.
    """
    by_size: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(place)
    done: dict[int, Tensor] = {}
    for places in by_size.values():
        batch = torch.stack([images[place] for place in places]).to(device)  # [b, 3, h, w]
        done |= zip(places, corrupt(batch, [ids[place] for place in places]).unbind(), strict=True)
    return [done[place] for place in range(len(images))]


# --- figures --------------------------------------------------------------------------------------------------------


def class_answers(score: Score, masks: Mapping[str, np.ndarray]) -> Callable[[Tensor], dict[str, Tensor]]:
    """An `answer` of a classifier: its first five classes, and for each mask what it says among those columns.

    Args:
        masks: int64 [M] columns by name. The confidence is that of a softmax over these alone.
    """

    def answer(images: Tensor) -> dict[str, Tensor]:
        logits = score(images)  # [B, K]
        rows = {"top5": logits.argsort(dim=1, descending=True, stable=True)[:, :5]}  # equal ones by column
        for name, mask in masks.items():
            columns = torch.from_numpy(mask).to(logits.device)
            among = logits[:, columns]  # [B, M]
            rows[f"{name}/prediction"] = columns[among.argsort(dim=1, descending=True, stable=True)[:, 0]]
            rows[f"{name}/confidence"] = among.softmax(dim=1).amax(dim=1)
        return rows

    return answer


def accuracy_figures(rows: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Top-1, and top-5 where there are more than five classes, in percent."""
    hits = rows["top5"] == labels[:, None]  # [N, 5]
    figures = {"top1_pct": pct(hits[:, 0]), "error_pct": 100 - pct(hits[:, 0])}
    return figures | ({"top5_pct": pct(hits.any(axis=1))} if hits.shape[1] == 5 else {})


def masked_figures(rows: Mapping[str, np.ndarray], labels: np.ndarray, mask: str) -> dict[str, float]:
    """Accuracy among the columns of a mask and without it, calibration and AURRA among them, in percent.

    The official calibration error is left out where it is not defined, below 200 images.
    """
    correct, confidence = rows[f"{mask}/prediction"] == labels, rows[f"{mask}/confidence"]
    figures = {
        "top1_pct": pct(correct),
        "unmasked_top1_pct": pct(rows["top5"][:, 0] == labels),
        "rms_calibration_pct": 100 * rms_calibration_error(confidence, correct, official=False),
        "mad_calibration_pct": 100 * mad_calibration_error(confidence, correct, official=False),
        "aurra_pct": 100 * aurra(confidence, correct),
        "soft_f1_pct": 100 * soft_f1(confidence, correct),
    }
    if len(correct) >= 200:
        for name, error in (("rms", rms_calibration_error), ("mad", mad_calibration_error)):
            figures[f"{name}_calibration_official_pct"] = 100 * error(confidence, correct, official=True)
    return figures


def real_figures(rows: Mapping[str, np.ndarray], targets: np.ndarray) -> dict[str, float]:
    """ReaL accuracy: the share of images, of those with labels, whose first class is one of them.

    Args:
        targets: int64 [N, M] columns, -1 where there are fewer.
    """
    counted = targets[:, 0] >= 0
    hits = (targets == rows["top5"][:, :1]).any(axis=1)
    return {"real_top1_pct": pct(hits[counted]), "real_images": float(counted.sum())}


def cosine_figures(clean: np.ndarray, corrupted: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over images of the cosine between features [N, D] of clean and corrupted ones."""
    cosines = F.cosine_similarity(torch.from_numpy(clean).double(), torch.from_numpy(corrupted).double(), dim=1)
    return {"cosine": cosines.mean().item(), "cosine_std": cosines.std(correction=0).item()}


def pct(hits: np.ndarray) -> float:
    """Percent of True."""
    return 100 * float(np.mean(hits))
