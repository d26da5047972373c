"""`rcmae predict`: a detector on any folder of photographs; COCO-result JSON, and pictures of what was found."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torchvision.io import encode_jpeg

from core.datasets import ImageSource, open_images
from core.engine import autocast
from core.errors import ConfigError, DataError, shown
from core.files import replace_file
from core.images import MAX_PIXELS, BadImage
from core.loader import read_image
from core.log import console_logging
from core.machine import choose_device
from transfer.detection.coco_eval import detection_rows
from transfer.detection.data import normalized_images, padded
from transfer.detection.detector import LoadedDetector, load_detector
from transfer.detection.draw import draw_detections
from transfer.detection.inference import Detections
from transfer.detection.jitter import eval_size, resize_to_fit

logger = logging.getLogger("rcmae")


def predict(
    model: Path, images: Path, out: Path, min_score: float, device_name: str, precision: str, cache: Path
) -> None:
    """Detect in every image of a folder, tar or single file, and write into `out`.

    detections.json: COCO results, from the detector's own score threshold on. images.json: ids of images and
    categories. pictures/: each photograph with what was found from `min_score` on. A broken image is left out, by name.

    Raises: ConfigError where `out` holds something; CheckpointError, DataError.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{shown(out)}: not empty; give another --out")
    with console_logging():
        loaded = load_detector(model)
        device = choose_device(device_name)
        loaded.model.to(device)
        source = _open(images, cache)
        results: list[dict[str, Any]] = []
        entries: list[dict[str, Any]] = []
        for index in track(range(len(source)), "detecting"):
            try:
                image = read_image(source, index, 3, MAX_PIXELS)
            except BadImage as error:
                logger.warning("left out %s: %s", source.name(index), error)
                continue
            found = _detect(loaded, image, device, precision)
            entries.append(_entry(index, source, image))
            results += _results(index, found, loaded)
            picture = draw_detections(image, found, loaded.names, min_score)
            target = out / "pictures" / f"{index:06d}_{_safe(source.name(index))}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, encode_jpeg(picture.contiguous(), quality=92).numpy().tobytes())
        if not entries:
            raise DataError(f"{shown(images)}: no image in it could be read")
        categories = [{"id": id_, "name": name} for id_, name in zip(loaded.category_ids, loaded.names, strict=True)]
        replace_file(out / "detections.json", json.dumps(results).encode())
        replace_file(out / "images.json", json.dumps({"images": entries, "categories": categories}, indent=1).encode())
        shown_ones = sum(result["score"] >= min_score for result in results)
        logger.info(
            "%d images, %d detections, %d of them from score %g on drawn; %s",
            len(entries), len(results), shown_ones, min_score, shown(out / "pictures"),
        )  # fmt: skip


def _open(images: Path, cache: Path) -> ImageSource:
    if not images.is_file() or images.suffix.lower() in {".tar", ".tgz", ".gz"}:
        return open_images(str(images), cache)
    whole = open_images(str(images.parent), cache)
    names = [whole.names[index].decode("utf-8", "surrogateescape") for index in range(len(whole))]
    chosen = [index for index, name in enumerate(names) if name == images.name]
    if not chosen:
        raise DataError(f"{shown(images)}: no image by its ending; expected a photograph or a folder of them")
    return whole.subset(torch.tensor(chosen).numpy())


@torch.no_grad()
def _detect(loaded: LoadedDetector, image: Tensor, device: torch.device, precision: str) -> Detections:
    original = (image.shape[1], image.shape[2])
    square = padded(resize_to_fit(image, loaded.side), loaded.side).unsqueeze(0).to(device)  # [1, 3, S, S]
    sizes = torch.tensor([eval_size(original, loaded.side)], device=device)
    with autocast(device, precision):
        (found,) = loaded.model.detect(normalized_images(square, sizes, torch.float32), sizes, [original])
    return found


def _entry(index: int, source: ImageSource, image: Tensor) -> dict[str, Any]:
    return {"id": index, "file_name": source.name(index), "height": image.shape[1], "width": image.shape[2]}


def _results(index: int, found: Detections, loaded: LoadedDetector) -> list[dict[str, Any]]:
    return [
        {
            "image_id": index,
            "category_id": loaded.category_ids[row.label],
            "bbox": list(row.xywh),
            "score": row.score,
            "segmentation": {"size": list(found.size), "counts": row.mask},
        }
        for row in detection_rows(index, found)
    ]


def _safe(name: str) -> str:
    """A file name of a name that may hold folders and anything else."""
    stem = Path(name).stem
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:80]
